//! A cluster as its users see it: nodes join, jobs train to the end, are followed, left, cancelled.

use anyhow::{Context, Result, ensure};
use arcface_tests::{
    Cluster, Finished, JobFile, Options, Process,
    wait::{self, Seen},
    write_identities,
};
use nix::sys::signal::Signal;
use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

/// For a tiny job on a machine that is busy with other things.
const TRAINED: Duration = Duration::from_secs(180);
const SOON: Duration = Duration::from_secs(60);

#[test]
fn nodes_join_and_a_lost_one_is_noticed() -> Result<()> {
    Cluster::run(Options::default(), |cluster| {
        let nodes = cluster.wait_for_nodes(2)?;
        for node in nodes.as_array().context("a list")? {
            ensure!(node["slots"] == 1, "one slot was asked for: {node}");
            ensure!(
                node["id"].as_str().is_some_and(|id| !id.is_empty()),
                "no id: {node}"
            );
            ensure!(node["address"].is_string(), "no address: {node}");
            ensure!(
                node["ranks"].as_array().is_some_and(Vec::is_empty),
                "a rank without a job: {node}"
            );
        }
        cluster.kill_worker()?;
        cluster.wait_for_nodes(1)?;
        Ok(())
    })
}

#[test]
fn a_job_trains_to_the_end_and_leaves_its_outputs() -> Result<()> {
    Cluster::run(Options::default(), |cluster| {
        let file = JobFile::tiny("whole").write(cluster.scratch())?;
        let followed = cluster
            .cli(&["submit", "--follow", &file.to_string_lossy()], TRAINED)?
            .expect(0)?;
        let jobs = cluster.json(&["jobs"])?;
        let id = jobs[0]["id"].as_str().context("a job is listed")?.to_owned();
        let job = cluster.job(&id)?;
        ensure!(job["state"] == "succeeded", "{job}\n{followed:?}");
        ensure!(job["world_size"] == 2 && job["generation"] == 1, "{job}");
        // 64 images in global batches of 16, twice.
        ensure!(job["step"] == 8 && job["total_steps"] == 8, "{job}");
        ensure!(
            job["loss"]
                .as_f64()
                .is_some_and(|loss| loss.is_finite() && loss > 0.0),
            "no loss: {job}"
        );
        let output = cluster.scratch().join("out/whole");
        ensure!(
            fs::metadata(output.join("model.safetensors"))?.len() > 1000,
            "the model is too small"
        );
        let log = fs::read_to_string(output.join("training.log")).context("training.log")?;
        ensure!(
            log.lines().count() >= 8,
            "a line for each step was asked for:\n{log}"
        );
        let checkpoints = cluster.json(&["checkpoints", &id])?;
        ensure!(checkpoints[0]["step"] == 8, "newest checkpoint: {checkpoints}");
        // Ranks end with their job.
        wait::until("the ranks' end", SOON, || {
            let living = cluster.living();
            Ok(if living.len() == 3 {
                Seen::Yes(())
            } else {
                Seen::NotYet(format!("processes {living:?}"))
            })
        })
    })
}

#[test]
fn a_job_reads_records_and_is_evaluated_on_others() -> Result<()> {
    Cluster::run(Options::default(), |cluster| {
        write_identities(cluster.scratch(), "faces", 8, 8, 20)?;
        let job = JobFile {
            rec: "faces".into(),
            more: "[eval]\nverbose = 0\nval_targets = [\"synth\"]".into(),
            ..JobFile::tiny("evaluated")
        };
        let id = cluster.submit(&job)?;
        let job = cluster.wait_for_state(&id, "succeeded", TRAINED)?;
        let evaluations = cluster.json(&["evals", &id])?;
        let last = evaluations
            .as_array()
            .and_then(|list| list.last())
            .context("an evaluation")?;
        ensure!(
            last["dataset"] == "synth" && last["pairs"] == 20 && last["step"] == 8,
            "{last}"
        );
        ensure!(
            last["accuracy"]
                .as_f64()
                .is_some_and(|accuracy| (0.0..=1.0).contains(&accuracy)),
            "{last}"
        );
        ensure!(job["evaluations"] == evaluations, "job and evals agree: {job}");
        Ok(())
    })
}

#[test]
fn a_job_that_gets_no_better_ends_early_and_says_why() -> Result<()> {
    Cluster::run(Options::default(), |cluster| {
        write_identities(cluster.scratch(), "faces", 8, 8, 20)?;
        let more = [
            "[eval]",
            "verbose = 1",
            "background = false",
            "val_targets = [\"synth\"]",
            "best = \"mean\"",
            "early_stop_patience = 1",
            "early_stop_min_delta = 2.0",
        ];
        let file = JobFile {
            rec: "faces".into(),
            more: more.join("\n"),
            ..JobFile::tiny("enough")
        };
        let file = file.write(cluster.scratch())?;
        let followed = cluster
            .cli(&["submit", "--follow", &file.to_string_lossy()], TRAINED)?
            .expect(0)?;
        let jobs = cluster.json(&["jobs"])?;
        let id = jobs[0]["id"].as_str().context("a job is listed")?.to_owned();
        let job = cluster.job(&id)?;
        // No accuracy rises by 2: the second evaluation is in vain, and the third step hears of it.
        ensure!(
            job["state"] == "succeeded" && job["step"] == 3 && job["total_steps"] == 8,
            "{job}"
        );
        let reason = job["reason"].as_str().unwrap_or_default();
        ensure!(
            reason.starts_with("stopped early: mean.accuracy has not risen by more than 2"),
            "{job}"
        );
        ensure!(followed.stderr.contains(reason), "it is not told: {followed:?}");
        let checkpoints = cluster.json(&["checkpoints", &id])?;
        ensure!(checkpoints[0]["step"] == 3, "newest checkpoint: {checkpoints}");
        let output = cluster.scratch().join("out/enough");
        for file in ["model.safetensors", "best.safetensors", "best.json"] {
            ensure!(output.join(file).is_file(), "no {file}");
        }
        Ok(())
    })
}

#[test]
fn two_jobs_share_the_cluster_one_after_the_other() -> Result<()> {
    Cluster::run(Options::default(), |cluster| {
        let first = cluster.submit(&JobFile::tiny("first"))?;
        let second = cluster.submit(&JobFile::tiny("second"))?;
        let job = cluster.job(&second)?;
        ensure!(
            job["state"] == "queued" && job["reason"].as_str().is_some_and(|reason| !reason.is_empty()),
            "both slots are taken, it should say what it waits for: {job}"
        );
        cluster.wait_for_state(&first, "succeeded", TRAINED)?;
        cluster.wait_for_state(&second, "succeeded", TRAINED)?;
        Ok(())
    })
}

#[test]
fn ctrl_c_detaches_watch_attaches_and_cancel_ends() -> Result<()> {
    Cluster::run(Options::default(), |cluster| {
        let file = JobFile::tiny("endless")
            .epochs(100_000)
            .write(cluster.scratch())?;
        let logs = cluster.scratch().join("clients");
        let follow = cluster.client(&["submit", "--follow", &file.to_string_lossy()])?;
        let mut follower = Process::start("follower", &logs, follow)?;
        let id = wait::until("the job to be listed", SOON, || {
            let jobs = cluster.json(&["jobs"])?;
            Ok(match jobs[0]["id"].as_str() {
                Some(id) => Seen::Yes(id.to_owned()),
                None => Seen::NotYet(jobs.to_string()),
            })
        })?;
        cluster.wait_for_job(&id, "to train", TRAINED, |job| job["step"].as_u64() > Some(0))?;

        follower.signal(Signal::SIGINT)?;
        let status = follower.wait(SOON)?;
        ensure!(
            status.code() == Some(130),
            "detaching ended with {status}: {}",
            follower.output()
        );
        ensure!(
            cluster.job(&id)?["state"] == "running",
            "the job goes on without its follower"
        );

        let watch = cluster.client(&["watch", &id, "--output", "json"])?;
        let mut watcher = Process::start("watcher", &logs, watch)?;
        wait::until("the watcher to see metrics", SOON, || {
            let seen = watcher.output();
            Ok(if seen.contains("\"metrics\"") {
                Seen::Yes(())
            } else {
                Seen::NotYet(seen)
            })
        })?;
        cluster
            .cli(&["cancel", &id, "--reason", "seen enough"], SOON)?
            .expect(0)?;
        let job = cluster.wait_for_state(&id, "cancelled", SOON)?;
        ensure!(
            job["reason"].as_str().is_some_and(|r| r.contains("seen enough")),
            "{job}"
        );
        let status = watcher.wait(SOON)?;
        ensure!(
            status.code() == Some(1),
            "a cancelled job is no success: {status}"
        );
        // A second cancel changes nothing and is no error.
        cluster.cli(&["cancel", &id], SOON)?.expect(0)?;
        wait::until("the ranks' end", SOON, || {
            let ranks = cluster.rank_pids(&id)?;
            Ok(if ranks.is_empty() {
                Seen::Yes(())
            } else {
                Seen::NotYet(format!("{ranks:?}"))
            })
        })
    })
}

#[test]
fn submitting_twice_with_one_request_id_gives_one_job() -> Result<()> {
    let nobody = Options { workers: 0, slots: 1 };
    Cluster::run(nobody, |cluster| {
        let file = JobFile::tiny("once").write(cluster.scratch())?;
        let submit = ["submit", &file.to_string_lossy(), "--request-id", "same"];
        let first = cluster.json(&submit)?;
        let again = cluster.json(&submit)?;
        ensure!(first["id"] == again["id"], "{first}\n{again}");
        let jobs = cluster.json(&["jobs"])?;
        ensure!(jobs.as_array().is_some_and(|jobs| jobs.len() == 1), "{jobs}");
        // Queued for want of nodes, it can be cancelled.
        let id = first["id"].as_str().context("an id")?.to_owned();
        cluster.cli(&["cancel", &id], SOON)?.expect(0)?;
        cluster.wait_for_state(&id, "cancelled", SOON)?;
        Ok(())
    })
}

#[test]
fn metrics_are_served_in_prometheus_form() -> Result<()> {
    Cluster::run(Options::default(), |cluster| {
        let id = cluster.submit(&JobFile::tiny("measured"))?;
        cluster.wait_for_state(&id, "succeeded", TRAINED)?;
        let text = http_get(&cluster.metrics_address()?, "/metrics")?;
        for name in [
            "arcface_build_info",
            "arcface_coordinator_nodes",
            "arcface_train_steps_total",
        ] {
            ensure!(
                text.contains(&format!("# TYPE {name} ")),
                "{name} is missing:\n{text}"
            );
        }
        let steps = text
            .lines()
            .find(|line| line.starts_with("arcface_train_steps_total{"))
            .and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
        ensure!(
            steps == Some(8.0),
            "8 steps were trained, /metrics says {steps:?}"
        );
        Ok(())
    })
}

fn http_get(address: &str, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect(address).with_context(|| format!("connect to {address}"))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    Ok(answer)
}

#[test]
fn a_standalone_run_starts_and_stops_everything_itself() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let file = JobFile::tiny("standalone").write(scratch.path())?;
    let mut command = arcface_tests::command("arcface-coordinator", scratch.path())?;
    command
        .arg("run")
        .arg(&file)
        .args(["--nodes", "2", "--slots", "1"]);
    Finished::of(command, TRAINED)?.expect(0)?;
    for (odd, words) in [
        (["--device", "cuda"], "share its GPUs"),
        (["--worker-metrics", "127.0.0.1:65535"], "no ports for 2 workers"),
        (["--worker-metrics", "127.0.0.1:0"], "no ports for 2 workers"),
    ] {
        let mut command = arcface_tests::command("arcface-coordinator", scratch.path())?;
        command.arg("run").arg(&file).args(odd);
        let refused = Finished::of(command, TRAINED)?.expect(2)?;
        ensure!(refused.stderr.contains(words), "{}", refused.stderr);
    }
    ensure!(
        scratch.path().join("out/standalone/model.safetensors").is_file(),
        "run left no model"
    );
    let left = arcface_tests::living_in(scratch.path());
    ensure!(left.is_empty(), "run left processes behind: {left:?}");
    Ok(())
}

/// Nobody is left to end what it started: the kernel does.
#[test]
fn a_standalone_run_that_is_killed_leaves_no_process_and_its_ranks_logs() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let file = JobFile::tiny("killed").epochs(10_000).write(scratch.path())?;
    let mut command = arcface_tests::command("arcface-coordinator", scratch.path())?;
    command
        .arg("run")
        .arg(&file)
        .args(["--nodes", "2", "--slots", "1"]);
    let mut run = Process::start("run", &scratch.path().join("logs"), command)?;
    let logs = ["rank-0.log", "rank-1.log"].map(|name| scratch.path().join("out/killed").join(name));
    wait::until("both ranks to log", TRAINED, || {
        let texts = logs
            .each_ref()
            .map(|log| fs::read_to_string(log).unwrap_or_default());
        Ok(match texts.iter().all(|text| text.contains(" INFO ")) {
            true => Seen::Yes(()),
            false => Seen::NotYet(format!("{texts:?}\n{}", run.output())),
        })
    })?;
    ensure!(
        arcface_tests::living_in(scratch.path()).len() == 5,
        "a coordinator, two agents, two ranks"
    );
    run.signal(Signal::SIGKILL)?;
    run.wait(SOON)?;
    wait::until("agents and ranks to end", SOON, || {
        let living = arcface_tests::living_in(scratch.path());
        Ok(match living.is_empty() {
            true => Seen::Yes(()),
            false => Seen::NotYet(format!("processes {living:?}")),
        })
    })
}

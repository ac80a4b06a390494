//! What a user is told when something is wrong: one line that names it, a hint, the exit code of the contract.

use anyhow::{Result, ensure};
use arcface_tests::{Cluster, Finished, Options, command};
use std::{
    fs,
    net::{Ipv4Addr, TcpListener},
    path::Path,
    time::Duration,
};

const SOON: Duration = Duration::from_secs(20);

fn coordinator(scratch: &Path, arguments: &[&str]) -> Result<Finished> {
    let mut command = command("arcface-coordinator", scratch)?;
    command.args(arguments);
    Finished::of(command, SOON)
}

/// Standard error says these things, in lines that begin with `error:` or `hint:`, and there was no panic.
fn complains(finished: &Finished, about: &[&str]) -> Result<()> {
    for text in about {
        ensure!(
            finished.stderr.contains(text),
            "{text:?} was expected in {finished:?}"
        );
    }
    for line in finished.stderr.lines() {
        ensure!(
            line.starts_with("error: ") || line.starts_with("hint: "),
            "neither an error nor a hint: {line:?}\n{finished:?}"
        );
    }
    ensure!(
        finished.stdout.is_empty(),
        "standard output is for data: {finished:?}"
    );
    Ok(())
}

#[test]
fn a_bad_job_file_lists_every_bad_field() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let file = scratch.path().join("bad.toml");
    fs::write(
        &file,
        "output = \"x\"\n\
         [model]\nnetwrok = \"r50\"\n\
         [head]\nsample_rate = 1.5\n\
         [data]\nrec = \"/data\"\n\
         [train]\nbatch_size = 0\noptimizer = \"sdg\"\n",
    )?;
    let finished = coordinator(scratch.path(), &["submit", &file.to_string_lossy()])?.expect(2)?;
    complains(
        &finished,
        &[
            "bad.toml",
            "model.netwrok",
            "did you mean",
            "head.sample_rate: 1.5 is not in (0, 1]",
            "train.batch_size",
            "train.optimizer",
            "hint: ",
        ],
    )
}

/// The libraries that read these panicked, or ended the process without a word of ours.
#[test]
fn an_absurd_number_of_threads_is_code_2() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    for (variable, value) in [
        ("RAYON_NUM_THREADS", "100000"),
        ("OMP_NUM_THREADS", "100000"),
        ("OMP_NUM_THREADS", "100000,2"),
    ] {
        let mut command = command("arcface-worker", scratch.path())?;
        command.args(["data", "inspect", "nowhere"]).env(variable, value);
        let finished = Finished::of(command, SOON)?.expect(2)?;
        let expected = format!("error: {variable}: 100000 threads are more than 4096");
        complains(&finished, &[&expected, "hint: unset it"])?;
    }
    Ok(())
}

#[test]
fn an_unreachable_coordinator_is_code_4() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    // Bound and dropped: nobody listens there.
    let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?
        .local_addr()?
        .to_string();
    let finished = coordinator(scratch.path(), &["jobs", "--coordinator", &address])?.expect(4)?;
    complains(&finished, &[&address, "hint: "])
}

#[test]
fn a_missing_job_file_and_an_unknown_job_are_code_3() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let finished = coordinator(scratch.path(), &["submit", "nowhere.toml"])?.expect(3)?;
    complains(&finished, &["nowhere.toml"])?;
    let nobody = Options { workers: 0, slots: 1 };
    Cluster::run(nobody, |cluster| {
        for command in ["job", "watch", "cancel", "evals", "checkpoints"] {
            let finished = cluster.cli(&[command, "job-000000000000"], SOON)?.expect(3)?;
            complains(&finished, &["job-000000000000"])?;
        }
        Ok(())
    })
}

#[test]
fn a_port_or_a_store_in_use_is_said() -> Result<()> {
    let nobody = Options { workers: 0, slots: 1 };
    Cluster::run(nobody, |cluster| {
        let serve = |listen: &str, store: &str| {
            let store = format!("embedded:{}", cluster.scratch().join(store).display());
            coordinator(
                cluster.scratch(),
                &[
                    "serve",
                    "--listen",
                    listen,
                    "--metrics",
                    "127.0.0.1:0",
                    "--store",
                    &store,
                ],
            )
        };
        let finished = serve(cluster.address(), "another")?.expect(4)?;
        ensure!(
            finished.stderr.contains(cluster.address()) && finished.stderr.contains("in use"),
            "{finished:?}"
        );
        let finished = serve("127.0.0.1:0", "store")?;
        ensure!(
            finished.code != 0 && finished.stderr.contains("store"),
            "{finished:?}"
        );
        ensure!(!finished.stderr.contains("panicked"), "{finished:?}");
        Ok(())
    })
}

#[test]
fn unknown_options_are_code_2_and_help_is_code_0() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    for name in ["arcface-coordinator", "arcface-worker"] {
        let run = |argument: &str| {
            let mut command = command(name, scratch.path())?;
            command.arg(argument);
            Finished::of(command, SOON)
        };
        run("--no-such-option")?.expect(2)?;
        let help = run("--help")?.expect(0)?;
        ensure!(help.stdout.contains("Usage"), "{help:?}");
        run("--version")?.expect(0)?;
    }
    Ok(())
}

#[test]
fn a_worker_whose_coordinator_is_away_keeps_trying() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?
        .local_addr()?
        .to_string();
    let mut command = command("arcface-worker", scratch.path())?;
    command.args(["--join", &address, "--device", "cpu"]);
    let mut worker = arcface_tests::Process::start("worker", scratch.path(), command)?;
    arcface_tests::wait::until("the worker to say whom it cannot reach", SOON, || {
        ensure!(worker.ended()?.is_none(), "it gave up: {}", worker.output());
        let said = worker.output();
        Ok(if said.contains(&address) && said.contains("WARN") {
            arcface_tests::wait::Seen::Yes(())
        } else {
            arcface_tests::wait::Seen::NotYet(said)
        })
    })
}

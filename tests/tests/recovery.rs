//! Things die and training goes on: a rank, a node, the coordinator.

use anyhow::{Context, Result, ensure};
use arcface_tests::{Cluster, JobFile, Options};
use nix::sys::signal::Signal;
use std::time::Duration;

const TRAINED: Duration = Duration::from_secs(240);

/// Long enough to be interrupted, with checkpoints to come back to: 4 steps an epoch.
fn interruptible(name: &str) -> JobFile {
    JobFile {
        checkpoint_steps: 4,
        ..JobFile::tiny(name).epochs(10)
    }
}

#[test]
fn a_killed_rank_costs_a_generation_and_not_the_job() -> Result<()> {
    Cluster::run(Options::default(), |cluster| {
        let id = cluster.submit(&interruptible("killed_rank"))?;
        // After the first committed checkpoint: the next generation must resume, not start over.
        cluster.wait_for_job(&id, "to have a checkpoint", TRAINED, |job| {
            job["checkpoint_step"].as_u64() >= Some(4)
        })?;
        let ranks = cluster.rank_pids(&id)?;
        ensure!(
            ranks.iter().map(|(rank, _)| *rank).eq([0, 1]),
            "ranks 0 and 1 were expected: {ranks:?}"
        );
        cluster.signal(ranks[1].1, Signal::SIGKILL)?;
        let job = cluster.wait_for_state(&id, "succeeded", TRAINED)?;
        ensure!(job["generation"] == 2, "one failure, one more generation: {job}");
        ensure!(job["step"] == 40, "10 epochs of 4 steps: {job}");
        let recovery = &job["recoveries"][0];
        ensure!(
            recovery["reason"]
                .as_str()
                .is_some_and(|reason| reason.contains("rank 1")),
            "the reason names the rank: {job}"
        );
        ensure!(
            recovery["resumed_step"].as_u64() >= Some(4),
            "it resumed from a checkpoint: {job}"
        );
        ensure!(
            recovery["total_s"].as_f64().is_some(),
            "the time it took is known: {job}"
        );
        Ok(())
    })
}

#[test]
fn a_hung_rank_is_named_and_replaced() -> Result<()> {
    Cluster::run(Options::default(), |cluster| {
        let id = cluster.submit(&interruptible("hung_rank"))?;
        cluster.wait_for_job(&id, "to have a checkpoint", TRAINED, |job| {
            job["checkpoint_step"].as_u64() >= Some(4)
        })?;
        let ranks = cluster.rank_pids(&id)?;
        cluster.signal(ranks[1].1, Signal::SIGSTOP)?;
        let job = cluster.wait_for_state(&id, "succeeded", TRAINED)?;
        ensure!(job["generation"] == 2 && job["step"] == 40, "{job}");
        let recovery = &job["recoveries"][0];
        let reason = recovery["reason"].as_str().context("a reason")?;
        ensure!(
            [
                "rank 1 ",
                "hung: no progress for",
                "stopped by a signal",
                " bytes"
            ]
            .iter()
            .all(|words| reason.contains(words)),
            "the reason names the culprit and its last collective operation: {job}"
        );
        ensure!(recovery["kind"] == "hang", "{job}");
        ensure!(
            recovery["detected_s"]
                .as_f64()
                .is_some_and(|s| (5.0..10.0).contains(&s)),
            "after five seconds, within ten: {job}"
        );
        Ok(())
    })
}

#[test]
fn a_damaged_checkpoint_costs_the_steps_to_the_one_before_it() -> Result<()> {
    Cluster::run(Options::default(), |cluster| {
        let id = cluster.submit(&interruptible("damaged"))?;
        cluster.wait_for_job(&id, "to have two checkpoints", TRAINED, |job| {
            job["checkpoint_step"].as_u64() >= Some(8)
        })?;
        // Training stands still, so that the newest stays the newest.
        let ranks = cluster.rank_pids(&id)?;
        for (_, pid) in &ranks {
            cluster.signal(*pid, Signal::SIGSTOP)?;
        }
        let listed = cluster.json(&["checkpoints", &id])?;
        let newest = &listed[0];
        let output = cluster.job(&id)?["output"]
            .as_str()
            .context("an output")?
            .to_owned();
        let directory = newest["directory"].as_str().context("a directory")?;
        let part = newest["parts"][1]["file"].as_str().context("a head part")?;
        let path = cluster.scratch().join(&output).join(directory).join(part);
        let mut bytes = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        std::fs::write(&path, bytes)?;
        cluster.signal(ranks[1].1, Signal::SIGKILL)?;
        let job = cluster.wait_for_state(&id, "succeeded", TRAINED)?;
        ensure!(job["step"] == 40, "{job}");
        let step = newest["step"].as_u64().context("a step")?;
        let recovery = &job["recoveries"][1];
        ensure!(
            recovery["kind"] == "damaged"
                && recovery["reason"]
                    .as_str()
                    .is_some_and(|reason| reason.contains(part) && reason.contains("BLAKE3")),
            "the reason names the part: {job}"
        );
        ensure!(
            recovery["resumed_step"].as_u64() < Some(step),
            "it went further back than step {step}: {job}"
        );
        let listed = cluster.json(&["checkpoints", &id])?;
        let all = listed.as_array().context("a list")?;
        let damaged: Vec<_> = all.iter().filter(|one| !one["damage"].is_null()).collect();
        ensure!(
            damaged.len() == 1 && damaged[0]["step"].as_u64() == Some(step) && path.exists(),
            "it is set aside and stays: {listed}"
        );
        Ok(())
    })
}

#[test]
fn a_worker_that_is_told_to_stop_leaves_a_checkpoint_behind() -> Result<()> {
    Cluster::run(Options::default(), |cluster| {
        // One epoch of 10,000 steps: only its end would make a checkpoint by itself.
        let job = JobFile {
            num_image: 160_000,
            ..JobFile::tiny("stopped_worker").epochs(1)
        };
        let id = cluster.submit(&job)?;
        cluster.wait_for_job(&id, "to train", TRAINED, |job| job["step"].as_u64() >= Some(2))?;
        cluster.stop_worker()?;
        let job = cluster.wait_for_job(&id, "to wait for another node", TRAINED, |job| {
            job["state"] == "recovering"
        })?;
        ensure!(job["recoveries"][0]["kind"] == "drained", "{job}");
        let checkpoint = job["checkpoint_step"].as_u64().context("a checkpoint")?;
        cluster.start_worker()?;
        let job = cluster.wait_for_state(&id, "running", TRAINED)?;
        ensure!(
            job["recoveries"][0]["resumed_step"].as_u64() == Some(checkpoint),
            "it goes on from there: {job}"
        );
        Ok(())
    })
}

#[test]
fn a_killed_node_is_replaced_by_one_that_joins() -> Result<()> {
    Cluster::run(Options::default(), |cluster| {
        let id = cluster.submit(&interruptible("killed_node"))?;
        cluster.wait_for_job(&id, "to have a checkpoint", TRAINED, |job| {
            job["checkpoint_step"].as_u64() >= Some(4)
        })?;
        cluster.kill_worker()?;
        cluster.start_worker()?;
        let job = cluster.wait_for_state(&id, "succeeded", TRAINED)?;
        ensure!(
            job["generation"].as_u64() >= Some(2) && job["step"] == 40,
            "{job}"
        );
        Ok(())
    })
}

#[test]
fn a_killed_coordinator_comes_back_and_the_job_with_it() -> Result<()> {
    Cluster::run(Options::default(), |cluster| {
        let id = cluster.submit(&interruptible("killed_coordinator"))?;
        cluster.wait_for_job(&id, "to train", TRAINED, |job| job["step"].as_u64() >= Some(2))?;
        let before = cluster.rank_pids(&id)?;
        cluster.kill_coordinator()?;
        cluster.start_coordinator()?;
        let job = cluster.wait_for_state(&id, "succeeded", TRAINED)?;
        ensure!(job["step"] == 40, "{job}");
        ensure!(!before.is_empty(), "it trained before");
        ensure!(
            job["generation"] == 1,
            "ranks train on while the coordinator is away, nothing restarts: {job}"
        );
        let checkpoints = cluster.json(&["checkpoints", &id])?;
        ensure!(
            checkpoints[0]["step"] == 40,
            "parts that waited were committed: {checkpoints}"
        );
        Ok(())
    })
}

#[test]
fn what_was_acknowledged_survives_a_killed_coordinator() -> Result<()> {
    let nobody = Options { workers: 0, slots: 1 };
    Cluster::run(nobody, |cluster| {
        let id = cluster.submit(&JobFile::tiny("kept"))?;
        cluster.kill_coordinator()?;
        cluster.start_coordinator()?;
        let job = cluster.job(&id)?;
        ensure!(job["state"] == "queued", "{job}");
        let name = job["name"].as_str().context("a name")?;
        ensure!(name == "kept", "{job}");
        Ok(())
    })
}

#[test]
fn a_job_that_cannot_work_fails_with_its_reason() -> Result<()> {
    Cluster::run(Options::default(), |cluster| {
        let job = JobFile {
            rec: "no/such/folder".into(),
            ..JobFile::tiny("hopeless")
        };
        let id = cluster.submit(&job)?;
        let job = cluster.wait_for_state(&id, "failed", TRAINED)?;
        ensure!(
            job["reason"]
                .as_str()
                .is_some_and(|reason| reason.contains("no/such/folder")),
            "the reason names the folder: {job}"
        );
        Ok(())
    })
}

/// The learning rate makes every loss after the first update infinite, so that no rollback can help.
#[test]
fn a_loss_that_is_not_finite_rolls_the_job_back_three_times_and_then_fails_it() -> Result<()> {
    Cluster::run(Options::default(), |cluster| {
        let job = JobFile {
            lr: 1e30,
            on_nonfinite: "rollback",
            ..JobFile::tiny("diverging")
        };
        let id = cluster.submit(&job)?;
        let job = cluster.wait_for_state(&id, "failed", TRAINED)?;
        let recoveries = job["recoveries"].as_array().context("recoveries")?;
        let left_out: Vec<&str> = recoveries
            .iter()
            .filter_map(|recovery| recovery["reason"].as_str())
            .collect();
        ensure!(left_out.len() == 3, "three rollbacks: {job}");
        for (reason, step) in left_out.iter().zip(1..) {
            ensure!(
                reason.contains(&format!("step {step}: the loss is")),
                "each leaves out one more step: {job}"
            );
        }
        ensure!(
            job["reason"]
                .as_str()
                .is_some_and(|reason| reason.contains("rolled back 3 times before")),
            "the reason tells of the rollbacks: {job}"
        );
        Ok(())
    })
}

//! The number of ranks changes while a job trains.

use anyhow::{Context, Result, ensure};
use arcface_tests::{Cluster, JobFile, Options};
use std::time::Duration;

const TRAINED: Duration = Duration::from_secs(240);

#[test]
fn a_job_shrinks_with_lost_nodes_and_grows_with_new_ones() -> Result<()> {
    let four = Options {
        workers: 4,
        ..Options::default()
    };
    Cluster::run(four, |cluster| {
        let job = JobFile {
            world_size: 4,
            batch_size: 4,
            job: "min_world_size = 2\nelastic = \"both\"\n".into(),
            checkpoint_steps: 4,
            ..JobFile::tiny("elastic").epochs(30)
        };
        let id = cluster.submit(&job)?;
        let reached = |checkpoint: u64| {
            move |job: &serde_json::Value| {
                job["state"] == "running" && job["checkpoint_step"].as_u64() >= Some(checkpoint)
            }
        };
        cluster.wait_for_job(&id, "to train on four", TRAINED, reached(4))?;
        cluster.kill_worker()?;
        cluster.kill_worker()?;
        let job = cluster.wait_for_job(&id, "to train on two", TRAINED, |job| {
            job["state"] == "running" && job["world_size"] == 2
        })?;
        let before = job["checkpoint_step"].as_u64().context("a checkpoint")?;
        cluster.wait_for_job(&id, "to go on", TRAINED, reached(before + 4))?;
        cluster.start_worker()?;
        let job = cluster.wait_for_job(&id, "to train on three", TRAINED, |job| {
            job["state"] == "running" && job["world_size"] == 3
        })?;
        let grown = job["recoveries"]
            .as_array()
            .and_then(|all| all.last())
            .context("a line about the growth")?
            .clone();
        ensure!(
            grown["kind"] == "grown" && grown["reason"] == "grows from 2 to 3 ranks",
            "{job}"
        );
        let job = cluster.wait_for_state(&id, "succeeded", TRAINED)?;
        ensure!(job["step"] == 120, "30 epochs of 4 steps: {job}");
        let grown = &job["recoveries"]
            .as_array()
            .context("recoveries")?
            .last()
            .context("one")?;
        ensure!(grown["lost_steps"] == 0, "it grows at a checkpoint: {job}");
        Ok(())
    })
}

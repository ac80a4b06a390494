//! Networks that swallow packets: nothing is refused and no connection ends by itself. Each worker is in a network namespace
//! of its own (`Network`), and cables are pulled.

use anyhow::{Context, Result, ensure};
use arcface_tests::{Cluster, JobFile, Network, Options};
use serde_json::Value;
use std::{
    io::{BufRead as _, BufReader},
    process::Stdio,
    time::{Duration, Instant},
};

const TRAINED: Duration = Duration::from_secs(240);
/// Detection and recovery of what a pulled cable does, on a machine that may compile beside it.
const LOST_S: f64 = 4.0;
const UNREACHABLE_S: f64 = 10.0;

/// A job that outlives the test: 4 steps an epoch, a checkpoint after each.
fn endless(name: &str, job: &str) -> JobFile {
    JobFile {
        job: job.to_owned(),
        checkpoint_steps: 4,
        ..JobFile::tiny(name).epochs(50_000)
    }
}

fn step(job: &Value) -> u64 {
    job["step"].as_u64().unwrap_or(0)
}

fn recoveries(job: &Value) -> &[Value] {
    job["recoveries"].as_array().map_or(&[], Vec::as_slice)
}

/// Waits until the job runs with so many ranks and has trained on from where it is now.
fn trains(cluster: &mut Cluster, id: &str, world_size: u64) -> Result<Value> {
    let begun = step(&cluster.job(id)?);
    cluster.wait_for_job(id, "to train on", TRAINED, |job| {
        job["state"] == "running" && job["world_size"] == world_size && step(job) >= begun + 6
    })
}

fn recovered(cluster: &mut Cluster, id: &str, index: usize) -> Result<Value> {
    let job = cluster.wait_for_job(id, "to train again", TRAINED, |job| {
        recoveries(job)
            .get(index)
            .is_some_and(|recovery| recovery["total_s"].is_number())
    })?;
    Ok(recoveries(&job)[index].clone())
}

#[test]
fn a_node_whose_cable_is_pulled_is_left_behind_and_taken_back() -> Result<()> {
    Cluster::run_in_network(Options::default(), |cluster| {
        let id = cluster.submit(&endless("cable", "min_world_size = 1\nelastic = \"both\"\n"))?;
        trains(cluster, &id, 2)?;
        cluster.network()?.pull(1)?;
        let recovery = recovered(cluster, &id, 0)?;
        let detected = recovery["detected_s"].as_f64().context("detected")?;
        ensure!(
            recovery["kind"] == "lost" && detected <= LOST_S,
            "lost within {LOST_S} s: {recovery}"
        );
        ensure!(recovery["total_s"].as_f64() <= Some(UNREACHABLE_S), "{recovery}");
        println!("cable pulled: {recovery}");
        trains(cluster, &id, 1)?;
        cluster.network()?.plug(1)?;
        trains(cluster, &id, 2)?;
        Ok(())
    })
}

#[test]
fn ranks_that_do_not_hear_each_other_are_noticed_and_go_on_when_they_do() -> Result<()> {
    Cluster::run_in_network(Options::default(), |cluster| {
        let id = cluster.submit(&endless("apart", ""))?;
        trains(cluster, &id, 2)?;
        let parted = Instant::now();
        cluster.network()?.part(0, 1)?;
        let job = cluster.wait_for_job(&id, "to notice", TRAINED, |job| !recoveries(job).is_empty())?;
        let noticed = parted.elapsed().as_secs_f64();
        ensure!(
            noticed <= UNREACHABLE_S + 2.0,
            "noticed after {noticed:.1} s: {job}"
        );
        println!(
            "ranks parted: noticed after {noticed:.1} s: {}",
            recoveries(&job)[0]
        );
        cluster.network()?.mend(0)?;
        cluster.network()?.mend(1)?;
        trains(cluster, &id, 2)?;
        Ok(())
    })
}

/// Nobody can say that the old generation has ended: no new one begins beside it.
#[test]
fn while_all_nodes_are_silent_nothing_is_started_and_afterwards_the_job_goes_on() -> Result<()> {
    // Longer than a node may be silent (3 s), shorter than an orphan waits (120 s).
    const AWAY: Duration = Duration::from_secs(10);
    Cluster::run_in_network(Options::default(), |cluster| {
        let id = cluster.submit(&endless("away", ""))?;
        let before = trains(cluster, &id, 2)?;
        for worker in [0, 1] {
            cluster.network()?.silence(worker)?;
        }
        let silent = Instant::now();
        let job = cluster.wait_for_job(&id, "to be without its nodes for long", TRAINED, |_| {
            silent.elapsed() >= AWAY
        })?;
        ensure!(
            job["generation"] == before["generation"] && job["state"] == "recovering",
            "waits for its nodes: {job}"
        );
        for worker in [0, 1] {
            cluster.network()?.mend(worker)?;
        }
        trains(cluster, &id, 2)?;
        Ok(())
    })
}

/// Of the harness itself: a process keeps a namespace alive after its removal, and its end of the cable in it.
#[test]
fn what_is_left_of_a_network_is_not_in_the_way_of_the_next_one() -> Result<()> {
    let Some(mut network) = Network::start()? else {
        return Ok(());
    };
    let index = network.add()?;
    let mut stays = network
        .inside(index)
        .args(["sh", "-c", "echo inside; exec cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let output = stays.stdout.take().context("its output")?;
    BufReader::new(output).read_line(&mut String::new())?;
    drop(network);
    let next = Network::start().and_then(|next| next.context("a second network")?.add());
    drop(stays.stdin.take());
    stays.wait()?;
    next.map(drop)
}

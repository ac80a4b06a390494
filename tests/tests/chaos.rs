//! Faults again and again: what they cost, and that they change nothing in the end.
//!
//! Each test makes a few trials; `make chaos` makes many (`ARCFACE_TRIALS`) on a machine that does nothing else, and holds the
//! times against their bars. The faults of a mix are drawn from `ARCFACE_SEED`, which every run prints.

use anyhow::{Context, Result, ensure};
use arcface_tests::{Cluster, JobFile, Options};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::{env, fs, time::Duration};

const TRAINED: Duration = Duration::from_secs(240);
const SOON: Duration = Duration::from_secs(60);

fn number(variable: &str) -> Result<Option<u64>> {
    match env::var(variable) {
        Ok(text) => Ok(Some(
            text.parse().with_context(|| format!("{variable} is a number"))?,
        )),
        Err(_) => Ok(None),
    }
}

/// Trials that were asked for, or 2.
fn trials() -> Result<usize> {
    Ok(number("ARCFACE_TRIALS")?.map_or(2, |trials| trials as usize))
}

/// A job that outlives all trials: 4 steps an epoch, a checkpoint after each.
fn endless(name: &str) -> JobFile {
    JobFile {
        checkpoint_steps: 4,
        ..JobFile::tiny(name).epochs(50_000)
    }
}

fn step(job: &Value) -> u64 {
    job["step"].as_u64().unwrap_or(0)
}

fn committed(job: &Value) -> u64 {
    job["checkpoint_step"].as_u64().unwrap_or(0)
}

fn recoveries(job: &Value) -> &[Value] {
    job["recoveries"].as_array().map_or(&[], Vec::as_slice)
}

/// Waits until the job has committed beyond where it is now.
fn goes_on(cluster: &mut Cluster, id: &str) -> Result<Value> {
    let now = committed(&cluster.job(id)?);
    cluster.wait_for_job(id, "to commit on", TRAINED, |job| {
        job["state"] == "running" && committed(job) > now
    })
}

/// Waits until the job has trained on after its recovery number `index`, and gives that.
fn recovered(cluster: &mut Cluster, id: &str, index: usize) -> Result<Value> {
    let job = cluster.wait_for_job(id, "to train again", TRAINED, |job| {
        recoveries(job)
            .get(index)
            .is_some_and(|recovery| recovery["total_s"].is_number())
    })?;
    Ok(recoveries(&job)[index].clone())
}

/// Seconds of some trials against what they may be at the middle and at the worst.
struct Figures {
    what: &'static str,
    bars: (f64, f64),
    seconds: Vec<f64>,
}

impl Figures {
    fn new(what: &'static str, p50: f64, worst: f64) -> Self {
        Self {
            what,
            bars: (p50, worst),
            seconds: Vec::new(),
        }
    }

    fn add(&mut self, recovery: &Value, field: &str) -> Result<()> {
        let seconds = recovery[field].as_f64();
        self.seconds
            .push(seconds.with_context(|| format!("{field} of {recovery}"))?);
        Ok(())
    }

    /// Prints a line of the table. Times are judged where many trials were asked for: then the machine is quiet.
    fn conclude(mut self) -> Result<()> {
        self.seconds.sort_by(f64::total_cmp);
        let (p50, worst) = (
            self.seconds[self.seconds.len() / 2],
            self.seconds[self.seconds.len() - 1],
        );
        println!(
            "| {} | {} | {p50:.2} s | {worst:.2} s | {} s / {} s |",
            self.what,
            self.seconds.len(),
            self.bars.0,
            self.bars.1
        );
        let judged = number("ARCFACE_TRIALS")?.is_some();
        ensure!(
            !judged || (p50 <= self.bars.0 && worst <= self.bars.1),
            "{}: over its bar",
            self.what
        );
        Ok(())
    }
}

fn cancel(cluster: &mut Cluster, id: &str) -> Result<()> {
    cluster.json(&["cancel", id])?;
    cluster.wait_for_state(id, "cancelled", SOON)?;
    Ok(())
}

#[test]
fn a_killed_rank_costs_seconds() -> Result<()> {
    Cluster::run(Options::default(), |cluster| {
        let id = cluster.submit(&endless("rank"))?;
        let mut detected = Figures::new("rank `kill -9` -> known", 0.5, 1.0);
        let mut back = Figures::new("rank `kill -9` -> first new step", 3.0, 6.0);
        for trial in 0..trials()? {
            goes_on(cluster, &id)?;
            let ranks = cluster.rank_pids(&id)?;
            cluster.signal(ranks[trial % ranks.len()].1, Signal::SIGKILL)?;
            let recovery = recovered(cluster, &id, trial)?;
            ensure!(
                recovery["lost_steps"].as_u64().is_some_and(|lost| lost <= 8),
                "at most to the checkpoint that was being written: {recovery}"
            );
            detected.add(&recovery, "detected_s")?;
            back.add(&recovery, "total_s")?;
        }
        detected.conclude()?;
        back.conclude()?;
        cancel(cluster, &id)
    })
}

#[test]
fn a_hung_rank_costs_seconds_and_is_named() -> Result<()> {
    Cluster::run(Options::default(), |cluster| {
        let id = cluster.submit(&endless("hang"))?;
        let mut detected = Figures::new("hung rank -> detected, culprit named", 10.0, 10.0);
        let mut back = Figures::new("hung rank -> first new step", 14.0, 16.0);
        for trial in 0..trials()? {
            goes_on(cluster, &id)?;
            let ranks = cluster.rank_pids(&id)?;
            let (culprit, pid) = ranks[trial % ranks.len()];
            cluster.signal(pid, Signal::SIGSTOP)?;
            let recovery = recovered(cluster, &id, trial)?;
            let reason = recovery["reason"].as_str().unwrap_or_default();
            ensure!(
                recovery["kind"] == "hang" && reason.starts_with(&format!("rank {culprit} ")),
                "rank {culprit} was stopped: {recovery}"
            );
            detected.add(&recovery, "detected_s")?;
            back.add(&recovery, "total_s")?;
        }
        detected.conclude()?;
        back.conclude()?;
        cancel(cluster, &id)
    })
}

/// The agent and its rank are stopped together, as when a virtual machine is paused: no word and no closed connection.
#[test]
fn a_silent_node_is_left_and_taken_back_when_it_wakes() -> Result<()> {
    Cluster::run(Options::default(), |cluster| {
        let id = cluster.submit(&JobFile {
            job: "min_world_size = 1\nelastic = \"both\"\n".into(),
            ..endless("node")
        })?;
        let mut lost = Figures::new("silent node -> declared lost", 4.0, 4.0);
        let mut back = Figures::new("silent node -> training on the rest", 10.0, 10.0);
        for _ in 0..trials()? {
            let job = cluster.wait_for_job(&id, "to train on both", TRAINED, |job| {
                job["state"] == "running" && job["world_size"] == 2
            })?;
            let before = recoveries(&job).len();
            goes_on(cluster, &id)?;
            let node = cluster.newest_worker()?;
            cluster.signal_group(node, Signal::SIGSTOP)?;
            let recovery = recovered(cluster, &id, before)?;
            ensure!(recovery["kind"] == "lost", "{recovery}");
            lost.add(&recovery, "detected_s")?;
            back.add(&recovery, "total_s")?;
            cluster.signal_group(node, Signal::SIGCONT)?;
        }
        lost.conclude()?;
        back.conclude()?;
        cancel(cluster, &id)
    })
}

/// SplitMix64: the same faults for the same seed.
struct Draw(u64);

impl Draw {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) % bound
    }
}

/// 12 epochs of 4 steps, trained with whatever `disturb` does meanwhile; the weights at the end.
fn weights(name: &str, mut disturb: impl FnMut(&mut Cluster, &str) -> Result<()>) -> Result<Vec<u8>> {
    let mut model = Vec::new();
    Cluster::run(Options::default(), |cluster| {
        let id = cluster.submit(&JobFile {
            checkpoint_steps: 3,
            ..JobFile::tiny(name).epochs(12)
        })?;
        cluster.wait_for_job(&id, "to train", TRAINED, |job| step(job) >= 1)?;
        disturb(cluster, &id)?;
        cluster.wait_for_state(&id, "succeeded", TRAINED)?;
        model = fs::read(cluster.scratch().join("out").join(name).join("model.safetensors"))?;
        Ok(())
    })?;
    Ok(model)
}

#[test]
fn any_mix_of_faults_ends_in_the_same_weights_bit_for_bit() -> Result<()> {
    let seed = number("ARCFACE_SEED")?.unwrap_or(1);
    let trials = trials()?;
    let expected = weights("undisturbed", |_, _| Ok(()))?;
    for trial in 0..trials {
        let mut draw = Draw(seed + trial as u64);
        let mut told = Vec::new();
        let name = format!("mix-{trial}");
        let got = weights(&name, |cluster, id| {
            for _ in 0..2 + draw.below(2) {
                // At whatever step of whatever phase it is now.
                let wait = step(&cluster.job(id)?) + draw.below(6);
                cluster.wait_for_job(id, "to train on", TRAINED, |job| {
                    job["state"] == "running" && (step(job) >= wait || step(job) >= 40)
                })?;
                let ranks = cluster.rank_pids(id)?;
                let rank = ranks.get(draw.below(2) as usize).copied();
                match (draw.below(4), rank) {
                    (0, _) => {
                        told.push("coordinator killed".to_owned());
                        cluster.kill_coordinator()?;
                        cluster.start_coordinator()?;
                    }
                    (1, _) => {
                        told.push("node killed".to_owned());
                        cluster.kill_worker()?;
                        cluster.start_worker()?;
                    }
                    (2, Some((rank, pid))) => {
                        told.push(format!("rank {rank} stopped"));
                        cluster.signal(pid, Signal::SIGSTOP)?;
                    }
                    (_, Some((rank, pid))) => {
                        told.push(format!("rank {rank} killed"));
                        cluster.signal(pid, Signal::SIGKILL)?;
                    }
                    _ => {}
                }
            }
            Ok(())
        })
        .with_context(|| format!("ARCFACE_SEED={}", seed + trial as u64))?;
        println!("seed {}: {}", seed + trial as u64, told.join(", "));
        ensure!(
            got == expected,
            "ARCFACE_SEED={}: other weights after {}",
            seed + trial as u64,
            told.join(", ")
        );
    }
    println!(
        "| any fault mix -> the weights of the undisturbed run, bit for bit | {trials} of {trials} | | | all |"
    );
    Ok(())
}

//! Faults again and again: what they cost, and that they change nothing in the end.
//!
//! Each test makes a few trials; `make chaos` makes many (`ARCFACE_TRIALS`) on a machine that does nothing else, and holds the
//! times against their bars. The faults of a mix are drawn from `ARCFACE_SEED`, which every run prints.

use anyhow::{Context, Result, ensure};
use arcface_tests::{
    Cluster, JobFile, Options,
    wait::{self, Seen},
};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::{
    env, fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

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

/// Twice as many threads as there are cores want them, and the ranks too: heartbeats still come in time.
#[test]
fn a_busy_machine_is_not_a_lost_one() -> Result<()> {
    let soak = Duration::from_secs(number("ARCFACE_SOAK_S")?.unwrap_or(15));
    Cluster::run(Options::default(), |cluster| {
        let id = cluster.submit(&endless("busy"))?;
        goes_on(cluster, &id)?;
        let begun = Instant::now();
        let threads = 2 * std::thread::available_parallelism()?.get();
        let job = std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    let mut draw = Draw(1);
                    while begun.elapsed() < soak {
                        std::hint::black_box((0..100_000).map(|_| draw.below(7)).sum::<u64>());
                    }
                });
            }
            cluster.wait_for_job(&id, "to train on a busy machine", soak + TRAINED, |job| {
                begun.elapsed() >= soak || !recoveries(job).is_empty()
            })
        })?;
        let nodes = cluster.json(&["nodes"])?;
        let healthy = nodes
            .as_array()
            .into_iter()
            .flatten()
            .filter(|node| node["state"] == "healthy");
        ensure!(
            recoveries(&job).is_empty() && healthy.count() == 2,
            "nobody was lost: {job} {nodes}"
        );
        println!(
            "| both cores busy for {} s -> nodes called lost, ranks called hung | 1 | 0 | 0 | 0 |",
            soak.as_secs()
        );
        cancel(cluster, &id)
    })
}

/// All folders so many levels below one.
fn folders(below: &Path, levels: usize) -> Vec<PathBuf> {
    let entries = fs::read_dir(below).into_iter().flatten().flatten();
    let here: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    match levels {
        1 => here,
        _ => here
            .iter()
            .flat_map(|folder| folders(folder, levels - 1))
            .collect(),
    }
}

/// Nothing of the job is ever in storage: what a generation resumes from can only have come from memory.
#[test]
fn a_lost_node_costs_a_few_steps_and_no_read_from_storage() -> Result<()> {
    const BUDDY_STEPS: u64 = 6;
    Cluster::run(Options::default(), |cluster| {
        let id = cluster.submit(&JobFile {
            // One epoch: no checkpoint before the end.
            num_image: 10_000_000,
            checkpoint_steps: 0,
            more: format!("buddy_steps = {BUDDY_STEPS}"),
            ..JobFile::tiny("buddies")
        })?;
        let checkpoints = cluster.scratch().join("out/buddies/checkpoints");
        let mut back = Figures::new(
            "node lost, replaced by another -> first new step, from memory",
            10.0,
            12.0,
        );
        let mut lost = Vec::new();
        for trial in 0..trials()? {
            let begun = step(&cluster.job(&id)?);
            cluster.wait_for_job(&id, "to make copies", TRAINED, |job| {
                job["state"] == "running" && step(job) >= begun + 2 * BUDDY_STEPS
            })?;
            cluster.kill_worker()?;
            cluster.start_worker()?;
            let recovery = recovered(cluster, &id, trial)?;
            let steps = recovery["lost_steps"].as_u64().context("lost steps")?;
            ensure!(
                recovery["from_memory"] == true && steps <= BUDDY_STEPS,
                "at most {BUDDY_STEPS} steps, from memory: {recovery}"
            );
            ensure!(!checkpoints.exists(), "a checkpoint was written");
            lost.push(steps);
            back.add(&recovery, "total_s")?;
        }
        lost.sort_unstable();
        println!(
            "| node lost -> steps lost with buddy_steps = {BUDDY_STEPS} | {} | {} | {} | {BUDDY_STEPS} |",
            lost.len(),
            lost[lost.len() / 2],
            lost[lost.len() - 1]
        );
        back.conclude()?;
        cancel(cluster, &id)?;
        let memory = cluster.scratch().join("memory");
        wait::until("the end of the copies", SOON, || {
            let left = folders(&memory, 3)
                .into_iter()
                .filter(|folder| folder.ends_with(&id));
            let left: Vec<PathBuf> = left.collect();
            Ok(match left.is_empty() {
                true => Seen::Yes(()),
                false => Seen::NotYet(format!("{left:?}")),
            })
        })
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
fn weights(
    name: &str,
    more: &str,
    mut disturb: impl FnMut(&mut Cluster, &str) -> Result<()>,
) -> Result<Vec<u8>> {
    let mut model = Vec::new();
    Cluster::run(Options::default(), |cluster| {
        let id = cluster.submit(&JobFile {
            checkpoint_steps: 3,
            more: more.to_owned(),
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
    let expected = weights("undisturbed", "", |_, _| Ok(()))?;
    for trial in 0..trials {
        let mut draw = Draw(seed + trial as u64);
        let mut told = Vec::new();
        let name = format!("mix-{trial}");
        // With copies at almost every step, or with checkpoints alone.
        let more = ["buddy_steps = 2", "buddy_steps = 0"][trial % 2];
        let got = weights(&name, more, |cluster, id| {
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

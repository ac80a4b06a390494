//! A rank that is slower than its peers is named with the cause, and nothing else happens to it; ranks that are equal are
//! not named.

use anyhow::{Context, Result, ensure};
use arcface_tests::{Cluster, JobFile, Options};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

const TRAINED: Duration = Duration::from_secs(240);
/// What a slow node gets: a fifth of the time.
const RUNS: Duration = Duration::from_millis(20);
const STANDS: Duration = Duration::from_millis(80);
/// From the start of the slowness; the bar is 60 s or 200 steps.
const NAMED: Duration = Duration::from_secs(60);

/// Every event of `watch` to the end of the job that is `event`.
fn events(watch: std::process::Child, event: &str) -> Result<Vec<Value>> {
    let output = watch.wait_with_output()?;
    let text = String::from_utf8(output.stdout)?;
    let all = text
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<Vec<Value>, _>>()?;
    ensure!(
        all.iter().any(|one| one["event"] == "metrics"),
        "the watch saw the training: {text}"
    );
    Ok(all
        .into_iter()
        .filter(|one| one["event"] == event)
        .map(|mut one| one[event].take())
        .collect())
}

fn watch(cluster: &Cluster, id: &str) -> Result<std::process::Child> {
    let mut command = cluster.client(&["watch", id, "--output", "json"])?;
    command
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null());
    command.spawn().context("watch the job")
}

/// Lets a process run for a fifth of the time while `work` is done.
fn slowed<T>(pid: u32, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let pid = Pid::from_raw(i32::try_from(pid)?);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let slowing = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                kill(pid, Signal::SIGSTOP)?;
                thread::sleep(STANDS);
                kill(pid, Signal::SIGCONT)?;
                thread::sleep(RUNS);
            }
            Ok::<(), nix::Error>(())
        });
        let worked = work();
        done.store(true, Ordering::Relaxed);
        let slowed = slowing
            .join()
            .map_err(|_| anyhow::anyhow!("the slowing panicked"))?;
        let worked = worked?;
        slowed.context("slow the process")?;
        Ok(worked)
    })
}

#[test]
fn a_slow_rank_is_named_until_it_keeps_up_again() -> Result<()> {
    Cluster::run(Options::default(), |cluster| {
        let id = cluster.submit(&JobFile::tiny("slow_rank").epochs(100_000))?;
        cluster.wait_for_job(&id, "to train", TRAINED, |job| job["step"].as_u64() >= Some(8))?;
        let watching = watch(cluster, &id)?;
        let ranks = cluster.rank_pids(&id)?;
        let named = |job: &Value| {
            job["stragglers"]
                .as_array()
                .is_some_and(|named| !named.is_empty())
        };
        let (job, took) = slowed(ranks[1].1, || {
            let begin = Instant::now();
            let job = cluster.wait_for_job(&id, "to name the slow rank", NAMED, named)?;
            Ok((job, begin.elapsed()))
        })?;
        println!("named after {:.1} s: {}", took.as_secs_f64(), job["stragglers"]);
        let stragglers = job["stragglers"].as_array().context("a list")?;
        ensure!(stragglers.len() == 1, "one rank is slow: {job}");
        let slow = &stragglers[0];
        ensure!(slow["rank"] == 1 && slow["cause"] == "compute", "{job}");
        ensure!(
            slow["node"].as_str().is_some_and(|node| !node.is_empty()),
            "its node is named: {job}"
        );
        let text = cluster
            .cli(&["job", &id], Duration::from_secs(20))?
            .expect(0)?
            .stdout;
        ensure!(
            text.contains("rank 1 on") && text.contains("holds up the others"),
            "{text}"
        );

        let job = cluster.wait_for_job(&id, "to say that it keeps up again", NAMED, |job| !named(job))?;
        ensure!(job["generation"] == 1, "nothing was restarted: {job}");
        cluster
            .cli(&["cancel", &id], Duration::from_secs(20))?
            .expect(0)?;
        cluster.wait_for_state(&id, "cancelled", TRAINED)?;
        let told = events(watching, "straggler")?;
        ensure!(
            told.len() == 2
                && told.iter().all(|event| event["rank"] == 1)
                && told[0]["over"] == false
                && told[0]["ratio"].as_f64() > Some(1.5)
                && told[1]["over"] == true,
            "the watch shows both: {told:?}"
        );
        Ok(())
    })
}

#[test]
fn ranks_that_are_equal_are_not_named() -> Result<()> {
    Cluster::run(Options::default(), |cluster| {
        let id = cluster.submit(&JobFile::tiny("equal_ranks").epochs(75))?;
        let watching = watch(cluster, &id)?;
        let job = cluster.wait_for_state(&id, "succeeded", TRAINED)?;
        ensure!(job["step"] == 300, "75 epochs of 4 steps: {job}");
        let told = events(watching, "straggler")?;
        ensure!(told.is_empty(), "{told:?}");
        Ok(())
    })
}

//! Coordinators and their etcd die and training goes on: another coordinator leads, nothing restarts, no step is lost,
//! checkpoints are committed.

use anyhow::{Context, Result, ensure};
use arcface_tests::{Cluster, JobFile, Options, Process, wait};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::{
    env,
    time::{Duration, Instant},
};
use wait::Seen;

const TRAINED: Duration = Duration::from_secs(240);
/// From the loss of the leader to an answer of the next one.
const FAILOVER: Duration = Duration::from_secs(7);
/// A cluster that runs one job after another may take so long for all of them.
const SOON: Duration = Duration::from_secs(60);

/// Longer than a failover by far: 4 steps an epoch, a checkpoint after each.
fn long(name: &str) -> JobFile {
    JobFile {
        checkpoint_steps: 4,
        ..JobFile::tiny(name).epochs(LONG_EPOCHS)
    }
}

const LONG_EPOCHS: u32 = 50_000;

fn step(job: &Value) -> u64 {
    job["step"].as_u64().unwrap_or(0)
}

fn undisturbed(job: &Value) -> bool {
    let recoveries = job["recoveries"].as_array().map_or(0, Vec::len);
    job["generation"] == 1 && recoveries == 0
}

/// Waits until the job has trained and committed beyond where it is now, and has never restarted.
fn goes_on(cluster: &mut Cluster, id: &str) -> Result<Value> {
    let now = cluster.job(id)?;
    let (steps, committed) = (step(&now) + 4, now["checkpoint_step"].as_u64().unwrap_or(0));
    let job = cluster.wait_for_job(id, "to train and commit on", TRAINED, |job| {
        step(job) >= steps && job["checkpoint_step"].as_u64().unwrap_or(0) > committed
    })?;
    ensure!(undisturbed(&job), "something restarted: {job}");
    Ok(job)
}

/// Cancels the job that was long enough for the test.
fn end(cluster: &mut Cluster, id: &str) -> Result<()> {
    cluster.json(&["cancel", id])?;
    cluster.wait_for_state(id, "cancelled", SOON)?;
    Ok(())
}

/// How long there is no control plane, at least: `ARCFACE_OUTAGE_S`, or no longer than it takes to see training go on.
fn outage() -> Result<Duration> {
    let seconds = match env::var("ARCFACE_OUTAGE_S") {
        Ok(text) => text.parse().context("ARCFACE_OUTAGE_S is a number")?,
        Err(_) => 0,
    };
    Ok(Duration::from_secs(seconds))
}

#[test]
fn a_standby_takes_over_from_a_killed_leader_and_training_does_not_notice() -> Result<()> {
    let trials: usize = match env::var("ARCFACE_TRIALS") {
        Ok(text) => text.parse().context("ARCFACE_TRIALS is a number")?,
        Err(_) => 2,
    };
    Cluster::run_on_etcd(Options::default(), 2, |cluster| {
        let id = cluster.submit(&long("failover"))?;
        cluster.wait_for_job(&id, "to train", TRAINED, |job| step(job) >= 4)?;
        let mut took = Vec::new();
        for trial in 0..trials {
            let before = step(&goes_on(cluster, &id)?);
            let leader = cluster.wait_for_leader()?;
            cluster.end_coordinator(leader, Signal::SIGKILL)?;
            let killed = Instant::now();
            // One call of a client that knows both: it waits for the standby to lead.
            let job = cluster.job(&id)?;
            let answered = killed.elapsed();
            ensure!(undisturbed(&job), "trial {trial}: {job}");
            ensure!(
                answered <= FAILOVER,
                "trial {trial}: the standby answered after {answered:?}"
            );
            took.push(answered);
            cluster.start_coordinator_at(leader)?;
            let after = goes_on(cluster, &id)?;
            ensure!(step(&after) > before, "trial {trial}: {after}");
        }
        took.sort();
        let seconds: Vec<f64> = took.iter().map(Duration::as_secs_f64).collect();
        println!(
            "leader killed -> a client's call is answered, {trials} trials: p50 {:.2} s, worst {:.2} s; 0 restarts; {seconds:.2?}",
            seconds[seconds.len() / 2],
            seconds[seconds.len() - 1],
        );
        end(cluster, &id)
    })
}

#[test]
fn a_job_ends_well_although_its_leader_died_and_its_last_checkpoint_is_committed() -> Result<()> {
    Cluster::run_on_etcd(Options::default(), 2, |cluster| {
        let id = cluster.submit(&JobFile {
            checkpoint_steps: 4,
            ..JobFile::tiny("ends").epochs(10)
        })?;
        cluster.wait_for_job(&id, "to train", TRAINED, |job| step(job) >= 2)?;
        let leader = cluster.wait_for_leader()?;
        cluster.end_coordinator(leader, Signal::SIGKILL)?;
        let job = cluster.wait_for_state(&id, "succeeded", TRAINED)?;
        ensure!(undisturbed(&job) && step(&job) == 40, "{job}");
        let checkpoints = cluster.json(&["checkpoints", &id])?;
        ensure!(checkpoints[0]["step"] == 40, "{checkpoints}");
        Ok(())
    })
}

#[test]
fn a_leader_that_stops_makes_way_at_once_and_a_client_that_follows_does_not_end() -> Result<()> {
    Cluster::run_on_etcd(Options::default(), 2, |cluster| {
        let id = cluster.submit(&JobFile {
            checkpoint_steps: 4,
            ..JobFile::tiny("followed").epochs(20)
        })?;
        let mut watching = Process::start(
            "watch",
            &cluster.scratch().join("logs"),
            cluster.client(&["watch", &id, "--output", "json"])?,
        )?;
        cluster.wait_for_job(&id, "to train", TRAINED, |job| step(job) >= 4)?;
        let leader = cluster.wait_for_leader()?;
        let killed = Instant::now();
        cluster.end_coordinator(leader, Signal::SIGTERM)?;
        cluster.job(&id)?;
        let answered = killed.elapsed();
        // Well below the time that a lease takes to lapse.
        ensure!(
            answered < Duration::from_secs(4),
            "the key was not released: {answered:?}"
        );
        let job = cluster.wait_for_state(&id, "succeeded", TRAINED)?;
        ensure!(undisturbed(&job) && step(&job) == 80, "{job}");
        let status = watching.wait(SOON)?;
        ensure!(status.success(), "{status}: {}", watching.output());
        let last = watching.output();
        ensure!(last.contains("found the coordinator again"), "{last}");
        Ok(())
    })
}

#[test]
fn a_paused_leader_is_replaced_and_changes_nothing_when_it_wakes() -> Result<()> {
    Cluster::run_on_etcd(Options::default(), 2, |cluster| {
        let id = cluster.submit(&long("paused"))?;
        cluster.wait_for_job(&id, "to train", TRAINED, |job| step(job) >= 4)?;
        let leader = cluster.wait_for_leader()?;
        cluster.signal_coordinator(leader, Signal::SIGSTOP)?;
        // The paused one still has its port: who asks it alone gets no answer, so the other one is asked.
        let other = 1 - leader;
        cluster.wait_for_role(other, true)?;
        cluster.signal_coordinator(leader, Signal::SIGCONT)?;
        cluster.wait_for_role(leader, false)?;
        goes_on(cluster, &id)?;
        ensure!(cluster.wait_for_leader()? == other, "the old one leads again");
        end(cluster, &id)
    })
}

#[test]
fn training_goes_on_without_coordinators_and_etcd_and_commits_afterwards() -> Result<()> {
    Cluster::run_on_etcd(Options::default(), 2, |cluster| {
        let id = cluster.submit(&long("alone"))?;
        let before = cluster.wait_for_job(&id, "to commit", TRAINED, |job| {
            job["checkpoint_step"].as_u64() >= Some(4)
        })?;
        for index in 0..2 {
            cluster.end_coordinator(index, Signal::SIGKILL)?;
        }
        cluster.etcd()?.kill()?;
        // The ranks' own log is all that there is to see of them now.
        let log = cluster.scratch().join("out/alone/training.log");
        let lines = || std::fs::read_to_string(&log).map(|text| text.lines().count());
        let written = lines()?;
        let (gone, outage) = (Instant::now(), outage()?);
        wait::until("ranks to train by themselves", outage + TRAINED, || {
            let now = lines()?;
            Ok(match now >= written + 20 && gone.elapsed() >= outage {
                true => Seen::Yes(()),
                false => Seen::NotYet(format!("{now} lines after {written}")),
            })
        })?;
        println!(
            "without coordinators and etcd for {:.0} s: {} steps meanwhile",
            gone.elapsed().as_secs_f64(),
            lines()? - written
        );
        cluster.etcd()?.resume()?;
        for index in 0..2 {
            cluster.start_coordinator_at(index)?;
        }
        let after = cluster.wait_for_job(&id, "to be seen further on", TRAINED, |job| {
            step(job) >= step(&before) + 20
        })?;
        ensure!(undisturbed(&after), "{after}");
        goes_on(cluster, &id)?;
        end(cluster, &id)
    })
}

#[test]
fn without_etcd_submits_are_refused_and_with_it_the_leader_goes_on() -> Result<()> {
    Cluster::run_on_etcd(Options::default(), 1, |cluster| {
        let id = cluster.submit(&long("outage"))?;
        cluster.wait_for_job(&id, "to commit", TRAINED, |job| {
            job["checkpoint_step"].as_u64() >= Some(4)
        })?;
        cluster.etcd()?.kill()?;
        let file = JobFile::tiny("refused").write(cluster.scratch())?;
        let refused = cluster
            .cli(&["submit", &file.to_string_lossy()], SOON)?
            .expect(4)?;
        ensure!(
            refused.stderr.contains("etcd") || refused.stderr.contains("no coordinator leads"),
            "{}",
            refused.stderr
        );
        cluster.wait_for_role(0, false)?;
        cluster.etcd()?.resume()?;
        cluster.wait_for_leader()?;
        goes_on(cluster, &id)?;
        let jobs = cluster.json(&["jobs"])?;
        ensure!(
            jobs.as_array().map(Vec::len) == Some(1),
            "what was refused is not there: {jobs}"
        );
        end(cluster, &id)
    })
}

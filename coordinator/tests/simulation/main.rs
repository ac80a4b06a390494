//! The whole control plane on a simulated network: the real services and the real control task, agents and ranks that
//! are fakes, a store that survives them. A seed decides everything that happens, and replays it.
//!
//! `ARCFACE_SIM_SEEDS` sets how many seeds are run, `ARCFACE_SIM_SEED` runs one and prints its history.

mod agent;
mod clients;
mod coordinator;
mod determinism;
mod double;
mod history;
mod net;
#[cfg(feature = "planted-bugs")]
mod planted;
mod rank;
mod run;
mod store;

use run::{Options, Outcome, run};
use std::{
    process::Command,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

/// Seeds of one run of the tests.
const SEEDS: u64 = 2000;
/// Names a seed to replay.
const SEED: &str = "ARCFACE_SIM_SEED";
/// Set for the processes that run one seed for a search: a planted fault's name, or nothing.
const SEARCH: &str = "ARCFACE_SIM_SEARCH";
/// Begins the line that such a process ends with.
const MARK: &str = "outcome ";

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| {
        text.parse()
            .unwrap_or_else(|_| panic!("{name} is no number: {text}"))
    })
}

/// Runs a seed in a process of its own: tokio seeds the fairness of its `select!` from a counter of the process.
fn run_alone(seed: u64, fault: &str) -> Outcome {
    let child = Command::new(std::env::current_exe().expect("this test"))
        .args(["replay", "--exact", "--nocapture", "--test-threads=1"])
        .env(SEED, seed.to_string())
        .env(SEARCH, fault)
        .output()
        .expect("start a process for a seed");
    let text = String::from_utf8_lossy(&child.stdout);
    let line = text
        .lines()
        .find_map(|line| line.split_once(MARK).map(|(_, outcome)| outcome));
    match line {
        Some(line) => line.parse().expect("an outcome"),
        None => Outcome {
            violations: vec![format!(
                "the simulation ended: {}",
                String::from_utf8_lossy(&child.stderr)
            )],
            ..Outcome::default()
        },
    }
}

/// Runs seeds on all cores, in their order, until one fails: the first that did, or how many ran.
fn search(seeds: u64, fault: &str) -> Result<u64, (u64, Outcome)> {
    let next = AtomicU64::new(0);
    let failed = Mutex::new(None::<(u64, Outcome)>);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds || failed.lock().expect("failures").is_some() {
                        return;
                    }
                    let outcome = run_alone(seed, fault);
                    if !outcome.violations.is_empty() {
                        let mut failed = failed.lock().expect("failures");
                        if failed.as_ref().is_none_or(|(first, _)| seed < *first) {
                            *failed = Some((seed, outcome));
                        }
                    }
                }
            });
        }
    });
    failed.into_inner().expect("failures").map_or(Ok(seeds), Err)
}

fn complain(seed: u64, outcome: &Outcome) -> ! {
    panic!(
        "seed {seed}: {}\nreplay: ARCFACE_SIM_SEED={seed} cargo test -p arcface-coordinator --test simulation replay -- --nocapture",
        outcome.violations.join("\n")
    )
}

#[test]
fn no_rule_is_broken_under_random_faults() {
    let seeds = variable("ARCFACE_SIM_SEEDS").unwrap_or(SEEDS);
    let started = Instant::now();
    match search(seeds, "") {
        Ok(ran) => {
            let seconds = started.elapsed().as_secs_f64();
            println!(
                "{ran} seeds in {seconds:.1} s: {:.1} a second",
                ran as f64 / seconds
            );
        }
        Err((seed, outcome)) => complain(seed, &outcome),
    }
}

#[test]
fn the_same_seed_is_the_same_history() {
    for seed in 1_000_000..1_000_006 {
        let (first, second) = (run_alone(seed, ""), run_alone(seed, ""));
        assert_eq!(first, second, "seed {seed}");
        assert!(first.events > 20, "seed {seed} did nothing: {first:?}");
    }
}

/// One seed with its history, for people; or its outcome alone, for [`run_alone`].
#[test]
fn replay() {
    let Some(seed) = variable(SEED) else {
        println!("skipped: {SEED} names no seed");
        return;
    };
    if let Ok(fault) = std::env::var(SEARCH) {
        return println!("{MARK}{}", run(seed, Options::with_fault(&fault)));
    }
    if std::env::var_os("RUST_LOG").is_some() {
        tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_writer(std::io::stderr)
            .init();
    }
    let options = Options {
        verbose: true,
        ..Options::default()
    };
    let outcome = run(seed, options);
    if !outcome.violations.is_empty() {
        complain(seed, &outcome);
    }
    println!("seed {seed} keeps every rule: {} events", outcome.events);
}

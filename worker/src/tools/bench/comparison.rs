//! One thing against another of the same sizes. Both run in processes of their own, in turn, so that neither's memory or
//! allocator is warm from the other and a disturbance of the machine meets both. Knows nothing of what is measured.

use super::timing::{median, min};
use anyhow::{Context, ensure};
use serde_json::{Value, json};
use std::{env, process::Command};

/// The variable, and what makes this program's allocator do as those of systems do, which people who start a trainer by hand have: large blocks
/// that are freed go back to the system at once (jemalloc's own defaults; its manual, "Tuning"). Without, it is as in a job: "tuned".
const DEFAULT: (&str, &str) = (
    "MALLOC_CONF",
    "oversize_threshold:8388608,dirty_decay_ms:10000,muzzy_decay_ms:0,thp:default",
);

/// Pairs of measurements of this program, each by the arguments of `bench` that it is made with.
pub(super) fn compare(pairs: u32, ours: &[String], other: &[String], malloc: &str) -> anyhow::Result<Value> {
    let mut sides = [Vec::new(), Vec::new()];
    for _ in 0..pairs {
        for (side, arguments) in sides.iter_mut().zip([ours, other]) {
            side.push(in_a_process(arguments, malloc)?);
        }
    }
    let [ours, plain] = sides;
    let number = |run: &Value, key: &str| run[key].as_f64().unwrap_or(f64::NAN);
    let all = |runs: &[Value], key: &str| -> Vec<f64> { runs.iter().map(|run| number(run, key)).collect() };
    let (ours_ms, plain_ms) = (all(&ours, "median_ms"), all(&plain, "median_ms"));
    let ratios: Vec<f64> = ours_ms
        .iter()
        .zip(&plain_ms)
        .map(|(ours, plain)| plain / ours)
        .collect();
    let peak = |runs: &[Value]| all(runs, "peak_bytes").into_iter().fold(f64::NAN, f64::max) as u64;
    // The sizes are those of our side.
    let mut result = ours[0].clone();
    let state = number(&result, "state_bytes");
    for (key, value) in [
        ("ratio", json!(median(&ratios))),
        ("ratios", json!(ratios)),
        ("ours_ms", json!(median(&ours_ms))),
        ("plain_ms", json!(median(&plain_ms))),
        ("ours_min_ms", json!(min(&all(&ours, "min_ms")))),
        ("plain_min_ms", json!(min(&all(&plain, "min_ms")))),
        ("ours_peak_bytes", json!(peak(&ours))),
        ("plain_peak_bytes", json!(peak(&plain))),
        ("ours_above_state", json!(peak(&ours) as f64 / state - 1.0)),
        ("malloc", json!(malloc)),
    ] {
        result[key] = value;
    }
    if let Value::Object(entries) = &mut result {
        for one_side in [
            "median_ms",
            "min_ms",
            "peak_bytes",
            "process_peak_bytes",
            "tensor_peak_bytes",
            "samples_per_second",
            "torch_threads",
        ] {
            entries.remove(one_side);
        }
        let steps = entries.remove("repetitions").unwrap_or_default();
        entries.insert("steps".to_owned(), steps);
    }
    Ok(result)
}

/// One side of a pair: this program again.
pub(super) fn in_a_process(arguments: &[String], malloc: &str) -> anyhow::Result<Value> {
    let mut command = Command::new(env::current_exe().context("find this program")?);
    command.arg("bench").args(arguments).args(["--output", "json"]);
    if malloc == "default" {
        command.env(DEFAULT.0, DEFAULT.1);
    }
    let output = command.output().context("start a process to measure in")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "bench {}: {}: {}",
        arguments.join(" "),
        output.status,
        said.trim()
    );
    serde_json::from_slice(&output.stdout).context("read the measurement of a process")
}

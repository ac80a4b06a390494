//! `bench ... --against plain` as a program: it starts itself again for each side.

use serde_json::Value;
use std::process::Command;

fn bench(arguments: &str) -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_arcface-worker"))
        .arg("bench")
        .args(arguments.split(' '))
        .args(["--against", "plain", "--repetitions", "2", "--steps", "1"])
        .args(["--threads", "1", "--output", "json"])
        .output()
        .expect("start the worker");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments}: {said}");
    let result: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    for key in [
        "ratio",
        "ours_ms",
        "plain_ms",
        "ours_peak_bytes",
        "plain_peak_bytes",
        "state_bytes",
    ] {
        assert!(
            result[key].as_f64().is_some_and(|value| value > 0.0),
            "{key}: {result}"
        );
    }
    assert_eq!(result["ratios"].as_array().map(Vec::len), Some(2));
    assert_eq!(
        (&result["threads"], &result["repetitions"], &result["steps"]),
        (&1.into(), &2.into(), &1.into())
    );
    assert!(result["date"].is_string() && result["device"] == "cpu" && result["against"] == "plain");
    assert!(
        result["median_ms"].is_null(),
        "a time of one side alone: {result}"
    );
    result
}

#[test]
fn two_heads_are_measured_in_turn() {
    for malloc in ["default", "tuned"] {
        let result = bench(&format!(
            "head --classes 400 --dim 24 --batch 6 --rate 0.5 --precision bf16 --malloc {malloc}"
        ));
        // Weights and momentum.
        assert_eq!(result["state_bytes"], 2 * 400 * 24 * 4);
        assert_eq!(
            (&result["malloc"], &result["precision"]),
            (&malloc.into(), &"bf16".into())
        );
    }
}

#[test]
fn two_trainers_are_measured_in_turn() {
    let result = bench("step --network tiny --classes 40 --batch 6 --precision bf16");
    assert_eq!(
        (&result["implementation"], &result["network"]),
        (&"tiled".into(), &"tiny".into())
    );
}

#[test]
fn a_wrong_choice_is_a_usage_error() {
    for part in ["head", "step"] {
        for wrong in [["--against", "nosuch"], ["--precision", "fp8"], ["--rate", "2"]] {
            let output = Command::new(env!("CARGO_BIN_EXE_arcface-worker"))
                .args(["bench", part])
                .args(wrong)
                .output()
                .expect("start the worker");
            assert_eq!(output.status.code(), Some(2), "{part} {wrong:?}");
            assert!(output.stdout.is_empty());
        }
    }
}

//! `bench head --against plain` as a program: it starts itself again for each side.

use std::process::Command;

#[test]
fn two_heads_are_measured_in_turn() {
    for malloc in ["default", "tuned"] {
        let output = Command::new(env!("CARGO_BIN_EXE_arcface-worker"))
            .args([
                "bench",
                "head",
                "--classes",
                "400",
                "--dim",
                "24",
                "--batch",
                "6",
                "--rate",
                "0.5",
            ])
            .args([
                "--precision",
                "bf16",
                "--against",
                "plain",
                "--repetitions",
                "2",
                "--steps",
                "1",
            ])
            .args(["--malloc", malloc, "--threads", "1", "--output", "json"])
            .output()
            .expect("start the worker");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        let result: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        for key in [
            "ratio",
            "ours_ms",
            "plain_ms",
            "ours_peak_bytes",
            "plain_peak_bytes",
        ] {
            assert!(
                result[key].as_f64().is_some_and(|value| value > 0.0),
                "{key}: {result}"
            );
        }
        // Weights and momentum.
        assert_eq!(result["state_bytes"], 2 * 400 * 24 * 4);
        assert_eq!(result["ratios"].as_array().map(Vec::len), Some(2));
        assert_eq!(
            (&result["threads"], &result["repetitions"]),
            (&1.into(), &2.into())
        );
        assert!(result["date"].is_string() && result["device"] == "cpu");
    }
}

#[test]
fn a_wrong_choice_is_a_usage_error() {
    for wrong in [["--against", "nosuch"], ["--precision", "fp8"], ["--rate", "2"]] {
        let output = Command::new(env!("CARGO_BIN_EXE_arcface-worker"))
            .args(["bench", "head"])
            .args(wrong)
            .output()
            .expect("start the worker");
        assert_eq!(output.status.code(), Some(2), "{wrong:?}");
        assert!(output.stdout.is_empty());
    }
}

//! Verification results for people and for programs. Only text: where it goes is the caller's business.

use super::Verification;
use serde_json::{Value, json};
use std::fmt::Write;

/// A list of objects `{name, pairs, accuracy, accuracy_std, xnorm, tar_at_far}`; `tar_at_far` maps "1e-3" and the
/// like to rates, or is null where a fold lacks one kind of pair.
pub fn json(results: &[Verification]) -> Value {
    results
        .iter()
        .map(|r| {
            let tar = r.tar_at_far.as_ref().map(|tar| {
                let entries = tar.iter().map(|&(far, tar)| (far.to_owned(), json!(tar)));
                Value::Object(entries.collect())
            });
            json!({
                "name": r.name,
                "pairs": r.pairs,
                "accuracy": r.accuracy,
                "accuracy_std": r.accuracy_std,
                "xnorm": r.xnorm,
                "tar_at_far": tar,
            })
        })
        .collect()
}

/// A table with a line per set.
pub fn table(results: &[Verification]) -> String {
    let width = results
        .iter()
        .map(|r| r.name.chars().count())
        .max()
        .unwrap_or(0)
        .max(4);
    let mut out = format!(
        "{:<width$}  {:>6}  {:>17}  {:>9}",
        "SET", "PAIRS", "ACCURACY", "XNORM"
    );
    for (far, _) in super::verification::FAR_TARGETS {
        write!(out, "  {:>9}", format!("TAR@{far}")).expect("a String takes all");
    }
    for r in results {
        write!(
            out,
            "\n{:<width$}  {:>6}  {:>8.5} ± {:.5}  {:>9.4}",
            r.name, r.pairs, r.accuracy, r.accuracy_std, r.xnorm
        )
        .expect("a String takes all");
        for (index, _) in super::verification::FAR_TARGETS.iter().enumerate() {
            match r.tar_at_far.as_ref().and_then(|tar| tar.get(index)) {
                Some((_, tar)) => write!(out, "  {tar:>9.5}"),
                None => write!(out, "  {:>9}", "-"),
            }
            .expect("a String takes all");
        }
    }
    out.push('\n');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_show_everything() {
        let result = Verification {
            name: "lfw".into(),
            pairs: 6000,
            accuracy: 0.9978333,
            accuracy_std: 0.0023,
            xnorm: 21.5,
            tar_at_far: Some(
                super::super::verification::FAR_TARGETS
                    .map(|(far, _)| (far, 0.5))
                    .to_vec(),
            ),
        };
        let lacking = Verification {
            name: "one_kind".into(),
            tar_at_far: None,
            ..result.clone()
        };
        let results = [result, lacking];
        assert_eq!(
            table(&results),
            "SET        PAIRS           ACCURACY      XNORM   TAR@1e-1   TAR@1e-2   TAR@1e-3   TAR@1e-4\n\
             lfw         6000   0.99783 ± 0.00230    21.5000    0.50000    0.50000    0.50000    0.50000\n\
             one_kind    6000   0.99783 ± 0.00230    21.5000          -          -          -          -\n"
        );
        let json = json(&results);
        assert_eq!(json[0]["tar_at_far"]["1e-3"], 0.5);
        assert_eq!(json[0]["accuracy"], 0.9978333);
        assert!(json[1]["tar_at_far"].is_null() && json[1]["pairs"] == 6000);
    }
}

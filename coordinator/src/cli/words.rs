//! Values in words: sizes, numbers, and the lines that a followed job prints. Pure. Those that the status page says too are
//! in `view/words`.

pub use crate::view::words::{
    checkpoint_url, clean, count, job_state, node_state, recovery, straggler, timestamp,
};

use arcface_proto::v1;

/// True once nothing more will happen to a job.
pub fn has_ended(state: v1::JobState) -> bool {
    matches!(
        state,
        v1::JobState::Succeeded | v1::JobState::Failed | v1::JobState::Cancelled
    )
}

/// Seconds in the two largest units: `3m 20s`. Empty for what is not a duration.
pub fn duration(seconds: f64) -> String {
    if !(0.0..1e9).contains(&seconds) {
        return String::new();
    }
    let whole = seconds.round() as u64;
    match (whole / 86_400, whole / 3600 % 24, whole / 60 % 60, whole % 60) {
        (0, 0, 0, s) => format!("{s}s"),
        (0, 0, m, s) => format!("{m}m {s:02}s"),
        (0, h, m, _) => format!("{h}h {m:02}m"),
        (d, h, _, _) => format!("{d}d {h:02}h"),
    }
}

/// Bytes in the unit that leaves one to three digits before the point: `24.5 MiB`.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// A learning rate with four significant digits, and no exponent where it can be helped.
pub fn rate(value: f64) -> String {
    if value == 0.0 || (1e-4..1e4).contains(&value.abs()) {
        let digits = if value == 0.0 {
            0
        } else {
            (3 - value.abs().log10().floor() as i32).clamp(0, 8)
        };
        let text = format!("{value:.*}", digits as usize);
        match text.contains('.') {
            true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
            false => text,
        }
    } else {
        format!("{value:.3e}")
    }
}

/// Samples a second: whole when that is exact enough.
pub fn speed(value: f64) -> String {
    if value >= 100.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.1}")
    }
}

/// The figures of a log interval, beside a progress bar.
pub fn metrics(metrics: &v1::StepMetrics) -> String {
    let mut parts = vec![
        format!("loss {:.3}", metrics.loss),
        format!("lr {}", rate(metrics.learning_rate)),
        format!("{} samples/s", speed(metrics.samples_per_second)),
    ];
    let left = duration(metrics.eta_seconds);
    if metrics.step < metrics.total_steps && !left.is_empty() {
        parts.push(format!("eta {left}"));
    }
    parts.join("  ")
}

/// An evaluation on one line.
pub fn evaluation(evaluation: &v1::Evaluation) -> String {
    let numbers = match &evaluation.ijb {
        None => format!(
            "accuracy {:.4} +- {:.4}  xnorm {:.2}",
            evaluation.accuracy, evaluation.accuracy_std, evaluation.xnorm
        ),
        Some(ijb) => {
            let rank_1 = ijb.rank.get("1");
            let rank_1 = rank_1.map_or_else(String::new, |share| format!("  rank-1 {share:.4}"));
            format!("auc {:.4}{rank_1}", ijb.auc)
        }
    };
    format!(
        "step {:>6}  {}  {numbers}{}",
        evaluation.step,
        clean(&evaluation.dataset),
        tightest(evaluation).map_or_else(String::new, |(far, tar)| format!("  tar@{far} {tar:.4}")),
    )
}

/// True accept rate at the smallest false accept rate that was answered; for IJB at 1e-4, which papers give.
pub fn tightest(evaluation: &v1::Evaluation) -> Option<(&str, f64)> {
    const USUAL: &str = "1e-4";
    if let (true, Some(tar)) = (evaluation.ijb.is_some(), evaluation.tar_at_far.get(USUAL)) {
        return Some((USUAL, *tar));
    }
    let far = |text: &str| text.parse::<f64>().unwrap_or(f64::INFINITY);
    let entries = evaluation
        .tar_at_far
        .iter()
        .map(|(name, tar)| (name.as_str(), *tar));
    entries.min_by(|a, b| far(a.0).total_cmp(&far(b.0)))
}

/// A job's state with what goes with it: `running: 2 ranks, generation 1`.
pub fn state(job: &v1::Job) -> String {
    let state = job_state(job.state());
    let reason = clean(&job.reason);
    match job.state() {
        v1::JobState::Starting | v1::JobState::Running if reason.is_empty() => {
            format!(
                "{state}: {}, generation {}",
                count(job.world_size.into(), "rank"),
                job.generation
            )
        }
        _ => with_reason(state, &reason),
    }
}

/// A state and why; the reason may begin with the state itself.
pub fn with_reason(state: &str, reason: &str) -> String {
    match reason.strip_prefix(state) {
        _ if reason.is_empty() => state.to_owned(),
        Some(rest) if !rest.starts_with(char::is_alphanumeric) => reason.to_owned(),
        _ => format!("{state}: {reason}"),
    }
}

/// Mean over the verification sets of each one's newest accuracy; `None` without evaluations.
pub fn final_accuracy(evaluations: &[v1::Evaluation]) -> Option<f64> {
    let newest: Vec<f64> = newest_of_each(evaluations)
        .into_iter()
        .filter(|evaluation| evaluation.ijb.is_none())
        .map(|evaluation| evaluation.accuracy)
        .collect();
    (!newest.is_empty()).then(|| newest.iter().sum::<f64>() / newest.len() as f64)
}

/// The newest evaluation of each data set, in the order in which the sets first appear.
pub fn newest_of_each(evaluations: &[v1::Evaluation]) -> Vec<&v1::Evaluation> {
    let mut newest: Vec<&v1::Evaluation> = Vec::new();
    for evaluation in evaluations {
        match newest
            .iter_mut()
            .find(|known| known.dataset == evaluation.dataset)
        {
            Some(known) if (known.generation, known.step) <= (evaluation.generation, evaluation.step) => {
                *known = evaluation;
            }
            Some(_) => {}
            None => newest.push(evaluation),
        }
    }
    newest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_sizes_read_well() {
        let durations = [0.4, 59.6, 200.0, 3599.0, 3600.0, 90_061.0, -1.0, f64::NAN, 1e30].map(duration);
        assert_eq!(
            durations,
            [
                "0s", "1m 00s", "3m 20s", "59m 59s", "1h 00m", "1d 01h", "", "", ""
            ]
        );
        assert_eq!(
            [0, 1023, 1024, 1_048_575, 25_690_112].map(bytes),
            ["0 B", "1023 B", "1.0 KiB", "1.0 MiB", "24.5 MiB"]
        );
        assert!(bytes(u64::MAX).ends_with("PiB"));
    }

    #[test]
    fn rates_keep_four_digits() {
        let rates = [0.1, 0.095, 0.012345, 1.0, 0.0, 12.5, 100.0, 3e-5, f64::NAN].map(rate);
        assert_eq!(
            rates,
            [
                "0.1", "0.095", "0.01235", "1", "0", "12.5", "100", "3.000e-5", "NaN"
            ]
        );
    }

    #[test]
    fn a_state_is_said_once() {
        assert_eq!(with_reason("cancelled", ""), "cancelled");
        assert_eq!(
            with_reason("cancelled", "cancelled: wrong margin"),
            "cancelled: wrong margin"
        );
        assert_eq!(with_reason("failed", "rank 0 ended"), "failed: rank 0 ended");
    }

    #[test]
    fn the_final_accuracy_is_the_mean_of_the_last_of_each_set() {
        let result = |dataset: &str, generation, step, accuracy| v1::Evaluation {
            dataset: dataset.into(),
            generation,
            step,
            accuracy,
            ..Default::default()
        };
        // A second generation measures step 10 again: the newer one counts.
        let all = [
            result("lfw", 1, 10, 0.5),
            result("cfp_fp", 1, 10, 0.6),
            result("lfw", 1, 20, 0.7),
            result("lfw", 2, 10, 0.8),
        ];
        assert_eq!(final_accuracy(&all), Some(0.7));
        assert_eq!(final_accuracy(&[]), None);
        let ijb = v1::Evaluation {
            ijb: Some(v1::IjbNumbers {
                auc: 0.99,
                rank: [("1".to_owned(), 0.91)].into(),
                ..Default::default()
            }),
            tar_at_far: [("1e-6".to_owned(), 0.5), ("1e-4".to_owned(), 0.9)].into(),
            ..result("ijbc", 2, 10, 0.0)
        };
        assert_eq!(
            evaluation(&ijb),
            "step     10  ijbc  auc 0.9900  rank-1 0.9100  tar@1e-4 0.9000"
        );
        // It has no accuracy that could count.
        assert_eq!(final_accuracy(&[all[0].clone(), ijb.clone()]), Some(0.5));
        assert_eq!(final_accuracy(&[ijb]), None);
    }
}

//! Repetitions of a piece of work, and what they come to. Knows nothing of the work.

use std::time::Instant;

/// Milliseconds of each repetition of `work`, the first run not counted.
pub(super) fn time(
    repetitions: u32,
    mut work: impl FnMut(u32) -> anyhow::Result<()>,
) -> anyhow::Result<Vec<f64>> {
    work(0)?;
    (1..=repetitions)
        .map(|repetition| {
            let begin = Instant::now();
            work(repetition)?;
            Ok(begin.elapsed().as_secs_f64() * 1e3)
        })
        .collect()
}

/// The middle value; the mean of the two middle ones of an even number. NaN for nothing.
pub(super) fn median(times: &[f64]) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match (
        sorted.len() % 2,
        sorted.get(middle),
        middle.checked_sub(1).and_then(|m| sorted.get(m)),
    ) {
        (1, Some(&m), _) => m,
        (_, Some(&hi), Some(&lo)) => (lo + hi) / 2.0,
        _ => f64::NAN,
    }
}

/// Standard deviation over the mean. NaN for nothing.
pub(super) fn variation(times: &[f64]) -> f64 {
    let count = times.len() as f64;
    let mean = times.iter().sum::<f64>() / count;
    let square = times.iter().map(|time| (time - mean).powi(2)).sum::<f64>() / count;
    square.sqrt() / mean
}

/// The shortest.
pub(super) fn min(times: &[f64]) -> f64 {
    times.iter().copied().fold(f64::INFINITY, f64::min)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn variations() {
        assert_eq!(variation(&[2.0, 2.0]), 0.0);
        assert_eq!(variation(&[1.0, 3.0]), 0.5);
        assert!(variation(&[]).is_nan());
    }
}

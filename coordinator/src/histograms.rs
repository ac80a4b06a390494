//! Histograms of what ranks have counted. They come as counts by bucket, thousands a second, and are added up as such: the
//! metrics library takes values one by one and keeps each until the next scrape.

use crate::telemetry::{METRICS, Metric, MetricKind};
use std::{
    collections::BTreeMap,
    fmt::Write,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Values of the labels of a metric, in their order.
type Labels = Vec<String>;

#[derive(Clone, Debug, Default, PartialEq)]
struct Histogram {
    /// By bucket, one more than bounds.
    counts: Vec<u64>,
    sum: f64,
}

/// By the metric's name.
type Shown = BTreeMap<&'static str, BTreeMap<Labels, Histogram>>;

static SHOWN: Mutex<Shown> = Mutex::new(BTreeMap::new());

fn shown() -> MutexGuard<'static, Shown> {
    // Sums are changed one by one: a panic elsewhere leaves them usable.
    SHOWN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn metric(name: &str) -> Option<(&'static Metric, &'static [f64])> {
    let metric = METRICS.iter().find(|metric| metric.name == name)?;
    match metric.kind {
        MetricKind::Histogram(bounds) => Some((metric, bounds)),
        _ => None,
    }
}

/// Adds `counts` times, which took `seconds` together, by the sender's buckets. `labels` are values in the order of the metric's
/// labels. Whatever bounds the sender has, a bucket's mean lies in it and is counted where it lies here.
pub fn add(name: &'static str, labels: &[&str], counts: &[u64], seconds: &[f64]) {
    let Some((_, bounds)) = metric(name) else { return };
    let labels = labels.iter().map(|value| (*value).to_owned()).collect();
    let mut shown = shown();
    let histogram = shown.entry(name).or_default().entry(labels).or_default();
    histogram.counts.resize(bounds.len() + 1, 0);
    for (&count, &seconds) in counts.iter().zip(seconds) {
        if count == 0 || !seconds.is_finite() || seconds < 0.0 {
            continue;
        }
        let mean = seconds / count as f64;
        let bucket = bounds.partition_point(|bound| *bound < mean);
        // A rank that tells nonsense harms only itself.
        histogram.counts[bucket] = histogram.counts[bucket].saturating_add(count);
        histogram.sum += seconds;
    }
}

/// Forgets the series of a job.
pub fn forget(job_id: &str) {
    for series in shown().values_mut() {
        series.retain(|labels, _| labels.first().is_none_or(|label| label != job_id));
    }
}

/// Adds all of it to the text of a scrape.
pub fn render(text: &mut String) {
    for (name, series) in shown().iter() {
        let Some((metric, bounds)) = metric(name).filter(|_| !series.is_empty()) else {
            continue;
        };
        // Writing to a string cannot fail.
        let _ = writeln!(text, "# HELP {name} {}\n# TYPE {name} histogram", metric.help);
        for (values, histogram) in series {
            let labels: Vec<String> = metric
                .labels
                .iter()
                .zip(values)
                .map(|(label, value)| format!("{label}=\"{value}\""))
                .collect();
            let labels = labels.join(",");
            let mut below = 0u64;
            let limits = bounds.iter().map(f64::to_string).chain(["+Inf".to_owned()]);
            for (limit, count) in limits.zip(&histogram.counts) {
                below = below.saturating_add(*count);
                let _ = writeln!(text, "{name}_bucket{{{labels},le=\"{limit}\"}} {below}");
            }
            let _ = writeln!(text, "{name}_sum{{{labels}}} {}", histogram.sum);
            let _ = writeln!(text, "{name}_count{{{labels}}} {below}");
        }
        text.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::COMM_COLLECTIVE_SECONDS;

    #[test]
    fn counts_are_added_and_shown_as_prometheus_reads_them() {
        let name = COMM_COLLECTIVE_SECONDS;
        let labels = ["job-of-this-test", "all_reduce"];
        add(name, &labels, &[4, 0, 1], &[0.000_244_140_625, 0.0, 30.0]);
        add(name, &labels, &[1, 1], &[0.000_976_562_5, f64::NAN]);
        add(name, &["job-of-this-test", "barrier"], &[1], &[0.002]);
        let mut text = String::new();
        render(&mut text);
        let of_test = |line: &&str| line.contains("\"job-of-this-test\",op=\"all_reduce\"");
        let lines: Vec<&str> = text.lines().filter(of_test).collect();
        let labels = "job_id=\"job-of-this-test\",op=\"all_reduce\"";
        let line = |le: &str, count| format!("{name}_bucket{{{labels},le=\"{le}\"}} {count}");
        // Four of 61 us each, one of 977 us, one of 30 s, over every bound.
        assert_eq!(lines[0], line("0.0001", 4));
        assert_eq!(lines[1], line("0.0005", 4));
        assert_eq!(lines[2], line("0.002", 5));
        assert_eq!(lines[7], line("5", 5));
        assert_eq!(lines[8], line("+Inf", 6));
        assert_eq!(lines[9], format!("{name}_sum{{{labels}}} 30.001220703125"));
        assert_eq!(lines[10], format!("{name}_count{{{labels}}} 6"));
        assert!(text.contains(&format!("# TYPE {name} histogram\n")), "{text}");
        forget("job-of-this-test");
        text.clear();
        render(&mut text);
        assert!(!text.contains("job-of-this-test"), "{text}");
    }
}

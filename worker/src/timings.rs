//! Pure: how long something takes, counted by several threads at once. A handful of counters, whatever is counted.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// Times by bucket: how many, and their sum.
#[derive(Debug)]
pub struct Timings {
    /// Upper bounds in seconds, rising.
    bounds: &'static [f64],
    /// One more than bounds: count and nanoseconds.
    buckets: Vec<(AtomicU64, AtomicU64)>,
}

impl Timings {
    /// No times yet, to be counted in buckets with these upper bounds in seconds and one for what is longer.
    pub fn new(bounds: &'static [f64]) -> Self {
        Self {
            bounds,
            buckets: (0..=bounds.len()).map(|_| Default::default()).collect(),
        }
    }

    /// Counts one.
    pub fn add(&self, took: Duration) {
        let seconds = took.as_secs_f64();
        let bucket = self.bounds.partition_point(|bound| *bound < seconds);
        let (count, nanoseconds) = &self.buckets[bucket];
        count.fetch_add(1, Ordering::Relaxed);
        let took = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        nanoseconds.fetch_add(took, Ordering::Relaxed);
    }

    /// Counts and seconds by bucket so far.
    pub fn read(&self) -> (Vec<u64>, Vec<f64>) {
        self.buckets
            .iter()
            .map(|(count, nanoseconds)| {
                let nanoseconds = nanoseconds.load(Ordering::Relaxed);
                (count.load(Ordering::Relaxed), nanoseconds as f64 / 1e9)
            })
            .unzip()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_counted_in_the_bucket_that_it_does_not_exceed() {
        let timings = Timings::new(&[0.001, 0.1]);
        for ms in [1, 2, 100, 101, 4000] {
            timings.add(Duration::from_millis(ms));
        }
        let (counts, seconds) = timings.read();
        assert_eq!(counts, [1, 2, 2]);
        assert_eq!(seconds, [0.001, 0.102, 4.101]);
    }
}

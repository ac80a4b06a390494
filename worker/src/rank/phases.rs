//! Where the time of a rank goes, by phase. The one stop-watch of the training loop.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Time by phase since the last [`Phases::take`]. Phases: data_wait, forward, head, backward, comm, optimizer,
/// checkpoint, eval.
#[derive(Clone, Debug, Default)]
pub struct Phases {
    spent: BTreeMap<&'static str, Duration>,
}

impl Phases {
    /// Runs `work` and counts its time as `phase`.
    pub fn time<T>(&mut self, phase: &'static str, work: impl FnOnce() -> T) -> T {
        let begin = Instant::now();
        let result = work();
        self.add(phase, begin.elapsed());
        result
    }

    /// Counts time that was measured elsewhere.
    pub fn add(&mut self, phase: &'static str, spent: Duration) {
        *self.spent.entry(phase).or_default() += spent;
    }

    /// Seconds by phase, and begins anew.
    pub fn take(&mut self) -> BTreeMap<&'static str, f64> {
        std::mem::take(&mut self.spent)
            .into_iter()
            .map(|(phase, spent)| (phase, spent.as_secs_f64()))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_counted_once_and_by_phase() {
        let mut phases = Phases::default();
        assert_eq!(phases.time("forward", || 7), 7);
        phases.time("head", || ());
        let taken = phases.take();
        assert_eq!(taken.keys().copied().collect::<Vec<_>>(), ["forward", "head"]);
        assert!(phases.take().is_empty());
    }
}

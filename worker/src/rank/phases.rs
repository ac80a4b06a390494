//! Where the time of a rank goes, by phase. The one stop-watch of the training loop.

use crate::progress::{Activity, Board, Operation};
use crate::timings::Timings;
use arcface_proto::buckets::COLLECTIVE_SECONDS;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Operations that are counted one by one.
const OPERATIONS: [Operation; 5] = [
    Operation::AllReduce,
    Operation::AllGather,
    Operation::ReduceScatter,
    Operation::Broadcast,
    Operation::Barrier,
];

/// Time inside collective operations so far, most of it spent waiting for the slowest rank. Clones count together.
#[derive(Clone, Debug)]
pub struct Together(Arc<Inside>);

#[derive(Debug)]
struct Inside {
    nanoseconds: AtomicU64,
    /// By operation: times and bytes.
    operations: [(Timings, AtomicU64); OPERATIONS.len()],
}

/// The calls of one operation so far.
#[derive(Clone, Debug, PartialEq)]
pub struct Calls {
    /// Its name.
    pub operation: &'static str,
    /// Counts and seconds in the buckets of [`COLLECTIVE_SECONDS`].
    pub times: (Vec<u64>, Vec<f64>),
    /// Bytes of this rank's tensors.
    pub bytes: u64,
}

impl Default for Together {
    fn default() -> Self {
        Self(Arc::new(Inside {
            nanoseconds: AtomicU64::new(0),
            operations: OPERATIONS.map(|_| (Timings::new(COLLECTIVE_SECONDS), AtomicU64::new(0))),
        }))
    }
}

impl Together {
    /// Counts one operation on a tensor of so many bytes.
    pub fn add(&self, operation: Operation, bytes: usize, spent: Duration) {
        let nanoseconds = u64::try_from(spent.as_nanos()).unwrap_or(u64::MAX);
        self.0.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
        if let Some(index) = OPERATIONS.iter().position(|known| *known == operation) {
            let (timings, sum) = &self.0.operations[index];
            timings.add(spent);
            sum.fetch_add(bytes as u64, Ordering::Relaxed);
        }
    }

    fn spent(&self) -> Duration {
        Duration::from_nanos(self.0.nanoseconds.load(Ordering::Relaxed))
    }

    /// Operations that were called so far.
    fn calls(&self) -> Vec<Calls> {
        let all = OPERATIONS.iter().zip(&self.0.operations);
        let calls = all.map(|(operation, (timings, bytes))| Calls {
            operation: operation.name(),
            times: timings.read(),
            bytes: bytes.load(Ordering::Relaxed),
        });
        calls
            .filter(|calls| calls.times.0.iter().any(|count| *count > 0))
            .collect()
    }
}

/// Time by phase since the last [`Phases::take`]. Phases: data_wait, forward, head, backward, comm, optimizer,
/// checkpoint, eval.
#[derive(Default)]
pub struct Phases {
    spent: BTreeMap<&'static str, Duration>,
    /// The part of it outside collective operations, since the last [`Phases::take_own`].
    own: BTreeMap<&'static str, Duration>,
    together: Together,
    board: Option<Board>,
}

impl Phases {
    /// Shows on `board` which phase the rank is in.
    pub fn show_on(&mut self, board: Board) {
        self.board = Some(board);
    }

    /// Knows from `together` what of a phase was spent inside collective operations.
    pub fn know(&mut self, together: Together) {
        self.together = together;
    }

    /// Collective operations that were called so far.
    pub fn calls(&self) -> Vec<Calls> {
        self.together.calls()
    }

    /// Runs `work` and counts its time as `phase`.
    pub fn time<T>(&mut self, phase: &'static str, work: impl FnOnce() -> T) -> T {
        let together = self.together.spent();
        let begin = self.begin(phase);
        let result = work();
        let spent = begin.elapsed();
        self.add(phase, spent);
        *self.own.entry(phase).or_default() += spent.saturating_sub(self.together.spent() - together);
        result
    }

    /// A phase begins now; [`Phases::add`] counts it when it has ended.
    pub fn begin(&self, phase: &'static str) -> Instant {
        if let (Some(board), Some(activity)) = (&self.board, activity(phase)) {
            board.enter(activity);
        }
        Instant::now()
    }

    /// A step was finished in so long a time.
    pub fn stepped(&self, done: u64, took: Duration) {
        if let Some(board) = &self.board {
            board.stepped(done, took);
        }
    }

    /// Counts time that was measured elsewhere.
    pub fn add(&mut self, phase: &'static str, spent: Duration) {
        *self.spent.entry(phase).or_default() += spent;
    }

    /// Seconds by phase, and begins anew.
    pub fn take(&mut self) -> BTreeMap<&'static str, f64> {
        seconds(std::mem::take(&mut self.spent))
    }

    /// Seconds by phase that this rank spent by itself in the work of steps, outside collective operations; and begins
    /// anew.
    pub fn take_own(&mut self) -> BTreeMap<&'static str, f64> {
        seconds(std::mem::take(&mut self.own))
    }
}

fn seconds(spent: BTreeMap<&'static str, Duration>) -> BTreeMap<&'static str, f64> {
    let seconds = |(phase, spent): (&'static str, Duration)| (phase, spent.as_secs_f64());
    spent.into_iter().map(seconds).collect()
}

fn activity(phase: &str) -> Option<Activity> {
    Some(match phase {
        "data_wait" => Activity::DataWait,
        "forward" => Activity::Forward,
        "head" => Activity::Head,
        "backward" => Activity::Backward,
        "comm" => Activity::Comm,
        "optimizer" => Activity::Optimizer,
        "checkpoint" => Activity::Checkpoint,
        "eval" => Activity::Evaluation,
        _ => return None,
    })
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

    #[test]
    fn what_all_ranks_do_together_is_not_a_ranks_own() {
        let mut phases = Phases::default();
        let together = Together::default();
        phases.know(together.clone());
        // All of the time of a phase, and more: a clock may tick between two readings.
        phases.time("head", || {
            together.add(Operation::AllReduce, 8, Duration::from_secs(1000))
        });
        phases.add("checkpoint", Duration::from_secs(5));
        assert!(phases.take()["head"] < 1000.0);
        phases.time("forward", || {
            let begin = Instant::now();
            while begin.elapsed() < Duration::from_millis(1) {}
        });
        let own = phases.take_own();
        assert_eq!(own.keys().copied().collect::<Vec<_>>(), ["forward", "head"]);
        assert!(own["head"] == 0.0 && own["forward"] >= 0.001, "{own:?}");
        assert!(phases.take_own().is_empty());
    }

    #[test]
    fn operations_are_counted_by_name() {
        let mut phases = Phases::default();
        let together = Together::default();
        phases.know(together.clone());
        assert_eq!(phases.calls(), []);
        together.add(Operation::AllGather, 100, Duration::from_millis(1));
        together.add(Operation::AllGather, 20, Duration::from_millis(3));
        together.add(Operation::Barrier, 0, Duration::from_secs(60));
        let calls = phases.calls();
        let seen: Vec<_> = calls.iter().map(|calls| (calls.operation, calls.bytes)).collect();
        assert_eq!(seen, [("all_gather", 120), ("barrier", 0)]);
        assert_eq!(calls[0].times.0[2..4], [1, 1]);
        assert_eq!(calls[1].times.1.last(), Some(&60.0), "longer than every bound");
    }
}

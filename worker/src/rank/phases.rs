//! Where the time of a rank goes, by phase. The one stop-watch of the training loop.

use crate::progress::{Activity, Board};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Time by phase since the last [`Phases::take`]. Phases: data_wait, forward, head, backward, comm, optimizer,
/// checkpoint, eval.
#[derive(Default)]
pub struct Phases {
    spent: BTreeMap<&'static str, Duration>,
    board: Option<Board>,
}

impl Phases {
    /// Shows on `board` which phase the rank is in.
    pub fn show_on(&mut self, board: Board) {
        self.board = Some(board);
    }

    /// Runs `work` and counts its time as `phase`.
    pub fn time<T>(&mut self, phase: &'static str, work: impl FnOnce() -> T) -> T {
        let begin = self.begin(phase);
        let result = work();
        self.add(phase, begin.elapsed());
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
        std::mem::take(&mut self.spent)
            .into_iter()
            .map(|(phase, spent)| (phase, spent.as_secs_f64()))
            .collect()
    }
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
}

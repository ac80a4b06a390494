//! When a rank counts as hung. Pure: what it wrote on its board and times are arguments.
//!
//! A rank that changes nothing on its board for its limit hangs. Ranks train in step, so one that hangs, or whose disk is
//! slow, makes all others wait in a collective operation: that is no fault of theirs, and their limit is long. One that
//! was stopped by a signal is a culprit wherever it stands, and has the shortest limit: it cannot just be slow.

use crate::progress::{Activity, Progress};
use std::time::{Duration, Instant};

/// Of its longest recent step, a rank may take so many for one thing.
const STEPS: u32 = 5;
/// A step may take so long, whatever those before it took; also the limit of steps before one is known.
const LONGEST: Duration = Duration::from_secs(300);
/// Data on slow disks, an evaluation's batch, a checkpoint that waits for its disk.
const ASIDE: Duration = Duration::from_secs(300);
/// In a collective operation: as long as the operation itself waits for a peer, and a little.
const WAITING: Duration = Duration::from_secs(630);
/// Opening data, meeting the peers, reading a checkpoint.
const STARTING: Duration = Duration::from_secs(600);
/// The last checkpoint may wait five minutes for a coordinator that is away, and once more to be heard of.
const FINISHING: Duration = Duration::from_secs(900);

/// Between two looks no more than this counts: the agent looks with every heartbeat.
const LOOK: Duration = Duration::from_secs(2);

/// A rank that hangs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stall {
    /// How long nothing has changed.
    pub silent: Duration,
    /// What is known of it, for people.
    pub what: String,
}

/// Watches one rank. It counts the time that it saw pass: an agent that was itself stopped for a while, with its machine, learns
/// nothing from that about its ranks.
#[derive(Debug)]
pub struct Watchdog {
    last: Option<Progress>,
    looked: Instant,
    silent: Duration,
    stopped: Duration,
}

impl Watchdog {
    /// For a rank that was started at `now`.
    pub fn new(now: Instant) -> Self {
        Self {
            last: None,
            looked: now,
            silent: Duration::ZERO,
            stopped: Duration::ZERO,
        }
    }

    /// What follows from the board as it is read at `now` (nothing if it cannot be read at this moment). `stopped` says that
    /// the process was stopped by a signal; `floor` is the shortest limit of a step.
    pub fn look(
        &mut self,
        seen: Option<Progress>,
        stopped: bool,
        floor: Duration,
        now: Instant,
    ) -> Option<Stall> {
        let passed = now.saturating_duration_since(self.looked).min(LOOK);
        self.looked = now;
        if let Some(seen) = seen
            && self.last.is_none_or(|last| last.updates != seen.updates)
        {
            self.last = Some(seen);
            self.silent = Duration::ZERO;
            self.stopped = Duration::ZERO;
            return None;
        }
        let progress = self.last.unwrap_or_default();
        self.silent += passed;
        self.stopped = if stopped {
            self.stopped + passed
        } else {
            Duration::ZERO
        };
        let limit = match progress.in_operation {
            true => WAITING,
            false => limit(&progress, floor),
        };
        (self.silent > limit || self.stopped > floor).then(|| Stall {
            silent: self.silent,
            what: words(&progress, stopped, self.silent),
        })
    }
}

fn limit(progress: &Progress, floor: Duration) -> Duration {
    match progress.activity {
        Activity::Starting => STARTING,
        Activity::Finishing => FINISHING,
        Activity::DataWait | Activity::Evaluation | Activity::Checkpoint => ASIDE,
        Activity::Forward | Activity::Head | Activity::Backward | Activity::Comm | Activity::Optimizer => {
            match progress.longest_step_us {
                0 => LONGEST,
                longest => {
                    (Duration::from_micros(longest).saturating_mul(STEPS)).clamp(floor, LONGEST.max(floor))
                }
            }
        }
    }
}

fn words(progress: &Progress, stopped: bool, silent: Duration) -> String {
    let mut words = format!(
        "no progress for {:.1} s after step {}, {}",
        silent.as_secs_f64(),
        progress.step,
        progress.activity.words()
    );
    if stopped {
        words += ", stopped by a signal";
    }
    if let Some(operation) = progress.last_operation() {
        words += if progress.in_operation {
            "; inside "
        } else {
            "; last collective "
        };
        words += &operation;
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Operation;

    const FLOOR: Duration = Duration::from_secs(5);

    fn at(step: u64, activity: Activity, step_ms: u64) -> Progress {
        Progress {
            updates: step * 10,
            activity,
            step,
            longest_step_us: step_ms * 1000,
            operation: Operation::AllReduce,
            in_operation: false,
            operations: step * 3,
            operation_bytes: 4096,
        }
    }

    /// Seconds after which a rank that wrote `progress` last counts as hung, looked at twice a second.
    fn detected_after(progress: Progress, stopped: bool) -> u64 {
        let start = Instant::now();
        let mut dog = Watchdog::new(start);
        let hangs = |half_seconds: &u64| {
            let now = start + Duration::from_millis(500 * half_seconds);
            dog.look(Some(progress), stopped, FLOOR, now).is_some()
        };
        (0..4000).find(hangs).expect("a limit") / 2
    }

    #[test]
    fn limits_follow_the_activity_and_the_longest_step() {
        let waiting = |progress| Progress {
            in_operation: true,
            ..progress
        };
        for (progress, stopped, seconds) in [
            (at(9, Activity::Forward, 50), false, 5),
            (at(9, Activity::Head, 4_000), false, 20),
            (at(9, Activity::Head, 100_000), false, 300),
            (at(9, Activity::Backward, 0), false, 300),
            // Those that wait for others have much time; those that are stopped have no more than the floor.
            (waiting(at(9, Activity::Comm, 50)), false, 630),
            (waiting(at(9, Activity::Comm, 50)), true, 5),
            (at(9, Activity::Forward, 50), true, 5),
            (at(9, Activity::Forward, 20_000), true, 5),
            (at(0, Activity::Starting, 0), true, 5),
            (at(9, Activity::DataWait, 50), false, 300),
            (at(9, Activity::Evaluation, 50), false, 300),
            (at(9, Activity::Checkpoint, 50), false, 300),
            (at(0, Activity::Starting, 0), false, 600),
            (at(9, Activity::Finishing, 50), false, 900),
        ] {
            assert_eq!(
                detected_after(progress, stopped),
                seconds,
                "{progress:?}, stopped: {stopped}"
            );
        }
    }

    #[test]
    fn any_change_is_progress_and_an_unreadable_board_is_none() {
        let start = Instant::now();
        let second = |s| start + Duration::from_secs(s);
        let mut dog = Watchdog::new(start);
        for s in 0..60 {
            let progress = at(s / 4 + 1, Activity::Forward, 50);
            assert_eq!(
                dog.look(Some(progress), false, FLOOR, second(s)),
                None,
                "at {s} s"
            );
        }
        // The last change was at 56 s.
        assert_eq!(dog.look(None, false, FLOOR, second(60)), None);
        assert_eq!(dog.look(None, false, FLOOR, second(61)), None);
        let stall = dog.look(None, false, FLOOR, second(62)).expect("6 s");
        assert_eq!(stall.silent, Duration::from_secs(6));
        assert_eq!(
            stall.what,
            "no progress for 6.0 s after step 15, in the forward pass; last collective all_reduce #45 of 4096 bytes"
        );
    }

    #[test]
    fn a_rank_that_never_wrote_has_the_time_of_a_start() {
        let start = Instant::now();
        let mut dog = Watchdog::new(start);
        let hangs = |s: &u64| {
            dog.look(None, false, FLOOR, start + Duration::from_secs(*s))
                .is_some()
        };
        assert_eq!((0..1000).find(hangs), Some(STARTING.as_secs() + 1));
    }

    #[test]
    fn an_agent_that_slept_blames_nobody_for_it() {
        let start = Instant::now();
        let progress = Some(at(9, Activity::Forward, 50));
        let mut dog = Watchdog::new(start);
        assert_eq!(dog.look(progress, false, FLOOR, start), None);
        let woken = start + Duration::from_secs(3600);
        assert_eq!(dog.look(progress, true, FLOOR, woken), None);
        assert_eq!(
            dog.look(progress, false, FLOOR, woken + Duration::from_secs(2)),
            None
        );
        assert!(
            dog.look(progress, false, FLOOR, woken + Duration::from_secs(4))
                .is_some()
        );
    }
}

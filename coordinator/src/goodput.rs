//! Pure: what the time of a job went into, from its submission to its end. The kinds add up to the time that was accounted
//! for, to the millisecond. Times are arguments.
//!
//! While a job trains, time is accounted for when rank 0 reports steps: only then is it known what it was good for. What had not
//! been reported when a generation failed was spent on nothing that lasted.

use crate::job::Phase;

/// What time goes into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Steps that no generation had reported before, and their evaluations.
    Productive,
    /// Steps that were done before and lost.
    Redone,
    /// Starting, failing and stopping: everything without a step that counts.
    Restart,
    /// Checkpoints that hold up training.
    Checkpoint,
    /// Waiting for the first ranks.
    Queued,
}

impl Use {
    /// Every use.
    pub const ALL: [Self; 5] = [
        Self::Productive,
        Self::Redone,
        Self::Restart,
        Self::Checkpoint,
        Self::Queued,
    ];

    /// Its name as a label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Productive => "productive",
            Self::Redone => "redone",
            Self::Restart => "restart",
            Self::Checkpoint => "checkpoint",
            Self::Queued => "queued",
        }
    }
}

/// Steps that rank 0 has reported, since the report before.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Steps {
    /// Steps finished before.
    pub from: u64,
    /// Steps finished now.
    pub to: u64,
    /// Time of it in which checkpoints held up training.
    pub checkpoint_ms: u64,
}

/// The account of one job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Goodput {
    /// Up to here it is accounted for.
    now_ms: u64,
    /// By use.
    spent_ms: [u64; Use::ALL.len()],
    /// Most steps that were ever reported.
    best: u64,
}

impl Goodput {
    /// Begins at `now_ms`, of a job that has finished `best` steps.
    pub fn begin(now_ms: u64, best: u64) -> Self {
        Self {
            now_ms,
            best,
            ..Self::default()
        }
    }

    /// Milliseconds that went into a use.
    pub fn spent_ms(&self, what: Use) -> u64 {
        self.spent_ms[what as usize]
    }

    /// The job was in `phase` and still is. Of one that trains, only its steps tell.
    pub fn passed(&mut self, phase: Phase, now_ms: u64) {
        if phase != Phase::Running {
            self.moved(phase, phase, now_ms);
        }
    }

    /// The job went from one phase to another.
    pub fn moved(&mut self, from: Phase, to: Phase, now_ms: u64) {
        let what = match from {
            Phase::Queued => Use::Queued,
            // The last steps are not reported in metrics.
            Phase::Running if to == Phase::Succeeded => Use::Productive,
            Phase::Starting | Phase::Running | Phase::Recovering | Phase::Cancelling => Use::Restart,
            Phase::Succeeded | Phase::Failed | Phase::Cancelled => return,
        };
        let passed = self.advance(now_ms);
        self.spend(what, passed);
    }

    /// Steps were reported. Without any, nothing is known yet.
    pub fn trained(&mut self, steps: Steps, now_ms: u64) {
        let Some(count) = steps.to.checked_sub(steps.from).filter(|count| *count > 0) else {
            return;
        };
        let passed = self.advance(now_ms);
        let checkpoint = steps.checkpoint_ms.min(passed);
        let again = self.best.clamp(steps.from, steps.to) - steps.from;
        let trained = passed - checkpoint;
        let redone = u128::from(trained) * u128::from(again) / u128::from(count);
        let redone = u64::try_from(redone).unwrap_or(trained);
        self.spend(Use::Checkpoint, checkpoint);
        self.spend(Use::Redone, redone);
        self.spend(Use::Productive, trained - redone);
        self.best = self.best.max(steps.to);
    }

    fn advance(&mut self, now_ms: u64) -> u64 {
        let passed = now_ms.saturating_sub(self.now_ms);
        self.now_ms += passed;
        passed
    }

    fn spend(&mut self, what: Use, ms: u64) {
        self.spent_ms[what as usize] += ms;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn steps(from: u64, to: u64, checkpoint_ms: u64) -> Steps {
        Steps {
            from,
            to,
            checkpoint_ms,
        }
    }

    fn spent(account: &Goodput) -> [u64; 5] {
        Use::ALL.map(|what| account.spent_ms(what))
    }

    #[test]
    fn a_failure_costs_a_restart_and_the_steps_that_are_done_again() {
        let mut account = Goodput::begin(1_000, 0);
        account.moved(Phase::Queued, Phase::Starting, 4_000);
        account.moved(Phase::Starting, Phase::Running, 6_000);
        account.trained(steps(0, 10, 500), 16_500);
        account.trained(steps(10, 20, 0), 26_500);
        assert_eq!(spent(&account), [20_000, 0, 2_000, 500, 3_000]);
        // Ranks die three seconds after a report, and come back at step 10.
        account.moved(Phase::Running, Phase::Recovering, 29_500);
        account.passed(Phase::Recovering, 30_000);
        account.moved(Phase::Recovering, Phase::Starting, 31_500);
        account.moved(Phase::Starting, Phase::Running, 32_500);
        assert_eq!(spent(&account), [20_000, 0, 8_000, 500, 3_000]);
        // Half of these had been done before.
        account.trained(steps(10, 30, 0), 52_500);
        assert_eq!(spent(&account), [30_000, 10_000, 8_000, 500, 3_000]);
        account.moved(Phase::Running, Phase::Succeeded, 53_500);
        account.passed(Phase::Succeeded, 99_999);
        assert_eq!(spent(&account), [31_000, 10_000, 8_000, 500, 3_000]);
    }

    #[test]
    fn a_report_without_steps_or_from_another_time_changes_nothing() {
        let mut account = Goodput::begin(5_000, 7);
        account.passed(Phase::Running, 6_000);
        account.trained(steps(7, 7, 100), 6_000);
        account.trained(steps(9, 7, 100), 6_000);
        assert_eq!(spent(&account), [0; 5]);
        account.trained(steps(7, 8, 100_000), 6_000);
        assert_eq!(spent(&account), [0, 0, 0, 1_000, 0], "no more than there was");
        account.trained(steps(8, 9, 0), 4_000);
        assert_eq!(spent(&account), [0, 0, 0, 1_000, 0], "time does not run back");
    }

    proptest! {
        /// Whatever happens to a job, the kinds add up to the time since it was submitted.
        #[test]
        fn kinds_add_up_to_the_time_that_has_passed(
            events in prop::collection::vec((0u64..5_000, 0usize..8, 0u64..40, 0u64..9_000), 0..60)
        ) {
            let mut account = Goodput::begin(100, 0);
            let (mut now, mut phase, mut step) = (100, Phase::Queued, 0);
            for (ms, next, count, checkpoint_ms) in events {
                if phase.is_terminal() {
                    break;
                }
                now += ms;
                if phase == Phase::Running && next < 4 {
                    account.trained(steps(step, step + count, checkpoint_ms), now);
                    step += count;
                } else {
                    account.moved(phase, Phase::ALL[next], now);
                    phase = Phase::ALL[next];
                    step = step.saturating_sub(count);
                }
            }
            // What a training job has not reported yet is known at its next move.
            account.moved(phase, Phase::Recovering, now);
            let total: u64 = spent(&account).iter().sum();
            let accounted = if phase.is_terminal() { account.now_ms } else { now };
            prop_assert_eq!(total, accounted - 100);
        }
    }
}

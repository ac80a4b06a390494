//! What a rank tells of its own pace, so that the coordinator can compare the ranks: training is synchronous, and the steps
//! of all are as slow as those of the slowest. Times are arguments, since the training began.

use arcface_proto::v1::RankPace;
use std::collections::BTreeMap;
use std::time::Duration;

/// Shortest time between two tellings.
const EVERY: Duration = Duration::from_secs(1);

/// Since when it was not told.
#[derive(Clone, Copy, Debug)]
pub struct OwnPace {
    told: Duration,
    step: u64,
}

impl OwnPace {
    /// Training begins after `step` steps.
    pub fn begin(step: u64) -> Self {
        Self {
            told: Duration::ZERO,
            step,
        }
    }

    /// True if the last telling is long enough ago.
    pub fn is_due(&self, now: Duration) -> bool {
        now.saturating_sub(self.told) >= EVERY
    }

    /// What to tell at `now`, after `done` steps: seconds that this rank spent by itself since the last time.
    pub fn tell(&mut self, now: Duration, done: u64, own: BTreeMap<&'static str, f64>) -> RankPace {
        let steps = done - self.step;
        (self.told, self.step) = (now, done);
        RankPace {
            step: done,
            steps,
            busy_seconds: own
                .into_iter()
                .map(|(phase, seconds)| (phase.to_owned(), seconds))
                .collect(),
            figures: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_told_at_most_once_a_second_and_of_the_steps_since() {
        let mut pace = OwnPace::begin(100);
        let at = Duration::from_millis;
        assert!(!pace.is_due(at(999)));
        assert!(pace.is_due(at(1000)));
        let told = pace.tell(at(1500), 130, BTreeMap::from([("head", 0.5)]));
        assert_eq!((told.step, told.steps), (130, 30));
        assert_eq!(told.busy_seconds["head"], 0.5);
        assert!(!pace.is_due(at(2499)) && pace.is_due(at(2500)));
        assert_eq!(pace.tell(at(2500), 140, BTreeMap::new()).steps, 10);
    }
}

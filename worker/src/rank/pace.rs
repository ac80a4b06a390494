//! When a checkpoint is due by the clock, what checkpoints cost the training, and how often they should be made. Times are
//! arguments, since the training began.

use std::time::Duration;

/// The checkpoints of one rank so far.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    every: Option<Duration>,
    last: Duration,
    stall: Option<Duration>,
    /// Mean time until one of the ranks fails.
    mttf: Duration,
    told: Option<Duration>,
}

impl Pace {
    /// A checkpoint every so often; none by the clock without `every`. Of `ranks` ranks, each fails once in
    /// `rank_mttf_hours` on average.
    pub fn new(every_seconds: Option<f64>, rank_mttf_hours: f64, ranks: u32) -> Self {
        let seconds = |seconds: f64| Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
        Self {
            every: every_seconds.map(seconds),
            last: Duration::ZERO,
            stall: None,
            mttf: seconds(rank_mttf_hours * 3600.0 / f64::from(ranks.max(1))),
            told: None,
        }
    }

    /// True if the last checkpoint is long enough ago.
    pub fn is_due(&self, now: Duration) -> bool {
        self.every
            .is_some_and(|every| now.saturating_sub(self.last) >= every)
    }

    /// A checkpoint was taken at `now`, after it had held up training for `stall`.
    pub fn taken(&mut self, now: Duration, stall: Duration) {
        self.last = now;
        self.stall = Some(stall);
    }

    /// How long the last one held up training.
    pub fn stall(&self) -> Option<Duration> {
        self.stall
    }

    /// The time between checkpoints that loses the least: Young's first order (Young 1974; Daly 2006 refines it where the
    /// stall is no small part of the time between failures, which it is not here). Half an interval is lost a failure, and
    /// a stall an interval: their sum is least at sqrt(2 x stall x time between failures).
    pub fn suggested(&self) -> Option<Duration> {
        let product = 2.0 * self.stall?.as_secs_f64() * self.mttf.as_secs_f64();
        Duration::try_from_secs_f64(product.sqrt()).ok()
    }

    /// What to tell people: at first, and whenever the suggestion has doubled or halved.
    pub fn news(&mut self) -> Option<String> {
        let (stall, suggested) = (self.stall?, self.suggested()?);
        let moved = self
            .told
            .is_none_or(|told| suggested > told * 2 || suggested * 2 < told);
        moved.then(|| {
            self.told = Some(suggested);
            format!(
                "a checkpoint holds up training for {:.1} ms; with a failure in {:.0} h, one every {:.0} s loses the least time",
                stall.as_secs_f64() * 1e3,
                self.mttf.as_secs_f64() / 3600.0,
                suggested.as_secs_f64()
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    #[test]
    fn it_is_due_so_long_after_the_last_one() {
        let mut pace = Pace::new(Some(60.0), 8000.0, 1);
        assert!(!pace.is_due(59 * S) && pace.is_due(60 * S));
        pace.taken(70 * S, S);
        assert!(!pace.is_due(129 * S) && pace.is_due(130 * S));
        assert!(!Pace::new(None, 8000.0, 1).is_due(Duration::MAX));
    }

    #[test]
    fn the_suggestion_is_youngs() {
        // 0.15 s at 126 h, 64 ranks of 8064 h: about 370 s.
        let mut pace = Pace::new(None, 8064.0, 64);
        assert_eq!((pace.suggested(), pace.news()), (None, None));
        pace.taken(S, Duration::from_millis(150));
        let suggested = pace.suggested().expect("measured").as_secs_f64();
        assert!((suggested - 368.9).abs() < 0.1, "{suggested}");
        assert_eq!(
            pace.news().expect("the first"),
            "a checkpoint holds up training for 150.0 ms; with a failure in 126 h, one every 369 s loses the least time"
        );
        pace.taken(2 * S, Duration::from_millis(300));
        assert_eq!(pace.news(), None);
        pace.taken(3 * S, Duration::from_millis(601));
        assert!(pace.news().is_some());
    }
}

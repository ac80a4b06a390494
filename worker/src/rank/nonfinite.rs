//! Losses and gradients that are not finite: what follows one, and which samples are behind it. Whether there is one is known
//! to all ranks alike (they have the same bits of losses and summed gradients), and so is everything here.

use crate::data::{Dataset, Epochs};
use arcface_proto::spec::OnNonfinite;
use std::sync::Arc;

/// Left-out updates in a row, after which it is no accident of a batch.
pub const MOST_IN_A_ROW: u32 = 10;
/// Rollbacks of a job, likewise. Each leaves out a step for good.
pub const MOST_ROLLBACKS: usize = 3;
/// Samples that a message names.
const NAMED: usize = 8;

/// What follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The update is left out.
    Skip,
    /// The job fails.
    Stop,
    /// The generation ends; the next leaves out the step.
    Rollback,
}

/// Where the number came up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Site {
    /// The loss in fp16, whose range activations may leave.
    LossInFp16,
    /// The loss in another precision, or a gradient that no loss scale is to blame for.
    Unexpected,
}

/// Counts, and decides by the job's policy.
#[derive(Clone, Copy, Debug)]
pub struct Guard {
    policy: OnNonfinite,
    in_a_row: u32,
    skipped: u64,
}

impl Guard {
    /// Nothing has happened yet.
    pub fn new(policy: OnNonfinite) -> Self {
        Self {
            policy,
            in_a_row: 0,
            skipped: 0,
        }
    }

    /// What follows a number that is not finite, in a job that was rolled back `rollbacks` times.
    pub fn judge(&mut self, site: Site, rollbacks: usize) -> Verdict {
        self.in_a_row += 1;
        let few = self.in_a_row <= MOST_IN_A_ROW;
        match self.policy {
            _ if few && site == Site::LossInFp16 => Verdict::Skip,
            OnNonfinite::Skip if few => Verdict::Skip,
            OnNonfinite::Rollback if rollbacks < MOST_ROLLBACKS => Verdict::Rollback,
            _ => Verdict::Stop,
        }
    }

    /// An update of the backbone was made.
    pub fn updated(&mut self) {
        self.in_a_row = 0;
    }

    /// A step was left out, or its update reached the head alone.
    pub fn skipped(&mut self) {
        self.skipped += 1;
    }

    /// Such steps so far; `None` before the first.
    pub fn skipped_steps(&self) -> Option<u64> {
        Some(self.skipped).filter(|skipped| *skipped > 0)
    }

    /// Why it came to the end, where the last number alone does not say it; empty or with a semicolon before it.
    pub fn before(&self, rollbacks: usize) -> String {
        let mut before = String::new();
        if self.in_a_row > 1 {
            before += &format!("; {} updates in a row before it were left out", self.in_a_row - 1);
        }
        if rollbacks > 0 {
            before += &format!("; the job was rolled back {rollbacks} times before");
        }
        before
    }
}

/// Tells which image a row of a micro-batch is.
pub struct Samples {
    /// The training set.
    pub dataset: Arc<dyn Dataset>,
    /// The order of its samples.
    pub epochs: Epochs,
    /// Rows of a rank's micro-batch at most.
    pub batch_size: u32,
}

impl Samples {
    /// Names of `rows` of all ranks' micro-batch `micro` of `step`, for people: `train.rec: key 7 (rank 1)`.
    pub fn names(&self, step: u64, micro: usize, world_size: u32, rows: &[u32]) -> String {
        let (epoch, epoch_step) = (
            step / self.epochs.steps_per_epoch(),
            step % self.epochs.steps_per_epoch(),
        );
        // Row by row of the micro-batch over all ranks: who has it, and its position in the epoch.
        let positions: Vec<(u32, u64)> = (0..world_size)
            .flat_map(|rank| {
                let slices = self
                    .epochs
                    .rank_slice(epoch_step, rank, world_size, self.batch_size);
                slices
                    .into_iter()
                    .nth(micro)
                    .into_iter()
                    .flatten()
                    .map(move |position| (rank, position))
            })
            .collect();
        let mut names: Vec<String> = rows
            .iter()
            .filter_map(|row| positions.get(*row as usize))
            .take(NAMED)
            .map(|(rank, position)| {
                let name = self.dataset.name(self.epochs.position(epoch, *position));
                format!("{name} (rank {rank})")
            })
            .collect();
        if rows.len() > NAMED {
            names.push(format!("{} more", rows.len() - NAMED));
        }
        if names.is_empty() {
            names.push("no sample in particular".to_owned());
        }
        names.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Site::{LossInFp16, Unexpected};
    use Verdict::{Rollback, Skip, Stop};

    fn verdicts(policy: OnNonfinite, site: Site, rollbacks: usize) -> Vec<Verdict> {
        let mut guard = Guard::new(policy);
        (0..12).map(|_| guard.judge(site, rollbacks)).collect()
    }

    #[test]
    fn the_policy_decides() {
        let ten_skips_and = |end: Verdict| [vec![Skip; 10], vec![end; 2]].concat();
        assert_eq!(verdicts(OnNonfinite::Stop, Unexpected, 0), [Stop; 12]);
        assert_eq!(verdicts(OnNonfinite::Skip, Unexpected, 0), ten_skips_and(Stop));
        assert_eq!(verdicts(OnNonfinite::Rollback, Unexpected, 2), [Rollback; 12]);
        assert_eq!(verdicts(OnNonfinite::Rollback, Unexpected, 3), [Stop; 12]);
        assert_eq!(verdicts(OnNonfinite::Stop, LossInFp16, 0), ten_skips_and(Stop));
        assert_eq!(verdicts(OnNonfinite::Skip, LossInFp16, 0), ten_skips_and(Stop));
        assert_eq!(
            verdicts(OnNonfinite::Rollback, LossInFp16, 0),
            ten_skips_and(Rollback)
        );
    }

    #[test]
    fn an_update_begins_the_count_anew_and_the_sum_goes_on() {
        let mut guard = Guard::new(OnNonfinite::Skip);
        assert_eq!(guard.skipped_steps(), None);
        for _ in 0..3 {
            for _ in 0..MOST_IN_A_ROW {
                assert_eq!(guard.judge(Unexpected, 0), Skip);
                guard.skipped();
            }
            guard.updated();
        }
        assert_eq!(guard.skipped_steps(), Some(30));
        assert_eq!(guard.before(0), "");
    }

    #[test]
    fn the_end_says_what_came_before() {
        let mut guard = Guard::new(OnNonfinite::Skip);
        for _ in 0..3 {
            assert_eq!(guard.judge(Unexpected, 0), Skip);
        }
        assert_eq!(guard.before(0), "; 2 updates in a row before it were left out");
        assert_eq!(
            Guard::new(OnNonfinite::Rollback).before(3),
            "; the job was rolled back 3 times before"
        );
    }
}

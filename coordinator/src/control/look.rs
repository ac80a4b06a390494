//! One job as the status page shows it: with what only the control task knows, where its ranks run and its curve.

use super::{Control, ControlError, Curve, Entry};
use crate::job::{Process, RankState};
use arcface_proto::{
    types::{ClassRange, JobId},
    v1,
};

/// Jobs that have ended and whose curves are kept; those of older ones are forgotten.
const KEPT_CURVES: usize = 256;

/// A job and what goes on in it.
#[derive(Clone, Debug)]
pub struct Look {
    /// The job.
    pub job: v1::Job,
    /// Ranks of the newest generation, by rank.
    pub ranks: Vec<RankLook>,
    /// Counts evaluations and checkpoints that were stored or found damaged, with this coordinator: their lists have
    /// changed if it has.
    pub history: u64,
}

/// One rank of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankLook {
    /// Where it was placed.
    pub node: String,
    /// Its process, if that is known and runs.
    pub pid: Option<u32>,
    /// What it does: "launching", "preparing", "training", "done", "ended" or "unreachable".
    pub state: &'static str,
    /// Its classes; `None` until their number is known.
    pub shard: Option<ClassRange>,
}

impl RankLook {
    fn of(rank: &RankState, shard: Option<ClassRange>) -> Self {
        let (pid, state) = match rank.process {
            Process::Launching => (None, "launching"),
            Process::Alive(pid) => (
                (pid > 0).then_some(pid),
                match (rank.done, rank.started) {
                    (true, _) => "done",
                    (false, true) => "training",
                    (false, false) => "preparing",
                },
            ),
            Process::Reaped | Process::Presumed => (None, if rank.done { "done" } else { "ended" }),
            Process::Unreachable => (None, "unreachable"),
        };
        Self {
            node: rank.node.to_string(),
            pid,
            state,
            shard,
        }
    }
}

impl Entry {
    fn look(&self) -> Look {
        let world_size = self.job.ranks.len() as u32;
        let ranks = self.job.ranks.iter().zip(0..);
        Look {
            job: self.to_wire(),
            ranks: ranks
                .map(|(rank, number)| {
                    let shard = self
                        .num_classes()
                        .map(|classes| ClassRange::of_rank(classes, number, world_size));
                    RankLook::of(rank, shard)
                })
                .collect(),
            history: self.history,
        }
    }

    /// Classes of the job: as its ranks have found them, as its checkpoint has them, or as it says itself.
    fn num_classes(&self) -> Option<u32> {
        let resume = self.resume.as_ref().map(|manifest| manifest.num_classes);
        self.classes_found.or(resume).or(self.job.spec.head.num_classes)
    }
}

impl Control {
    pub(super) fn look(&self, id: &str) -> Result<Look, ControlError> {
        Ok(self.find(id)?.look())
    }

    pub(super) fn curve(&self, id: &str) -> Result<Curve, ControlError> {
        Ok(self.find(id)?.curve.clone())
    }

    /// The curve of a job that has just ended is kept for now.
    pub(super) fn keep_curve(&mut self, id: &JobId) {
        self.kept_curves.push_back(id.clone());
        if self.kept_curves.len() > KEPT_CURVES
            && let Some(oldest) = self.kept_curves.pop_front()
            && let Some(entry) = self.jobs.get_mut(&oldest)
        {
            entry.curve = Curve::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_says_what_it_does() {
        let rank = |process, started, done| {
            let state = RankState {
                node: "a".parse().expect("a node id"),
                process,
                started,
                done,
                missing: 0,
            };
            let look = RankLook::of(&state, None);
            (look.pid, look.state)
        };
        assert_eq!(rank(Process::Launching, false, false), (None, "launching"));
        assert_eq!(rank(Process::Alive(7), false, false), (Some(7), "preparing"));
        assert_eq!(rank(Process::Alive(0), true, false), (None, "training"));
        assert_eq!(rank(Process::Alive(7), true, true), (Some(7), "done"));
        assert_eq!(rank(Process::Reaped, true, true), (None, "done"));
        assert_eq!(rank(Process::Reaped, true, false), (None, "ended"));
        assert_eq!(rank(Process::Unreachable, true, false), (None, "unreachable"));
    }
}

//! Pure: the jobs by what they need, kept from change to change: thousands may wait while a few train, and nobody walks
//! over those who wait to find out that nothing happened to them.

use crate::job::{Job, Phase};
use arcface_proto::types::{JobId, NodeId};
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
    path::{Component, Path, PathBuf},
};

/// Place of a job in the order of submission: when it was submitted, in ms since the Unix epoch, and its id.
pub type Age = (u64, JobId);

/// Sets and counts of jobs. All of it follows from the jobs alone.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    ages: BTreeSet<Age>,
    live: BTreeSet<Age>,
    /// Those that recover before those that are queued.
    waiting: BTreeSet<(bool, Age)>,
    placed: BTreeMap<NodeId, BTreeSet<Age>>,
    /// Who writes where.
    outputs: BTreeMap<PathBuf, BTreeSet<Age>>,
    queued: u32,
    active: u32,
}

/// A job's place in the order of submission.
pub fn age(job: &Job) -> Age {
    (job.submitted_unix_ms, job.id.clone())
}

/// True while a job needs attention: not at its end, or with ranks that still run.
pub fn is_live(job: &Job) -> bool {
    !job.phase.is_terminal() || job.ranks.iter().any(|rank| rank.process.occupies())
}

/// Ranks of a job that may hold a slot.
pub fn occupied(job: &Job) -> usize {
    job.ranks.iter().filter(|rank| rank.process.occupies()).count()
}

impl Ledger {
    /// A job changed from `before`, which is `None` for one that is new here.
    pub fn change(&mut self, before: Option<&Job>, after: &Job) {
        if let Some(before) = before {
            self.remove(before);
        }
        let age = age(after);
        if let Some(place) = waits(after) {
            self.waiting.insert((place, age.clone()));
        }
        if is_live(after) {
            for rank in &after.ranks {
                let jobs = self.placed.entry(rank.node.clone()).or_default();
                jobs.insert(age.clone());
            }
            let writers = self.outputs.entry(folder(&after.spec.output)).or_default();
            writers.insert(age.clone());
            self.live.insert(age.clone());
        }
        self.queued += u32::from(after.phase == Phase::Queued);
        self.active += u32::from(is_active(after));
        self.ages.insert(age);
    }

    fn remove(&mut self, job: &Job) {
        let age = age(job);
        for rank in &job.ranks {
            take_out(&mut self.placed, &rank.node, &age);
        }
        take_out(&mut self.outputs, &folder(&job.spec.output), &age);
        self.queued -= u32::from(job.phase == Phase::Queued);
        self.active -= u32::from(is_active(job));
        self.live.remove(&age);
        if let Some(place) = waits(job) {
            self.waiting.remove(&(place, age));
        }
    }

    /// Jobs from the newest to the oldest, beginning after `before`; only those that need attention if `live`.
    pub fn newest_first(&self, before: Option<&Age>, live: bool) -> impl Iterator<Item = &JobId> {
        let jobs = if live { &self.live } else { &self.ages };
        let end = before.map_or(Bound::Unbounded, Bound::Excluded);
        jobs.range((Bound::Unbounded, end)).rev().map(|(_, id)| id)
    }

    /// Jobs that need attention, oldest first.
    pub fn live(&self) -> impl ExactSizeIterator<Item = &JobId> {
        self.live.iter().map(|(_, id)| id)
    }

    /// Jobs that wait for a plan: those that recover first, then by age.
    pub fn waiting(&self) -> impl Iterator<Item = &JobId> {
        self.waiting.iter().map(|(_, (_, id))| id)
    }

    /// Those of `jobs` that wait for a plan, in the same order.
    pub fn waiting_among(&self, jobs: BTreeSet<Age>) -> BTreeSet<(bool, Age)> {
        let places = jobs
            .into_iter()
            .flat_map(|age| [(false, age.clone()), (true, age)]);
        places.filter(|place| self.waiting.contains(place)).collect()
    }

    /// Jobs that need attention with ranks of their newest generation on a node, oldest first.
    pub fn on(&self, node: &NodeId) -> impl Iterator<Item = &JobId> {
        self.placed.get(node).into_iter().flatten().map(|(_, id)| id)
    }

    /// Jobs that need attention with ranks of their newest generation on any node.
    pub fn placed(&self) -> BTreeSet<&JobId> {
        self.placed.values().flatten().map(|(_, id)| id).collect()
    }

    /// The job that needs attention and has this output directory.
    pub fn writer(&self, output: &str) -> Option<&JobId> {
        let (_, id) = self.outputs.get(&folder(output))?.first()?;
        Some(id)
    }

    /// Jobs that wait for their first generation.
    pub fn queued(&self) -> u32 {
        self.queued
    }

    /// Jobs that neither are queued nor have ended.
    pub fn active(&self) -> u32 {
        self.active
    }
}

/// An output directory, however it is written: `a/./b/` is `a/b`.
pub fn folder(output: &str) -> PathBuf {
    Path::new(output)
        .components()
        .filter(|part| *part != Component::CurDir)
        .collect()
}

fn take_out<K: Ord>(jobs: &mut BTreeMap<K, BTreeSet<Age>>, key: &K, age: &Age) {
    if let Some(ages) = jobs.get_mut(key) {
        ages.remove(age);
        if ages.is_empty() {
            jobs.remove(key);
        }
    }
}

/// Whether a job waits for a plan; true for those behind all that recover.
fn waits(job: &Job) -> Option<bool> {
    match job.phase {
        Phase::Recovering => Some(false),
        Phase::Queued => Some(true),
        _ => None,
    }
}

fn is_active(job: &Job) -> bool {
    job.phase != Phase::Queued && !job.phase.is_terminal()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::{Process, RankState};
    use arcface_proto::{convert, v1};
    use proptest::prelude::*;

    const JOBS: u64 = 4;

    fn job(number: u64) -> Job {
        let wire = v1::JobSpec {
            output: Some("out".into()),
            model: Some(v1::ModelSection {
                network: Some("tiny".into()),
                ..Default::default()
            }),
            data: Some(v1::DataSection {
                rec: Some("/data".into()),
                ..Default::default()
            }),
            ..Default::default()
        };
        let spec = convert::job_spec(&wire).expect("a valid job");
        // Two jobs a millisecond.
        Job::new(JobId::from_random(number), spec, number / 2)
    }

    const PROCESSES: [Process; 5] = [
        Process::Launching,
        Process::Alive(7),
        Process::Reaped,
        Process::Unreachable,
        Process::Presumed,
    ];

    prop_compose! {
        fn change()(
            job in 0..JOBS,
            phase in prop::sample::select(Phase::ALL.to_vec()),
            ranks in prop::collection::vec((0u8..3, prop::sample::select(PROCESSES.to_vec())), 0..4),
        ) -> (u64, Phase, Vec<RankState>) {
            let rank = |(node, process)| RankState {
                node: format!("n{node}").parse().expect("node id"),
                process,
                started: false,
                done: false,
                missing: 0,
            };
            (job, phase, ranks.into_iter().map(rank).collect())
        }
    }

    proptest! {
        /// After any changes, what was kept from change to change is what a count of all jobs gives.
        #[test]
        fn it_equals_a_recount(changes in prop::collection::vec(change(), 1..60)) {
            let mut jobs: BTreeMap<u64, Job> = BTreeMap::new();
            let mut ledger = Ledger::default();
            for (number, phase, ranks) in changes {
                let before = jobs.get(&number).cloned();
                let after = Job { phase, ranks, ..job(number) };
                ledger.change(before.as_ref(), &after);
                jobs.insert(number, after);

                let mut recount = Ledger::default();
                jobs.values().for_each(|job| recount.change(None, job));
                prop_assert_eq!(&ledger, &recount);
                let count = |wanted: &dyn Fn(&Job) -> bool| jobs.values().filter(|job| wanted(job)).count();
                prop_assert_eq!(ledger.queued() as usize, count(&|job| job.phase == Phase::Queued));
                prop_assert_eq!(ledger.active() as usize, count(&is_active));
                prop_assert_eq!(ledger.live().len(), count(&is_live));
                prop_assert_eq!(ledger.waiting().count(), count(&|job| waits(job).is_some()));
                prop_assert_eq!(ledger.newest_first(None, false).count(), jobs.len());
                prop_assert_eq!(ledger.writer("./out/"), ledger.live().next());
            }
        }
    }

    #[test]
    fn a_page_begins_after_the_job_that_ended_the_one_before() {
        let mut ledger = Ledger::default();
        for number in 0..7 {
            ledger.change(None, &job(number));
        }
        let all: Vec<JobId> = ledger.newest_first(None, false).cloned().collect();
        assert_eq!(all, (0..7).rev().map(JobId::from_random).collect::<Vec<_>>());
        let last = age(&job(4));
        let rest: Vec<&JobId> = ledger.newest_first(Some(&last), true).collect();
        assert_eq!(rest, all[3..].iter().collect::<Vec<_>>());
    }
}

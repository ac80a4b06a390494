//! Which ranks this node runs, and what a command means for them. Pure: commands and exits in, effects out; the
//! agent performs them. Generations fence everything: what belongs to an older one is refused or killed.

use arcface_proto::types::{Generation, JobId, Rank};
use arcface_proto::v1::{NodeRank, RankAssignment, RankExited};
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// One rank process.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RankKey {
    /// Job.
    pub job: JobId,
    /// Generation.
    pub generation: Generation,
    /// Rank.
    pub rank: Rank,
}

impl fmt::Display for RankKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} generation {} rank {}",
            self.job, self.generation, self.rank
        )
    }
}

impl RankKey {
    /// As the coordinator is told about it.
    pub fn to_wire(&self, pid: u32) -> NodeRank {
        NodeRank {
            job_id: self.job.to_string(),
            generation: self.generation.0,
            rank: self.rank.0,
            pid,
        }
    }
}

/// What the agent does next.
#[derive(Debug, PartialEq)]
pub enum Effect {
    /// Start a process for this assignment.
    Spawn(RankKey, Box<RankAssignment>),
    /// End this process: SIGTERM, SIGKILL after the grace.
    Kill(RankKey, Duration),
    /// Tell the coordinator.
    Report(RankExited),
    /// Log why a command was not followed.
    Refuse(String),
}

/// How a process ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExitFacts {
    /// Process id; 0 if it never ran.
    pub pid: u32,
    /// Exit status, unless a signal ended it.
    pub exit_code: Option<i32>,
    /// Signal that ended it.
    pub signal: Option<i32>,
    /// Last line of its standard error.
    pub last_error: String,
    /// It ended before anybody sent it a signal from here, though one may have been asked for since.
    pub by_itself: bool,
}

#[derive(Debug)]
enum State {
    /// Waits until older generations are reaped and a slot is free.
    Waiting(Box<RankAssignment>),
    /// Runs; `stop` once it is being killed.
    Running { pid: u32, stop: Option<Stop> },
    /// Was reaped.
    Exited(RankExited),
}

/// Why a process is being killed.
#[derive(Clone, Debug)]
struct Stop {
    /// The coordinator wanted it.
    requested: bool,
    /// What the coordinator is told if it did not.
    reason: String,
    /// How long the process had made no progress, if it was killed for that.
    stalled: Option<Duration>,
}

/// Fencing state of a job on this node.
#[derive(Debug, Default)]
struct Fence {
    /// Newest generation that was launched here.
    newest: Generation,
    /// Generations up to this one were killed.
    killed_through: Option<Generation>,
}

/// The ranks of this node.
#[derive(Debug)]
pub struct Table {
    slots: u32,
    fences: BTreeMap<JobId, Fence>,
    ranks: BTreeMap<RankKey, State>,
}

impl Table {
    /// No ranks, this many slots.
    pub fn new(slots: u32) -> Self {
        Self {
            slots,
            fences: BTreeMap::new(),
            ranks: BTreeMap::new(),
        }
    }

    /// A launch command. Repeating one changes nothing, except that an exit is reported again.
    pub fn launch(&mut self, assignment: RankAssignment) -> Vec<Effect> {
        let key = match assignment.job_id.parse() {
            Ok(job) => RankKey {
                job,
                generation: Generation(assignment.generation),
                rank: Rank(assignment.rank),
            },
            Err(invalid) => return vec![Effect::Refuse(invalid.to_string())],
        };
        let fence = self.fences.entry(key.job.clone()).or_default();
        if key.generation < fence.newest {
            let newest = fence.newest;
            return vec![Effect::Refuse(format!(
                "{key} is older than generation {newest}, which was launched here"
            ))];
        }
        if fence
            .killed_through
            .is_some_and(|killed| key.generation <= killed)
        {
            return vec![Effect::Refuse(format!("{key} was already stopped"))];
        }
        fence.newest = key.generation;
        match self.ranks.get(&key) {
            Some(State::Exited(exit)) => return vec![Effect::Report(exit.clone())],
            Some(_) => return Vec::new(),
            None => {}
        }
        // A newer generation exists, so the older ones have ended, whatever their processes think.
        let (job, generation) = (key.job.clone(), key.generation);
        let mut effects = match generation.0.checked_sub(1) {
            Some(older) => self.stop_generations(&job, Generation(older), Duration::ZERO),
            None => Vec::new(),
        };
        self.ranks.retain(|k, state| {
            k.job != job || k.generation >= generation || !matches!(state, State::Exited(_))
        });
        self.ranks.insert(key, State::Waiting(Box::new(assignment)));
        effects.extend(self.start_waiting());
        effects
    }

    /// A kill command: every rank of `job` up to `generation`.
    pub fn kill(&mut self, job: &JobId, generation: Generation, grace: Duration) -> Vec<Effect> {
        let fence = self.fences.entry(job.clone()).or_default();
        fence.killed_through = fence.killed_through.max(Some(generation));
        let mut effects = self.stop_generations(job, generation, grace);
        effects.extend(self.start_waiting());
        effects
    }

    /// Ends every rank for a reason of the agent's own.
    pub fn stop_all(&mut self, reason: &str, grace: Duration) -> Vec<Effect> {
        let stop = Stop {
            requested: false,
            reason: reason.to_owned(),
            stalled: None,
        };
        let keys: Vec<RankKey> = self.ranks.keys().cloned().collect();
        keys.into_iter()
            .flat_map(|key| self.stop(key, &stop, grace))
            .collect()
    }

    /// The process of `key` hangs: it is killed at once, and the coordinator is told why.
    pub fn hangs(&mut self, key: &RankKey, reason: &str, stalled: Duration) -> Option<Effect> {
        let stop = Stop {
            requested: false,
            reason: reason.to_owned(),
            stalled: Some(stalled),
        };
        self.stop(key.clone(), &stop, Duration::ZERO)
    }

    /// The process of `key` was started.
    pub fn spawned(&mut self, key: &RankKey, pid: u32) {
        self.ranks.insert(key.clone(), State::Running { pid, stop: None });
    }

    /// The process of `key` is gone (or could not be started).
    pub fn exited(&mut self, key: &RankKey, facts: ExitFacts) -> Vec<Effect> {
        let stop = match self.ranks.get_mut(key) {
            Some(State::Running { stop, .. }) => stop.take(),
            Some(State::Exited(_)) => return Vec::new(),
            _ => None,
        };
        let stop = stop.filter(|_| !facts.by_itself);
        let mut effects = vec![Effect::Report(self.record(key.clone(), facts, stop))];
        effects.extend(self.start_waiting());
        effects
    }

    /// Ranks whose process runs.
    pub fn running(&self) -> Vec<NodeRank> {
        self.ranks
            .iter()
            .filter_map(|(key, state)| match state {
                State::Running { pid, .. } => Some(key.to_wire(*pid)),
                _ => None,
            })
            .collect()
    }

    /// True if no process runs and none waits.
    pub fn is_idle(&self) -> bool {
        self.ranks.values().all(|state| matches!(state, State::Exited(_)))
    }

    fn stop_generations(&mut self, job: &JobId, through: Generation, grace: Duration) -> Vec<Effect> {
        let stop = Stop {
            requested: true,
            reason: String::new(),
            stalled: None,
        };
        let keys: Vec<RankKey> = self
            .ranks
            .keys()
            .filter(|key| key.job == *job && key.generation <= through)
            .cloned()
            .collect();
        keys.into_iter()
            .flat_map(|key| self.stop(key, &stop, grace))
            .collect()
    }

    fn stop(&mut self, key: RankKey, why: &Stop, grace: Duration) -> Option<Effect> {
        match self.ranks.get_mut(&key)? {
            State::Running { stop, .. } => {
                stop.get_or_insert_with(|| why.clone());
                Some(Effect::Kill(key, grace))
            }
            State::Waiting(_) => {
                let facts = ExitFacts::default();
                Some(Effect::Report(self.record(key, facts, Some(why.clone()))))
            }
            State::Exited(_) => None,
        }
    }

    fn record(&mut self, key: RankKey, facts: ExitFacts, stop: Option<Stop>) -> RankExited {
        let reason = stop.as_ref().map(|stop| stop.reason.as_str()).unwrap_or_default();
        let exit = RankExited {
            rank: Some(key.to_wire(facts.pid)),
            exit_code: facts.exit_code,
            signal: facts.signal,
            last_error: match reason {
                "" => facts.last_error,
                reason => reason.to_owned(),
            },
            requested: stop.as_ref().is_some_and(|stop| stop.requested),
            stalled_ms: stop
                .and_then(|stop| stop.stalled)
                .map(|stalled| u64::try_from(stalled.as_millis()).unwrap_or(u64::MAX)),
        };
        self.ranks.insert(key, State::Exited(exit.clone()));
        exit
    }

    /// Starts what waits, oldest key first: a free slot, and no process of an older generation of its job.
    fn start_waiting(&mut self) -> Vec<Effect> {
        let mut effects = Vec::new();
        let waiting: Vec<RankKey> = self
            .ranks
            .iter()
            .filter(|(_, state)| matches!(state, State::Waiting(_)))
            .map(|(key, _)| key.clone())
            .collect();
        for key in waiting {
            let running = |state: &State| matches!(state, State::Running { .. });
            let busy = self.ranks.values().filter(|state| running(state)).count();
            let held_by_older = self.ranks.iter().any(|(other, state)| {
                running(state) && other.job == key.job && other.generation < key.generation
            });
            if busy >= self.slots as usize || held_by_older {
                continue;
            }
            let started = State::Running { pid: 0, stop: None };
            if let Some(State::Waiting(assignment)) = self.ranks.insert(key.clone(), started) {
                effects.push(Effect::Spawn(key, assignment));
            }
        }
        effects
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const JOB: &str = "job-0123456789ab";

    fn assignment(generation: u64, rank: u32) -> RankAssignment {
        RankAssignment {
            job_id: JOB.into(),
            generation,
            rank,
            ..Default::default()
        }
    }

    fn key(generation: u64, rank: u32) -> RankKey {
        RankKey {
            job: JOB.parse().unwrap(),
            generation: Generation(generation),
            rank: Rank(rank),
        }
    }

    /// One letter and key per effect: S(pawn), K(ill), R(eport), X (refuse).
    fn show(effects: &[Effect]) -> String {
        let words: Vec<String> = effects
            .iter()
            .map(|effect| match effect {
                Effect::Spawn(key, _) => format!("S{}.{}", key.generation, key.rank),
                Effect::Kill(key, _) => format!("K{}.{}", key.generation, key.rank),
                Effect::Report(exit) => {
                    let rank = exit.rank.as_ref().unwrap();
                    format!(
                        "R{}.{}{}",
                        rank.generation,
                        rank.rank,
                        if exit.requested { "!" } else { "" }
                    )
                }
                Effect::Refuse(_) => "X".into(),
            })
            .collect();
        words.join(" ")
    }

    #[test]
    fn a_launch_is_idempotent_also_after_the_exit() {
        let mut table = Table::new(2);
        assert_eq!(show(&table.launch(assignment(1, 0))), "S1.0");
        assert_eq!(show(&table.launch(assignment(1, 0))), "");
        table.spawned(&key(1, 0), 42);
        assert_eq!(table.running()[0].pid, 42);
        assert_eq!(show(&table.launch(assignment(1, 0))), "");
        assert_eq!(show(&table.exited(&key(1, 0), ExitFacts::default())), "R1.0");
        assert_eq!(show(&table.launch(assignment(1, 0))), "R1.0");
        assert!(table.is_idle());
    }

    #[test]
    fn a_new_generation_waits_until_the_old_one_is_reaped() {
        let mut table = Table::new(4);
        table.launch(assignment(1, 0));
        table.launch(assignment(1, 1));
        assert_eq!(show(&table.launch(assignment(2, 0))), "K1.0 K1.1");
        assert_eq!(show(&table.launch(assignment(2, 1))), "K1.0 K1.1");
        assert_eq!(show(&table.exited(&key(1, 0), ExitFacts::default())), "R1.0!");
        assert_eq!(
            show(&table.exited(&key(1, 1), ExitFacts::default())),
            "R1.1! S2.0 S2.1"
        );
        assert_eq!(show(&table.launch(assignment(1, 0))), "X", "the older generation");
    }

    #[test]
    fn a_kill_covers_older_generations_and_launches_that_come_late() {
        let mut table = Table::new(1);
        table.launch(assignment(3, 0));
        table.launch(assignment(3, 1)); // waits: one slot
        assert_eq!(
            show(&table.kill(&key(4, 0).job, Generation(4), Duration::ZERO)),
            "K3.0 R3.1!"
        );
        assert_eq!(show(&table.launch(assignment(4, 0))), "X");
        assert_eq!(show(&table.exited(&key(3, 0), ExitFacts::default())), "R3.0!");
        assert_eq!(
            show(&table.exited(&key(3, 0), ExitFacts::default())),
            "",
            "told twice"
        );
        assert_eq!(show(&table.launch(assignment(5, 0))), "S5.0");
    }

    #[test]
    fn a_full_node_starts_the_next_when_a_slot_is_free() {
        let mut table = Table::new(1);
        assert_eq!(show(&table.launch(assignment(1, 0))), "S1.0");
        let mut other = assignment(7, 0);
        other.job_id = "job-ffffffffffff".into();
        assert_eq!(show(&table.launch(other)), "");
        assert_eq!(show(&table.exited(&key(1, 0), ExitFacts::default())), "R1.0 S7.0");
    }

    #[test]
    fn stopping_for_its_own_reason_tells_the_reason() {
        let mut table = Table::new(1);
        table.launch(assignment(1, 0));
        table.spawned(&key(1, 0), 9);
        assert_eq!(
            show(&table.stop_all("the worker was stopped", Duration::ZERO)),
            "K1.0"
        );
        let effects = table.exited(
            &key(1, 0),
            ExitFacts {
                pid: 9,
                signal: Some(15),
                ..Default::default()
            },
        );
        let [Effect::Report(exit)] = &effects[..] else {
            panic!("{effects:?}")
        };
        assert_eq!(exit.last_error, "the worker was stopped");
        assert!(!exit.requested);
        assert_eq!(exit.signal, Some(15));
    }

    /// The coordinator, which heard of it from a peer and wants the generation dead, would else take the peer's word for it.
    #[test]
    fn a_rank_that_ended_before_its_kill_ended_by_itself() {
        for (by_itself, requested) in [(true, false), (false, true)] {
            let mut table = Table::new(1);
            table.launch(assignment(1, 0));
            table.spawned(&key(1, 0), 9);
            assert_eq!(
                show(&table.kill(&key(1, 0).job, key(1, 0).generation, Duration::ZERO)),
                "K1.0"
            );
            let facts = ExitFacts {
                pid: 9,
                signal: Some(9),
                by_itself,
                ..Default::default()
            };
            let effects = table.exited(&key(1, 0), facts);
            let [Effect::Report(exit)] = &effects[..] else {
                panic!("{effects:?}")
            };
            assert_eq!(exit.requested, requested);
        }
    }

    #[test]
    fn a_job_id_that_is_a_path_is_refused() {
        let mut bad = assignment(1, 0);
        bad.job_id = "../../x".into();
        assert_eq!(show(&Table::new(1).launch(bad)), "X");
    }
}

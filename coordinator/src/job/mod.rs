//! Pure: the life of one job. [`step()`] takes a job and an event and returns the job after it and the effects that the
//! caller must perform, once the store has said yes. No clock, no I/O; times come in with [`Now`].
//!
//! ```text
//! Queued -> Starting -> Running -> Succeeded
//!              ^  \        |  \
//!              |   v       v   v
//!              Recovering      Failed          Cancelling -> Cancelled   (from any that is not terminal)
//! ```
//!
//! The fence: a generation is launched only when no rank of the one before can run beside it. Every rank that an
//! agent we reach may run has been reaped, and at least one rank has: training is synchronous, so the others, on
//! nodes that we do not reach, cannot finish a step without it. If no rank at all could be reaped, we wait
//! until all agents have killed theirs by themselves.

mod step;
#[cfg(test)]
mod tests;
mod words;

pub use step::step;

use crate::{
    plan::{Placement, PlanJob},
    planted::{Bug, planted},
};
use arcface_proto::{
    spec::{Elastic, JobSpec},
    types::{Generation, JobId, NodeId, Rank},
};
use std::fmt;

/// The caller's clocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// Monotonic, from any start: durations and deadlines.
    pub mono_ms: u64,
    /// Since the Unix epoch: shown to people, never compared.
    pub unix_ms: u64,
}

/// Waits and limits of a job's life.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// First wait before a restart; doubles with each failure in a row.
    pub backoff_ms: u64,
    /// Longest wait before a restart.
    pub backoff_max_ms: u64,
    /// Time for an agent to spawn a rank.
    pub spawn_ms: u64,
    /// Between SIGTERM and SIGKILL at a cancel.
    pub grace_ms: u64,
}

/// Where a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// Waits for slots.
    Queued,
    /// Ranks were launched and meet.
    Starting,
    /// All ranks train.
    Running,
    /// A generation ended with a failure; the next is on its way.
    Recovering,
    /// A cancel was accepted; ranks are being stopped.
    Cancelling,
    /// Trained to the end.
    Succeeded,
    /// Gave up.
    Failed,
    /// Ended by request.
    Cancelled,
}

impl Phase {
    /// Every phase.
    pub const ALL: [Self; 8] = [
        Self::Queued,
        Self::Starting,
        Self::Running,
        Self::Recovering,
        Self::Cancelling,
        Self::Succeeded,
        Self::Failed,
        Self::Cancelled,
    ];

    /// True once nothing can change it.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    /// True while ranks of the newest generation should run.
    pub fn wants_ranks(self) -> bool {
        matches!(self, Self::Starting | Self::Running)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Queued => "queued",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Recovering => "recovering",
            Self::Cancelling => "cancelling",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        })
    }
}

/// What is known of one rank's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Process {
    /// Its agent was told to start it.
    Launching,
    /// It runs; 0 if its process id is not known.
    Alive(u32),
    /// Its agent reaped it, or was itself restarted.
    Reaped,
    /// Its node is silent: it may run.
    Unreachable,
    /// Its node has been silent for so long that its agent has killed it.
    Presumed,
}

impl Process {
    /// True if it may hold a slot of a node that we reach.
    pub fn occupies(self) -> bool {
        matches!(self, Self::Launching | Self::Alive(_))
    }
}

/// One rank of the newest generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankState {
    /// Where it was placed.
    pub node: NodeId,
    /// Its process.
    pub process: Process,
    /// It said that its set-up is done.
    pub started: bool,
    /// It said that training is at its end, or exited with 0.
    pub done: bool,
    /// Lists of its agent in a row that it should have been on and was not.
    pub missing: u8,
}

/// Class of a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// A process ended that should not have.
    Crash,
    /// A node fell silent.
    Lost,
    /// Something did not happen in time.
    Hang,
    /// Out of memory.
    Oom,
    /// Moved off a node that is drained: not counted as a failure.
    Drained,
    /// Took room that became free, for more ranks: not counted as a failure.
    Grown,
    /// The checkpoint to resume from was damaged: not counted either, each time there is one less.
    Damaged,
    /// A rank said that it cannot go on.
    Error,
    /// A loss or gradient was not finite, and the job wants to go on without the step.
    Nonfinite,
}

impl FailureKind {
    /// Every kind.
    pub const ALL: [Self; 9] = [
        Self::Crash,
        Self::Lost,
        Self::Hang,
        Self::Oom,
        Self::Drained,
        Self::Grown,
        Self::Damaged,
        Self::Error,
        Self::Nonfinite,
    ];

    /// Name in the API and as a metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Crash => "crash",
            Self::Lost => "lost",
            Self::Hang => "hang",
            Self::Oom => "oom",
            Self::Drained => "drained",
            Self::Grown => "grown",
            Self::Damaged => "damaged",
            Self::Error => "error",
            Self::Nonfinite => "nonfinite",
        }
    }

    /// Kind of a name; unknown names (of a later version) are errors.
    pub fn parse(name: &str) -> Self {
        Self::ALL
            .into_iter()
            .find(|kind| kind.as_str() == name)
            .unwrap_or(Self::Error)
    }
}

/// One failure and the way back.
#[derive(Clone, Debug, PartialEq)]
pub struct Recovery {
    /// What died, for people.
    pub reason: String,
    /// Its class.
    pub kind: FailureKind,
    /// Generation that ended.
    pub from: Generation,
    /// When it was detected, ms since the Unix epoch.
    pub detected_unix_ms: u64,
    /// Seconds from the last sign of life to the detection.
    pub detected_s: f64,
    /// Step that training resumed from.
    pub resumed_step: Option<u64>,
    /// Finished steps that were lost.
    pub lost_steps: Option<u64>,
    /// Seconds from the last sign of life to the first new step.
    pub total_s: Option<f64>,
    /// Monotonic time of the detection; unknown after a restart of the coordinator.
    pub detected_mono_ms: Option<u64>,
    /// Training resumed from copies in the memory of nodes.
    pub from_memory: bool,
}

/// How far training is, as last reported.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Progress {
    /// Steps finished.
    pub step: u64,
    /// Steps of the whole job; 0 if unknown.
    pub total_steps: u64,
    /// Epoch, from 0.
    pub epoch: u32,
    /// Mean loss of the last interval.
    pub loss: Option<f64>,
    /// Learning rate of the last step.
    pub learning_rate: Option<f64>,
    /// Samples a second of all ranks.
    pub samples_per_second: Option<f64>,
}

/// A job.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// Its id.
    pub id: JobId,
    /// What it is to do.
    pub spec: JobSpec,
    /// Where it stands.
    pub phase: Phase,
    /// Why, for people; empty if all is well.
    pub reason: String,
    /// Newest generation; 0 before the first.
    pub generation: Generation,
    /// Its ranks.
    pub ranks: Vec<RankState>,
    /// Failures since the last committed checkpoint or whole set of copies: progress that a failure does not take away starts
    /// the count anew.
    pub failures: u32,
    /// Failures and the ways back, oldest first.
    pub recoveries: Vec<Recovery>,
    /// Steps, counted from 0, that it was rolled back from and that later generations leave out.
    pub left_out_steps: Vec<u64>,
    /// How far it is.
    pub progress: Progress,
    /// Step of the newest committed checkpoint that is not known to be damaged.
    pub checkpoint_step: Option<u64>,
    /// When it was accepted, ms since the Unix epoch.
    pub submitted_unix_ms: u64,
    /// When the newest generation first trained.
    pub started_unix_ms: Option<u64>,
    /// When it ended.
    pub ended_unix_ms: Option<u64>,
    /// Not before this monotonic time is the next generation planned.
    pub not_before_ms: u64,
    /// When the newest generation was launched, monotonic.
    pub launched_ms: u64,
    /// The newest failure was told by a rank, perhaps only because its peer had died: a better reason may follow.
    pub hearsay: bool,
    /// Ends its generation at the next committed checkpoint, to leave this node.
    pub leaving: Option<NodeId>,
    /// Ranks that there is room for, if that is more than it has: it takes them at the next committed checkpoint.
    pub room: Option<u32>,
}

impl Job {
    /// A job that was just accepted.
    pub fn new(id: JobId, spec: JobSpec, unix_ms: u64) -> Self {
        Self {
            id,
            spec,
            phase: Phase::Queued,
            reason: String::new(),
            generation: Generation(0),
            ranks: Vec::new(),
            failures: 0,
            recoveries: Vec::new(),
            left_out_steps: Vec::new(),
            progress: Progress::default(),
            checkpoint_step: None,
            submitted_unix_ms: unix_ms,
            started_unix_ms: None,
            ended_unix_ms: None,
            not_before_ms: 0,
            launched_ms: 0,
            hearsay: false,
            leaving: None,
            room: None,
        }
    }

    /// True if it trains with fewer ranks than it may have, and may take more while it runs.
    pub fn may_grow(&self) -> bool {
        self.phase == Phase::Running
            && self.leaving.is_none()
            && matches!(self.spec.elastic, Elastic::Grow | Elastic::Both)
            && self.ranks.len() < self.wishes().most as usize
    }

    /// What the planner is asked for: the wanted world, and once the job has run, what its elasticity allows. The
    /// first generation has the world that was asked for, because it fixes nothing that a wait could not mend.
    pub fn wishes(&self) -> PlanJob {
        let has_run = self.generation > Generation(0);
        let shrink = has_run && matches!(self.spec.elastic, Elastic::Shrink | Elastic::Both);
        let grow = has_run && matches!(self.spec.elastic, Elastic::Grow | Elastic::Both);
        PlanJob {
            least: if shrink {
                self.spec.min_world_size
            } else {
                self.spec.world_size
            },
            most: if grow {
                self.spec.max_world_size
            } else {
                self.spec.world_size
            },
        }
    }

    /// Nodes of the newest generation by rank.
    pub fn placement(&self) -> Placement {
        self.ranks.iter().map(|rank| rank.node.clone()).collect()
    }

    /// Whether the next generation may be planned now; if not, why, or nothing to say for a job that waits for no plan.
    ///
    /// # Errors
    /// Why not yet.
    pub fn may_launch(&self, now: Now) -> Result<(), Option<String>> {
        if !matches!(self.phase, Phase::Queued | Phase::Recovering) {
            return Err(None);
        }
        if planted(Bug::NoFence) {
            return Ok(());
        }
        if let Some((rank, state)) = self.ranks.iter().enumerate().find(|(_, r)| r.process.occupies()) {
            return Err(Some(format!(
                "waits until rank {rank} on {} has ended",
                state.node
            )));
        }
        let reaped = self.ranks.iter().any(|rank| rank.process == Process::Reaped);
        let silent = self
            .ranks
            .iter()
            .position(|rank| rank.process == Process::Unreachable);
        if let (false, Some(rank)) = (reaped, silent) {
            let node = &self.ranks[rank].node;
            return Err(Some(format!(
                "waits until rank {rank} on silent {node} has certainly ended"
            )));
        }
        match now.mono_ms < self.not_before_ms {
            true => Err(None), // The failure that it recovers from is reason enough.
            false => Ok(()),
        }
    }
}

/// How a process ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exit {
    /// Exit status; absent if a signal ended it.
    pub code: Option<i32>,
    /// Signal that ended it.
    pub signal: Option<i32>,
    /// Last line of its standard error.
    pub last_error: String,
    /// Its agent killed it because it was told to.
    pub requested: bool,
    /// Its agent killed it because it made no progress for so long.
    pub stalled_ms: Option<u64>,
}

/// What can happen to a job.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The planner's answer for a job that [may be launched](Job::may_launch), or why it could not be asked.
    Planned(Result<Placement, String>),
    /// An agent started a rank.
    Spawned {
        /// Generation.
        generation: Generation,
        /// Rank.
        rank: Rank,
        /// Process id.
        pid: u32,
    },
    /// An agent reaped a rank.
    Exited {
        /// Generation.
        generation: Generation,
        /// Rank.
        rank: Rank,
        /// How it ended.
        exit: Exit,
        /// Since the last sign of life.
        silent_ms: u64,
    },
    /// The ranks that a node's agent runs, after it joined (`joined`) or with a heartbeat.
    Listed {
        /// Node.
        node: NodeId,
        /// Ranks of this job's newest generation, with their process ids.
        ranks: Vec<(Rank, u32)>,
        /// First list on a new stream: commands sent before it that it does not show were lost.
        joined: bool,
    },
    /// A node fell silent for so long that it counts as lost.
    NodeLost {
        /// Node.
        node: NodeId,
        /// For how long.
        silent_ms: u64,
    },
    /// Another agent took a node's place: the ranks of the old one are gone.
    NodeRestarted {
        /// Node.
        node: NodeId,
    },
    /// A lost node's agent has killed its ranks by now.
    NodeOrphaned {
        /// Node.
        node: NodeId,
    },
    /// A rank is ready for its first step.
    Started {
        /// Generation.
        generation: Generation,
        /// Rank.
        rank: Rank,
        /// Step that it starts from.
        step: u64,
        /// Steps of the whole job.
        total_steps: u64,
        /// It resumes from copies in memory.
        from_memory: bool,
    },
    /// Rank 0 reported a log interval.
    Metrics {
        /// Generation.
        generation: Generation,
        /// How far it is.
        progress: Progress,
        /// Mean seconds of a step.
        step_seconds: f64,
    },
    /// A rank trained to the end.
    Finished {
        /// Generation.
        generation: Generation,
        /// Rank.
        rank: Rank,
        /// Steps finished.
        step: u64,
        /// Why that is before the last step; empty if it is not, or if another rank says it.
        reason: String,
    },
    /// A rank cannot go on.
    Error {
        /// Generation.
        generation: Generation,
        /// Rank.
        rank: Rank,
        /// Why.
        message: String,
        /// Another try cannot help.
        permanent: bool,
        /// The peer that it blames.
        peer: Option<Rank>,
        /// The step that the next generation shall leave out.
        rollback_step: Option<u64>,
    },
    /// A checkpoint is about to be committed in the same store transaction.
    Committed {
        /// Generation.
        generation: Generation,
        /// Its step.
        step: u64,
    },
    /// Every rank has copies of a step in memory.
    Copied {
        /// Generation.
        generation: Generation,
    },
    /// The checkpoint to resume from does not verify. It is set aside in the same store transaction.
    Damaged {
        /// Generation.
        generation: Generation,
        /// Rank that found it.
        rank: Rank,
        /// What is wrong with which file.
        message: String,
        /// Step of the newest committed checkpoint that is left.
        left: Option<u64>,
    },
    /// Somebody asked for the end.
    Cancel {
        /// Why, for people.
        reason: String,
    },
    /// A node is to be left after the next checkpoint.
    Drain {
        /// Node.
        node: NodeId,
    },
    /// It need not be left after all.
    Stay {
        /// Node.
        node: NodeId,
    },
    /// There is room for a world of so many ranks, or no more than the job has.
    Room(Option<u32>),
    /// Time passed.
    Tick,
}

/// What the caller must do, after the store accepted the new state if [`Effect::Persist`] is among them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Store the job first.
    Persist,
    /// Tell the agents to start all ranks that are [`Process::Launching`] (of one node, or of all).
    Launch(Option<NodeId>),
    /// Tell the agents of all ranks to stop this generation and older ones.
    Kill {
        /// Between SIGTERM and SIGKILL; 0 is SIGKILL at once.
        grace_ms: u64,
    },
    /// The generation is over: calls that wait for its ranks fail.
    EndGeneration,
    /// Ask the ranks for a checkpoint.
    CheckpointNow,
    /// Tell watchers how the job stands.
    Notify,
    /// Tell watchers of a recovery, by index.
    NotifyRecovery(usize),
}

/// A message that belongs to another generation than the newest, or to a rank that it does not have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Another generation.
    #[error("generation {got} of {job} is not the current one, {current}")]
    Stale {
        /// Job.
        job: JobId,
        /// The message's.
        got: Generation,
        /// The newest.
        current: Generation,
    },
    /// The generation ended: its job failed, was cancelled or recovers.
    #[error("generation {generation} of {job} has ended: the job is {phase}")]
    Ended {
        /// Job.
        job: JobId,
        /// The generation.
        generation: Generation,
        /// Where the job stands.
        phase: Phase,
    },
    /// No such rank.
    #[error("{job} has no rank {rank}: its world size is {world_size}")]
    NoSuchRank {
        /// Job.
        job: JobId,
        /// The message's.
        rank: Rank,
        /// Ranks there are.
        world_size: usize,
    },
}

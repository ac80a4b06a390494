//! The transitions of a job: one function an event.

use super::words::{describe, is_out_of_memory, rank_list};
use super::{
    Effect, Event, Exit, FailureKind, Job, Limits, Now, Phase, Process, Progress, RankState, Recovery,
    Refused,
};
use crate::{
    plan::Placement,
    planted::{Bug, planted},
};
use arcface_proto::types::{Generation, NodeId, Rank};

/// Lists of an agent without a rank that it should run, until the rank counts as gone: its exit may be on its way.
const MISSING_LISTS: u8 = 3;

/// The job after an event, and what the caller must do. A refused event leaves nothing behind.
///
/// # Errors
/// [`Refused`] for a message of another generation or rank.
pub fn step(job: &Job, event: &Event, now: Now, limits: &Limits) -> Result<(Job, Vec<Effect>), Refused> {
    let mut next = Transition {
        job: job.clone(),
        effects: Vec::new(),
        now,
        limits,
    };
    match event {
        Event::Planned(Ok(placement)) => next.launch(placement),
        Event::Planned(Err(reason)) => next.waits(reason),
        Event::Spawned {
            generation,
            rank,
            pid,
        } => next.spawned(*generation, *rank, *pid),
        Event::Exited {
            generation,
            rank,
            exit,
            silent_ms,
        } => next.exited(*generation, *rank, exit, *silent_ms)?,
        Event::Listed { node, ranks, joined } => next.listed(node, ranks, *joined),
        Event::NodeLost { node, silent_ms } => next.node_lost(node, *silent_ms),
        Event::NodeRestarted { node } => next.node_restarted(node),
        Event::NodeOrphaned { node } => next.node_orphaned(node),
        Event::Started {
            generation,
            rank,
            step,
            total_steps,
            from_memory,
        } => {
            next.fence(*generation, *rank)?;
            next.started(*rank, *step, *total_steps, *from_memory);
        }
        Event::Metrics {
            generation,
            progress,
            step_seconds,
        } => {
            next.fence(*generation, Rank(0))?;
            next.metrics(*progress, *step_seconds);
        }
        Event::Finished {
            generation,
            rank,
            step,
            reason,
        } => {
            next.fence(*generation, *rank)?;
            next.finished(*rank, *step, reason);
        }
        Event::Error {
            generation,
            rank,
            message,
            permanent,
            peer,
            rollback_step: Some(step),
        } if !permanent && peer.is_none() => next.roll_back(*generation, *rank, message, *step)?,
        Event::Error {
            generation,
            rank,
            message,
            permanent,
            peer,
            ..
        } => next.error(*generation, *rank, message, *permanent, *peer)?,
        Event::Committed { generation, step } => {
            next.fence(*generation, Rank(0))?;
            next.committed(*step);
        }
        Event::Copied { generation } => {
            next.fence(*generation, Rank(0))?;
            next.job.failures = 0;
        }
        Event::Damaged {
            generation,
            rank,
            message,
            left,
        } => next.damaged(*generation, *rank, message, *left)?,
        Event::Cancel { reason } => next.cancel(reason),
        Event::Drain { node } => next.drain(node),
        Event::Stay { node } => _ = next.job.leaving.take_if(|leaving| leaving == node),
        Event::Room(world_size) => next.job.room = *world_size,
        Event::Tick => next.tick(),
    }
    next.settle();
    Ok((next.job, next.effects))
}

struct Transition<'a> {
    job: Job,
    effects: Vec<Effect>,
    now: Now,
    limits: &'a Limits,
}

impl Transition<'_> {
    fn effect(&mut self, effect: Effect) {
        if !self.effects.contains(&effect) {
            self.effects.push(effect);
        }
    }

    /// A change that must survive and that watchers see.
    fn changed(&mut self) {
        self.effect(Effect::Persist);
        self.effect(Effect::Notify);
    }

    fn enter(&mut self, phase: Phase, reason: impl Into<String>) {
        self.job.phase = phase;
        self.job.reason = reason.into();
        if phase.is_terminal() {
            self.job.ended_unix_ms = Some(self.now.unix_ms);
            self.job.leaving = None;
            self.job.room = None;
        }
        self.changed();
    }

    /// Accepts a message only from a rank of the newest generation while that stands.
    fn fence(&self, generation: Generation, rank: Rank) -> Result<(), Refused> {
        let job = &self.job;
        if generation != job.generation && !planted(Bug::NoGenerationCompare) {
            return Err(Refused::Stale {
                job: job.id.clone(),
                got: generation,
                current: job.generation,
            });
        }
        if !job.phase.wants_ranks() {
            return Err(Refused::Ended {
                job: job.id.clone(),
                generation,
                phase: job.phase,
            });
        }
        match (rank.0 as usize) < job.ranks.len() {
            true => Ok(()),
            false => Err(Refused::NoSuchRank {
                job: job.id.clone(),
                rank,
                world_size: job.ranks.len(),
            }),
        }
    }

    fn rank(&mut self, rank: Rank) -> Option<&mut RankState> {
        self.job.ranks.get_mut(rank.0 as usize)
    }

    /// "rank 1 on node-a", or only the rank if there is no such.
    fn name(&self, rank: Rank) -> String {
        match self.job.ranks.get(rank.0 as usize) {
            Some(state) => format!("rank {rank} on {}", state.node),
            None => format!("rank {rank}"),
        }
    }

    fn launch(&mut self, placement: &Placement) {
        if self.job.may_launch(self.now).is_err() || placement.is_empty() {
            return;
        }
        self.job.generation = self.job.generation.next();
        self.job.ranks = placement
            .iter()
            .map(|node| RankState {
                node: node.clone(),
                process: Process::Launching,
                started: false,
                done: false,
                missing: 0,
            })
            .collect();
        self.job.launched_ms = self.now.mono_ms;
        self.job.hearsay = false;
        self.job.leaving = None;
        self.job.room = None;
        self.enter(Phase::Starting, "");
        self.effect(Effect::Launch(None));
    }

    /// Says why a job waits. The failure that it recovers from stays in its recoveries.
    fn waits(&mut self, reason: &str) {
        if matches!(self.job.phase, Phase::Queued | Phase::Recovering) && self.job.reason != reason {
            self.job.reason = reason.to_owned();
            self.effect(Effect::Notify);
        }
    }

    fn spawned(&mut self, generation: Generation, rank: Rank, pid: u32) {
        if generation == self.job.generation
            && let Some(state) = self.rank(rank)
            && state.process != Process::Reaped
        {
            state.process = Process::Alive(pid);
            state.missing = 0;
        }
    }

    fn exited(
        &mut self,
        generation: Generation,
        rank: Rank,
        exit: &Exit,
        silent_ms: u64,
    ) -> Result<(), Refused> {
        let current = self.job.generation;
        if generation < current {
            return Ok(()); // An old generation's rank; its slot is free again, the job has moved on.
        }
        if generation > current {
            return Err(Refused::Stale {
                job: self.job.id.clone(),
                got: generation,
                current,
            });
        }
        let name = self.name(rank);
        let world_size = self.job.ranks.len();
        let Some(state) = self.rank(rank) else {
            return Err(Refused::NoSuchRank {
                job: self.job.id.clone(),
                rank,
                world_size,
            });
        };
        state.process = Process::Reaped;
        state.done |= exit.code == Some(0) && !exit.requested;
        // Its word that it had may be lost, with a coordinator that remembered it.
        state.started |= state.done;
        if state.done {
            return Ok(());
        }
        let (kind, reason) = describe(&name, exit);
        let silent_ms = exit.stalled_ms.unwrap_or(silent_ms);
        match self.job.phase {
            Phase::Starting | Phase::Running => self.fail_generation(kind, reason, silent_ms, false),
            // The rank that died says more than the peer that missed it.
            Phase::Recovering if self.job.hearsay && !exit.requested && exit.signal.is_some() => {
                self.job.hearsay = false;
                if let Some(last) = self.job.recoveries.last_mut() {
                    last.reason = reason.clone();
                    last.kind = kind;
                    last.detected_s = last.detected_s.max(silent_ms as f64 / 1000.0);
                }
                self.job.reason = reason;
                self.changed();
                self.effect(Effect::NotifyRecovery(
                    self.job.recoveries.len().saturating_sub(1),
                ));
            }
            _ => {}
        }
        Ok(())
    }

    fn listed(&mut self, node: &NodeId, ranks: &[(Rank, u32)], joined: bool) {
        let wanted = self.job.phase.wants_ranks();
        let mut gone = None;
        let mut relaunch = false;
        for (index, state) in self
            .job
            .ranks
            .iter_mut()
            .enumerate()
            .filter(|(_, state)| &state.node == node)
        {
            let rank = Rank(index as u32);
            if let Some((_, pid)) = ranks.iter().find(|(listed, _)| *listed == rank) {
                if state.process != Process::Reaped {
                    state.process = Process::Alive(*pid);
                }
                state.missing = 0;
                continue;
            }
            match state.process {
                Process::Reaped => {}
                // The command was lost with the old stream, or its exit was: repeating it is harmless.
                Process::Launching if joined && wanted => relaunch = true,
                Process::Launching if joined => state.process = Process::Reaped,
                Process::Launching => {}
                Process::Alive(_) | Process::Unreachable | Process::Presumed if !wanted => {
                    state.process = Process::Reaped;
                }
                Process::Alive(_) | Process::Unreachable | Process::Presumed => {
                    if !matches!(state.process, Process::Alive(_)) {
                        state.process = Process::Alive(0);
                    }
                    state.missing = state.missing.saturating_add(1);
                    if state.missing >= MISSING_LISTS {
                        state.process = Process::Reaped;
                        gone = gone.or((!state.done).then_some(rank));
                    }
                }
            }
        }
        if relaunch {
            self.effect(Effect::Launch(Some(node.clone())));
        }
        if let Some(rank) = gone {
            let reason = format!("{} is gone and its agent did not say how", self.name(rank));
            self.fail_generation(FailureKind::Crash, reason, 0, false);
        }
    }

    /// Ranks of a node that were not done, after `change` was applied to all that may still run.
    fn undone_on(&mut self, node: &NodeId, process: Process) -> Vec<String> {
        let mut undone = Vec::new();
        for (rank, state) in self
            .job
            .ranks
            .iter_mut()
            .enumerate()
            .filter(|(_, state)| &state.node == node)
        {
            if state.process != Process::Reaped {
                state.process = process;
                if !state.done {
                    undone.push(rank.to_string());
                }
            }
        }
        undone
    }

    fn node_lost(&mut self, node: &NodeId, silent_ms: u64) {
        let undone = self.undone_on(node, Process::Unreachable);
        if !undone.is_empty() && self.job.phase.wants_ranks() {
            let reason = format!(
                "{node} was silent for {:.1} s; it ran {}",
                silent_ms as f64 / 1000.0,
                rank_list(&undone)
            );
            self.fail_generation(FailureKind::Lost, reason, silent_ms, false);
        }
    }

    fn node_restarted(&mut self, node: &NodeId) {
        let undone = self.undone_on(node, Process::Reaped);
        if !undone.is_empty() && self.job.phase.wants_ranks() {
            let reason = format!(
                "the agent on {node} was restarted; it had run {}",
                rank_list(&undone)
            );
            self.fail_generation(FailureKind::Crash, reason, 0, false);
        }
    }

    fn node_orphaned(&mut self, node: &NodeId) {
        for state in self.job.ranks.iter_mut().filter(|state| &state.node == node) {
            if state.process == Process::Unreachable {
                state.process = Process::Presumed;
            }
        }
    }

    fn started(&mut self, rank: Rank, step: u64, total_steps: u64, from_memory: bool) {
        if let Some(state) = self.rank(rank) {
            state.started = true;
        }
        if total_steps > 0 {
            self.job.progress.total_steps = total_steps;
        }
        self.resumed(step, from_memory);
    }

    /// Training goes on from `step`: says so in the recoveries that wait for it.
    fn resumed(&mut self, step: u64, from_memory: bool) {
        // Steps lost are counted once, in the first of several failures in a row.
        let mut lost = self.job.progress.step.saturating_sub(step);
        let mut first = true;
        for index in 0..self.job.recoveries.len() {
            let recovery = &mut self.job.recoveries[index];
            if recovery.resumed_step.is_none() {
                recovery.resumed_step = Some(step);
                recovery.from_memory = from_memory;
                recovery.lost_steps = Some(std::mem::take(&mut lost));
                if std::mem::take(&mut first) {
                    self.job.progress.step = step;
                }
                self.effect(Effect::Persist);
                self.effect(Effect::NotifyRecovery(index));
            }
        }
    }

    fn metrics(&mut self, progress: Progress, step_seconds: f64) {
        if self.job.phase == Phase::Starting {
            // A synchronous step means that all ranks are there: their word was lost in a restart of ours.
            self.job.ranks.iter_mut().for_each(|state| state.started = true);
        }
        // The report comes at the end of an interval; the first of its steps was finished that much earlier.
        let resumed = self
            .job
            .recoveries
            .last()
            .and_then(|recovery| recovery.resumed_step);
        let later_steps = progress
            .step
            .saturating_sub(resumed.unwrap_or(0))
            .saturating_sub(1);
        let each_s = step_seconds.is_finite().then_some(step_seconds.max(0.0));
        let later_s = later_steps as f64 * each_s.unwrap_or_default();
        for index in 0..self.job.recoveries.len() {
            let now = self.now;
            let recovery = &mut self.job.recoveries[index];
            if recovery.total_s.is_none() && recovery.resumed_step.is_some_and(|step| progress.step > step) {
                let since_ms = match recovery.detected_mono_ms {
                    Some(detected) => now.mono_ms.saturating_sub(detected),
                    None => now.unix_ms.saturating_sub(recovery.detected_unix_ms),
                };
                recovery.total_s = Some(recovery.detected_s + (since_ms as f64 / 1000.0 - later_s).max(0.0));
                self.effect(Effect::Persist);
                self.effect(Effect::NotifyRecovery(index));
            }
        }
        let total_steps = match progress.total_steps {
            0 => self.job.progress.total_steps,
            total => total,
        };
        self.job.progress = Progress {
            total_steps,
            ..progress
        };
    }

    fn finished(&mut self, rank: Rank, step: u64, reason: &str) {
        if let Some(state) = self.rank(rank) {
            state.started = true;
            state.done = true;
        }
        if !reason.is_empty() && self.job.reason != reason {
            self.job.reason = reason.to_owned();
            self.changed();
        }
        // Rank 0's last metrics come before its word; another rank's word may come before them.
        if rank == Rank(0) {
            self.job.progress.step = self.job.progress.step.max(step);
        }
    }

    fn error(
        &mut self,
        generation: Generation,
        rank: Rank,
        message: &str,
        permanent: bool,
        peer: Option<Rank>,
    ) -> Result<(), Refused> {
        // The rank that knows why may speak after the peer that only saw it go.
        let same = generation == self.job.generation && (rank.0 as usize) < self.job.ranks.len();
        if same && permanent && self.job.phase == Phase::Recovering {
            self.enter(Phase::Failed, format!("{}: {message}", self.name(rank)));
            return Ok(());
        }
        self.fence(generation, rank)?;
        let reason = match peer {
            Some(peer) => format!("{} lost {}: {message}", self.name(rank), self.name(peer)),
            None => format!("{}: {message}", self.name(rank)),
        };
        if permanent {
            self.enter(Phase::Failed, reason);
            self.effect(Effect::Kill { grace_ms: 0 });
            self.effect(Effect::EndGeneration);
            return Ok(());
        }
        let kind = match is_out_of_memory(message) {
            true => FailureKind::Oom,
            false => FailureKind::Error,
        };
        self.fail_generation(kind, reason, 0, true);
        Ok(())
    }

    /// A step's numbers are not finite: the next generation goes on from the last checkpoint without it. All ranks know the
    /// reason, so none has a better one.
    fn roll_back(
        &mut self,
        generation: Generation,
        rank: Rank,
        message: &str,
        step: u64,
    ) -> Result<(), Refused> {
        self.fence(generation, rank)?;
        if !self.job.left_out_steps.contains(&step) {
            self.job.left_out_steps.push(step);
        }
        self.fail_generation(FailureKind::Nonfinite, message.to_owned(), 0, false);
        Ok(())
    }

    fn committed(&mut self, step: u64) {
        self.job.checkpoint_step = Some(self.job.checkpoint_step.map_or(step, |old| old.max(step)));
        self.job.failures = 0;
        self.effect(Effect::Persist);
        // A last checkpoint has no steps behind it to be trained elsewhere.
        let total = self.job.progress.total_steps;
        if total > 0 && step >= total {
            return;
        }
        let ranks = self.job.ranks.len();
        if let Some(node) = self.job.leaving.take() {
            self.fail_generation(FailureKind::Drained, format!("{node} is drained"), 0, false);
        } else if let Some(room) = self.job.room.take().filter(|room| *room as usize > ranks) {
            let reason = format!("grows from {ranks} to {room} ranks");
            self.fail_generation(FailureKind::Grown, reason, 0, false);
        }
    }

    /// The generation cannot resume: the next one does, from the checkpoint before. Without one the job fails, because to
    /// start over would throw away what its user believes to be safe.
    fn damaged(
        &mut self,
        generation: Generation,
        rank: Rank,
        message: &str,
        left: Option<u64>,
    ) -> Result<(), Refused> {
        // A peer that only saw this rank go may have spoken first.
        let late = generation == self.job.generation
            && (rank.0 as usize) < self.job.ranks.len()
            && self.job.phase == Phase::Recovering;
        if !late {
            self.fence(generation, rank)?;
        }
        self.job.checkpoint_step = left;
        let reason = format!("{}: {message}", self.name(rank));
        if left.is_none() {
            if !late {
                self.effect(Effect::Kill { grace_ms: 0 });
                self.effect(Effect::EndGeneration);
            }
            self.enter(
                Phase::Failed,
                format!("{reason}; no committed checkpoint is left to go back to"),
            );
            return Ok(());
        }
        if !late {
            self.fail_generation(FailureKind::Damaged, reason, 0, false);
            return Ok(());
        }
        self.job.failures = self.job.failures.saturating_sub(1);
        self.job.hearsay = false;
        if let Some(last) = self.job.recoveries.last_mut() {
            last.kind = FailureKind::Damaged;
            last.reason.clone_from(&reason);
        }
        self.job.reason = reason;
        self.changed();
        self.effect(Effect::NotifyRecovery(
            self.job.recoveries.len().saturating_sub(1),
        ));
        Ok(())
    }

    fn cancel(&mut self, reason: &str) {
        if self.job.phase.is_terminal() || self.job.phase == Phase::Cancelling {
            return;
        }
        if planted(Bug::CancelLostToRestart) && self.job.phase == Phase::Recovering {
            return;
        }
        let reason = match reason.is_empty() {
            true => "cancelled by request".to_owned(),
            false => format!("cancelled: {reason}"),
        };
        self.enter(Phase::Cancelling, reason);
        if self.job.ranks.iter().any(|rank| rank.process != Process::Reaped) {
            self.effect(Effect::Kill {
                grace_ms: self.limits.grace_ms,
            });
        }
        self.effect(Effect::EndGeneration);
    }

    fn drain(&mut self, node: &NodeId) {
        if self.job.phase.wants_ranks() && self.job.ranks.iter().any(|rank| &rank.node == node) {
            self.job.leaving = Some(node.clone());
            self.effect(Effect::CheckpointNow);
        }
    }

    fn tick(&mut self) {
        let waited_ms = self.now.mono_ms.saturating_sub(self.job.launched_ms);
        if self.job.phase != Phase::Starting || waited_ms < self.limits.spawn_ms {
            return;
        }
        if let Some(rank) = self
            .job
            .ranks
            .iter()
            .position(|rank| rank.process == Process::Launching)
        {
            let name = self.name(Rank(rank as u32));
            let reason = format!("{name} was not spawned within {:.1} s", waited_ms as f64 / 1000.0);
            self.fail_generation(FailureKind::Hang, reason, waited_ms, false);
        }
    }

    /// One rank failed: all of them end, and the next generation follows unless there were too many.
    fn fail_generation(&mut self, kind: FailureKind, reason: String, silent_ms: u64, hearsay: bool) {
        self.effect(Effect::Kill { grace_ms: 0 });
        self.effect(Effect::EndGeneration);
        if !matches!(
            kind,
            FailureKind::Drained | FailureKind::Grown | FailureKind::Damaged
        ) {
            self.job.failures += 1;
        }
        if self.job.failures > self.job.spec.max_restarts {
            let restarts = self.job.spec.max_restarts;
            self.enter(
                Phase::Failed,
                format!("gave up after {restarts} restarts: {reason}"),
            );
            return;
        }
        self.job.recoveries.push(Recovery {
            reason: reason.clone(),
            kind,
            from: self.job.generation,
            detected_unix_ms: self.now.unix_ms,
            detected_s: silent_ms as f64 / 1000.0,
            resumed_step: None,
            lost_steps: None,
            total_s: None,
            detected_mono_ms: Some(self.now.mono_ms),
            from_memory: false,
        });
        self.job.hearsay = hearsay;
        self.job.leaving = None;
        self.job.room = None;
        self.job.not_before_ms = self.now.mono_ms + backoff_ms(self.job.failures, self.limits);
        self.enter(Phase::Recovering, reason);
        self.effect(Effect::NotifyRecovery(self.job.recoveries.len() - 1));
    }

    /// What follows from the ranks' states alone.
    fn settle(&mut self) {
        let ranks = &self.job.ranks;
        let none_runs = !ranks.iter().any(|rank| rank.process.occupies());
        match self.job.phase {
            Phase::Starting | Phase::Running if ranks.iter().all(|rank| rank.done) && none_runs => {
                // Why it ended before its last step, if it did.
                let reason = self.job.reason.clone();
                self.enter(Phase::Succeeded, reason);
                self.effect(Effect::EndGeneration);
            }
            Phase::Starting if ranks.iter().all(|rank| rank.started) => {
                self.job.started_unix_ms = Some(self.now.unix_ms);
                let reason = self.job.reason.clone();
                self.enter(Phase::Running, reason);
            }
            Phase::Cancelling if none_runs => {
                let reason = self.job.reason.clone();
                self.enter(Phase::Cancelled, reason);
            }
            _ => {}
        }
    }
}

/// 0 for a move that was no failure, else doubling from the first wait to the longest.
fn backoff_ms(failures: u32, limits: &Limits) -> u64 {
    match failures {
        0 => 0,
        n => limits
            .backoff_ms
            .saturating_mul(1 << (n - 1).min(20))
            .min(limits.backoff_max_ms),
    }
}

//! A naive cluster around the pure modules: what really runs on its nodes, and a coordinator that only does what `job`,
//! `plan` and `membership` say. Messages wait until they are delivered, or are lost with their stream.

mod machines;
mod op;

pub use op::Op;

use arcface_coordinator::{
    job::{self, Effect, Event, Exit, Job, Limits, Now, Phase, Process, Progress},
    membership::{self, Change, Liveness, Membership, RankKey},
    plan::{self, PlanNode},
};
use arcface_proto::{
    convert,
    types::{ClassRange, Generation, JobId, NodeId, Rank},
    v1,
};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

pub const NODES: usize = 3;
pub const JOBS: usize = 2;
const LIMITS: Limits = Limits {
    backoff_ms: 500,
    backoff_max_ms: 4_000,
    spawn_ms: 20_000,
    grace_ms: 1_000,
};
const LIVENESS: membership::Limits = membership::Limits {
    suspect_ms: 1_500,
    lost_ms: 3_000,
    rejoin_ms: 6_000,
    orphan_ms: 20_000,
    forget_ms: 600_000,
};

#[derive(Clone, Copy, Debug)]
enum Command {
    Launch(usize, u64, u32),
    Kill(usize, u64),
}

/// A rank process: job, generation, rank.
type Key = (usize, u64, u32);

#[derive(Default)]
struct Machine {
    slots: u32,
    boot: u64,
    stream: Option<u64>,
    /// When the agent was last answered.
    answered_ms: u64,
    commands: VecDeque<Command>,
    untold: Vec<(Key, Exit)>,
    /// Launched, without a slot so far.
    waiting: Vec<Key>,
    newest: [u64; JOBS],
    killed: [u64; JOBS],
}

/// What the rules are checked against.
#[derive(Default)]
struct Past {
    cancelled: bool,
    stepped: u64,
    committed: Option<(u64, u64)>,
}

pub struct Cluster {
    now_ms: u64,
    jobs: Vec<Job>,
    past: [Past; JOBS],
    members: Membership,
    drains: BTreeSet<usize>,
    machines: Vec<Machine>,
    /// Processes that run, with their nodes.
    running: BTreeMap<Key, usize>,
    /// Those that the coordinator has let meet their peers: no other can train.
    met: BTreeSet<Key>,
    streams: u64,
    split: fn(u32, u32, u32) -> ClassRange,
}

fn node_id(node: usize) -> NodeId {
    format!("n{node}").parse().expect("node id")
}

fn node_of(id: &NodeId) -> usize {
    id.as_str()[1..].parse().expect("a node of the model")
}

fn spec(world_size: u32, least: u32) -> arcface_proto::spec::JobSpec {
    let wire = v1::JobSpec {
        output: Some("out".into()),
        job: Some(v1::JobSection {
            world_size: Some(world_size),
            min_world_size: Some(least),
            elastic: Some(if least < world_size { "shrink" } else { "off" }.into()),
            max_restarts: Some(4),
            ..Default::default()
        }),
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
    convert::job_spec(&wire).expect("a valid job")
}

fn allowed(from: Phase, to: Phase) -> bool {
    use Phase::*;
    from == to
        || match from {
            Queued => matches!(to, Starting | Cancelling | Cancelled),
            Starting => matches!(
                to,
                Running | Recovering | Succeeded | Failed | Cancelling | Cancelled
            ),
            Running => matches!(to, Recovering | Succeeded | Failed | Cancelling | Cancelled),
            Recovering => matches!(to, Starting | Failed | Cancelling | Cancelled),
            Cancelling => to == Cancelled,
            Succeeded | Failed | Cancelled => false,
        }
}

/// I7: every class in exactly one shard, sizes within one of each other.
pub fn is_partition(
    num_classes: u32,
    world_size: u32,
    split: impl Fn(u32, u32, u32) -> ClassRange,
) -> Result<(), String> {
    let (mut next, share) = (0, num_classes / world_size);
    for rank in 0..world_size {
        let range = split(num_classes, rank, world_size);
        if range.lo != next || range.hi < range.lo || !(share..=share + 1).contains(&(range.hi - range.lo)) {
            return Err(format!(
                "I7: rank {rank} of {world_size} has {}..{}",
                range.lo, range.hi
            ));
        }
        next = range.hi;
    }
    match next == num_classes {
        true => Ok(()),
        false => Err(format!("I7: {next} of {num_classes} classes")),
    }
}

impl Cluster {
    /// Three nodes, two jobs; how classes are split is an argument, so that a wrong way can be tried.
    pub fn new(split: fn(u32, u32, u32) -> ClassRange) -> Self {
        let machine = |slots| Machine {
            slots,
            ..Default::default()
        };
        let job = |number, spec| Job::new(JobId::from_random(number), spec, number);
        Self {
            now_ms: 0,
            jobs: vec![job(1, spec(3, 1)), job(2, spec(2, 2))],
            past: Default::default(),
            members: Membership::new(LIVENESS),
            drains: BTreeSet::new(),
            machines: vec![machine(2), machine(2), machine(1)],
            running: BTreeMap::new(),
            met: BTreeSet::new(),
            streams: 0,
            split,
        }
    }

    fn now(&self) -> Now {
        Now {
            mono_ms: self.now_ms,
            unix_ms: self.now_ms,
        }
    }

    /// One operation, and the rules after it.
    pub fn act(&mut self, op: Op) -> Result<(), String> {
        match op {
            Op::Wait(ms) => self.wait(ms)?,
            Op::Schedule => self.schedule()?,
            Op::Deliver(node) => self.deliver(node % NODES)?,
            Op::TellExits(node) => self.tell_exits(node % NODES)?,
            Op::Beat(node) => self.beat(node % NODES)?,
            Op::Disconnect(node) => self.disconnect(node % NODES),
            Op::Join(node) => self.join(node % NODES)?,
            Op::PowerCycle(node) => self.power_cycle(node % NODES),
            Op::Die(index) => {
                if let Some(key) = self.process(index) {
                    self.exits(key, Some(9), None, false);
                }
            }
            Op::Started(index) => {
                if let Some(key) = self.process(index) {
                    self.meet(key);
                }
                self.rank_says(index, |(_, generation, rank), _| Event::Started {
                    generation: Generation(generation),
                    rank: Rank(rank),
                    step: 0,
                    total_steps: 1_000,
                    from_memory: false,
                })?;
            }
            Op::Train => self.train()?,
            Op::Commit(index, steps) => self.commit(index, steps, 0)?,
            Op::LateCommit(index, steps, age) => self.commit(index, steps, age)?,
            Op::Finish(index) => {
                self.rank_says(index, |(_, generation, rank), _| Event::Finished {
                    generation: Generation(generation),
                    rank: Rank(rank),
                    step: 1_000,
                    reason: String::new(),
                })?;
                if let Some(key) = self.process(index) {
                    self.exits(key, None, Some(0), false);
                }
            }
            Op::Error(index, permanent) => {
                self.rank_says(index, |(_, generation, rank), _| Event::Error {
                    generation: Generation(generation),
                    rank: Rank(rank),
                    message: "no".into(),
                    permanent,
                    peer: None,
                    rollback_step: None,
                })?;
                if let Some(key) = self.process(index) {
                    self.exits(key, None, Some(1), false);
                }
            }
            Op::Cancel(job) => {
                let job = job % JOBS;
                let ended = self.jobs[job].phase.is_terminal();
                self.happens(
                    job,
                    &Event::Cancel {
                        reason: String::new(),
                    },
                )?;
                self.past[job].cancelled |= !ended;
                self.cancel_holds(job)?;
            }
            Op::Drain(node, draining) => {
                let node = node % NODES;
                match draining {
                    true => self.drains.insert(node),
                    false => self.drains.remove(&node),
                };
                self.members.drain(&node_id(node), draining);
                for job in (0..JOBS).filter(|_| draining) {
                    self.happens(job, &Event::Drain { node: node_id(node) })?;
                }
            }
            Op::Restart => self.restart(),
        }
        (0..NODES).try_for_each(|node| self.start_waiting(node))?;
        self.one_process_a_slot()
    }

    fn process(&self, index: usize) -> Option<Key> {
        let count = self.running.len();
        self.running.keys().nth(index % count.max(1)).copied()
    }

    fn rank_says(&mut self, index: usize, event: impl Fn(Key, &Job) -> Event) -> Result<(), String> {
        let Some(key) = self.process(index) else {
            return Ok(());
        };
        let event = event(key, &self.jobs[key.0]);
        self.happens(key.0, &event)
    }

    /// The rendezvous: open to ranks of the newest generation while that stands, over when all have come.
    fn meet(&mut self, key: Key) {
        let job = &self.jobs[key.0];
        let ranks = 0..job.ranks.len() as u32;
        let here = |rank: u32| self.running.contains_key(&(key.0, key.1, rank));
        if key.1 == job.generation.0 && job.phase.wants_ranks() && ranks.clone().all(here) {
            self.met.extend(ranks.map(|rank| (key.0, key.1, rank)));
        }
    }

    /// True if a generation of so many ranks can finish a step.
    fn can_train(&self, job: usize, generation: u64, world_size: u32) -> bool {
        (0..world_size).all(|rank| {
            let key = (job, generation, rank);
            self.running.contains_key(&key) && self.met.contains(&key)
        })
    }

    /// An event of a job: the rules of every transition, then its effects.
    fn happens(&mut self, index: usize, event: &Event) -> Result<(), String> {
        let before = self.jobs[index].clone();
        let Ok((after, effects)) = job::step(&before, event, self.now(), &LIMITS) else {
            return Ok(());
        };
        let (from, to) = (before.phase, after.phase);
        if !allowed(from, to) {
            return Err(format!("I14: {from} -> {to} by {event:?}"));
        }
        let opened = after.generation != before.generation;
        if opened && after.generation != before.generation.next() {
            return Err(format!(
                "I3: generation {} after {}",
                after.generation, before.generation
            ));
        }
        if opened != effects.contains(&Effect::Launch(None)) {
            return Err("I3: a generation without its launch, or the other way round".into());
        }
        if (opened || from != to) && !effects.contains(&Effect::Persist) {
            return Err(format!("I24: {from} -> {to} is acted on before it is stored"));
        }
        if after.checkpoint_step < before.checkpoint_step {
            return Err("I10: the newest checkpoint went back".into());
        }
        self.jobs[index] = after;
        if opened {
            self.generation_opened(index, &before)?;
        }
        self.cancel_holds(index)?;
        for effect in effects {
            self.perform(index, &effect);
        }
        Ok(())
    }

    fn cancel_holds(&self, index: usize) -> Result<(), String> {
        let phase = self.jobs[index].phase;
        match self.past[index].cancelled && !matches!(phase, Phase::Cancelling | Phase::Cancelled) {
            true => Err(format!("I13: {phase} after a cancel")),
            false => Ok(()),
        }
    }

    fn generation_opened(&self, index: usize, before: &Job) -> Result<(), String> {
        let (old, world_size) = (before.generation.0, before.ranks.len() as u32);
        if world_size > 0 && self.can_train(index, old, world_size) {
            return Err(format!(
                "I5: generation {} opened while {old} could train",
                old + 1
            ));
        }
        let job = &self.jobs[index];
        let mut placed: BTreeMap<usize, u32> = BTreeMap::new();
        for rank in &job.ranks {
            *placed.entry(node_of(&rank.node)).or_default() += 1;
        }
        for (node, ranks) in placed {
            // Older generations of the job itself end before the new rank starts.
            let others = self
                .running
                .iter()
                .filter(|(key, at)| **at == node && key.0 != index)
                .count() as u32;
            if ranks + others > self.machines[node].slots {
                return Err(format!("I18: {ranks} ranks placed on n{node} beside {others}"));
            }
            if self.drains.contains(&node) {
                return Err(format!("L5: placed on n{node}, which is drained"));
            }
        }
        let world_size = job.ranks.len() as u32;
        [1, 7, 93_431]
            .into_iter()
            .try_for_each(|classes| is_partition(world_size * 2 + classes, world_size, self.split))
    }

    fn one_process_a_slot(&self) -> Result<(), String> {
        for (node, machine) in self.machines.iter().enumerate() {
            let here = self.running.values().filter(|at| **at == node).count();
            if here as u32 > machine.slots {
                return Err(format!("I18: {here} processes on n{node}"));
            }
        }
        Ok(())
    }

    fn perform(&mut self, index: usize, effect: &Effect) {
        let job = &self.jobs[index];
        let generation = job.generation.0;
        match effect {
            Effect::Launch(only) => {
                let launching: Vec<(usize, u32)> = job
                    .ranks
                    .iter()
                    .enumerate()
                    .filter(|(_, rank)| rank.process == Process::Launching)
                    .filter(|(_, rank)| only.as_ref().is_none_or(|only| *only == rank.node))
                    .map(|(rank, state)| (node_of(&state.node), rank as u32))
                    .collect();
                for (node, rank) in launching {
                    self.tell(node, Command::Launch(index, generation, rank));
                }
            }
            Effect::Kill { .. } => {
                let nodes: BTreeSet<usize> = job.ranks.iter().map(|rank| node_of(&rank.node)).collect();
                for node in nodes {
                    self.tell(node, Command::Kill(index, generation));
                }
            }
            _ => {}
        }
    }

    fn tell(&mut self, node: usize, command: Command) {
        if self.machines[node].stream.is_some() {
            self.machines[node].commands.push_back(command);
        }
    }

    fn wait(&mut self, ms: u64) -> Result<(), String> {
        self.now_ms += ms;
        for node in 0..NODES {
            if self.now_ms - self.machines[node].answered_ms > LIVENESS.orphan_ms {
                self.machines[node].waiting.clear();
                let orphans: Vec<Key> = self.on(node);
                orphans
                    .into_iter()
                    .for_each(|key| self.exits(key, Some(9), None, false));
            }
        }
        for change in self.members.tick(self.now_ms) {
            let event = match &change {
                Change::Lost(node, silent_ms) => Event::NodeLost {
                    node: node.clone(),
                    silent_ms: *silent_ms,
                },
                Change::Orphaned(node) => Event::NodeOrphaned { node: node.clone() },
                Change::Suspect(_) | Change::Forgotten(_) => continue,
            };
            self.all_on(&event)?;
        }
        (0..JOBS).try_for_each(|job| self.happens(job, &Event::Tick))
    }

    /// An event of a node, for the jobs on it.
    fn all_on(&mut self, event: &Event) -> Result<(), String> {
        (0..JOBS).try_for_each(|job| self.happens(job, event))
    }

    fn on(&self, node: usize) -> Vec<Key> {
        self.running
            .iter()
            .filter(|(_, at)| **at == node)
            .map(|(key, _)| *key)
            .collect()
    }

    fn schedule(&mut self) -> Result<(), String> {
        for job in 0..JOBS {
            let planned = match self.jobs[job].may_launch(self.now()) {
                Err(None) => continue,
                Err(Some(reason)) => Err(reason),
                Ok(()) => {
                    let job = &self.jobs[job];
                    plan::plan(&self.plan_nodes(), job.wishes(), &job.placement()).map_err(|e| e.to_string())
                }
            };
            self.happens(job, &Event::Planned(planned))?;
        }
        Ok(())
    }

    /// Free slots as `control` counts them: what agents list, and what they were told to start.
    fn plan_nodes(&self) -> Vec<PlanNode> {
        let mut used: BTreeMap<NodeId, BTreeSet<RankKey>> = BTreeMap::new();
        for (id, member) in self.members.members() {
            used.entry(id.clone())
                .or_default()
                .extend(member.hello.ranks.keys().cloned());
        }
        for job in &self.jobs {
            for (rank, state) in job
                .ranks
                .iter()
                .enumerate()
                .filter(|(_, state)| state.process.occupies())
            {
                used.entry(state.node.clone()).or_default().insert(RankKey {
                    job: job.id.clone(),
                    generation: job.generation,
                    rank: Rank(rank as u32),
                });
            }
        }
        let node = |(id, member): (&NodeId, &membership::Member)| PlanNode {
            id: id.clone(),
            slots: member.hello.slots,
            free: member
                .hello
                .slots
                .saturating_sub(used.get(id).map_or(0, |ranks| ranks.len() as u32)),
            kept: 0,
            usable: member.usable(),
        };
        self.members.members().iter().map(node).collect()
    }

    /// A synchronous step: every rank of the generation runs.
    fn train(&mut self) -> Result<(), String> {
        let generations: BTreeSet<(usize, u64)> = self.running.keys().map(|key| (key.0, key.1)).collect();
        for (index, generation) in generations {
            let job = &self.jobs[index];
            // Only the newest world's size is known here; an older one that is complete broke I5 already.
            let whole =
                generation == job.generation.0 && self.can_train(index, generation, job.ranks.len() as u32);
            if whole {
                let past = &mut self.past[index];
                if generation < past.stepped {
                    return Err(format!(
                        "I4: generation {generation} trained after {}",
                        past.stepped
                    ));
                }
                past.stepped = generation;
                let event = Event::Metrics {
                    generation: Generation(generation),
                    progress: Progress {
                        step: self.jobs[index].progress.step + 1,
                        ..Progress::default()
                    },
                    step_seconds: 0.1,
                };
                self.happens(index, &event)?;
            }
        }
        Ok(())
    }

    fn commit(&mut self, index: usize, steps: u64, age: u64) -> Result<(), String> {
        let Some((job, generation, _)) = self.process(index) else {
            return Ok(());
        };
        let generation = Generation(generation.saturating_sub(age));
        let newest = self.jobs[job].checkpoint_step;
        let step = newest.unwrap_or(0) + steps;
        if newest.is_some_and(|newest| step <= newest) {
            return Ok(()); // Answered by `control` without an event.
        }
        let event = Event::Committed { generation, step };
        if job::step(&self.jobs[job], &event, self.now(), &LIMITS).is_err() {
            return Ok(());
        }
        if generation != self.jobs[job].generation {
            return Err(format!(
                "I4: generation {generation} committed in {}",
                self.jobs[job].generation
            ));
        }
        if self.past[job]
            .committed
            .is_some_and(|(old, at)| generation.0 < old || step <= at)
        {
            return Err(format!(
                "I15: step {step} of {generation} after {:?}",
                self.past[job].committed
            ));
        }
        self.past[job].committed = Some((generation.0, step));
        self.happens(job, &event)
    }

    /// What a coordinator knows that has just started.
    fn restart(&mut self) {
        self.members = Membership::new(LIVENESS);
        for machine in &mut self.machines {
            machine.stream = None;
            machine.commands.clear();
        }
        for job in &mut self.jobs {
            let process = match job.phase.is_terminal() {
                true => Process::Reaped,
                false => Process::Unreachable,
            };
            for rank in &mut job.ranks {
                rank.process = process;
                rank.started = job.phase == Phase::Running;
                rank.done = false;
                rank.missing = 0;
                if !job.phase.is_terminal() {
                    self.members.await_node(rank.node.clone(), self.now_ms);
                }
            }
            (job.not_before_ms, job.launched_ms, job.hearsay, job.leaving) = (0, 0, false, None);
        }
    }

    /// Fair weather: everybody is there, every message arrives. Every job must train or be at its end.
    pub fn settle(&mut self) -> Result<(), String> {
        for node in 0..NODES {
            self.act(Op::Drain(node, false))?;
        }
        for _ in 0..120 {
            self.now_ms += 400;
            for node in 0..NODES {
                if self.machines[node].stream.is_none() {
                    self.join(node)?;
                }
                self.beat(node)?;
            }
            self.wait(0)?;
            self.schedule()?;
            for node in 0..NODES {
                while !self.machines[node].commands.is_empty() {
                    self.deliver(node)?;
                    self.one_process_a_slot()?;
                }
            }
            for index in 0..self.running.len() {
                self.act(Op::Started(index))?;
            }
        }
        for (index, job) in self.jobs.iter().enumerate() {
            let settled = match job.phase {
                Phase::Queued => !self.fits(index),
                Phase::Running => true,
                phase => phase.is_terminal(),
            };
            if !settled {
                return Err(format!(
                    "L2: job {index} is {} for ever: {}",
                    job.phase, job.reason
                ));
            }
        }
        match self
            .members
            .members()
            .values()
            .find(|member| member.liveness != Liveness::Healthy)
        {
            Some(member) => Err(format!("L3: {} is {}", member.hello.node, member.liveness)),
            None => Ok(()),
        }
    }

    /// Whether the slots that the other job leaves are enough.
    fn fits(&self, index: usize) -> bool {
        let slots: u32 = self.machines.iter().map(|machine| machine.slots).sum();
        let used = self.running.keys().filter(|key| key.0 != index).count() as u32;
        slots - used >= self.jobs[index].wishes().least
    }
}

//! What really happened: which processes ran where, which steps they finished, what the store accepted, what clients
//! were answered. Every rule of safety is checked at the moment that it could break.

use arcface_coordinator::store::Write;
use arcface_proto::{
    types::ClassRange,
    v1::{CheckpointManifest, CheckpointPart, Job, JobState},
};
use prost::Message;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
};
use tokio::sync::Notify;

pub type Shared = Arc<Mutex<World>>;

/// A job's record, as `control` writes it.
#[derive(Clone, PartialEq, Message)]
struct StoredJob {
    #[prost(message, optional, tag = "1")]
    job: Option<Job>,
    #[prost(string, repeated, tag = "2")]
    placement: Vec<String>,
}

/// A rank: job, generation, rank.
pub type Key = (String, u64, u32);

/// A rank process that runs.
pub struct Process {
    pub node: String,
    /// Ends it as a signal does.
    pub doom: Arc<Notify>,
}

/// What the ranks of a generation have done together.
#[derive(Default)]
struct Training {
    world_size: u32,
    finished_step: u64,
    arrived: BTreeMap<u32, u64>,
    spawned: BTreeSet<u32>,
    met: BTreeSet<u32>,
    checkpoint_at: BTreeSet<u64>,
}

/// A job as the store has it.
struct Stored {
    job: Job,
    placement: Vec<String>,
    checkpoints: BTreeMap<u64, CheckpointManifest>,
    /// Step that each generation has to resume from.
    resume: BTreeMap<u64, Option<u64>>,
    /// Newest generation that finished a step.
    stepped: u64,
    cancel_acked: bool,
}

/// Whether a synchronous step is done.
pub enum Barrier {
    Done,
    Wait,
    /// A peer's process is gone.
    Gone(u32),
}

#[derive(Default)]
pub struct World {
    pub now_ms: u64,
    /// The coordinator whose turn it is.
    pub leader: &'static str,
    pub violations: Vec<String>,
    pub slots: BTreeMap<String, u32>,
    pub processes: BTreeMap<Key, Process>,
    /// Pairs of nodes that cannot talk, each in both orders.
    pub apart: BTreeSet<(String, String)>,
    verbose: bool,
    hash: u64,
    pub events: u64,
    jobs: BTreeMap<String, Stored>,
    drained: BTreeSet<String>,
    acked: BTreeMap<String, String>,
    training: BTreeMap<(String, u64), Training>,
    files: BTreeMap<(String, String), BTreeMap<String, String>>,
    store_epoch: u64,
    obeyed_epoch: BTreeMap<String, u64>,
    boots: u64,
}

/// Digest of the part that a rank writes at a step.
pub fn digest(key: &Key, step: u64) -> String {
    let text = format!("{}/{}/{}/{step}", key.0, key.1, key.2);
    format!("{:016x}", fnv(0xCBF2_9CE4_8422_2325, text.as_bytes())).repeat(4)
}

fn fnv(start: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(start, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01B3)
    })
}

fn allowed(from: JobState, to: JobState) -> bool {
    use JobState::*;
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
            _ => false,
        }
}

fn terminal(state: JobState) -> bool {
    matches!(
        state,
        JobState::Succeeded | JobState::Failed | JobState::Cancelled
    )
}

impl World {
    pub fn new(verbose: bool) -> Self {
        Self {
            verbose,
            hash: 0xCBF2_9CE4_8422_2325,
            ..Self::default()
        }
    }

    /// Something happened: it is part of the history that the same seed must repeat.
    pub fn event(&mut self, what: String) {
        self.hash = fnv(self.hash, &self.now_ms.to_le_bytes());
        self.hash = fnv(self.hash, what.as_bytes());
        self.events += 1;
        if self.verbose {
            eprintln!("{:>8} ms  {what}", self.now_ms);
        }
    }

    pub fn hash(&self) -> u64 {
        self.hash
    }

    pub fn broken(&mut self, rule: &str, how: String) {
        let violation = format!("{rule}: {how} (at {} ms)", self.now_ms);
        self.event(format!("BROKEN {violation}"));
        self.violations.push(violation);
    }

    /// A new start of an agent has its own name.
    pub fn boot(&mut self, node: &str) -> String {
        self.boots += 1;
        format!("{node}-boot-{}", self.boots)
    }

    // The store.

    /// The store took a transaction.
    pub fn stored(&mut self, epoch: u64, writes: &[Write]) {
        if epoch < self.store_epoch {
            self.broken("I1", format!("epoch {epoch} wrote after {}", self.store_epoch));
        }
        self.store_epoch = self.store_epoch.max(epoch);
        // The job first: its generation is what a checkpoint of the same transaction belongs to.
        for write in writes {
            if let Write::Put(key, value) = write
                && key.starts_with("job/")
            {
                let record = StoredJob::decode(value.as_slice()).expect("a job record");
                self.job_stored(record.job.expect("a job"), record.placement);
            }
        }
        for write in writes {
            match write {
                Write::Put(key, value) if key.starts_with("checkpoint/") => {
                    let manifest = CheckpointManifest::decode(value.as_slice()).expect("a manifest");
                    self.checkpoint_stored(manifest);
                }
                Write::Delete(key) if key.starts_with("checkpoint/") => self.checkpoint_forgotten(key),
                Write::Put(key, _) => {
                    if let Some(node) = key.strip_prefix("drain/") {
                        self.drained.insert(node.to_owned());
                        self.event(format!("drained {node}"));
                    }
                }
                Write::Delete(key) => {
                    if let Some(node) = key.strip_prefix("drain/") {
                        self.drained.remove(node);
                    }
                }
            }
        }
    }

    fn job_stored(&mut self, job: Job, placement: Vec<String>) {
        let (id, name, to) = (job.id.clone(), name_of(&job), job.state());
        self.event(format!(
            "{name} is {} in generation {}",
            to.as_str_name(),
            job.generation
        ));
        let Some(before) = self.jobs.get(&id) else {
            let twins = self
                .jobs
                .values()
                .filter(|other| name_of(&other.job) == name)
                .count();
            if twins > 0 {
                self.broken("I12", format!("{name} was made twice"));
            }
            let stored = Stored {
                job,
                placement,
                checkpoints: BTreeMap::new(),
                resume: BTreeMap::new(),
                stepped: 0,
                cancel_acked: false,
            };
            self.jobs.insert(id, stored);
            return;
        };
        let from = before.job.state();
        let old = before.job.generation;
        let cancelled = before.cancel_acked;
        let newest = before.checkpoints.keys().next_back().copied();
        let shrank = job.checkpoint_step < before.job.checkpoint_step;
        if !allowed(from, to) {
            self.broken("I14", format!("{name} went from {from:?} to {to:?}"));
        }
        if job.generation != old && job.generation != old + 1 {
            self.broken(
                "I3",
                format!("{name} went from generation {old} to {}", job.generation),
            );
        }
        if shrank {
            self.broken("I10", format!("{name}: the checkpoint's step went back"));
        }
        if cancelled && (!matches!(to, JobState::Cancelling | JobState::Cancelled) || job.generation != old) {
            self.broken(
                "I13",
                format!("{name} went on after its cancel was answered: {to:?}"),
            );
        }
        if job.generation == old + 1 {
            self.generation_opened(&id, &name, old, &placement);
            self.slots_hold(&id, &placement);
        }
        if let Some(stored) = self.jobs.get_mut(&id) {
            if job.generation == old + 1 {
                stored.resume.insert(job.generation, newest);
            }
            stored.job = job;
            stored.placement = placement;
        }
    }

    /// The fence, and where ranks may be placed.
    fn generation_opened(&mut self, id: &str, name: &str, old: u64, placement: &[String]) {
        let world_size = self.jobs[id].placement.len();
        let alive = (0..world_size as u32)
            .filter(|rank| self.processes.contains_key(&(id.to_owned(), old, *rank)))
            .count();
        // Ranks that have not met cannot train, and will not be let to.
        let met = self
            .training
            .get(&(id.to_owned(), old))
            .map_or(0, |training| training.met.len());
        if old > 0 && alive == world_size && met == world_size {
            self.broken(
                "I5",
                format!("{name}: generation {} opened while {old} could train", old + 1),
            );
        }
        if let Some(node) = placement.iter().find(|node| self.drained.contains(*node)) {
            self.broken("L5", format!("{name} was placed on {node}, which is drained"));
        }
    }

    /// Ranks placed on a node, and those that run or are about to run there, are no more than its slots.
    fn slots_hold(&mut self, id: &str, placement: &[String]) {
        let mut used: BTreeMap<&str, u32> = BTreeMap::new();
        placement
            .iter()
            .for_each(|node| *used.entry(node).or_default() += 1);
        for process in self.processes.values() {
            *used.entry(&process.node).or_default() += 1;
        }
        for stored in self.jobs.values().filter(|stored| stored.job.id != id) {
            let job = &stored.job;
            let spawned = self
                .training
                .get(&(job.id.clone(), job.generation))
                .map(|training| &training.spawned);
            let launched = matches!(job.state(), JobState::Starting | JobState::Running);
            for (rank, node) in stored.placement.iter().enumerate().filter(|_| launched) {
                if !spawned.is_some_and(|spawned| spawned.contains(&(rank as u32))) {
                    *used.entry(node).or_default() += 1;
                }
            }
        }
        let over = |(node, ranks): &(&str, u32)| {
            placement.iter().any(|placed| placed == node)
                && self.slots.get(*node).is_none_or(|slots| ranks > slots)
        };
        let found = used.into_iter().find(over);
        if let Some(how) = found.map(|(node, ranks)| format!("{ranks} ranks were placed on {node}")) {
            self.broken("I18", how);
        }
    }

    fn checkpoint_stored(&mut self, manifest: CheckpointManifest) {
        let id = manifest.job_id.clone();
        let Some(stored) = self.jobs.get(&id) else {
            return self.broken("I9", format!("a checkpoint of an unknown job {id}"));
        };
        let name = name_of(&stored.job);
        let (generation, world_size) = (stored.job.generation, stored.placement.len() as u32);
        let newest = stored.checkpoints.keys().next_back().copied();
        let step = manifest.step;
        if manifest.generation != generation {
            let how = format!(
                "{name}: generation {} committed in {generation}",
                manifest.generation
            );
            self.broken("I4", how);
        }
        if newest.is_some_and(|newest| step <= newest) {
            self.broken(
                "I15",
                format!("{name}: step {step} was committed after {newest:?}"),
            );
        }
        if let Err(problem) = self.is_whole(&manifest, world_size) {
            self.broken("I9", format!("{name}, step {step}: {problem}"));
        }
        self.event(format!("{name} committed step {step} of generation {generation}"));
        if let Some(stored) = self.jobs.get_mut(&id) {
            stored.checkpoints.insert(step, manifest);
        }
    }

    fn is_whole(&self, manifest: &CheckpointManifest, world_size: u32) -> Result<(), String> {
        let job = &manifest.job_id;
        let wanted: BTreeSet<String> = (0..world_size)
            .map(|rank| digest(&(job.clone(), manifest.generation, rank), manifest.step))
            .collect();
        let found: BTreeSet<String> = manifest.parts.iter().map(|part| part.blake3.clone()).collect();
        if found != wanted {
            return Err(format!("{} of {world_size} ranks' parts are in it", found.len()));
        }
        let mut next = 0;
        for part in manifest.parts.iter().filter(|part| part.class_hi > part.class_lo) {
            if part.class_lo != next {
                return Err(format!("class {next} is in no part, or in two"));
            }
            next = part.class_hi;
        }
        if next != manifest.num_classes {
            return Err(format!("{next} of {} classes", manifest.num_classes));
        }
        let files = self.files.get(&(job.clone(), manifest.directory.clone()));
        let missing =
            |part: &&CheckpointPart| files.is_none_or(|files| files.get(&part.file) != Some(&part.blake3));
        match manifest.parts.iter().find(missing) {
            Some(part) => Err(format!("{} is not on disk", part.file)),
            None => Ok(()),
        }
    }

    fn checkpoint_forgotten(&mut self, key: &str) {
        let mut words = key.split('/').skip(1);
        let (Some(id), Some(Ok(step))) = (words.next(), words.next().map(str::parse::<u64>)) else {
            return;
        };
        let Some(stored) = self.jobs.get_mut(id) else {
            return;
        };
        stored.checkpoints.remove(&step);
        if stored.checkpoints.is_empty() {
            let name = name_of(&stored.job);
            self.broken("I11", format!("{name} lost its last checkpoint, of step {step}"));
        }
    }

    // Agents and ranks.

    /// An agent did what a coordinator of that epoch said.
    pub fn obeyed(&mut self, boot: &str, epoch: u64) {
        let highest = self.obeyed_epoch.entry(boot.to_owned()).or_default();
        let before = *highest;
        *highest = before.max(epoch);
        if epoch < before {
            self.broken("I2", format!("{boot} obeyed epoch {epoch} after {before}"));
        }
    }

    pub fn started(&mut self, key: &Key, node: &str, world_size: u32, doom: Arc<Notify>) {
        let name = self.job_name(&key.0);
        self.event(format!("{name} {}/{} runs on {node}", key.1, key.2));
        let process = Process {
            node: node.to_owned(),
            doom,
        };
        if self.processes.insert(key.clone(), process).is_some() {
            self.broken("I6", format!("{name}: rank {} of {} runs twice", key.2, key.1));
        }
        let here = self
            .processes
            .values()
            .filter(|process| process.node == node)
            .count() as u32;
        if here > self.slots.get(node).copied().unwrap_or(0) {
            self.broken("I18", format!("{here} processes run on {node}"));
        }
        let training = self.training.entry((key.0.clone(), key.1)).or_default();
        training.world_size = world_size;
        training.spawned.insert(key.2);
    }

    pub fn ended(&mut self, key: &Key, how: &str) {
        if self.processes.remove(key).is_some() {
            let name = self.job_name(&key.0);
            self.event(format!("{name} {}/{} ended: {how}", key.1, key.2));
        }
    }

    /// A node lost its power.
    pub fn node_down(&mut self, node: &str) {
        self.processes.retain(|_, process| process.node != node);
    }

    fn job_name(&self, id: &str) -> String {
        self.jobs
            .get(id)
            .map_or_else(|| "?".into(), |stored| name_of(&stored.job))
    }

    /// A rank read the checkpoint that it was told to resume from.
    pub fn resumed(&mut self, key: &Key, resume: Option<&CheckpointManifest>) {
        let name = self.job_name(&key.0);
        let Some(stored) = self.jobs.get(&key.0) else {
            return self.broken(
                "I12",
                format!("a rank of {}, which is not in the store, runs", key.0),
            );
        };
        let wanted = stored.resume.get(&key.1).copied().flatten();
        // A generation that was replaced meanwhile may find its checkpoint expired.
        let current = stored.job.generation == key.1;
        let step = resume.map(|manifest| manifest.step);
        if step != wanted {
            let how = format!(
                "{name}: generation {} resumed from {step:?}, not {wanted:?}",
                key.1
            );
            self.broken("I15", how);
        }
        if let Some(manifest) = resume.filter(|_| current)
            && let Err(problem) = self.is_whole(manifest, manifest.world_size)
        {
            self.broken(
                "I11",
                format!("{name} cannot resume from step {}: {problem}", manifest.step),
            );
        }
    }

    pub fn arrive(&mut self, key: &Key, step: u64) {
        let training = self.training.entry((key.0.clone(), key.1)).or_default();
        training.arrived.insert(key.2, step);
        training.met.insert(key.2);
    }

    /// A step is done when every rank is at it and all reach each other.
    pub fn barrier(&mut self, key: &Key, step: u64) -> Barrier {
        let Some(training) = self.training.get(&(key.0.clone(), key.1)) else {
            return Barrier::Wait;
        };
        if training.finished_step >= step {
            return Barrier::Done;
        }
        let node = |rank: u32| {
            self.processes
                .get(&(key.0.clone(), key.1, rank))
                .map(|process| process.node.as_str())
        };
        let mut nodes = Vec::new();
        for rank in 0..training.world_size {
            match node(rank) {
                Some(node) => nodes.push(node),
                None if training.met.contains(&rank) => return Barrier::Gone(rank),
                None => return Barrier::Wait,
            }
        }
        let together = nodes.iter().all(|a| {
            nodes
                .iter()
                .all(|b| !self.apart.contains(&((*a).to_owned(), (*b).to_owned())))
        });
        let all_here = (0..training.world_size).all(|rank| {
            training
                .arrived
                .get(&rank)
                .is_some_and(|arrived| *arrived >= step)
        });
        if !together || !all_here {
            return Barrier::Wait;
        }
        self.stepped(key, step);
        Barrier::Done
    }

    fn stepped(&mut self, key: &Key, step: u64) {
        if let Some(training) = self.training.get_mut(&(key.0.clone(), key.1)) {
            training.finished_step = step;
        }
        let Some(stored) = self.jobs.get_mut(&key.0) else {
            return;
        };
        let newest = stored.stepped;
        stored.stepped = newest.max(key.1);
        if key.1 < newest {
            let name = self.job_name(&key.0);
            self.broken(
                "I4",
                format!("{name}: generation {} trained after {newest}", key.1),
            );
        }
    }

    /// Rank 0 tells its peers to write a checkpoint.
    pub fn checkpoint_at(&mut self, key: &Key, step: u64) {
        let training = self.training.entry((key.0.clone(), key.1)).or_default();
        training.checkpoint_at.insert(step);
    }

    pub fn wants_checkpoint(&self, key: &Key, step: u64) -> bool {
        let training = self.training.get(&(key.0.clone(), key.1));
        training.is_some_and(|training| training.checkpoint_at.contains(&step))
    }

    pub fn wrote(&mut self, key: &Key, directory: &str, parts: &[CheckpointPart]) {
        let files = self
            .files
            .entry((key.0.clone(), directory.to_owned()))
            .or_default();
        for part in parts {
            files.insert(part.file.clone(), part.blake3.clone());
        }
    }

    /// Rank 0 deletes what it was told is kept no longer.
    pub fn deleted(&mut self, key: &Key, directory: &str) {
        self.files.remove(&(key.0.clone(), directory.to_owned()));
        let kept = self.jobs.get(&key.0).is_some_and(|stored| {
            stored
                .checkpoints
                .values()
                .any(|manifest| manifest.directory == directory)
        });
        if kept {
            let name = self.job_name(&key.0);
            self.broken(
                "I11",
                format!("{name}: {directory} was deleted while it counts as committed"),
            );
        }
    }

    // Clients.

    pub fn submit_acked(&mut self, name: &str, id: &str) {
        self.event(format!("submit of {name} was answered"));
        if let Some(before) = self.acked.insert(name.to_owned(), id.to_owned())
            && before != id
        {
            self.broken("I12", format!("{name} was answered with two ids"));
        }
        if !self.jobs.contains_key(id) {
            self.broken("I12", format!("{name} was answered before the store had it"));
        }
    }

    pub fn cancel_acked(&mut self, name: &str, job: &Job) {
        self.event(format!("cancel of {name} was answered: {:?}", job.state()));
        if matches!(job.state(), JobState::Succeeded | JobState::Failed) {
            return; // It came too late, and said so.
        }
        if let Some(stored) = self.jobs.get_mut(&job.id) {
            stored.cancel_acked = true;
        }
        if !matches!(job.state(), JobState::Cancelling | JobState::Cancelled) {
            self.broken(
                "I13",
                format!("the cancel of {name} was answered with {:?}", job.state()),
            );
        }
    }

    /// Which jobs are not where they should end, if all goes well from now on.
    pub fn unfinished(&self) -> Vec<String> {
        let running = self.jobs.values().filter(|stored| !terminal(stored.job.state()));
        let mut unfinished: Vec<String> = running
            .map(|stored| {
                format!(
                    "{} is {:?} ({})",
                    name_of(&stored.job),
                    stored.job.state(),
                    stored.job.reason
                )
            })
            .collect();
        unfinished.extend(
            self.processes
                .keys()
                .map(|key| format!("{}/{} runs", key.1, key.2)),
        );
        unfinished
    }

    /// The ends that were promised.
    pub fn check_ends(&mut self) {
        let mut broken = Vec::new();
        for stored in self.jobs.values() {
            let (name, state) = (name_of(&stored.job), stored.job.state());
            if stored.cancel_acked && state != JobState::Cancelled {
                broken.push(("I13", format!("{name} was cancelled and is {state:?}")));
            }
            if state == JobState::Failed {
                broken.push(("L2", format!("{name} failed: {}", stored.job.reason)));
            }
            if state == JobState::Succeeded && stored.checkpoints.is_empty() {
                broken.push((
                    "L4",
                    format!("{name} trained to its end and committed no checkpoint"),
                ));
            }
        }
        for (name, id) in &self.acked {
            if !self.jobs.contains_key(id) {
                broken.push(("I12", format!("{name} was answered and is not in the store")));
            }
        }
        for (rule, how) in broken {
            self.broken(rule, how);
        }
    }
}

fn name_of(job: &Job) -> String {
    let section = job.spec.as_ref().and_then(|spec| spec.job.as_ref());
    section.and_then(|job| job.name.clone()).unwrap_or_default()
}

/// The classes of a rank, as it announces them.
pub fn classes(num_classes: u32, rank: u32, world_size: u32, off_by_one: bool) -> ClassRange {
    let mut range = ClassRange::of_rank(num_classes, rank, world_size);
    if off_by_one && rank > 0 {
        range.lo += 1;
    }
    range
}

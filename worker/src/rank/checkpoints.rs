//! Checkpoints of a running rank: one fast copy on the training thread, everything slow (files, digests, commit,
//! retention) on a thread of its own. What the copy holds, and how it is taken back, stands here and nowhere else.

use super::failure::RankFailure;
use super::step::Trainer;
use crate::checkpoint::{Checkpoint, Location, NamedTensor, PartKind, TrainState, write};
use crate::optim::GradScaler;
use arcface_proto::v1::{CheckpointCommitted, CheckpointPart, CommitCheckpointRequest};
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread::JoinHandle;
use std::time::Instant;
use tch::{Kind, Tensor};
use tracing::{info, warn};

/// Copies in memory at once: one being written, one waiting. A third checkpoint waits until one of them is on the disk,
/// while training goes on. Their memory is used again and again: fresh pages would cost more than the copying.
const COPIES: usize = 2;
/// Commits that wait for the thread beside them; there is at most one a copy and those of before.
const WAITING_COMMITS: usize = 16;

/// A rank's part of a checkpoint, copied.
pub struct Snapshot {
    /// Where training stands.
    pub state: TrainState,
    /// Classes over all ranks.
    pub num_classes: u32,
    /// Head rows of this rank, and on rank 0 the backbone.
    pub parts: Vec<(PartKind, Vec<NamedTensor>)>,
}

impl Snapshot {
    /// What the coordinator is told of parts that were made of it, in `directory`. Who tells it is filled in later.
    pub fn announce(&self, directory: String, parts: Vec<CheckpointPart>) -> CommitCheckpointRequest {
        let TrainState {
            step,
            epoch,
            epoch_samples,
            scaler,
            num_image,
        } = self.state;
        CommitCheckpointRequest {
            rank: None,
            step,
            epoch,
            epoch_samples,
            directory,
            num_classes: self.num_classes,
            parts,
            scaler,
            persist_seconds: None,
            num_image,
        }
    }
}

/// Directory of a checkpoint, relative to the location of them all.
pub fn directory(location: &Location, step: u64, generation: u64) -> String {
    location.directory(&name(step, generation))
}

/// Name of what a generation kept of a step.
pub fn name(step: u64, generation: u64) -> String {
    format!("step-{step:010}-g{generation}")
}

/// The generation that a [`name`] tells.
fn generation_of(name: &str) -> Option<u64> {
    let (step, generation) = name.strip_prefix("step-")?.split_once("-g")?;
    step.parse::<u64>().ok()?;
    generation.parse().ok()
}

/// Copies what this rank keeps in a checkpoint.
#[cfg(test)]
pub fn snapshot(trainer: &mut Trainer, state: TrainState, num_classes: u32) -> Snapshot {
    snapshot_into(trainer, state, num_classes, Room::new())
}

/// Copies what this rank keeps in a checkpoint, into the memory of an older copy where it fits.
pub fn snapshot_into(trainer: &mut Trainer, state: TrainState, num_classes: u32, room: Room) -> Snapshot {
    let mut room = room.into_iter();
    let mut copied = |named: &[(String, Tensor)]| copied(named, room.next().unwrap_or_default());
    let mut parts = Vec::new();
    if trainer.comm.rank() == 0 {
        let mut named: Vec<(String, Tensor)> = trainer
            .backbone
            .state()
            .iter()
            .map(|entry| (format!("model.{}", entry.name), entry.tensor.shallow_clone()))
            .collect();
        let trainable = trainer.backbone.trainable();
        for (slot, buffers) in trainer.optimizer.state() {
            for ((name, _), buffer) in trainable.iter().zip(buffers) {
                named.push((format!("optimizer.{slot}.{name}"), buffer.shallow_clone()));
            }
        }
        named.push(("optimizer.steps".into(), scalar(trainer.optimizer.steps())));
        parts.push((PartKind::Backbone, copied(&named)));
    }
    let mut named = trainer.head.state();
    named.push(("updates".into(), scalar(trainer.head.updates())));
    parts.push((PartKind::Head(trainer.head.shard()), copied(&named)));
    Snapshot {
        state,
        num_classes,
        parts,
    }
}

/// Takes a committed checkpoint back, at whatever world size it was written.
///
/// # Errors
/// Damaged or missing parts, or tensors of another network or optimizer.
pub fn restore(trainer: &mut Trainer, checkpoint: &Checkpoint) -> Result<TrainState, RankFailure> {
    let unusable = |error| RankFailure::checkpoint(checkpoint.manifest(), &error);
    let backbone = checkpoint.backbone().map_err(unusable)?;
    let mut tensors: HashMap<String, Tensor> = backbone.into_iter().collect();
    trainer
        .backbone
        .load_state(&mut |name| tensors.remove(&format!("model.{name}")))?;
    let names: Vec<String> = trainer
        .backbone
        .trainable()
        .iter()
        .map(|(name, _)| (*name).to_owned())
        .collect();
    let steps = count(tensors.remove("optimizer.steps"), "optimizer.steps")?;
    trainer.optimizer.load_state(steps, &mut |slot, index| {
        tensors.remove(&format!("optimizer.{slot}.{}", names.get(index)?))
    })?;
    let head = checkpoint.head_rows(trainer.head.shard()).map_err(unusable)?;
    let mut rows: HashMap<String, Tensor> = head.into_iter().collect();
    let updates = count(rows.remove("updates"), "updates")?;
    trainer.head.load_state(updates, &mut |name| rows.remove(name))?;
    let state = checkpoint.train_state();
    if trainer.scaler.is_some() {
        let scaler = state
            .scaler
            .and_then(|scaler| GradScaler::resumed(scaler.scale, scaler.good_updates));
        let missing =
            || RankFailure::transient("checkpoint: the loss scale is missing or none that fp16 trains with");
        trainer.scaler = Some(scaler.ok_or_else(missing)?);
    }
    Ok(state)
}

fn scalar(value: u64) -> Tensor {
    Tensor::from(i64::try_from(value).unwrap_or(i64::MAX))
}

fn count(tensor: Option<Tensor>, name: &str) -> Result<u64, RankFailure> {
    tensor
        .filter(|tensor| tensor.numel() == 1 && tensor.kind() == Kind::Int64)
        .and_then(|tensor| u64::try_from(tensor.reshape([1]).int64_value(&[0])).ok())
        .ok_or_else(|| RankFailure::transient(format!("checkpoint: {name} is missing or no count")))
}

fn copied(tensors: &[(String, Tensor)], room: Vec<NamedTensor>) -> Vec<NamedTensor> {
    let borrowed: Vec<(&str, &Tensor)> = tensors
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor))
        .collect();
    write::snapshot(&borrowed, room)
}

enum Job {
    Write(Box<Snapshot>),
    Committed(Box<CheckpointCommitted>),
}

/// Memory of an older copy, by part.
pub type Room = Vec<Vec<NamedTensor>>;

/// What went wrong with checkpoints so far. Clones count together.
#[derive(Clone, Debug, Default)]
pub struct Failures(Arc<[AtomicU64; 3]>);

/// What can go wrong: writing the parts, putting the manifest beside them, removing what is not kept.
#[derive(Clone, Copy)]
enum Stage {
    Write,
    Manifest,
    Remove,
}

impl Failures {
    fn count(&self, stage: Stage) {
        self.0[stage as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// How many, by stage.
    pub fn read(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let counts = self.0.iter().map(|count| count.load(Ordering::Relaxed));
        ["write", "manifest", "remove"].into_iter().zip(counts)
    }
}

/// The thread that writes.
pub struct Writer {
    location: Location,
    failures: Failures,
    jobs: Option<SyncSender<Job>>,
    /// Memory that the thread has written out.
    returned: Receiver<Room>,
    /// What has come back of it.
    room: RefCell<Vec<Room>>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    /// Starts it for a location and this generation. `commit` is told of parts that are durable.
    pub fn start(
        location: Location,
        generation: u64,
        commit: impl Fn(CommitCheckpointRequest) + Send + 'static,
    ) -> Self {
        let (jobs, receiver) = sync_channel(COPIES + WAITING_COMMITS);
        let (give_back, returned) = sync_channel(COPIES);
        for _ in 0..COPIES {
            // As many as the channel holds.
            drop(give_back.try_send(Room::new()));
        }
        let place = location.clone();
        let failures = Failures::default();
        let failed = failures.clone();
        let thread = std::thread::spawn(move || {
            let mut written = Written {
                generation,
                failures: failed,
                ..Written::default()
            };
            for job in receiver {
                match job {
                    Job::Write(snapshot) => {
                        written.write(&place, &snapshot, &commit);
                        let room = snapshot.parts.into_iter().map(|(_, tensors)| tensors);
                        // The training thread is at its end if it is not taken back.
                        drop(give_back.try_send(room.collect()));
                    }
                    Job::Committed(committed) => {
                        settle(&place, &committed, &written.failures);
                        written.sweep(&place, &committed);
                    }
                }
            }
        });
        Self {
            location,
            failures,
            jobs: Some(jobs),
            returned,
            room: RefCell::default(),
            thread: Some(thread),
        }
    }

    /// What went wrong so far.
    pub fn failures(&self) -> &Failures {
        &self.failures
    }

    /// True while there is no room for another copy. Room does not go away but by [`Writer::room`].
    pub fn is_busy(&self) -> bool {
        let mut room = self.room.borrow_mut();
        loop {
            match self.returned.try_recv() {
                Ok(returned) => room.push(returned),
                Err(TryRecvError::Empty) => return room.is_empty(),
                // Without the thread nothing is written, and [`Writer::write`] says so.
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// The memory for a copy; waits for it while the writer is busy. Memory that has been used before comes first: where no
    /// two checkpoints overlap, there is never more than one copy.
    pub fn room(&self) -> Room {
        if self.is_busy() {
            return self.returned.recv().unwrap_or_default();
        }
        let mut room = self.room.borrow_mut();
        room.sort_by_key(Vec::len);
        room.pop().unwrap_or_default()
    }

    /// Writes the parts and asks for their commit.
    pub fn write(&self, snapshot: Snapshot) {
        self.send(Job::Write(Box::new(snapshot)));
    }

    /// A checkpoint was committed: its manifest is put beside the parts, expired ones are removed. For rank 0 alone.
    pub fn committed(&self, committed: CheckpointCommitted) {
        self.send(Job::Committed(Box::new(committed)));
    }

    /// Waits until everything was done; gives the location back.
    pub fn finish(mut self) -> Location {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            // A panic there was printed there; the checkpoint was not committed.
            thread.join().unwrap_or_default();
        }
        self.location
    }

    fn send(&self, job: Job) {
        if self.jobs.as_ref().is_none_or(|jobs| jobs.send(job).is_err()) {
            warn!("the checkpoint thread is gone: no more checkpoints");
        }
    }
}

/// What this generation has written and not seen committed.
#[derive(Default)]
struct Written {
    generation: u64,
    /// What earlier generations left unfinished is gone.
    swept_before: bool,
    /// Directories by step.
    steps: BTreeMap<u64, String>,
    failures: Failures,
}

impl Written {
    /// A checkpoint that cannot be written is a warning: the older ones stand, and training goes on. Nobody can commit it
    /// without this rank's parts, so what there is of it goes: a full disk has better use for the room.
    fn write(&mut self, location: &Location, snapshot: &Snapshot, commit: &impl Fn(CommitCheckpointRequest)) {
        let step = snapshot.state.step;
        let directory = directory(location, step, self.generation);
        let begin = Instant::now();
        let written: Result<Vec<_>, _> = snapshot
            .parts
            .iter()
            .map(|(kind, tensors)| location.write_part(&directory, *kind, tensors))
            .collect();
        match written {
            Ok(parts) => {
                self.steps.insert(step, directory.clone());
                let took = begin.elapsed();
                commit(CommitCheckpointRequest {
                    persist_seconds: Some(took.as_secs_f64()),
                    ..snapshot.announce(directory, parts)
                });
            }
            Err(error) => {
                self.failures.count(Stage::Write);
                warn!(step, "no checkpoint, training goes on: {error}");
                if let Err(error) = location.remove(&directory) {
                    self.failures.count(Stage::Remove);
                    warn!(step, "what was written of it stays: {error}");
                }
            }
        }
    }

    /// A checkpoint of this generation was committed: those before it that were not never will be, a peer could not write
    /// its parts, or its generation died over them. Only what the coordinator says is kept counts; without its list nothing
    /// is removed.
    fn sweep(&mut self, location: &Location, committed: &CheckpointCommitted) {
        let Some(manifest) = &committed.manifest else {
            return;
        };
        let later = self.steps.split_off(&manifest.step);
        let mut older: Vec<String> = std::mem::replace(&mut self.steps, later).into_values().collect();
        let kept = &committed.kept_directories;
        if kept.is_empty() {
            return;
        }
        if !self.swept_before {
            self.swept_before = true;
            older.extend(self.unfinished_before(location));
        }
        for directory in older {
            if kept.contains(&directory) {
                continue;
            }
            if let Err(error) = location.remove(&directory) {
                self.failures.count(Stage::Remove);
                warn!("cannot remove {directory}, which was never committed: {error}");
            }
        }
    }

    /// What earlier generations began and did not come to a manifest with.
    fn unfinished_before(&self, location: &Location) -> Vec<String> {
        let names = location.without_manifest().unwrap_or_else(|error| {
            self.failures.count(Stage::Remove);
            warn!("cannot look for checkpoints that were never committed: {error}");
            Vec::new()
        });
        let earlier = |name: &String| generation_of(name).is_some_and(|written| written < self.generation);
        let names = names.into_iter().filter(earlier);
        names.map(|name| location.directory(&name)).collect()
    }
}

/// Puts the manifest of a committed checkpoint beside its parts, and removes the expired ones.
pub fn settle(location: &Location, committed: &CheckpointCommitted, failures: &Failures) {
    if let Some(manifest) = &committed.manifest {
        match location.write_manifest(manifest) {
            Ok(()) => info!(
                step = manifest.step,
                "checkpoint committed: {}", manifest.directory
            ),
            Err(error) => {
                failures.count(Stage::Manifest);
                warn!(step = manifest.step, "no manifest beside the checkpoint: {error}");
            }
        }
    }
    for expired in &committed.expired_directories {
        if let Err(error) = location.remove(expired) {
            failures.count(Stage::Remove);
            warn!("cannot remove the expired checkpoint {expired}: {error}");
        }
    }
}

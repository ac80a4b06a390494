//! Checkpoints of a running rank: one fast copy on the training thread, everything slow (files, digests, commit,
//! retention) on a thread of its own. What the copy holds, and how it is taken back, stands here and nowhere else.

use super::failure::RankFailure;
use super::report::Committer;
use super::step::Trainer;
use crate::checkpoint::{Checkpoint, NamedTensor, PartKind, TrainState, write};
use crate::optim::GradScaler;
use arcface_proto::v1::{CheckpointCommitted, CommitCheckpointRequest};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;
use tch::{Device, Kind, Tensor};
use tracing::{info, warn};

/// Copies in memory at once: one being written, one waiting. A third makes training wait.
const WAITING: usize = 1;

/// A rank's part of a checkpoint, copied.
pub struct Snapshot {
    /// Where training stands.
    pub state: TrainState,
    /// Classes over all ranks.
    pub num_classes: u32,
    /// Head rows of this rank, and on rank 0 the backbone.
    pub parts: Vec<(PartKind, Vec<NamedTensor>)>,
}

/// Directory of a checkpoint, relative to the job's output.
pub fn directory(step: u64, generation: u64) -> String {
    format!("checkpoints/step-{step:010}-g{generation}")
}

/// Copies what this rank keeps in a checkpoint.
pub fn snapshot(trainer: &mut Trainer, state: TrainState, num_classes: u32) -> Snapshot {
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
    let mut tensors: HashMap<String, Tensor> = checkpoint.backbone()?.into_iter().collect();
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
    let mut rows: HashMap<String, Tensor> = checkpoint.head_rows(trainer.head.shard())?.into_iter().collect();
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

fn copied(tensors: &[(String, Tensor)]) -> Vec<NamedTensor> {
    let borrowed: Vec<(&str, &Tensor)> = tensors
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor))
        .collect();
    debug_assert!(tensors.iter().all(|(_, tensor)| tensor.device() == Device::Cpu));
    write::snapshot(&borrowed)
}

enum Job {
    Write(Box<Snapshot>),
    Committed(Box<CheckpointCommitted>),
}

/// The thread that writes.
pub struct Writer {
    output: PathBuf,
    jobs: Option<SyncSender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    /// Starts it for the job's output directory and this generation.
    pub fn start(output: PathBuf, generation: u64, committer: Committer) -> Self {
        let (jobs, receiver) = sync_channel(WAITING);
        let directory = output.clone();
        let thread = std::thread::spawn(move || {
            for job in receiver {
                match job {
                    Job::Write(snapshot) => write_and_commit(&directory, generation, *snapshot, &committer),
                    Job::Committed(committed) => settle(&directory, &committed),
                }
            }
        });
        Self {
            output,
            jobs: Some(jobs),
            thread: Some(thread),
        }
    }

    /// Writes the parts and asks for their commit. Waits while an older copy still waits.
    pub fn write(&self, snapshot: Snapshot) {
        self.send(Job::Write(Box::new(snapshot)));
    }

    /// A checkpoint was committed: its manifest is put beside the parts, expired ones are removed. For rank 0 alone.
    pub fn committed(&self, committed: CheckpointCommitted) {
        self.send(Job::Committed(Box::new(committed)));
    }

    /// Waits until everything was done; gives the output directory back.
    pub fn finish(mut self) -> PathBuf {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            // A panic there was printed there; the checkpoint was not committed.
            thread.join().unwrap_or_default();
        }
        self.output
    }

    fn send(&self, job: Job) {
        if self.jobs.as_ref().is_none_or(|jobs| jobs.send(job).is_err()) {
            warn!("the checkpoint thread is gone: no more checkpoints");
        }
    }
}

/// A checkpoint that cannot be written is a warning: the older ones stand, and training goes on.
fn write_and_commit(output: &Path, generation: u64, snapshot: Snapshot, committer: &Committer) {
    let TrainState {
        step,
        epoch,
        epoch_samples,
        scaler,
    } = snapshot.state;
    let directory = directory(step, generation);
    let path = output.join(&directory);
    let written: Result<Vec<_>, _> = snapshot
        .parts
        .iter()
        .map(|(kind, tensors)| write::write_part(&path, *kind, tensors))
        .collect();
    match written {
        Ok(parts) => committer.commit(CommitCheckpointRequest {
            rank: None,
            step,
            epoch,
            epoch_samples,
            directory,
            num_classes: snapshot.num_classes,
            parts,
            scaler,
        }),
        Err(error) => warn!(step, "no checkpoint: {error}"),
    }
}

/// Puts the manifest of a committed checkpoint beside its parts, and removes the expired ones.
pub fn settle(output: &Path, committed: &CheckpointCommitted) {
    if let Some(manifest) = &committed.manifest {
        let path = output.join(&manifest.directory);
        match write::write_manifest(&path, manifest) {
            Ok(()) => info!(
                step = manifest.step,
                "checkpoint committed: {}", manifest.directory
            ),
            Err(error) => warn!(step = manifest.step, "no manifest beside the checkpoint: {error}"),
        }
    }
    for expired in &committed.expired_directories {
        if let Err(error) = write::remove(output, expired) {
            warn!("cannot remove the expired checkpoint {expired}: {error}");
        }
    }
}

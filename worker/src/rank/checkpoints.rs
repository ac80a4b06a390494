//! Checkpoints of a running rank: one fast copy on the training thread, everything slow (files, digests, commit,
//! retention) on a thread of its own ([`Writer`]). What the copy holds, and how it is taken back, stands here and nowhere else.

mod writer;

pub use writer::{Failures, Writer, settle};

use super::failure::RankFailure;
use super::step::Trainer;
use crate::checkpoint::{Checkpoint, CheckpointError, Location, NamedTensor, PartKind, TrainState, write};
use crate::optim::GradScaler;
use arcface_proto::v1::{CheckpointPart, CommitCheckpointRequest};
use std::collections::HashMap;
use tch::{Kind, Tensor};

/// Memory of an older copy, by part.
pub type Room = Vec<Vec<NamedTensor>>;

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

/// The step and the generation that a [`name`] tells.
fn named(name: &str) -> Option<(u64, u64)> {
    let (step, generation) = name.strip_prefix("step-")?.split_once("-g")?;
    Some((step.parse().ok()?, generation.parse().ok()?))
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

/// Takes a committed checkpoint back, at whatever world size it was written. `in_memory`: it was put together from copies in the
/// memory of nodes, and says nothing about what is in the store.
///
/// # Errors
/// Damaged or missing parts, or tensors of another network or optimizer.
pub fn restore(
    trainer: &mut Trainer,
    checkpoint: &Checkpoint,
    in_memory: bool,
) -> Result<TrainState, RankFailure> {
    let unusable = |error: CheckpointError| match in_memory {
        true => RankFailure::copies(checkpoint.manifest(), "", &error),
        false => RankFailure::checkpoint(checkpoint.manifest(), &error),
    };
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

//! Verification during training. Every rank embeds its share of each batch, so none waits idle, and every rank
//! computes the same result. Batch-norm statistics are rank 0's: they are the model's.

use super::failure::RankFailure;
use crate::collective::Collective;
use crate::data::roots;
use crate::eval::{Verification, VerificationSet, evaluate};
use crate::model::{Backbone, ForwardMode, Role};
use arcface_proto::spec::{JobSpec, Precision};
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};

/// Images in one forward pass of a rank.
const BATCH_PER_RANK: usize = 64;

/// Reads the verification sets of a job, so that a missing one is known before the first step.
///
/// # Errors
/// Permanent, naming the set and the field.
pub fn open_sets(spec: &JobSpec, data_roots: &[PathBuf]) -> Result<Vec<VerificationSet>, RankFailure> {
    let open = |target: &String| {
        let path = set_path(&spec.data.rec, target);
        let path = roots::resolve(&path.to_string_lossy(), data_roots).map_err(RankFailure::from)?;
        VerificationSet::open(&path).map_err(RankFailure::from)
    };
    spec.eval
        .val_targets
        .iter()
        .map(|target| {
            open(target).map_err(|failure| RankFailure {
                message: format!("eval.val_targets: {target:?}: {}", failure.message),
                permanent: true,
                ..failure
            })
        })
        .collect()
}

/// `lfw` lies as `lfw.bin` beside the training data; what looks like a path is one.
fn set_path(rec: &str, target: &str) -> PathBuf {
    if target.contains('/') || target.ends_with(".bin") {
        return PathBuf::from(target);
    }
    let rec = Path::new(rec);
    let folder = match rec.extension().is_some_and(|ending| ending == "rec") {
        true => rec.parent().unwrap_or(Path::new("")),
        false => rec,
    };
    folder.join(format!("{target}.bin"))
}

/// Measures the backbone on one set, all ranks together.
///
/// # Errors
/// A broken image, or a lost peer.
pub fn run(
    backbone: &Backbone,
    precision: Precision,
    comm: &mut dyn Collective,
    set: &VerificationSet,
) -> Result<Verification, RankFailure> {
    let _no_grad = tch::no_grad_guard();
    let mode = ForwardMode::evaluation(precision);
    let world_size = comm.world_size() as usize;
    // The evaluation's error type carries anyhow; a lost peer must keep its type on the way through.
    let mut lost = None;
    let result = evaluate(set, BATCH_PER_RANK * world_size, &mut |images| {
        embed_shared(backbone, &mode, comm, images).map_err(|failure| {
            let told = anyhow::anyhow!("{failure}");
            lost = Some(failure);
            told
        })
    });
    match lost {
        Some(failure) => Err(failure),
        None => Ok(result?),
    }
}

/// Embeddings `[n, D]` of `[n, 3, 112, 112]` images that all ranks hold: each computes an equal share of rows.
fn embed_shared(
    backbone: &Backbone,
    mode: &ForwardMode,
    comm: &mut dyn Collective,
    images: &Tensor,
) -> Result<Tensor, RankFailure> {
    let count = images.size()[0];
    let (rank, world_size) = (i64::from(comm.rank()), i64::from(comm.world_size()));
    let share = (count + world_size - 1) / world_size;
    // The last shares may be short or empty; rows are repeated so that every rank sends the same shape.
    let rows: Vec<i64> = (0..share)
        .map(|row| (rank * share + row).min(count - 1))
        .collect();
    let own = images.index_select(0, &Tensor::from_slice(&rows));
    let embedding = backbone.forward(&own, mode).to_kind(Kind::Float).contiguous();
    Ok(comm.all_gather(&embedding)?.narrow(0, 0, count))
}

/// Gives every rank the batch-norm statistics of rank 0. Training does not read them, so this changes no step.
///
/// # Errors
/// A lost peer.
pub fn share_statistics(backbone: &Backbone, comm: &mut dyn Collective) -> Result<(), RankFailure> {
    let _no_grad = tch::no_grad_guard();
    for kind in [Kind::Float, Kind::Int64] {
        let buffers: Vec<Tensor> = backbone
            .state()
            .iter()
            .filter(|entry| entry.role == Role::Buffer && entry.tensor.kind() == kind)
            .map(|entry| entry.tensor.shallow_clone())
            .collect();
        if buffers.is_empty() {
            continue;
        }
        let flat: Vec<Tensor> = buffers.iter().map(|buffer| buffer.reshape([-1])).collect();
        let mut all = Tensor::cat(&flat, 0);
        comm.broadcast(&mut all, 0)?;
        let mut at = 0;
        for mut buffer in buffers {
            let count = buffer.numel() as i64;
            buffer.copy_(&all.narrow(0, at, count).view(buffer.size().as_slice()));
            at += count;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lie_beside_the_data_and_paths_are_paths() {
        assert_eq!(set_path("/data/ms1m", "lfw"), PathBuf::from("/data/ms1m/lfw.bin"));
        assert_eq!(
            set_path("/data/ms1m/train.rec", "lfw"),
            PathBuf::from("/data/ms1m/lfw.bin")
        );
        assert_eq!(set_path("synthetic", "/sets/x.bin"), PathBuf::from("/sets/x.bin"));
        assert_eq!(set_path("a", "own.bin"), PathBuf::from("own.bin"));
    }
}

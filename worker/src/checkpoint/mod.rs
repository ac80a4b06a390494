//! Checkpoints: a directory of safetensors, `backbone.safetensors` and one `head-<lo>-<hi>.safetensors` a shard,
//! and `manifest.json`. Written by the ranks of one world, read by those of any other.
//!
//! A part is written to a temporary name, synced, renamed and read again ([`mod@write`]); the checkpoint exists once the
//! coordinator has committed its manifest, which carries size and BLAKE3 digest of every part. Nothing of a part is used
//! before both were checked ([`mod@read`]). Which bytes a new shard takes from old ones is pure arithmetic ([`reshard`]).
//!
//! They lie in a directory or in an object store ([`location`]).
//!
//! Knows tensors by name alone: it must not know networks, heads or optimizers, nor decide what is committed.

mod digest;
mod disk;
mod error;
pub mod location;
pub mod manifest;
mod part;
pub mod read;
pub mod reshard;
pub mod write;

pub(crate) use disk::forget;
pub use error::CheckpointError;
pub use location::Location;
pub use part::PartKind;
pub use read::Checkpoint;
pub use write::write_part;

use arcface_proto::v1::{CheckpointManifest, LossScaler};

/// Bytes moved at a time between tensors and files.
const CHUNK: usize = 4 << 20;

/// A named tensor of a part.
pub type NamedTensor = (String, tch::Tensor);

/// Where training stands. It lies in the manifest, so that the coordinator knows it too.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrainState {
    /// Steps finished.
    pub step: u64,
    /// Epoch of the next step, from 0.
    pub epoch: u32,
    /// Samples of that epoch already consumed.
    pub epoch_samples: u64,
    /// The loss scale of fp16.
    pub scaler: Option<LossScaler>,
    /// Images of the training data; none in checkpoints of older versions.
    pub num_image: Option<u64>,
}

impl From<&CheckpointManifest> for TrainState {
    fn from(manifest: &CheckpointManifest) -> Self {
        Self {
            step: manifest.step,
            epoch: manifest.epoch,
            epoch_samples: manifest.epoch_samples,
            num_image: manifest.num_image,
            scaler: manifest.scaler,
        }
    }
}

#[cfg(test)]
mod tests;

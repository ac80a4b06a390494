//! The classifier: margins, class sampling, the distributed softmax loss and the update of the class weights,
//! sharded by class over the ranks. Speaks to other ranks through [`Collective`] alone; knows no gRPC, no file and
//! no backbone. A new head is one file and one line in [`build`].

mod centers;
mod classes;
pub mod cuda;
mod exchange;
pub mod lazy_sgd;
pub mod margin;
pub mod plain;
pub mod sampling;
#[cfg(test)]
pub(crate) mod suite;
pub mod tiled;
mod unit;

pub use cuda::CudaHead;
pub use plain::PlainHead;
pub use tiled::TiledHead;

use crate::kernels::launch::{LaunchError, Launcher};
use crate::{
    collective::{Collective, CollectiveError},
    optim::{OptimError, OptimizerConfig},
};
use arcface_proto::{
    spec::{self, HeadImplementation, MarginGradient, Precision},
    types::ClassRange,
};
use margin::Loss;
use std::sync::Arc;
use tch::{Device, Tensor, no_grad};

/// What a head computes; the same on every rank.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadConfig {
    /// Classes over all ranks.
    pub num_classes: u32,
    /// Embedding length D.
    pub embedding_size: i64,
    /// (m1, m2, m3) of cos(m1*theta + m2) - m3.
    pub margin: [f64; 3],
    /// Logit scale s.
    pub scale: f64,
    /// How the target's logit is differentiated.
    pub margin_gradient: MarginGradient,
    /// Non-target cosines above it become logit 0; `None` is off.
    pub interclass_filtering_threshold: Option<f64>,
    /// Share of a shard's classes used each step, in (0, 1].
    pub sample_rate: f64,
    /// Seed of the initial weights and of the sampling.
    pub seed: u64,
    /// Update rule of the class weights.
    pub optimizer: OptimizerConfig,
    /// Which head.
    pub implementation: HeadImplementation,
    /// Arithmetic of the products, where the head has a choice; sums, weights and optimizer state are f32.
    pub precision: Precision,
    /// What becomes of cosines.
    pub loss: spec::Loss,
}

impl HeadConfig {
    /// The head of a job; `num_classes` is the data set's where the job leaves it out.
    pub fn of(spec: &spec::JobSpec, num_classes: u32) -> Self {
        Self {
            num_classes,
            embedding_size: i64::from(spec.model.embedding_size),
            margin: spec.head.margin,
            scale: spec.head.scale,
            margin_gradient: spec.head.margin_gradient,
            interclass_filtering_threshold: spec.head.interclass_filtering_threshold,
            sample_rate: spec.head.sample_rate,
            seed: spec.seed,
            optimizer: OptimizerConfig::of(&spec.train),
            implementation: spec.head.implementation,
            precision: spec.train.precision,
            loss: spec.head.loss,
        }
    }

    /// The angular margin of this configuration, which not every loss has a use for.
    pub fn margin(&self) -> margin::Margin {
        margin::Margin::new(
            self.margin,
            self.scale,
            self.margin_gradient,
            self.interclass_filtering_threshold,
        )
    }

    /// The loss of this configuration, its running statistics at their start.
    pub fn loss(&self) -> Loss {
        Loss::new(
            self.loss,
            self.margin(),
            self.scale,
            self.interclass_filtering_threshold,
        )
    }
}

/// One rank's shard of the classifier. All ranks make the same calls in the same order.
pub trait Head: Send {
    /// The classes of this shard.
    fn shard(&self) -> ClassRange;

    /// Loss and gradients of one micro-batch, softmax over all (sampled) classes of all ranks. Losses with running
    /// statistics take them from the micro-batch over all ranks.
    ///
    /// * `embedding` `[b, D]` f32, raw (not normalised), detached, this rank's rows; `labels` `[b]` i64, global class ids.
    /// * `rows`: rows of every rank, the same list on all; `rows[rank] == b`, which may differ between ranks or be 0.
    /// * `step`: counter of the class sampling.
    /// * `share`: the weight of this micro-batch's mean in the update: its share of the update's samples, 1 without
    ///   accumulation; where the gradients of steps are summed, its share of its step's.
    ///
    /// The weight gradient, times `share`, is kept until [`update`](Self::update).
    ///
    /// # Errors
    /// On all ranks alike for a label out of range (which no collective call follows, so the communicator stays
    /// usable); [`HeadError::Collective`] as the communicator says.
    #[allow(clippy::too_many_arguments)] // the facts of one micro-batch; a struct would only rename them
    fn forward_backward(
        &mut self,
        comm: &mut dyn Collective,
        embedding: &Tensor,
        labels: &Tensor,
        rows: &[u32],
        step: u64,
        share: f64,
    ) -> Result<HeadOutput, HeadError>;

    /// Updates the class weights from the gradient kept since the last update, and forgets it.
    fn update(&mut self, lr: f64);

    /// Forgets the gradient without an update: for a step that is skipped.
    fn discard(&mut self);

    /// Updates made, also before the state was loaded (AdamW's bias correction counts them).
    fn updates(&self) -> u64;

    /// Weights and optimizer state for a checkpoint: "weight" and one entry per optimizer buffer, each
    /// `[num_local, D]` f32 (`[num_local, K, D]` with K centres a class), rows in the order of the shard's classes; and
    /// the loss's running statistics, f64 scalars that are the same on every rank. The tensors are the head's own:
    /// copy them before the next update.
    fn state(&mut self) -> Vec<(String, Tensor)>;

    /// Takes over the values of a [`state`](Self::state) of the same classes, by name, and its
    /// [`updates`](Self::updates). After an error the head must not be used.
    fn load_state(
        &mut self,
        updates: u64,
        rows: &mut dyn FnMut(&str) -> Option<Tensor>,
    ) -> Result<(), HeadError>;
}

/// What one micro-batch gave.
#[derive(Debug)]
pub struct HeadOutput {
    /// Mean loss over the micro-batch of all ranks, with the loss's own terms of the norms (MagFace); the same bits on
    /// every rank. 0 if it has no rows.
    pub loss: f64,
    /// `[b, D]` f32: world_size x the gradient of that mean by this rank's embeddings, times `share`. The world
    /// size cancels the averaging of the backbone's gradient over ranks.
    pub grad_embedding: Tensor,
    /// If the loss is not finite, the rows behind it, counted over all ranks: those whose embedding is not finite, or where
    /// there are none, those whose loss is not. The same on every rank.
    pub not_finite: Vec<u32>,
    /// What the head saw on the way.
    pub seen: Seen,
}

/// What a head saw of a micro-batch: numbers that it has in any case, for people who watch. Nothing follows from them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Seen {
    /// Classes of this shard in the softmax.
    pub sampled_rows: u32,
    /// Of these, classes of samples.
    pub positive_rows: u32,
    /// Cosines of samples with their own class, before the margin, where that is in this shard.
    pub target_cosines: Total,
    /// Norms of the embeddings of all ranks.
    pub norms: Total,
}

/// Values added up.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Total {
    /// Their sum.
    pub sum: f64,
    /// How many.
    pub count: u64,
}

impl Total {
    /// Adds one.
    pub fn add(&mut self, value: f64) {
        self.sum += value;
        self.count += 1;
    }
}

impl FromIterator<f64> for Total {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        let mut total = Self::default();
        values.into_iter().for_each(|value| total.add(value));
        total
    }
}

impl std::ops::AddAssign for Total {
    fn add_assign(&mut self, other: Self) {
        self.sum += other.sum;
        self.count += other.count;
    }
}

/// [`HeadOutput::not_finite`], from the norms of all rows and their losses.
fn rows_not_finite(loss: f64, norms: &[f64], losses: impl Iterator<Item = f64>) -> Vec<u32> {
    if loss.is_finite() {
        return Vec::new();
    }
    let broken = |values: &mut dyn Iterator<Item = f64>| -> Vec<u32> {
        let numbered = (0u32..).zip(values);
        numbered
            .filter(|(_, value)| !value.is_finite())
            .map(|(row, _)| row)
            .collect()
    };
    let embeddings = broken(&mut norms.iter().copied());
    match embeddings.is_empty() {
        true => broken(&mut { losses }),
        false => embeddings,
    }
}

/// Why a head failed.
#[derive(Debug, thiserror::Error)]
pub enum HeadError {
    /// A label that is no class.
    #[error("label {label} of sample {row} of rank {rank} is outside 0..{num_classes}")]
    LabelOutOfRange {
        /// The label.
        label: i64,
        /// Rank whose sample it is.
        rank: u32,
        /// Row in that rank's micro-batch.
        row: u32,
        /// Number of classes.
        num_classes: u32,
    },
    /// A tensor or list of another form than the head was built for.
    #[error("{what} has the form {got}, expected {expected}")]
    Form {
        /// Which one.
        what: String,
        /// The form expected.
        expected: String,
        /// The form it has.
        got: String,
    },
    /// A part of the state is absent.
    #[error("head state {name} is missing")]
    MissingState {
        /// Its name.
        name: String,
    },
    /// The optimizer refused its state.
    #[error("head: {0}")]
    Optimizer(#[from] OptimError),
    /// The device refused a kernel.
    #[error("head: {0}")]
    Kernel(#[from] LaunchError),
    /// A sampler broke its contract.
    #[error("class sampling of step {step}: {detail}")]
    Sampling {
        /// The step.
        step: u64,
        /// What is wrong.
        detail: String,
    },
    /// Communication failed.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
}

fn check_form(what: &str, got: &[i64], expected: &[i64]) -> Result<(), HeadError> {
    if got == expected {
        return Ok(());
    }
    Err(HeadError::Form {
        what: what.to_owned(),
        expected: format!("{expected:?}"),
        got: format!("{got:?}"),
    })
}

/// A head's state by name: its weights, what the optimizer keeps of them, and what the loss learns.
fn state_of(weight: &Tensor, buffers: Vec<(&'static str, &[Tensor])>, loss: &Loss) -> Vec<(String, Tensor)> {
    let buffers = buffers
        .into_iter()
        .map(|(slot, tensors)| (slot.to_owned(), tensors[0].shallow_clone()));
    std::iter::once(("weight".to_owned(), weight.shallow_clone()))
        .chain(buffers)
        .chain(loss.state())
        .collect()
}

/// Takes the weights, and what the loss has learnt, out of such a state.
fn load_weight_and_loss(
    rows: &mut dyn FnMut(&str) -> Option<Tensor>,
    weight: &mut Tensor,
    loss: &mut Loss,
) -> Result<(), HeadError> {
    let found = rows("weight").ok_or_else(|| HeadError::MissingState {
        name: "weight".to_owned(),
    })?;
    check_form("head state weight", &found.size(), &weight.size())?;
    no_grad(|| weight.copy_(&found));
    loss.load_state(rows)
}

/// Where a head's weights are, and what computes there. Tensors that it is given may be anywhere, those that it gives out
/// are there, and the communicator must take them.
#[derive(Clone)]
pub enum HeadDevice {
    /// The CPU.
    Cpu,
    /// A GPU.
    Gpu {
        /// As libtorch names it.
        device: Device,
        /// Starts the kernels of [`CudaHead`] on it.
        launcher: Arc<dyn Launcher>,
    },
}

impl HeadDevice {
    /// As libtorch names it.
    pub fn device(&self) -> Device {
        match self {
            Self::Cpu => Device::Cpu,
            Self::Gpu { device, .. } => *device,
        }
    }
}

/// This rank's shard of the configured head, with its initial weights. What the tiled heads do not compute, the plain head
/// does, on either device: several centres a class.
///
/// # Panics
/// If `rank >= world_size`.
pub fn build(config: &HeadConfig, rank: u32, world_size: u32, device: &HeadDevice) -> Box<dyn Head> {
    // Several centres a class: the tiles' arithmetic has one.
    let is_tiled = config.implementation == HeadImplementation::Tiled
        && !matches!(config.loss, spec::Loss::SubCenter(_));
    match device {
        HeadDevice::Cpu if is_tiled => Box::new(TiledHead::new(config, rank, world_size)),
        HeadDevice::Gpu { device, launcher } if is_tiled => {
            Box::new(CudaHead::new(config, rank, world_size, *device, launcher.clone()))
        }
        _ => Box::new(PlainHead::on(config, rank, world_size, device.device())),
    }
}

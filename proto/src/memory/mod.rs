//! How much memory one rank of a job takes, line by line, before anything runs: ours, and that of the reference's trainer for
//! the same job; and what would make a job fit. Pure arithmetic over the job and a table of the networks' sizes.
//!
//! A rank's memory is highest at one of three moments of a step ([`Moment`]). An [`Account`] is the list of what is there at
//! the highest of them; its lines add up to its total. What is known from the sources of the worker is a formula; what is
//! not (the size of a CUDA context, a library's workspaces) is a named constant, and its line is marked as assumed.

pub mod fit;
pub mod networks;
mod ours;
mod reference;
pub mod size;

pub use ours::ours;
pub use reference::{reference, reference_of_2021};

use crate::spec::{HeadImplementation, JobSpec, Optimizer, Precision};
use networks::{Network, Pass};

/// What a rank computes with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// One GPU: its memory.
    Cuda,
    /// Some cores: the memory of the process.
    Cpu,
}

impl Device {
    /// Its name on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cuda => "cuda",
            Self::Cpu => "cpu",
        }
    }
}

/// A job as memory sees it, on some number of ranks.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// The backbone's sizes.
    pub network: &'static Network,
    /// Embedding length D.
    pub embedding_size: u64,
    /// Activations are computed again on the way back.
    pub gradient_checkpointing: bool,
    /// Batch norms take their running statistics.
    pub freeze_batch_norm: bool,
    /// Identities C over all ranks.
    pub num_classes: u64,
    /// Centres a class.
    pub centers: u64,
    /// Share of a shard's classes used each step.
    pub sample_rate: f64,
    /// Which head.
    pub implementation: HeadImplementation,
    /// Update rule.
    pub optimizer: Optimizer,
    /// Arithmetic.
    pub precision: Precision,
    /// Steps of an update.
    pub gradient_acc: u64,
    /// Samples of a step over all ranks.
    pub global_batch: u64,
    /// Most samples of a rank's micro-batch.
    pub batch_size: u64,
    /// Ranks.
    pub world_size: u64,
    /// Verification runs beside training.
    pub evaluates: bool,
    /// Bytes in which decoded images are kept.
    pub cache: u64,
}

impl Job {
    /// The job on `world_size` ranks, its global batch as written: as it runs after it shrank or grew. `num_classes` is the
    /// data set's where the job leaves it out. `None` for a network without a line in the table.
    pub fn of(spec: &JobSpec, num_classes: u32, world_size: u32) -> Option<Self> {
        let eval = &spec.eval;
        let verifies = !eval.val_targets.is_empty() || eval.ijbb.is_some() || eval.ijbc.is_some();
        let centers = u64::from(spec.head.loss.centers());
        Some(Self {
            network: Network::find(&spec.model.network)?,
            embedding_size: spec.model.embedding_size.into(),
            gradient_checkpointing: spec.model.gradient_checkpointing,
            freeze_batch_norm: spec.model.freeze_batch_norm,
            num_classes: num_classes.into(),
            centers,
            sample_rate: spec.head.sample_rate,
            // Several centres a class: the tiles' arithmetic has one.
            implementation: match centers {
                1 => spec.head.implementation,
                _ => HeadImplementation::Plain,
            },
            optimizer: spec.train.optimizer,
            precision: spec.train.precision,
            gradient_acc: spec.train.gradient_acc.into(),
            global_batch: spec.global_batch(),
            batch_size: spec.train.batch_size.into(),
            world_size: world_size.max(1).into(),
            evaluates: verifies && eval.background,
            cache: spec.data.cache.unwrap_or(0),
        })
    }

    /// Micro-batches of a step.
    pub fn micro_batches(&self) -> u64 {
        let most_rows = self.global_batch.div_ceil(self.world_size);
        most_rows.div_ceil(self.batch_size.max(1)).max(1)
    }

    /// Most samples of this rank in a micro-batch.
    pub fn rows(&self) -> u64 {
        let most_rows = self.global_batch.div_ceil(self.world_size);
        most_rows.div_ceil(self.micro_batches())
    }

    /// Samples of all ranks in a micro-batch: what the head sees.
    pub fn rows_of_all(&self) -> u64 {
        self.rows()
            .saturating_mul(self.world_size)
            .min(self.global_batch.max(1))
    }

    /// Classes of the largest shard.
    pub fn shard(&self) -> u64 {
        self.num_classes.div_ceil(self.world_size)
    }

    /// Classes of it that take part in a step: the sampled ones, or the positives where these are more.
    pub fn sampled(&self) -> u64 {
        if self.sample_rate >= 1.0 {
            return self.shard();
        }
        let wanted = (self.sample_rate * self.shard() as f64) as u64;
        let positives = self.rows_of_all().div_ceil(self.world_size);
        wanted.max(positives).min(self.shard())
    }

    /// True if only the sampled rows of the head are touched in a step.
    pub fn is_lazy(&self) -> bool {
        self.sample_rate < 1.0
            && self.optimizer == Optimizer::Sgd
            && self.implementation == HeadImplementation::Tiled
    }

    /// Micro-batches whose gradients make one update.
    fn pending(&self) -> u64 {
        self.micro_batches().saturating_mul(self.gradient_acc)
    }

    fn trainable(&self) -> u64 {
        self.network.trainable.of(self.embedding_size)
    }

    /// A pass of libtorch's operations.
    fn pass(&self) -> &'static Pass {
        let passes = match self.precision {
            Precision::Fp32 => &self.network.fp32,
            Precision::Bf16 | Precision::Fp16 => &self.network.half,
        };
        &passes[usize::from(self.gradient_checkpointing)]
    }

    /// A pass with what is ours on this device: batch norms that are not frozen.
    fn pass_on(&self, device: Device) -> &'static Pass {
        if self.freeze_batch_norm {
            return self.pass();
        }
        let passes = match (device, self.precision) {
            (_, Precision::Fp32) => &self.network.fused_fp32,
            (Device::Cpu, Precision::Bf16) => &self.network.cpu_bf16,
            (Device::Cuda, Precision::Bf16) => &self.network.gpu_bf16,
            (_, Precision::Fp16) => return self.pass(),
        };
        &passes[usize::from(self.gradient_checkpointing)]
    }

    /// Buffers that the optimizer keeps for each parameter.
    fn slots(&self) -> u64 {
        match self.optimizer {
            Optimizer::Sgd => 1,
            Optimizer::AdamW => 2,
        }
    }
}

/// When in a step memory is at its highest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// The network went forward, everything is kept for the way back, the head works.
    Head,
    /// The network goes back.
    Backward,
    /// Gradients are summed and weights updated.
    Update,
}

impl Moment {
    /// In words.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Head => "head",
            Self::Backward => "backward",
            Self::Update => "update",
        }
    }
}

/// What memory is taken for; lines of two accounts with the same part are about the same thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// Parameters of the network.
    Parameters,
    /// Their gradients.
    Gradients,
    /// What its optimizer keeps.
    Optimizer,
    /// Batch norm statistics.
    Statistics,
    /// The gradient in one piece, or in buckets, for the sum over ranks.
    Exchange,
    /// What the way back through the network needs.
    Activations,
    /// The batch.
    Images,
    /// Batches that wait.
    Ahead,
    /// Images that were decoded before.
    Cache,
    /// Class weights.
    HeadWeights,
    /// What their optimizer keeps.
    HeadOptimizer,
    /// Their gradient.
    HeadGradient,
    /// What the head computes in.
    HeadWorkspace,
    /// Embeddings of all ranks, and their gradient.
    Embeddings,
    /// What the update computes in.
    Update,
    /// A second network that is evaluated.
    Evaluation,
    /// Copies of the state on their way to the disk.
    Checkpoints,
    /// Buffers of the collective library.
    Collective,
    /// What is there before the first tensor.
    Runtime,
}

impl Part {
    /// In words.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Parameters => "network parameters",
            Self::Gradients => "network gradients",
            Self::Optimizer => "network optimizer",
            Self::Statistics => "batch norm statistics",
            Self::Exchange => "gradient sum",
            Self::Activations => "activations",
            Self::Images => "images",
            Self::Ahead => "images ahead",
            Self::Cache => "image cache",
            Self::HeadWeights => "head weights",
            Self::HeadOptimizer => "head optimizer",
            Self::HeadGradient => "head gradient",
            Self::HeadWorkspace => "head workspace",
            Self::Embeddings => "embeddings",
            Self::Update => "update",
            Self::Evaluation => "evaluation",
            Self::Checkpoints => "checkpoint copies",
            Self::Collective => "collective buffers",
            Self::Runtime => "runtime",
        }
    }
}

/// One thing that takes memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// What it is for.
    pub part: Part,
    /// How much.
    pub bytes: u64,
    /// How that follows.
    pub how: String,
    /// A constant in it is an assumption.
    pub assumed: bool,
}

impl Line {
    fn new(part: Part, bytes: u64, how: impl Into<String>) -> Self {
        Self {
            part,
            bytes,
            how: how.into(),
            assumed: false,
        }
    }

    fn assumed(part: Part, bytes: u64, how: impl Into<String>) -> Self {
        Self {
            assumed: true,
            ..Self::new(part, bytes, how)
        }
    }
}

/// The memory of one rank at the highest moment of its steps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// What is there then, in the order of [`Part`].
    pub lines: Vec<Line>,
    /// Which moment it is.
    pub moment: Moment,
    /// The total at each moment.
    pub moments: [(Moment, u64); 3],
}

impl Account {
    /// From what is always there and what is there at each moment.
    fn highest(always: Vec<Line>, moments: [(Moment, Vec<Line>); 3]) -> Self {
        let sum = |lines: &[Line]| {
            lines
                .iter()
                .fold(0u64, |sum, line| sum.saturating_add(line.bytes))
        };
        let base = sum(&always);
        let totals = [0, 1, 2].map(|i| (moments[i].0, base.saturating_add(sum(&moments[i].1))));
        let highest = (0..3).max_by_key(|i| totals[*i].1).unwrap_or(0);
        let [head, backward, update] = moments;
        let (moment, of_moment) = match highest {
            0 => head,
            1 => backward,
            _ => update,
        };
        let mut lines: Vec<Line> = always.into_iter().chain(of_moment).collect();
        lines.retain(|line| line.bytes > 0);
        lines.sort_by_key(|line| line.part);
        Self {
            lines,
            moment,
            moments: totals,
        }
    }

    /// Bytes of all lines.
    pub fn total(&self) -> u64 {
        self.lines
            .iter()
            .fold(0, |sum, line| sum.saturating_add(line.bytes))
    }

    /// Bytes of the lines about something.
    pub fn of(&self, part: Part) -> u64 {
        let lines = self.lines.iter().filter(|line| line.part == part);
        lines.fold(0, |sum, line| sum.saturating_add(line.bytes))
    }
}

/// A product that stays at the largest number instead of wrapping.
fn product<const N: usize>(factors: [u64; N]) -> u64 {
    factors.into_iter().fold(1, u64::saturating_mul)
}

/// A count for people: `24.0 M`.
fn count(n: u64) -> String {
    match n {
        0..10_000 => n.to_string(),
        10_000..1_000_000 => format!("{:.1} k", n as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} M", n as f64 / 1e6),
        _ => format!("{:.2} G", n as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests;

//! A valid training job. [`JobSpec`] exists only as the result of [`crate::convert::job_spec`], which has checked
//! every range and relation; the fields' meaning and units are written in `arcface/v1/job.proto`.

use crate::location::StoreUrl;

/// Backbones by registry name, as `arcface-worker networks` lists them.
pub const NETWORKS: [&str; 17] = [
    "tiny",
    "r18",
    "r34",
    "r50",
    "r100",
    "r200",
    "r2060",
    "mbf",
    "mbf_large",
    "vit_t",
    "vit_t_dp005_mask0",
    "vit_s",
    "vit_s_dp005_mask_0",
    "vit_b",
    "vit_b_dp005_mask_005",
    "vit_l_dp005_mask_005",
    "vit_h",
];

/// Of these, the ones that train with gradient checkpointing unless a job says otherwise: those that the reference
/// trains so.
pub const CHECKPOINTED_NETWORKS: [&str; 5] = [
    "r2060",
    "vit_b",
    "vit_b_dp005_mask_005",
    "vit_l_dp005_mask_005",
    "vit_h",
];

/// A validated job with every default filled in.
#[derive(Clone, Debug, PartialEq)]
pub struct JobSpec {
    /// Output directory as the user wrote it.
    pub output: String,
    /// Name for people.
    pub name: String,
    /// Ranks wanted; with `train.batch_size` it fixes the global batch.
    pub world_size: u32,
    /// Fewest ranks to train with.
    pub min_world_size: u32,
    /// Most ranks to train with.
    pub max_world_size: u32,
    /// How the world may change.
    pub elastic: Elastic,
    /// Seed of every random draw.
    pub seed: u64,
    /// Restarts after failures before giving up.
    pub max_restarts: u32,
    /// The backbone.
    pub model: ModelSpec,
    /// The classifier.
    pub head: HeadSpec,
    /// The training set.
    pub data: DataSpec,
    /// Batch, schedule, optimizer.
    pub train: TrainSpec,
    /// Verification during training.
    pub eval: EvalSpec,
    /// Checkpoints.
    pub checkpoint: CheckpointSpec,
}

impl JobSpec {
    /// Samples of one optimizer micro-step over all ranks: fixed for the life of the job, whatever the world size.
    pub fn global_batch(&self) -> u64 {
        u64::from(self.train.batch_size) * u64::from(self.world_size)
    }
}

/// `[model]`
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// One of [`NETWORKS`].
    pub network: String,
    /// Embedding length D.
    pub embedding_size: u32,
    /// Dropout probability before the last linear layer.
    pub dropout: f64,
    /// Weights file to start from.
    pub init: Option<String>,
    /// Batch norm in evaluation mode, statistics and affine parameters fixed.
    pub freeze_batch_norm: bool,
    /// Activations are computed again in the backward pass instead of kept.
    pub gradient_checkpointing: bool,
}

pub use loss::{AdaFace, CurricularFace, Loss, LossName, MagFace, SubCenter};

/// `[head]`
#[derive(Clone, Debug, PartialEq)]
pub struct HeadSpec {
    /// Identities, if given; else the data set's.
    pub num_classes: Option<u32>,
    /// (m1, m2, m3).
    pub margin: [f64; 3],
    /// Logit scale s.
    pub scale: f64,
    /// Share of a shard's classes used each step.
    pub sample_rate: f64,
    /// Non-target cosines above it become logit 0; `None` is off.
    pub interclass_filtering_threshold: Option<f64>,
    /// How the target's logit is differentiated.
    pub margin_gradient: MarginGradient,
    /// Which head computes it.
    pub implementation: HeadImplementation,
    /// What becomes of cosines.
    pub loss: Loss,
    /// Class weights to start from; `None` is random.
    pub init: Option<HeadInit>,
}

/// `head.init` and `head.class_list`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeadInit {
    /// The old head.
    pub path: String,
    /// File that says which old class each class starts as; `None`: the same one.
    pub class_list: Option<String>,
}

/// `[data]`
#[derive(Clone, Debug, PartialEq)]
pub struct DataSpec {
    /// Folder, or `"synthetic"`.
    pub rec: String,
    /// Images, if given; else the data set's.
    pub num_image: Option<u64>,
    /// Decoding threads a rank.
    pub num_workers: u32,
    /// Random changes of the images.
    pub augment: Augment,
    /// Bytes in which a rank keeps decoded images; `None` is no cache.
    pub cache: Option<u64>,
}

/// `[train]`
#[derive(Clone, Debug, PartialEq)]
pub struct TrainSpec {
    /// Samples per rank and step at `world_size`.
    pub batch_size: u32,
    /// Epochs.
    pub num_epoch: u32,
    /// Epochs of warm-up.
    pub warmup_epoch: u32,
    /// Update rule of backbone and head.
    pub optimizer: Optimizer,
    /// Base learning rate.
    pub lr: f64,
    /// SGD momentum.
    pub momentum: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Steps whose gradients make one update.
    pub gradient_acc: u32,
    /// How they become one.
    pub accumulation: Accumulation,
    /// Largest norm of the backbone's gradient; `None` is no clipping.
    pub clip_grad_norm: Option<f64>,
    /// Arithmetic of the backbone.
    pub precision: Precision,
    /// Steps between log lines.
    pub frequent: u32,
    /// Stop after this many steps; `None` is at the last epoch's end.
    pub max_steps: Option<u64>,
    /// What follows a loss or gradient that is not finite.
    pub on_nonfinite: OnNonfinite,
    /// Event files for TensorBoard are written.
    pub tensorboard: bool,
    /// What the backbone's gradients are sent as.
    pub gradient_compression: GradientCompression,
    /// On a GPU the backbone runs as CUDA graphs.
    pub cuda_graph: bool,
}

/// `[eval]`
#[derive(Clone, Debug, PartialEq)]
pub struct EvalSpec {
    /// Steps between evaluations; `None`: at the end of every epoch only.
    pub every_steps: Option<u64>,
    /// Names or paths of `.bin` files.
    pub val_targets: Vec<String>,
    /// Folder of IJB-B.
    pub ijbb: Option<String>,
    /// Folder of IJB-C.
    pub ijbc: Option<String>,
    /// Epochs between evaluations of these; `None`: at the end of training only.
    pub ijb_every: Option<u32>,
    /// Training goes on meanwhile.
    pub background: bool,
    /// Most of a node's compute time that they take where no core is free, (0, 1].
    pub max_share: f64,
    /// What the best weights are best at.
    pub best: Option<Metric>,
    /// When training ends because that does not rise any more.
    pub early_stop: Option<EarlyStop>,
}

/// `eval.early_stop_*`
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EarlyStop {
    /// Evaluations in a row without a better one.
    pub patience: u32,
    /// What better means, at least 0.
    pub min_delta: f64,
}

/// `[checkpoint]`
#[derive(Clone, Debug, PartialEq)]
pub struct CheckpointSpec {
    /// Steps between checkpoints, beside the one at the end of every epoch.
    pub every_steps: Option<u64>,
    /// Seconds between checkpoints, likewise.
    pub every_seconds: Option<f64>,
    /// Committed checkpoints kept, as asked for.
    pub keep: u32,
    /// Mean hours until a rank fails.
    pub rank_mttf_hours: f64,
    /// Most steps that the loss of one node costs, by copies in memory; `None` without them.
    pub buddy_steps: Option<u64>,
    /// Where they go, if not to the output directory.
    pub location: Option<StoreUrl>,
}

impl CheckpointSpec {
    /// Fewest committed checkpoints kept: one to resume from, and one for the case that it is damaged.
    pub const LEAST_KEPT: u32 = 2;

    /// Committed checkpoints that retention keeps.
    pub fn kept(&self) -> u32 {
        self.keep.max(Self::LEAST_KEPT)
    }
}

mod loss;
mod metric;

pub use metric::{Metric, is_set_path, set_name};

/// A closed set of names in the job file.
pub trait Choice: Copy + Sized + 'static {
    /// Every value with its name.
    const ALL: &'static [(&'static str, Self)];

    /// Value of a name.
    fn parse(name: &str) -> Option<Self> {
        Self::ALL
            .iter()
            .find(|(candidate, _)| *candidate == name)
            .map(|(_, value)| *value)
    }
}

macro_rules! choice {
    ($(#[$doc:meta])* $name:ident { $($(#[$value_doc:meta])* $value:ident = $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($(#[$value_doc])* $value),+ }

        impl Choice for $name {
            const ALL: &'static [(&'static str, Self)] = &[$(($text, Self::$value)),+];
        }

        impl $name {
            /// Its name in the job file.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$value => $text),+ }
            }
        }
    };
}

pub(crate) use choice;

choice! {
    /// How a job's world may change after failures and arrivals.
    Elastic {
        /// Always `world_size` ranks.
        Off = "off",
        /// Fewer after a loss.
        Shrink = "shrink",
        /// More when nodes come.
        Grow = "grow",
        /// Both.
        Both = "both",
    }
}
choice! {
    /// Derivative of the target's logit by its cosine.
    MarginGradient {
        /// `s`, as the reference trains.
        Reference = "reference",
        /// The true one.
        Exact = "exact",
    }
}
choice! {
    /// Which head computes loss and gradients.
    HeadImplementation {
        /// Walks through the classes in tiles and never builds the logits.
        Tiled = "tiled",
        /// Materialises the logits: the oracle.
        Plain = "plain",
    }
}
choice! {
    /// Random changes of training images.
    Augment {
        /// None.
        None = "none",
        /// Horizontal flip with probability 1/2.
        Flip = "flip",
        /// The same, and size, sharpness and colour as in the reference's DALI pipeline.
        Dali = "dali",
    }
}
choice! {
    /// Update rule.
    Optimizer {
        /// Stochastic gradient descent with momentum (torch's form).
        Sgd = "sgd",
        /// Adam with decoupled weight decay.
        AdamW = "adamw",
    }
}
choice! {
    /// Arithmetic of the backbone.
    Precision {
        /// 32-bit floats.
        Fp32 = "fp32",
        /// bfloat16 with fp32 master weights.
        Bf16 = "bf16",
        /// float16 with fp32 master weights and a dynamic loss scale.
        Fp16 = "fp16",
    }
}
choice! {
    /// How gradients of several steps become that of one update.
    Accumulation {
        /// Averaged: the learning rate keeps its meaning.
        Mean = "mean",
        /// Added, as the reference does.
        Sum = "sum",
    }
}
choice! {
    /// What the backbone's gradients are sent as between ranks.
    GradientCompression {
        /// As they are, in fp32.
        Off = "none",
        /// bfloat16: the range of fp32, 8 bits of precision.
        Bf16 = "bf16",
        /// float16: 11 bits of precision, up to 65504.
        Fp16 = "fp16",
    }
}
choice! {
    /// What follows a loss or gradient that is not finite.
    OnNonfinite {
        /// The job fails.
        Stop = "stop",
        /// The update is left out.
        Skip = "skip",
        /// Training goes back to the last checkpoint and leaves out the step.
        Rollback = "rollback",
    }
}

//! Everything that a job needs before its first step, opened and checked in the order in which mistakes are cheap to
//! find: settings, data, verification sets, network; then the peers.

use super::captured::CapturedSteps;
use super::evaluate::targets::Target;
use super::failure::RankFailure;
use super::figures::Sight;
use super::gradients::{Buckets, GradientSum};
use super::head_start::HeadStart;
use super::memory;
use super::nonfinite::{Guard, Samples};
use super::phases::Phases;
use super::same_data::check_same_data;
use super::step::{StepSettings, Trainer, Window};
use crate::collective::Collective;
use crate::data::{self, Dataset, Epochs, ImageCache, augment::Filters};
use crate::device::Placement;
use crate::export;
use crate::head::{self, HeadConfig};
use crate::model::{Backbone, BackboneConfig};
use crate::optim::{Fused, GradScaler, OptimizerConfig, schedule::PolyWarmup};
use arcface_proto::spec::{JobSpec, Precision};
use arcface_proto::types::ClassRange;
use std::path::PathBuf;
use std::sync::Arc;
use tch::Tensor;
use tracing::warn;

/// What is known without the other ranks.
pub struct Prepared {
    /// The job.
    pub spec: JobSpec,
    /// Where this rank computes.
    pub placement: Placement,
    /// The training set.
    pub dataset: Arc<dyn Dataset>,
    /// The order of its samples.
    pub epochs: Epochs,
    /// What is evaluated.
    pub targets: Vec<Target>,
    /// The network with its initial weights, the same on every rank; on the CPU until the trainer is put together.
    pub backbone: Backbone,
    /// Where class weights come from, if not from random draws.
    pub head_start: Option<HeadStart>,
}

impl Prepared {
    /// Opens data and network, to train at `placement`.
    ///
    /// # Errors
    /// Permanent for anything that the job file or the data is to blame for.
    pub fn open(spec: JobSpec, data_roots: &[PathBuf], placement: Placement) -> Result<Self, RankFailure> {
        if placement.gpu().is_none() && spec.train.precision == Precision::Fp16 {
            warn!(
                "train.precision = \"fp16\" is slow on a CPU, good for comparisons alone: use \"bf16\" or \"fp32\""
            );
        }
        let dataset = data::open(&spec.data, spec.head.num_classes, spec.seed, data_roots)?;
        let epochs = Epochs::new(dataset.len(), spec.global_batch(), spec.seed).map_err(|error| {
            RankFailure::permanent(error.to_string())
                .hint("a smaller train.batch_size or job.world_size, or more data")
        })?;
        let targets = Target::open_all(&spec, data_roots)?;
        let mut backbone = Backbone::new(&BackboneConfig::from(&spec.model))?;
        match &spec.model.init {
            Some(path) => {
                let path = data::roots::resolve(path, data_roots).map_err(RankFailure::from)?;
                export::weights::load_backbone(&path, &mut backbone)
                    .map_err(|error| RankFailure::permanent(format!("model.init: {error}")))?;
            }
            None => backbone.init_random(spec.seed),
        }
        let head_start = match &spec.head.init {
            Some(init) => Some(HeadStart::open(init, dataset.num_classes(), data_roots)?),
            None => None,
        };
        Ok(Self {
            spec,
            placement,
            dataset,
            epochs,
            targets,
            backbone,
            head_start,
        })
    }

    /// Steps of the whole job, as the schedule counts them.
    pub fn total_steps(&self) -> u64 {
        self.epochs.steps_per_epoch() * u64::from(self.spec.train.num_epoch)
    }

    /// The step that training ends before.
    pub fn end_step(&self) -> u64 {
        let total = self.total_steps();
        self.spec.train.max_steps.map_or(total, |most| most.min(total))
    }

    /// Puts the trainer together for this rank's place among `comm`.
    ///
    /// # Errors
    /// If the ranks do not start from the same weights, or a peer is lost.
    pub fn into_trainer(self, mut comm: Box<dyn Collective>) -> Result<(Trainer, Job), RankFailure> {
        let (rank, world_size) = (comm.rank(), comm.world_size());
        check_same_start(&self.backbone, self.head_start.as_ref(), comm.as_mut())?;
        check_same_data(self.dataset.as_ref(), comm.as_mut())?;
        let job = Job {
            total_steps: self.total_steps(),
            end_step: self.end_step(),
            num_classes: self.dataset.num_classes(),
            cache: self.spec.data.cache.map(|bytes| Arc::new(ImageCache::new(bytes))),
            spec: self.spec,
            dataset: self.dataset,
            epochs: self.epochs,
            targets: self.targets.into(),
            ranks_on_node: 1,
        };
        let mut backbone = self.backbone;
        let parts = backbone.parts();
        backbone.move_to(self.placement.device());
        backbone.compute_with(self.placement.kernels());
        let params: Vec<Tensor> = backbone
            .trainable()
            .into_iter()
            .map(|(_, tensor)| tensor.shallow_clone())
            .collect();
        let elements: Vec<usize> = params.iter().map(Tensor::numel).collect();
        let config = HeadConfig::of(&job.spec, job.num_classes);
        if self.placement.gpu().is_none() {
            let shard = ClassRange::of_rank(config.num_classes, rank, world_size);
            let copies = 1 + config.optimizer.slots().len() as u64;
            let row = config.embedding_size.unsigned_abs() * size_of::<f32>() as u64;
            memory::check_head(u64::from(shard.len()) * row * copies, memory::of_machine())?;
        }
        let mut head = head::build(&config, rank, world_size, self.placement.of_head());
        if let Some(start) = &self.head_start {
            start.fill(head.as_mut())?;
        }
        let compression = job.spec.train.gradient_compression;
        let warmup_steps = job.epochs.steps_per_epoch() * u64::from(job.spec.train.warmup_epoch);
        let trainer = Trainer {
            placement: self.placement,
            optimizer: Box::new(Fused::new(OptimizerConfig::of(&job.spec.train), &params)),
            scaler: (job.spec.train.precision == Precision::Fp16).then(GradScaler::default),
            head,
            schedule: PolyWarmup::new(job.spec.train.lr, warmup_steps, job.total_steps),
            settings: StepSettings::of(&job.spec, &job.epochs, world_size),
            guard: Guard::new(job.spec.train.on_nonfinite),
            samples: Samples {
                dataset: job.dataset.clone(),
                epochs: job.epochs.clone(),
                batch_size: job.spec.train.batch_size,
            },
            window: Window::default(),
            sum: GradientSum::new(Buckets::new(&elements, &parts), compression),
            phases: Phases::default(),
            sight: Sight::default(),
            captured: CapturedSteps::new(job.spec.train.cuda_graph),
            filters: Filters::default(),
            backbone,
            params,
            comm,
        };
        Ok((trainer, job))
    }
}

/// The job as all ranks see it.
#[derive(Clone)]
pub struct Job {
    /// As submitted.
    pub spec: JobSpec,
    /// The training set.
    pub dataset: Arc<dyn Dataset>,
    /// The order of its samples.
    pub epochs: Epochs,
    /// Images that were decoded before.
    pub cache: Option<Arc<ImageCache>>,
    /// What is evaluated.
    pub targets: Arc<[Target]>,
    /// Ranks that share the cores of this node; 1 unless someone knows better.
    pub ranks_on_node: u32,
    /// Steps of the schedule.
    pub total_steps: u64,
    /// The step that training ends before.
    pub end_step: u64,
    /// Identities.
    pub num_classes: u32,
}

/// A different binary, weights file or data folder on one node would train nonsense: compare before the first step.
fn check_same_start(
    backbone: &Backbone,
    head_start: Option<&HeadStart>,
    comm: &mut dyn Collective,
) -> Result<(), RankFailure> {
    let mut hasher = blake3::Hasher::new();
    if let Some(start) = head_start {
        start.add_to(&mut hasher);
    }
    for entry in backbone.state() {
        hasher.update(entry.name.as_bytes());
        let flat = entry.tensor.detach().contiguous().view([-1]);
        let mut bytes = vec![0u8; flat.numel() * flat.kind().elt_size_in_bytes()];
        flat.copy_data_u8(&mut bytes, flat.numel());
        hasher.update(&bytes);
    }
    let mut digest = [0; 8];
    digest.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    let own = i64::from_le_bytes(digest);
    let all = comm.all_gather(&Tensor::from_slice(&[own]))?;
    for rank in 0..i64::from(comm.world_size()) {
        if all.int64_value(&[rank]) != all.int64_value(&[0]) {
            return Err(
                RankFailure::permanent(format!("rank {rank} starts from other weights than rank 0"))
                    .hint("the same arcface-worker and the same model.init and head.class_list belong on every node"),
            );
        }
    }
    Ok(())
}

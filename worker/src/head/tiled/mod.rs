//! The head that never builds the logits, for the CPU: it walks through the class weights in tiles that fit the cache, and
//! does everything that is due to a tile while it is there. Knows no gRPC, no file and no backbone.
//!
//! 1. [`Head::forward_backward`] is one pass: cosines of a tile with all embeddings, softmax terms, their sums, and the
//!    tile's weighted sum for the embeddings' gradient. The terms need no maximum (see `kernel/exponentials.rs`), so that
//!    gradient is divided by the sums of all ranks afterwards. The weights are only read.
//! 2. [`Head::update`] is a second pass: it forms the terms anew, but for those that were kept, with them the tile's weight
//!    gradient, and updates the tile at once. No gradient of all classes ever exists, with gradient accumulation either: the micro-batches' embeddings
//!    are kept instead (`micro.rs`).
//!
//! Sampled heads under SGD touch the sampled rows alone (`../lazy_sgd.rs`). Memory beside weights and optimizer state
//! is O(batch x dimension) and a twenty-fifth of these for kept terms, none of it taken anew in a step.
//!
//! `kernel/` has the arithmetic, `chunk.rs` a tile, `kept.rs` terms between the passes, `sweep.rs` the passes and their threads.

mod buffer;
mod chunk;
mod kept;
pub mod kernel;
mod micro;
mod sweep;

use super::{
    Head, HeadConfig, HeadError, HeadOutput, Seen,
    classes::{check_labels, choose, initial_weight, to_vec},
    exchange::{check_forms, gather_rows, scatter_rows},
    lazy_sgd::History,
    load_weight_and_loss,
    margin::{Loss, Prepared, Rows},
    rows_not_finite,
    sampling::{ClassSampler, RandomNegatives},
    state_of,
    unit::MIN_NORM,
};
use crate::{
    collective::{Collective, ReduceOp},
    optim::{self, Optimizer, OptimizerConfig},
    slices,
};
use arcface_proto::{spec::Precision, types::ClassRange};
use chunk::{Taking, Weights};
use kernel::{
    exponentials::{SMALLEST_SUM, first_shift},
    gemm::Format,
    isa::Isa,
    rows::{AdamWStep, AddScaled, Unit},
};
use micro::{Geometry, Micro, Target};
use std::f64::consts::{LN_2, LOG2_E};
use sweep::{Rule, Threads};
use tch::{Device, Kind, Tensor};

/// Smallest target probability in the loss, so that a loss is at most 69.08; does not cut the gradient.
const MIN_PROBABILITY: f64 = 1e-30;

/// Terms that are kept take so small a part of weights and optimizer state at most.
const KEPT_PART: usize = 25;

/// Shortest rows with products in bf16.
const BF16_DIM: i64 = 128;
/// Fewest classes of all ranks, as sampled, with products in bf16.
const BF16_CLASSES: f64 = 4096.0;

/// One rank's shard. See the head of this file.
pub struct TiledHead {
    shard: ClassRange,
    config: HeadConfig,
    loss: Loss,
    sampler: Box<dyn ClassSampler>,
    weight_nd: Tensor,
    /// Keeps the optimizer's buffers under their names; its steps are made here.
    buffers: Box<dyn Optimizer>,
    updates: u64,
    lazy: Option<Lazy>,
    geometry: Geometry,
    threads: Threads,
    /// The micro-batches since the last update are the first `pending`; the others are spare memory.
    micros: Vec<Micro>,
    pending: usize,
    /// `[b, d]`: see [`Threads::softmax`].
    sums: Vec<f64>,
}

/// Rows that wait for steps without gradient.
struct Lazy {
    history: History,
    /// By row: the history's `now` when it was touched last.
    since: Vec<u32>,
}

/// What all ranks know of the softmax of a micro-batch, by sample.
struct Softmax {
    /// Sum of all terms, times 2^-shift.
    sums: Vec<f64>,
    /// Logit of the sample's own class.
    targets: Vec<f64>,
}

impl TiledHead {
    /// This rank's shard, with initial weights that depend on (seed, class, dimension) alone, on as many threads as
    /// libtorch uses now.
    ///
    /// # Panics
    /// If `rank >= world_size`.
    pub fn new(config: &HeadConfig, rank: u32, world_size: u32) -> Self {
        let sampler = RandomNegatives {
            seed: config.seed,
            rate: config.sample_rate,
        };
        Self::with_sampler(config, rank, world_size, Box::new(sampler))
    }

    /// The same with another choice of classes.
    ///
    /// # Panics
    /// If `rank >= world_size`.
    pub fn with_sampler(
        config: &HeadConfig,
        rank: u32,
        world_size: u32,
        sampler: Box<dyn ClassSampler>,
    ) -> Self {
        let threads = usize::try_from(tch::get_num_threads()).unwrap_or(1);
        let isa = Isa::best();
        Self::on(
            config,
            rank,
            world_size,
            sampler,
            isa,
            format(config, isa),
            threads,
        )
    }

    /// The same with these instructions, operands and threads.
    fn on(
        config: &HeadConfig,
        rank: u32,
        world_size: u32,
        sampler: Box<dyn ClassSampler>,
        isa: Isa,
        format: Format,
        threads: usize,
    ) -> Self {
        let shard = ClassRange::of_rank(config.num_classes, rank, world_size);
        let weight_nd = initial_weight(config.seed, shard, config.embedding_size);
        let geometry = Geometry::new(config.embedding_size.max(1) as usize, format);
        let lazy = match config.optimizer {
            OptimizerConfig::Sgd {
                momentum,
                weight_decay,
            } if config.sample_rate < 1.0 => Some(Lazy {
                history: History::new(momentum, weight_decay, config.sample_rate),
                since: vec![0; shard.len() as usize],
            }),
            _ => None,
        };
        let copies = 1 + config.optimizer.slots().len();
        let room = weight_nd.numel() * size_of::<f32>() * copies / KEPT_PART;
        Self {
            shard,
            loss: config.loss(),
            config: config.clone(),
            sampler,
            buffers: optim::build(config.optimizer, &[weight_nd.shallow_clone()]),
            weight_nd,
            updates: 0,
            lazy,
            geometry,
            threads: Threads::new(threads, isa, geometry, room),
            micros: Vec::new(),
            pending: 0,
            sums: Vec::new(),
        }
    }

    /// The rows as they are, for a look at some of them.
    fn weights(&self) -> Weights<'_> {
        weights(&self.weight_nd, &*self.buffers, self.lazy.as_ref())
    }

    /// Cosine of each sample that has its class here with that class, in double precision whatever the products are
    /// in: an angle near 0 or pi needs it. And whether rounding put it outside of [-1, 1], where no gradient flows.
    fn target_cosines(&self, micro: &Micro, rows: &[Option<usize>]) -> Vec<(f64, bool)> {
        let (dim, weights) = (self.geometry.dim, self.weights());
        let mut unit = vec![0f32; dim];
        let cosine = |(sample, row): (usize, &Option<usize>)| {
            let Some(row) = *row else { return (0.0, false) };
            let (weight, missed) = weights.row(row, dim);
            self.threads.isa().run(Unit {
                weight,
                missed,
                unit: &mut unit,
            });
            let products = |a: &[f32], b: &[f32]| -> f64 {
                a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
            };
            let embedding = &micro.unit_row(sample, self.geometry)[..dim];
            // Of rows whose length is 1 to single precision: the second order of that counts at the poles.
            let lengths = (products(&unit, &unit) * products(embedding, embedding)).sqrt();
            let raw = products(&unit, embedding) / if lengths < 0.5 { 1.0 } else { lengths };
            (raw.clamp(-1.0, 1.0), raw.abs() > 1.0)
        };
        rows.iter().enumerate().map(cosine).collect()
    }

    /// Sums over all ranks, from the sums over this rank's other classes and its targets' logits.
    fn reduce(
        comm: &mut dyn Collective,
        micro: &Micro,
        sums: &[f64],
        logits: &[Option<f64>],
    ) -> Result<Softmax, HeadError> {
        let batch = micro.batch;
        let term = |sample: usize, logit: &Option<f64>| {
            logit.map_or(0.0, |logit| {
                (logit * LOG2_E - f64::from(micro.shift[sample])).exp2()
            })
        };
        let own = sums.iter().zip(logits).enumerate();
        let mut both: Vec<f64> = own
            .map(|(sample, (sum, logit))| sum + term(sample, logit))
            .collect();
        both.extend(logits.iter().map(|logit| logit.unwrap_or(0.0)));
        // One message for both.
        let mut both = Tensor::from_slice(&both);
        comm.all_reduce(&mut both, ReduceOp::Sum)?;
        let mut values = vec![0f64; 2 * batch];
        both.copy_data(&mut values, 2 * batch);
        let targets = values.split_off(batch);
        Ok(Softmax {
            sums: values,
            targets,
        })
    }

    /// The softmax of the micro-batch in hand, and the gradient of embeddings before it is divided by the sums. Where
    /// a sum came out so small that it may have lost terms, shifts by the largest logit and does it again; every rank
    /// sees the same sums.
    fn softmax(
        &mut self,
        comm: &mut dyn Collective,
        logits: &[Option<f64>],
        embeddings: &mut Tensor,
    ) -> Result<Softmax, HeadError> {
        let micro = &mut self.micros[self.pending];
        let weights = weights(&self.weight_nd, &*self.buffers, self.lazy.as_ref());
        let shard_rows = self.shard.len() as usize;
        let keep = self.pending == 0;
        let out = slices::floats_mut(embeddings);
        self.sums.resize(micro.batch, 0.0);
        let rows = taking(micro, shard_rows);
        self.threads
            .softmax(weights, rows, micro, &mut self.sums, out, keep);
        let softmax = Self::reduce(comm, micro, &self.sums, logits)?;
        let lost = |sum: &f64| *sum < SMALLEST_SUM;
        if !softmax.sums.iter().any(lost) {
            return Ok(softmax);
        }
        let mut largest = vec![f32::NEG_INFINITY; micro.columns];
        self.threads
            .largest(weights, taking(micro, shard_rows), micro, &mut largest);
        for (largest, logit) in largest.iter_mut().zip(logits) {
            *largest = largest.max(logit.map_or(f32::NEG_INFINITY, |logit| (logit * LOG2_E) as f32));
        }
        let mut largest = Tensor::from_slice(&largest);
        comm.all_reduce(&mut largest, ReduceOp::Max)?;
        let largest = slices::floats(&largest).to_vec();
        for ((shift, largest), sum) in micro.shift.iter_mut().zip(largest).zip(&softmax.sums) {
            if lost(sum) {
                *shift = largest.ceil();
            }
        }
        let rows = taking(micro, shard_rows);
        self.threads
            .softmax(weights, rows, micro, &mut self.sums, out, keep);
        Self::reduce(comm, micro, &self.sums, logits)
    }
}

/// What a head of this configuration computes with on this machine, for people.
pub fn arithmetic(config: &HeadConfig) -> String {
    let isa = Isa::best();
    let format = match format(config, isa) {
        Format::F32 => "fp32",
        Format::Bf16 => "bf16",
    };
    format!("{} {format}", isa.name())
}

/// True if products may have operands of bf16: the job wants it, and it pays. Short rows do not pay, and rounding weighs
/// more in them; nor do heads that take no time.
pub(super) fn wants_bf16(config: &HeadConfig) -> bool {
    let large = config.embedding_size >= BF16_DIM
        && f64::from(config.num_classes) * config.sample_rate >= BF16_CLASSES;
    large && matches!(config.precision, Precision::Bf16 | Precision::Fp16)
}

/// Form of the operands of products.
fn format(config: &HeadConfig, isa: Isa) -> Format {
    match wants_bf16(config) && isa.multiplies_bf16() {
        true => Format::Bf16,
        false => Format::F32,
    }
}

/// The classes of the shard that take part in a micro-batch.
fn taking(micro: &Micro, rows: usize) -> Taking<'_> {
    match &micro.classes {
        Some(classes) => Taking::Some(classes),
        None => Taking::All(rows),
    }
}

fn weights<'a>(weight_nd: &'a Tensor, buffers: &'a dyn Optimizer, lazy: Option<&'a Lazy>) -> Weights<'a> {
    let momentum = match lazy {
        Some(_) => slices::floats(&buffers.state()[0].1[0]),
        None => &[],
    };
    Weights {
        first: 0,
        weight: slices::floats(weight_nd),
        momentum,
        lazy: lazy.map(|lazy| (lazy.since.as_slice(), &lazy.history)),
    }
}

/// Handles to the optimizer's buffers, in their order.
fn slots(buffers: &dyn Optimizer) -> Vec<Tensor> {
    let state = buffers.state();
    state
        .iter()
        .map(|(_, tensors)| tensors[0].shallow_clone())
        .collect()
}

/// Mean over the samples of -ln p of the target; and p of each.
fn cross_entropy(micro: &Micro, softmax: &Softmax) -> (f64, Vec<f64>) {
    let samples = softmax.sums.iter().zip(&softmax.targets).zip(&micro.shift);
    let log_p: Vec<f64> = samples
        .map(|((sum, target), shift)| target - f64::from(*shift) * LN_2 - sum.ln())
        .collect();
    let least = MIN_PROBABILITY.ln();
    // Not f64::max, which would hide a NaN.
    let sum: f64 = log_p
        .iter()
        .map(|log_p| if *log_p < least { least } else { *log_p })
        .sum();
    let probabilities = log_p.iter().map(|log_p| log_p.exp()).collect();
    (-sum / micro.batch as f64, probabilities)
}

impl Head for TiledHead {
    fn shard(&self) -> ClassRange {
        self.shard
    }

    fn forward_backward(
        &mut self,
        comm: &mut dyn Collective,
        embedding: &Tensor,
        labels: &Tensor,
        rows: &[u32],
        step: u64,
        share: f64,
    ) -> Result<HeadOutput, HeadError> {
        let dim = self.config.embedding_size;
        check_forms(comm, embedding, labels, rows, dim)?;
        let batch: usize = rows.iter().map(|&n| n as usize).sum();
        if batch == 0 {
            return Ok(HeadOutput {
                loss: 0.0,
                grad_embedding: Tensor::zeros([0, dim], (Kind::Float, Device::Cpu)),
                not_finite: Vec::new(),
                seen: Seen::default(),
            });
        }
        let _no_grad = tch::no_grad_guard();
        let embedding_bd = gather_rows(comm, &embedding.to_kind(Kind::Float), rows)?.contiguous();
        let labels = to_vec(&gather_rows(comm, &labels.to_kind(Kind::Int64), rows)?);
        check_labels(self.config.num_classes, &labels, rows)?;
        let chosen = choose(&mut *self.sampler, step, self.shard, &labels)?;
        let row_of = |column: &i64| {
            let column = usize::try_from(*column).ok()?;
            Some(
                chosen
                    .classes
                    .as_ref()
                    .map_or(column, |classes| classes[column] as usize),
            )
        };
        let target_rows: Vec<Option<usize>> = chosen.targets.iter().map(row_of).collect();
        let (sampled_rows, positive_rows) = (chosen.sampled(self.shard.len()), chosen.positives);

        if self.micros.len() == self.pending {
            self.micros.push(Micro::default());
        }
        let mut micro = std::mem::take(&mut self.micros[self.pending]);
        micro.take(slices::floats(&embedding_bd), self.geometry);
        micro.classes = chosen.classes;
        micro.share = share;
        micro.scale = self.config.scale;
        let cosines = self.target_cosines(&micro, &target_rows);
        let prepared = self.prepare(comm, &micro, &cosines)?;
        micro.set_loss(&prepared, first_shift(prepared.largest_logit()));
        micro.targets = sorted_targets(&target_rows);
        self.micros[self.pending] = micro;

        let here = target_rows.iter().zip(prepared.targets());
        let logits: Vec<Option<f64>> = here.map(|(row, target)| row.map(|_| target.value)).collect();
        let mut grad_unit_bd = Tensor::zeros([batch as i64, dim], (Kind::Float, Device::Cpu));
        let softmax = self.softmax(comm, &logits, &mut grad_unit_bd)?;

        let micro = &mut self.micros[self.pending];
        let (loss, probabilities) = cross_entropy(micro, &softmax);
        // d loss / d cosine is (p - onehot) / batch times d logit / d cosine; the sums turn terms into p.
        let factors: Vec<f64> = softmax
            .sums
            .iter()
            .map(|sum| micro.scale / (batch as f64 * sum))
            .collect();
        for target in &mut micro.targets {
            let sample = target.sample;
            let by_cos = if cosines[sample].1 {
                0.0
            } else {
                prepared.targets()[sample].by_cos
            };
            target.gradient = (probabilities[sample] - 1.0) / batch as f64 * by_cos;
        }
        let for_weights: Vec<f64> = factors.iter().map(|factor| factor * share).collect();
        micro.scale_for_gradient(&for_weights, self.geometry);
        self.finish_embeddings(&mut grad_unit_bd, &factors);

        // Through the normalisation only after the sum over shards: it is linear, and there are fewer rows.
        let grad_unit_rd = scatter_rows(comm, &grad_unit_bd, rows)?;
        let first: usize = rows.iter().take(comm.rank() as usize).map(|&n| n as usize).sum();
        let own = first..first + embedding.size()[0] as usize;
        let factor = share * f64::from(comm.world_size());
        let grad_embedding = self.through_norm(&grad_unit_rd, own, &prepared, &probabilities, factor);
        let loss = loss + prepared.norm_loss();
        let norms = &self.micros[self.pending].norms;
        let not_finite = rows_not_finite(loss, norms, probabilities.into_iter());
        let here = target_rows.iter().zip(&cosines);
        let seen = Seen {
            sampled_rows,
            positive_rows,
            target_cosines: here
                .filter(|(row, _)| row.is_some())
                .map(|(_, cos)| cos.0)
                .collect(),
            norms: norms.iter().copied().collect(),
        };
        self.pending += 1;
        Ok(HeadOutput {
            loss,
            grad_embedding,
            not_finite,
            seen,
        })
    }

    fn update(&mut self, lr: f64) {
        let pending = std::mem::take(&mut self.pending);
        if pending == 0 {
            return;
        }
        let _no_grad = tch::no_grad_guard();
        self.loss.commit();
        self.updates += 1;
        let micros = &self.micros[..pending];
        let all: Option<Vec<u32>> = (pending > 1).then(|| union(micros)).flatten();
        let taking = match &all {
            Some(classes) => Taking::Some(classes),
            None => taking(&micros[0], self.shard.len() as usize),
        };
        let mut slots = slots(&*self.buffers);
        let mut slots = slots.iter_mut().map(slices::floats_mut);
        let mut slot = || slots.next().unwrap_or(&mut []);
        let rule = match self.config.optimizer {
            OptimizerConfig::Sgd {
                momentum,
                weight_decay,
            } => Rule::Sgd {
                momentum: slot(),
                lazy: self
                    .lazy
                    .as_mut()
                    .map(|lazy| (lazy.since.as_mut_slice(), &lazy.history)),
                lr: lr as f32,
                mu: momentum as f32,
                decay: weight_decay as f32,
            },
            OptimizerConfig::AdamW {
                weight_decay,
                beta1,
                beta2,
                eps,
            } => Rule::AdamW {
                mean: slot(),
                mean_sq: slot(),
                step: AdamWStep::new(lr, weight_decay, (beta1, beta2), eps, self.updates),
            },
        };
        self.threads
            .update(slices::floats_mut(&mut self.weight_nd), rule, taking, micros);
        if let Some(lazy) = &mut self.lazy {
            lazy.history.advance(lr);
            if let Some(before) = lazy.history.overdue() {
                self.make_up(before);
            }
        }
    }

    fn discard(&mut self) {
        self.pending = 0;
        self.loss.discard();
    }

    fn updates(&self) -> u64 {
        self.updates
    }

    fn state(&mut self) -> Vec<(String, Tensor)> {
        if let Some(lazy) = &self.lazy {
            let now = lazy.history.now();
            self.make_up(now);
        }
        state_of(&self.weight_nd, self.buffers.state(), &self.loss)
    }

    fn load_state(
        &mut self,
        updates: u64,
        rows: &mut dyn FnMut(&str) -> Option<Tensor>,
    ) -> Result<(), HeadError> {
        load_weight_and_loss(rows, &mut self.weight_nd, &mut self.loss)?;
        self.pending = 0;
        if let Some(lazy) = &mut self.lazy {
            lazy.history.restart();
            lazy.since.fill(0);
        }
        self.updates = updates;
        Ok(self.buffers.load_state(updates, &mut |slot, _| rows(slot))?)
    }
}

impl TiledHead {
    /// What the loss makes of the targets' cosines, which it may need of all ranks' classes.
    fn prepare(
        &mut self,
        comm: &mut dyn Collective,
        micro: &Micro,
        cosines: &[(f64, bool)],
    ) -> Result<Prepared, HeadError> {
        let mut target_cos: Vec<f64> = cosines.iter().map(|(cos, _)| *cos).collect();
        if self.loss.needs_all_targets() {
            let mut all = Tensor::from_slice(&target_cos);
            comm.all_reduce(&mut all, ReduceOp::Sum)?;
            all.copy_data(&mut target_cos, micro.batch);
        }
        Ok(self.loss.prepare(&Rows {
            share: micro.share,
            norms: &micro.norms,
            target_cos: &target_cos,
        }))
    }

    /// Divides the rows' sums by the terms' sums, and adds the targets' part.
    fn finish_embeddings(&self, grad_unit_bd: &mut Tensor, factors: &[f64]) {
        let (dim, weights, isa) = (self.geometry.dim, self.weights(), self.threads.isa());
        let out = slices::floats_mut(grad_unit_bd);
        for (row, factor) in out.chunks_exact_mut(dim).zip(factors) {
            row.iter_mut()
                .for_each(|value| *value = (f64::from(*value) * factor) as f32);
        }
        let mut unit = vec![0f32; dim];
        for target in &self.micros[self.pending].targets {
            let (weight, missed) = weights.row(target.row, dim);
            isa.run(Unit {
                weight,
                missed,
                unit: &mut unit,
            });
            isa.run(AddScaled {
                out: &mut out[target.sample * dim..][..dim],
                row: &unit,
                factor: target.gradient as f32,
            });
        }
    }

    /// Gradient by this rank's embeddings, times `factor`, from that by their directions, and by their norms where the
    /// loss has some. In plain loops: a handful of tensor operations would wake and spin libtorch's threads, which the
    /// next pass over the classes needs.
    fn through_norm(
        &self,
        grad_unit_rd: &Tensor,
        own: std::ops::Range<usize>,
        prepared: &Prepared,
        probabilities: &[f64],
        factor: f64,
    ) -> Tensor {
        let micro = &self.micros[self.pending];
        let dim = self.geometry.dim;
        let mut grad_rd = Tensor::empty([own.len() as i64, dim as i64], (Kind::Float, Device::Cpu));
        let rows = slices::floats(grad_unit_rd).chunks_exact(dim);
        let out = slices::floats_mut(&mut grad_rd).chunks_exact_mut(dim);
        for ((sample, grad), out) in own.zip(rows).zip(out) {
            let unit = &micro.unit_row(sample, self.geometry)[..dim];
            let norm = micro.norms[sample];
            // A row under the smallest norm was divided by a constant, and has no part along it to take away.
            let along: f64 = match norm < MIN_NORM {
                true => 0.0,
                false => grad
                    .iter()
                    .zip(unit)
                    .map(|(g, x)| f64::from(*g) * f64::from(*x))
                    .sum(),
            };
            let divisor = if norm < MIN_NORM { MIN_NORM } else { norm };
            let by_norm = match prepared.moves_norms() {
                true => prepared.grad_norm(sample, probabilities[sample]),
                false => 0.0,
            };
            for ((out, g), x) in out.iter_mut().zip(grad).zip(unit) {
                let across = (f64::from(*g) - f64::from(*x) * along) / divisor;
                *out = ((across + f64::from(*x) * by_norm) * factor) as f32;
            }
        }
        grad_rd
    }

    /// Brings rows that were touched before `before` up to date; what came before is forgotten.
    fn make_up(&mut self, before: u32) {
        let Some(lazy) = &mut self.lazy else { return };
        let mut slots = slots(&*self.buffers);
        if let Some(momentum) = slots.first_mut() {
            let (weight, momentum) = (
                slices::floats_mut(&mut self.weight_nd),
                slices::floats_mut(momentum),
            );
            self.threads
                .make_up(weight, momentum, &mut lazy.since, &lazy.history, before);
            lazy.history.forget(before);
        }
    }
}

/// The targets, rising by (row, sample), with gradients still to come.
fn sorted_targets(rows: &[Option<usize>]) -> Vec<Target> {
    let here = rows.iter().enumerate();
    let mut targets: Vec<Target> = here
        .filter_map(|(sample, row)| {
            row.map(|row| Target {
                row,
                sample,
                gradient: 0.0,
            })
        })
        .collect();
    targets.sort_unstable_by_key(|target| (target.row, target.sample));
    targets
}

/// All classes that take part in any of the micro-batches, rising; `None` if one has them all.
fn union(micros: &[Micro]) -> Option<Vec<u32>> {
    let lists: Option<Vec<&Vec<u32>>> = micros.iter().map(|micro| micro.classes.as_ref()).collect();
    let mut all: Vec<u32> = lists?.into_iter().flatten().copied().collect();
    all.sort_unstable();
    all.dedup();
    Some(all)
}

#[cfg(test)]
mod tests;

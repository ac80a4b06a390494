//! The head that never builds the logits, for GPUs: it walks through the class weights in tiles, with libtorch's matrix
//! products and our kernels between them. The passes are those of the tiled head for the CPU:
//!
//! 1. [`Head::forward_backward`]: cosines of a tile, softmax terms, their sums, and the tile's weighted sum for the embeddings'
//!    gradient, which is divided by the sums of all ranks afterwards. The weights are only read.
//! 2. [`Head::update`]: cosines anew, the gradient by them, the tile's weight gradient, the update of its rows. No gradient of
//!    all classes ever exists; gradient accumulation keeps micro-batches.
//!
//! **The host waits for the device once a micro-batch**, in [`Report::fetch`](super::micro::Report::fetch), which brings the
//! loss and all that [`HeadOutput`] says, and in `update` never. It waits once more where a loss prepares its samples on the
//! host (AdaFace, CurricularFace, MagFace), where the samples may have more classes than are wanted (tiny shards), and where
//! a sum of terms came out so small that they are formed again. Labels are looked at in that copy too, so a bad one is
//! refused after the micro-batch's collective calls, on all ranks alike.
//!
//! It speaks of a device, not of a GPU: in tests that is the CPU, with the kernels' twins.

mod update;

use super::{
    choosing::Choosing,
    kernels::{AngularMargin, Missed, OwnRows, SoftmaxRows, Tile, Weights},
    micro::{Fetched, Micro, Part, to_device},
    tiles::{COLUMNS, Span, Tiles},
};
use crate::kernels::{Kernels, Started, launch::Launcher};
use crate::{
    collective::{Collective, ReduceOp},
    head::{
        Head, HeadConfig, HeadError, HeadOutput, Seen,
        classes::{check_labels, initial_weight, positives},
        exchange::{check_forms, gather_rows, scatter_rows},
        lazy_sgd::History,
        load_weight_and_loss,
        margin::{Loss, Prepared, Rows},
        rows_not_finite, state_of,
        tiled::{
            self,
            kernel::exponentials::{SMALLEST_SUM, first_shift},
        },
    },
    optim::{self, Optimizer, OptimizerConfig},
};
use arcface_proto::{
    spec::{self, MarginGradient},
    types::ClassRange,
};
use std::sync::Arc;
use tch::{Device, Kind, Tensor};
use update::{Lazy, works};

/// Smallest target probability in the loss, so that a loss is at most 69.08; does not cut the gradient.
const MIN_PROBABILITY: f64 = 1e-30;

/// One rank's shard. See the head of this file.
pub struct CudaHead {
    shard: ClassRange,
    config: HeadConfig,
    loss: Loss,
    device: Device,
    kernels: Kernels,
    /// `[n, d]` f32.
    weight: Tensor,
    /// Keeps the optimizer's buffers under their names; its steps are made here.
    buffers: Box<dyn Optimizer>,
    updates: u64,
    lazy: Option<Lazy>,
    /// Where not all classes take part.
    choosing: Option<Choosing>,
    tiles: Tiles,
    /// The micro-batches since the last update are the first `pending`; the others are spare memory.
    micros: Vec<Micro>,
    pending: usize,
}

/// What a rank brings to a micro-batch.
struct Batch<'a> {
    embedding: &'a Tensor,
    labels: &'a Tensor,
    /// Of every rank.
    rows: &'a [u32],
    step: u64,
    share: f64,
}

impl CudaHead {
    /// This rank's shard, with initial weights that depend on (seed, class, dimension) alone, on the device that `launcher`
    /// starts kernels on. Not for losses with several centres a class.
    ///
    /// # Panics
    /// If `rank >= world_size`.
    pub fn new(
        config: &HeadConfig,
        rank: u32,
        world_size: u32,
        device: Device,
        launcher: Arc<dyn Launcher>,
    ) -> Self {
        let kind = match tiled::wants_bf16(config) && launcher.multiplies_bf16() {
            true => Kind::BFloat16,
            false => Kind::Float,
        };
        let shard = ClassRange::of_rank(config.num_classes, rank, world_size);
        Self::on(config, shard, Kernels::new(launcher, device), kind, COLUMNS)
    }

    /// The same with products of this kind and tiles of so many columns.
    pub(super) fn on(
        config: &HeadConfig,
        shard: ClassRange,
        kernels: Kernels,
        kind: Kind,
        columns: i64,
    ) -> Self {
        let device = kernels.device();
        let weight = initial_weight(config.seed, shard, config.embedding_size).to_device(device);
        let is_sampled = config.sample_rate < 1.0;
        let lazy = match config.optimizer {
            OptimizerConfig::Sgd {
                momentum,
                weight_decay,
            } if is_sampled => Some(Lazy::new(
                History::new(momentum, weight_decay, config.sample_rate),
                shard.len(),
                device,
            )),
            _ => None,
        };
        Self {
            shard,
            loss: config.loss(),
            config: config.clone(),
            device,
            kernels,
            buffers: optim::build(config.optimizer, &[weight.shallow_clone()]),
            weight,
            updates: 0,
            lazy,
            choosing: is_sampled.then(|| Choosing::new(config.seed, config.sample_rate, shard, device)),
            tiles: Tiles::new(kind, config.embedding_size, columns, device),
            micros: Vec::new(),
            pending: 0,
        }
    }

    /// Everything of a micro-batch but its place among the kept ones.
    fn micro_batch(&mut self, comm: &mut dyn Collective, batch: &Batch<'_>) -> Result<HeadOutput, HeadError> {
        let embedding = batch.embedding.to_device(self.device);
        let embedding = match embedding.kind() {
            // What a backbone in bf16 gives goes over the wire as it is.
            Kind::BFloat16 => embedding,
            _ => embedding.to_kind(Kind::Float),
        };
        let labels = to_device(&batch.labels.to_kind(Kind::Int64), self.device);
        let embedding_bd = gather_rows(comm, &embedding, batch.rows)?.contiguous();
        let labels_b = gather_rows(comm, &labels, batch.rows)?;
        self.take_samples(&embedding_bd, &labels_b, batch.share)?;
        let prepared = self.prepare(comm, batch.rows)?;
        if let Some(choosing) = &mut self.choosing {
            choosing.choose(&self.kernels, batch.step, &self.micros, self.pending)?;
        }
        let micro = &mut self.micros[self.pending];
        let _ = micro
            .shift
            .fill_(f64::from(first_shift(prepared.largest_logit())));

        self.add_terms()?;
        comm.all_reduce(&mut self.micro().report.sums_and_targets(), ReduceOp::Sum)?;
        let mut grad_embedding = self.finish(comm, batch.rows)?;
        let mut seen = self.micro().report.fetch();
        check_labels(self.config.num_classes, &seen.labels(), batch.rows)?;
        // Every rank sees the same sums.
        if seen.part(Part::Sums).iter().any(|sum| *sum < SMALLEST_SUM) {
            self.shift_by_largest(comm)?;
            self.add_terms()?;
            comm.all_reduce(&mut self.micro().report.part(Part::Sums), ReduceOp::Sum)?;
            grad_embedding = self.finish(comm, batch.rows)?;
            seen = self.micro().report.fetch();
        }
        if let (Some(choosing), 1..) = (&mut self.choosing, self.pending) {
            choosing.set_union_count(seen.listed());
        }
        Ok(self.output(&prepared, &seen, grad_embedding))
    }

    fn micro(&self) -> &Micro {
        &self.micros[self.pending]
    }

    fn weights(&self) -> Weights {
        weights(&self.weight, &*self.buffers, self.lazy.as_ref())
    }

    /// Lengths of embeddings, their classes in this shard, and the cosines with them.
    fn take_samples(&mut self, embedding_bd: &Tensor, labels_b: &Tensor, share: f64) -> Started {
        let samples = labels_b.size()[0];
        let fits = |micro: &Micro| micro.batch() == samples;
        if !self.micros.get(self.pending).is_some_and(fits) {
            let fresh = Micro::new(
                samples,
                self.config.embedding_size,
                self.tiles.kind(),
                self.choosing.as_ref().map(|choosing| choosing.room(samples)),
                self.device,
            );
            self.micros.truncate(self.pending);
            self.micros.push(fresh);
        }
        let micro = &mut self.micros[self.pending];
        micro.share = share;
        micro.report.labels().copy_(labels_b);
        let kernels = &self.kernels;
        kernels.local_classes(labels_b, self.shard, &micro.local)?;
        if self.choosing.is_none() {
            micro.column.copy_(&micro.local);
        }
        let norm = micro.report.part(Part::Norms);
        kernels.normalize_rows(embedding_bd, &micro.unit, &micro.inverse, &norm)?;
        if self.tiles.kind() != Kind::Float {
            kernels.normalize_rows(embedding_bd, &micro.operand, &micro.inverse, &norm)?;
        }
        let weights = weights(&self.weight, &*self.buffers, self.lazy.as_ref());
        let micro = &self.micros[self.pending];
        kernels.target_cosines(
            &micro.unit,
            &weights,
            &micro.local,
            &micro.report.part(Part::Cosines),
            &micro.outside,
        )
    }

    /// What the loss makes of the targets' cosines, and how many classes take part: on the device where it can be.
    fn prepare(&mut self, comm: &mut dyn Collective, rows: &[u32]) -> Result<Prepared, HeadError> {
        let micro = &mut self.micros[self.pending];
        let is_angular = matches!(self.config.loss, spec::Loss::ArcFace);
        if self.loss.needs_all_targets() {
            // Each class lives on one rank, so the sum over ranks is that rank's value.
            comm.all_reduce(&mut micro.report.part(Part::Cosines), ReduceOp::Sum)?;
        }
        let count = match &self.choosing {
            None => Some(i64::from(self.shard.len())),
            Some(choosing) => choosing.count(micro.batch()),
        };
        let early = (!is_angular || count.is_none()).then(|| micro.report.fetch());
        micro.count = match (count, &self.choosing, &early) {
            (None, Some(choosing), Some(early)) => {
                let positives = positives(self.shard, &early.labels());
                choosing.count_with(u32::try_from(positives.len()).unwrap_or(u32::MAX))
            }
            (count, _, _) => count.unwrap_or_default(),
        };
        let Some(early) = early.filter(|_| !is_angular) else {
            let prepared = self.loss.prepare(&Rows {
                norms: &[],
                target_cos: &[],
                share: micro.share,
            });
            micro.set_rule(&prepared);
            self.margin_logits()?;
            return Ok(prepared);
        };
        // Before the loss's statistics have seen them.
        let labels = early.labels();
        check_labels(self.config.num_classes, &labels, rows)?;
        let prepared = self.loss.prepare(&Rows {
            norms: early.part(Part::Norms),
            target_cos: early.part(Part::Cosines),
            share: micro.share,
        });
        micro.set_prepared(&prepared, self.shard, &labels);
        Ok(prepared)
    }

    fn margin_logits(&self) -> Started {
        let micro = self.micro();
        let margin = AngularMargin {
            m: self.config.margin,
            scale: self.config.scale,
            exact: self.config.margin_gradient == MarginGradient::Exact,
        };
        self.kernels.margin_logits(
            margin,
            (&micro.report.part(Part::Cosines), &micro.outside),
            &micro.local,
            &micro.report.part(Part::TargetLogits),
            &micro.by_cosine,
        )
    }

    /// The pass over all classes that take part: sums of this rank's terms, and its rows weighted by them.
    fn add_terms(&mut self) -> Started {
        let micro = &self.micros[self.pending];
        let weights = weights(&self.weight, &*self.buffers, self.lazy.as_ref());
        let taking = micro.taking();
        let (sums, logits) = (
            micro.report.part(Part::Sums),
            micro.report.part(Part::TargetLogits),
        );
        let _ = sums.shallow_clone().zero_();
        let _ = self.tiles.embeddings(micro.batch()).zero_();
        for span in self.tiles.spans(&taking, micro.batch()) {
            self.tiles.load(&self.kernels, &weights, &taking, span)?;
            let cosines = self.tiles.cosines(&micro.operand, span);
            let tile = tile(&cosines, span, micro);
            self.kernels
                .softmax_terms(tile, &logits, &micro.others(self.config.scale), &sums)?;
            self.tiles.add_embeddings(&cosines, span);
        }
        Ok(())
    }

    /// Shifts the samples whose sums have lost terms by their largest logits.
    fn shift_by_largest(&mut self, comm: &mut dyn Collective) -> Result<(), HeadError> {
        let micro = &mut self.micros[self.pending];
        let weights = weights(&self.weight, &*self.buffers, self.lazy.as_ref());
        let taking = micro.taking();
        let options = (Kind::Float, self.device);
        let mut largest = Tensor::full([micro.batch()], f64::NEG_INFINITY, options);
        for span in self.tiles.spans(&taking, micro.batch()) {
            self.tiles.load(&self.kernels, &weights, &taking, span)?;
            let cosines = self.tiles.cosines(&micro.operand, span);
            self.kernels.largest_logits(
                tile(&cosines, span, micro),
                &micro.report.part(Part::TargetLogits),
                &micro.others(self.config.scale),
                &largest,
            )?;
        }
        comm.all_reduce(&mut largest, ReduceOp::Max)?;
        let lost = micro.report.part(Part::Sums).lt(SMALLEST_SUM);
        let shift = largest.ceil().where_self(&lost, &micro.shift);
        micro.shift.copy_(&shift);
        Ok(())
    }

    /// From sums over all ranks to losses, and to the gradient of this rank's embeddings.
    fn finish(&mut self, comm: &mut dyn Collective, rows: &[u32]) -> Result<Tensor, HeadError> {
        let weights = self.weights();
        let micro = &self.micros[self.pending];
        let probability = micro.report.part(Part::Probabilities);
        self.kernels.softmax_rows(
            &SoftmaxRows {
                sums: &micro.report.part(Part::Sums),
                target_logit: &micro.report.part(Part::TargetLogits),
                by_cosine: &micro.by_cosine,
                shift: &micro.shift,
                loss: &micro.report.part(Part::Losses),
                probability: &probability,
                factor: &micro.factor,
                target_gradient: &micro.target_gradient,
            },
            self.config.scale,
            micro.share,
            MIN_PROBABILITY,
        )?;
        let grad_unit_bd = self.tiles.embeddings(micro.batch());
        let gradient = (&micro.factor, &micro.target_gradient);
        self.kernels
            .finish_embeddings(&grad_unit_bd, gradient, &micro.local, &weights)?;

        // Through the normalisation only after the sum over shards: it is linear, and there are fewer rows.
        let grad_unit_rd = scatter_rows(comm, &grad_unit_bd, rows)?.contiguous();
        let before = rows.iter().take(comm.rank() as usize);
        let first: i64 = before.map(|&n| i64::from(n)).sum();
        let count = grad_unit_rd.size()[0];
        let own = |all: &Tensor| all.narrow(0, first, count);
        let by_norm = micro
            .by_norm
            .as_ref()
            .map(|(logit, term)| (own(logit), own(term)));
        let gradient_rd = Tensor::empty(grad_unit_rd.size(), (Kind::Float, self.device));
        self.kernels.embedding_gradient(
            &OwnRows {
                gradient_unit: &grad_unit_rd,
                unit: &own(&micro.unit),
                norm: &own(&micro.report.part(Part::Norms)),
                probability: &own(&probability),
                by_norm: by_norm.as_ref().map(|(logit, term)| (logit, term)),
                each: micro.share / micro.batch() as f64,
                factor: f64::from(comm.world_size()),
            },
            &gradient_rd,
        )?;
        Ok(gradient_rd)
    }

    fn output(&self, prepared: &Prepared, seen: &Fetched, grad_embedding: Tensor) -> HeadOutput {
        let losses = seen.part(Part::Losses);
        let loss = losses.iter().sum::<f64>() / losses.len() as f64 + prepared.norm_loss();
        let (norms, probabilities) = (seen.part(Part::Norms), seen.part(Part::Probabilities));
        let labels = seen.labels();
        let here = i64::from(self.shard.lo)..i64::from(self.shard.hi);
        let targets = labels.iter().zip(seen.part(Part::Cosines));
        HeadOutput {
            loss,
            grad_embedding,
            not_finite: rows_not_finite(loss, norms, probabilities.iter().copied()),
            seen: Seen {
                sampled_rows: u32::try_from(self.micro().count).unwrap_or(u32::MAX),
                positive_rows: positives(self.shard, &labels).len() as u32,
                target_cosines: targets
                    .filter(|(label, _)| here.contains(label))
                    .map(|(_, cos)| *cos)
                    .collect(),
                norms: norms.iter().copied().collect(),
            },
        }
    }
}

/// The rows as they are, with what they may have missed.
fn weights(weight: &Tensor, buffers: &dyn Optimizer, lazy: Option<&Lazy>) -> Weights {
    Weights {
        weight: weight.shallow_clone(),
        // SGD's momentum; AdamW's rows never miss a step, and nobody reads what is there.
        momentum: Some(buffers.state()[0].1[0].shallow_clone()),
        missed: lazy.map(|lazy| Missed {
            since: lazy.since.shallow_clone(),
            products: lazy.products.shallow_clone(),
            now: lazy.history.now(),
        }),
    }
}

fn tile<'a>(cosines: &'a Tensor, span: Span, micro: &'a Micro) -> Tile<'a> {
    Tile {
        cosines,
        first: span.first,
        target: &micro.column,
    }
}

impl Head for CudaHead {
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
        if rows.iter().all(|&n| n == 0) {
            return Ok(HeadOutput {
                loss: 0.0,
                grad_embedding: Tensor::zeros([0, dim], (Kind::Float, self.device)),
                not_finite: Vec::new(),
                seen: Seen::default(),
            });
        }
        let _no_grad = tch::no_grad_guard();
        let batch = Batch {
            embedding,
            labels,
            rows,
            step,
            share,
        };
        let output = self.micro_batch(comm, &batch);
        match output {
            Ok(_) => self.pending += 1,
            // It may have left its classes among those of the update.
            Err(_) => self.discard(),
        }
        output
    }

    /// # Panics
    /// If a kernel does not start, as every operation of libtorch does whose device fails.
    fn update(&mut self, lr: f64) {
        let pending = std::mem::take(&mut self.pending);
        if pending == 0 {
            return;
        }
        let _no_grad = tch::no_grad_guard();
        self.loss.commit();
        self.updates += 1;
        works(self.update_rows(pending, lr));
    }

    fn discard(&mut self) {
        self.pending = 0;
        self.loss.discard();
    }

    fn updates(&self) -> u64 {
        self.updates
    }

    /// # Panics
    /// As [`update`](Self::update).
    fn state(&mut self) -> Vec<(String, Tensor)> {
        if let Some(lazy) = &self.lazy {
            let now = lazy.history.now();
            works(self.make_up(now));
        }
        state_of(&self.weight, self.buffers.state(), &self.loss)
    }

    fn load_state(
        &mut self,
        updates: u64,
        rows: &mut dyn FnMut(&str) -> Option<Tensor>,
    ) -> Result<(), HeadError> {
        load_weight_and_loss(rows, &mut self.weight, &mut self.loss)?;
        self.pending = 0;
        if let Some(lazy) = &mut self.lazy {
            lazy.history.restart();
            let _ = lazy.since.zero_();
            lazy.tell();
        }
        self.updates = updates;
        Ok(self.buffers.load_state(updates, &mut |slot, _| rows(slot))?)
    }
}

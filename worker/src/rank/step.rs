//! One step, as the recipe is written: forward, head, backward for every micro-batch, then one gradient sum, clipping
//! and one update. A *step* is one global batch: it counts for the log and the schedule; with `gradient_acc = n` every
//! n-th one ends in an update, from gradients averaged over the n (the reference sums them).
//!
//! Batch-norm statistics stay local to each rank, as in the reference (its DDP does not broadcast buffers); those of
//! rank 0 are the model's.

use super::failure::RankFailure;
use super::phases::Phases;
use crate::collective::{Collective, ReduceOp};
use crate::data::{Batch, DataError, Epochs};
use crate::head::Head;
use crate::model::{Backbone, DropoutDraw, ForwardMode};
use crate::optim::{Optimizer, clip::clip_grad_norm, schedule::PolyWarmup};
use arcface_proto::spec::Precision;
use tch::{Kind, Tensor};

/// What a step follows, the same on every rank.
#[derive(Clone, Debug)]
pub struct StepSettings {
    /// Arithmetic of the backbone.
    pub precision: Precision,
    /// Seed of the random masks.
    pub seed: u64,
    /// Largest norm of the backbone's gradient.
    pub clip_grad_norm: Option<f64>,
    /// Steps averaged into one update.
    pub gradient_acc: u32,
    /// Samples of a step over all ranks.
    pub global_batch: u64,
    /// Rows of every rank, by micro-batch.
    pub rows: Vec<Vec<u32>>,
}

impl StepSettings {
    /// The settings of a job whose samples come in the order `epochs`, cut for `world_size` ranks.
    pub fn of(spec: &arcface_proto::spec::JobSpec, epochs: &Epochs, world_size: u32) -> Self {
        let batch_size = spec.train.batch_size;
        let micros = epochs.micro_batches(world_size, batch_size);
        Self {
            precision: spec.train.precision,
            seed: spec.seed,
            clip_grad_norm: spec.train.clip_grad_norm,
            gradient_acc: spec.train.gradient_acc,
            global_batch: epochs.global_batch(),
            rows: (0..micros)
                .map(|micro| epochs.rows(world_size, batch_size, micro))
                .collect(),
        }
    }
}

/// What a step gave; the same on every rank, but for `grad_norm`'s absence alike.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepOutcome {
    /// Mean loss over the global batch.
    pub loss: f64,
    /// Learning rate of the step.
    pub lr: f64,
    /// Norm of the backbone's gradient before clipping, if the step ended in an update.
    pub grad_norm: Option<f64>,
    /// A rank wished for a checkpoint before this update; the same on all ranks.
    pub wished: bool,
}

/// Everything that a step changes.
pub struct Trainer {
    /// The network, replicated.
    pub backbone: Backbone,
    /// Its trainable parameters, in state_dict order.
    pub params: Vec<Tensor>,
    /// Their update rule.
    pub optimizer: Box<dyn Optimizer>,
    /// This rank's classes.
    pub head: Box<dyn Head>,
    /// The other ranks.
    pub comm: Box<dyn Collective>,
    /// Learning rate by step.
    pub schedule: PolyWarmup,
    /// What a step follows.
    pub settings: StepSettings,
    /// Where the time went.
    pub phases: Phases,
}

impl Trainer {
    /// Trains step `step` (from 0) on this rank's micro-batches, taken from `batches` in order. `wish` asks for a
    /// checkpoint; all ranks hear of it with the next gradient sum.
    ///
    /// # Errors
    /// Bad data, a lost peer, or a loss or gradient that is not finite, on all ranks alike.
    pub fn step(
        &mut self,
        step: u64,
        batches: &mut dyn Iterator<Item = Result<Batch, DataError>>,
        wish: bool,
    ) -> Result<StepOutcome, RankFailure> {
        let lr = self.schedule.lr(step);
        let mut loss = 0.0;
        for micro in 0..self.settings.rows.len() {
            let batch = self.phases.time("data_wait", || batches.next());
            let batch = batch.ok_or_else(|| {
                RankFailure::permanent(format!("step {step}: the loader ended before the training"))
            })??;
            loss += self.micro_step(step, micro, &batch)?;
        }
        if !loss.is_finite() {
            return Err(RankFailure::permanent(format!("step {step}: the loss is {loss}"))
                .hint("a lower train.lr, a warm-up epoch or precision = \"fp32\" usually helps"));
        }
        let mut outcome = StepOutcome {
            loss,
            lr,
            grad_norm: None,
            wished: false,
        };
        if self.ends_update(step) {
            let (grad_norm, wished) = self.update(step, lr, wish)?;
            outcome.grad_norm = Some(grad_norm);
            outcome.wished = wished;
        }
        Ok(outcome)
    }

    /// True if step `step` ends in an update: only then is the state whole.
    pub fn ends_update(&self, step: u64) -> bool {
        (step + 1).is_multiple_of(u64::from(self.settings.gradient_acc))
    }

    /// Forward, head and backward of one micro-batch; its part of the step's loss.
    fn micro_step(&mut self, step: u64, micro: usize, batch: &Batch) -> Result<f64, RankFailure> {
        let rows = &self.settings.rows[micro];
        let global_rows: u64 = rows.iter().map(|rows| u64::from(*rows)).sum();
        let of_step = global_rows as f64 / self.settings.global_batch as f64;
        let mode = ForwardMode::training(
            self.settings.precision,
            DropoutDraw {
                seed: self.settings.seed,
                step,
                first_sample: batch.micro.first_position % self.settings.global_batch,
            },
        );
        let forward = self
            .phases
            .time("forward", || self.backbone.forward_to_train(&batch.images, &mode));
        let output = self.phases.time("head", || {
            self.head.forward_backward(
                self.comm.as_mut(),
                &forward.embedding(),
                &batch.labels,
                rows,
                step,
                of_step / f64::from(self.settings.gradient_acc),
            )
        })?;
        self.phases
            .time("backward", || forward.backward(&output.grad_embedding));
        Ok(output.loss * of_step)
    }

    /// Gradient sum, clipping (the backbone's alone, as in the reference), both updates. Gives the gradient's norm
    /// before clipping, and whether any rank wished for a checkpoint.
    fn update(&mut self, step: u64, lr: f64, wish: bool) -> Result<(f64, bool), RankFailure> {
        let (params, comm) = (&self.params, self.comm.as_mut());
        let (flat, grads, wished) = self.phases.time("comm", || sum_gradients(params, comm, wish))?;
        let norm = match self.settings.clip_grad_norm {
            Some(max_norm) => clip_grad_norm(&grads, max_norm),
            None => flat.norm().double_value(&[]),
        };
        if !norm.is_finite() {
            return Err(
                RankFailure::permanent(format!("step {step}: the norm of the gradient is {norm}"))
                    .hint("a lower train.lr, a warm-up epoch or precision = \"fp32\" usually helps"),
            );
        }
        self.phases.time("optimizer", || {
            self.optimizer.step(&self.params, &grads, lr);
            self.head.update(lr);
            for param in &mut self.params {
                param.zero_grad();
            }
        });
        Ok((norm, wished))
    }
}

/// Mean of the gradients over the ranks: one flat tensor, its views by parameter, and whether any rank had a wish
/// (it travels as one more element). Parameters without gradient count as zero.
fn sum_gradients(
    params: &[Tensor],
    comm: &mut dyn Collective,
    wish: bool,
) -> Result<(Tensor, Vec<Tensor>, bool), RankFailure> {
    let world_size = f64::from(comm.world_size());
    let _no_grad = tch::no_grad_guard();
    let mut parts: Vec<Tensor> = params
        .iter()
        .map(|param| {
            let grad = param.grad();
            match grad.defined() {
                true => grad.reshape([-1]),
                false => Tensor::zeros([param.numel() as i64], (Kind::Float, param.device())),
            }
        })
        .collect();
    parts.push(Tensor::from_slice(&[f32::from(u8::from(wish))]));
    let mut all = Tensor::cat(&parts, 0);
    comm.all_reduce(&mut all, ReduceOp::Sum)?;
    let elements = all.size()[0] - 1;
    let wished = all.double_value(&[elements]) > 0.0;
    let mut flat = all.narrow(0, 0, elements);
    flat /= world_size;
    let mut at = 0;
    let grads = params
        .iter()
        .map(|param| {
            let count = param.numel() as i64;
            let grad = flat.narrow(0, at, count).view(param.size().as_slice());
            at += count;
            grad
        })
        .collect();
    Ok((flat, grads, wished))
}

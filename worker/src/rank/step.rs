//! One step, as the recipe is written: forward, head, backward for every micro-batch, then one gradient sum, clipping
//! and one update. A *step* is one global batch: it counts for the log and the schedule; with `gradient_acc = n` every
//! n-th one ends in an update, from the mean or the sum of the n gradients (the reference's is the sum). These n steps are
//! one *window*.
//!
//! The order at its end: sum over ranks, division by world size and loss scale, norm, clipping (the backbone's alone, as in
//! the reference), update.
//!
//! A loss that is not finite is seen by all ranks alike, before anything was changed but the batch-norm statistics; so is
//! a gradient, in its sum over ranks. Where the window is left out then, everything is as it was before it.
//!
//! Batch-norm statistics stay local to each rank, as in the reference (its DDP does not broadcast buffers); those of
//! rank 0 are the model's.

use super::captured::CapturedSteps;
use super::failure::RankFailure;
use super::figures::Sight;
use super::gradients::{GradientSum, Summed};
use super::nonfinite::{Guard, Samples, Site, Verdict};
use super::phases::Phases;
use crate::collective::Collective;
use crate::data::{Batch, DataError, Epochs, augment::Filters, planes::normalised};
use crate::device::{CudaGraphError, Placement};
use crate::head::Head;
use crate::model::{Backbone, DropoutDraw, ForwardMode, Role, TrainingPass, let_go_of_gradient};
use crate::optim::{GradScaler, Optimizer, clip::clip_grad_norm, schedule::PolyWarmup};
use arcface_proto::spec::{Accumulation, Precision};
use tch::{Device, Kind, Tensor};
use tracing::warn;

/// What a step follows, the same on every rank.
#[derive(Clone, Debug)]
pub struct StepSettings {
    /// Arithmetic of the backbone.
    pub precision: Precision,
    /// Seed of the random masks.
    pub seed: u64,
    /// Largest norm of the backbone's gradient.
    pub clip_grad_norm: Option<f64>,
    /// Steps whose gradients make one update.
    pub gradient_acc: u32,
    /// How they become one.
    pub accumulation: Accumulation,
    /// Samples of a step over all ranks.
    pub global_batch: u64,
    /// Rows of every rank, by micro-batch.
    pub rows: Vec<Vec<u32>>,
    /// Steps that the job was rolled back from: their samples are passed over.
    pub left_out: Vec<u64>,
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
            accumulation: spec.train.accumulation,
            global_batch: epochs.global_batch(),
            rows: (0..micros)
                .map(|micro| epochs.rows(world_size, batch_size, micro))
                .collect(),
            left_out: Vec::new(),
        }
    }

    /// Rows of a micro-batch over all ranks, as a share of its step's.
    fn share_of_step(&self, micro: usize) -> f64 {
        let rows: u64 = self.rows[micro].iter().map(|rows| u64::from(*rows)).sum();
        rows as f64 / self.global_batch as f64
    }

    /// What the gradient of a step's mean loss counts in an update.
    fn weight_of_step(&self) -> f64 {
        match self.accumulation {
            Accumulation::Mean => 1.0 / f64::from(self.gradient_acc),
            Accumulation::Sum => 1.0,
        }
    }
}

/// What a rank tells the others with its gradient.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Says {
    /// It wishes for a checkpoint.
    pub wish: bool,
    /// It has no room for one more: its older copies are not on the disk yet.
    pub busy: bool,
    /// Its last copies for another node's memory are still on their way.
    pub copying: bool,
    /// Its last copies did not get where they belong.
    pub uncopied: bool,
    /// Its part of an evaluation is not done yet.
    pub evaluating: bool,
    /// It knows that it is no use to go on.
    pub stop: bool,
}

impl Says {
    /// As elements of a sum.
    pub(super) fn to_elements(self) -> [f32; 6] {
        let Self {
            wish,
            busy,
            copying,
            uncopied,
            evaluating,
            stop,
        } = self;
        [wish, busy, copying, uncopied, evaluating, stop].map(|said| f32::from(u8::from(said)))
    }

    /// What any rank said, from the elements of the sum.
    pub(super) fn from_elements(sum: impl Fn(i64) -> f64) -> Self {
        let any = |which| sum(which) > 0.0;
        Self {
            wish: any(0),
            busy: any(1),
            copying: any(2),
            uncopied: any(3),
            evaluating: any(4),
            stop: any(5),
        }
    }
}

/// What a step gave; the same on every rank.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepOutcome {
    /// Mean loss over the global batch; none if the step was left out.
    pub loss: Option<f64>,
    /// Learning rate of the step.
    pub lr: f64,
    /// Norm of the backbone's gradient before clipping, if the step ended in an update of the backbone.
    pub grad_norm: Option<f64>,
    /// What any of the ranks said before this update; none if there was no update to say it with.
    pub said: Option<Says>,
}

/// The steps that one update is made of, while they are under way.
#[derive(Default)]
pub struct Window {
    /// Batch-norm statistics from before it, in one row for each kind of numbers; none between windows.
    statistics: Option<[Tensor; 2]>,
    /// Nothing of it counts.
    left_out: bool,
}

/// Everything that a step changes.
pub struct Trainer {
    /// Where it computes: network, head and their updates are there.
    pub placement: Placement,
    /// The network, replicated.
    pub backbone: Backbone,
    /// Its trainable parameters, in state_dict order: f32 in every precision, cast for each pass.
    pub params: Vec<Tensor>,
    /// Their update rule.
    pub optimizer: Box<dyn Optimizer>,
    /// Loss scale of the backbone's gradients, in fp16.
    pub scaler: Option<GradScaler>,
    /// This rank's classes.
    pub head: Box<dyn Head>,
    /// The other ranks.
    pub comm: Box<dyn Collective>,
    /// Learning rate by step.
    pub schedule: PolyWarmup,
    /// What a step follows.
    pub settings: StepSettings,
    /// What follows numbers that are not finite.
    pub guard: Guard,
    /// Who is behind them.
    pub samples: Samples,
    /// The update under way.
    pub window: Window,
    /// The sum of its gradients.
    pub sum: GradientSum,
    /// Where the time went.
    pub phases: Phases,
    /// What the head saw.
    pub sight: Sight,
    /// The network's way there and back where a GPU repeats it by itself.
    pub captured: CapturedSteps,
    /// What changes the looks of a GPU's images.
    pub filters: Filters,
}

/// The way there that a micro-batch went, for the way back.
enum Way<'a> {
    Launched(TrainingPass<'a>),
    /// As CUDA graphs; its embeddings.
    Captured(Tensor),
}

impl Trainer {
    /// Trains step `step` (from 0) on this rank's micro-batches, taken from `batches` in order. What it `says` all ranks hear
    /// with the gradient sum.
    ///
    /// # Errors
    /// Bad data, a lost peer, or, on all ranks alike, a loss or gradient that is not finite and that the job's policy
    /// does not let pass.
    pub fn step(
        &mut self,
        step: u64,
        batches: &mut dyn Iterator<Item = Result<Batch, DataError>>,
        says: Says,
    ) -> Result<StepOutcome, RankFailure> {
        let lr = self.schedule.lr(step);
        if self.window.statistics.is_none() {
            self.window.statistics = Some(self.statistics().map(|all| in_one_row(&all)));
        }
        if self.settings.left_out.contains(&step) {
            self.leave_out_window();
        }
        let mut loss = 0.0;
        for micro in 0..self.settings.rows.len() {
            let batch = self.phases.time("data_wait", || batches.next());
            let batch = batch.ok_or_else(|| {
                RankFailure::permanent(format!("step {step}: the loader ended before the training"))
            })??;
            // What is left of a window that does not count is passed over.
            if !self.window.left_out {
                loss += self.micro_step(step, micro, &batch)?;
            }
        }
        let mut outcome = StepOutcome {
            loss: Some(loss).filter(|_| !self.window.left_out),
            lr,
            grad_norm: None,
            said: None,
        };
        if self.ends_update(step) && !self.window.left_out {
            let (grad_norm, said) = self.update(step, lr, says)?;
            (outcome.grad_norm, outcome.said) = (grad_norm, Some(said));
        }
        if self.window.left_out {
            self.guard.skipped();
        }
        if self.ends_update(step) {
            self.window = Window::default();
        }
        Ok(outcome)
    }

    /// True if step `step` ends in an update: only then is the state whole.
    pub fn ends_update(&self, step: u64) -> bool {
        (step + 1).is_multiple_of(u64::from(self.settings.gradient_acc))
    }

    /// Forward, head and backward of one micro-batch; its part of the step's loss. Leaves out the window if that is not
    /// finite and may pass.
    fn micro_step(&mut self, step: u64, micro: usize, batch: &Batch) -> Result<f64, RankFailure> {
        let rows = &self.settings.rows[micro];
        let share = self.settings.share_of_step(micro);
        let mode = ForwardMode::training(
            self.settings.precision,
            DropoutDraw {
                seed: self.settings.seed,
                step,
                first_sample: batch.micro.first_position % self.settings.global_batch,
            },
        );
        let way = self.phases.time("forward", || {
            let mut images = self.placement.take(&batch.images);
            if let Some(looks) = &batch.looks {
                looks.apply(&mut images, &mut self.filters);
            }
            let parts = self.sum.parts(self.comm.world_size());
            let (backbone, params) = (&self.backbone, &mut self.params);
            match self
                .captured
                .graphs_for(backbone, params, &images, &mode, &parts)?
            {
                Some(graphs) => Ok(Way::Captured(graphs.forward(&images)?)),
                None => {
                    let pass = backbone.forward_to_train_for(&normalised(&images), &mode, &parts);
                    self.captured.ran(&images.size(), pass.draws());
                    Ok::<_, CudaGraphError>(Way::Launched(pass))
                }
            }
        })?;
        let embedding = match &way {
            Way::Launched(pass) => pass.embedding(),
            Way::Captured(embedding) => embedding.shallow_clone(),
        };
        let output = self.phases.time("head", || {
            self.head.forward_backward(
                self.comm.as_mut(),
                &embedding,
                &self.placement.take(&batch.labels),
                rows,
                step,
                share * self.settings.weight_of_step(),
            )
        })?;
        if !output.loss.is_finite() {
            drop(way);
            let names = self
                .samples
                .names(step, micro, self.comm.world_size(), &output.not_finite);
            let site = match self.settings.precision {
                Precision::Fp16 => Site::LossInFp16,
                _ => Site::Unexpected,
            };
            self.not_finite(step, site, &format!("the loss is {} for {names}", output.loss))?;
            return Ok(0.0);
        }
        self.sight.add(&output.seen);
        let scale = self.scaler.map_or(1.0, |scaler| scaler.scale());
        let grad = output.grad_embedding * scale;
        let ends = self.ends_update(step) && micro + 1 == self.settings.rows.len();
        let alone = self.settings.gradient_acc == 1 && self.settings.rows.len() == 1;
        let (params, comm) = (&mut self.params, self.comm.as_mut());
        let sum = &mut self.sum;
        // With the last of the window's gradients the sum over the ranks begins on the way.
        let mut finished = |part, params: &[Tensor]| match ends {
            true => sum.finished(part, params, comm),
            false => Ok(()),
        };
        self.phases.time("backward", || match way {
            Way::Launched(pass) => pass.backward_by_part(&grad, |part| finished(part, params)),
            Way::Captured(_) => {
                let graphs = self.captured.graphs().expect("they have gone the way there");
                graphs.backward_by_part(&grad, params, alone, finished)
            }
        })?;
        Ok(output.loss * share)
    }

    /// Gradient sum, clipping, both updates. Gives the gradient's norm before clipping, if the backbone was updated, and
    /// what any rank said.
    fn update(&mut self, step: u64, lr: f64, says: Says) -> Result<(Option<f64>, Says), RankFailure> {
        let scale = self.scaler.map_or(1.0, |scaler| scaler.scale());
        let (params, comm, sum) = (&self.params, self.comm.as_mut(), &mut self.sum);
        let Summed { grads, flats, said } = self
            .phases
            .time("comm", || sum.finish(params, comm, says, scale))?;
        // A norm a parameter is a launch a parameter on a GPU, which adds long rows as exactly as short ones; the CPU does not.
        let rows = match self.placement.device() {
            Device::Cpu => &grads,
            _ => &flats,
        };
        let norm = clip_grad_norm(rows, self.settings.clip_grad_norm);
        // An infinity or NaN of one rank survives the sum, whose bits all ranks share: they agree without a word.
        let finite = norm.is_finite();
        if let Some(scaler) = &mut self.scaler {
            scaler.update(!finite);
        }
        // At a scale of 1 and below, it is not the scale that made gradients overflow.
        let scaled_too_far = !finite && scale > 1.0;
        if !finite && !scaled_too_far {
            let name = self.first_not_finite(&grads);
            let what = format!("the norm of the gradient is {norm}, first of {name}");
            self.not_finite(step, Site::Unexpected, &what)?;
            return Ok((None, said));
        }
        if finite {
            self.guard.updated();
        } else {
            self.guard.skipped();
        }
        self.phases.time("optimizer", || {
            if finite {
                self.optimizer.step(&self.params, &grads, lr);
            }
            self.head.update(lr);
            forget_gradients(&mut self.params);
        });
        Ok((Some(norm).filter(|_| finite), said))
    }

    /// A number of `step` is not finite: leaves out its window, if that may pass.
    fn not_finite(&mut self, step: u64, site: Site, what: &str) -> Result<(), RankFailure> {
        let rollbacks = self.settings.left_out.len();
        match self.guard.judge(site, rollbacks) {
            Verdict::Skip => {
                warn!("step {step} is left out: {what}");
                self.leave_out_window();
                Ok(())
            }
            Verdict::Rollback => Err(RankFailure::rollback(step, format!("step {step}: {what}"))),
            Verdict::Stop => {
                let before = self.guard.before(rollbacks);
                let failure = RankFailure::permanent(format!("step {step}: {what}{before}"));
                Err(failure.hint("a lower train.lr, a warm-up epoch or precision = \"fp32\" usually helps"))
            }
        }
    }

    /// Everything becomes as it was before the window, and what is left of it does not count.
    fn leave_out_window(&mut self) {
        self.window.left_out = true;
        self.head.discard();
        forget_gradients(&mut self.params);
        for (all, before) in self
            .statistics()
            .into_iter()
            .zip(self.window.statistics.iter().flatten())
        {
            let mut at = 0;
            for mut now in all {
                let count = now.numel() as i64;
                now.copy_(&before.narrow(0, at, count).view(now.size().as_slice()));
                at += count;
            }
        }
    }

    /// The batch-norm statistics: floating-point numbers, and counts.
    fn statistics(&self) -> [Vec<Tensor>; 2] {
        let buffers = self.backbone.state().iter();
        let (floats, counts) = buffers
            .filter(|entry| entry.role == Role::Buffer)
            .map(|entry| entry.tensor.shallow_clone())
            .partition(|tensor: &Tensor| tensor.kind() == Kind::Float);
        [floats, counts]
    }

    /// Name of the first parameter whose gradient is not finite, as all ranks find it; or of the sum of them all.
    fn first_not_finite(&self, grads: &[Tensor]) -> String {
        let named = self.backbone.trainable().into_iter().zip(grads);
        let mut broken = named.filter(|(_, grad)| !grad.norm().double_value(&[]).is_finite());
        broken
            .next()
            .map_or("their sum".to_owned(), |((name, _), _)| name.to_owned())
    }
}

/// A few copies instead of one a tensor: each is a launch on a GPU.
fn in_one_row(tensors: &[Tensor]) -> Tensor {
    let _no_grad = tch::no_grad_guard();
    match tensors {
        [] => Tensor::zeros([0], (Kind::Float, Device::Cpu)),
        _ => Tensor::cat(
            &tensors
                .iter()
                .map(|tensor| tensor.reshape([-1]))
                .collect::<Vec<_>>(),
            0,
        ),
    }
}

/// On the CPU their memory stays, for it costs more to have it anew than to fill it. On a GPU it goes: the next gradient is then
/// taken as it comes, without zeros and a sum with them.
fn forget_gradients(params: &mut [Tensor]) {
    for param in params {
        match param.device() {
            Device::Cpu => param.zero_grad(),
            _ => let_go_of_gradient(param),
        }
    }
}

//! The training loop around the step: log, evaluation, model file and checkpoints at their times.

use super::checkpoints::{self, Writer};
use super::copies::Copier;
use super::evaluate::Evaluations;
use super::failure::RankFailure;
use super::figures::{self, Counted};
use super::log::{Meter, TrainingLog};
use super::outputs;
use super::own_pace::OwnPace;
use super::pace::Pace;
use super::setup::Job;
use super::step::{Says, StepOutcome, Trainer};
use crate::checkpoint::TrainState;
use crate::data::{Batch, DataError, Form, Loader, LoaderOptions};
use arcface_proto::v1::{Evaluation, LossScaler, RankPace, StepMetrics, TrainingFinished};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tracing::warn;

/// Micro-batches decoded ahead.
const PREFETCH: usize = 4;

/// What the loop tells and asks of the world outside; the rank process answers with gRPC, a test with vectors.
pub trait Outside {
    /// Metrics of an interval, from rank 0.
    fn metrics(&mut self, metrics: StepMetrics);
    /// What this rank did by itself, from every rank.
    fn pace(&mut self, pace: RankPace);
    /// A result, from rank 0.
    fn evaluation(&mut self, evaluation: Evaluation);
    /// Results of earlier generations; rank 0 of a resumed job asks.
    ///
    /// # Errors
    /// If nobody tells.
    fn evaluations(&mut self) -> Result<Vec<Evaluation>, RankFailure>;
    /// True if a checkpoint was asked for since the last call.
    fn checkpoint_wanted(&mut self) -> bool;
}

/// Where results go.
pub struct Sinks<'a> {
    /// The job's output directory.
    pub output: PathBuf,
    /// Lines and numbers for people, on rank 0.
    pub log: Option<TrainingLog>,
    /// Checkpoints, unless none are wanted.
    pub writer: Option<&'a Writer>,
    /// Copies in memory, unless none are wanted.
    pub copier: Option<Copier>,
    /// Floating-point operations to train on one sample, told by rank 0.
    pub flops_per_sample: Option<f64>,
    /// Reports and wishes.
    pub outside: &'a mut dyn Outside,
}

/// What is due after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Due {
    /// A log line.
    pub log: bool,
    /// An evaluation of the verification sets.
    pub sets: bool,
    /// An evaluation of IJB.
    pub ijb: bool,
    /// The model file.
    pub model: bool,
    /// A checkpoint.
    pub checkpoint: bool,
    /// It is the last step.
    pub last: bool,
}

impl Due {
    /// Pure: what the job wants after `done` steps, the last ones or not.
    pub fn after(job: &Job, done: u64, last: bool) -> Self {
        let per_epoch = job.epochs.steps_per_epoch();
        let epoch_end = done.is_multiple_of(per_epoch);
        let every = |steps: Option<u64>| steps.is_some_and(|steps| done.is_multiple_of(steps));
        let ijb_epochs = job
            .spec
            .eval
            .ijb_every
            .map(|epochs| per_epoch * u64::from(epochs));
        Self {
            log: last || done.is_multiple_of(u64::from(job.spec.train.frequent)),
            sets: last || epoch_end || every(job.spec.eval.every_steps),
            ijb: last || every(ijb_epochs),
            model: last || epoch_end,
            checkpoint: last || epoch_end || every(job.spec.checkpoint.every_steps),
            last,
        }
    }
}

/// Trains from step `start` to the end, or until it is no use to go on; gives the steps finished, and why there are no more.
///
/// # Errors
/// Whatever ends the training before its end.
pub fn train(
    trainer: &mut Trainer,
    job: &Job,
    start: u64,
    sinks: &mut Sinks<'_>,
) -> Result<TrainingFinished, RankFailure> {
    let (rank, world_size) = (trainer.comm.rank(), trainer.comm.world_size());
    let spec = &job.spec;
    let plan = job
        .epochs
        .plan(rank, world_size, spec.train.batch_size, start..job.end_step);
    let mut loader = Loader::new(
        job.dataset.clone(),
        plan,
        LoaderOptions {
            threads: spec.data.num_workers as usize,
            augment: spec.data.augment,
            seed: spec.seed,
            prefetch: PREFETCH,
            form: match trainer.placement.gpu() {
                Some(_) => Form::Pixels,
                None => Form::Planes,
            },
            cache: job.cache.clone(),
        },
    );
    let mut meter = Meter::begin();
    let mut own_pace = OwnPace::begin(start);
    let begin = Instant::now();
    let mut pace = Pace::new(
        spec.checkpoint.every_seconds,
        spec.checkpoint.rank_mttf_hours,
        world_size,
    );
    // A checkpoint waits for the next update, because gradients in between are not part of it, and for a moment when every
    // rank has room for it. All ranks know both from the same sum: they take it at the same step.
    let mut owed = false;
    let mut wish = false;
    let mut waits = false;
    let mut copy_owed = false;
    let (mut evaluations, latest) = Evaluations::begin(trainer, job, start, sinks)?;
    let mut end = latest;
    for step in start..latest {
        wish |= sinks.outside.checkpoint_wanted();
        let says = Says {
            // One clock decides.
            wish: wish || rank == 0 && pace.is_due(begin.elapsed()),
            busy: sinks.writer.is_some_and(Writer::is_busy),
            copying: sinks.copier.as_mut().is_some_and(Copier::is_busy),
            uncopied: sinks.copier.as_ref().is_some_and(Copier::has_failed),
            evaluating: evaluations.is_busy()?,
            stop: evaluations.wants_stop(),
        };
        let batches: &mut dyn Iterator<Item = Result<Batch, DataError>> = &mut loader;
        let step_begin = Instant::now();
        let stepped = trainer.step(step, batches, says);
        if stepped.is_err() && loader.loaded().errors > 0 {
            // The last word follows, and the record that cannot be read is to be counted.
            tell(trainer, job, step, &loader, &mut own_pace, begin.elapsed(), sinks);
        }
        let outcome = stepped?;
        meter.step(outcome.loss, outcome.grad_norm);
        let done = step + 1;
        trainer.phases.stepped(done, step_begin.elapsed());
        if outcome.said.is_some_and(|said| said.stop) {
            end = done;
        }
        let last = done == end;
        let due = Due::after(job, done, last);
        if due.log {
            log_interval(trainer, job, done, &outcome, &mut meter, &pace, sinks);
            if done == job.end_step || own_pace.is_due(begin.elapsed()) {
                tell(trainer, job, done, &loader, &mut own_pace, begin.elapsed(), sinks);
            }
        }
        let aside = Instant::now();
        // Without an update nothing was said: whatever might hinder does.
        let said = outcome.said.unwrap_or(Says {
            wish: false,
            busy: true,
            copying: true,
            uncopied: true,
            evaluating: true,
            stop: false,
        });
        evaluations.heard(trainer, said, sinks)?;
        evaluations.after_step(trainer, due, done, sinks)?;
        if due.model && rank == 0 {
            // A slow disk is no step that hangs.
            trainer.phases.begin("checkpoint");
            match outputs::write_model(&sinks.output, &trainer.backbone) {
                Ok(()) => {}
                Err(failure) if last => return Err(failure),
                // Before the end it costs nothing but the file: the next epoch writes it anew.
                Err(failure) => warn!(
                    step = done,
                    "no model file, training goes on: {}", failure.message
                ),
            }
        }
        owed |= due.checkpoint || said.wish;
        // A wish that was not heard, because the update was left out, is told again.
        wish &= !said.wish;
        // The last one waits for room.
        if owed && (last || !said.busy) {
            (owed, waits) = (false, false);
            checkpoint(trainer, job, done, begin, &mut pace, sinks);
        } else if owed && outcome.said.is_some() && !waits {
            waits = true;
            warn!(
                step = done,
                "the checkpoint waits: a rank is still writing the two before it"
            );
        }
        if let Some(copier) = &mut sinks.copier {
            copy_owed |= copier.is_due(done);
            if copy_owed && !said.copying && !last {
                copy_owed = false;
                copy(trainer, job, done, copier, !said.uncopied);
            } else if copy_owed && outcome.said.is_some() && !last {
                copier.waits(done);
            }
        }
        meter.aside(aside);
        if last {
            break;
        }
    }
    // The last checkpoint is on its way: what is left to wait for can be lost.
    evaluations.finish(trainer, sinks)?;
    let step = end.max(start);
    Ok(TrainingFinished {
        step,
        reason: match step < job.end_step {
            true => evaluations.reason(),
            false => String::new(),
        },
    })
}

/// Tells what this rank did by itself, and what it counts.
fn tell(
    trainer: &mut Trainer,
    job: &Job,
    done: u64,
    loader: &Loader,
    own_pace: &mut OwnPace,
    now: Duration,
    sinks: &mut Sinks<'_>,
) {
    let counted = Counted {
        classes: job.num_classes,
        shard_rows: trainer.head.shard().len(),
        sight: &trainer.sight,
        loaded: loader.loaded(),
        calls: trainer.phases.calls(),
        checkpoint_failures: sinks.writer.map(Writer::failures),
        flops_per_sample: sinks.flops_per_sample,
        placement: &trainer.placement,
    };
    let figures = Some(figures::to_wire(counted));
    let own = trainer.phases.take_own();
    sinks.outside.pace(RankPace {
        figures,
        ..own_pace.tell(now, done, own)
    });
}

fn checkpoint(
    trainer: &mut Trainer,
    job: &Job,
    done: u64,
    begin: Instant,
    pace: &mut Pace,
    sinks: &mut Sinks<'_>,
) {
    let Some(writer) = sinks.writer else { return };
    let state = position(trainer, job, done);
    let phases = &trainer.phases;
    let waits = || _ = phases.begin("checkpoint");
    waits();
    let room = writer.room(&waits);
    let stop = phases.begin("checkpoint");
    let snapshot = checkpoints::snapshot_into(trainer, state, job.num_classes, room);
    writer.write(snapshot);
    let stall = stop.elapsed();
    trainer.phases.add("checkpoint", stall);
    pace.taken(begin.elapsed(), stall);
    if let (Some(news), Some(log)) = (pace.news(), sinks.log.as_mut()) {
        log.line(&news);
    }
}

/// Copies this rank's state for the memory of its node and of its buddy's.
fn copy(trainer: &mut Trainer, job: &Job, done: u64, copier: &mut Copier, last_is_whole: bool) {
    let state = position(trainer, job, done);
    let stop = trainer.phases.begin("checkpoint");
    let snapshot = checkpoints::snapshot_into(trainer, state, job.num_classes, copier.room());
    copier.copy(snapshot, last_is_whole);
    trainer.phases.add("checkpoint", stop.elapsed());
}

/// Where training stands after `done` steps.
pub(super) fn position(trainer: &Trainer, job: &Job, done: u64) -> TrainState {
    let per_epoch = job.epochs.steps_per_epoch();
    TrainState {
        step: done,
        epoch: u32::try_from(done / per_epoch).unwrap_or(u32::MAX),
        epoch_samples: done % per_epoch * job.epochs.global_batch(),
        scaler: trainer.scaler.map(|scaler| LossScaler {
            scale: scaler.scale(),
            good_updates: scaler.good_updates(),
        }),
        num_image: Some(job.dataset.len()),
    }
}

fn log_interval(
    trainer: &mut Trainer,
    job: &Job,
    done: u64,
    outcome: &StepOutcome,
    meter: &mut Meter,
    pace: &Pace,
    sinks: &mut Sinks<'_>,
) {
    let phases = trainer.phases.take();
    let seen = trainer.sight.take();
    let (Some((loss, step_seconds, grad_norm)), Some(log)) = (meter.take(), sinks.log.as_mut()) else {
        return;
    };
    let metrics = StepMetrics {
        step: done,
        total_steps: job.end_step,
        // The epoch that the step belonged to, not the one that begins after it.
        epoch: u32::try_from((done - 1) / job.epochs.steps_per_epoch()).unwrap_or(u32::MAX),
        loss,
        learning_rate: outcome.lr,
        samples_per_second: job.epochs.global_batch() as f64 / step_seconds.max(1e-9),
        grad_norm,
        eta_seconds: (job.end_step - done) as f64 * step_seconds,
        step_seconds,
        phase_seconds: phases
            .into_iter()
            .map(|(phase, seconds)| (phase.to_owned(), seconds))
            .collect(),
        loss_scale: trainer.scaler.map(|scaler| scaler.scale()),
        skipped_steps: trainer.guard.skipped_steps(),
        checkpoint_stall_seconds: pace.stall().map(|stall| stall.as_secs_f64()),
        checkpoint_suggested_seconds: pace.suggested().map(|interval| interval.as_secs_f64()),
        embedding_norm: figures::mean(seen.norms),
        target_cosine: figures::mean(seen.target_cosines),
    };
    log.metrics(&metrics);
    sinks.outside.metrics(metrics);
}

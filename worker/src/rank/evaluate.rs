//! Evaluation during training, which training does not wait for. At an evaluation's step every rank copies the weights, with
//! rank 0's batch-norm statistics, because those are the model's. A thread beside training embeds the rank's share of the
//! images; the shares go to rank 0 over the training's communicator, a piece after each update, once all ranks have said with
//! a gradient that theirs is done; rank 0's thread makes numbers of them.
//!
//! Every decision is taken from what all ranks hear alike, so they take it at the same step: nothing here can make one rank
//! wait for another that does not come. With the generation an evaluation ends; the next generation makes it again if it
//! begins at its very step, and leaves it out otherwise. While one is under way, another that becomes due is left
//! out, except the last, which waits. Weights and head are never touched: training goes as if nobody looked.

mod background;
mod best;
mod shares;
pub mod targets;

use super::failure::RankFailure;
use super::setup::Job;
use super::step::{Says, Trainer};
use super::train::{Due, Sinks};
use crate::collective::{Collective, ReduceOp};
use crate::model::{Backbone, Role};
use arcface_proto::v1::Evaluation;
use background::{Allowance, Answer, Background, Order, Setting};
use best::Best;
use shares::{Gathered, Shares};
use std::sync::Arc;
use std::time::{Duration, Instant};
use targets::Target;
use tch::{Kind, Tensor};

/// Bytes of all ranks together that go to rank 0 after an update; r18's gradients are six times as many.
const PIECE_BYTES: usize = 16 << 20;
/// How long a rank that waits for its thread waits before it looks after the others.
const LOOK: Duration = Duration::from_millis(200);

/// A job's evaluations, as one rank sees them.
pub struct Evaluations {
    targets: Arc<[Target]>,
    thread: Option<Background>,
    /// Training waits for each.
    waits: bool,
    /// Memory for the copy of the weights, while no evaluation has it.
    spare: Option<Backbone>,
    open: Option<Open>,
    /// Why it is no use to go on; on rank 0.
    stop: Option<String>,
}

/// The evaluation under way.
struct Open {
    step: u64,
    begin: Instant,
    which: Vec<usize>,
    shares: Shares,
    stage: Stage,
}

/// How far it is. All ranks are at the same stage.
enum Stage {
    /// The ranks embed; what this one has, once it is done.
    Embedding(Option<(Backbone, Vec<f32>)>),
    /// The lists go to rank 0, which puts them together; so many values of each have gone.
    Exchanging {
        weights: Backbone,
        list: Vec<f32>,
        gone: usize,
        gathered: Option<Gathered>,
    },
    /// Rank 0 makes numbers of them, and has them, once it is done.
    Scoring(Option<Vec<Evaluation>>),
}

impl Evaluations {
    /// Before step `start`. Rank 0 looks up what earlier generations found: an evaluation of just this step that is missing is
    /// made now, and [`Evaluations::wants_stop`] may already hold. Gives the step that training ends at.
    ///
    /// # Errors
    /// A lost peer, or a coordinator that does not tell.
    pub fn begin(
        trainer: &mut Trainer,
        job: &Job,
        start: u64,
        sinks: &mut Sinks<'_>,
    ) -> Result<(Self, u64), RankFailure> {
        let mut evaluations = Self {
            targets: job.targets.clone(),
            thread: None,
            waits: !job.spec.eval.background,
            spare: None,
            open: None,
            stop: None,
        };
        if job.targets.is_empty() {
            return Ok((evaluations, job.end_step));
        }
        let rank = trainer.comm.rank();
        let mut best = Best::of(&job.spec.eval).filter(|_| rank == 0);
        let earlier = match start > 0 && rank == 0 {
            true => sinks.outside.evaluations()?,
            false => Vec::new(),
        };
        if let Some(best) = &mut best {
            best.replay(&earlier, start);
            evaluations.stop = best.stop().map(str::to_owned);
        }
        evaluations.thread = Some(Background::start(Setting {
            targets: job.targets.clone(),
            rank,
            precision: trainer.settings.precision,
            allowance: Allowance::here(&job.spec.eval, job.ranks_on_node),
            best,
            output: sinks.output.clone(),
        }));
        if start == 0 {
            return Ok((evaluations, job.end_step));
        }
        // What rank 0 knows goes for all.
        let is_missing = |target: &Target| {
            let mut of_step = earlier.iter().filter(|found| found.step == start);
            !of_step.any(|found| found.dataset == target.name())
        };
        let mut told: Vec<i64> = vec![evaluations.stop.is_some().into()];
        told.extend(job.targets.iter().map(|target| i64::from(is_missing(target))));
        let mut told = Tensor::from_slice(&told);
        trainer.comm.broadcast(&mut told, 0)?;
        let is_told = |index: usize| told.int64_value(&[index as i64]) == 1;
        let end = if is_told(0) { start } else { job.end_step };
        let due = Due::after(job, start, start == end);
        let mut which = evaluations.due(due);
        which.retain(|target| is_told(target + 1));
        evaluations.start(trainer, start, which, sinks)?;
        if evaluations.waits {
            evaluations.finish(trainer, sinks)?;
        }
        Ok((evaluations, end))
    }

    /// True while the others have to wait for this rank's part of an evaluation.
    ///
    /// # Errors
    /// What went wrong with it.
    pub fn is_busy(&mut self) -> Result<bool, RankFailure> {
        self.look(Duration::ZERO)
    }

    /// True if rank 0 has found that it is no use to go on.
    pub fn wants_stop(&self) -> bool {
        self.stop.is_some()
    }

    /// Why it is no use to go on; empty if it is some, and on all ranks but 0.
    pub fn reason(self) -> String {
        self.stop.unwrap_or_default()
    }

    /// Goes on with the evaluation under way after an update in which any rank `said` this.
    ///
    /// # Errors
    /// A lost peer.
    pub fn heard(
        &mut self,
        trainer: &mut Trainer,
        said: Says,
        sinks: &mut Sinks<'_>,
    ) -> Result<(), RankFailure> {
        if self.open.is_none() {
            return Ok(());
        }
        let begin = trainer.phases.begin("eval");
        self.advance(trainer.comm.as_mut(), said.evaluating, sinks)?;
        trainer.phases.add("eval", begin.elapsed());
        Ok(())
    }

    /// Begins what is due after `done` steps, `last` of the job or not.
    ///
    /// # Errors
    /// A lost peer.
    pub fn after_step(
        &mut self,
        trainer: &mut Trainer,
        due: Due,
        done: u64,
        sinks: &mut Sinks<'_>,
    ) -> Result<(), RankFailure> {
        let which = self.due(due);
        if let Some(open) = self.open.as_ref().filter(|_| !which.is_empty()) {
            if !due.last {
                if let Some(log) = sinks.log.as_mut() {
                    log.line(&format!(
                        "the evaluation of step {done} is left out: that of step {} is still under way",
                        open.step
                    ));
                }
                return Ok(());
            }
            self.finish(trainer, sinks)?;
        }
        self.start(trainer, done, which, sinks)?;
        match self.waits {
            true => self.finish(trainer, sinks),
            false => Ok(()),
        }
    }

    /// Waits for the evaluation under way.
    ///
    /// # Errors
    /// What went wrong with it, or a lost peer.
    pub fn finish(&mut self, trainer: &mut Trainer, sinks: &mut Sinks<'_>) -> Result<(), RankFailure> {
        let Some(thread) = self.thread.as_ref().filter(|_| self.open.is_some()) else {
            return Ok(());
        };
        thread.hurry(true);
        let begin = trainer.phases.begin("eval");
        while self.open.is_some() {
            // The ranks look after each other: one that is gone is noticed at once.
            let mut busy = Tensor::from_slice(&[f32::from(u8::from(self.look(LOOK)?))]);
            trainer.comm.all_reduce(&mut busy, ReduceOp::Sum)?;
            self.advance(trainer.comm.as_mut(), busy.double_value(&[0]) > 0.0, sinks)?;
        }
        trainer.phases.add("eval", begin.elapsed());
        if let Some(thread) = &self.thread {
            thread.hurry(false);
        }
        Ok(())
    }

    /// Targets that are due.
    fn due(&self, due: Due) -> Vec<usize> {
        let is_due = |target: &Target| if target.is_ijb() { due.ijb } else { due.sets };
        let all = self.targets.iter().enumerate();
        all.filter(|(_, target)| is_due(target))
            .map(|(index, _)| index)
            .collect()
    }

    /// Copies the weights and sends the thread to work.
    fn start(
        &mut self,
        trainer: &mut Trainer,
        step: u64,
        which: Vec<usize>,
        sinks: &mut Sinks<'_>,
    ) -> Result<(), RankFailure> {
        let Some(thread) = self.thread.as_mut().filter(|_| !which.is_empty()) else {
            return Ok(());
        };
        let phase = trainer.phases.begin("eval");
        let weights = copy(self.spare.take(), &trainer.backbone, trainer.comm.as_mut())?;
        let images = which
            .iter()
            .map(|&target| self.targets[target].images())
            .collect();
        let dim = weights.config().embedding_size as usize;
        let shares = Shares::new(images, trainer.comm.world_size(), dim);
        thread.ask(Order::Embed {
            weights,
            which: which.clone(),
            shares: shares.clone(),
        })?;
        if let Some(log) = sinks.log.as_mut().filter(|_| !self.waits) {
            log.line(&format!("evaluation of step {step} begins beside training"));
        }
        self.open = Some(Open {
            step,
            begin: phase,
            which,
            shares,
            stage: Stage::Embedding(None),
        });
        trainer.phases.add("eval", phase.elapsed());
        Ok(())
    }

    /// Takes the thread's answer if it comes within `limit`; true if the others have to wait for more.
    fn look(&mut self, limit: Duration) -> Result<bool, RankFailure> {
        let (Some(open), Some(thread)) = (&mut self.open, &mut self.thread) else {
            return Ok(false);
        };
        let waits = matches!(open.stage, Stage::Embedding(None) | Stage::Scoring(None));
        // In the third stage only rank 0 has asked for something.
        let asked = waits && !(matches!(open.stage, Stage::Scoring(_)) && self.spare.is_some());
        if !asked {
            return Ok(false);
        }
        match thread.answer(limit)? {
            None => Ok(true),
            Some(Answer::Embedded { weights, list }) => {
                open.stage = Stage::Embedding(Some((weights, list)));
                Ok(false)
            }
            Some(Answer::Scored { weights, found, stop }) => {
                open.stage = Stage::Scoring(Some(found));
                self.spare = Some(weights);
                self.stop = stop;
                Ok(false)
            }
        }
    }

    /// The next stage, or a piece of one, unless `busy`: a rank still has to do its part of this one.
    fn advance(
        &mut self,
        comm: &mut dyn Collective,
        busy: bool,
        sinks: &mut Sinks<'_>,
    ) -> Result<(), RankFailure> {
        let Some(mut open) = self.open.take() else {
            return Ok(());
        };
        open.stage = match open.stage {
            Stage::Embedding(Some((weights, list))) if !busy => Stage::Exchanging {
                weights,
                list,
                gone: 0,
                gathered: (comm.rank() == 0).then(|| Gathered::new(open.shares.clone())),
            },
            Stage::Scoring(found) if !busy => {
                let seconds = open.begin.elapsed().as_secs_f64();
                for evaluation in found.into_iter().flatten() {
                    let evaluation = Evaluation {
                        seconds,
                        ..evaluation
                    };
                    if let Some(log) = sinks.log.as_mut() {
                        log.evaluation(&evaluation);
                    }
                    sinks.outside.evaluation(evaluation);
                }
                return Ok(());
            }
            stage => stage,
        };
        if let Stage::Exchanging {
            list, gone, gathered, ..
        } = &mut open.stage
        {
            *gone = exchange(comm, list, *gone, gathered.as_mut())?;
        }
        open.stage = match open.stage {
            Stage::Exchanging {
                weights,
                list,
                gone,
                gathered,
            } if gone == list.len() => {
                match (gathered, &mut self.thread) {
                    (Some(gathered), Some(thread)) => thread.ask(Order::Score {
                        weights,
                        which: open.which.clone(),
                        step: open.step,
                        gathered,
                    })?,
                    _ => self.spare = Some(weights),
                }
                Stage::Scoring(None)
            }
            stage => stage,
        };
        self.open = Some(open);
        Ok(())
    }
}

/// A piece of every rank's list, to rank 0. Gives how far it has gone.
fn exchange(
    comm: &mut dyn Collective,
    list: &[f32],
    gone: usize,
    gathered: Option<&mut Gathered>,
) -> Result<usize, RankFailure> {
    let most = PIECE_BYTES / size_of::<f32>() / comm.world_size() as usize;
    let end = list.len().min(gone + most.max(1));
    let all = comm.all_gather(&Tensor::from_slice(&list[gone..end]))?;
    if let Some(gathered) = gathered {
        for rank in 0..comm.world_size() {
            let piece = all.narrow(0, i64::from(rank) * (end - gone) as i64, (end - gone) as i64);
            let piece = Vec::<f32>::try_from(piece)
                .map_err(|error| RankFailure::permanent(format!("evaluation: {error}")))?;
            gathered.place(rank, gone, &piece);
        }
    }
    Ok(end)
}

/// The weights as they are now, with rank 0's batch-norm statistics, in the memory of an earlier copy if there is one.
fn copy(
    room: Option<Backbone>,
    weights: &Backbone,
    comm: &mut dyn Collective,
) -> Result<Backbone, RankFailure> {
    let copy = match room {
        Some(room) => room,
        None => {
            let mut room = Backbone::new(weights.config())?;
            room.move_to(weights.device());
            room
        }
    };
    let _no_grad = tch::no_grad_guard();
    for (to, from) in copy.state().iter().zip(weights.state()) {
        to.tensor.shallow_clone().copy_(&from.tensor);
    }
    share_statistics(&copy, comm)?;
    Ok(copy)
}

/// Gives every rank the batch-norm statistics of rank 0.
fn share_statistics(copy: &Backbone, comm: &mut dyn Collective) -> Result<(), RankFailure> {
    for kind in [Kind::Float, Kind::Int64] {
        let buffers: Vec<Tensor> = copy
            .state()
            .iter()
            .filter(|entry| entry.role == Role::Buffer && entry.tensor.kind() == kind)
            .map(|entry| entry.tensor.shallow_clone())
            .collect();
        if buffers.is_empty() {
            continue;
        }
        let flat: Vec<Tensor> = buffers.iter().map(|buffer| buffer.reshape([-1])).collect();
        let mut all = Tensor::cat(&flat, 0);
        comm.broadcast(&mut all, 0)?;
        let mut at = 0;
        for mut buffer in buffers {
            let count = buffer.numel() as i64;
            buffer.copy_(&all.narrow(0, at, count).view(buffer.size().as_slice()));
            at += count;
        }
    }
    Ok(())
}

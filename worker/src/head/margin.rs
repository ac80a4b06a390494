//! Losses as functions of cosines: what becomes of the cosine at a row's own class, what of the others, and the
//! derivatives that training uses. Shared by all heads. Pure; knows no ranks, no weights and no update rule.
//!
//! A micro-batch goes through in three strokes, so that a head's inner loop over classes does next to nothing:
//! 1. the head learns each row's cosine with its own class (and its embedding's norm), a handful of numbers;
//! 2. [`Loss::prepare`] turns them into the row's [`TargetLogit`] and its rule for all other classes ([`Others`]),
//!    and moves the running statistics of losses that have some;
//! 3. the loop over classes maps every other cosine by [`Others`], or a whole matrix by [`Prepared::apply`].
//!
//! A new loss is one file with its `Rule`, and one line in [`Loss::new`].
//!
//! Shapes: b rows of the micro-batch over all ranks, c classes.

mod adaface;
mod angular;
mod curricularface;
mod magface;
mod statistics;

pub use angular::Margin;

use super::HeadError;
use arcface_proto::spec;
use statistics::Statistics;
use tch::{Kind, Tensor, no_grad};

/// What a loss must know of a micro-batch, by row, over all ranks.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// Norm of the embedding.
    pub norms: &'a [f64],
    /// Cosine with the row's own class, in [-1, 1]. Where [`Loss::needs_all_targets`], the same on every rank; else
    /// only rows whose class lives on this rank need theirs, and others may hold anything.
    pub target_cos: &'a [f64],
    /// The micro-batch's share of the update's samples: all micro-batches of an update together move the statistics as
    /// far as one of its whole batch would.
    pub share: f64,
}

impl Rows<'_> {
    /// How far the micro-batch moves a statistic whose share of a new batch is `alpha`: what is left of the old value
    /// after all of an update's micro-batches is then 1 - alpha, however many they are.
    fn alpha(&self, alpha: f64) -> f64 {
        1.0 - (1.0 - alpha).powf(self.share)
    }
}

/// The logit of a row's own class.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TargetLogit {
    /// The logit, scaled by s.
    pub value: f64,
    /// d logit / d cos, as training differentiates it.
    pub by_cos: f64,
    /// d logit / d norm of the embedding; 0 unless the margin follows the norm and the loss lets gradient through.
    pub by_norm: f64,
}

/// A term of the loss that depends on the embedding's norm alone.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct NormTerm {
    /// The row's term; the loss takes the mean over rows.
    pub value: f64,
    /// Its derivative by the norm.
    pub by_norm: f64,
}

/// How one row's cosines with all classes but its own become logits. Small and `Copy`, for inner loops.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Others {
    /// s.
    pub scale: f32,
    /// Cosines above it become logit 0 with derivative 0 (interclass filtering); infinite when off.
    pub zero_above: f32,
    /// Cosines above it are hard: s * cos * (t + cos); infinite unless the loss is CurricularFace.
    pub hard_above: f32,
    /// t of the hard ones.
    pub t: f32,
}

impl Others {
    /// True if every logit is s * cos: a loop may then skip the comparisons.
    #[inline]
    pub fn is_plain(&self) -> bool {
        self.zero_above == f32::INFINITY && self.hard_above == f32::INFINITY
    }

    /// The logit of a cosine.
    #[inline]
    pub fn logit(&self, cos: f32) -> f32 {
        if cos > self.zero_above {
            0.0
        } else if cos > self.hard_above {
            cos * (self.t + cos) * self.scale
        } else {
            cos * self.scale
        }
    }

    /// d logit / d cos.
    #[inline]
    pub fn slope(&self, cos: f32) -> f32 {
        if cos > self.zero_above {
            0.0
        } else if cos > self.hard_above {
            (self.t + 2.0 * cos) * self.scale
        } else {
            self.scale
        }
    }
}

/// Logits with their derivative by the cosine.
pub struct Margined {
    /// `[b, c]`, scaled by s.
    pub logits: Tensor,
    /// `[b, c]`: d logit / d cos as training differentiates it.
    pub derivative: Tensor,
}

/// One loss: the equations of one paper. Values are in units of s, which the caller multiplies in.
trait Rule: Send + Sync {
    /// Running statistics by name, with their values before the first batch.
    fn statistics(&self) -> &'static [(&'static str, f64)] {
        &[]
    }

    /// Moves the statistics by a micro-batch; called before anything else is asked of it.
    fn observe(&self, _rows: &Rows, _statistics: &mut [f64]) {}

    /// True if [`Rows::target_cos`] must be known of all rows on every rank.
    fn needs_all_targets(&self) -> bool {
        false
    }

    /// The logit at the row's own class, over s.
    fn target(&self, cos: f64, norm: f64, statistics: &[f64]) -> TargetLogit;

    /// Cosines with other classes above the first value are hard, and t, given the row's cosine with its own class.
    fn hard(&self, _target_cos: f64, _statistics: &[f64]) -> Option<(f64, f64)> {
        None
    }

    /// The term of the embedding's norm, not scaled.
    fn norm_term(&self, _norm: f64) -> Option<NormTerm> {
        None
    }

    /// No logit over s is larger; the same on all ranks.
    fn largest(&self, _statistics: &[f64]) -> f64 {
        1.0
    }
}

/// A head's loss: its rule, the scale s, interclass filtering and the running statistics, which are the same on
/// every rank.
pub struct Loss {
    rule: Box<dyn Rule>,
    scale: f64,
    zero_above: Option<f64>,
    statistics: Statistics,
}

impl Loss {
    /// The loss of a configuration. `margin` is asked where the loss is an angular margin.
    pub fn new(loss: spec::Loss, margin: Margin, scale: f64, zero_above: Option<f64>) -> Self {
        let rule: Box<dyn Rule> = match loss {
            // Sub-centres change which cosine a class has, not what becomes of it.
            spec::Loss::ArcFace | spec::Loss::SubCenter(_) => Box::new(margin),
            spec::Loss::AdaFace(config) => Box::new(adaface::AdaFace(config)),
            spec::Loss::MagFace(config) => Box::new(magface::MagFace(config)),
            spec::Loss::CurricularFace(config) => Box::new(curricularface::CurricularFace(config)),
        };
        let statistics = Statistics::new(rule.statistics());
        Self {
            rule,
            scale,
            zero_above: zero_above.filter(|&threshold| threshold > 0.0),
            statistics,
        }
    }

    /// True if [`Rows::target_cos`] must hold the cosines of all rows on every rank: the head sums them over ranks
    /// before [`prepare`](Self::prepare).
    pub fn needs_all_targets(&self) -> bool {
        self.rule.needs_all_targets()
    }

    /// Everything about a micro-batch that does not depend on the other classes; moves the running statistics. Not
    /// for a micro-batch without rows.
    pub fn prepare(&mut self, rows: &Rows) -> Prepared {
        self.rule.observe(rows, &mut self.statistics.now);
        let now = &self.statistics.now;
        let cos_and_norm = || rows.target_cos.iter().zip(rows.norms);
        let scaled = |logit: TargetLogit| TargetLogit {
            value: logit.value * self.scale,
            by_cos: logit.by_cos * self.scale,
            by_norm: logit.by_norm * self.scale,
        };
        Prepared {
            scale: self.scale,
            zero_above: self.zero_above,
            targets: cos_and_norm()
                .map(|(&cos, &norm)| scaled(self.rule.target(cos, norm, now)))
                .collect(),
            hard: rows
                .target_cos
                .iter()
                .filter_map(|&cos| self.rule.hard(cos, now))
                .collect(),
            norm_terms: rows
                .norms
                .iter()
                .filter_map(|&norm| self.rule.norm_term(norm))
                .collect(),
            largest: self.rule.largest(now) * self.scale,
        }
    }

    /// Keeps what the micro-batches since the last update did to the statistics.
    pub fn commit(&mut self) {
        self.statistics.commit();
    }

    /// Forgets it: for a step that is skipped.
    pub fn discard(&mut self) {
        self.statistics.discard();
    }

    /// The statistics for a checkpoint: scalars of shape `[]`, f64, the same on every rank.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        self.statistics.state()
    }

    /// Takes over the values of a [`state`](Self::state), by name.
    ///
    /// # Errors
    /// If one is missing or no scalar.
    pub fn load_state(&mut self, value: &mut dyn FnMut(&str) -> Option<Tensor>) -> Result<(), HeadError> {
        self.statistics.load_state(value)
    }
}

/// A micro-batch as its loss sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Prepared {
    scale: f64,
    zero_above: Option<f64>,
    targets: Vec<TargetLogit>,
    /// By row, or empty.
    hard: Vec<(f64, f64)>,
    /// By row, or empty.
    norm_terms: Vec<NormTerm>,
    largest: f64,
}

impl Prepared {
    /// The logit of each row's own class; of meaning where [`Rows::target_cos`] was.
    pub fn targets(&self) -> &[TargetLogit] {
        &self.targets
    }

    /// The rule for all other classes of a row.
    pub fn others(&self, row: usize) -> Others {
        let (hard_above, t) = self.hard.get(row).copied().unwrap_or((f64::INFINITY, 0.0));
        Others {
            scale: self.scale as f32,
            zero_above: self.zero_above.unwrap_or(f64::INFINITY) as f32,
            hard_above: hard_above as f32,
            t: t as f32,
        }
    }

    /// No logit is larger; the same on all ranks. s for most losses: the softmax may take exp(logit - largest).
    pub fn largest_logit(&self) -> f64 {
        self.largest
    }

    /// The norm's term of each row; empty if the loss has none.
    pub fn norm_terms(&self) -> &[NormTerm] {
        &self.norm_terms
    }

    /// The part of the loss that depends on norms alone: the mean of its terms. The same bits on every rank.
    pub fn norm_loss(&self) -> f64 {
        let sum: f64 = self.norm_terms.iter().map(|term| term.value).sum();
        sum / (self.norm_terms.len().max(1) as f64)
    }

    /// True if norms get gradient of their own, beside that of the directions.
    pub fn moves_norms(&self) -> bool {
        !self.norm_terms.is_empty() || self.targets.iter().any(|target| target.by_norm != 0.0)
    }

    /// d loss / d norm of a row's embedding, given the softmax's probability of the row's own class.
    pub fn grad_norm(&self, row: usize, target_probability: f64) -> f64 {
        let by_norm = self.targets.get(row).map_or(0.0, |target| target.by_norm);
        let term = self.norm_terms.get(row).copied().unwrap_or_default();
        ((target_probability - 1.0) * by_norm + term.by_norm) / self.targets.len() as f64
    }

    /// Maps a whole matrix. `cos_bc` holds cosines in [-1, 1]; `target_b` i64 the column of each row's class, -1
    /// where the class is not among these columns.
    ///
    /// Filtering comes first: a non-target cosine above the threshold becomes logit 0 (it stays in the softmax)
    /// with derivative 0.
    pub fn apply(&self, cos_bc: &Tensor, target_b: &Tensor) -> Margined {
        no_grad(|| {
            let mut logits = cos_bc * self.scale;
            let mut derivative = Tensor::full_like(cos_bc, self.scale);
            if let Some(&(_, t)) = self.hard.first() {
                let above: Vec<f64> = self.hard.iter().map(|(above, _)| *above).collect();
                let above_b1 = Tensor::from_slice(&above).to_kind(cos_bc.kind()).unsqueeze(1);
                let above_b1 = above_b1.to_device(cos_bc.device());
                let hard = cos_bc.gt_tensor(&above_b1);
                logits = (cos_bc * (cos_bc + t) * self.scale).where_self(&hard, &logits);
                derivative = ((cos_bc * 2.0 + t) * self.scale).where_self(&hard, &derivative);
            }
            if let Some(threshold) = self.zero_above {
                let dirty = cos_bc.gt(threshold);
                let _ = logits.masked_fill_(&dirty, 0.0);
                let _ = derivative.masked_fill_(&dirty, 0.0);
            }
            let row = target_b.ge(0).nonzero().view([-1]);
            if row.numel() > 0 {
                let column = target_b.index_select(0, &row);
                let at = [Some(&row), Some(&column)];
                let put = |into: &mut Tensor, value: fn(&TargetLogit) -> f64| {
                    let all: Vec<f64> = self.targets.iter().map(value).collect();
                    let values = Tensor::from_slice(&all).to_device(cos_bc.device());
                    let values = values.index_select(0, &row);
                    let _ = into.index_put_(&at, &values.to_kind(cos_bc.kind()), false);
                };
                put(&mut logits, |target| target.value);
                put(&mut derivative, |target| target.by_cos);
            }
            Margined { logits, derivative }
        })
    }
}

/// The cosines of a matrix at each row's target column, as f64; 0 where a row has none.
pub fn target_cosines(cos_bc: &Tensor, target_b: &Tensor) -> Vec<f64> {
    let rows = target_b.size()[0];
    let mut values = vec![0f64; rows as usize];
    if cos_bc.size()[1] > 0 {
        let picked = cos_bc.gather(1, &target_b.clamp_min(0).unsqueeze(1), false);
        let picked = picked.squeeze_dim(1).to_kind(Kind::Double) * target_b.ge(0);
        picked.copy_data(&mut values, rows as usize);
    }
    values
}

#[cfg(test)]
mod tests;

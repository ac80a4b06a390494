//! Rows: embeddings and weights of length 1, the gradient of embeddings, and the update of weights.

use super::Weights;
use crate::{
    head::tiled::kernel::rows::AdamWStep,
    kernels::{
        Call, Kernels, Started,
        launch::{
            Element::{self, Bf16, F32, F64, I64, U8, U32},
            Shape,
        },
    },
};
use tch::{Kind, Tensor};

/// The numbers of a step of SGD.
#[derive(Clone, Copy, Debug)]
pub struct SgdStep {
    /// Learning rate.
    pub lr: f32,
    /// Momentum's factor.
    pub mu: f32,
    /// Weight decay.
    pub decay: f32,
}

/// The gradient of some rows, by those of length 1.
pub struct RowsGradient<'a> {
    /// `[t, d]` f32 or bf16.
    pub gradient: &'a Tensor,
    /// `[t]` f32: 1 / norm of each row.
    pub inverse: &'a Tensor,
    /// `[t]` u32: which rows; `None` is all.
    pub chosen: Option<&'a Tensor>,
}

/// Embeddings with what their gradient takes, `[r]` or `[r, d]`: a rank's own.
pub struct OwnRows<'a> {
    /// f32, `[r, d]`: gradient by the rows of length 1.
    pub gradient_unit: &'a Tensor,
    /// f32, `[r, d]`: these rows.
    pub unit: &'a Tensor,
    /// f64.
    pub norm: &'a Tensor,
    /// f64: of the own class.
    pub probability: &'a Tensor,
    /// f64, where the loss moves norms: derivatives by the norm of the target's logit, and of the loss's own term.
    pub by_norm: Option<(&'a Tensor, &'a Tensor)>,
    /// Weight of a sample in the loss.
    pub each: f64,
    /// What everything is multiplied by.
    pub factor: f64,
}

impl Kernels {
    /// `[b, d]` rows to rows of length 1, f32 or bf16 either way; by row 1 / norm (f32) and the norm (f64).
    pub fn normalize_rows(&self, rows: &Tensor, unit: &Tensor, inverse: &Tensor, norm: &Tensor) -> Started {
        let (count, dim) = (rows.size()[0], rows.size()[1]);
        let (kernel, from, to) = match (rows.kind(), unit.kind()) {
            (Kind::BFloat16, Kind::BFloat16) => ("head_normalize_rows_bf16_bf16", Bf16, Bf16),
            (Kind::BFloat16, _) => ("head_normalize_rows_bf16_f32", Bf16, F32),
            (_, Kind::BFloat16) => ("head_normalize_rows_f32_bf16", F32, Bf16),
            _ => ("head_normalize_rows_f32_f32", F32, F32),
        };
        self.call(kernel)
            .reads(from, rows, count * dim)
            .value(count)
            .value(dim)
            .writes(to, unit, count * dim)
            .writes(F32, inverse, count)
            .writes(F64, norm, count)
            .start(Shape::blocks(count))
    }

    /// Rows of weights (`None`: all) to rows of length 1, as they are once missed steps are made up for.
    pub fn normalize_weights(
        &self,
        weights: &Weights,
        chosen: Option<&Tensor>,
        unit: &Tensor,
        inverse: &Tensor,
    ) -> Started {
        let dim = weights.dim();
        let count = chosen.map_or(weights.rows(), |chosen| chosen.size()[0]);
        let (kernel, to) = match unit.kind() {
            Kind::BFloat16 => ("head_normalize_weights_bf16", Bf16),
            _ => ("head_normalize_weights_f32", F32),
        };
        self.call(kernel)
            .weights(weights)
            .missed(weights)
            .maybe_reads(U32, chosen, count)
            .value(count)
            .value(dim)
            .writes(to, unit, count * dim)
            .writes(F32, inverse, count)
            .start(Shape::rows(count, dim))
    }

    /// Turns `[b, d]` f32 sums of rows, weighted by terms, into the gradient of embeddings of length 1.
    pub fn finish_embeddings(
        &self,
        gradient: &Tensor,
        (factor, target_gradient): (&Tensor, &Tensor),
        local: &Tensor,
        weights: &Weights,
    ) -> Started {
        let (samples, dim) = (gradient.size()[0], weights.dim());
        self.call("head_finish_embeddings")
            .writes(F32, gradient, samples * dim)
            .reads(F32, factor, samples)
            .reads(F32, target_gradient, samples)
            .reads(I64, local, samples)
            .value(samples)
            .value(dim)
            .weights(weights)
            .missed(weights)
            .start(Shape::blocks(samples))
    }

    /// `[r, d]` f32: the gradient by embeddings.
    pub fn embedding_gradient(&self, rows: &OwnRows<'_>, gradient: &Tensor) -> Started {
        let (count, dim) = (rows.unit.size()[0], rows.unit.size()[1]);
        self.call("head_embedding_gradient")
            .reads(F32, rows.gradient_unit, count * dim)
            .reads(F32, rows.unit, count * dim)
            .reads(F64, rows.norm, count)
            .reads(F64, rows.probability, count)
            .maybe_reads(F64, rows.by_norm.map(|(logit, _)| logit), count)
            .maybe_reads(F64, rows.by_norm.map(|(_, term)| term), count)
            .value(count)
            .value(dim)
            .value(rows.each)
            .value(rows.factor)
            .writes(F32, gradient, count * dim)
            .start(Shape::blocks(count))
    }

    /// A step of SGD; rows that may miss steps are noted as touched in it.
    pub fn sgd_rows(&self, weights: &Weights, rows: &RowsGradient<'_>, step: SgdStep) -> Started {
        let (dim, all) = (weights.dim(), weights.rows());
        let count = rows.inverse.size()[0];
        let kernel = match rows.gradient.kind() {
            Kind::BFloat16 => "head_sgd_rows_bf16",
            _ => "head_sgd_rows_f32",
        };
        self.call(kernel)
            .rows(rows, count, dim)
            .value(count)
            .value(dim)
            .writes(F32, &weights.weight, all * dim)
            .maybe_writes(F32, weights.momentum.as_ref(), all * dim)
            .missed(weights)
            .maybe_writes(U32, weights.missed.as_ref().map(|missed| &missed.since), all)
            .value(step.lr)
            .value(step.mu)
            .value(step.decay)
            .start(Shape::rows(count, dim))
    }

    /// Makes up for what rows have missed that were touched before `before`.
    pub fn make_up_rows(&self, weights: &Weights, before: u32) -> Started {
        let (rows, dim) = (weights.rows(), weights.dim());
        self.call("head_make_up_rows")
            .value(rows)
            .value(dim)
            .writes(F32, &weights.weight, rows * dim)
            .maybe_writes(F32, weights.momentum.as_ref(), rows * dim)
            .missed(weights)
            .maybe_writes(U32, weights.missed.as_ref().map(|missed| &missed.since), rows)
            .value(before)
            .start(Shape::rows(rows, dim))
    }

    /// A step of AdamW; `mean` and `mean_sq` `[n, d]` f32.
    pub fn adamw_rows(
        &self,
        weight: &Tensor,
        (mean, mean_sq): (&Tensor, &Tensor),
        rows: &RowsGradient<'_>,
        step: AdamWStep,
    ) -> Started {
        let (all, dim) = (weight.size()[0], weight.size()[1]);
        let count = rows.inverse.size()[0];
        let kernel = match rows.gradient.kind() {
            Kind::BFloat16 => "head_adamw_rows_bf16",
            _ => "head_adamw_rows_f32",
        };
        self.call(kernel)
            .rows(rows, count, dim)
            .value(count)
            .value(dim)
            .writes(F32, weight, all * dim)
            .writes(F32, mean, all * dim)
            .writes(F32, mean_sq, all * dim)
            .value(step)
            .start(Shape::blocks(count))
    }

    /// The same step on rows whose flag `taken` `[n]` u8 is not set: their gradient is 0.
    pub fn adamw_idle_rows(
        &self,
        weight: &Tensor,
        (mean, mean_sq): (&Tensor, &Tensor),
        taken: &Tensor,
        step: AdamWStep,
    ) -> Started {
        let (rows, dim) = (weight.size()[0], weight.size()[1]);
        self.call("head_adamw_idle_rows")
            .reads(U8, taken, rows)
            .value(rows)
            .value(dim)
            .writes(F32, weight, rows * dim)
            .writes(F32, mean, rows * dim)
            .writes(F32, mean_sq, rows * dim)
            .value(step)
            .start(Shape::blocks(rows))
    }
}

impl Call<'_> {
    fn rows(self, rows: &RowsGradient<'_>, count: i64, dim: i64) -> Self {
        let element = Element::of_float(rows.gradient.kind());
        self.reads(element, rows.gradient, count * dim)
            .reads(F32, rows.inverse, count)
            .maybe_reads(U32, rows.chosen, count)
    }
}

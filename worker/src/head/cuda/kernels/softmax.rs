//! Samples' logits of their own classes, and tiles of cosines that become terms and gradients.

use super::Weights;
use crate::{
    head::{cuda::raw, margin::Others},
    kernels::{
        Call, Kernels, Started,
        launch::{
            Element::{self, Bf16, F32, F64, I64, U8, U32},
            Shape,
        },
    },
};
use std::ptr;
use tch::{Kind, Tensor};

/// What the loss does to other classes than a sample's own.
pub struct OtherClasses<'a> {
    /// Scale and filter; the threshold of hard ones is in `hard_above`.
    pub rule: Others,
    /// The logits' scale, unrounded.
    pub scale: f64,
    /// `[b]` f32, where classes may be hard.
    pub hard_above: Option<&'a Tensor>,
    /// `[b]` f32, whole numbers: see terms.cuh.
    pub shift: &'a Tensor,
}

/// Cosines of every sample with some columns.
#[derive(Clone, Copy)]
pub struct Tile<'a> {
    /// `[b, t]` f32 or bf16; terms or gradients take their place.
    pub cosines: &'a Tensor,
    /// The column of the whole that the tile begins with.
    pub first: i64,
    /// `[b]` i64: column of each sample's own class, or -1.
    pub target: &'a Tensor,
}

impl Tile<'_> {
    fn samples(&self) -> i64 {
        self.cosines.size()[0]
    }

    fn columns(&self) -> i64 {
        self.cosines.size()[1]
    }
}

/// An angular margin.
#[derive(Clone, Copy, Debug)]
pub struct AngularMargin {
    /// m1, m2, m3.
    pub m: [f64; 3],
    /// Scale of logits.
    pub scale: f64,
    /// The true derivative.
    pub exact: bool,
}

/// What `softmax_rows` reads and writes, `[b]` each.
pub struct SoftmaxRows<'a> {
    /// f64, over all ranks.
    pub sums: &'a Tensor,
    /// f64, over all ranks.
    pub target_logit: &'a Tensor,
    /// f64: derivative of the target's logit by its cosine.
    pub by_cosine: &'a Tensor,
    /// f32.
    pub shift: &'a Tensor,
    /// f64, written.
    pub loss: &'a Tensor,
    /// f64, written.
    pub probability: &'a Tensor,
    /// f32, written.
    pub factor: &'a Tensor,
    /// f32, written.
    pub target_gradient: &'a Tensor,
}

impl Kernels {
    /// `[b]` f64 cosines of rows of length 1 with their own classes, 0 for those that are not here; and u8, 1 where rounding
    /// put one outside of [-1, 1].
    pub fn target_cosines(
        &self,
        unit: &Tensor,
        weights: &Weights,
        local: &Tensor,
        cosine: &Tensor,
        outside: &Tensor,
    ) -> Started {
        let (samples, dim) = (unit.size()[0], weights.dim());
        self.call("head_target_cosines")
            .reads(F32, unit, samples * dim)
            .value(samples)
            .value(dim)
            .weights(weights)
            .missed(weights)
            .reads(I64, local, samples)
            .writes(F64, cosine, samples)
            .writes(U8, outside, samples)
            .start(Shape::blocks(samples))
    }

    /// `[b]` f64 logits of samples' own classes with their derivatives by the cosine; 0 for classes that are not here.
    pub fn margin_logits(
        &self,
        margin: AngularMargin,
        (cosine, outside): (&Tensor, &Tensor),
        local: &Tensor,
        target_logit: &Tensor,
        by_cosine: &Tensor,
    ) -> Started {
        let samples = cosine.size()[0];
        let [m1, m2, m3] = margin.m;
        self.call("head_margin_logits")
            .reads(F64, cosine, samples)
            .reads(U8, outside, samples)
            .reads(I64, local, samples)
            .value(samples)
            .value(m1)
            .value(m2)
            .value(m3)
            .value(margin.scale)
            .value(i32::from(margin.exact))
            .writes(F64, target_logit, samples)
            .writes(F64, by_cosine, samples)
            .start(Shape::threads(samples))
    }

    /// Turns a tile of cosines into terms, and adds them to `sums` `[b]` f64.
    pub fn softmax_terms(
        &self,
        tile: Tile<'_>,
        target_logit: &Tensor,
        others: &OtherClasses<'_>,
        sums: &Tensor,
    ) -> Started {
        let (kernel, element) = match tile.cosines.kind() {
            Kind::BFloat16 => ("head_softmax_terms_bf16", Bf16),
            _ => ("head_softmax_terms_f32", F32),
        };
        self.call(kernel)
            .tile(element, true, tile)
            .reads(F64, target_logit, tile.samples())
            .others(others, tile.samples())
            .writes(F64, sums, tile.samples())
            .start(Shape::blocks(tile.samples()))
    }

    /// Raises `largest` `[b]` f32 to the largest logits of a tile of cosines, in base 2.
    pub fn largest_logits(
        &self,
        tile: Tile<'_>,
        target_logit: &Tensor,
        others: &OtherClasses<'_>,
        largest: &Tensor,
    ) -> Started {
        let (kernel, element) = match tile.cosines.kind() {
            Kind::BFloat16 => ("head_largest_logits_bf16", Bf16),
            _ => ("head_largest_logits_f32", F32),
        };
        self.call(kernel)
            .tile(element, false, tile)
            .reads(F64, target_logit, tile.samples())
            .others(others, tile.samples())
            .writes(F32, largest, tile.samples())
            .start(Shape::blocks(tile.samples()))
    }

    /// From sums over all ranks to losses, probabilities and the factors of the gradient.
    pub fn softmax_rows(
        &self,
        rows: &SoftmaxRows<'_>,
        scale: f64,
        share: f64,
        min_probability: f64,
    ) -> Started {
        let samples = rows.sums.size()[0];
        self.call("head_softmax_rows")
            .reads(F64, rows.sums, samples)
            .reads(F64, rows.target_logit, samples)
            .reads(F64, rows.by_cosine, samples)
            .reads(F32, rows.shift, samples)
            .value(samples)
            .value(scale)
            .value(share)
            .value(min_probability)
            .writes(F64, rows.loss, samples)
            .writes(F64, rows.probability, samples)
            .writes(F32, rows.factor, samples)
            .writes(F32, rows.target_gradient, samples)
            .start(Shape::threads(samples))
    }

    /// Turns a tile of cosines into the loss's gradient by them. `factor` and `target_gradient`: `[b]` f32.
    pub fn softmax_gradient(
        &self,
        tile: Tile<'_>,
        others: &OtherClasses<'_>,
        factor: &Tensor,
        target_gradient: &Tensor,
    ) -> Started {
        let (kernel, element) = match tile.cosines.kind() {
            Kind::BFloat16 => ("head_softmax_gradient_bf16", Bf16),
            _ => ("head_softmax_gradient_f32", F32),
        };
        let samples = tile.samples();
        self.call(kernel)
            .tile(element, true, tile)
            .others(others, samples)
            .reads(F32, factor, samples)
            .reads(F32, target_gradient, samples)
            .start(Shape::blocks(samples))
    }

    /// Makes 0 the columns of `[b, t]` whose class, one of `rows` `[t]` u32, is not in `chosen` `[c]` u32.
    pub fn drop_columns(&self, gradient: &Tensor, rows: &Tensor, chosen: &Tensor) -> Started {
        let (samples, columns) = (gradient.size()[0], gradient.size()[1]);
        let count = chosen.size()[0];
        let (kernel, element) = match gradient.kind() {
            Kind::BFloat16 => ("head_drop_columns_bf16", Bf16),
            _ => ("head_drop_columns_f32", F32),
        };
        self.call(kernel)
            .writes(element, gradient, samples * columns)
            .value(columns)
            .value(samples)
            .value(columns)
            .reads(U32, rows, columns)
            .reads(U32, chosen, count)
            .value(count)
            .start(Shape::threads(columns))
    }
}

impl Call<'_> {
    fn others(mut self, others: &OtherClasses<'_>, samples: i64) -> Self {
        self.check(F32, others.shift, samples);
        if let Some(hard_above) = others.hard_above {
            self.check(F32, hard_above, samples);
        }
        self.value(raw::Others {
            zero_above: others.rule.zero_above,
            t: others.rule.t,
            hard_above: others
                .hard_above
                .map_or(ptr::null(), |tensor| tensor.data_ptr().cast_const()),
            shift: others.shift.data_ptr(),
            ..raw::Others::of_scale(others.scale)
        })
    }

    fn tile(self, element: Element, written: bool, tile: Tile<'_>) -> Self {
        let (samples, columns) = (tile.samples(), tile.columns());
        self.memory(element, written, Some(tile.cosines), samples * columns)
            .value(columns)
            .value(samples)
            .value(columns)
            .value(tile.first)
            .reads(I64, tile.target, samples)
    }
}

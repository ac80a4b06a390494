//! A micro-batch as the head keeps it from its loss until the update: the embeddings as operands of matrix products,
//! the softmax's numbers by sample, and the targets. Knows no weights and no rank.
//!
//! The weight gradient is formed only in the update, tile by tile, so gradient accumulation keeps these (b x d numbers a
//! micro-batch) instead of a gradient of all classes.

use super::{
    buffer::Buffer,
    kernel::{
        exponentials::{Special, Terms},
        gemm::{Format, Left, PANEL, Right},
        rows::to_bf16,
    },
};
use crate::head::margin::Prepared;

/// Length of a row of embeddings or weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Geometry {
    /// Elements.
    pub dim: usize,
    /// The next multiple of [`PANEL`]; what is beyond `dim` is 0.
    pub padded: usize,
    /// Form of the operands.
    pub format: Format,
}

impl Geometry {
    pub fn new(dim: usize, format: Format) -> Self {
        Self {
            dim,
            padded: dim.next_multiple_of(PANEL),
            format,
        }
    }
}

/// A sample whose class lives in this shard and takes part.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    /// The class, counted from the shard's first.
    pub row: usize,
    /// The sample.
    pub sample: usize,
    /// Derivative of the loss (mean over the micro-batch) by the cosine.
    pub gradient: f64,
}

/// See the head of this file.
#[derive(Default)]
pub struct Micro {
    /// Samples over all ranks.
    pub batch: usize,
    /// The next multiple of [`PANEL`].
    pub columns: usize,
    /// `[batch, padded]`, rows of length 1.
    pub unit: Buffer,
    /// By sample: norm of the embedding.
    pub norms: Vec<f64>,
    /// Share of the update's samples.
    pub share: f64,
    /// Rising (row, sample).
    pub targets: Vec<Target>,
    /// Classes that take part, rising; `None` is all.
    pub classes: Option<Vec<u32>>,
    /// Logit scale.
    pub scale: f64,
    /// By sample and up to `columns`.
    pub shift: Vec<f32>,
    for_cosines: Buffer,
    for_gradient: Buffer,
    is_plain: bool,
    zero_above: Vec<f32>,
    hard_above: Vec<f32>,
    t: Vec<f32>,
}

impl Micro {
    /// Takes over `[batch, dim]` embeddings.
    pub fn take(&mut self, embedding: &[f32], geometry: Geometry) {
        let Geometry { dim, padded, .. } = geometry;
        self.batch = embedding.len() / dim;
        self.columns = self.batch.next_multiple_of(PANEL);
        self.unit.reserve(self.batch * padded);
        self.norms.clear();
        for (row, unit) in embedding
            .chunks_exact(dim)
            .zip(self.unit.floats_mut().chunks_exact_mut(padded))
        {
            let norm = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
            // Not f64::max, which would hide a NaN.
            let divisor = if norm < MIN_NORM { MIN_NORM } else { norm };
            self.norms.push(norm);
            for (unit, x) in unit.iter_mut().zip(row) {
                *unit = (f64::from(*x) / divisor) as f32;
            }
        }
        // The operand of cosines: word (k, sample).
        let steps = padded / geometry.format.per_word();
        self.for_cosines.reserve(steps * self.columns);
        let (words, unit) = (self.for_cosines.words_mut(), self.unit.floats());
        for (panel, words) in words
            .chunks_exact_mut(PANEL * steps)
            .take(self.columns / PANEL)
            .enumerate()
        {
            for (lane, sample) in (panel * PANEL..).take(PANEL).enumerate() {
                let row = match sample < self.batch {
                    true => &unit[sample * padded..][..padded],
                    false => &[],
                };
                for k in 0..steps {
                    words[k * PANEL + lane] = match (row.is_empty(), geometry.format) {
                        (true, _) => 0,
                        (_, Format::F32) => row[k].to_bits(),
                        (_, Format::Bf16) => to_bf16(row[2 * k]) | to_bf16(row[2 * k + 1]) << 16,
                    };
                }
            }
        }
    }

    /// Takes over what the loss does to cosines, with the first shift of all samples.
    pub fn set_loss(&mut self, loss: &Prepared, shift: f32) {
        let others: Vec<_> = (0..self.batch).map(|sample| loss.others(sample)).collect();
        let lanes = |value: fn(&crate::head::margin::Others) -> f32, beyond: f32| {
            let mut lanes: Vec<f32> = others.iter().map(value).collect();
            lanes.resize(self.columns, beyond);
            lanes
        };
        self.is_plain = others.iter().all(|others| others.is_plain());
        self.zero_above = lanes(|others| others.zero_above, f32::INFINITY);
        self.hard_above = lanes(|others| others.hard_above, f32::INFINITY);
        self.t = lanes(|others| others.t, 0.0);
        self.shift.clear();
        self.shift.resize(self.columns, shift);
    }

    /// How cosines become terms.
    pub fn terms(&self) -> Terms<'_> {
        let special = (!self.is_plain).then_some(Special {
            zero_above: &self.zero_above,
            hard_above: &self.hard_above,
            t: &self.t,
        });
        Terms::new(self.scale, &self.shift, special)
    }

    /// The embeddings as operand of the product with rows of weights that gives cosines.
    pub fn for_cosines(&self, geometry: Geometry) -> (Right<'_>, usize) {
        let steps = geometry.padded / geometry.format.per_word();
        let right = Right {
            words: self.for_cosines.words(),
            panel: PANEL * steps,
            step: PANEL,
        };
        (right, steps)
    }

    /// Forms the operand that turns terms into the gradient of weights: each sample's embedding times `factor`.
    pub fn scale_for_gradient(&mut self, factor: &[f64], geometry: Geometry) {
        let Geometry { padded, format, .. } = geometry;
        let steps = self.columns / format.per_word();
        self.for_gradient.reserve(steps * padded);
        let unit = self.unit.floats();
        let value = |sample: usize, d: usize| match factor.get(sample) {
            Some(factor) => (f64::from(unit[sample * padded + d]) * factor) as f32,
            None => 0.0,
        };
        let words = self.for_gradient.words_mut();
        for k in 0..steps {
            for d in 0..padded {
                words[d / PANEL * PANEL * steps + k * PANEL + d % PANEL] = match format {
                    Format::F32 => value(k, d).to_bits(),
                    Format::Bf16 => to_bf16(value(2 * k, d)) | to_bf16(value(2 * k + 1, d)) << 16,
                };
            }
        }
    }

    /// The operand of [`scale_for_gradient`](Self::scale_for_gradient) and the words along its inner dimension.
    pub fn for_gradient(&self, geometry: Geometry) -> (Right<'_>, usize) {
        let steps = self.columns / geometry.format.per_word();
        let right = Right {
            words: self.for_gradient.words(),
            panel: PANEL * steps,
            step: PANEL,
        };
        (right, steps)
    }

    /// The row of length 1 of a sample.
    pub fn unit_row(&self, sample: usize, geometry: Geometry) -> &[f32] {
        &self.unit.floats()[sample * geometry.padded..][..geometry.padded]
    }
}

/// Smallest norm that an embedding is divided by (torch.nn.functional.normalize).
const MIN_NORM: f64 = 1e-12;

/// Terms as the left operand: word (row, k) of `[rows, stride]`.
pub fn rows_of(words: &[u32], stride: usize) -> Left<'_> {
    Left {
        words,
        row: stride,
        step: 1,
    }
}

/// The same, turned: word (k, column).
pub fn columns_of(words: &[u32], stride: usize) -> Left<'_> {
    Left {
        words,
        row: 1,
        step: stride,
    }
}

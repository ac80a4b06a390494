//! One thread's scratch: a few dozen rows of weights on their way through the cache, and what is computed from them.
//! Knows no thread and no rank.

use super::{
    buffer::Buffer,
    kept::{Rows, RowsMut},
    kernel::{
        exponentials::{Exponentials, Largest},
        gemm::{Format, Left, Order, Out, Right, Shape, multiply},
        isa::Isa,
        rows::{AddScaled, PairNeighbours, PairRows, RowMap, Unit},
    },
    micro::{Geometry, Micro, columns_of, rows_of},
};
use crate::head::lazy_sgd::History;
use std::ops::Range;

/// Distance between rows beyond their length, in words: a cache line, so that the rows' beginnings do not all fall
/// into the same few sets of the cache.
const SKEW: usize = 16;

/// The rows that take part, in rising order.
#[derive(Clone, Copy)]
pub enum Taking<'a> {
    /// Rows 0..n.
    All(usize),
    /// These.
    Some(&'a [u32]),
}

impl Taking<'_> {
    pub fn len(&self) -> usize {
        match self {
            Self::All(rows) => *rows,
            Self::Some(rows) => rows.len(),
        }
    }

    /// The row at a place.
    pub fn row(&self, place: usize) -> usize {
        match self {
            Self::All(_) => place,
            Self::Some(rows) => rows[place] as usize,
        }
    }
}

/// Rows of weights, some of which may have missed steps. Row r is element `r - first` of every list.
#[derive(Clone, Copy)]
pub struct Weights<'a> {
    pub first: usize,
    pub weight: &'a [f32],
    /// Momentum; needed where rows may have missed steps.
    pub momentum: &'a [f32],
    /// For every row what the history's `now` was when it was touched last; and the history.
    pub lazy: Option<(&'a [u32], &'a History)>,
}

impl<'a> Weights<'a> {
    /// The row, and what it has missed.
    pub fn row(&self, row: usize, dim: usize) -> (&'a [f32], Option<(&'a [f32], RowMap)>) {
        let at = row - self.first;
        let cut = |all: &'a [f32]| &all[at * dim..][..dim];
        let missed = self.lazy.and_then(|(since, history)| history.missed(since[at]));
        (
            cut(self.weight),
            missed.map(|map| (cut(self.momentum), RowMap::of(map))),
        )
    }
}

/// See the head of this file. Grows to the largest shapes that it meets.
#[derive(Default)]
pub struct Chunk {
    rows: usize,
    /// f32: `[rows, padded + SKEW]`, rows of length 1. bf16: the two rows in hand.
    unit: Buffer,
    /// bf16: word (row, pair of neighbours).
    neighbours: Buffer,
    /// bf16: word (pair of rows, column).
    pairs: Buffer,
    /// 1 / norm of each row.
    pub inverse: Vec<f32>,
    /// `[rows, columns + SKEW]`: cosines, then terms.
    cosines: Buffer,
    /// bf16: terms as an operand.
    terms: Buffer,
    /// `[rows, padded + SKEW]`: gradient by the rows of length 1.
    gradient: Buffer,
    /// Sums of terms by sample.
    pub sums: Vec<f32>,
    /// (row of the chunk, sample) of its targets, and where they stand in the micro-batch's list.
    targets: Vec<(usize, usize)>,
    first_target: usize,
}

/// What the rows are loaded for.
#[derive(Clone, Copy, PartialEq)]
pub enum Use {
    /// Cosines alone.
    Cosines,
    /// Cosines, and the gradient of embeddings.
    Embeddings,
}

impl Chunk {
    /// Loads rows of weights, scaled to length 1.
    pub fn load(
        &mut self,
        isa: Isa,
        geometry: Geometry,
        weights: &Weights<'_>,
        taking: Taking<'_>,
        places: Range<usize>,
        purpose: Use,
    ) {
        let Geometry { dim, padded, format } = geometry;
        self.rows = places.len();
        self.inverse.clear();
        let stride = padded + SKEW;
        if format == Format::F32 {
            self.unit.reserve(self.rows * stride);
            for (place, unit) in places.zip(self.unit.floats_mut().chunks_exact_mut(stride)) {
                let (weight, missed) = weights.row(taking.row(place), dim);
                self.inverse.push(isa.run(Unit { weight, missed, unit }));
            }
            return;
        }
        let half = padded / 2 + SKEW;
        self.unit.reserve(2 * stride);
        self.neighbours.reserve(self.rows.next_multiple_of(2) * half);
        self.pairs.reserve(self.rows.div_ceil(2) * stride);
        for pair in 0..self.rows.div_ceil(2) {
            let (first, second) = self.unit.floats_mut().split_at_mut(stride);
            for (k, unit) in [(2 * pair, &mut *first), (2 * pair + 1, &mut *second)] {
                if k >= self.rows {
                    unit.fill(0.0);
                    continue;
                }
                let (weight, missed) = weights.row(taking.row(places.start + k), dim);
                self.inverse.push(isa.run(Unit { weight, missed, unit }));
                let halves =
                    bytemuck::cast_slice_mut(&mut self.neighbours.words_mut()[k * half..][..padded / 2]);
                let row = &unit[..padded];
                isa.run(PairNeighbours { row, halves });
            }
            if purpose == Use::Embeddings {
                let words = &mut self.pairs.words_mut()[pair * stride..][..padded];
                isa.run(PairRows { first, second, words });
            }
        }
    }

    /// Cosines of the loaded rows with every sample; notes the targets among them.
    fn cosines(
        &mut self,
        isa: Isa,
        geometry: Geometry,
        micro: &Micro,
        taking: Taking<'_>,
        places: Range<usize>,
    ) {
        let (right, inner) = micro.for_cosines(geometry);
        let left = match geometry.format {
            Format::F32 => rows_of(self.unit.words(), geometry.padded + SKEW),
            Format::Bf16 => rows_of(self.neighbours.words(), geometry.padded / 2 + SKEW),
        };
        let stride = micro.columns + SKEW;
        // An even number of rows, so that the last can be paired.
        self.cosines.reserve(self.rows.next_multiple_of(2) * stride);
        let out = Out {
            values: self.cosines.floats_mut(),
            row: stride,
            add: false,
        };
        let shape = Shape {
            rows: self.rows,
            columns: micro.columns,
            inner,
        };
        multiply(isa, geometry.format, shape, left, right, out, Order::RowsFirst);
        self.note_targets(micro, taking, places);
    }

    /// Notes which of these places are targets.
    fn note_targets(&mut self, micro: &Micro, taking: Taking<'_>, places: Range<usize>) {
        self.targets.clear();
        if places.is_empty() {
            return;
        }
        let last = taking.row(places.end - 1);
        let first = micro
            .targets
            .partition_point(|target| target.row < taking.row(places.start));
        let mut place = places.start;
        self.first_target = first;
        for target in micro.targets[first..]
            .iter()
            .take_while(|target| target.row <= last)
        {
            while taking.row(place) < target.row {
                place += 1;
            }
            self.targets.push((place - places.start, target.sample));
        }
    }

    /// From the loaded rows to terms; their sums by sample are in `sums`.
    pub fn exponentials(
        &mut self,
        isa: Isa,
        geometry: Geometry,
        micro: &Micro,
        taking: Taking<'_>,
        places: Range<usize>,
    ) {
        self.cosines(isa, geometry, micro, taking, places);
        let stride = micro.columns + SKEW;
        self.sums.clear();
        self.sums.resize(micro.columns, 0.0);
        isa.run(Exponentials {
            cosines: &mut self.cosines.floats_mut()[..self.rows * stride],
            stride,
            terms: micro.terms(),
            sums: &mut self.sums,
            targets: &self.targets,
        });
    }

    /// From the loaded rows to the largest logits of every sample.
    pub fn largest(
        &mut self,
        isa: Isa,
        geometry: Geometry,
        micro: &Micro,
        taking: Taking<'_>,
        places: Range<usize>,
        largest: &mut [f32],
    ) {
        self.cosines(isa, geometry, micro, taking, places);
        let stride = micro.columns + SKEW;
        isa.run(Largest {
            cosines: &self.cosines.floats()[..self.rows * stride],
            stride,
            terms: micro.terms(),
            largest,
            targets: &self.targets,
        });
    }

    /// Adds the terms' weighted sum of rows to `[batch, padded]`.
    pub fn add_to_embeddings(&mut self, isa: Isa, geometry: Geometry, micro: &Micro, out: &mut [f32]) {
        let Geometry { padded, format, .. } = geometry;
        let stride = micro.columns + SKEW;
        let (left, right): (Left<'_>, Right<'_>);
        let inner = self.rows.div_ceil(format.per_word());
        match format {
            Format::F32 => {
                left = columns_of(self.cosines.words(), stride);
                right = panels_of(self.unit.words(), padded + SKEW);
            }
            Format::Bf16 => {
                if !self.rows.is_multiple_of(2) {
                    self.cosines.floats_mut()[self.rows * stride..][..stride].fill(0.0);
                }
                self.terms.reserve(inner * stride);
                let rows = self.cosines.floats().chunks_exact(2 * stride);
                let words = self.terms.words_mut().chunks_exact_mut(stride);
                for (rows, words) in rows.zip(words).take(inner) {
                    let (first, second) = rows.split_at(stride);
                    isa.run(PairRows { first, second, words });
                }
                left = columns_of(self.terms.words(), stride);
                right = panels_of(self.pairs.words(), padded + SKEW);
            }
        }
        let shape = Shape {
            rows: micro.batch,
            columns: padded,
            inner,
        };
        let out = Out {
            values: out,
            row: padded,
            add: true,
        };
        multiply(isa, format, shape, left, right, out, Order::PanelsFirst);
    }

    /// Forgets the terms of places whose class took no part in this micro-batch.
    pub fn forget_absent(&mut self, micro: &Micro, taking: Taking<'_>, places: Range<usize>) {
        let Some(classes) = &micro.classes else { return };
        let stride = micro.columns + SKEW;
        for (place, row) in places.zip(self.cosines.floats_mut().chunks_exact_mut(stride)) {
            if classes.binary_search(&(taking.row(place) as u32)).is_err() {
                row.fill(0.0);
            }
        }
    }

    /// Leaves the terms to the update, of as many of the chunk's first rows as `kept` has.
    pub fn leave(&self, isa: Isa, geometry: Geometry, micro: &Micro, kept: &mut RowsMut<'_>) {
        let kept = kept.take(self.rows);
        let rows = kept.inverse.len();
        kept.inverse.copy_from_slice(&self.inverse[..rows]);
        let words = kept.words.chunks_exact_mut(kept.stride);
        let cosines = self.cosines.words().chunks_exact(micro.columns + SKEW);
        match geometry.format {
            Format::F32 => cosines
                .zip(words)
                .for_each(|(row, words)| words[..micro.columns].copy_from_slice(&row[..micro.columns])),
            Format::Bf16 => pair_terms(isa, micro, self.cosines.floats(), words),
        }
    }

    /// Gradient by rows whose terms were left by the other pass: nothing need be loaded.
    pub fn gradient_of(
        &mut self,
        isa: Isa,
        geometry: Geometry,
        micro: &Micro,
        taking: Taking<'_>,
        places: Range<usize>,
        kept: Rows<'_>,
    ) {
        self.rows = places.len();
        self.inverse.clear();
        self.inverse.extend_from_slice(kept.inverse);
        self.note_targets(micro, taking, places);
        let left = rows_of(kept.words, kept.stride);
        weigh(isa, geometry, micro, self.rows, left, &mut self.gradient, false);
        self.add_targets(isa, geometry, micro);
    }

    /// Gradient by the loaded rows, from the terms; adds to that of earlier micro-batches.
    pub fn gradient(&mut self, isa: Isa, geometry: Geometry, micro: &Micro, add: bool) {
        let left = match geometry.format {
            Format::F32 => rows_of(self.cosines.words(), micro.columns + SKEW),
            Format::Bf16 => {
                let half = micro.columns / 2 + SKEW;
                self.terms.reserve(self.rows * half);
                let words = self.terms.words_mut().chunks_exact_mut(half).take(self.rows);
                pair_terms(isa, micro, self.cosines.floats(), words);
                rows_of(self.terms.words(), half)
            }
        };
        weigh(isa, geometry, micro, self.rows, left, &mut self.gradient, add);
        self.add_targets(isa, geometry, micro);
    }

    /// Adds what the targets' own terms give.
    fn add_targets(&mut self, isa: Isa, geometry: Geometry, micro: &Micro) {
        for index in 0..self.targets.len() {
            let (row, sample) = self.targets[index];
            let factor = (micro.targets[self.first_target + index].gradient * micro.share) as f32;
            let unit = &micro.unit_row(sample, geometry)[..geometry.dim];
            let out = self.gradient_row(row, geometry);
            isa.run(AddScaled {
                out,
                row: unit,
                factor,
            });
        }
    }

    /// The gradient of a row of the chunk.
    pub fn gradient_row(&mut self, row: usize, geometry: Geometry) -> &mut [f32] {
        &mut self.gradient.floats_mut()[row * (geometry.padded + SKEW)..][..geometry.dim]
    }
}

/// Rows of terms in pairs of neighbours, as bf16.
fn pair_terms<'a>(isa: Isa, micro: &Micro, terms: &[f32], words: impl Iterator<Item = &'a mut [u32]>) {
    let rows = terms.chunks_exact(micro.columns + SKEW);
    for (row, words) in rows.zip(words) {
        let halves = bytemuck::cast_slice_mut(&mut words[..micro.columns / 2]);
        let row = &row[..micro.columns];
        isa.run(PairNeighbours { row, halves });
    }
}

/// Embeddings weighted by terms, `(+)=` into `gradient`.
fn weigh(
    isa: Isa,
    geometry: Geometry,
    micro: &Micro,
    rows: usize,
    left: Left<'_>,
    gradient: &mut Buffer,
    add: bool,
) {
    let Geometry { padded, format, .. } = geometry;
    let (right, inner) = micro.for_gradient(geometry);
    gradient.reserve(rows * (padded + SKEW));
    let shape = Shape {
        rows,
        columns: padded,
        inner,
    };
    let out = Out {
        values: gradient.floats_mut(),
        row: padded + SKEW,
        add,
    };
    multiply(isa, format, shape, left, right, out, Order::RowsFirst);
}

/// A matrix `[k, stride]` as the right operand.
fn panels_of(words: &[u32], stride: usize) -> Right<'_> {
    Right {
        words,
        panel: super::kernel::gemm::PANEL,
        step: stride,
    }
}

//! The passes over all classes that take part, on all threads: the softmax with the gradient of embeddings, and the
//! update of weights. Work is cut into *lanes* by the shapes alone, each lane goes through its rows in order, and lanes are
//! added up in order: results depend neither on the number of threads nor on their timing.

use super::{
    buffer::Buffer,
    chunk::{Chunk, Taking, Use, Weights},
    kept::Kept,
    kernel::{
        gemm::Format,
        isa::Isa,
        rows::{AdamWRow, AdamWStep, MakeUp, RowMap, SgdRow},
    },
    micro::{Geometry, Micro},
};
use crate::head::lazy_sgd::History;
use rayon::prelude::*;
use std::{ops::Range, sync::Mutex};

/// Rows of a chunk.
#[derive(Clone, Copy, Debug)]
struct ChunkRows {
    /// In the pass for embeddings.
    embeddings: usize,
    /// In the update, which has no sums.
    update: usize,
}

impl ChunkRows {
    /// With the sums of the pass for embeddings they fill most of a second-level cache of 1 MB. A multiple of the kernels' 12 rows.
    const OF_VECTORS: Self = Self {
        embeddings: 120,
        update: 48,
    };
    /// A multiple of two tiles' rows. Sums are read and written once a chunk, which costs more beside products that take a fraction of the
    /// time; and processors with tiles have caches of 2 MB.
    const OF_TILES: Self = Self {
        embeddings: 256,
        update: 64,
    };
}

/// Most lanes, and so most threads that help.
const MOST_LANES: usize = 32;
/// Elements of all lanes' sums at most, unless that makes too few lanes.
const LANE_ELEMENTS: usize = 16 << 20;

/// The threads of a head, with their scratch.
pub struct Threads {
    pool: rayon::ThreadPool,
    chunks: Vec<Mutex<Chunk>>,
    lanes: Vec<Lane>,
    pub(super) kept: Kept,
    isa: Isa,
    geometry: Geometry,
    rows: ChunkRows,
}

/// What a lane adds up.
#[derive(Default)]
struct Lane {
    /// `[batch, padded]`: gradient of embeddings of length 1, not yet divided by the sums.
    embeddings: Buffer,
    /// Sums of terms by sample.
    sums: Vec<f64>,
    largest: Vec<f32>,
}

/// Updates every row that took part, and whatever the rule does to the others.
pub enum Rule<'a> {
    /// SGD; `momentum` is the buffer of all rows.
    Sgd {
        /// Momentum of every row.
        momentum: &'a mut [f32],
        /// For sampled heads: when each row was touched last.
        lazy: Option<(&'a mut [u32], &'a History)>,
        /// Learning rate.
        lr: f32,
        /// Momentum's factor.
        mu: f32,
        /// Weight decay.
        decay: f32,
    },
    /// AdamW: rows that took no part have gradient 0 and are updated too.
    AdamW {
        /// Mean of the gradient.
        mean: &'a mut [f32],
        /// Mean of its square.
        mean_sq: &'a mut [f32],
        /// The step's numbers.
        step: AdamWStep,
    },
}

impl Threads {
    /// As many threads as given, at least one; between a pass for embeddings and the update terms may take so many bytes.
    pub fn new(threads: usize, isa: Isa, geometry: Geometry, room: usize) -> Self {
        let threads = threads.max(1);
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|index| format!("head-{index}"))
            .build()
            .expect("a process that cannot start threads cannot train");
        Self {
            pool,
            chunks: (0..threads).map(|_| Mutex::default()).collect(),
            lanes: Vec::new(),
            kept: Kept::new(room),
            isa,
            geometry,
            rows: match isa.has_tiles() && geometry.format == Format::Bf16 {
                true => ChunkRows::OF_TILES,
                false => ChunkRows::OF_VECTORS,
            },
        }
    }

    /// Instructions they use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Softmax over the rows that take part: adds up each sample's terms, and the rows weighted by them. `sums` has
    /// `batch` numbers, `embeddings` is `[batch, dim]`. `keep`: an update with this micro-batch alone may follow.
    pub fn softmax(
        &mut self,
        weights: Weights<'_>,
        taking: Taking<'_>,
        micro: &Micro,
        sums: &mut [f64],
        embeddings: &mut [f32],
        keep: bool,
    ) {
        let (isa, geometry, rows_of_chunk) = (self.isa, self.geometry, self.rows.embeddings);
        let count = lanes(taking.len(), micro.batch * geometry.padded, rows_of_chunk);
        self.lanes.resize_with(count.max(self.lanes.len()), Lane::default);
        let (lanes, chunks) = (&mut self.lanes[..count], &self.chunks);
        let kept_places = if keep { taking.len() } else { 0 };
        let parts = (0..count).map(|index| part(taking.len(), count, index));
        let mut kept = self
            .kept
            .begin(kept_places, micro.columns, geometry.format, parts);
        self.pool.install(|| {
            lanes
                .par_iter_mut()
                .zip(&mut kept)
                .enumerate()
                .with_max_len(1)
                .for_each(|(index, (lane, kept))| {
                    let mut chunk = own(chunks);
                    let elements = micro.batch * geometry.padded;
                    lane.embeddings.reserve(elements);
                    let out = &mut lane.embeddings.floats_mut()[..elements];
                    out.fill(0.0);
                    lane.sums.clear();
                    lane.sums.resize(micro.batch, 0.0);
                    for places in pieces(part(taking.len(), count, index), rows_of_chunk) {
                        chunk.load(isa, geometry, &weights, taking, places.clone(), Use::Embeddings);
                        chunk.exponentials(isa, geometry, micro, taking, places);
                        for (sum, of_chunk) in lane.sums.iter_mut().zip(&chunk.sums) {
                            *sum += f64::from(*of_chunk);
                        }
                        chunk.leave(isa, geometry, micro, kept);
                        chunk.add_to_embeddings(isa, geometry, micro, out);
                    }
                });
            sums.fill(0.0);
            for lane in lanes.iter() {
                sums.iter_mut()
                    .zip(&lane.sums)
                    .for_each(|(sum, of_lane)| *sum += of_lane);
            }
            let rows = embeddings.par_chunks_mut(geometry.dim).enumerate();
            rows.with_min_len(8).for_each(|(sample, row)| {
                row.fill(0.0);
                for lane in lanes.iter() {
                    let of_lane = &lane.embeddings.floats()[sample * geometry.padded..];
                    row.iter_mut().zip(of_lane).for_each(|(sum, value)| *sum += value);
                }
            });
        });
    }

    /// Largest logit, in base 2, of every sample with the other classes.
    pub fn largest(&mut self, weights: Weights<'_>, taking: Taking<'_>, micro: &Micro, largest: &mut [f32]) {
        let (isa, geometry, rows_of_chunk) = (self.isa, self.geometry, self.rows.embeddings);
        let count = lanes(taking.len(), micro.batch * geometry.padded, rows_of_chunk);
        self.lanes.resize_with(count.max(self.lanes.len()), Lane::default);
        let (lanes, chunks) = (&mut self.lanes[..count], &self.chunks);
        self.pool.install(|| {
            lanes
                .par_iter_mut()
                .enumerate()
                .with_max_len(1)
                .for_each(|(index, lane)| {
                    let mut chunk = own(chunks);
                    lane.largest.clear();
                    lane.largest.resize(micro.columns, f32::NEG_INFINITY);
                    for places in pieces(part(taking.len(), count, index), rows_of_chunk) {
                        chunk.load(isa, geometry, &weights, taking, places.clone(), Use::Cosines);
                        chunk.largest(isa, geometry, micro, taking, places, &mut lane.largest);
                    }
                });
        });
        for lane in lanes.iter() {
            let both = largest.iter_mut().zip(&lane.largest);
            both.for_each(|(largest, of_lane)| *largest = largest.max(*of_lane));
        }
    }

    /// Forms the gradient of the rows that took part in any of the micro-batches, and updates them, tile by tile.
    pub fn update(&mut self, weight: &mut [f32], rule: Rule<'_>, taking: Taking<'_>, micros: &[Micro]) {
        let (isa, geometry, chunks, kept) = (self.isa, self.geometry, &self.chunks, &self.kept);
        let rows_of_chunk = self.rows.update;
        let regions = regions(weight, rule, taking, geometry.dim, rows_of_chunk);
        self.pool.install(|| {
            regions.into_par_iter().with_max_len(1).for_each(|mut region| {
                let mut chunk = own(chunks);
                for places in pieces(region.places.clone(), rows_of_chunk) {
                    match (micros, kept.rows(places.clone())) {
                        ([micro], Some(kept)) => {
                            chunk.gradient_of(isa, geometry, micro, taking, places.clone(), kept);
                        }
                        _ => {
                            let (weights, places) = (region.weights(), places.clone());
                            gradient_of_all(&mut chunk, isa, geometry, &weights, taking, places, micros);
                        }
                    }
                    for place in places.clone() {
                        let inverse = chunk.inverse[place - places.start];
                        let gradient = chunk.gradient_row(place - places.start, geometry);
                        region.update(isa, geometry.dim, taking.row(place), gradient, inverse);
                    }
                }
                region.finish(isa, geometry.dim);
            });
        });
    }

    /// Brings rows that were touched before `before` up to date.
    pub fn make_up(
        &mut self,
        weight: &mut [f32],
        momentum: &mut [f32],
        since: &mut [u32],
        history: &History,
        before: u32,
    ) {
        let (isa, dim) = (self.isa, self.geometry.dim);
        let rows = weight
            .par_chunks_mut(dim)
            .zip(momentum.par_chunks_mut(dim))
            .zip(since);
        self.pool.install(|| {
            rows.with_min_len(64).for_each(|((weight, momentum), since)| {
                if *since < before {
                    if let Some(map) = history.missed(*since) {
                        let missed = RowMap::of(map);
                        isa.run(MakeUp {
                            weight,
                            momentum,
                            missed,
                        });
                    }
                    *since = history.now();
                }
            });
        });
    }
}

/// Gradient by the rows at these places, from terms that are made for it.
fn gradient_of_all(
    chunk: &mut Chunk,
    isa: Isa,
    geometry: Geometry,
    weights: &Weights<'_>,
    taking: Taking<'_>,
    places: Range<usize>,
    micros: &[Micro],
) {
    chunk.load(isa, geometry, weights, taking, places.clone(), Use::Cosines);
    for (index, micro) in micros.iter().enumerate() {
        chunk.exponentials(isa, geometry, micro, taking, places.clone());
        if micros.len() > 1 {
            chunk.forget_absent(micro, taking, places.clone());
        }
        chunk.gradient(isa, geometry, micro, index > 0);
    }
}

/// This thread's scratch.
fn own(chunks: &[Mutex<Chunk>]) -> std::sync::MutexGuard<'_, Chunk> {
    let index = rayon::current_thread_index().expect("only threads of the pool come here");
    chunks[index]
        .lock()
        .expect("a pass that panicked ended the process' training")
}

/// Lanes for so many rows, with sums of so many elements each, in chunks of so many rows.
fn lanes(rows: usize, elements: usize, rows_of_chunk: usize) -> usize {
    let by_memory = (LANE_ELEMENTS / elements.max(1)).max(4);
    rows.div_ceil(2 * rows_of_chunk)
        .clamp(1, MOST_LANES.min(by_memory))
}

/// The `index`-th of `count` parts of `0..len`.
fn part(len: usize, count: usize, index: usize) -> Range<usize> {
    len * index / count..len * (index + 1) / count
}

/// A range in pieces of `size`, the last one shorter.
fn pieces(range: Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range
        .step_by(size)
        .map(move |start| start..(start + size).min(end))
}

/// The rows from the first of a lane's to the first of the next lane's, with all that belongs to them.
struct Region<'a> {
    places: Range<usize>,
    first: usize,
    weight: &'a mut [f32],
    rule: Rule<'a>,
    /// The row after the last updated one.
    next: usize,
}

fn regions<'a>(
    weight: &'a mut [f32],
    rule: Rule<'a>,
    taking: Taking<'_>,
    dim: usize,
    rows_of_chunk: usize,
) -> Vec<Region<'a>> {
    // More than there are lanes in the other pass: nothing is added up here, and small parts balance better.
    let count = taking.len().div_ceil(2 * rows_of_chunk).clamp(1, 4 * MOST_LANES);
    let rows = weight.len() / dim.max(1);
    let mut regions = Vec::with_capacity(count);
    let (mut weight, mut rule, mut first) = (weight, rule, 0);
    for index in 0..count {
        let places = part(taking.len(), count, index);
        let end = match index + 1 == count {
            true => rows,
            false => taking.row(places.end),
        };
        let (own_weight, other_weight) = weight.split_at_mut((end - first) * dim);
        let (own_rule, other_rule) = rule.split((end - first) * dim, end - first);
        regions.push(Region {
            places,
            first,
            weight: own_weight,
            rule: own_rule,
            next: first,
        });
        (weight, rule, first) = (other_weight, other_rule, end);
    }
    regions
}

impl<'a> Rule<'a> {
    /// The first so many elements, or rows, and the rest.
    fn split(self, elements: usize, rows: usize) -> (Self, Self) {
        match self {
            Self::Sgd {
                momentum,
                lazy,
                lr,
                mu,
                decay,
            } => {
                let (own, other) = momentum.split_at_mut(elements);
                let (own_lazy, other_lazy) = lazy.map_or((None, None), |(since, history)| {
                    let (own, other) = since.split_at_mut(rows);
                    (Some((own, history)), Some((other, history)))
                });
                let sgd = |momentum, lazy| Self::Sgd {
                    momentum,
                    lazy,
                    lr,
                    mu,
                    decay,
                };
                (sgd(own, own_lazy), sgd(other, other_lazy))
            }
            Self::AdamW { mean, mean_sq, step } => {
                let (own, other) = mean.split_at_mut(elements);
                let (own_sq, other_sq) = mean_sq.split_at_mut(elements);
                let adamw = |mean, mean_sq| Self::AdamW { mean, mean_sq, step };
                (adamw(own, own_sq), adamw(other, other_sq))
            }
        }
    }
}

impl Region<'_> {
    fn weights(&self) -> Weights<'_> {
        let (momentum, lazy): (&[f32], _) = match &self.rule {
            Rule::Sgd { momentum, lazy, .. } => (
                momentum,
                lazy.as_ref().map(|(since, history)| (&**since, *history)),
            ),
            Rule::AdamW { .. } => (&[], None),
        };
        Weights {
            first: self.first,
            weight: self.weight,
            momentum,
            lazy,
        }
    }

    /// Updates a row, after those before it.
    fn update(&mut self, isa: Isa, dim: usize, row: usize, grad_unit: &[f32], inverse: f32) {
        self.pass_over(isa, dim, row);
        let at = row - self.first;
        let span = at * dim..(at + 1) * dim;
        let weight = &mut self.weight[span.clone()];
        match &mut self.rule {
            Rule::Sgd {
                momentum,
                lazy,
                lr,
                mu,
                decay,
            } => {
                let missed = lazy.as_mut().and_then(|(since, history)| {
                    let missed = history.missed(since[at]).map(RowMap::of);
                    since[at] = history.now() + 1;
                    missed
                });
                isa.run(SgdRow {
                    grad_unit,
                    inverse,
                    weight,
                    momentum: &mut momentum[span],
                    missed,
                    lr: *lr,
                    mu: *mu,
                    decay: *decay,
                });
            }
            Rule::AdamW { mean, mean_sq, step } => isa.run(AdamWRow {
                grad_unit: Some((grad_unit, inverse)),
                weight,
                mean: &mut mean[span.clone()],
                mean_sq: &mut mean_sq[span],
                step: *step,
            }),
        }
        self.next = row + 1;
    }

    /// Rows without gradient before `row`.
    fn pass_over(&mut self, isa: Isa, dim: usize, row: usize) {
        let rows = self.next - self.first..row - self.first;
        if let Rule::AdamW { mean, mean_sq, step } = &mut self.rule {
            let span = rows.start * dim..rows.end * dim;
            isa.run(AdamWRow {
                grad_unit: None,
                weight: &mut self.weight[span.clone()],
                mean: &mut mean[span.clone()],
                mean_sq: &mut mean_sq[span],
                step: *step,
            });
        }
        self.next = row;
    }

    /// Rows without gradient at the end.
    fn finish(&mut self, isa: Isa, dim: usize) {
        let end = self.first + self.weight.len() / dim.max(1);
        self.pass_over(isa, dim, end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_everything_once() {
        for len in [0, 1, 5, 1000, 1001] {
            for count in [1, 3, 32] {
                let all: Vec<usize> = (0..count).flat_map(|index| part(len, count, index)).collect();
                assert_eq!(all, (0..len).collect::<Vec<_>>());
            }
            let all: Vec<usize> = pieces(0..len, 7).flatten().collect();
            assert_eq!(all, (0..len).collect::<Vec<_>>());
        }
        assert_eq!(lanes(0, 0, 120), 1);
        assert_eq!(lanes(1 << 20, 128 * 512, 120), MOST_LANES);
        assert_eq!(lanes(1 << 20, 1 << 24, 120), 4);
    }
}

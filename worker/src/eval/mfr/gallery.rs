//! Features of length 1, images of one person next to each other, and the scores of all their pairs: tile by tile, so that the
//! matrix of all scores is never in memory. A score is the cosine in f32.
//!
//! Tensor names end in their shape: n images, d values of a feature.

use super::MfrError;
use crate::eval::ijb::ImageFeatures;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

/// Images on each side of a tile: its scores (4 MiB) and both of its blocks of features stay near the processor.
const TILE: usize = 1024;

/// Takes the scores of pairs as they come.
pub trait Counter: Send {
    /// Scores of one image with images of the same person, and of others.
    fn add(&mut self, genuine: &[f32], impostor: &[f32]);
}

/// Images that are compared with each other.
#[derive(Debug)]
pub struct Gallery {
    emb_nd: Tensor,
    /// For each row, one past the last row of the same person.
    ends: Vec<u32>,
    identities: usize,
    genuine: u64,
}

impl Gallery {
    /// Brings features to length 1, after adding the mirror images' to them with `flip`, and orders them by label.
    ///
    /// # Panics
    /// If there is not one label an image, or `flip` without features of mirror images.
    pub fn new(features: &dyn ImageFeatures, labels: &[i64], flip: bool) -> Result<Self, MfrError> {
        let images = features.images();
        assert_eq!(labels.len(), images, "one label an image");
        if u32::try_from(images).is_err() {
            return Err(MfrError::TooMany { images });
        }
        let mut order: Vec<u32> = (0..images as u32).collect();
        order.sort_by_key(|&image| labels[image as usize]);
        let dim = features.dim();
        let mut values = vec![0f32; images * dim];
        values.par_chunks_mut(dim.max(1)).zip(&order).try_for_each_init(
            || vec![0f32; dim],
            |mirrored, (out, &image)| {
                let image = image as usize;
                features.read(image, false, out);
                if flip {
                    features.read(image, true, mirrored);
                    out.iter_mut().zip(&*mirrored).for_each(|(a, b)| *a += b);
                }
                unit(out).map_err(|what| MfrError::Feature { row: image, what })
            },
        )?;
        let emb_nd = Tensor::from_slice(&values).view([images as i64, dim as i64]);
        let mut ends = Vec::with_capacity(images);
        let (mut identities, mut genuine) = (0, 0);
        for person in order.chunk_by(|&a, &b| labels[a as usize] == labels[b as usize]) {
            let end = ends.len() + person.len();
            // Below the number of images, which is a u32.
            ends.resize(end, end as u32);
            identities += 1;
            genuine += pairs(person.len());
        }
        Ok(Self {
            emb_nd,
            ends,
            identities,
            genuine,
        })
    }

    /// Images.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// True without images.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Persons.
    pub fn identities(&self) -> usize {
        self.identities
    }

    /// Pairs of the same person.
    pub fn genuine(&self) -> u64 {
        self.genuine
    }

    /// Pairs of different persons.
    pub fn impostor(&self) -> u64 {
        pairs(self.len()) - self.genuine
    }

    /// Gives the score of every pair to one of the counters, in the same order and with the same bits at each call. `done`
    /// is told after each tile how many pairs it had.
    ///
    /// # Panics
    /// Without a counter.
    pub fn scan<C: Counter>(&self, counters: &mut [C], done: &mut dyn FnMut(u64)) {
        let _guard = tch::no_grad_guard();
        let ends = self.ends.as_slice();
        let place = Tensor::empty([(TILE * TILE) as i64], (Kind::Float, Device::Cpu));
        let mut scores = vec![0f32; TILE * TILE];
        for first in (0..self.len()).step_by(TILE) {
            let rows = TILE.min(self.len() - first);
            let block_nd = self.block(first, rows);
            for start in (first..self.len()).step_by(TILE) {
                let columns = TILE.min(self.len() - start);
                let scores = &mut scores[..rows * columns];
                let tile_nn = place
                    .narrow(0, 0, scores.len() as i64)
                    .view([rows as i64, columns as i64]);
                let tile_nn = block_nd.mm_out(&tile_nn, &self.block(start, columns).tr());
                tile_nn.copy_data(scores, rows * columns);
                let share = rows.div_ceil(counters.len());
                scores
                    .par_chunks(share * columns)
                    .zip(&mut *counters)
                    .enumerate()
                    .for_each(|(part, (scores, counter))| {
                        for (image, row) in (first + part * share..).zip(scores.chunks(columns)) {
                            count(ends, image, start, row, counter);
                        }
                    });
                done(match start == first {
                    true => pairs(rows),
                    false => (rows * columns) as u64,
                });
            }
        }
    }

    fn block(&self, first: usize, rows: usize) -> Tensor {
        self.emb_nd.narrow(0, first as i64, rows as i64)
    }
}

/// Counts the scores of an image with the images from `start` on, of which those behind it are not yet counted.
fn count(ends: &[u32], image: usize, start: usize, scores: &[f32], counter: &mut impl Counter) {
    let column = |other: usize| other.clamp(start, start + scores.len()) - start;
    let (next, end) = (column(image + 1), column(ends[image] as usize));
    counter.add(&scores[next..end], &scores[end..]);
}

fn pairs(images: usize) -> u64 {
    let images = images as u64;
    images * images.saturating_sub(1) / 2
}

/// Brings a feature to length 1; says what is wrong with one that has no direction.
fn unit(feature: &mut [f32]) -> Result<(), &'static str> {
    let square: f64 = feature.iter().map(|&value| f64::from(value).powi(2)).sum();
    if !square.is_finite() {
        return Err("is not finite");
    }
    if square == 0.0 {
        return Err("is all zeros");
    }
    let factor = square.sqrt().recip();
    for value in feature {
        *value = (f64::from(*value) * factor) as f32;
    }
    Ok(())
}

//! Random initial weights: every element is a function of (seed, parameter name, index), so that all ranks start
//! equal without a broadcast, and any number of threads draws the same.

use rayon::prelude::*;
use tch::Tensor;

use super::{
    fill::fnv1a64,
    state::{Init, StateEntry},
};
use crate::random::{self, Purpose};

/// The first value of one entry, in its shape; f32, or i64 for integer buffers.
pub(super) fn draw(seed: u64, entry: &StateEntry) -> Tensor {
    let stream = fnv1a64(&entry.name);
    let init = entry.init;
    let element = move |i: usize| match init {
        Init::Constant(value) => value,
        Init::Normal { std } => std * random::normal(seed, Purpose::BackboneInit, stream, i as u64),
        Init::Uniform { bound } => {
            bound * (2.0 * random::uniform(seed, Purpose::BackboneInit, stream, i as u64) - 1.0)
        }
    };
    tabulate(&entry.tensor, element)
}

/// A tensor of the shape and kind of `like` from a function of the flat row-major index.
pub(super) fn tabulate(like: &Tensor, element: impl Fn(usize) -> f64 + Sync) -> Tensor {
    let mut values = vec![0f32; like.numel()];
    const CHUNK: usize = 1 << 14;
    values
        .par_chunks_mut(CHUNK)
        .enumerate()
        .for_each(|(chunk, part)| {
            for (i, value) in part.iter_mut().enumerate() {
                *value = element(chunk * CHUNK + i) as f32;
            }
        });
    Tensor::from_slice(&values)
        .view(like.size().as_slice())
        .to_kind(like.kind())
}

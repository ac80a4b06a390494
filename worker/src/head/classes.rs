//! A shard's classes in one micro-batch: are the labels classes, which classes take part, in which column is each
//! row's own; and the weights that classes start with. The same for every head.

use super::{HeadError, sampling::ClassSampler};
use crate::random::{Purpose, normal};
use arcface_proto::types::ClassRange;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

/// Standard deviation of the initial weights.
pub(super) const INIT_STD: f64 = 0.01;

/// Refuses labels that are no class, naming the first; every rank sees the same rows and fails alike.
pub(super) fn check_labels(num_classes: u32, labels: &[i64], rows: &[u32]) -> Result<(), HeadError> {
    let mut labels = labels.iter();
    for (rank, &rows_of_rank) in (0u32..).zip(rows) {
        for (row, &label) in (0..rows_of_rank).zip(&mut labels) {
            if !(0..i64::from(num_classes)).contains(&label) {
                return Err(HeadError::LabelOutOfRange {
                    label,
                    rank,
                    row,
                    num_classes,
                });
            }
        }
    }
    Ok(())
}

/// The classes of a shard that take part in a step.
pub(super) struct Chosen {
    /// Local indices, rising; `None` is all of them.
    pub(super) classes: Option<Vec<u32>>,
    /// For each row the column of its class among them, or -1.
    pub(super) targets: Vec<i64>,
    /// How many classes rows have here.
    pub(super) positives: u32,
}

impl Chosen {
    /// Classes that take part, of a shard of `rows`.
    pub(super) fn sampled(&self, rows: u32) -> u32 {
        self.classes
            .as_ref()
            .map_or(rows, |classes| u32::try_from(classes.len()).unwrap_or(rows))
    }
}

/// The classes of a shard that rows have, local and rising.
pub(super) fn positives(shard: ClassRange, labels: &[i64]) -> Vec<u32> {
    let mut positives: Vec<u32> = labels.iter().filter_map(|&label| local(shard, label)).collect();
    positives.sort_unstable();
    positives.dedup();
    positives
}

/// A class counted from the shard's first, if it is there.
fn local(shard: ClassRange, label: i64) -> Option<u32> {
    match u32::try_from(label) {
        Ok(class) if (shard.lo..shard.hi).contains(&class) => Some(class - shard.lo),
        _ => None,
    }
}

/// Asks the sampler, and finds each row's class.
pub(super) fn choose(
    sampler: &mut dyn ClassSampler,
    step: u64,
    shard: ClassRange,
    labels: &[i64],
) -> Result<Chosen, HeadError> {
    let positives = positives(shard, labels);
    let count = u32::try_from(positives.len()).unwrap_or(u32::MAX);
    let Some(classes) = sampler.sample(step, shard, &positives) else {
        let targets = labels
            .iter()
            .map(|&label| local(shard, label).map_or(-1, i64::from));
        return Ok(Chosen {
            classes: None,
            targets: targets.collect(),
            positives: count,
        });
    };
    let fault = |detail: String| HeadError::Sampling { step, detail };
    if !classes.windows(2).all(|w| w[0] < w[1]) || classes.last().is_some_and(|&c| c >= shard.len()) {
        return Err(fault(format!(
            "classes are not rising indices below {}",
            shard.len()
        )));
    }
    let column = |label: i64| match local(shard, label) {
        None => Ok(-1),
        Some(class) => match classes.binary_search(&class) {
            Ok(column) => Ok(column as i64),
            Err(_) => Err(fault(format!("class {label} of the batch was left out"))),
        },
    };
    let targets: Result<Vec<i64>, HeadError> = labels.iter().map(|&label| column(label)).collect();
    Ok(Chosen {
        targets: targets?,
        classes: Some(classes),
        positives: count,
    })
}

/// `[n, width]`, normal draws counted by (class, place in its row): the same weights at every world size.
pub(super) fn initial_weight(seed: u64, shard: ClassRange, width: i64) -> Tensor {
    /// Rows drawn at a time: bounds the copy beside the weights.
    const BLOCK: usize = 16 * 1024;
    let weight = Tensor::zeros([i64::from(shard.len()), width], (Kind::Float, Device::Cpu));
    let row_length = width.max(1) as usize;
    let classes: Vec<u32> = (shard.lo..shard.hi).collect();
    for (block, classes) in classes.chunks(BLOCK).enumerate() {
        let mut values = vec![0f32; classes.len() * row_length];
        values
            .par_chunks_mut(row_length)
            .zip(classes)
            .for_each(|(row, &class)| {
                for (place, value) in (0u64..).zip(row) {
                    *value = (INIT_STD * normal(seed, Purpose::HeadInit, u64::from(class), place)) as f32;
                }
            });
        let values = Tensor::from_slice(&values).view([-1, width]);
        let first = (block * BLOCK) as i64;
        weight.narrow(0, first, classes.len() as i64).copy_(&values);
    }
    weight
}

/// The values of an i64 tensor.
pub(super) fn to_vec(tensor: &Tensor) -> Vec<i64> {
    let mut values = vec![0i64; tensor.numel()];
    tensor.copy_data(&mut values, tensor.numel());
    values
}

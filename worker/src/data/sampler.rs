//! Which image is trained on when. Pure: a function of (seed, epoch, step) and, for the cut, of rank and world.
//!
//! An epoch is a permutation of the whole set; the global batch of step s is positions `s*G .. (s+1)*G` of it,
//! whatever the world size, and the ranks cut that range among them. So a job that resumes at another world size
//! goes on with the same samples. The permutation is a Feistel network with cycle walking: any position is
//! computed alone, no list of all images is kept (40 million images would be 320 MB a rank).

use std::ops::Range;

use crate::random::{Purpose, bits, mix};

/// Rounds of the Feistel network: 4 make a pseudo-random permutation (Luby and Rackoff 1988); 6 leave a margin
/// for the small domains here.
const ROUNDS: u64 = 6;

/// Why a job's numbers make no epoch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SamplerError {
    /// Not one full step.
    #[error("the data set has {num_image} images, fewer than one global batch of {global_batch}")]
    TooFewImages {
        /// Images of the set.
        num_image: u64,
        /// Samples of one step over all ranks.
        global_batch: u64,
    },
    /// No samples a step.
    #[error("the global batch is 0")]
    EmptyBatch,
}

/// The order of the samples for the life of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Epochs {
    num_image: u64,
    global_batch: u64,
    seed: u64,
}

/// One rank's part of one micro-batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MicroBatch {
    /// Epoch, from 0.
    pub epoch: u64,
    /// Step since the beginning of the job, from 0.
    pub step: u64,
    /// Micro-batch in the step, from 0.
    pub micro: u32,
    /// Position of the first row in the epoch: row i is position `first_position + i`, at every world size.
    pub first_position: u64,
    /// Image indices, in order of position; may be empty where the numbers do not divide.
    pub indices: Vec<u64>,
}

impl Epochs {
    /// An order over `num_image` images in steps of `global_batch` samples.
    pub fn new(num_image: u64, global_batch: u64, seed: u64) -> Result<Self, SamplerError> {
        if global_batch == 0 {
            return Err(SamplerError::EmptyBatch);
        }
        if num_image < global_batch {
            return Err(SamplerError::TooFewImages {
                num_image,
                global_batch,
            });
        }
        Ok(Self {
            num_image,
            global_batch,
            seed,
        })
    }

    /// Full steps in an epoch; the rest of the images (fewer than a global batch, other ones each epoch) waits for
    /// the next, as in the reference (`drop_last`).
    pub fn steps_per_epoch(&self) -> u64 {
        self.num_image / self.global_batch
    }

    /// Samples of a step over all ranks.
    pub fn global_batch(&self) -> u64 {
        self.global_batch
    }

    /// Image at position `k` of an epoch; `k` below the number of images.
    pub fn position(&self, epoch: u64, k: u64) -> u64 {
        debug_assert!(k < self.num_image);
        let half_bits = (64 - (self.num_image - 1).leading_zeros()).div_ceil(2).max(1);
        let mut x = k;
        // Walking the cycle of a permutation of [0, 4^half_bits) until it re-enters [0, n) permutes [0, n): fewer
        // than four tries on average.
        loop {
            x = self.feistel(epoch, half_bits, x);
            if x < self.num_image {
                return x;
            }
        }
    }

    fn feistel(&self, epoch: u64, half_bits: u32, x: u64) -> u64 {
        let mask = (1u64 << half_bits) - 1;
        let (mut left, mut right) = (x >> half_bits, x & mask);
        for round in 0..ROUNDS {
            let key = bits(self.seed, Purpose::SampleOrder, epoch, round);
            (left, right) = (right, left ^ (mix(key ^ right) & mask));
        }
        (left << half_bits) | right
    }

    /// Micro-batches that every rank takes in a step: as many as the rank with the most rows needs at
    /// `batch_size` rows each.
    pub fn micro_batches(&self, world_size: u32, batch_size: u32) -> u32 {
        let most_rows = self.global_batch.div_ceil(u64::from(world_size.max(1)));
        let count = most_rows.div_ceil(u64::from(batch_size.max(1)));
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    /// Rows of every rank in one micro-batch, as all ranks compute it alike. Their sum over the micro-batches is the
    /// global batch.
    pub fn rows(&self, world_size: u32, batch_size: u32, micro: u32) -> Vec<u32> {
        let micros = u64::from(self.micro_batches(world_size, batch_size));
        (0..world_size)
            .map(|rank| {
                let own = part(self.global_batch, world_size.into(), rank.into());
                let rows = part(own.end - own.start, micros, micro.into());
                u32::try_from(rows.end - rows.start).unwrap_or(u32::MAX)
            })
            .collect()
    }

    /// Positions in the epoch of one rank's micro-batches of step `epoch_step` (counted within the epoch). The rows of
    /// a rank are spread evenly over its micro-batches rather than filling the first ones, so that batch norm does
    /// not see a batch of a single image after full ones.
    pub fn rank_slice(
        &self,
        epoch_step: u64,
        rank: u32,
        world_size: u32,
        batch_size: u32,
    ) -> Vec<Range<u64>> {
        let first = epoch_step * self.global_batch;
        let own = part(self.global_batch, world_size.into(), rank.into());
        let micros = u64::from(self.micro_batches(world_size, batch_size));
        (0..micros)
            .map(|micro| {
                let rows = part(own.end - own.start, micros, micro);
                first + own.start + rows.start..first + own.start + rows.end
            })
            .collect()
    }

    /// Everything one rank loads from global step `steps.start` until `steps.end`, in order.
    pub fn plan(&self, rank: u32, world_size: u32, batch_size: u32, steps: Range<u64>) -> Plan {
        Plan {
            epochs: self.clone(),
            rank,
            world_size,
            batch_size,
            steps,
            pending: Vec::new().into_iter(),
        }
    }
}

/// The micro-batches of one rank; see [`Epochs::plan`].
#[derive(Debug)]
pub struct Plan {
    epochs: Epochs,
    rank: u32,
    world_size: u32,
    batch_size: u32,
    steps: Range<u64>,
    pending: std::vec::IntoIter<MicroBatch>,
}

impl Iterator for Plan {
    type Item = MicroBatch;

    fn next(&mut self) -> Option<MicroBatch> {
        loop {
            if let Some(micro_batch) = self.pending.next() {
                return Some(micro_batch);
            }
            let step = self.steps.next()?;
            let (epoch, epoch_step) = (
                step / self.epochs.steps_per_epoch(),
                step % self.epochs.steps_per_epoch(),
            );
            let slices = self
                .epochs
                .rank_slice(epoch_step, self.rank, self.world_size, self.batch_size);
            self.pending = (0u32..)
                .zip(slices)
                .map(|(micro, positions)| MicroBatch {
                    epoch,
                    step,
                    micro,
                    first_position: positions.start,
                    indices: positions.map(|k| self.epochs.position(epoch, k)).collect(),
                })
                .collect::<Vec<_>>()
                .into_iter();
        }
    }
}

/// Part `index` of `count` near-equal consecutive parts of `0..total`; the larger ones first.
fn part(total: u64, count: u64, index: u64) -> Range<u64> {
    let (size, rest) = (total / count.max(1), total % count.max(1));
    let start = size * index + rest.min(index);
    start..start + size + u64::from(index < rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    proptest! {
        #[test]
        fn an_epoch_is_a_permutation(num_image in 1u64..3000, seed: u64, epoch in 0u64..100) {
            let epochs = Epochs::new(num_image, 1, seed).unwrap();
            let seen: HashSet<u64> = (0..num_image).map(|k| epochs.position(epoch, k)).collect();
            prop_assert_eq!(seen.len() as u64, num_image);
            prop_assert!(seen.iter().all(|&image| image < num_image));
        }

        #[test]
        fn ranks_share_exactly_the_first_positions(
            num_image in 1u64..2000, global_batch in 1u64..200, world_size in 1u32..9, batch_size in 1u32..70, seed: u64,
        ) {
            prop_assume!(num_image >= global_batch);
            let epochs = Epochs::new(num_image, global_batch, seed).unwrap();
            let micros = epochs.micro_batches(world_size, batch_size);
            let mut positions = Vec::new();
            for step in 0..epochs.steps_per_epoch() {
                let slices: Vec<_> = (0..world_size)
                    .map(|rank| epochs.rank_slice(step, rank, world_size, batch_size))
                    .collect();
                for micro in 0..micros {
                    let rows = epochs.rows(world_size, batch_size, micro);
                    for (rank, slice) in slices.iter().enumerate() {
                        prop_assert_eq!(slice.len(), micros as usize);
                        let range = slice[micro as usize].clone();
                        prop_assert_eq!(range.end - range.start, u64::from(rows[rank]));
                        prop_assert!(rows[rank] <= batch_size);
                    }
                }
                positions.extend(slices.into_iter().flatten().flatten());
            }
            // Ranks in order, micro-batches in order: the epoch's positions without a gap, each once.
            let expected: Vec<u64> = (0..epochs.steps_per_epoch() * global_batch).collect();
            prop_assert_eq!(positions, expected);
        }

        #[test]
        fn a_plan_is_its_own_continuation(cut in 0u64..40, world_size in 1u32..5, seed: u64) {
            let epochs = Epochs::new(53, 8, seed).unwrap();
            let whole: Vec<_> = epochs.plan(0, world_size, 3, 0..40).collect();
            let mut resumed: Vec<_> = epochs.plan(0, world_size, 3, 0..cut).collect();
            resumed.extend(epochs.plan(0, world_size, 3, cut..40));
            prop_assert_eq!(whole, resumed);
        }
    }

    #[test]
    fn each_sample_comes_at_most_once_an_epoch_at_any_world_size() {
        let epochs = Epochs::new(1001, 64, 7).unwrap();
        let steps = epochs.steps_per_epoch();
        let mut first: Option<HashSet<u64>> = None;
        for world_size in [1, 2, 3, 5, 8] {
            let mut seen = HashSet::new();
            for rank in 0..world_size {
                for micro_batch in epochs.plan(rank, world_size, 16, steps..2 * steps) {
                    assert_eq!(micro_batch.epoch, 1);
                    assert!(micro_batch.indices.iter().all(|&image| seen.insert(image)));
                }
            }
            assert_eq!(seen.len() as u64, steps * 64);
            assert_eq!(
                *first.get_or_insert_with(|| seen.clone()),
                seen,
                "world size {world_size}"
            );
        }
    }

    #[test]
    fn epochs_and_seeds_differ_and_look_shuffled() {
        let n = 10_000u64;
        let order = |seed, epoch| -> Vec<u64> {
            let epochs = Epochs::new(n, 1, seed).unwrap();
            (0..n).map(|k| epochs.position(epoch, k)).collect()
        };
        let a = order(1, 0);
        for b in [order(1, 1), order(2, 0), (0..n).collect()] {
            let equal = a.iter().zip(&b).filter(|(x, y)| x == y).count();
            assert!(
                equal < 10,
                "a random permutation agrees in about one place, not {equal}"
            );
        }
        // Neighbours of a uniform shuffle are n/3 apart on average.
        let apart = a.windows(2).map(|w| w[0].abs_diff(w[1])).sum::<u64>() as f64 / (n - 1) as f64;
        assert!((apart / (n as f64 / 3.0) - 1.0).abs() < 0.05, "{apart}");
    }

    #[test]
    fn a_smaller_world_takes_more_micro_batches() {
        let epochs = Epochs::new(100, 12, 0).unwrap();
        assert_eq!(epochs.micro_batches(4, 3), 1);
        assert_eq!(epochs.rows(4, 3, 0), [3, 3, 3, 3]);
        assert_eq!(epochs.micro_batches(3, 3), 2);
        assert_eq!(epochs.rows(3, 3, 1), [2, 2, 2]);
        assert_eq!(epochs.rank_slice(1, 2, 3, 3), [20..22, 22..24]);
        // Where the numbers do not divide, some ranks have one row more.
        let epochs = Epochs::new(100, 8, 0).unwrap();
        assert_eq!(epochs.rows(3, 2, 0), [2, 2, 1]);
        assert_eq!(epochs.rows(3, 2, 1), [1, 1, 1]);
    }

    #[test]
    fn too_few_images_are_refused() {
        let error = Epochs::new(5, 8, 0).unwrap_err().to_string();
        assert_eq!(
            error,
            "the data set has 5 images, fewer than one global batch of 8"
        );
        assert_eq!(Epochs::new(5, 0, 0).unwrap_err(), SamplerError::EmptyBatch);
    }
}

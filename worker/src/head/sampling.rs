//! Which classes of a shard take part in a step (Partial FC, arXiv:2203.15565): all positives, and random
//! negatives. Pure: a function of (seed, step, class), so it survives a restart and a changed world.

use crate::random::{Draws, Purpose};
use arcface_proto::types::ClassRange;

/// Chooses the classes of a step.
pub trait ClassSampler: Send {
    /// Local class indices (class - `shard.lo`), rising, that take part in `step`; `None` is all of them. The
    /// `positives`, local and rising, must be among them.
    fn sample(&mut self, step: u64, shard: ClassRange, positives: &[u32]) -> Option<Vec<u32>>;
}

/// All positives, and uniform random negatives up to `int(rate * shard size)` classes; just the positives if they
/// are more than that.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RandomNegatives {
    /// Seed of the draws.
    pub seed: u64,
    /// Share of a shard's classes, in (0, 1].
    pub rate: f64,
}

impl ClassSampler for RandomNegatives {
    fn sample(&mut self, step: u64, shard: ClassRange, positives: &[u32]) -> Option<Vec<u32>> {
        if self.rate >= 1.0 {
            return None;
        }
        // Truncation is the reference's: int(sample_rate * num_local).
        let wanted = (self.rate * f64::from(shard.len())) as usize;
        if positives.len() >= wanted {
            return Some(positives.to_vec());
        }
        let fill = wanted - positives.len();
        let negatives = self.smallest_keys(step, shard, positives, fill);
        let mut chosen: Vec<u32> = negatives.into_iter().map(|(_, local)| local).collect();
        chosen.extend_from_slice(positives);
        // The stable sort sees two rising runs and merges them.
        chosen.sort();
        Some(chosen)
    }
}

impl RandomNegatives {
    /// The `fill` negatives with the smallest keys, each with its key, in the order of classes. Every class draws a key, so they are a uniform
    /// sample; keys of one step differ between classes (the draw is a bijection of the class), so there are no ties.
    ///
    /// Keys are uniform too: nearly all of the smallest lie under a threshold that is known beforehand, and only
    /// what is under it is kept and looked at again.
    fn smallest_keys(&self, step: u64, shard: ClassRange, positives: &[u32], fill: usize) -> Vec<(u64, u32)> {
        let classes = shard.len() as usize - positives.len();
        let mut threshold = likely_threshold(classes, fill);
        loop {
            let mut smallest = self.keys_up_to(threshold, step, shard, positives);
            if smallest.len() >= fill || threshold == u64::MAX {
                if fill < smallest.len() {
                    let mut keys: Vec<u64> = smallest.iter().map(|(key, _)| *key).collect();
                    let (_, first_over, _) = keys.select_nth_unstable(fill);
                    smallest.retain(|(key, _)| key < first_over);
                }
                return smallest;
            }
            // The one draw in thousands that the threshold was too low for.
            threshold = u64::MAX;
        }
    }

    fn keys_up_to(&self, threshold: u64, step: u64, shard: ClassRange, positives: &[u32]) -> Vec<(u64, u32)> {
        let draws = Draws::new(self.seed, Purpose::ClassSampling, step);
        let mut is_positive = positives.iter().copied().peekable();
        let key = |local: u32| (draws.bits(u64::from(shard.lo) + u64::from(local)), local);
        let mut found = Vec::new();
        for (key, local) in (0..shard.len()).map(key) {
            if is_positive.next_if_eq(&local).is_none() && key <= threshold {
                found.push((key, local));
            }
        }
        found
    }
}

/// A key that more than `fill` of so many uniform keys are below, but for four standard deviations of bad luck.
fn likely_threshold(classes: usize, fill: usize) -> u64 {
    let (classes, fill) = (classes as f64, fill as f64);
    let share = (fill + 4.0 * fill.sqrt() + 4.0) / classes;
    // Saturates: a share of 1 or more is all keys.
    (share * u64::MAX as f64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample(rate: f64, step: u64, shard: ClassRange, positives: &[u32]) -> Vec<u32> {
        let mut sampler = RandomNegatives { seed: 11, rate };
        sampler.sample(step, shard, positives).expect("a rate below 1")
    }

    proptest! {
        #[test]
        fn keeps_the_positives_and_the_size(
            lo in 0u32..1000, len in 0u32..300, rate in 0.0f64..0.999, step: u64, picks in prop::collection::btree_set(0u32..300, 0..40)
        ) {
            let shard = ClassRange { lo, hi: lo + len };
            let positives: Vec<u32> = picks.into_iter().filter(|&p| p < len).collect();
            let chosen = sample(rate, step, shard, &positives);
            let wanted = (rate * f64::from(len)) as usize;
            prop_assert_eq!(chosen.len(), wanted.max(positives.len()));
            prop_assert!(chosen.windows(2).all(|w| w[0] < w[1]), "sorted, no class twice");
            prop_assert!(chosen.iter().all(|&c| c < len));
            prop_assert!(positives.iter().all(|p| chosen.binary_search(p).is_ok()));
        }
    }

    /// Against a full sort of all keys; small shards also meet thresholds that are too low.
    #[test]
    fn the_smallest_keys_are_found() {
        let sampler = RandomNegatives { seed: 7, rate: 0.5 };
        let shard = ClassRange { lo: 100, hi: 1100 };
        for (step, fill) in (0..300).flat_map(|step| [(step, 1), (step, 40), (step, 995), (step, 2000)]) {
            let positives = [3, 500, 999];
            let mut all = sampler.keys_up_to(u64::MAX, step, shard, &positives);
            assert_eq!(all.len(), 997);
            all.sort_unstable();
            all.truncate(fill);
            let mut found = sampler.smallest_keys(step, shard, &positives, fill);
            found.sort_unstable();
            assert_eq!(found, all);
        }
        assert_eq!(likely_threshold(10, 10), u64::MAX);
        let draws: usize = (0..2000)
            .filter(|&step| {
                sampler
                    .keys_up_to(likely_threshold(997, 100), step, shard, &[])
                    .len()
                    < 100
            })
            .count();
        assert!(draws < 10, "{draws} of 2000 thresholds were too low");
    }

    #[test]
    fn a_full_rate_is_everything() {
        let mut sampler = RandomNegatives { seed: 1, rate: 1.0 };
        assert_eq!(sampler.sample(0, ClassRange { lo: 0, hi: 9 }, &[3]), None);
    }

    #[test]
    fn more_positives_than_the_rate_allows_are_all_kept() {
        assert_eq!(
            sample(0.1, 0, ClassRange { lo: 0, hi: 20 }, &[1, 5, 7]),
            [1, 5, 7]
        );
    }

    #[test]
    fn every_negative_is_as_likely_and_steps_differ() {
        let shard = ClassRange { lo: 40, hi: 90 };
        let mut counts = [0u32; 50];
        for step in 0..4000 {
            sample(0.2, step, shard, &[7])
                .into_iter()
                .for_each(|c| counts[c as usize] += 1);
        }
        assert_eq!(counts[7], 4000);
        // 9 of 49 negatives a step: 735 expected, standard deviation 24.5; six of them either side.
        let negatives = || counts.iter().enumerate().filter(|(class, _)| *class != 7);
        assert!(negatives().all(|(_, &n)| (588..=882).contains(&n)), "{counts:?}");
        assert_ne!(sample(0.2, 1, shard, &[]), sample(0.2, 2, shard, &[]));
    }

    /// The relative order of two classes does not depend on the shard they are in, so worlds of different sizes
    /// draw almost the same negatives.
    #[test]
    fn draws_belong_to_the_class_not_to_the_shard() {
        let whole = sample(0.5, 3, ClassRange { lo: 0, hi: 1000 }, &[]);
        let half = sample(0.5, 3, ClassRange { lo: 500, hi: 1000 }, &[]);
        let shared = half
            .iter()
            .filter(|&&c| whole.binary_search(&(c + 500)).is_ok())
            .count();
        assert!(shared > 200, "{shared} of 250");
    }
}

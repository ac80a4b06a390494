//! Which classes of a shard take part in a step (Partial FC, arXiv:2203.15565): all positives, and random
//! negatives. Pure: a function of (seed, step, class), so it survives a restart and a changed world.

use crate::random::{Purpose, bits};
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
        // Each class draws a key; the smallest keys are a uniform sample. Keys of one step differ between classes
        // (the draw is a bijection of the class), so there are no ties.
        let mut is_positive = positives.iter().copied().peekable();
        let mut negatives: Vec<(u64, u32)> = (0..shard.len())
            .filter(|&local| is_positive.next_if_eq(&local).is_none())
            .map(|local| {
                let class = u64::from(shard.lo) + u64::from(local);
                (bits(self.seed, Purpose::ClassSampling, step, class), local)
            })
            .collect();
        let fill = wanted - positives.len();
        if fill < negatives.len() {
            negatives.select_nth_unstable(fill);
            negatives.truncate(fill);
        }
        let mut chosen: Vec<u32> = negatives.into_iter().map(|(_, local)| local).collect();
        chosen.extend_from_slice(positives);
        chosen.sort_unstable();
        Some(chosen)
    }
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

//! The k-th largest of very many numbers, exactly, from counts alone. Pure.
//!
//! An f32 becomes a u32 of the same order (its [`key`]). Numbers are counted by the upper 16 bits of their keys, which
//! says in which region of keys the k-th largest lies; counted again by the lower 16 bits within that region, they say
//! which one it is. Memory does not depend on how many numbers there are or how many of them are equal.

use super::Point;

/// Bins of a histogram: values of 16 bits.
const BINS: usize = 1 << 16;
/// Most regions of one pass, each of which takes a megabyte a thread.
pub const MOST_REGIONS: usize = 64;

/// A number of the same order as the score; both zeros are one.
pub fn key(score: f32) -> u32 {
    // Minus zero becomes plus zero.
    let bits = (score + 0.0).to_bits();
    match bits >> 31 {
        0 => bits | 0x8000_0000,
        _ => !bits,
    }
}

/// The score of a key.
pub fn score(key: u32) -> f32 {
    f32::from_bits(match key >> 31 {
        0 => !key,
        _ => key & 0x7fff_ffff,
    })
}

fn upper(key: u32) -> u16 {
    (key >> 16) as u16
}

fn lower(key: u32) -> u16 {
    key as u16
}

/// How often each value of 16 bits came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Histogram(Box<[u64; BINS]>);

impl Default for Histogram {
    fn default() -> Self {
        let counts = vec![0u64; BINS].into_boxed_slice();
        Self(counts.try_into().expect("made with this length"))
    }
}

impl Histogram {
    /// Counts scores by the upper half of their keys.
    pub fn count(&mut self, scores: &[f32]) {
        for &score in scores {
            self.0[usize::from(upper(key(score)))] += 1;
        }
    }

    /// Adds the counts of another one.
    pub fn merge(&mut self, other: &Self) {
        self.0.iter_mut().zip(other.0.iter()).for_each(|(a, b)| *a += b);
    }

    /// How many values were counted.
    fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// How many values are above this one.
    fn above(&self, value: u16) -> u64 {
        self.0[usize::from(value) + 1..].iter().sum()
    }

    /// The value at a place from the top, from 1, and how many are above it; nothing where there are not so many.
    fn largest(&self, place: u64) -> Option<(u16, u64)> {
        let mut above = 0;
        for (value, &count) in (0..=u16::MAX).zip(self.0.iter()).rev() {
            if place > above && place <= above + count {
                return Some((value, above));
            }
            above += count;
        }
        None
    }
}

/// Rates (false, true accepts) at the lower end of each region that has scores, from the highest; those where nothing wrong is
/// accepted are one.
pub fn curve(genuine: &Histogram, impostor: &Histogram) -> Vec<(f64, f64)> {
    let (all_genuine, all_impostor) = (genuine.total() as f64, impostor.total() as f64);
    let (mut right, mut wrong) = (0, 0);
    let mut points: Vec<(f64, f64)> = Vec::new();
    for (&g, &i) in genuine.0.iter().zip(impostor.0.iter()).rev() {
        if g + i == 0 {
            continue;
        }
        right += g;
        wrong += i;
        let point = (wrong as f64 / all_impostor, right as f64 / all_genuine);
        match points.last_mut() {
            Some(last) if last.0 == point.0 => *last = point,
            _ => points.push(point),
        }
    }
    points
}

/// Where thresholds lie, after the first pass.
#[derive(Clone, Debug)]
pub struct Thresholds {
    /// For each upper half of a key, the number of its region from 1; 0 without a threshold.
    region_of: Vec<u8>,
    /// Upper halves with a threshold.
    regions: Vec<u16>,
    /// For each place asked for: which region, and which place in it.
    within: Vec<Option<(usize, u64)>>,
}

impl Thresholds {
    /// Thresholds at these places from the top, from 1, of what was counted; place 0 has none. Places beyond
    /// [`MOST_REGIONS`] different regions have none either.
    pub fn new(impostor: &Histogram, places: &[u64]) -> Self {
        let mut regions: Vec<u16> = Vec::new();
        let within = places
            .iter()
            .map(|&place| {
                let (upper, above) = impostor.largest(place)?;
                let known = regions.iter().position(|&region| region == upper);
                let region = match known {
                    Some(region) => region,
                    None if regions.len() < MOST_REGIONS => {
                        regions.push(upper);
                        regions.len() - 1
                    }
                    None => return None,
                };
                Some((region, place - above))
            })
            .collect();
        let mut region_of = vec![0; BINS];
        for (number, &upper) in (1u8..).zip(&regions) {
            region_of[usize::from(upper)] = number;
        }
        Self {
            region_of,
            regions,
            within,
        }
    }

    /// Regions that the second pass counts in.
    pub fn regions(&self) -> usize {
        self.regions.len()
    }

    /// Counts scores of each region by the lower half of their keys; `counts` has one histogram a region.
    pub fn count(&self, scores: &[f32], counts: &mut [Histogram]) {
        for &score in scores {
            let key = key(score);
            let region = usize::from(self.region_of[usize::from(upper(key))]);
            if region > 0 {
                counts[region - 1].0[usize::from(lower(key))] += 1;
            }
        }
    }

    /// The threshold of each place, from the counts (genuine, impostor) of the first pass and of the second; nothing if the passes
    /// did not see the same scores.
    pub fn resolve(
        &self,
        coarse: (&Histogram, &Histogram),
        fine: (&[Histogram], &[Histogram]),
    ) -> Option<Vec<Option<Point>>> {
        let same = |coarse: &Histogram, fine: &[Histogram]| {
            let mut regions = self.regions.iter().zip(fine);
            regions.all(|(&upper, fine)| coarse.0[usize::from(upper)] == fine.total())
        };
        if !same(coarse.0, fine.0) || !same(coarse.1, fine.1) {
            return None;
        }
        let points = self.within.iter().map(|within| {
            let (region, place) = (*within)?;
            let upper = self.regions[region];
            let (low, above) = fine.1[region].largest(place)?;
            Some(Point {
                threshold: score(u32::from(upper) << 16 | u32::from(low)),
                true_accepts: coarse.0.above(upper) + fine.0[region].above(low),
                false_accepts: coarse.1.above(upper) + above,
            })
        });
        Some(points.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn points(genuine: &[f32], impostor: &[f32], places: &[u64]) -> Vec<Option<Point>> {
        let count = |scores: &[f32]| {
            let mut counts = Histogram::default();
            counts.count(scores);
            counts
        };
        let (all_genuine, all_impostor) = (count(genuine), count(impostor));
        let thresholds = Thresholds::new(&all_impostor, places);
        let fine = |scores: &[f32]| {
            let mut counts = vec![Histogram::default(); thresholds.regions()];
            thresholds.count(scores, &mut counts);
            counts
        };
        thresholds
            .resolve((&all_genuine, &all_impostor), (&fine(genuine), &fine(impostor)))
            .unwrap()
    }

    /// By sorting.
    fn expected(genuine: &[f32], impostor: &[f32], place: u64) -> Option<Point> {
        let mut sorted = impostor.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let threshold = *sorted.get(usize::try_from(place).unwrap().checked_sub(1)?)?;
        let above = |scores: &[f32]| scores.iter().filter(|&&score| score > threshold).count() as u64;
        Some(Point {
            threshold,
            true_accepts: above(genuine),
            false_accepts: above(impostor),
        })
    }

    #[test]
    fn keys_have_the_order_of_scores() {
        let sorted = [
            f32::NEG_INFINITY,
            -1.5,
            -1.0,
            -f32::MIN_POSITIVE,
            0.0,
            f32::MIN_POSITIVE,
            0.5,
            0.500_000_06,
            1.0,
        ];
        assert!(sorted.windows(2).all(|pair| key(pair[0]) < key(pair[1])));
        assert!(sorted.iter().all(|&value| score(key(value)) == value));
        assert_eq!(key(-0.0), key(0.0));
    }

    #[test]
    fn equal_scores_are_accepted_together_or_not_at_all() {
        let impostor = [0.5, 0.5, 0.5, 0.25, -0.0, 0.0];
        let genuine = [0.9, 0.5, 0.3, 0.25];
        let found = points(&genuine, &impostor, &[0, 1, 3, 4, 6, 7]);
        let point = |threshold, true_accepts, false_accepts| {
            Some(Point {
                threshold,
                true_accepts,
                false_accepts,
            })
        };
        assert_eq!(
            found,
            [
                None,
                point(0.5, 1, 0),
                point(0.5, 1, 0),
                point(0.25, 3, 3),
                point(0.0, 4, 4),
                None
            ]
        );
    }

    #[test]
    fn passes_that_differ_are_noticed() {
        let mut counts = Histogram::default();
        counts.count(&[0.5, 0.25]);
        let thresholds = Thresholds::new(&counts, &[1]);
        let mut fine = vec![Histogram::default()];
        thresholds.count(&[0.500_000_06, 0.5], &mut fine);
        let none = Histogram::default();
        assert_eq!(
            thresholds.resolve((&none, &counts), (std::slice::from_ref(&none), &fine)),
            None
        );
    }

    #[test]
    fn the_curve_goes_from_the_strictest_threshold_to_all() {
        let mut genuine = Histogram::default();
        genuine.count(&[0.9, 0.8, 0.1, 0.05]);
        let mut impostor = Histogram::default();
        impostor.count(&[0.5, 0.1]);
        assert_eq!(curve(&genuine, &impostor), [(0.0, 0.5), (0.5, 0.5), (1.0, 1.0)]);
    }

    proptest! {
        #[test]
        fn counting_is_sorting(
            genuine in proptest::collection::vec(-1.0f32..1.0, 0..40),
            rounded in proptest::collection::vec(-8i8..8, 1..60),
            exact in proptest::collection::vec(-1.0f32..1.0, 0..60),
            places in proptest::collection::vec(0u64..130, 1..6),
        ) {
            let impostor: Vec<f32> = rounded.iter().map(|&n| f32::from(n) / 8.0).chain(exact).collect();
            let found = points(&genuine, &impostor, &places);
            for (place, found) in places.iter().zip(found) {
                prop_assert_eq!(found, expected(&genuine, &impostor, *place));
            }
        }
    }
}

//! How certain a true accept rate is. Comparisons are not independent, a person is in many of them, so persons are
//! drawn anew, not comparisons (the subsets bootstrap of Bolle, Ratha and Pankanti 2004): a person drawn k times
//! counts k times in each of their comparisons. Pure: a function of the comparisons and the seed.

use super::{
    meta::Pairs,
    roc::{Comparison, Ranked},
};
use crate::random::{Draws, Purpose};
use rayon::prelude::*;

/// Most visits of comparisons that are spent: about ten seconds on two cores.
const MAX_VISITS: u64 = 8_000_000_000;

/// A rate and the interval that holds the middle 95 % of the rates of all repetitions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Interval {
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// Who each template shows, as an index from 0, and how many persons there are: templates that a genuine pair joins
/// are one person. No file but the list of pairs is needed, and IJB's lists join all templates of a person.
pub fn subjects(pairs: &Pairs, templates: usize) -> (Vec<u32>, u32) {
    // Templates are lines of a file in memory: their number fits.
    let mut parent: Vec<u32> = (0..templates as u32).collect();
    for ((&a, &b), _) in pairs
        .first
        .iter()
        .zip(&pairs.second)
        .zip(&pairs.same)
        .filter(|(_, same)| **same)
    {
        let (a, b) = (root(&mut parent, a), root(&mut parent, b));
        parent[a.max(b) as usize] = a.min(b);
    }
    let mut count = 0;
    let mut subjects = vec![0; templates];
    for template in 0..templates as u32 {
        // A root is the smallest of its templates: it has its number already.
        let root = root(&mut parent, template);
        if root == template {
            subjects[template as usize] = count;
            count += 1;
        } else {
            subjects[template as usize] = subjects[root as usize];
        }
    }
    (subjects, count)
}

fn root(parent: &mut [u32], mut template: u32) -> u32 {
    while parent[template as usize] != template {
        let above = parent[parent[template as usize] as usize];
        parent[template as usize] = above;
        template = above;
    }
    template
}

/// Repetitions that are affordable for this many comparisons, at most `wanted`.
pub fn affordable(wanted: u32, comparisons: usize) -> u32 {
    let most = MAX_VISITS / (comparisons as u64).max(1);
    u32::try_from(most).map_or(wanted, |most| wanted.min(most))
}

/// For each of `fars` the interval of the true accept rate, from `repetitions` draws of `subjects` persons; nothing
/// if fewer than two repetitions have both kinds of comparisons.
pub fn intervals(
    ranked: &Ranked,
    subjects: u32,
    fars: &[f64],
    repetitions: u32,
    seed: u64,
) -> Vec<Option<Interval>> {
    let rates: Vec<Vec<Option<f64>>> = (0..repetitions)
        .into_par_iter()
        .map(|repetition| {
            let times = draw(subjects, seed, repetition);
            let weight = |c: &Comparison| weight(&times, c);
            let totals = ranked.totals(weight);
            fars.iter()
                .map(|&far| ranked.tar_at(far, totals, weight))
                .collect()
        })
        .collect();
    (0..fars.len())
        .map(|index| {
            let mut rates: Vec<f64> = rates.iter().filter_map(|of_all| of_all[index]).collect();
            rates.sort_by(f64::total_cmp);
            (rates.len() > 1).then(|| Interval {
                low: quantile(&rates, 0.025),
                high: quantile(&rates, 0.975),
            })
        })
        .collect()
}

/// How often each person is drawn when as many are drawn as there are.
fn draw(subjects: u32, seed: u64, repetition: u32) -> Vec<u16> {
    let draws = Draws::new(seed, Purpose::Bootstrap, repetition.into());
    let mut times = vec![0u16; subjects as usize];
    for pick in 0..u64::from(subjects) {
        let subject = (u128::from(draws.bits(pick)) * u128::from(subjects)) >> 64;
        let times = &mut times[subject as usize];
        *times = times.saturating_add(1);
    }
    times
}

/// Two persons are drawn independently; of one person there is one draw.
fn weight(times: &[u16], comparison: &Comparison) -> f64 {
    let [a, b] = comparison.subjects;
    let of_a = f64::from(times[a as usize]);
    if a == b {
        of_a
    } else {
        of_a * f64::from(times[b as usize])
    }
}

/// Value below which a share `at` of the sorted values lies, between neighbours on the line.
fn quantile(sorted: &[f64], at: f64) -> f64 {
    let place = at * (sorted.len() - 1) as f64;
    let (below, part) = (place.floor() as usize, place.fract());
    let above = sorted[(below + 1).min(sorted.len() - 1)];
    sorted[below] + (above - sorted[below]) * part
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random;

    #[test]
    fn templates_of_genuine_pairs_are_one_person() {
        let pairs = Pairs {
            first: vec![4, 0, 1, 5],
            second: vec![2, 4, 3, 0],
            same: vec![true, true, true, false],
        };
        assert_eq!(subjects(&pairs, 6), (vec![0, 1, 0, 1, 0, 2], 3));
    }

    #[test]
    fn draws_are_as_many_as_persons_and_repeat() {
        let times = draw(1000, 7, 3);
        assert_eq!(times.iter().map(|&t| u32::from(t)).sum::<u32>(), 1000);
        // About 1/e of them are never drawn.
        let never = times.iter().filter(|&&t| t == 0).count();
        assert!((300..440).contains(&never), "{never}");
        assert_eq!(times, draw(1000, 7, 3));
        assert!(times != draw(1000, 8, 3) && times != draw(1000, 7, 4));
        assert_eq!((affordable(200, 15_658_489), affordable(200, 1 << 40)), (200, 0));
    }

    /// One genuine comparison a person: the rate is a mean of independent draws, whose deviation is known.
    #[test]
    fn the_interval_has_the_width_of_the_theory() {
        let people = 400;
        let score = |p: u32| random::uniform(1, Purpose::Flip, u64::from(p), 0);
        let genuine = (0..people).map(|p| Comparison {
            score: score(p),
            subjects: [p, p],
        });
        let impostor = (0..people).map(|p| Comparison {
            score: 0.5,
            subjects: [p, (p + 1) % people],
        });
        let ranked = Ranked::new(genuine.collect(), impostor.collect());
        let rate = ranked
            .tar_at(0.0, ranked.totals(|_| 1.0), |_| 1.0)
            .expect("both kinds");
        let found = intervals(&ranked, people, &[0.0], 2000, 5)[0].expect("an interval");
        let half = 1.96 * (rate * (1.0 - rate) / f64::from(people)).sqrt();
        assert!(
            (found.low - (rate - half)).abs() < 0.008,
            "{found:?} {rate} {half}"
        );
        assert!(
            (found.high - (rate + half)).abs() < 0.008,
            "{found:?} {rate} {half}"
        );
        assert_eq!(intervals(&ranked, people, &[0.0], 1, 5), [None]);
    }
}

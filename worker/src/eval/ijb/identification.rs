//! The 1:N protocol: templates of unknown persons (probes) are searched for in a gallery of known ones. Pure.
//!
//! The reference has two programs with different ideas of a rate of false alarms, and both are here. [`open_set`]
//! (`ijb_evals.py`) takes its thresholds from the best scores of probes that are not in the gallery, and a hit must have
//! rank 1. [`closed_set`] (`ijb_1n.py`) joins the galleries, so that every probe is in, and takes its thresholds from the
//! scores of all wrong pairs, as many as the rate times the number of *probes*; a hit need not have rank 1.

use super::{
    meta::Entry,
    templates::{Templates, dot},
};
use rayon::prelude::*;
use std::{collections::HashMap, sync::Mutex};

/// Ranks up to which a hit is counted.
pub const RANKS: [usize; 3] = [1, 5, 10];
/// Rates of false alarms of the closed-set search.
pub const CLOSED_FARS: [f64; 2] = [0.01, 0.1];
/// Probes that are compared with the gallery at a time: one passage of the gallery through the cache serves all.
const PROBES_AT_ONCE: usize = 8;

/// Rates of false alarms of the open-set search: 10^-4 to 10^-0.04 in steps of 0.04 in the exponent, and 1. The step is
/// the one that numpy's `arange` makes of it, since a rate just below or above decides about a threshold.
pub fn open_fars() -> Vec<f64> {
    let step = (-4.0 + 4.0 / 100.0) - -4.0;
    let grid = (0..100).map(|k| 10f64.powf(-4.0 + f64::from(k) * step));
    grid.chain([1.0]).collect()
}

/// A search in one gallery.
#[derive(Clone, Debug, PartialEq)]
pub struct OpenSet {
    /// Probes whose person is in the gallery.
    pub mated: usize,
    /// Probes whose person is not.
    pub unmated: usize,
    /// Mated probes whose person is among the best [`RANKS`].
    pub hits: [usize; 3],
    /// Threshold at each rate of false alarms; nothing without unmated probes.
    pub thresholds: Option<Vec<f64>>,
    /// Share of the mated probes with rank 1 and a score above the threshold; nothing without mated or unmated probes.
    pub tpir: Option<Vec<f64>>,
}

/// A search in both galleries as one.
#[derive(Clone, Debug, PartialEq)]
pub struct ClosedSet {
    /// Share of the probes whose person is among the best [`RANKS`].
    pub top: [f64; 3],
    /// For each of [`CLOSED_FARS`] the share of probes with a score above the threshold, and the threshold; nothing
    /// where there are too few wrong pairs.
    pub dir: [Option<(f64, f64)>; 2],
}

/// What the search for one probe found.
struct Found {
    /// Gallery entries that are better than the probe's own, or as good; nothing for an unmated probe.
    better: Option<usize>,
    /// Score of the probe's own entry; the best score for an unmated probe.
    score: f64,
    /// Best score of the entries of other persons; -infinity if there are none.
    best_other: f64,
}

/// Calls `visit` with every probe and its scores in the gallery; results in the order of the probes.
fn search<T: Send>(
    templates: &Templates,
    probes: &[Entry],
    gallery: &[Entry],
    visit: impl Fn(&Entry, &[f64]) -> T + Sync,
) -> Vec<T> {
    let of_block = |block: &[Entry]| -> Vec<T> {
        let mut scores = vec![vec![0.0; gallery.len()]; block.len()];
        for (place, entry) in gallery.iter().enumerate() {
            let row = templates.row(entry.template);
            for (probe, scores) in block.iter().zip(&mut scores) {
                scores[place] = dot(templates.row(probe.template), row);
            }
        }
        let visited = block.iter().zip(&scores);
        visited.map(|(probe, scores)| visit(probe, scores)).collect()
    };
    let blocks: Vec<Vec<T>> = probes.par_chunks(PROBES_AT_ONCE).map(of_block).collect();
    blocks.into_iter().flatten().collect()
}

/// First place of each subject.
fn places(gallery: &[Entry]) -> HashMap<u32, usize> {
    let mut places = HashMap::new();
    for (place, entry) in gallery.iter().enumerate() {
        places.entry(entry.subject).or_insert(place);
    }
    places
}

/// Entries before the own one in the order of scores. Equal scores count against the probe: numpy's sort leaves their
/// order open, and an own entry that cannot be told from another's is no hit.
fn better(scores: &[f64], own: usize) -> usize {
    let above = scores.iter().filter(|&&score| score >= scores[own]).count();
    above - 1
}

/// Searches for `probes` in one gallery.
pub fn open_set(templates: &Templates, probes: &[Entry], gallery: &[Entry], fars: &[f64]) -> OpenSet {
    let places = places(gallery);
    let highest = |scores: &mut dyn Iterator<Item = f64>| scores.fold(f64::NEG_INFINITY, f64::max);
    let found = search(templates, probes, gallery, |probe, scores| {
        let others = gallery.iter().zip(scores);
        let mut others = others
            .filter(|(entry, _)| entry.subject != probe.subject)
            .map(|(_, &s)| s);
        let best_other = highest(&mut others);
        match places.get(&probe.subject) {
            Some(&own) => Found {
                better: Some(better(scores, own)),
                score: scores[own],
                best_other,
            },
            None => Found {
                better: None,
                score: best_other,
                best_other,
            },
        }
    });
    let (mated, unmated): (Vec<&Found>, Vec<&Found>) = found.iter().partition(|found| found.better.is_some());
    let mut alarms: Vec<f64> = unmated.iter().map(|found| found.score).collect();
    alarms.sort_by(|a, b| b.total_cmp(a));
    let threshold = |far: &f64| {
        let place = ((alarms.len() as f64 * far) as usize).saturating_sub(1);
        alarms.get(place).copied()
    };
    let thresholds: Option<Vec<f64>> = fars.iter().map(threshold).collect();
    let rate = |threshold: &f64| {
        let is_hit = |found: &&&Found| found.score > found.best_other && found.score > *threshold;
        mated.iter().filter(is_hit).count() as f64 / mated.len() as f64
    };
    OpenSet {
        mated: mated.len(),
        unmated: unmated.len(),
        hits: RANKS.map(|rank| {
            mated
                .iter()
                .filter(|f| f.better.is_some_and(|b| b < rank))
                .count()
        }),
        tpir: thresholds
            .as_ref()
            .filter(|_| !mated.is_empty())
            .map(|thresholds| thresholds.iter().map(rate).collect()),
        thresholds,
    }
}

/// The galleries as one, sorted by template; a template of both keeps the subject of the first.
pub fn join(galleries: &[Vec<Entry>; 2]) -> Vec<Entry> {
    let mut joined: Vec<Entry> = galleries.concat();
    joined.sort_by_key(|entry| entry.template);
    joined.dedup_by_key(|entry| entry.template);
    joined
}

/// The highest of many scores, however they come: which ones these are does not depend on the order.
struct Highest {
    most: usize,
    values: Vec<f64>,
    floor: f64,
}

impl Highest {
    fn new(most: usize) -> Self {
        Self {
            most,
            values: Vec::new(),
            floor: f64::NEG_INFINITY,
        }
    }

    fn add(&mut self, some: &[f64], more: &[f64]) {
        let above = some.iter().chain(more).filter(|&&score| score > self.floor);
        self.values.extend(above);
        if self.values.len() > 4 * self.most + 1024 {
            self.cut();
        }
    }

    fn cut(&mut self) {
        if self.most == 0 || self.values.len() < self.most {
            return;
        }
        let (_, lowest, _) = self
            .values
            .select_nth_unstable_by(self.most - 1, |a, b| b.total_cmp(a));
        self.floor = *lowest;
        self.values.truncate(self.most);
    }

    fn sorted(mut self) -> Vec<f64> {
        self.cut();
        self.values.sort_unstable_by(|a, b| b.total_cmp(a));
        self.values
    }
}

/// Searches for `probes` in `gallery`, which must have exactly one entry for each; the error says which has not.
pub fn closed_set(templates: &Templates, probes: &[Entry], gallery: &[Entry]) -> Result<ClosedSet, String> {
    let mut entries: HashMap<u32, usize> = HashMap::new();
    for entry in gallery {
        *entries.entry(entry.subject).or_default() += 1;
    }
    for probe in probes {
        let count = entries.get(&probe.subject).copied().unwrap_or(0);
        if count != 1 {
            return Err(format!(
                "subject {} of the probes has {count} entries in the joined galleries, expected 1",
                probe.subject
            ));
        }
    }
    let places = places(gallery);
    let needed = CLOSED_FARS.map(|far| (probes.len() as f64 * far).ceil() as usize);
    let wrong = Mutex::new(Highest::new(needed.into_iter().max().unwrap_or(0)));
    let found = search(templates, probes, gallery, |probe, scores| {
        let own = places[&probe.subject];
        let (before, after) = (&scores[..own], &scores[own + 1..]);
        wrong.lock().expect("adding does not panic").add(before, after);
        (better(scores, own), scores[own])
    });
    let wrong = wrong.into_inner().expect("adding does not panic").sorted();
    let share = |count: usize| count as f64 / probes.len() as f64;
    Ok(ClosedSet {
        top: RANKS.map(|rank| share(found.iter().filter(|(better, _)| *better < rank).count())),
        dir: needed.map(|needed| {
            let threshold = *wrong.get(needed.checked_sub(1)?)?;
            let hits = found.iter().filter(|(_, own)| *own > threshold).count();
            Some((share(hits), threshold))
        }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(list: &[(u32, u32)]) -> Vec<Entry> {
        list.iter()
            .map(|&(template, subject)| Entry { template, subject })
            .collect()
    }

    /// Templates on a circle, by degrees.
    fn circle(degrees: &[f64]) -> Templates {
        let xy = degrees
            .iter()
            .flat_map(|d| [d.to_radians().cos(), d.to_radians().sin()]);
        Templates::from_values(2, xy.collect())
    }

    #[test]
    fn an_open_search_takes_its_thresholds_from_strangers() {
        // Gallery: persons 1 at 0 degrees, 2 at 90. Probes: 1 at 10, 2 at 40 (nearer to 1), strangers at 100 and 45.
        let templates = circle(&[0.0, 90.0, 10.0, 40.0, 100.0, 45.0]);
        let gallery = entries(&[(0, 1), (1, 2)]);
        let probes = entries(&[(2, 1), (3, 2), (4, 8), (5, 9)]);
        let found = open_set(&templates, &probes, &gallery, &[0.0, 0.5, 0.9, 1.0]);
        assert_eq!((found.mated, found.unmated, found.hits), (2, 2, [1, 2, 2]));
        let cos = |degrees: f64| degrees.to_radians().cos();
        let thresholds = found.thresholds.expect("strangers");
        let expected = [cos(10.0), cos(10.0), cos(10.0), cos(45.0)];
        assert!(
            thresholds
                .iter()
                .zip(expected)
                .all(|(a, b)| (a - b).abs() < 1e-12),
            "{thresholds:?}"
        );
        assert_eq!(found.tpir.expect("rates")[3], 0.5);
        let known = open_set(&templates, &probes[..2], &gallery, &[0.1]);
        assert_eq!((known.thresholds, known.tpir), (None, None));
        let strangers = open_set(&templates, &probes[2..], &gallery, &[0.1]);
        assert!(strangers.thresholds.is_some() && strangers.tpir.is_none());
    }

    #[test]
    fn equal_scores_are_no_hit() {
        let templates = circle(&[0.0, 0.0, 0.0]);
        let gallery = entries(&[(0, 1), (1, 2)]);
        let found = open_set(&templates, &entries(&[(2, 1)]), &gallery, &[0.1]);
        assert_eq!(found.hits, [0, 1, 1]);
        let found = closed_set(&templates, &entries(&[(2, 1)]), &gallery).expect("in the gallery");
        assert_eq!((found.top, found.dir[0]), ([0.0, 1.0, 1.0], Some((0.0, 1.0))));
    }

    #[test]
    fn a_closed_search_wants_every_probe_in_the_gallery_once() {
        let templates = circle(&[0.0, 90.0, 10.0]);
        let probes = entries(&[(2, 1)]);
        for (gallery, count) in [(vec![(0, 2)], 0), (vec![(0, 1), (1, 1)], 2)] {
            let said = closed_set(&templates, &probes, &entries(&gallery)).expect_err("refused");
            assert!(
                said.starts_with(&format!("subject 1 of the probes has {count} entries")),
                "{said}"
            );
        }
        // A gallery of one: there is no wrong pair to take a threshold from.
        let alone = closed_set(&templates, &probes, &entries(&[(0, 1)])).expect("in the gallery");
        assert_eq!((alone.top, alone.dir), ([1.0; 3], [None; 2]));
        let joined = join(&[entries(&[(3, 1), (5, 2)]), entries(&[(1, 4), (3, 9)])]);
        assert_eq!(joined, entries(&[(1, 4), (3, 1), (5, 2)]));
    }

    #[test]
    fn the_highest_are_kept_whatever_the_order() {
        let value = |i: u32| f64::from(i.wrapping_mul(2_654_435_761) >> 20);
        let values: Vec<f64> = (0..9000).map(value).collect();
        let mut expected = values.clone();
        expected.sort_by(|a, b| b.total_cmp(a));
        let mut highest = Highest::new(70);
        values
            .chunks(90)
            .for_each(|part| highest.add(&part[..20], &part[20..]));
        assert_eq!(highest.sorted(), expected[..70]);
        let mut few = Highest::new(5);
        few.add(&[1.0], &[3.0]);
        assert_eq!(few.sorted(), [3.0, 1.0]);
    }

    #[test]
    fn the_rates_are_numpys() {
        let fars = open_fars();
        assert_eq!((fars.len(), fars[0], fars[100]), (101, 1e-4, 1.0));
        // Not 0.001: the step is a little over 0.04.
        assert!((fars[25] - 0.001).abs() < 1e-15 && fars[25] > 0.001);
    }
}

//! All-to-all verification, as the MFR ongoing challenge of InsightFace measures: every image of a set is compared with
//! every other one, and rates are given at very low false accept rates (1e-6 of all pairs of different persons).
//!
//! Exact in bounded memory: the matrix of scores is computed in tiles, twice, and never kept. The first pass counts scores by the
//! upper half of their bits and so finds the 1/65536th of all numbers in which each threshold lies; the second one
//! counts the lower half there ([`select`]). Nothing is rounded, sampled or interpolated.
//!
//! The definition: with P pairs of different persons, k = floor(FAR * P). The threshold is the k-th largest of their
//! scores, a pair is accepted if its score is **above** it, and TAR is the share of the pairs of the same person that
//! are accepted. So at most k - 1 wrong pairs are accepted, fewer where scores are equal: the rate stays below
//! the FAR, as the challenge asks ("with FAR less than 1e-6"). With k = 0 there is no such threshold.
//!
//! The way of the data: [`features`] reads a file, [`embed`] asks a network, [`gallery`] brings features to length 1 and
//! scores them, [`report`] writes the rates down.

pub mod embed;
mod error;
pub mod features;
pub mod gallery;
pub mod report;
pub mod select;

pub use error::MfrError;
pub use gallery::Gallery;

use gallery::Counter;
use select::{Histogram, Thresholds};
use std::{iter, str::FromStr};

/// False accept rates at which rates are reported without a choice.
pub const FARS: [&str; 4] = ["1e-6", "1e-5", "1e-4", "1e-3"];

/// A false accept rate as it was written.
#[derive(Clone, Debug, PartialEq)]
pub struct Far {
    /// As written.
    pub text: String,
    /// In (0, 1).
    pub value: f64,
}

impl FromStr for Far {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.trim().parse() {
            Ok(value) if 0.0 < value && value < 1.0 => Ok(Self {
                text: text.trim().to_owned(),
                value,
            }),
            _ => Err(format!("{text:?} is no rate between 0 and 1, like 1e-6")),
        }
    }
}

/// A true accept rate.
#[derive(Clone, Debug, PartialEq)]
pub struct Rate {
    /// At which false accept rate.
    pub far: Far,
    /// The threshold is the score of this place among the pairs of different persons, from 1; 0 if they are too few
    /// for this rate.
    pub place: u64,
    /// What the threshold gives; nothing if the pairs are too few.
    pub point: Option<Point>,
}

/// A threshold and what is above it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Scores above it are accepted.
    pub threshold: f32,
    /// Accepted pairs of the same person.
    pub true_accepts: u64,
    /// Accepted pairs of different persons.
    pub false_accepts: u64,
}

/// What a set gives.
#[derive(Clone, Debug, PartialEq)]
pub struct Evaluation {
    /// Name of the set.
    pub name: String,
    /// Images.
    pub images: usize,
    /// Persons.
    pub identities: usize,
    /// Pairs of the same person.
    pub genuine: u64,
    /// Pairs of different persons.
    pub impostor: u64,
    /// In the order asked for.
    pub rates: Vec<Rate>,
    /// False and true accept rates at every 1/128th of an octave of the scores, from the highest.
    pub curve: Vec<(f64, f64)>,
}

/// Share of the pairs of the same person that a point accepts.
pub fn tar(evaluation: &Evaluation, point: &Point) -> f64 {
    point.true_accepts as f64 / evaluation.genuine as f64
}

/// floor(FAR * pairs); a product that is a whole number but for the rounding of `far` is that number.
pub fn place(far: f64, pairs: u64) -> u64 {
    let product = far * pairs as f64;
    let whole = product.round();
    match (product - whole).abs() <= 4.0 * f64::EPSILON * whole {
        true => whole as u64,
        false => product.floor() as u64,
    }
}

/// Pairs that [`evaluate`] looks at, all passes together.
pub fn work(gallery: &Gallery) -> u64 {
    2 * (gallery.genuine() + gallery.impostor())
}

/// Counts of one pass over all scores.
#[derive(Debug, Default)]
struct Coarse {
    genuine: Histogram,
    impostor: Histogram,
}

impl Counter for Coarse {
    fn add(&mut self, genuine: &[f32], impostor: &[f32]) {
        self.genuine.count(genuine);
        self.impostor.count(impostor);
    }
}

/// Counts of a pass over the scores near the thresholds.
#[derive(Debug)]
struct Fine<'a> {
    thresholds: &'a Thresholds,
    genuine: Vec<Histogram>,
    impostor: Vec<Histogram>,
}

impl<'a> Fine<'a> {
    fn new(thresholds: &'a Thresholds) -> Self {
        let empty = || {
            iter::repeat_with(Histogram::default)
                .take(thresholds.regions())
                .collect()
        };
        Self {
            thresholds,
            genuine: empty(),
            impostor: empty(),
        }
    }
}

impl Counter for Fine<'_> {
    fn add(&mut self, genuine: &[f32], impostor: &[f32]) {
        self.thresholds.count(genuine, &mut self.genuine);
        self.thresholds.count(impostor, &mut self.impostor);
    }
}

/// Compares all images with each other. `done` is told how many pairs were looked at since its last call.
pub fn evaluate(
    name: &str,
    gallery: &Gallery,
    fars: &[Far],
    done: &mut dyn FnMut(u64),
) -> Result<Evaluation, MfrError> {
    if gallery.genuine() == 0 {
        return Err(MfrError::NoGenuine {
            images: gallery.len(),
        });
    }
    if gallery.impostor() == 0 {
        return Err(MfrError::NoImpostor {
            images: gallery.len(),
        });
    }
    let threads = rayon::current_num_threads();
    let mut parts: Vec<Coarse> = iter::repeat_with(Coarse::default).take(threads).collect();
    gallery.scan(&mut parts, done);
    let mut coarse = Coarse::default();
    for part in &parts {
        coarse.genuine.merge(&part.genuine);
        coarse.impostor.merge(&part.impostor);
    }
    drop(parts);
    let places: Vec<u64> = fars
        .iter()
        .map(|far| place(far.value, gallery.impostor()))
        .collect();
    let points = locate(gallery, &coarse, &places, threads, done)?;
    Ok(Evaluation {
        name: name.to_owned(),
        images: gallery.len(),
        identities: gallery.identities(),
        genuine: gallery.genuine(),
        impostor: gallery.impostor(),
        rates: fars
            .iter()
            .zip(places)
            .zip(points)
            .map(|((far, place), point)| Rate {
                far: far.clone(),
                place,
                point,
            })
            .collect(),
        curve: select::curve(&coarse.genuine, &coarse.impostor),
    })
}

/// The second pass: the threshold at each place among the wrong pairs.
fn locate(
    gallery: &Gallery,
    coarse: &Coarse,
    places: &[u64],
    threads: usize,
    done: &mut dyn FnMut(u64),
) -> Result<Vec<Option<Point>>, MfrError> {
    let thresholds = Thresholds::new(&coarse.impostor, places);
    let mut parts: Vec<Fine<'_>> = iter::repeat_with(|| Fine::new(&thresholds))
        .take(threads)
        .collect();
    if thresholds.regions() > 0 {
        gallery.scan(&mut parts, done);
    } else {
        done(gallery.genuine() + gallery.impostor());
    }
    let mut fine = Fine::new(&thresholds);
    for part in &parts {
        let both = [
            (&mut fine.genuine, &part.genuine),
            (&mut fine.impostor, &part.impostor),
        ];
        for (all, some) in both {
            all.iter_mut().zip(some).for_each(|(all, some)| all.merge(some));
        }
    }
    thresholds
        .resolve(
            (&coarse.genuine, &coarse.impostor),
            (&fine.genuine, &fine.impostor),
        )
        .ok_or(MfrError::Unstable)
}

#[cfg(test)]
mod tests;

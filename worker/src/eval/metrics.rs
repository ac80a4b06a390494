//! The numbers of a verification set as the reference computes them (`eval/verification.py` of arcface_torch):
//! pure functions of distances and flags.
//!
//! The reference tests every pair against every threshold, for each fold. The thresholds are an increasing grid,
//! so a pair is described by the first threshold that accepts it, and a fold by two histograms of those: the same
//! counts, without the product of pairs and thresholds.

use super::EvalError;
use std::ops::Range;

/// Folds of the cross-validation.
pub const FOLDS: usize = 10;

/// Squared distances of the pairs: rows 2i and 2i+1 are pair i. Embeddings of an image and of its mirror image
/// are summed in f64, then normalised to length 1 (a zero vector stays zero).
///
/// `emb`, `emb_flip`: `[2n, dim]` row-major. Returns n distances in [0, 4].
pub fn pair_distances<T: Copy + Into<f64>>(
    emb: &[T],
    emb_flip: &[T],
    dim: usize,
) -> Result<Vec<f64>, EvalError> {
    if dim == 0 || emb.len() != emb_flip.len() || !emb.len().is_multiple_of(2 * dim) {
        return Err(EvalError::Sizes {
            emb: emb.len(),
            emb_flip: emb_flip.len(),
            dim,
            pairs: emb.len() / (2 * dim).max(1),
        });
    }
    let (mut left, mut right) = (vec![0.0; dim], vec![0.0; dim]);
    let mut distances = Vec::with_capacity(emb.len() / (2 * dim));
    let pairs = emb.chunks_exact(2 * dim).zip(emb_flip.chunks_exact(2 * dim));
    for (pair, (plain, mirrored)) in pairs.enumerate() {
        for (side, sum) in [&mut left, &mut right].into_iter().enumerate() {
            let rows = side * dim..(side + 1) * dim;
            let values = plain[rows.clone()].iter().zip(&mirrored[rows]);
            for (sum, (&a, &b)) in sum.iter_mut().zip(values) {
                *sum = a.into() + b.into();
            }
            let norm = norm(sum);
            if !norm.is_finite() {
                return Err(EvalError::NotFinite { row: 2 * pair + side });
            }
            let norm = if norm == 0.0 { 1.0 } else { norm };
            sum.iter_mut().for_each(|x| *x /= norm);
        }
        distances.push(left.iter().zip(&right).map(|(a, b)| (a - b) * (a - b)).sum());
    }
    Ok(distances)
}

/// XNorm: mean L2 norm of all embeddings as the network gave them, plain and mirrored. 0 for none.
pub fn mean_norm<T: Copy + Into<f64>>(emb: &[T], emb_flip: &[T], dim: usize) -> f64 {
    let norms: Vec<f64> = [emb, emb_flip]
        .into_iter()
        .flat_map(|rows| rows.chunks_exact(dim.max(1)))
        .map(|row| row.iter().map(|&x| x.into() * x.into()).sum::<f64>().sqrt())
        .collect();
    if norms.is_empty() { 0.0 } else { mean(&norms) }
}

fn norm(vector: &[f64]) -> f64 {
    vector.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// Arithmetic mean; NaN for nothing.
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Standard deviation of the population (numpy's default).
pub fn population_std(values: &[f64]) -> f64 {
    let centre = mean(values);
    (values.iter().map(|x| (x - centre) * (x - centre)).sum::<f64>() / values.len() as f64).sqrt()
}

/// Test sets of a k-fold split without shuffle: `pairs / folds` consecutive pairs each, one more for the first
/// `pairs % folds`.
pub fn folds(pairs: usize, folds: usize) -> Result<Vec<Range<usize>>, EvalError> {
    if folds == 0 || pairs < folds {
        return Err(EvalError::TooFewPairs { pairs, folds });
    }
    let (share, rest) = (pairs / folds, pairs % folds);
    Ok((0..folds)
        .map(|k| share * k + k.min(rest)..share * (k + 1) + (k + 1).min(rest))
        .collect())
}

/// A grid of thresholds `step * k`, k < count. A pair is accepted at k if its distance is below (strictly).
#[derive(Clone, Copy, Debug)]
pub struct Grid {
    step: f64,
    count: usize,
}

/// Thresholds of the accuracy.
pub const ACCURACY_GRID: Grid = Grid {
    step: 0.01,
    count: 400,
};

/// Thresholds of the true accept rate at a false accept rate.
pub const FAR_GRID: Grid = Grid {
    step: 0.001,
    count: 4000,
};

impl Grid {
    /// The k-th threshold, as numpy's `arange` computes it.
    fn at(self, k: usize) -> f64 {
        self.step * k as f64
    }

    /// First k that accepts `distance`; `count` if none does.
    fn first_accepting(self, distance: f64) -> usize {
        // Where it should be, then the exact comparison, which rounding may move by one.
        let mut k = ((distance / self.step).clamp(0.0, self.count as f64)) as usize;
        while k > 0 && distance < self.at(k - 1) {
            k -= 1;
        }
        while k < self.count && distance >= self.at(k) {
            k += 1;
        }
        k
    }
}

/// Pairs accepted at each threshold, and all pairs, of both kinds.
struct Counts {
    same: Vec<u64>,
    different: Vec<u64>,
    num_same: u64,
    num_different: u64,
}

impl Counts {
    fn of(grid: Grid, distances: &[f64], issame: &[bool]) -> Self {
        let mut counts = Self {
            same: vec![0; grid.count],
            different: vec![0; grid.count],
            num_same: issame.iter().filter(|&&same| same).count() as u64,
            num_different: issame.iter().filter(|&&same| !same).count() as u64,
        };
        for (&distance, &same) in distances.iter().zip(issame) {
            let accepted = if same {
                &mut counts.same
            } else {
                &mut counts.different
            };
            if let Some(count) = accepted.get_mut(grid.first_accepting(distance)) {
                *count += 1;
            }
        }
        for accepted in [&mut counts.same, &mut counts.different] {
            let mut sum = 0;
            for count in accepted {
                sum += *count;
                *count = sum;
            }
        }
        counts
    }

    /// These pairs without those of `part`.
    fn without(&self, part: &Self) -> Self {
        let minus = |all: &[u64], part: &[u64]| all.iter().zip(part).map(|(a, b)| a - b).collect();
        Self {
            same: minus(&self.same, &part.same),
            different: minus(&self.different, &part.different),
            num_same: self.num_same - part.num_same,
            num_different: self.num_different - part.num_different,
        }
    }

    /// Pairs judged rightly at threshold k.
    fn right(&self, k: usize) -> u64 {
        self.same[k] + self.num_different - self.different[k]
    }
}

/// Accuracy by fold, and the receiver operating characteristic.
#[derive(Clone, Debug)]
pub struct Roc {
    /// Accuracy of each test fold at the threshold that is best on the other folds.
    pub accuracy: Vec<f64>,
    /// True accept rate at each threshold of the grid, mean over the test folds; 0 in a fold without same pairs.
    pub tpr: Vec<f64>,
    /// False accept rate, likewise.
    pub fpr: Vec<f64>,
}

/// Cross-validated accuracy and ROC of `distances` against `issame` on a grid of thresholds.
pub fn roc(distances: &[f64], issame: &[bool], grid: Grid) -> Result<Roc, EvalError> {
    let all = Counts::of(grid, distances, issame);
    let mut out = Roc {
        accuracy: Vec::with_capacity(FOLDS),
        tpr: vec![0.0; grid.count],
        fpr: vec![0.0; grid.count],
    };
    for test in folds(distances.len().min(issame.len()), FOLDS)? {
        let fold = Counts::of(grid, &distances[test.clone()], &issame[test.clone()]);
        let train = all.without(&fold);
        // The first of the best, as numpy's argmax.
        let best = (0..grid.count).rev().max_by_key(|&k| train.right(k)).unwrap_or(0);
        out.accuracy.push(fold.right(best) as f64 / test.len() as f64);
        for k in 0..grid.count {
            out.tpr[k] += rate(fold.same[k], fold.num_same).unwrap_or(0.0);
            out.fpr[k] += rate(fold.different[k], fold.num_different).unwrap_or(0.0);
        }
    }
    for mean in out.tpr.iter_mut().chain(&mut out.fpr) {
        *mean /= FOLDS as f64;
    }
    Ok(out)
}

fn rate(part: u64, all: u64) -> Option<f64> {
    (all > 0).then(|| part as f64 / all as f64)
}

/// True accept rate where the false accept rate of the other folds meets a target.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TarAtFar {
    /// Mean true accept rate over the folds.
    pub tar: f64,
    /// Its population standard deviation.
    pub tar_std: f64,
    /// False accept rate that the folds really had, mean.
    pub far: f64,
}

/// True accept rates at each of `targets`, or nothing if a fold or its complement lacks same or different pairs:
/// the rate has no meaning then (the reference divides by zero).
///
/// The threshold of a fold is interpolated on the other folds between the last grid point whose false accept rate
/// is at most the target and the next; it is 0 if the rate never gets there.
pub fn tar_at_far(
    distances: &[f64],
    issame: &[bool],
    targets: &[f64],
) -> Result<Option<Vec<TarAtFar>>, EvalError> {
    let grid = FAR_GRID;
    let all = Counts::of(grid, distances, issame);
    let folds = folds(distances.len().min(issame.len()), FOLDS)?;
    let (mut tar, mut far) = (vec![Vec::new(); targets.len()], vec![Vec::new(); targets.len()]);
    for test in folds {
        let (distances, issame) = (&distances[test.clone()], &issame[test]);
        let fold = Counts::of(grid, distances, issame);
        let train = all.without(&fold);
        if [&fold, &train]
            .iter()
            .any(|c| c.num_same == 0 || c.num_different == 0)
        {
            return Ok(None);
        }
        for (index, &target) in targets.iter().enumerate() {
            let threshold = threshold_at(grid, &train, target);
            let accepted = |kind: bool| {
                let pairs = distances.iter().zip(issame);
                pairs
                    .filter(|&(&distance, &same)| same == kind && distance < threshold)
                    .count() as u64
            };
            tar[index].extend(rate(accepted(true), fold.num_same));
            far[index].extend(rate(accepted(false), fold.num_different));
        }
    }
    let summary = tar.iter().zip(&far).map(|(tar, far)| TarAtFar {
        tar: mean(tar),
        tar_std: population_std(tar),
        far: mean(far),
    });
    Ok(Some(summary.collect()))
}

fn threshold_at(grid: Grid, train: &Counts, target: f64) -> f64 {
    let far = |k: usize| train.different[k] as f64 / train.num_different as f64;
    let last = grid.count - 1;
    if far(last) < target {
        return 0.0;
    }
    // The rate grows with k, so this is the first k above the target.
    let above = train
        .different
        .partition_point(|&count| count as f64 / train.num_different as f64 <= target);
    match above {
        0 => grid.at(0),
        k if k > last => grid.at(last),
        k => {
            let part = (target - far(k - 1)) / (far(k) - far(k - 1));
            grid.at(k - 1) + (grid.at(k) - grid.at(k - 1)) * part
        }
    }
}

#[cfg(test)]
mod tests;

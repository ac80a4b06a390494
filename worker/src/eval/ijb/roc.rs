//! Rates of a 1:1 comparison as functions of the threshold. Pure: scores in, rates out.
//!
//! Two readings of "true accepts at a rate of false accepts" live side by side. [`Roc::tpr_near`] is the
//! reference's: the point of the curve whose rate of false accepts is nearest, above or below. With few impostors
//! the low rates all fall onto one point, and rates above the target may be reported. [`Ranked::tar_at`] is the
//! rate at the target itself, on the line between the points beside it.

use rayon::prelude::*;

/// A comparison of two templates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Comparison {
    /// Cosine.
    pub score: f64,
    /// Who the templates show, as an index.
    pub subjects: [u32; 2],
}

/// All comparisons, by falling score.
#[derive(Clone, Debug)]
pub struct Ranked {
    genuine: Vec<Comparison>,
    impostor: Vec<Comparison>,
}

impl Ranked {
    /// Sorts comparisons of equal (`genuine`) and different persons. Both must be there, with finite scores.
    pub fn new(mut genuine: Vec<Comparison>, mut impostor: Vec<Comparison>) -> Self {
        for comparisons in [&mut genuine, &mut impostor] {
            comparisons.par_sort_unstable_by(|a, b| b.score.total_cmp(&a.score));
        }
        Self { genuine, impostor }
    }

    /// Comparisons of the same person.
    pub fn genuine(&self) -> &[Comparison] {
        &self.genuine
    }

    /// Comparisons of different persons.
    pub fn impostor(&self) -> &[Comparison] {
        &self.impostor
    }

    /// The receiver operating characteristic.
    pub fn roc(&self) -> Roc {
        let (mut genuine, mut impostor) = (&self.genuine[..], &self.impostor[..]);
        let mut roc = Roc {
            points: vec![Point::default()],
            genuine: self.genuine.len() as u64,
            impostor: self.impostor.len() as u64,
            auc: 0.0,
        };
        // Twice the area, in units of one genuine times one impostor comparison: exact.
        let mut area = 0u128;
        let mut at = Point::default();
        let mut before: Option<Point> = None;
        while let Some(score) = highest(genuine, impostor) {
            let next = Point {
                true_accepts: at.true_accepts + take(&mut genuine, score),
                false_accepts: at.false_accepts + take(&mut impostor, score),
            };
            let width = u128::from(next.false_accepts - at.false_accepts);
            area += width * u128::from(next.true_accepts + at.true_accepts);
            // `at` matters unless the curve goes straight on; the first and the last point always do.
            if let Some(before) = before
                && next.minus(at) != at.minus(before)
            {
                roc.points.push(at);
            } else if before.is_none() && at != Point::default() {
                roc.points.push(at);
            }
            before = (at != Point::default()).then_some(at);
            at = next;
        }
        roc.points.push(at);
        roc.auc = area as f64 / (2.0 * roc.genuine as f64 * roc.impostor as f64);
        roc
    }

    /// True accept rate at a false accept rate, comparisons weighed by `weight`: on the line between the thresholds
    /// just above and just below, which is what a coin thrown between the two would give. Nothing where one kind of
    /// comparison has no weight.
    pub fn tar_at(&self, far: f64, totals: Totals, weight: impl Fn(&Comparison) -> f64) -> Option<f64> {
        if !(totals.genuine > 0.0 && totals.impostor > 0.0) {
            return None;
        }
        // Rounding must not put a target that is a whole number of comparisons a little below it.
        let allowed = far * totals.impostor;
        let whole = allowed.round();
        let allowed = if (allowed - whole).abs() < 1e-12 * whole {
            whole
        } else {
            allowed
        };
        let mut accepted = 0.0;
        for group in self.impostor.chunk_by(|a, b| a.score == b.score) {
            let group_weight: f64 = group.iter().map(&weight).sum();
            if accepted + group_weight <= allowed {
                accepted += group_weight;
                continue;
            }
            let score = group[0].score;
            let above = self.genuine.partition_point(|c| c.score > score);
            let upto = above + self.genuine[above..].partition_point(|c| c.score == score);
            let sum = |part: &[Comparison]| part.iter().map(&weight).sum::<f64>();
            let part = (allowed - accepted) / group_weight;
            let accepts = sum(&self.genuine[..above]) + part * sum(&self.genuine[above..upto]);
            return Some(accepts / totals.genuine);
        }
        Some(1.0)
    }

    /// Sums of weights.
    pub fn totals(&self, weight: impl Fn(&Comparison) -> f64) -> Totals {
        Totals {
            genuine: self.genuine.iter().map(&weight).sum(),
            impostor: self.impostor.iter().map(&weight).sum(),
        }
    }
}

/// Sums of the weights of all comparisons of one kind.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Totals {
    /// Of the same person.
    pub genuine: f64,
    /// Of different persons.
    pub impostor: f64,
}

/// The higher of the first scores.
fn highest(genuine: &[Comparison], impostor: &[Comparison]) -> Option<f64> {
    match (genuine.first(), impostor.first()) {
        (Some(a), Some(b)) => Some(a.score.max(b.score)),
        (one, other) => one.or(other).map(|c| c.score),
    }
}

/// Takes all with this score off the front.
fn take(comparisons: &mut &[Comparison], score: f64) -> u64 {
    let count = comparisons.iter().take_while(|c| c.score == score).count();
    *comparisons = &comparisons[count..];
    count as u64
}

/// Comparisons accepted at one threshold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Point {
    /// Of different persons.
    pub false_accepts: u64,
    /// Of the same person.
    pub true_accepts: u64,
}

impl Point {
    fn minus(self, other: Self) -> (u64, u64) {
        (
            self.false_accepts - other.false_accepts,
            self.true_accepts - other.true_accepts,
        )
    }
}

/// The receiver operating characteristic.
#[derive(Clone, Debug, PartialEq)]
pub struct Roc {
    /// From nothing to everything accepted. Points within a straight piece are left out, as scikit-learn does: which
    /// point is nearest to a rate depends on it.
    pub points: Vec<Point>,
    /// Comparisons of the same person.
    pub genuine: u64,
    /// Comparisons of different persons.
    pub impostor: u64,
    /// Area under the curve.
    pub auc: f64,
}

impl Roc {
    /// False and true accept rate of a point.
    pub fn rates(&self, point: Point) -> (f64, f64) {
        (
            point.false_accepts as f64 / self.impostor as f64,
            point.true_accepts as f64 / self.genuine as f64,
        )
    }

    /// True accept rate of the point whose false accept rate is nearest to `fpr`: of two equally near, the one with
    /// the higher false accept rate; of those with equal false accept rate, the one with the highest true accept rate.
    pub fn tpr_near(&self, fpr: f64) -> f64 {
        let mut best = (f64::INFINITY, 0.0);
        for &point in self.points.iter().rev() {
            let (false_rate, true_rate) = self.rates(point);
            let distance = (false_rate - fpr).abs();
            if distance < best.0 {
                best = (distance, true_rate);
            }
        }
        best.1
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Comparisons between ever new subjects.
    pub(crate) fn comparisons(scores: &[f64]) -> Vec<Comparison> {
        let with = |(i, &score): (u32, &f64)| Comparison {
            score,
            subjects: [2 * i, 2 * i + 1],
        };
        (0..).zip(scores).map(with).collect()
    }

    fn ranked(genuine: &[f64], impostor: &[f64]) -> Ranked {
        Ranked::new(comparisons(genuine), comparisons(impostor))
    }

    fn tar(ranked: &Ranked, far: f64) -> f64 {
        ranked
            .tar_at(far, ranked.totals(|_| 1.0), |_| 1.0)
            .expect("both kinds")
    }

    fn points(roc: &Roc) -> Vec<(u64, u64)> {
        roc.points
            .iter()
            .map(|p| (p.false_accepts, p.true_accepts))
            .collect()
    }

    #[test]
    fn straight_pieces_have_two_points() {
        // g g i i i g i: up, right, up, right.
        let ranked = ranked(&[0.9, 0.8, 0.4], &[0.7, 0.6, 0.5, 0.3]);
        let roc = ranked.roc();
        assert_eq!(points(&roc), [(0, 0), (0, 1), (0, 2), (3, 2), (3, 3), (4, 3)]);
        assert_eq!(roc.auc, 9.0 / 12.0);
        // Nearest: 0.25 is as far from 0 as... only 0 and 0.75 are there.
        assert_eq!((roc.tpr_near(0.25), roc.tpr_near(0.5)), (2.0 / 3.0, 1.0));
        assert_eq!(roc.tpr_near(0.375), 1.0, "of two equally near the higher");
        // Interpolated: the curve is level up to 0.75.
        assert_eq!((tar(&ranked, 0.5), tar(&ranked, 0.75)), (2.0 / 3.0, 1.0));
        assert_eq!((tar(&ranked, 0.0), tar(&ranked, 1.0)), (2.0 / 3.0, 1.0));
    }

    #[test]
    fn equal_scores_are_one_step() {
        let tied = ranked(&[0.5, 0.5, 0.1], &[0.5, 0.1]);
        let roc = tied.roc();
        assert_eq!(points(&roc), [(0, 0), (1, 2), (2, 3)]);
        assert_eq!(roc.auc, (0.5 * 2.0 + 2.5) / 6.0);
        assert_eq!(tar(&tied, 0.25), 1.0 / 3.0, "half way to two of three");
        assert_eq!(tar(&tied, 0.5), 2.0 / 3.0);
        // All equal: one step from nothing to everything.
        let flat = ranked(&[0.2; 3], &[0.2; 5]);
        assert_eq!((points(&flat.roc()), flat.roc().auc), (vec![(0, 0), (5, 3)], 0.5));
    }

    proptest! {
        /// Against the definitions, counted pair by pair. Few different scores, so that many are equal.
        #[test]
        fn area_and_rates_are_those_of_the_definition(
            genuine in prop::collection::vec(0..12u8, 1..40),
            impostor in prop::collection::vec(0..12u8, 1..40),
            far in 0.0..1.0f64,
        ) {
            let scores = |levels: &[u8]| levels.iter().map(|&l| f64::from(l) / 8.0).collect::<Vec<_>>();
            let (genuine, impostor) = (scores(&genuine), scores(&impostor));
            let ranked = ranked(&genuine, &impostor);
            let roc = ranked.roc();
            let wins: f64 = genuine
                .iter()
                .flat_map(|g| impostor.iter().map(move |i| f64::from(u8::from(g > i)) + 0.5 * f64::from(u8::from(g == i))))
                .sum();
            prop_assert!((roc.auc - wins / (genuine.len() * impostor.len()) as f64).abs() < 1e-12);
            // The interpolated rate lies on the polyline through the points.
            let rates: Vec<(f64, f64)> = roc.points.iter().map(|&p| roc.rates(p)).collect();
            let after = rates.iter().position(|&(x, _)| x > far).unwrap_or(rates.len());
            let expected = match rates.get(after) {
                None => 1.0,
                Some(&(x, y)) => {
                    let (x0, y0) = rates[after - 1];
                    y0 + (y - y0) * (far - x0) / (x - x0)
                }
            };
            let found = tar(&ranked, far);
            prop_assert!((found - expected).abs() < 1e-9, "{found} {expected}");
            prop_assert_eq!(*roc.points.last().expect("some"), Point {
                false_accepts: impostor.len() as u64,
                true_accepts: genuine.len() as u64,
            });
        }
    }
}

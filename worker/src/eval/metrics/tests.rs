//! The histograms against the reference's way: every pair against every threshold.

use super::*;
use proptest::prelude::*;

/// Accuracy of the folds, the slow way.
fn slow_accuracy(distances: &[f64], issame: &[bool]) -> Vec<f64> {
    let right = |k: usize, pairs: &mut dyn Iterator<Item = usize>| {
        pairs
            .filter(|&i| (distances[i] < 0.01 * k as f64) == issame[i])
            .count()
    };
    let folds = folds(issame.len(), FOLDS).expect("enough pairs");
    let all = 0..issame.len();
    let of_fold = |test: &Range<usize>| {
        let mut best = (0, 0);
        for k in 0..400 {
            let count = right(k, &mut all.clone().filter(|i| !test.contains(i)));
            if count > best.1 {
                best = (k, count);
            }
        }
        right(best.0, &mut test.clone()) as f64 / test.len() as f64
    };
    folds.iter().map(of_fold).collect()
}

fn slow_tar(distances: &[f64], issame: &[bool], target: f64) -> Option<f64> {
    let rate = |pairs: &[usize], kind: bool, threshold: f64| {
        let of_kind: Vec<_> = pairs.iter().filter(|&&i| issame[i] == kind).collect();
        let accepted = of_kind.iter().filter(|&&&i| distances[i] < threshold).count();
        (!of_kind.is_empty()).then(|| accepted as f64 / of_kind.len() as f64)
    };
    let mut tars = Vec::new();
    for test in folds(issame.len(), FOLDS).expect("enough pairs") {
        let train: Vec<_> = (0..issame.len()).filter(|i| !test.contains(i)).collect();
        let test: Vec<_> = test.collect();
        rate(&train, true, 0.0)?;
        let far: Option<Vec<f64>> = (0..4000).map(|k| rate(&train, false, 0.001 * k as f64)).collect();
        let far = far?;
        let threshold = match far.iter().rposition(|&f| f <= target) {
            _ if far[3999] < target => 0.0,
            Some(3999) | None => 0.001 * 3999.0,
            Some(k) => {
                let (lo, hi) = (0.001 * k as f64, 0.001 * (k + 1) as f64);
                lo + (hi - lo) * ((target - far[k]) / (far[k + 1] - far[k]))
            }
        };
        rate(&test, false, threshold)?;
        tars.push(rate(&test, true, threshold)?);
    }
    Some(mean(&tars))
}

/// Distances on and off the grids, so that the strict comparison matters.
fn pair() -> impl Strategy<Value = (f64, bool)> {
    let distance = prop_oneof![
        0.0..4.2f64,
        (0usize..420).prop_map(|k| 0.01 * k as f64),
        (0usize..4200).prop_map(|k| 0.001 * k as f64),
    ];
    (distance, any::<bool>())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn histograms_give_the_numbers_of_the_slow_way(pairs in proptest::collection::vec(pair(), 10..80),
                                                   target in prop_oneof![Just(0.1), Just(1e-3), Just(1.0), 0.0..1.0]) {
        let (distances, issame): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
        prop_assert_eq!(roc(&distances, &issame, ACCURACY_GRID).expect("enough pairs").accuracy,
                        slow_accuracy(&distances, &issame));
        let tar = tar_at_far(&distances, &issame, &[target]).expect("enough pairs");
        prop_assert_eq!(tar.map(|t| t[0].tar), slow_tar(&distances, &issame, target));
    }

    #[test]
    fn folds_cover_all_pairs_once(pairs in 10usize..5000) {
        let folds = folds(pairs, FOLDS).expect("enough pairs");
        prop_assert_eq!((folds[0].start, folds[FOLDS - 1].end), (0, pairs));
        prop_assert!(folds.windows(2).all(|w| w[0].end == w[1].start && w[0].len() >= w[1].len()));
        prop_assert!(folds[0].len() - folds[FOLDS - 1].len() <= 1);
    }

    #[test]
    fn first_accepting_is_the_first(distance in prop_oneof![0.0..5.0f64, (0usize..500).prop_map(|k| 0.01 * k as f64)]) {
        let k = ACCURACY_GRID.first_accepting(distance);
        prop_assert!(k == 400 || distance < 0.01 * k as f64);
        prop_assert!(k == 0 || distance >= 0.01 * (k - 1) as f64);
    }
}

#[test]
fn distances_and_norms_by_hand() {
    // Pair 0: the same direction; pair 1: opposite ones; pair 2: a zero vector and a unit vector.
    let emb = [1.0f32, 0.0, 2.0, 0.0, 0.0, 3.0, 0.0, -1.0, 0.0, 0.0, 1.0, 0.0];
    assert_eq!(pair_distances(&emb, &emb, 2).expect("sizes"), [0.0, 4.0, 1.0]);
    assert_eq!(mean_norm(&emb, &emb, 2), 8.0 / 6.0);
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let nan = [0.0f32, 1.0, f32::NAN, 1.0];
    assert!(matches!(
        pair_distances(&nan, &[0.0; 4], 2),
        Err(EvalError::NotFinite { row: 1 })
    ));
    assert!(matches!(
        pair_distances(&nan, &[0.0; 2], 2),
        Err(EvalError::Sizes { .. })
    ));
    assert!(matches!(
        pair_distances(&[0.0f32; 3], &[0.0; 3], 0),
        Err(EvalError::Sizes { .. })
    ));
    assert!(matches!(
        roc(&[0.1; 9], &[true; 9], ACCURACY_GRID),
        Err(EvalError::TooFewPairs { .. })
    ));
    assert_eq!(
        tar_at_far(&[0.1; 20], &[true; 20], &[0.1]).expect("enough pairs"),
        None
    );
}

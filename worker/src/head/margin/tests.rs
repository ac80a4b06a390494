//! Each loss against its formula, its derivatives against finite differences, the loop's rule against the matrix's.

use super::*;
use arcface_proto::spec::{AdaFace, CurricularFace, MagFace, MarginGradient};

const S: f64 = 64.0;

fn one(margin: Margin, cos: f64) -> (f64, f64) {
    let cos = Tensor::from_slice(&[cos]).view([1, 1]);
    let out = margin.apply(&cos, &Tensor::from_slice(&[0i64]));
    (
        out.logits.double_value(&[0, 0]),
        out.derivative.double_value(&[0, 0]),
    )
}

fn loss(of: spec::Loss) -> Loss {
    let unused = Margin::new([1.0, 0.5, 0.0], S, MarginGradient::Exact, None);
    Loss::new(of, unused, S, None)
}

fn papers() -> [spec::Loss; 3] {
    [
        spec::Loss::AdaFace(AdaFace::default()),
        spec::Loss::MagFace(MagFace::default()),
        spec::Loss::CurricularFace(CurricularFace::default()),
    ]
}

#[test]
fn formula_at_the_target() {
    for m in [
        [1.0, 0.5, 0.0],
        [1.0, 0.0, 0.4],
        [1.35, 0.0, 0.0],
        [0.9, 0.4, 0.15],
        [1.0, 0.3, 0.2],
    ] {
        for cos in [-0.99, -0.3, 0.0, 0.2, 0.8, 0.999] {
            let exact = Margin::new(m, S, MarginGradient::Exact, None);
            let logit = |cos: f64| S * ((m[0] * cos.acos() + m[1]).cos() - m[2]);
            let (value, slope) = one(exact, cos);
            assert!((value - logit(cos)).abs() < 1e-9, "{m:?} at {cos}");
            let numeric = (logit(cos + 1e-6) - logit(cos - 1e-6)) / 2e-6;
            assert!(
                (slope - numeric).abs() < 1e-3 * S,
                "{m:?} at {cos}: {slope} {numeric}"
            );
        }
    }
}

#[test]
fn the_reference_differentiates_arcface_and_cosface_as_a_plain_cosine() {
    for m in [[1.0, 0.5, 0.0], [1.0, 0.0, 0.4]] {
        assert_eq!(one(Margin::new(m, S, MarginGradient::Reference, None), 0.3).1, S);
    }
    // It has no other margins, so there "reference" is the true derivative too.
    let m = [1.35, 0.0, 0.0];
    let exact = one(Margin::new(m, S, MarginGradient::Exact, None), 0.3);
    assert_eq!(
        one(Margin::new(m, S, MarginGradient::Reference, None), 0.3),
        exact
    );
}

#[test]
fn the_exact_derivative_stays_finite_at_the_pole() {
    let margin = Margin::new([1.0, 0.5, 0.0], S, MarginGradient::Exact, None);
    for cos in [1.0, -1.0] {
        let (value, slope) = one(margin, cos);
        assert!(value.is_finite() && slope.is_finite(), "{cos}: {value} {slope}");
    }
    for of in papers() {
        for cos in [1.0, -1.0] {
            let rows = Rows {
                norms: &[25.0],
                target_cos: &[cos],
                share: 1.0,
            };
            let target = loss(of).prepare(&rows).targets()[0];
            assert!(target.value.is_finite() && target.by_cos.is_finite(), "{of:?}");
        }
    }
}

#[test]
fn filtering_spares_the_target_and_comes_before_the_margin() {
    let cos = Tensor::from_slice2(&[[0.5f64, 0.6, 0.1], [0.5, 0.6, 0.1]]);
    let margin = Margin::new([1.0, 0.0, 0.4], S, MarginGradient::Reference, Some(0.4));
    let out = margin.apply(&cos, &Tensor::from_slice(&[1i64, -1]));
    let expected = Tensor::from_slice2(&[[0.0, 0.2 * S, 0.1 * S], [0.0, 0.0, 0.1 * S]]);
    assert!((&out.logits - expected).abs().max().double_value(&[]) < 1e-12);
    let slopes = Tensor::from_slice2(&[[0.0, S, S], [0.0, 0.0, S]]);
    assert_eq!(out.derivative, slopes);
}

/// The derivatives by the cosine and by the norm, of the target's logit and of the norm's own term. AdaFace stops the
/// gradient at the norm, so its derivative by the norm is 0 although the logit moves.
#[test]
fn derivatives_are_the_slopes_of_the_formulas() {
    let norms = [12.0, 18.0, 22.0, 31.0, 60.0, 105.0];
    let cosines = [-0.6, -0.2, 0.1, 0.45, 0.8, 0.97];
    for of in papers() {
        // The statistics stand still while one value moves: no gradient flows through them.
        let mut moved = loss(of);
        moved.prepare(&Rows {
            norms: &tests_norms(),
            target_cos: &tests_cosines(),
            share: 1.0,
        });
        let at = |norm: f64, cos: f64| {
            let target = moved.rule.target(cos, norm, &moved.statistics.now);
            (target, moved.rule.norm_term(norm).unwrap_or_default())
        };
        const STEP: f64 = 1e-6;
        for norm in norms {
            for cos in cosines {
                let (target, term) = at(norm, cos);
                let (up, up_term) = at(norm + STEP, cos);
                let (down, down_term) = at(norm - STEP, cos);
                if !matches!(of, spec::Loss::AdaFace(_)) {
                    let numeric = (up.value - down.value) / (2.0 * STEP);
                    assert!((target.by_norm - numeric).abs() < 1e-6, "{of:?} by norm {norm}");
                } else {
                    assert_eq!(target.by_norm, 0.0);
                }
                let numeric = (up_term.value - down_term.value) / (2.0 * STEP);
                assert!((term.by_norm - numeric).abs() < 1e-6, "{of:?} term at {norm}");
                let (right, left) = (at(norm, cos + STEP).0, at(norm, cos - STEP).0);
                let numeric = (right.value - left.value) / (2.0 * STEP);
                assert!(
                    (target.by_cos - numeric).abs() < 1e-5,
                    "{of:?} by cos {cos}: {} {numeric}",
                    target.by_cos
                );
            }
        }
    }
}

fn tests_norms() -> [f64; 4] {
    [15.0, 20.0, 24.0, 33.0]
}

fn tests_cosines() -> [f64; 4] {
    [0.1, -0.2, 0.5, 0.3]
}

/// What a loop does with [`Others`] is what [`Prepared::apply`] does with the matrix.
#[test]
fn the_rule_of_a_row_equals_the_matrix() {
    let cosines: Vec<f32> = (0..60).map(|i| (i as f32 * 0.77).sin()).collect();
    let cos_bc = Tensor::from_slice(&cosines).view([4, 15]);
    let none = Tensor::from_slice(&[-1i64; 4]);
    for filter in [None, Some(0.6)] {
        for of in papers().into_iter().chain([spec::Loss::ArcFace]) {
            let margin = Margin::new([1.0, 0.5, 0.0], S, MarginGradient::Reference, None);
            let prepared = Loss::new(of, margin, S, filter).prepare(&Rows {
                norms: &tests_norms(),
                target_cos: &tests_cosines(),
                share: 1.0,
            });
            let whole = prepared.apply(&cos_bc, &none);
            for (i, &cos) in cosines.iter().enumerate() {
                let (row, column) = (i / 15, (i % 15) as i64);
                let others = prepared.others(row);
                let at = [row as i64, column];
                let (logit, slope) = (whole.logits.double_value(&at), whole.derivative.double_value(&at));
                assert!((f64::from(others.logit(cos)) - logit).abs() < 1e-5 * S, "{of:?}");
                assert!((f64::from(others.slope(cos)) - slope).abs() < 1e-5 * S, "{of:?}");
                assert!(logit <= prepared.largest_logit());
            }
            let plain = filter.is_none() && !matches!(of, spec::Loss::CurricularFace(_));
            assert_eq!(prepared.others(0).is_plain(), plain);
        }
    }
}

/// AdaFace by hand: norms 10, 20, 30 have mean 20 and (unbiased) standard deviation 10.
#[test]
fn adaface_follows_its_statistics() {
    let config = AdaFace {
        t_alpha: 1.0,
        ..AdaFace::default()
    };
    let norms = [10.0, 20.0, 30.0];
    let prepared = loss(spec::Loss::AdaFace(config)).prepare(&Rows {
        norms: &norms,
        target_cos: &[0.3; 3],
        share: 1.0,
    });
    for (norm, target) in norms.iter().zip(prepared.targets()) {
        let quality = (norm - 20.0) / (10.0 + 1e-3) * 0.333;
        let logit = S * ((0.3f64.acos() - 0.4 * quality).cos() - (0.4 * quality + 0.4));
        assert!((target.value - logit).abs() < 1e-9, "{} {logit}", target.value);
    }
    // A single row moves the mean but not the spread.
    let mut alone = loss(spec::Loss::AdaFace(config));
    alone.prepare(&Rows {
        norms: &[50.0],
        target_cos: &[0.3],
        share: 1.0,
    });
    assert_eq!(alone.statistics.now, [50.0, 100.0]);
}

/// Two halves of a batch leave as much of the old statistics as the whole.
#[test]
fn micro_batches_move_the_statistics_by_their_share() {
    let mut halves = loss(spec::Loss::CurricularFace(CurricularFace::default()));
    for _ in 0..2 {
        halves.prepare(&Rows {
            norms: &[1.0],
            target_cos: &[0.5],
            share: 0.5,
        });
    }
    assert!((halves.statistics.now[0] - 0.005).abs() < 1e-12);
}

/// MagFace by hand, at a norm in the middle of its range.
#[test]
fn magface_margin_and_regulariser() {
    let prepared = loss(spec::Loss::MagFace(MagFace::default())).prepare(&Rows {
        norms: &[60.0],
        target_cos: &[0.3],
        share: 1.0,
    });
    let logit = S * (0.3f64.acos() + 0.625).cos();
    assert!((prepared.targets()[0].value - logit).abs() < 1e-9);
    let term = 35.0 * (1.0 / 60.0 + 60.0 / 12100.0);
    assert!((prepared.norm_loss() - term).abs() < 1e-12);
    assert!(prepared.moves_norms());
}

/// CurricularFace by hand: t is a hundredth of the mean target cosine after one batch.
#[test]
fn curricularface_weighs_what_is_nearer_than_the_own_class() {
    let mut loss = loss(spec::Loss::CurricularFace(CurricularFace::default()));
    let rows = Rows {
        norms: &[1.0, 1.0],
        target_cos: &[0.9, 0.5],
        share: 1.0,
    };
    let others = loss.prepare(&rows).others(0);
    let t = 0.007;
    let threshold = (0.9f64.acos() + 0.5).cos() as f32;
    assert!((f64::from(others.t) - t).abs() < 1e-9);
    let close = |a: f32, b: f64| (f64::from(a) - b).abs() < 1e-4;
    assert!(close(
        others.logit(threshold - 0.01),
        S * f64::from(threshold - 0.01)
    ));
    let hard = f64::from(threshold + 0.01);
    assert!(close(others.logit(threshold + 0.01), S * hard * (t + hard)));
    assert!(close(others.slope(threshold + 0.01), S * (t + 2.0 * hard)));
}

/// Statistics move with each micro-batch, count at the update, and come back from a checkpoint.
#[test]
fn statistics_are_kept_by_an_update_alone() {
    for of in [papers()[0], papers()[2]] {
        let rows = Rows {
            norms: &tests_norms(),
            target_cos: &tests_cosines(),
            share: 1.0,
        };
        let mut first = loss(of);
        let fresh = first.statistics.now.clone();
        let once = first.prepare(&rows);
        first.discard();
        assert_eq!(first.statistics.now, fresh, "a skipped step leaves no trace");
        assert_eq!(first.prepare(&rows), once);
        first.commit();
        let state = first.state();
        assert!(state.iter().all(|(_, value)| value.size().is_empty()));
        let mut second = loss(of);
        let find = |name: &str| state.iter().find(|(n, _)| n == name).map(|(_, t)| t.copy());
        second.load_state(&mut |name| find(name)).expect("its own state");
        assert_eq!(second.prepare(&rows), first.prepare(&rows));
        assert!(second.load_state(&mut |_| None).is_err());
        let two = Tensor::from_slice(&[1f64, 2.0]);
        assert!(second.load_state(&mut |_| Some(two.copy())).is_err());
    }
}

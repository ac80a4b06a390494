//! Rows of length 1: against `unit.rs` and the tiled head's.

use super::*;
use crate::head::{
    lazy_sgd,
    tiled::kernel::{
        isa::Isa,
        rows::{RowMap, Unit},
    },
    unit,
};
use half::bf16;
use tch::{Kind, Tensor};
use twin::{History, Weights};

/// libtorch's norm is a sum in f32, in another order.
const TOLERANCE: f32 = 1e-6;

/// Rows of many lengths: 0, under and over the smallest norm, huge, and one with a NaN.
fn rows(case: u64, count: usize, dim: usize) -> Vec<f32> {
    let mut stream = stream(case);
    let mut rows = normals(&mut stream, count * dim);
    let scales = [1.0, 0.0, 1e-14, 3e-12, 1e-6, 1e6];
    for row in rows.chunks_exact_mut(dim) {
        let scale = scales[draw(&mut stream, 0..scales.len())];
        row.iter_mut().for_each(|x| *x *= scale);
    }
    if case % 5 == 4 {
        rows[dim / 2] = f32::NAN;
    }
    rows
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(tensor.to_kind(Kind::Float).view([-1])).expect("f32")
}

#[test]
fn rows_get_length_one_as_everywhere_else() {
    for (case, (count, dim)) in [(1, 1), (1, 512), (7, 5), (40, 33), (3, 64), (2, 300)]
        .into_iter()
        .enumerate()
    {
        for case in [case as u64, 10 + case as u64 * 5 + 4] {
            let rows = rows(case, count, dim);
            let (unit, norm) = unit::normalize(&Tensor::from_slice(&rows).view([count as i64, dim as i64]));
            let (unit, divisor) = (floats(&unit), floats(&norm));
            for (ours, inverse, norm) in
                in_every_launch_but_nan(|launch| twin::normalize_f32_f32(launch, &rows, dim))
            {
                close(&ours, &unit, TOLERANCE, 1e-12);
                let expected: Vec<f32> = divisor.iter().map(|norm| 1.0 / norm).collect();
                close(&inverse, &expected, TOLERANCE, 0.0);
                for ((norm, divisor), row) in norm.iter().zip(&divisor).zip(rows.chunks_exact(dim)) {
                    let exact = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
                    assert!(norm.is_nan() && exact.is_nan() || (norm - exact).abs() <= 1e-12 * exact);
                    assert!(*divisor >= 1e-12 || divisor.is_nan());
                }
            }
            // The other kinds differ in nothing but one rounding on the way in or out.
            let half_rows: Vec<bf16> = rows.iter().map(|x| bf16::from_f32(*x)).collect();
            let widened: Vec<f32> = half_rows.iter().map(|x| x.to_f32()).collect();
            let rounded =
                |unit: &[f32]| -> Vec<u16> { unit.iter().map(|x| canonical(bf16::from_f32(*x))).collect() };
            let bits = |unit: &[bf16]| -> Vec<u16> { unit.iter().map(|x| canonical(*x)).collect() };
            for launch in Launch::all() {
                let exact = twin::normalize_f32_f32(launch, &rows, dim).0;
                assert_eq!(
                    bits(&twin::normalize_f32_bf16(launch, &rows, dim).0),
                    rounded(&exact)
                );
                let exact = twin::normalize_f32_f32(launch, &widened, dim).0;
                let from_half = twin::normalize_bf16_f32(launch, &half_rows, dim).0;
                close(&from_half, &exact, 0.0, 0.0);
                assert_eq!(
                    bits(&twin::normalize_bf16_bf16(launch, &half_rows, dim).0),
                    rounded(&exact)
                );
            }
        }
    }
}

/// All NaN are one.
fn canonical(x: bf16) -> u16 {
    if x.is_nan() {
        bf16::NAN.to_bits()
    } else {
        x.to_bits()
    }
}

/// As [`in_every_launch`], which NaN would fail: its bits are compared.
fn in_every_launch_but_nan(run: impl Fn(Launch) -> twin::Normalized<f32>) -> Vec<twin::Normalized<f32>> {
    in_every_launch(|launch| {
        let (unit, inverse, norm) = run(launch);
        let bits = |values: &[f32]| -> Vec<u32> { values.iter().map(|x| x.to_bits()).collect() };
        let norm_bits: Vec<u64> = norm.iter().map(|x| x.to_bits()).collect();
        (bits(&unit), bits(&inverse), norm_bits)
    })
    .into_iter()
    .map(|(unit, inverse, norm)| {
        let floats = |bits: Vec<u32>| bits.into_iter().map(f32::from_bits).collect();
        (
            floats(unit),
            floats(inverse),
            norm.into_iter().map(f64::from_bits).collect(),
        )
    })
    .collect()
}

/// A history of `steps`, and rows that were touched at random in it.
pub(super) fn history(case: u64, steps: u32, rows: usize) -> (lazy_sgd::History, Vec<u32>) {
    let mut history = lazy_sgd::History::new(0.9, 5e-4, 0.5);
    for step in 0..steps {
        history.advance(0.1 / (1.0 + f64::from(step)));
    }
    let mut stream = stream(1000 + case);
    let since = (0..rows).map(|_| draw(&mut stream, 0..steps as usize + 1) as u32);
    (history, since.collect())
}

#[test]
fn weights_that_missed_steps_get_the_length_they_would_have() {
    for (case, (count, dim)) in [(1, 1), (5, 70), (33, 32), (9, 512)].into_iter().enumerate() {
        let case = case as u64;
        let (history, since) = history(case, 1 + 9 * case as u32, count);
        let weights = Weights {
            dim,
            weight: rows(case, count, dim),
            momentum: normals(&mut stream(case + 50), count * dim),
            history: History::of(&history, &since),
        };
        let some: Vec<u32> = (0..count as u32).step_by(2).collect();
        for chosen in [None, Some(some.as_slice())] {
            let all: Vec<u32> = (0..count as u32).collect();
            let (mut unit, mut inverse) = (Vec::new(), Vec::new());
            for &row in chosen.unwrap_or(&all) {
                let span = row as usize * dim..(row as usize + 1) * dim;
                let mut out = vec![0f32; dim];
                let missed = history.missed(since[row as usize]);
                inverse.push(Isa::best().run(Unit {
                    weight: &weights.weight[span.clone()],
                    missed: missed.map(|map| (&weights.momentum[span], RowMap::of(map))),
                    unit: &mut out,
                }));
                unit.extend(out);
            }
            for (ours, factor) in
                in_every_launch(|launch| twin::normalize_weights_f32(launch, &weights, chosen))
            {
                close(&ours, &unit, TOLERANCE, 1e-7);
                close(&factor, &inverse, TOLERANCE, 0.0);
                for launch in Launch::all().into_iter().take(3) {
                    let (half, _) = twin::normalize_weights_bf16(launch, &weights, chosen);
                    let half: Vec<f32> = half.iter().map(|x| x.to_f32()).collect();
                    close(&half, &ours, 1.0 / 256.0, 1e-7);
                }
            }
        }
        // Without a history nothing is made up for.
        let fresh = Weights {
            history: History::none(),
            ..weights
        };
        for (ours, _) in in_every_launch(|launch| twin::normalize_weights_f32(launch, &fresh, None)) {
            let exact = twin::normalize_f32_f32(Launch::all()[0], &fresh.weight, dim).0;
            close(&ours, &exact, TOLERANCE, 0.0);
        }
    }
}

//! The update of rows: against the tiled head's, for rows that have missed steps and rows that have no direction.

use super::*;
use crate::head::tiled::kernel::{
    isa::Isa,
    rows::{AdamWRow, AdamWStep, MakeUp, RowMap, SgdRow},
};
use twin::{AdamWRows, History, Sgd, Weights};

/// A step in f32, the sum along the row in another order.
const TOLERANCE: f32 = 2e-6;

const SGD: Sgd = Sgd {
    lr: 0.1,
    mu: 0.9,
    decay: 5e-4,
};

fn weights(case: u64, rows: usize, dim: usize, steps: u32) -> (Weights, crate::head::lazy_sgd::History) {
    let (history, since) = normalize::history(case, steps, rows);
    let mut stream = stream(500 + case);
    let mut weight = normals(&mut stream, rows * dim);
    // Rows without a direction.
    weight[..dim].fill(0.0);
    if rows > 2 {
        weight[dim..2 * dim].iter_mut().for_each(|w| *w *= 1e-14);
    }
    let mut momentum = normals(&mut stream, rows * dim);
    momentum[..2.min(rows) * dim].fill(0.0);
    let weights = Weights {
        dim,
        weight,
        momentum,
        history: History::of(&history, &since),
    };
    (weights, history)
}

#[test]
fn a_step_is_the_tiled_heads() {
    let shapes = [(1, 1, 0), (1, 33, 3), (5, 64, 7), (12, 70, 20), (3, 512, 1)];
    for (case, (rows, dim, steps)) in shapes.into_iter().enumerate() {
        for lazy in [true, false] {
            let case = case as u64;
            let fresh = || {
                let (mut weights, history) = weights(case, rows, dim, steps);
                if !lazy {
                    weights.history = History::none();
                }
                (weights, history)
            };
            let every = 1 + case as usize % 2;
            let chosen: Vec<u32> = (0..rows as u32).step_by(every).collect();
            let (before, history) = fresh();
            let gradient = normals(&mut stream(900 + case), chosen.len() * dim);
            let list = (every > 1 || lazy).then_some(chosen.as_slice());
            let (_, inverse) = twin::normalize_weights_f32(Launch::all()[0], &before, list);
            let (mut weight, mut momentum) = (before.weight.clone(), before.momentum.clone());
            for (place, &row) in chosen.iter().enumerate() {
                let span = row as usize * dim..(row as usize + 1) * dim;
                let missed = before.history.since.get(row as usize);
                let missed = missed.and_then(|since| history.missed(*since));
                Isa::best().run(SgdRow {
                    grad_unit: &gradient[place * dim..(place + 1) * dim],
                    inverse: inverse[place],
                    weight: &mut weight[span.clone()],
                    momentum: &mut momentum[span],
                    missed: missed.map(RowMap::of),
                    lr: SGD.lr,
                    mu: SGD.mu,
                    decay: SGD.decay,
                });
            }
            for (ours_w, ours_v, since) in in_every_launch(|launch| {
                let (mut weights, _) = fresh();
                twin::sgd_rows(launch, &mut weights, list, &gradient, &inverse, SGD);
                (weights.weight, weights.momentum, weights.history.since)
            }) {
                // A row without a length has gradients of 1e12, and every sum of them their rounding.
                for row in 0..rows {
                    let span = row * dim..(row + 1) * dim;
                    let size = |values: &[f32]| values.iter().fold(1f32, |most, x| most.max(x.abs()));
                    let absolute = TOLERANCE * size(&momentum[span.clone()]);
                    close(&ours_w[span.clone()], &weight[span.clone()], TOLERANCE, absolute);
                    close(&ours_v[span.clone()], &momentum[span], TOLERANCE, absolute);
                }
                for (row, since) in since.iter().enumerate() {
                    let expected = match chosen.contains(&(row as u32)) {
                        true => history.now() + 1,
                        false => before.history.since[row],
                    };
                    assert_eq!(*since, expected);
                }
            }
        }
    }
}

#[test]
fn rows_are_made_up_for_up_to_a_step() {
    for (case, (rows, dim, steps)) in [(1, 1, 1), (9, 40, 30), (20, 65, 12)].into_iter().enumerate() {
        let case = case as u64;
        let (before, history) = weights(case, rows, dim, steps);
        for limit in [0, steps / 2, steps] {
            let (mut weight, mut momentum) = (before.weight.clone(), before.momentum.clone());
            let mut since = before.history.since.clone();
            for (row, since) in since.iter_mut().enumerate() {
                let span = row * dim..(row + 1) * dim;
                if let (true, Some(map)) = (*since < limit, history.missed(*since)) {
                    Isa::best().run(MakeUp {
                        weight: &mut weight[span.clone()],
                        momentum: &mut momentum[span],
                        missed: RowMap::of(map),
                    });
                    *since = history.now();
                }
            }
            for (ours_w, ours_v, ours_since) in in_every_launch(|launch| {
                let (mut weights, _) = weights(case, rows, dim, steps);
                twin::make_up_rows(launch, &mut weights, limit);
                (weights.weight, weights.momentum, weights.history.since)
            }) {
                close(&ours_w, &weight, TOLERANCE, TOLERANCE);
                close(&ours_v, &momentum, TOLERANCE, TOLERANCE);
                assert_eq!(ours_since, since);
            }
        }
    }
}

#[test]
fn a_step_of_adamw_is_the_tiled_heads() {
    let step = AdamWStep::new(0.01, 0.1, (0.9, 0.999), 1e-8, 3);
    for (case, (rows, dim)) in [(1, 1), (5, 64), (9, 70), (3, 512)].into_iter().enumerate() {
        let case = 40 + case as u64;
        let (start, _) = weights(case, rows, dim, 1);
        let chosen: Vec<u32> = (0..rows as u32).step_by(2).collect();
        let before = AdamWRows {
            dim,
            mean: start.momentum.clone(),
            mean_sq: start.momentum.iter().map(|v| v * v).collect(),
            weight: start.weight.clone(),
        };
        let gradient = normals(&mut stream(700 + case), chosen.len() * dim);
        let dense = Weights {
            history: History::none(),
            ..start
        };
        let (_, inverse) = twin::normalize_weights_f32(Launch::all()[0], &dense, Some(&chosen));
        let mut expected = before.clone();
        for row in 0..rows {
            let span = row * dim..(row + 1) * dim;
            let place = chosen.iter().position(|chosen| *chosen as usize == row);
            Isa::best().run(AdamWRow {
                grad_unit: place.map(|place| (&gradient[place * dim..(place + 1) * dim], inverse[place])),
                weight: &mut expected.weight[span.clone()],
                mean: &mut expected.mean[span.clone()],
                mean_sq: &mut expected.mean_sq[span],
                step,
            });
        }
        for ours in in_every_launch(|launch| {
            let mut ours = before.clone();
            twin::adamw_rows(launch, &mut ours, &chosen, &gradient, &inverse, step);
            (ours.weight, ours.mean, ours.mean_sq)
        }) {
            for (ours, expected) in [
                (&ours.0, &expected.weight),
                (&ours.1, &expected.mean),
                (&ours.2, &expected.mean_sq),
            ] {
                for (ours, expected) in ours.chunks_exact(dim).zip(expected.chunks_exact(dim)) {
                    let size = expected.iter().fold(1f32, |most, x| most.max(x.abs()));
                    close(ours, expected, TOLERANCE, TOLERANCE * size);
                }
            }
        }
    }
}

//! Margins, sums of exponentials and the gradient by cosines: against `margin.rs` and the plain head's formula, in f64.

use super::*;
use crate::head::{
    margin::{self, Loss, Prepared, Rows},
    tiled::kernel::exponentials::first_shift,
};
use arcface_proto::spec::{self, MarginGradient};
use half::bf16;
use std::f64::consts::{LN_2, LOG2_E};
use tch::{Kind, Tensor};
use twin::{History, Margin, Others, Tile, Weights};

const S: f64 = 64.0;
/// Of a term: 2 ulp of the exponential, and t + cos of a hard class, whose rounding counts s times.
const TOLERANCE: f64 = 1e-5;

const MARGINS: [[f64; 3]; 6] = [
    [1.0, 0.5, 0.0],
    [1.0, 0.0, 0.4],
    [1.0, 0.0, -0.1],
    [1.35, 0.0, 0.0],
    [0.9, 0.4, 0.15],
    [1.0, 0.3, 0.2],
];

fn kind(exact: bool) -> MarginGradient {
    if exact {
        MarginGradient::Exact
    } else {
        MarginGradient::Reference
    }
}

/// Both sides are the same formula in f64.
#[test]
fn margins_are_those_of_the_rule() {
    let cosines: Vec<f64> = (0..=40)
        .map(|i| f64::from(i) / 20.0 - 1.0)
        .chain([0.9999999, -0.9999999])
        .collect();
    let mut target = vec![3i64; cosines.len()];
    target[5] = -1;
    let mut outside = vec![0u8; cosines.len()];
    outside[9] = 1;
    for m in MARGINS {
        for exact in [false, true] {
            let rule = margin::Margin::new(m, S, kind(exact), None);
            let prepared = rule.prepare(&cosines);
            let ours = Margin { m, scale: S, exact };
            for (logit, slope) in
                in_every_launch(|launch| twin::margin_logits(launch, ours, &cosines, &outside, &target))
            {
                for (i, expected) in prepared.targets().iter().enumerate() {
                    let expected = match i {
                        5 => (0.0, 0.0),
                        9 => (expected.value, 0.0),
                        _ => (expected.value, expected.by_cos),
                    };
                    let near =
                        |ours: f64, expected: f64| (ours - expected).abs() <= 1e-11 * expected.abs().max(S);
                    assert!(
                        near(logit[i], expected.0),
                        "{m:?} {exact} {i}: {} {}",
                        logit[i],
                        expected.0
                    );
                    assert!(
                        near(slope[i], expected.1),
                        "{m:?} {exact} {i}: {} {}",
                        slope[i],
                        expected.1
                    );
                }
            }
        }
    }
}

#[test]
fn target_cosines_are_exact_also_at_the_poles() {
    let (samples, classes) = (9, 6);
    for (case, dim) in [1, 7, 64, 130].into_iter().enumerate() {
        let mut stream = stream(case as u64);
        let mut weight = normals(&mut stream, classes * dim);
        weight[2 * dim..3 * dim].fill(0.0);
        let target: Vec<i64> = (0..samples).map(|i| [0, 1, -1, 2, 5, 0, 1, 3, 4][i]).collect();
        let mut embedding = normals(&mut stream, samples * dim);
        for (sample, sign) in [(5, 3.0), (6, -3.0)] {
            let row = target[sample] as usize;
            for d in 0..dim {
                embedding[sample * dim + d] = sign * weight[row * dim + d];
            }
        }
        let (unit, _, _) = twin::normalize_f32_f32(Launch::all()[0], &embedding, dim);
        let weights = Weights {
            dim,
            momentum: vec![0.0; weight.len()],
            weight,
            history: History::none(),
        };
        for (cosine, outside) in
            in_every_launch(|launch| twin::target_cosines(launch, &unit, &weights, &target))
        {
            for sample in 0..samples {
                let expected = match usize::try_from(target[sample]) {
                    Ok(row) if row != 2 => {
                        let pair = || {
                            (0..dim).map(|d| {
                                let (e, w) = (unit[sample * dim + d], weights.weight[row * dim + d]);
                                (f64::from(e), f64::from(w))
                            })
                        };
                        let product: f64 = pair().map(|(e, w)| e * w).sum();
                        let squares = pair().fold((0.0, 0.0), |(a, b), (e, w)| (a + e * e, b + w * w));
                        product / (squares.0 * squares.1).sqrt()
                    }
                    _ => 0.0,
                };
                let difference = (cosine[sample] - expected).abs();
                // The second order of what rounding the embedding's elements turns it by.
                assert!(difference < 1e-12, "{sample}: {} {expected}", cosine[sample]);
                assert!(outside[sample] <= 1 && (outside[sample] == 0 || cosine[sample].abs() == 1.0));
            }
            assert!(cosine[5] > 1.0 - 1e-12 && cosine[6] < 1e-12 - 1.0);
        }
    }
}

#[test]
fn target_cosines_see_what_rows_have_missed() {
    let (classes, dim) = (8, 40);
    let (history, since) = normalize::history(3, 12, classes);
    let mut stream = stream(77);
    let weights = Weights {
        dim,
        weight: normals(&mut stream, classes * dim),
        momentum: normals(&mut stream, classes * dim),
        history: History::of(&history, &since),
    };
    let (unit, _, _) = twin::normalize_f32_f32(Launch::all()[0], &normals(&mut stream, classes * dim), dim);
    let target: Vec<i64> = (0..classes as i64).collect();
    let (made_up, _) = twin::normalize_weights_f32(Launch::all()[0], &weights, None);
    for (cosine, _) in in_every_launch(|launch| twin::target_cosines(launch, &unit, &weights, &target)) {
        for (row, cosine) in cosine.into_iter().enumerate() {
            let span = row * dim..(row + 1) * dim;
            let pairs = unit[span.clone()].iter().zip(&made_up[span]);
            let expected: f64 = pairs.map(|(e, w)| f64::from(*e) * f64::from(*w)).sum();
            assert!((cosine - expected).abs() < 1e-6, "lengths of 1 are f32: {row}");
        }
    }
}

/// A micro-batch of random cosines with a loss.
struct Case {
    loss: spec::Loss,
    m: [f64; 3],
    exact: bool,
    filter: Option<f64>,
    samples: usize,
    classes: usize,
    cosines: Vec<f32>,
    target: Vec<i64>,
    prepared: Prepared,
}

impl Case {
    fn new(number: u64) -> Self {
        let mut stream = stream(300 + number);
        let (samples, classes) = match number {
            0 => (1, 1),
            1 => (1, 70),
            2 => (6, 1),
            _ => (draw(&mut stream, 1..7), draw(&mut stream, 1..90)),
        };
        let mut cosines: Vec<f32> = (0..samples * classes)
            .map(|_| stream.next_in(-1.0, 1.0) as f32)
            .collect();
        // The ends, and what rounding puts beyond them.
        for special in [1.0, -1.0, 1.0 + 2e-7, -1.0 - 2e-7] {
            let at = draw(&mut stream, 0..cosines.len());
            cosines[at] = special;
        }
        let target: Vec<i64> = (0..samples)
            .map(|_| draw(&mut stream, 0..classes + 2) as i64)
            .map(|column| if column < classes as i64 { column } else { -1 })
            .collect();
        // Samples at the poles of their own class.
        if let (0, Ok(column)) = (number % 3, usize::try_from(target[0])) {
            cosines[column] = if number.is_multiple_of(2) { 1.0 } else { -1.0 };
        }
        let m = MARGINS[draw(&mut stream, 0..MARGINS.len())];
        let exact = stream.next_uniform() < 0.5;
        let filter = (stream.next_uniform() < 0.5).then(|| stream.next_in(0.2, 0.9));
        let hard = stream.next_uniform() < 0.3;
        let loss = match hard {
            true => spec::Loss::CurricularFace(spec::CurricularFace::default()),
            false => spec::Loss::ArcFace,
        };
        let own = |sample: usize| match usize::try_from(target[sample]) {
            Ok(column) => f64::from(cosines[sample * classes + column]).clamp(-1.0, 1.0),
            Err(_) => 0.0,
        };
        let target_cos: Vec<f64> = (0..samples).map(own).collect();
        let rule = margin::Margin::new(m, S, kind(exact), filter);
        let prepared = Loss::new(loss, rule, S, filter).prepare(&Rows {
            norms: &vec![20.0; samples],
            target_cos: &target_cos,
            share: 1.0,
        });
        Self {
            loss,
            m,
            exact,
            filter,
            samples,
            classes,
            cosines,
            target,
            prepared,
        }
    }

    fn describe(&self) -> String {
        format!(
            "{:?} {:?} exact {} filter {:?}, {} samples, {} classes",
            self.loss, self.m, self.exact, self.filter, self.samples, self.classes
        )
    }

    /// Logits and derivatives `[samples, classes]`, as every head would have them.
    fn expected(&self) -> (Vec<f64>, Vec<f64>) {
        let cosines: Vec<f64> = self
            .cosines
            .iter()
            .map(|cos| f64::from(*cos).clamp(-1.0, 1.0))
            .collect();
        let matrix = Tensor::from_slice(&cosines).view([self.samples as i64, self.classes as i64]);
        let margined = self.prepared.apply(&matrix, &Tensor::from_slice(&self.target));
        let doubles = |t: Tensor| Vec::try_from(t.to_kind(Kind::Double).view([-1])).expect("f64");
        (doubles(margined.logits), doubles(margined.derivative))
    }

    /// (first, columns) of tiles with odd edges.
    fn tiles(&self) -> Vec<(usize, usize)> {
        let width = 1 + (self.classes * 7 + self.samples) % 31;
        let starts = (0..self.classes).step_by(width);
        starts
            .map(|first| (first, width.min(self.classes - first)))
            .collect()
    }

    /// The cosines of a tile, dense.
    fn tile(&self, (first, columns): (usize, usize)) -> Vec<f32> {
        let rows = self.cosines.chunks_exact(self.classes);
        rows.flat_map(|row| row[first..first + columns].to_vec())
            .collect()
    }

    fn target_logits(&self) -> Vec<f64> {
        self.prepared
            .targets()
            .iter()
            .map(|target| target.value)
            .collect()
    }

    fn others(&self) -> Others {
        let shift = first_shift(self.prepared.largest_logit());
        // Shifts may differ by sample.
        let shifts = (0..self.samples).map(|sample| shift - sample as f32).collect();
        Others::of(&self.prepared, S, shifts)
    }

    /// Sums over all tiles, by sample.
    fn sums(&self, launch: Launch, others: &Others) -> Vec<f64> {
        let mut sums = vec![0f64; self.samples];
        for span in self.tiles() {
            let tile = Tile {
                cosines: &self.tile(span),
                columns: span.1,
                first: span.0,
                target: &self.target,
            };
            twin::softmax_terms_f32(launch, tile, &self.target_logits(), others, &mut sums);
        }
        sums
    }
}

const CASES: u64 = 40;

#[test]
fn sums_and_gradients_are_those_of_the_whole_matrix() {
    for number in 0..CASES {
        let case = Case::new(number);
        let (logits, slopes) = case.expected();
        let others = case.others();
        let (target_logit, share) = (case.target_logits(), 0.5);
        let by_cosine: Vec<f64> = (0..case.samples)
            .map(|sample| match usize::try_from(case.target[sample]) {
                // What head_target_cosines says of a cosine beyond the ends.
                Ok(column) if case.cosines[sample * case.classes + column].abs() > 1.0 => 0.0,
                _ => case.prepared.targets()[sample].by_cos,
            })
            .collect();
        for sums in in_every_launch(|launch| case.sums(launch, &others)) {
            let mut gradient = vec![0f64; logits.len()];
            for (sample, sum_of_terms) in sums.iter().enumerate() {
                let row = sample * case.classes..(sample + 1) * case.classes;
                let terms: Vec<f64> = logits[row.clone()].iter().map(|logit| logit.exp()).collect();
                let sum: f64 = terms.iter().sum();
                let ours = sum_of_terms * (f64::from(others.shift[sample]) * LN_2).exp();
                let what = case.describe();
                assert!(
                    (ours / sum - 1.0).abs() < TOLERANCE,
                    "sample {sample} of {what}: {ours} {sum}"
                );
                for (column, at) in row.enumerate() {
                    let onehot = if case.target[sample] == column as i64 {
                        1.0
                    } else {
                        0.0
                    };
                    let cut = case.cosines[at].abs() > 1.0;
                    let p = (terms[column] / sum - onehot) * slopes[at];
                    gradient[at] = if cut { 0.0 } else { p / case.samples as f64 * share };
                }
            }
            let launch = Launch::all()[3];
            let rows = twin::softmax_rows(launch, &sums, &target_logit, &by_cosine, &others, share);
            for (sample, sum_of_terms) in sums.iter().enumerate() {
                let sum = sum_of_terms.ln() + f64::from(others.shift[sample]) * LN_2;
                let log_p = target_logit[sample] - sum;
                assert!((rows.loss[sample] + log_p.max(1e-30f64.ln())).abs() < 1e-9);
                // More than 1 where the sample's own class is elsewhere and not in the sum.
                assert!((rows.probability[sample] / log_p.exp() - 1.0).abs() < 1e-12);
            }
            check_gradient(&case, &others, &rows, &gradient);
        }
    }
}

fn check_gradient(case: &Case, others: &Others, rows: &twin::SoftmaxRows, gradient: &[f64]) {
    for span in case.tiles() {
        let cosines = case.tile(span);
        let (first, columns) = span;
        let tile = Tile {
            cosines: &cosines,
            columns,
            first,
            target: &case.target,
        };
        let wanted: Vec<f32> = gradient
            .chunks_exact(case.classes)
            .flat_map(|row| row[first..first + columns].iter().map(|g| *g as f32))
            .collect();
        for ours in in_every_launch(|launch| twin::softmax_gradient_f32(launch, tile, others, rows)) {
            // p - 1 of a sample that is sure loses what is next to 1; then all of it is next to nothing.
            close(&ours, &wanted, 3e-5, 1e-7);
        }
        let launch = Launch::all()[5];
        let exact = twin::softmax_gradient_f32(launch, tile, others, rows);
        let half_cosines: Vec<bf16> = cosines.iter().map(|cos| bf16::from_f32(*cos)).collect();
        let widened: Vec<f32> = half_cosines.iter().map(|cos| cos.to_f32()).collect();
        let rounded = |values: Vec<f32>| -> Vec<bf16> { values.into_iter().map(bf16::from_f32).collect() };
        let of = |cosines| Tile { cosines, ..tile };
        let half_tile = Tile {
            cosines: &half_cosines,
            columns,
            first,
            target: &case.target,
        };
        assert_eq!(
            twin::softmax_gradient_bf16(launch, half_tile, others, rows),
            rounded(twin::softmax_gradient_f32(launch, of(&widened), others, rows))
        );
        let (mut from_half, mut from_wide) = (vec![0f64; case.samples], vec![0f64; case.samples]);
        let logits = case.target_logits();
        let half_terms = twin::softmax_terms_bf16(launch, half_tile, &logits, others, &mut from_half);
        let terms = twin::softmax_terms_f32(launch, of(&widened), &logits, others, &mut from_wide);
        assert_eq!(from_half, from_wide);
        assert_eq!(half_terms, rounded(terms));
        // The terms are the gradient before it is multiplied by the factors, without the samples' own classes.
        let plain = twin::SoftmaxRows {
            loss: Vec::new(),
            probability: Vec::new(),
            factor: vec![1.0; case.samples],
            target_gradient: vec![0.0; case.samples],
        };
        let mut sums = vec![0f64; case.samples];
        assert_eq!(
            twin::softmax_terms_f32(launch, tile, &logits, others, &mut sums),
            twin::softmax_gradient_f32(launch, tile, others, &plain)
        );
        // In place, with a gap behind every row that is not touched.
        let stride = columns + 3;
        let mut padded: Vec<f32> = cosines
            .chunks_exact(columns)
            .flat_map(|row| row.iter().copied().chain([9.0; 3]))
            .collect();
        twin::softmax_gradient_in_place(launch, &mut padded, stride, tile, others, rows);
        let unpadded: Vec<f32> = padded
            .chunks_exact(stride)
            .flat_map(|row| row[..columns].to_vec())
            .collect();
        assert_eq!(unpadded, exact);
        assert!(padded.chunks_exact(stride).all(|row| row[columns..] == [9.0; 3]));
    }
}

#[test]
fn the_largest_logit_is_found_where_sums_are_lost() {
    for number in 0..CASES {
        let case = Case::new(number);
        let (logits, _) = case.expected();
        let others = case.others();
        for largest in in_every_launch(|launch| {
            let mut largest = vec![f32::NEG_INFINITY; case.samples];
            for span in case.tiles() {
                let tile = Tile {
                    cosines: &case.tile(span),
                    columns: span.1,
                    first: span.0,
                    target: &case.target,
                };
                twin::largest_logits_f32(launch, tile, &case.target_logits(), &others, &mut largest);
            }
            largest
        }) {
            for (sample, largest) in largest.iter().enumerate() {
                let row = &logits[sample * case.classes..(sample + 1) * case.classes];
                let expected = row.iter().copied().fold(f64::NEG_INFINITY, f64::max) * LOG2_E;
                let difference = (f64::from(*largest) - expected).abs();
                assert!(difference < 1e-3, "{}: {largest} {expected}", case.describe());
            }
        }
        let half: Vec<bf16> = case.cosines.iter().map(|cos| bf16::from_f32(*cos)).collect();
        let wide: Vec<f32> = half.iter().map(|cos| cos.to_f32()).collect();
        let (mut from_half, mut from_wide) = (vec![-200f32; case.samples], vec![-200f32; case.samples]);
        let launch = Launch::all()[2];
        let tile = Tile {
            cosines: &wide,
            columns: case.classes,
            first: 0,
            target: &case.target,
        };
        twin::largest_logits_f32(launch, tile, &case.target_logits(), &others, &mut from_wide);
        let tile = Tile {
            cosines: &half,
            columns: case.classes,
            first: 0,
            target: &case.target,
        };
        twin::largest_logits_bf16(launch, tile, &case.target_logits(), &others, &mut from_half);
        assert_eq!(from_half, from_wide);
    }
}

/// What is not a number makes its own sample's loss so, and no other's.
#[test]
fn a_cosine_that_is_no_number_is_not_hidden() {
    let rule = margin::Margin::new([1.0, 0.5, 0.0], S, MarginGradient::Reference, Some(0.4));
    let prepared = rule.prepare(&[0.3, 0.2]);
    let others = Others::of(&prepared, S, vec![0.0; 2]);
    let cosines = [f32::NAN, 0.1, 0.3, 0.2, 0.1, 0.0];
    let tile = Tile {
        cosines: &cosines,
        columns: 3,
        first: 0,
        target: &[2, 0],
    };
    let logits = [10.0, 12.0];
    for launch in Launch::all() {
        let mut sums = vec![0f64; 2];
        twin::softmax_terms_f32(launch, tile, &logits, &others, &mut sums);
        assert!(sums[0].is_nan() && sums[1].is_finite());
        let rows = twin::softmax_rows(launch, &sums, &logits, &[S; 2], &others, 1.0);
        assert!(rows.loss[0].is_nan() && rows.loss[1].is_finite());
        let gradient = twin::softmax_gradient_f32(launch, tile, &others, &rows);
        assert!(gradient[..3].iter().all(|g| g.is_nan()) && gradient[3..].iter().all(|g| g.is_finite()));
    }
}

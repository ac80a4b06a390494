//! Cosines with own classes, margins, sums of exponentials and their gradient, on the CPU.
//!
//! It needs `unsafe` for the same reason as the folder's head.
#![allow(unsafe_code)]

use super::{RawHistory, Weights};
use crate::head::{cuda::raw::Others as RawOthers, margin};
use crate::kernels::twin::Launch;
use half::bf16;
use std::ptr;

macro_rules! tile_arguments {
    ($($name:ident($cosines:ty, $out:ty);)*) => {
        unsafe extern "C" {
            $(fn $name(
                cosines: $cosines, stride: i64, samples: i64, columns: i64, first: i64, target: *const i64,
                target_logit: *const f64, others: RawOthers, out: *mut $out,
            );)*
        }
    };
}
tile_arguments! {
    head_softmax_terms_f32(*mut f32, f64);
    head_softmax_terms_bf16(*mut bf16, f64);
    head_largest_logits_f32(*const f32, f32);
    head_largest_logits_bf16(*const bf16, f32);
}

macro_rules! gradient_arguments {
    ($($name:ident($type:ty);)*) => {
        unsafe extern "C" {
            $(fn $name(
                cosines: *mut $type, stride: i64, samples: i64, columns: i64, first: i64, target: *const i64,
                others: RawOthers, factor: *const f32, target_gradient: *const f32,
            );)*
        }
    };
}
gradient_arguments! {
    head_softmax_gradient_f32(f32);
    head_softmax_gradient_bf16(bf16);
}

unsafe extern "C" {
    fn head_target_cosines(
        unit: *const f32,
        samples: i64,
        dim: i64,
        weight: *const f32,
        momentum: *const f32,
        history: RawHistory,
        target_row: *const i64,
        cosine: *mut f64,
        outside: *mut u8,
    );
    fn head_margin_logits(
        cosine: *const f64,
        outside: *const u8,
        target: *const i64,
        samples: i64,
        m1: f64,
        m2: f64,
        m3: f64,
        scale: f64,
        exact: i32,
        target_logit: *mut f64,
        by_cosine: *mut f64,
    );
    fn head_softmax_rows(
        sums: *const f64,
        target_logit: *const f64,
        by_cosine: *const f64,
        shift: *const f32,
        samples: i64,
        scale: f64,
        share: f64,
        min_probability: f64,
        loss: *mut f64,
        probability: *mut f64,
        factor: *mut f32,
        target_gradient: *mut f32,
    );
}

/// By sample the cosine with the class in row `target_row`, and whether it was outside of [-1, 1].
pub fn target_cosines(
    launch: Launch,
    unit: &[f32],
    weights: &Weights,
    target_row: &[i64],
) -> (Vec<f64>, Vec<u8>) {
    weights.check(&[]);
    let samples = target_row.len();
    assert_eq!(unit.len(), samples * weights.dim);
    assert!(target_row.iter().all(|row| *row < weights.rows() as i64));
    let (mut cosine, mut outside) = (vec![7f64; samples], vec![7u8; samples]);
    let out = (cosine.as_mut_ptr(), outside.as_mut_ptr());
    // SAFETY: the lengths and rows were compared.
    launch.run(|| unsafe {
        head_target_cosines(
            unit.as_ptr(),
            samples as i64,
            weights.dim as i64,
            weights.weight.as_ptr(),
            weights.momentum.as_ptr(),
            weights.history.raw(),
            target_row.as_ptr(),
            out.0,
            out.1,
        );
    });
    (cosine, outside)
}

/// An angular margin: m1, m2, m3, scale, the true derivative.
#[derive(Clone, Copy, Debug)]
pub struct Margin {
    pub m: [f64; 3],
    pub scale: f64,
    pub exact: bool,
}

/// By sample the logit of its own class, and its derivative by the cosine.
pub fn margin_logits(
    launch: Launch,
    margin: Margin,
    cosine: &[f64],
    outside: &[u8],
    target: &[i64],
) -> (Vec<f64>, Vec<f64>) {
    let samples = target.len();
    assert_eq!((cosine.len(), outside.len()), (samples, samples));
    let (mut logit, mut slope) = (vec![7f64; samples], vec![7f64; samples]);
    let out = (logit.as_mut_ptr(), slope.as_mut_ptr());
    let [m1, m2, m3] = margin.m;
    // SAFETY: the lengths were compared.
    launch.run(|| unsafe {
        head_margin_logits(
            cosine.as_ptr(),
            outside.as_ptr(),
            target.as_ptr(),
            samples as i64,
            m1,
            m2,
            m3,
            margin.scale,
            margin.exact.into(),
            out.0,
            out.1,
        );
    });
    (logit, slope)
}

/// What the loss does to other classes, by sample.
pub struct Others {
    scale: f64,
    zero_above: f32,
    t: f32,
    hard_above: Vec<f32>,
    pub shift: Vec<f32>,
}

impl Others {
    /// As a GPU would be given it.
    pub fn of(prepared: &margin::Prepared, scale: f64, shift: Vec<f32>) -> Self {
        let rules: Vec<_> = (0..shift.len()).map(|row| prepared.others(row)).collect();
        let hard = rules.iter().any(|rule| rule.hard_above != f32::INFINITY);
        Self {
            scale,
            zero_above: rules.first().map_or(f32::INFINITY, |rule| rule.zero_above),
            t: rules.first().map_or(0.0, |rule| rule.t),
            hard_above: match hard {
                true => rules.iter().map(|rule| rule.hard_above).collect(),
                false => Vec::new(),
            },
            shift,
        }
    }

    fn raw(&self) -> RawOthers {
        RawOthers {
            zero_above: self.zero_above,
            t: self.t,
            hard_above: match self.hard_above.is_empty() {
                true => ptr::null(),
                false => self.hard_above.as_ptr().cast(),
            },
            shift: self.shift.as_ptr().cast(),
            ..RawOthers::of_scale(self.scale)
        }
    }
}

/// Cosines of every sample with the classes of some columns, from `first` on.
#[derive(Clone, Copy)]
pub struct Tile<'a, T> {
    pub cosines: &'a [T],
    pub columns: usize,
    pub first: usize,
    /// By sample: column of its own class, or -1.
    pub target: &'a [i64],
}

impl<T> Tile<'_, T> {
    fn check(&self, others: &Others) -> i64 {
        let samples = self.target.len();
        assert_eq!(self.cosines.len(), samples * self.columns);
        assert_eq!(others.shift.len(), samples);
        assert!(others.hard_above.is_empty() || others.hard_above.len() == samples);
        samples as i64
    }
}

macro_rules! largest_logits {
    ($name:ident, $kernel:ident, $in:ty) => {
        pub fn $name(
            launch: Launch,
            tile: Tile<'_, $in>,
            target_logit: &[f64],
            others: &Others,
            largest: &mut [f32],
        ) {
            let samples = tile.check(others);
            assert_eq!(
                (target_logit.len() as i64, largest.len() as i64),
                (samples, samples)
            );
            let columns = tile.columns as i64;
            let largest = largest.as_mut_ptr();
            // SAFETY: `check` compared what the tile reads, the line above the rest.
            launch.run(|| unsafe {
                $kernel(
                    tile.cosines.as_ptr(),
                    columns,
                    samples,
                    columns,
                    tile.first as i64,
                    tile.target.as_ptr(),
                    target_logit.as_ptr(),
                    others.raw(),
                    largest,
                )
            });
        }
    };
}
largest_logits!(largest_logits_f32, head_largest_logits_f32, f32);
largest_logits!(largest_logits_bf16, head_largest_logits_bf16, bf16);

macro_rules! softmax_terms {
    ($name:ident, $kernel:ident, $type:ty) => {
        /// The terms, which are added to `sums`.
        pub fn $name(
            launch: Launch,
            tile: Tile<'_, $type>,
            target_logit: &[f64],
            others: &Others,
            sums: &mut [f64],
        ) -> Vec<$type> {
            let samples = tile.check(others);
            assert_eq!(
                (target_logit.len() as i64, sums.len() as i64),
                (samples, samples)
            );
            let columns = tile.columns as i64;
            let mut terms = tile.cosines.to_vec();
            let (place, sums) = (terms.as_mut_ptr(), sums.as_mut_ptr());
            // SAFETY: `check` compared what the tile reads, which is as much as is written; the line above the rest.
            launch.run(|| unsafe {
                $kernel(
                    place,
                    columns,
                    samples,
                    columns,
                    tile.first as i64,
                    tile.target.as_ptr(),
                    target_logit.as_ptr(),
                    others.raw(),
                    sums,
                )
            });
            terms
        }
    };
}
softmax_terms!(softmax_terms_f32, head_softmax_terms_f32, f32);
softmax_terms!(softmax_terms_bf16, head_softmax_terms_bf16, bf16);

/// What `head_softmax_rows` gives, by sample.
pub struct SoftmaxRows {
    pub loss: Vec<f64>,
    pub probability: Vec<f64>,
    pub factor: Vec<f32>,
    pub target_gradient: Vec<f32>,
}

pub fn softmax_rows(
    launch: Launch,
    sums: &[f64],
    target_logit: &[f64],
    by_cosine: &[f64],
    others: &Others,
    share: f64,
) -> SoftmaxRows {
    /// As in the heads.
    const MIN_PROBABILITY: f64 = 1e-30;
    let samples = sums.len();
    assert_eq!((target_logit.len(), by_cosine.len()), (samples, samples));
    assert_eq!(others.shift.len(), samples);
    let (mut loss, mut probability) = (vec![0f64; samples], vec![0f64; samples]);
    let (mut factor, mut target_gradient) = (vec![0f32; samples], vec![0f32; samples]);
    let out = (
        loss.as_mut_ptr(),
        probability.as_mut_ptr(),
        factor.as_mut_ptr(),
        target_gradient.as_mut_ptr(),
    );
    // SAFETY: the lengths were compared.
    launch.run(|| unsafe {
        head_softmax_rows(
            sums.as_ptr(),
            target_logit.as_ptr(),
            by_cosine.as_ptr(),
            others.shift.as_ptr(),
            samples as i64,
            others.scale,
            share,
            MIN_PROBABILITY,
            out.0,
            out.1,
            out.2,
            out.3,
        );
    });
    SoftmaxRows {
        loss,
        probability,
        factor,
        target_gradient,
    }
}

macro_rules! softmax_gradient {
    ($name:ident, $kernel:ident, $type:ty) => {
        pub fn $name(
            launch: Launch,
            tile: Tile<'_, $type>,
            others: &Others,
            rows: &SoftmaxRows,
        ) -> Vec<$type> {
            let samples = tile.check(others);
            assert_eq!(rows.factor.len() as i64, samples);
            let columns = tile.columns as i64;
            let mut gradient = tile.cosines.to_vec();
            let place = gradient.as_mut_ptr();
            // SAFETY: `check` compared what the tile reads; as much is written.
            launch.run(|| unsafe {
                $kernel(
                    place,
                    columns,
                    samples,
                    columns,
                    tile.first as i64,
                    tile.target.as_ptr(),
                    others.raw(),
                    rows.factor.as_ptr(),
                    rows.target_gradient.as_ptr(),
                )
            });
            gradient
        }
    };
}
softmax_gradient!(softmax_gradient_f32, head_softmax_gradient_f32, f32);
softmax_gradient!(softmax_gradient_bf16, head_softmax_gradient_bf16, bf16);

/// The same in place. The cosines' rows have a gap behind them that stays as it is.
pub fn softmax_gradient_in_place(
    launch: Launch,
    cosines: &mut [f32],
    stride: usize,
    tile: Tile<'_, f32>,
    others: &Others,
    rows: &SoftmaxRows,
) {
    let samples = tile.target.len();
    assert_eq!(cosines.len(), samples * stride);
    assert!(tile.columns <= stride && others.shift.len() == samples && rows.factor.len() == samples);
    let place = cosines.as_mut_ptr();
    // SAFETY: the lengths were compared.
    launch.run(|| unsafe {
        head_softmax_gradient_f32(
            place,
            stride as i64,
            samples as i64,
            tile.columns as i64,
            tile.first as i64,
            tile.target.as_ptr(),
            others.raw(),
            rows.factor.as_ptr(),
            rows.target_gradient.as_ptr(),
        );
    });
}

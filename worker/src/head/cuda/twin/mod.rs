//! The kernels on the CPU, for tests: safe functions over slices, one a kernel or a chain of kernels, and a launcher for the
//! whole head (`launcher.rs`). Owns the launches; what the kernels should compute is the tests' business.
//!
//! It needs `unsafe` because the kernels are C++ functions over pointers. Every function here derives the counts that it
//! passes from the slices that it got, or compares them.
#![allow(unsafe_code)]

mod sampling;
mod softmax;

pub use sampling::sample;
pub use softmax::{
    Margin, Others, SoftmaxRows, Tile, largest_logits_bf16, largest_logits_f32, margin_logits,
    softmax_gradient_bf16, softmax_gradient_f32, softmax_gradient_in_place, softmax_rows, softmax_terms_bf16,
    softmax_terms_f32, target_cosines,
};

use crate::head::{
    cuda::raw::History as RawHistory,
    lazy_sgd,
    tiled::kernel::rows::{AdamWStep, RowMap},
};
use crate::kernels::twin::Launch;
use half::bf16;
use std::ptr;

unsafe extern "C" {
    fn head_sgd_rows_f32(
        gradient: *const f32,
        inverse: *const f32,
        chosen: *const u32,
        count: i64,
        dim: i64,
        weight: *mut f32,
        momentum: *mut f32,
        history: RawHistory,
        touched: *mut u32,
        lr: f32,
        mu: f32,
        decay: f32,
    );
    fn head_adamw_rows_f32(
        gradient: *const f32,
        inverse: *const f32,
        chosen: *const u32,
        count: i64,
        dim: i64,
        weight: *mut f32,
        mean: *mut f32,
        mean_sq: *mut f32,
        step: AdamWStep,
    );
    fn head_adamw_idle_rows(
        taken: *const u8,
        rows: i64,
        dim: i64,
        weight: *mut f32,
        mean: *mut f32,
        mean_sq: *mut f32,
        step: AdamWStep,
    );
    fn head_make_up_rows(
        rows: i64,
        dim: i64,
        weight: *mut f32,
        momentum: *mut f32,
        history: RawHistory,
        touched: *mut u32,
        before: u32,
    );
}

/// The steps that rows of weights have missed.
pub struct History {
    /// By row; empty: rows never miss any.
    pub since: Vec<u32>,
    products: Vec<RowMap>,
    now: u32,
}

impl History {
    /// No row ever misses a step.
    pub fn none() -> Self {
        Self {
            since: Vec::new(),
            products: Vec::new(),
            now: 0,
        }
    }

    /// As a GPU would be given it. `history` has forgotten nothing.
    pub fn of(history: &lazy_sgd::History, since: &[u32]) -> Self {
        Self {
            since: since.to_vec(),
            products: history.remembered().map(RowMap::of).collect(),
            now: history.now(),
        }
    }

    fn check(&self, rows: usize) {
        assert!(self.since.is_empty() || self.since.len() == rows);
        let oldest = self.now - self.products.len() as u32;
        // One more than now: touched in this step.
        assert!(
            self.since
                .iter()
                .all(|since| (oldest..=self.now + 1).contains(since))
        );
    }

    fn raw(&self) -> RawHistory {
        RawHistory {
            since: match self.since.is_empty() {
                true => ptr::null(),
                false => self.since.as_ptr().cast(),
            },
            products: self.products.as_ptr().cast(),
            remembered: self.products.len() as u32,
            now: self.now,
        }
    }
}

/// Rows of length 1, 1 / norm, norm.
pub type Normalized<T> = (Vec<T>, Vec<f32>, Vec<f64>);

macro_rules! normalize_rows {
    ($name:ident, $kernel:ident, $in:ty, $out:ty) => {
        unsafe extern "C" {
            fn $kernel(
                rows: *const $in,
                count: i64,
                dim: i64,
                unit: *mut $out,
                inverse: *mut f32,
                norm: *mut f64,
            );
        }

        pub fn $name(launch: Launch, rows: &[$in], dim: usize) -> Normalized<$out> {
            let count = rows.len() / dim;
            let mut unit = vec![<$out>::default(); count * dim];
            let (mut inverse, mut norm) = (vec![0f32; count], vec![0f64; count]);
            let out = (unit.as_mut_ptr(), inverse.as_mut_ptr(), norm.as_mut_ptr());
            // SAFETY: count * dim elements are read and written, and count of the other two.
            launch.run(|| unsafe { $kernel(rows.as_ptr(), count as i64, dim as i64, out.0, out.1, out.2) });
            (unit, inverse, norm)
        }
    };
}
normalize_rows!(normalize_f32_f32, head_normalize_rows_f32_f32, f32, f32);
normalize_rows!(normalize_f32_bf16, head_normalize_rows_f32_bf16, f32, bf16);
normalize_rows!(normalize_bf16_f32, head_normalize_rows_bf16_f32, bf16, f32);
normalize_rows!(normalize_bf16_bf16, head_normalize_rows_bf16_bf16, bf16, bf16);

/// Class weights with their momentum, `[rows, dim]`.
pub struct Weights {
    pub dim: usize,
    pub weight: Vec<f32>,
    pub momentum: Vec<f32>,
    pub history: History,
}

impl Weights {
    pub fn rows(&self) -> usize {
        self.weight.len() / self.dim
    }

    fn check(&self, chosen: &[u32]) {
        assert_eq!(self.weight.len(), self.momentum.len());
        assert!(self.weight.len().is_multiple_of(self.dim));
        assert!(chosen.iter().all(|row| (*row as usize) < self.rows()));
        self.history.check(self.rows());
    }
}

macro_rules! normalize_weights {
    ($name:ident, $kernel:ident, $out:ty) => {
        unsafe extern "C" {
            fn $kernel(
                weight: *const f32,
                momentum: *const f32,
                history: RawHistory,
                chosen: *const u32,
                count: i64,
                dim: i64,
                unit: *mut $out,
                inverse: *mut f32,
            );
        }

        /// `chosen`: `None` is all rows.
        pub fn $name(launch: Launch, weights: &Weights, chosen: Option<&[u32]>) -> (Vec<$out>, Vec<f32>) {
            weights.check(chosen.unwrap_or(&[]));
            let count = chosen.map_or(weights.rows(), <[u32]>::len);
            let mut unit = vec![<$out>::default(); count * weights.dim];
            let mut inverse = vec![0f32; count];
            let out = (unit.as_mut_ptr(), inverse.as_mut_ptr());
            let list = chosen.map_or(ptr::null(), <[u32]>::as_ptr);
            // SAFETY: `check` saw that all rows and steps named are there; count rows are written.
            launch.run(|| unsafe {
                $kernel(
                    weights.weight.as_ptr(),
                    weights.momentum.as_ptr(),
                    weights.history.raw(),
                    list,
                    count as i64,
                    weights.dim as i64,
                    out.0,
                    out.1,
                )
            });
            (unit, inverse)
        }
    };
}
normalize_weights!(normalize_weights_f32, head_normalize_weights_f32, f32);
normalize_weights!(normalize_weights_bf16, head_normalize_weights_bf16, bf16);

/// The numbers of a step.
#[derive(Clone, Copy, Debug)]
pub struct Sgd {
    pub lr: f32,
    pub mu: f32,
    pub decay: f32,
}

/// One step on some rows (`None`: all), from the gradient by rows of length 1.
pub fn sgd_rows(
    launch: Launch,
    weights: &mut Weights,
    chosen: Option<&[u32]>,
    gradient: &[f32],
    inverse: &[f32],
    sgd: Sgd,
) {
    weights.check(chosen.unwrap_or(&[]));
    let count = chosen.map_or(weights.rows(), <[u32]>::len);
    assert_eq!((gradient.len(), inverse.len()), (count * weights.dim, count));
    let dim = weights.dim as i64;
    let touched = match weights.history.since.is_empty() {
        true => ptr::null_mut(),
        false => weights.history.since.as_mut_ptr(),
    };
    let mut history = weights.history.raw();
    history.since = touched.cast();
    let (weight, momentum) = (weights.weight.as_mut_ptr(), weights.momentum.as_mut_ptr());
    let list = chosen.map_or(ptr::null(), <[u32]>::as_ptr);
    // SAFETY: `check` saw that all rows and steps named are there; the lengths were compared.
    launch.run(|| unsafe {
        head_sgd_rows_f32(
            gradient.as_ptr(),
            inverse.as_ptr(),
            list,
            count as i64,
            dim,
            weight,
            momentum,
            history,
            touched,
            sgd.lr,
            sgd.mu,
            sgd.decay,
        );
    });
}

/// Makes up for what rows have missed that were touched before `before`.
pub fn make_up_rows(launch: Launch, weights: &mut Weights, before: u32) {
    weights.check(&[]);
    assert!(!weights.history.since.is_empty());
    let (rows, dim) = (weights.rows() as i64, weights.dim as i64);
    let touched = weights.history.since.as_mut_ptr();
    let mut history = weights.history.raw();
    history.since = touched.cast();
    let (weight, momentum) = (weights.weight.as_mut_ptr(), weights.momentum.as_mut_ptr());
    // SAFETY: `check` saw that all steps named are there; every row has an element of `since`.
    launch.run(|| unsafe { head_make_up_rows(rows, dim, weight, momentum, history, touched, before) });
}

/// Weights with the two means of AdamW, `[rows, dim]` each.
#[derive(Clone)]
pub struct AdamWRows {
    pub dim: usize,
    pub weight: Vec<f32>,
    pub mean: Vec<f32>,
    pub mean_sq: Vec<f32>,
}

impl AdamWRows {
    fn rows(&self) -> usize {
        assert_eq!(
            (self.mean.len(), self.mean_sq.len()),
            (self.weight.len(), self.weight.len())
        );
        self.weight.len() / self.dim
    }
}

/// One step on the rows `chosen`, from the gradient by rows of length 1; then on all others, whose gradient is 0.
pub fn adamw_rows(
    launch: Launch,
    rows: &mut AdamWRows,
    chosen: &[u32],
    gradient: &[f32],
    inverse: &[f32],
    step: AdamWStep,
) {
    let (count, dim) = (chosen.len(), rows.dim as i64);
    let mut taken = vec![0u8; rows.rows()];
    chosen.iter().for_each(|row| taken[*row as usize] = 1);
    assert_eq!((gradient.len(), inverse.len()), (count * rows.dim, count));
    let (weight, mean) = (rows.weight.as_mut_ptr(), rows.mean.as_mut_ptr());
    let mean_sq = rows.mean_sq.as_mut_ptr();
    // SAFETY: the lengths were compared, and every row named has a flag, so it is there.
    launch.run(|| unsafe {
        head_adamw_rows_f32(
            gradient.as_ptr(),
            inverse.as_ptr(),
            chosen.as_ptr(),
            count as i64,
            dim,
            weight,
            mean,
            mean_sq,
            step,
        );
    });
    let all = taken.len() as i64;
    // SAFETY: as above; every row has a flag.
    launch.run(|| unsafe {
        head_adamw_idle_rows(taken.as_ptr(), all, dim, weight, mean, mean_sq, step);
    });
}

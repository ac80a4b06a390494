//! Batch norm with the rectifier or the sum that follows it in the same pass over memory (`norm.cu` on a GPU, `cpu.cpp`), as one
//! function of autograd's (`autograd.cpp`). libtorch reads and writes what lies between them, and keeps it for the way back.
//!
//! For activations `[N, C, H, W]` with channels innermost, in f32 and bf16, whose statistics are the batch's. Everything else
//! is libtorch's (`layers.rs`). In bf16 what lies between norm and rectifier is not rounded, which libtorch's is.
//!
//! Unsafe, because autograd is reached across the C interface.
#![allow(unsafe_code)]

mod kernels;
#[cfg(all(test, cuda_twin))]
mod tests;

use std::ffi::{c_char, c_void};

use tch::{Kind, Tensor};

use super::native::made;
use crate::kernels::{
    COMMON, File, Kernels, Set,
    launch::{BLOCK, GROUP},
};

/// The kernels.
pub const KERNELS: Set = Set {
    headers: &[COMMON],
    files: &[File {
        name: "norm.cu",
        text: include_str!("norm.cu"),
        kernels: &[
            "norm_apply_bf16",
            "norm_apply_f32",
            "norm_back_apply_bf16",
            "norm_back_apply_f32",
            "norm_back_sums_bf16",
            "norm_back_sums_f32",
            "norm_finish_back",
            "norm_finish_moments_bf16",
            "norm_finish_moments_f32",
            "norm_moments_bf16",
            "norm_moments_f32",
        ],
    }],
};

/// A batch norm's numbers: all `[C]` f32.
pub struct Norm<'a> {
    /// Of the normalised value.
    pub weight: &'a Tensor,
    /// Added to it.
    pub bias: &'a Tensor,
    /// Mean and variance that move with the batch's; none where they stay.
    pub running: Option<(&'a Tensor, &'a Tensor)>,
    /// How far they move.
    pub momentum: f64,
    /// Added to the variance.
    pub eps: f64,
}

/// What follows the norm.
#[derive(Clone, Copy)]
pub enum Then<'a> {
    /// Nothing.
    Nothing,
    /// PReLU with slopes `[C]` f32.
    PRelu(&'a Tensor),
    /// A sum with a tensor of the same form.
    Add(&'a Tensor),
}

/// Where it is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On the CPU.
    Cpu,
    /// By the kernels.
    Gpu,
}

/// True if [`batch_norm`] takes activations of this form there.
pub fn takes_form(place: Place, size: &[i64], kind: Kind) -> bool {
    let &[_, channels, ..] = size else { return false };
    let groups = channels / GROUP;
    let fits = match place {
        Place::Cpu => true,
        // A block's threads lie along a row.
        Place::Gpu => {
            channels % GROUP == 0 && groups > 0 && groups <= i64::from(BLOCK) && groups & (groups - 1) == 0
        }
    };
    size.len() == 4 && fits && matches!(kind, Kind::Float | Kind::BFloat16) && !size.contains(&0)
}

/// True if they lie in memory as it takes them: dense, channels innermost.
pub fn is_laid_out(x: &Tensor) -> bool {
    kernels::rows(x).is_contiguous()
}

unsafe extern "C" {
    fn arcface_norm(
        kernels: *const c_void,
        tensors: *const *const c_void,
        eps: f64,
        momentum: f64,
        error: *mut c_char,
        length: usize,
    ) -> *mut c_void;
}

/// `x` normalised by the batch's statistics, and what follows: the form and kind of `x`, which [`takes_form`] and
/// [`is_laid_out`] have found good. Without kernels the CPU computes.
///
/// # Panics
/// If the tensors do not fit, as tch's own functions do.
pub fn batch_norm(kernels: Option<&Kernels>, x: &Tensor, norm: &Norm<'_>, then: Then<'_>) -> Tensor {
    let (slope, shortcut) = match then {
        Then::Nothing => (None, None),
        Then::PRelu(slope) => (Some(slope), None),
        Then::Add(shortcut) => (None, Some(shortcut)),
    };
    let (mean, variance) = norm.running.unzip();
    let tensors = [
        Some(x),
        Some(norm.weight),
        Some(norm.bias),
        slope,
        shortcut,
        mean,
        variance,
    ];
    let tensors = tensors.map(|tensor| tensor.map_or(std::ptr::null(), |tensor| tensor.as_ptr().cast()));
    // SAFETY: all pointers but null are to tensors that outlive the call. The handle goes to C++.
    made("batch norm", |error, length| unsafe {
        arcface_norm(
            kernels.map_or(std::ptr::null(), kernels::handle),
            tensors.as_ptr(),
            norm.eps,
            norm.momentum,
            error,
            length,
        )
    })
}

//! What the head's kernels take by value and find in memory, field by field as their sources declare it.

use crate::{
    head::tiled::kernel::rows::AdamWStep,
    kernels::launch::{Element, Value},
};
use std::{f64::consts::LOG2_E, ffi::c_void};
use tch::Kind;

/// history.cuh, `History`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct History {
    /// By row, u32; null: no row ever misses a step.
    pub since: *const c_void,
    /// Four f32 a step.
    pub products: *const c_void,
    /// How many steps.
    pub remembered: u32,
    /// Steps taken.
    pub now: u32,
}

impl History {
    /// No row ever misses a step.
    pub const NONE: Self = Self {
        since: std::ptr::null(),
        products: std::ptr::null(),
        remembered: 0,
        now: 0,
    };
}

/// terms.cuh, `Others`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Others {
    /// The logits' scale times log2(e).
    pub scale_log2: f32,
    /// What that lost in rounding.
    pub scale_rest: f32,
    /// Cosines above it become logit 0.
    pub zero_above: f32,
    /// t of hard classes.
    pub t: f32,
    /// By sample, f32; null: none is hard.
    pub hard_above: *const c_void,
    /// By sample, f32.
    pub shift: *const c_void,
}

impl Others {
    /// Those of logits of this scale; the rest is still to be filled in.
    pub fn of_scale(scale: f64) -> Self {
        let exact = scale * LOG2_E;
        let scale_log2 = exact as f32;
        Self {
            scale_log2,
            scale_rest: (exact - f64::from(scale_log2)) as f32,
            zero_above: f32::INFINITY,
            t: 0.0,
            hard_above: std::ptr::null(),
            shift: std::ptr::null(),
        }
    }
}

/// Numbers of 64 bits of sampling.cu's `Selection`; the last is the list's length.
pub const SELECTION: i64 = 4;

/// Memory of `Selection`s.
pub const SELECTIONS: Element = Element::Struct {
    letter: 's',
    kind: Kind::Int64,
    numbers: SELECTION,
};

/// Memory of `RowMap`s (history.cuh).
pub const ROW_MAPS: Element = Element::Struct {
    letter: 'm',
    kind: Kind::Float,
    numbers: 4,
};

impl Value for History {
    const LETTER: char = 'H';
}

impl Value for Others {
    const LETTER: char = 'O';
}

impl Value for AdamWStep {
    const LETTER: char = 'A';
}

//! The kernels as functions over tensors: every one compares the tensors that it is given with what its kernel reads and
//! writes, and says how many threads it takes. Knows no step and no rank. What is chosen is in `classes.rs`, what cosines
//! become in `softmax.rs`, what becomes of embeddings and weights in `rows.rs`.
//!
//! It needs `unsafe` because kernels take addresses. What cannot be compared is what the device alone knows: rows and columns
//! in lists that an earlier kernel has written.
//!
//! Shapes: b samples of all ranks, r samples of this one, n classes of the shard, c of them that take part, t a tile of
//! those, d embedding.
#![allow(unsafe_code)]

mod classes;
mod rows;
mod softmax;

pub use classes::{Choice, DIGITS, List, chunks};
pub use rows::{OwnRows, RowsGradient, SgdStep};
pub use softmax::{AngularMargin, OtherClasses, SoftmaxRows, Tile};

use super::launch::{Arguments, Element, LaunchError, Launcher, Shape, Value, raw};
use Element::{F32, RowMap, U32};
use std::{ptr, sync::Arc};
use tch::{Device, Tensor};

/// Nothing, or why a kernel was not started.
pub type Started = Result<(), LaunchError>;

/// The kernels on one device.
#[derive(Clone)]
pub struct Kernels {
    launcher: Arc<dyn Launcher>,
    device: Device,
}

/// Class weights. Handles: the tensors are the head's.
pub struct Weights {
    /// `[n, d]` f32.
    pub weight: Tensor,
    /// `[n, d]` f32; needed where rows may have missed steps.
    pub momentum: Option<Tensor>,
    /// For rows that may have missed steps.
    pub missed: Option<Missed>,
}

/// Steps that rows may have missed (`lazy_sgd.rs`).
pub struct Missed {
    /// `[n]` u32: the history's `now` when the row was touched last.
    pub since: Tensor,
    /// `[steps, 4]` f32: the map of all steps from each one on.
    pub products: Tensor,
    /// Steps taken.
    pub now: u32,
}

impl Weights {
    fn rows(&self) -> i64 {
        self.weight.size()[0]
    }

    fn dim(&self) -> i64 {
        self.weight.size()[1]
    }
}

impl Kernels {
    /// Kernels that this launcher starts on this device.
    pub fn new(launcher: Arc<dyn Launcher>, device: Device) -> Self {
        Self { launcher, device }
    }

    /// Where their memory is.
    pub fn device(&self) -> Device {
        self.device
    }

    fn call(&self, kernel: &'static str) -> Call<'_> {
        Call {
            kernels: self,
            kernel,
            arguments: Arguments::new(),
            wrong: None,
        }
    }
}

/// The arguments of one launch as they come together. The first one that is wrong is told when it is started.
struct Call<'a> {
    kernels: &'a Kernels,
    kernel: &'static str,
    arguments: Arguments,
    wrong: Option<LaunchError>,
}

impl Call<'_> {
    fn value<T: Value>(mut self, value: T) -> Self {
        self.arguments.value(value);
        self
    }

    /// Memory that is read: at least so many elements.
    fn reads(self, element: Element, tensor: &Tensor, count: i64) -> Self {
        self.memory(element, false, Some(tensor), count)
    }

    fn writes(self, element: Element, tensor: &Tensor, count: i64) -> Self {
        self.memory(element, true, Some(tensor), count)
    }

    /// The same, or null.
    fn maybe_reads(self, element: Element, tensor: Option<&Tensor>, count: i64) -> Self {
        self.memory(element, false, tensor, count)
    }

    fn maybe_writes(self, element: Element, tensor: Option<&Tensor>, count: i64) -> Self {
        self.memory(element, true, tensor, count)
    }

    fn memory(mut self, element: Element, written: bool, tensor: Option<&Tensor>, count: i64) -> Self {
        let address = tensor.map_or(ptr::null_mut(), |tensor| {
            self.check(element, tensor, count);
            tensor.data_ptr()
        });
        self.arguments.pointer(element, written, address);
        self
    }

    fn check(&mut self, element: Element, tensor: &Tensor, count: i64) {
        let numbers = count * element.numbers();
        let detail = if tensor.device() != self.kernels.device {
            format!("is on {:?}, not on {:?}", tensor.device(), self.kernels.device)
        } else if tensor.kind() != element.kind() {
            format!("is {:?}, not {:?}", tensor.kind(), element.kind())
        } else if !tensor.is_contiguous() {
            "has gaps between its rows".to_owned()
        } else if (tensor.numel() as i64) < numbers {
            format!("has {} numbers, not {numbers}", tensor.numel())
        } else {
            return;
        };
        let wrong = LaunchError::Argument {
            kernel: self.kernel,
            index: self.arguments.len(),
            detail,
        };
        self.wrong.get_or_insert(wrong);
    }

    fn weights(self, weights: &Weights) -> Self {
        let count = weights.rows() * weights.dim();
        self.reads(F32, &weights.weight, count)
            .maybe_reads(F32, weights.momentum.as_ref(), count)
    }

    fn missed(mut self, weights: &Weights) -> Self {
        let Some(missed) = &weights.missed else {
            return self.value(raw::History::NONE);
        };
        let remembered = missed.products.size()[0];
        self.check(U32, &missed.since, weights.rows());
        self.check(RowMap, &missed.products, remembered);
        // A row that has missed a step is made up for with its momentum.
        if weights.momentum.is_none() {
            let wrong = LaunchError::Argument {
                kernel: self.kernel,
                index: self.arguments.len(),
                detail: "needs momentum beside it".to_owned(),
            };
            self.wrong.get_or_insert(wrong);
        }
        self.value(raw::History {
            since: missed.since.data_ptr(),
            products: missed.products.data_ptr(),
            remembered: u32::try_from(remembered).unwrap_or(0),
            now: missed.now,
        })
    }

    fn start(mut self, shape: Shape) -> Started {
        if let Some(wrong) = self.wrong {
            return Err(wrong);
        }
        // SAFETY: every function of this folder gives its kernel the parameters of its declaration, which the twins' tests
        // hold against it, and has compared the memory with the counts that it passes. The tensors are libtorch's, whose
        // memory goes to later work of its stream alone.
        unsafe {
            self.kernels
                .launcher
                .launch(self.kernel, shape, &mut self.arguments)
        }
    }
}

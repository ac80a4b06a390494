//! The arguments of a launch over tensors: every tensor is compared with what its kernel reads or writes before it starts.
//!
//! It needs `unsafe` because kernels take addresses. What cannot be compared is what the device alone knows: rows and columns
//! in lists that an earlier kernel has written.
#![allow(unsafe_code)]

use super::launch::{Arguments, Element, LaunchError, Launcher, Shape, Value};
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

impl Kernels {
    /// Kernels that this launcher starts on this device.
    pub fn new(launcher: Arc<dyn Launcher>, device: Device) -> Self {
        Self { launcher, device }
    }

    /// Where their memory is.
    pub fn device(&self) -> Device {
        self.device
    }

    /// A launch of this kernel, whose arguments follow.
    pub fn call(&self, kernel: &'static str) -> Call<'_> {
        Call {
            kernels: self,
            kernel,
            arguments: Arguments::new(),
            wrong: None,
        }
    }
}

/// The arguments of one launch as they come together. The first one that is wrong is told when it is started.
pub struct Call<'a> {
    kernels: &'a Kernels,
    kernel: &'static str,
    arguments: Arguments,
    wrong: Option<LaunchError>,
}

impl Call<'_> {
    /// A value.
    pub fn value<T: Value>(mut self, value: T) -> Self {
        self.arguments.value(value);
        self
    }

    /// Memory that is read: at least so many elements.
    pub fn reads(self, element: Element, tensor: &Tensor, count: i64) -> Self {
        self.memory(element, false, Some(tensor), count)
    }

    /// Memory that is written.
    pub fn writes(self, element: Element, tensor: &Tensor, count: i64) -> Self {
        self.memory(element, true, Some(tensor), count)
    }

    /// The same, or null.
    pub fn maybe_reads(self, element: Element, tensor: Option<&Tensor>, count: i64) -> Self {
        self.memory(element, false, tensor, count)
    }

    /// The same, or null.
    pub fn maybe_writes(self, element: Element, tensor: Option<&Tensor>, count: i64) -> Self {
        self.memory(element, true, tensor, count)
    }

    /// Memory that is read or written, or null.
    pub fn memory(mut self, element: Element, written: bool, tensor: Option<&Tensor>, count: i64) -> Self {
        let address = tensor.map_or(ptr::null_mut(), |tensor| {
            self.check(element, tensor, count);
            tensor.data_ptr()
        });
        self.arguments.pointer(element, written, address);
        self
    }

    /// Compares a tensor that the next argument is about.
    pub fn check(&mut self, element: Element, tensor: &Tensor, count: i64) {
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
        self.refuse(detail);
    }

    /// The next argument is wrong.
    pub fn refuse(&mut self, detail: String) {
        let wrong = LaunchError::Argument {
            kernel: self.kernel,
            index: self.arguments.len(),
            detail,
        };
        self.wrong.get_or_insert(wrong);
    }

    /// Starts it with threads of this shape.
    ///
    /// # Errors
    /// The first argument that is wrong, or what the device says.
    pub fn start(mut self, shape: Shape) -> Started {
        if let Some(wrong) = self.wrong {
            return Err(wrong);
        }
        // SAFETY: whoever makes a call gives its kernel the parameters of its declaration, which the twins' tests
        // hold against it, and has compared the memory with the counts that it passes. The tensors are libtorch's, whose
        // memory goes to later work of its stream alone.
        unsafe {
            self.kernels
                .launcher
                .launch(self.kernel, shape, &mut self.arguments)
        }
    }
}

//! The kernels of `norm.cu` over tensors, forward and back, as `autograd.cpp` asks for them.
//!
//! It needs `unsafe` because tensors come across the C interface.
#![allow(unsafe_code)]

use std::{
    ffi::{c_char, c_void},
    mem::ManuallyDrop,
    panic::{AssertUnwindSafe, catch_unwind},
    ptr,
};

use tch::{Kind, Tensor};

use crate::{
    kernels::{
        Kernels, Started,
        launch::{BLOCK, Element, GROUP, Shape},
    },
    panics,
};
use Element::{Bf16, F32};

/// Chunks of rows at most, each with sums of its own: enough blocks for every processor of a GPU, few enough that
/// their sums are soon added.
const MOST_CHUNKS: i64 = 512;
/// Rows that a thread reads of a chunk, at least.
const ROWS_OF_THREAD: i64 = 8;
/// Channels of a block that adds the chunks' sums (norm.cu).
const SIDE_BY_SIDE: i64 = 8;
/// Blocks that walk through all rows: at most, and at least where there are as many.
const WALKING_BLOCKS: (i64, i64) = (2048, 264);

/// Activations `[N, C, H, W]` as `[N, H, W, C]`.
pub fn rows(x: &Tensor) -> Tensor {
    x.permute([0, 2, 3, 1])
}

/// A handle for C++, which gives it back to [`arcface_norm_release`].
pub fn handle(kernels: &Kernels) -> *const c_void {
    Box::into_raw(Box::new(kernels.clone())).cast_const().cast()
}

/// Takes a handle back.
#[unsafe(no_mangle)]
extern "C" fn arcface_norm_release(kernels: *const c_void) {
    // SAFETY: it is one of `handle`'s, and nobody has it any more.
    drop(unsafe { Box::from_raw(kernels.cast_mut().cast::<Kernels>()) });
}

/// A tensor of somebody else's; none for null.
///
/// # Safety
/// The tensor outlives what is returned.
unsafe fn borrowed(tensor: *const c_void) -> Option<ManuallyDrop<Tensor>> {
    // SAFETY: it is not dropped, so it stays its owner's.
    (!tensor.is_null()).then(|| ManuallyDrop::new(unsafe { Tensor::from_ptr(tensor.cast_mut().cast()) }))
}

/// Runs `work` with the tensors at `tensors`; false with the reason in `error` if a kernel does not start.
///
/// # Safety
/// There are N addresses of tensors, or null, good until this returns, and `length` bytes at `error`.
unsafe fn with<const N: usize>(
    tensors: *const *const c_void,
    error: *mut c_char,
    length: usize,
    work: impl FnOnce([Option<&Tensor>; N]) -> Started,
) -> bool {
    // SAFETY: as the caller says.
    let all: [Option<ManuallyDrop<Tensor>>; N] =
        std::array::from_fn(|at| unsafe { borrowed(*tensors.add(at)) });
    let work = || work(std::array::from_fn(|at| all[at].as_deref()));
    // libtorch's own operations panic, where a GPU's memory is full among others, and no panic passes through C.
    let text = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(())) => return true,
        Ok(Err(problem)) => problem.to_string(),
        Err(panic) => panics::text(panic.as_ref()).unwrap_or("a panic").to_owned(),
    };
    let count = text.len().min(length.saturating_sub(1));
    // SAFETY: as the caller says; there is room for the text and its end.
    unsafe {
        ptr::copy_nonoverlapping(text.as_ptr(), error.cast(), count);
        error.add(count).write(0);
    }
    false
}

#[unsafe(no_mangle)]
extern "C" fn arcface_norm_forward(
    kernels: *const c_void,
    tensors: *const *const c_void,
    eps: f64,
    momentum: f64,
    error: *mut c_char,
    length: usize,
) -> bool {
    // SAFETY: one of `handle`'s, which C++ keeps until after this.
    let kernels = unsafe { &*kernels.cast::<Kernels>() };
    // SAFETY: autograd.cpp passes ten.
    unsafe {
        with(tensors, error, length, |tensors: [Option<&Tensor>; 10]| {
            let [
                Some(x),
                Some(weight),
                Some(bias),
                slope,
                shortcut,
                running_mean,
                running_var,
                Some(mean),
                Some(inverse),
                Some(y),
            ] = tensors
            else {
                unreachable!("autograd.cpp passes them")
            };
            Forward {
                x,
                weight,
                bias,
                slope,
                shortcut,
                running: running_mean.zip(running_var),
                mean,
                inverse,
                y,
            }
            .start(kernels, eps, momentum)
        })
    }
}

#[unsafe(no_mangle)]
extern "C" fn arcface_norm_backward(
    kernels: *const c_void,
    tensors: *const *const c_void,
    error: *mut c_char,
    length: usize,
) -> bool {
    // SAFETY: as above.
    let kernels = unsafe { &*kernels.cast::<Kernels>() };
    // SAFETY: autograd.cpp passes eleven.
    unsafe {
        with(tensors, error, length, |tensors: [Option<&Tensor>; 11]| {
            let [
                Some(x),
                Some(grad),
                Some(mean),
                Some(inverse),
                Some(weight),
                Some(bias),
                slope,
                Some(grad_weight),
                Some(grad_bias),
                grad_slope,
                Some(grad_x),
            ] = tensors
            else {
                unreachable!("autograd.cpp passes them")
            };
            Backward {
                x,
                grad,
                mean,
                inverse,
                weight,
                bias,
                slope,
                grad_weight,
                grad_bias,
                grad_slope,
                grad_x,
            }
            .start(kernels)
        })
    }
}

/// How a matrix `[rows, channels]` is cut.
struct Cut {
    rows: i64,
    channels: i64,
    chunks: i64,
    element: Element,
    /// For kernels that walk through all rows.
    walk: Shape,
}

impl Cut {
    fn of(x: &Tensor) -> Self {
        let channels = x.size()[1];
        let rows = x.numel() as i64 / channels;
        let at_once = (i64::from(BLOCK) * GROUP / channels).max(1);
        let passes = (rows + at_once - 1) / at_once;
        let (most, least) = WALKING_BLOCKS;
        Self {
            rows,
            channels,
            chunks: (passes / ROWS_OF_THREAD).clamp(1, MOST_CHUNKS),
            element: Element::of_float(x.kind()),
            // What a thread reads before its first row should not be much of what it reads.
            walk: Shape::blocks((passes / ROWS_OF_THREAD).clamp(passes.min(least), most)),
        }
    }

    fn numbers(&self) -> i64 {
        self.rows * self.channels
    }

    fn named(&self, f32: &'static str, bf16: &'static str) -> &'static str {
        match self.element {
            Bf16 => bf16,
            _ => f32,
        }
    }

    /// Sums by chunk: so many for each channel.
    fn sums(&self, each: i64, x: &Tensor) -> Tensor {
        Tensor::empty([self.chunks, each, self.channels], (Kind::Float, x.device()))
    }
}

struct Forward<'a> {
    x: &'a Tensor,
    weight: &'a Tensor,
    bias: &'a Tensor,
    slope: Option<&'a Tensor>,
    shortcut: Option<&'a Tensor>,
    running: Option<(&'a Tensor, &'a Tensor)>,
    mean: &'a Tensor,
    inverse: &'a Tensor,
    y: &'a Tensor,
}

impl Forward<'_> {
    fn start(&self, kernels: &Kernels, eps: f64, momentum: f64) -> Started {
        let cut = Cut::of(self.x);
        let Cut {
            rows: count,
            channels,
            chunks,
            element,
            ..
        } = cut;
        let x = rows(self.x);
        let sums = cut.sums(2, &x);
        kernels
            .call(cut.named("norm_moments_f32", "norm_moments_bf16"))
            .reads(element, &x, cut.numbers())
            .value(count)
            .value(channels)
            .value(chunks)
            .writes(F32, &sums, chunks * 2 * channels)
            .start(Shape::blocks(chunks))?;
        let (running_mean, running_var) = self.running.unzip();
        kernels
            .call(cut.named("norm_finish_moments_f32", "norm_finish_moments_bf16"))
            .reads(F32, &sums, chunks * 2 * channels)
            .reads(element, &x, channels)
            .value(count)
            .value(channels)
            .value(chunks)
            .value(eps)
            .value(momentum)
            .writes(F32, self.mean, channels)
            .writes(F32, self.inverse, channels)
            .maybe_writes(F32, running_mean, channels)
            .maybe_writes(F32, running_var, channels)
            .start(Shape::blocks(channels / SIDE_BY_SIDE))?;
        kernels
            .call(cut.named("norm_apply_f32", "norm_apply_bf16"))
            .reads(element, &x, cut.numbers())
            .reads(F32, self.mean, channels)
            .reads(F32, self.inverse, channels)
            .reads(F32, self.weight, channels)
            .reads(F32, self.bias, channels)
            .maybe_reads(F32, self.slope, channels)
            .maybe_reads(element, self.shortcut.map(rows).as_ref(), cut.numbers())
            .value(count)
            .value(channels)
            .writes(element, &rows(self.y), cut.numbers())
            .start(cut.walk)
    }
}

struct Backward<'a> {
    x: &'a Tensor,
    grad: &'a Tensor,
    mean: &'a Tensor,
    inverse: &'a Tensor,
    weight: &'a Tensor,
    bias: &'a Tensor,
    slope: Option<&'a Tensor>,
    grad_weight: &'a Tensor,
    grad_bias: &'a Tensor,
    grad_slope: Option<&'a Tensor>,
    grad_x: &'a Tensor,
}

impl Backward<'_> {
    fn start(&self, kernels: &Kernels) -> Started {
        let cut = Cut::of(self.x);
        let Cut {
            rows: count,
            channels,
            chunks,
            element,
            ..
        } = cut;
        let (x, grad) = (rows(self.x), rows(self.grad));
        let sums = cut.sums(3, &x);
        let line = Tensor::empty([2, channels], (Kind::Float, x.device()));
        let call = |kernel| {
            kernels
                .call(kernel)
                .reads(element, &x, cut.numbers())
                .reads(element, &grad, cut.numbers())
                .reads(F32, self.mean, channels)
                .reads(F32, self.inverse, channels)
                .reads(F32, self.weight, channels)
                .reads(F32, self.bias, channels)
                .maybe_reads(F32, self.slope, channels)
        };
        call(cut.named("norm_back_sums_f32", "norm_back_sums_bf16"))
            .value(count)
            .value(channels)
            .value(chunks)
            .writes(F32, &sums, chunks * 3 * channels)
            .start(Shape::blocks(chunks))?;
        kernels
            .call("norm_finish_back")
            .reads(F32, &sums, chunks * 3 * channels)
            .reads(F32, self.inverse, channels)
            .reads(F32, self.weight, channels)
            .value(count)
            .value(channels)
            .value(chunks)
            .writes(F32, self.grad_weight, channels)
            .writes(F32, self.grad_bias, channels)
            .maybe_writes(F32, self.grad_slope, channels)
            .writes(F32, &line, 2 * channels)
            .start(Shape::blocks(channels / SIDE_BY_SIDE))?;
        call(cut.named("norm_back_apply_f32", "norm_back_apply_bf16"))
            .reads(F32, &line, 2 * channels)
            .value(count)
            .value(channels)
            .writes(element, &rows(self.grad_x), cut.numbers())
            .start(cut.walk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;

    /// A full memory, say: the reason reaches C++, as that of a kernel that does not start does.
    #[test]
    fn no_panic_passes_through_c() {
        let mut reason: [c_char; 24] = [1; 24];
        // SAFETY: there are no tensors, and room for as many bytes as are told.
        let (done, said) = unsafe {
            let work = |[]: [Option<&Tensor>; 0]| -> Started {
                panic!("out of memory: {}", "tried to allocate much")
            };
            let done = with(ptr::null(), reason.as_mut_ptr(), reason.len(), work);
            (done, CStr::from_ptr(reason.as_ptr()))
        };
        assert!(!done);
        assert_eq!(said.to_str(), Ok("out of memory: tried to"));
    }
}

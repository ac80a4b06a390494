//! CUDA graphs (CUDA C++ Programming Guide, "CUDA Graphs"): what libtorch and our kernels launch is recorded once and repeated by
//! one call, which spares the host a launch at a time. A recording works on the memory that it was recorded with, so what it reads
//! anew must be copied there, and what it writes is found where it was the first time.
//!
//! Unsafe, because libtorch's graphs are reached across the C interface.
#![allow(unsafe_code)]

use crate::panics;
use std::{
    any::Any,
    ffi::{CStr, c_char, c_int, c_void},
    panic::{AssertUnwindSafe, catch_unwind},
    ptr::NonNull,
};

/// Longest reason of a failure, in bytes.
const REASON: usize = 1024;

unsafe extern "C" {
    fn arcface_recorder(gpu: c_int, error: *mut c_char, length: usize) -> *mut c_void;
    fn arcface_recorder_free(recorder: *mut c_void);
    fn arcface_record(recorder: *mut c_void, error: *mut c_char, length: usize) -> *mut c_void;
    fn arcface_recorded(recorder: *mut c_void, graph: *mut c_void, error: *mut c_char, length: usize)
    -> bool;
    fn arcface_graph_launch(graph: *mut c_void, error: *mut c_char, length: usize) -> bool;
    fn arcface_graph_free(graph: *mut c_void);
}

/// Why there is no graph, or why it does not run: what libtorch says, in one line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CudaGraphError {
    /// None was recorded, or it does not run.
    #[error("CUDA graph: {0}")]
    Refused(String),
    /// The driver broke a recording off. libtorch's allocator takes it for one that still goes on, and gives nothing back any more: the
    /// process is not to train on.
    #[error("CUDA graph: the recording was broken off: {0}")]
    BrokenOff(String),
}

/// Calls a function that writes its reason to a buffer of so many bytes where it fails.
fn asked<T>(call: impl FnOnce(*mut c_char, usize) -> Option<T>) -> Result<T, CudaGraphError> {
    let mut reason = [0u8; REASON];
    call(reason.as_mut_ptr().cast(), reason.len()).ok_or_else(|| {
        let reason = CStr::from_bytes_until_nul(&reason).unwrap_or_default();
        CudaGraphError::Refused(first_line(&reason.to_string_lossy()))
    })
}

/// libtorch adds where in its sources it failed.
fn first_line(reason: &str) -> String {
    reason.lines().next().unwrap_or("no reason is given").to_owned()
}

/// Records graphs on a GPU that are repeated in the order in which they were recorded: what one leaves unused, the next ones
/// may take.
pub struct Recorder(NonNull<c_void>);

impl Recorder {
    /// On libtorch's `Device::Cuda(gpu)`. Waits for it.
    ///
    /// # Errors
    /// If libtorch has no graphs, or no such GPU.
    pub fn new(gpu: usize) -> Result<Self, CudaGraphError> {
        let gpu = c_int::try_from(gpu).unwrap_or(c_int::MAX);
        // SAFETY: the buffer is as long as we say; C++ exceptions end inside.
        asked(|error, length| NonNull::new(unsafe { arcface_recorder(gpu, error, length) })).map(Self)
    }

    /// Runs `work`, whose launches are recorded instead of done: memory that they would have written holds anything until the graph is
    /// launched. It must not look at values on the GPU, nor copy there what it forgets afterwards.
    ///
    /// # Errors
    /// If it does, or panics, as tch does where there is no memory.
    pub fn record<T>(&mut self, work: impl FnOnce() -> T) -> Result<(CudaGraph, T), CudaGraphError> {
        let recorder = self.0.as_ptr();
        // SAFETY: the recorder lives; as above.
        let raw = asked(|error, length| NonNull::new(unsafe { arcface_record(recorder, error, length) }))?;
        // tch panics with what libtorch throws, and the recording must end in any case.
        let made = catch_unwind(AssertUnwindSafe(work));
        let ended = asked(|error, length| {
            // SAFETY: both live, and this is the recording that was just begun; as above.
            unsafe { arcface_recorded(recorder, raw.as_ptr(), error, length) }.then_some(())
        });
        // One that has ended gives its memory back when it is dropped, whatever became of the work.
        let graph = match ended {
            Ok(()) => CudaGraph(raw),
            Err(CudaGraphError::Refused(reason) | CudaGraphError::BrokenOff(reason)) => {
                let reason = made.err().map_or(reason, |panic| first_line(said(&*panic)));
                return Err(CudaGraphError::BrokenOff(reason));
            }
        };
        match made {
            Ok(made) => Ok((graph, made)),
            Err(panic) => Err(CudaGraphError::Refused(first_line(said(&*panic)))),
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        // SAFETY: made in `new`; graphs do not refer to it.
        unsafe { arcface_recorder_free(self.0.as_ptr()) }
    }
}

/// What a panic says.
fn said(panic: &(dyn Any + Send)) -> &str {
    panics::text(panic).unwrap_or("the recording panicked")
}

/// A recorded graph and the memory that it works in.
pub struct CudaGraph(NonNull<c_void>);

// SAFETY: libtorch's object is bound to no thread; one at a time has it.
unsafe impl Send for CudaGraph {}

impl CudaGraph {
    /// Does what was recorded, after all that libtorch was given to compute before.
    ///
    /// # Errors
    /// What CUDA says, which may be an error of what was computed before.
    pub fn launch(&self) -> Result<(), CudaGraphError> {
        // SAFETY: the graph lives; the buffer is as long as we say; C++ exceptions end inside.
        asked(|error, length| unsafe { arcface_graph_launch(self.0.as_ptr(), error, length) }.then_some(()))
    }
}

impl Drop for CudaGraph {
    fn drop(&mut self) {
        // SAFETY: recorded to its end, and nobody has it any more.
        unsafe { arcface_graph_free(self.0.as_ptr()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_gpu_it_is_said_in_one_line() {
        if tch::Cuda::is_available() {
            println!("SKIPPED: this machine has a GPU");
            return;
        }
        let error = Recorder::new(0).err().expect("there is no GPU").to_string();
        assert!(
            error.starts_with("CUDA graph: this libtorch has no ") && !error.contains('\n'),
            "{error}"
        );
    }

    #[test]
    fn a_panic_says_why() {
        let of = |work: fn()| said(&*catch_unwind(work).expect_err("it panics")).to_owned();
        assert_eq!(of(|| panic!("{} of two", 1)), "1 of two");
        assert_eq!(of(|| panic!("as it is")), "as it is");
        assert_eq!(of(|| std::panic::panic_any(3)), "the recording panicked");
        assert_eq!(first_line("why\nException raised from"), "why");
        assert_eq!(first_line(""), "no reason is given");
    }
}

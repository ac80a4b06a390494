//! The order between what libtorch computes on a GPU and what is communicated beside it: a stream of our own, and the events
//! that tie it to libtorch's. libtorch computes on the null stream of its device's primary context in this process.
//!
//! It needs `unsafe` because the driver's functions are C functions behind pointers.
#![allow(unsafe_code)]

use cudarc::driver::sys as driver;
use std::{
    ffi::{c_int, c_void},
    ptr,
};

/// A stream of the driver's, as libraries take it (`cudaStream_t`); null is libtorch's own. It lives as long as the timeline
/// that gave it.
#[derive(Clone, Copy, Debug)]
pub struct RawStream(pub *mut c_void);

/// What a library that works on a stream beside libtorch's needs. Whoever enqueues waits on the host until it is
/// [reached](Timeline::reached): what is computed afterwards needs no event to come after it.
pub trait Timeline: Send {
    /// The stream.
    fn stream(&self) -> RawStream;

    /// What is enqueued on the stream from now on begins when everything is done that was given to compute until now. Makes
    /// the GPU the calling thread's too.
    ///
    /// # Errors
    /// What the driver says, which may be an error of what was computed.
    fn follow_compute(&mut self) -> Result<(), StreamError>;

    /// Marks the end of what is enqueued on the stream until now.
    ///
    /// # Errors
    /// As above.
    fn mark(&mut self) -> Result<(), StreamError>;

    /// True once all before the last mark is done.
    ///
    /// # Errors
    /// As above.
    fn reached(&self) -> Result<bool, StreamError>;
}

/// Why a GPU cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// No libcuda.
    #[error("no NVIDIA driver was found (libcuda.so.1)")]
    NoDriver,
    /// No such GPU.
    #[error("CUDA has no GPU {ordinal} here: {reason}")]
    NoGpu {
        /// As it was counted.
        ordinal: u32,
        /// CUDA's name of the error.
        reason: String,
    },
    /// A call failed.
    #[error("{call}: {reason}")]
    Call {
        /// The function.
        call: &'static str,
        /// CUDA's name of the error.
        reason: String,
    },
}

fn check(call: &'static str, result: driver::CUresult) -> Result<(), StreamError> {
    match result {
        driver::CUresult::CUDA_SUCCESS => Ok(()),
        failed => Err(StreamError::Call {
            call,
            reason: format!("{failed:?}"),
        }),
    }
}

/// The timeline of a GPU.
pub struct CudaTimeline {
    device: driver::CUdevice,
    context: driver::CUcontext,
    stream: driver::CUstream,
    computed: driver::CUevent,
    marked: driver::CUevent,
}

// SAFETY: the driver's handles may be used from any thread; `follow_compute` sees to the thread's context, which the null stream
// depends on.
unsafe impl Send for CudaTimeline {}

impl CudaTimeline {
    /// A stream beside libtorch's on the GPU that CUDA counts as `ordinal` in this process, which becomes the calling thread's.
    ///
    /// # Errors
    /// If there is no driver or no such GPU.
    pub fn open(ordinal: u32) -> Result<Self, StreamError> {
        // SAFETY: opens libcuda and closes it again.
        if !unsafe { driver::is_culib_present() } {
            // Only now may cudarc be asked for anything else: it panics where the library is absent.
            return Err(StreamError::NoDriver);
        }
        let mut device = 0;
        let number = c_int::try_from(ordinal).unwrap_or(c_int::MAX);
        // SAFETY: may be called any number of times, from any thread.
        check("cuInit", unsafe { driver::cuInit(0) })?;
        // SAFETY: writes a number.
        match unsafe { driver::cuDeviceGet(&mut device, number) } {
            driver::CUresult::CUDA_SUCCESS => {}
            failed => {
                let reason = format!("{failed:?}");
                return Err(StreamError::NoGpu { ordinal, reason });
            }
        }
        let mut context = ptr::null_mut();
        // SAFETY: writes a handle; the context is libtorch's, and released in `drop`.
        let retained = unsafe { driver::cuDevicePrimaryCtxRetain(&mut context, device) };
        check("cuDevicePrimaryCtxRetain", retained)?;
        // What is made from here on is destroyed in `drop`, also if one of the calls fails.
        let mut made = Self {
            device,
            context,
            stream: ptr::null_mut(),
            computed: ptr::null_mut(),
            marked: ptr::null_mut(),
        };
        made.enter()?;
        let beside = driver::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: writes a handle, in the context that was just entered.
        let created = unsafe { driver::cuStreamCreate(&mut made.stream, beside) };
        check("cuStreamCreate", created)?;
        for event in [&mut made.computed, &mut made.marked] {
            let untimed = driver::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
            // SAFETY: as above.
            check("cuEventCreate", unsafe { driver::cuEventCreate(event, untimed) })?;
        }
        Ok(made)
    }

    fn enter(&self) -> Result<(), StreamError> {
        // SAFETY: the context is retained as long as this lives.
        check("cuCtxSetCurrent", unsafe {
            driver::cuCtxSetCurrent(self.context)
        })
    }
}

impl Timeline for CudaTimeline {
    fn stream(&self) -> RawStream {
        RawStream(self.stream.cast())
    }

    fn follow_compute(&mut self) -> Result<(), StreamError> {
        self.enter()?;
        // SAFETY: event and stream live; the null stream is that of the context that was just entered.
        let recorded = unsafe { driver::cuEventRecord(self.computed, ptr::null_mut()) };
        check("cuEventRecord", recorded)?;
        // SAFETY: as above.
        let waits = unsafe { driver::cuStreamWaitEvent(self.stream, self.computed, 0) };
        check("cuStreamWaitEvent", waits)
    }

    fn mark(&mut self) -> Result<(), StreamError> {
        // SAFETY: event and stream live.
        let recorded = unsafe { driver::cuEventRecord(self.marked, self.stream) };
        check("cuEventRecord", recorded)
    }

    fn reached(&self) -> Result<bool, StreamError> {
        // SAFETY: the event lives.
        match unsafe { driver::cuEventQuery(self.marked) } {
            driver::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            other => check("cuEventQuery", other).map(|()| true),
        }
    }
}

impl Drop for CudaTimeline {
    fn drop(&mut self) {
        // A context that failed answers nothing any more, and then there is nothing to give back.
        if self.enter().is_err() {
            return;
        }
        for event in [self.computed, self.marked] {
            if !event.is_null() {
                // SAFETY: made in `open`, and not used after this. A failure leaks memory, nothing more.
                unsafe { driver::cuEventDestroy_v2(event) };
            }
        }
        if !self.stream.is_null() {
            // SAFETY: as above.
            unsafe { driver::cuStreamDestroy_v2(self.stream) };
        }
        // SAFETY: retained in `open`, once.
        unsafe { driver::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

//! Bytes of tensors on the CPU as libtorch's allocator counts them: exact, where the kernel's numbers have the noise of pages
//! and heaps. For measurements. Unsafe, because it calls C++.
#![allow(unsafe_code)]

use std::{ffi::c_void, marker::PhantomData, ptr::NonNull};

unsafe extern "C" {
    fn arcface_allocations_begin() -> *mut c_void;
    fn arcface_allocations_take(watch: *mut c_void, live: *mut i64, peak: *mut i64);
    fn arcface_allocations_end(watch: *mut c_void);
}

/// Counts what this thread's operations allocate and free, on whatever threads they run, until it is dropped. Tensors that
/// were there before do not count.
pub struct Allocations {
    watch: NonNull<c_void>,
    /// It belongs to the thread that made it.
    thread: PhantomData<*const ()>,
}

/// Bytes of tensors made since the count began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Now.
    pub live: i64,
    /// The most since the count was last looked at.
    pub peak: i64,
}

impl Allocations {
    /// Begins to count.
    pub fn begin() -> Self {
        // SAFETY: it takes nothing, and gives a new object that is ours alone.
        let watch = unsafe { arcface_allocations_begin() };
        Self {
            watch: NonNull::new(watch).expect("C++'s new gives an object or throws"),
            thread: PhantomData,
        }
    }

    /// The count, and the peak since the last look.
    pub fn take(&mut self) -> Taken {
        let mut taken = Taken { live: 0, peak: 0 };
        // SAFETY: the object is alive until the drop, and both places are ours to write.
        unsafe { arcface_allocations_take(self.watch.as_ptr(), &raw mut taken.live, &raw mut taken.peak) };
        taken
    }
}

impl Drop for Allocations {
    fn drop(&mut self) {
        // SAFETY: made by `begin` on this thread, which it cannot leave, and dropped once.
        unsafe { arcface_allocations_end(self.watch.as_ptr()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind, Tensor};

    #[test]
    fn tensors_are_counted_while_they_live() {
        let mut allocations = Allocations::begin();
        let kept = Tensor::zeros([1000], (Kind::Float, Device::Cpu));
        let gone = Tensor::zeros([3000], (Kind::Float, Device::Cpu));
        drop(gone);
        let taken = allocations.take();
        assert_eq!((taken.live, taken.peak), (4000, 16_000));
        let again = allocations.take();
        assert_eq!((again.live, again.peak), (4000, 4000), "a look begins a new peak");
        drop(kept);
        assert_eq!(allocations.take().live, 0);
    }
}

//! The kernels on the CPU, for tests: every thread of a block is a fibre, and blocks run one after the other. `launcher.rs` starts
//! them as a GPU's driver would; their owners' tests call them as the C++ functions that they are here.
//!
//! It needs `unsafe` because the kernels are C++ functions over pointers.
#![allow(unsafe_code)]

pub mod launcher;

use std::ffi::c_void;

/// How many threads run a kernel, and in which order.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// Blocks.
    pub grid: u32,
    /// Threads of a block.
    pub block: u32,
    /// From the last thread to the first.
    pub backwards: bool,
}

impl Launch {
    /// Grids smaller and larger than what there is to do, blocks smaller and larger than a row, both orders.
    pub fn all() -> Vec<Self> {
        let shapes = [(1, 1), (3, 32), (40, 8), (2, 256)];
        shapes
            .into_iter()
            .flat_map(|(grid, block)| {
                [false, true].map(|backwards| Self {
                    grid,
                    block,
                    backwards,
                })
            })
            .collect()
    }

    /// Runs `kernel` as every thread of every block.
    pub fn run<F: Fn()>(self, kernel: F) {
        extern "C" fn thread<F: Fn()>(data: *mut c_void) {
            // SAFETY: `run` passes its closure, which outlives the launch.
            (unsafe { &*data.cast::<F>() })();
        }
        let data = (&raw const kernel).cast_mut().cast();
        // SAFETY: `thread` takes this closure, and is only called before this returns; kernels do not unwind.
        let split =
            unsafe { kernel_twin_run(self.grid, self.block, self.backwards.into(), thread::<F>, data) };
        assert_eq!(
            split, 0,
            "the threads of a block came to different numbers of barriers"
        );
    }
}

unsafe extern "C" {
    fn kernel_twin_run(
        grid: u32,
        block: u32,
        backwards: i32,
        body: extern "C" fn(*mut c_void),
        data: *mut c_void,
    ) -> i32;
}

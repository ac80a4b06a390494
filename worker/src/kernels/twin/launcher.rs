//! Starts the kernels' twins as a GPU's driver would start the kernels: by name, with addresses of arguments. An argument that
//! is not what the kernel's declaration has in its place is refused.
//!
//! It needs `unsafe` for the same reason as the folder's head.
#![allow(unsafe_code)]

use super::Launch;
use crate::kernels::launch::{Arguments, LaunchError, Launcher, Shape};
use std::{
    ffi::{CStr, CString, c_char, c_void},
    sync::atomic::{AtomicBool, Ordering},
};

/// A kernel with its name and parameters (launch.cpp).
#[repr(C)]
struct Named {
    _opaque: [u8; 0],
}

unsafe extern "C" {
    fn kernel_twin_find(name: *const c_char) -> *const Named;
    fn kernel_twin_count() -> u32;
    fn kernel_twin_signature(kernel: *const Named) -> *const c_char;
    fn kernel_twin_call(kernel: *const Named, arguments: *mut *mut c_void);
    fn kernel_twin_layouts() -> *const u32;
}

/// How many kernels there are.
pub fn count() -> usize {
    // SAFETY: takes nothing.
    unsafe { kernel_twin_count() as usize }
}

/// The first `count` of what launch.cpp says of structs.
pub fn layouts(count: usize) -> Vec<u32> {
    /// Numbers that it has.
    const ALL: usize = 31;
    assert!(count <= ALL);
    // SAFETY: it has as many numbers, for ever.
    unsafe { std::slice::from_raw_parts(kernel_twin_layouts(), count) }.to_vec()
}

/// The kernel's parameters, as `Arguments::signature` spells them; `None` if there is no such kernel.
pub fn parameters(kernel: &str) -> Option<String> {
    find(kernel).map(|(_, parameters)| parameters)
}

fn find(kernel: &str) -> Option<(*const Named, String)> {
    let name = CString::new(kernel).expect("names have no zero");
    // SAFETY: a string that outlives the call.
    let found = unsafe { kernel_twin_find(name.as_ptr()) };
    (!found.is_null()).then(|| {
        // SAFETY: it was just found; its string lives for ever.
        let text = unsafe { CStr::from_ptr(kernel_twin_signature(found)) };
        (found, text.to_string_lossy().into_owned())
    })
}

/// Runs kernels on the CPU, with blocks of few threads: real ones are so many fibres. Every other launch runs them backwards.
pub struct TwinLauncher {
    block: u32,
    backwards: AtomicBool,
}

impl TwinLauncher {
    /// Blocks of so many threads, a power of two.
    pub fn new(block: u32) -> Self {
        Self {
            block,
            backwards: AtomicBool::new(false),
        }
    }
}

impl Launcher for TwinLauncher {
    unsafe fn launch(
        &self,
        kernel: &'static str,
        shape: Shape,
        arguments: &mut Arguments,
    ) -> Result<(), LaunchError> {
        let refused = |reason: String| LaunchError::Refused { kernel, reason };
        let Some((found, parameters)) = find(kernel) else {
            return Err(refused("there is no such kernel".to_owned()));
        };
        let given = arguments.signature();
        if given != parameters {
            return Err(refused(format!("it takes {parameters} and was given {given}")));
        }
        assert!(shape.grid > 0 && shape.block.is_power_of_two() && shape.block <= 256);
        let pointers = arguments.pointers();
        let launch = Launch {
            grid: shape.grid,
            block: self.block.min(shape.block),
            backwards: self.backwards.fetch_xor(true, Ordering::Relaxed),
        };
        // SAFETY: the arguments are of the kernel's own types; what they point to is the caller's word.
        launch.run(|| unsafe { kernel_twin_call(found, pointers.as_ptr().cast_mut()) });
        Ok(())
    }

    fn multiplies_bf16(&self) -> bool {
        true
    }
}

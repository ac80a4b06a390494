//! NVIDIA's libraries, opened at run time: the driver and libtorch's CUDA half. Says which are there and of which version;
//! what that means is decided in `cuda.rs`. NCCL is opened in `collective/nccl`, NVRTC in `nvrtc`. Nothing is opened before a function here is called, so a worker that computes
//! on the CPU never has a CUDA library in its address space.
//!
//! It needs `unsafe` because loading a library runs its code and a symbol's type is only known from its header.
#![allow(unsafe_code)]

use crate::nvrtc::loader_says;
use cudarc::driver::sys as driver;
use std::{ffi::c_int, mem::ManuallyDrop};

/// A version of CUDA.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Major.
    pub major: i32,
    /// Minor.
    pub minor: i32,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// What the driver says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Driver {
    /// There is none: no libcuda.
    Absent,
    /// It does not start, with its name of the reason.
    Fails(String),
    /// It starts but has no GPU for this process.
    NoGpu,
    /// It starts, and knows this version of CUDA and older ones.
    Starts(Version),
}

/// Starts the driver, which takes no memory of a GPU. A version that is too old is told first: such a driver may fail
/// for that reason.
pub fn start_driver(oldest: Version) -> Driver {
    // SAFETY: opens libcuda and closes it again.
    if !unsafe { driver::is_culib_present() } {
        // Only now may cudarc be asked for anything else: it panics where the library is absent.
        return Driver::Absent;
    }
    let mut number: c_int = 0;
    // SAFETY: writes a number; needs no other call before it.
    let asked = unsafe { driver::cuDriverGetVersion(&mut number) };
    let version = Version {
        major: number / 1000,
        minor: number % 1000 / 10,
    };
    if asked == driver::CUresult::CUDA_SUCCESS && version < oldest {
        return Driver::Starts(version);
    }
    // SAFETY: may be called any number of times, from any thread.
    match unsafe { driver::cuInit(0) } {
        driver::CUresult::CUDA_SUCCESS => Driver::Starts(version),
        driver::CUresult::CUDA_ERROR_NO_DEVICE => Driver::NoGpu,
        failed => Driver::Fails(format!("{failed:?}")),
    }
}

/// Opens libtorch's CUDA half for all libraries of this process. To be called before anything asks `tch::Cuda`: libtorch
/// looks once, and the linker leaves this library out of our executables so that they start without CUDA.
///
/// # Errors
/// What the loader says, in one line: it names the library that is missing, which may be one that this one needs.
pub fn open_libtorch_cuda() -> Result<(), String> {
    open_for_all("libtorch_cuda.so")
}

fn open_for_all(name: &str) -> Result<(), String> {
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
    // SAFETY: runs the library's initialisers, which libtorch's own loading would run too.
    let library = unsafe { Library::open(Some(name), RTLD_NOW | RTLD_GLOBAL) };
    // It stays: libtorch keeps pointers into it.
    library
        .map(|library| _ = ManuallyDrop::new(library))
        .map_err(|error| loader_says(&error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// With RTLD_LOCAL, the loader's default, libtorch would not see the library that we opened.
    #[test]
    fn what_is_opened_for_all_is_seen_by_all() {
        let folder = tempfile::tempdir().expect("a folder");
        let (source, library) = (folder.path().join("seen.c"), folder.path().join("seen.so"));
        std::fs::write(&source, "int arcface_test_seen_by_all(void) { return 7; }\n").expect("write");
        let status = Command::new("cc")
            .args(["-shared", "-fPIC", "-o"])
            .args([&library, &source])
            .status();
        assert!(status.expect("a C compiler").success());
        type Seen = unsafe extern "C" fn() -> c_int;
        let everywhere = libloading::os::unix::Library::this();
        // SAFETY: the symbol is not there yet; nothing is called.
        assert!(unsafe { everywhere.get::<Seen>("arcface_test_seen_by_all") }.is_err());
        open_for_all(library.to_str().expect("UTF-8")).expect("it is there");
        // SAFETY: the type is that of the source above.
        let seen = unsafe { everywhere.get::<Seen>("arcface_test_seen_by_all") }.expect("seen");
        // SAFETY: as above.
        assert_eq!(unsafe { seen() }, 7);
        let missing = open_for_all("libarcface_nowhere.so").expect_err("nowhere");
        assert!(
            missing.contains("libarcface_nowhere.so") && !missing.contains('\n'),
            "{missing}"
        );
    }
}

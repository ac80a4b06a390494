//! Kernels of our own on NVIDIA GPUs: what all of them share. They are sources, CUDA C++ that NVRTC compiles on the machine that
//! runs them (`crate::nvrtc`), in [`Set`]s that belong to who uses them: the head's (`head/cuda/`), the networks' batch norm
//! (`model/norm/`). [`Kernels`] starts them over tensors, and who starts them is behind [`Launcher`](launch::Launcher): a GPU's driver
//! (`crate::device`). Knows no driver and no stream, and not what they compute.
//!
//! # How to launch one
//! A grid and blocks of one dimension; a block has a power of two of threads, 256 at most. Any grid is right (kernels
//! stride over what there is); one block a row, or one thread a sample where the comment says so, is fast. No dynamic
//! shared memory. Sizes are 64 bits; matrices are dense and in rows unless a `stride` is named.
//!
//! # How all this is tested
//! Sources keep to what the host's C++ compiler reads too. In builds with tests, `twin/` makes every thread of a block a fibre
//! and runs the kernels on the CPU, in both orders of threads: by themselves, and as a launcher, with which a whole head trains
//! on the CPU in the tests of every head. That launcher takes the very arguments that a GPU would get, and holds them against
//! the kernel's parameters. NVRTC compiles all kernels for all architectures in `crate::nvrtc`'s tests. What no test on the
//! CPU can see: the time they take, whether a GPU's exponential and fused arithmetic are as good as the tolerances have it, and
//! the driver's side of a launch (`device/launcher.rs`); `tests/gpu/accept.sh` sees that.

mod call;
pub mod launch;
#[cfg(all(test, cuda_twin))]
pub mod twin;

pub use call::{Call, Kernels, Started};

/// What all kernels include, by name.
pub const COMMON: (&str, &str) = ("common.cuh", include_str!("common.cuh"));

/// A source.
pub struct File {
    /// Its name.
    pub name: &'static str,
    /// What is in it.
    pub text: &'static str,
    /// The kernels' names.
    pub kernels: &'static [&'static str],
}

/// Kernels that belong together.
pub struct Set {
    /// What their sources include, by name.
    pub headers: &'static [(&'static str, &'static str)],
    /// Their sources.
    pub files: &'static [File],
}

/// All that there are: what a GPU's driver is given.
pub const ALL: [&Set; 2] = [&crate::head::cuda::KERNELS, &crate::model::norm::KERNELS];

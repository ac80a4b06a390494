//! The one place that asks what hardware there is and how much of it a process may use.
//!
//! `--device cuda` looks whether this machine is fit to train on its GPUs (`cuda.rs`); a rank then computes on the one GPU that
//! its agent gave it (`placement.rs`). Without it, and where there is no GPU, no CUDA library is opened.

mod cuda;
pub mod gpus;
mod graph;
mod launcher;
mod libraries;
mod placement;
pub mod streams;

pub use graph::{CudaGraph, CudaGraphError, Recorder};
pub use placement::{GpuMemory, Placement, pinned};

pub use launcher::{GpuLauncher, GpuLauncherError};

use crate::nvrtc::{Cache, Compiler, NvrtcError};
use arcface_proto::failure::{ExitCode, Failure};
use gpus::Gpu;
use std::path::{Path, PathBuf};

/// What the user asked for with `--device`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum DeviceChoice {
    /// The GPUs, where there are any that are fit to train on; else the CPU.
    Auto,
    /// CPU.
    Cpu,
    /// NVIDIA GPUs, one for each rank.
    Cuda,
}

/// What computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// CPU.
    #[default]
    Cpu,
    /// One NVIDIA GPU for each rank.
    Cuda,
}

impl Device {
    /// Its name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        }
    }

    /// Device of a name on the wire.
    ///
    /// # Errors
    /// For a name that this version cannot compute on.
    pub fn parse(name: &str) -> Result<Self, Failure> {
        match name {
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda),
            other => Err(Failure::new(
                ExitCode::Usage,
                format!("device {other:?} is not one that this worker computes on"),
            )
            .hint("this version computes on \"cpu\" and \"cuda\"")),
        }
    }
}

/// What a node computes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hardware {
    /// The kind.
    pub device: Device,
    /// One for each rank; none on the CPU.
    pub gpus: Vec<Gpu>,
}

impl Hardware {
    /// The CPU.
    fn cpu() -> Self {
        Self {
            device: Device::Cpu,
            gpus: Vec::new(),
        }
    }

    /// Ranks that run at once, unless `asked` for another number: all cores serve one CPU rank best, and a GPU serves one rank.
    ///
    /// # Errors
    /// For more ranks than GPUs.
    pub fn slots(&self, asked: Option<u32>) -> Result<u32, Failure> {
        let gpus = u32::try_from(self.gpus.len()).unwrap_or(u32::MAX);
        match (self.device, asked) {
            (Device::Cpu, asked) => Ok(asked.unwrap_or(1)),
            (Device::Cuda, Some(asked)) if asked > gpus => Err(Failure::new(
                ExitCode::Usage,
                format!("--slots {asked}: there are {gpus} GPUs, and each serves one rank"),
            )
            .hint("leave --slots out: every GPU that is visible gets a rank")),
            (Device::Cuda, asked) => Ok(asked.unwrap_or(gpus)),
        }
    }
}

/// Turns the user's choice into hardware.
///
/// # Errors
/// `cuda` where CUDA cannot be used.
pub fn resolve(choice: DeviceChoice) -> Result<Hardware, Failure> {
    match choice {
        DeviceChoice::Cpu => Ok(Hardware::cpu()),
        // Without a GPU no library of CUDA's is opened.
        DeviceChoice::Auto if !nvidia_gpu_present() => Ok(Hardware::cpu()),
        DeviceChoice::Auto => Ok(visible_gpus().map_or_else(
            |_| Hardware::cpu(),
            |gpus| Hardware {
                device: Device::Cuda,
                gpus,
            },
        )),
        DeviceChoice::Cuda => Ok(Hardware {
            device: Device::Cuda,
            gpus: visible_gpus().map_err(|failure| Failure {
                message: format!("--device cuda: {}", failure.message),
                ..failure
            })?,
        }),
    }
}

/// The GPUs that this process may use, fit to train, with all that training on them needs.
///
/// # Errors
/// The first thing that is in the way.
fn visible_gpus() -> Result<Vec<Gpu>, Failure> {
    let list = std::env::var_os(VISIBLE_VARIABLE);
    let list = list.as_deref().map(std::ffi::OsStr::to_string_lossy);
    cuda::find(list.as_deref(), nvrtc().as_deref(), Cache::of_user())
        .map_err(|error| Failure::new(error.code(), error.to_string()).hint(error.hint()))
}

/// Another NVRTC than the loader's, if the user names one.
fn nvrtc() -> Option<PathBuf> {
    let path = std::env::var_os("ARCFACE_NVRTC").filter(|value| !value.is_empty());
    path.map(PathBuf::from)
}

/// What compiles kernels here, and keeps them for this user.
fn compiler() -> Result<Compiler, NvrtcError> {
    Compiler::open(nvrtc().as_deref(), Cache::of_user())
}

/// Names the GPUs of a process; CUDA's own. An agent gives each of its ranks one.
pub const VISIBLE_VARIABLE: &str = "CUDA_VISIBLE_DEVICES";

/// True if the kernel has a node for an NVIDIA GPU.
pub fn nvidia_gpu_present() -> bool {
    Path::new("/dev/nvidia0").exists()
}

/// Cores that this process may run on; at least 1.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Compute threads for each of `ranks_on_node` ranks: an equal share of the cores, at least 1.
pub fn threads_per_rank(cores: usize, ranks_on_node: u32) -> usize {
    (cores / (ranks_on_node.max(1) as usize)).max(1)
}

/// Tells a process its compute threads; OpenMP's own.
pub const THREADS_VARIABLE: &str = "OMP_NUM_THREADS";

/// Compute threads of this rank, one of so many on its node: what its agent told it by [`THREADS_VARIABLE`], or an equal
/// share.
pub fn threads_of_rank(ranks_on_node: u32) -> usize {
    let told = std::env::var(THREADS_VARIABLE).ok();
    told_threads(told.as_deref()).unwrap_or_else(|| threads_per_rank(cores(), ranks_on_node))
}

/// The number of the outermost level, as OpenMP reads the variable: `8` or `8,2`.
pub fn told_threads(text: Option<&str>) -> Option<usize> {
    let first = text?.split(',').next()?.trim();
    first.parse().ok().filter(|threads| *threads > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_told_as_openmp_reads_them() {
        assert_eq!(told_threads(Some("8")), Some(8));
        assert_eq!(told_threads(Some(" 4,2")), Some(4));
        for none in [None, Some(""), Some("0"), Some("-1"), Some("many")] {
            assert_eq!(told_threads(none), None, "{none:?}");
        }
    }

    #[test]
    fn cores_are_shared_and_never_less_than_one() {
        assert_eq!(threads_per_rank(16, 4), 4);
        assert_eq!(threads_per_rank(2, 8), 1);
        assert_eq!(threads_per_rank(6, 4), 1);
        assert_eq!(threads_per_rank(6, 0), 6);
    }

    #[test]
    fn cuda_is_refused_in_words_and_auto_is_not() {
        assert_eq!(resolve(DeviceChoice::Auto).unwrap().device, Device::Cpu);
        let refused = resolve(DeviceChoice::Cuda).unwrap_err();
        assert!(refused.message.contains("--device cuda"), "{refused}");
        assert_eq!(refused.code, ExitCode::Usage);
        for device in [Device::Cpu, Device::Cuda] {
            assert_eq!(Device::parse(device.as_str()).unwrap(), device);
        }
        assert!(Device::parse("tpu").is_err());
    }

    #[test]
    fn a_gpu_serves_one_rank() {
        let gpu = Gpu {
            index: 0,
            uuid: "GPU-1".to_owned(),
            name: "one".to_owned(),
            memory: 1,
            arch: crate::nvrtc::Arch::new(9, 0),
            fault: None,
        };
        let on = |device, gpus| Hardware { device, gpus };
        let two = on(Device::Cuda, vec![gpu.clone(), gpu]);
        assert_eq!(two.slots(None).unwrap(), 2);
        assert_eq!(two.slots(Some(1)).unwrap(), 1);
        let refused = two.slots(Some(3)).unwrap_err();
        assert!(refused.message.contains("there are 2 GPUs"), "{refused}");
        let none = on(Device::Cpu, Vec::new());
        assert_eq!((none.slots(None).unwrap(), none.slots(Some(5)).unwrap()), (1, 5));
    }
}

//! The one place that asks what hardware there is and how much of it a process may use.
//!
//! This version computes on the CPU; a GPU is named in the messages so that nobody wonders why it idles. `--device cuda` looks
//! whether this machine could train on its GPUs (`cuda.rs`), and then says that this version does not. Without it, no CUDA
//! library is opened.

mod cuda;
mod gpus;
mod libraries;
pub mod streams;

use crate::nvrtc::Cache;
use arcface_proto::failure::{ExitCode, Failure};
use std::path::Path;

/// What the user asked for with `--device`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum DeviceChoice {
    /// The best that this version can use on this machine.
    Auto,
    /// CPU.
    Cpu,
    /// NVIDIA GPU.
    Cuda,
}

/// What computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// CPU.
    Cpu,
}

impl Device {
    /// Its name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
        }
    }

    /// Device of a name on the wire.
    ///
    /// # Errors
    /// For a name that this version cannot compute on.
    pub fn parse(name: &str) -> Result<Self, Failure> {
        match name {
            "cpu" => Ok(Self::Cpu),
            other => Err(Failure::new(
                ExitCode::Usage,
                format!("device {other:?} is not one that this worker computes on"),
            )
            .hint("this version computes on \"cpu\"")),
        }
    }

    /// Ranks that a node runs at once unless it is told otherwise: all cores serve one CPU rank best.
    pub fn default_slots(self) -> u32 {
        match self {
            Self::Cpu => 1,
        }
    }
}

/// Turns the user's choice into a device.
///
/// # Errors
/// `cuda` where CUDA cannot be used.
pub fn resolve(choice: DeviceChoice) -> Result<Device, Failure> {
    match choice {
        DeviceChoice::Cpu | DeviceChoice::Auto => Ok(Device::Cpu),
        DeviceChoice::Cuda => {
            let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
            let list = std::env::var_os("CUDA_VISIBLE_DEVICES");
            let list = list.as_deref().map(std::ffi::OsStr::to_string_lossy);
            let nvrtc = variable("ARCFACE_NVRTC");
            match cuda::find(list.as_deref(), nvrtc.as_deref().map(Path::new), Cache::of_user()) {
                Ok(found) => Err(Failure::new(
                    ExitCode::Usage,
                    format!(
                        "--device cuda: {found}, but this version of arcface-worker trains on the CPU only"
                    ),
                )
                .hint("start it with --device cpu")),
                Err(error) => {
                    let failure = Failure::new(error.code(), format!("--device cuda: {error}"));
                    Err(failure.hint(error.hint()))
                }
            }
        }
    }
}

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
fn told_threads(text: Option<&str>) -> Option<usize> {
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
        assert_eq!(resolve(DeviceChoice::Auto).unwrap(), Device::Cpu);
        let refused = resolve(DeviceChoice::Cuda).unwrap_err();
        assert!(refused.message.contains("--device cuda"), "{refused}");
        assert_eq!(refused.code, ExitCode::Usage);
        assert_eq!(Device::parse(Device::Cpu.as_str()).unwrap(), Device::Cpu);
        assert!(Device::parse("tpu").is_err());
    }
}

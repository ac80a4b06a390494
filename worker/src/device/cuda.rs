//! Whether this machine is fit to train on its GPUs, and if not, the one thing that is in the way, with what to do about it.
//! Asked only where the user said `--device cuda`: it opens the driver, NVML, libtorch's CUDA half, NCCL and NVRTC, in the
//! order in which people can repair them, and takes no memory of a GPU.

use super::{
    gpus::{self, Gpu, VisibleError},
    libraries::{self, Driver, Version},
};
use crate::{
    collective::nccl::library::{Library as Nccl, NcclError},
    kernels,
    nvrtc::{Cache, Compiler, NvrtcError, Source, Target},
};
use arcface_proto::failure::ExitCode;
use nvml_wrapper::error::NvmlError;
use std::{collections::BTreeSet, path::Path};

/// What libtorch is built with: drivers of this version and newer ones run it.
const CUDA: Version = Version { major: 13, minor: 0 };

/// What is in the way.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// No libcuda.
    #[error("no NVIDIA driver was found (libcuda.so.1)")]
    NoDriver,
    /// It does not start.
    #[error("the NVIDIA driver does not start: {reason}")]
    DriverFails {
        /// CUDA's name of it.
        reason: String,
    },
    /// It is too old.
    #[error("the NVIDIA driver knows CUDA {found}, and libtorch needs {CUDA}")]
    OldDriver {
        /// What it knows.
        found: Version,
    },
    /// NVML is missing or refuses.
    #[error("NVML, which says what GPUs there are, does not answer: {0}")]
    Nvml(#[from] NvmlError),
    /// None at all.
    #[error("the NVIDIA driver finds no GPU")]
    NoGpu,
    /// None that this process may use.
    #[error("no GPU is visible: CUDA_VISIBLE_DEVICES={list:?} leaves none of {count}")]
    NoneVisible {
        /// The variable.
        list: String,
        /// GPUs of the machine.
        count: usize,
    },
    /// The variable is wrong.
    #[error(transparent)]
    Visible(#[from] VisibleError),
    /// One that must not be trained on.
    #[error("{gpu}: {fault}")]
    Fault {
        /// Which one.
        gpu: Box<Gpu>,
        /// Why.
        fault: String,
    },
    /// libtorch_cuda or something that it needs.
    #[error("libtorch cannot use CUDA: {reason}")]
    NoLibtorch {
        /// What the loader says.
        reason: String,
    },
    /// No libnccl, or one that does not do.
    #[error(transparent)]
    Nccl(#[from] NcclError),
    /// The head's kernels.
    #[error(transparent)]
    Kernels(#[from] NvrtcError),
}

impl CudaError {
    /// What a person can do.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NoDriver => {
                "install NVIDIA's driver, 580 or newer; a container needs its GPUs given to it; or start it with --device cpu"
            }
            Self::DriverFails { .. } => {
                "nvidia-smi and the kernel's log say more; after an update of the driver, restart"
            }
            Self::OldDriver { .. } => "install driver 580 or newer, or start it with --device cpu",
            Self::Nvml(_) => {
                "NVML (libnvidia-ml.so.1) comes with the driver; a container needs the capability \"utility\""
            }
            Self::NoGpu => "nvidia-smi lists what the driver sees; or start it with --device cpu",
            Self::NoneVisible { .. } | Self::Visible(_) => {
                "CUDA_VISIBLE_DEVICES is a list such as 0,1 or GPU-uuids; without it all GPUs are used"
            }
            Self::Fault { .. } => "reset or replace it; CUDA_VISIBLE_DEVICES without it leaves it out",
            Self::NoLibtorch { .. } => {
                "it needs the CUDA 13 build of libtorch 2.11 with its libraries beside libtorch_cpu.so"
            }
            Self::Nccl(_) => "install NCCL 2.28 (libnccl.so.2) where the loader finds it",
            Self::Kernels(NvrtcError::Missing { .. }) => {
                "it comes with CUDA 13 (libnvrtc.so.13); ARCFACE_NVRTC names another place"
            }
            Self::Kernels(NvrtcError::Unknown { .. }) => {
                "CUDA_VISIBLE_DEVICES without this GPU leaves it out"
            }
            Self::Kernels(_) => "please report this with the version of NVRTC",
        }
    }

    /// The command line asks for what this machine has not; a kernel that does not compile is our own fault.
    pub fn code(&self) -> ExitCode {
        match self {
            Self::Kernels(NvrtcError::Compile { .. } | NvrtcError::Call { .. }) => ExitCode::Failed,
            _ => ExitCode::Usage,
        }
    }
}

/// The GPUs that this process may use, with everything there that training on them needs, the head's kernels compiled. `list`
/// is `CUDA_VISIBLE_DEVICES`, `nvrtc` another NVRTC than the loader's.
///
/// # Errors
/// The first thing that is in the way.
pub fn find(list: Option<&str>, nvrtc: Option<&Path>, cache: Option<Cache>) -> Result<Vec<Gpu>, CudaError> {
    match libraries::start_driver(CUDA) {
        Driver::Absent => return Err(CudaError::NoDriver),
        Driver::Fails(reason) => return Err(CudaError::DriverFails { reason }),
        Driver::Starts(found) if found < CUDA => return Err(CudaError::OldDriver { found }),
        // The driver obeys the variable too; NVML says what there is without it.
        Driver::NoGpu | Driver::Starts(_) => {}
    }
    let all = gpus::all()?;
    if all.is_empty() {
        return Err(CudaError::NoGpu);
    }
    let visible = gpus::visible(&all, list)?;
    if visible.is_empty() {
        return Err(CudaError::NoneVisible {
            list: list.unwrap_or_default().to_owned(),
            count: all.len(),
        });
    }
    for gpu in &visible {
        if let Some(fault) = &gpu.fault {
            return Err(CudaError::Fault {
                gpu: Box::new((*gpu).clone()),
                fault: fault.clone(),
            });
        }
    }
    libraries::open_libtorch_cuda().map_err(|reason| CudaError::NoLibtorch { reason })?;
    Nccl::open(None)?;
    let compiler = Compiler::open(nvrtc, cache)?;
    let targets: Result<Vec<Target>, NvrtcError> = visible
        .iter()
        .map(|gpu| gpu.arch)
        .collect::<BTreeSet<_>>()
        .into_iter()
        .map(|arch| compiler.target(arch))
        .collect();
    for target in targets? {
        for (source, _) in kernels::ALL.into_iter().flat_map(Source::of) {
            compiler.compile(&source, target)?;
        }
    }
    Ok(visible.into_iter().cloned().collect())
}

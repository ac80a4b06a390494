//! The GPUs of this machine as NVIDIA's management library (NVML) tells them: what they are, whether they are fit to train,
//! and which of them this process may use. Asking takes no memory of a GPU.

use crate::nvrtc::Arch;
use nvml_wrapper::{
    Device, Nvml,
    enum_wrappers::device::{EccCounter, MemoryError},
    error::NvmlError,
};
use std::fmt;

/// One GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// Its place in the order of the bus, as nvidia-smi counts.
    pub index: u32,
    /// GPU-.., the same after a restart.
    pub uuid: String,
    /// The product.
    pub name: String,
    /// Bytes of its memory.
    pub memory: u64,
    /// Its architecture.
    pub arch: Arch,
    /// Why nothing should be trained on it, if so.
    pub fault: Option<String>,
}

impl fmt::Display for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gib = self.memory as f64 / f64::from(1 << 30);
        write!(
            f,
            "GPU {} ({}, {gib:.0} GiB, {})",
            self.index, self.name, self.arch
        )
    }
}

/// All GPUs of the machine, in the order of the bus.
///
/// # Errors
/// If NVML is missing or does not answer. A GPU that does not answer is a GPU with a fault.
pub fn all() -> Result<Vec<Gpu>, NvmlError> {
    let nvml = Nvml::init()?;
    (0..nvml.device_count()?)
        .map(
            |index| match nvml.device_by_index(index).and_then(|device| ask(index, &device)) {
                Ok(gpu) => Ok(gpu),
                Err(error @ (NvmlError::GpuLost | NvmlError::Unknown | NvmlError::InsufficientPower)) => {
                    Ok(Gpu {
                        index,
                        uuid: String::new(),
                        name: "unknown".to_owned(),
                        memory: 0,
                        arch: Arch::new(0, 0),
                        fault: Some(format!("it does not answer: {error}")),
                    })
                }
                Err(error) => Err(error),
            },
        )
        .collect()
}

fn ask(index: u32, device: &Device<'_>) -> Result<Gpu, NvmlError> {
    let capability = device.cuda_compute_capability()?;
    let number = |part: i32| u32::try_from(part).unwrap_or(0);
    Ok(Gpu {
        index,
        uuid: device.uuid()?,
        name: device.name()?,
        memory: device.memory_info()?.total,
        arch: Arch::new(number(capability.major), number(capability.minor)),
        fault: fault(device)?,
    })
}

/// Errors of memory that make results wrong or end every process. GPUs that do not count them have none.
fn fault(device: &Device<'_>) -> Result<Option<String>, NvmlError> {
    let uncorrected = device.total_ecc_errors(MemoryError::Uncorrected, EccCounter::Volatile);
    if let Some(count) = answer(uncorrected)?.filter(|count| *count > 0) {
        return Ok(Some(format!(
            "its memory had {count} uncorrectable errors since the driver was loaded"
        )));
    }
    let pending = answer(device.are_pages_pending_retired())?;
    Ok(pending
        .filter(|pending| *pending)
        .map(|_| "pages of its memory wait to be retired".to_owned()))
}

/// `None` where a GPU or a driver has no such question.
fn answer<T>(asked: Result<T, NvmlError>) -> Result<Option<T>, NvmlError> {
    match asked {
        Ok(value) => Ok(Some(value)),
        Err(NvmlError::NotSupported | NvmlError::NoPermission | NvmlError::FailedToLoadSymbol(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Why `CUDA_VISIBLE_DEVICES` names no set of GPUs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VisibleError {
    /// One that is not there. CUDA would silently forget it and all that follow.
    #[error("CUDA_VISIBLE_DEVICES names {entry}, and there are {count} GPUs")]
    Unknown {
        /// The entry.
        entry: String,
        /// GPUs of the machine.
        count: usize,
    },
    /// The same one twice. CUDA would see none at all.
    #[error("CUDA_VISIBLE_DEVICES names GPU {index} twice")]
    Twice {
        /// Which one.
        index: u32,
    },
    /// A part of a GPU.
    #[error("CUDA_VISIBLE_DEVICES names {entry}: parts of GPUs (MIG) are not used")]
    Part {
        /// The entry.
        entry: String,
    },
}

/// The GPUs that a `CUDA_VISIBLE_DEVICES` leaves, in its order; all without one. Numbers count in the order of the bus, so
/// ranks are told their GPU by its uuid: CUDA itself counts the fastest first.
///
/// # Errors
/// For what CUDA would take in a way that nobody means.
pub fn visible<'a>(gpus: &'a [Gpu], list: Option<&str>) -> Result<Vec<&'a Gpu>, VisibleError> {
    let Some(list) = list else {
        return Ok(gpus.iter().collect());
    };
    let mut chosen: Vec<&Gpu> = Vec::new();
    for entry in list.split(',').map(str::trim).filter(|entry| !entry.is_empty()) {
        if entry == "-1" || entry == "NoDevFiles" {
            break; // CUDA's way to say: no more
        }
        if entry.starts_with("MIG-") {
            return Err(VisibleError::Part {
                entry: entry.to_owned(),
            });
        }
        let named = |gpu: &&Gpu| match entry.parse::<u32>() {
            Ok(index) => gpu.index == index,
            // A beginning of a uuid is enough.
            Err(_) => entry.starts_with("GPU-") && gpu.uuid.starts_with(entry),
        };
        let mut found = gpus.iter().filter(named);
        let (Some(gpu), None) = (found.next(), found.next()) else {
            return Err(VisibleError::Unknown {
                entry: entry.to_owned(),
                count: gpus.len(),
            });
        };
        if chosen.contains(&gpu) {
            return Err(VisibleError::Twice { index: gpu.index });
        }
        chosen.push(gpu);
    }
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpus(count: u32) -> Vec<Gpu> {
        (0..count)
            .map(|index| Gpu {
                index,
                uuid: format!("GPU-{index}a{index}b-0000"),
                name: "NVIDIA H100".to_owned(),
                memory: 80 << 30,
                arch: Arch::new(9, 0),
                fault: None,
            })
            .collect()
    }

    fn indices(list: Option<&str>) -> Result<Vec<u32>, VisibleError> {
        let gpus = gpus(4);
        Ok(visible(&gpus, list)?.into_iter().map(|gpu| gpu.index).collect())
    }

    #[test]
    fn lists_are_read_as_cuda_reads_them() {
        assert_eq!(indices(None), Ok(vec![0, 1, 2, 3]));
        assert_eq!(indices(Some("")), Ok(vec![]));
        assert_eq!(indices(Some("2, 0")), Ok(vec![2, 0]));
        assert_eq!(indices(Some("1,-1,3")), Ok(vec![1]));
        assert_eq!(indices(Some("NoDevFiles")), Ok(vec![]));
        assert_eq!(indices(Some("GPU-3a,GPU-0a0b-0000")), Ok(vec![3, 0]));
        assert_eq!(gpus(1)[0].to_string(), "GPU 0 (NVIDIA H100, 80 GiB, sm_90)");
    }

    #[test]
    fn what_nobody_means_is_refused() {
        let message = |list| indices(Some(list)).expect_err("refused").to_string();
        assert_eq!(
            message("0,4"),
            "CUDA_VISIBLE_DEVICES names 4, and there are 4 GPUs"
        );
        assert_eq!(message("1,GPU-1a"), "CUDA_VISIBLE_DEVICES names GPU 1 twice");
        assert!(message("MIG-1").contains("MIG-1"));
        for unclear in ["GPU-", "all", "0;1", "gpu0"] {
            assert!(
                matches!(indices(Some(unclear)), Err(VisibleError::Unknown { .. })),
                "{unclear}"
            );
        }
    }
}

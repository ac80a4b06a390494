//! Where a rank computes: on the CPU, or on the one GPU that its agent gave it. Opens CUDA in the rank's process, before
//! anything else asks libtorch for it. Unsafe, because libtorch's switches are reached across the C interface.
#![allow(unsafe_code)]

use super::{Device, GpuLauncher, compiler, gpus::Gpu, visible_gpus};
use crate::{head::HeadDevice, kernels::Kernels};
use arcface_proto::{
    failure::{ExitCode, Failure},
    spec::Precision,
};
use std::{ffi::c_void, fmt, sync::Arc};
use tch::Tensor;

unsafe extern "C" {
    fn arcface_allow_tf32(allow: bool);
    fn arcface_gpu_memory(bytes: *mut u64) -> bool;
    fn arcface_pinned(tensor: *const c_void) -> *mut c_void;
}

/// The same tensor in memory that a GPU reads by itself; as it is where there is no GPU, and nothing to gain by it.
pub fn pinned(tensor: Tensor) -> Tensor {
    // SAFETY: the pointer is to a tensor that outlives the call; C++ exceptions end inside.
    let copy = unsafe { arcface_pinned(tensor.as_ptr().cast()) };
    match copy.is_null() {
        true => tensor,
        // SAFETY: a new tensor that nobody else owns.
        false => unsafe { Tensor::from_ptr(copy.cast()) },
    }
}

/// Bytes of a GPU's memory, as libtorch counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GpuMemory {
    /// What tensors take.
    pub allocated: u64,
    /// What libtorch holds for tensors.
    pub reserved: u64,
    /// The most that tensors have taken at once.
    pub peak: u64,
}

/// A rank's place.
#[derive(Clone)]
pub struct Placement {
    head: HeadDevice,
    gpu: Option<Gpu>,
}

impl fmt::Debug for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.gpu {
            Some(gpu) => write!(f, "{gpu}"),
            None => write!(f, "CPU"),
        }
    }
}

impl Placement {
    /// On the CPU.
    pub fn cpu() -> Self {
        Self {
            head: HeadDevice::Cpu,
            gpu: None,
        }
    }

    /// On a device by its name on the wire, for a job of this precision. `"cuda"` takes the first GPU that this process
    /// sees: an agent shows each rank one.
    ///
    /// In fp32 a GPU multiplies in fp32 too, so that results are those of the CPU to rounding; in the other precisions what is
    /// left in fp32 may be rounded to TF32.
    ///
    /// # Errors
    /// For an unknown device, and where CUDA cannot be used.
    pub fn open(device: &str, precision: Precision) -> Result<Self, Failure> {
        match Device::parse(device)? {
            Device::Cpu => Ok(Self::cpu()),
            Device::Cuda => {
                // Opens libtorch's CUDA half: only now may it be asked.
                let gpu = visible_gpus()?.into_iter().next();
                if !tch::Cuda::is_available() {
                    let name = gpu.map(|gpu| gpu.to_string()).unwrap_or_default();
                    return Err(
                        Failure::new(ExitCode::Failed, format!("libtorch cannot use {name}"))
                            .hint("libtorch and its CUDA libraries must be of one build"),
                    );
                }
                let rounds = precision != Precision::Fp32;
                // SAFETY: sets two flags of libtorch's.
                unsafe { arcface_allow_tf32(rounds) };
                // Every step has the same shapes: the search for the fastest convolution pays.
                tch::Cuda::cudnn_set_benchmark(true);
                let failed = |error: &dyn fmt::Display| Failure::new(ExitCode::Failed, error.to_string());
                let compiler = compiler().map_err(|error| failed(&error))?;
                let launcher = GpuLauncher::new(0, &compiler).map_err(|error| failed(&error))?;
                Ok(Self {
                    head: HeadDevice::Gpu {
                        device: tch::Device::Cuda(0),
                        launcher: Arc::new(launcher),
                    },
                    gpu,
                })
            }
        }
    }

    /// For libtorch.
    pub fn device(&self) -> tch::Device {
        self.head.device()
    }

    /// For the head, with what starts its kernels.
    pub fn of_head(&self) -> &HeadDevice {
        &self.head
    }

    /// What starts kernels of our own on it; none on the CPU.
    pub fn kernels(&self) -> Option<Kernels> {
        match &self.head {
            HeadDevice::Cpu => None,
            HeadDevice::Gpu { device, launcher } => Some(Kernels::new(launcher.clone(), *device)),
        }
    }

    /// The GPU, if it is one.
    pub fn gpu(&self) -> Option<&Gpu> {
        self.gpu.as_ref()
    }

    /// What is allocated on the GPU, if it is one.
    pub fn memory(&self) -> Option<GpuMemory> {
        self.gpu.as_ref()?;
        let mut bytes = [0u64; 3];
        // SAFETY: writes three numbers; C++ exceptions end inside.
        let known = unsafe { arcface_gpu_memory(bytes.as_mut_ptr()) };
        let [allocated, reserved, peak] = bytes;
        known.then_some(GpuMemory {
            allocated,
            reserved,
            peak,
        })
    }

    /// Waits until everything that was begun here is done; at once on the CPU.
    pub fn wait(&self) {
        if self.gpu.is_some() {
            tch::Cuda::synchronize(0);
        }
    }

    /// Brings a tensor here. From pinned memory the copy runs while the caller goes on.
    pub fn take(&self, tensor: &Tensor) -> Tensor {
        let device = self.device();
        match tensor.device() == device {
            true => tensor.shallow_clone(),
            false => tensor.to_device_(device, tensor.kind(), true, false),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    unsafe extern "C" {
        fn arcface_allows_tf32() -> bool;
    }

    #[test]
    fn products_in_f32_can_be_kept_exact() {
        for allow in [true, false] {
            // SAFETY: sets and reads libtorch's flags.
            unsafe { arcface_allow_tf32(allow) };
            // SAFETY: as above.
            assert_eq!(unsafe { arcface_allows_tf32() }, allow);
        }
    }

    #[test]
    fn without_a_gpu_nothing_is_allocated_on_one() {
        let mut bytes = [7u64; 3];
        // SAFETY: three numbers.
        let known = unsafe { arcface_gpu_memory(bytes.as_mut_ptr()) };
        assert!(known || bytes == [7; 3]);
        assert_eq!(Placement::cpu().memory(), None);
    }

    #[test]
    fn a_tensor_that_is_here_is_not_copied() {
        let here = Placement::open("cpu", Precision::Fp32).expect("a CPU");
        let tensor = Tensor::from_slice(&[1f32, 2.0]);
        assert_eq!(here.take(&tensor).data_ptr(), tensor.data_ptr());
        assert_eq!((here.device(), here.gpu()), (tch::Device::Cpu, None));
        assert!(Placement::open("tpu", Precision::Fp32).is_err());
    }
}

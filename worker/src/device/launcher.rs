//! Kernels on a GPU: compiled for it, loaded into the context that libtorch has there, and started on the stream that libtorch
//! works on. Knows the kernels' names, and not what they compute.
//!
//! It needs `unsafe` because the driver's functions take addresses and handles.
#![allow(unsafe_code)]

use crate::{
    kernels::{
        self,
        launch::{Arguments, LaunchError, Launcher, Shape},
    },
    nvrtc::{Arch, Compiler, NvrtcError, Source},
};
use cudarc::driver::sys as driver;
use driver::{CUdevice_attribute as Attribute, CUresult};
use std::{
    collections::HashMap,
    ffi::{CStr, CString, c_char, c_int, c_void},
    ptr,
};

/// The first generation of GPUs that multiplies bf16 (A100).
const MULTIPLIES_BF16: (u32, u32) = (8, 0);

/// Why a GPU has no kernels.
#[derive(Debug, thiserror::Error)]
pub enum GpuLauncherError {
    /// No libcuda.
    #[error("no NVIDIA driver was found (libcuda.so.1)")]
    NoDriver,
    /// The driver refuses something.
    #[error("GPU {ordinal}: {call} of {what} failed: {reason}")]
    Driver {
        /// The GPU, as CUDA counts those of this process.
        ordinal: usize,
        /// The function.
        call: &'static str,
        /// What it was called for.
        what: String,
        /// The driver's name of the reason.
        reason: String,
    },
    /// The kernels do not compile for it.
    #[error(transparent)]
    Kernels(#[from] NvrtcError),
}

/// Longest reason of libtorch's, in bytes.
const REASON: usize = 1024;

unsafe extern "C" {
    fn arcface_current_stream(
        gpu: c_int,
        stream: *mut *mut c_void,
        error: *mut c_char,
        length: usize,
    ) -> bool;
}

/// Starts kernels on one GPU. Modules stay loaded for as long as the process lives, as the context does.
pub struct GpuLauncher {
    ordinal: c_int,
    context: driver::CUcontext,
    functions: HashMap<&'static str, driver::CUfunction>,
    arch: Arch,
}

// SAFETY: contexts and functions are handles of the driver, which takes them from any thread; nothing here changes after `new`.
unsafe impl Send for GpuLauncher {}
// SAFETY: as above.
unsafe impl Sync for GpuLauncher {}

impl GpuLauncher {
    /// Compiles our kernels for a GPU, or takes them from the compiler's cache, and loads them. `ordinal` is libtorch's
    /// `Device::Cuda(ordinal)`.
    ///
    /// # Errors
    /// The first thing that is in the way.
    pub fn new(ordinal: usize, compiler: &Compiler) -> Result<Self, GpuLauncherError> {
        // SAFETY: opens libcuda and closes it again.
        if !unsafe { driver::is_culib_present() } {
            // Only now may cudarc be asked for anything else: it panics where the library is absent.
            return Err(GpuLauncherError::NoDriver);
        }
        let number = c_int::try_from(ordinal).unwrap_or(c_int::MAX);
        let check = |call: &'static str, what: &str, status: CUresult| match status {
            CUresult::CUDA_SUCCESS => Ok(()),
            failed => Err(GpuLauncherError::Driver {
                ordinal,
                call,
                what: what.to_owned(),
                reason: format!("{failed:?}"),
            }),
        };
        // SAFETY: may be called any number of times, from any thread.
        check("cuInit", "the driver", unsafe { driver::cuInit(0) })?;
        let mut device = 0;
        // SAFETY: writes a handle.
        check("cuDeviceGet", "it", unsafe {
            driver::cuDeviceGet(&mut device, number)
        })?;
        let attribute = |which: Attribute| {
            let mut value = 0;
            // SAFETY: writes a number; the device was just found.
            let status = unsafe { driver::cuDeviceGetAttribute(&mut value, which, device) };
            check("cuDeviceGetAttribute", "its generation", status)?;
            Ok::<u32, GpuLauncherError>(u32::try_from(value).unwrap_or(0))
        };
        let arch = Arch::new(
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        let mut context = ptr::null_mut();
        // SAFETY: writes a handle. The primary context is the one that libtorch uses; it is kept for as long as we live.
        let status = unsafe { driver::cuDevicePrimaryCtxRetain(&mut context, device) };
        check("cuDevicePrimaryCtxRetain", "its context", status)?;
        // SAFETY: the context was just given to us.
        let status = unsafe { driver::cuCtxSetCurrent(context) };
        check("cuCtxSetCurrent", "its context", status)?;

        let target = compiler.target(arch)?;
        let mut functions = HashMap::new();
        for (source, names) in kernels::ALL.into_iter().flat_map(Source::of) {
            let image = compiler.compile(&source, target)?;
            let mut module = ptr::null_mut();
            // SAFETY: the image is machine code, or PTX with its final zero, and is only read during the call.
            let status = unsafe {
                driver::cuModuleLoadDataEx(
                    &mut module,
                    image.bytes.as_ptr().cast(),
                    0,
                    ptr::null_mut(),
                    ptr::null_mut(),
                )
            };
            check("cuModuleLoadDataEx", source.name, status)?;
            for &kernel in names {
                let symbol = CString::new(kernel).expect("names of kernels have no zero");
                let mut function = ptr::null_mut();
                // SAFETY: the module was just loaded; the name outlives the call.
                let status = unsafe { driver::cuModuleGetFunction(&mut function, module, symbol.as_ptr()) };
                check("cuModuleGetFunction", kernel, status)?;
                functions.insert(kernel, function);
            }
        }
        Ok(Self {
            ordinal: number,
            context,
            functions,
            arch,
        })
    }
}

impl Launcher for GpuLauncher {
    unsafe fn launch(
        &self,
        kernel: &'static str,
        shape: Shape,
        arguments: &mut Arguments,
    ) -> Result<(), LaunchError> {
        let refused = |reason: String| LaunchError::Refused { kernel, reason };
        let function = *self
            .functions
            .get(kernel)
            .ok_or_else(|| refused("there is no such kernel".to_owned()))?;
        // SAFETY: the context lives as long as this; threads of this process have no other on this GPU.
        let status = unsafe { driver::cuCtxSetCurrent(self.context) };
        if status != CUresult::CUDA_SUCCESS {
            return Err(refused(format!("cuCtxSetCurrent: {status:?}")));
        }
        let mut pointers = arguments.pointers();
        let mut stream = ptr::null_mut();
        let mut reason = [0u8; REASON];
        // SAFETY: writes a handle, or a reason to a buffer as long as we say; C++ exceptions end inside.
        let known =
            unsafe { arcface_current_stream(self.ordinal, &mut stream, reason.as_mut_ptr().cast(), REASON) };
        if !known {
            let reason = CStr::from_bytes_until_nul(&reason).unwrap_or_default();
            return Err(refused(reason.to_string_lossy().into_owned()));
        }
        // SAFETY: the function is of a loaded module, and the arguments are its own by the caller's word; the driver copies
        // them before it returns.
        let status = unsafe {
            driver::cuLaunchKernel(
                function,
                shape.grid,
                1,
                1,
                shape.block,
                1,
                1,
                0,
                stream.cast(),
                pointers.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        match status {
            CUresult::CUDA_SUCCESS => Ok(()),
            failed => Err(refused(format!("cuLaunchKernel: {failed:?}"))),
        }
    }

    fn multiplies_bf16(&self) -> bool {
        let (major, minor) = MULTIPLIES_BF16;
        self.arch >= Arch::new(major, minor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        collective::{Collective, CollectiveError, ReduceOp},
        device::libraries,
        head::{
            CudaHead, TiledHead,
            suite::{Case, config, distance, train},
        },
        optim::OptimizerConfig,
    };
    use std::{path::Path, sync::Arc};
    use tch::{Device, Tensor};

    /// The communicator of a single rank, for tensors on any device.
    struct Alone;

    impl Collective for Alone {
        fn rank(&self) -> u32 {
            0
        }

        fn world_size(&self) -> u32 {
            1
        }

        fn all_reduce(&mut self, _: &mut Tensor, _: ReduceOp) -> Result<(), CollectiveError> {
            Ok(())
        }

        fn all_gather(&mut self, local: &Tensor) -> Result<Tensor, CollectiveError> {
            Ok(local.copy())
        }

        fn reduce_scatter(&mut self, full: &Tensor) -> Result<Tensor, CollectiveError> {
            Ok(full.copy())
        }

        fn broadcast(&mut self, _: &mut Tensor, _: u32) -> Result<(), CollectiveError> {
            Ok(())
        }

        fn barrier(&mut self) -> Result<(), CollectiveError> {
            Ok(())
        }
    }

    /// A launcher on the first GPU, or what is missing for one.
    fn on_gpu() -> Result<GpuLauncher, String> {
        libraries::open_libtorch_cuda()?;
        if !tch::Cuda::is_available() {
            return Err("libtorch finds no GPU".to_owned());
        }
        let nvrtc = std::env::var_os("ARCFACE_NVRTC").filter(|path| Path::new(path).exists());
        let compiler = Compiler::open(nvrtc.as_deref().map(Path::new), None);
        let compiler = compiler.map_err(|error| error.to_string())?;
        GpuLauncher::new(0, &compiler).map_err(|error| error.to_string())
    }

    /// The one test that needs a GPU: what the twins cannot show.
    #[test]
    fn a_head_on_a_gpu_trains_as_the_tiled_one() {
        /// f32 in other orders of sums, and a GPU's own exponential.
        const TOLERANCE: f64 = 1e-4;
        let launcher: Arc<dyn Launcher> = match on_gpu() {
            Ok(launcher) => Arc::new(launcher),
            Err(missing) => {
                println!("SKIPPED: no head ran on a GPU: {missing}");
                return;
            }
        };
        for (optimizer, sample_rate, micros) in [
            (config(1, 1).optimizer, 1.0, 1),
            (config(1, 1).optimizer, 0.2, 2),
            (OptimizerConfig::adamw(0.1), 0.5, 2),
        ] {
            let config = crate::head::HeadConfig {
                optimizer,
                sample_rate,
                ..config(40_003, 256)
            };
            let labels: Vec<i64> = (0..64).map(|i| i * 619).collect();
            let case = Case {
                micros,
                ..Case::new(config.clone(), &labels, &[64])
            };
            let mut gpu = CudaHead::new(&config, 0, 1, Device::Cuda(0), launcher.clone());
            let mut tiled = TiledHead::new(&config, 0, 1);
            let ours = train(&mut gpu, &mut Alone, &case);
            let expected = train(&mut tiled, &mut Alone, &case);
            let here = |tensor: &Tensor| tensor.to_device(Device::Cpu);
            for ((loss, grad), (tiled_loss, tiled_grad)) in ours.micros.iter().zip(&expected.micros) {
                assert!(
                    (loss - tiled_loss).abs() < TOLERANCE * tiled_loss,
                    "{loss} {tiled_loss}"
                );
                assert!(distance(&here(grad), tiled_grad, 1e-6) < TOLERANCE);
            }
            for ((name, ours), (_, expected)) in ours.state.iter().zip(&expected.state) {
                let difference = distance(&here(ours), expected, 1e-6);
                assert!(difference < 10.0 * TOLERANCE, "{name}: {difference:e}");
            }
        }
    }

    #[test]
    fn without_a_driver_it_is_said_in_one_line() {
        // SAFETY: opens libcuda and closes it again.
        if unsafe { driver::is_culib_present() } {
            println!("SKIPPED: this machine has a driver");
            return;
        }
        let nvrtc = std::env::var_os("ARCFACE_NVRTC").filter(|path| Path::new(path).exists());
        let Ok(compiler) = Compiler::open(nvrtc.as_deref().map(Path::new), None) else {
            println!("SKIPPED: no NVRTC, which is asked first");
            return;
        };
        let error = GpuLauncher::new(0, &compiler).err().expect("there is no driver");
        assert!(matches!(error, GpuLauncherError::NoDriver));
        assert!(!error.to_string().contains('\n'));
    }
}

//! NVRTC's functions, loaded at run time: thin, one method a call or a chain of calls. The header is the nvrtc.h of CUDA 12.9;
//! what is used of it is the same in 13.
//!
//! cudarc binds the same functions, but finds the library by names of its own choice and panics where it is absent; and
//! results come as an enum, in which a code of another version would be undefined. So only its handle is used here.
//!
//! It needs `unsafe` because these are C functions behind pointers.
#![allow(unsafe_code)]

use super::{NvrtcError, Source, Target, loader_says};
use cudarc::nvrtc::sys::nvrtcProgram;
use std::{
    ffi::{CStr, CString, OsStr, c_char, c_int},
    mem::ManuallyDrop,
    path::Path,
    ptr,
};

/// Names to try where none is given; the first is libtorch's own.
const NAMES: [&str; 3] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];

/// nvrtcResult.
type Status = c_int;
const SUCCESS: Status = 0;
const COMPILATION: Status = 6;

type Size = unsafe extern "C" fn(nvrtcProgram, *mut usize) -> Status;
type Bytes = unsafe extern "C" fn(nvrtcProgram, *mut c_char) -> Status;

/// The library and its functions.
pub struct Library {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> Status,
    error_string: unsafe extern "C" fn(Status) -> *const c_char,
    arch_count: unsafe extern "C" fn(*mut c_int) -> Status,
    archs: unsafe extern "C" fn(*mut c_int) -> Status,
    create: unsafe extern "C" fn(
        *mut nvrtcProgram,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Status,
    destroy: unsafe extern "C" fn(*mut nvrtcProgram) -> Status,
    compile: unsafe extern "C" fn(nvrtcProgram, c_int, *const *const c_char) -> Status,
    log_size: Size,
    log: Bytes,
    ptx_size: Size,
    ptx: Bytes,
    cubin_size: Size,
    cubin: Bytes,
    /// Stays loaded: NVRTC has threads and caches of its own.
    _library: ManuallyDrop<libloading::Library>,
}

impl Library {
    pub fn open(path: Option<&Path>) -> Result<Self, NvrtcError> {
        let names: Vec<&OsStr> = match path {
            Some(path) => vec![path.as_os_str()],
            None => NAMES.iter().map(OsStr::new).collect(),
        };
        let mut reason = String::new();
        for name in names {
            // SAFETY: loading NVRTC runs its initialisers, which do nothing that concerns us.
            match unsafe { libloading::Library::new(name) } {
                Ok(library) => return Self::bind(ManuallyDrop::new(library)),
                Err(error) => reason = loader_says(&error),
            }
        }
        Err(NvrtcError::Missing { reason })
    }

    fn bind(library: ManuallyDrop<libloading::Library>) -> Result<Self, NvrtcError> {
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: the field that takes the pointer has the type of the function of this name in nvrtc.h.
                unsafe { library.get($name) }
                    .map(|symbol| *symbol)
                    .map_err(|error| NvrtcError::Missing {
                        reason: loader_says(&error),
                    })?
            };
        }
        Ok(Self {
            version: function!("nvrtcVersion"),
            error_string: function!("nvrtcGetErrorString"),
            arch_count: function!("nvrtcGetNumSupportedArchs"),
            archs: function!("nvrtcGetSupportedArchs"),
            create: function!("nvrtcCreateProgram"),
            destroy: function!("nvrtcDestroyProgram"),
            compile: function!("nvrtcCompileProgram"),
            log_size: function!("nvrtcGetProgramLogSize"),
            log: function!("nvrtcGetProgramLog"),
            ptx_size: function!("nvrtcGetPTXSize"),
            ptx: function!("nvrtcGetPTX"),
            cubin_size: function!("nvrtcGetCUBINSize"),
            cubin: function!("nvrtcGetCUBIN"),
            _library: library,
        })
    }

    fn check(&self, call: &'static str, status: Status) -> Result<(), NvrtcError> {
        if status == SUCCESS {
            return Ok(());
        }
        // SAFETY: NVRTC gives a string that lives as long as the library, for any code.
        let text = unsafe { CStr::from_ptr((self.error_string)(status)) };
        Err(NvrtcError::Call {
            call,
            reason: text.to_string_lossy().into_owned(),
        })
    }

    pub fn version(&self) -> Result<(i32, i32), NvrtcError> {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: writes two numbers.
        let status = unsafe { (self.version)(&mut major, &mut minor) };
        self.check("nvrtcVersion", status)?;
        Ok((major, minor))
    }

    /// The numbers of all architectures that it compiles for, as in sm_90.
    pub fn architectures(&self) -> Result<Vec<u32>, NvrtcError> {
        let mut count = 0;
        // SAFETY: writes a number.
        let status = unsafe { (self.arch_count)(&mut count) };
        self.check("nvrtcGetNumSupportedArchs", status)?;
        let mut numbers = vec![0 as c_int; usize::try_from(count).unwrap_or(0)];
        // SAFETY: writes as many numbers as it has just said.
        let status = unsafe { (self.archs)(numbers.as_mut_ptr()) };
        self.check("nvrtcGetSupportedArchs", status)?;
        Ok(numbers
            .into_iter()
            .filter_map(|n| u32::try_from(n).ok())
            .collect())
    }

    pub fn compile(
        &self,
        source: &Source<'_>,
        options: &[String],
        target: Target,
    ) -> Result<Vec<u8>, NvrtcError> {
        let text = c_string(source.text, source.name)?;
        let name = c_string(source.name, source.name)?;
        let headers = c_strings(source.headers.iter().map(|(_, text)| *text), source.name)?;
        let names = c_strings(source.headers.iter().map(|(name, _)| *name), source.name)?;
        let options = c_strings(options.iter().map(String::as_str), "an option")?;
        let pointers = |strings: &[CString]| -> Vec<*const c_char> {
            strings.iter().map(|string| string.as_ptr()).collect()
        };
        let (headers, names) = (Strings::new(headers, pointers), Strings::new(names, pointers));
        let options = Strings::new(options, pointers);

        let mut handle: nvrtcProgram = ptr::null_mut();
        // SAFETY: all strings end in a zero and outlive the call, and there are as many as it is told.
        let status = unsafe {
            (self.create)(
                &mut handle,
                text.as_ptr(),
                name.as_ptr(),
                headers.count(),
                headers.pointers.as_ptr(),
                names.pointers.as_ptr(),
            )
        };
        self.check("nvrtcCreateProgram", status)?;
        let program = Program {
            library: self,
            handle,
        };
        // SAFETY: the program is alive; the options are strings as above.
        let status = unsafe { (self.compile)(program.handle, options.count(), options.pointers.as_ptr()) };
        if status == COMPILATION {
            return Err(NvrtcError::Compile {
                source_name: source.name.to_owned(),
                target,
                log: program.log()?,
            });
        }
        self.check("nvrtcCompileProgram", status)?;
        match target {
            Target::Ptx(_) => program.bytes("nvrtcGetPTX", self.ptx_size, self.ptx),
            Target::Cubin(_) => program.bytes("nvrtcGetCUBIN", self.cubin_size, self.cubin),
        }
    }
}

/// Strings, and pointers to them.
struct Strings {
    pointers: Vec<*const c_char>,
    /// What the pointers point to.
    _owned: Vec<CString>,
}

impl Strings {
    fn new(owned: Vec<CString>, pointers: impl Fn(&[CString]) -> Vec<*const c_char>) -> Self {
        Self {
            pointers: pointers(&owned),
            _owned: owned,
        }
    }

    fn count(&self) -> c_int {
        c_int::try_from(self.pointers.len()).unwrap_or(c_int::MAX)
    }
}

fn c_string(text: &str, what: &str) -> Result<CString, NvrtcError> {
    CString::new(text).map_err(|_| NvrtcError::Zero {
        what: what.to_owned(),
    })
}

fn c_strings<'a>(texts: impl Iterator<Item = &'a str>, what: &str) -> Result<Vec<CString>, NvrtcError> {
    texts.map(|text| c_string(text, what)).collect()
}

/// A program in NVRTC's hands.
struct Program<'a> {
    library: &'a Library,
    handle: nvrtcProgram,
}

impl Program<'_> {
    fn bytes(&self, call: &'static str, size: Size, get: Bytes) -> Result<Vec<u8>, NvrtcError> {
        let mut count = 0usize;
        // SAFETY: the program is alive; writes a number.
        let status = unsafe { size(self.handle, &mut count) };
        self.library.check(call, status)?;
        let mut bytes = vec![0u8; count];
        // SAFETY: writes as many bytes as it has just said.
        let status = unsafe { get(self.handle, bytes.as_mut_ptr().cast()) };
        self.library.check(call, status)?;
        Ok(bytes)
    }

    fn log(&self) -> Result<String, NvrtcError> {
        let bytes = self.bytes("nvrtcGetProgramLog", self.library.log_size, self.library.log)?;
        let text = String::from_utf8_lossy(&bytes);
        Ok(text.trim_end_matches('\0').trim().to_owned())
    }
}

impl Drop for Program<'_> {
    fn drop(&mut self) {
        // SAFETY: made by `create`, and not used after this. A failure leaks memory, nothing more.
        unsafe { (self.library.destroy)(&mut self.handle) };
    }
}

//! Compiles CUDA C++ on this machine, with NVIDIA's run-time compiler (NVRTC), and keeps the results on disk. Knows no
//! kernel and no GPU: sources and architectures are arguments. Loads the library only when [`Compiler::open`] is called.
//!
//! A result is machine code for one architecture (CUBIN) where the compiler knows it, else PTX of the newest architecture
//! below, which the driver translates. It is kept under a digest of everything that it depends on: source, headers, options,
//! the compiler's version, architecture and form. What is on disk is compared with its own digest before it is used, and
//! compiled again if it differs.

mod cache;
mod library;

pub use cache::Cache;

use crate::kernels::Set;
use library::Library;
use std::{fmt, path::Path};
use tracing::warn;

/// Language of the sources.
const STANDARD: &str = "--std=c++17";

/// A generation of GPUs: their compute capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Arch(u32);

impl Arch {
    /// Compute capability `major.minor`.
    pub fn new(major: u32, minor: u32) -> Self {
        Self(10 * major + minor)
    }
}

/// As compilers name it: sm_90.
impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sm_{}", self.0)
    }
}

/// What to compile to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Machine code.
    Cubin(Arch),
    /// The driver's input, for this architecture and newer ones.
    Ptx(Arch),
}

impl Target {
    /// The compiler's option.
    fn option(self) -> String {
        match self {
            Self::Cubin(Arch(number)) => format!("--gpu-architecture=sm_{number}"),
            Self::Ptx(Arch(number)) => format!("--gpu-architecture=compute_{number}"),
        }
    }

    fn extension(self) -> &'static str {
        match self {
            Self::Cubin(_) => "cubin",
            Self::Ptx(_) => "ptx",
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cubin(Arch(number)) => write!(f, "sm_{number}"),
            Self::Ptx(Arch(number)) => write!(f, "compute_{number}"),
        }
    }
}

/// One file of CUDA C++, with what it may include, by name.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// Its name in messages.
    pub name: &'a str,
    /// Its text.
    pub text: &'a str,
    /// Names and texts of headers.
    pub headers: &'a [(&'a str, &'a str)],
}

impl Source<'static> {
    /// The sources of a set of kernels, each with their names.
    pub fn of(set: &'static Set) -> impl Iterator<Item = (Self, &'static [&'static str])> {
        set.files.iter().map(|file| {
            let source = Self {
                name: file.name,
                text: file.text,
                headers: set.headers,
            };
            (source, file.kernels)
        })
    }
}

/// A compiled source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// CUBIN, or PTX with its final zero.
    pub bytes: Vec<u8>,
    /// True if it was on disk.
    pub cached: bool,
}

/// Why nothing was compiled.
#[derive(Debug, thiserror::Error)]
pub enum NvrtcError {
    /// The library is not there, or is another one.
    #[error("NVRTC, which compiles the kernels, cannot be loaded: {reason}")]
    Missing {
        /// What the loader says, for the last name that was tried.
        reason: String,
    },
    /// A call failed that has nothing to do with the source.
    #[error("{call} failed: {reason}")]
    Call {
        /// The function.
        call: &'static str,
        /// What NVRTC says.
        reason: String,
    },
    /// The compiler is too new or too old for a GPU.
    #[error("NVRTC {major}.{minor} compiles for {oldest} and newer, not for {arch}")]
    Unknown {
        /// Of the compiler.
        major: i32,
        /// Of the compiler.
        minor: i32,
        /// The GPU's.
        arch: Arch,
        /// The oldest that the compiler knows.
        oldest: Arch,
    },
    /// The source has errors.
    #[error("{source_name} does not compile for {target}: {}", first_error(log))]
    Compile {
        /// Which one.
        source_name: String,
        /// For what.
        target: Target,
        /// Everything that the compiler said.
        log: String,
    },
    /// A name or text with a zero in it.
    #[error("{what} has a zero byte in it")]
    Zero {
        /// Which one.
        what: String,
    },
}

/// The line that says what is wrong.
fn first_error(log: &str) -> &str {
    let mut lines = log.lines().map(str::trim).filter(|line| !line.is_empty());
    let first = lines.clone().next().unwrap_or("the compiler says nothing");
    lines.find(|line| line.contains("error")).unwrap_or(first)
}

/// What the system's loader says, in one line: libloading's own text names only the call.
pub(crate) fn loader_says(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// NVRTC, with the results that it had before.
pub struct Compiler {
    library: Library,
    version: (i32, i32),
    cache: Option<Cache>,
}

impl Compiler {
    /// Loads NVRTC: the library at `path`, or the one that the system's loader finds.
    ///
    /// # Errors
    /// [`NvrtcError::Missing`].
    pub fn open(path: Option<&Path>, cache: Option<Cache>) -> Result<Self, NvrtcError> {
        let library = Library::open(path)?;
        let version = library.version()?;
        Ok(Self {
            library,
            version,
            cache,
        })
    }

    /// Major and minor.
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// What to compile to for GPUs of this architecture.
    ///
    /// # Errors
    /// [`NvrtcError::Unknown`] if all that the compiler knows is newer.
    pub fn target(&self, arch: Arch) -> Result<Target, NvrtcError> {
        let mut known: Vec<Arch> = self.library.architectures()?.into_iter().map(Arch).collect();
        known.sort_unstable();
        let (major, minor) = self.version;
        match known.iter().rev().find(|one| **one <= arch) {
            Some(one) if *one == arch => Ok(Target::Cubin(arch)),
            Some(one) => Ok(Target::Ptx(*one)),
            None => Err(NvrtcError::Unknown {
                major,
                minor,
                arch,
                oldest: known.first().copied().unwrap_or(arch),
            }),
        }
    }

    /// Compiles a source, or takes it from disk. A result that cannot be kept is compiled again next time.
    ///
    /// # Errors
    /// [`NvrtcError::Compile`] with the compiler's words.
    pub fn compile(&self, source: &Source<'_>, target: Target) -> Result<Image, NvrtcError> {
        let options = [target.option(), STANDARD.to_owned()];
        let key = self.key(source, &options, target);
        if let Some(bytes) = self.cache.as_ref().and_then(|cache| cache.load(&key)) {
            return Ok(Image { bytes, cached: true });
        }
        let bytes = self.library.compile(source, &options, target)?;
        if let Some(Err(error)) = self.cache.as_ref().map(|cache| cache.store(&key, &bytes)) {
            warn!("{key}: a compiled kernel is not kept: {error}");
        }
        Ok(Image { bytes, cached: false })
    }

    /// The name of a result: a digest of all that it depends on.
    fn key(&self, source: &Source<'_>, options: &[String], target: Target) -> String {
        let mut hasher = blake3::Hasher::new();
        // With its length before it, no part can be taken for the beginning of the next.
        let mut part = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        let (major, minor) = self.version;
        part(format!("{major}.{minor} {}", target.extension()).as_bytes());
        options.iter().for_each(|option| part(option.as_bytes()));
        for (name, text) in [(source.name, source.text)].iter().chain(source.headers) {
            part(name.as_bytes());
            part(text.as_bytes());
        }
        format!("{}.{}", hasher.finalize().to_hex(), target.extension())
    }
}

#[cfg(test)]
mod tests;

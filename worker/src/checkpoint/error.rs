//! Why a checkpoint cannot be written or used.

use std::{
    io,
    path::{Path, PathBuf},
};

/// Why a checkpoint cannot be written or used.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// No room left: older checkpoints or other files must go first.
    #[error("{operation} {}: no space left for {bytes} bytes", path.display())]
    NoSpace {
        /// What was done.
        operation: &'static str,
        /// File.
        path: PathBuf,
        /// Size that the file should have had.
        bytes: u64,
    },
    /// The system refused.
    #[error("{operation} {}: {source}", path.display())]
    Io {
        /// What was done.
        operation: &'static str,
        /// File.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A part has another size than was committed: cut off, or another file.
    #[error("{}: {got} bytes, but {expected} were committed", path.display())]
    Size {
        /// File.
        path: PathBuf,
        /// Bytes committed.
        expected: u64,
        /// Bytes found.
        got: u64,
    },
    /// A part has other contents than were committed.
    #[error("{}: contents changed: BLAKE3 is {got}, but {expected} was committed", path.display())]
    Digest {
        /// File.
        path: PathBuf,
        /// Digest committed.
        expected: String,
        /// Digest found.
        got: String,
    },
    /// The manifest is of a version that this program does not read.
    #[error("{}: checkpoint format {got}, this program reads format {expected}", path.display())]
    Version {
        /// Manifest or directory.
        path: PathBuf,
        /// Format that is read.
        expected: u32,
        /// Format found.
        got: u32,
    },
    /// A manifest or a part does not make sense.
    #[error("{}: {detail}", path.display())]
    Layout {
        /// File or directory.
        path: PathBuf,
        /// What and where.
        detail: String,
    },
    /// Tensors that cannot be stored.
    #[error("{file}: tensor {name}: {detail}")]
    Tensor {
        /// Part.
        file: String,
        /// Tensor.
        name: String,
        /// Why not.
        detail: String,
    },
}

impl CheckpointError {
    /// A failed operation; a full disk is told apart.
    pub(super) fn io(operation: &'static str, path: &Path, bytes: u64) -> impl Fn(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace {
                operation,
                path: path.clone(),
                bytes,
            },
            _ => Self::Io {
                operation,
                path: path.clone(),
                source,
            },
        }
    }

    pub(super) fn layout(path: &Path, detail: impl Into<String>) -> Self {
        Self::Layout {
            path: path.to_owned(),
            detail: detail.into(),
        }
    }
}

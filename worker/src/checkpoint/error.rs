//! Why a checkpoint cannot be written or used.

use std::{
    io,
    ops::Range,
    path::{Path, PathBuf},
};

/// "Input/output error" of Linux: the disk could not give back what it took.
const EIO: i32 = 5;

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
    #[error("{}: contents changed{}: BLAKE3 is {got}, but {expected} was committed", path.display(), zeroed(zeros))]
    Digest {
        /// File.
        path: PathBuf,
        /// Bytes up to its end that are zero, if they are suspiciously many: what a disk gives that lost a write.
        zeros: Option<Range<u64>>,
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
    /// An object store refused, did not answer, or does not have an object.
    #[error("{operation} {}: {detail}", path.display())]
    Store {
        /// What was done.
        operation: &'static str,
        /// URL of the object.
        path: PathBuf,
        /// What the store or the network said.
        detail: String,
        /// True if there is no such object.
        gone: bool,
    },
    /// A verified part cannot be kept on this node while it is read.
    #[error("temporary file in {}: {detail}", dir.display())]
    Scratch {
        /// Where temporary files go.
        dir: PathBuf,
        /// What is wrong with it.
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

fn zeroed(zeros: &Option<Range<u64>>) -> String {
    zeros.as_ref().map_or(String::new(), |zeros| {
        format!(", bytes {}..{} are zero", zeros.start, zeros.end)
    })
}

impl CheckpointError {
    /// True if the files are not those that were committed: another try, or another node, would find the same. False for
    /// what may pass, such as a folder that is not mounted here.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Size { .. } | Self::Digest { .. } | Self::Layout { .. } => true,
            Self::Io { path, source, .. } => match source.kind() {
                io::ErrorKind::UnexpectedEof => true,
                // A file or its directory is gone, but the folder of all checkpoints is here.
                io::ErrorKind::NotFound => path.ancestors().nth(2).is_some_and(Path::is_dir),
                _ => source.raw_os_error() == Some(EIO),
            },
            Self::Store { gone, .. } => *gone,
            Self::NoSpace { .. } | Self::Scratch { .. } | Self::Version { .. } | Self::Tensor { .. } => false,
        }
    }

    /// What may help if it is no damage.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Store { .. } => {
                "every node must reach the store, with endpoint and credentials in the environment of its worker"
            }
            Self::Scratch { .. } => {
                "TMPDIR of the worker names a folder with room for the parts that a rank reads"
            }
            _ => "every node must see the output directory of the job",
        }
    }

    /// The file or directory that it is about.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::NoSpace { path, .. }
            | Self::Io { path, .. }
            | Self::Size { path, .. }
            | Self::Digest { path, .. }
            | Self::Version { path, .. }
            | Self::Store { path, .. }
            | Self::Layout { path, .. } => Some(path),
            Self::Scratch { dir, .. } => Some(dir),
            Self::Tensor { .. } => None,
        }
    }

    /// A failed operation; a full disk is told apart.
    pub(crate) fn io(operation: &'static str, path: &Path, bytes: u64) -> impl Fn(io::Error) -> Self + use<> {
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

    /// The same for a part that was fetched whole: a temporary file that gives back other bytes than it took says
    /// nothing about the checkpoint.
    pub(super) fn of_scratch(self) -> Self {
        match self {
            Self::Io { .. } | Self::Size { .. } | Self::Digest { .. } => Self::Scratch {
                dir: std::env::temp_dir(),
                detail: self.to_string(),
            },
            other => other,
        }
    }

    pub(crate) fn layout(path: &Path, detail: impl Into<String>) -> Self {
        Self::Layout {
            path: path.to_owned(),
            detail: detail.into(),
        }
    }
}

//! Why a tensor file cannot be read or written.

use std::{
    io,
    path::{Path, PathBuf},
};

use arcface_proto::failure::{ExitCode, Failure};

/// An error of one file.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Its reason.
        #[source]
        source: io::Error,
    },
    /// The file is not what it should be.
    #[error("{}: {what}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong, where.
        what: String,
        /// What to do; may be empty.
        hint: &'static str,
    },
}

impl FileError {
    /// Wraps an I/O error of `path`.
    pub fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }

    /// A file with wrong content.
    pub fn malformed(path: &Path, what: impl Into<String>) -> Self {
        Self::Malformed {
            path: path.to_owned(),
            what: what.into(),
            hint: "",
        }
    }
}

impl From<FileError> for Failure {
    fn from(error: FileError) -> Self {
        let message = error.to_string();
        match error {
            FileError::Io { path, source } if source.kind() == io::ErrorKind::NotFound => {
                Failure::new(ExitCode::NotFound, format!("{} does not exist", path.display()))
            }
            FileError::Io { .. } => Failure::new(ExitCode::Failed, message),
            FileError::Malformed { hint, .. } => Failure::new(ExitCode::Failed, message).hint(hint),
        }
    }
}

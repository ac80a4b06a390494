//! What can be wrong with a data set. The training rank branches on nothing here: every kind is permanent, a job
//! that meets one stops and names the place. (Skipping a broken record would silently train on other data.)

use std::{
    io,
    path::{Path, PathBuf},
};

use arcface_proto::failure::{ExitCode, Failure};

/// An error of the data path; all of them are permanent.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// What was named is not there.
    #[error("{}: no such file or folder", path.display())]
    NotFound {
        /// As looked for.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// A file is not what it should be, as a whole.
    #[error("{}: {message}", path.display())]
    Format {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// One record is broken.
    #[error("{record}: {message}")]
    Record {
        /// File and key of the record ("/data/train.rec: record 17 at offset 8012").
        record: String,
        /// What is wrong.
        message: String,
    },
    /// The job says one number, the data set another.
    #[error("{field}: the job says {given}, but {} has {found}", path.display())]
    Mismatch {
        /// Field of the job file.
        field: &'static str,
        /// The job's number.
        given: u64,
        /// The data set's number.
        found: u64,
        /// The data set.
        path: PathBuf,
    },
    /// A path leads out of the folders that this worker serves.
    #[error("{}: is not inside a data root of this worker ({roots})", path.display())]
    OutsideRoots {
        /// As the job says.
        path: PathBuf,
        /// The roots, for people.
        roots: String,
    },
    /// The job leaves something out that this kind of data needs.
    #[error("{field}: {message}")]
    Missing {
        /// Field of the job file.
        field: &'static str,
        /// Why it is needed.
        message: String,
    },
    /// A decoding thread ended without a result (a fault of this program).
    #[error("a decoding thread died at step {step}, micro-batch {micro}")]
    LoaderDied {
        /// Global step.
        step: u64,
        /// Micro-batch in the step.
        micro: u32,
    },
}

impl DataError {
    /// The error of an operation on `path`.
    pub fn io(path: &Path, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::NotFound => Self::NotFound { path: path.into() },
            _ => Self::Io {
                path: path.into(),
                source,
            },
        }
    }

    /// A file that is not what it should be.
    pub fn format(path: &Path, message: impl Into<String>) -> Self {
        Self::Format {
            path: path.into(),
            message: message.into(),
        }
    }

    /// A broken record.
    pub fn record(record: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Record {
            record: record.into(),
            message: message.into(),
        }
    }

    fn exit_code(&self) -> ExitCode {
        match self {
            Self::NotFound { .. } => ExitCode::NotFound,
            Self::Mismatch { .. } | Self::OutsideRoots { .. } | Self::Missing { .. } => ExitCode::Usage,
            _ => ExitCode::Failed,
        }
    }

    fn hint(&self) -> String {
        match self {
            Self::NotFound { .. } => "check the path; a job's is looked for on the worker's node, below its --data-root if it has one".into(),
            Self::Mismatch { field, .. } => format!("leave {field} out to take it from the data set"),
            Self::OutsideRoots { .. } => "start the worker with --data-root for this folder".into(),
            Self::Record { .. } => "`arcface-worker data verify` lists every damaged record".into(),
            _ => String::new(),
        }
    }
}

impl From<DataError> for Failure {
    fn from(error: DataError) -> Self {
        Failure::new(error.exit_code(), error.to_string()).hint(error.hint())
    }
}

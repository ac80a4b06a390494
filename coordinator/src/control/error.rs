//! Why the control task did not do what it was asked. `api::status` gives each its gRPC code.

use crate::{job::Refused, store::StoreError};
use arcface_proto::convert::FieldViolation;

/// Why a request was not done.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// What was named does not exist.
    #[error("there is no {kind} {id}")]
    NotFound {
        /// "job" or "node".
        kind: &'static str,
        /// As the caller wrote it.
        id: String,
    },
    /// Fields of the request are wrong.
    #[error("{}", list(violations))]
    Invalid {
        /// All that are.
        violations: Vec<FieldViolation>,
    },
    /// It exists, and is something else.
    #[error("{0}")]
    AlreadyExists(String),
    /// The state does not allow it: a stale generation, a job that has ended.
    #[error("{0}")]
    Refused(String),
    /// What the caller waited for is over.
    #[error("{0}")]
    Aborted(String),
    /// What the caller waited for did not come in time.
    #[error("{0}")]
    Deadline(String),
    /// A limit was reached.
    #[error("{0}")]
    Exhausted(String),
    /// The store or the coordinator cannot do it now; another try may.
    #[error("{0}")]
    Unavailable(String),
}

fn list(violations: &[FieldViolation]) -> String {
    violations
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join("; ")
}

impl ControlError {
    /// There is no such thing.
    pub fn not_found(kind: &'static str, id: &str) -> Self {
        Self::NotFound {
            kind,
            id: id.chars().take(128).collect(),
        }
    }

    /// One field is wrong.
    pub fn invalid(path: impl Into<String>, problem: impl Into<String>) -> Self {
        let violation = FieldViolation {
            path: path.into(),
            problem: problem.into(),
            hint: String::new(),
        };
        Self::Invalid {
            violations: vec![violation],
        }
    }
}

impl From<Refused> for ControlError {
    fn from(refused: Refused) -> Self {
        match &refused {
            Refused::NoSuchRank { .. } => Self::invalid("rank.rank", refused.to_string()),
            Refused::Stale { .. } | Refused::Ended { .. } => Self::Refused(refused.to_string()),
        }
    }
}

impl From<StoreError> for ControlError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::TooLarge { .. } => Self::Exhausted(error.to_string()),
            _ => Self::Unavailable(error.to_string()),
        }
    }
}

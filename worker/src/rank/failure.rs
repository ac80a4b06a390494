//! Why a rank cannot go on: the line for people, whether another try could help, and which peer was seen to fail.

use crate::checkpoint::CheckpointError;
use crate::collective::CollectiveError;
use crate::data::DataError;
use crate::device::CudaGraphError;
use crate::eval::{EvalError, ijb::IjbError};
use crate::head::HeadError;
use crate::model::ModelError;
use crate::optim::OptimError;
use arcface_proto::failure::{ExitCode, Failure};
use arcface_proto::v1::{CheckpointManifest, DamagedCheckpoint, RankError};

/// The end of a rank before its time.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct RankFailure {
    /// One line.
    pub message: String,
    /// What to do; may be empty.
    pub hint: String,
    /// Another try meets the same: bad data, a refused setting, a diverged loss.
    pub permanent: bool,
    /// Peer that failed.
    pub peer: Option<u32>,
    /// Another try shall leave out this step, counted from 0.
    pub rollback_step: Option<u64>,
    /// Another try shall resume from an older checkpoint than this one.
    pub damaged: Option<Box<DamagedCheckpoint>>,
}

impl RankFailure {
    /// One that another try cannot help.
    pub fn permanent(message: impl Into<String>) -> Self {
        Self {
            permanent: true,
            ..Self::transient(message)
        }
    }

    /// One that may pass: a peer, a disk, a network.
    pub fn transient(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            hint: String::new(),
            permanent: false,
            peer: None,
            rollback_step: None,
            damaged: None,
        }
    }

    /// One that another try passes if it leaves out `step`.
    pub fn rollback(step: u64, message: impl Into<String>) -> Self {
        Self {
            rollback_step: Some(step),
            ..Self::transient(message)
        }
    }

    /// The checkpoint to resume from cannot be used: it is damaged, or out of reach for now.
    pub fn checkpoint(manifest: &CheckpointManifest, error: &CheckpointError) -> Self {
        let files = || manifest.parts.iter().map(|part| part.file.as_str());
        let file = error.path().and_then(|path| path.file_name()?.to_str());
        let damaged = error.is_damage().then(|| DamagedCheckpoint {
            step: manifest.step,
            file: file
                .filter(|file| files().any(|part| part == *file))
                .unwrap_or_default()
                .to_owned(),
            detail: error.to_string(),
            in_memory: false,
        });
        let failure = Self {
            permanent: matches!(error, CheckpointError::Version { .. }),
            damaged: damaged.map(Box::new),
            ..Self::transient(format!("resume from step {}: {error}", manifest.step))
        };
        match &failure.damaged {
            Some(_) => failure,
            None => failure.hint(error.hint()),
        }
    }

    /// The copies in memory to resume from cannot be used, or not be had: another try does without.
    pub fn copies(manifest: &CheckpointManifest, file: &str, error: &dyn std::fmt::Display) -> Self {
        let damaged = DamagedCheckpoint {
            step: manifest.step,
            file: file.to_owned(),
            detail: error.to_string(),
            in_memory: true,
        };
        Self {
            damaged: Some(Box::new(damaged)),
            ..Self::transient(format!(
                "resume from copies of step {} in memory: {error}",
                manifest.step
            ))
        }
    }

    /// The same with a hint.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    /// The same for good, of this value of a setting.
    pub fn of(self, setting: &str, value: &str) -> Self {
        Self {
            message: format!("{setting}: {value:?}: {}", self.message),
            permanent: true,
            ..self
        }
    }

    /// What the coordinator is told.
    pub fn to_wire(&self) -> RankError {
        RankError {
            message: match self.hint.as_str() {
                "" => self.message.clone(),
                hint => format!("{}; hint: {hint}", self.message),
            },
            permanent: self.permanent,
            peer: self.peer,
            rollback_step: self.rollback_step,
            damaged: self.damaged.as_deref().cloned(),
        }
    }
}

impl From<RankFailure> for Failure {
    fn from(failure: RankFailure) -> Self {
        Failure::new(ExitCode::Failed, failure.message).hint(failure.hint)
    }
}

impl From<CollectiveError> for RankFailure {
    fn from(error: CollectiveError) -> Self {
        let peer = match &error {
            CollectiveError::PeerLost { peer, .. } | CollectiveError::Timeout { peer, .. } => Some(*peer),
            _ => None,
        };
        let permanent = matches!(
            error,
            CollectiveError::Mismatch { .. } | CollectiveError::Unsupported { .. }
        );
        Self {
            permanent,
            peer,
            ..Self::transient(error.to_string())
        }
    }
}

impl From<HeadError> for RankFailure {
    fn from(error: HeadError) -> Self {
        match error {
            HeadError::Collective(error) => error.into(),
            other => Self::permanent(other.to_string()),
        }
    }
}

impl From<CudaGraphError> for RankFailure {
    fn from(error: CudaGraphError) -> Self {
        let failure = Self {
            // The next try would record it again.
            permanent: matches!(error, CudaGraphError::BrokenOff(_)),
            ..Self::transient(error.to_string())
        };
        failure.hint("train.cuda_graph = false runs the network launch by launch")
    }
}

impl From<DataError> for RankFailure {
    fn from(error: DataError) -> Self {
        let failure = Failure::from(error);
        Self::permanent(failure.message).hint(failure.hint)
    }
}

impl From<ModelError> for RankFailure {
    fn from(error: ModelError) -> Self {
        Self::permanent(error.to_string())
    }
}

impl From<OptimError> for RankFailure {
    fn from(error: OptimError) -> Self {
        Self::permanent(format!("checkpoint: {error}"))
    }
}

impl From<EvalError> for RankFailure {
    fn from(error: EvalError) -> Self {
        Self::permanent(error.to_string())
    }
}

impl From<IjbError> for RankFailure {
    fn from(error: IjbError) -> Self {
        Self::permanent(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_peer_is_named_and_may_pass_and_bad_data_may_not() {
        let lost = RankFailure::from(HeadError::Collective(CollectiveError::PeerLost {
            operation: "all_gather",
            peer: 3,
            world_size: 4,
            cause: "reset".into(),
        }));
        assert_eq!((lost.peer, lost.permanent), (Some(3), false));
        let bad = RankFailure::from(DataError::record("a.rec: record 7", "not a JPEG"));
        assert!(bad.permanent && bad.message.contains("record 7"), "{bad:?}");
        assert!(bad.to_wire().message.contains("hint: "));
    }
}

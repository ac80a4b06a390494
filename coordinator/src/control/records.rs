//! Jobs as the store and the wire have them. The stored record is the wire's job and the few fields that no client
//! needs.

use crate::{
    job::{FailureKind, Job, Phase, Process, Progress, RankState, Recovery},
    straggler::Straggler,
};
use arcface_proto::{
    convert,
    timestamp::{from_unix_ms, to_unix_ms},
    types::{Generation, NodeId},
    v1::{self, JobState},
};
use prost::Message;

/// A job in the store.
#[derive(Clone, PartialEq, Message)]
pub struct StoredJob {
    /// What clients see.
    #[prost(message, optional, tag = "1")]
    pub job: Option<v1::Job>,
    /// Node of every rank of the newest generation.
    #[prost(string, repeated, tag = "2")]
    pub placement: Vec<String>,
    /// Failures since the last committed checkpoint.
    #[prost(uint32, tag = "3")]
    pub failures: u32,
    /// Steps that the job was rolled back from.
    #[prost(uint64, repeated, tag = "4")]
    pub left_out_steps: Vec<u64>,
}

/// What a request id made.
#[derive(Clone, PartialEq, Message)]
pub struct StoredRequest {
    /// The job.
    #[prost(string, tag = "1")]
    pub job_id: String,
}

/// Keys of the store.
pub mod keys {
    use arcface_proto::types::{JobId, NodeId};

    /// All jobs.
    pub const JOBS: &str = "job/";
    /// All drained nodes.
    pub const DRAINS: &str = "drain/";

    /// One job.
    pub fn job(id: &JobId) -> String {
        format!("{JOBS}{id}")
    }
    /// One request id.
    pub fn request(id: &str) -> String {
        format!("request/{id}")
    }
    /// A job's checkpoints, by step.
    pub fn checkpoints(id: &JobId) -> String {
        format!("checkpoint/{id}/")
    }
    /// One checkpoint.
    pub fn checkpoint(id: &JobId, step: u64) -> String {
        format!("checkpoint/{id}/{step:020}")
    }
    /// A job's checkpoints that were found damaged, by step and generation.
    pub fn damaged_checkpoints(id: &JobId) -> String {
        format!("damaged/{id}/")
    }
    /// One damaged checkpoint. A later generation may commit the same step again, so the step alone does not name it.
    pub fn damaged_checkpoint(id: &JobId, step: u64, generation: u64) -> String {
        format!("damaged/{id}/{step:020}/{generation:020}")
    }
    /// A job's evaluations, by step and data set.
    pub fn evaluations(id: &JobId) -> String {
        format!("evaluation/{id}/")
    }
    /// One evaluation.
    pub fn evaluation(id: &JobId, step: u64, dataset: &str) -> String {
        format!("evaluation/{id}/{step:020}/{dataset}")
    }
    /// One drained node.
    pub fn drain(id: &NodeId) -> String {
        format!("{DRAINS}{id}")
    }
}

/// The wire's name of a phase.
pub fn phase_to_wire(phase: Phase) -> JobState {
    match phase {
        Phase::Queued => JobState::Queued,
        Phase::Starting => JobState::Starting,
        Phase::Running => JobState::Running,
        Phase::Recovering => JobState::Recovering,
        Phase::Cancelling => JobState::Cancelling,
        Phase::Succeeded => JobState::Succeeded,
        Phase::Failed => JobState::Failed,
        Phase::Cancelled => JobState::Cancelled,
    }
}

fn phase_from_wire(state: i32) -> Option<Phase> {
    let state = JobState::try_from(state).ok()?;
    Phase::ALL
        .into_iter()
        .find(|phase| phase_to_wire(*phase) == state)
}

/// A recovery for the wire.
pub fn recovery_to_wire(recovery: &Recovery) -> v1::Recovery {
    v1::Recovery {
        reason: recovery.reason.clone(),
        kind: recovery.kind.as_str().into(),
        from_generation: recovery.from.0,
        detected_s: recovery.detected_s,
        resumed_step: recovery.resumed_step,
        lost_steps: recovery.lost_steps,
        total_s: recovery.total_s,
        detected_at: Some(from_unix_ms(recovery.detected_unix_ms)),
        from_memory: recovery.from_memory,
    }
}

fn recovery_from_wire(wire: v1::Recovery) -> Recovery {
    Recovery {
        reason: wire.reason,
        kind: FailureKind::parse(&wire.kind),
        from: Generation(wire.from_generation),
        detected_unix_ms: wire.detected_at.as_ref().map_or(0, to_unix_ms),
        detected_s: wire.detected_s,
        resumed_step: wire.resumed_step,
        lost_steps: wire.lost_steps,
        total_s: wire.total_s,
        detected_mono_ms: None,
        from_memory: wire.from_memory,
    }
}

/// A job for the wire.
pub fn job_to_wire(job: &Job, revision: u64) -> v1::Job {
    v1::Job {
        id: job.id.to_string(),
        spec: Some(convert::job_spec_to_wire(&job.spec)),
        state: phase_to_wire(job.phase).into(),
        reason: job.reason.clone(),
        generation: job.generation.0,
        world_size: job.ranks.len() as u32,
        step: job.progress.step,
        total_steps: job.progress.total_steps,
        epoch: job.progress.epoch,
        loss: job.progress.loss,
        learning_rate: job.progress.learning_rate,
        samples_per_second: job.progress.samples_per_second,
        recoveries: job.recoveries.iter().map(recovery_to_wire).collect(),
        submitted_at: Some(from_unix_ms(job.submitted_unix_ms)),
        started_at: job.started_unix_ms.map(from_unix_ms),
        ended_at: job.ended_unix_ms.map(from_unix_ms),
        revision,
        checkpoint_step: job.checkpoint_step,
        stragglers: Vec::new(),
    }
}

/// A straggler for the wire; `over` if it no longer is one.
pub fn straggler_to_wire(job: &Job, straggler: Straggler, over: bool) -> v1::Straggler {
    let node = job
        .ranks
        .get(straggler.rank as usize)
        .map(|rank| rank.node.to_string());
    v1::Straggler {
        rank: straggler.rank,
        node: node.unwrap_or_default(),
        cause: straggler.cause.to_string(),
        ratio: straggler.ratio,
        over,
    }
}

/// A job's record.
pub fn encode(job: &Job, revision: u64) -> Vec<u8> {
    StoredJob {
        job: Some(job_to_wire(job, revision)),
        placement: job.ranks.iter().map(|rank| rank.node.to_string()).collect(),
        failures: job.failures,
        left_out_steps: job.left_out_steps.clone(),
    }
    .encode_to_vec()
}

/// The job of a record with its revision, as a coordinator that has just started knows it: what its rank processes do
/// is not known until their agents say so.
///
/// # Errors
/// What is wrong with the record.
pub fn decode(bytes: &[u8]) -> Result<(Job, u64), String> {
    let stored = StoredJob::decode(bytes).map_err(|error| error.to_string())?;
    let wire = stored.job.ok_or("it holds no job")?;
    let phase = phase_from_wire(wire.state).ok_or_else(|| format!("state {} is not known", wire.state))?;
    let spec = convert::job_spec(&wire.spec.unwrap_or_default()).map_err(|violations| {
        violations
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join("; ")
    })?;
    let process = match phase.is_terminal() {
        true => Process::Reaped,
        false => Process::Unreachable,
    };
    let ranks = stored
        .placement
        .iter()
        .map(|node| {
            Ok(RankState {
                node: node.parse::<NodeId>().map_err(|error| error.to_string())?,
                process,
                started: phase == Phase::Running,
                done: false,
                missing: 0,
            })
        })
        .collect::<Result<Vec<_>, String>>()?;
    if ranks.is_empty() && phase.wants_ranks() {
        return Err(format!("it is {phase} without ranks"));
    }
    let job = Job {
        phase,
        reason: wire.reason,
        generation: Generation(wire.generation),
        ranks,
        failures: stored.failures,
        left_out_steps: stored.left_out_steps,
        recoveries: wire.recoveries.into_iter().map(recovery_from_wire).collect(),
        progress: Progress {
            step: wire.step,
            total_steps: wire.total_steps,
            epoch: wire.epoch,
            loss: wire.loss,
            learning_rate: wire.learning_rate,
            samples_per_second: wire.samples_per_second,
        },
        checkpoint_step: wire.checkpoint_step,
        started_unix_ms: wire.started_at.as_ref().map(to_unix_ms),
        ended_unix_ms: wire.ended_at.as_ref().map(to_unix_ms),
        ..Job::new(
            wire.id
                .parse()
                .map_err(|error: arcface_proto::types::InvalidId| error.to_string())?,
            spec,
            wire.submitted_at.as_ref().map_or(0, to_unix_ms),
        )
    };
    Ok((job, wire.revision))
}

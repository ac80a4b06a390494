//! One training process: rendezvous, the step loop, reports.

use arcface_proto::v1::RankAssignment;

/// Trains as assigned.
///
/// # Errors
/// Whatever ended the training before its end.
pub fn run(assignment: RankAssignment) -> anyhow::Result<()> {
    anyhow::bail!(
        "rank {} of job {} cannot train yet",
        assignment.rank,
        assignment.job_id
    )
}

//! Turns what happened into metrics. Labels are ids of jobs and nodes, names of jobs and data sets, and words of closed
//! sets; series of jobs that ended and of nodes that are forgotten are hidden by the exporter.

use super::{Control, figures::RANK_STAGES};
use crate::{
    goodput::{Goodput, Use},
    job::{FailureKind, Job, Now, Phase},
    membership::Liveness,
    straggler::{Paces, Straggler},
    telemetry as t,
};
use arcface_proto::{
    types::{Generation, JobId},
    v1::{CheckpointManifest, Evaluation, StepMetrics},
};
use metrics::{counter, gauge, histogram};
use std::collections::{BTreeMap, HashSet};

/// Phases of a step that are reported; others are left out, because a label is never free text.
const PHASES: [&str; 8] = [
    "data_wait",
    "forward",
    "head",
    "backward",
    "comm",
    "optimizer",
    "checkpoint",
    "eval",
];

/// The series of a job that has ended are shown for so long: several scrapes see how it ended.
const RETIRE_MS: u64 = 15 * 60 * 1000;

/// Stages of checkpoints that fail on this side; see also [`RANK_STAGES`].
pub(super) const COMMIT: &str = "commit";
/// Likewise.
pub(super) const RESTORE: &str = "restore";

/// Seconds by phase over a job's life with this coordinator.
pub(super) type PhaseSeconds = BTreeMap<&'static str, f64>;

/// A job that was submitted or loaded from the store.
pub(super) fn job_loaded(job: &Job) {
    if !job.phase.is_terminal() {
        gauge!(t::JOB_INFO, "job_id" => job.id.to_string(), "name" => job.spec.name.clone(),
            "backbone" => job.spec.model.network.clone(), "head" => job.spec.head.implementation.as_str())
        .set(1.0);
        state_of(job);
        if job.generation.0 > 0 {
            start_counters(job);
        }
    }
}

/// Counters of rare events start at 0 with a job's first generation: Prometheus sees no increase in a series that begins with
/// its first event. Jobs that wait, of which there may be thousands, have none yet.
fn start_counters(job: &Job) {
    let id = job.id.to_string();
    for name in [
        t::WORKER_RESTARTS_TOTAL,
        t::TRAIN_NONFINITE_STEPS_TOTAL,
        t::TRAIN_ROLLBACKS_TOTAL,
        t::CHECKPOINT_DAMAGED_TOTAL,
    ] {
        counter!(name, "job_id" => id.clone()).increment(0);
    }
    for stage in RANK_STAGES.into_iter().chain([COMMIT, RESTORE]) {
        checkpoint_failed(&job.id, stage, 0);
    }
    for kind in FailureKind::ALL {
        counter!(t::WORKER_FAILURES_TOTAL, "job_id" => id.clone(), "reason" => kind.as_str()).increment(0);
    }
}

fn state_of(job: &Job) {
    let id = job.id.to_string();
    for phase in Phase::ALL {
        let value = if phase == job.phase { 1.0 } else { 0.0 };
        gauge!(t::JOB_STATE, "job_id" => id.clone(), "state" => phase.to_string()).set(value);
    }
    gauge!(t::JOB_WORLD_SIZE, "job_id" => id.clone()).set(job.ranks.len() as f64);
    gauge!(t::JOB_WORLD_SIZE_TARGET, "job_id" => id.clone()).set(f64::from(job.spec.world_size));
    gauge!(t::RENDEZVOUS_GENERATION, "job_id" => id).set(job.generation.0 as f64);
}

/// A transition of a job.
pub(super) fn job_changed(before: &Job, after: &Job) {
    let id = after.id.to_string();
    if before.phase != after.phase || before.generation != after.generation {
        state_of(after);
    }
    if after.generation > before.generation {
        match before.generation.0 {
            0 => start_counters(after),
            _ => counter!(t::WORKER_RESTARTS_TOTAL, "job_id" => id.clone()).increment(1),
        }
    }
    for recovery in after.recoveries.iter().skip(before.recoveries.len()) {
        if recovery.kind == FailureKind::Nonfinite {
            counter!(t::TRAIN_ROLLBACKS_TOTAL, "job_id" => id.clone()).increment(1);
        }
        counter!(t::WORKER_FAILURES_TOTAL, "job_id" => id.clone(), "reason" => recovery.kind.as_str())
            .increment(1);
        histogram!(t::RECOVERY_DURATION_SECONDS, "job_id" => id.clone(), "stage" => "detect")
            .record(recovery.detected_s);
    }
    for (old, new) in before.recoveries.iter().zip(&after.recoveries) {
        if let (None, Some(total_s)) = (old.total_s, new.total_s) {
            histogram!(t::RECOVERY_DURATION_SECONDS, "job_id" => id.clone(), "stage" => "total")
                .record(total_s);
        }
    }
}

/// All ranks of a generation have met.
pub(super) fn met(job: &Job, now: Now) {
    let seconds = now.mono_ms.saturating_sub(job.launched_ms) as f64 / 1000.0;
    histogram!(t::RENDEZVOUS_DURATION_SECONDS, "job_id" => job.id.to_string()).record(seconds);
    recovers(job, "rendezvous", seconds);
}

/// All ranks of a generation are ready to train, so long after they had met.
pub(super) fn loaded(job: &Job, since_met_ms: u64) {
    recovers(job, "load", since_met_ms as f64 / 1000.0);
}

/// A stage of a recovery took so long. What a first generation does is none.
fn recovers(job: &Job, stage: &'static str, seconds: f64) {
    let under_way = job
        .recoveries
        .last()
        .is_some_and(|recovery| recovery.total_s.is_none());
    if under_way {
        histogram!(t::RECOVERY_DURATION_SECONDS, "job_id" => job.id.to_string(), "stage" => stage)
            .record(seconds);
    }
}

/// What a job's time went into. Jobs that wait for their first ranks, of which there may be thousands, show nothing.
pub(super) fn job_time(job: &Job, goodput: &Goodput) {
    if job.generation.0 == 0 {
        return;
    }
    for what in Use::ALL {
        // Counters are whole numbers.
        counter!(t::JOB_TIME_SECONDS_TOTAL, "job_id" => job.id.to_string(), "kind" => what.as_str())
            .absolute(goodput.spent_ms(what) / 1000);
    }
}

/// A rank took so long to take over what it resumes from.
pub(super) fn restored(id: &JobId, seconds: f64) {
    if seconds.is_finite() && seconds >= 0.0 {
        histogram!(t::CHECKPOINT_RESTORE_SECONDS, "job_id" => id.to_string()).record(seconds);
    }
}

/// Parts of a checkpoint that was committed were written in so long a time.
pub(super) fn persisted(id: &JobId, seconds: f64) {
    if seconds.is_finite() {
        histogram!(t::CHECKPOINT_PERSIST_SECONDS, "job_id" => id.to_string()).record(seconds);
    }
}

/// So many failures of a stage.
pub(super) fn checkpoint_failed(id: &JobId, stage: &'static str, count: u64) {
    counter!(t::CHECKPOINT_FAILURES_TOTAL, "job_id" => id.to_string(), "stage" => stage).increment(count);
}

/// Steps skipped since the report before, where `known` is what that one said: ranks count from the start of their
/// generation, so that a lost report loses nothing.
pub(super) fn newly_skipped(
    known: &mut (Generation, u64),
    generation: Generation,
    reported: Option<u64>,
) -> u64 {
    let before = match known.0 == generation {
        true => known.1,
        false => 0,
    };
    let now = reported.unwrap_or(0).max(before);
    *known = (generation, now);
    now - before
}

/// A log interval of `steps` new steps, with `skipped` more that were skipped.
pub(super) fn trained(
    job: &Job,
    steps: u64,
    skipped: u64,
    metrics: &StepMetrics,
    phase_seconds: &mut PhaseSeconds,
) {
    let id = job.id.to_string();
    counter!(t::TRAIN_NONFINITE_STEPS_TOTAL, "job_id" => id.clone()).increment(skipped);
    if let Some(scale) = metrics.loss_scale {
        gauge!(t::TRAIN_LOSS_SCALE, "job_id" => id.clone()).set(scale);
    }
    counter!(t::TRAIN_STEPS_TOTAL, "job_id" => id.clone()).increment(steps);
    counter!(t::TRAIN_SAMPLES_TOTAL, "job_id" => id.clone())
        .increment(steps.saturating_mul(job.spec.global_batch()));
    for (name, value) in [
        (t::TRAIN_LOSS, metrics.loss),
        (t::TRAIN_LEARNING_RATE, metrics.learning_rate),
        (t::TRAIN_GRAD_NORM, metrics.grad_norm),
        (t::TRAIN_SAMPLES_PER_SECOND, metrics.samples_per_second),
        (t::TRAIN_ETA_SECONDS, metrics.eta_seconds),
    ] {
        gauge!(name, "job_id" => id.clone()).set(value);
    }
    for (name, value) in [
        (t::EMBEDDING_NORM, metrics.embedding_norm),
        (t::CHECKPOINT_STALL_SECONDS, metrics.checkpoint_stall_seconds),
        (
            t::CHECKPOINT_SUGGESTED_INTERVAL_SECONDS,
            metrics.checkpoint_suggested_seconds,
        ),
    ] {
        if let Some(value) = value.filter(|value| value.is_finite()) {
            gauge!(name, "job_id" => id.clone()).set(value);
        }
    }
    let total = job.progress.total_steps.max(1);
    gauge!(t::TRAIN_PROGRESS_RATIO, "job_id" => id.clone()).set(job.progress.step as f64 / total as f64);
    if metrics.step_seconds.is_finite() && metrics.step_seconds >= 0.0 {
        histogram!(t::TRAIN_STEP_DURATION_SECONDS, "job_id" => id.clone(), "rank" => "0")
            .record(metrics.step_seconds);
    }
    for phase in PHASES {
        if let Some(seconds) = metrics
            .phase_seconds
            .get(phase)
            .filter(|s| s.is_finite() && **s >= 0.0)
        {
            // Counters are whole numbers; what is under a second waits in the sum.
            let sum = phase_seconds.entry(phase).or_insert(0.0);
            *sum += seconds;
            counter!(t::TRAIN_PHASE_SECONDS_TOTAL, "job_id" => id.clone(), "rank" => "0", "phase" => phase)
                .absolute(*sum as u64);
        }
    }
}

/// A rank that holds up the others, or no longer does.
pub(super) fn straggler(id: &JobId, straggler: Straggler, over: bool) {
    let ratio = if over { 0.0 } else { straggler.ratio };
    gauge!(t::STRAGGLER_RATIO, "job_id" => id.to_string(), "rank" => straggler.rank.to_string()).set(ratio);
}

/// The generation of these ranks is over.
pub(super) fn stragglers_over(id: &JobId, paces: &Paces) {
    paces.stragglers().for_each(|found| straggler(id, found, true));
}

/// An evaluation result.
pub(super) fn evaluated(id: &JobId, evaluation: &Evaluation) {
    let labels = [
        ("job_id", id.to_string()),
        ("dataset", evaluation.dataset.clone()),
    ];
    if evaluation.ijb.is_none() {
        gauge!(t::EVAL_ACCURACY_RATIO, &labels).set(evaluation.accuracy);
    }
    gauge!(t::EVAL_DURATION_SECONDS, &labels).set(evaluation.seconds);
    for far in ["1e-3", "1e-4", "1e-5", "1e-6"] {
        if let Some(rate) = evaluation.tar_at_far.get(far) {
            gauge!(t::EVAL_TAR_RATIO, "job_id" => id.to_string(), "dataset" => evaluation.dataset.clone(), "far" => far)
                .set(*rate);
        }
    }
}

/// A committed checkpoint.
pub(super) fn checkpointed(id: &JobId, manifest: &CheckpointManifest, now: Now) {
    let bytes: u64 = manifest
        .parts
        .iter()
        .fold(0, |sum, part| sum.saturating_add(part.bytes));
    let id = id.to_string();
    gauge!(t::CHECKPOINT_BYTES, "job_id" => id.clone()).set(bytes as f64);
    gauge!(t::CHECKPOINT_LAST_COMMITTED_STEP, "job_id" => id.clone()).set(manifest.step as f64);
    gauge!(t::CHECKPOINT_LAST_COMMITTED_TIMESTAMP_SECONDS, "job_id" => id).set(now.unix_ms as f64 / 1000.0);
}

/// A set of copies in memory is whole.
pub(super) fn copied(id: &JobId, step: u64) {
    gauge!(t::CHECKPOINT_LAST_COPIED_STEP, "job_id" => id.to_string()).set(step as f64);
}

/// A committed checkpoint that does not verify.
pub(super) fn damaged(id: &JobId) {
    counter!(t::CHECKPOINT_DAMAGED_TOTAL, "job_id" => id.to_string()).increment(1);
}

impl Control {
    /// What is true of the cluster as a whole at this moment.
    pub(super) fn measure(&mut self, now: Now) {
        while let Some((ended_ms, _)) = self.retiring.front()
            && now.mono_ms >= ended_ms + RETIRE_MS
        {
            if let Some((_, id)) = self.retiring.pop_front() {
                crate::exporter::retire(id.as_str());
            }
        }
        // Time passes for jobs that start or recover too, although nothing happens to them.
        let unsettled: Vec<JobId> = self
            .ledger
            .waiting()
            .map_while(|id| self.jobs.get(id).filter(|entry| entry.job.phase != Phase::Queued))
            .map(|entry| entry.job.id.clone())
            .chain(self.ledger.placed().into_iter().cloned())
            .collect();
        for id in unsettled {
            if let Some(entry) = self.jobs.get_mut(&id) {
                entry.goodput.passed(entry.job.phase, now.mono_ms);
                job_time(&entry.job, &entry.goodput);
            }
        }
        let count = |wanted: fn(Liveness) -> bool| {
            self.members
                .members()
                .values()
                .filter(|member| wanted(member.liveness))
                .count() as f64
        };
        gauge!(t::COORDINATOR_NODES, "state" => "healthy").set(count(|l| l == Liveness::Healthy));
        gauge!(t::COORDINATOR_NODES, "state" => "suspect")
            .set(count(|l| matches!(l, Liveness::Suspect | Liveness::Awaited)));
        gauge!(t::COORDINATOR_NODES, "state" => "lost").set(count(|l| l == Liveness::Lost));
        let totals = self.cluster();
        gauge!(t::COORDINATOR_SLOTS, "use" => "used").set(f64::from(totals.slots_used));
        gauge!(t::COORDINATOR_SLOTS, "use" => "free")
            .set(f64::from(totals.slots_total.saturating_sub(totals.slots_used)));
        let mut shown = HashSet::new();
        for (id, member) in self.members.members() {
            // A node that was drained is expected to go.
            if member.liveness != Liveness::Lost || !member.draining {
                let age_s = now.mono_ms.saturating_sub(member.heard_ms) as f64 / 1000.0;
                gauge!(t::HEARTBEAT_AGE_SECONDS, "node" => id.to_string()).set(age_s);
                shown.insert(id.to_string());
            }
        }
        crate::exporter::show_nodes(shown);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skipped_steps_are_counted_once() {
        let mut known = (Generation(0), 0);
        let reports = [
            (1, None, 0),
            (1, Some(2), 2),
            (1, Some(2), 0),
            (1, Some(5), 3),
            (2, None, 0),
            (2, Some(1), 1),
        ];
        for (generation, reported, newly) in reports {
            let found = newly_skipped(&mut known, Generation(generation), reported);
            assert_eq!(found, newly, "{generation} {reported:?}");
        }
    }
}

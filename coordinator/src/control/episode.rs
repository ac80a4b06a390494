//! The spans of a job's ways into training: one trace from its submit to its first step, and one from each failure, or move to
//! other nodes, to the next new step. Failures on such a way are part of it. Agents and ranks add theirs by the context that
//! assignments carry. Nothing of it is stored: what a coordinator has begun ends with it.

use crate::job::{Job, Now, Phase};
use arcface_traces::Span;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The way under way; empty while the job trains, and where no traces are sent. Times are ms since the Unix epoch.
#[derive(Debug, Default)]
pub(super) struct Episode {
    /// The part under way.
    stage: Span,
    stage_begin: u64,
    whole: Span,
    begin: u64,
    /// The recovery that it began with, if it did not begin with the submit.
    recovery: Option<usize>,
}

impl Episode {
    /// A job was submitted, and the store has it.
    pub(super) fn submitted(job: &Job, now: Now) -> Self {
        let mut episode = Self::default();
        let whole = Span::root("submit", time(job.submitted_unix_ms));
        episode.open(whole, job, job.submitted_unix_ms);
        episode.enter("store", job.submitted_unix_ms);
        episode.enter("plan", now.unix_ms);
        episode
    }

    /// A job changed.
    pub(super) fn moved(&mut self, before: &Job, after: &Job, now: Now) {
        if after.recoveries.len() > before.recoveries.len() {
            self.failed(after, now);
        }
        if after.generation > before.generation {
            self.enter("rendezvous", now.unix_ms);
        }
        if before.phase == Phase::Starting && after.phase == Phase::Running {
            self.enter("first step", now.unix_ms);
        }
        if after.phase.is_terminal() {
            // Without a new step on its way.
            if after.phase != Phase::Succeeded {
                self.fail_stage(&after.reason);
                self.whole = std::mem::take(&mut self.whole).failed(&after.reason);
            }
            self.end(after, now.unix_ms);
        }
    }

    /// A generation ended. What it is about began with the last sign of life.
    fn failed(&mut self, job: &Job, now: Now) {
        let Some(recovery) = job.recoveries.last() else {
            return;
        };
        // Casts saturate, and make 0 of what is no number.
        let silent_ms = (recovery.detected_s * 1000.0) as u64;
        let sign_of_life = now.unix_ms.saturating_sub(silent_ms);
        if self.whole.is_none() {
            let whole = Span::root("recovery", time(sign_of_life));
            self.open(whole, job, sign_of_life);
            self.recovery = Some(job.recoveries.len() - 1);
        } else {
            // The last sign of life may be older than the part that failed.
            self.fail_stage(&recovery.reason);
            std::mem::take(&mut self.stage).end(time(now.unix_ms.max(self.stage_begin)));
            self.stage_begin = self.begin;
        }
        self.enter("detect", sign_of_life);
        self.enter("plan", now.unix_ms);
    }

    /// All ranks have met.
    pub(super) fn met(&mut self, now: Now) {
        self.enter("load", now.unix_ms);
    }

    /// New steps were reported: the first of them ended so many seconds before the last.
    pub(super) fn trained(&mut self, job: &Job, later_s: f64, now: Now) {
        let later_ms = (later_s * 1000.0) as u64;
        self.end(job, now.unix_ms.saturating_sub(later_ms));
    }

    /// For the spans of agents and ranks; empty if there is nothing under way.
    pub(super) fn context(&self) -> String {
        self.whole.context()
    }

    fn open(&mut self, whole: Span, job: &Job, begin: u64) {
        self.whole = whole
            .text("job_id", job.id.as_str())
            .text("job_name", &job.spec.name);
        self.begin = begin;
        self.stage_begin = begin;
    }

    /// The next part begins, and with that the one before ends.
    fn enter(&mut self, name: &'static str, at: u64) {
        // Clocks are set back now and then.
        let at = at.max(self.stage_begin);
        let next = self.whole.child(name, time(at));
        std::mem::replace(&mut self.stage, next).end(time(at));
        self.stage_begin = at;
    }

    fn fail_stage(&mut self, why: &str) {
        self.stage = std::mem::take(&mut self.stage).failed(why);
    }

    fn end(&mut self, job: &Job, at: u64) {
        let Self {
            stage,
            stage_begin,
            whole,
            recovery,
            ..
        } = std::mem::take(self);
        let at = time(at.max(stage_begin));
        stage.end(at);
        let whole = whole
            .number("generation", job.generation.0)
            .number("world_size", job.ranks.len() as u64);
        // Only now is the reason certain: a rank that died says more than the peer that missed it, and later.
        let recovery = recovery.and_then(|index| job.recoveries.get(index));
        let whole = match recovery {
            Some(recovery) => whole
                .text("reason", recovery.kind.as_str())
                .text("cause", &recovery.reason),
            None => whole,
        };
        whole.end(at);
    }
}

fn time(unix_ms: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(unix_ms)
}

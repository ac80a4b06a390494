//! The spans of one rank. Those of its way into training lie in the trace that its assignment names. What it does while it
//! trains, for days perhaps, are traces of their own with a link to that one.

use super::failure::RankFailure;
use arcface_proto::v1::RankAssignment;
use arcface_traces::Span;
use std::time::{Duration, SystemTime};

/// Makes them.
#[derive(Clone, Debug)]
pub struct Spans {
    parent: String,
    job_id: String,
    generation: u64,
    rank: u32,
    node: String,
}

impl Spans {
    /// Those of the rank that this is the assignment of.
    pub fn of(assignment: &RankAssignment) -> Self {
        Self {
            parent: assignment.trace_parent.clone(),
            job_id: assignment.job_id.clone(),
            generation: assignment.generation,
            rank: assignment.rank,
            node: assignment.node_id.clone(),
        }
    }

    /// A part of the way into training begins.
    pub fn begin(&self, name: &'static str) -> Span {
        self.marked(Span::under(&self.parent, name, SystemTime::now()))
    }

    /// A part of the way into training.
    ///
    /// # Errors
    /// Those of the part.
    pub fn during<T>(
        &self,
        name: &'static str,
        part: impl FnOnce() -> Result<T, RankFailure>,
    ) -> Result<T, RankFailure> {
        let span = self.begin(name);
        let done = part();
        let span = match &done {
            Ok(_) => span,
            Err(failure) => span.failed(&failure.message),
        };
        span.end(SystemTime::now());
        done
    }

    /// Something beside training, at a step, that took so many seconds until now.
    pub fn took(&self, name: &'static str, step: u64, seconds: f64) -> Span {
        let now = SystemTime::now();
        let took = Duration::try_from_secs_f64(seconds).unwrap_or_default();
        let begin = now.checked_sub(took).unwrap_or(now);
        self.marked(Span::root_linked(&self.parent, name, begin))
            .number("step", step)
    }

    fn marked(&self, span: Span) -> Span {
        span.text("job_id", &self.job_id)
            .number("generation", self.generation)
            .number("rank", self.rank.into())
            .text("node", &self.node)
    }
}

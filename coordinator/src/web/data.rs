//! The JSON of the status page: asks the control task and writes what the command line writes, in pages.

use crate::{
    control::{ControlError, Handle, JobFilter},
    view::{json, words},
};
use arcface_proto::{timestamp::to_unix_ms, v1::JobState};
use serde_json::{Value, json};

/// Elements of a page if nothing is said.
const DEFAULT_PAGE: usize = 50;
/// Most elements of a page.
const MAX_PAGE: usize = 200;
/// Most evaluations of one job that are shown.
const MAX_EVALUATIONS: usize = 5_000;
/// Evaluations that are asked for at once.
const EVALUATIONS: usize = 500;
/// States of jobs that are not at their end.
const LIVE: [JobState; 5] = [
    JobState::Queued,
    JobState::Starting,
    JobState::Running,
    JobState::Recovering,
    JobState::Cancelling,
];

/// What may stand after the question mark. Values are taken as they are: ids and numbers need no quoting.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Query {
    limit: Option<usize>,
    live: bool,
    /// `MS-JOB` of a list of jobs, a node's id of a list of nodes: the page begins after it.
    after: Option<String>,
}

impl Query {
    /// Reads a query.
    ///
    /// # Errors
    /// The first part that means nothing here.
    pub fn parse(text: Option<&str>) -> Result<Self, ControlError> {
        let mut query = Self::default();
        for part in text
            .unwrap_or_default()
            .split('&')
            .filter(|part| !part.is_empty())
        {
            let (name, value) = part.split_once('=').unwrap_or((part, ""));
            match name {
                "limit" => {
                    let limit = value.parse().ok().filter(|limit| (1..=MAX_PAGE).contains(limit));
                    let problem = || ControlError::invalid("limit", format!("is not in 1..={MAX_PAGE}"));
                    query.limit = Some(limit.ok_or_else(problem)?);
                }
                "state" if value == "live" => query.live = true,
                "after" => query.after = Some(value.to_owned()),
                _ => {
                    return Err(ControlError::invalid(
                        "query",
                        "knows limit, after and state=live",
                    ));
                }
            }
        }
        Ok(query)
    }

    fn limit(&self) -> usize {
        self.limit.unwrap_or(DEFAULT_PAGE)
    }
}

/// Totals, and that this coordinator leads.
pub async fn cluster(control: Handle) -> Result<Value, ControlError> {
    let mut value = json::cluster(&control.cluster().await?);
    value["leads"] = true.into();
    Ok(value)
}

/// What a coordinator says that stands by: who leads, as clients of gRPC find it.
pub fn standby(leader: Option<&str>) -> Value {
    json!({"leads": false, "leader": leader, "version": env!("CARGO_PKG_VERSION")})
}

/// One page of the jobs, newest first.
pub async fn jobs(control: Handle, query: Query) -> Result<Value, ControlError> {
    let before = match &query.after {
        None => None,
        Some(token) => Some(
            token
                .split_once('-')
                .and_then(|(ms, id)| Some((ms.parse().ok()?, id.parse().ok()?)))
                .ok_or_else(|| ControlError::invalid("after", "is not a token of this list"))?,
        ),
    };
    // One more than the page: whether there is a next one.
    let filter = JobFilter {
        states: if query.live { LIVE.into() } else { Vec::new() },
        before,
        limit: query.limit() + 1,
    };
    let mut jobs = control.jobs(filter).await?;
    let more = jobs.len() > query.limit();
    jobs.truncate(query.limit());
    let next = jobs
        .last()
        .filter(|_| more)
        .map(|last| format!("{}-{}", last.submitted_at.as_ref().map_or(0, to_unix_ms), last.id));
    Ok(json!({"jobs": jobs.iter().map(json::job_row).collect::<Vec<_>>(), "next": next}))
}

/// One job as `job ID` prints it, without its evaluations, and what goes on in it.
pub async fn job(control: Handle, id: String) -> Result<Value, ControlError> {
    let look = control.look(id).await?;
    let mut value = json::job_summary(&look.job);
    for (index, recovery) in look.job.recoveries.iter().enumerate() {
        value["recoveries"][index]["line"] = words::recovery(recovery).into();
    }
    for (index, straggler) in look.job.stragglers.iter().enumerate() {
        value["stragglers"][index]["line"] = words::straggler(straggler).into();
    }
    let rank = |(number, rank): (usize, &crate::control::RankLook)| {
        json!({
            "rank": number,
            "node": rank.node,
            "pid": rank.pid,
            "state": rank.state,
            "class_lo": rank.shard.map(|shard| shard.lo),
            "class_hi": rank.shard.map(|shard| shard.hi),
        })
    };
    value["ranks"] = look.ranks.iter().enumerate().map(rank).collect();
    value["history"] = look.history.into();
    Ok(value)
}

/// Loss and speed of a job over its steps, in columns.
pub async fn curve(control: Handle, id: String) -> Result<Value, ControlError> {
    let curve = control.curve(id).await?;
    let points = curve.points();
    Ok(json!({
        "first_step": curve.first_step(),
        "step": points.iter().map(|point| point.step).collect::<Vec<_>>(),
        "loss": points.iter().map(|point| point.loss()).collect::<Vec<_>>(),
        "samples_per_second": points.iter().map(|point| point.samples_per_second()).collect::<Vec<_>>(),
    }))
}

/// Evaluations of a job, oldest first.
pub async fn evaluations(control: Handle, id: String) -> Result<Value, ControlError> {
    let mut all: Vec<Value> = Vec::new();
    let mut after = None;
    loop {
        let page = control.evaluations(id.clone(), after, EVALUATIONS).await?;
        after = page.last().map(|(token, _)| token.clone());
        let whole = page.len() == EVALUATIONS;
        all.extend(page.iter().map(|(_, evaluation)| json::evaluation(evaluation)));
        if !whole || all.len() >= MAX_EVALUATIONS {
            return Ok(json!({"evaluations": all}));
        }
    }
}

/// Checkpoints of a job, newest first, without their parts.
pub async fn checkpoints(control: Handle, id: String) -> Result<Value, ControlError> {
    let mut all = Vec::new();
    for manifest in control.checkpoints(id).await? {
        let mut value = json::checkpoint(&manifest);
        value["parts"] = manifest.parts.len().into();
        all.push(value);
    }
    Ok(json!({"checkpoints": all}))
}

/// One page of the nodes, by id.
pub async fn nodes(control: Handle, query: Query) -> Result<Value, ControlError> {
    let mut nodes = control.nodes().await?;
    nodes.retain(|node| query.after.as_ref().is_none_or(|after| node.id > *after));
    let more = nodes.len() > query.limit();
    nodes.truncate(query.limit());
    let next = nodes.last().filter(|_| more).map(|last| last.id.clone());
    Ok(json!({"nodes": nodes.iter().map(json::node).collect::<Vec<_>>(), "next": next}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_read_or_refused() {
        assert_eq!(Query::parse(None).expect("nothing asked"), Query::default());
        let query = Query::parse(Some("limit=7&state=live&after=12-job-00")).expect("a query");
        assert_eq!((query.limit(), query.live), (7, true));
        assert_eq!(query.after.as_deref(), Some("12-job-00"));
        for wrong in ["limit=0", "limit=201", "limit=x", "state=dead", "q=1"] {
            assert!(Query::parse(Some(wrong)).is_err(), "{wrong}");
        }
    }
}

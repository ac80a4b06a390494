//! The text of `/metrics`. Knows the recorder; which metrics there are is `telemetry`'s, and `web` serves it.

use crate::{histograms, telemetry};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use std::{
    collections::HashSet,
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

/// Between two clean-ups of the recorder, which bound its memory.
pub const UPKEEP: Duration = Duration::from_secs(5);

static RECORDER: OnceLock<Result<PrometheusHandle, String>> = OnceLock::new();
/// Jobs whose series are not shown any more.
static RETIRED: Mutex<Option<HashSet<String>>> = Mutex::new(None);

/// Nodes whose series are shown.
static NODES: Mutex<Option<HashSet<String>>> = Mutex::new(None);

/// False while the series of jobs and nodes are those of a time when this coordinator led.
static CLUSTER: AtomicBool = AtomicBool::new(true);

/// Installs the process's one recorder; later calls give the same.
///
/// # Errors
/// Another recorder was installed before.
pub fn recorder() -> anyhow::Result<&'static PrometheusHandle> {
    let installed = RECORDER.get_or_init(|| {
        let mut builder = PrometheusBuilder::new();
        for (name, bounds) in telemetry::buckets() {
            let metric = Matcher::Full(name.to_owned());
            builder = builder
                .set_buckets_for_metric(metric, bounds)
                .map_err(|error| error.to_string())?;
        }
        let handle = builder.install_recorder().map_err(|error| error.to_string())?;
        telemetry::describe();
        Ok(handle)
    });
    installed
        .as_ref()
        .map_err(|error| anyhow::anyhow!("install the metrics recorder: {error}"))
}

/// Shows a job's series no more: it ended a while ago, and every job leaves a hundred of them.
pub fn retire(job_id: &str) {
    let mut retired = RETIRED.lock().unwrap_or_else(PoisonError::into_inner);
    retired
        .get_or_insert_with(HashSet::new)
        .insert(format!("job_id=\"{job_id}\""));
    histograms::forget(job_id);
}

/// Shows the series of these nodes and of no others: every worker that was ever started anew leaves some.
pub fn show_nodes(nodes: HashSet<String>) {
    *NODES.lock().unwrap_or_else(PoisonError::into_inner) = Some(nodes);
}

/// Whether the series of jobs and nodes are shown: a coordinator that stands by knows of none, and what it knew is old.
pub fn show_cluster(shown: bool) {
    CLUSTER.store(shown, Ordering::Relaxed);
}

/// The text that a scrape gets.
pub fn render(recorder: &PrometheusHandle) -> String {
    let mut text = recorder.render();
    histograms::render(&mut text);
    let retired = RETIRED.lock().unwrap_or_else(PoisonError::into_inner);
    let nodes = NODES.lock().unwrap_or_else(PoisonError::into_inner);
    shown(
        text,
        CLUSTER.load(Ordering::Relaxed),
        retired.as_ref(),
        nodes.as_ref(),
    )
}

/// What of a page is shown: nothing of the cluster unless `cluster`, no `retired` jobs, no nodes but `nodes` if these are known.
fn shown(
    text: String,
    cluster: bool,
    retired: Option<&HashSet<String>>,
    nodes: Option<&HashSet<String>>,
) -> String {
    if cluster && retired.is_none() && nodes.is_none() {
        return text;
    }
    let of_cluster = |line: &str| {
        let series = ["job_id=\"", "{node=\""].iter().any(|label| line.contains(label));
        series
            || line.starts_with(telemetry::COORDINATOR_NODES)
            || line.starts_with(telemetry::COORDINATOR_SLOTS)
    };
    let of_retired = |line: &str| {
        let label = line.find("job_id=\"").and_then(|at| {
            let label = line.get(at..)?;
            label.get(..label.char_indices().filter(|(_, c)| *c == '"').nth(1)?.0 + 1)
        });
        label.is_some_and(|label| retired.is_some_and(|retired| retired.contains(label)))
    };
    let of_forgotten = |line: &str| {
        let node = line
            .split_once("{node=\"")
            .and_then(|(_, rest)| rest.split('"').next());
        node.is_some_and(|node| nodes.is_some_and(|nodes| !nodes.contains(node)))
    };
    text.lines()
        .filter(|line| !of_retired(line) && !of_forgotten(line) && (cluster || !of_cluster(line)))
        .fold(String::with_capacity(text.len()), |mut shown, line| {
            shown.push_str(line);
            shown.push('\n');
            shown
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forgotten_nodes_ended_jobs_and_the_cluster_of_another_are_hidden() {
        const PAGE: &str = "# HELP a b\nis_leader 1\nage{node=\"old\"} 9\nage{node=\"new\"} 1\n\
                            steps{job_id=\"j1\"} 1\nsteps{job_id=\"j2\",rank=\"0\"} 2\n";
        let set = |one: &str| Some(HashSet::from([one.to_owned()]));
        let (ended, known) = (set("job_id=\"j1\""), set("new"));
        let cases = [
            (true, &None, &None, PAGE.to_owned()),
            (
                true,
                &ended,
                &known,
                PAGE.replace("age{node=\"old\"} 9\n", "")
                    .replace("steps{job_id=\"j1\"} 1\n", ""),
            ),
            (false, &None, &known, "# HELP a b\nis_leader 1\n".to_owned()),
        ];
        for (cluster, retired, nodes, expected) in cases {
            let found = shown(PAGE.to_owned(), cluster, retired.as_ref(), nodes.as_ref());
            assert_eq!(found, expected, "{cluster} {retired:?} {nodes:?}");
        }
    }
}

//! Logs and metrics of the agent and of the rank processes: set up once, in `main`. Metric names stand in one list.
//! Labels come from closed sets or ids, never from free text.

use anyhow::Context;
use arcface_proto::types::NodeId;
use std::net::SocketAddr;
use tracing_subscriber::EnvFilter;

/// How log lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// The commit that was built, where the build said so.
const COMMIT: &str = match option_env!("ARCFACE_COMMIT") {
    Some(commit) => commit,
    None => "unknown",
};
/// The libtorch that it was built against, where that told its version.
const LIBTORCH: &str = match option_env!("ARCFACE_LIBTORCH_VERSION") {
    Some(version) => version,
    None => "unknown",
};

/// Always 1; labelled with the version.
pub const BUILD_INFO: &str = "arcface_build_info";
/// Rank processes that run on this node.
pub const AGENT_RANKS: &str = "arcface_agent_ranks";
/// Slots of this node.
pub const AGENT_SLOTS: &str = "arcface_agent_slots";
/// Rank processes started.
pub const AGENT_RANK_STARTS: &str = "arcface_agent_rank_starts_total";
/// Rank processes that ended, by `outcome`: ok, error, signal, hang, requested.
pub const AGENT_RANK_EXITS: &str = "arcface_agent_rank_exits_total";
/// Rank processes that made no progress and were killed for it.
pub const AGENT_RANK_HANGS: &str = "arcface_agent_rank_hangs_total";
/// Heartbeats that the coordinator acknowledged.
pub const AGENT_HEARTBEATS: &str = "arcface_agent_heartbeats_total";
/// Seconds since the newest acknowledged heartbeat was sent.
pub const AGENT_HEARTBEAT_AGE: &str = "arcface_agent_heartbeat_age_seconds";
/// Connections to a coordinator that were lost.
pub const AGENT_CONNECTIONS_LOST: &str = "arcface_agent_connections_lost_total";
/// 1 while joined.
pub const AGENT_JOINED: &str = "arcface_agent_joined";

/// Starts logging to standard error. `RUST_LOG` chooses what, otherwise `level` does.
pub fn init_logs(format: LogFormat, level: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_writer(std::io::stderr);
    // A second call (tests in one process) keeps the first subscriber.
    let _already_set = match format {
        LogFormat::Text => builder
            .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
            .try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
}

/// How a rank process can end, as the agent counts it.
const OUTCOMES: [&str; 5] = ["ok", "error", "signal", "hang", "requested"];

/// Serves `/metrics` for Prometheus at `address`, every series with the label `node`. Must be called inside a tokio
/// runtime.
///
/// # Errors
/// If the address cannot be listened at.
pub fn serve_metrics(address: SocketAddr, node: &NodeId) -> anyhow::Result<()> {
    metrics_exporter_prometheus::PrometheusBuilder::new()
        .with_http_listener(address)
        .add_global_label("node", node.to_string())
        .install()
        .with_context(|| format!("--metrics {address}: cannot serve metrics there"))?;
    describe();
    start_counters();
    Ok(())
}

/// Counters of rare events start at 0: Prometheus sees no increase in a series that begins with its first event.
fn start_counters() {
    for name in [AGENT_RANK_STARTS, AGENT_RANK_HANGS, AGENT_CONNECTIONS_LOST] {
        metrics::counter!(name).increment(0);
    }
    for outcome in OUTCOMES {
        metrics::counter!(AGENT_RANK_EXITS, "outcome" => outcome).increment(0);
    }
}

fn describe() {
    use metrics::{describe_counter, describe_gauge};
    describe_gauge!(BUILD_INFO, "Always 1; the labels tell the version.");
    describe_gauge!(AGENT_RANKS, "Rank processes that run on this node.");
    describe_gauge!(AGENT_SLOTS, "Ranks that this node can run at once.");
    describe_counter!(AGENT_RANK_STARTS, "Rank processes started.");
    describe_counter!(AGENT_RANK_EXITS, "Rank processes that ended, by outcome.");
    describe_counter!(
        AGENT_RANK_HANGS,
        "Rank processes that made no progress and were killed for it."
    );
    describe_counter!(AGENT_HEARTBEATS, "Heartbeats that the coordinator acknowledged.");
    describe_gauge!(
        AGENT_HEARTBEAT_AGE,
        "Seconds since the newest acknowledged heartbeat was sent."
    );
    describe_counter!(
        AGENT_CONNECTIONS_LOST,
        "Connections to a coordinator that were lost."
    );
    describe_gauge!(AGENT_JOINED, "1 while joined to a coordinator.");
    metrics::gauge!(BUILD_INFO, "version" => env!("CARGO_PKG_VERSION"), "commit" => COMMIT, "libtorch" => LIBTORCH)
        .set(1.0);
}

//! Puts a coordinator together and takes it apart: binds, opens the store, serves gRPC and metrics, writes the
//! address file, and stops in a stated order. Jobs go on while no coordinator runs.

use crate::api::Router;
use anyhow::Context;
use arcface_proto::failure::{ExitCode, Failure};
use std::{
    fmt, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    pin::pin,
    str::FromStr,
    time::Duration,
};
use tokio::{net::TcpListener, time::timeout};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;

/// What `serve` was told.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// Address of the gRPC services; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Address of `/metrics`; `None` serves none.
    pub metrics: Option<SocketAddr>,
    /// Where state is kept.
    pub store: StoreUrl,
    /// File that gets `grpc=HOST:PORT` and `metrics=HOST:PORT` once the services answer.
    pub address_file: Option<PathBuf>,
    /// How long to wait for what.
    pub timers: Timers,
}

/// Where the coordinator keeps its state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreUrl {
    /// One file in a directory of this machine, for a single coordinator.
    Embedded(PathBuf),
}

impl FromStr for StoreUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("embedded", directory)) if !directory.is_empty() => {
                Ok(Self::Embedded(PathBuf::from(directory)))
            }
            _ => Err(format!("store {text:?} is not embedded:DIR")),
        }
    }
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedded(directory) => write!(f, "embedded:{}", directory.display()),
        }
    }
}

/// Every time limit of the control plane, in milliseconds. The defaults detect a lost node within 4 s; tests make
/// them short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timers {
    /// Between two heartbeats of an agent.
    pub heartbeat_ms: u64,
    /// Silence after which a node gets no new ranks.
    pub suspect_ms: u64,
    /// Silence after which a node counts as lost and its generations end.
    pub lost_ms: u64,
    /// Silence after which an agent has killed its ranks by itself.
    pub orphan_ms: u64,
    /// Time for known agents to come back after the coordinator started.
    pub rejoin_ms: u64,
    /// Time for a rank process to be spawned, and for all ranks of a generation to meet.
    pub rendezvous_ms: u64,
    /// First wait before a restart; it doubles up to `backoff_max_ms`.
    pub backoff_ms: u64,
    /// Longest wait before a restart.
    pub backoff_max_ms: u64,
    /// Between SIGTERM and SIGKILL when a job is cancelled.
    pub grace_ms: u64,
}

impl Default for Timers {
    fn default() -> Self {
        Self {
            heartbeat_ms: 500,
            suspect_ms: 1_500,
            lost_ms: 3_000,
            orphan_ms: 120_000,
            rejoin_ms: 10_000,
            rendezvous_ms: 60_000,
            backoff_ms: 500,
            backoff_max_ms: 30_000,
            grace_ms: 5_000,
        }
    }
}

/// Longest that open streams get to end at shutdown.
const STREAMS_END: Duration = Duration::from_secs(5);

/// A coordinator that serves.
pub struct Running {
    /// Address of the gRPC services, with the port that was really taken.
    pub grpc: SocketAddr,
    /// Address of `/metrics`.
    pub metrics: Option<SocketAddr>,
    stop: CancellationToken,
    serving: tokio::task::JoinHandle<anyhow::Result<()>>,
}

impl Running {
    /// Ends the coordinator: streams are closed, accepted changes are stored, jobs and their ranks go on.
    ///
    /// # Errors
    /// What had stopped it before.
    pub async fn shutdown(self) -> anyhow::Result<()> {
        self.stop.cancel();
        self.wait().await
    }

    /// Waits until the coordinator ends by itself, which it does only on an error.
    ///
    /// # Errors
    /// Why it stopped.
    pub async fn wait(self) -> anyhow::Result<()> {
        self.serving.await.context("serve")?
    }

    /// Ends the coordinator when cancelled, as [`Running::shutdown`] does: for signal handlers.
    pub fn stopper(&self) -> CancellationToken {
        self.stop.clone()
    }
}

/// Starts a coordinator and returns once it answers.
///
/// # Errors
/// [`Failure`]s: an address that is in use, a store that is in use or damaged, an address file that cannot be written.
pub async fn start(options: ServeOptions) -> anyhow::Result<Running> {
    let listener = bind(options.listen, "--listen").await?;
    let grpc = listener.local_addr().context("read the listening address")?;
    let stop = CancellationToken::new();
    let (health, health_service) = tonic_health::server::health_reporter();
    health
        .set_service_status("", tonic_health::ServingStatus::Serving)
        .await;
    let router = Router::default().with(health_service);
    let stopping = stop.clone();
    let serving = tokio::spawn(async move {
        let mut server = pin!(tonic::transport::Server::builder().serve_with_incoming_shutdown(
            router,
            TcpListenerStream::new(listener),
            stopping.clone().cancelled_owned(),
        ));
        tokio::select! {
            ended = &mut server => return ended.context("serve gRPC"),
            () = stopping.cancelled() => {}
        }
        match timeout(STREAMS_END, server).await {
            Ok(ended) => ended.context("serve gRPC"),
            Err(_) => Ok(()),
        }
    });
    if let Some(path) = &options.address_file {
        write_address_file(path, grpc, None)?;
    }
    Ok(Running {
        grpc,
        metrics: None,
        stop,
        serving,
    })
}

async fn bind(address: SocketAddr, flag: &str) -> Result<TcpListener, Failure> {
    TcpListener::bind(address).await.map_err(|error| {
        let (why, hint) = match error.kind() {
            io::ErrorKind::AddrInUse => (
                "the port is in use".to_owned(),
                format!("stop the other process, or choose another port with {flag}"),
            ),
            io::ErrorKind::AddrNotAvailable => (
                "this machine does not have that address".to_owned(),
                format!("{flag} wants an address of this machine, or 0.0.0.0"),
            ),
            io::ErrorKind::PermissionDenied => (
                "permission denied".to_owned(),
                format!("ports below 1024 need a privilege; choose another with {flag}"),
            ),
            _ => (error.to_string(), String::new()),
        };
        Failure::new(ExitCode::Unreachable, format!("listen on {address}: {why}")).hint(hint)
    })
}

/// Written under another name and renamed, so that a reader never sees half a file.
fn write_address_file(path: &Path, grpc: SocketAddr, metrics: Option<SocketAddr>) -> anyhow::Result<()> {
    let mut text = format!("grpc={grpc}\n");
    if let Some(metrics) = metrics {
        text.push_str(&format!("metrics={metrics}\n"));
    }
    let draft = path.with_extension("tmp");
    std::fs::write(&draft, text)
        .and_then(|()| std::fs::rename(&draft, path))
        .with_context(|| format!("write address file {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn store_urls_round_trip() {
        let url: StoreUrl = "embedded:/var/lib/arcface".parse().expect("valid");
        assert_eq!(url.to_string(), "embedded:/var/lib/arcface");
        for text in ["", "embedded", "embedded:", "etcd:http://localhost:2379", "/tmp"] {
            assert!(text.parse::<StoreUrl>().is_err(), "{text:?}");
        }
    }
}

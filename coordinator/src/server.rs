//! Puts a coordinator together and takes it apart: binds, opens the store, serves gRPC, metrics and the status page, writes the
//! address file, and stops in a stated order. Jobs go on while no coordinator runs. When it leads is decided in `terms`.

mod terms;

use crate::{
    api::{Front, Router},
    exporter,
    store::{Candidate, EmbeddedStore, EtcdUrl, StoreError},
    telemetry,
    tls::Served,
    web,
};
use anyhow::Context;
use arcface_proto::failure::{ExitCode, Failure};
use std::{
    convert::Infallible,
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    pin::pin,
    str::FromStr,
    sync::Arc,
    time::Duration,
};
use terms::{Desk, Leadership, Stops};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::timeout,
};
use tokio_stream::{Stream, StreamExt, wrappers::TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{
    body::Body,
    codegen::{Service, http},
    server::NamedService,
    transport::ClientTlsConfig,
};

/// What `serve` was told.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// Address of the gRPC services; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Address of `/metrics` and the status page; `None` serves neither.
    pub metrics: Option<SocketAddr>,
    /// Where state is kept.
    pub store: StoreUrl,
    /// Where others find this coordinator, `HOST:PORT`, told by one that stands by when this one leads; `None`: the
    /// address it listens on.
    pub advertise: Option<String>,
    /// TLS of the gRPC services; `None`: without.
    pub tls: Option<Served>,
    /// TLS towards etcd; `None`: without.
    pub etcd_tls: Option<ClientTlsConfig>,
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
    /// etcd, for several coordinators of which one leads.
    Etcd(EtcdUrl),
}

impl FromStr for StoreUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("embedded", directory)) if !directory.is_empty() => {
                Ok(Self::Embedded(PathBuf::from(directory)))
            }
            Some(("etcd", url)) if !url.is_empty() => url.parse().map(Self::Etcd),
            _ => Err(format!(
                "store {text:?} is neither embedded:DIR nor etcd:http[s]://HOST:PORT,...[/PREFIX]"
            )),
        }
    }
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedded(directory) => write!(f, "embedded:{}", directory.display()),
            Self::Etcd(url) => write!(f, "etcd:{url}"),
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
    /// Silence of a leader after which another coordinator leads, with a store in etcd: whole seconds, at least 2 s.
    pub leader_ms: u64,
}

impl Default for Timers {
    fn default() -> Self {
        Self {
            heartbeat_ms: 500,
            suspect_ms: 1_500,
            lost_ms: 3_000,
            orphan_ms: 180_000,
            rejoin_ms: 10_000,
            rendezvous_ms: 60_000,
            backoff_ms: 500,
            backoff_max_ms: 30_000,
            grace_ms: 5_000,
            leader_ms: 5_000,
        }
    }
}

/// Longest that open streams get to end at shutdown.
const STREAMS_END: Duration = Duration::from_secs(5);
/// Largest request: a checkpoint's parts of one rank, a job with long lists, an agent with thousands of ranks.
const MAX_REQUEST_BYTES: usize = 1 << 20;
/// Streams of one connection: a client that opens more waits.
const MAX_STREAMS: u32 = 256;
/// A connection whose peer does not answer a ping for so long is closed.
const PING_EVERY: Duration = Duration::from_secs(10);
const PING_LIMIT: Duration = Duration::from_secs(10);

/// A coordinator that serves.
pub struct Running {
    /// Address of the gRPC services, with the port that was really taken.
    pub grpc: SocketAddr,
    /// Address of `/metrics` and the status page.
    pub metrics: Option<SocketAddr>,
    stop: CancellationToken,
    serving: JoinHandle<anyhow::Result<()>>,
}

impl Running {
    /// Where a browser on this machine finds the status page.
    pub fn status_page(&self) -> Option<String> {
        let mut address = self.metrics?;
        if address.ip().is_unspecified() {
            address.set_ip(match address.ip() {
                IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
                IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
            });
        }
        Some(format!("http://{address}/"))
    }

    /// Ends the coordinator: streams are closed, accepted changes are stored, jobs and their ranks go on.
    ///
    /// # Errors
    /// What had stopped it before.
    pub async fn shutdown(self) -> anyhow::Result<()> {
        self.stop.cancel();
        self.wait().await
    }

    /// Waits until the coordinator ends: by itself, which it does only on an error, or because it was stopped.
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
    // Addresses first: a second coordinator on this machine learns of the port before it touches the store.
    let listener = bind(options.listen, "--listen").await?;
    let grpc = listener.local_addr().context("read the listening address")?;
    let metrics = match options.metrics {
        Some(address) => Some(bind(address, "--metrics").await?),
        None => None,
    };
    let metrics_address = metrics
        .as_ref()
        .map(TcpListener::local_addr)
        .transpose()
        .context("read the metrics address")?;
    warn_if_exposed(grpc, options.tls.as_ref(), metrics_address);

    let recorder = exporter::recorder()?;
    metrics::gauge!(telemetry::BUILD_INFO, "version" => env!("CARGO_PKG_VERSION"), "commit" => telemetry::COMMIT)
        .set(1.0);
    let leadership = open_store(&options, grpc).await?;
    let stop = CancellationToken::new();
    let stops = Stops {
        streams: stop.clone(),
        // The control task outlives the streams: what they have accepted is still stored.
        control: CancellationToken::new(),
    };
    let (health, health_service) = tonic_health::server::health_reporter();
    let always = always(health_service)?;
    let desk = Desk::new(health).await;
    let front = Front::new(always, desk.role());
    let pages = desk.role();
    let terms = terms::start(leadership, options.timers, desk, stops.clone()).await?;
    if let Some(listener) = metrics {
        tokio::spawn(web::serve(listener, recorder, pages, stop.clone()));
    }
    let serving = tokio::spawn(serve(listener, options.tls.clone(), front, terms, stops));
    if let Some(path) = &options.address_file
        && let Err(error) = write_address_file(path, grpc, metrics_address)
    {
        stop.cancel();
        return Err(error);
    }
    Ok(Running {
        grpc,
        metrics: metrics_address,
        stop,
        serving,
    })
}

/// Serves until stopped. The order of the end: no new connections, streams end (with a limit), the control task ends,
/// the leader's key is released.
async fn serve(
    listener: TcpListener,
    tls: Option<Served>,
    front: Front,
    mut terms: JoinHandle<anyhow::Result<()>>,
    stops: Stops,
) -> anyhow::Result<()> {
    let mut builder = tonic::transport::Server::builder()
        .tcp_nodelay(true)
        .max_concurrent_streams(MAX_STREAMS)
        .http2_keepalive_interval(Some(PING_EVERY))
        .http2_keepalive_timeout(Some(PING_LIMIT));
    if let Some(tls) = tls {
        builder = builder.tls_config(tls.config).context("TLS")?;
    }
    let mut server = pin!(builder.serve_with_incoming_shutdown(
        front,
        incoming(listener),
        stops.streams.clone().cancelled_owned()
    ));
    tokio::select! {
        ended = &mut server => {
            stops.streams.cancel();
            stops.control.cancel();
            ended.context("serve gRPC")?;
        }
        ended = &mut terms => {
            stops.streams.cancel();
            // What still runs is cut off: this coordinator may not act any more.
            return ended.context("terms")?;
        }
        () = stops.streams.cancelled() => {
            if timeout(STREAMS_END, server).await.is_err() {
                tracing::warn!("streams did not end within {STREAMS_END:?} and were cut");
            }
            stops.control.cancel();
        }
    }
    terms.await.context("terms")?
}

/// Accepted connections without Nagle's delay: heartbeats and commands are small.
fn incoming(listener: TcpListener) -> impl Stream<Item = io::Result<TcpStream>> {
    TcpListenerStream::new(listener).map(|accepted| {
        accepted.inspect(|socket| {
            if let Err(error) = socket.set_nodelay(true) {
                tracing::debug!(%error, "set nodelay");
            }
        })
    })
}

/// Health and reflection for any gRPC client, whoever leads.
fn always<H>(health: H) -> anyhow::Result<Router>
where
    H: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>
        + NamedService
        + Clone
        + Send
        + Sync
        + 'static,
    H::Future: Send,
{
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(arcface_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    Ok(Router::default()
        .with(health)
        .with(reflection().build_v1().context("reflection")?)
        .with(reflection().build_v1alpha().context("reflection")?))
}

async fn open_store(options: &ServeOptions, grpc: SocketAddr) -> anyhow::Result<Leadership> {
    match &options.store {
        StoreUrl::Embedded(directory) => {
            let directory = directory.clone();
            let opened = tokio::task::spawn_blocking(move || EmbeddedStore::open(&directory)).await;
            let store = opened.context("open the store")?.map_err(store_failure)?;
            Ok(Leadership::Alone(Arc::new(store)))
        }
        StoreUrl::Etcd(url) => {
            if url.is_encrypted() != options.etcd_tls.is_some() {
                let (message, hint) = match url.is_encrypted() {
                    true => (
                        "--store has https addresses, and nobody vouches for them",
                        "name the authorities with --etcd-ca FILE",
                    ),
                    false => (
                        "--etcd-ca was given, and --store has http addresses",
                        "write https:// there",
                    ),
                };
                return Err(Failure::new(ExitCode::Usage, message).hint(hint).into());
            }
            let address = match &options.advertise {
                Some(address) => address.clone(),
                None if grpc.ip().is_unspecified() => {
                    let message = format!("{grpc} is no address at which others find this coordinator");
                    let hint = "say which with --advertise HOST:PORT";
                    return Err(Failure::new(ExitCode::Usage, message).hint(hint).into());
                }
                None => grpc.to_string(),
            };
            let ttl = Duration::from_millis(options.timers.leader_ms);
            let candidate = Candidate::connect(url.clone(), options.etcd_tls.clone(), address, ttl)
                .await
                .map_err(|error| {
                    Failure::new(ExitCode::Unreachable, error.to_string())
                        .hint("is etcd running there, and is --store right?")
                })?;
            Ok(Leadership::Elected(Box::new(candidate)))
        }
    }
}

/// What a person can do about a store that fails.
fn store_failure(error: StoreError) -> anyhow::Error {
    let (code, hint) = match &error {
        StoreError::InUse { .. } => (
            ExitCode::Unreachable,
            "stop the other coordinator, or choose another directory with --store",
        ),
        StoreError::Damaged { .. } => (
            ExitCode::Failed,
            "restore the file from a backup, or choose another directory with --store",
        ),
        StoreError::Fenced { .. } => (ExitCode::Failed, "another coordinator serves this store now"),
        _ => (
            ExitCode::Failed,
            "look at the disk's free space, permissions and health",
        ),
    };
    Failure::new(code, error.to_string()).hint(hint).into()
}

/// Says what anybody who reaches the address can do.
fn warn_if_exposed(grpc: SocketAddr, tls: Option<&Served>, metrics: Option<SocketAddr>) {
    let lacking = match tls {
        None => Some("without TLS"),
        Some(tls) if !tls.authenticated => Some("without --tls-client-ca"),
        Some(_) => None,
    };
    if let Some(lacking) = lacking.filter(|_| !grpc.ip().is_loopback()) {
        tracing::warn!(
            %grpc,
            "listening beyond loopback {lacking}: whoever reaches this address can submit and cancel jobs, join as a \
             worker and read all results"
        );
    }
    if let Some(metrics) = metrics.filter(|address| !address.ip().is_loopback()) {
        tracing::warn!(
            %metrics,
            "metrics and the status page are readable by whoever reaches this address: jobs with their settings, nodes, \
             process ids, errors"
        );
    }
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
        let url: StoreUrl = "etcd:http://a:2379,http://b:2379/faces".parse().expect("valid");
        assert_eq!(url.to_string(), "etcd:http://a:2379,http://b:2379/faces");
        for text in [
            "",
            "embedded",
            "embedded:",
            "etcd:",
            "etcd:localhost:2379",
            "/tmp",
        ] {
            assert!(text.parse::<StoreUrl>().is_err(), "{text:?}");
        }
    }
}

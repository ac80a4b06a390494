//! `serve`: a coordinator until it is told to stop.

use super::connect::parse_address;
use crate::server::{self, ServeOptions, StoreUrl, Timers};
use crate::telemetry::{self, DEFAULT_FILTER, LogFormat, LogSink};
use crate::tls::{EtcdTls, ServerTls};
use arcface_traces::Otlp;
use clap::Args;
use std::{env, net::SocketAddr, path::PathBuf};
use tokio::signal::unix::{SignalKind, signal};

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  arcface-coordinator serve
  arcface-coordinator serve --listen 10.0.0.1:1234 --store embedded:/var/lib/arcface
  arcface-coordinator serve --listen 10.0.0.1:1234 --store etcd:http://10.0.0.1:2379,http://10.0.0.2:2379
  arcface-coordinator serve --listen 10.0.0.1:1234 --tls-cert c1.pem --tls-key c1.key --tls-client-ca ca.pem")]
pub(super) struct ServeArgs {
    /// Address of the gRPC services; port 0 takes a free one
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:1234", value_parser = parse_socket)]
    listen: SocketAddr,
    /// Address of the status page (/) and of /metrics for Prometheus
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:9464", value_parser = parse_socket)]
    metrics: SocketAddr,
    /// Where jobs are kept [default: embedded: in $XDG_STATE_HOME/arcface or ~/.local/state/arcface]. With etcd
    /// several coordinators serve one cluster: one leads, the others stand by. A path after the last URL is the
    /// prefix of the keys [default: /arcface]
    #[arg(
        long,
        value_name = "embedded:DIR|etcd:URL,URL[/PREFIX]",
        env = "ARCFACE_STORE"
    )]
    store: Option<StoreUrl>,
    /// Where clients, workers and ranks find this coordinator when it leads [default: the address of --listen]
    #[arg(long, value_name = "HOST:PORT", value_parser = parse_address)]
    advertise: Option<String>,
    #[command(flatten)]
    tls: ServerTls,
    #[command(flatten)]
    etcd_tls: EtcdTls,
    /// File that gets the addresses in use once the services answer
    #[arg(long, value_name = "FILE")]
    address_file: Option<PathBuf>,
    #[command(flatten)]
    otlp: Otlp,
    #[command(flatten)]
    log: LogArgs,
}

/// What is logged and how.
#[derive(Args, Debug)]
pub(super) struct LogArgs {
    /// Log lines for people or for programs [default: text on a terminal, else json]
    #[arg(long, value_enum)]
    pub log_format: Option<LogFormat>,
    /// What is logged: a level, or levels by module
    #[arg(long, value_name = "FILTER", env = "ARCFACE_LOG", default_value = DEFAULT_FILTER, hide_default_value = true)]
    pub log: String,
}

pub(super) fn parse_socket(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .map_err(|_| "an address to listen on is IP:PORT, as 127.0.0.1:1234 or 0.0.0.0:1234".into())
}

/// The directory for state of this user, after the XDG base directory specification.
fn default_store() -> StoreUrl {
    let absolute = |name: &str| {
        env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    let state = absolute("XDG_STATE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".local/state")));
    StoreUrl::Embedded(state.map_or_else(|| PathBuf::from("arcface-state"), |state| state.join("arcface")))
}

pub(super) async fn run(args: ServeArgs) -> anyhow::Result<()> {
    let format = args.log.log_format.unwrap_or_else(LogFormat::of_stderr);
    telemetry::start_logging(format, &args.log.log, LogSink::Stderr)?;
    let _traces = args.otlp.start("arcface-coordinator")?;
    let store = args.store.unwrap_or_else(default_store);
    let options = ServeOptions {
        listen: args.listen,
        metrics: Some(args.metrics),
        store: store.clone(),
        advertise: args.advertise,
        tls: args.tls.config()?,
        etcd_tls: args.etcd_tls.config()?,
        address_file: args.address_file,
        timers: Timers::default(),
    };
    // Signals count from here on: a stop while the store opens is not lost.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let running = server::start(options).await?;
    let metrics = running
        .metrics
        .map(|address| address.to_string())
        .unwrap_or_default();
    let status_page = running.status_page().unwrap_or_default();
    tracing::info!(grpc = %running.grpc, %metrics, status_page, %store, version = env!("CARGO_PKG_VERSION"), "serving");
    let stop = running.stopper();
    let signals = tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("stopping: terminated"),
            _ = interrupt.recv() => tracing::info!("stopping: interrupted"),
        }
        stop.cancel();
    });
    let ended = running.wait().await;
    signals.abort();
    ended
}

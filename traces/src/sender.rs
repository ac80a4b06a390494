//! Sends the spans of a process, beside its work: they wait in a queue of 2048, a thread of its own sends them every second, and
//! what finds the queue full or no collector is lost. The work neither waits for a collector nor fails for want of one.

use arcface_proto::failure::{ExitCode, Failure};
use clap::Args;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{
        BatchConfigBuilder, BatchSpanProcessor, SdkTracer, SdkTracerProvider, SpanData,
        SpanExporter as Exporter,
    },
};
use std::{
    error::Error,
    ffi::OsString,
    fmt,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::runtime::{Builder, Runtime};
use tonic::transport::{Channel, ClientTlsConfig, Endpoint};
use tracing::warn;

/// Between two batches: a process that is killed loses no more.
const EVERY: Duration = Duration::from_secs(1);
/// Longest that a connection may take.
const CONNECT: Duration = Duration::from_secs(2);
/// Longest that a collector may take for a batch.
const SEND: Duration = Duration::from_secs(5);
/// Longest that a process waits at its end for its last spans.
const LAST: Duration = Duration::from_secs(1);
/// Spans that wait.
const QUEUE: usize = 2048;

/// Set once, where traces are sent.
pub(crate) static TRACER: OnceLock<SdkTracer> = OnceLock::new();

/// Where the traces of a process go.
#[derive(Args, Clone, Debug, Default)]
pub struct Otlp {
    /// Send OpenTelemetry traces to the collector at this URL (OTLP over gRPC), as http://10.0.0.9:4317 or https://HOST:PORT
    /// with a certificate of the system's authorities [default: none are made]
    #[arg(long = "otlp", value_name = "URL", env = "OTEL_EXPORTER_OTLP_ENDPOINT")]
    url: Option<String>,
}

impl Otlp {
    /// The same for another process, as arguments.
    pub fn arguments(&self) -> Vec<OsString> {
        match &self.url {
            Some(url) => vec!["--otlp".into(), url.into()],
            None => Vec::new(),
        }
    }

    /// Begins to send the spans of this process, which is one of `service`, if a collector was named. Nobody needs to be there.
    ///
    /// # Errors
    /// A URL that names no collector, or settings in the environment (`OTEL_*`) that cannot be used.
    pub fn start(&self, service: &'static str) -> Result<Option<Traces>, Failure> {
        // Templates of deployments set variables to nothing.
        match self.url.as_deref().filter(|url| !url.is_empty()) {
            Some(url) => Traces::start(url, service).map(Some),
            None => Ok(None),
        }
    }
}

/// Sends the spans of this process, until it is dropped: then for one second more at most.
pub struct Traces {
    provider: SdkTracerProvider,
    /// The last batch did not arrive.
    failing: Arc<AtomicBool>,
    /// Of the connection. Ranks have no other where they begin.
    runtime: Option<Runtime>,
}

impl Traces {
    fn start(url: &str, service: &'static str) -> Result<Self, Failure> {
        let refused = |why: &dyn fmt::Display| {
            Failure::new(ExitCode::Usage, format!("--otlp {url:?}: {why}")).hint(
                "name the gRPC port of a collector, as http://127.0.0.1:4317; without --otlp and \
                 OTEL_EXPORTER_OTLP_ENDPOINT no traces are sent",
            )
        };
        check(url).map_err(|why| refused(&why))?;
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("traces")
            .enable_all()
            .build()
            .map_err(|error| Failure::new(ExitCode::Failed, format!("start to send traces: {error}")))?;
        let exporter = {
            let _inside = runtime.enter();
            exporter(url)
        };
        let exporter = match exporter {
            Ok(exporter) => exporter,
            Err(error) => {
                // To drop it would wait, which no task may.
                runtime.shutdown_background();
                return Err(refused(&chain(error.as_ref())));
            }
        };
        let failing = Arc::new(AtomicBool::new(false));
        let watched = Watched {
            exporter,
            failing: failing.clone(),
            warned: AtomicBool::new(false),
        };
        let batches = BatchConfigBuilder::default()
            .with_max_queue_size(QUEUE)
            .with_scheduled_delay(EVERY);
        let provider = SdkTracerProvider::builder()
            .with_span_processor(
                BatchSpanProcessor::builder(watched)
                    .with_batch_config(batches.build())
                    .build(),
            )
            .with_resource(Resource::builder().with_service_name(service).build())
            .build();
        TRACER.set(provider.tracer("arcface")).map_err(|_| {
            Failure::new(
                ExitCode::Failed,
                "traces of this process are already sent elsewhere",
            )
        })?;
        Ok(Self {
            provider,
            failing,
            runtime: Some(runtime),
        })
    }
}

impl fmt::Debug for Traces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Traces")
            .field("failing", &self.failing)
            .finish_non_exhaustive()
    }
}

impl Drop for Traces {
    fn drop(&mut self) {
        // A collector that did not answer is not waited for again.
        if !self.failing.load(Ordering::Relaxed)
            && let Err(error) = self.provider.shutdown_with_timeout(LAST)
        {
            warn!("the last traces are lost: {error}");
        }
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Says once that spans are lost.
#[derive(Debug)]
struct Watched {
    exporter: SpanExporter,
    failing: Arc<AtomicBool>,
    warned: AtomicBool,
}

impl Exporter for Watched {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let sent = self.exporter.export(batch).await;
        self.failing.store(sent.is_err(), Ordering::Relaxed);
        if let Err(error) = &sent
            && !self.warned.swap(true, Ordering::Relaxed)
        {
            warn!("traces are lost, the work goes on (said once): {error}");
        }
        sent
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

/// Whether it is `http://HOST:PORT` or `https://HOST:PORT`.
fn check(url: &str) -> Result<(), &'static str> {
    let shape = "is not http://HOST:PORT or https://HOST:PORT";
    let rest = url
        .strip_prefix("http://")
        .or_else(|| url.strip_prefix("https://"))
        .ok_or(shape)?;
    let authority = rest.strip_suffix('/').unwrap_or(rest);
    let (host, port) = authority.rsplit_once(':').ok_or(shape)?;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._:[]".contains(&byte);
    let valid = !host.is_empty() && host.bytes().all(plain) && port.parse::<u16>().is_ok_and(|port| port > 0);
    valid.then_some(()).ok_or(shape)
}

fn exporter(url: &str) -> Result<SpanExporter, Box<dyn Error + Send + Sync>> {
    Ok(SpanExporter::builder()
        .with_tonic()
        .with_channel(channel(url)?)
        .with_timeout(SEND)
        .build()?)
}

/// A connection that is made when there is something to send. Every wait for the other side has its limit.
fn channel(url: &str) -> Result<Channel, tonic::transport::Error> {
    let mut endpoint = Endpoint::from_shared(url.to_owned())?
        .connect_timeout(CONNECT)
        .timeout(SEND);
    if url.starts_with("https:") {
        endpoint = endpoint.tls_config(ClientTlsConfig::new().with_native_roots().timeout(CONNECT))?;
    }
    Ok(endpoint.connect_lazy())
}

/// An error with its causes, in one line.
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_collector_has_a_host_and_a_port() {
        for good in [
            "http://127.0.0.1:4317",
            "http://collector:4317/",
            "https://otel.example.org:443",
            "http://[::1]:4317",
        ] {
            assert_eq!(check(good), Ok(()), "{good}");
        }
        for bad in [
            "collector:4317",
            "ftp://collector:4317",
            "http://",
            "http://collector",
            "http://:4317",
            "http://collector:0",
            "http://collector:70000",
            "http://collector:4318/v1/traces",
            "http://user@collector:4317",
            "http://a collector:4317",
            "unix:///run/otel",
            " http://collector:4317",
        ] {
            assert!(check(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_url_that_names_no_collector_is_a_mistake_of_the_command_line() {
        let otlp = |url: &str| Otlp {
            url: Some(url.to_owned()),
        };
        let refused = otlp("collector:4317")
            .start("test")
            .expect_err("it has no scheme");
        assert_eq!(refused.code, ExitCode::Usage);
        assert!(
            refused.message.contains("\"collector:4317\"") && refused.hint.contains("4317"),
            "{refused:?}"
        );
        assert!(otlp("").start("test").expect("nothing is named").is_none());
        assert!(otlp("").arguments().len() == 2 && Otlp::default().arguments().is_empty());
    }
}

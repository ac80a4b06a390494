//! Traces of a cluster as a collector gets them: a submit is one trace and a recovery is one, with the spans of all processes that
//! take part; and nobody waits for a collector.

use anyhow::{Context, Result, ensure};
use arcface_tests::{
    Certificates, Cluster, Finished, JobFile, Options, command,
    wait::{self, Seen},
    write_identities,
};
use nix::sys::signal::Signal;
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{KeyValue, any_value::Value},
    trace::v1::{Span, status::StatusCode},
};
use std::{
    fs,
    net::TcpListener,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use tokio::runtime::Runtime;
use tonic::{
    Request, Response, Status,
    transport::{Identity, Server, ServerTlsConfig, server::TcpIncoming},
};

const TRAINED: Duration = Duration::from_secs(240);
/// Spans are sent every second.
const SENT: Duration = Duration::from_secs(60);
/// The coordinator's times are whole milliseconds, those of the others are not.
const ROUNDED_NS: u64 = 1_000_000;

const COORDINATOR: &str = "arcface-coordinator";
const AGENT: &str = "arcface-agent";
const RANK: &str = "arcface-rank";

/// What agents and ranks add to a trace of two ranks: service, name, how often.
const PARTS: [(&str, &str, usize); 4] = [
    (AGENT, "spawn", 2),
    (RANK, "load data", 2),
    (RANK, "rendezvous", 2),
    (RANK, "load", 2),
];

/// A span and the service that sent it.
#[derive(Clone, Debug)]
struct Sent {
    service: String,
    span: Span,
}

impl Sent {
    fn is_root(&self, name: &str) -> bool {
        self.span.name == name && self.span.parent_span_id.is_empty()
    }

    fn is(&self, service: &str, name: &str) -> bool {
        self.service == service && self.span.name == name
    }

    fn has_failed(&self) -> bool {
        let status = self.span.status.as_ref();
        status.is_some_and(|status| status.code() == StatusCode::Error)
    }

    fn interval(&self) -> (u64, u64) {
        (self.span.start_time_unix_nano, self.span.end_time_unix_nano)
    }

    fn text(&self, key: &str) -> Option<String> {
        text(&self.span.attributes, key)
    }

    fn number(&self, key: &str) -> Option<i64> {
        match value(&self.span.attributes, key)? {
            Value::IntValue(number) => Some(number),
            _ => None,
        }
    }
}

fn value(attributes: &[KeyValue], key: &str) -> Option<Value> {
    let pair = attributes.iter().find(|pair| pair.key == key)?;
    pair.value.as_ref()?.value.clone()
}

fn text(attributes: &[KeyValue], key: &str) -> Option<String> {
    match value(attributes, key)? {
        Value::StringValue(text) => Some(text),
        _ => None,
    }
}

/// A collector that keeps everything, in the order in which it comes.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<Sent>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for process in request.into_inner().resource_spans {
            let service = text(&process.resource.unwrap_or_default().attributes, "service.name");
            let service = service.ok_or_else(|| Status::invalid_argument("a service has a name"))?;
            let spans = process.scope_spans.into_iter().flat_map(|scope| scope.spans);
            self.kept().extend(spans.map(|span| Sent {
                service: service.clone(),
                span,
            }));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    /// Starts one, with TLS if there are certificates; gives its URL.
    fn serve(&self, runtime: &Runtime, certificates: Option<&Certificates>) -> Result<String> {
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))?;
        let address = listener.local_addr()?;
        let mut server = Server::builder();
        if let Some(certificates) = certificates {
            let pem = |path| fs::read(path);
            let own = Identity::from_pem(
                pem(certificates.cert("server"))?,
                pem(certificates.key("server"))?,
            );
            server = server.tls_config(ServerTlsConfig::new().identity(own))?;
        }
        let service = TraceServiceServer::new(self.clone());
        runtime.spawn(
            server
                .add_service(service)
                .serve_with_incoming(TcpIncoming::from(listener)),
        );
        let scheme = if certificates.is_some() { "https" } else { "http" };
        Ok(format!("{scheme}://{address}"))
    }

    fn kept(&self) -> MutexGuard<'_, Vec<Sent>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a trace that begins with a span of this name and has these others: its first span, and all.
    fn trace(&self, root: &str, wanted: &[(&str, &str, usize)]) -> Result<(Sent, Vec<Sent>)> {
        wait::until(&format!("the trace {root:?}"), SENT, || {
            let kept = self.kept();
            let Some(first) = kept.iter().find(|sent| sent.is_root(root)) else {
                return Ok(Seen::NotYet("no such span".into()));
            };
            let same = |sent: &&Sent| sent.span.trace_id == first.span.trace_id;
            let trace: Vec<Sent> = kept.iter().filter(same).cloned().collect();
            let missing = wanted.iter().find(|(service, name, count)| {
                trace.iter().filter(|sent| sent.is(service, name)).count() != *count
            });
            Ok(match missing {
                None => Seen::Yes((first.clone(), trace)),
                Some(missing) => Seen::NotYet(format!("not {missing:?} in {trace:?}")),
            })
        })
    }

    /// What the processes are started with to find it.
    fn environment(url: &str) -> Vec<(String, String)> {
        vec![("OTEL_EXPORTER_OTLP_ENDPOINT".to_owned(), url.to_owned())]
    }
}

/// The coordinator's spans are these, one after the other from the trace's begin to its end.
fn check_stages(root: &Sent, trace: &[Sent], names: &[&str]) -> Result<()> {
    let mut stages: Vec<&Sent> = trace
        .iter()
        .filter(|sent| sent.service == COORDINATOR && !sent.is_root(&root.span.name))
        .collect();
    stages.sort_by_key(|stage| stage.interval());
    let found: Vec<&str> = stages.iter().map(|stage| stage.span.name.as_str()).collect();
    ensure!(found == names, "{found:?}");
    let mut reached = root.interval().0;
    for stage in stages {
        let (begin, end) = stage.interval();
        ensure!(
            begin == reached && begin <= end,
            "{stage:?} begins at {reached}: {trace:?}"
        );
        ensure!(stage.span.parent_span_id == root.span.span_id, "{stage:?}");
        reached = end;
    }
    ensure!(reached == root.interval().1, "{trace:?}");
    Ok(())
}

/// Spans of agents and ranks lie in the trace's time and say whose they are.
fn check_parts(root: &Sent, trace: &[Sent], job: &str, generation: i64) -> Result<()> {
    let (first, last) = root.interval();
    for part in trace.iter().filter(|sent| sent.service != COORDINATOR) {
        let (begin, end) = part.interval();
        ensure!(part.span.parent_span_id == root.span.span_id, "{part:?}");
        ensure!(
            first <= begin && begin <= end && end <= last + ROUNDED_NS,
            "{part:?} in {root:?}"
        );
        ensure!(
            part.text("job_id").as_deref() == Some(job) && part.number("generation") == Some(generation),
            "{part:?}"
        );
        ensure!(part.text("node").is_some_and(|node| !node.is_empty()), "{part:?}");
    }
    for (service, name, _) in PARTS {
        let parts = trace.iter().filter(|sent| sent.is(service, name));
        let mut ranks: Vec<_> = parts.filter_map(|part| part.number("rank")).collect();
        ranks.sort_unstable();
        ensure!(ranks == [0, 1], "{service} {name}: {ranks:?}");
    }
    Ok(())
}

#[test]
fn a_submit_is_one_trace_and_a_recovery_is_one() -> Result<()> {
    let runtime = Runtime::new()?;
    let collector = Collector::default();
    let url = collector.serve(&runtime, None)?;
    Cluster::run_in_environment(Options::default(), Collector::environment(&url), |cluster| {
        let id = cluster.submit(&JobFile {
            checkpoint_steps: 4,
            ..JobFile::tiny("traced").epochs(50_000)
        })?;
        cluster.wait_for_job(&id, "to have a checkpoint", TRAINED, |job| {
            job["checkpoint_step"].as_u64() >= Some(4)
        })?;
        let (submit, trace) = collector.trace("submit", &PARTS)?;
        check_stages(
            &submit,
            &trace,
            &["store", "plan", "rendezvous", "load", "first step"],
        )?;
        check_parts(&submit, &trace, &id, 1)?;
        ensure!(
            submit.text("job_id").as_deref() == Some(&id) && submit.number("generation") == Some(1),
            "{submit:?}"
        );
        ensure!(
            submit.text("reason").is_none() && !submit.has_failed(),
            "{submit:?}"
        );

        let (write, _) = collector.trace("write checkpoint", &[])?;
        let links: Vec<_> = write.span.links.iter().map(|link| &link.trace_id).collect();
        ensure!(
            links == [&submit.span.trace_id] && write.number("step") >= Some(4),
            "a checkpoint is a trace of its own, which names the one it came of: {write:?}"
        );
        let recovered = collector.kept().iter().any(|sent| sent.is_root("recovery"));
        ensure!(!recovered, "nothing has failed yet");

        let victim = cluster.rank_pids(&id)?.last().context("a rank")?.1;
        cluster.signal(victim, Signal::SIGKILL)?;
        let job = cluster.wait_for_job(&id, "to train again", TRAINED, |job| {
            job["recoveries"][0]["total_s"].is_number()
        })?;
        let (recovery, trace) = collector.trace("recovery", &PARTS)?;
        check_stages(
            &recovery,
            &trace,
            &["detect", "plan", "rendezvous", "load", "first step"],
        )?;
        check_parts(&recovery, &trace, &id, 2)?;
        ensure!(
            recovery.text("job_id").as_deref() == Some(&id)
                && recovery.number("generation") == Some(2)
                && !recovery.has_failed()
                && recovery.text("reason").as_deref() == job["recoveries"][0]["kind"].as_str()
                && recovery.text("cause").as_deref() == job["recoveries"][0]["reason"].as_str(),
            "{recovery:?} of {job}"
        );
        let (begin, end) = recovery.interval();
        let took = (end - begin) as f64 / 1e9;
        let total = job["recoveries"][0]["total_s"].as_f64().context("it has")?;
        ensure!(
            (took - total).abs() < 0.05,
            "the trace took {took} s, the recovery {total} s"
        );
        cluster.json(&["cancel", &id])?;
        Ok(())
    })
}

#[test]
fn a_collector_that_swallows_connections_holds_up_nobody() -> Result<()> {
    // Connections stay in its backlog for ever.
    let deaf = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}", deaf.local_addr()?);
    Cluster::run_in_environment(Options::default(), Collector::environment(&url), |cluster| {
        let id = cluster.submit(&JobFile::tiny("unheard"))?;
        cluster.wait_for_state(&id, "succeeded", TRAINED)?;
        let log = cluster.scratch().join("logs/coordinator.log");
        let warnings = || anyhow::Ok(fs::read_to_string(&log)?.matches("traces are lost").count());
        wait::until("the warning of the coordinator", SENT, || {
            Ok(match warnings()? {
                0 => Seen::NotYet("none".into()),
                _ => Seen::Yes(()),
            })
        })?;
        let id = cluster.submit(&JobFile::tiny("unheard_again"))?;
        cluster.wait_for_state(&id, "succeeded", TRAINED)?;
        let begin = Instant::now();
        cluster.end_coordinator(0, Signal::SIGTERM)?;
        let took = begin.elapsed();
        ensure!(took < Duration::from_secs(5), "its end took {took:?}");
        ensure!(warnings()? == 1, "it warns once");
        Ok(())
    })
}

#[test]
fn a_collector_with_tls_is_known_by_the_systems_authorities() -> Result<()> {
    let runtime = Runtime::new()?;
    let collector = Collector::default();
    let certificates = Certificates::make()?;
    let url = collector.serve(&runtime, Some(&certificates))?;
    let mut environment = Collector::environment(&url);
    let authority = certificates.cert("ca").to_string_lossy().into_owned();
    environment.push(("SSL_CERT_FILE".to_owned(), authority));
    let alone = Options {
        workers: 0,
        ..Options::default()
    };
    Cluster::run_in_environment(alone, environment, |cluster| {
        let id = cluster.submit(&JobFile::tiny("never_begun"))?;
        cluster.json(&["cancel", &id])?;
        let (submit, trace) = collector.trace("submit", &[])?;
        check_stages(&submit, &trace, &["store", "plan"])?;
        ensure!(
            submit.has_failed(),
            "it did not get to its first step: {submit:?}"
        );
        let status = submit.span.status.context("it has one")?;
        ensure!(status.message.contains("cancelled"), "{status:?}");
        Ok(())
    })
}

/// `run` gives its own coordinator and workers the same collector.
#[test]
fn a_run_on_this_machine_is_traced_with_its_evaluations() -> Result<()> {
    let runtime = Runtime::new()?;
    let collector = Collector::default();
    let url = collector.serve(&runtime, None)?;
    let scratch = tempfile::tempdir()?;
    write_identities(scratch.path(), "faces", 8, 8, 40)?;
    let job = JobFile {
        rec: "faces".into(),
        more: "[eval]\nverbose = 0\nval_targets = [\"synth\"]".into(),
        ..JobFile::tiny("traced_run").epochs(1)
    };
    let mut run = command("arcface-coordinator", scratch.path())?;
    run.arg("run")
        .arg(job.write(scratch.path())?)
        .args(["--nodes", "2", "--slots", "1", "--device", "cpu", "--otlp", &url]);
    Finished::of(run, TRAINED)?.expect(0)?;
    let (submit, trace) = collector.trace("submit", &PARTS)?;
    let id = submit.text("job_id").context("the job's id")?;
    check_parts(&submit, &trace, &id, 1)?;
    let (evaluation, _) = collector.trace("evaluation", &[])?;
    let links: Vec<_> = evaluation.span.links.iter().map(|link| &link.trace_id).collect();
    ensure!(
        evaluation.service == RANK
            && links == [&submit.span.trace_id]
            && evaluation.text("dataset").as_deref() == Some("synth")
            && evaluation.text("job_id").as_deref() == Some(&id)
            && evaluation.number("step") > Some(0),
        "{evaluation:?}"
    );
    Ok(())
}

#[test]
fn a_bad_url_is_refused_at_the_start() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    for (program, arguments) in [
        ("arcface-coordinator", ["serve", "--listen", "127.0.0.1:0"]),
        ("arcface-worker", ["--join", "127.0.0.1:1", "--device=cpu"]),
    ] {
        let mut refused = command(program, scratch.path())?;
        refused.args(arguments).args(["--otlp", "collector:4317"]);
        let refused = Finished::of(refused, SENT)?.expect(2)?;
        let (error, hint) = refused.stderr.split_once("hint: ").context("a hint")?;
        ensure!(
            error.contains("--otlp \"collector:4317\"") && hint.contains("http://127.0.0.1:4317"),
            "{}",
            refused.stderr
        );
    }
    Ok(())
}

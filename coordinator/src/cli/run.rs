//! `run`: one job on this machine, from nothing to a model. A coordinator in this process, workers beside it.

use super::connect::Coordinator;
use super::output::Output;
use super::progress::{Progress, View};
use super::serve::{LogArgs, parse_socket};
use super::submit::JobArgs;
use super::workers::{self, Plan, Workers};
use super::{Outcome, follow, say, words};
use crate::server::{self, ServeOptions, StoreUrl, Timers};
use crate::spec::JobFile;
use crate::telemetry::{self, LogFormat, LogSink};
use anyhow::Context;
use arcface_proto::failure::{ExitCode, Failure};
use arcface_proto::spec::JobSpec;
use arcface_proto::v1::{self, JobState};
use arcface_traces::Otlp;
use clap::Args;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

/// Longest wait for a cancelled job to end, and for the last metrics.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// Largest metrics page kept, in bytes.
const LARGEST_METRICS: u64 = 16 << 20;

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  arcface-coordinator run configs/demo_cpu.toml
  arcface-coordinator run job.toml --nodes 1 --slots 2 --set train.num_epoch=1

Logs, state and the last metrics go to the folder `run` below the job's output.")]
pub(super) struct RunArgs {
    #[command(flatten)]
    job: JobArgs,
    /// Workers to start
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    nodes: u32,
    /// Ranks that each worker runs at once
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    slots: u32,
    /// Folder where the job file's relative paths start [default: the current one]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// What the workers compute on: auto, cpu or cuda
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// Address of the status page and of /metrics while the job runs; port 0 takes a free one
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:0", value_parser = parse_socket)]
    metrics: SocketAddr,
    /// Address of /metrics of the first worker; each further one takes the next port [default: none serves any]
    #[arg(long, value_name = "IP:PORT", value_parser = parse_socket)]
    worker_metrics: Option<SocketAddr>,
    #[command(flatten)]
    otlp: Otlp,
    #[command(flatten)]
    log: LogArgs,
}

/// Where things lie.
struct Places {
    /// Where relative paths start.
    start: PathBuf,
    /// The job's output.
    output: PathBuf,
    /// Logs and state.
    run: PathBuf,
}

impl Places {
    fn of(dir: Option<&Path>, spec: &JobSpec) -> anyhow::Result<Self> {
        let dir = dir.unwrap_or(Path::new("."));
        let start = fs::canonicalize(dir).map_err(|error| {
            Failure::new(
                ExitCode::NotFound,
                format!("--dir {}: {}", dir.display(), error.kind()),
            )
        })?;
        let output = start.join(&spec.output);
        let run = output.join("run");
        fs::create_dir_all(&run).with_context(|| format!("create {}", run.display()))?;
        Ok(Self { start, output, run })
    }
}

pub(super) async fn run(args: RunArgs) -> anyhow::Result<Outcome> {
    let JobFile { wire, spec } = args.job.read()?;
    enough_slots(&spec, args.nodes, args.slots)?;
    own_resources(&args)?;
    let program = workers::find()?;
    let _traces = args.otlp.start("arcface-coordinator")?;
    let places = Places::of(args.dir.as_deref(), &spec)?;
    let log_path = places.run.join("coordinator.log");
    let log = File::create(&log_path).with_context(|| format!("create {}", log_path.display()))?;
    telemetry::start_logging(
        args.log.log_format.unwrap_or(LogFormat::Text),
        &args.log.log,
        LogSink::File(log),
    )?;

    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let running = server::start(ServeOptions {
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        metrics: Some(args.metrics),
        store: StoreUrl::Embedded(places.run.join("store")),
        advertise: None,
        tls: None,
        etcd_tls: None,
        address_file: None,
        timers: Timers::default(),
    })
    .await?;
    let (grpc, metrics) = (running.grpc, running.metrics);
    let status_page = running.status_page();
    let stop = running.stopper();
    let mut serving = pin!(running.wait());

    let coordinator = Coordinator::connect(&[grpc.to_string()], None).await?;
    end_leftovers(&coordinator).await?;
    let job = coordinator.submit(uuid::Uuid::new_v4().to_string(), wire).await?;
    let mut workers = Workers::start(&Plan {
        program,
        join: grpc,
        nodes: args.nodes,
        slots: args.slots,
        device: args.device,
        metrics: args.worker_metrics,
        otlp: args.otlp,
        directory: places.start.clone(),
        logs: places.run.clone(),
    })?;
    say(&format!(
        "running {} ({}) on {} with {} each",
        job.id,
        spec.name,
        words::count(args.nodes.into(), "worker"),
        words::count(args.slots.into(), "slot")
    ));
    if let Some(metrics) = metrics {
        say(&format!("metrics  http://{metrics}/metrics"));
    }
    if let Some(page) = status_page {
        say(&format!("status   {page}#/jobs/{}", job.id));
    }

    let mut server_ended = false;
    let mut view = Progress::new();
    let speaker = view.speaker();
    let ended: anyhow::Result<Option<v1::Job>> = {
        let mut followed = pin!(follow::follow(&coordinator, &job.id, &mut view));
        loop {
            tokio::select! {
                ended = &mut followed => break ended.map(Some),
                stopped = &mut serving => {
                    server_ended = true;
                    break stopped.and_then(|()| anyhow::bail!("the coordinator stopped by itself"));
                }
                worker = workers.next_ended() => {
                    let worker = worker.context("wait for a worker")?;
                    let slots_left = workers.len() as u64 * u64::from(args.slots);
                    if slots_left < u64::from(spec.min_world_size) {
                        let hint = format!("its whole log is {}", worker.log.display());
                        break Err(Failure::new(ExitCode::Failed, worker.describe()).hint(hint).into());
                    }
                    speaker.line(&worker.describe());
                }
                _ = interrupt.recv() => break Ok(None),
                _ = terminate.recv() => break Ok(None),
                _ = hangup.recv() => break Ok(None),
            }
        }
    };
    view.close();

    let evaluations = match &ended {
        Ok(Some(job)) => coordinator.evaluations(&job.id).await?,
        _ => {
            say("stopping the job and the workers");
            let reason = "`run` was stopped".to_owned();
            // Asked for politely; the workers are stopped either way.
            let _ = timeout(LAST_WORDS, coordinator.cancel(&job.id, reason)).await;
            Vec::new()
        }
    };
    let snapshot = places.run.join("metrics.prom");
    if let Some(metrics) = metrics {
        match timeout(LAST_WORDS, scrape(metrics)).await {
            Ok(Ok(page)) => {
                fs::write(&snapshot, page).with_context(|| format!("write {}", snapshot.display()))?
            }
            Ok(Err(error)) => say(&format!("the last metrics were not kept: {error:#}")),
            Err(_) => say("the last metrics were not kept: no answer"),
        }
    }
    workers.stop().await;
    drop(coordinator);
    stop.cancel();
    if !server_ended {
        serving.await?;
    }

    let Some(job) = ended? else {
        return Ok(Outcome::Interrupted);
    };
    for (name, path) in [
        ("model", places.output.join("model.safetensors")),
        ("log", places.output.join("training.log")),
        ("metrics", snapshot),
        ("details", places.run.clone()),
    ] {
        if path.exists() {
            say(&format!("{name:<8} {}", path.display()));
        }
    }
    let hint = format!(
        "the logs of coordinator and workers are in {}",
        places.run.display()
    );
    follow::conclude(&job, &evaluations, Output::Table, hint)
}

fn enough_slots(spec: &JobSpec, nodes: u32, slots: u32) -> Result<(), Failure> {
    let there_are = u64::from(nodes) * u64::from(slots);
    if there_are >= u64::from(spec.min_world_size) {
        return Ok(());
    }
    let nodes_needed = spec.min_world_size.div_ceil(slots);
    Err(Failure::new(
        ExitCode::Usage,
        format!(
            "the job wants {}, --nodes {nodes} --slots {slots} has {there_are}",
            words::count(spec.min_world_size.into(), "rank")
        ),
    )
    .hint(format!(
        "--nodes {nodes_needed}, or --set job.world_size={there_are}"
    )))
}

/// What the workers of one machine cannot share.
fn own_resources(args: &RunArgs) -> Result<(), Failure> {
    if args.device.as_deref() == Some("cuda") && args.nodes > 1 {
        return Err(Failure::new(
            ExitCode::Usage,
            format!("--nodes {} on one machine would share its GPUs", args.nodes),
        )
        .hint("--nodes 1 --slots N gives each of N ranks a GPU"));
    }
    let last = |first: SocketAddr| u32::from(first.port()) + args.nodes - 1;
    match args.worker_metrics {
        Some(first) if first.port() == 0 || last(first) > u32::from(u16::MAX) => Err(Failure::new(
            ExitCode::Usage,
            format!(
                "--worker-metrics {first}: there are no ports for {}",
                words::count(args.nodes.into(), "worker")
            ),
        )
        .hint("for example 127.0.0.1:9465")),
        _ => Ok(()),
    }
}

/// Jobs of an earlier `run` that was killed are not taken up again: this one has its own.
async fn end_leftovers(coordinator: &Coordinator) -> anyhow::Result<()> {
    let unfinished = [
        JobState::Queued,
        JobState::Starting,
        JobState::Running,
        JobState::Recovering,
    ];
    for job in coordinator.jobs(1000, &unfinished).await? {
        coordinator
            .cancel(&job.id, "its `run` ended before it".into())
            .await?;
    }
    Ok(())
}

/// The page at `/metrics`.
async fn scrape(address: SocketAddr) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect(address).await.context("connect")?;
    let request = format!("GET /metrics HTTP/1.0\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.context("ask")?;
    let mut answer = Vec::new();
    stream
        .take(LARGEST_METRICS)
        .read_to_end(&mut answer)
        .await
        .context("read")?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, page) = answer.split_once("\r\n\r\n").context("no page in the answer")?;
    let status = head.lines().next().unwrap_or_default();
    anyhow::ensure!(status.contains(" 200"), "answered {status:?}");
    Ok(page.to_owned())
}

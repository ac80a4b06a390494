//! `arcface-worker`: the agent of a node (`--join`), one training rank (`rank`, started by the agent) and the
//! offline tools. Parse, run, exit code; nothing else happens here.

mod allocator;

use anyhow::Context;
use arcface_proto::failure::{self, ExitCode, Failure};
use arcface_proto::types::NodeId;
use arcface_traces::Otlp;
use arcface_worker::agent::{self, AgentOptions, MemoryRoot, RankCommand};
use arcface_worker::channel::ClientTls;
use arcface_worker::device::{self, Device, DeviceChoice};
use arcface_worker::telemetry::{self, LogFormat};
use arcface_worker::tools;
use clap::{CommandFactory, Parser, Subcommand};
use nix::sys::signal::Signal;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tracing::{info, warn};

const EXAMPLES: &str = "\
Examples:
  arcface-worker --join 127.0.0.1:1234
  arcface-worker --join c1:1234,c2:1234 --slots 2 --data-root /data --output-root /train
  arcface-worker verify --network r50 --weights model.safetensors lfw.bin
  arcface-worker ijb --network r50 --weights model.safetensors --root /data/IJB_release --protocol ijbc
  arcface-worker networks";

#[derive(Parser, Debug)]
#[command(
    name = "arcface-worker",
    version,
    about = "Runs the training ranks of a node, and offline tools for models and data",
    after_help = EXAMPLES,
    args_conflicts_with_subcommands = true
)]
struct Cli {
    #[command(flatten)]
    agent: AgentArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(clap::Args, Debug)]
struct AgentArgs {
    /// Coordinators to join, tried in order.
    #[arg(
        long,
        value_name = "HOST:PORT",
        value_delimiter = ',',
        env = "ARCFACE_COORDINATOR"
    )]
    join: Vec<String>,
    #[command(flatten)]
    tls: ClientTls,
    /// What computes; `auto` is the GPUs where there are any that are fit to train on, else the CPU. `cuda` gives each rank one of the
    /// GPUs that `CUDA_VISIBLE_DEVICES` leaves, and says what is in the way.
    #[arg(long, value_enum, default_value = "auto", env = "ARCFACE_DEVICE")]
    device: DeviceChoice,
    /// Ranks that run at once [default: 1 on the CPU, one for each visible GPU with --device cuda].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096), env = "ARCFACE_SLOTS")]
    slots: Option<u32>,
    /// Compute threads of each rank; fewer leave cores for evaluations beside training, and for others [default: an equal
    /// share of the cores].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(MOST_THREADS)), env = "ARCFACE_THREADS_PER_RANK")]
    threads_per_rank: Option<u32>,
    /// Name of this node, unique in the cluster [default: host name and process id].
    #[arg(long, value_name = "ID", env = "ARCFACE_NODE_ID")]
    node_id: Option<NodeId>,
    /// Host at which the ranks of other nodes reach this one [default: the address that faces the coordinator].
    #[arg(long, value_name = "HOST", env = "ARCFACE_ADVERTISE")]
    advertise: Option<String>,
    /// Folder that jobs may read training data from; repeatable [default: any].
    #[arg(long, value_name = "DIR")]
    data_root: Vec<PathBuf>,
    /// Folder that jobs write to [default: the current directory, absolute paths anywhere].
    #[arg(long, value_name = "DIR", env = "ARCFACE_OUTPUT_ROOT")]
    output_root: Option<PathBuf>,
    /// Folder in this node's memory (a tmpfs) for copies of the state of jobs on several nodes; "none": it keeps no copies
    /// [default: /dev/shm where that is].
    #[arg(long, value_name = "DIR", env = "ARCFACE_MEMORY_ROOT")]
    memory_root: Option<PathBuf>,
    /// A training rank that makes no progress for so many seconds, and for five of its longest recent steps, is killed as hung; 0
    /// never. Waiting for data, evaluations, checkpoints and the start have limits of their own, of minutes.
    #[arg(long, value_name = "SECONDS", default_value_t = 5, env = "ARCFACE_HANG_AFTER")]
    hang_after: u32,
    /// On SIGTERM, how long jobs may take to make a checkpoint and leave this node; a second SIGTERM ends the wait.
    #[arg(long, value_name = "TIME", default_value = "20s", env = "ARCFACE_LEAVE")]
    leave: humantime::Duration,
    /// Folder of this worker alone that keeps which coordinators were replaced, so that none of them can command it after a
    /// restart either [default: that is forgotten at a restart].
    #[arg(long, value_name = "DIR", env = "ARCFACE_STATE_DIR")]
    state_dir: Option<PathBuf>,
    /// Serve Prometheus metrics of this node at this address.
    #[arg(long, value_name = "ADDR", env = "ARCFACE_WORKER_METRICS")]
    metrics: Option<SocketAddr>,
    #[command(flatten)]
    otlp: Otlp,
    /// How log lines on standard error are written.
    #[arg(long, value_enum, default_value = "text", env = "ARCFACE_LOG_FORMAT")]
    log_format: LogFormat,
    /// The process that started this one and that it does not outlive: `arcface-coordinator run`.
    #[arg(long, value_name = "PID", hide = true)]
    parent_pid: Option<i32>,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Embed images, or a tensor of images.
    Infer(tools::infer::InferArgs),
    /// Measure accuracy on verification sets (.bin).
    Verify(tools::verify::VerifyArgs),
    /// Measure IJB-B or IJB-C: 1:1 and 1:N.
    Ijb(tools::ijb::IjbArgs),
    /// Compare all images of a set with each other: TAR at very low FAR, as the MFR challenge measures.
    Mfr(tools::mfr::MfrArgs),
    /// Bring PyTorch weights into safetensors, checked against a network's names and shapes.
    Import(tools::import::ImportArgs),
    /// List the backbones.
    Networks(tools::networks::NetworksArgs),
    /// Write weights for other programs.
    Export(tools::export::ExportArgs),
    /// Inspect, verify, pack and make data sets.
    Data(tools::data::DataArgs),
    /// Measure parts of the training on this machine.
    Bench(tools::bench::BenchArgs),
    /// Print a completion script for a shell.
    Completions {
        /// Shell.
        shell: clap_complete::Shell,
    },
    /// One training process; the agent starts it.
    #[command(hide = true)]
    Rank(tools::rank::RankArgs),
}

fn main() -> std::process::ExitCode {
    // Usage errors end here with exit code 2 and clap's own hint.
    let cli = Cli::parse();
    match dispatch(cli) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            let (text, code) = failure::report(error.as_ref());
            eprintln!("{text}");
            std::process::ExitCode::from(code as u8)
        }
    }
}

/// Variables from which libraries take a number of threads. They panic, or end the process, where so many cannot be had.
const THREADS: [&str; 2] = ["RAYON_NUM_THREADS", device::THREADS_VARIABLE];
/// More than a machine has cores. The agent passes `--threads-per-rank` on by the second of these variables.
const MOST_THREADS: u32 = 4096;

fn check_threads() -> Result<(), Failure> {
    for variable in THREADS {
        // What is no number is ignored by those who read it.
        let value = std::env::var(variable).ok();
        let threads = device::told_threads(value.as_deref());
        if let Some(threads) = threads.filter(|threads| *threads > MOST_THREADS as usize) {
            let message = format!("{variable}: {threads} threads are more than {MOST_THREADS}");
            return Err(Failure::new(ExitCode::Usage, message).hint("unset it for one thread a core"));
        }
    }
    Ok(())
}

fn dispatch(cli: Cli) -> anyhow::Result<()> {
    check_threads()?;
    match &cli.command {
        // Its lines go to the agent's log and to the job's.
        Some(Command::Rank(_)) => telemetry::init_logs(LogFormat::Text, "info"),
        Some(_) => telemetry::init_logs(LogFormat::Text, "warn"),
        None => {}
    }
    match cli.command {
        None => join(cli.agent),
        Some(Command::Infer(args)) => tools::infer::run(args),
        Some(Command::Verify(args)) => tools::verify::run(args),
        Some(Command::Ijb(args)) => tools::ijb::run(args),
        Some(Command::Mfr(args)) => tools::mfr::run(args),
        Some(Command::Import(args)) => tools::import::run(args),
        Some(Command::Networks(args)) => tools::networks::run(args),
        Some(Command::Export(args)) => tools::export::run(args),
        Some(Command::Data(args)) => tools::data::run(args),
        Some(Command::Bench(args)) => tools::bench::run(args),
        Some(Command::Rank(args)) => tools::rank::run(args),
        Some(Command::Completions { shell }) => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "arcface-worker", &mut script);
            std::io::Write::write_all(&mut std::io::stdout(), &script).context("write to standard output")
        }
    }
}

/// Memory for copies. What was asked for must be there; without the usual one, a node does without copies.
fn memory_root(asked: Option<&Path>, node: &NodeId) -> anyhow::Result<Option<MemoryRoot>> {
    const USUAL: &str = "/dev/shm";
    match asked {
        Some(none) if none == Path::new("none") => Ok(None),
        Some(root) => MemoryRoot::open(root, node).map(Some),
        None => Ok(MemoryRoot::open(Path::new(USUAL), node)
            .inspect_err(|error| warn!("this node keeps no copies in memory: {error:#}"))
            .ok()),
    }
}

/// The reader of our output left (`| head`): it has what it wanted.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<std::io::Error>()
            .is_some_and(|io| io.kind() == std::io::ErrorKind::BrokenPipe)
    })
}

fn join(args: AgentArgs) -> anyhow::Result<()> {
    if args.join.is_empty() {
        let message = "nothing to do: neither --join nor a subcommand was given";
        return Err(Failure::new(ExitCode::Usage, message)
            .hint("arcface-worker --join HOST:PORT runs a node; arcface-worker --help lists the tools")
            .into());
    }
    for address in &args.join {
        check_address(address)?;
    }
    if let Some(parent) = args.parent_pid {
        tools::rank::end_with_parent(parent, Signal::SIGTERM)?;
    }
    args.tls.config()?;
    let hardware = device::resolve(args.device)?;
    let slots = hardware.slots(args.slots)?;
    telemetry::init_logs(args.log_format, "info");
    let _traces = args.otlp.start("arcface-agent")?;
    if args.device == DeviceChoice::Auto && hardware.device == Device::Cpu && device::nvidia_gpu_present() {
        warn!(
            "a GPU is present that cannot be trained on, so ranks compute on the CPU: --device cuda says why"
        );
    }
    for gpu in &hardware.gpus {
        info!("{gpu} serves one rank");
    }
    let output_root = match &args.output_root {
        Some(root) => {
            std::fs::create_dir_all(root)
                .with_context(|| format!("--output-root {}: cannot make the directory", root.display()))?;
            existing_directory("--output-root", root)?
        }
        None => String::new(),
    };
    let data_roots = args
        .data_root
        .iter()
        .map(|root| existing_directory("--data-root", root))
        .collect::<Result<_, _>>()?;
    let node_id = match args.node_id {
        Some(id) => id,
        None => default_node_id()?,
    };
    let mut rank_command = RankCommand::of_this_executable()?;
    rank_command.args.extend(args.tls.arguments());
    rank_command.threads = args.threads_per_rank;
    rank_command.args.extend(args.otlp.arguments());
    let options = AgentOptions {
        coordinators: args.join,
        tls: args.tls,
        memory_root: memory_root(args.memory_root.as_deref(), &node_id)?,
        node_id,
        advertise: args.advertise,
        slots,
        hardware,
        output_root,
        data_roots,
        hang_after: Some(Duration::from_secs(args.hang_after.into())).filter(|after| !after.is_zero()),
        rank_command,
        leave: args.leave.into(),
        state_dir: args.state_dir,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the runtime")?;
    runtime.block_on(async {
        if let Some(address) = args.metrics {
            telemetry::serve_metrics(address, &options.node_id)?;
        }
        let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("listen for Ctrl-C")?;
        let (stop, stopped) = mpsc::channel(2);
        let signals = async {
            loop {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
                // More than two say nothing new.
                let _full = stop.try_send(());
            }
        };
        tokio::select! {
            ended = agent::run(options, stopped) => ended,
            () = signals => Ok(()),
        }
    })
}

fn check_address(address: &str) -> Result<(), Failure> {
    let valid = address.rsplit_once(':').is_some_and(|(host, port)| {
        !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok_and(|port| port > 0)
    });
    match valid {
        true => Ok(()),
        false => Err(
            Failure::new(ExitCode::Usage, format!("--join: {address:?} is not HOST:PORT"))
                .hint("the coordinator listens at 127.0.0.1:1234 by default"),
        ),
    }
}

/// The directory as an absolute path without links.
fn existing_directory(flag: &str, path: &Path) -> Result<String, Failure> {
    let real = path.canonicalize().map_err(|error| {
        Failure::new(ExitCode::NotFound, format!("{flag} {}: {error}", path.display()))
            .hint("name a directory that exists on this node")
    })?;
    match (real.is_dir(), real.to_str()) {
        (true, Some(text)) => Ok(text.to_owned()),
        (true, None) => Err(Failure::new(
            ExitCode::Usage,
            format!("{flag} {}: the path is not UTF-8", real.display()),
        )),
        (false, _) => Err(Failure::new(
            ExitCode::Usage,
            format!("{flag} {}: is not a directory", real.display()),
        )),
    }
}

fn default_node_id() -> anyhow::Result<NodeId> {
    let host = nix::unistd::gethostname().context("read the host name")?;
    let host: String = host
        .to_string_lossy()
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || "-_.".contains(c) {
                c
            } else {
                '-'
            }
        })
        .take(100)
        .collect();
    Ok(format!("{host}-{}", std::process::id()).parse()?)
}

//! `plan`: the memory of one rank of a job, line by line, and whether it is there; if not, what would fit. Asks nobody and
//! opens no data: the arithmetic is `arcface_proto::memory`.

use super::render::{
    Align::{Left, Right},
    Table,
};
use super::submit::JobArgs;
use super::{Format, output, output::Output, say, words};
use crate::spec::JobFile;
use arcface_proto::failure::{ExitCode, Failure};
use arcface_proto::memory::fit::{self, Place, Proposal};
use arcface_proto::memory::{self, Account, Job, Line, Moment, size};
use arcface_proto::spec::{Elastic, JobSpec};
use clap::Args;
use serde_json::{Value, json};

/// What a caching allocator holds and cannot use, and what is not foreseen.
const CUDA_RESERVE: f64 = 0.08;
/// The heap of a process keeps holes between blocks of many sizes: up to 8 % above the account was measured in fp32, 16 % with bf16
/// that is computed in f32, where small networks take more than any reserve (docs/planning.md).
const CPU_RESERVE: f64 = 0.20;

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  arcface-coordinator plan configs/ms1mv3_r50.toml --gpus 8 --gpu-memory 32GB
  arcface-coordinator plan mine.toml --classes 2000000 --gpu-memory 80GiB --set head.sample_rate=0.1 --output json
  arcface-coordinator plan configs/demo_cpu.toml --classes 100 --device cpu --memory 16GiB

Ends with 1 if the job does not fit. Without a size of memory it only says what the job takes.")]
pub(super) struct PlanArgs {
    #[command(flatten)]
    job: JobArgs,
    /// Ranks, one a GPU or CPU slot; the global batch stays that of the file [default: job.world_size]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    gpus: Option<u32>,
    /// Memory of a GPU, with its unit: 80GiB, 32GB
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    gpu_memory: Option<u64>,
    /// What a rank computes with
    #[arg(long, value_enum, default_value_t)]
    device: Device,
    /// Memory for one rank on a CPU, with its unit
    #[arg(long, value_name = "SIZE", value_parser = size::parse, conflicts_with = "gpu_memory")]
    memory: Option<u64>,
    /// Share of it that is left free: what the allocator cannot use, and what is not foreseen [default: 8%, on a CPU 25%]
    #[arg(long, value_name = "PERCENT", value_parser = size::parse_percent)]
    reserve: Option<f64>,
    /// Identities, for a job whose head.num_classes is left out
    #[arg(long, value_name = "C", value_parser = clap::value_parser!(u32).range(1..))]
    classes: Option<u32>,
    #[command(flatten)]
    format: Format,
}

#[derive(Clone, Copy, Debug, Default, clap::ValueEnum)]
enum Device {
    /// A GPU
    #[default]
    Cuda,
    /// Cores
    Cpu,
}

/// The answer.
struct Plan<'a> {
    spec: &'a JobSpec,
    job: Job,
    device: memory::Device,
    ours: Account,
    reference: Account,
    room: Option<Room>,
    /// The fewest ranks that the job goes on with, and what each of them takes.
    shrunk: Option<(u32, u64)>,
    proposals: Vec<Proposal>,
    /// What a rank takes with every change at once, where none of them is enough.
    least: Option<u64>,
}

/// The memory that there is.
#[derive(Clone, Copy)]
struct Room {
    memory: u64,
    reserve: f64,
}

impl Room {
    fn usable(self) -> u64 {
        (self.memory as f64 * (1.0 - self.reserve)) as u64
    }
}

pub(super) fn run(args: &PlanArgs) -> anyhow::Result<()> {
    let JobFile { spec, .. } = args.job.read()?;
    let device = match args.device {
        Device::Cuda => memory::Device::Cuda,
        Device::Cpu => memory::Device::Cpu,
    };
    let memory = match (device, args.gpu_memory, args.memory) {
        (memory::Device::Cuda, size, None) | (memory::Device::Cpu, None, size) => size,
        (memory::Device::Cuda, _, Some(_)) => {
            return Err(usage("--memory is for ranks on a CPU", "--gpu-memory, or --device cpu").into());
        }
        (memory::Device::Cpu, Some(_), _) => {
            return Err(usage("--gpu-memory is for ranks on a GPU", "--memory is the CPU's").into());
        }
    };
    let room = memory.map(|memory| Room {
        memory,
        reserve: args.reserve.unwrap_or(match device {
            memory::Device::Cuda => CUDA_RESERVE,
            memory::Device::Cpu => CPU_RESERVE,
        }),
    });
    let plan = plan(&spec, classes(&spec, args.classes)?, args.gpus, device, room)?;
    match args.format.output {
        Output::Table => output::print(&table(&plan))?,
        Output::Json => output::print_json(&document(&plan))?,
    }
    judge(&plan)
}

fn usage(message: impl Into<String>, hint: impl Into<String>) -> Failure {
    Failure::new(ExitCode::Usage, message).hint(hint)
}

/// The identities: the file's, or those on the command line where it has none.
fn classes(spec: &JobSpec, typed: Option<u32>) -> Result<u32, Failure> {
    match (spec.head.num_classes, typed) {
        (Some(written), Some(typed)) if written != typed => Err(usage(
            format!("--classes {typed}: head.num_classes is {written} in the job file"),
            format!("--set head.num_classes={typed} changes it"),
        )),
        (Some(classes), _) | (None, Some(classes)) => Ok(classes),
        (None, None) => Err(usage(
            "head.num_classes: is left out in the job file, and no data set is opened here",
            "--classes with the number of identities; `arcface-worker data inspect` says it",
        )),
    }
}

fn plan(
    spec: &JobSpec,
    num_classes: u32,
    gpus: Option<u32>,
    device: memory::Device,
    room: Option<Room>,
) -> Result<Plan<'_>, Failure> {
    let world_size = gpus.unwrap_or(spec.world_size);
    let unknown = || {
        Failure::new(
            ExitCode::Failed,
            format!("no sizes of network {}", spec.model.network),
        )
    };
    let job = Job::of(spec, num_classes, world_size).ok_or_else(unknown)?;
    let place = |world_size, usable| Place {
        num_classes,
        world_size,
        device,
        usable,
    };
    let ours = memory::ours(&job, device);
    let usable = room.map_or(u64::MAX, Room::usable);
    let proposals = match ours.total() > usable {
        true => fit::proposals(spec, &place(world_size, usable)),
        false => Vec::new(),
    };
    let refused = ours.total() > usable && proposals.is_empty();
    let least = refused
        .then(|| fit::least(spec, &place(world_size, usable)))
        .flatten();
    let shrinks = matches!(spec.elastic, Elastic::Shrink | Elastic::Both) && spec.min_world_size < world_size;
    let shrunk = shrinks.then_some(spec.min_world_size).and_then(|fewest| {
        let takes = place(fewest, usable).takes(spec)?;
        Some((fewest, takes))
    });
    Ok(Plan {
        reference: memory::reference(&job, device),
        spec,
        job,
        device,
        ours,
        room,
        shrunk,
        proposals,
        least,
    })
}

impl Plan<'_> {
    fn usable(&self) -> Option<u64> {
        self.room.map(Room::usable)
    }

    fn fits(&self) -> Option<bool> {
        self.usable().map(|usable| self.ours.total() <= usable)
    }
}

/// The failure of a job that does not fit, and a warning of one that will not once it has shrunk.
fn judge(plan: &Plan<'_>) -> anyhow::Result<()> {
    let (Some(usable), Some(fits)) = (plan.usable(), plan.fits()) else {
        return Ok(());
    };
    if fits {
        if let Some((ranks, takes)) = plan.shrunk.filter(|(_, takes)| *takes > usable) {
            say(&format!(
                "warning: on {ranks} ranks (job.min_world_size) a rank takes {} and does not fit",
                words::bytes(takes)
            ));
        }
        return Ok(());
    }
    let unit = match plan.device {
        memory::Device::Cuda => "GPU",
        memory::Device::Cpu => "rank",
    };
    let message = format!(
        "job {}: takes {} a {unit} and has {}",
        output::clean(&plan.spec.name),
        words::bytes(plan.ours.total()),
        words::bytes(usable)
    );
    let hint = match (plan.proposals.first(), plan.least) {
        (Some(proposal), _) => format!("{} would fit", changes(proposal)),
        (None, Some(least)) => format!(
            "nothing in the job file makes it fit: with all changes at once, on as many ranks, it takes {}",
            words::bytes(least)
        ),
        (None, None) => "more memory, or fewer classes".to_owned(),
    };
    Err(Failure::new(ExitCode::Failed, message).hint(hint).into())
}

fn changes(proposal: &Proposal) -> String {
    let changes = proposal.changes.iter();
    let changes: Vec<String> = changes
        .map(|change| format!("{} = {}", change.field, change.value))
        .collect();
    changes.join(", ")
}

fn moment(moment: Moment) -> &'static str {
    match moment {
        Moment::Head => "between forward and backward, in the head",
        Moment::Backward => "on the way back through the network",
        Moment::Update => "in the update",
    }
}

fn table(plan: &Plan<'_>) -> String {
    let (spec, job) = (plan.spec, &plan.job);
    let mut text = format!(
        "{}: {}, {}, {}, {} head; {} classes, {} a rank; {} ranks of {} images (global batch {}{})\n\n",
        output::clean(&spec.name),
        spec.model.network,
        spec.train.precision.as_str(),
        spec.train.optimizer.as_str(),
        job.implementation.as_str(),
        job.num_classes,
        job.shard(),
        job.world_size,
        job.rows(),
        job.global_batch,
        match job.micro_batches() {
            1 => String::new(),
            n => format!(", {n} micro-batches"),
        }
    );
    let mut rows = Table::new(&[
        ("MEMORY OF A RANK", Left),
        ("OURS", Right),
        ("REFERENCE", Right),
        ("HOW", Left),
    ]);
    let of_reference = |line: &Line| plan.reference.of(line.part);
    let size = |bytes| {
        if bytes == 0 {
            "-".to_owned()
        } else {
            words::bytes(bytes)
        }
    };
    for line in &plan.ours.lines {
        let mark = if line.assumed { " *" } else { "" };
        rows.row([
            line.part.as_str().to_owned(),
            size(line.bytes),
            size(of_reference(line)),
            format!("{}{mark}", line.how),
        ]);
    }
    let only_there = plan.reference.lines.iter();
    for line in only_there.filter(|line| plan.ours.of(line.part) == 0) {
        rows.row([
            line.part.as_str().to_owned(),
            size(0),
            size(line.bytes),
            format!("reference: {}", line.how),
        ]);
    }
    rows.row([
        "total".to_owned(),
        size(plan.ours.total()),
        size(plan.reference.total()),
        format!("at the highest moment, {}", moment(plan.ours.moment)),
    ]);
    text += &rows.text();
    if plan.ours.lines.iter().any(|line| line.assumed) {
        text += "* with an assumed constant\n";
    }
    text += &verdict(plan);
    text
}

fn verdict(plan: &Plan<'_>) -> String {
    let mut text = String::new();
    let (Some(room), Some(fits)) = (plan.room, plan.fits()) else {
        return text;
    };
    let (total, usable) = (plan.ours.total(), room.usable());
    let mut line = |line: String| {
        text += &line;
        text.push('\n');
    };
    line(format!(
        "\n{} less {:.0} % reserve: {} usable",
        words::bytes(room.memory),
        100.0 * room.reserve,
        words::bytes(usable)
    ));
    match fits {
        true => line(format!("fits: {} free", words::bytes(usable - total))),
        false => line(format!("does not fit: {} too much", words::bytes(total - usable))),
    }
    if let Some((ranks, takes)) = plan.shrunk {
        let verdict = if takes <= usable { "fits" } else { "does not fit" };
        line(format!(
            "after losses, on {ranks} ranks (job.min_world_size): {}, {verdict}",
            words::bytes(takes)
        ));
    }
    if !plan.proposals.is_empty() {
        let mut table = Table::new(&[("WHAT WOULD FIT", Left), ("TOTAL", Right), ("", Left)]);
        for proposal in &plan.proposals {
            table.row([
                changes(proposal),
                words::bytes(proposal.total),
                proposal.notes.join("; "),
            ]);
        }
        text += &format!("\n{}", table.text());
    }
    text
}

fn document(plan: &Plan<'_>) -> Value {
    let account = |account: &Account| {
        let lines = account.lines.iter();
        let lines: Vec<Value> = lines
            .map(|line| {
                json!({
                    "name": line.part.as_str(), "bytes": line.bytes, "how": line.how, "assumed": line.assumed,
                })
            })
            .collect();
        let moments = account.moments.iter();
        let moments: serde_json::Map<String, Value> = moments
            .map(|(moment, total)| (moment.as_str().to_owned(), json!(total)))
            .collect();
        json!({
            "total_bytes": account.total(), "moment": account.moment.as_str(), "moments": moments, "lines": lines,
        })
    };
    let proposals = plan.proposals.iter();
    let proposals: Vec<Value> = proposals
        .map(|proposal| {
            let changes = proposal.changes.iter();
            let changes: serde_json::Map<String, Value> = changes
                .map(|change| (change.field.to_owned(), json!(change.value)))
                .collect();
            json!({
                "changes": changes, "total_bytes": proposal.total, "notes": proposal.notes,
                "world_size": proposal.world_size,
            })
        })
        .collect();
    let (spec, job) = (plan.spec, &plan.job);
    json!({
        "job": spec.name, "network": spec.model.network, "device": plan.device.as_str(),
        "world_size": job.world_size, "global_batch": job.global_batch, "rows": job.rows(),
        "micro_batches": job.micro_batches(), "num_classes": job.num_classes, "shard_classes": job.shard(),
        "sampled_classes": job.sampled(),
        "ours": account(&plan.ours), "reference": account(&plan.reference),
        "memory_bytes": plan.room.map(|room| room.memory), "reserve": plan.room.map(|room| room.reserve),
        "usable_bytes": plan.usable(), "fits": plan.fits(),
        "shrunk": plan.shrunk.map(|(ranks, takes)| json!({
            "world_size": ranks, "total_bytes": takes, "fits": plan.usable().map(|usable| takes <= usable),
        })),
        "proposals": proposals,
    })
}

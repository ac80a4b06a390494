//! How fast a whole training step of one rank is, from a batch of images to updated weights, and how much memory it
//! takes: alone, or against the plain trainer (fp32, a network of libtorch's operations as a trainer in Python runs it, a head that
//! materialises the logits).

use super::{
    Share, choice, comparison, memory,
    timing::{median, min, time, variation},
};
use crate::tools::place::PlaceArgs;
use crate::{
    data::{
        Batch, MicroBatch,
        augment::{Looks, appearance},
    },
    device,
    model::allocations::Allocations,
    rank::{
        captured::PASSES_BEFORE,
        setup::Prepared,
        step::{Says, Trainer},
    },
};
use arcface_proto::{
    convert,
    failure::{ExitCode, Failure},
    spec::{Augment, HeadImplementation, Optimizer, Precision},
    v1,
};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

/// Arguments of `bench step`.
#[derive(clap::Args, Debug)]
pub struct StepArgs {
    /// Network.
    #[arg(long, default_value = "r18")]
    network: String,
    /// Classes over all ranks.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..))]
    classes: u32,
    /// Ranks of the world whose first one runs, alone: with its shard of the classes, and with its own rows in place of the
    /// others'.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    world: u32,
    #[command(flatten)]
    place: PlaceArgs,
    /// Samples of the rank.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=65536))]
    batch: u32,
    /// Share of the classes used, in (0, 1].
    #[arg(long, visible_alias = "sample-rate", default_value_t = 1.0)]
    rate: f64,
    /// Arithmetic: fp32, bf16 or fp16.
    #[arg(long, default_value = "fp32", value_parser = choice::<Precision>)]
    precision: Precision,
    /// Which head: tiled or plain.
    #[arg(long, default_value = "tiled", value_parser = choice::<HeadImplementation>)]
    implementation: HeadImplementation,
    /// libtorch's operations alone for the network, in the layout that images come in: as a trainer in Python computes.
    #[arg(long)]
    plain_network: bool,
    /// On a GPU, run the network as CUDA graphs instead of launch by launch (train.cuda_graph).
    #[arg(long)]
    cuda_graph: bool,
    /// Change how the images look, as a GPU does it in a job with data.augment = "dali"; not on a CPU, whose images come changed.
    #[arg(long)]
    change_looks: bool,
    /// Update rule: sgd or adamw.
    #[arg(long, default_value = "sgd", value_parser = choice::<Optimizer>)]
    optimizer: Optimizer,
    /// Compute activations again in the backward pass instead of keeping them; some networks do in any case.
    #[arg(long)]
    gradient_checkpointing: bool,
    /// Measure the plain trainer too, in turn, and print the ratio of the times; --repetitions is the number of pairs.
    #[arg(long, value_parser = ["plain"])]
    against: Option<String>,
    /// Steps that count in each process of a comparison.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Threads; default: one a core.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Memory allocator of both sides of a comparison: "tuned" keeps freed memory and uses large pages, as in a job; "default" gives
    /// large blocks back to the system at once, as a trainer meets it that is started by hand.
    #[arg(long, default_value = "default", value_parser = ["default", "tuned"])]
    malloc: String,
}

impl StepArgs {
    /// What computes.
    pub(super) fn device(&self) -> &'static str {
        self.place.name()
    }

    /// True if two trainers are measured.
    pub(super) fn is_comparison(&self) -> bool {
        self.against.is_some()
    }
}

/// The result as JSON.
pub(super) fn measure(repetitions: u32, args: &StepArgs) -> anyhow::Result<Value> {
    match &args.against {
        None => alone(repetitions, args),
        Some(plain) => {
            let ours = arguments(args, args.precision, args.implementation);
            let mut other = arguments(args, Precision::Fp32, HeadImplementation::Plain);
            other.retain(|argument| argument != "--cuda-graph");
            other.push("--plain-network".to_owned());
            let mut result = comparison::compare(repetitions, &ours, &other, &args.malloc)?;
            result["against"] = plain.as_str().into();
            Ok(result)
        }
    }
}

fn alone(repetitions: u32, args: &StepArgs) -> anyhow::Result<Value> {
    if args.change_looks && args.place.name() == "cpu" {
        let message = "--change-looks is for a GPU: a CPU is given images that are changed already";
        return Err(Failure::new(ExitCode::Usage, message).into());
    }
    let threads = args.threads.map_or(device::cores(), usize::from);
    tch::set_num_threads(i32::try_from(threads).unwrap_or(1));
    let before = memory::resident();
    memory::forget_peak();
    let mut allocations = Allocations::begin();
    let mut trainer = trainer(repetitions, args)?;
    let rows = i64::from(args.batch);
    tch::manual_seed(1);
    // As the loader gives them.
    let images = match trainer.placement.gpu() {
        None => Tensor::rand([rows, 3, 112, 112], (Kind::Float, Device::Cpu)) * 2.0 - 1.0,
        Some(_) => device::pinned(Tensor::randint(
            256,
            [rows, 112, 112, 3],
            (Kind::Uint8, Device::Cpu),
        )),
    };
    let labels = Tensor::randint(i64::from(args.classes), [rows], (Kind::Int64, Device::Cpu));
    let mut stepped = 0;
    let mut step = |trainer: &mut Trainer| {
        let looks = trainer
            .placement
            .gpu()
            .filter(|_| args.change_looks)
            .and_then(|_| {
                let looks =
                    (0..u64::from(args.batch)).map(|image| appearance(Augment::Dali, 1, stepped, image));
                Looks::of(&looks.collect::<Vec<_>>())
            });
        let batch = Batch {
            images: images.shallow_clone(),
            looks,
            labels: labels.shallow_clone(),
            micro: MicroBatch {
                epoch: 0,
                step: stepped,
                micro: 0,
                first_position: 0,
                indices: (0..u64::from(args.batch)).collect(),
            },
        };
        trainer.step(stepped, &mut std::iter::once(Ok(batch)), Says::default())?;
        trainer.placement.wait();
        stepped += 1;
        Ok::<(), anyhow::Error>(())
    };
    for _ in 0..warm_up(args) {
        step(&mut trainer)?;
    }
    let times = time(repetitions, |_| step(&mut trainer))?;
    let process_peak = memory::peak();
    // A GPU's memory where it computes there.
    let peak = match trainer.placement.memory() {
        Some(memory) => Some(memory.peak),
        None => process_peak
            .zip(before)
            .map(|(peak, before)| peak.saturating_sub(before)),
    };
    let tensor_peak = allocations.take().peak;
    Ok(json!({
        "bench": "step", "network": args.network, "implementation": args.implementation.as_str(),
        "precision": args.precision.as_str(), "classes": args.classes, "batch": args.batch,
        "sample_rate": args.rate, "threads": threads, "state_bytes": state_bytes(&mut trainer), "peak_bytes": peak,
        "process_peak_bytes": process_peak, "tensor_peak_bytes": tensor_peak,
        "optimizer": args.optimizer.as_str(), "gradient_checkpointing": trainer.backbone.config().gradient_checkpointing,
        "change_looks": args.change_looks, "world": args.world, "cuda_graph": trainer.captured.graphs().is_some(), "median_ms": median(&times), "min_ms": min(&times), "variation": variation(&times),
        "samples_per_second": f64::from(args.batch) * 1e3 / median(&times),
    }))
}

/// Steps before the one that does not count: on a GPU the first ones are unlike the others (`rank/captured.rs`).
fn warm_up(args: &StepArgs) -> u32 {
    match args.place.name() {
        "cpu" => 0,
        _ => PASSES_BEFORE,
    }
}

/// The trainer of a job with these sizes, as a rank has it.
fn trainer(repetitions: u32, args: &StepArgs) -> anyhow::Result<Trainer> {
    let wire = v1::JobSpec {
        output: Some("bench".into()),
        job: Some(v1::JobSection {
            world_size: Some(args.world),
            ..Default::default()
        }),
        model: Some(v1::ModelSection {
            network: Some(args.network.clone()),
            gradient_checkpointing: args.gradient_checkpointing.then_some(true),
            ..Default::default()
        }),
        head: Some(v1::HeadSection {
            num_classes: Some(args.classes),
            sample_rate: Some(args.rate),
            implementation: Some(args.implementation.as_str().into()),
            ..Default::default()
        }),
        data: Some(v1::DataSection {
            rec: Some("synthetic".into()),
            num_image: Some(
                u64::from(args.batch) * u64::from(args.world) * u64::from(repetitions + 1 + warm_up(args)),
            ),
            ..Default::default()
        }),
        train: Some(v1::TrainSection {
            batch_size: Some(args.batch),
            num_epoch: Some(1),
            precision: Some(args.precision.as_str().into()),
            cuda_graph: Some(args.cuda_graph),
            optimizer: Some(args.optimizer.as_str().into()),
            // Random images teach nothing; a step that diverges would be measured as one that is left out.
            lr: Some(1e-6),
            ..Default::default()
        }),
        ..Default::default()
    };
    let spec = convert::job_spec(&wire).map_err(|violations| {
        let list: Vec<String> = violations.iter().map(ToString::to_string).collect();
        Failure::new(ExitCode::Usage, list.join("; "))
    })?;
    let placement = args.place.open(args.precision)?;
    let prepared = Prepared::open(spec, &[], placement)
        .map_err(|failure| Failure::new(ExitCode::Usage, failure.message).hint(failure.hint))?;
    let (mut trainer, _) = prepared.into_trainer(Box::new(Share {
        world_size: args.world,
    }))?;
    if args.plain_network {
        trainer.backbone.compute_plainly();
    }
    Ok(trainer)
}

/// Weights and optimizer state, of backbone and head.
fn state_bytes(trainer: &mut Trainer) -> usize {
    let bytes = |tensor: &Tensor| tensor.numel() * tensor.kind().elt_size_in_bytes();
    let head: usize = trainer.head.state().iter().map(|(_, tensor)| bytes(tensor)).sum();
    let params: usize = trainer.params.iter().map(bytes).sum();
    let optimizer = trainer.optimizer.state();
    let buffers: usize = optimizer
        .iter()
        .flat_map(|(_, tensors)| *tensors)
        .map(bytes)
        .sum();
    head + params + buffers
}

/// The arguments that measure one side.
fn arguments(args: &StepArgs, precision: Precision, implementation: HeadImplementation) -> Vec<String> {
    let mut arguments = vec!["step".to_owned()];
    let mut set = |flag: &str, value: String| arguments.extend([flag.to_owned(), value]);
    set("--network", args.network.clone());
    set("--implementation", implementation.as_str().into());
    set("--precision", precision.as_str().into());
    set("--classes", args.classes.to_string());
    set("--batch", args.batch.to_string());
    set("--rate", args.rate.to_string());
    set("--optimizer", args.optimizer.as_str().into());
    set("--repetitions", args.steps.to_string());
    set("--world", args.world.to_string());
    set("--device", args.place.name().to_owned());
    if let Some(threads) = args.threads {
        set("--threads", threads.to_string());
    }
    if args.cuda_graph {
        arguments.push("--cuda-graph".to_owned());
    }
    if args.gradient_checkpointing {
        arguments.push("--gradient-checkpointing".to_owned());
    }
    if args.change_looks {
        arguments.push("--change-looks".to_owned());
    }
    arguments
}

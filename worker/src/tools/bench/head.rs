//! How fast a step of the head is, and how much memory it takes: alone, or one head against another.

use super::{
    Share, choice, comparison, memory,
    timing::{median, min, time},
};
use crate::{
    device::{self, Placement},
    head::{self, Head, HeadConfig, tiled},
    optim::OptimizerConfig,
    tools::place::PlaceArgs,
};
use arcface_proto::{
    failure::{ExitCode, Failure},
    spec::{self, HeadImplementation, MarginGradient, Precision},
};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

/// Arguments of `bench head`.
#[derive(clap::Args, Debug)]
pub struct HeadArgs {
    /// Classes of the shard.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..))]
    classes: u32,
    /// Embedding size.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=65536))]
    dim: u32,
    /// Samples.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=65536))]
    batch: u32,
    /// Share of the classes used, in (0, 1].
    #[arg(long, visible_alias = "sample-rate", default_value_t = 1.0)]
    rate: f64,
    /// Arithmetic of the products: fp32 or bf16. The plain head always uses fp32.
    #[arg(long, default_value = "fp32", value_parser = choice::<Precision>)]
    precision: Precision,
    /// Which head: tiled or plain.
    #[arg(long, default_value = "tiled", value_parser = choice::<HeadImplementation>)]
    implementation: HeadImplementation,
    /// Measure this head too, in turn, and print the ratio of the times; --repetitions is the number of pairs.
    #[arg(long, value_parser = choice::<HeadImplementation>)]
    against: Option<HeadImplementation>,
    /// Steps that count in each process of a comparison.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    #[command(flatten)]
    place: PlaceArgs,
    /// Threads; default: one a core.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Memory allocator of both sides of a comparison: "tuned" keeps freed memory and uses large pages, as in a job; "default" gives
    /// large blocks back to the system at once, as a trainer meets it that is started by hand.
    #[arg(long, default_value = "default", value_parser = ["default", "tuned"])]
    malloc: String,
}

impl HeadArgs {
    /// What computes.
    pub(super) fn device(&self) -> &'static str {
        self.place.name()
    }

    /// True if two heads are measured.
    pub(super) fn is_comparison(&self) -> bool {
        self.against.is_some()
    }
}

/// The result as JSON.
pub(super) fn measure(repetitions: u32, args: &HeadArgs) -> anyhow::Result<Value> {
    if !(args.rate > 0.0 && args.rate <= 1.0) {
        let message = format!("--rate {} is not in (0, 1]", args.rate);
        return Err(Failure::new(ExitCode::Usage, message).into());
    }
    match args.against {
        Some(other) => compare(repetitions, args, other),
        None => alone(repetitions, args),
    }
}

fn alone(repetitions: u32, args: &HeadArgs) -> anyhow::Result<Value> {
    let threads = args.threads.map_or(device::cores(), usize::from);
    tch::set_num_threads(i32::try_from(threads).unwrap_or(1));
    let config = config(args, args.classes);
    let place = args.place.open(args.precision)?;
    tch::manual_seed(1);
    let (batch, dim) = (i64::from(args.batch), i64::from(args.dim));
    let embedding = place.take(&Tensor::randn([batch, dim], (Kind::Float, Device::Cpu)));
    // Code that is loaded when it is first used is not the head's memory: a small head goes first.
    let mut small = build(
        &HeadConfig {
            num_classes: 8,
            ..config.clone()
        },
        &place,
    );
    let labels = place.take(&Tensor::zeros([batch], (Kind::Int64, Device::Cpu)));
    for step in 0..2 {
        step_once(&mut *small, &embedding, &labels, args.batch, step)?;
    }
    drop(small);
    let before = memory::resident();
    let mut head = build(&config, &place);
    let arithmetic = match (args.implementation, place.gpu()) {
        (HeadImplementation::Tiled, None) => tiled::arithmetic(&config),
        (HeadImplementation::Tiled, Some(gpu)) => format!("kernels and libtorch, {}", gpu.arch),
        (HeadImplementation::Plain, _) => "libtorch fp32".to_owned(),
    };
    memory::forget_peak();
    let labels = Tensor::randint(i64::from(args.classes), [batch], (Kind::Int64, Device::Cpu));
    let labels = place.take(&labels);
    let times = time(repetitions, |step| {
        step_once(&mut *head, &embedding, &labels, args.batch, step.into())?;
        place.wait();
        Ok(())
    })?;
    // A GPU's memory where it computes there.
    let peak = match place.memory() {
        Some(memory) => Some(memory.peak),
        None => memory::peak()
            .zip(before)
            .map(|(peak, before)| peak.saturating_sub(before)),
    };
    let state: usize = head
        .state()
        .iter()
        .map(|(_, tensor)| tensor.numel() * tensor.kind().elt_size_in_bytes())
        .sum();
    Ok(json!({
        "bench": "head", "implementation": args.implementation.as_str(), "arithmetic": arithmetic,
        "classes": args.classes, "dim": args.dim, "batch": args.batch, "sample_rate": args.rate,
        "precision": args.precision.as_str(), "threads": threads, "state_bytes": state, "peak_bytes": peak,
        "median_ms": median(&times), "min_ms": min(&times),
    }))
}

fn config(args: &HeadArgs, num_classes: u32) -> HeadConfig {
    HeadConfig {
        num_classes,
        embedding_size: args.dim.into(),
        margin: [1.0, 0.5, 0.0],
        scale: 64.0,
        margin_gradient: MarginGradient::Reference,
        interclass_filtering_threshold: None,
        sample_rate: args.rate,
        seed: 1,
        optimizer: OptimizerConfig::Sgd {
            momentum: 0.9,
            weight_decay: 5e-4,
        },
        implementation: args.implementation,
        precision: args.precision,
        loss: spec::Loss::ArcFace,
    }
}

fn build(config: &HeadConfig, place: &Placement) -> Box<dyn Head> {
    head::build(config, 0, 1, place.of_head())
}

fn step_once(
    head: &mut dyn Head,
    embedding: &Tensor,
    labels: &Tensor,
    batch: u32,
    step: u64,
) -> anyhow::Result<()> {
    head.forward_backward(
        &mut Share { world_size: 1 },
        embedding,
        labels,
        &[batch],
        step,
        1.0,
    )?;
    head.update(0.1);
    Ok(())
}

/// Pairs of processes, ours and the other.
fn compare(pairs: u32, args: &HeadArgs, other: HeadImplementation) -> anyhow::Result<Value> {
    let [ours, plain] = [args.implementation, other].map(|implementation| arguments(args, implementation));
    let mut result = comparison::compare(pairs, &ours, &plain, &args.malloc)?;
    result["against"] = other.as_str().into();
    Ok(result)
}

/// The arguments that measure one side.
fn arguments(args: &HeadArgs, implementation: HeadImplementation) -> Vec<String> {
    let mut arguments = vec!["head".to_owned()];
    let mut set = |flag: &str, value: String| arguments.extend([flag.to_owned(), value]);
    set("--implementation", implementation.as_str().into());
    set("--precision", args.precision.as_str().into());
    set("--classes", args.classes.to_string());
    set("--dim", args.dim.to_string());
    set("--batch", args.batch.to_string());
    set("--rate", args.rate.to_string());
    set("--repetitions", args.steps.to_string());
    set("--device", args.place.name().to_owned());
    if let Some(threads) = args.threads {
        set("--threads", threads.to_string());
    }
    arguments
}

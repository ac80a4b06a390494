//! How fast a step of the head is, and how much memory it takes: alone, or one head against another.
//!
//! The two sides of a comparison run in processes of their own, in turn, so that neither's memory or allocator is
//! warm from the other and a disturbance of the machine meets both.

use super::{
    Alone, memory,
    timing::{median, min, time},
};
use crate::{
    device,
    head::{self, Head, HeadConfig, tiled},
    optim::OptimizerConfig,
};
use anyhow::{Context, ensure};
use arcface_proto::{
    failure::{ExitCode, Failure},
    spec::{self, Choice, HeadImplementation, MarginGradient, Precision},
};
use serde_json::{Value, json};
use std::{env, process::Command};
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
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// Share of the classes used, in (0, 1].
    #[arg(long, visible_alias = "sample-rate", default_value_t = 1.0)]
    rate: f64,
    /// Arithmetic of the products: fp32 or bf16. The plain head always uses fp32.
    #[arg(long, default_value = "fp32", value_parser = precision)]
    precision: Precision,
    /// Which head: tiled or plain.
    #[arg(long, default_value = "tiled", value_parser = implementation)]
    implementation: HeadImplementation,
    /// Measure this head too, in turn, and print the ratio of the times; --repetitions is the number of pairs.
    #[arg(long, value_parser = implementation)]
    against: Option<HeadImplementation>,
    /// Steps that count in each process of a comparison.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Threads; default: one a core.
    #[arg(long)]
    threads: Option<u16>,
    /// Memory allocator of both sides of a comparison: "default", or "tuned", which keeps freed memory and uses large
    /// pages.
    #[arg(long, default_value = "default", value_parser = ["default", "tuned"])]
    malloc: String,
}

impl HeadArgs {
    /// True if two heads are measured.
    pub(super) fn is_comparison(&self) -> bool {
        self.against.is_some()
    }
}

fn precision(name: &str) -> Result<Precision, String> {
    choice(name)
}

fn implementation(name: &str) -> Result<HeadImplementation, String> {
    choice(name)
}

fn choice<T: Choice>(name: &str) -> Result<T, String> {
    T::parse(name).ok_or_else(|| {
        let known: Vec<&str> = T::ALL.iter().map(|(known, _)| *known).collect();
        format!("is none of {}", known.join(", "))
    })
}

/// Environment of a tuned allocator (glibc): freed memory stays with the process and is mapped in large pages, so that
/// steps after the first meet no page faults.
const TUNED: [(&str, &str); 4] = [
    ("MALLOC_MMAP_THRESHOLD_", "17179869184"),
    ("MALLOC_TRIM_THRESHOLD_", "17179869184"),
    ("MALLOC_TOP_PAD_", "268435456"),
    ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),
];

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
    tch::manual_seed(1);
    let (batch, dim) = (i64::from(args.batch), i64::from(args.dim));
    let embedding = Tensor::randn([batch, dim], (Kind::Float, Device::Cpu));
    // Code that is loaded when it is first used is not the head's memory: a small head goes first.
    let mut small = build(&HeadConfig {
        num_classes: 8,
        ..config.clone()
    });
    let labels = Tensor::zeros([batch], (Kind::Int64, Device::Cpu));
    for step in 0..2 {
        step_once(&mut *small, &embedding, &labels, args.batch, step)?;
    }
    drop(small);
    let before = memory::resident();
    let mut head = build(&config);
    let arithmetic = match args.implementation {
        HeadImplementation::Tiled => tiled::arithmetic(&config),
        HeadImplementation::Plain => "libtorch fp32".to_owned(),
    };
    memory::forget_peak();
    let labels = Tensor::randint(i64::from(args.classes), [batch], (Kind::Int64, Device::Cpu));
    let times = time(repetitions, |step| {
        step_once(&mut *head, &embedding, &labels, args.batch, step.into())
    })?;
    let peak = memory::peak()
        .zip(before)
        .map(|(peak, before)| peak.saturating_sub(before));
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

fn build(config: &HeadConfig) -> Box<dyn Head> {
    head::build(config, 0, 1)
}

fn step_once(
    head: &mut dyn Head,
    embedding: &Tensor,
    labels: &Tensor,
    batch: u32,
    step: u64,
) -> anyhow::Result<()> {
    head.forward_backward(&mut Alone, embedding, labels, &[batch], step, 1.0)?;
    head.update(0.1);
    Ok(())
}

/// Pairs of processes, ours and the other.
fn compare(pairs: u32, args: &HeadArgs, other: HeadImplementation) -> anyhow::Result<Value> {
    let mut sides = [Vec::new(), Vec::new()];
    for _ in 0..pairs {
        for (side, implementation) in sides.iter_mut().zip([args.implementation, other]) {
            side.push(in_a_process(args, implementation)?);
        }
    }
    let [ours, plain] = sides;
    let number = |run: &Value, key: &str| run[key].as_f64().unwrap_or(f64::NAN);
    let all = |runs: &[Value], key: &str| -> Vec<f64> { runs.iter().map(|run| number(run, key)).collect() };
    let (ours_ms, plain_ms) = (all(&ours, "median_ms"), all(&plain, "median_ms"));
    let ratios: Vec<f64> = ours_ms
        .iter()
        .zip(&plain_ms)
        .map(|(ours, plain)| plain / ours)
        .collect();
    let peak = |runs: &[Value]| all(runs, "peak_bytes").into_iter().fold(f64::NAN, f64::max) as u64;
    let state = number(&ours[0], "state_bytes");
    Ok(json!({
        "bench": "head", "against": other.as_str(), "implementation": args.implementation.as_str(),
        "ratio": median(&ratios), "ratios": ratios,
        "ours_ms": median(&ours_ms), "plain_ms": median(&plain_ms),
        "ours_min_ms": min(&all(&ours, "min_ms")), "plain_min_ms": min(&all(&plain, "min_ms")),
        "ours_peak_bytes": peak(&ours), "plain_peak_bytes": peak(&plain), "state_bytes": state as u64,
        "ours_above_state": peak(&ours) as f64 / state - 1.0,
        "arithmetic": ours[0]["arithmetic"], "classes": args.classes, "dim": args.dim, "batch": args.batch,
        "sample_rate": args.rate, "precision": args.precision.as_str(), "threads": ours[0]["threads"],
        "malloc": args.malloc, "steps": args.steps,
    }))
}

/// One side of a pair: this program again.
fn in_a_process(args: &HeadArgs, implementation: HeadImplementation) -> anyhow::Result<Value> {
    let mut command = Command::new(env::current_exe().context("find this program")?);
    command
        .args(["bench", "head", "--output", "json"])
        .args([
            "--implementation",
            implementation.as_str(),
            "--precision",
            args.precision.as_str(),
        ])
        .args([
            "--classes",
            &args.classes.to_string(),
            "--dim",
            &args.dim.to_string(),
        ])
        .args([
            "--batch",
            &args.batch.to_string(),
            "--rate",
            &args.rate.to_string(),
        ])
        .args(["--repetitions", &args.steps.to_string()]);
    if let Some(threads) = args.threads {
        command.args(["--threads", &threads.to_string()]);
    }
    if args.malloc == "tuned" {
        command.envs(TUNED);
    }
    let output = command.output().context("start a process to measure in")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "measuring the {} head: {}: {}",
        implementation.as_str(),
        output.status,
        said.trim()
    );
    serde_json::from_slice(&output.stdout).context("read the measurement of a process")
}

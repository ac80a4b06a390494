//! `arcface-worker bench`: how fast one part of training runs on this machine, alone. Prints medians and minima over
//! repetitions after one that is not counted, with the sizes, the device and the threads they hold for.

use super::output::Output;
use crate::{
    checkpoint::{self, Checkpoint, PartKind, manifest},
    collective::{Collective, CollectiveError, ReduceOp},
    data::{self, Dataset, Epochs, Loader, LoaderOptions, synthetic::SyntheticFaces},
    head::{self, HeadConfig},
    model::{Backbone, BackboneConfig, DropoutDraw, ForwardMode},
    optim::OptimizerConfig,
};
use anyhow::Context;
use arcface_proto::{
    failure::{ExitCode, Failure},
    spec::{Augment, HeadImplementation, Loss, MarginGradient, Precision},
    types::ClassRange,
    v1::CheckpointManifest,
};
use serde_json::{Value, json};
use std::{
    io::{self, Write},
    path::PathBuf,
    sync::Arc,
    time::Instant,
};
use tch::{Device, Kind, Tensor};

/// Arguments of `bench`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    arcface-worker bench head --classes 100000 --batch 128 --output json\n  \
    arcface-worker bench backbone --network mbf --train")]
pub struct BenchArgs {
    /// What to measure.
    #[command(subcommand)]
    pub part: Part,
    /// Repetitions that count.
    #[arg(long, global = true, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub repetitions: u32,
    /// How to print the result.
    #[arg(long, global = true, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

/// What can be measured.
#[derive(clap::Subcommand, Debug)]
pub enum Part {
    /// One step of the head on one rank: loss, gradients and update.
    Head {
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
        #[arg(long, default_value_t = 1.0)]
        sample_rate: f64,
    },
    /// One forward pass of a network, with --train a backward pass as well.
    Backbone {
        /// Network.
        #[arg(long, default_value = "r18")]
        network: String,
        /// Images.
        #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
        batch: u32,
        /// Training mode, and the gradient of every parameter.
        #[arg(long)]
        train: bool,
    },
    /// Reading, decoding and augmenting batches; a repetition is one batch as training would wait for it.
    Loader {
        /// Training data: .rec, image folder, or "synthetic".
        #[arg(long, default_value = "synthetic")]
        data: String,
        /// Images of a batch.
        #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
        batch: u32,
        /// Decoding threads.
        #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=256))]
        threads: u16,
    },
    /// Writing, verifying and reading one head part.
    Checkpoint {
        /// Classes of the part.
        #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1..))]
        classes: u32,
        /// Embedding size.
        #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=65536))]
        dim: u32,
        /// Directory to write in; the disk that is measured.
        #[arg(long, default_value = ".")]
        dir: PathBuf,
    },
}

/// Runs `bench`.
pub fn run(args: BenchArgs) -> anyhow::Result<()> {
    let result = measure(&args)?;
    let text = match (args.output, &result) {
        (Output::Table, Value::Object(entries)) => entries
            .iter()
            .map(|(key, value)| format!("{key:20} {value}\n"))
            .collect(),
        _ => format!("{result:#}\n"),
    };
    io::stdout()
        .write_all(text.as_bytes())
        .context("write the result")
}

/// The result as a JSON object.
pub fn measure(args: &BenchArgs) -> anyhow::Result<Value> {
    let repetitions = args.repetitions;
    let mut result = match &args.part {
        Part::Head {
            classes,
            dim,
            batch,
            sample_rate,
        } => bench_head(repetitions, *classes, *dim, *batch, *sample_rate)?,
        Part::Backbone {
            network,
            batch,
            train,
        } => bench_backbone(repetitions, network, *batch, *train)?,
        Part::Loader { data, batch, threads } => bench_loader(repetitions, data, *batch, *threads)?,
        Part::Checkpoint { classes, dim, dir } => bench_checkpoint(repetitions, *classes, *dim, dir)?,
    };
    result["repetitions"] = repetitions.into();
    result["device"] = "cpu".into();
    result["torch_threads"] = tch::get_num_threads().into();
    Ok(result)
}

/// Milliseconds of each repetition of `work`, the first run not counted.
fn time(repetitions: u32, mut work: impl FnMut(u32) -> anyhow::Result<()>) -> anyhow::Result<Vec<f64>> {
    work(0)?;
    (1..=repetitions)
        .map(|repetition| {
            let begin = Instant::now();
            work(repetition)?;
            Ok(begin.elapsed().as_secs_f64() * 1e3)
        })
        .collect()
}

/// The middle value; the mean of the two middle ones of an even number. NaN for nothing.
fn median(times: &[f64]) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match (
        sorted.len() % 2,
        sorted.get(middle),
        middle.checked_sub(1).and_then(|m| sorted.get(m)),
    ) {
        (1, Some(&m), _) => m,
        (_, Some(&hi), Some(&lo)) => (lo + hi) / 2.0,
        _ => f64::NAN,
    }
}

fn min(times: &[f64]) -> f64 {
    times.iter().copied().fold(f64::INFINITY, f64::min)
}

fn bench_head(
    repetitions: u32,
    classes: u32,
    dim: u32,
    batch: u32,
    sample_rate: f64,
) -> anyhow::Result<Value> {
    if !(sample_rate > 0.0 && sample_rate <= 1.0) {
        return Err(Failure::new(
            ExitCode::Usage,
            format!("--sample-rate {sample_rate} is not in (0, 1]"),
        )
        .into());
    }
    let config = HeadConfig {
        num_classes: classes,
        embedding_size: dim.into(),
        margin: [1.0, 0.5, 0.0],
        scale: 64.0,
        margin_gradient: MarginGradient::Reference,
        interclass_filtering_threshold: None,
        sample_rate,
        seed: 1,
        optimizer: OptimizerConfig::Sgd {
            momentum: 0.9,
            weight_decay: 5e-4,
        },
        implementation: HeadImplementation::Plain,
        loss: Loss::ArcFace,
    };
    let mut head = head::build(&config, 0, 1);
    tch::manual_seed(1);
    let embedding = Tensor::randn([batch.into(), dim.into()], (Kind::Float, Device::Cpu));
    let labels = Tensor::randint(classes.into(), [i64::from(batch)], (Kind::Int64, Device::Cpu));
    let times = time(repetitions, |repetition| {
        head.forward_backward(&mut Alone, &embedding, &labels, &[batch], repetition.into(), 1.0)?;
        head.update(0.1);
        Ok(())
    })?;
    let state: usize = head
        .state()
        .iter()
        .map(|(_, t)| t.numel() * t.kind().elt_size_in_bytes())
        .sum();
    Ok(json!({
        "bench": "head", "implementation": "plain", "classes": classes, "dim": dim, "batch": batch,
        "sample_rate": sample_rate, "state_bytes": state, "median_ms": median(&times), "min_ms": min(&times),
    }))
}

fn bench_backbone(repetitions: u32, network: &str, batch: u32, train: bool) -> anyhow::Result<Value> {
    let mut backbone = Backbone::new(&BackboneConfig::new(network, 512))
        .map_err(|error| Failure::new(ExitCode::Usage, error.to_string()))?;
    backbone.init_random(1);
    let images = Tensor::rand([batch.into(), 3, 112, 112], (Kind::Float, Device::Cpu)) * 2.0 - 1.0;
    let times = time(repetitions, |_| {
        if train {
            let mode = ForwardMode::training(Precision::Fp32, DropoutDraw::default());
            backbone
                .forward(&images, &mode)
                .square()
                .mean(Kind::Float)
                .backward();
            for (_, parameter) in backbone.trainable() {
                parameter.shallow_clone().zero_grad();
            }
        } else {
            drop(tch::no_grad(|| {
                backbone.forward(&images, &ForwardMode::evaluation(Precision::Fp32))
            }));
        }
        Ok(())
    })?;
    Ok(json!({
        "bench": "backbone", "network": network, "batch": batch, "train": train, "precision": "fp32",
        "parameters": backbone.num_parameters(), "median_ms": median(&times), "min_ms": min(&times),
        "images_per_second": f64::from(batch) * 1e3 / median(&times),
    }))
}

fn bench_loader(repetitions: u32, data: &str, batch: u32, threads: u16) -> anyhow::Result<Value> {
    let steps = u64::from(repetitions) + 1;
    let dataset: Arc<dyn Dataset> = match data {
        data::synthetic::NAME => Arc::new(SyntheticFaces::new(1, 1000, steps * u64::from(batch))),
        path => data::open_path(path.as_ref(), None)?,
    };
    let description = dataset.describe();
    // A small data set is read in several epochs.
    let plan = Epochs::new(dataset.len(), batch.into(), 1)?.plan(0, 1, batch, 0..steps);
    let options = LoaderOptions {
        threads: threads.into(),
        augment: Augment::Flip,
        seed: 1,
        prefetch: 4,
    };
    let mut loader = Loader::new(dataset, plan, options);
    let begin = Instant::now();
    let times = time(repetitions, |_| {
        loader.next().context("the loader ended early")??;
        Ok(())
    })?;
    let all = begin.elapsed().as_secs_f64();
    Ok(json!({
        "bench": "loader", "data": description, "batch": batch, "threads": threads,
        "median_ms": median(&times), "min_ms": min(&times),
        // Of all batches and the whole time: single waits say little while others are being prepared.
        "images_per_second": steps as f64 * f64::from(batch) / all,
    }))
}

fn bench_checkpoint(
    repetitions: u32,
    classes: u32,
    dim: u32,
    dir: &std::path::Path,
) -> anyhow::Result<Value> {
    let range = ClassRange { lo: 0, hi: classes };
    let rows = || Tensor::rand([classes.into(), dim.into()], (Kind::Float, Device::Cpu));
    let tensors = [("weight".to_owned(), rows()), ("momentum".to_owned(), rows())];
    let scratch = dir.join(format!(".bench-checkpoint-{}", std::process::id()));
    let remove = Scratch(scratch.clone());
    let mut bytes = 0;
    let write = time(repetitions, |_| {
        bytes = checkpoint::write_part(&scratch, PartKind::Head(range), &tensors)?.bytes;
        Ok(())
    })?;
    let parts = vec![
        checkpoint::write_part(&scratch, PartKind::Backbone, &[])?,
        checkpoint::write_part(&scratch, PartKind::Head(range), &tensors)?,
    ];
    let manifest = CheckpointManifest {
        format: manifest::FORMAT,
        num_classes: classes,
        parts,
        ..Default::default()
    };
    let checkpoint = Checkpoint::open(&scratch, manifest)?;
    let verify = time(repetitions, |_| Ok(checkpoint.verify()?))?;
    let read = time(repetitions, |_| {
        checkpoint.head_rows(range)?;
        Ok(())
    })?;
    drop(remove);
    Ok(json!({
        "bench": "checkpoint", "classes": classes, "dim": dim, "bytes": bytes,
        "write_median_ms": median(&write), "write_min_ms": min(&write),
        "verify_median_ms": median(&verify), "verify_min_ms": min(&verify),
        "read_median_ms": median(&read), "read_min_ms": min(&read),
    }))
}

/// A directory that goes when the benchmark does, also after an error.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed stays in sight of the user, who chose the place.
        drop(std::fs::remove_dir_all(&self.0));
    }
}

/// The communicator of a single rank: what others would add is nothing.
struct Alone;

impl Collective for Alone {
    fn rank(&self) -> u32 {
        0
    }

    fn world_size(&self) -> u32 {
        1
    }

    fn all_reduce(&mut self, _: &mut Tensor, _: ReduceOp) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn all_gather(&mut self, local: &Tensor) -> Result<Tensor, CollectiveError> {
        Ok(local.copy())
    }

    fn reduce_scatter(&mut self, full: &Tensor) -> Result<Tensor, CollectiveError> {
        Ok(full.copy())
    }

    fn broadcast(&mut self, _: &mut Tensor, _: u32) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        args: BenchArgs,
    }

    fn bench(line: &str) -> anyhow::Result<Value> {
        measure(&Cli::try_parse_from(line.split(' ')).expect("valid").args)
    }

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn every_part_can_be_measured() {
        let dir = tempfile::tempdir().expect("scratch");
        let checkpoint = format!(
            "bench checkpoint --classes 20 --dim 8 --repetitions 2 --dir {}",
            dir.path().display()
        );
        for (line, key) in [
            (
                "bench head --classes 50 --dim 8 --batch 4 --sample-rate 0.5 --repetitions 2",
                "median_ms",
            ),
            (
                "bench backbone --network tiny --batch 2 --repetitions 1",
                "images_per_second",
            ),
            (
                "bench backbone --network tiny --batch 2 --train --repetitions 1",
                "images_per_second",
            ),
            ("bench loader --batch 2 --repetitions 2", "images_per_second"),
            (checkpoint.as_str(), "read_median_ms"),
        ] {
            let result = bench(line).unwrap_or_else(|error| panic!("{line}: {error:#}"));
            assert!(
                result[key].as_f64().is_some_and(|value| value > 0.0),
                "{line}: {result}"
            );
            assert_eq!(
                (&result["device"], &result["bench"]),
                (&json!("cpu"), &json!(line.split(' ').nth(1)))
            );
        }
        assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), 0);
    }

    #[test]
    fn what_cannot_be_measured_is_a_usage_error() {
        for line in ["bench head --sample-rate 0", "bench backbone --network nosuch"] {
            let error = bench(line).expect_err("refused");
            assert!(
                error
                    .downcast_ref::<Failure>()
                    .is_some_and(|f| f.code == ExitCode::Usage),
                "{error:#}"
            );
        }
    }
}

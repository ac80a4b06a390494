//! `arcface-worker bench`: how fast one part of training runs on this machine, alone. Prints medians and minima over
//! repetitions after one that is not counted, with the sizes, the device and the threads they hold for.

mod backbone;
mod checkpoint;
mod collective;
mod comparison;
mod head;
mod ijb;
mod loader;
mod memory;
mod scratch;
mod step;
mod table;
mod timing;

use super::output::Output;
use crate::collective::{Collective, CollectiveError, ReduceOp};
use anyhow::Context;
use arcface_proto::spec::Choice;
use serde_json::Value;
use std::{
    io::{self, Write},
    path::PathBuf,
    time::SystemTime,
};
use tch::Tensor;

/// Arguments of `bench`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    arcface-worker bench head --classes 100000 --batch 128 --against plain --output json\n  \
    arcface-worker bench step --network r18 --classes 100000 --precision bf16 --against plain\n  \
    arcface-worker bench backbone --network mbf --train\n  \
    arcface-worker bench table --device cuda --output json\n  \
    arcface-worker bench collective --ranks 2\n  \
    arcface-worker bench ijb --dir /tmp --output json")]
pub struct BenchArgs {
    /// What to measure.
    #[command(subcommand)]
    pub part: Part,
    /// Repetitions that count; default 10, 5 pairs of a comparison, 1 of ijb (where every one counts).
    #[arg(long, global = true, value_parser = clap::value_parser!(u32).range(1..))]
    pub repetitions: Option<u32>,
    /// How to print the result.
    #[arg(long, global = true, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

/// What can be measured.
#[derive(clap::Subcommand, Debug)]
pub enum Part {
    /// One step of the head on one rank: loss, gradients and update.
    Head(head::HeadArgs),
    /// One forward pass of a network, with --train a backward pass as well.
    Backbone(backbone::BackboneArgs),
    /// One training step of one rank, from images to updated weights.
    Step(step::StepArgs),
    /// Samples a second and memory of each GPU for millions of identities over eight GPUs, by way of training: the share of
    /// one of them.
    Table(table::TableArgs),
    /// The operations between ranks of this machine: over loopback, or between its GPUs.
    Collective(collective::CollectiveArgs),
    /// Reading, decoding and augmenting batches; a repetition is one batch as training would wait for it.
    Loader(loader::LoaderArgs),
    /// The 1:1 numbers of a drawn benchmark of IJB-C's size: wall time by phase and peak memory.
    Ijb(ijb::IjbArgs),
    /// One head part: the copy that training waits for, writing (with the reading again), digest, verifying and reading.
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
    let is_comparison = match &args.part {
        Part::Head(args) => args.is_comparison(),
        Part::Step(args) => args.is_comparison(),
        _ => false,
    };
    let usual = match &args.part {
        Part::Ijb(_) => 1,
        _ if is_comparison => 5,
        _ => 10,
    };
    let repetitions = args.repetitions.unwrap_or(usual);
    let mut result = match &args.part {
        Part::Head(args) => head::measure(repetitions, args)?,
        Part::Backbone(args) => backbone::measure(repetitions, args)?,
        Part::Step(args) => step::measure(repetitions, args)?,
        Part::Table(args) => table::measure(repetitions, args)?,
        Part::Collective(args) => collective::measure(repetitions, args)?,
        Part::Loader(args) => loader::measure(repetitions, args)?,
        Part::Ijb(args) => ijb::measure(repetitions, args)?,
        Part::Checkpoint { classes, dim, dir } => checkpoint::measure(repetitions, *classes, *dim, dir)?,
    };
    result["repetitions"] = repetitions.into();
    let device = match &args.part {
        Part::Head(args) => args.device(),
        Part::Backbone(args) => args.device(),
        Part::Step(args) => args.device(),
        Part::Table(args) => args.device(),
        Part::Collective(args) => args.device(),
        _ => "cpu",
    };
    result["device"] = device.into();
    result["date"] = humantime::format_rfc3339_seconds(SystemTime::now())
        .to_string()
        .into();
    result["torch_threads"] = tch::get_num_threads().into();
    Ok(result)
}

/// A setting by the name that job files have for it.
fn choice<T: Choice>(name: &str) -> Result<T, String> {
    T::parse(name).ok_or_else(|| {
        let known: Vec<&str> = T::ALL.iter().map(|(known, _)| *known).collect();
        format!("is none of {}", known.join(", "))
    })
}

/// The communicator of the first rank of a world that runs alone. The others have what it has: gathered rows are its own
/// again and again, and sums are left as they are.
struct Share {
    world_size: u32,
}

impl Collective for Share {
    fn rank(&self) -> u32 {
        0
    }

    fn world_size(&self) -> u32 {
        self.world_size
    }

    fn all_reduce(&mut self, _: &mut Tensor, _: ReduceOp) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn all_gather(&mut self, local: &Tensor) -> Result<Tensor, CollectiveError> {
        let rows: Vec<&Tensor> = (0..self.world_size).map(|_| local).collect();
        Ok(Tensor::cat(&rows, 0))
    }

    fn reduce_scatter(&mut self, full: &Tensor) -> Result<Tensor, CollectiveError> {
        Ok(full
            .narrow(0, 0, full.size()[0] / i64::from(self.world_size))
            .copy())
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
    use arcface_proto::failure::{ExitCode, Failure};
    use clap::Parser;
    use serde_json::json;

    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        args: BenchArgs,
    }

    fn bench(line: &str) -> anyhow::Result<Value> {
        measure(&Cli::try_parse_from(line.split(' ')).expect("valid").args)
    }

    #[test]
    fn every_part_can_be_measured() {
        let dir = tempfile::tempdir().expect("scratch");
        let checkpoint = format!(
            "bench checkpoint --classes 20 --dim 8 --repetitions 2 --dir {}",
            dir.path().display()
        );
        let ijb = format!(
            "bench ijb --images 300 --templates 60 --pairs 500 --dim 8 --bootstrap 5 --identification --dir {}",
            dir.path().display()
        );
        for (line, key) in [
            (ijb.as_str(), "median_ms"),
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
            (
                "bench backbone --network tiny --batch 2 --train --gradient-checkpointing --repetitions 1",
                "images_per_second",
            ),
            (
                "bench step --network tiny --classes 30 --batch 4 --precision bf16 --rate 0.5 --repetitions 2",
                "samples_per_second",
            ),
            (
                "bench step --network tiny --classes 40 --batch 4 --world 4 --repetitions 2",
                "samples_per_second",
            ),
            (
                "bench collective --ranks 3 --mib 1 --repetitions 2",
                "all_reduce_gb_per_second",
            ),
            ("bench collective --ranks 1 --mib 1 --repetitions 1", "bytes"),
            ("bench loader --batch 2 --repetitions 2", "images_per_second"),
            (
                "bench loader --batch 2 --augment dali --form pixels --repetitions 2",
                "images_per_second",
            ),
            (checkpoint.as_str(), "copy_median_ms"),
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
        for line in [
            "bench head --sample-rate 0",
            "bench backbone --network nosuch",
            "bench step --network nosuch",
            "bench step --rate 2",
            "bench step --network tiny --device cuda",
            "bench head --device cuda",
            "bench backbone --device cuda",
            "bench table --scale 0",
            "bench collective --backend nccl",
        ] {
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

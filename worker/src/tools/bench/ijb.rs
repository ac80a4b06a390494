//! How long the numbers of IJB-C take, and how much memory, on a drawn benchmark of the real size.

use super::{
    memory,
    scratch::Scratch,
    timing::{median, min},
};
use crate::eval::ijb::{
    Benchmark, FeatureFile, Layout, Options, Phase, Protocol, Settings, evaluate,
    synthetic::{self, Sizes},
};
use anyhow::Context;
use serde_json::{Map, Value, json};
use std::{
    path::{Path, PathBuf},
    time::Instant,
};

/// Arguments of `bench ijb`.
#[derive(clap::Args, Debug)]
pub struct IjbArgs {
    /// Images; the defaults are IJB-C's sizes.
    #[arg(long, default_value_t = Sizes::IJBC.images, value_parser = clap::value_parser!(u32).range(1..=1 << 28))]
    images: u32,
    /// Templates.
    #[arg(long, default_value_t = Sizes::IJBC.templates, value_parser = clap::value_parser!(u32).range(12..=1 << 24))]
    templates: u32,
    /// Comparisons.
    #[arg(long, default_value_t = Sizes::IJBC.pairs, value_parser = clap::value_parser!(u32).range(100..))]
    pairs: u32,
    /// Embedding size.
    #[arg(long, default_value_t = Sizes::IJBC.dim, value_parser = clap::value_parser!(u32).range(1..=65536))]
    dim: u32,
    /// Measure 1:N as well.
    #[arg(long)]
    identification: bool,
    /// Repetitions of the bootstrap.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(0..=100_000))]
    bootstrap: u32,
    /// Folder to draw the benchmark in (2.2 GB at the default sizes); it is removed afterwards.
    #[arg(long, default_value = ".")]
    dir: PathBuf,
}

/// The result as JSON.
pub(super) fn measure(repetitions: u32, args: &IjbArgs) -> anyhow::Result<Value> {
    let sizes = Sizes {
        images: args.images.max(args.templates),
        templates: args.templates,
        pairs: args.pairs,
        dim: args.dim,
        ..Sizes::IJBC
    };
    let folder = Scratch::new(&args.dir, "ijb")?;
    let path = synthetic::write(folder.path(), &sizes)?;
    let is_new_peak = memory::forget_peak();
    let runs: Vec<Run> = (0..repetitions)
        .map(|_| one(folder.path(), &path, args))
        .collect::<anyhow::Result<_>>()?;
    let totals: Vec<f64> = runs.iter().map(|run| run.total).collect();
    let last = runs.last().context("at least one repetition")?;
    Ok(json!({
        "bench": "ijb", "images": sizes.images, "templates": sizes.templates, "pairs": sizes.pairs, "dim": sizes.dim,
        "bootstrap": args.bootstrap, "identification": args.identification,
        "median_ms": median(&totals), "min_ms": min(&totals), "phases_ms": last.phases,
        // Where the kernel cannot begin anew, drawing the benchmark is in it as well.
        "peak_bytes": memory::peak(), "peak_without_drawing": is_new_peak, "auc": last.auc,
    }))
}

/// One evaluation, from the lists on disk to the rates.
struct Run {
    total: f64,
    phases: Map<String, Value>,
    auc: f64,
}

fn one(folder: &Path, features: &Path, args: &IjbArgs) -> anyhow::Result<Run> {
    let begin = Instant::now();
    let mut marks: Vec<(&'static str, Instant)> = vec![("lists", begin)];
    let layout = Layout::find(folder, Protocol::Ijbc)?;
    let benchmark = Benchmark::open(layout, args.identification)?;
    let features = FeatureFile::open(features)?;
    let options = Options {
        settings: Settings::REFERENCE,
        all_settings: false,
        repetitions: args.bootstrap,
        seed: 1,
    };
    let mut mark = |phase: Phase| marks.push((phase.name(), Instant::now()));
    let found = evaluate(&benchmark, &features, &options, &mut mark)?;
    let end = Instant::now();
    let ends = marks.iter().skip(1).map(|(_, at)| *at).chain([end]);
    let phases = marks.iter().zip(ends).map(|(&(name, from), to)| {
        let ms = (to - from).as_secs_f64() * 1e3;
        (name.to_owned(), json!(ms))
    });
    Ok(Run {
        total: (end - begin).as_secs_f64() * 1e3,
        phases: phases.collect(),
        auc: found.verification.roc.auc,
    })
}

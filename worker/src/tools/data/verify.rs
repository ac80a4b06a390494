//! `data verify`: every record read and decoded; what is damaged is listed, and the command fails if anything is.

use std::io::Write as _;
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use arcface_proto::failure::{ExitCode, Failure};
use rayon::prelude::*;
use serde_json::json;

use super::{
    Output, progress,
    source::{explain, rec_path},
};
use crate::data::{self, Dataset, decode::PIXEL_BYTES, read_pixels, record_set::RecordSet};

/// Records checked between two moves of the progress bar.
const CHUNK: u64 = 4096;

/// Arguments of `data verify`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example:\n  arcface-worker data verify /data/ms1m-retinaface-t1")]
pub struct VerifyArgs {
    /// Folder with train.rec and train.idx, a .rec file, or an image folder.
    path: PathBuf,
    /// Form of the report.
    #[arg(long, value_enum, default_value = "table")]
    output: Output,
}

pub fn run(args: &VerifyArgs) -> anyhow::Result<()> {
    let dataset = open(&args.path)?;
    let report = check(dataset.as_ref());
    print(&report, dataset.as_ref(), args.output)?;
    match report.damaged.len() as u64 + report.empty_classes {
        0 => Ok(()),
        _ => Err(Failure::new(
            ExitCode::Failed,
            format!(
                "{}: {} of {} images are damaged, {} of {} identities have no good image",
                args.path.display(),
                report.damaged.len(),
                dataset.len(),
                report.empty_classes,
                report.classes
            ),
        )
        .hint("a job refuses damaged records: pack the data set again without them")
        .into()),
    }
}

/// Opens without the checks that would stop at the first damage.
fn open(path: &Path) -> anyhow::Result<Arc<dyn Dataset>> {
    let rec = rec_path(path);
    match rec.is_file() {
        true => Ok(Arc::new(RecordSet::open_unchecked(&rec).map_err(explain)?)),
        false => data::open_path(path, None).map_err(explain),
    }
}

struct Report {
    /// What is wrong, image by image.
    damaged: Vec<String>,
    classes: u64,
    empty_classes: u64,
}

fn check(dataset: &dyn Dataset) -> Report {
    let mut damaged = Vec::new();
    let mut seen: Vec<bool> = Vec::new();
    let bar = progress::bar(dataset.len(), "verifying");
    for first in (0..dataset.len()).step_by(CHUNK as usize) {
        let results: Vec<_> = (first..dataset.len().min(first + CHUNK))
            .into_par_iter()
            .map(|index| read_pixels(dataset, index, &mut [0; PIXEL_BYTES]))
            .collect();
        bar.inc(results.len() as u64);
        for (index, result) in (first..).zip(results) {
            match result {
                // A label alone may not cost memory: one that is far above all others leaves a gap by itself.
                Ok(label) if u64::from(label) < dataset.len() => {
                    let label = label as usize;
                    seen.resize(seen.len().max(label + 1), false);
                    seen[label] = true;
                }
                Ok(label) => {
                    let (name, images) = (dataset.name(index), dataset.len());
                    damaged.push(format!(
                        "{name}: label {label} is not below the number of images, {images}"
                    ));
                }
                Err(error) => damaged.push(error.to_string()),
            }
        }
    }
    bar.finish_and_clear();
    let classes = match dataset.num_classes() {
        u32::MAX => seen.len() as u64,
        known => known.into(),
    };
    let with_images = seen.iter().filter(|&&seen| seen).count() as u64;
    Report {
        damaged,
        classes,
        empty_classes: classes.saturating_sub(with_images),
    }
}

fn print(report: &Report, dataset: &dyn Dataset, output: Output) -> std::io::Result<()> {
    if output == Output::Json {
        let report = json!({
            "num_image": dataset.len(),
            "num_classes": report.classes,
            "identities_without_image": report.empty_classes,
            "damaged": report.damaged,
        });
        writeln!(std::io::stdout(), "{report}")?;
        return Ok(());
    }
    for line in &report.damaged {
        writeln!(std::io::stdout(), "{line}")?;
    }
    writeln!(
        std::io::stdout(),
        "{} images, {} damaged; {} identities, {} without a good image",
        dataset.len(),
        report.damaged.len(),
        report.classes,
        report.empty_classes
    )
}

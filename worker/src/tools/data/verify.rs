//! `data verify`: every record read and decoded; what is damaged is listed, and the command fails if anything is. Says also how
//! large the images are and which of them are there twice.

use std::io::Write as _;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use arcface_proto::failure::{ExitCode, Failure};
use serde_json::json;

use super::{
    Output, progress,
    source::{explain, rec_path, with_threads},
};
use crate::data::{
    self, Dataset, Image,
    decode::{self, PIXEL_BYTES},
    duplicates::{self, Hashes},
    record_set::RecordSet,
    repack::{in_order, same_bytes},
};

/// Damaged images and duplicates that are named; all are counted.
const NAMED: usize = 10_000;

/// Arguments of `data verify`.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "Example:\n  arcface-worker data verify /data/ms1m-retinaface-t1\n\n\
    Damaged images and identities without a good one fail the check; duplicates are only counted (`data filter --dedup` leaves \
    them out). Memory: 30 bytes an image."
)]
pub struct VerifyArgs {
    /// Folder with train.rec and train.idx, a .rec file, or an image folder.
    path: PathBuf,
    /// Threads [default: one a core].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Form of the report.
    #[arg(long, value_enum, default_value = "table")]
    output: Output,
}

pub fn run(args: &VerifyArgs) -> anyhow::Result<()> {
    let dataset = open(&args.path)?;
    let threads = args.threads.map(usize::from);
    let report = with_threads(threads, || Ok(check(dataset.as_ref())))?;
    print(&report, dataset.as_ref(), args.output)?;
    match report.damaged + report.empty_classes {
        // Whatever else a job would refuse: an empty index, records of identities that are gone.
        0 => whole(&args.path).map_err(|error| {
            Failure::new(ExitCode::Failed, error.to_string())
                .hint("a job refuses the set as a whole; `arcface-worker data filter` copies what is whole")
                .into()
        }),
        _ => Err(Failure::new(
            ExitCode::Failed,
            format!(
                "{}: {} of {} images are damaged, {} of {} identities have no good image",
                args.path.display(),
                report.damaged,
                dataset.len(),
                report.empty_classes,
                report.classes
            ),
        )
        .hint("a job refuses damaged records: `arcface-worker data filter --drop-damaged` leaves them out")
        .into()),
    }
}

/// The checks that opening left out: they are about the set, not about an image.
fn whole(path: &Path) -> Result<(), data::DataError> {
    let rec = rec_path(path);
    match rec.is_file() {
        true => RecordSet::open_unchecked(&rec)?.file().check_offsets(),
        false => Ok(()),
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

#[derive(Default)]
struct Report {
    damaged: u64,
    /// What is wrong, image by image, up to [`NAMED`].
    named: Vec<String>,
    classes: u64,
    empty_classes: u64,
    /// Stored bytes of all images.
    bytes: u64,
    /// Images of each size, as stored.
    sizes: BTreeMap<(u32, u32), u64>,
    /// Images that are there before, under the same label.
    twice: u64,
    /// Images that are there before, under another label.
    twice_elsewhere: u64,
    /// (image, first one like it), up to [`NAMED`].
    duplicates: Vec<[String; 2]>,
}

impl Report {
    fn damage(&mut self, what: String) {
        self.damaged += 1;
        if self.named.len() < NAMED {
            self.named.push(what);
        }
    }
}

/// A good image.
struct Seen {
    label: u32,
    bytes: u64,
    hash: u64,
    size: (u32, u32),
}

/// Reads and decodes one image.
fn look(dataset: &dyn Dataset, index: u64) -> Result<Seen, data::DataError> {
    let record = dataset.record(index)?;
    let refuse = |message: String| data::DataError::record(dataset.name(index), message);
    // Where no header says how many identities there are, a label alone may not cost memory.
    if dataset.num_classes() == u32::MAX && u64::from(record.label) >= dataset.len() {
        let (label, images) = (record.label, dataset.len());
        return Err(refuse(format!(
            "label {label} is not below the number of images, {images}"
        )));
    }
    let (bytes, hash, size) = match &record.image {
        Image::Encoded(bytes, other_size) => {
            decode::decode(bytes, *other_size, &mut [0; PIXEL_BYTES]).map_err(refuse)?;
            let size = decode::dimensions(bytes).map_err(refuse)?;
            (bytes.len() as u64, duplicates::hash(bytes), size)
        }
        Image::Pixels(pixels) => {
            let side = decode::SIDE as u32;
            (
                PIXEL_BYTES as u64,
                duplicates::hash(pixels.as_slice()),
                (side, side),
            )
        }
    };
    Ok(Seen {
        label: record.label,
        bytes,
        hash,
        size,
    })
}

fn check(dataset: &dyn Dataset) -> Report {
    let mut report = Report::default();
    let mut has_image: Vec<bool> = Vec::new();
    let mut labels: Vec<u32> = Vec::new();
    let mut hashes = Hashes::default();
    let bar = progress::bar(dataset.len(), "verifying");
    let take = |index: u64, seen: Result<Seen, data::DataError>| -> Result<(), ()> {
        bar.inc(1);
        match seen {
            Ok(seen) => {
                let label = seen.label as usize;
                has_image.resize(has_image.len().max(label + 1), false);
                has_image[label] = true;
                labels.push(seen.label);
                hashes.push(index, seen.hash);
                report.bytes += seen.bytes;
                *report.sizes.entry(seen.size).or_default() += 1;
            }
            Err(error) => {
                labels.push(u32::MAX);
                report.damage(error.to_string());
            }
        }
        Ok(())
    };
    // Taking never stops.
    in_order(dataset.len(), |index| look(dataset, index), take).unwrap_or_default();
    bar.finish_and_clear();
    for (image, original) in hashes.duplicates(|a, b| same_bytes(dataset, a, dataset, b)) {
        match labels[image as usize] == labels[original as usize] {
            true => report.twice += 1,
            false => report.twice_elsewhere += 1,
        }
        if report.duplicates.len() < NAMED {
            report
                .duplicates
                .push([image, original].map(|index| dataset.name(index)));
        }
    }
    report.classes = match dataset.num_classes() {
        u32::MAX => has_image.len() as u64,
        known => known.into(),
    };
    let with_images = has_image.iter().filter(|&&has| has).count() as u64;
    report.empty_classes = report.classes.saturating_sub(with_images);
    report
}

fn print(report: &Report, dataset: &dyn Dataset, output: Output) -> std::io::Result<()> {
    let mut out = std::io::stdout();
    let size = |&(width, height): &(u32, u32)| format!("{width}x{height}");
    if output == Output::Json {
        let sizes = report.sizes.iter().map(|(key, &count)| (size(key), json!(count)));
        let report = json!({
            "num_image": dataset.len(),
            "num_classes": report.classes,
            "identities_without_image": report.empty_classes,
            "damaged": report.named,
            "damaged_total": report.damaged,
            "image_bytes": report.bytes,
            "sizes": sizes.collect::<serde_json::Map<_, _>>(),
            "duplicates": {
                "of_the_same_identity": report.twice,
                "of_another_identity": report.twice_elsewhere,
                "named": report.duplicates,
            },
        });
        return writeln!(out, "{report}");
    }
    for line in &report.named {
        writeln!(out, "{line}")?;
    }
    if report.damaged > report.named.len() as u64 {
        writeln!(out, "... and {} more", report.damaged - report.named.len() as u64)?;
    }
    writeln!(
        out,
        "{} images, {} damaged; {} identities, {} without a good image",
        dataset.len(),
        report.damaged,
        report.classes,
        report.empty_classes
    )?;
    let twice = report.twice + report.twice_elsewhere;
    if twice > 0 {
        writeln!(
            out,
            "{twice} images are there before, {} of them under another label",
            report.twice_elsewhere
        )?;
    }
    for (key, count) in &report.sizes {
        writeln!(out, "size {}: {count}", size(key))?;
    }
    Ok(())
}

//! `data inspect`: what a data set holds.

use std::io::Write as _;
use std::{collections::BTreeMap, path::PathBuf};

use serde_json::json;

use super::{Output, progress, source::explain};
use crate::data::{self, Image, decode};

/// Images whose size is looked at without `--all`.
const SAMPLE: u64 = 2000;

/// Arguments of `data inspect`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example:\n  arcface-worker data inspect /data/ms1m-retinaface-t1")]
pub struct InspectArgs {
    /// Folder with train.rec and train.idx, a .rec file, or an image folder.
    path: PathBuf,
    /// Read every record, not a sample of 2000.
    #[arg(long)]
    all: bool,
    /// Form of the report.
    #[arg(long, value_enum, default_value = "table")]
    output: Output,
}

pub fn run(args: &InspectArgs) -> anyhow::Result<()> {
    let dataset = data::open_path(&args.path, None).map_err(explain)?;
    let images = dataset.len();
    let looked_at = if args.all { images } else { images.min(SAMPLE) };
    let mut sizes: BTreeMap<String, u64> = BTreeMap::new();
    let mut labels: BTreeMap<u32, u64> = BTreeMap::new();
    let mut bytes = 0u64;
    let bar = progress::bar(looked_at, "reading");
    for k in 0..looked_at {
        // Evenly over the whole set; no overflow below 2^64 / 2000 images.
        let index = if args.all { k } else { k * images / looked_at };
        let record = dataset.record(index).map_err(explain)?;
        *labels.entry(record.label).or_default() += 1;
        let size = match &record.image {
            Image::Encoded(encoded, _) => {
                bytes += encoded.len() as u64;
                match decode::dimensions(encoded) {
                    Ok((width, height)) => format!("{width}x{height}"),
                    Err(_) => "undecodable".into(),
                }
            }
            Image::Pixels(_) => "112x112".into(),
        };
        *sizes.entry(size).or_default() += 1;
        bar.inc(1);
    }
    bar.finish_and_clear();
    let smallest = labels.keys().next().copied().unwrap_or(0);
    let largest = labels.keys().next_back().copied().unwrap_or(0);
    let mean_bytes = bytes.checked_div(looked_at).unwrap_or(0);
    if args.output == Output::Json {
        let counts = args.all.then(|| {
            json!({
                "identities_seen": labels.len(),
                "fewest_images": labels.values().min(),
                "most_images": labels.values().max(),
            })
        });
        let report = json!({
            "path": args.path,
            "description": dataset.describe(),
            "num_image": images,
            "num_classes": dataset.num_classes(),
            "looked_at": looked_at,
            "label_min": smallest,
            "label_max": largest,
            "sizes": sizes,
            "mean_image_bytes": mean_bytes,
            "per_identity": counts,
        });
        writeln!(std::io::stdout(), "{report}")?;
        return Ok(());
    }
    writeln!(std::io::stdout(), "{}", dataset.describe())?;
    writeln!(std::io::stdout(), "num_image     {images}")?;
    writeln!(std::io::stdout(), "num_classes   {}", dataset.num_classes())?;
    writeln!(std::io::stdout(), "looked at     {looked_at} images")?;
    writeln!(std::io::stdout(), "labels        {smallest} to {largest}")?;
    if args.all {
        let counts = (
            labels.values().min().unwrap_or(&0),
            labels.values().max().unwrap_or(&0),
        );
        writeln!(
            std::io::stdout(),
            "per identity  {} to {} images",
            counts.0,
            counts.1
        )?;
    }
    writeln!(std::io::stdout(), "image bytes   {mean_bytes} on average")?;
    for (size, count) in sizes {
        writeln!(std::io::stdout(), "size          {size}: {count}")?;
    }
    Ok(())
}

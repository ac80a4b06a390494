//! `data shuffle`: the records of a `.rec` in random order, physically. The training order is random anyway; this is for
//! disks where neighbours in a file are cheap and jumps are not.

use std::io::Write as _;
use std::path::PathBuf;

use anyhow::Context;

use super::{
    progress,
    source::{explain, new_set, rec_path},
};
use crate::data::{
    Dataset, Epochs, Image,
    record_set::RecordSet,
    recordio_write::{RecordHeader, RecordWriter},
};

/// Arguments of `data shuffle`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example:\n  arcface-worker data shuffle /data/ms1mv3 -o /data/shuffled_ms1mv3")]
pub struct ShuffleArgs {
    /// Folder with train.rec and train.idx, or a .rec file.
    path: PathBuf,
    /// Folder for the new train.rec and train.idx: keys 0, 1, 2, ..., all of them images, as shuffle_rec.py writes.
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Seed of the order.
    #[arg(long, default_value_t = 2048)]
    seed: u64,
    /// Replace a set that is in the output folder.
    #[arg(long)]
    force: bool,
}

pub fn run(args: &ShuffleArgs) -> anyhow::Result<()> {
    let source = rec_path(&args.path);
    let set = RecordSet::open(&source, None).map_err(explain)?;
    let target = new_set(&args.output, args.force, &[&source])?;
    let order = Epochs::new(set.len(), 1, args.seed).context("order of the records")?;
    let mut writer = RecordWriter::create(&target).map_err(explain)?;
    let bar = progress::bar(set.len(), "shuffling");
    for key in 0..set.len() {
        let record = set.record(order.position(0, key)).map_err(explain)?;
        let header = RecordHeader {
            labels: vec![record.label as f32],
            id: key,
        };
        if let Image::Encoded(body, _) = &record.image {
            writer.write(key, &header, body).map_err(explain)?;
        }
        bar.inc(1);
    }
    writer.finish().map_err(explain)?;
    bar.finish_and_clear();
    writeln!(
        std::io::stdout(),
        "{}: {} images of {} identities",
        target.display(),
        set.len(),
        set.num_classes()
    )?;
    Ok(())
}

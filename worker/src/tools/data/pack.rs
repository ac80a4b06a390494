//! `data pack`: an image folder or a list as `.rec` and `.idx`. Image files are copied byte for byte.

use std::io::Write as _;
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use arcface_proto::failure::{ExitCode, Failure};
use rayon::prelude::*;

use super::{
    progress,
    source::{checked_image, explain, output_folder},
};
use crate::data::{
    image_folder::{Entry, ImageFolder},
    recordio_write::LayoutWriter,
};

/// Files read between two writes.
const CHUNK: usize = 1024;

/// Arguments of `data pack`.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "Examples:\n  arcface-worker data pack faces -o packed\n  arcface-worker data pack --list faces/label.txt -o packed"
)]
pub struct PackArgs {
    /// Folder with one sub-folder an identity, or with a label.txt.
    #[arg(
        value_name = "FOLDER",
        required_unless_present = "list",
        conflicts_with = "list"
    )]
    folder: Option<PathBuf>,
    /// List with lines "path<TAB>label"; paths are relative to the list.
    #[arg(long, value_name = "FILE")]
    list: Option<PathBuf>,
    /// Folder for train.rec and train.idx.
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Scale images that are not 112x112 instead of refusing them.
    #[arg(long)]
    resize: bool,
}

pub fn run(args: &PackArgs) -> anyhow::Result<()> {
    let folder = match (&args.list, &args.folder) {
        (Some(list), _) => ImageFolder::open_list(list),
        (None, Some(folder)) if folder.is_file() => ImageFolder::open_list(folder),
        (None, folder) => ImageFolder::open(folder.as_deref().unwrap_or(Path::new("."))),
    }
    .map_err(explain)?;
    let mut entries = folder.entries().to_vec();
    // The layout has the images of an identity together; their order is kept.
    entries.sort_by_key(|entry| entry.label);
    let num_classes = dense(&entries)?;
    output_folder(&args.output)?;
    let rec = args.output.join("train.rec");
    let mut writer = LayoutWriter::create(&rec, entries.len() as u64, num_classes).map_err(explain)?;
    let bar = progress::bar(entries.len() as u64, "packing");
    for chunk in entries.chunks(CHUNK) {
        let images: Vec<Vec<u8>> = chunk
            .par_iter()
            .map(|entry| checked_image(&folder.root().join(&entry.path), args.resize))
            .collect::<anyhow::Result<_>>()?;
        for (entry, image) in chunk.iter().zip(&images) {
            writer.write(entry.label, image).map_err(explain)?;
        }
        bar.inc(chunk.len() as u64);
    }
    writer.finish().map_err(explain)?;
    bar.finish_and_clear();
    writeln!(
        std::io::stdout(),
        "{}: {} images of {num_classes} identities",
        rec.display(),
        entries.len()
    )?;
    Ok(())
}

/// Number of classes, if every one has an image.
fn dense(entries: &[Entry]) -> anyhow::Result<u32> {
    let labels: BTreeSet<u32> = entries.iter().map(|entry| entry.label).collect();
    match (0u32..).zip(&labels).find(|(expected, label)| expected != *label) {
        None => Ok(labels.len() as u32),
        Some((missing, _)) => Err(Failure::new(
            ExitCode::Failed,
            format!(
                "no image has label {missing}, but there are labels up to {}",
                labels.last().unwrap_or(&0)
            ),
        )
        .hint("number the identities 0, 1, 2, ... without a gap")
        .into()),
    }
}

//! `data pack`: an image folder or a list as `.rec` and `.idx`. Image files are copied byte for byte unless they are to be
//! changed. A run that is broken off is gone on with by the same command, from its journal's last mark.

use std::io::Write as _;
use std::{
    cell::RefCell,
    collections::BTreeSet,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use arcface_proto::failure::{ExitCode, Failure};

use super::{
    progress,
    source::{check_names, checked_image, explain, new_set, with_threads},
};
use crate::data::{
    image_folder::{Entry, ImageFolder},
    journal::{Earlier, Journal},
    recode::Recode,
    recordio_write::LayoutWriter,
    repack,
};

/// Damaged images that are named one by one.
const NAMED: u64 = 20;

/// Arguments of `data pack`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    arcface-worker data pack faces -o packed\n  \
    arcface-worker data pack --list faces/label.txt -o packed\n  \
    arcface-worker data pack --list train.lst --root /data/faces --reencode 95 --resize -o packed\n\n\
    A run that is broken off leaves nothing that could be taken for a set; the same command goes on with it.")]
pub struct PackArgs {
    /// Folder with one sub-folder an identity, or with a label.txt.
    #[arg(
        value_name = "FOLDER",
        required_unless_present = "list",
        conflicts_with = "list"
    )]
    folder: Option<PathBuf>,
    /// List with lines "path<TAB>label", "index<TAB>label<TAB>path" (im2rec) or "1<TAB>path<TAB>label" (InsightFace).
    #[arg(long, value_name = "FILE")]
    list: Option<PathBuf>,
    /// Folder that the list's paths are in [default: that of the list].
    #[arg(long, value_name = "DIR", requires = "list")]
    root: Option<PathBuf>,
    /// Folder for train.rec, train.idx, property, and train.identities.tsv with the names of sub-folders by label.
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Scale images that are not 112x112 instead of refusing them.
    #[arg(long)]
    resize: bool,
    /// Encode every image again as JPEG of this quality.
    #[arg(long, value_name = "QUALITY", value_parser = clap::value_parser!(u8).range(1..=100))]
    reencode: Option<u8>,
    /// Encode PNG files as JPEG (of quality 95); JPEG files stay as they are.
    #[arg(long)]
    png_to_jpeg: bool,
    /// Number labels anew where some have no image.
    #[arg(long)]
    renumber: bool,
    /// Leave damaged images out instead of stopping at the first.
    #[arg(long)]
    skip_damaged: bool,
    /// Threads [default: one a core].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Replace a set that is in the output folder.
    #[arg(long)]
    force: bool,
    /// Seconds between marks from which a run that is broken off can be gone on with.
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    mark_every: u32,
}

pub fn run(args: &PackArgs) -> anyhow::Result<()> {
    let folder = match (&args.list, &args.folder) {
        (Some(list), _) => match &args.root {
            Some(root) => ImageFolder::open_list_in(list, root),
            None => ImageFolder::open_list(list),
        },
        (None, Some(folder)) if folder.is_file() => ImageFolder::open_list(folder),
        (None, folder) => ImageFolder::open(folder.as_deref().unwrap_or(Path::new("."))),
    }
    .map_err(explain)?;
    let mut entries = folder.entries().to_vec();
    // The layout has the images of an identity together; their order is kept.
    entries.sort_by_key(|entry| entry.label);
    if !args.renumber {
        dense(&entries)?;
    }
    check_names(folder.names().unwrap_or_default())?;
    let rec = new_set(&args.output, args.force, &[])?;
    let threads = args.threads.map(usize::from);
    let (images, identities, skipped) = with_threads(threads, || pack(args, &folder, &entries, &rec))?;
    let mut out = std::io::stdout();
    writeln!(
        out,
        "{}: {images} images of {identities} identities",
        rec.display()
    )?;
    if skipped > 0 {
        writeln!(out, "{skipped} damaged images were left out")?;
    }
    Ok(())
}

/// Images, identities, and images that were left out.
fn pack(
    args: &PackArgs,
    folder: &ImageFolder,
    entries: &[Entry],
    rec: &Path,
) -> anyhow::Result<(u64, u32, u64)> {
    let how = Recode {
        resize: args.resize,
        quality: args.reencode,
        png_to_jpeg: args.png_to_jpeg,
    };
    let (mut journal, earlier) = Journal::open(rec, &purpose(args, folder, entries)).map_err(explain)?;
    let (mut writer, labels, earlier) = begin(rec, entries, earlier)?;
    let bar = progress::bar(entries.len() as u64, "packing");
    bar.set_position(earlier.mark.items);
    let mut skipped = earlier.refused.len() as u64;
    // Left out since the last mark; one closure fills it and the other empties it.
    let unnoted = RefCell::new(Vec::new());
    let mut refused = |(place, _): &(u64, &Entry), told: Failure| {
        if !args.skip_damaged {
            return Err(told);
        }
        skipped += 1;
        unnoted.borrow_mut().push(*place);
        if skipped <= NAMED {
            bar.suspend(|| eprintln!("left out: {told}"));
        }
        Ok(())
    };
    let (mut done, mut noted) = (earlier.mark.items, Instant::now());
    let mut mark = |items: u64, writer: &mut LayoutWriter| {
        bar.inc(items);
        done += items;
        if noted.elapsed() >= Duration::from_secs(args.mark_every.into()) {
            let mark = writer.mark(done)?;
            journal.note(&mark, &unnoted.take())?;
            noted = Instant::now();
        }
        Ok(())
    };
    let rest: Vec<(u64, &Entry)> = (0..).zip(entries).skip(earlier.mark.items as usize).collect();
    let made = repack::make(
        &rest,
        labels,
        |(_, entry)| entry.label,
        |(_, entry)| checked_image(&folder.root().join(&entry.path), &how),
        &mut refused,
        &mut writer,
        &mut mark,
    );
    let labels = match made {
        Ok(labels) => labels,
        Err(error) => {
            if journal.is_marked() {
                bar.suspend(|| eprintln!("the same command goes on from here; what is packed stays packed"));
            }
            return Err(error.into());
        }
    };
    let (images, identities) = (writer.images(), writer.identities());
    let names: Option<Vec<String>> = folder.names().map(|names| {
        let name = |&label: &u32| names.get(label as usize).cloned().unwrap_or_default();
        labels.iter().map(name).collect()
    });
    repack::finish(writer, rec, names.as_deref()).map_err(explain)?;
    journal.done();
    bar.finish_and_clear();
    Ok((images, identities, skipped))
}

/// All that decides what is packed. Files that are packed already are not looked at again.
fn purpose(args: &PackArgs, folder: &ImageFolder, entries: &[Entry]) -> String {
    let mut digest = blake3::Hasher::new();
    let how = (args.resize, args.reencode, args.png_to_jpeg, args.skip_damaged);
    digest.update(format!("{how:?} {}\0", folder.root().display()).as_bytes());
    for entry in entries {
        digest.update(&entry.label.to_le_bytes());
        digest.update(entry.path.as_os_str().as_encoded_bytes());
        digest.update(b"\0");
    }
    digest.finalize().to_hex().to_string()
}

/// The writer, the labels so far, and what an earlier run left; nothing of that if its files are no good.
fn begin(
    rec: &Path,
    entries: &[Entry],
    earlier: Option<Earlier>,
) -> anyhow::Result<(LayoutWriter, Vec<u32>, Earlier)> {
    if let Some(earlier) = earlier {
        let before = entries.iter().take(earlier.mark.items as usize);
        let (labels, images) = repack::made(before.map(|entry| entry.label), &earlier.refused);
        match LayoutWriter::resume(rec, &earlier.mark, &images) {
            Ok(writer) => {
                eprintln!("goes on after {} of {} images", earlier.mark.items, entries.len());
                return Ok((writer, labels, earlier));
            }
            Err(error) => eprintln!("begins again: of a run that was broken off, {error}"),
        }
    }
    let writer = LayoutWriter::open_ended(rec).map_err(explain)?;
    Ok((writer, Vec::new(), Earlier::default()))
}

/// Refuses labels with a gap.
fn dense(entries: &[Entry]) -> anyhow::Result<()> {
    let labels: BTreeSet<u32> = entries.iter().map(|entry| entry.label).collect();
    match (0u32..).zip(&labels).find(|(expected, label)| expected != *label) {
        None => Ok(()),
        Some((missing, _)) => Err(Failure::new(
            ExitCode::Failed,
            format!(
                "no image has label {missing}, but there are labels up to {}",
                labels.last().unwrap_or(&0)
            ),
        )
        .hint("number the identities 0, 1, 2, ... without a gap, or have it done by --renumber")
        .into()),
    }
}

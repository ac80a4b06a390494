//! `data merge`: several sets as one, each with identities of its own.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
};

use serde_json::json;

use super::{
    Output, progress,
    source::{check_names, explain, new_set, rec_path},
};
use crate::data::{
    DataError, Dataset,
    duplicates::Hashes,
    identities,
    record_set::RecordSet,
    recordio_write::LayoutWriter,
    repack::{self, Look, Pick, Survey, same_bytes},
};

/// Arguments of `data merge`.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "Example:\n  arcface-worker data merge /data/ms1mv3 /data/own --dedup -o /data/both\n\n\
    Identities are not joined by their names: the same folder name in two sets may be two persons. Memory: 40 bytes an image, 16 \
    more with --dedup."
)]
pub struct MergeArgs {
    /// Folders with train.rec and train.idx, or .rec files, in the order of the new labels.
    #[arg(value_name = "PATH", required = true, num_args = 2..)]
    paths: Vec<PathBuf>,
    /// Folder for the new train.rec, train.idx, property and train.identities.tsv, which has the old sets' names and labels.
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Keep only the first of images with the same bytes.
    #[arg(long)]
    dedup: bool,
    /// Replace a set that is in the output folder.
    #[arg(long)]
    force: bool,
    /// How the result is printed.
    #[arg(long, value_enum, value_name = "FORM", default_value_t = Output::Table)]
    report: Output,
}

pub fn run(args: &MergeArgs) -> anyhow::Result<()> {
    let recs: Vec<PathBuf> = args.paths.iter().map(|path| rec_path(path)).collect();
    let sets: Vec<RecordSet> = recs
        .iter()
        .map(|rec| RecordSet::open_unchecked(rec))
        .collect::<Result<_, _>>()
        .map_err(explain)?;
    for set in &sets {
        // An index that is empty, or points past the end, would leave out a part without a word.
        set.file().check_offsets().map_err(explain)?;
    }
    let inputs: Vec<&Path> = recs.iter().map(PathBuf::as_path).collect();
    let target = new_set(&args.output, args.force, &inputs)?;
    let (mut surveys, duplicates) = look_through(&sets, args.dedup).map_err(explain)?;
    let twice = duplicates.len();
    let across = drop_duplicates(&mut surveys, &sets, duplicates);
    let (picks, names) = number_anew(&sets, &surveys).map_err(explain)?;
    drop(surveys);
    check_names(&names)?;
    let mut writer =
        LayoutWriter::create(&target, picks.len() as u64, names.len() as u32).map_err(explain)?;
    let bar = progress::bar(picks.len() as u64, "copying");
    repack::copy(&sets, &picks, &mut writer, &mut |images| bar.inc(images)).map_err(explain)?;
    repack::finish(writer, &target, Some(&names)).map_err(explain)?;
    bar.finish_and_clear();
    let mut out = std::io::stdout();
    match args.report {
        Output::Json => writeln!(
            out,
            "{}",
            json!({
                "output": target, "images": picks.len(), "identities": names.len(),
                "duplicates": twice, "duplicates_of_other_identities": across,
            })
        )?,
        Output::Table => {
            let (images, identities) = (picks.len(), names.len());
            writeln!(
                out,
                "{}: {images} images of {identities} identities",
                target.display()
            )?;
            if args.dedup {
                writeln!(
                    out,
                    "{twice} duplicates left out, {across} of them of another identity"
                )?;
            }
        }
    }
    Ok(())
}

/// An image and the first one like it, numbered through all sets.
type Duplicate = (u64, u64);

/// Labels of all sets, and duplicates in all of them together.
fn look_through(sets: &[RecordSet], dedup: bool) -> Result<(Vec<Survey>, Vec<Duplicate>), DataError> {
    let bar = progress::bar(sets.iter().map(Dataset::len).sum(), "looking");
    let look = Look {
        hash: dedup,
        ..Look::default()
    };
    let (mut hashes, mut first) = (Hashes::default(), 0);
    let mut surveys = Vec::with_capacity(sets.len());
    for set in sets {
        surveys.push(repack::survey(set, look, first, &mut hashes, &mut || bar.inc(1))?);
        first += set.len();
    }
    bar.finish_and_clear();
    let found = hashes.duplicates(|a, b| {
        let ((set_a, a), (set_b, b)) = (place(sets, a), place(sets, b));
        same_bytes(&sets[set_a], a, &sets[set_b], b)
    });
    Ok((surveys, found))
}

/// Which set an image numbered through all sets is in, and where.
fn place(sets: &[RecordSet], mut image: u64) -> (usize, u64) {
    for (number, set) in sets.iter().enumerate() {
        if image < set.len() {
            return (number, image);
        }
        image -= set.len();
    }
    (sets.len(), image)
}

/// Takes the labels of duplicates away; how many of them have another identity than the first.
fn drop_duplicates(surveys: &mut [Survey], sets: &[RecordSet], found: Vec<Duplicate>) -> u64 {
    let mut across = 0;
    for (image, original) in found {
        let ((set, index), (first_set, first)) = (place(sets, image), place(sets, original));
        let label = surveys[set].labels[index as usize].take();
        let differs = set != first_set || label != surveys[first_set].labels[first as usize];
        across += u64::from(differs);
    }
    across
}

/// Images in the order of their new labels, and these labels' names.
fn number_anew(sets: &[RecordSet], surveys: &[Survey]) -> Result<(Vec<Pick>, Vec<String>), DataError> {
    let mut picks = Vec::with_capacity(surveys.iter().map(|survey| survey.labels.len()).sum());
    let mut names: Vec<String> = Vec::new();
    for ((number, set), survey) in (0u32..).zip(sets).zip(surveys) {
        let rec = set.file().path();
        let old_names = identities::read(rec, survey.classes(set))?;
        let source = source_name(rec, number);
        let (kept, _) = crate::data::choose::choose(&survey.labels, &Default::default());
        let mut last = None;
        for index in kept {
            let Some(label) = survey.labels[index as usize] else {
                continue;
            };
            if last != Some(label) {
                last = Some(label);
                let name = old_names.as_ref().and_then(|names| names.get(label as usize));
                names.push(match name {
                    Some(name) => format!("{source}/{name}"),
                    None => format!("{source}/{label}"),
                });
            }
            picks.push(Pick {
                set: number,
                label: names.len() as u32 - 1,
                index,
            });
        }
    }
    Ok((picks, names))
}

/// What a set is called in names: its folder, with its number where it has no name.
fn source_name(rec: &Path, number: u32) -> String {
    let folder = rec.parent().and_then(Path::file_name);
    match (folder, rec.file_stem()) {
        (Some(folder), Some(stem)) if stem == "train" => folder.to_string_lossy().into_owned(),
        (_, Some(stem)) if stem != "train" => stem.to_string_lossy().into_owned(),
        _ => format!("set{number}"),
    }
}

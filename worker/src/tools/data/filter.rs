//! `data filter`: a part of a set as a set of its own: identities by name, by number of images or by chance, without damaged or
//! doubled images.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
};

use arcface_proto::failure::{ExitCode, Failure};
use serde_json::json;

use super::{
    Output, progress,
    source::{explain, new_set, rec_path},
};
use crate::data::{
    DataError, Dataset,
    choose::{Conditions, Gone, choose},
    duplicates::Hashes,
    identities,
    record_set::RecordSet,
    recordio_write::LayoutWriter,
    repack::{self, Look, Pick, same_bytes},
};

/// Arguments of `data filter`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    arcface-worker data filter /data/own --drop-damaged --dedup --min-images 5 -o /data/clean\n  \
    arcface-worker data filter /data/ms1mv3 --identities 10000 --cap 50 --seed 1 -o /data/small\n\n\
    Conditions apply in the order in which they are listed here; labels are 0, 1, 2, ... again afterwards. Memory: 40 bytes an \
    image, 16 more with --dedup.")]
pub struct FilterArgs {
    /// Folder with train.rec and train.idx, or a .rec file.
    path: PathBuf,
    /// Folder for the new train.rec, train.idx, property and train.identities.tsv.
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Decode every image and leave out those that cannot be read; otherwise such a record stops the command.
    #[arg(long)]
    drop_damaged: bool,
    /// Keep only the first of images with the same bytes.
    #[arg(long)]
    dedup: bool,
    /// Keep only the identities of this list: a name a line, or a label where the set has no train.identities.tsv.
    #[arg(long, value_name = "FILE")]
    keep: Option<PathBuf>,
    /// Drop the identities of this list.
    #[arg(long, value_name = "FILE")]
    drop: Option<PathBuf>,
    /// Drop identities with fewer images.
    #[arg(long, value_name = "N", default_value_t = 1)]
    min_images: u64,
    /// Drop identities with more images.
    #[arg(long, value_name = "N")]
    max_images: Option<u64>,
    /// Draw so many of the identities that are left.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    identities: Option<u32>,
    /// Draw so many images of identities that have more.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    cap: Option<u64>,
    /// Seed of the draws.
    #[arg(long, default_value_t = 2048)]
    seed: u64,
    /// Replace a set that is in the output folder.
    #[arg(long)]
    force: bool,
    /// How the result is printed.
    #[arg(long, value_enum, value_name = "FORM", default_value_t = Output::Table)]
    report: Output,
}

pub fn run(args: &FilterArgs) -> anyhow::Result<()> {
    let rec = rec_path(&args.path);
    let set = RecordSet::open_unchecked(&rec).map_err(explain)?;
    let lists = [&args.keep, &args.drop].map(|list| list.as_deref().map(read_list).transpose());
    let [keep, drop] = lists;
    let (keep, drop) = (keep?, drop?);
    let target = new_set(&args.output, args.force, &[&rec])?;

    let bar = progress::bar(set.len(), "looking");
    let look = Look {
        decode: args.drop_damaged,
        hash: args.dedup,
        skip_damaged: args.drop_damaged,
    };
    let mut hashes = Hashes::default();
    let mut survey = repack::survey(&set, look, 0, &mut hashes, &mut || bar.inc(1)).map_err(explain)?;
    bar.finish_and_clear();
    let duplicates = hashes.duplicates(|a, b| same_bytes(&set, a, &set, b));
    for &(image, _) in &duplicates {
        survey.labels[image as usize] = None;
    }
    let classes = survey.classes(&set);
    let names = identities::read(&rec, classes).map_err(explain)?;
    let listed = |list: Option<(&Path, String)>| -> anyhow::Result<Option<Vec<u32>>> {
        let Some((path, text)) = list else {
            return Ok(None);
        };
        let labels = identities::labels(&text, classes, names.as_deref());
        let refuse = |message| {
            Failure::new(ExitCode::Failed, format!("{}: {message}", path.display())).hint(match &names {
                Some(_) => "a line is a name of train.identities.tsv, or begins with a label and a tab",
                None => "a line is a label: the set has no train.identities.tsv with names",
            })
        };
        Ok(Some(labels.map_err(refuse)?))
    };
    let conditions = Conditions {
        keep: listed(keep)?,
        drop: listed(drop)?.unwrap_or_default(),
        min_images: args.min_images,
        max_images: args.max_images,
        identities: args.identities,
        cap: args.cap,
        seed: args.seed,
    };
    let (kept, dropped) = choose(&survey.labels, &conditions);

    let old_name = |label: u32| match &names {
        Some(names) => names.get(label as usize).cloned().unwrap_or_default(),
        None => label.to_string(),
    };
    let (mut picks, mut new_names, mut last) = (Vec::with_capacity(kept.len()), Vec::new(), None);
    for index in kept {
        let label = survey.labels[index as usize];
        if last != label {
            last = label;
            new_names.extend(label.map(old_name));
        }
        picks.push(Pick {
            set: 0,
            label: (new_names.len() as u32).saturating_sub(1),
            index,
        });
    }
    let sets = [set];
    let mut writer = LayoutWriter::open_ended(&target).map_err(explain)?;
    let bar = progress::bar(picks.len() as u64, "copying");
    repack::copy(&sets, &picks, &mut writer, &mut |images| bar.inc(images)).map_err(explain)?;
    repack::finish(writer, &target, Some(&new_names)).map_err(explain)?;
    bar.finish_and_clear();

    let gone = |gone: Gone| json!({"identities": gone.identities, "images": gone.images});
    let mut out = std::io::stdout();
    if args.report == Output::Json {
        let report = json!({
            "output": target,
            "images_before": sets[0].len(), "images": picks.len(),
            "identities_before": classes, "identities": new_names.len(),
            "damaged": survey.damaged, "duplicates": duplicates.len(),
            "not_listed": gone(dropped.by_list), "too_few_images": gone(dropped.too_few),
            "too_many_images": gone(dropped.too_many), "not_drawn": gone(dropped.not_drawn),
            "over_cap": dropped.over_cap,
        });
        writeln!(out, "{report}")?;
        return Ok(());
    }
    writeln!(
        out,
        "{}: {} of {} images kept, of {} of {classes} identities",
        target.display(),
        picks.len(),
        sets[0].len(),
        new_names.len()
    )?;
    let images = |what: &str, images: u64| match images {
        0 => None,
        _ => Some(format!("{what:<18}{images} images")),
    };
    let whole = |what: &str, gone: Gone| match gone.identities {
        0 => None,
        _ => Some(format!(
            "{what:<18}{} images of {} identities",
            gone.images, gone.identities
        )),
    };
    let lines = [
        images("damaged", survey.damaged),
        images("duplicates", duplicates.len() as u64),
        whole("not listed", dropped.by_list),
        whole("too few images", dropped.too_few),
        whole("too many images", dropped.too_many),
        whole("not drawn", dropped.not_drawn),
        images("over the cap", dropped.over_cap),
    ];
    for line in lines.into_iter().flatten() {
        writeln!(out, "{line}")?;
    }
    Ok(())
}

fn read_list(path: &Path) -> anyhow::Result<(&Path, String)> {
    let text = fs::read_to_string(path).map_err(|e| explain(DataError::io(path, e)))?;
    Ok((path, text))
}

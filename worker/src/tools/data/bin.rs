//! `data bin`: a verification set from image files and a list of pairs.

use std::{
    collections::HashMap,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::Context;
use arcface_proto::failure::{ExitCode, Failure};
use rayon::prelude::*;

use super::{
    progress,
    source::{checked_image, explain, new_file},
};
use crate::data::{
    DataError, bin_write,
    pair_list::{self, Layout, Picture},
    recode::Recode,
    recordio_write::write_atomically,
};
use crate::tools::output::no_input;

/// Endings of the files of LFW's layout, in the order in which they are looked for.
const ENDINGS: [&str; 3] = ["jpg", "png", "jpeg"];

/// Arguments of `data bin`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    arcface-worker data bin --pairs pairs.txt -o mine.bin\n  \
    arcface-worker data bin --pairs lfw/pairs.txt --images lfw/aligned -o lfw.bin")]
pub struct BinArgs {
    /// List of pairs: a line a pair with two paths and 1 (same person) or 0, separated by tabs, commas or blanks; or the
    /// pairs.txt of LFW, "name i j" and "name i other j", where image i is name/name_000i.jpg.
    #[arg(long, value_name = "FILE")]
    pairs: PathBuf,
    /// Folder that the paths are relative to [default: that of the list].
    #[arg(long, value_name = "DIR")]
    images: Option<PathBuf>,
    /// How the list is written: list or lfw [default: by its first line].
    #[arg(long, value_name = "LAYOUT")]
    layout: Option<Layout>,
    /// File to write.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Scale images that are not 112x112 instead of refusing them.
    #[arg(long)]
    resize: bool,
    /// Replace a file that is there.
    #[arg(long)]
    force: bool,
}

pub fn run(args: &BinArgs) -> anyhow::Result<()> {
    let refuse =
        |message: String| Failure::new(ExitCode::Failed, format!("{}: {message}", args.pairs.display()));
    let text = fs::read_to_string(&args.pairs).map_err(|e| explain(DataError::io(&args.pairs, e)))?;
    let pairs = pair_list::parse(&text, args.layout).map_err(|message| {
        refuse(message)
            .hint("a line is \"path<TAB>path<TAB>0|1\", or \"name i j\" and \"name i other j\" as in LFW")
    })?;
    new_file(&args.output, args.force, &[&args.pairs])?;
    let beside = args.pairs.parent().unwrap_or(Path::new(""));
    let root = args.images.as_deref().unwrap_or(beside);
    // Lists name most images many times: each is read once.
    let mut places: HashMap<&Picture, usize> = HashMap::new();
    let mut distinct: Vec<(&Picture, u64)> = Vec::new();
    let mut order = Vec::with_capacity(2 * pairs.len());
    for pair in &pairs {
        for picture in &pair.pictures {
            let place = *places.entry(picture).or_insert_with(|| {
                distinct.push((picture, pair.line));
                distinct.len() - 1
            });
            order.push(place);
        }
    }
    let files: Vec<PathBuf> = distinct.iter().map(|(picture, _)| find(root, picture)).collect();
    no_input(&args.output, files.iter().map(PathBuf::as_path))?;
    let how = Recode {
        resize: args.resize,
        ..Recode::default()
    };
    let bar = progress::bar(distinct.len() as u64, "reading");
    let images: Vec<Vec<u8>> = distinct
        .par_iter()
        .zip(&files)
        .map(|((_, line), file)| {
            bar.inc(1);
            checked_image(file, &how).map_err(|told| {
                let code = told.code;
                Failure {
                    code,
                    ..refuse(format!("line {line}: {}", told.message)).hint(told.hint)
                }
            })
        })
        .collect::<Result<_, _>>()?;
    bar.finish_and_clear();
    let images: Vec<&[u8]> = order.into_iter().map(|place| images[place].as_slice()).collect();
    let issame: Vec<bool> = pairs.iter().map(|pair| pair.same).collect();
    let bytes = bin_write::verification_set(&images, &issame).context("build the verification set")?;
    write_atomically(&args.output, &bytes).map_err(explain)?;
    let same = issame.iter().filter(|&&same| same).count();
    writeln!(
        std::io::stdout(),
        "{}: {} pairs, {same} of the same person",
        args.output.display(),
        issame.len()
    )?;
    Ok(())
}

/// Where an image is; that of the first ending where none is there.
fn find(root: &Path, picture: &Picture) -> PathBuf {
    match picture {
        Picture::File(path) => root.join(path),
        Picture::Stem(stem) => {
            // Not `with_extension`: names of people have dots.
            let with = |ending: &str| {
                let mut path = root.join(stem).into_os_string();
                path.push(format!(".{ending}"));
                PathBuf::from(path)
            };
            let mut there = ENDINGS.iter().map(|ending| with(ending));
            there
                .find(|path| path.exists())
                .unwrap_or_else(|| with(ENDINGS[0]))
        }
    }
}

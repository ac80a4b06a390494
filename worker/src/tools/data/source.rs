//! What the subcommands share: opening what a user names, outputs, image files for packing.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context;
use arcface_proto::failure::{ExitCode, Failure};

use crate::data::{
    DataError, identities,
    image_folder::read_image_file,
    recode::{Recode, recode},
};
use crate::tools::output::no_input;

/// A data error with its exit code and hint.
pub fn explain(error: DataError) -> anyhow::Error {
    Failure::from(error).into()
}

/// Creates the output folder.
pub fn output_folder(path: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(path).with_context(|| format!("create {}", path.display()))
}

/// `train.rec` of a folder, or the `.rec` itself.
pub fn rec_path(path: &Path) -> PathBuf {
    match path.is_dir() {
        true => path.join("train.rec"),
        false => path.into(),
    }
}

/// The `.rec` to write in a folder, which is made; refused where it would replace one of the inputs, or without `force`
/// anything.
pub fn new_set(folder: &Path, force: bool, inputs: &[&Path]) -> anyhow::Result<PathBuf> {
    let rec = folder.join("train.rec");
    new_file(&rec, force, inputs)?;
    new_file(&rec.with_extension("idx"), force, &[])?;
    output_folder(folder)?;
    Ok(rec)
}

/// Refuses a file to write that is one of the inputs, or without `force` one that is there.
pub fn new_file(path: &Path, force: bool, inputs: &[&Path]) -> Result<(), Failure> {
    no_input(path, inputs.iter().copied())?;
    match path.exists() && !force {
        true => Err(
            Failure::new(ExitCode::Usage, format!("{} is there already", path.display()))
                .hint("name another place with -o, or replace it with --force"),
        ),
        false => Ok(()),
    }
}

/// Refuses identities whose names a set cannot keep, before the work is done for them.
pub fn check_names(names: &[String]) -> Result<(), Failure> {
    identities::check(names).map_err(|message| {
        Failure::new(ExitCode::Failed, message)
            .hint("rename the folder: in train.identities.tsv tabs separate and lines end")
    })
}

/// Runs with so many threads, or as many as the machine has.
pub fn with_threads<T: Send>(
    threads: Option<usize>,
    work: impl FnOnce() -> anyhow::Result<T> + Send,
) -> anyhow::Result<T> {
    match threads {
        None => work(),
        Some(threads) => rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .context("start the threads")?
            .install(work),
    }
}

/// The bytes of an image file to store.
pub fn checked_image(path: &Path, how: &Recode) -> Result<Vec<u8>, Failure> {
    let bytes = read_image_file(path)?;
    recode(bytes, how).map_err(|refused| {
        let message = format!("{}: {}", path.display(), refused.message);
        Failure::new(ExitCode::Failed, message).hint(refused.hint)
    })
}

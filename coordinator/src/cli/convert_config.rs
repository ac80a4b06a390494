//! `convert-config`: a recipe of arcface_torch as a job file. Reads the files, says what was not carried over, writes.

use super::submit::read_text;
use super::{Complaints, output, say};
use crate::recipe::{self, Options, Source};
use anyhow::Context;
use arcface_proto::failure::{ExitCode, Failure};
use clap::Args;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  arcface-coordinator convert-config arcface_torch/configs/ms1mv3_r50.py -o ms1mv3_r50.toml
  arcface-coordinator convert-config mine.py --base arcface_torch/configs/base.py --gpus 4 > mine.toml

The recipe is read, not executed. What it does not set has the reference's default. Every line that could not be carried
over, or means something else here, is named on standard error; the job file has a comment where a value was changed.")]
pub(super) struct ConvertConfigArgs {
    /// Recipe: a Python file with lines such as config.lr = 0.1
    #[arg(value_name = "OLD.py")]
    recipe: PathBuf,
    /// Job file to write [default: standard output]
    #[arg(short = 'o', long, value_name = "NEW.toml")]
    output: Option<PathBuf>,
    /// Recipe whose values hold where OLD.py has none; your base.py, if you changed it [default: the reference's defaults]
    #[arg(long, value_name = "BASE.py")]
    base: Option<PathBuf>,
    /// Ranks of the job, for which a recipe has no key [default: what its name says, as in _32gpus, else 8]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    gpus: Option<u32>,
    /// Replace NEW.toml if it is there
    #[arg(long, requires = "output")]
    force: bool,
}

pub(super) fn run(args: &ConvertConfigArgs) -> anyhow::Result<()> {
    if let Some(path) = &args.output {
        check_writable(path, args.force)?;
    }
    let read = |path: &Path| {
        let text = read_text(
            "recipe",
            path,
            "the reference's recipes are in arcface_torch/configs/",
        )?;
        Ok::<_, Failure>((output::clean(&path.display().to_string()), text))
    };
    let (name, text) = read(&args.recipe)?;
    let base = args.base.as_deref().map(read).transpose()?;
    let source = Source {
        name: &name,
        text: &text,
    };
    let base = base.as_ref().map(|(name, text)| Source { name, text });
    let options = Options {
        job: output::clean(&args.recipe.file_stem().unwrap_or_default().to_string_lossy()),
        gpus: args.gpus,
    };
    let converted = recipe::convert(source, base, &options).map_err(|complaints| {
        let failure = |remark: recipe::Remark| {
            Failure::new(ExitCode::Usage, format!("recipe {remark}")).hint(remark.hint)
        };
        Complaints(complaints.into_iter().map(failure).collect())
    })?;
    for remark in &converted.remarks {
        say(&format!("warning: {remark}"));
        if !remark.hint.is_empty() {
            say(&format!("hint: {}", remark.hint));
        }
    }
    match &args.output {
        None => output::print(&converted.text)?,
        Some(path) => {
            write_whole(path, &converted.text).with_context(|| format!("write {}", path.display()))?;
            say(&format!("wrote {}", path.display()));
        }
    }
    Ok(())
}

/// Renaming replaces whatever is there, even a device.
fn check_writable(path: &Path, force: bool) -> Result<(), Failure> {
    let fail = |what: &str| Failure::new(ExitCode::Usage, format!("-o {}: {what}", path.display()));
    match fs::metadata(path) {
        Ok(there) if !there.is_file() => {
            Err(fail("is not a regular file").hint("without -o it goes to standard output"))
        }
        Ok(_) if !force => Err(fail("is there already").hint("--force replaces it")),
        _ => Ok(()),
    }
}

/// The whole file or none of it, whatever fails.
fn write_whole(path: &Path, text: &str) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let draft = path.with_file_name(format!(".{name}.{}.tmp", std::process::id()));
    let result = File::create(&draft)
        .and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()
        })
        .and_then(|()| fs::rename(&draft, path));
    if result.is_err() {
        // The error that matters is the one above.
        fs::remove_file(&draft).ok();
    }
    result
}

//! `data bin`: a verification set from image files.

use std::io::Write as _;
use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context;
use arcface_proto::failure::{ExitCode, Failure};
use rayon::prelude::*;

use super::{
    progress,
    source::{checked_image, explain},
};
use crate::data::{DataError, bin_write, recordio_write::write_atomically};

/// Arguments of `data bin`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example:\n  arcface-worker data bin --pairs pairs.txt -o mine.bin")]
pub struct BinArgs {
    /// List with lines "path<TAB>path<TAB>1" (same person) or "...<TAB>0"; paths are relative to the list.
    #[arg(long, value_name = "FILE")]
    pairs: PathBuf,
    /// File to write.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Scale images that are not 112x112 instead of refusing them.
    #[arg(long)]
    resize: bool,
}

pub fn run(args: &BinArgs) -> anyhow::Result<()> {
    let text = fs::read_to_string(&args.pairs).map_err(|e| explain(DataError::io(&args.pairs, e)))?;
    let root = args.pairs.parent().unwrap_or(Path::new(""));
    let (paths, issame) = parse(&text).map_err(|message| {
        Failure::new(ExitCode::Failed, format!("{}: {message}", args.pairs.display()))
            .hint("a line is \"path<TAB>path<TAB>0|1\"")
    })?;
    let bar = progress::bar(paths.len() as u64, "reading");
    let images: Vec<Vec<u8>> = paths
        .par_iter()
        .map(|path| {
            bar.inc(1);
            checked_image(&root.join(path), args.resize)
        })
        .collect::<anyhow::Result<_>>()?;
    bar.finish_and_clear();
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

/// Paths, two a pair, and flags.
fn parse(text: &str) -> Result<(Vec<PathBuf>, Vec<bool>), String> {
    let (mut paths, mut issame) = (Vec::new(), Vec::new());
    for (line, number) in text
        .lines()
        .zip(1u64..)
        .filter(|(line, _)| !line.trim().is_empty())
    {
        let parts: Vec<&str> = line.split('\t').map(str::trim).collect();
        let &[a, b, flag] = parts.as_slice() else {
            return Err(format!("line {number} has {} parts, not 3", parts.len()));
        };
        issame.push(match flag {
            "1" => true,
            "0" => false,
            other => return Err(format!("line {number}: {other:?} is neither 0 nor 1")),
        });
        paths.extend([PathBuf::from(a), PathBuf::from(b)]);
    }
    match issame.is_empty() {
        true => Err("there are no pairs".into()),
        false => Ok((paths, issame)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_read_or_refused_with_their_line() {
        let (paths, issame) = parse("a.jpg\tb c.jpg\t1\n\na.jpg\td.png\t0\n").unwrap();
        assert_eq!((paths.len(), issame), (4, vec![true, false]));
        assert_eq!(paths[1], Path::new("b c.jpg"));
        for (text, expected) in [
            ("a\tb\n", "line 1 has 2 parts, not 3"),
            ("a\tb\t1\nc\td\tyes\n", "line 2: \"yes\" is neither 0 nor 1"),
            ("\n", "there are no pairs"),
        ] {
            assert_eq!(parse(text).unwrap_err(), expected);
        }
    }
}

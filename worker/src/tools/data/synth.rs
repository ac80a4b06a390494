//! `data synth`: synthetic identities as files, through the same formats as real ones.

use std::io::Write as _;
use std::path::PathBuf;

use anyhow::Context;
use image::RgbImage;
use rayon::prelude::*;

use super::{
    progress,
    source::{explain, new_file, new_set},
};
use crate::data::{
    bin_write,
    decode::{PIXEL_BYTES, SIDE},
    recode::{self, JPEG_QUALITY},
    recordio_write::{LayoutWriter, write_atomically},
    synthetic::{self, FIRST_VERIFICATION_IDENTITY},
};

/// Images drawn between two writes: bounds memory and keeps every core busy.
const CHUNK: u64 = 1024;

/// Arguments of `data synth`.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "Example:\n  arcface-worker data synth --identities 500 --images-per-identity 40 -o /tmp/faces"
)]
pub struct SynthArgs {
    /// Identities to train on.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    identities: u32,
    /// Pictures of each.
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..))]
    images_per_identity: u32,
    /// Pairs of the verification set, half of them the same person; 0 makes none.
    #[arg(long, value_name = "P", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pairs: u32,
    /// Seed: the same seed draws the same faces.
    #[arg(long, default_value_t = 2048)]
    seed: u64,
    /// Folder for train.rec, train.idx and synth.bin.
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Replace a set that is in the folder.
    #[arg(long)]
    force: bool,
}

pub fn run(args: &SynthArgs) -> anyhow::Result<()> {
    let rec = new_set(&args.output, args.force, &[])?;
    let bin = args.output.join("synth.bin");
    if args.pairs > 0 {
        new_file(&bin, args.force, &[])?;
    }
    let per_identity = u64::from(args.images_per_identity);
    let total = u64::from(args.identities) * per_identity;
    let mut writer = LayoutWriter::create(&rec, total, args.identities).map_err(explain)?;
    let bar = progress::bar(total, "drawing");
    for first in (0..total).step_by(CHUNK as usize) {
        let images: Vec<Vec<u8>> = (first..total.min(first + CHUNK))
            .into_par_iter()
            .map(|image| draw(args.seed, image / per_identity, image % per_identity))
            .collect::<anyhow::Result<_>>()?;
        for (image, jpeg) in (first..).zip(&images) {
            // Below the number of identities, which is a u32.
            let label = u32::try_from(image / per_identity).context("label")?;
            writer.write(label, jpeg).map_err(explain)?;
        }
        bar.inc(images.len() as u64);
    }
    writer.finish().map_err(explain)?;
    bar.finish_and_clear();
    writeln!(
        std::io::stdout(),
        "{}: {total} images of {} identities",
        rec.display(),
        args.identities
    )?;
    if args.pairs > 0 {
        verification(args.seed, args.pairs, &bin)?;
        writeln!(
            std::io::stdout(),
            "{}: {} pairs of other identities",
            bin.display(),
            args.pairs
        )?;
    }
    Ok(())
}

/// Pictures of a verification set. Even pairs show one identity twice, odd pairs two that follow each other; every
/// picture is used once, and folds of consecutive pairs have both kinds.
fn verification(seed: u64, pairs: u32, path: &std::path::Path) -> anyhow::Result<()> {
    let identities = u64::from(pairs.div_ceil(2));
    let shown = |pair: u64| {
        let who = FIRST_VERIFICATION_IDENTITY + pair / 2;
        let other = FIRST_VERIFICATION_IDENTITY + (pair / 2 + 1) % identities.max(2);
        match pair % 2 {
            0 => [(who, 0), (who, 1)],
            _ => [(who, 2), (other, 3)],
        }
    };
    let bar = progress::bar(2 * u64::from(pairs), "drawing pairs");
    let images: Vec<Vec<u8>> = (0..u64::from(pairs))
        .flat_map(shown)
        .collect::<Vec<_>>()
        .into_par_iter()
        .map(|(identity, image)| {
            bar.inc(1);
            draw(seed, identity, image)
        })
        .collect::<anyhow::Result<_>>()?;
    bar.finish_and_clear();
    let issame: Vec<bool> = (0..pairs).map(|pair| pair % 2 == 0).collect();
    let bytes = bin_write::verification_set(&images, &issame).context("build the verification set")?;
    write_atomically(path, &bytes).map_err(explain)
}

fn draw(seed: u64, identity: u64, image: u64) -> anyhow::Result<Vec<u8>> {
    let mut pixels = [0; PIXEL_BYTES];
    synthetic::draw(seed, identity, image, &mut pixels);
    let image =
        RgbImage::from_raw(SIDE as u32, SIDE as u32, pixels.to_vec()).context("size of a drawn image")?;
    recode::encode(&image, JPEG_QUALITY).map_err(|refused| anyhow::anyhow!(refused.message))
}

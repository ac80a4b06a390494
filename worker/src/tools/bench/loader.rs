//! How fast batches are read, decoded and augmented.

use super::{
    choice,
    timing::{median, min, time},
};
use crate::data::{
    self, DataError, Dataset, Epochs, Form, Image, ImageCache, Loader, LoaderOptions, OtherSize, Record,
    decode::{PIXEL_BYTES, SIDE},
    recode::{self, JPEG_QUALITY},
    synthetic::{self, SyntheticFaces},
};
use anyhow::Context;
use arcface_proto::spec::Augment;
use image::RgbImage;
use serde_json::{Value, json};
use std::{borrow::Cow, sync::Arc, time::Instant};

/// The name of drawn images as files of training sets have them.
const JPEG: &str = "jpeg";
/// How many of them there are.
const JPEGS: u64 = 1000;

/// Arguments of `bench loader`.
#[derive(clap::Args, Debug)]
pub struct LoaderArgs {
    /// Training data: .rec, image folder, "synthetic" (drawn when asked for), or "jpeg" (drawn before, as JPEG of quality 95).
    #[arg(long, default_value = synthetic::NAME)]
    data: String,
    /// Images of a batch.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// Decoding threads.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: u16,
    /// Memory in which decoded images are kept, as in 4GiB; default: none.
    #[arg(long, value_parser = arcface_proto::memory::size::parse)]
    cache: Option<u64>,
    /// Random changes: none, flip or dali.
    #[arg(long, default_value = "flip", value_parser = choice::<Augment>)]
    augment: Augment,
    /// What becomes of them: "planes" for a CPU, or "pixels" for a GPU, which changes how they look and normalises them itself.
    #[arg(long, default_value = "planes", value_parser = ["planes", "pixels"])]
    form: String,
}

/// Batches as training would wait for them.
pub(super) fn measure(repetitions: u32, args: &LoaderArgs) -> anyhow::Result<Value> {
    let &LoaderArgs {
        batch,
        threads,
        augment,
        ..
    } = args;
    let steps = u64::from(repetitions) + 1;
    let dataset: Arc<dyn Dataset> = match args.data.as_str() {
        synthetic::NAME => Arc::new(SyntheticFaces::new(1, 1000, steps * u64::from(batch))),
        JPEG => Arc::new(DrawnJpegs::draw()?),
        path => data::open_path(path.as_ref(), None)?,
    };
    let description = dataset.describe();
    // A small data set is read in several epochs.
    let plan = Epochs::new(dataset.len(), batch.into(), 1)?.plan(0, 1, batch, 0..steps);
    let options = LoaderOptions {
        threads: threads.into(),
        augment,
        seed: 1,
        prefetch: 4,
        form: match args.form.as_str() {
            "pixels" => Form::Pixels,
            _ => Form::Planes,
        },
        cache: args.cache.map(|bytes| Arc::new(ImageCache::new(bytes))),
    };
    let mut loader = Loader::new(dataset, plan, options);
    let begin = Instant::now();
    let times = time(repetitions, |_| {
        loader.next().context("the loader ended early")??;
        Ok(())
    })?;
    let all = begin.elapsed().as_secs_f64();
    let loaded = loader.loaded();
    Ok(json!({
        "bench": "loader", "data": description, "batch": batch, "threads": threads,
        "augment": augment.as_str(), "form": args.form,
        "bytes_an_image": loaded.bytes.checked_div(loaded.samples - loaded.cached),
        "cached_share": loaded.cached as f64 / loaded.samples as f64,
        "median_ms": median(&times), "min_ms": min(&times),
        // Of all batches and the whole time: single waits say little while others are being prepared.
        "images_per_second": steps as f64 * f64::from(batch) / all,
    }))
}

/// Drawn images, encoded, in memory: what a machine decodes without any disk.
struct DrawnJpegs(Vec<Vec<u8>>);

impl DrawnJpegs {
    fn draw() -> anyhow::Result<Self> {
        let mut pixels = [0; PIXEL_BYTES];
        let files = (0..JPEGS).map(|index| {
            synthetic::draw(1, index, 0, &mut pixels);
            let image = RgbImage::from_raw(SIDE as u32, SIDE as u32, pixels.to_vec());
            let image = image.context("as many bytes as pixels")?;
            recode::encode(&image, JPEG_QUALITY).map_err(|refused| anyhow::anyhow!(refused.message))
        });
        Ok(Self(files.collect::<anyhow::Result<_>>()?))
    }
}

impl Dataset for DrawnJpegs {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn num_classes(&self) -> u32 {
        1
    }

    fn describe(&self) -> String {
        format!(
            "{} drawn faces as JPEG of quality {JPEG_QUALITY}, in memory",
            self.0.len()
        )
    }

    fn name(&self, index: u64) -> String {
        format!("drawn JPEG {index}")
    }

    fn record(&self, index: u64) -> Result<Record<'_>, DataError> {
        Ok(Record {
            label: 0,
            image: Image::Encoded(Cow::Borrowed(&self.0[index as usize]), OtherSize::Refuse),
        })
    }
}

//! How fast batches are read, decoded and augmented.

use super::timing::{median, min, time};
use crate::data::{
    self, Dataset, Epochs, Form, ImageCache, Loader, LoaderOptions, synthetic::SyntheticFaces,
};
use anyhow::Context;
use arcface_proto::spec::Augment;
use serde_json::{Value, json};
use std::{sync::Arc, time::Instant};

/// Batches as training would wait for them.
pub(super) fn measure(
    repetitions: u32,
    data: &str,
    batch: u32,
    threads: u16,
    cache: Option<u64>,
) -> anyhow::Result<Value> {
    let steps = u64::from(repetitions) + 1;
    let dataset: Arc<dyn Dataset> = match data {
        data::synthetic::NAME => Arc::new(SyntheticFaces::new(1, 1000, steps * u64::from(batch))),
        path => data::open_path(path.as_ref(), None)?,
    };
    let description = dataset.describe();
    // A small data set is read in several epochs.
    let plan = Epochs::new(dataset.len(), batch.into(), 1)?.plan(0, 1, batch, 0..steps);
    let options = LoaderOptions {
        threads: threads.into(),
        augment: Augment::Flip,
        seed: 1,
        prefetch: 4,
        form: Form::Planes,
        cache: cache.map(|bytes| Arc::new(ImageCache::new(bytes))),
    };
    let mut loader = Loader::new(dataset, plan, options);
    let begin = Instant::now();
    let times = time(repetitions, |_| {
        loader.next().context("the loader ended early")??;
        Ok(())
    })?;
    let all = begin.elapsed().as_secs_f64();
    Ok(json!({
        "bench": "loader", "data": description, "batch": batch, "threads": threads,
        "median_ms": median(&times), "min_ms": min(&times),
        // Of all batches and the whole time: single waits say little while others are being prepared.
        "images_per_second": steps as f64 * f64::from(batch) / all,
    }))
}

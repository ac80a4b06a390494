//! What a checkpoint costs: the copy that training waits for, and the writing, digests and reading that it does not.

use super::timing::{median, min, time};
use crate::checkpoint::{self, Checkpoint, NamedTensor, PartKind, manifest, write};
use arcface_proto::{types::ClassRange, v1::CheckpointManifest};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Instant;
use tch::{Device, Kind, Tensor};

/// Seconds between checkpoints that the share of time lost is given for.
const INTERVAL_S: f64 = 60.0;

/// One part of weights and momentum.
pub(super) fn measure(repetitions: u32, classes: u32, dim: u32, dir: &Path) -> anyhow::Result<Value> {
    let range = ClassRange { lo: 0, hi: classes };
    let rows = || Tensor::rand([classes.into(), dim.into()], (Kind::Float, Device::Cpu));
    let state = [("weight", rows()), ("momentum", rows())];
    let borrowed = state.each_ref().map(|(name, tensor)| (*name, tensor));
    // The first copy takes fresh memory; those after it, as in training, the memory of one that is written.
    let begin = Instant::now();
    let mut copy: Vec<NamedTensor> = write::snapshot(&borrowed, Vec::new());
    let first_copy_ms = begin.elapsed().as_secs_f64() * 1e3;
    let copying = time(repetitions, |_| {
        copy = write::snapshot(&borrowed, std::mem::take(&mut copy));
        Ok(())
    })?;

    let scratch = dir.join(format!(".bench-checkpoint-{}", std::process::id()));
    let remove = Scratch(scratch.clone());
    let mut part = checkpoint::write_part(&scratch, PartKind::Head(range), &copy)?;
    let writing = time(repetitions, |_| {
        part = checkpoint::write_part(&scratch, PartKind::Head(range), &copy)?;
        Ok(())
    })?;
    let bytes = part.bytes;
    let file = std::fs::read(scratch.join(&part.file))?;
    let hashing = time(repetitions, |_| {
        std::hint::black_box(blake3::hash(&file));
        Ok(())
    })?;
    drop(file);
    let parts = vec![checkpoint::write_part(&scratch, PartKind::Backbone, &[])?, part];
    let manifest = CheckpointManifest {
        format: manifest::FORMAT,
        num_classes: classes,
        parts,
        ..Default::default()
    };
    let verifying = time(repetitions, |_| {
        Ok(Checkpoint::open(&scratch, manifest.clone())?.verify()?)
    })?;
    let reading = time(repetitions, |_| {
        Checkpoint::open(&scratch, manifest.clone())?.head_rows(range)?;
        Ok(())
    })?;
    drop(remove);
    let per_second = |milliseconds: f64| bytes as f64 / (milliseconds / 1e3);
    Ok(json!({
        "bench": "checkpoint", "classes": classes, "dim": dim, "bytes": bytes,
        "copy_first_ms": first_copy_ms,
        "copy_median_ms": median(&copying), "copy_min_ms": min(&copying),
        "stall_share_at_one_a_minute": median(&copying) / 1e3 / INTERVAL_S,
        "copy_gb_per_s": per_second(median(&copying)) / 1e9,
        "write_median_ms": median(&writing), "write_min_ms": min(&writing),
        "write_mb_per_s": per_second(median(&writing)) / 1e6,
        "digest_gb_per_s": per_second(median(&hashing)) / 1e9,
        "verify_median_ms": median(&verifying), "verify_min_ms": min(&verifying),
        "read_median_ms": median(&reading), "read_min_ms": min(&reading),
    }))
}

/// A directory that goes when the benchmark does, also after an error.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed stays in sight of the user, who chose the place.
        drop(std::fs::remove_dir_all(&self.0));
    }
}

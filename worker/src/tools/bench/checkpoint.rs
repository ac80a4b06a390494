//! How fast a head part is written, verified and read.

use super::timing::{median, min, time};
use crate::checkpoint::{self, Checkpoint, PartKind, manifest};
use arcface_proto::{types::ClassRange, v1::CheckpointManifest};
use serde_json::{Value, json};
use std::path::PathBuf;
use tch::{Device, Kind, Tensor};

/// One part of weights and momentum.
pub(super) fn measure(
    repetitions: u32,
    classes: u32,
    dim: u32,
    dir: &std::path::Path,
) -> anyhow::Result<Value> {
    let range = ClassRange { lo: 0, hi: classes };
    let rows = || Tensor::rand([classes.into(), dim.into()], (Kind::Float, Device::Cpu));
    let tensors = [("weight".to_owned(), rows()), ("momentum".to_owned(), rows())];
    let scratch = dir.join(format!(".bench-checkpoint-{}", std::process::id()));
    let remove = Scratch(scratch.clone());
    let mut bytes = 0;
    let write = time(repetitions, |_| {
        bytes = checkpoint::write_part(&scratch, PartKind::Head(range), &tensors)?.bytes;
        Ok(())
    })?;
    let parts = vec![
        checkpoint::write_part(&scratch, PartKind::Backbone, &[])?,
        checkpoint::write_part(&scratch, PartKind::Head(range), &tensors)?,
    ];
    let manifest = CheckpointManifest {
        format: manifest::FORMAT,
        num_classes: classes,
        parts,
        ..Default::default()
    };
    let checkpoint = Checkpoint::open(&scratch, manifest)?;
    let verify = time(repetitions, |_| Ok(checkpoint.verify()?))?;
    let read = time(repetitions, |_| {
        checkpoint.head_rows(range)?;
        Ok(())
    })?;
    drop(remove);
    Ok(json!({
        "bench": "checkpoint", "classes": classes, "dim": dim, "bytes": bytes,
        "write_median_ms": median(&write), "write_min_ms": min(&write),
        "verify_median_ms": median(&verify), "verify_min_ms": min(&verify),
        "read_median_ms": median(&read), "read_min_ms": min(&read),
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

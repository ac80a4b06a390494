//! What a checkpoint costs: the copy that training waits for, and the writing, digests and reading that it does not; in turn with what
//! the disk does by itself with as many bytes.

use super::{
    scratch::Scratch,
    timing::{median, min, time},
};
use crate::checkpoint::{self, Checkpoint, NamedTensor, PartKind, manifest, write};
use arcface_proto::{types::ClassRange, v1::CheckpointManifest};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::time::Instant;
use tch::{Device, Kind, Tensor};

/// Seconds between checkpoints that the share of time lost is given for.
const INTERVAL_S: f64 = 60.0;
/// Bytes that the disk by itself is given at once.
const CHUNK: usize = 4 << 20;

/// One part of weights and momentum.
pub(super) fn measure(repetitions: u32, classes: u32, dim: u32, dir: &Path) -> anyhow::Result<Value> {
    let range = ClassRange { lo: 0, hi: classes };
    let scratch = Scratch::new(dir, "checkpoint")?;
    let scratch = scratch.path();
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

    let mut part = checkpoint::write_part(scratch, PartKind::Head(range), &copy)?;
    let (ours, raw) = (scratch.join(&part.file), scratch.join("raw"));
    let mut contents = fs::read(&ours)?;
    let mut times: [Vec<f64>; 5] = Default::default();
    // The first round does not count.
    for repetition in 0..=repetitions {
        let mut put = |which: usize, milliseconds| {
            if repetition > 0 {
                times[which].push(milliseconds);
            }
        };
        let begin = Instant::now();
        part = checkpoint::write_part(scratch, PartKind::Head(range), &copy)?;
        put(WRITE, since(begin));
        let begin = Instant::now();
        write_raw(&raw, &contents)?;
        put(RAW_WRITE, since(begin));
        forget(&raw)?;
        read_raw(&raw, &mut contents)?;
        put(RAW_WRITE_AND_READ, since(begin));

        let manifest = manifest_of(scratch, &part, classes)?;
        forget(&ours)?;
        let begin = Instant::now();
        Checkpoint::open(scratch, manifest)?.head_rows(range)?;
        put(READ, since(begin));
        forget(&raw)?;
        let begin = Instant::now();
        read_raw(&raw, &mut contents)?;
        put(RAW_READ, since(begin));
    }
    let bytes = part.bytes;
    let hashing = time(repetitions, |_| {
        std::hint::black_box(blake3::hash(&contents));
        Ok(())
    })?;
    drop(contents);
    let manifest = manifest_of(scratch, &part, classes)?;
    let verifying = time(repetitions, |_| {
        Ok(Checkpoint::open(scratch, manifest.clone())?.verify()?)
    })?;
    let from_memory = time(repetitions, |_| {
        Checkpoint::open(scratch, manifest.clone())?.head_rows(range)?;
        Ok(())
    })?;
    let per_second = |milliseconds: f64| bytes as f64 / (milliseconds / 1e3);
    let [writing, raw_writing, raw_both, reading, raw_reading] = &times;
    Ok(json!({
        "bench": "checkpoint", "classes": classes, "dim": dim, "bytes": bytes,
        "copy_first_ms": first_copy_ms,
        "copy_median_ms": median(&copying), "copy_min_ms": min(&copying),
        "stall_share_at_one_a_minute": median(&copying) / 1e3 / INTERVAL_S,
        "copy_gb_per_s": per_second(median(&copying)) / 1e9,
        // Until it is durable and was read again from the disk.
        "write_median_ms": median(writing), "write_min_ms": min(writing),
        "write_mb_per_s": per_second(median(writing)) / 1e6,
        "raw_write_median_ms": median(raw_writing), "raw_write_min_ms": min(raw_writing),
        "raw_write_mb_per_s": per_second(median(raw_writing)) / 1e6,
        "raw_write_and_read_median_ms": median(raw_both), "raw_write_and_read_min_ms": min(raw_both),
        "write_against_raw_write_and_read": median(&ratios(raw_both, writing)),
        // From the disk.
        "read_median_ms": median(reading), "read_min_ms": min(reading),
        "read_mb_per_s": per_second(median(reading)) / 1e6,
        "raw_read_median_ms": median(raw_reading), "raw_read_min_ms": min(raw_reading),
        "raw_read_mb_per_s": per_second(median(raw_reading)) / 1e6,
        "read_against_raw_read": median(&ratios(raw_reading, reading)),
        // From the system's memory.
        "digest_gb_per_s": per_second(median(&hashing)) / 1e9,
        "verify_median_ms": median(&verifying), "verify_min_ms": min(&verifying),
        "read_from_memory_median_ms": median(&from_memory), "read_from_memory_min_ms": min(&from_memory),
    }))
}

/// Places in the list of times.
const WRITE: usize = 0;
const RAW_WRITE: usize = 1;
const RAW_WRITE_AND_READ: usize = 2;
const READ: usize = 3;
const RAW_READ: usize = 4;

fn since(begin: Instant) -> f64 {
    begin.elapsed().as_secs_f64() * 1e3
}

/// How many times as fast as alone, repetition by repetition.
fn ratios(raw: &[f64], ours: &[f64]) -> Vec<f64> {
    raw.iter().zip(ours).map(|(raw, ours)| raw / ours).collect()
}

/// A checkpoint of this part, and of no backbone to speak of.
fn manifest_of(
    dir: &Path,
    part: &arcface_proto::v1::CheckpointPart,
    classes: u32,
) -> anyhow::Result<CheckpointManifest> {
    Ok(CheckpointManifest {
        format: manifest::FORMAT,
        num_classes: classes,
        parts: vec![
            checkpoint::write_part(dir, PartKind::Backbone, &[])?,
            part.clone(),
        ],
        ..Default::default()
    })
}

/// Writes a file until it is durable.
fn write_raw(path: &Path, contents: &[u8]) -> anyhow::Result<()> {
    let mut file = File::create(path)?;
    for chunk in contents.chunks(CHUNK) {
        file.write_all(chunk)?;
    }
    Ok(file.sync_all()?)
}

/// Reads a file into memory that is there.
fn read_raw(path: &Path, contents: &mut [u8]) -> anyhow::Result<()> {
    let mut file = File::open(path)?;
    for chunk in contents.chunks_mut(CHUNK) {
        file.read_exact(chunk)?;
    }
    Ok(())
}

/// Makes the system forget what it has of a durable file, so that it is read from the disk.
fn forget(path: &Path) -> anyhow::Result<()> {
    checkpoint::forget(&File::open(path)?);
    Ok(())
}

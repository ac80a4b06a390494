//! Checkpoints on a server with the protocol of S3, over HTTP: written, resumed at another world size, damaged, removed,
//! and what is said when the server is away.

// Cluster tests use more of it.
#[allow(dead_code)]
#[path = "../../tests/harness/s3.rs"]
mod s3;

use anyhow::{Context, Result, ensure};
use arcface_proto::{types::ClassRange, v1::CheckpointManifest};
use arcface_worker::checkpoint::{
    CheckpointError, Location, NamedTensor, PartKind, location::Remote, manifest,
};
use object_store::{BackoffConfig, RetryConfig, aws::AmazonS3Builder};
use s3::{BUCKET, KEY, S3};
use std::{fs, path::PathBuf, sync::Arc, time::Duration};
use tch::{Device, Kind, Tensor};

/// The largest part is of two requests.
const CLASSES: u32 = 40_000;
const DIM: i64 = 128;

fn location(server: &S3) -> Result<Location> {
    let _there = rustls::crypto::ring::default_provider().install_default();
    // Failures are to be seen soon.
    let retry = RetryConfig {
        max_retries: 1,
        retry_timeout: Duration::from_secs(1),
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(1),
            ..Default::default()
        },
    };
    let store = AmazonS3Builder::new()
        .with_bucket_name(BUCKET)
        .with_endpoint(server.endpoint())
        .with_allow_http(true)
        .with_access_key_id(KEY.0)
        .with_secret_access_key(KEY.1)
        .with_retry(retry)
        .build()?;
    let remote = Remote::on(Arc::new(store), "s3://faces/runs", "runs")?;
    Ok(Location::remote(remote, &"job-0123456789ab".parse()?))
}

fn rows(classes: ClassRange) -> Vec<NamedTensor> {
    let class = Tensor::arange_start(
        i64::from(classes.lo),
        i64::from(classes.hi),
        (Kind::Float, Device::Cpu),
    );
    let weight = class.unsqueeze(1) + Tensor::arange(DIM, (Kind::Float, Device::Cpu)) / 256.0;
    vec![("weight".into(), weight), ("updates".into(), Tensor::from(7i64))]
}

fn backbone() -> Vec<NamedTensor> {
    vec![("model.fc".into(), Tensor::arange(24, (Kind::Float, Device::Cpu)))]
}

fn written(location: &Location, world: u32, step: u64) -> Result<CheckpointManifest> {
    let directory = location.directory(&format!("step-{step:010}-g1"));
    let mut parts = vec![location.write_part(&directory, PartKind::Backbone, &backbone(), &|| {})?];
    for rank in 0..world {
        let classes = ClassRange::of_rank(CLASSES, rank, world);
        parts.push(location.write_part(&directory, PartKind::Head(classes), &rows(classes), &|| {})?);
    }
    let manifest = CheckpointManifest {
        format: manifest::FORMAT,
        job_id: "job-0123456789ab".into(),
        generation: 1,
        step,
        world_size: world,
        num_classes: CLASSES,
        directory,
        parts,
        ..Default::default()
    };
    location.write_manifest(&manifest)?;
    Ok(manifest)
}

fn resumed(
    location: &Location,
    manifest: &CheckpointManifest,
    rank: u32,
    world: u32,
) -> Result<(), CheckpointError> {
    let classes = ClassRange::of_rank(CLASSES, rank, world);
    let checkpoint = location.open(manifest, classes, &|| {})?;
    let head = checkpoint.head_rows(classes)?;
    for (found, expected) in [(head, rows(classes)), (checkpoint.backbone()?, backbone())] {
        for (name, expected) in &expected {
            let found = found.iter().find(|(found, _)| found == name);
            assert!(
                found.is_some_and(|(_, tensor)| tensor.equal(expected)),
                "{name} of {rank}/{world}"
            );
        }
    }
    Ok(())
}

fn file(server: &S3, manifest: &CheckpointManifest, name: &str) -> PathBuf {
    server.bucket().join("runs").join(&manifest.directory).join(name)
}

#[test]
fn a_checkpoint_is_resumed_at_other_world_sizes() -> Result<()> {
    let server = S3::start()?;
    let location = location(&server)?;
    location.check()?;
    let one = written(&location, 1, 10)?;
    let two = written(&location, 2, 20)?;
    ensure!(one.parts[1].bytes > 16 << 20, "a part in several pieces: {one:?}");
    for (manifest, world) in [(&one, 1), (&one, 3), (&two, 1), (&two, 5)] {
        for rank in 0..world {
            resumed(&location, manifest, rank, world)?;
        }
    }
    // What other programs see: the manifest, and parts with the digests that it has.
    let text = fs::read(file(&server, &two, manifest::FILE))?;
    let read = manifest::parse(&file(&server, &two, manifest::FILE), &text)?;
    ensure!(read == two, "{read:?}");
    for part in &two.parts {
        let bytes = fs::read(file(&server, &two, &part.file))?;
        ensure!(
            blake3::hash(&bytes).to_hex().as_str() == part.blake3,
            "{}",
            part.file
        );
    }
    location.remove(&one.directory)?;
    ensure!(
        !file(&server, &one, manifest::FILE).exists()
            && !file(&server, &one, "backbone.safetensors").exists()
    );
    resumed(&location, &two, 0, 2)?;
    Ok(())
}

#[test]
fn damage_is_found_and_a_server_that_is_away_is_none() -> Result<()> {
    let mut server = S3::start()?;
    let location = location(&server)?;
    let manifest = written(&location, 2, 10)?;
    let path = file(&server, &manifest, &manifest.parts[1].file);
    let good = fs::read(&path)?;
    let mut bad = good.clone();
    bad[5_000_000] ^= 1;
    fs::write(&path, &bad)?;
    let error = resumed(&location, &manifest, 0, 2).expect_err("corrupted");
    ensure!(
        error.is_damage() && error.to_string().contains("BLAKE3"),
        "{error}"
    );
    resumed(&location, &manifest, 1, 2).context("the other rank does not read it")?;

    fs::write(&path, &good[..good.len() - 1])?;
    let error = resumed(&location, &manifest, 0, 2).expect_err("cut off");
    ensure!(matches!(error, CheckpointError::Size { .. }), "{error}");

    fs::remove_file(&path)?;
    let error = resumed(&location, &manifest, 0, 2).expect_err("gone");
    ensure!(error.is_damage(), "{error}");

    fs::write(&path, &good)?;
    server.stop();
    let error = resumed(&location, &manifest, 0, 2).expect_err("away");
    ensure!(
        !error.is_damage() && error.to_string().contains("s3://faces/runs/job-"),
        "{error}"
    );
    let error = written(&location, 2, 20).expect_err("away");
    ensure!(
        error.to_string().contains("write s3://faces/runs/job-"),
        "{error}"
    );
    location.check().expect_err("away");
    server.resume()?;
    resumed(&location, &manifest, 0, 2).context("it is back")?;
    Ok(())
}

#[test]
fn a_wrong_key_and_a_wrong_bucket_are_told() -> Result<()> {
    let server = S3::start()?;
    location(&server)?.check()?;
    for (bucket, secret) in [(BUCKET, "another"), ("nothing", KEY.1)] {
        let store = AmazonS3Builder::new()
            .with_bucket_name(bucket)
            .with_endpoint(server.endpoint())
            .with_allow_http(true)
            .with_access_key_id(KEY.0)
            .with_secret_access_key(secret)
            .build()?;
        let remote = Remote::on(Arc::new(store), "s3://b", "")?;
        let location = Location::remote(remote, &"job-0123456789ab".parse()?);
        let error = location.check().expect_err("refused");
        ensure!(
            !error.is_damage() && !error.to_string().contains(KEY.1),
            "{error}"
        );
    }
    Ok(())
}

//! Exported networks in onnxruntime: cosine and largest difference on 64 images, one at a time and all at once.
//!
//! Runs the networks that take seconds; `ARCFACE_ONNX_NETWORKS` names others, separated by commas, or `all`
//! (`make onnx`). Needs the Python packages of `scripts/setup.sh python`; says so where they are missing.

use std::{path::Path, process::Command};

use anyhow::{Context, Result, bail, ensure};
use arcface_proto::spec::Precision;
use arcface_worker::{
    export::{npy, onnx},
    model::{Backbone, BackboneConfig, ForwardMode, fill, registry::REGISTRY},
};
use serde_json::{Value, json};
use tch::Tensor;

/// Networks of every family that take a few seconds each.
const QUICK: [&str; 4] = ["tiny", "r18", "mbf", "vit_t"];
const IMAGES: i64 = 64;
/// libtorch reads several images at a time here, as `infer` does.
const CHUNK: i64 = 16;
const EMBEDDING_SIZE: i64 = 512;
/// What is promised to users of exported networks.
const MIN_COSINE: f64 = 0.99999;
const MAX_DIFFERENCE: f64 = 1e-3;
/// Embeddings of trained networks are of size 1, and those of filled ones of up to about 10. Where a thousand residual
/// blocks with filled weights let them grow beyond this (1e11 for r2060), the difference is measured in their size.
const USUAL_SIZE: f64 = 100.0;
/// `scripts/python.sh` ends with this if the packages are not there (EX_UNAVAILABLE).
const NO_PACKAGES: i32 = 69;

fn networks() -> Vec<&'static str> {
    let wanted = std::env::var("ARCFACE_ONNX_NETWORKS").unwrap_or_else(|_| QUICK.join(","));
    let names = REGISTRY.iter().map(|network| network.name);
    names
        .filter(|&name| wanted == "all" || wanted.split(',').any(|wanted| wanted == name))
        .collect()
}

/// What became of a check.
enum Checked {
    Seen(Value),
    NoPackages(String),
}

/// Runs `tests/python/onnx_check.py`. Its packages may be missing where nobody set `CI`.
fn check(model: &Path, images: &Path, embeddings: &Path) -> Result<Checked> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let output = Command::new(root.join("scripts/python.sh"))
        .arg(root.join("tests/python/onnx_check.py"))
        .args([model, images, embeddings])
        .output()
        .context("start scripts/python.sh")?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    let missing = output.status.code() == Some(NO_PACKAGES) || stderr.contains("ModuleNotFoundError");
    if missing && std::env::var_os("CI").is_some() {
        bail!("the Python packages are missing: {stderr}");
    }
    if missing {
        return Ok(Checked::NoPackages(stderr.into_owned()));
    }
    ensure!(output.status.success(), "onnx_check.py: {stderr}");
    Ok(Checked::Seen(serde_json::from_slice(&output.stdout)?))
}

fn embed(backbone: &Backbone, images: &Tensor) -> Tensor {
    let mode = ForwardMode::evaluation(Precision::Fp32);
    let chunks = images.split(CHUNK, 0);
    let parts: Vec<Tensor> = tch::no_grad(|| {
        chunks
            .iter()
            .map(|chunk| backbone.forward(chunk, &mode))
            .collect()
    });
    Tensor::cat(&parts, 0)
}

/// Writes a filled network as ONNX, and its embeddings of the images. The network is gone from memory afterwards:
/// onnxruntime needs the place for the largest ones.
fn export(
    network: &str,
    fold_batch_norm: bool,
    images: &Tensor,
    model: &Path,
    embeddings: &Path,
) -> Result<()> {
    let mut backbone = Backbone::new(&BackboneConfig::new(network, EMBEDDING_SIZE))?;
    backbone.fill_golden();
    npy::write(embeddings, &embed(&backbone, images))?;
    let options = onnx::Options {
        fold_batch_norm,
        ..onnx::Options::default()
    };
    onnx::write(model, &backbone, options)?;
    Ok(())
}

#[test]
fn onnxruntime_computes_the_same_embeddings_at_batch_1_and_64() -> Result<()> {
    let networks = networks();
    ensure!(!networks.is_empty(), "ARCFACE_ONNX_NETWORKS names no network");
    // Batch norms as operators of their own compute the same; one network shows it.
    let cases = networks
        .iter()
        .map(|&network| (network, true))
        .chain([("tiny", false)]);
    let folder = tempfile::tempdir()?;
    let [pixels, model, embeddings] =
        ["images.npy", "model.onnx", "embeddings.npy"].map(|name| folder.path().join(name));
    let images = fill::symmetric("input", &[IMAGES, 3, 112, 112]);
    npy::write(&pixels, &images)?;
    for (network, fold_batch_norm) in cases {
        export(network, fold_batch_norm, &images, &model, &embeddings)?;
        let report = match check(&model, &pixels, &embeddings)? {
            Checked::Seen(report) => report,
            Checked::NoPackages(why) => {
                eprintln!("SKIPPED: onnxruntime was not run: {}", why.trim());
                return Ok(());
            }
        };
        let batch_norm = if fold_batch_norm { "folded" } else { "separate" };
        println!("{network}, batch norm {batch_norm}: {report}");
        ensure!(report["metadata"]["batch_norm"] == batch_norm, "{report}");
        assert_report(network, &report)?;
    }
    Ok(())
}

fn assert_report(network: &str, report: &Value) -> Result<()> {
    ensure!(
        report["input"] == json!(["input", "tensor(float)", ["batch", 3, 112, 112]]),
        "{network}: {report}"
    );
    ensure!(
        report["output"] == json!(["embedding", "tensor(float)", ["batch", EMBEDDING_SIZE]]),
        "{network}: {report}"
    );
    ensure!(report["metadata"]["network"] == network, "{network}: {report}");
    let size = report["rms"].as_f64().context("the embeddings' size")?;
    let unit = if size > USUAL_SIZE { size } else { 1.0 };
    for (batch, rows) in [("one_by_one", IMAGES), ("all_at_once", IMAGES), ("three", 3)] {
        let seen = &report[batch];
        ensure!(seen["rows"] == rows, "{network}: {batch}: {seen}");
        // What is no number is neither large nor small enough.
        let cosine = seen["min_cosine"].as_f64().unwrap_or(f64::NAN);
        ensure!(
            cosine >= MIN_COSINE,
            "{network}: {batch}: cosine {cosine} < {MIN_COSINE}"
        );
        let difference = seen["max_difference"].as_f64().unwrap_or(f64::NAN) / unit;
        ensure!(
            difference <= MAX_DIFFERENCE,
            "{network}: {batch}: differs by {difference:.1e} > {MAX_DIFFERENCE}"
        );
    }
    Ok(())
}

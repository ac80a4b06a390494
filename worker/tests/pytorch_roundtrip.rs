//! Weights to PyTorch and back, with PyTorch itself: what we write it loads strictly, bit for bit; what it writes, in
//! every form that people keep weights in, gives the same network and the same embeddings here.
//!
//! Needs the Python packages of `scripts/setup.sh python`; says so where they are missing.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use arcface_proto::spec::Precision;
use arcface_worker::{
    export::{pytorch, safetensors, weights},
    model::{Backbone, BackboneConfig, StateEntry, fill},
    tools::{
        infer::{self, InferArgs},
        place::PlaceArgs,
    },
};
use serde_json::Value;
use tch::{Kind, Tensor};

/// `scripts/python.sh` ends with this if the packages are not there (EX_UNAVAILABLE).
const NO_PACKAGES: i32 = 69;

/// Runs `tests/python/pytorch_state.py`; nothing where there is no PyTorch, which must be there with `CI` set.
fn python(arguments: &[&OsStr]) -> Result<Option<Value>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let output = Command::new(root.join("scripts/python.sh"))
        .arg(root.join("tests/python/pytorch_state.py"))
        .args(arguments)
        .output()
        .context("start scripts/python.sh")?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(NO_PACKAGES) || stderr.contains("ModuleNotFoundError") {
        if std::env::var_os("CI").is_some() {
            bail!("the Python packages are missing: {stderr}");
        }
        eprintln!("SKIPPED: PyTorch was not run: {}", stderr.trim());
        return Ok(None);
    }
    ensure!(output.status.success(), "pytorch_state.py: {stderr}");
    Ok(Some(serde_json::from_slice(&output.stdout)?))
}

/// A network as after some training: no tensor has the value that it is made with.
fn trained(network: &str, embedding_size: i64) -> Result<Backbone> {
    let mut backbone = Backbone::new(&BackboneConfig::new(network, embedding_size))?;
    backbone.fill_golden();
    for (step, entry) in backbone.state().iter().enumerate() {
        if entry.name.ends_with("num_batches_tracked") {
            let _ = entry.tensor.shallow_clone().fill_(1000 + step as i64);
        }
    }
    Ok(backbone)
}

fn named(state: &[StateEntry]) -> impl Iterator<Item = (&str, &Tensor)> {
    state.iter().map(|entry| (entry.name.as_str(), &entry.tensor))
}

#[test]
fn pytorch_loads_what_is_exported_strictly_and_bit_for_bit() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (model, state) = (folder.path().join("m.pt"), folder.path().join("s.safetensors"));
    for network in ["tiny", "r18", "mbf"] {
        let backbone = trained(network, 512)?;
        pytorch::write(&model, named(backbone.state()))?;
        safetensors::write(&state, named(backbone.state()))?;
        let Some(report) = python(&["check".as_ref(), model.as_ref(), state.as_ref()])? else {
            return Ok(());
        };
        println!("{network}: {report}");
        ensure!(report["tensors"] == backbone.state().len(), "{network}: {report}");
        ensure!(report["wrong"] == serde_json::json!([]), "{network}: {report}");
        ensure!(report["type"] == "OrderedDict", "{network}: {report}");
    }
    Ok(())
}

/// The embeddings that `infer` gives with a weights file.
fn embed(weights: PathBuf, input: &Path, out: PathBuf) -> Result<Tensor> {
    infer::run(InferArgs {
        images: Vec::new(),
        network: "tiny".to_owned(),
        weights,
        landmarks: None,
        tensor: Some(input.to_owned()),
        flip: false,
        out: out.clone(),
        batch: 4,
        precision: Precision::Fp32,
        place: PlaceArgs::default(),
    })?;
    let content = safetensors::read(&out)?;
    Ok(content.get("embedding").context("embeddings")?.shallow_clone())
}

#[test]
fn whatever_pytorch_writes_is_the_same_network_here() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    let backbone = trained("tiny", 32)?;
    let (state, input) = (at("state.safetensors"), at("input.safetensors"));
    safetensors::write(&state, named(backbone.state()))?;
    safetensors::write(&input, [("input", &fill::symmetric("input", &[4, 3, 112, 112]))])?;
    let Some(report) = python(&["write".as_ref(), folder.path().as_ref(), state.as_ref()])? else {
        return Ok(());
    };
    let exact = embed(state, &input, at("out.safetensors"))?;
    let files: Vec<String> = serde_json::from_value(report["files"].clone())?;
    ensure!(files.len() > 20, "{report}");
    for file in files {
        // Narrow floats were rounded when they were written, not here.
        let rounded = match file.split('.').next() {
            Some("half") => Kind::Half,
            Some("bf16") => Kind::BFloat16,
            _ => Kind::Float,
        };
        let read = weights::open_backbone(&at(&file), "tiny").with_context(|| file.clone())?;
        for (ours, original) in read.state().iter().zip(backbone.state()) {
            let expected = match original.tensor.kind() {
                Kind::Float => original.tensor.to_kind(rounded).to_kind(Kind::Float),
                _ => original.tensor.shallow_clone(),
            };
            ensure!(ours.name == original.name, "{file}: {}", ours.name);
            ensure!(ours.tensor.equal(&expected), "{file}: {} differs", ours.name);
        }
        let embedding = embed(at(&file), &input, at("out.safetensors"))?;
        if rounded == Kind::Float {
            ensure!(embedding.equal(&exact), "{file}: the embeddings differ");
        } else {
            let apart = (&embedding - &exact).norm() / exact.norm();
            let apart = apart.double_value(&[]);
            ensure!(apart > 0.0 && apart < 0.1, "{file}: {apart}");
        }
        println!("{file}: the same");
    }
    Ok(())
}

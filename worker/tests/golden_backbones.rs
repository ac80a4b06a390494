//! The backbones against the reference: parameter names, evaluation, and one training step.
//!
//! Networks that the reference has and this build lacks are counted and named.

mod golden;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use arcface_proto::spec::Precision;
use arcface_worker::model::{Backbone, BackboneConfig, DropoutDraw, ForwardMode, Role, fill, registry};
use golden::GoldenFile;
use tch::Tensor;

/// Relative L2 distance of f32 embeddings from the reference's; its own f32 and f64 runs differ by about 1e-6.
const EVALUATION: f64 = 1e-4;
/// The reference's f32 gradients differ from its f64 ones by up to `noise` of the gradnorms file (kinks of PReLU and
/// batch norm over four samples fall on either side); ours may do so independently.
const GRADIENT_NOISE: f64 = 2.0;

/// The golden files of a kind by network. Networks that the reference has and this build does not are counted and
/// named; a network that nobody knows fails the test.
fn files(folder: &str, prefix: &str, suffix: &str) -> Vec<(String, PathBuf)> {
    let mut files = Vec::new();
    let mut missing = Vec::new();
    for path in golden::golden_files(folder, prefix, suffix) {
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .expect("a UTF-8 name");
        let network = name[prefix.len()..name.len() - suffix.len()].to_owned();
        let of_reference = golden::root()
            .join(format!("backbones/state/{network}.json"))
            .exists();
        if registry::find(&network).is_some() {
            files.push((network, path));
        } else {
            assert!(of_reference, "{}: unknown network {network:?}", path.display());
            missing.push(network);
        }
    }
    println!("not supported by this build: {} {missing:?}", missing.len());
    files
}

fn filled(network: &str, embedding_size: i64) -> Backbone {
    let mut backbone = Backbone::new(&BackboneConfig::new(network, embedding_size)).expect("a known network");
    backbone.fill_golden();
    backbone
}

#[test]
fn names_shapes_and_order_equal_the_reference() {
    let files = files("backbones/state", "", ".json");
    for (network, path) in &files {
        let golden = golden::read_json(path);
        let backbone = Backbone::outline(&BackboneConfig::new(network, 512)).expect("a known network");
        let ours: Vec<serde_json::Value> = backbone
            .state()
            .iter()
            .map(|entry| {
                let kind = if entry.tensor.kind() == tch::Kind::Int64 {
                    "I64"
                } else {
                    "F32"
                };
                serde_json::json!([entry.name, entry.tensor.size(), kind])
            })
            .collect();
        let entries = golden["state_dict"].as_array().expect("a list");
        for (i, (ours, golden)) in ours.iter().zip(entries).enumerate() {
            assert_eq!(ours, golden, "{network}: entry {i}");
        }
        assert_eq!(ours.len(), entries.len(), "{network}: number of entries");
        assert_eq!(
            backbone.num_parameters() as u64,
            golden["num_parameters"],
            "{network}"
        );
        assert_eq!(
            backbone.num_trainable() as u64,
            golden["num_trainable"],
            "{network}"
        );
        let frozen = backbone.state().iter().filter(|entry| entry.role == Role::Frozen);
        let frozen: Vec<&str> = frozen.map(|entry| entry.name.as_str()).collect();
        assert_eq!(
            serde_json::json!(frozen),
            golden["frozen_parameters"],
            "{network}"
        );
    }
    golden::report("backbone states", files.len());
}

#[test]
fn evaluation_equals_the_reference() {
    let files = files("backbones", "eval_", ".safetensors");
    for (network, path) in &files {
        evaluate(network, &golden::read_safetensors(path));
    }
    golden::report("backbone evaluations", files.len());
}

fn evaluate(network: &str, file: &GoldenFile) {
    let golden = file.tensor("embedding");
    let [rows, size] = golden.size()[..] else {
        panic!("{network}: embedding is no matrix");
    };
    let backbone = filled(network, size);
    let mut first_difference = None;
    let mut tap = |module: &str, output: &Tensor| {
        let Some(golden) = file.get(&format!("tap.{module}.first64")) else {
            return;
        };
        let ours = output.reshape([-1]).narrow(0, 0, golden.size()[0]);
        let distance = golden::relative_l2(&ours, &golden);
        if distance > EVALUATION && first_difference.is_none() {
            first_difference = Some(format!("{module} (relative L2 {distance:.1e})"));
        }
    };
    let mode = ForwardMode::evaluation(Precision::Fp32);
    let input = fill::symmetric("input", &[rows, 3, 112, 112]);
    let ours = tch::no_grad(|| backbone.forward_tapped(&input, &mode, &mut tap));
    let distance = golden::relative_l2(&ours, &golden);
    println!("{network}: embedding, relative L2 {distance:.1e}");
    assert!(
        distance <= EVALUATION,
        "{network}: relative L2 {distance:.1e}; first module that differs: {first_difference:?}"
    );
    assert_eq!(
        first_difference, None,
        "{network}: a module differs though the embedding agrees"
    );
}

#[test]
fn one_training_step_equals_the_reference() {
    let files = files("backbones", "train_", ".safetensors");
    for (network, path) in &files {
        train(network, &golden::read_safetensors(path));
    }
    golden::report("backbone training steps", files.len());
}

/// Gradient norms of the reference by parameter: [f32 run, f64 run, relative difference of the gradients].
fn gradient_norms(path: &Path) -> BTreeMap<String, [f64; 3]> {
    let stem = path
        .file_stem()
        .and_then(|stem| stem.to_str())
        .expect("a UTF-8 name");
    let norms = golden::read_json(&path.with_file_name(format!("{stem}_gradnorms.json")));
    serde_json::from_value(norms["grads"].clone()).expect("three numbers a parameter")
}

fn train(network: &str, file: &GoldenFile) {
    let golden = file.tensor("embedding");
    let [rows, size] = golden.size()[..] else {
        panic!("{network}: embedding is no matrix");
    };
    let backbone = filled(network, size);
    let input = fill::symmetric("train_input", &[rows, 3, 112, 112]).set_requires_grad(true);
    let cotangent = fill::symmetric("train_cotangent", &[rows, size]);
    let mode = ForwardMode::training(Precision::Fp32, DropoutDraw::default());
    let embedding = backbone.forward(&input, &mode);
    let loss = (&embedding * &cotangent).sum(tch::Kind::Float);
    loss.backward();

    let distance = golden::relative_l2(&embedding.detach(), &golden);
    println!("{network}: training embedding, relative L2 {distance:.1e}");
    assert!(
        distance <= EVALUATION,
        "{network}: training embedding, relative L2 {distance:.1e}"
    );
    // The loss is a sum of terms of both signs: its rounding scales with the terms, not with the sum.
    let scale = golden.norm().double_value(&[]) * cotangent.norm().double_value(&[]);
    let difference = (loss.double_value(&[]) - file.scalar("loss")).abs();
    assert!(
        difference <= EVALUATION * scale,
        "{network}: loss differs by {difference:.1e}"
    );

    let norms = gradient_norms(&file.path);
    // A bias that a later batch norm removes has a true gradient of 0: its f64 norm is rounding, its f32 norm too.
    let is_zero = |norms: &[f64; 3]| norms[1] < 1e-6 * norms[0];
    let noise = norms
        .values()
        .filter(|n| !is_zero(n))
        .map(|n| n[2])
        .fold(0.0, f64::max);
    let rounding = norms
        .values()
        .filter(|n| is_zero(n))
        .map(|n| n[0])
        .fold(0.0, f64::max);
    let tolerance = GRADIENT_NOISE * noise;
    let parameters: BTreeMap<&str, &Tensor> = backbone.trainable().into_iter().collect();
    assert!(
        parameters.keys().copied().eq(norms.keys().map(String::as_str)),
        "{network}: the parameters with a gradient are others"
    );
    for (name, norms) in &norms {
        let ours = parameters[name.as_str()]
            .grad()
            .to_kind(tch::Kind::Double)
            .norm()
            .double_value(&[]);
        if is_zero(norms) {
            assert!(
                ours <= 8.0 * rounding,
                "{network}: {name}: norm {ours:.1e} of a gradient that is 0"
            );
        } else {
            let distance = (ours / norms[1] - 1.0).abs();
            assert!(
                distance <= tolerance,
                "{network}: {name}: gradient norm off by {distance:.1e}"
            );
        }
    }

    let mut worst: f64 = 0.0;
    let mut compared = 0;
    for key in file.names().filter(|key| key.starts_with("grad.")) {
        let name = &key["grad.".len()..];
        let golden = file.tensor(key);
        let ours = match name {
            "input0" => input.grad().get(0),
            name => parameters[name].grad(),
        };
        // Of large matrices the file holds the first rows.
        let ours = ours.narrow(0, 0, golden.size()[0]);
        compared += 1;
        if norms.get(name).is_some_and(is_zero) {
            let difference = golden::max_abs_difference(&ours, &golden);
            assert!(
                difference <= 8.0 * rounding,
                "{network}: {name}: differs by {difference:.1e}, true value 0"
            );
        } else {
            let distance = golden::relative_l2(&ours, &golden);
            worst = worst.max(distance);
            assert!(
                distance <= tolerance,
                "{network}: grad of {name}: relative L2 {distance:.1e} > {tolerance:.1e}"
            );
        }
    }
    println!("{network}: {compared} gradients, worst relative L2 {worst:.1e}, allowed {tolerance:.1e}");

    for key in file.names().filter(|key| key.starts_with("stat.")) {
        let name = &key["stat.".len()..];
        let entry = backbone.state().iter().find(|entry| entry.name == name);
        let ours = &entry
            .unwrap_or_else(|| panic!("{network}: no entry {name}"))
            .tensor;
        let golden = file.tensor(key).reshape(ours.size());
        let distance = golden::relative_l2(ours, &golden);
        assert!(
            distance <= EVALUATION,
            "{network}: {name}: relative L2 {distance:.1e}"
        );
    }
}

//! Tests of whole networks that need no golden file; `tiny` stands for its family.

use arcface_proto::spec::Precision;
use tch::{Device, Kind, Tensor};

use super::*;

fn tiny(config: BackboneConfig) -> Backbone {
    let mut backbone = Backbone::new(&config).unwrap();
    backbone.fill_golden();
    backbone
}

fn config() -> BackboneConfig {
    BackboneConfig::new("tiny", 32)
}

fn images(n: i64) -> Tensor {
    fill::symmetric("images", &[n, 3, IMAGE_SIZE, IMAGE_SIZE])
}

fn training(precision: Precision) -> ForwardMode {
    ForwardMode::training(precision, DropoutDraw::default())
}

fn snapshot(backbone: &Backbone) -> Vec<Tensor> {
    backbone
        .state()
        .iter()
        .map(|entry| entry.tensor.detach().copy())
        .collect()
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (a.detach().to_kind(Kind::Double), b.detach().to_kind(Kind::Double));
    (&a - &b).norm().double_value(&[]) / b.norm().double_value(&[])
}

#[test]
fn evaluation_of_a_sample_does_not_depend_on_its_batch() {
    let backbone = tiny(config());
    let mode = ForwardMode::evaluation(Precision::Fp32);
    let before = snapshot(&backbone);
    let all = tch::no_grad(|| backbone.forward(&images(3), &mode));
    let one = tch::no_grad(|| backbone.forward(&images(3).narrow(0, 1, 1), &mode));
    assert!(distance(&one, &all.narrow(0, 1, 1)) < 1e-5);
    assert_eq!(before, snapshot(&backbone), "evaluation changes nothing");
}

#[test]
fn bf16_trains_close_to_f32_with_f32_gradients() {
    let gradients = |precision| {
        let backbone = tiny(config());
        let embedding = backbone.forward(&images(8), &training(precision));
        assert_eq!(embedding.kind(), Kind::Float);
        (&embedding * fill::symmetric("cotangent", &[8, 32]))
            .sum(Kind::Float)
            .backward();
        let gradients: Vec<Tensor> = backbone
            .trainable()
            .iter()
            .map(|(_, tensor)| tensor.grad())
            .collect();
        (embedding, gradients)
    };
    let (embedding, full) = gradients(Precision::Fp32);
    let (rounded, reduced) = gradients(Precision::Bf16);
    let rounding = distance(&rounded, &embedding);
    assert!((1e-5..0.05).contains(&rounding), "{rounding}");
    assert!(reduced.iter().all(|gradient| gradient.kind() == Kind::Float));
    let flat = |gradients: &[Tensor]| {
        Tensor::cat(
            &gradients
                .iter()
                .map(|gradient| gradient.reshape([-1]))
                .collect::<Vec<_>>(),
            0,
        )
    };
    let error = distance(&flat(&reduced), &flat(&full));
    assert!(error < 0.1, "{error}");
}

#[test]
fn a_frozen_batch_norm_is_a_constant_map() {
    let frozen = tiny(BackboneConfig {
        freeze_batch_norm: true,
        ..config()
    });
    let trainable: Vec<&str> = frozen.trainable().iter().map(|(name, _)| *name).collect();
    assert!(
        trainable
            .iter()
            .all(|name| !name.contains("bn") && !name.contains("features")),
        "{trainable:?}"
    );
    let before = snapshot(&frozen);
    let embedding = frozen.forward(&images(2), &training(Precision::Fp32));
    assert_eq!(before, snapshot(&frozen), "no statistics move");
    let evaluated =
        tch::no_grad(|| tiny(config()).forward(&images(2), &ForwardMode::evaluation(Precision::Fp32)));
    assert!(
        distance(&embedding, &evaluated) < 1e-5,
        "training equals evaluation"
    );
    embedding.sum(Kind::Float).backward();
    assert!(
        frozen
            .trainable()
            .iter()
            .all(|(_, tensor)| tensor.grad().defined()),
        "every parameter left has a gradient"
    );
}

#[test]
fn small_batches_leave_finite_statistics() {
    let backbone = tiny(config());
    let before = snapshot(&backbone);
    let empty = backbone.forward(&images(0), &training(Precision::Fp32));
    assert_eq!(empty.size(), [0, 32]);
    assert_eq!(before, snapshot(&backbone), "an empty batch changes nothing");
    let one = backbone.forward(&images(1), &training(Precision::Fp32));
    assert!(bool::try_from(one.isfinite().all()).unwrap());
    for entry in backbone.state() {
        assert!(
            bool::try_from(entry.tensor.isfinite().all()).unwrap(),
            "{}",
            entry.name
        );
    }
}

#[test]
fn initial_weights_have_the_reference_distributions() {
    let draw = |seed| {
        let mut backbone = Backbone::new(&BackboneConfig::new("r18", 64)).unwrap();
        backbone.init_random(seed);
        backbone
    };
    let backbone = draw(1);
    let tensor = |name: &str| {
        let entry = backbone.state().iter().find(|entry| entry.name == name).unwrap();
        entry.tensor.detach()
    };
    let std = |name: &str| tensor(name).std(true).double_value(&[]);
    assert!((std("layer3.0.conv1.weight") - 0.1).abs() < 1e-3);
    let bound = 1.0 / (25088f64).sqrt();
    assert!((std("fc.weight") / (bound / 3f64.sqrt()) - 1.0).abs() < 1e-2);
    assert!(tensor("fc.weight").abs().max().double_value(&[]) <= bound * (1.0 + 1e-6));
    let is = |name: &str, value: f64| bool::try_from(tensor(name).eq(value).all()).unwrap();
    assert!(
        is("bn1.weight", 1.0)
            && is("bn1.bias", 0.0)
            && is("bn1.running_var", 1.0)
            && is("prelu.weight", 0.25)
    );
    assert!(is("features.weight", 1.0) && is("features.num_batches_tracked", 0.0));
    assert_eq!(snapshot(&backbone), snapshot(&draw(1)), "a seed is a network");
    assert_ne!(tensor("conv1.weight"), draw(2).state()[0].tensor.detach());

    let mut mbf = Backbone::new(&BackboneConfig::new("mbf", 64)).unwrap();
    mbf.init_random(1);
    let separated = mbf
        .state()
        .iter()
        .find(|entry| entry.name == "conv_sep.layers.0.weight")
        .unwrap();
    let std = separated.tensor.std(true).double_value(&[]);
    assert!((std / (2f64 / 512.0).sqrt() - 1.0).abs() < 1e-2, "{std}");
}

#[test]
fn a_state_that_does_not_fit_changes_nothing() {
    let mut backbone = tiny(config());
    let before = snapshot(&backbone);
    let shape = |name: &str| match name {
        "fc.bias" => vec![33],
        _ => vec![],
    };
    let error = backbone
        .load_state(&mut |name| match name {
            "conv1.weight" => Some(Tensor::ones([16, 3, 3, 3], (Kind::Float, Device::Cpu))),
            name => Some(Tensor::ones(shape(name), (Kind::Float, Device::Cpu))),
        })
        .unwrap_err();
    assert!(error.to_string().contains("has shape []"), "{error}");
    let error = backbone.load_state(&mut |_| None).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("conv1.weight of tiny is missing (and "),
        "{error}"
    );
    assert_eq!(before, snapshot(&backbone));
}

#[test]
fn unknown_networks_and_sizes_are_refused() {
    let error = |network: &str, size| match Backbone::new(&BackboneConfig::new(network, size)) {
        Ok(_) => panic!("{network} with {size} was built"),
        Err(error) => error.to_string(),
    };
    assert!(error("r51", 512).contains("known networks: tiny, r18"));
    assert!(error("tiny", 0).contains("embedding size 0"));
}

#[test]
fn counting_without_computing_counts_the_same() {
    for network in ["tiny", "mbf"] {
        let backbone = Backbone::new(&BackboneConfig::new(network, 32)).unwrap();
        let mode = ForwardMode::evaluation(Precision::Fp32);
        let mut pass = Pass::new(&mode, None);
        let _embedding = tch::no_grad(|| backbone.run(&images(1), &mut pass));
        assert_eq!(pass.macs(), backbone.macs(), "{network}");
    }
}

//! Tests of whole networks that need no golden file; `tiny` stands for its family.

use arcface_proto::spec::Precision;
use tch::{Device, Kind, Tensor};

use super::*;

fn filled(config: BackboneConfig) -> Backbone {
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

/// Gradients of all parameters, in one row. Those that the pass did not reach are zero.
fn flat(gradients: &[Tensor]) -> Tensor {
    let rows: Vec<Tensor> = gradients.iter().map(|gradient| gradient.reshape([-1])).collect();
    Tensor::cat(&rows, 0)
}

fn all_gradients(backbone: &Backbone) -> Vec<Tensor> {
    let gradient = |parameter: &Tensor| match parameter.grad() {
        gradient if gradient.defined() => gradient,
        _ => parameter.zeros_like(),
    };
    let trainable = backbone.trainable();
    trainable
        .iter()
        .map(|(_, parameter)| gradient(parameter))
        .collect()
}

/// Samples `first..first + n` of a global batch.
fn drawing(precision: Precision, first_sample: u64) -> ForwardMode {
    let draw = DropoutDraw {
        seed: 3,
        step: 4,
        first_sample,
    };
    ForwardMode::training(precision, draw)
}

#[test]
fn a_transformer_trains_alike_however_the_global_batch_is_cut() {
    let config = BackboneConfig {
        // Statistics of a batch depend on what is in it, whatever is random.
        freeze_batch_norm: true,
        dropout: 0.2,
        ..BackboneConfig::new("vit_t", 32)
    };
    let images = images(5);
    let cotangent = fill::symmetric("cotangent", &[5, 32]);
    let train = |cuts: &[i64]| {
        let backbone = filled(config.clone());
        let mut first = 0;
        let embeddings: Vec<Tensor> = cuts
            .iter()
            .map(|&rows| {
                let part = images.narrow(0, first, rows);
                let pass = backbone.forward_to_train(&part, &drawing(Precision::Fp32, first as u64));
                let embedding = pass.embedding();
                pass.backward(&cotangent.narrow(0, first, rows));
                first += rows;
                embedding
            })
            .collect();
        (Tensor::cat(&embeddings, 0), flat(&all_gradients(&backbone)))
    };
    let (whole, whole_gradient) = train(&[5]);
    let (parts, parts_gradient) = train(&[2, 0, 1, 2]);
    assert!(distance(&parts, &whole) < 1e-5, "{}", distance(&parts, &whole));
    let error = distance(&parts_gradient, &whole_gradient);
    assert!(error < 1e-5, "{error}");
}

#[test]
fn what_is_random_in_training_is_not_in_evaluation() {
    let backbone = filled(BackboneConfig::new("vit_t", 32));
    let embed = |mode: &ForwardMode| tch::no_grad(|| backbone.forward(&images(2), mode));
    let evaluation = ForwardMode::evaluation(Precision::Fp32);
    let drawn = ForwardMode {
        train: false,
        ..drawing(Precision::Fp32, 7)
    };
    assert_eq!(embed(&evaluation), embed(&evaluation));
    assert_eq!(embed(&evaluation), embed(&drawn));
    let other_samples = embed(&drawing(Precision::Fp32, 9));
    assert!(distance(&embed(&drawing(Precision::Fp32, 7)), &other_samples) > 1e-3);
}

#[test]
fn the_mask_token_trains_where_tokens_are_hidden() {
    for (network, hides) in [("vit_t", true), ("vit_t_dp005_mask0", false)] {
        let backbone = filled(BackboneConfig::new(network, 32));
        let pass = backbone.forward_to_train(&images(2), &training(Precision::Fp32));
        pass.backward(&fill::symmetric("cotangent", &[2, 32]));
        for (name, parameter) in backbone.trainable() {
            let gradient = parameter.grad();
            let reached = gradient.defined() && gradient.abs().max().double_value(&[]) > 0.0;
            assert_eq!(reached, hides || name != "mask_token", "{network}: {name}");
        }
    }
}

#[test]
fn computing_activations_again_gives_the_same_gradients_and_statistics() {
    // r50 has pieces of several blocks, the transformers random masks, MobileFaceNet another way into its trunk.
    for (network, precision) in [
        ("tiny", Precision::Fp32),
        ("r50", Precision::Fp32),
        ("mbf", Precision::Fp32),
        ("vit_t", Precision::Fp32),
        ("vit_t", Precision::Bf16),
    ] {
        let train = |gradient_checkpointing| {
            let backbone = filled(BackboneConfig {
                gradient_checkpointing,
                dropout: 0.2,
                ..BackboneConfig::new(network, 32)
            });
            let pass = backbone.forward_to_train(&images(3), &drawing(precision, 1));
            let embedding = pass.embedding();
            pass.backward(&fill::symmetric("cotangent", &[3, 32]));
            let state = snapshot(&backbone);
            (embedding, flat(&all_gradients(&backbone)), state)
        };
        let (embedding, gradient, state) = train(false);
        let (again_embedding, again_gradient, again_state) = train(true);
        assert_eq!(embedding, again_embedding, "{network}");
        assert_eq!(state, again_state, "{network}: statistics");
        let error = distance(&again_gradient, &gradient);
        assert!(error < 1e-6, "{network}: {error}");
    }
}

#[test]
fn the_gradients_of_a_part_are_complete_when_it_is_finished() {
    for network in ["tiny", "mbf", "vit_t"] {
        let mut gradients = Vec::new();
        for (gradient_checkpointing, wanted) in [
            (false, None),
            (true, None),
            (false, Some(vec![])),
            (false, Some(vec![3])),
        ] {
            let backbone = filled(BackboneConfig {
                gradient_checkpointing,
                ..BackboneConfig::new(network, 32)
            });
            let parts = backbone.parts();
            let last = *parts.iter().max().expect("parameters");
            assert!(last > 3 && parts.contains(&0), "{network}: {parts:?}");
            let mut seen: Vec<Option<Tensor>> = parts.iter().map(|_| None).collect();
            let mut numbers = Vec::new();
            let (images, mode) = (images(2), training(Precision::Fp32));
            let pass = match &wanted {
                Some(parts) => backbone.forward_to_train_for(&images, &mode, parts),
                None => backbone.forward_to_train(&images, &mode),
            };
            let finished = |part| {
                numbers.push(part);
                for ((index, of), (_, parameter)) in parts.iter().enumerate().zip(backbone.trainable()) {
                    if *of == part {
                        seen[index] = Some(parameter.grad().copy());
                    }
                }
                Ok::<(), std::convert::Infallible>(())
            };
            let Ok(()) = pass.backward_by_part(&fill::symmetric("cotangent", &[2, 32]), finished);
            assert_eq!(numbers, (0..=last).rev().collect::<Vec<_>>(), "{network}");
            for ((name, parameter), seen) in backbone.trainable().into_iter().zip(seen) {
                assert_eq!(seen.expect("its part"), parameter.grad(), "{network}: {name}");
            }
            gradients.push(flat(&all_gradients(&backbone)));
        }
        assert!(
            gradients
                .iter()
                .all(|other| distance(other, &gradients[0]) < 1e-6),
            "{network}"
        );
    }
}

#[test]
fn an_empty_batch_has_no_gradient() {
    for gradient_checkpointing in [false, true] {
        let backbone = filled(BackboneConfig {
            gradient_checkpointing,
            ..config()
        });
        let pass = backbone.forward_to_train(&images(0), &training(Precision::Fp32));
        assert_eq!(pass.embedding().size(), [0, 32]);
        pass.backward(&Tensor::zeros([0, 32], (Kind::Float, Device::Cpu)));
        assert!(backbone.trainable().iter().all(|(_, p)| !p.grad().defined()));
    }
}

#[test]
fn an_outline_has_names_and_shapes_and_no_memory() {
    let outline = Backbone::outline(&BackboneConfig::new("tiny", 32)).unwrap();
    let whole = Backbone::new(&config()).unwrap();
    let shapes = |backbone: &Backbone| -> Vec<(String, Vec<i64>, Role)> {
        let entries = backbone.state().iter();
        entries
            .map(|entry| (entry.name.clone(), entry.tensor.size(), entry.role))
            .collect()
    };
    assert_eq!(shapes(&outline), shapes(&whole));
    assert_eq!(outline.macs(), whole.macs());
    let strides = outline.state()[0].tensor.stride();
    assert!(strides.iter().all(|&stride| stride == 0), "{strides:?}");
}

#[test]
fn evaluation_of_a_sample_does_not_depend_on_its_batch() {
    let backbone = filled(config());
    let mode = ForwardMode::evaluation(Precision::Fp32);
    let before = snapshot(&backbone);
    let all = tch::no_grad(|| backbone.forward(&images(3), &mode));
    let one = tch::no_grad(|| backbone.forward(&images(3).narrow(0, 1, 1), &mode));
    assert!(distance(&one, &all.narrow(0, 1, 1)) < 1e-5);
    assert_eq!(before, snapshot(&backbone), "evaluation changes nothing");
}

#[test]
fn bf16_trains_close_to_f32_with_f32_gradients() {
    for network in ["tiny", "vit_t"] {
        bf16_trains_close_to_f32(network);
    }
}

fn bf16_trains_close_to_f32(network: &str) {
    let gradients = |precision| {
        let backbone = filled(BackboneConfig::new(network, 32));
        let embedding = backbone.forward(&images(8), &training(precision));
        assert_eq!(embedding.kind(), Kind::Float);
        (&embedding * fill::symmetric("cotangent", &[8, 32]))
            .sum(Kind::Float)
            .backward();
        (embedding, all_gradients(&backbone))
    };
    let (embedding, full) = gradients(Precision::Fp32);
    let (rounded, reduced) = gradients(Precision::Bf16);
    let rounding = distance(&rounded, &embedding);
    assert!((1e-5..0.05).contains(&rounding), "{network}: {rounding}");
    assert!(reduced.iter().all(|gradient| gradient.kind() == Kind::Float));
    let error = distance(&flat(&reduced), &flat(&full));
    assert!(error < 0.1, "{network}: {error}");
}

#[test]
fn a_frozen_batch_norm_is_a_constant_map() {
    let frozen = filled(BackboneConfig {
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
        tch::no_grad(|| filled(config()).forward(&images(2), &ForwardMode::evaluation(Precision::Fp32)));
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
    let backbone = filled(config());
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

    let mut vit = Backbone::new(&BackboneConfig::new("vit_t", 64)).unwrap();
    vit.init_random(1);
    let values = vit
        .state()
        .iter()
        .filter(|entry| entry.tensor.kind() == Kind::Float);
    for entry in values {
        let (std, name) = (entry.tensor.std(false).double_value(&[]), entry.name.as_str());
        let normal = name == "pos_embed" || name == "mask_token" || entry.tensor.dim() == 2;
        if normal {
            // The mask token has 256 elements.
            assert!((std / 0.02 - 1.0).abs() < 0.15, "{name}: {std}");
        } else if !name.starts_with("patch_embed") {
            assert_eq!(std, 0.0, "{name} is constant");
        }
    }

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
    let mut backbone = filled(config());
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

/// What others are measured against computes the same, in training and in evaluation.
#[test]
fn the_plain_form_computes_the_same() {
    for network in ["tiny", "mbf", "vit_t"] {
        let computed = |plain: bool| {
            let mut backbone = Backbone::new(&BackboneConfig::new(network, 32)).unwrap();
            backbone.init_random(1);
            if plain {
                backbone.compute_plainly();
            }
            let mode = ForwardMode::training(Precision::Fp32, DropoutDraw::default());
            let pass = backbone.forward_to_train(&images(4), &mode);
            let embedding = pass.embedding();
            pass.backward(&embedding);
            let evaluation = ForwardMode::evaluation(Precision::Fp32);
            let evaluated = tch::no_grad(|| backbone.forward(&images(2), &evaluation));
            [embedding, evaluated, flat(&all_gradients(&backbone))]
        };
        let [plain, usual] = [computed(true), computed(false)];
        // Rounding has grown on the way back.
        for ((plain, usual), most) in plain.iter().zip(&usual).zip([1e-5, 1e-5, 1e-3]) {
            let off = distance(plain, usual);
            assert!(off < most, "{network}: {off}");
        }
    }
}

#[test]
fn counting_without_computing_counts_the_same() {
    for network in ["tiny", "mbf", "vit_t"] {
        let backbone = Backbone::new(&BackboneConfig::new(network, 32)).unwrap();
        let mode = ForwardMode::evaluation(Precision::Fp32);
        let mut pass = Pass::new(&mode, None);
        let _embedding = tch::no_grad(|| backbone.run(&images(1), &mut pass));
        assert_eq!(pass.macs(), backbone.macs(), "{network}");
    }
}

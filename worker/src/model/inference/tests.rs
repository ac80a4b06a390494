//! The network that embeds against the layers that it is made of.

use arcface_proto::spec::Precision;

use super::*;
use crate::model::{Backbone, BackboneConfig, ForwardMode, IMAGE_SIZE, fill};

fn filled(network: &str) -> Backbone {
    let mut backbone = Backbone::new(&BackboneConfig::new(network, 32)).expect("known");
    backbone.fill_golden();
    backbone
}

fn images(n: i64) -> Tensor {
    fill::symmetric("images", &[n, 3, IMAGE_SIZE, IMAGE_SIZE])
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
    (&a - &b).norm().double_value(&[]) / b.norm().double_value(&[])
}

fn by_layers(backbone: &Backbone, precision: Precision, images: &Tensor) -> Tensor {
    tch::no_grad(|| backbone.forward(images, &ForwardMode::evaluation(precision)))
}

#[test]
fn embeddings_are_those_of_the_layers() {
    let images = images(3);
    // Every operation that a network has: convolutions of all kinds, and transformers'.
    for network in ["tiny", "r18", "mbf", "vit_t"] {
        let backbone = filled(network);
        let exact = by_layers(&backbone, Precision::Fp32, &images);
        let found = backbone.for_inference(Precision::Fp32).embed(&images);
        assert_eq!((found.size(), found.kind()), (vec![3, 32], Kind::Float));
        assert!(!found.requires_grad());
        let error = distance(&found, &exact);
        assert!(error < 1e-5, "{network}: {error:e}");
        // Rounding in bf16 happens elsewhere, but does not become more.
        let layered = distance(&by_layers(&backbone, Precision::Bf16, &images), &exact);
        let folded = distance(&backbone.for_inference(Precision::Bf16).embed(&images), &exact);
        assert!(
            folded < 1.2 * layered + 1e-3 && folded > 1e-5,
            "{network}: {folded:e} {layered:e}"
        );
    }
}

#[test]
fn only_the_norms_before_padded_convolutions_are_left() {
    let steps = |network: &str| filled(network).for_inference(Precision::Fp32).steps;
    let norms = |network: &str| {
        let is_norm = |step: &&Step| {
            matches!(
                step.layer,
                Layer::Other {
                    op: Op::BatchNorm { .. },
                    ..
                }
            )
        };
        steps(network).iter().filter(is_norm).count()
    };
    // The first of each of the four blocks, and the one behind the last sum.
    assert_eq!((norms("tiny"), norms("mbf")), (4 + 1, 0));
}

#[test]
fn a_sample_has_the_same_embedding_in_any_batch() {
    let network = filled("tiny").for_inference(Precision::Fp32);
    let all = images(5);
    let whole = network.embed(&all);
    let parts = Tensor::cat(
        &[
            network.embed(&all.narrow(0, 0, 1)),
            network.embed(&all.narrow(0, 1, 4)),
        ],
        0,
    );
    assert!(distance(&parts, &whole) < 1e-6);
    assert_eq!(network.embed(&images(0)).size(), [0, 32]);
    assert_eq!(network.embedding_size(), 32);
}

#[test]
fn values_that_nobody_reads_any_more_are_let_go() {
    let network = filled("tiny").for_inference(Precision::Fp32);
    let mut gone: Vec<ValueId> = network
        .steps
        .iter()
        .flat_map(|step| step.last_read.clone())
        .collect();
    gone.sort_unstable();
    let mut read: Vec<ValueId> = network
        .steps
        .iter()
        .flat_map(|step| step.inputs.clone())
        .collect();
    read.sort_unstable();
    read.dedup();
    // Each once, after its last reader.
    assert_eq!(gone, read);
    for (at, step) in network.steps.iter().enumerate() {
        let later = &network.steps[at + 1..];
        assert!(
            later
                .iter()
                .all(|later| step.last_read.iter().all(|value| !later.inputs.contains(value)))
        );
    }
}

#[test]
#[should_panic(expected = "expected [N, 3, 112, 112]")]
fn images_of_another_size_are_refused() {
    let _ = filled("tiny")
        .for_inference(Precision::Fp32)
        .embed(&Tensor::zeros([1, 3, 96, 96], (Kind::Float, Device::Cpu)));
}

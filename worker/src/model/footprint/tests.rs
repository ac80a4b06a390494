//! The table of sizes against the networks themselves.

use std::fmt::Write;

use arcface_proto::memory::networks::NETWORKS;

use super::*;
use crate::kernels::Kernels;
use crate::model::{DropoutDraw, ForwardMode, allocations::Allocations, registry::REGISTRY};

/// The file with the planner's numbers, from the worker's folder.
const TABLE: &str = "../proto/src/memory/networks/table.rs";

fn per_dim(number: PerDim) -> String {
    format!("d({}, {})", number.base, number.per_dim)
}

fn passes(passes: &[Numbers; 2]) -> String {
    let at = |number: &PerImage| format!("i({}, {})", number.per_image, number.fixed);
    let pass = |pass: &Numbers| {
        let moments: Vec<String> = pass.backward.iter().map(at).collect();
        format!("pass({}, [{}])", at(&pass.kept), moments.join(", "))
    };
    format!("[{}, {}]", pass(&passes[0]), pass(&passes[1]))
}

fn rust(networks: &[Sizes]) -> String {
    let mut text = String::from(
        "//! Written by the worker's test that counts the networks: `UPDATE_EXPECT=1`.\n\n\
         use super::{Network, Pass, PerDim, PerImage};\n\n\
         const fn d(base: u64, per_dim: u64) -> PerDim {\n    PerDim { base, per_dim }\n}\n\n\
         const fn i(per_image: u64, fixed: u64) -> PerImage {\n    PerImage { per_image, fixed }\n}\n\n\
         const fn pass(kept: PerImage, backward: [PerImage; 4]) -> Pass {\n    Pass { kept, backward }\n}\n\n\
         /// Every network of `arcface_proto::spec::NETWORKS`, in that order.\n\
         #[rustfmt::skip]\n",
    );
    let mut line = |line: String| writeln!(text, "{line}").expect("memory");
    line(format!("pub const NETWORKS: [Network; {}] = [", networks.len()));
    for n in networks {
        line(format!("    Network {{\n        name: {:?},", n.name));
        line(format!("        trainable: {},", per_dim(n.trainable)));
        line(format!("        frozen: {},", per_dim(n.frozen)));
        line(format!("        buffer_bytes: {},", per_dim(n.buffer_bytes)));
        line(format!("        largest: {},", per_dim(n.largest)));
        line(format!("        fp32: {},", passes(&n.fp32)));
        line(format!("        half: {},", passes(&n.half)));
        line(format!("        fused_fp32: {},", passes(&n.fused_fp32)));
        line(format!("        cpu_bf16: {},", passes(&n.cpu_bf16)));
        line(format!("        gpu_bf16: {},\n    }},", passes(&n.gpu_bf16)));
    }
    line("];".into());
    text
}

#[test]
fn the_planners_table_is_what_the_networks_are() {
    let counted: Vec<Sizes> = REGISTRY
        .iter()
        .map(|network| sizes(network).expect(network.name))
        .collect();
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        std::fs::write(TABLE, rust(&counted)).expect("write the table");
        return;
    }
    for (counted, planned) in counted.iter().zip(&NETWORKS) {
        assert_eq!(
            counted, planned,
            "{TABLE} is not what {} is; UPDATE_EXPECT=1 writes it anew",
            counted.name
        );
    }
    assert_eq!(counted.len(), NETWORKS.len());
}

/// What computes there in a test.
fn kernels(place: Place) -> Option<Kernels> {
    match place {
        Place::Cpu => None,
        #[cfg(cuda_twin)]
        Place::Gpu => Some(Kernels::new(
            std::sync::Arc::new(crate::kernels::twin::launcher::TwinLauncher::new(8)),
            Device::Cpu,
        )),
        #[cfg(not(cuda_twin))]
        Place::Gpu => None,
    }
}

/// Bytes of tensors that a training pass of the real network takes: at the beginning of the way back, and at most on it.
/// Gradients of parameters are there before.
fn measured(network: &str, precision: Precision, recomputes: bool, images: i64, place: Place) -> [f64; 2] {
    let config = BackboneConfig {
        gradient_checkpointing: recomputes,
        ..BackboneConfig::new(network, 512)
    };
    let mut backbone = Backbone::new(&config).expect("registered");
    backbone.init_random(1);
    backbone.compute_with(kernels(place));
    let mode = ForwardMode::training(precision, DropoutDraw::default());
    tch::manual_seed(1);
    let images = Tensor::rand([images, 3, 112, 112], (Kind::Float, Device::Cpu));
    backbone
        .forward_to_train(&images, &mode)
        .backward(&Tensor::ones([images.size()[0], 512], (Kind::Float, Device::Cpu)));
    let gradient = Tensor::ones([images.size()[0], 512], (Kind::Float, Device::Cpu));
    let mut allocations = Allocations::begin();
    let pass = backbone.forward_to_train(&images, &mode);
    let kept = allocations.take().live;
    pass.backward(&gradient);
    [kept as f64, allocations.take().peak as f64]
}

/// The rules of what autograd keeps, against libtorch's allocator. The way back has the libraries' workspaces on top, which
/// are `beyond` at most, as a share of what is counted.
fn check(network: &str, precision: Precision, recomputes: bool, beyond: f64) {
    check_at(network, precision, recomputes, beyond, Place::Cpu);
}

fn check_at(network: &str, precision: Precision, recomputes: bool, beyond: f64, place: Place) {
    const IMAGES: u64 = 8;
    let backbone = Backbone::outline(&BackboneConfig::new(network, 512)).expect("registered");
    let numbers = backbone.walk(precision, Some(place)).numbers(recomputes);
    let kept = numbers.kept.bytes(IMAGES) as f64;
    let highest = numbers.highest(IMAGES) as f64;
    let [measured_kept, measured_highest] = measured(network, precision, recomputes, IMAGES as i64, place);
    let line = format!(
        "{network} {precision:?} {place:?} recomputing {recomputes}: kept: counted {:.1} MB, measured {:.1} MB; on the way back: \
         counted {:.1} MB, measured {:.1} MB",
        kept / 1e6,
        measured_kept / 1e6,
        highest / 1e6,
        measured_highest / 1e6
    );
    println!("{line}");
    assert!((kept / measured_kept - 1.0).abs() <= 0.01, "{line}");
    let over = measured_highest / highest - 1.0;
    assert!((-0.02..=beyond).contains(&over), "{line}");
}

#[test]
fn what_is_counted_of_convolutional_networks_is_what_they_take() {
    for network in ["tiny", "r18"] {
        check(network, Precision::Fp32, false, 0.02);
    }
    // With AVX-512, oneDNN's convolutions of one channel at a time have a workspace of a map's size.
    check("mbf", Precision::Fp32, false, 0.10);
    // oneDNN's workspaces hold f32 copies of maps where the machine has no bf16 of its own.
    check("tiny", Precision::Bf16, false, 0.06);
    check("mbf", Precision::Bf16, false, 0.20);
}

/// One line of the table is for both.
#[test]
fn in_f32_a_gpu_keeps_what_the_cpu_keeps() {
    for network in REGISTRY {
        let backbone = Backbone::outline(&BackboneConfig::new(network.name, 512)).expect("registered");
        for recomputes in [false, true] {
            let [cpu, gpu] = [Place::Cpu, Place::Gpu]
                .map(|place| backbone.walk(Precision::Fp32, Some(place)).numbers(recomputes));
            assert_eq!(cpu, gpu, "{}", network.name);
        }
    }
}

/// What a GPU's kernels keep, by their twins, which are given the same tensors.
#[cfg(cuda_twin)]
#[test]
fn what_is_counted_of_a_gpu_is_what_its_kernels_take() {
    for recomputes in [false, true] {
        check_at("tiny", Precision::Fp32, recomputes, 0.10, Place::Gpu);
    }
    check_at("mbf", Precision::Fp32, false, 0.15, Place::Gpu);
}

#[test]
fn what_is_counted_of_transformers_is_what_they_take() {
    for network in ["vit_t", "vit_t_dp005_mask0"] {
        check(network, Precision::Fp32, false, 0.02);
    }
    check("vit_t", Precision::Bf16, false, 0.02);
}

/// The highest moment is then in the first layers, whose maps are largest: so are oneDNN's workspaces for them, which hold f32
/// copies of the maps where the machine has no bf16 of its own.
#[test]
fn what_is_counted_of_networks_that_compute_twice_is_what_they_take() {
    for network in ["tiny", "mbf", "vit_t"] {
        check(network, Precision::Fp32, true, 0.10);
    }
    check("tiny", Precision::Bf16, true, 0.80);
}

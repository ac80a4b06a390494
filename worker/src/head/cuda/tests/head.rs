//! The head for GPUs on the CPU, with the kernels' twins: as every head of its kind (`../../suite.rs`), and what is its own:
//! kernels, states of other heads, embeddings in bf16, and what is refused.

use crate::kernels::{
    Kernels,
    launch::{Arguments, LaunchError, Launcher, Shape},
    twin::launcher::TwinLauncher,
};
use crate::{
    collective::TcpCollective,
    head::{
        Head, HeadConfig, HeadError, TiledHead,
        cuda::{CudaHead, KERNELS},
        suite::{self, Case, Make, Subject, config, train},
    },
    optim::OptimizerConfig,
};
use arcface_proto::{spec, types::ClassRange};
use proptest::prelude::*;
use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
};
use tch::{Device, Kind, Tensor};

/// Threads of a block, of which each is a fibre.
const BLOCK: u32 = 4;

/// Of few columns, so that there are several and the last is not full.
fn columns(config: &HeadConfig) -> i64 {
    let classes = i64::from(config.num_classes);
    classes / 5 + 7 + classes % 3
}

pub(super) fn head(
    config: &HeadConfig,
    (rank, world_size): (u32, u32),
    kind: Kind,
    launcher: Arc<dyn Launcher>,
) -> CudaHead {
    let shard = ClassRange::of_rank(config.num_classes, rank, world_size);
    let kernels = Kernels::new(launcher, Device::Cpu);
    CudaHead::on(config, shard, kernels, kind, columns(config))
}

fn with(kind: Kind, block: u32) -> impl Fn(&HeadConfig, u32, u32) -> Box<dyn Head> + Sync {
    move |config, rank, world_size| {
        let launcher = Arc::new(TwinLauncher::new(block));
        Box::new(head(config, (rank, world_size), kind, launcher))
    }
}

/// Relative L2. The products' results are of bf16 too, cosines among them, where the tiled head for the CPU keeps f32.
const BF16_TOLERANCE: f64 = 1e-2;

fn subject(make: Make<'_>, half: bool) -> Subject<'_> {
    Subject {
        make,
        name: "cuda",
        half: half.then_some(BF16_TOLERANCE),
    }
}

fn usual(test: impl Fn(Subject<'_>)) {
    test(subject(&with(Kind::Float, BLOCK), false));
}

fn half(test: impl Fn(Subject<'_>)) {
    test(subject(&with(Kind::BFloat16, BLOCK), true));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn cuda_equals_plain(case in suite::cases()) {
        usual(|subject| suite::check(&case, subject));
    }
}

#[test]
fn edges_equal_plain() {
    usual(suite::edges_equal_plain);
}

#[test]
fn a_sum_that_vanishes_is_shifted() {
    usual(suite::a_sum_that_vanishes_is_shifted);
}

#[test]
fn magface_equals_plain() {
    usual(suite::magface_equals_plain);
}

#[test]
fn adaface_equals_plain() {
    usual(suite::adaface_equals_plain);
}

#[test]
fn bf16_equals_plain() {
    half(suite::bf16_equals_plain);
}

#[test]
fn lazy_sgd_equals_dense() {
    usual(suite::lazy_sgd_equals_dense);
}

#[test]
fn state_round_trips() {
    usual(suite::state_round_trips);
}

#[test]
fn bad_batches_are_refused() {
    usual(suite::bad_batches_are_refused);
}

#[test]
fn not_a_number_is_not_hidden() {
    usual(suite::not_a_number_is_not_hidden);
    half(suite::not_a_number_is_not_hidden);
}

/// Blocks as a GPU has them, and of a single thread.
#[test]
fn any_block_is_right() {
    for block in [1, 256] {
        let make = with(Kind::Float, block);
        for sample_rate in [1.0, 0.4] {
            let config = HeadConfig {
                sample_rate,
                ..config(41, 24)
            };
            let case = Case {
                micros: 2,
                steps: 2,
                ..Case::new(config, &[0, 40, 7, 7, 14], &[3, 2])
            };
            suite::check(&case, subject(&make, false));
        }
    }
}

/// Several micro-batches of a sampled head, whose classes differ: the update is that of all of them.
#[test]
fn three_micro_batches_update_all_their_classes() {
    for optimizer in [config(1, 1).optimizer, OptimizerConfig::adamw(0.1)] {
        let config = HeadConfig {
            optimizer,
            sample_rate: 0.15,
            ..config(411, 48)
        };
        let labels: Vec<i64> = (0..12).map(|i| i * 31).collect();
        let case = Case {
            micros: 3,
            ..Case::new(config, &labels, &[4, 8])
        };
        usual(|subject| suite::check(&case, subject));
    }
}

fn copied(head: &mut dyn Head) -> Vec<(String, Tensor)> {
    let state = head.state().into_iter();
    state.map(|(name, tensor)| (name, tensor.copy())).collect()
}

/// A checkpoint of one head is one of the other, to the bit.
#[test]
fn states_of_the_tiled_head_are_its_own() {
    for (optimizer, sample_rate) in [
        (config(1, 1).optimizer, 1.0),
        (config(1, 1).optimizer, 0.3),
        (OptimizerConfig::adamw(0.1), 0.5),
    ] {
        let config = HeadConfig {
            optimizer,
            sample_rate,
            loss: spec::Loss::CurricularFace(spec::CurricularFace { m: 0.5, t_alpha: 0.5 }),
            ..config(90, 16)
        };
        let case = Case::new(config.clone(), &[1, 5, 77], &[3]);
        let mut comm = TcpCollective::alone();
        let launcher = || Arc::new(TwinLauncher::new(BLOCK));
        let mut cuda = head(&config, (0, 1), Kind::Float, launcher());
        let mut tiled = TiledHead::new(&config, 0, 1);
        train(&mut cuda, &mut comm, &case);
        train(&mut tiled, &mut comm, &case);
        let (from_cuda, from_tiled) = (copied(&mut cuda), copied(&mut tiled));
        let mut other = |into: &mut dyn Head, state: &[(String, Tensor)], updates: u64| {
            let find = |name: &str| state.iter().find(|(n, _)| n == name).map(|(_, t)| t.copy());
            into.load_state(updates, &mut |name| find(name))
                .expect("the other's state");
            assert_eq!(copied(into), state);
            assert_eq!(into.updates(), updates);
            // And it goes on from there.
            train(into, &mut comm, &case);
        };
        let updates = (cuda.updates(), tiled.updates());
        other(&mut tiled, &from_cuda, updates.0);
        other(&mut cuda, &from_tiled, updates.1);
    }
}

/// What a backbone in bf16 gives is taken as it is.
#[test]
fn embeddings_in_bf16_are_what_they_are_in_f32() {
    for kind in [Kind::Float, Kind::BFloat16] {
        let config = config(50, 32);
        let labels = Tensor::from_slice(&[3i64, 49, 3]);
        let case = Case::new(config.clone(), &[3, 49, 3], &[3]);
        let none = Tensor::zeros([50, 32], (Kind::Float, Device::Cpu));
        let rounded = case.embeddings(0, 1, &none).to_kind(Kind::BFloat16);
        let [(loss, grad), expected] = [Kind::BFloat16, Kind::Float].map(|as_kind| {
            let mut head = head(&config, (0, 1), kind, Arc::new(TwinLauncher::new(BLOCK)));
            let out = head
                .forward_backward(
                    &mut TcpCollective::alone(),
                    &rounded.to_kind(as_kind),
                    &labels,
                    &[3],
                    0,
                    1.0,
                )
                .expect("a good batch");
            (out.loss, out.grad_embedding)
        });
        assert_eq!((loss, grad.kind()), (expected.0, Kind::Float));
        assert_eq!(grad, expected.1);
    }
}

/// A micro-batch that is refused takes those before it with it: it may have added its classes to theirs.
#[test]
fn a_refused_micro_batch_leaves_nothing_to_update() {
    let config = HeadConfig {
        sample_rate: 0.3,
        ..config(60, 16)
    };
    let mut comm = TcpCollective::alone();
    let mut head = head(&config, (0, 1), Kind::Float, Arc::new(TwinLauncher::new(BLOCK)));
    let before = copied(&mut head);
    let embedding = Tensor::ones([2, 16], (Kind::Float, Device::Cpu));
    for (labels, good) in [([1, 2], true), ([1, 60], false)] {
        let labels = Tensor::from_slice(&labels);
        let out = head.forward_backward(&mut comm, &embedding, &labels, &[2], 0, 0.5);
        match good {
            true => assert!(out.is_ok()),
            false => assert!(matches!(
                out,
                Err(HeadError::LabelOutOfRange {
                    label: 60,
                    row: 1,
                    ..
                })
            )),
        }
    }
    head.update(0.1);
    assert_eq!(head.updates(), 0);
    assert_eq!(copied(&mut head), before);
}

/// Notes which kernels were started.
struct Noting {
    twin: TwinLauncher,
    started: Mutex<BTreeSet<&'static str>>,
}

impl Launcher for Noting {
    #[allow(unsafe_code)]
    unsafe fn launch(
        &self,
        kernel: &'static str,
        shape: Shape,
        arguments: &mut Arguments,
    ) -> Result<(), LaunchError> {
        self.started.lock().expect("nobody panics with it").insert(kernel);
        // SAFETY: the caller's word.
        unsafe { self.twin.launch(kernel, shape, arguments) }
    }

    fn multiplies_bf16(&self) -> bool {
        true
    }
}

/// There is no kernel that no head starts, and none whose arguments no test has held against its parameters.
#[test]
fn every_kernel_is_started() {
    let noting = Arc::new(Noting {
        twin: TwinLauncher::new(BLOCK),
        started: Mutex::default(),
    });
    let mut comm = TcpCollective::alone();
    for kind in [Kind::Float, Kind::BFloat16] {
        let optimizers = [config(1, 1).optimizer, OptimizerConfig::adamw(0.1)];
        for (optimizer, micros) in optimizers.into_iter().flat_map(|each| [(each, 1), (each, 2)]) {
            let config = HeadConfig {
                optimizer,
                sample_rate: 0.5,
                ..config(30, 8)
            };
            let case = Case {
                micros,
                ..Case::new(config.clone(), &[3, 9], &[2])
            };
            let mut sampled = head(&config, (0, 1), kind, noting.clone());
            train(&mut sampled, &mut comm, &case);
        }
        let vanishing = HeadConfig {
            scale: 80.0,
            ..config(1, 1)
        };
        for from in [Kind::Float, Kind::BFloat16] {
            let against = Tensor::full([1, 1], -1.0, (from, Device::Cpu));
            let against = against * suite_sign(&vanishing);
            let mut one = head(&vanishing, (0, 1), kind, noting.clone());
            one.forward_backward(&mut comm, &against, &Tensor::from_slice(&[0i64]), &[1], 0, 1.0)
                .expect("a good batch");
        }
    }
    let started = noting.started.lock().expect("nobody panics with it");
    let all = KERNELS.files.iter().flat_map(|file| file.kernels).copied();
    let all: BTreeSet<&str> = all.collect();
    assert_eq!(*started, all);
}

/// The sign of the only weight.
fn suite_sign(config: &HeadConfig) -> f64 {
    let mut head = TiledHead::new(config, 0, 1);
    head.state()[0].1.double_value(&[0, 0]).signum()
}

//! What every head that never builds the logits must do: losses, gradients, weights and optimizer state over several steps
//! against the plain head, on worlds of several ranks, and what becomes of bad batches and of state. A head's tests call
//! these with a [`Subject`].

use super::{Head, HeadConfig, HeadError, PlainHead, classes::initial_weight};
use crate::{
    collective::{Collective, TcpCollective, local},
    head::classes::INIT_STD,
    optim::OptimizerConfig,
    random::{Purpose, normal},
};
use arcface_proto::{
    spec::{self, HeadImplementation, MarginGradient, Precision},
    types::ClassRange,
};
use proptest::prelude::*;
use std::{thread, time::Duration};
use tch::{Device, Kind, Tensor};

/// Relative L2, f32 against f32 in another order of sums.
const TOLERANCE: f64 = 1e-5;
/// Losses, gradients of embeddings and weights with products of bf16.
pub const BF16_TOLERANCE: f64 = 3e-3;
/// The momentum then: most of it is the sum of many small terms, each of which is off by s times the cosine's rounding.
const BF16_MOMENTUM_TOLERANCE: f64 = 1e-2;
/// AdamW divides by the root of the squared gradient, which turns rounding of a near-zero gradient into a whole step. What
/// is computed from the weights after an update inherits it.
const ADAMW_WEIGHT_TOLERANCE: f64 = 1e-4;

pub fn config(num_classes: u32, embedding_size: i64) -> HeadConfig {
    HeadConfig {
        num_classes,
        embedding_size,
        margin: [1.0, 0.5, 0.0],
        scale: 64.0,
        margin_gradient: MarginGradient::Reference,
        interclass_filtering_threshold: None,
        sample_rate: 1.0,
        seed: 3,
        optimizer: OptimizerConfig::Sgd {
            momentum: 0.9,
            weight_decay: 5e-4,
        },
        implementation: HeadImplementation::Tiled,
        precision: Precision::Fp32,
        loss: spec::Loss::ArcFace,
    }
}

/// Where an embedding points.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pointing {
    Anywhere,
    /// Exactly along its class's weights, or against them.
    AtClass(f64),
}

/// A run of both heads: the batch of each rank, the same in all steps but for the embeddings.
#[derive(Clone, Debug)]
pub struct Case {
    pub config: HeadConfig,
    pub labels: Vec<i64>,
    pub rows: Vec<u32>,
    pub pointing: Pointing,
    /// Micro-batches averaged into an update.
    pub micros: u64,
    pub steps: u64,
}

impl Case {
    pub fn new(config: HeadConfig, labels: &[i64], rows: &[u32]) -> Self {
        Self {
            config,
            labels: labels.to_vec(),
            rows: rows.to_vec(),
            pointing: Pointing::Anywhere,
            micros: 1,
            steps: 3,
        }
    }

    /// So small that rounding does not grow from step to step, as it does in any two heads. AdamW moves every weight
    /// by about its rate, whatever the gradient.
    fn lr(&self) -> f64 {
        match self.config.optimizer {
            OptimizerConfig::Sgd { .. } => 0.01,
            OptimizerConfig::AdamW { .. } => 1e-5,
        }
    }

    fn own(&self, rank: usize) -> std::ops::Range<usize> {
        let first: u32 = self.rows[..rank].iter().sum();
        first as usize..(first + self.rows[rank]) as usize
    }

    pub fn embeddings(&self, rank: usize, micro: u64, classes: &Tensor) -> Tensor {
        let dim = self.config.embedding_size;
        if let Pointing::AtClass(sign) = self.pointing {
            let labels = Tensor::from_slice(&self.labels[self.own(rank)]);
            return classes.index_select(0, &labels) * (70.0 * sign);
        }
        let value = |i: usize, d: u64| normal(micro, Purpose::Synthetic, i as u64, d) as f32;
        let values: Vec<f32> = self
            .own(rank)
            .flat_map(|i| (0..dim as u64).map(move |d| value(i, d)))
            .collect();
        Tensor::from_slice(&values).view([-1, dim])
    }
}

/// What a head did on one rank: per micro-batch (loss, gradient), then its state.
pub struct Outcome {
    pub micros: Vec<(f64, Tensor)>,
    pub state: Vec<(String, Tensor)>,
}

pub fn train(head: &mut dyn Head, comm: &mut dyn Collective, case: &Case) -> Outcome {
    let rank = comm.rank() as usize;
    // Initial weights of all classes: a function of the seed.
    let whole = ClassRange::of_rank(case.config.num_classes, 0, 1);
    let classes = initial_weight(case.config.seed, whole, case.config.embedding_size);
    let labels = Tensor::from_slice(&case.labels[case.own(rank)]);
    let mut micros = Vec::new();
    for micro in 0..case.steps * case.micros {
        let embedding = case.embeddings(rank, micro, &classes);
        let share = 1.0 / case.micros as f64;
        let out = head
            .forward_backward(comm, &embedding, &labels, &case.rows, micro, share)
            .expect("a good batch");
        micros.push((out.loss, out.grad_embedding));
        if (micro + 1).is_multiple_of(case.micros) {
            head.update(case.lr() / (1.0 + micro as f64));
        }
    }
    let state = head
        .state()
        .into_iter()
        .map(|(name, tensor)| (name, tensor.copy()))
        .collect();
    Outcome { micros, state }
}

pub fn on_ranks<T: Send>(world_size: usize, work: impl Fn(&mut TcpCollective) -> T + Sync) -> Vec<T> {
    let ranks = local::world(world_size as u32, Duration::from_secs(60)).expect("loopback");
    let work = &work;
    thread::scope(|scope| {
        let start = |mut comm: TcpCollective| scope.spawn(move || work(&mut comm));
        let threads: Vec<_> = ranks.into_iter().map(start).collect();
        threads
            .into_iter()
            .map(|t| t.join().expect("a rank panicked"))
            .collect()
    })
}

/// Relative to `expected`, or to `scale` where that is next to nothing.
pub fn distance(ours: &Tensor, expected: &Tensor, scale: f64) -> f64 {
    assert_eq!(ours.size(), expected.size());
    let double = |t: &Tensor| t.to_kind(Kind::Double);
    let norm = double(expected).norm().double_value(&[]).max(scale);
    (double(ours) - double(expected)).norm().double_value(&[]) / norm.max(f64::MIN_POSITIVE)
}

/// The size below which a difference in a state is rounding, however small the state itself has become.
fn floor(case: &Case, name: &str) -> f64 {
    // The mean of the targets' cosines: of either sign, their sum may be next to nothing, and each is rounded at its own size.
    if name == "curricularface.t" {
        return 1.0 / (case.config.embedding_size as f64).sqrt();
    }
    if case.pointing == Pointing::Anywhere {
        return 1e-6;
    }
    // A small part of what a gradient across the weights would do to them: at the poles it is 0 but for rounding.
    let gradient = case.config.scale / (INIT_STD * (case.config.embedding_size as f64).sqrt());
    0.1 * if name == "weight" {
        0.1 * gradient
    } else {
        gradient
    }
}

/// Makes the head of one rank: of this configuration, rank and world size.
pub type Make<'a> = &'a (dyn Fn(&HeadConfig, u32, u32) -> Box<dyn Head> + Sync);

/// A head under test.
#[derive(Clone, Copy)]
pub struct Subject<'a> {
    pub make: Make<'a>,
    /// For messages.
    pub name: &'a str,
    /// How far it may be off where its products are of bf16; none if they are of f32.
    pub half: Option<f64>,
}

impl Subject<'_> {
    fn alone(&self, config: &HeadConfig) -> Box<dyn Head> {
        (self.make)(config, 0, 1)
    }

    fn tolerance(&self) -> f64 {
        self.half.unwrap_or(TOLERANCE)
    }
}

/// It and the plain head on all ranks; fails where they differ by more than the tolerance.
pub fn check(case: &Case, subject: Subject<'_>) {
    let (world_size, tolerance) = (case.rows.len(), subject.tolerance());
    let outcomes = on_ranks(world_size, |comm| {
        let mut ours = (subject.make)(&case.config, comm.rank(), world_size as u32);
        let mut plain = PlainHead::new(&case.config, comm.rank(), world_size as u32);
        (train(&mut *ours, comm, case), train(&mut plain, comm, case))
    });
    let is_adamw = matches!(case.config.optimizer, OptimizerConfig::AdamW { .. });
    let about = format!("{} {case:?}", subject.name);
    for (rank, (ours, plain)) in outcomes.iter().enumerate() {
        for (i, ((loss, grad), (plain_loss, plain_grad))) in ours.micros.iter().zip(&plain.micros).enumerate()
        {
            let updated = i as u64 >= case.micros;
            let tolerance = match is_adamw && updated {
                true => ADAMW_WEIGHT_TOLERANCE.max(tolerance),
                false => tolerance,
            };
            let difference = (loss - plain_loss).abs() / plain_loss.abs().max(1.0);
            assert!(difference <= tolerance, "loss {i}: {loss} {plain_loss}: {about}");
            assert_eq!(*loss, outcomes[0].0.micros[i].0, "ranks differ: {about}");
            // The size of a gradient that a class across the embedding gives.
            let dim = case.config.embedding_size as f64;
            let length = if case.pointing == Pointing::Anywhere {
                dim.sqrt()
            } else {
                0.3 * dim.sqrt()
            };
            let natural = case.config.scale * world_size as f64
                / (case.labels.len() as f64 * case.micros as f64 * length);
            let difference = distance(grad, plain_grad, 0.1 * natural);
            assert!(
                difference <= tolerance,
                "embeddings {i} of rank {rank}: {difference:e}: {about}"
            );
        }
        for ((name, ours), (plain_name, plain)) in ours.state.iter().zip(&plain.state) {
            assert_eq!(name, plain_name);
            let tolerance = match name.as_str() {
                "weight" if is_adamw => ADAMW_WEIGHT_TOLERANCE.max(tolerance),
                "momentum_buffer" if subject.half.is_some() => BF16_MOMENTUM_TOLERANCE.max(3.0 * tolerance),
                _ => tolerance,
            };
            let difference = distance(ours, plain, floor(case, name));
            assert!(
                difference <= tolerance,
                "{name} of rank {rank}: {difference:e}: {about}"
            );
        }
    }
}

/// Odd class counts, empty shards and ranks, more positives than samples, every margin, both optimizers, with and without
/// accumulation.
pub fn cases() -> impl Strategy<Value = Case> {
    let rows = prop::collection::vec(0u32..40, 1..4).prop_filter("a row", |rows| rows.iter().any(|&n| n > 0));
    let dims = prop::sample::select(vec![33i64, 64, 100, 129]);
    let rates = prop::sample::select(vec![1.0, 1.0, 0.5, 0.1]);
    (
        1u32..700,
        dims,
        rows,
        rates,
        0usize..5,
        any::<bool>(),
        any::<bool>(),
        1u64..3,
        any::<bool>(),
    )
        .prop_flat_map(
            |(classes, dim, rows, sample_rate, kind, filter, adamw, micros, few)| {
                let total = rows.iter().sum::<u32>() as usize;
                let most = if few { classes.min(2) } else { classes };
                prop::collection::vec(0..i64::from(most), total).prop_map(move |labels| {
                    let mut config = HeadConfig {
                        sample_rate,
                        ..config(classes, dim)
                    };
                    (config.margin, config.margin_gradient) = [
                        ([1.0, 0.5, 0.0], MarginGradient::Reference),
                        ([1.0, 0.0, 0.4], MarginGradient::Reference),
                        ([1.0, 0.5, 0.0], MarginGradient::Exact),
                        ([0.9, 0.4, 0.15], MarginGradient::Exact),
                        ([1.0, 0.5, 0.0], MarginGradient::Reference),
                    ][kind];
                    if kind == 4 {
                        config.loss =
                            spec::Loss::CurricularFace(spec::CurricularFace { m: 0.5, t_alpha: 0.5 });
                    }
                    // A cosine at the threshold falls on one side or the other by its last bit: a look at the first step.
                    config.interclass_filtering_threshold = filter.then_some(0.2);
                    let steps = if filter || kind == 4 { 1 } else { 3 };
                    if adamw {
                        config.optimizer = OptimizerConfig::adamw(0.1);
                    }
                    Case {
                        micros,
                        steps,
                        ..Case::new(config, &labels, &rows)
                    }
                })
            },
        )
}

/// One class, one sample, shards and ranks without any, all labels the same, and embeddings at the poles of their classes.
pub fn edges_equal_plain(subject: Subject<'_>) {
    for (classes, labels, rows) in [
        (1, vec![0], vec![1]),
        (1, vec![0, 0, 0], vec![2, 1]),
        (9, vec![8], vec![1]),
        (500, vec![77; 6], vec![3, 3]),
        (500, vec![77; 40], vec![40]),
        (2, vec![0, 1, 1, 0], vec![1, 0, 2, 1]),
    ] {
        let case = Case::new(config(classes, 40), &labels, &rows);
        check(&case, subject);
        for sign in [1.0, -1.0] {
            let pointing = Pointing::AtClass(sign);
            let cosface = HeadConfig {
                margin: [1.0, 0.0, 0.4],
                ..case.config.clone()
            };
            check(
                &Case {
                    pointing,
                    config: cosface,
                    steps: 1,
                    ..case.clone()
                },
                subject,
            );
            // An angle of 0 is 5e-4 in single precision, where the plain head has its cosines; along an axis it is 0.
            let axis = HeadConfig {
                embedding_size: 1,
                ..case.config.clone()
            };
            check(
                &Case {
                    pointing,
                    config: axis,
                    steps: 1,
                    ..case.clone()
                },
                subject,
            );
        }
    }
}

/// All cosines near -1 at the largest scale: every sum of exponentials is below what f32 holds.
pub fn a_sum_that_vanishes_is_shifted(subject: Subject<'_>) {
    let config = HeadConfig {
        scale: 80.0,
        ..config(3, 1)
    };
    // Of one dimension every cosine is 1 or -1.
    for pointing in [Pointing::AtClass(-1.0), Pointing::AtClass(1.0)] {
        for rows in [vec![3], vec![1, 2]] {
            let case = Case {
                pointing,
                ..Case::new(config.clone(), &[0, 1, 2], &rows)
            };
            check(&case, subject);
        }
    }
    let alone = Case {
        pointing: Pointing::AtClass(-1.0),
        ..Case::new(
            HeadConfig {
                num_classes: 1,
                ..config
            },
            &[0],
            &[1],
        )
    };
    check(&alone, subject);
}

/// Norms with a gradient of their own.
pub fn magface_equals_plain(subject: Subject<'_>) {
    let loss = spec::Loss::MagFace(spec::MagFace {
        l_a: 1.0,
        u_a: 110.0,
        l_m: 0.45,
        u_m: 0.8,
        lambda_g: 35.0,
    });
    let config = HeadConfig {
        loss,
        ..config(300, 32)
    };
    let labels: Vec<i64> = (0..20).map(|i| i * 13).collect();
    check(&Case::new(config, &labels, &[12, 8]), subject);
}

/// Margins that follow the norm, without a gradient through it.
pub fn adaface_equals_plain(subject: Subject<'_>) {
    let config = HeadConfig {
        loss: spec::Loss::AdaFace(spec::AdaFace {
            m: 0.4,
            h: 0.333,
            t_alpha: 0.5,
        }),
        ..config(300, 32)
    };
    let labels: Vec<i64> = (0..20).map(|i| i * 13).collect();
    for (sample_rate, micros) in [(1.0, 1), (0.2, 2)] {
        let config = HeadConfig {
            sample_rate,
            ..config.clone()
        };
        let case = Case {
            micros,
            ..Case::new(config, &labels, &[12, 8])
        };
        check(&case, subject);
    }
}

/// Products of bf16, at the width that training has.
pub fn bf16_equals_plain(subject: Subject<'_>) {
    for (classes, batch, world_size, sample_rate) in
        [(3001, 50, 1, 1.0), (1501, 33, 2, 1.0), (6001, 40, 2, 0.3)]
    {
        for micros in [1, 2] {
            let config = HeadConfig {
                sample_rate,
                ..config(classes, 512)
            };
            let labels: Vec<i64> = (0..batch * world_size)
                .map(|i| i * 37 % i64::from(classes))
                .collect();
            let rows = vec![batch as u32; world_size as usize];
            check(
                &Case {
                    micros,
                    ..Case::new(config, &labels, &rows)
                },
                subject,
            );
        }
    }
}

/// A sampled head under SGD against the dense optimizer over 200 steps of a falling rate, with looks at the state in
/// between, and a restart: rows that were not sampled decay and move as there.
pub fn lazy_sgd_equals_dense(subject: Subject<'_>) {
    // A small scale: rounding grows with it from step to step, in any two heads.
    let config = HeadConfig {
        sample_rate: 0.1,
        scale: 16.0,
        ..config(2000, 64)
    };
    let labels: Vec<i64> = (0..8).map(|i| i * 231).collect();
    let case = Case::new(config, &labels, &[8]);
    let classes = initial_weight(3, ClassRange { lo: 0, hi: 2000 }, 64);
    let mut comm = TcpCollective::alone();
    let mut plain = PlainHead::new(&case.config, 0, 1);
    let mut lazy = subject.alone(&case.config);
    // One that nobody looks at before the end.
    let mut unseen = subject.alone(&case.config);
    let compare = |lazy: &mut dyn Head, plain: &mut PlainHead, step: u64| {
        for ((name, ours), (_, dense)) in lazy.state().iter().zip(plain.state()) {
            let difference = distance(ours, &dense, 1e-6);
            println!("{name} at step {step}: {difference:.1e}");
            assert!(difference < 1e-5, "{name} at step {step}: {difference:e}");
        }
    };
    let labels = Tensor::from_slice(&labels);
    for step in 0..200u64 {
        let lr = 0.1 * (1.0 - step as f64 / 201.0);
        let embedding = case.embeddings(0, step, &classes);
        for head in [&mut plain as &mut dyn Head, &mut *lazy, &mut *unseen] {
            head.forward_backward(&mut comm, &embedding, &labels, &[8], step, 1.0)
                .expect("a good batch");
            head.update(lr);
        }
        if step % 50 == 30 {
            compare(&mut *lazy, &mut plain, step);
        }
        if step == 111 {
            let saved: Vec<(String, Tensor)> = lazy.state().into_iter().map(|(n, t)| (n, t.copy())).collect();
            let updates = lazy.updates();
            lazy = subject.alone(&case.config);
            let find = |name: &str| saved.iter().find(|(n, _)| n == name).map(|(_, t)| t.copy());
            lazy.load_state(updates, &mut |name| find(name))
                .expect("its state");
        }
    }
    compare(&mut *lazy, &mut plain, 200);
    compare(&mut *unseen, &mut plain, 200);
    assert_eq!((lazy.updates(), plain.updates()), (200, 200));
}

/// A discarded micro-batch leaves no trace, and a state taken over goes on bit for bit.
pub fn state_round_trips(subject: Subject<'_>) {
    for (optimizer, sample_rate) in [
        (config(9, 16).optimizer, 1.0),
        (config(9, 16).optimizer, 0.3),
        (OptimizerConfig::adamw(0.1), 1.0),
    ] {
        let config = HeadConfig {
            optimizer,
            sample_rate,
            ..config(90, 16)
        };
        let case = Case {
            steps: 1,
            ..Case::new(config, &[1, 5, 77], &[3])
        };
        let mut comm = TcpCollective::alone();
        let mut first = subject.alone(&case.config);
        train(&mut *first, &mut comm, &case);
        let saved: Vec<(String, Tensor)> = first.state().into_iter().map(|(n, t)| (n, t.copy())).collect();
        let find = |name: &str| saved.iter().find(|(n, _)| n == name).map(|(_, t)| t.copy());
        let mut second = subject.alone(&HeadConfig {
            seed: 99,
            ..case.config.clone()
        });
        second
            .load_state(first.updates(), &mut |name| find(name))
            .expect("its state");
        let embedding = case.embeddings(0, 8, &Tensor::zeros([90, 16], (Kind::Float, Device::Cpu)));
        let labels = Tensor::from_slice(&case.labels);
        second
            .forward_backward(&mut comm, &embedding, &labels, &[3], 9, 1.0)
            .expect("a good batch");
        second.discard();
        second.update(0.1);
        assert_eq!(second.updates(), 1, "nothing to update from");
        // The sampler's seed is the head's own.
        if sample_rate == 1.0 {
            let (a, b) = (
                train(&mut *first, &mut comm, &case),
                train(&mut *second, &mut comm, &case),
            );
            assert_eq!(a.micros, b.micros);
            assert_eq!(a.state, b.state);
        }
        assert!(matches!(
            second.load_state(1, &mut |_| None),
            Err(HeadError::MissingState { .. })
        ));
        let short = second.load_state(1, &mut |name| find(name).map(|t| t.narrow(0, 0, 3)));
        assert!(matches!(short, Err(HeadError::Form { .. })));
    }
}

pub fn bad_batches_are_refused(subject: Subject<'_>) {
    let mut comm = TcpCollective::alone();
    let mut head = subject.alone(&config(9, 16));
    let embedding = Tensor::ones([2, 16], (Kind::Float, Device::Cpu));
    for bad in [-1, 9, i64::MAX] {
        let labels = Tensor::from_slice(&[0, bad]);
        let refused = head.forward_backward(&mut comm, &embedding, &labels, &[2], 0, 1.0);
        assert!(
            matches!(refused, Err(HeadError::LabelOutOfRange { row: 1, .. })),
            "{refused:?}"
        );
    }
    let labels = Tensor::from_slice(&[0i64, 1]);
    let refused = head.forward_backward(&mut comm, &embedding.narrow(1, 0, 8), &labels, &[2], 0, 1.0);
    assert!(matches!(refused, Err(HeadError::Form { .. })));
    let nothing = head.forward_backward(
        &mut comm,
        &embedding.narrow(0, 0, 0),
        &labels.narrow(0, 0, 0),
        &[0],
        0,
        1.0,
    );
    assert_eq!(nothing.expect("nothing to do").loss, 0.0);
    head.update(0.1);
    assert_eq!(head.updates(), 0);
}

/// What is not finite shows in the loss, as with the plain head.
pub fn not_a_number_is_not_hidden(subject: Subject<'_>) {
    let case = Case::new(config(300, 16), &[0, 7], &[2]);
    for bad in [f64::NAN, f64::INFINITY] {
        let mut head = subject.alone(&case.config);
        let embedding = Tensor::ones([2, 16], (Kind::Float, Device::Cpu));
        let _ = embedding.narrow(0, 1, 1).narrow(1, 3, 1).fill_(bad);
        let labels = Tensor::from_slice(&[0i64, 7]);
        let out = head.forward_backward(&mut TcpCollective::alone(), &embedding, &labels, &[2], 0, 1.0);
        assert!(!out.expect("a good batch").loss.is_finite());
    }
}

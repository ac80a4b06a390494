//! All kernels together, with libtorch's matrix products between them: a head, held against the tiled one over several
//! steps.

use super::*;
use crate::{
    collective::local,
    head::{
        Head, HeadConfig, TiledHead, classes, lazy_sgd::History, margin,
        tiled::kernel::exponentials::first_shift, unit::normalize_backward,
    },
    optim::OptimizerConfig,
    random::{Draws, normal},
};
use arcface_proto::{
    spec::{self, HeadImplementation, MarginGradient, Precision},
    types::ClassRange,
};
use std::time::Duration;
use tch::{Kind, Tensor};
use twin::{Margin, Others, Sgd, Tile, Weights};

/// Relative L2, f32 against f32 in another order of sums: that of the tiled head against the plain one.
const TOLERANCE: f64 = 1e-5;
/// Columns of a tile: so that the last one is not full.
const TILE: usize = 7;

/// One rank's head as a GPU would compute it.
struct KernelHead {
    config: HeadConfig,
    weights: Weights,
    since: Vec<u32>,
    history: History,
    launch: Launch,
}

fn matrix(values: &[f32], columns: usize) -> Tensor {
    Tensor::from_slice(values).view([-1, columns as i64])
}

fn values(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(tensor.contiguous().view([-1])).expect("f32")
}

impl KernelHead {
    fn new(config: &HeadConfig, launch: Launch) -> Self {
        let shard = ClassRange::of_rank(config.num_classes, 0, 1);
        let weight = values(&classes::initial_weight(
            config.seed,
            shard,
            config.embedding_size,
        ));
        Self {
            weights: Weights {
                dim: config.embedding_size as usize,
                momentum: vec![0.0; weight.len()],
                weight,
                history: twin::History::none(),
            },
            since: vec![0; config.num_classes as usize],
            history: History::new(0.9, 5e-4, config.sample_rate),
            config: config.clone(),
            launch,
        }
    }

    /// Loss and gradient of the embeddings; the weights are updated.
    fn step(&mut self, embedding: &Tensor, labels: &[i64], step: u64, lr: f64) -> (f64, Tensor) {
        let (launch, dim, samples) = (self.launch, self.weights.dim, labels.len());
        let classes = self.weights.rows();
        let lazy = self.config.sample_rate < 1.0;
        let (chosen, target) = match lazy {
            true => {
                let draws = Draws::new(self.config.seed, Purpose::ClassSampling, step).word();
                let wanted = (self.config.sample_rate * classes as f64) as u64;
                twin::sample(launch, draws, 0, classes, wanted, labels)
            }
            false => ((0..classes as u32).collect(), labels.to_vec()),
        };
        if lazy {
            self.weights.history = twin::History::of(&self.history, &self.since);
        }
        let (unit_bd, _, norms) = twin::normalize_f32_f32(launch, &values(embedding), dim);
        let (unit_cd, inverse) = twin::normalize_weights_f32(launch, &self.weights, Some(&chosen));
        let (cosine, outside) = twin::target_cosines(launch, &unit_bd, &self.weights, labels);
        let margin = Margin {
            m: self.config.margin,
            scale: self.config.scale,
            exact: self.config.margin_gradient == MarginGradient::Exact,
        };
        let (logit, by_cosine) = twin::margin_logits(launch, margin, &cosine, &outside, &target);
        let rule: margin::Margin = self.config.margin();
        let prepared = rule.prepare(&cosine);
        let shift = vec![first_shift(prepared.largest_logit()); samples];
        let others = Others::of(&prepared, self.config.scale, shift);

        let (unit_b, unit_c) = (matrix(&unit_bd, dim), matrix(&unit_cd, dim));
        let tiles = || {
            (0..chosen.len())
                .step_by(TILE)
                .map(|first| (first, TILE.min(chosen.len() - first)))
        };
        let product = |(first, columns): (usize, usize)| {
            let rows = unit_c.narrow(0, first as i64, columns as i64);
            (values(&unit_b.matmul(&rows.tr())), rows)
        };
        let mut sums = vec![0f64; samples];
        for (first, columns) in tiles() {
            let tile = Tile {
                cosines: &product((first, columns)).0,
                columns,
                first,
                target: &target,
            };
            twin::softmax_sums_f32(launch, tile, &logit, &others, &mut sums);
        }
        let rows = twin::softmax_rows(launch, &sums, &logit, &by_cosine, &others, 1.0);
        let mut grad_unit_bd = Tensor::zeros([samples as i64, dim as i64], (Kind::Float, tch::Device::Cpu));
        let sgd = Sgd {
            lr: lr as f32,
            mu: 0.9,
            decay: 5e-4,
        };
        for (first, columns) in tiles() {
            let (mut cosines, unit_tile) = product((first, columns));
            let tile = Tile {
                cosines: &[],
                columns,
                first,
                target: &target,
            };
            twin::softmax_gradient_in_place(launch, &mut cosines, columns, tile, &others, &rows);
            let gradient = matrix(&cosines, columns);
            grad_unit_bd += gradient.matmul(&unit_tile);
            let grad_tile = values(&gradient.tr().matmul(&unit_b));
            let span = first..first + columns;
            let of_tile = Some(&chosen[span.clone()]);
            twin::sgd_rows(
                launch,
                &mut self.weights,
                of_tile,
                &grad_tile,
                &inverse[span],
                sgd,
            );
        }
        if lazy {
            self.since.clone_from(&self.weights.history.since);
            self.history.advance(lr);
        }
        let norms: Vec<f32> = norms.iter().map(|norm| *norm as f32).collect();
        let gradient = normalize_backward(&grad_unit_bd, &unit_b, &matrix(&norms, 1));
        (rows.loss.iter().sum::<f64>() / samples as f64, gradient)
    }

    /// Weights and momentum with nothing missing.
    fn finish(mut self) -> (Tensor, Tensor) {
        if self.config.sample_rate < 1.0 {
            self.weights.history = twin::History::of(&self.history, &self.since);
            twin::make_up_rows(self.launch, &mut self.weights, self.history.now());
        }
        let dim = self.weights.dim;
        (
            matrix(&self.weights.weight, dim),
            matrix(&self.weights.momentum, dim),
        )
    }
}

/// Relative, but for what is 0 up to rounding: the softmax over one class.
fn distance(ours: &Tensor, expected: &Tensor) -> f64 {
    let norm = expected.norm().double_value(&[]).max(1e-6);
    (ours - expected).norm().double_value(&[]) / norm
}

fn check(config: &HeadConfig, labels: &[i64], launch: Launch) {
    let mut comm = local::world(1, Duration::from_secs(60))
        .expect("loopback")
        .remove(0);
    let mut tiled = TiledHead::new(config, 0, 1);
    let mut ours = KernelHead::new(config, launch);
    for step in 0..5u64 {
        let value = |i: u64| normal(step, Purpose::Synthetic, i, 0) as f32;
        let count = labels.len() as u64 * config.embedding_size as u64;
        let embedding: Vec<f32> = (0..count).map(value).collect();
        let embedding = matrix(&embedding, config.embedding_size as usize);
        let lr = 0.01 / (1.0 + step as f64);
        let labels_b = Tensor::from_slice(labels);
        let rows = [labels.len() as u32];
        let expected = tiled
            .forward_backward(&mut comm, &embedding, &labels_b, &rows, step, 1.0)
            .expect("a good batch");
        tiled.update(lr);
        let (loss, gradient) = ours.step(&embedding, labels, step, lr);
        assert!(
            (loss - expected.loss).abs() < TOLERANCE * expected.loss.max(1e-3),
            "{step}: {loss} {}",
            expected.loss
        );
        let difference = distance(&gradient, &expected.grad_embedding);
        assert!(
            difference < TOLERANCE,
            "{step}: gradient {difference:e}, {launch:?} {config:?}"
        );
    }
    let (weight, momentum) = ours.finish();
    for (name, expected) in tiled.state() {
        let ours = match name.as_str() {
            "weight" => &weight,
            _ => &momentum,
        };
        let difference = distance(ours, &expected);
        assert!(
            difference < TOLERANCE,
            "{name} {difference:e}, {launch:?} {config:?}"
        );
    }
}

#[test]
fn a_head_of_kernels_trains_as_the_tiled_one() {
    let config = |num_classes, margin, margin_gradient, filter, sample_rate| HeadConfig {
        num_classes,
        embedding_size: 24,
        margin,
        scale: 64.0,
        margin_gradient,
        interclass_filtering_threshold: filter,
        sample_rate,
        seed: 3,
        optimizer: OptimizerConfig::Sgd {
            momentum: 0.9,
            weight_decay: 5e-4,
        },
        implementation: HeadImplementation::Tiled,
        precision: Precision::Fp32,
        loss: spec::Loss::ArcFace,
    };
    let launches = Launch::all();
    let (reference, exact) = (MarginGradient::Reference, MarginGradient::Exact);
    check(
        &config(37, [1.0, 0.5, 0.0], reference, None, 1.0),
        &[0, 36, 7, 7, 14],
        launches[2],
    );
    check(
        &config(37, [1.0, 0.0, 0.4], reference, Some(0.2), 1.0),
        &[3, 36, 20],
        launches[3],
    );
    check(
        &config(64, [0.9, 0.4, 0.15], exact, None, 0.4),
        &[0, 63, 7, 20, 21, 22],
        launches[4],
    );
    check(
        &config(50, [1.0, 0.5, 0.0], exact, Some(0.1), 0.2),
        &[49],
        launches[5],
    );
    check(
        &config(1, [1.0, 0.5, 0.0], reference, None, 1.0),
        &[0, 0],
        launches[2],
    );
}

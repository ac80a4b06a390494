//! The plain head on worlds of several ranks against one dense computation in f64 by autograd, and its edges.

use super::*;
use crate::head::{classes::INIT_STD, unit::MIN_NORM};
use crate::random::{Purpose, normal};
use crate::{
    collective::{TcpCollective, local},
    optim::OptimizerConfig,
};
use arcface_proto::spec::{HeadImplementation, Loss, MarginGradient, Precision};
use proptest::prelude::*;
use std::{thread, time::Duration};

mod losses;

/// f32 against f64: sums of a few hundred products, logits up to 64.
const TOLERANCE: f64 = 2e-5;

fn config(num_classes: u32) -> HeadConfig {
    HeadConfig {
        num_classes,
        embedding_size: 16,
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
        implementation: HeadImplementation::Plain,
        precision: Precision::Fp32,
        loss: Loss::ArcFace,
    }
}

/// What one rank of a world got.
struct Outcome {
    loss: f64,
    grad_embedding: Tensor,
    grad_weight: Tensor,
}

/// A micro-batch over all ranks: labels and rows per rank. Embeddings are drawn from a counter.
#[derive(Clone, Debug)]
struct Batch {
    labels: Vec<i64>,
    rows: Vec<u32>,
    share: f64,
}

impl Batch {
    fn cut(&self, rank: usize) -> (i64, i64) {
        let first: u32 = self.rows[..rank].iter().sum();
        (i64::from(first), i64::from(self.rows[rank]))
    }

    fn labels_of(&self, rank: usize) -> Tensor {
        let (first, rows) = self.cut(rank);
        Tensor::from_slice(&self.labels).narrow(0, first, rows)
    }
}

/// Embedding of row `row` of a batch: the same however the batch is cut.
fn embeddings(first: i64, rows: i64) -> Tensor {
    let value = |i: i64, d: i64| normal(17, Purpose::Synthetic, i as u64, d as u64) as f32;
    let values: Vec<f32> = (first..first + rows)
        .flat_map(|i| (0..16).map(move |d| value(i, d)))
        .collect();
    Tensor::from_slice(&values).view([rows, 16])
}

/// Runs `work` on every rank of a world; results in rank order.
fn on_ranks<T: Send>(world_size: u32, work: impl Fn(&mut TcpCollective) -> T + Sync) -> Vec<T> {
    let ranks = local::world(world_size, Duration::from_secs(60)).expect("loopback");
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

fn run_one(head: &mut PlainHead, comm: &mut dyn Collective, batch: &Batch, first: i64) -> HeadOutput {
    let rank = comm.rank() as usize;
    let (start, rows) = batch.cut(rank);
    let embedding = embeddings(first + start, rows);
    head.forward_backward(
        comm,
        &embedding,
        &batch.labels_of(rank),
        &batch.rows,
        4,
        batch.share,
    )
    .expect("a good batch")
}

fn run(config: &HeadConfig, world_size: u32, batch: &Batch) -> Vec<Outcome> {
    on_ranks(world_size, |comm| {
        let mut head = PlainHead::new(config, comm.rank(), world_size);
        let out = run_one(&mut head, comm, batch, 0);
        Outcome {
            loss: out.loss,
            grad_embedding: out.grad_embedding,
            grad_weight: head.weight_grad().expect("kept").copy(),
        }
    })
}

/// Loss and gradients by (embeddings, weight) of one dense softmax over all classes, in f64 by autograd.
fn dense(config: &HeadConfig, labels: &[i64]) -> (f64, Tensor, Tensor) {
    let leaf = |tensor: Tensor| tensor.to_kind(Kind::Double).set_requires_grad(true);
    let embedding = leaf(embeddings(0, labels.len() as i64));
    let weight = leaf(PlainHead::new(config, 0, 1).weight);
    let unit = |t: &Tensor| {
        t / t
            .norm_scalaropt_dim(2.0, [1].as_slice(), true)
            .clamp_min(MIN_NORM)
    };
    let cos = unit(&embedding).matmul(&unit(&weight).tr()).clamp(-1.0, 1.0);
    let target = Tensor::from_slice(labels);
    let onehot = target
        .one_hot(i64::from(config.num_classes))
        .to_kind(Kind::Double);
    let [m1, m2, m3] = config.margin;
    let kept = match config.interclass_filtering_threshold {
        Some(threshold) => cos.le(threshold).to_kind(Kind::Double).maximum(&onehot),
        None => cos.ones_like(),
    };
    let exact = (cos.acos() * m1 + m2).cos() - m3;
    let with_margin = match config.margin_gradient {
        // The value of the margin with the slope of the plain cosine.
        MarginGradient::Reference => &cos + (exact - &cos).detach(),
        MarginGradient::Exact => exact,
    };
    let others: Tensor = 1.0 - &onehot;
    let logits: Tensor = (with_margin * &onehot + &cos * &kept * others) * config.scale;
    let log_p =
        (logits.log_softmax(1, Kind::Double) * &onehot).sum_dim_intlist([1].as_slice(), false, Kind::Double);
    // The smallest probability limits the value of each sample's loss, not its gradient.
    let loss = -log_p
        .clamp_min(MIN_PROBABILITY.ln())
        .mean(Kind::Double)
        .double_value(&[]);
    (-log_p.mean(Kind::Double)).backward();
    (loss, embedding.grad(), weight.grad())
}

fn close(ours: &Tensor, golden: &Tensor) -> bool {
    assert_eq!(ours.size(), golden.size());
    let difference = (ours.to_kind(Kind::Double) - golden).norm().double_value(&[]);
    difference <= TOLERANCE * golden.norm().double_value(&[]).max(1e-6)
}

fn check_against_dense(config: &HeadConfig, batch: &Batch) {
    let world_size = batch.rows.len() as u32;
    let (loss, grad_embedding, grad_weight) = dense(config, &batch.labels);
    let outcomes = run(config, world_size, batch);
    let about = format!("{config:?} {batch:?}");
    for (rank, outcome) in outcomes.iter().enumerate() {
        assert!(
            (outcome.loss - loss).abs() <= TOLERANCE * loss.max(1.0),
            "{} {loss}: {about}",
            outcome.loss
        );
        assert_eq!(outcome.loss, outcomes[0].loss, "ranks differ: {about}");
        let (first, rows) = batch.cut(rank);
        let golden = grad_embedding.narrow(0, first, rows) * (f64::from(world_size) * batch.share);
        assert!(
            close(&outcome.grad_embedding, &golden),
            "embedding gradient of rank {rank}: {about}"
        );
    }
    let parts: Vec<&Tensor> = outcomes.iter().map(|outcome| &outcome.grad_weight).collect();
    assert!(
        close(&Tensor::cat(&parts, 0), &(grad_weight * batch.share)),
        "weight gradient: {about}"
    );
}

fn batch_strategy() -> impl Strategy<Value = (u32, Batch)> {
    let rows = prop::collection::vec(0u32..5, 1..5).prop_filter("a row", |rows| rows.iter().any(|&n| n > 0));
    (1u32..40, rows, 0.1f64..1.0).prop_flat_map(|(classes, rows, share)| {
        let total = rows.iter().sum::<u32>() as usize;
        prop::collection::vec(0..i64::from(classes), total).prop_map(move |labels| {
            let rows = rows.clone();
            (classes, Batch { labels, rows, share })
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    /// Worlds of 1 to 4, uneven rows, empty ranks, more ranks than classes, repeated labels, every kind of margin.
    #[test]
    fn sharded_equals_dense((classes, batch) in batch_strategy(), kind in 0usize..4, filter in any::<bool>()) {
        let mut config = config(classes);
        (config.margin, config.margin_gradient) = [
            ([1.0, 0.5, 0.0], MarginGradient::Reference),
            ([1.0, 0.0, 0.4], MarginGradient::Reference),
            ([1.0, 0.5, 0.0], MarginGradient::Exact),
            ([0.9, 0.4, 0.15], MarginGradient::Exact),
        ][kind];
        config.interclass_filtering_threshold = filter.then_some(0.2);
        check_against_dense(&config, &batch);
    }
}

#[test]
fn edges_equal_dense() {
    let batch = |rows: &[u32], labels: &[i64]| Batch {
        labels: labels.to_vec(),
        rows: rows.to_vec(),
        share: 1.0,
    };
    // One sample; all labels equal; all of one shard's classes; more ranks than classes.
    for (classes, batch) in [
        (9, batch(&[1], &[8])),
        (9, batch(&[2, 2, 2], &[4, 4, 4, 4, 4, 4])),
        (12, batch(&[3, 3], &[0, 1, 2, 5, 4, 3])),
        (2, batch(&[1, 0, 2, 1], &[0, 1, 1, 0])),
        (1, batch(&[1, 1], &[0, 0])),
    ] {
        check_against_dense(&config(classes), &batch);
    }
}

/// Micro-batches weighted by their share of the samples give the gradient of the whole batch.
#[test]
fn accumulation_equals_one_batch() {
    let labels = vec![3, 14, 3, 7, 0, 20];
    let micro = |labels: &[i64], rows: [u32; 2], share| Batch {
        labels: labels.to_vec(),
        rows: rows.to_vec(),
        share,
    };
    let whole = run(&config(21), 2, &micro(&labels, [3, 3], 1.0));
    let parts = [
        (micro(&labels[..4], [2, 2], 4.0 / 6.0), 0),
        (micro(&labels[4..], [2, 0], 2.0 / 6.0), 4),
    ];
    let accumulated = on_ranks(2, |comm| {
        let mut head = PlainHead::new(&config(21), comm.rank(), 2);
        let losses: Vec<f64> = parts
            .iter()
            .map(|(batch, first)| run_one(&mut head, comm, batch, *first).loss * batch.share)
            .collect();
        (
            losses.iter().sum::<f64>(),
            head.weight_grad().expect("kept").copy(),
        )
    });
    for ((loss, grad_weight), whole) in accumulated.iter().zip(&whole) {
        assert!((loss - whole.loss).abs() < TOLERANCE * whole.loss);
        assert!(close(grad_weight, &whole.grad_weight.to_kind(Kind::Double)));
    }
}

/// Training is the same at every world size: same loss curve, same weights.
#[test]
fn a_run_is_the_same_at_every_world_size() {
    let labels: Vec<i64> = (0..12).map(|i| i * 5 % 23).collect();
    let train = |world_size: u32| {
        let batch = Batch {
            labels: labels.clone(),
            rows: vec![12 / world_size; world_size as usize],
            share: 1.0,
        };
        let ranks = on_ranks(world_size, |comm| {
            let mut head = PlainHead::new(&config(23), comm.rank(), world_size);
            let losses: Vec<f64> = (0..6)
                .map(|_| {
                    let loss = run_one(&mut head, comm, &batch, 0).loss;
                    head.update(0.1);
                    loss
                })
                .collect();
            (losses, head.state())
        });
        let losses = ranks[0].0.clone();
        let weights: Vec<&Tensor> = ranks.iter().map(|(_, state)| &state[0].1).collect();
        (losses, Tensor::cat(&weights, 0))
    };
    let (losses, weight) = train(1);
    assert!(losses[5] < losses[0], "it learns: {losses:?}");
    for world_size in [2, 3, 4] {
        let (other_losses, other_weight) = train(world_size);
        for (a, b) in losses.iter().zip(&other_losses) {
            assert!((a - b).abs() < 1e-4 * a.max(1.0), "{losses:?} {other_losses:?}");
        }
        let difference = (&other_weight - &weight).norm() / weight.norm();
        assert!(
            difference.double_value(&[]) < 1e-4,
            "{world_size}: {difference:?}"
        );
    }
}

/// A sampled step is a dense step over the chosen classes; the others keep a zero gradient, and are still decayed.
#[test]
fn unsampled_rows_get_no_gradient_but_decay() {
    let config = HeadConfig {
        sample_rate: 0.2,
        ..config(50)
    };
    let batch = Batch {
        labels: vec![1, 40, 13],
        rows: vec![2, 1],
        share: 1.0,
    };
    on_ranks(2, |comm| {
        let mut head = PlainHead::new(&config, comm.rank(), 2);
        let before = head.weight.copy();
        run_one(&mut head, comm, &batch, 0);
        let touched = head
            .weight_grad()
            .expect("kept")
            .norm_scalaropt_dim(2.0, [1].as_slice(), false)
            .gt(0.0);
        assert_eq!(
            touched.sum(Kind::Int64).int64_value(&[]),
            5,
            "int(0.2 * 25) classes"
        );
        head.update(0.1);
        let decayed = before * (1.0 - 0.1 * 5e-4);
        let kept = touched.logical_not().nonzero().view([-1]);
        let difference = (&head.weight - decayed).index_select(0, &kept).abs().max();
        // A rounding of weights of up to 0.05; the decay itself is 50 times as large.
        assert!(difference.double_value(&[]) < 1e-8);
    });
}

#[test]
fn initial_weights_do_not_depend_on_the_world() {
    let whole = PlainHead::new(&config(11), 0, 1).weight;
    let parts: Vec<Tensor> = (0..4)
        .map(|rank| PlainHead::new(&config(11), rank, 4).weight)
        .collect();
    assert_eq!(Tensor::cat(&parts, 0), whole);
    let std = PlainHead::new(&config(4000), 0, 1)
        .weight
        .std(true)
        .double_value(&[]);
    assert!((std - INIT_STD).abs() < 1e-4, "{std}");
}

/// All ranks refuse a label that is no class, name it, and can go on with the next batch.
#[test]
fn a_label_out_of_range_is_refused_by_all() {
    for bad in [-1, 9, i64::MAX] {
        on_ranks(2, |comm| {
            let mut head = PlainHead::new(&config(9), comm.rank(), 2);
            let labels = Tensor::from_slice(&if comm.rank() == 1 { [0, bad] } else { [0, 1] });
            let refused = head.forward_backward(comm, &embeddings(0, 2), &labels, &[2, 2], 0, 1.0);
            let message = refused.expect_err("no class").to_string();
            assert_eq!(
                message,
                format!("label {bad} of sample 1 of rank 1 is outside 0..9")
            );
            assert!(head.weight_grad().is_none());
            comm.barrier().expect("the communicator lives");
        });
    }
}

#[test]
fn a_batch_of_another_form_is_refused() {
    let mut comm = TcpCollective::alone();
    let mut head = PlainHead::new(&config(9), 0, 1);
    let labels = Tensor::from_slice(&[1i64, 2]);
    for (embedding, labels, rows) in [
        (embeddings(0, 3), &labels, vec![2]),
        (embeddings(0, 2), &labels.narrow(0, 0, 1), vec![2]),
        (embeddings(0, 2), &labels, vec![2, 2]),
        (embeddings(0, 2).narrow(1, 0, 8), &labels, vec![2]),
    ] {
        let refused = head.forward_backward(&mut comm, &embedding, labels, &rows, 0, 1.0);
        assert!(matches!(refused, Err(HeadError::Form { .. })), "{refused:?}");
    }
    let empty = head.forward_backward(
        &mut comm,
        &embeddings(0, 0),
        &labels.narrow(0, 0, 0),
        &[0],
        0,
        1.0,
    );
    assert_eq!(empty.expect("nothing to do").loss, 0.0);
}

/// A head that takes over another's state goes on as the other does; a discarded gradient leaves no trace.
#[test]
fn state_round_trips() {
    for optimizer in [config(9).optimizer, OptimizerConfig::adamw(0.1)] {
        let config = HeadConfig {
            optimizer,
            ..config(9)
        };
        let batch = Batch {
            labels: vec![1, 5],
            rows: vec![2],
            share: 1.0,
        };
        let mut comm = TcpCollective::alone();
        let mut step = |head: &mut PlainHead| {
            run_one(head, &mut comm, &batch, 0);
            head.update(0.01);
        };
        let mut first = PlainHead::new(&config, 0, 1);
        step(&mut first);
        let saved: Vec<(String, Tensor)> = first.state().into_iter().map(|(n, t)| (n, t.copy())).collect();
        let mut second = PlainHead::new(&HeadConfig { seed: 99, ..config }, 0, 1);
        let find = |name: &str| saved.iter().find(|(n, _)| n == name).map(|(_, t)| t.copy());
        second
            .load_state(first.updates(), &mut |name| find(name))
            .expect("its state");
        step(&mut first);
        let mut other = TcpCollective::alone();
        run_one(&mut second, &mut other, &batch, 7);
        second.discard();
        step(&mut second);
        assert_eq!(first.updates(), 2);
        for ((name, a), (_, b)) in first.state().iter().zip(second.state()) {
            assert_eq!(*a, b, "{name}");
        }
        let missing = second.load_state(1, &mut |_| None);
        assert!(matches!(missing, Err(HeadError::MissingState { .. })));
        let short = second.load_state(1, &mut |name| find(name).map(|t| t.narrow(0, 0, 3)));
        assert!(matches!(short, Err(HeadError::Form { .. })));
    }
}

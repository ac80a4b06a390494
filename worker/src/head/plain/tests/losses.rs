//! AdaFace, MagFace, CurricularFace and sub-centres on worlds of several ranks against their papers' equations, written
//! down once more as one dense computation in f64 that autograd differentiates.

use super::*;
use arcface_proto::spec::{AdaFace, CurricularFace, MagFace, SubCenter};
use std::{f64::consts::PI, sync::Mutex};

const CLASSES: u32 = 30;
const LABELS: [i64; 8] = [3, 29, 3, 14, 0, 21, 7, 12];

fn losses() -> [Loss; 4] {
    [
        // A share that lets one batch move the statistics well away from their start.
        Loss::AdaFace(AdaFace {
            t_alpha: 0.8,
            ..AdaFace::default()
        }),
        Loss::MagFace(MagFace::default()),
        Loss::CurricularFace(CurricularFace {
            t_alpha: 0.8,
            ..CurricularFace::default()
        }),
        Loss::SubCenter(SubCenter::default()),
    ]
}

fn with_loss(loss: Loss) -> HeadConfig {
    HeadConfig {
        margin_gradient: MarginGradient::Exact,
        loss,
        ..config(CLASSES)
    }
}

/// Rows whose norms lie around 20 as those of networks do, some below MagFace's 10 and some above AdaFace's 100; and
/// which lean towards their classes a little.
fn rows_of_faces(config: &HeadConfig, first: i64, rows: i64) -> Tensor {
    let weight = PlainHead::new(config, 0, 1).weight;
    let weight = if config.loss.centers() > 1 {
        weight.select(1, 1)
    } else {
        weight
    };
    let (unit, _) = normalize(&weight);
    let count = LABELS.len() as i64;
    let parts: Vec<Tensor> = (first..=first + rows)
        .map(|row| {
            let own = unit.select(0, LABELS[(row % count) as usize]);
            let length = [22.0, 8.0, 31.0, 17.0, 25.0, 130.0, 19.0, 40.0][(row % count) as usize];
            let noise = embeddings(100 + row, 1).squeeze_dim(0) * 0.25;
            let direction = own * (0.3 + 0.1 * (row % 5) as f64) + noise;
            &direction / direction.norm() * length
        })
        .collect();
    Tensor::stack(&parts, 0).narrow(0, 0, rows)
}

/// Moving statistics as the oracle keeps them: (AdaFace's mean, its standard deviation, CurricularFace's t).
type Moving = (f64, f64, f64);

/// The oracle: loss, gradients by embeddings and by weights `[classes, centers, d]`, and the moved statistics.
fn oracle(
    config: &HeadConfig,
    embedding: &Tensor,
    weight: &Tensor,
    target: &Tensor,
    moving: Moving,
) -> (f64, Tensor, Tensor, Moving) {
    let leaf = |tensor: &Tensor| tensor.to_kind(Kind::Double).copy().set_requires_grad(true);
    let (x, w) = (leaf(embedding), leaf(weight));
    let length = |t: &Tensor, dim: i64| t.norm_scalaropt_dim(2.0, [dim].as_slice(), true);
    let (x_norm, w_norm) = (length(&x, 1), length(&w, 2));
    let (x_unit, w_unit) = (&x / &x_norm, &w / w_norm);
    // [b, classes, centers], the nearest centre of each.
    let cos = Tensor::einsum("bd,nkd->bnk", &[&x_unit, &w_unit], None::<&[i64]>)
        .amax([2].as_slice(), false)
        .clamp(-1.0, 1.0);
    let cos_y = cos.gather(1, &target.unsqueeze(1), false);
    let theta_y = cos_y.acos();
    let (mut mean, mut std, mut t) = moving;
    let mut others = cos.shallow_clone();
    let mut extra = Tensor::from(0.0);
    let own = match config.loss {
        Loss::AdaFace(AdaFace { m, h, t_alpha }) => {
            let norms = x_norm.detach().clamp(1e-3, 100.0);
            mean = t_alpha * norms.mean(None::<Kind>).double_value(&[]) + (1.0 - t_alpha) * mean;
            std = t_alpha * norms.std(true).double_value(&[]) + (1.0 - t_alpha) * std;
            let z = ((norms - mean) * (h / (std + 1e-3))).clamp(-1.0, 1.0);
            (theta_y - &z * m).clamp(1e-3, PI - 1e-3).cos() - (&z * m + m)
        }
        Loss::MagFace(c) => {
            let a = x_norm.clamp(c.l_a, c.u_a);
            let m = (&a - c.l_a) * ((c.u_m - c.l_m) / (c.u_a - c.l_a)) + c.l_m;
            let regulariser: Tensor = a.reciprocal() + &a / (c.u_a * c.u_a);
            extra = regulariser.mean(None::<Kind>) * c.lambda_g;
            assert!((&theta_y + &m).max().double_value(&[]) < PI);
            (theta_y + m).cos()
        }
        Loss::CurricularFace(CurricularFace { m, t_alpha }) => {
            t = t_alpha * cos_y.mean(None::<Kind>).double_value(&[]) + (1.0 - t_alpha) * t;
            let own = (theta_y + m).cos();
            let hard = cos.gt_tensor(&own.detach()).to_kind(Kind::Double);
            let easy: Tensor = 1.0 - &hard;
            others = &cos * (&cos + t) * hard + &cos * easy;
            own
        }
        Loss::SubCenter(_) | Loss::ArcFace => (theta_y + config.margin[1]).cos(),
    };
    let onehot = target.one_hot(cos.size()[1]).to_kind(Kind::Double);
    let rest: Tensor = 1.0 - &onehot;
    let logits = (own * &onehot + others * rest) * config.scale;
    let log_p = logits.log_softmax(1, Kind::Double) * &onehot;
    let loss: Tensor = extra - log_p.sum(Kind::Double) / target.size()[0] as f64;
    loss.backward();
    (loss.double_value(&[]), x.grad(), w.grad(), (mean, std, t))
}

/// What a world made of two micro-batches, each with the statistics that the one before left.
struct Run {
    losses: [f64; 2],
    grad_embeddings: [Tensor; 2],
    /// Sum over both, `[all classes, centers, d]`.
    grad_weight: Tensor,
}

fn run_twice(config: &HeadConfig, rows: &[u32]) -> Run {
    let world_size = rows.len() as u32;
    let batch = Batch {
        labels: LABELS.to_vec(),
        rows: rows.to_vec(),
        share: 1.0,
    };
    let mut ranks = on_ranks(world_size, |comm| {
        let mut head = PlainHead::new(config, comm.rank(), world_size);
        let mut outputs = [0, 8].map(|offset| {
            let rank = comm.rank() as usize;
            let (first, rows) = batch.cut(rank);
            let embedding = rows_of_faces(config, offset + first, rows);
            head.forward_backward(comm, &embedding, &batch.labels_of(rank), &batch.rows, 4, 1.0)
                .expect("a good batch")
        });
        outputs
            .iter_mut()
            .for_each(|out| out.grad_embedding /= f64::from(world_size));
        (outputs, head.weight_grad().expect("kept").copy())
    });
    let whole = |part: fn(&([HeadOutput; 2], Tensor)) -> &Tensor| {
        Tensor::cat(&ranks.iter().map(part).collect::<Vec<_>>(), 0)
    };
    let grad_embeddings = [
        whole(|rank| &rank.0[0].grad_embedding),
        whole(|rank| &rank.0[1].grad_embedding),
    ];
    let grad_weight = whole(|rank| &rank.1).view([
        i64::from(CLASSES),
        i64::from(config.loss.centers()),
        config.embedding_size,
    ]);
    let losses = ranks.swap_remove(0).0.map(|out| out.loss);
    for (other, _) in &ranks {
        assert_eq!([0, 1].map(|i| other[i].loss), losses, "ranks differ");
    }
    Run {
        losses,
        grad_embeddings,
        grad_weight,
    }
}

/// The classes that take part in step 4 on any rank, rising.
fn sampled(config: &HeadConfig, world_size: u32) -> Vec<i64> {
    let mut all = Vec::new();
    for rank in 0..world_size {
        let shard = ClassRange::of_rank(CLASSES, rank, world_size);
        let mut sampler = RandomNegatives {
            seed: config.seed,
            rate: config.sample_rate,
        };
        let chosen = classes::choose(&mut sampler, 4, shard, &LABELS).expect("chosen");
        let local = chosen.classes.unwrap_or_else(|| (0..shard.len()).collect());
        all.extend(local.into_iter().map(|class| i64::from(class + shard.lo)));
    }
    all
}

fn check(config: &HeadConfig, rows: &[u32]) {
    let about = format!("{:?} rate {} rows {rows:?}", config.loss, config.sample_rate);
    let run = run_twice(config, rows);
    let classes = sampled(config, rows.len() as u32);
    let index = Tensor::from_slice(&classes);
    let column = |label: &i64| classes.binary_search(label).expect("a positive") as i64;
    let target = Tensor::from_slice(&LABELS.iter().map(column).collect::<Vec<i64>>());
    let weight = PlainHead::new(config, 0, 1)
        .weight
        .view([i64::from(CLASSES), -1, config.embedding_size])
        .index_select(0, &index);
    let mut moving = (20.0, 100.0, 0.0);
    let mut grad_weight = Tensor::zeros_like(&weight.to_kind(Kind::Double));
    for (i, offset) in [(0, 0), (1, 8)] {
        let embedding = rows_of_faces(config, offset, LABELS.len() as i64);
        let (loss, by_embedding, by_weight, moved) = oracle(config, &embedding, &weight, &target, moving);
        moving = moved;
        grad_weight += by_weight;
        let ours = run.losses[i];
        assert!(
            (ours - loss).abs() < TOLERANCE * loss.max(1.0),
            "{ours} {loss}: {about}"
        );
        assert!(
            close(&run.grad_embeddings[i], &by_embedding),
            "embedding gradient of batch {i}: {about}"
        );
    }
    assert!(
        close(&run.grad_weight.index_select(0, &index), &grad_weight),
        "weight gradient: {about}"
    );
    let all = run.grad_weight.norm().double_value(&[]);
    let chosen = run.grad_weight.index_select(0, &index).norm().double_value(&[]);
    assert!(
        (all - chosen).abs() <= 1e-6 * all,
        "classes left out have no gradient: {about}"
    );
}

#[test]
fn papers_equations_at_one_two_and_four_ranks() {
    for loss in losses() {
        for rows in [vec![8], vec![3, 5], vec![2, 0, 5, 1]] {
            check(&with_loss(loss), &rows);
        }
    }
}

#[test]
fn papers_equations_with_sampled_classes() {
    for loss in losses() {
        let config = HeadConfig {
            sample_rate: 0.3,
            ..with_loss(loss)
        };
        for rows in [vec![8], vec![3, 5], vec![2, 0, 5, 1]] {
            check(&config, &rows);
        }
    }
}

#[test]
fn filtering_works_with_every_loss() {
    for loss in losses() {
        let config = HeadConfig {
            interclass_filtering_threshold: Some(0.3),
            ..with_loss(loss)
        };
        let (open, filtered) = (run_twice(&with_loss(loss), &[8]), run_twice(&config, &[3, 5]));
        assert!(
            filtered.losses[0] < open.losses[0],
            "near classes no longer count"
        );
        assert!(filtered.losses.iter().all(|loss| loss.is_finite()));
    }
}

/// More ranks than classes, ranks without rows, one row, one class: the same loss and gradients as on one rank.
#[test]
fn edges_equal_one_rank() {
    let batch = |rows: &[u32], labels: &[i64]| Batch {
        labels: labels.to_vec(),
        rows: rows.to_vec(),
        share: 1.0,
    };
    for loss in losses() {
        for (classes, cut) in [
            (2, batch(&[1, 0, 2, 1], &[0, 1, 1, 0])),
            (1, batch(&[1, 1], &[0, 0])),
            (9, batch(&[0, 1], &[8])),
        ] {
            let config = HeadConfig {
                num_classes: classes,
                ..with_loss(loss)
            };
            let about = format!("{loss:?} {cut:?}");
            let world_size = cut.rows.len() as u32;
            let whole = batch(&[cut.rows.iter().sum()], &cut.labels);
            let one = run(&config, 1, &whole).remove(0);
            let many = run(&config, world_size, &cut);
            let cat =
                |part: fn(&Outcome) -> &Tensor| Tensor::cat(&many.iter().map(part).collect::<Vec<_>>(), 0);
            assert!(
                (many[0].loss - one.loss).abs() < TOLERANCE * one.loss.max(1.0),
                "{about}"
            );
            assert!(many[0].loss.is_finite(), "{about}");
            let by_embedding = cat(|out| &out.grad_embedding) / f64::from(world_size);
            assert!(
                close(&by_embedding, &one.grad_embedding.to_kind(Kind::Double)),
                "{about}"
            );
            let by_weight = cat(|out| &out.grad_weight);
            assert!(
                close(&by_weight, &one.grad_weight.to_kind(Kind::Double)),
                "{about}"
            );
        }
    }
}

/// One run on two ranks; and the same, saved after three steps and taken up by worlds of one, two and four.
#[test]
fn a_saved_state_goes_on_at_another_world_size() {
    let step = |head: &mut PlainHead, comm: &mut dyn Collective, step: i64| {
        let world_size = comm.world_size();
        let batch = Batch {
            labels: LABELS.to_vec(),
            rows: vec![8 / world_size; world_size as usize],
            share: 1.0,
        };
        let rank = comm.rank() as usize;
        let (first, rows) = batch.cut(rank);
        let embedding = embeddings(8 * step + first, rows) * 5.0;
        let labels = batch.labels_of(rank);
        let out = head.forward_backward(comm, &embedding, &labels, &batch.rows, step as u64, 1.0);
        head.update(0.1);
        out.expect("a good batch").loss
    };
    for loss in losses() {
        let config = with_loss(loss);
        let mut ranks = on_ranks(2, |comm| {
            let mut head = PlainHead::new(&config, comm.rank(), 2);
            (0..3).for_each(|at| {
                step(&mut head, comm, at);
            });
            let saved: Vec<(String, Tensor)> = head.state().into_iter().map(|(n, t)| (n, t.copy())).collect();
            let updates = head.updates();
            let losses = [3, 4].map(|at| step(&mut head, comm, at));
            (losses, updates, saved)
        });
        let (expected, updates, first) = ranks.remove(0);
        let (_, _, second) = ranks.remove(0);
        let whole: Vec<(String, Tensor)> = first
            .into_iter()
            .zip(second)
            .map(|((name, a), (_, b))| match a.size().is_empty() {
                true => {
                    assert_eq!(a, b, "{name} differs between ranks");
                    (name, a)
                }
                false => (name, Tensor::cat(&[a, b], 0)),
            })
            .collect();
        let whole = Mutex::new(whole);
        for world_size in [1, 2, 4] {
            let resumed = on_ranks(world_size, |comm| {
                let other_start = HeadConfig {
                    seed: 77,
                    ..config.clone()
                };
                let mut head = PlainHead::new(&other_start, comm.rank(), world_size);
                let shard = head.shard();
                let mut rows = |name: &str| {
                    let whole = whole.lock().expect("no rank panicked");
                    let (_, all) = whole.iter().find(|(n, _)| n == name)?;
                    Some(match all.size().is_empty() {
                        true => all.copy(),
                        false => all.narrow(0, shard.lo.into(), shard.len().into()).copy(),
                    })
                };
                head.load_state(updates, &mut rows).expect("its state");
                [3, 4].map(|at| step(&mut head, comm, at))
            });
            for (a, b) in resumed[0].iter().zip(expected) {
                assert!((a - b).abs() < 1e-5 * b, "{loss:?} at {world_size}: {a} and {b}");
            }
        }
    }
}

/// A step that is skipped leaves the statistics as they were.
#[test]
fn a_skipped_step_leaves_no_trace() {
    for loss in losses() {
        let config = with_loss(loss);
        let mut comm = TcpCollective::alone();
        let labels = Tensor::from_slice(&LABELS);
        let mut go = |head: &mut PlainHead, first: i64| {
            let embedding = rows_of_faces(&config, first, 8);
            let out = head.forward_backward(&mut comm, &embedding, &labels, &[8], 0, 1.0);
            out.expect("a good batch").loss
        };
        let mut disturbed = PlainHead::new(&config, 0, 1);
        go(&mut disturbed, 40);
        disturbed.discard();
        let mut undisturbed = PlainHead::new(&config, 0, 1);
        assert_eq!(go(&mut disturbed, 0), go(&mut undisturbed, 0), "{loss:?}");
    }
}

//! One update against its restatement in f64: accumulation, mean over ranks, loss scale, clipping, rule, and what of it
//! reaches the head.

use super::*;
use crate::collective::{CollectiveError, ReduceOp};
use crate::optim::GradScaler;
use std::sync::{Arc, Mutex};
use tch::Kind;

/// Elements of a gradient sum at least; the head's messages are shorter.
const GRADIENT: usize = 10_000;

/// What is done to this rank's own gradient before it is summed.
type Before = Box<dyn FnMut(&mut Tensor) -> Result<(), CollectiveError> + Send>;

/// A communicator that shows, and lets change or fail, gradient sums: `before(tensor)` is this rank's own, `after(tensor)`
/// the sum.
pub(super) struct Tapped {
    pub inner: TcpCollective,
    pub before: Before,
    pub after: Box<dyn FnMut(&Tensor) + Send>,
}

impl Collective for Tapped {
    fn rank(&self) -> u32 {
        self.inner.rank()
    }

    fn world_size(&self) -> u32 {
        self.inner.world_size()
    }

    fn all_reduce(&mut self, tensor: &mut Tensor, op: ReduceOp) -> Result<(), CollectiveError> {
        let is_gradient = tensor.kind() != Kind::Int64 && tensor.numel() > GRADIENT;
        if is_gradient {
            (self.before)(tensor)?;
        }
        self.inner.all_reduce(tensor, op)?;
        if is_gradient {
            (self.after)(tensor);
        }
        Ok(())
    }

    fn all_gather(&mut self, local: &Tensor) -> Result<Tensor, CollectiveError> {
        self.inner.all_gather(local)
    }

    fn reduce_scatter(&mut self, full: &Tensor) -> Result<Tensor, CollectiveError> {
        self.inner.reduce_scatter(full)
    }

    fn broadcast(&mut self, tensor: &mut Tensor, root: u32) -> Result<(), CollectiveError> {
        self.inner.broadcast(tensor, root)
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.inner.barrier()
    }
}

/// Takes the steps one after the other; gives their outcomes.
pub(super) fn steps(
    trainer: &mut Trainer,
    job: &Job,
    range: std::ops::Range<u64>,
) -> Vec<crate::rank::step::StepOutcome> {
    let mut loader = loader(trainer, job, range.clone());
    range
        .map(|step| trainer.step(step, &mut loader, Says::default()).expect("a step"))
        .collect()
}

fn difference(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
    (&a - &b).norm().double_value(&[]) / b.norm().double_value(&[]).max(1e-30)
}

/// The gradients of the first update, of backbone and head: what plain SGD's momentum buffers hold after it.
fn gradients(trainer: &mut Trainer) -> Vec<(String, Tensor)> {
    let state = state(trainer).into_iter();
    state
        .filter(|(name, _)| name.contains("momentum_buffer"))
        .map(|(name, tensor)| (name, tensor.to_kind(Kind::Double)))
        .collect()
}

/// A job of 2 samples a step whose buffers are the gradients.
fn small_steps(change: impl FnOnce(&mut v1::TrainSection)) -> JobSpec {
    job(1, |wire| {
        let train = wire.train.get_or_insert_default();
        train.batch_size = Some(2);
        train.clip_grad_norm = Some(0.0);
        train.weight_decay = Some(0.0);
        change(train);
        wire.data.get_or_insert_default().augment = Some("none".into());
    })
}

#[test]
fn accumulated_gradients_are_the_mean_or_the_sum_of_the_steps() {
    // The gradient of every step alone, at the initial weights.
    let single: Vec<Vec<(String, Tensor)>> = (0..4)
        .map(|step| {
            let spec = small_steps(|_| {});
            on_ranks(&spec, 1, |_, trainer, job| {
                steps(trainer, job, step..step + 1);
                gradients(trainer)
            })
            .swap_remove(0)
        })
        .collect();
    for implementation in ["plain", "tiled"] {
        for (accumulation, divisor) in [("mean", 4.0), ("sum", 1.0)] {
            let mut spec = small_steps(|train| {
                train.gradient_acc = Some(4);
                train.accumulation = Some(accumulation.into());
            });
            if implementation == "plain" {
                spec.head.implementation = arcface_proto::spec::HeadImplementation::Plain;
            }
            let (accumulated, norm) = on_ranks(&spec, 1, |_, trainer, job| {
                let outcomes = steps(trainer, job, 0..4);
                assert!(outcomes[..3].iter().all(|outcome| outcome.grad_norm.is_none()));
                (gradients(trainer), outcomes[3].grad_norm.expect("an update"))
            })
            .swap_remove(0);
            let mut squares = 0.0;
            for (index, (name, found)) in accumulated.iter().enumerate() {
                let sum = single[1..]
                    .iter()
                    .fold(single[0][index].1.copy(), |sum, step| sum + &step[index].1);
                let expected = sum / divisor;
                let off = difference(found, &expected);
                assert!(off < 2e-5, "{implementation}, {accumulation}: {name}: {off}");
                if name.starts_with("optimizer.") {
                    squares += expected.square().sum(Kind::Double).double_value(&[]);
                }
            }
            assert!(
                (norm / squares.sqrt() - 1.0).abs() < 1e-5,
                "{accumulation}: {norm}"
            );
            assert!(
                accumulated.iter().any(|(name, _)| name == "momentum_buffer"),
                "the head's"
            );
        }
    }
}

/// The optimizers in f64, on flat lists.
enum Restated {
    Sgd { v: Vec<f64> },
    AdamW { m: Vec<f64>, v: Vec<f64>, t: i32 },
}

impl Restated {
    fn step(&mut self, w: &mut [f64], g: &[f64], lr: f64, weight_decay: f64) {
        match self {
            Self::Sgd { v } => {
                for ((w, g), v) in w.iter_mut().zip(g).zip(v) {
                    *v = 0.9 * *v + g + weight_decay * *w;
                    *w -= lr * *v;
                }
            }
            Self::AdamW { m, v, t } => {
                *t += 1;
                for (((w, g), m), v) in w.iter_mut().zip(g).zip(m).zip(v) {
                    *m = 0.9 * *m + 0.1 * g;
                    *v = 0.999 * *v + 0.001 * g * g;
                    let (mean, square) = (*m / (1.0 - 0.9f64.powi(*t)), *v / (1.0 - 0.999f64.powi(*t)));
                    *w = *w * (1.0 - lr * weight_decay) - lr * mean / (square.sqrt() + 1e-8);
                }
            }
        }
    }
}

fn flat(tensors: &[Tensor]) -> Vec<f64> {
    let parts: Vec<Tensor> = tensors
        .iter()
        .map(|tensor| tensor.detach().reshape([-1]))
        .collect();
    Vec::try_from(Tensor::cat(&parts, 0).to_kind(Kind::Double)).expect("a list")
}

/// Sum over ranks, mean, loss scale, clipping, weight decay on every parameter, rule and schedule: five updates of the
/// backbone from the gradients that went through the communicator.
#[test]
fn the_backbone_is_updated_as_restated_in_f64() {
    for (optimizer, precision, weight_decay, tolerance) in [
        ("sgd", "fp32", 0.05, 1e-6),
        ("sgd", "fp16", 0.05, 1e-6),
        // The root of the squared gradient makes a whole step of a gradient's rounding where it is nearly 0.
        ("adamw", "fp32", 0.5, 1e-5),
        ("adamw", "fp16", 0.5, 1e-5),
    ] {
        let spec = job(2, |wire| {
            let train = wire.train.get_or_insert_default();
            train.optimizer = Some(optimizer.into());
            train.precision = Some(precision.into());
            train.weight_decay = Some(weight_decay);
            train.clip_grad_norm = Some(0.5);
            wire.model.get_or_insert_default().freeze_batch_norm = Some(false);
        });
        let sums: Arc<Mutex<Vec<Vec<f64>>>> = Arc::default();
        let wrap = |inner: TcpCollective| -> Box<dyn Collective> {
            let (sums, rank) = (sums.clone(), inner.rank());
            Box::new(Tapped {
                inner,
                before: Box::new(|_| Ok(())),
                after: Box::new(move |sum| {
                    if rank == 0 {
                        sums.lock().expect("whole").push(flat(&[sum.shallow_clone()]));
                    }
                }),
            })
        };
        let (before, after, norms) = on_ranks_with(&spec, 2, wrap, |_, trainer, job| {
            // A scale that no gradient here overflows at.
            trainer.scaler = trainer
                .scaler
                .map(|_| GradScaler::resumed(64.0, 0).expect("a scale"));
            let before = flat(&trainer.params);
            let outcomes = steps(trainer, job, 0..5);
            let norms: Vec<f64> = outcomes.iter().filter_map(|outcome| outcome.grad_norm).collect();
            assert_eq!(trainer.params.len(), trainer.backbone.trainable().len());
            (before, flat(&trainer.params), norms)
        })
        .swap_remove(0);
        let sums = sums.lock().expect("whole");
        assert_eq!((sums.len(), norms.len()), (5, 5), "{optimizer} {precision}");

        let divisor = 2.0 * if precision == "fp16" { 64.0 } else { 1.0 };
        let zeros = || vec![0.0; before.len()];
        let mut rule = match optimizer {
            "sgd" => Restated::Sgd { v: zeros() },
            _ => Restated::AdamW {
                m: zeros(),
                v: zeros(),
                t: 0,
            },
        };
        let mut expected = before.clone();
        let schedule = crate::optim::schedule::PolyWarmup::new(0.02, 0, 5);
        let mut clipped = 0;
        for (step, (sum, norm)) in sums.iter().zip(&norms).enumerate() {
            let mut g: Vec<f64> = sum[..before.len()].iter().map(|sum| sum / divisor).collect();
            let restated: f64 = g.iter().map(|g| g * g).sum::<f64>().sqrt();
            assert!(
                (norm / restated - 1.0).abs() < 1e-5,
                "{optimizer}: {norm} and {restated}"
            );
            let factor = (0.5 / (restated + 1e-6)).min(1.0);
            clipped += usize::from(factor < 1.0);
            g.iter_mut().for_each(|g| *g *= factor);
            rule.step(&mut expected, &g, schedule.lr(step as u64), weight_decay);
        }
        assert!(clipped > 0, "{optimizer} {precision}: clipping was not tried");
        let moved = difference(&Tensor::from_slice(&before), &Tensor::from_slice(&after));
        let off = difference(&Tensor::from_slice(&after), &Tensor::from_slice(&expected));
        println!("{optimizer} {precision}: moved {moved:.1e}, off {off:.1e}, clipped {clipped} of 5");
        assert!(
            off < tolerance && moved > 100.0 * tolerance,
            "{optimizer}: {off} of {moved}"
        );
    }
}

/// What two ranks send each other for the first update, and its gradient.
fn exchanged(compression: &str) -> (Vec<Kind>, Tensor) {
    let spec = job(2, |wire| {
        let train = wire.train.get_or_insert_default();
        train.gradient_compression = Some(compression.into());
        train.clip_grad_norm = Some(0.0);
        train.weight_decay = Some(0.0);
    });
    let kinds: Arc<Mutex<Vec<Kind>>> = Arc::default();
    let wrap = |inner: TcpCollective| -> Box<dyn Collective> {
        let kinds = kinds.clone();
        Box::new(Tapped {
            inner,
            before: Box::new(move |gradient| {
                kinds.lock().expect("whole").push(gradient.kind());
                Ok(())
            }),
            after: Box::new(|_| {}),
        })
    };
    let by_rank = on_ranks_with(&spec, 2, wrap, |rank, trainer, job| {
        steps(trainer, job, 0..1);
        // The backbone's state is rank 0's to save.
        let of_all = gradients(trainer).into_iter();
        let own: Vec<Tensor> = of_all
            .filter(|(name, _)| name.starts_with("optimizer."))
            .map(|(_, grad)| grad.reshape([-1]))
            .collect();
        let gradient = (rank == 0).then(|| Tensor::cat(&own, 0));
        (gradient, flat(&trainer.params))
    });
    assert_eq!(
        by_rank[0].1, by_rank[1].1,
        "{compression}: ranks must not drift apart"
    );
    let kinds = kinds.lock().expect("whole").clone();
    (kinds, by_rank[0].0.as_ref().expect("of rank 0").shallow_clone())
}

#[test]
fn gradients_may_travel_in_half_the_bytes() {
    let (kinds, exact) = exchanged("none");
    assert!(
        !kinds.is_empty() && kinds.iter().all(|kind| *kind == Kind::Float),
        "{kinds:?}"
    );
    for (compression, kind, least, most) in [
        ("bf16", Kind::BFloat16, 1e-4, 5e-3),
        ("fp16", Kind::Half, 1e-5, 6e-4),
    ] {
        let (kinds, rounded) = exchanged(compression);
        assert!(
            !kinds.is_empty() && kinds.iter().all(|sent| *sent == kind),
            "{kinds:?}"
        );
        let off = difference(&rounded, &exact);
        assert!((least..most).contains(&off), "{compression}: {off}");
    }
}

#[test]
fn clipping_covers_the_backbone_alone() {
    let after_one = |clip: f64| {
        let spec = job(1, |wire| {
            wire.train.get_or_insert_default().clip_grad_norm = Some(clip)
        });
        on_ranks(&spec, 1, |_, trainer, job| {
            steps(trainer, job, 0..1);
            (flat(&trainer.params), trainer.head.state())
        })
        .swap_remove(0)
    };
    let ((free, free_head), (clipped, clipped_head)) = (after_one(0.0), after_one(1e-3));
    assert_ne!(free, clipped);
    for ((name, a), (_, b)) in free_head.iter().zip(&clipped_head) {
        assert!(a.equal(b), "{name}");
    }
}

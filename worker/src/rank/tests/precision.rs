//! Training in bf16 and fp16: master weights, the loss scale, what a restart keeps.

use super::updates::{Tapped, steps};
use super::*;
use crate::optim::GradScaler;
use std::sync::atomic::{AtomicU32, Ordering};
use tch::Kind;

fn in_precision(world_size: u32, precision: &str, change: impl FnOnce(&mut v1::JobSpec)) -> JobSpec {
    job(world_size, |wire| {
        wire.train.get_or_insert_default().precision = Some(precision.into());
        wire.model.get_or_insert_default().freeze_batch_norm = Some(false);
        change(wire);
    })
}

/// Loss of every step of an epoch.
fn curve(precision: &str) -> Vec<f64> {
    let spec = in_precision(1, precision, |_| {});
    on_ranks(&spec, 1, |_, trainer, job| {
        // From a scale at which no gradient of this job overflows: a step that is skipped would be another curve.
        trainer.scaler = trainer.scaler.and_then(|_| GradScaler::resumed(256.0, 0));
        let outcomes = steps(trainer, job, 0..5);
        assert!(
            outcomes.iter().all(|outcome| outcome.grad_norm.is_some()),
            "{outcomes:?}"
        );
        outcomes.iter().filter_map(|outcome| outcome.loss).collect()
    })
    .swap_remove(0)
}

/// How far the losses of five steps are from those in fp32, relatively. Batch norm over 8 images multiplies a difference with
/// every step: later steps say nothing.
fn off_from_fp32(precision: &str) -> Vec<f64> {
    let (exact, reduced) = (curve("fp32"), curve(precision));
    assert_eq!((exact.len(), reduced.len()), (5, 5));
    assert_ne!(exact, reduced, "another arithmetic");
    let off = exact
        .iter()
        .zip(&reduced)
        .map(|(a, b)| (a - b).abs() / a)
        .collect();
    println!("{precision} is off by {off:?}");
    off
}

/// Where it was measured: 1.3e-3 in the first step, 2.9e-2 in the fifth.
#[test]
fn bf16_follows_fp32() {
    let off = off_from_fp32("bf16");
    assert!(off[0] < 5e-3 && off.iter().all(|off| *off < 0.06), "{off:?}");
}

/// On the CPU, whose fp16 convolutions also round partial sums.
#[test]
fn fp16_follows_fp32() {
    let off = off_from_fp32("fp16");
    assert!(off[0] < 2e-3 && off.iter().all(|off| *off < 0.015), "{off:?}");
}

/// A step far below bf16's resolution of the weights (2^-9 of them) still counts: the parameters are f32 and only cast for
/// each pass. Were they rounded to bf16 after every update, they would stay where they were.
#[test]
fn updates_below_the_resolution_of_bf16_add_up() {
    let spec = in_precision(1, "bf16", |wire| {
        let train = wire.train.get_or_insert_default();
        (train.lr, train.weight_decay) = (Some(1e-6), Some(0.0));
        (train.clip_grad_norm, train.momentum) = (Some(1.0), Some(0.0));
    });
    on_ranks(&spec, 1, |_, trainer, job| {
        let copies =
            |params: &[Tensor]| -> Vec<Tensor> { params.iter().map(|p| p.detach().copy()).collect() };
        let rounded = |params: &[Tensor]| -> Vec<Tensor> {
            params
                .iter()
                .map(|p| p.detach().to_kind(Kind::BFloat16))
                .collect()
        };
        let before = copies(&trainer.params);
        steps(trainer, job, 0..5);
        let (mut moved, mut moved_in_bf16, mut elements) = (0, 0, 0);
        for (before, after) in before.iter().zip(&copies(&trainer.params)) {
            assert_eq!(after.kind(), Kind::Float);
            moved += after.ne_tensor(before).sum(Kind::Int64).int64_value(&[]);
            elements += before.numel() as i64;
        }
        for (before, after) in rounded(&before).iter().zip(&rounded(&trainer.params)) {
            moved_in_bf16 += after.ne_tensor(before).sum(Kind::Int64).int64_value(&[]);
        }
        println!("of {elements} weights {moved} moved, {moved_in_bf16} in bf16");
        assert!(moved > elements / 4 && moved_in_bf16 < elements / 100);
        // What a checkpoint keeps is the f32 of it.
        for (name, tensor) in state(trainer) {
            let counts = tensor.kind() == Kind::Int64;
            assert!(
                counts || tensor.kind() == Kind::Float,
                "{name}: {:?}",
                tensor.kind()
            );
        }
    });
}

#[test]
fn an_overflow_of_one_rank_skips_the_backbone_on_all() {
    let spec = in_precision(3, "fp16", |_| {});
    // Rank 1's gradient is infinite in the first update.
    let wrap = |inner: TcpCollective| -> Box<dyn Collective> {
        let breaks = inner.rank() == 1;
        let calls = AtomicU32::new(0);
        Box::new(Tapped {
            inner,
            before: Box::new(move |own| {
                if breaks && calls.fetch_add(1, Ordering::Relaxed) == 0 {
                    let _ = own.narrow(0, 5, 1).fill_(f64::INFINITY);
                }
                Ok(())
            }),
            after: Box::new(|_| {}),
        })
    };
    let ranks = on_ranks_with(&spec, 3, wrap, |_, trainer, job| {
        trainer.scaler = GradScaler::resumed(64.0, 7);
        let before = (
            state(trainer),
            trainer.params.iter().map(Tensor::copy).collect::<Vec<_>>(),
        );
        let first = steps(trainer, job, 0..1)[0];
        assert!(first.loss.is_some_and(f64::is_finite), "{first:?}");
        assert_eq!(first.grad_norm, None, "the backbone was not updated");
        for (before, after) in before.1.iter().zip(&trainer.params) {
            assert!(before.equal(after), "the backbone moved");
        }
        for (name, before) in before.0.iter().filter(|(name, _)| name.starts_with("optimizer.")) {
            let after = state(trainer)
                .into_iter()
                .find(|(other, _)| other == name)
                .expect("as before");
            assert!(before.equal(&after.1), "{name} moved");
        }
        assert_eq!(
            (trainer.optimizer.steps(), trainer.head.updates()),
            (0, 1),
            "the head goes on"
        );
        assert_eq!(trainer.guard.skipped_steps(), Some(1));
        let halved = trainer.scaler;
        let second = steps(trainer, job, 1..2)[0];
        assert!(second.grad_norm.is_some(), "{second:?}");
        assert_eq!((trainer.optimizer.steps(), trainer.head.updates()), (1, 2));
        (halved, trainer.scaler)
    });
    let expected = (GradScaler::resumed(32.0, 0), GradScaler::resumed(32.0, 1));
    assert_eq!(ranks, [expected; 3]);
}

/// From a scale that gradients overflow at for some steps, so that it moves; the checkpoint lies in the middle of that.
#[test]
fn the_loss_scale_survives_a_restart() {
    let spec = in_precision(2, "fp16", |wire| {
        wire.train.get_or_insert_default().num_epoch = Some(2);
    });
    let scratch = tempfile::tempdir().unwrap();
    let too_large = || GradScaler::resumed(2f64.powi(60), 0);
    let to = |trainer: &mut Trainer, job: &Job, end: u64| {
        trainer.scaler = too_large();
        let outcomes = steps(trainer, job, 0..end);
        outcomes
            .iter()
            .filter(|outcome| outcome.grad_norm.is_none())
            .count()
    };
    let snapshots = on_ranks(&spec, 2, |_, trainer, job| {
        assert_eq!(to(trainer, job, 3), 3, "the scale is too large for all of them");
        let position = crate::rank::train::position(trainer, job, 3);
        checkpoints::snapshot(trainer, position, job.num_classes)
    });
    let manifest = write_checkpoint(&scratch.path().join("c"), snapshots);
    assert_eq!(manifest.scaler.map(|scaler| scaler.scale), Some(2f64.powi(57)));
    let resumed = on_ranks(&spec, 2, |_, trainer, job| {
        let checkpoint = Checkpoint::open(&scratch.path().join("c"), manifest.clone()).expect("whole");
        checkpoints::restore(trainer, &checkpoint, false).expect("restored");
        steps(trainer, job, 3..6);
        (trainer.scaler, state(trainer))
    });
    let uninterrupted = on_ranks(&spec, 2, |_, trainer, job| {
        to(trainer, job, 6);
        (trainer.scaler, state(trainer))
    });
    for ((scaler, state), (other_scaler, other_state)) in resumed.iter().zip(&uninterrupted) {
        assert_eq!(scaler, other_scaler);
        assert_eq!(state.len(), other_state.len());
        for ((name, a), (_, b)) in state.iter().zip(other_state) {
            assert!(a.equal(b), "{name} differs");
        }
    }

    // A checkpoint of another precision has none.
    let without = CheckpointManifest {
        scaler: None,
        ..manifest
    };
    on_ranks(&spec, 1, |_, trainer, _| {
        let checkpoint = Checkpoint::open(&scratch.path().join("c"), without.clone()).expect("whole");
        let refused = checkpoints::restore(trainer, &checkpoint, false).expect_err("no loss scale");
        assert!(refused.message.contains("loss scale"), "{refused}");
    });
}

//! Losses and gradients that are not finite: who notices, what is left out, and what follows.

use super::updates::{Tapped, steps};
use super::*;
use crate::data::{Batch, DataError};
use crate::rank::failure::RankFailure;
use crate::rank::step::StepOutcome;

/// Batches of steps in which an image of rank `rank` is not a number at the steps `bad`.
struct Broken {
    loader: Loader,
    breaks: bool,
    bad: Vec<u64>,
}

impl Iterator for Broken {
    type Item = Result<Batch, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        let batch = self.loader.next()?;
        if let Ok(batch) = &batch
            && self.breaks
            && self.bad.contains(&batch.micro.step)
        {
            let _ = batch.images.get(1).fill_(f64::NAN);
        }
        Some(batch)
    }
}

/// Takes steps with the second image of rank 1's first micro-batch broken at the steps `bad`.
fn broken_steps(
    trainer: &mut Trainer,
    job: &Job,
    range: std::ops::Range<u64>,
    bad: &[u64],
) -> Vec<Result<StepOutcome, RankFailure>> {
    let mut batches = Broken {
        loader: loader(trainer, job, range.clone()),
        breaks: trainer.comm.rank() + 1 == trainer.comm.world_size(),
        bad: bad.to_vec(),
    };
    let mut outcomes = Vec::new();
    for step in range {
        let outcome = trainer.step(step, &mut batches, Says::default());
        let failed = outcome.is_err();
        outcomes.push(outcome);
        if failed {
            break;
        }
    }
    outcomes
}

fn with_policy(policy: &str, precision: &str, change: impl FnOnce(&mut v1::JobSpec)) -> JobSpec {
    job(2, |wire| {
        let train = wire.train.get_or_insert_default();
        train.on_nonfinite = Some(policy.into());
        train.precision = Some(precision.into());
        train.num_epoch = Some(4);
        wire.model.get_or_insert_default().freeze_batch_norm = Some(false);
        change(wire);
    })
}

fn same(a: &[(String, Tensor)], b: &[(String, Tensor)]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.0 == b.0 && a.1.equal(&b.1))
}

#[test]
fn the_job_stops_and_every_rank_names_the_step_and_the_sample() {
    for precision in ["fp32", "bf16"] {
        for implementation in ["plain", "tiled"] {
            let spec = with_policy("stop", precision, |wire| {
                wire.head.get_or_insert_default().implementation = Some(implementation.into());
                // With statistics of the batch, a broken image breaks all images of its rank.
                wire.model.get_or_insert_default().freeze_batch_norm = Some(true);
            });
            let ranks = on_ranks(&spec, 2, |_, trainer, job| {
                let last = broken_steps(trainer, job, 0..4, &[2]).pop().expect("steps");
                let failure = last.expect_err("a loss that is not finite");
                // Rank 1's second row: position 5 of the step's 8.
                let name = job.dataset.name(job.epochs.position(0, 2 * 8 + 5));
                (failure, name)
            });
            for (failure, name) in &ranks {
                assert_eq!(
                    failure.message,
                    format!("step 2: the loss is NaN for {name} (rank 1)"),
                    "{precision} {implementation}"
                );
                assert!(failure.permanent && !failure.hint.is_empty(), "{failure:?}");
                assert_eq!(failure.message, ranks[0].0.message, "the ranks agree");
            }
        }
    }
}

#[test]
fn a_skipped_step_changes_nothing() {
    // In fp16 whatever the policy, in other precisions if that is the policy.
    let every_loss: &[&str] = &["arcface", "adaface", "curricularface", "magface", "subcenter"];
    for (precision, policy, losses) in [
        ("fp32", "skip", every_loss),
        ("bf16", "skip", &["adaface"]),
        ("fp16", "stop", &["adaface"]),
    ] {
        for &loss in losses {
            let spec = with_policy(policy, precision, |wire| {
                let head = wire.head.get_or_insert_default();
                head.loss = Some(loss.into());
                head.sample_rate = Some(0.5);
            });
            on_ranks(&spec, 2, |_, trainer, job| {
                trainer.scaler = trainer
                    .scaler
                    .and_then(|_| crate::optim::GradScaler::resumed(32.0, 3));
                let first = broken_steps(trainer, job, 0..1, &[]);
                assert!(
                    first[0].as_ref().is_ok_and(|outcome| outcome.grad_norm.is_some()),
                    "{loss}"
                );
                let (before, scaler) = (state(trainer), trainer.scaler);
                let skipped = broken_steps(trainer, job, 1..2, &[1])
                    .pop()
                    .expect("a step")
                    .expect("it passes");
                assert_eq!((skipped.loss, skipped.grad_norm), (None, None));
                assert!(
                    same(&before, &state(trainer)),
                    "{precision} {loss}: the state changed"
                );
                assert_eq!(trainer.scaler, scaler, "the scale has nothing to do with it");
                assert_eq!(trainer.guard.skipped_steps(), Some(1));
                let next = broken_steps(trainer, job, 2..3, &[])
                    .pop()
                    .expect("a step")
                    .expect("it trains");
                assert!(
                    next.loss.is_some_and(f64::is_finite) && next.grad_norm.is_some(),
                    "{next:?}"
                );
            });
        }
    }
}

#[test]
fn too_many_skips_in_a_row_stop_the_job() {
    let spec = with_policy("skip", "fp32", |_| {});
    let all: Vec<u64> = (3..20).collect();
    let ranks = on_ranks(&spec, 2, |_, trainer, job| {
        let outcomes = broken_steps(trainer, job, 0..20, &all);
        assert_eq!(outcomes.len(), 3 + 10 + 1);
        outcomes
            .into_iter()
            .next_back()
            .expect("steps")
            .expect_err("the eleventh")
    });
    for failure in &ranks {
        assert!(
            failure.permanent
                && failure
                    .message
                    .contains("10 updates in a row before it were left out"),
            "{failure:?}"
        );
        assert_eq!(failure.message, ranks[0].message);
    }
}

#[test]
fn a_rollback_asks_for_a_generation_without_the_step() {
    let spec = with_policy("rollback", "fp32", |_| {});
    let skips = with_policy("skip", "fp32", |_| {});
    on_ranks(&spec, 2, |_, trainer, job| {
        let failure = broken_steps(trainer, job, 0..4, &[2])
            .pop()
            .expect("steps")
            .expect_err("it ends");
        assert_eq!(
            (failure.permanent, failure.rollback_step),
            (false, Some(2)),
            "{failure:?}"
        );
        assert_eq!(failure.to_wire().rollback_step, Some(2));
    });
    // The next generation passes over the step, to where a job is that skips.
    let passed = on_ranks(&spec, 2, |_, trainer, job| {
        trainer.settings.left_out = vec![2];
        let outcomes = broken_steps(trainer, job, 0..5, &[2]);
        assert!(outcomes.iter().all(Result::is_ok));
        state(trainer)
    });
    let skipped = on_ranks(&skips, 2, |_, trainer, job| {
        broken_steps(trainer, job, 0..5, &[2]);
        state(trainer)
    });
    assert!(passed.iter().zip(&skipped).all(|(a, b)| same(a, b)));
    // Three times is enough.
    on_ranks(&spec, 2, |_, trainer, job| {
        trainer.settings.left_out = vec![0, 1, 2];
        let failure = broken_steps(trainer, job, 0..5, &[3])
            .pop()
            .expect("steps")
            .expect_err("it ends");
        assert!(
            failure.permanent && failure.rollback_step.is_none(),
            "{failure:?}"
        );
        assert!(
            failure
                .message
                .ends_with("; the job was rolled back 3 times before"),
            "{failure}"
        );
    });
}

#[test]
fn a_window_of_accumulated_steps_is_left_out_as_a_whole() {
    let spec = with_policy("skip", "fp32", |wire| {
        wire.train.get_or_insert_default().gradient_acc = Some(3);
    });
    on_ranks(&spec, 2, |_, trainer, job| {
        broken_steps(trainer, job, 0..3, &[]);
        let before = state(trainer);
        let outcomes: Vec<StepOutcome> = broken_steps(trainer, job, 3..6, &[4])
            .into_iter()
            .map(|outcome| outcome.expect("it passes"))
            .collect();
        let losses: Vec<bool> = outcomes.iter().map(|outcome| outcome.loss.is_some()).collect();
        assert_eq!(losses, [true, false, false]);
        assert!(same(&before, &state(trainer)));
        assert_eq!(trainer.guard.skipped_steps(), Some(2));
        let next = broken_steps(trainer, job, 6..9, &[])
            .pop()
            .expect("steps")
            .expect("it trains");
        assert!(next.grad_norm.is_some());
    });
}

/// The loss is finite, but the gradient of the last rank is not.
#[test]
fn a_gradient_that_is_not_finite_follows_the_policy() {
    let wrap = |inner: TcpCollective| -> Box<dyn Collective> {
        let mut breaks = inner.rank() == 1;
        Box::new(Tapped {
            inner,
            before: Box::new(move |own| {
                if std::mem::take(&mut breaks) {
                    let _ = own.narrow(0, 0, 1).fill_(f64::NAN);
                }
                Ok(())
            }),
            after: Box::new(|_| {}),
        })
    };
    // The scale of 1 is not to blame in fp16 either.
    for precision in ["fp32", "fp16"] {
        let failures = on_ranks_with(
            &with_policy("stop", precision, |_| {}),
            2,
            wrap,
            |_, trainer, job| {
                trainer.scaler = trainer
                    .scaler
                    .and_then(|_| crate::optim::GradScaler::resumed(1.0, 0));
                let failure = broken_steps(trainer, job, 0..1, &[]).pop().expect("a step");
                let (name, _) = trainer.backbone.trainable()[0];
                let expected = format!("step 0: the norm of the gradient is NaN, first of {name}");
                (failure.expect_err("it ends"), expected)
            },
        );
        for (failure, expected) in failures {
            assert!(failure.permanent, "{failure:?}");
            assert_eq!(failure.message, expected, "{precision}");
        }
        on_ranks_with(
            &with_policy("skip", precision, |_| {}),
            2,
            wrap,
            |_, trainer, job| {
                trainer.scaler = trainer
                    .scaler
                    .and_then(|_| crate::optim::GradScaler::resumed(1.0, 0));
                let before = state(trainer);
                let outcome = steps(trainer, job, 0..1)[0];
                assert!(
                    outcome.loss.is_some() && outcome.grad_norm.is_none(),
                    "{outcome:?}"
                );
                assert!(same(&before, &state(trainer)), "{precision}: the state changed");
                assert!(steps(trainer, job, 1..2)[0].grad_norm.is_some());
            },
        );
    }
}

#[test]
fn the_log_tells_of_skipped_steps() {
    let scratch = tempfile::tempdir().unwrap();
    let spec = with_policy("skip", "fp32", |wire| {
        wire.train.get_or_insert_default().max_steps = Some(3);
    });
    let told = on_ranks(&spec, 2, |rank, trainer, job| {
        // The weights are broken once for all: the loop tells of three steps without a loss.
        for param in &trainer.params {
            let _ = tch::no_grad(|| param.shallow_clone().fill_(f64::NAN));
        }
        let mut recorder = Recorder::default();
        let log = (rank == 0).then(|| crate::rank::log::TrainingLog::open(scratch.path()).expect("a log"));
        let mut sinks = Sinks {
            output: scratch.path().to_owned(),
            log,
            writer: None,
            copier: None,
            flops_per_sample: None,
            outside: &mut recorder,
        };
        train(trainer, job, 0, &mut sinks).expect("skips pass");
        recorder.metrics
    });
    let skipped: Vec<Option<u64>> = told[0].iter().map(|metrics| metrics.skipped_steps).collect();
    assert_eq!(skipped, [Some(1), Some(2), Some(3)]);
    assert!(told[0].iter().all(|metrics| metrics.loss.is_nan()
        && metrics.loss_scale.is_none()
        && metrics.embedding_norm.is_none()));
}

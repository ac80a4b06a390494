//! Every loss through the whole of a job: it learns, and a checkpoint carries all of its state.

use super::*;

const LOSSES: [&str; 5] = ["arcface", "adaface", "magface", "curricularface", "subcenter"];

/// A scale at which a tiny network on ten classes starts away from the loss's flat ends.
fn job_with(loss: &str, change: impl FnOnce(&mut v1::JobSpec)) -> JobSpec {
    job(2, |wire| {
        let head = wire.head.get_or_insert_default();
        head.loss = Some(loss.into());
        head.scale = Some(16.0);
        change(wire);
    })
}

#[test]
fn the_loss_falls_with_every_loss() {
    let scratch = tempfile::tempdir().unwrap();
    for loss in LOSSES {
        let spec = job_with(loss, |wire| {
            let train = wire.train.get_or_insert_default();
            train.num_epoch = Some(6);
            train.lr = Some(0.05);
            wire.model.get_or_insert_default().freeze_batch_norm = Some(false);
        });
        let curve = on_ranks(&spec, 2, |rank, trainer, job| {
            losses(rank, trainer, job, 0, scratch.path())
        })
        .swap_remove(0);
        let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
        let (first, last) = (mean(&curve[..5]), mean(&curve[curve.len() - 5..]));
        println!("{loss}: {first:.3} falls to {last:.3}");
        assert!(last < 0.9 * first, "{loss}: {curve:?}");
    }
}

#[test]
fn a_resumed_run_with_any_loss_equals_an_uninterrupted_one_bit_for_bit() {
    for loss in LOSSES {
        let spec = job_with(loss, |wire| {
            wire.head.get_or_insert_default().sample_rate = Some(0.6);
        });
        let (resumed, uninterrupted) = resumed_and_uninterrupted(&spec, 3, (2, 2));
        for (a, b) in resumed.iter().flatten().zip(uninterrupted.iter().flatten()) {
            assert_eq!(a.0, b.0);
            assert!(a.1.equal(&b.1), "{loss}: {} differs", a.0);
        }
    }
}

#[test]
fn a_checkpoint_with_any_loss_goes_on_at_another_world_size() {
    for loss in LOSSES {
        let spec = job_with(loss, |_| {});
        let (resumed, uninterrupted) = resumed_and_uninterrupted(&spec, 3, (2, 1));
        let named = |ranks: &WorldState, name: &str| -> Vec<Tensor> {
            let all = ranks.iter().flatten().filter(|(n, _)| n == name);
            all.map(|(_, tensor)| tensor.shallow_clone()).collect()
        };
        let weight = |ranks: &WorldState| Tensor::cat(&named(ranks, "weight"), 0);
        let (a, b) = (weight(&resumed), weight(&uninterrupted));
        let difference = (&a - &b).norm().double_value(&[]) / b.norm().double_value(&[]);
        assert!(difference < 1e-3, "{loss}: weights differ by {difference}");
        for name in ["adaface.mean", "adaface.std", "curricularface.t"] {
            let own = loss == name.split('.').next().unwrap_or_default();
            let (a, b) = (named(&resumed, name), named(&uninterrupted, name));
            assert_eq!((a.len(), b.len()), if own { (1, 2) } else { (0, 0) }, "{loss}");
            for b in b {
                let difference = (&a[0] - &b).abs().double_value(&[]);
                // One rank takes two micro-batches a step: the same share of the statistics, in halves.
                assert!(difference < 1e-3 * b.abs().double_value(&[]).max(0.1), "{name}");
            }
        }
    }
}

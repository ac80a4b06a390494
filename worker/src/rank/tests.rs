//! The training loop as ranks run it, each on a thread with TCP collectives between them, on drawn faces and the
//! `tiny` network.

use super::checkpoints::{self, Writer};
use super::failure::RankFailure;
use super::setup::{Job, Prepared};
use super::step::{Says, Trainer};
use super::train::{Outside, Sinks, train};
use crate::checkpoint::{Checkpoint, write_part};
use crate::collective::{Collective, TcpCollective, local};
use crate::data::{Form, Loader, LoaderOptions};
use crate::device::Placement;
use arcface_proto::convert::job_spec;
use arcface_proto::spec::JobSpec;
use arcface_proto::types::ClassRange;
use arcface_proto::v1::{self, CheckpointManifest, Evaluation, RankPace, StepMetrics};
use std::path::Path;
use std::time::Duration;
use tch::Tensor;

mod checkpointing;
mod elastic;
mod evaluating;
mod fine_tuning;
mod losses;
mod nonfinite;
mod precision;
mod updates;

/// Slowest step here, with room.
const OPERATION: Duration = Duration::from_secs(120);

/// 40 images of 10 identities, 8 a step over `world_size` wanted ranks, batch norm frozen.
fn job(world_size: u32, change: impl FnOnce(&mut v1::JobSpec)) -> JobSpec {
    let mut wire = v1::JobSpec {
        output: Some("out".into()),
        job: Some(v1::JobSection {
            world_size: Some(world_size),
            ..Default::default()
        }),
        model: Some(v1::ModelSection {
            network: Some("tiny".into()),
            embedding_size: Some(16),
            freeze_batch_norm: Some(true),
            ..Default::default()
        }),
        head: Some(v1::HeadSection {
            num_classes: Some(10),
            sample_rate: Some(1.0),
            ..Default::default()
        }),
        data: Some(v1::DataSection {
            rec: Some("synthetic".into()),
            num_image: Some(40),
            num_workers: Some(1),
            ..Default::default()
        }),
        train: Some(v1::TrainSection {
            batch_size: Some(8 / world_size),
            num_epoch: Some(1),
            lr: Some(0.02),
            frequent: Some(1),
            ..Default::default()
        }),
        eval: None,
        checkpoint: None,
    };
    change(&mut wire);
    job_spec(&wire).expect("a valid job")
}

/// Remembers what the loop told.
#[derive(Default)]
struct Recorder {
    metrics: Vec<StepMetrics>,
    paces: Vec<RankPace>,
    evaluations: Vec<Evaluation>,
    /// What an earlier generation found.
    earlier: Vec<Evaluation>,
    wants_checkpoint: bool,
}

impl Outside for Recorder {
    fn metrics(&mut self, metrics: StepMetrics) {
        self.metrics.push(metrics);
    }

    fn pace(&mut self, pace: RankPace) {
        self.paces.push(pace);
    }

    fn evaluation(&mut self, evaluation: Evaluation) {
        self.evaluations.push(evaluation);
    }

    fn evaluations(&mut self) -> Result<Vec<Evaluation>, RankFailure> {
        Ok(self.earlier.clone())
    }

    fn checkpoint_wanted(&mut self) -> bool {
        std::mem::take(&mut self.wants_checkpoint)
    }
}

/// Runs `work` on every rank of a world, gives the results in rank order.
fn on_ranks<T: Send>(
    spec: &JobSpec,
    world_size: u32,
    work: impl Fn(u32, &mut Trainer, &Job) -> T + Sync,
) -> Vec<T> {
    on_ranks_with(spec, world_size, |comm| Box::new(comm), work)
}

/// The same, with something around each rank's communicator.
fn on_ranks_with<T: Send>(
    spec: &JobSpec,
    world_size: u32,
    wrap: impl Fn(TcpCollective) -> Box<dyn Collective> + Sync,
    work: impl Fn(u32, &mut Trainer, &Job) -> T + Sync,
) -> Vec<T> {
    let world = local::world(world_size, OPERATION).expect("a world on loopback");
    std::thread::scope(|scope| {
        let threads: Vec<_> = world
            .into_iter()
            .map(|comm| {
                let (work, wrap) = (&work, &wrap);
                scope.spawn(move || {
                    tch::set_num_threads(1);
                    let comm = wrap(comm);
                    let rank = comm.rank();
                    let prepared = Prepared::open(spec.clone(), &[], Placement::cpu()).expect("prepared");
                    let (mut trainer, mut job) = prepared.into_trainer(comm).expect("a trainer");
                    job.ranks_on_node = world_size;
                    work(rank, &mut trainer, &job)
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("a rank"))
            .collect()
    })
}

/// Trains steps `start..` on this rank and gives the losses (rank 0's; empty elsewhere).
fn losses(rank: u32, trainer: &mut Trainer, job: &Job, start: u64, output: &Path) -> Vec<f64> {
    let mut recorder = Recorder::default();
    let log = (rank == 0).then(|| super::log::TrainingLog::open(output).expect("a log"));
    let mut sinks = Sinks {
        output: output.to_owned(),
        log,
        writer: None::<&Writer>,
        copier: None,
        flops_per_sample: None,
        outside: &mut recorder,
    };
    train(trainer, job, start, &mut sinks).expect("trained");
    recorder.metrics.iter().map(|metrics| metrics.loss).collect()
}

/// This rank's batches of some steps.
fn loader(trainer: &Trainer, job: &Job, steps: std::ops::Range<u64>) -> Loader {
    loader_of(Form::Planes, trainer, job, steps)
}

/// The same in this form.
fn loader_of(form: Form, trainer: &Trainer, job: &Job, steps: std::ops::Range<u64>) -> Loader {
    let (rank, world_size) = (trainer.comm.rank(), trainer.comm.world_size());
    let plan = job
        .epochs
        .plan(rank, world_size, job.spec.train.batch_size, steps);
    let options = LoaderOptions {
        threads: 1,
        augment: job.spec.data.augment,
        seed: job.spec.seed,
        prefetch: 1,
        form,
        cache: None,
    };
    Loader::new(job.dataset.clone(), plan, options)
}

/// What a GPU is given trains as what the CPU is given. Changed looks are rounded to other grey levels in a few places.
#[test]
fn pixels_train_as_planes() {
    let losses = |form, augment: &str| {
        let changed = job(1, |wire| {
            wire.data.get_or_insert_default().augment = Some(augment.into());
        });
        let mut trained = on_ranks(&changed, 1, |_, trainer, job| {
            let mut batches = loader_of(form, trainer, job, 0..3);
            let step = |step| trainer.step(step, &mut batches, Says::default()).expect("a step");
            let losses = (0..3).map(step).map(|outcome| outcome.loss.expect("a loss"));
            losses.collect::<Vec<f64>>()
        });
        trained.swap_remove(0)
    };
    let flipped = losses(Form::Planes, "flip");
    assert_eq!(losses(Form::Pixels, "flip"), flipped);
    let changed = losses(Form::Planes, "dali");
    let far = |a: &[f64], b: &[f64]| {
        a.iter()
            .zip(b)
            .map(|(a, b)| (a / b - 1.0).abs())
            .fold(0.0, f64::max)
    };
    let off = far(&losses(Form::Pixels, "dali"), &changed);
    assert!(off < 1e-4, "{off}");
    assert!(far(&changed, &flipped) > 1e-3, "images look as before");
}

#[test]
fn an_account_names_what_stays_in_memory() {
    let accounts = on_ranks(&job(1, |_| {}), 1, |_, trainer, _| {
        assert_eq!(super::memory::Account::of(trainer), None, "a CPU has none");
        super::memory::Account::at("here".to_owned(), trainer).to_string()
    });
    for name in ["here has", " backbone ", " its momentum_buffer ", " head weight "] {
        assert!(accounts[0].contains(name), "{accounts:?}");
    }
}

/// Everything that training changed, in one list.
fn state(trainer: &mut Trainer) -> Vec<(String, Tensor)> {
    let position = crate::checkpoint::TrainState {
        step: 0,
        epoch: 0,
        epoch_samples: 0,
        scaler: None,
        num_image: None,
    };
    checkpoints::snapshot(trainer, position, 10)
        .parts
        .into_iter()
        .flat_map(|(_, tensors)| tensors)
        .collect()
}

#[test]
fn the_loss_curve_is_the_same_on_one_two_and_four_ranks() {
    let scratch = tempfile::tempdir().unwrap();
    let curves: Vec<Vec<f64>> = [1, 2, 4]
        .map(|world_size| {
            let spec = job(world_size, |_| {});
            on_ranks(&spec, world_size, |rank, trainer, job| {
                losses(rank, trainer, job, 0, scratch.path())
            })
            .swap_remove(0)
        })
        .to_vec();
    println!("losses at 1, 2, 4 ranks: {curves:?}");
    assert_eq!(curves[0].len(), 5);
    assert!(curves[0].iter().all(|loss| *loss > 1.0), "{:?}", curves[0]);
    for curve in &curves[1..] {
        for (step, (a, b)) in curves[0].iter().zip(curve).enumerate() {
            assert!((a - b).abs() / a < 1e-4, "step {step}: {a} and {b}");
        }
    }
}

#[test]
fn a_smaller_world_takes_more_micro_batches_and_learns_the_same() {
    let scratch = tempfile::tempdir().unwrap();
    let spec = job(4, |_| {});
    let full = on_ranks(&spec, 4, |rank, t, job| losses(rank, t, job, 0, scratch.path())).swap_remove(0);
    let three = on_ranks(&spec, 3, |rank, t, job| losses(rank, t, job, 0, scratch.path())).swap_remove(0);
    // The loss of a step is the mean over its micro-batches, and each micro-batch is a softmax of its own rows:
    // nothing in it depends on the other rows.
    for (a, b) in full.iter().zip(&three) {
        assert!((a - b).abs() / a < 1e-4, "{full:?} and {three:?}");
    }
}

#[test]
fn gradient_accumulation_equals_one_large_batch() {
    let scratch = tempfile::tempdir().unwrap();
    // Four steps of 2 averaged into one update of 8, against one step of 8: the same weights afterwards, with the
    // learning rate of the step that ends the update.
    let train_with = |batch: u32, acc: u32, steps: u64| {
        let spec = job(1, |wire| {
            let train = wire.train.get_or_insert_default();
            train.batch_size = Some(batch);
            train.gradient_acc = Some(acc);
            train.max_steps = Some(steps);
            train.clip_grad_norm = Some(0.0);
            train.lr = Some(0.01);
            // The schedule is flat at its start only, so it is made long.
            train.num_epoch = Some(1_000_000);
            wire.data.get_or_insert_default().augment = Some("none".into());
        });
        on_ranks(&spec, 1, |rank, trainer, job| {
            losses(rank, trainer, job, 0, scratch.path());
            state(trainer)
        })
        .swap_remove(0)
    };
    let (one, four) = (train_with(8, 1, 1), train_with(2, 4, 4));
    for ((name, a), (_, b)) in one.iter().zip(&four) {
        if a.kind() == tch::Kind::Float {
            let difference = (a - b).norm().double_value(&[]) / a.norm().double_value(&[]).max(1e-6);
            assert!(difference < 1e-3, "{name}: {difference}");
        }
    }
}

/// Writes what all ranks hold as a checkpoint, as the coordinator would commit it.
fn write_checkpoint(dir: &Path, snapshots: Vec<checkpoints::Snapshot>) -> CheckpointManifest {
    let first = &snapshots[0];
    let mut manifest = CheckpointManifest {
        format: 1,
        job_id: "job-0123456789ab".into(),
        generation: 1,
        step: first.state.step,
        epoch: first.state.epoch,
        epoch_samples: first.state.epoch_samples,
        scaler: first.state.scaler,
        world_size: snapshots.len() as u32,
        num_classes: first.num_classes,
        directory: "checkpoints/c".into(),
        ..Default::default()
    };
    for snapshot in snapshots {
        for (kind, tensors) in &snapshot.parts {
            manifest
                .parts
                .push(write_part(dir, *kind, tensors).expect("written"));
        }
    }
    manifest
}

/// The named state of every rank.
type WorldState = Vec<Vec<(String, Tensor)>>;

/// Trains to `stop`, checkpoints, goes on from the checkpoint at another world size; and without interruption, with a
/// checkpoint at the same step.
fn resumed_and_uninterrupted(spec: &JobSpec, stop: u64, worlds: (u32, u32)) -> (WorldState, WorldState) {
    let scratch = tempfile::tempdir().unwrap();
    let mut first_half = spec.clone();
    first_half.train.max_steps = Some(stop);
    let snapshots = on_ranks(&first_half, worlds.0, |rank, trainer, job| {
        losses(rank, trainer, job, 0, scratch.path());
        let position = super::train::position(trainer, job, stop);
        checkpoints::snapshot(trainer, position, job.num_classes)
    });
    let dir = scratch.path().join("c");
    let manifest = write_checkpoint(&dir, snapshots);
    let resumed = on_ranks(spec, worlds.1, |rank, trainer, job| {
        let checkpoint = Checkpoint::open(&dir, manifest.clone()).expect("a checkpoint");
        let state_at = checkpoints::restore(trainer, &checkpoint, false).expect("restored");
        assert_eq!(state_at.step, stop);
        losses(rank, trainer, job, state_at.step, scratch.path());
        state(trainer)
    });
    let uninterrupted = on_ranks(spec, worlds.0, |rank, trainer, job| {
        let half = Job {
            end_step: stop,
            ..job.clone()
        };
        losses(rank, trainer, &half, 0, scratch.path());
        // A checkpoint rounds the rows that it brings up to date.
        checkpoints::snapshot(
            trainer,
            super::train::position(trainer, job, stop),
            job.num_classes,
        );
        losses(rank, trainer, job, stop, scratch.path());
        state(trainer)
    });
    (resumed, uninterrupted)
}

#[test]
fn a_resumed_run_equals_an_uninterrupted_one_bit_for_bit() {
    for optimizer in ["sgd", "adamw"] {
        let spec = job(2, |wire| {
            let train = wire.train.get_or_insert_default();
            train.optimizer = Some(optimizer.into());
            train.num_epoch = Some(2);
            wire.head.get_or_insert_default().sample_rate = Some(0.4);
            wire.model.get_or_insert_default().freeze_batch_norm = Some(false);
            wire.model.get_or_insert_default().dropout = Some(0.2);
        });
        // Of 10 steps, 5 are the first epoch.
        for stop in [5, 7] {
            let (resumed, uninterrupted) = resumed_and_uninterrupted(&spec, stop, (2, 2));
            let mut compared = 0;
            for (a, b) in resumed.iter().flatten().zip(uninterrupted.iter().flatten()) {
                assert_eq!(a.0, b.0);
                assert!(a.1.equal(&b.1), "{optimizer}, step {stop}: {} differs", a.0);
                compared += 1;
            }
            assert!(compared > 50, "{compared} tensors");
        }
    }
}

#[test]
fn a_checkpoint_of_two_ranks_goes_on_at_one_and_three() {
    let spec = job(2, |_| {});
    for world_size in [1, 3] {
        let (resumed, uninterrupted) = resumed_and_uninterrupted(&spec, 3, (2, world_size));
        let backbone = |ranks: &[Vec<(String, Tensor)>]| -> Vec<Tensor> {
            ranks[0]
                .iter()
                .filter(|(name, tensor)| name.starts_with("model.") && tensor.kind() == tch::Kind::Float)
                .map(|(_, tensor)| tensor.shallow_clone())
                .collect()
        };
        for (a, b) in backbone(&resumed).iter().zip(&backbone(&uninterrupted)) {
            let difference = (a - b).norm().double_value(&[]) / b.norm().double_value(&[]).max(1e-6);
            assert!(difference < 1e-3, "{world_size} ranks: {difference}");
        }
        let head = |ranks: &[Vec<(String, Tensor)>]| {
            let shards: Vec<Tensor> = ranks
                .iter()
                .flatten()
                .filter(|(name, _)| name == "weight")
                .map(|(_, tensor)| tensor.shallow_clone())
                .collect();
            Tensor::cat(&shards, 0)
        };
        let (a, b) = (head(&resumed), head(&uninterrupted));
        assert_eq!(a.size(), [10, 16]);
        let difference = (&a - &b).norm().double_value(&[]) / b.norm().double_value(&[]);
        assert!(difference < 1e-3, "head at {world_size} ranks: {difference}");
    }
}

#[test]
fn what_any_rank_says_is_heard_by_all_at_the_same_step() {
    let spec = job(2, |_| {});
    let heard = on_ranks(&spec, 2, |rank, trainer, job| {
        let mut loader = loader(trainer, job, 0..2);
        let mut said = |step, wish, busy| {
            let outcome = trainer.step(
                step,
                &mut loader,
                Says {
                    wish,
                    busy,
                    ..Says::default()
                },
            );
            let said = outcome.expect("a step").said.expect("an update");
            (said.wish, said.busy)
        };
        [said(0, rank == 1, false), said(1, false, rank == 0)]
    });
    assert_eq!(heard, [[(true, false), (false, true)]; 2]);
}

#[test]
fn the_model_file_has_the_names_of_the_network() {
    let scratch = tempfile::tempdir().unwrap();
    let spec = job(1, |wire| wire.train.get_or_insert_default().max_steps = Some(1));
    on_ranks(&spec, 1, |rank, trainer, job| {
        losses(rank, trainer, job, 0, scratch.path());
        let mut other = crate::model::Backbone::new(trainer.backbone.config()).expect("a network");
        crate::export::weights::load_backbone(&scratch.path().join("model.safetensors"), &mut other)
            .expect("its own names");
        for (a, b) in trainer.backbone.state().iter().zip(other.state()) {
            assert!(a.tensor.equal(&b.tensor), "{}", a.name);
        }
    });
}

#[test]
fn a_job_that_cannot_train_says_why_before_it_starts() {
    let fails = |change: fn(&mut v1::JobSpec), words: &str| {
        let failure = Prepared::open(job(1, change), &[], Placement::cpu())
            .err()
            .expect("refused");
        assert!(failure.permanent, "{failure:?}");
        assert!(failure.message.contains(words), "{failure:?}");
        failure
    };
    fails(
        |wire| wire.train.get_or_insert_default().batch_size = Some(41),
        "fewer than one global batch of 41",
    );
    fails(
        |wire| wire.data.get_or_insert_default().rec = Some("/no/such/set".into()),
        "/no/such/set",
    );
    fails(
        |wire| {
            wire.eval = Some(v1::EvalSection {
                val_targets: vec!["/no/such/lfw.bin".into()],
                ..Default::default()
            });
        },
        "eval.val_targets: \"/no/such/lfw.bin\"",
    );
    fails(
        |wire| wire.eval.get_or_insert_default().ijbc = Some("/no/such/ijb".into()),
        "eval.ijbc: \"/no/such/ijb\": ",
    );
    fails(
        |wire| wire.model.get_or_insert_default().init = Some("/no/such/weights.safetensors".into()),
        "/no/such/weights.safetensors",
    );
}

#[test]
fn what_ranks_count_adds_up() {
    for implementation in ["plain", "tiled"] {
        what_ranks_count_adds_up_in(implementation);
    }
}

fn what_ranks_count_adds_up_in(implementation: &str) {
    let scratch = tempfile::tempdir().unwrap();
    let spec = job(2, |wire| {
        let head = wire.head.get_or_insert_default();
        head.sample_rate = Some(0.4);
        head.implementation = Some(implementation.into());
    });
    let told = on_ranks(&spec, 2, |rank, trainer, job| {
        let mut recorder = Recorder::default();
        let mut sinks = Sinks {
            output: scratch.path().to_owned(),
            log: (rank == 0).then(|| super::log::TrainingLog::open(scratch.path()).expect("a log")),
            writer: None::<&Writer>,
            copier: None,
            flops_per_sample: (rank == 0).then(|| super::figures::flops_per_sample(&trainer.backbone)),
            outside: &mut recorder,
        };
        train(trainer, job, 0, &mut sinks).expect("trained");
        recorder
    });
    let last = |rank: usize| told[rank].paces.last().and_then(|pace| pace.figures.clone());
    let figures = [
        last(0).expect("told at the end"),
        last(1).expect("told at the end"),
    ];
    let mut cosines = 0;
    for own in &figures {
        assert_eq!((own.classes, own.shard_rows), (10, 5));
        // Two of five, or the classes of the batch if those are more.
        assert_eq!(own.sampled_rows, own.positive_rows.max(2), "{own:?}");
        // Five steps of four images, and none is left to read.
        assert_eq!((own.samples, own.data_errors, own.queue_depth), (20, 0, 0));
        assert_eq!(own.sample_bytes, 20 * 3 * 112 * 112);
        let decode = own.decode.as_ref().expect("times");
        assert_eq!(decode.counts.iter().sum::<u64>(), 20);
        let own = own.target_cosines.expect("cosines");
        assert!(own.sum.abs() <= own.count as f64, "{own:?}");
        cosines += own.count;
    }
    assert_eq!(cosines, 40, "each sample's class is in one shard");
    // 5,419,008 and more multiply-accumulates, three times, two operations each.
    assert!(figures[0].flops_per_sample > 6.0 * 5_419_008.0 && figures[1].flops_per_sample == 0.0);
    for metrics in &told[0].metrics {
        let (norm, cosine) = (metrics.embedding_norm, metrics.target_cosine);
        assert!(norm.is_some_and(|norm| norm > 0.0), "{metrics:?}");
        assert!(cosine.is_none_or(|cosine| cosine.abs() <= 1.0), "{metrics:?}");
    }
}

#[test]
fn every_rank_owns_its_classes() {
    let spec = job(2, |_| {});
    let shards = on_ranks(&spec, 2, |_, trainer, _| trainer.head.shard());
    assert_eq!(
        shards,
        [ClassRange { lo: 0, hi: 5 }, ClassRange { lo: 5, hi: 10 }]
    );
}

//! When checkpoints are taken, what a slow or full disk does to training, and that nothing is forgotten in one.

use super::updates::steps;
use super::*;
use crate::checkpoint::{Location, location::Remote};
use crate::progress::{Activity, Board, Shared};
use arcface_proto::v1::{CheckpointCommitted, CheckpointPart, CommitCheckpointRequest};
use object_store::{RetryConfig, aws::AmazonS3Builder};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// Takes the metrics of a rank as they come.
struct Listener<F: FnMut(&StepMetrics)>(F);

impl<F: FnMut(&StepMetrics)> Outside for Listener<F> {
    fn metrics(&mut self, metrics: StepMetrics) {
        (self.0)(&metrics);
    }

    fn pace(&mut self, _: RankPace) {}

    fn evaluation(&mut self, _: Evaluation) {}

    fn evaluations(&mut self) -> Result<Vec<Evaluation>, RankFailure> {
        Ok(Vec::new())
    }

    fn checkpoint_wanted(&mut self) -> bool {
        false
    }
}

/// Trains a rank with checkpoints in `output`; `commit` and `listen` are called as the rank process would.
fn train_with(
    rank: u32,
    trainer: &mut Trainer,
    job: &Job,
    output: &Path,
    commit: impl Fn(CommitCheckpointRequest) + Send + 'static,
    listen: impl FnMut(&StepMetrics),
) {
    train_at(
        Location::output(output),
        rank,
        trainer,
        job,
        output,
        commit,
        listen,
    );
}

/// The same with checkpoints in another place.
fn train_at(
    location: Location,
    rank: u32,
    trainer: &mut Trainer,
    job: &Job,
    output: &Path,
    commit: impl Fn(CommitCheckpointRequest) + Send + 'static,
    listen: impl FnMut(&StepMetrics),
) {
    let writer = Writer::start(location, 1, commit);
    let mut sinks = Sinks {
        output: output.to_owned(),
        log: (rank == 0).then(|| crate::rank::log::TrainingLog::open(output).expect("a log")),
        writer: Some(&writer),
        copier: None,
        flops_per_sample: None,
        outside: &mut Listener(listen),
    };
    let finished = train(trainer, job, 0, &mut sinks).expect("trained");
    assert_eq!(finished.step, job.end_step);
    writer.finish(&|| {});
}

/// Steps that ranks asked to commit, by rank.
type Commits = Arc<Mutex<Vec<Vec<u64>>>>;

fn record(commits: &Commits, rank: u32, request: &CommitCheckpointRequest) {
    commits.lock().expect("commits")[rank as usize].push(request.step);
}

#[test]
fn the_clock_of_rank_0_decides_for_all() {
    let scratch = tempfile::tempdir().unwrap();
    let spec = job(2, |wire| {
        wire.checkpoint.get_or_insert_default().every_seconds = Some(1e-9);
    });
    let commits: Commits = Arc::new(Mutex::new(vec![vec![]; 2]));
    let measured = Mutex::new(Vec::new());
    on_ranks(&spec, 2, |rank, trainer, job| {
        let commits = commits.clone();
        let commit = move |request: CommitCheckpointRequest| record(&commits, rank, &request);
        train_with(rank, trainer, job, scratch.path(), commit, |metrics| {
            let pair = (
                metrics.checkpoint_stall_seconds,
                metrics.checkpoint_suggested_seconds,
            );
            measured.lock().expect("measured").push(pair);
        });
    });
    let commits = commits.lock().expect("commits");
    assert_eq!(commits[0], commits[1], "all ranks alike");
    // Those in between may have waited for the disk.
    assert!(
        commits[0].starts_with(&[1]) && commits[0].ends_with(&[5]),
        "{commits:?}"
    );
    let measured = measured.lock().expect("measured");
    assert_eq!(measured[0], (None, None), "before the first");
    let (Some(stall), Some(suggested)) = measured[4] else {
        panic!("{measured:?}")
    };
    let youngs = (2.0 * stall * 8000.0 * 3600.0 / 2.0).sqrt();
    assert!(stall > 0.0 && (suggested - youngs).abs() < 1.0, "{measured:?}");
    let log = std::fs::read_to_string(scratch.path().join("training.log")).expect("a log");
    assert!(log.contains("a checkpoint holds up training for "), "{log}");
}

#[test]
fn a_disk_that_hangs_holds_up_no_step_and_all_ranks_leave_out_the_same_checkpoints() {
    let scratch = tempfile::tempdir().unwrap();
    let spec = job(2, |wire| {
        wire.checkpoint.get_or_insert_default().every_steps = Some(1);
    });
    let commits: Commits = Arc::new(Mutex::new(vec![vec![]; 2]));
    let (release, released): (SyncSender<()>, Receiver<()>) = sync_channel(1);
    let (release, released) = (Mutex::new(release), Arc::new(Mutex::new(released)));
    on_ranks(&spec, 2, |rank, trainer, job| {
        let (commits, released) = (commits.clone(), released.clone());
        let commit = move |request: CommitCheckpointRequest| {
            // Rank 1 hangs over its first checkpoint until training has come to the last step but one.
            if rank == 1 && request.step == 1 {
                released.lock().expect("released").recv().expect("a word");
            }
            record(&commits, rank, &request);
        };
        train_with(rank, trainer, job, scratch.path(), commit, |metrics| {
            if rank == 0 && metrics.step == 4 {
                release.lock().expect("release").send(()).expect("taken");
            }
        });
    });
    let commits = commits.lock().expect("commits");
    assert_eq!(
        *commits,
        [[1, 2, 5], [1, 2, 5]],
        "two wait, the next are left out, the last one waits for room"
    );
}

/// A checkpoint that is not committed, of a generation that trains on.
fn left_behind(output: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(output.join("checkpoints"))
        .into_iter()
        .flatten();
    entries.map(|entry| entry.expect("entry").path()).collect()
}

/// The agent sees a checkpoint, whose limit is that of a disk, and not a step that takes too long.
#[test]
fn a_rank_that_waits_for_its_disk_is_in_a_checkpoint() {
    let scratch = tempfile::tempdir().unwrap();
    let spec = job(1, |wire| {
        wire.checkpoint.get_or_insert_default().every_steps = Some(1);
    });
    let shared = Arc::new(Shared::new().expect("memory"));
    on_ranks(&spec, 1, |rank, trainer, job| {
        trainer.phases.show_on(Board::shown_to(&shared).expect("memory"));
        let (shared, last) = (shared.clone(), job.end_step);
        let deadline = Instant::now() + Duration::from_secs(60);
        let commit = move |request: CommitCheckpointRequest| {
            // The first one hangs until the last step was trained, whose checkpoint has no room.
            let waits = || {
                let seen = shared.read().unwrap_or_default();
                (seen.step, seen.activity) == (last, Activity::Checkpoint)
            };
            while request.step == 1 && !waits() {
                assert!(Instant::now() < deadline, "{:?}", shared.read());
                std::thread::yield_now();
            }
        };
        train_with(rank, trainer, job, scratch.path(), commit, |_| {});
    });
}

#[test]
fn a_checkpoint_that_cannot_be_written_is_a_warning_and_leaves_nothing() {
    let scratch = tempfile::tempdir().unwrap();
    let spec = job(1, |wire| {
        wire.checkpoint.get_or_insert_default().every_steps = Some(1);
    });
    let output = scratch.path();
    // The head of step 1 has no place: something of its name is in the way, after the backbone was written.
    let in_the_way = checkpoints::directory(&Location::output(output), 1, 1) + "/head-0-10.safetensors/x";
    std::fs::create_dir_all(output.join(in_the_way)).expect("make");
    let commits: Commits = Arc::new(Mutex::new(vec![vec![]]));
    on_ranks(&spec, 1, |rank, trainer, job| {
        let commits = commits.clone();
        let commit = move |request: CommitCheckpointRequest| record(&commits, rank, &request);
        train_with(rank, trainer, job, output, commit, |_| {});
    });
    let commits = &commits.lock().expect("commits")[0];
    assert!(
        !commits.contains(&1) && commits.ends_with(&[5]),
        "the next ones are written: {commits:?}"
    );
    let mut expected: Vec<PathBuf> = commits
        .iter()
        .map(|step| output.join(checkpoints::directory(&Location::output(output), *step, 1)))
        .collect();
    let mut found = left_behind(output);
    found.sort();
    expected.sort();
    assert_eq!(found, expected);
}

#[test]
fn a_store_that_is_away_costs_the_checkpoints_and_no_step() {
    let scratch = tempfile::tempdir().unwrap();
    let spec = job(1, |wire| {
        wire.checkpoint.get_or_insert_default().every_steps = Some(1);
    });
    let commits: Commits = Arc::new(Mutex::new(vec![vec![]]));
    on_ranks(&spec, 1, |rank, trainer, job| {
        let _there = rustls::crypto::ring::default_provider().install_default();
        // Nobody listens there.
        let store = AmazonS3Builder::new()
            .with_bucket_name("faces")
            .with_endpoint("http://127.0.0.1:1")
            .with_allow_http(true)
            .with_access_key_id("key")
            .with_secret_access_key("secret")
            .with_retry(RetryConfig {
                max_retries: 0,
                ..Default::default()
            })
            .build()
            .expect("a client");
        let remote = Remote::on(Arc::new(store), "s3://faces", "").expect("threads");
        let location = Location::remote(remote, &"job-0123456789ab".parse().expect("an id"));
        let commits = commits.clone();
        let commit = move |request: CommitCheckpointRequest| record(&commits, rank, &request);
        // Comes to the end of the job, or panics.
        train_at(location, rank, trainer, job, scratch.path(), commit, |_| {});
    });
    assert_eq!(*commits.lock().expect("commits"), [[0u64; 0]]);
    assert_eq!(left_behind(scratch.path()), Vec::<PathBuf>::new());
}

#[test]
fn what_was_never_committed_is_swept_and_what_is_kept_is_not() {
    let scratch = tempfile::tempdir().unwrap();
    let output = scratch.path();
    let spec = job(1, |wire| wire.train.get_or_insert_default().max_steps = Some(1));
    on_ranks(&spec, 1, |_, trainer, job| {
        let (committed, parts) = sync_channel(8);
        let writer = Writer::start(Location::output(output), 1, move |request| {
            committed.send(request).expect("taken");
        });
        let mut requests = Vec::new();
        for step in [10, 20, 30, 40] {
            let mut state = crate::rank::train::position(trainer, job, 1);
            state.step = step;
            let room = writer.room(&|| {});
            writer.write(checkpoints::snapshot_into(trainer, state, job.num_classes, room));
            requests.push(parts.recv().expect("written"));
        }
        let told = |step: usize, kept: Vec<String>| CheckpointCommitted {
            manifest: Some(CheckpointManifest {
                step: requests[step].step,
                directory: requests[step].directory.clone(),
                ..Default::default()
            }),
            expired_directories: vec![],
            kept_directories: kept,
        };
        let directory = |step| checkpoints::directory(&Location::output(output), step, 1);
        // Of 10 we were never told, but the coordinator has it; 20 lacks the parts of a peer; 40 is on its way.
        writer.committed(told(2, vec![directory(30), directory(10)]));
        writer.finish(&|| {});
        let exists = |step| output.join(directory(step)).exists();
        assert_eq!(
            [10, 20, 30, 40].map(exists),
            [true, false, true, true],
            "without a list nothing is swept"
        );
    });
}

/// The manifest of a checkpoint of this name, as a job commits it.
fn described(name: &str, job: &str) -> CheckpointManifest {
    let part = |file: &str, class_hi| CheckpointPart {
        file: file.into(),
        blake3: "0".repeat(64),
        class_hi,
        ..Default::default()
    };
    CheckpointManifest {
        format: 1,
        job_id: job.into(),
        num_classes: 10,
        directory: format!("checkpoints/{name}"),
        parts: vec![part("backbone.safetensors", 0), part("head-0-10.safetensors", 10)],
        ..Default::default()
    }
}

/// A rank 0 may die between the commit and its manifest: the next one puts it there.
#[test]
fn a_generation_describes_what_it_resumes_from() {
    let scratch = tempfile::tempdir().unwrap();
    let location = Location::output(scratch.path());
    let manifest = described("step-0000000010-g1", "job-ours");
    std::fs::create_dir_all(scratch.path().join(&manifest.directory)).expect("made");
    let writer = Writer::start(location.clone(), 2, |_| {});
    writer.resumed(manifest.clone());
    let location = writer.finish(&|| {});
    assert_eq!(
        location.manifest_of(&manifest.directory).expect("read"),
        Some(manifest)
    );
}

#[test]
fn what_earlier_generations_left_goes_with_the_first_commit() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("checkpoints");
    let make = |name: &str, files: &[&str]| {
        std::fs::create_dir_all(folder.join(name)).expect("made");
        for file in files {
            std::fs::write(folder.join(name).join(file), "{}").expect("written");
        }
    };
    make("step-0000000010-g1", &["manifest.json", "backbone.safetensors"]);
    make("step-0000000020-g1", &["backbone.safetensors"]);
    // Committed, and its rank 0 died before it had put the manifest there.
    make("step-0000000030-g1", &["backbone.safetensors"]);
    make("step-0000000040-g2", &[]);
    // Of this generation, on its way; of a later one; of nobody.
    make("step-0000000040-g3", &["backbone.safetensors"]);
    make("step-0000000020-g4", &[]);
    make("step-mine-g1", &[]);
    make("notes", &[]);
    // Of this generation: a peer could not write its parts, and wrote some of them after rank 0 had removed what there was.
    make("step-0000000025-g3", &["head-0-5.safetensors"]);
    // Not kept any more, and the coordinator died that was to say so; and one of a job that had the same output.
    let location = Location::output(scratch.path());
    for (step, job) in [(5, "job-ours"), (6, "job-theirs")] {
        let manifest = described(&format!("step-{step:010}-g2"), job);
        make(&format!("step-{step:010}-g2"), &[]);
        location.write_manifest(&manifest).expect("written");
    }
    let writer = Writer::start(location, 3, |_| {});
    let told = |step, name: &str, kept: &[&str]| CheckpointCommitted {
        manifest: Some(CheckpointManifest {
            step,
            ..described(name, "job-ours")
        }),
        expired_directories: vec![],
        kept_directories: kept.iter().map(|name| format!("checkpoints/{name}")).collect(),
    };
    make("step-0000000035-g3", &[]);
    // Without a list nothing is swept, nor with one that is older than what its generation committed last.
    writer.committed(told(35, "step-0000000035-g3", &[]));
    writer.committed(told(10, "step-0000000010-g1", &["step-0000000010-g1"]));
    writer.committed(told(
        35,
        "step-0000000035-g3",
        &["step-0000000035-g3", "step-0000000030-g1"],
    ));
    writer.finish(&|| {});
    let mut left: Vec<String> = left_behind(scratch.path())
        .iter()
        .map(|path| path.file_name().expect("a name").to_string_lossy().into_owned())
        .collect();
    left.sort();
    assert_eq!(
        left,
        [
            "notes",
            "step-0000000006-g2",
            "step-0000000020-g4",
            "step-0000000030-g1",
            "step-0000000035-g3",
            "step-0000000040-g3",
            "step-mine-g1"
        ]
    );
}

/// Everything at once: stochastic depth and dropout, AdamW, classes drawn at rate 0.1 with lazy updates, the position in
/// the second epoch, and a loss scale that moves.
#[test]
fn nothing_is_forgotten_in_a_checkpoint() {
    let cases: [(&str, &str, &str); 3] = [
        ("vit_t", "adamw", "fp32"),
        ("tiny", "adamw", "fp16"),
        ("tiny", "sgd", "bf16"),
    ];
    for (network, optimizer, precision) in cases {
        let spec = job(2, |wire| {
            let model = wire.model.get_or_insert_default();
            model.network = Some(network.into());
            model.freeze_batch_norm = Some(false);
            model.dropout = Some(0.2);
            let head = wire.head.get_or_insert_default();
            head.num_classes = Some(100);
            head.sample_rate = Some(0.1);
            let data = wire.data.get_or_insert_default();
            data.num_image = Some(20);
            let train = wire.train.get_or_insert_default();
            train.batch_size = Some(2);
            train.optimizer = Some(optimizer.into());
            train.precision = Some(precision.into());
            train.lr = Some(1e-3);
            // Taken at step 6 of 8, in the second epoch of five steps.
            train.num_epoch = Some(2);
            train.max_steps = Some(8);
        });
        let scaler = |trainer: &mut Trainer| {
            if trainer.scaler.is_some() {
                // Near growth, and low enough for small batches.
                trainer.scaler = crate::optim::GradScaler::resumed(128.0, 93);
            }
        };
        let scratch = tempfile::tempdir().unwrap();
        let requests: Commits = Arc::new(Mutex::new(vec![vec![]; 2]));
        let mut first = spec.clone();
        first.train.max_steps = Some(6);
        let taken: Mutex<Vec<CommitCheckpointRequest>> = Mutex::default();
        on_ranks(&first, 2, |rank, trainer, job| {
            scaler(trainer);
            let (sender, parts) = sync_channel(8);
            let requests = requests.clone();
            let commit = move |request: CommitCheckpointRequest| {
                record(&requests, rank, &request);
                sender.send(request).expect("taken");
            };
            train_with(rank, trainer, job, scratch.path(), commit, |_| {});
            let last = parts.iter().last().expect("a checkpoint at the end");
            taken.lock().expect("taken").push(last);
        });
        let mut taken = taken.into_inner().expect("taken");
        let one = taken.pop().expect("two ranks");
        let manifest = CheckpointManifest {
            format: 1,
            generation: 1,
            step: one.step,
            epoch: one.epoch,
            epoch_samples: one.epoch_samples,
            world_size: 2,
            num_classes: one.num_classes,
            directory: one.directory.clone(),
            parts: [taken.pop().expect("two ranks").parts, one.parts].concat(),
            scaler: one.scaler,
            ..Default::default()
        };
        assert_eq!((manifest.step, manifest.epoch, manifest.epoch_samples), (6, 1, 4));
        let dir = scratch.path().join(&manifest.directory);
        let resumed = on_ranks(&spec, 2, |rank, trainer, job| {
            let checkpoint = Checkpoint::open(&dir, manifest.clone()).expect("whole");
            let at = checkpoints::restore(trainer, &checkpoint, false)
                .expect("restored")
                .step;
            let losses = losses(rank, trainer, job, at, scratch.path());
            (losses, trainer.scaler, state(trainer))
        });
        let unbroken = on_ranks(&spec, 2, |rank, trainer, job| {
            scaler(trainer);
            // The same checkpoints, at the end of the epoch and at step 6: each brings the rows of a sampled head up to date, and
            // rounds them there.
            for piece in [0..5, 5..6] {
                steps(trainer, job, piece.clone());
                let position = crate::rank::train::position(trainer, job, piece.end);
                checkpoints::snapshot(trainer, position, job.num_classes);
            }
            let losses = losses(rank, trainer, job, 6, scratch.path());
            (losses, trainer.scaler, state(trainer))
        });
        let mut compared = 0;
        for (rank, (a, b)) in resumed.iter().zip(&unbroken).enumerate() {
            if rank == 0 {
                assert_eq!(a.0, b.0, "{network}, {optimizer}, {precision}: losses");
            }
            assert_eq!(a.1, b.1, "{network}, {optimizer}, {precision}: loss scale");
            for ((name, a), (_, b)) in a.2.iter().zip(&b.2) {
                assert!(a.equal(b), "{network}, {optimizer}, {precision}: {name} differs");
                compared += 1;
            }
        }
        assert!(compared > 50, "{compared} tensors");
        if precision == "fp16" {
            let (then, end) = (manifest.scaler.expect("fp16"), unbroken[0].1.expect("fp16"));
            assert_ne!(
                (end.scale(), end.good_updates()),
                (then.scale, then.good_updates),
                "it moved on after the checkpoint"
            );
        }
    }
}

/// Two epochs of five steps, while nothing can be put in the place of the model file.
#[test]
fn a_model_file_that_cannot_be_written_ends_nothing_before_the_end() {
    let scratch = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(
        scratch
            .path()
            .join(super::super::outputs::MODEL)
            .join("in the way"),
    )
    .unwrap();
    let spec = job(1, |wire| wire.train.get_or_insert_default().num_epoch = Some(2));
    on_ranks(&spec, 1, |_, trainer, job| {
        let mut recorder = Recorder::default();
        let mut sinks = Sinks {
            output: scratch.path().to_owned(),
            log: Some(super::super::log::TrainingLog::open(scratch.path()).unwrap()),
            writer: None::<&Writer>,
            copier: None,
            flops_per_sample: None,
            outside: &mut recorder,
        };
        let failure = train(trainer, job, 0, &mut sinks).expect_err("the last one has to be written");
        assert!(
            failure.message.starts_with("write the model"),
            "{}",
            failure.message
        );
        assert!(!failure.permanent);
        // The step that ends the first epoch ended no more than that.
        let steps: Vec<u64> = recorder.metrics.iter().map(|metrics| metrics.step).collect();
        assert!(steps.contains(&9), "{steps:?}");
    });
}

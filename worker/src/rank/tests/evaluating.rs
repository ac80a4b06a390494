//! Evaluation beside training: it changes nothing of training, gives the numbers that it would give if training waited, and
//! its end is no rank's end but that of its generation. The best weights, and the end before the last step.

use super::updates::Tapped;
use super::*;
use crate::collective::CollectiveError;
use crate::data::decode::SIDE;
use crate::eval::ijb::synthetic::{self, Sizes};
use crate::eval::ijb::{self, Benchmark, Layout, Protocol, Settings, embed::embed_images};
use crate::eval::{VerificationSet, evaluate};
use crate::model::{Backbone, BackboneConfig, ForwardMode};
use crate::rank::log::TrainingLog;
use arcface_proto::spec::Precision;
use arcface_proto::v1::TrainingFinished;
use std::path::PathBuf;
use std::time::Instant;

/// Pairs of the drawn set.
const PAIRS: u32 = 20;

/// A stripe pattern that only its number knows, with some noise.
fn picture(person: u32, noise: u32) -> image::RgbImage {
    image::RgbImage::from_fn(SIDE as u32, SIDE as u32, |x, y| {
        let wave = (x * (1 + person % 7) + y * (1 + person % 5)) as u8;
        image::Rgb([
            wave,
            (y * (1 + person % 3)) as u8,
            wave.wrapping_add((noise * x) as u8),
        ])
    })
}

/// Writes a verification set of pairs by turns alike and not; gives its path.
fn draw_set(dir: &Path) -> String {
    draw_pairs(dir, PAIRS)
}

fn draw_pairs(dir: &Path, pairs: u32) -> String {
    let encoded = |person: u32, noise: u32| {
        let mut bytes = Vec::new();
        image::codecs::jpeg::JpegEncoder::new(&mut bytes)
            .encode_image(&picture(person, noise))
            .expect("encoded");
        bytes
    };
    let drawn: Vec<[Vec<u8>; 2]> = (0..pairs.min(PAIRS))
        .map(|pair| [encoded(pair, 0), encoded(pair + pair % 2 * 31, 3)])
        .collect();
    let mut pickle = b"](".to_vec();
    for image in drawn.iter().cycle().take(pairs as usize).flatten() {
        pickle.push(b'B');
        pickle.extend((image.len() as u32).to_le_bytes());
        pickle.extend(image);
    }
    pickle.extend(b"e](");
    pickle.extend((0..pairs).map(|pair| if pair % 2 == 0 { 0x88 } else { 0x89 }));
    pickle.extend(b"e\x86.");
    let path = dir.join("drawn.bin");
    std::fs::write(&path, pickle).expect("written");
    path.display().to_string()
}

/// 10 steps on two ranks, everything random in them, evaluated on the drawn set after each.
fn evaluated(set: &str, change: impl FnOnce(&mut v1::EvalSection)) -> JobSpec {
    job(2, |wire| {
        wire.train.get_or_insert_default().num_epoch = Some(2);
        wire.head.get_or_insert_default().sample_rate = Some(0.4);
        wire.model.get_or_insert_default().freeze_batch_norm = Some(false);
        wire.model.get_or_insert_default().dropout = Some(0.2);
        let eval = wire.eval.get_or_insert_default();
        eval.val_targets = vec![set.to_owned()];
        eval.verbose = Some(1);
        change(eval);
    })
}

/// What a rank has after a training.
struct Lived {
    finished: Result<TrainingFinished, RankFailure>,
    recorder: Recorder,
    state: Vec<(String, Tensor)>,
}

fn live(
    rank: u32,
    trainer: &mut Trainer,
    job: &Job,
    start: u64,
    output: &Path,
    earlier: &[Evaluation],
) -> Lived {
    let mut recorder = Recorder {
        earlier: earlier.to_vec(),
        ..Default::default()
    };
    let mut sinks = Sinks {
        output: output.to_owned(),
        log: (rank == 0).then(|| TrainingLog::open(output).expect("a log")),
        writer: None::<&Writer>,
        copier: None,
        flops_per_sample: None,
        outside: &mut recorder,
    };
    let finished = train(trainer, job, start, &mut sinks);
    Lived {
        finished,
        state: state(trainer),
        recorder,
    }
}

/// Trains from the beginning; what ranks 0 and 1 have.
fn train_both(spec: &JobSpec, output: &Path) -> [Lived; 2] {
    let ranks = on_ranks(spec, 2, |rank, trainer, job| {
        live(rank, trainer, job, 0, output, &[])
    });
    ranks.try_into().ok().expect("two ranks")
}

/// The numbers, without what depends on the clock.
fn numbers(evaluations: &[Evaluation]) -> Vec<Evaluation> {
    let timeless = |found: &Evaluation| Evaluation {
        seconds: 0.0,
        ..found.clone()
    };
    evaluations.iter().map(timeless).collect()
}

fn steps_of(evaluations: &[Evaluation]) -> Vec<u64> {
    evaluations.iter().map(|found| found.step).collect()
}

fn assert_same_state(a: &Lived, b: &Lived) {
    assert_eq!(a.state.len(), b.state.len());
    for (a, b) in a.state.iter().zip(&b.state) {
        assert_eq!(a.0, b.0);
        assert!(a.1.equal(&b.1), "{} differs", a.0);
    }
}

/// The network of a weights file in `output`.
fn weights(output: &Path, file: &str) -> Backbone {
    let mut network = Backbone::new(&BackboneConfig::new("tiny", 16)).expect("known");
    crate::export::weights::load_backbone(&output.join(file), &mut network).expect("its own names");
    network
}

fn embed(network: &Backbone, images: &Tensor) -> Tensor {
    let mode = ForwardMode::evaluation(Precision::Fp32);
    tch::no_grad(|| network.forward(images, &mode))
}

#[test]
fn evaluation_changes_nothing_of_training_and_finds_the_same_beside_it() {
    let dirs = [(); 3].map(|()| tempfile::tempdir().expect("scratch"));
    let set = draw_set(dirs[0].path());
    let never = train_both(&evaluated(&set, |eval| eval.val_targets.clear()), dirs[0].path());
    let waits = train_both(
        &evaluated(&set, |eval| eval.background = Some(false)),
        dirs[1].path(),
    );
    let beside = train_both(&evaluated(&set, |_| {}), dirs[2].path());
    for rank in 0..2 {
        assert_same_state(&never[rank], &waits[rank]);
        assert_same_state(&never[rank], &beside[rank]);
        let losses = |lived: &Lived| -> Vec<f64> { lived.recorder.metrics.iter().map(|m| m.loss).collect() };
        assert_eq!(losses(&never[rank]), losses(&waits[rank]));
        assert_eq!(losses(&never[rank]), losses(&beside[rank]));
    }
    let waited = numbers(&waits[0].recorder.evaluations);
    assert_eq!(steps_of(&waited), (1..=10).collect::<Vec<u64>>());
    assert!(never[0].recorder.evaluations.is_empty() && waits[1].recorder.evaluations.is_empty());
    let varied = waited.iter().any(|found| found.xnorm != waited[0].xnorm);
    assert!(varied && waited[0].pairs == u64::from(PAIRS), "{waited:?}");
    // Beside training not all that are due are made; those that are have the same bits.
    let found = numbers(&beside[0].recorder.evaluations);
    assert!(steps_of(&found).ends_with(&[10]), "{found:?}");
    for evaluation in &found {
        assert_eq!(*evaluation, waited[evaluation.step as usize - 1]);
    }
    // And they are those of the weights, as `verify` would measure them.
    let set = VerificationSet::open(Path::new(&set)).expect("valid");
    let network = weights(dirs[2].path(), "model.safetensors");
    let alone = evaluate(&set, 7, &mut |images| Ok(embed(&network, images))).expect("measured");
    let last = found.last().expect("the last");
    assert!(
        (alone.accuracy - last.accuracy).abs() < 1e-6,
        "{alone:?} {last:?}"
    );
    assert!(
        (alone.xnorm - last.xnorm).abs() / alone.xnorm < 1e-6,
        "{alone:?} {last:?}"
    );
    assert_eq!(last.dataset, "drawn");
}

#[test]
fn one_that_is_due_while_another_is_under_way_is_left_out_but_not_the_last() {
    let scratch = tempfile::tempdir().expect("scratch");
    let set = draw_set(scratch.path());
    let [zero, _] = train_both(&evaluated(&set, |_| {}), scratch.path());
    // Embedding, exchange and numbers take an update each at the least: that of step 2 never finds the first done.
    let steps = steps_of(&zero.recorder.evaluations);
    assert!(
        steps.starts_with(&[1]) && !steps.contains(&2) && steps.ends_with(&[10]),
        "{steps:?}"
    );
    let log = std::fs::read_to_string(scratch.path().join("training.log")).expect("a log");
    assert!(
        log.contains("the evaluation of step 2 is left out: that of step 1 is still under way"),
        "{log}"
    );
    assert!(!log.contains("evaluation of step 10 is left out"), "{log}");
}

#[test]
fn a_rank_that_dies_during_an_evaluation_ends_the_generation_at_once() {
    let scratch = tempfile::tempdir().expect("scratch");
    let set = draw_set(scratch.path());
    // The evaluation of step 1 is under way, at a share that would take it hours.
    let spec = evaluated(&set, |eval| {
        eval.verbose = Some(1);
        eval.max_share = Some(1e-6);
    });
    let ends = on_ranks_with(
        &spec,
        2,
        |inner| {
            // Rank 1 dies in its fourth gradient sum.
            let mut left = (inner.rank() == 1).then_some(3);
            Box::new(Tapped {
                inner,
                before: Box::new(move |_| match &mut left {
                    Some(0) => Err(CollectiveError::Dead {
                        operation: "all_reduce",
                        first: "killed by the test".into(),
                    }),
                    Some(left) => {
                        *left -= 1;
                        Ok(())
                    }
                    None => Ok(()),
                }),
                after: Box::new(|_| {}),
            })
        },
        |rank, trainer, job| {
            // Two ranks on a core: none is free.
            tch::set_num_threads(i32::try_from(crate::device::cores()).unwrap_or(1));
            let lived = live(rank, trainer, job, 0, scratch.path(), &[]);
            let failure = lived.finished.expect_err("the generation ends");
            // Closes this rank's connections, as the end of its process does.
            trainer.comm = Box::new(TcpCollective::alone());
            (failure, Instant::now(), lived.recorder.evaluations.len())
        },
    );
    let [(lost, at, none), (died, before, _)] = &ends[..] else {
        panic!("two ranks")
    };
    assert!(died.message.contains("killed by the test"), "{died}");
    assert_eq!((lost.peer, lost.permanent, *none), (Some(1), false, 0), "{lost}");
    assert!(at.saturating_duration_since(*before) < Duration::from_secs(2));
}

/// All ranks' snapshots after `stop` steps, as a checkpoint.
fn checkpoint_at(spec: &JobSpec, stop: u64, dir: &Path) -> CheckpointManifest {
    let mut half = spec.clone();
    half.train.max_steps = Some(stop);
    half.eval.val_targets.clear();
    half.eval.best = None;
    half.eval.early_stop = None;
    let snapshots = on_ranks(&half, 2, |rank, trainer, job| {
        losses(rank, trainer, job, 0, dir);
        let position = crate::rank::train::position(trainer, job, stop);
        checkpoints::snapshot(trainer, position, job.num_classes)
    });
    write_checkpoint(&dir.join("c"), snapshots)
}

/// Goes on from a checkpoint as a generation that knows `earlier`.
fn resume(
    spec: &JobSpec,
    manifest: &CheckpointManifest,
    dir: &Path,
    output: &Path,
    earlier: &[Evaluation],
) -> [Lived; 2] {
    let ranks = on_ranks(spec, 2, |rank, trainer, job| {
        let checkpoint = Checkpoint::open(&dir.join("c"), manifest.clone()).expect("a checkpoint");
        let at = checkpoints::restore(trainer, &checkpoint, false).expect("restored");
        live(rank, trainer, job, at.step, output, earlier)
    });
    ranks.try_into().ok().expect("two ranks")
}

fn best_json(output: &Path) -> serde_json::Value {
    let text = std::fs::read_to_string(output.join("best.json")).expect("best.json");
    serde_json::from_str(&text).expect("JSON")
}

#[test]
fn the_best_weights_are_kept_whatever_happens_on_the_way() {
    let dirs = [(); 3].map(|()| tempfile::tempdir().expect("scratch"));
    let set = draw_set(dirs[0].path());
    let mut spec = evaluated(&set, |eval| {
        eval.background = Some(false);
        eval.best = Some("drawn.tar@1e-1".into());
    });
    // Of a sampled head a checkpoint rounds the rows that it brings up to date.
    spec.head.sample_rate = 1.0;
    let [whole, _] = train_both(&spec, dirs[0].path());
    let all = &whole.recorder.evaluations;
    let mut best = (f64::NEG_INFINITY, 0);
    for found in all {
        let value = found.tar_at_far["1e-1"];
        if value > best.0 {
            best = (value, found.step);
        }
    }
    let kept = best_json(dirs[0].path());
    assert_eq!(
        (kept["metric"].as_str(), kept["step"].as_u64()),
        (Some("drawn.tar@1e-1"), Some(best.1))
    );
    assert!(
        kept["value"]
            .as_f64()
            .is_some_and(|value| (value - best.0).abs() < 1e-12),
        "{kept}"
    );
    // The file has the weights of that step.
    let network = weights(dirs[0].path(), "best.safetensors");
    let read = VerificationSet::open(Path::new(&set)).expect("valid");
    let again = evaluate(&read, 16, &mut |images| Ok(embed(&network, images))).expect("measured");
    let told = &all[best.1 as usize - 1];
    assert!(
        (again.xnorm - told.xnorm).abs() / told.xnorm < 1e-6,
        "{again:?} {told:?}"
    );

    // A generation that goes on from step 5 and knows what was found until then ends with the same. It finds the file of
    // the earlier generation, or none.
    let manifest = checkpoint_at(&spec, 5, dirs[1].path());
    for file in ["best.safetensors", "best.json"].iter().filter(|_| best.1 <= 5) {
        std::fs::copy(dirs[0].path().join(file), dirs[1].path().join(file)).expect("copied");
    }
    let [second, other] = resume(&spec, &manifest, dirs[1].path(), dirs[1].path(), all);
    assert_same_state(&second, &whole);
    assert_eq!(steps_of(&second.recorder.evaluations), [6, 7, 8, 9, 10]);
    assert_eq!(numbers(&second.recorder.evaluations), numbers(&all[5..]));
    assert!(other.recorder.evaluations.is_empty());
    assert_eq!(best_json(dirs[1].path()), kept);

    // The evaluation of step 5 was lost with the generation before: it is made now.
    let [third, _] = resume(&spec, &manifest, dirs[1].path(), dirs[2].path(), &all[..4]);
    assert_eq!(numbers(&third.recorder.evaluations), numbers(&all[4..]));
    // On a disk without the earlier file there is at least the best of what came later.
    assert!(best_json(dirs[2].path())["step"].as_u64() >= Some(5));
}

#[test]
fn training_ends_when_the_best_does_not_rise_and_all_ranks_end_at_the_same_step() {
    let dirs = [(); 2].map(|()| tempfile::tempdir().expect("scratch"));
    let set = draw_set(dirs[0].path());
    let with_patience = |background| {
        evaluated(&set, |eval| {
            eval.background = Some(background);
            eval.best = Some("mean".into());
            eval.early_stop_patience = Some(2);
            // No accuracy rises by that much: the first stays the best.
            eval.early_stop_min_delta = Some(2.0);
        })
    };
    let spec = with_patience(false);
    let [zero, one] = train_both(&spec, dirs[0].path());
    let (ended, peer) = (
        zero.finished.as_ref().expect("ended"),
        one.finished.as_ref().expect("ended"),
    );
    // Found after step 3, heard with the gradient of step 4, which has the last evaluation and the model.
    assert_eq!((ended.step, peer.step), (4, 4));
    assert!(
        ended.reason.starts_with(
            "stopped early: mean.accuracy has not risen by more than 2 in 2 evaluations; the best is "
        ),
        "{}",
        ended.reason
    );
    assert_eq!(peer.reason, "");
    assert_eq!(steps_of(&zero.recorder.evaluations), [1, 2, 3, 4]);
    let model = weights(dirs[0].path(), "model.safetensors");
    let trained = |name: &str| {
        let found = zero
            .state
            .iter()
            .find(|(found, _)| found == &format!("model.{name}"));
        found.map(|(_, tensor)| tensor)
    };
    for entry in model.state() {
        assert!(
            trained(&entry.name).is_some_and(|tensor| tensor.equal(&entry.tensor)),
            "{}",
            entry.name
        );
    }
    // The schedule is that of the whole training.
    let rates =
        |lived: &Lived| -> Vec<f64> { lived.recorder.metrics.iter().map(|m| m.learning_rate).collect() };
    let whole = train_both(&evaluated(&set, |eval| eval.val_targets.clear()), dirs[1].path());
    assert_eq!(rates(&zero)[..], rates(&whole[0])[..4]);

    // A generation that begins behind the decision trains no further, and makes up for the last evaluation if that was lost.
    let manifest = checkpoint_at(&spec, 4, dirs[1].path());
    let earlier = &zero.recorder.evaluations;
    for (known, made) in [(&earlier[..3], &[4][..]), (&earlier[..], &[])] {
        for lived in resume(&spec, &manifest, dirs[1].path(), dirs[1].path(), known) {
            assert_eq!(lived.finished.expect("ended").step, 4);
            if !lived.recorder.evaluations.is_empty() || made.is_empty() {
                assert_eq!(steps_of(&lived.recorder.evaluations), made);
            }
            assert!(lived.recorder.metrics.is_empty());
        }
    }

    // Beside training it is heard later, at the same step by all.
    let [zero, one] = train_both(&with_patience(true), dirs[1].path());
    let (ended, peer) = (zero.finished.expect("ended"), one.finished.expect("ended"));
    assert_eq!(ended.step, peer.step);
    assert_eq!(steps_of(&zero.recorder.evaluations).last(), Some(&ended.step));
}

#[test]
fn ijb_is_evaluated_by_all_ranks_together_at_the_end_of_its_epochs() {
    let scratch = tempfile::tempdir().expect("scratch");
    let sizes = Sizes {
        images: 41,
        templates: 12,
        pairs: 100,
        dim: 16,
        seed: 1,
    };
    synthetic::write(scratch.path(), &sizes).expect("written");
    let crops = scratch.path().join("IJBC/loose_crop");
    std::fs::create_dir(&crops).expect("made");
    let incomplete = |spec: &JobSpec| {
        Prepared::open(spec.clone(), &[], Placement::cpu())
            .err()
            .expect("refused")
    };
    let set = draw_set(scratch.path());
    let spec = evaluated(&set, |eval| {
        eval.verbose = Some(0);
        eval.ijbc = Some(scratch.path().display().to_string());
        eval.ijb_every = Some(2);
        eval.best = Some("ijbc.auc".into());
    });
    // Known before the first step: there are no images.
    let failure = incomplete(&spec);
    assert!(
        failure.permanent && failure.message.starts_with("eval.ijbc: "),
        "{failure}"
    );
    assert!(failure.message.contains("loose_crop/1.jpg"), "{failure}");
    for image in 1..=sizes.images {
        picture(image * 5 / 18, image)
            .save_with_format(crops.join(format!("{image}.jpg")), image::ImageFormat::Png)
            .expect("saved");
    }

    let [zero, one] = train_both(&spec, scratch.path());
    assert!(one.recorder.evaluations.is_empty());
    let found = &zero.recorder.evaluations;
    let names: Vec<(u64, &str)> = found
        .iter()
        .map(|found| (found.step, found.dataset.as_str()))
        .collect();
    // The set after each epoch, the benchmark after every second.
    assert_eq!(names, [(5, "drawn"), (10, "drawn"), (10, "ijbc")]);
    let told = &found[2];
    let ijb = told.ijb.as_ref().expect("a benchmark's");
    assert_eq!((told.pairs, ijb.images, ijb.templates), (100, 41, 12));
    assert_eq!(
        (told.tar_at_far.len(), ijb.rank.len(), told.accuracy),
        (6, 3, 0.0)
    );
    let kept = best_json(scratch.path());
    assert!(
        kept["value"]
            .as_f64()
            .is_some_and(|value| (value - ijb.auc).abs() < 1e-12),
        "{kept}"
    );

    // As `arcface-worker ijb` measures the weights alone.
    let layout = Layout::find(scratch.path(), Protocol::Ijbc).expect("found");
    let benchmark = Benchmark::open(layout, true).expect("read");
    let network = weights(scratch.path(), "model.safetensors");
    let features = embed_images(&benchmark, 0..41, 8, true, &mut |images| {
        Ok(embed(&network, images))
    });
    let options = ijb::Options {
        settings: Settings::REFERENCE,
        all_settings: false,
        repetitions: 0,
        seed: 1,
    };
    let alone =
        ijb::evaluate(&benchmark, &features.expect("embedded"), &options, &mut |_| {}).expect("measured");
    assert!((alone.verification.roc.auc - ijb.auc).abs() < 1e-6, "{told:?}");
    for ((far, _), tpr) in ijb::FARS.iter().zip(alone.verification.tpr) {
        assert!((told.tar_at_far[*far] - tpr).abs() < 1e-6, "{far}: {told:?}");
    }
    let top = ijb::report::mean_top(alone.identification.as_ref().expect("1:N"));
    assert!((ijb.rank["1"] - top[0]).abs() < 1e-6, "{told:?}");

    // A list of pairs that only rank 0 reads is checked by it beforehand as well.
    let pairs: PathBuf = scratch.path().join("IJBC/meta/ijbc_template_pair_label.txt");
    std::fs::write(&pairs, "3 8 1\nnonsense\n").expect("written");
    let prepared = Prepared::open(spec, &[], Placement::cpu()).expect("the rest is there");
    let failure = prepared.targets[1].check().expect_err("damaged");
    assert!(
        failure.permanent && failure.message.contains("ijbc_template_pair_label.txt:2"),
        "{failure}"
    );
}

/// Seconds of each step, and which of them an evaluation was under way in.
#[derive(Default)]
struct StepTimes {
    every: u64,
    under_way: bool,
    /// When the step before the next was told.
    last: Option<(u64, Instant)>,
    beside: Vec<f64>,
    alone: Vec<f64>,
    evaluations: Vec<Evaluation>,
}

impl Outside for StepTimes {
    fn metrics(&mut self, metrics: StepMetrics) {
        // By the clock: the speed that is told leaves out what the training thread does for evaluations.
        let now = Instant::now();
        if let Some((_, last)) = self.last.replace((metrics.step, now)) {
            let seconds = (now - last).as_secs_f64();
            match self.under_way {
                true => self.beside.push(seconds),
                false => self.alone.push(seconds),
            }
        }
        self.under_way |= metrics.step.is_multiple_of(self.every);
    }

    fn pace(&mut self, _: RankPace) {}

    fn evaluation(&mut self, evaluation: Evaluation) {
        self.evaluations.push(evaluation);
        // One that is due now begins.
        self.under_way = self.last.is_some_and(|(step, _)| step.is_multiple_of(self.every));
    }

    fn evaluations(&mut self) -> Result<Vec<Evaluation>, RankFailure> {
        Ok(Vec::new())
    }

    fn checkpoint_wanted(&mut self) -> bool {
        false
    }
}

/// What an evaluation costs the training beside it, with a core of its own (one rank of one thread) and without (as many ranks
/// of one thread as there are cores), where a tenth of the images is enough to see the share. For 12,000 images on a machine
/// that does nothing else, some 15 minutes: `ARCFACE_EVAL_PAIRS=6000 ARCFACE_EVAL_EVERY=20`, with `--nocapture`.
#[test]
fn what_an_evaluation_costs_training() {
    let asked = |name: &str, usual: u32| {
        let text = std::env::var(name).ok();
        text.map_or(usual, |text| text.parse().expect("a number"))
    };
    let (most, every) = (asked("ARCFACE_EVAL_PAIRS", 20), asked("ARCFACE_EVAL_EVERY", 4));
    let network = std::env::var("ARCFACE_EVAL_NETWORK").unwrap_or("tiny".into());
    let scratch = tempfile::tempdir().expect("scratch");
    let cores = u32::try_from(crate::device::cores()).expect("cores");
    for (world_size, pairs) in [(1, most), (cores.clamp(2, 4), (most / 10).max(20))] {
        let set = draw_pairs(scratch.path(), pairs);
        let spec = job(world_size, |wire| {
            wire.model.get_or_insert_default().network = Some(network.clone());
            let train = wire.train.get_or_insert_default();
            train.num_epoch = Some(1_000_000);
            train.batch_size = Some(16);
            let eval = wire.eval.get_or_insert_default();
            eval.val_targets = vec![set.clone()];
            eval.verbose = Some(u64::from(every));
            // Ends after the second evaluation.
            eval.best = Some("drawn".into());
            eval.early_stop_patience = Some(1);
            eval.early_stop_min_delta = Some(2.0);
            let data = wire.data.get_or_insert_default();
            data.num_image = Some(64 * u64::from(every) * u64::from(world_size));
        });
        let times = on_ranks(&spec, world_size, |rank, trainer, job| {
            let mut times = StepTimes {
                every: u64::from(every),
                ..Default::default()
            };
            let mut sinks = Sinks {
                output: scratch.path().to_owned(),
                log: (rank == 0).then(|| TrainingLog::open(scratch.path()).expect("a log")),
                writer: None::<&Writer>,
                copier: None,
                flops_per_sample: None,
                outside: &mut times,
            };
            let finished = train(trainer, job, 0, &mut sinks).expect("trained");
            assert!(finished.step < job.end_step, "stops after the second evaluation");
            times
        })
        .swap_remove(0);
        let mean = |seconds: &[f64]| seconds.iter().sum::<f64>() / seconds.len() as f64;
        let (alone, beside) = (mean(&times.alone), mean(&times.beside));
        println!(
            "{network}, {world_size} rank(s) of 1 thread on {cores} cores, {} images: a step takes {:.1} ms alone ({} steps), \
             {:.1} ms beside an evaluation ({} steps): {:+.1} %; evaluations took {:?} s",
            2 * pairs,
            1e3 * alone,
            times.alone.len(),
            1e3 * beside,
            times.beside.len(),
            100.0 * (beside / alone - 1.0),
            times
                .evaluations
                .iter()
                .map(|found| found.seconds.round())
                .collect::<Vec<_>>(),
        );
        assert!(
            times.evaluations.len() >= 3 && !times.beside.is_empty(),
            "{world_size}"
        );
        assert!(
            times
                .evaluations
                .iter()
                .all(|found| found.pairs == u64::from(pairs))
        );
    }
}

//! What people and programs read of a training in its output directory: `training.log`, one line an interval, and
//! `metrics.jsonl`, one JSON object for each interval and each evaluation; and event files for TensorBoard. Written by rank 0
//! alone.

use super::failure::RankFailure;
use super::tensorboard::Events;
use arcface_proto::v1::{Evaluation, StepMetrics};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

/// The open files.
pub struct TrainingLog {
    lines: File,
    metrics: File,
    events: Option<Events>,
}

impl TrainingLog {
    /// Opens both files for appending: a resumed job goes on in them.
    ///
    /// # Errors
    /// If the output directory cannot be written.
    pub fn open(output: &Path) -> Result<Self, RankFailure> {
        let open = |name: &str| {
            let path = output.join(name);
            let file = File::options().create(true).append(true).open(&path);
            file.map_err(|error| RankFailure::transient(format!("open {}: {error}", path.display())))
        };
        Ok(Self {
            lines: open("training.log")?,
            metrics: open("metrics.jsonl")?,
            events: None,
        })
    }

    /// Writes event files for TensorBoard too, of a training that begins after `start` steps. One that cannot be written is a
    /// warning: nothing but pictures is lost.
    pub fn draw(&mut self, output: &Path, start: u64) {
        match Events::create(output, start) {
            Ok(events) => self.events = Some(events),
            Err(error) => tracing::warn!("no event file for TensorBoard: {error}"),
        }
    }

    /// A line of text, with the time before it.
    pub fn line(&mut self, text: &str) {
        tracing::info!("{text}");
        let now = humantime::format_rfc3339_seconds(SystemTime::now());
        // A full disk must not end the training; the line is in the rank's own log.
        let _lost = writeln!(self.lines, "{now} {text}");
    }

    /// An interval.
    pub fn metrics(&mut self, metrics: &StepMetrics) {
        self.line(&interval_line(metrics));
        let value = json!({
            "kind": "metrics", "step": metrics.step, "total_steps": metrics.total_steps, "epoch": metrics.epoch,
            "loss": metrics.loss, "learning_rate": metrics.learning_rate,
            "samples_per_second": metrics.samples_per_second, "grad_norm": metrics.grad_norm,
            "eta_seconds": metrics.eta_seconds, "step_seconds": metrics.step_seconds,
            "loss_scale": metrics.loss_scale, "skipped_steps": metrics.skipped_steps,
            "checkpoint_stall_seconds": metrics.checkpoint_stall_seconds,
            "checkpoint_suggested_seconds": metrics.checkpoint_suggested_seconds,
            "embedding_norm": metrics.embedding_norm, "target_cosine": metrics.target_cosine,
            "phase_seconds": sorted(&metrics.phase_seconds),
        });
        let _lost = writeln!(self.metrics, "{value}");
        if let Some(events) = &mut self.events {
            events.metrics(metrics);
        }
    }

    /// An evaluation.
    pub fn evaluation(&mut self, evaluation: &Evaluation) {
        self.line(&evaluation_line(evaluation));
        let mut value = json!({
            "kind": "evaluation", "dataset": evaluation.dataset, "step": evaluation.step, "pairs": evaluation.pairs,
            "accuracy": evaluation.accuracy, "accuracy_std": evaluation.accuracy_std, "xnorm": evaluation.xnorm,
            "tar_at_far": sorted(&evaluation.tar_at_far),
            "seconds": evaluation.seconds,
        });
        if let Some(ijb) = &evaluation.ijb {
            for of_set in ["accuracy", "accuracy_std", "xnorm"] {
                value[of_set] = Value::Null;
            }
            value["ijb"] = json!({
                "images": ijb.images, "templates": ijb.templates, "auc": ijb.auc,
                "rank": sorted(&ijb.rank), "dir_at_far": sorted(&ijb.dir_at_far),
            });
        }
        let _lost = writeln!(self.metrics, "{value}");
        if let Some(events) = &mut self.events {
            events.evaluation(evaluation);
        }
    }
}

fn sorted(map: &HashMap<String, f64>) -> BTreeMap<&String, &f64> {
    map.iter().collect()
}

fn interval_line(metrics: &StepMetrics) -> String {
    let left = Duration::from_secs(metrics.eta_seconds.clamp(0.0, 1e9) as u64);
    let scale = metrics
        .loss_scale
        .map_or(String::new(), |scale| format!(" scale {scale}"));
    let skipped = metrics
        .skipped_steps
        .map_or(String::new(), |steps| format!(" skipped {steps}"));
    format!(
        "step {}/{} epoch {} loss {:.4} lr {:.6} grad norm {:.3}{scale}{skipped} speed {:.1} samples/s left {}",
        metrics.step,
        metrics.total_steps,
        metrics.epoch,
        metrics.loss,
        metrics.learning_rate,
        metrics.grad_norm,
        metrics.samples_per_second,
        humantime::format_duration(left),
    )
}

fn evaluation_line(evaluation: &Evaluation) -> String {
    let mut tar: Vec<_> = evaluation.tar_at_far.iter().collect();
    tar.sort_by(|a, b| b.0.cmp(a.0));
    let tar: String = tar
        .iter()
        .map(|(far, tar)| format!(" tar@{far} {tar:.4}"))
        .collect();
    let numbers = match &evaluation.ijb {
        None => format!(
            "accuracy {:.5}+-{:.5} xnorm {:.4}",
            evaluation.accuracy, evaluation.accuracy_std, evaluation.xnorm
        ),
        Some(ijb) => {
            let ranks = ["1", "5", "10"].into_iter().filter_map(|rank| {
                let share = ijb.rank.get(rank)?;
                Some(format!(" rank-{rank} {share:.4}"))
            });
            format!("auc {:.5}{}", ijb.auc, ranks.collect::<String>())
        }
    };
    format!(
        "evaluation {} step {} {numbers}{tar} ({:.1} s)",
        evaluation.dataset, evaluation.step, evaluation.seconds,
    )
}

/// Means over a log interval.
#[derive(Debug)]
pub struct Meter {
    begin: Instant,
    steps: u64,
    loss: f64,
    /// Steps that had a loss.
    losses: u64,
    /// Time in evaluations and waiting for checkpoints, which is not training speed.
    aside: Duration,
    grad_norm: f64,
}

impl Meter {
    /// An empty interval that begins now.
    pub fn begin() -> Self {
        Self {
            begin: Instant::now(),
            steps: 0,
            loss: 0.0,
            losses: 0,
            aside: Duration::ZERO,
            grad_norm: 0.0,
        }
    }

    /// A step was done, or left out: then it has no loss.
    pub fn step(&mut self, loss: Option<f64>, grad_norm: Option<f64>) {
        self.steps += 1;
        if let Some(loss) = loss {
            self.loss += loss;
            self.losses += 1;
        }
        if let Some(norm) = grad_norm {
            self.grad_norm = norm;
        }
    }

    /// Time since `begin` went into something else than steps.
    pub fn aside(&mut self, begin: Instant) {
        self.aside += begin.elapsed();
    }

    /// Mean loss (NaN if every step was left out), seconds a step and the last gradient norm; begins anew. `None` without
    /// a step.
    pub fn take(&mut self) -> Option<(f64, f64, f64)> {
        let done = std::mem::replace(self, Self::begin());
        self.grad_norm = done.grad_norm;
        let seconds = done.begin.elapsed().saturating_sub(done.aside).as_secs_f64();
        let steps = done.steps as f64;
        (done.steps > 0).then(|| (done.loss / done.losses as f64, seconds / steps, done.grad_norm))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_the_reference_log_says() {
        let metrics = StepMetrics {
            step: 20,
            total_steps: 100,
            epoch: 1,
            loss: 12.34567,
            learning_rate: 0.1,
            samples_per_second: 256.04,
            grad_norm: 4.5,
            eta_seconds: 3661.9,
            ..Default::default()
        };
        let expected = "step 20/100 epoch 1 loss 12.3457 lr 0.100000 grad norm 4.500 speed 256.0 samples/s left 1h 1m 1s";
        assert_eq!(interval_line(&metrics), expected);
        let scaled = StepMetrics {
            loss_scale: Some(32768.0),
            skipped_steps: Some(3),
            ..metrics
        };
        let expected = expected.replace("4.500 speed", "4.500 scale 32768 skipped 3 speed");
        assert_eq!(interval_line(&scaled), expected);
    }

    #[test]
    fn a_log_is_appended_to() {
        let scratch = tempfile::tempdir().unwrap();
        for step in [1, 2] {
            let mut log = TrainingLog::open(scratch.path()).unwrap();
            log.metrics(&StepMetrics {
                step,
                ..Default::default()
            });
        }
        let text = std::fs::read_to_string(scratch.path().join("metrics.jsonl")).unwrap();
        let steps: Vec<u64> = text
            .lines()
            .map(|line| {
                serde_json::from_str::<Value>(line).unwrap()["step"]
                    .as_u64()
                    .unwrap()
            })
            .collect();
        assert_eq!(steps, [1, 2]);
        let lines = std::fs::read_to_string(scratch.path().join("training.log")).unwrap();
        assert_eq!(lines.lines().count(), 2);
    }

    #[test]
    fn a_meter_averages_and_begins_anew() {
        let mut meter = Meter::begin();
        meter.step(Some(1.0), Some(2.0));
        meter.step(None, None);
        meter.step(Some(3.0), None);
        let (loss, _, norm) = meter.take().unwrap();
        assert_eq!((loss, norm), (2.0, 2.0));
        assert!(meter.take().is_none());
        meter.step(None, None);
        assert!(meter.take().unwrap().0.is_nan(), "every step was left out");
    }
}

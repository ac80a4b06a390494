//! The best weights so far by one number, and when it is no use to go on: a function of the evaluations in the order of
//! their steps, so that a later generation that knows the earlier ones decides the same. And the files of the best weights.

use crate::export::{self, atomic};
use crate::model::Backbone;
use crate::rank::failure::RankFailure;
use arcface_proto::spec::{EarlyStop, EvalSpec, Metric};
use arcface_proto::v1::Evaluation;
use serde_json::json;
use std::io::Write;
use std::path::Path;

/// Name of the best weights' file.
pub const BEST: &str = "best.safetensors";
/// Name of the file that says what they are best at.
pub const BEST_JSON: &str = "best.json";

/// What the evaluations so far say.
#[derive(Clone, Debug)]
pub struct Best {
    metric: Metric,
    early_stop: Option<EarlyStop>,
    /// Highest value, and the step of the first that had it.
    highest: Option<(f64, u64)>,
    /// What the next value has to exceed by the least change, to count as better.
    bar: f64,
    /// Values in a row that were not.
    stale: u32,
    /// Why it is no use to go on.
    stop: Option<String>,
}

/// What an evaluation was.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Value {
    /// Its value.
    pub value: f64,
    /// Higher than all before it.
    pub is_highest: bool,
}

impl Best {
    /// Before the first evaluation; nothing if the job does not ask for it.
    pub fn of(spec: &EvalSpec) -> Option<Self> {
        Some(Self {
            metric: spec.best.clone()?,
            early_stop: spec.early_stop,
            highest: None,
            bar: f64::NEG_INFINITY,
            stale: 0,
            stop: None,
        })
    }

    /// Takes in what was found of the weights after `step`; nothing if that does not tell the number.
    pub fn take(&mut self, step: u64, found: &[Evaluation]) -> Option<Value> {
        let value = self.metric.value(found)?;
        let is_highest = self.highest.is_none_or(|(highest, _)| value > highest);
        if is_highest {
            self.highest = Some((value, step));
        }
        let Some(EarlyStop { patience, min_delta }) = self.early_stop else {
            return Some(Value { value, is_highest });
        };
        if value > self.bar + min_delta {
            (self.bar, self.stale) = (value, 0);
        } else {
            self.stale += 1;
        }
        // Once decided it stays so, whatever the last evaluation finds.
        if self.stale >= patience && self.stop.is_none() {
            let (highest, at) = self.highest.unwrap_or((value, step));
            self.stop = Some(format!(
                "stopped early: {} has not risen{} in {patience} evaluation{}; the best is {highest:.5} at step {at}",
                self.metric,
                if min_delta > 0.0 {
                    format!(" by more than {min_delta}")
                } else {
                    String::new()
                },
                if patience == 1 { "" } else { "s" },
            ));
        }
        Some(Value { value, is_highest })
    }

    /// Takes in what earlier generations found, up to `step`.
    pub fn replay(&mut self, found: &[Evaluation], step: u64) {
        let mut earlier: Vec<&Evaluation> = found.iter().filter(|found| found.step <= step).collect();
        earlier.sort_by_key(|found| found.step);
        for of_step in earlier.chunk_by(|a, b| a.step == b.step) {
            let of_step: Vec<Evaluation> = of_step.iter().copied().cloned().collect();
            self.take(of_step[0].step, &of_step);
        }
    }

    /// Why it is no use to go on, if it is none.
    pub fn stop(&self) -> Option<&str> {
        self.stop.as_deref()
    }

    /// Writes weights and what they are to `output`, if they are the best, or the best that there are: an earlier
    /// generation may have kept its own on another disk.
    ///
    /// # Errors
    /// If a file cannot be written; the old ones stay.
    pub fn keep(
        &self,
        output: &Path,
        weights: &Backbone,
        step: u64,
        value: Value,
    ) -> Result<(), RankFailure> {
        if !value.is_highest && output.join(BEST).exists() {
            return Ok(());
        }
        let tensors = weights
            .state()
            .iter()
            .map(|entry| (entry.name.as_str(), &entry.tensor));
        let about = json!({ "metric": self.metric.to_string(), "value": value.value, "step": step });
        export::safetensors::write(&output.join(BEST), tensors)
            .and_then(|()| atomic::write(&output.join(BEST_JSON), |file| writeln!(file, "{about}")))
            .map_err(|error| RankFailure::transient(format!("write the best model: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn best(patience: Option<u32>, min_delta: f64) -> Best {
        let spec = EvalSpec {
            every_steps: None,
            val_targets: vec!["lfw".into()],
            ijbb: None,
            ijbc: None,
            ijb_every: None,
            background: true,
            max_share: 1.0,
            best: Metric::parse("lfw", &["lfw"], &[]).ok(),
            early_stop: patience.map(|patience| EarlyStop { patience, min_delta }),
        };
        Best::of(&spec).expect("asked for")
    }

    fn found(step: u64, accuracy: f64) -> Evaluation {
        Evaluation {
            dataset: "lfw".into(),
            step,
            accuracy,
            ..Default::default()
        }
    }

    /// Steps at which the best weights were found, and that of the decision to stop.
    fn lived(mut best: Best, values: &[f64]) -> (Vec<u64>, Option<u64>) {
        let (mut highest, mut stop) = (Vec::new(), None);
        for (step, value) in (1..).zip(values) {
            let taken = best.take(step, &[found(step, *value)]).expect("told");
            highest.extend(taken.is_highest.then_some(step));
            stop = stop.or(best.stop().map(|_| step));
        }
        (highest, stop)
    }

    #[test]
    fn the_first_highest_is_the_best_and_patience_counts_from_the_last_rise() {
        let values = [0.5, 0.7, 0.7, 0.6, 0.75, 0.74, 0.73, 0.9];
        assert_eq!(lived(best(None, 0.0), &values), (vec![1, 2, 5, 8], None));
        assert_eq!(lived(best(Some(2), 0.0), &values).1, Some(4));
        assert_eq!(lived(best(Some(3), 0.0), &values).1, None);
        // A rise of 0.05 is none: the best weights are kept all the same.
        assert_eq!(lived(best(Some(3), 0.1), &values), (vec![1, 2, 5, 8], Some(5)));
    }

    #[test]
    fn an_evaluation_that_does_not_tell_the_number_does_not_count() {
        let mut best = best(Some(1), 0.0);
        assert_eq!(best.take(1, &[]), None);
        assert!(best.take(2, &[found(2, 0.5)]).is_some());
        assert_eq!(best.take(3, &[found(3, f64::NAN)]), None);
        assert_eq!(best.stop(), None);
    }

    #[test]
    fn a_later_generation_decides_as_the_earlier_would_have() {
        let values = [0.5, 0.7, 0.7, 0.6, 0.75];
        let history: Vec<Evaluation> = (1..)
            .zip(values)
            .map(|(step, value)| found(step, value))
            .collect();
        // What lies behind the checkpoint does not count, whatever the order.
        let mut second = best(Some(3), 0.0);
        let mut shuffled = history.clone();
        shuffled.reverse();
        second.replay(&shuffled, 3);
        assert_eq!((second.highest, second.stale), (Some((0.7, 2)), 1));
        let mut stopped = best(Some(2), 0.0);
        stopped.replay(&history, 5);
        let reason = stopped.stop().expect("decided");
        assert_eq!(
            reason,
            "stopped early: lfw.accuracy has not risen in 2 evaluations; the best is 0.70000 at step 2"
        );
    }
}

//! What a rank still has to say, in what order, and what is said again after a broken stream. Pure.
//!
//! Nothing on the stream is acknowledged one by one. Set-up and evaluations are kept and repeated on a new stream
//! (the coordinator keeps one of each), and so is where the latest copies are; of the metrics and of the pace only the latest
//! counts; the last word ends the stream.

use arcface_proto::v1::report_request::Report;
use arcface_proto::v1::{Evaluation, PartsCopied, RankPace, StepMetrics, TrainingStarted};
use std::collections::VecDeque;

/// Evaluations kept for a coordinator that is away.
const EVALUATIONS: usize = 256;

/// Reports that wait or may have to be repeated.
#[derive(Debug, Default)]
pub struct Outbox {
    started: Option<(TrainingStarted, bool)>,
    metrics: Option<StepMetrics>,
    pace: Option<RankPace>,
    evaluations: VecDeque<(Evaluation, bool)>,
    copied: Option<(PartsCopied, bool)>,
    last: Option<(Report, bool)>,
}

impl Outbox {
    /// Adds a report.
    pub fn push(&mut self, report: Report) {
        match report {
            Report::Started(started) => self.started = Some((started, false)),
            Report::Metrics(metrics) => self.metrics = Some(metrics),
            Report::Copied(copied) => self.copied = Some((copied, false)),
            Report::Pace(pace) => self.pace = Some(pace),
            Report::Evaluation(evaluation) => {
                if self.evaluations.len() == EVALUATIONS {
                    self.evaluations.pop_front();
                }
                self.evaluations.push_back((evaluation, false));
            }
            last @ (Report::Error(_) | Report::Finished(_)) => self.last = Some((last, false)),
        }
    }

    /// The next report to send, if there is one.
    pub fn next(&mut self) -> Option<Report> {
        if let Some((started, sent @ false)) = &mut self.started {
            *sent = true;
            return Some(Report::Started(*started));
        }
        if let Some((evaluation, sent)) = self.evaluations.iter_mut().find(|(_, sent)| !sent) {
            *sent = true;
            return Some(Report::Evaluation(evaluation.clone()));
        }
        if let Some((copied, sent @ false)) = &mut self.copied {
            *sent = true;
            return Some(Report::Copied(copied.clone()));
        }
        if let Some(metrics) = self.metrics.take() {
            return Some(Report::Metrics(metrics));
        }
        if let Some(pace) = self.pace.take() {
            return Some(Report::Pace(pace));
        }
        match &mut self.last {
            Some((last, sent @ false)) => {
                *sent = true;
                Some(last.clone())
            }
            _ => None,
        }
    }

    /// True if [`Outbox::next`] would give nothing.
    pub fn is_empty(&self) -> bool {
        let unsent_start = self.started.as_ref().is_some_and(|(_, sent)| !sent);
        let unsent_evaluation = self.evaluations.iter().any(|(_, sent)| !sent);
        let unsent_copies = self.copied.as_ref().is_some_and(|(_, sent)| !sent);
        let unsent_end = self.last.as_ref().is_some_and(|(_, sent)| !sent);
        let unsent_figures = self.metrics.is_some() || self.pace.is_some();
        !(unsent_start || unsent_evaluation || unsent_copies || unsent_end || unsent_figures)
    }

    /// The stream broke: what it carried may be lost, and is sent again.
    pub fn requeue(&mut self) {
        if let Some((_, sent)) = &mut self.started {
            *sent = false;
        }
        for (_, sent) in &mut self.evaluations {
            *sent = false;
        }
        if let Some((_, sent)) = &mut self.copied {
            *sent = false;
        }
        if let Some((_, sent)) = &mut self.last {
            *sent = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arcface_proto::v1::TrainingFinished;

    fn metrics(step: u64) -> Report {
        Report::Metrics(StepMetrics {
            step,
            ..Default::default()
        })
    }

    fn evaluation(step: u64) -> Report {
        Report::Evaluation(Evaluation {
            step,
            ..Default::default()
        })
    }

    fn drain(outbox: &mut Outbox) -> Vec<Report> {
        std::iter::from_fn(|| outbox.next()).collect()
    }

    #[test]
    fn the_latest_metrics_win_and_the_end_comes_last() {
        let mut outbox = Outbox::default();
        let end = Report::Finished(TrainingFinished {
            step: 9,
            ..Default::default()
        });
        let start = Report::Started(TrainingStarted::default());
        let pace = |step| {
            Report::Pace(RankPace {
                step,
                ..Default::default()
            })
        };
        for report in [
            end.clone(),
            pace(1),
            metrics(1),
            metrics(2),
            evaluation(2),
            pace(2),
            start.clone(),
        ] {
            outbox.push(report);
        }
        assert!(!outbox.is_empty());
        assert_eq!(
            drain(&mut outbox),
            [start, evaluation(2), metrics(2), pace(2), end]
        );
        assert!(outbox.is_empty());
    }

    #[test]
    fn a_broken_stream_repeats_all_but_old_metrics() {
        let mut outbox = Outbox::default();
        let start = Report::Started(TrainingStarted::default());
        for report in [start.clone(), evaluation(1), metrics(1)] {
            outbox.push(report);
        }
        drain(&mut outbox);
        outbox.requeue();
        outbox.push(evaluation(2));
        assert_eq!(drain(&mut outbox), [start, evaluation(1), evaluation(2)]);
    }

    #[test]
    fn a_coordinator_that_stays_away_costs_bounded_memory() {
        let mut outbox = Outbox::default();
        for step in 0..1000 {
            outbox.push(evaluation(step));
            outbox.push(metrics(step));
        }
        let kept = drain(&mut outbox);
        assert_eq!(kept.len(), EVALUATIONS + 1);
        assert_eq!(kept[EVALUATIONS - 1], evaluation(999));
        assert_eq!(kept[EVALUATIONS], metrics(999));
    }
}

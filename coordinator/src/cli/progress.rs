//! What a followed job looks like: a bar on a terminal, plain lines elsewhere, JSON lines for programs.

use super::{follow, output, say, words};
use arcface_proto::timestamp::to_unix_ms;
use arcface_proto::v1::{self, watch_job_response::Event};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::collections::HashSet;
use std::io::{self, IsTerminal};
use std::time::Duration;

/// Time of the events between two lines of metrics where there is no bar, in milliseconds.
const PLAIN_EVERY_MS: u64 = 5_000;

/// Receives what happens to a followed job.
pub(super) trait View: Send {
    /// An event of the stream.
    ///
    /// # Errors
    /// If standard output cannot be written.
    fn event(&mut self, response: &v1::WatchJobResponse) -> io::Result<()>;

    /// Evaluations from before this stream began, some of them perhaps already seen.
    ///
    /// # Errors
    /// If standard output cannot be written.
    fn missed(&mut self, evaluations: &[v1::Evaluation]) -> io::Result<()>;

    /// Something about the connection.
    fn notice(&mut self, line: &str);

    /// Nothing more will come.
    fn close(&mut self) {}
}

/// Every event as one line of JSON on standard output.
pub(super) struct Events;

impl View for Events {
    fn event(&mut self, response: &v1::WatchJobResponse) -> io::Result<()> {
        follow::event_line(response).map_or(Ok(()), |line| output::print(&line))
    }

    fn missed(&mut self, _evaluations: &[v1::Evaluation]) -> io::Result<()> {
        Ok(())
    }

    fn notice(&mut self, line: &str) {
        say(line);
    }
}

/// Says a line on standard error, above the bar if there is one.
#[derive(Clone)]
pub(super) struct Speaker(Option<ProgressBar>);

impl Speaker {
    pub(super) fn line(&self, line: &str) {
        match &self.0 {
            Some(bar) if !bar.is_finished() => bar.println(line),
            _ => say(line),
        }
    }
}

/// For people, on standard error.
pub(super) struct Progress {
    bar: Option<ProgressBar>,
    state: String,
    /// (generation, completed) of recoveries that were told.
    recoveries: HashSet<(u64, bool)>,
    /// (set, step, generation) of evaluations that were told.
    evaluations: HashSet<(String, u64, u64)>,
    /// When the last plain line of metrics happened, by the coordinator's clock.
    last_plain_ms: Option<u64>,
}

impl Progress {
    /// A bar if standard error is a terminal, else plain lines.
    pub(super) fn new() -> Self {
        let bar = io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
            bar.set_style(waiting());
            bar.set_message("attaching");
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Self {
            bar,
            state: String::new(),
            recoveries: HashSet::new(),
            evaluations: HashSet::new(),
            last_plain_ms: None,
        }
    }

    /// For lines that come from elsewhere.
    pub(super) fn speaker(&self) -> Speaker {
        Speaker(self.bar.clone())
    }

    fn line(&self, line: &str) {
        self.speaker().line(line);
    }

    fn job(&mut self, job: &v1::Job) {
        for recovery in &job.recoveries {
            self.recovery(recovery);
        }
        let state = words::state(job);
        if state != self.state {
            // How it ended is said by whoever asked to follow, and what a recovery is from by the recovery's line.
            let told = job.state() == v1::JobState::Recovering
                && job
                    .recoveries
                    .last()
                    .is_some_and(|recovery| recovery.reason == job.reason);
            if !told && !words::has_ended(job.state()) {
                self.line(&state);
            }
            self.state = state;
        }
        let Some(bar) = &self.bar else { return };
        if job.state() != v1::JobState::Running {
            bar.set_style(waiting());
            bar.set_message(words::job_state(job.state()));
        } else if job.total_steps > 0 {
            bar.set_style(training());
            bar.set_length(job.total_steps);
            bar.set_position(job.step);
        } else {
            bar.set_message("loading data and weights");
        }
    }

    fn metrics(&mut self, metrics: &v1::StepMetrics, at_ms: u64) {
        let figures = words::metrics(metrics);
        if let Some(bar) = &self.bar {
            bar.set_style(training());
            bar.set_length(metrics.total_steps);
            bar.set_position(metrics.step);
            bar.set_message(figures);
            return;
        }
        let last = metrics.step == metrics.total_steps;
        if last
            || self
                .last_plain_ms
                .is_none_or(|before| at_ms >= before.saturating_add(PLAIN_EVERY_MS))
        {
            self.last_plain_ms = Some(at_ms);
            say(&format!(
                "step {:>6}/{}  epoch {}  {figures}",
                metrics.step,
                metrics.total_steps,
                metrics.epoch + 1
            ));
        }
    }

    fn evaluation(&mut self, evaluation: &v1::Evaluation) {
        let key = (evaluation.dataset.clone(), evaluation.step, evaluation.generation);
        if self.evaluations.insert(key) {
            self.line(&words::evaluation(evaluation));
        }
    }

    fn recovery(&mut self, recovery: &v1::Recovery) {
        if self
            .recoveries
            .insert((recovery.from_generation, recovery.total_s.is_some()))
        {
            self.line(&words::recovery(recovery));
        }
    }
}

fn waiting() -> ProgressStyle {
    style("{spinner:.cyan} {wide_msg}")
}

fn training() -> ProgressStyle {
    style("{bar:20.cyan/dim} {pos}/{len}  {wide_msg}")
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("━╸─")
}

impl View for Progress {
    fn event(&mut self, response: &v1::WatchJobResponse) -> io::Result<()> {
        let at_ms = response.at.as_ref().map_or(0, to_unix_ms);
        match &response.event {
            Some(Event::Job(job)) => self.job(job),
            Some(Event::Metrics(metrics)) => self.metrics(metrics, at_ms),
            Some(Event::Evaluation(evaluation)) => self.evaluation(evaluation),
            Some(Event::Checkpoint(v1::CheckpointManifest {
                step,
                damage: Some(damage),
                ..
            })) => self.line(&format!(
                "step {step:>6}  checkpoint is damaged: {}",
                output::clean(&damage.detail)
            )),
            Some(Event::Checkpoint(manifest)) => self.line(&format!(
                "step {:>6}  checkpoint committed, {}",
                manifest.step,
                words::bytes(
                    manifest
                        .parts
                        .iter()
                        .fold(0u64, |sum, part| sum.saturating_add(part.bytes))
                )
            )),
            Some(Event::Recovery(recovery)) => self.recovery(recovery),
            Some(Event::Straggler(straggler)) => self.line(&words::straggler(straggler)),
            Some(Event::Missed(count)) => self.line(&format!("{} not shown", words::count(*count, "event"))),
            None => {}
        }
        Ok(())
    }

    fn missed(&mut self, evaluations: &[v1::Evaluation]) -> io::Result<()> {
        for evaluation in evaluations {
            self.evaluation(evaluation);
        }
        Ok(())
    }

    fn notice(&mut self, line: &str) {
        self.line(line);
    }

    fn close(&mut self) {
        if let Some(bar) = self.bar.take() {
            // What it says last is history; the lines above it stay.
            bar.finish_and_clear();
        }
    }
}

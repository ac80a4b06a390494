//! Follows a job to its end, through restarts of the coordinator, and says how it ended.

use super::connect::{CallError, Coordinator};
use super::output::{self, Output};
use super::progress::{Events, Progress, View};
use super::{Outcome, json, say, words};
use arcface_proto::failure::{ExitCode, Failure};
use arcface_proto::v1::{self, watch_job_response::Event};
use std::time::Duration;
use tokio::time::sleep;

/// First wait before a connection is tried again; it doubles up to [`LONGEST_WAIT`].
const FIRST_WAIT: Duration = Duration::from_millis(200);
/// Longest wait between two tries.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// A job that somebody looks at.
pub(super) struct Attached {
    /// Where it is.
    pub coordinator: Coordinator,
    /// Its whole id.
    pub job_id: String,
    /// How its events are printed.
    pub output: Output,
}

/// The command that attaches to a job again.
pub(super) fn attach_command(job_id: &str, address: &str) -> String {
    format!("arcface-coordinator watch {job_id} --coordinator {address}")
}

/// Follows until the job ends or Ctrl-C detaches.
///
/// # Errors
/// If the coordinator does not know the job, or the job failed or was cancelled.
pub(super) async fn until_end(attached: Attached) -> anyhow::Result<Outcome> {
    let Attached {
        coordinator,
        job_id,
        output,
    } = attached;
    let mut view: Box<dyn View> = match output {
        Output::Table => Box::new(Progress::new()),
        Output::Json => Box::new(Events),
    };
    let ended = tokio::select! {
        ended = follow(&coordinator, &job_id, view.as_mut()) => ended,
        pressed = tokio::signal::ctrl_c() => {
            pressed?;
            view.close();
            say(&format!("detached; the job goes on. attach again with: {}", attach_command(&job_id, &coordinator.addresses())));
            return Ok(Outcome::Interrupted);
        }
    };
    view.close();
    let job = ended?;
    let evaluations = coordinator.evaluations(&job.id).await?;
    let hint = format!(
        "arcface-coordinator job {} --coordinator {}",
        job.id,
        coordinator.addresses()
    );
    conclude(&job, &evaluations, output, hint)
}

/// Says how a job ended: on standard output its last word, the accuracy.
///
/// # Errors
/// A job that failed or was cancelled, with its reason.
pub(super) fn conclude(
    job: &v1::Job,
    evaluations: &[v1::Evaluation],
    output: Output,
    hint: String,
) -> anyhow::Result<Outcome> {
    if job.state() != v1::JobState::Succeeded {
        let message = format!("job {} {}", job.id, words::state(job));
        return Err(Failure::new(ExitCode::Failed, message).hint(hint).into());
    }
    say(&success(job));
    match (output, words::final_accuracy(evaluations)) {
        (Output::Table, Some(accuracy)) => output::print(&format!("final accuracy {accuracy:.4}\n"))?,
        // In JSON the last event was this job already.
        (Output::Table, None) | (Output::Json, _) => {}
    }
    Ok(Outcome::Done)
}

fn success(job: &v1::Job) -> String {
    let took = match (&job.started_at, &job.ended_at) {
        (Some(start), Some(end)) => {
            let seconds = (end.seconds.saturating_sub(start.seconds)) as f64;
            format!(" in {}", words::duration(seconds))
        }
        _ => String::new(),
    };
    let reason = match job.reason.as_str() {
        "" => String::new(),
        reason => format!(", {}", output::clean(reason)),
    };
    format!(
        "job {} succeeded: {}{took}{reason}",
        job.id,
        words::count(job.step, "step")
    )
}

/// Shows every event until the job has ended.
///
/// # Errors
/// What cannot be helped by trying again: a first connection that fails, a job that is not known.
pub(super) async fn follow(
    coordinator: &Coordinator,
    job_id: &str,
    view: &mut dyn View,
) -> anyhow::Result<v1::Job> {
    let mut wait = FIRST_WAIT;
    let mut lost = false;
    let mut attached_before = false;
    loop {
        let cause = match watch(
            coordinator,
            job_id,
            view,
            &mut attached_before,
            &mut lost,
            &mut wait,
        )
        .await
        {
            Ok(Some(job)) => return Ok(job),
            Ok(None) => "it closed the connection".to_owned(),
            Err(error) => match error.downcast::<CallError>() {
                Ok(CallError::Unreachable { cause, .. } | CallError::Unable { cause, .. })
                    if attached_before =>
                {
                    cause
                }
                Ok(error) => return Err(error.into()),
                Err(error) => return Err(error),
            },
        };
        if !lost {
            view.notice(&format!(
                "lost the coordinator at {} ({cause}); the job goes on, trying again",
                coordinator.addresses()
            ));
            lost = true;
        }
        sleep(wait).await;
        wait = (wait * 2).min(LONGEST_WAIT);
    }
}

/// One attachment: the events of one stream. `None` when the stream ends before the job does.
async fn watch(
    coordinator: &Coordinator,
    job_id: &str,
    view: &mut dyn View,
    attached_before: &mut bool,
    lost: &mut bool,
    wait: &mut Duration,
) -> anyhow::Result<Option<v1::Job>> {
    let mut events = coordinator.watch(job_id).await?;
    // After the watch has begun, so that nothing falls between the list and the stream.
    let evaluations = coordinator.evaluations(job_id).await?;
    if std::mem::take(lost) {
        view.notice("found the coordinator again");
    }
    if *attached_before {
        view.missed(&evaluations)?;
    } else {
        let newest: Vec<_> = words::newest_of_each(&evaluations).into_iter().cloned().collect();
        view.missed(&newest)?;
    }
    *attached_before = true;
    while let Some(response) = events.next().await? {
        *wait = FIRST_WAIT;
        view.event(&response)?;
        if let Some(Event::Job(job)) = response.event
            && words::has_ended(job.state())
        {
            return Ok(Some(job));
        }
    }
    Ok(None)
}

/// One line of JSON for an event; `None` for events of a newer version.
pub(super) fn event_line(response: &v1::WatchJobResponse) -> Option<String> {
    json::event(response).map(|value| format!("{value}\n"))
}

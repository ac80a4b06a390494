//! Commands about jobs that exist: `jobs`, `job`, `watch`, `cancel`, `checkpoints`, `evals`.

use super::follow::{self, Attached};
use super::{Format, Outcome, Target, json, output, output::Output, render, say, words};
use arcface_proto::v1::JobState;
use clap::Args;

/// States that `jobs --state` takes.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum StateName {
    Queued,
    Starting,
    Running,
    Recovering,
    Cancelling,
    Succeeded,
    Failed,
    Cancelled,
}

impl StateName {
    fn state(self) -> JobState {
        match self {
            Self::Queued => JobState::Queued,
            Self::Starting => JobState::Starting,
            Self::Running => JobState::Running,
            Self::Recovering => JobState::Recovering,
            Self::Cancelling => JobState::Cancelling,
            Self::Succeeded => JobState::Succeeded,
            Self::Failed => JobState::Failed,
            Self::Cancelled => JobState::Cancelled,
        }
    }
}

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  arcface-coordinator jobs
  arcface-coordinator jobs --state running --state queued --output json")]
pub(super) struct JobsArgs {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    format: Format,
    /// Only jobs in this state; may be given several times
    #[arg(long, value_enum)]
    state: Vec<StateName>,
    /// Most jobs to list
    #[arg(long, value_name = "N", default_value_t = 50)]
    limit: usize,
}

/// A job and where to ask for it.
#[derive(Args, Debug)]
struct OneJob {
    /// Job's id, or the beginning of it
    #[arg(value_name = "ID")]
    id: String,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    format: Format,
}

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  arcface-coordinator job job-0123456789ab --output json | jq .state")]
pub(super) struct JobArgs {
    #[command(flatten)]
    job: OneJob,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  arcface-coordinator watch job-0123456789ab
  arcface-coordinator watch job-01 --output json   # one event a line")]
pub(super) struct WatchArgs {
    #[command(flatten)]
    job: OneJob,
}

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  arcface-coordinator cancel job-0123456789ab --reason \"wrong margin\"")]
pub(super) struct CancelArgs {
    #[command(flatten)]
    job: OneJob,
    /// Why, for whoever looks at the job later
    #[arg(long, default_value = "")]
    reason: String,
}

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  arcface-coordinator checkpoints job-0123456789ab")]
pub(super) struct CheckpointsArgs {
    #[command(flatten)]
    job: OneJob,
}

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  arcface-coordinator evals job-0123456789ab --output json")]
pub(super) struct EvalsArgs {
    #[command(flatten)]
    job: OneJob,
}

pub(super) async fn list(args: JobsArgs) -> anyhow::Result<()> {
    let states: Vec<_> = args.state.iter().map(|name| name.state()).collect();
    let jobs = args.target.connect().await?.jobs(args.limit, &states).await?;
    match args.format.output {
        Output::Table => output::print(&render::jobs(&jobs))?,
        Output::Json => output::print_json(&jobs.iter().map(json::job_summary).collect())?,
    }
    Ok(())
}

pub(super) async fn show(JobArgs { job: args }: JobArgs) -> anyhow::Result<()> {
    let coordinator = args.target.connect().await?;
    let job = coordinator.job(&args.id).await?;
    let evaluations = coordinator.evaluations(&job.id).await?;
    match args.format.output {
        Output::Table => output::print(&render::job(&job, &evaluations))?,
        Output::Json => output::print_json(&json::job(&job, &evaluations))?,
    }
    Ok(())
}

pub(super) async fn watch(WatchArgs { job: args }: WatchArgs) -> anyhow::Result<Outcome> {
    let coordinator = args.target.connect().await?;
    // The full id, so that a beginning cannot become ambiguous while we watch.
    let job_id = coordinator.job(&args.id).await?.id;
    follow::until_end(Attached {
        coordinator,
        job_id,
        output: args.format.output,
    })
    .await
}

pub(super) async fn cancel(CancelArgs { job: args, reason }: CancelArgs) -> anyhow::Result<()> {
    let job = args.target.connect().await?.cancel(&args.id, reason).await?;
    match args.format.output {
        Output::Table => say(&format!("{} is {}", job.id, words::state(&job))),
        Output::Json => output::print_json(&json::job_summary(&job))?,
    }
    Ok(())
}

pub(super) async fn checkpoints(CheckpointsArgs { job: args }: CheckpointsArgs) -> anyhow::Result<()> {
    let coordinator = args.target.connect().await?;
    let job = coordinator.job(&args.id).await?;
    let checkpoints = coordinator.checkpoints(&job.id).await?;
    let location = job.spec.and_then(|spec| spec.checkpoint?.location);
    let location = location.as_deref();
    match args.format.output {
        Output::Table => output::print(&render::checkpoints(&checkpoints, location))?,
        Output::Json => {
            let listed = checkpoints
                .iter()
                .map(|one| json::listed_checkpoint(one, location));
            output::print_json(&listed.collect())?;
        }
    }
    Ok(())
}

pub(super) async fn evals(EvalsArgs { job: args }: EvalsArgs) -> anyhow::Result<()> {
    let evaluations = args.target.connect().await?.evaluations(&args.id).await?;
    match args.format.output {
        Output::Table => output::print(&render::evaluations(&evaluations))?,
        Output::Json => output::print_json(&evaluations.iter().map(json::evaluation).collect())?,
    }
    Ok(())
}

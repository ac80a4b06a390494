//! The command line: what can be typed, which code runs, how it ends. One file for each group of commands; only
//! this module decides on exit codes, only `output` writes to standard output.

mod connect;
mod convert_config;
mod follow;
mod jobs;
mod nodes;
mod output;
mod plan;
mod progress;
mod render;
mod run;
mod serve;
mod submit;
mod words;
mod workers;

use crate::spec::SpecError;
use crate::tls::ClientTls;
use crate::view::json;
use arcface_proto::failure::{self, ExitCode, Failure};
use clap::{Args, CommandFactory, Parser, Subcommand};
use connect::{CallError, Coordinator, parse_address};
use output::Output;
use std::fmt;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

/// Coordinator of an ArcFace cluster, and the commands that drive it.
#[derive(Debug, Parser)]
#[command(
    name = "arcface-coordinator",
    version,
    arg_required_else_help = true,
    max_term_width = 110
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve: keep jobs and nodes, plan ranks, answer gRPC and /metrics
    Serve(serve::ServeArgs),
    /// Train one job on this machine: a coordinator and workers, started and stopped for it
    Run(run::RunArgs),
    /// Submit a job file
    Submit(submit::SubmitArgs),
    /// List jobs, newest first
    Jobs(jobs::JobsArgs),
    /// Show one job
    Job(jobs::JobArgs),
    /// Follow a job until it ends; Ctrl-C detaches, the job goes on
    Watch(jobs::WatchArgs),
    /// End a job
    Cancel(jobs::CancelArgs),
    /// List nodes
    Nodes(nodes::NodesArgs),
    /// Take a node out of use: no new ranks, and those it has move elsewhere
    Drain(nodes::DrainArgs),
    /// List the committed checkpoints of a job, newest first
    Checkpoints(jobs::CheckpointsArgs),
    /// List the evaluations of a job, oldest first
    Evals(jobs::EvalsArgs),
    /// Turn a recipe of arcface_torch (.py) into a job file, without executing it
    ConvertConfig(convert_config::ConvertConfigArgs),
    /// Say what memory a job takes, before it runs, and what would make it fit
    Plan(plan::PlanArgs),
    /// Print shell completions
    Completions(CompletionsArgs),
}

/// Which coordinator to ask.
#[derive(Args, Debug)]
struct Target {
    /// Address of the coordinator, or of several: the one that leads is found
    #[arg(
        long,
        value_name = "HOST:PORT",
        env = "ARCFACE_COORDINATOR",
        default_value = "127.0.0.1:1234"
    )]
    #[arg(value_parser = parse_address, value_delimiter = ',')]
    coordinator: Vec<String>,
    #[command(flatten)]
    tls: ClientTls,
}

impl Target {
    async fn connect(&self) -> anyhow::Result<Coordinator> {
        Ok(Coordinator::connect(&self.coordinator, self.tls.config()?).await?)
    }
}

/// How to print what was asked for.
#[derive(Args, Debug)]
struct Format {
    /// Print columns for people or JSON for programs
    #[arg(long, short, value_enum, default_value_t)]
    output: Output,
}

#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  arcface-coordinator completions bash > ~/.local/share/bash-completion/completions/arcface-coordinator"
)]
struct CompletionsArgs {
    /// Shell to complete for
    #[arg(value_enum)]
    shell: clap_complete::Shell,
}

/// How a command ended that did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// Did what was asked.
    Done,
    /// Ctrl-C while following a job that goes on, or while running one that was stopped.
    Interrupted,
}

/// Several failures at once, each on its line: the fields of a bad job file.
#[derive(Debug)]
struct Complaints(Vec<Failure>);

impl fmt::Display for Complaints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, failure) in self.0.iter().enumerate() {
            write!(f, "{}{failure}", if i == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}

impl std::error::Error for Complaints {}

impl Complaints {
    /// What is wrong with a job file.
    fn of_job_file(path: &Path, error: SpecError) -> Self {
        let usage = |text: &dyn fmt::Display| {
            Failure::new(ExitCode::Usage, format!("job {}: {text}", path.display()))
        };
        match error {
            SpecError::Fields(violations) => Self(
                violations
                    .iter()
                    .map(|v| usage(v).hint(v.hint.as_str()))
                    .collect(),
            ),
            SpecError::Override { .. } => Self(vec![
                Failure::new(ExitCode::Usage, error.to_string()).hint("as in --set head.sample_rate=0.1"),
            ]),
            SpecError::Syntax { .. } => {
                Self(vec![usage(&error).hint(
                    "the file is TOML: sections in [brackets], key = value, strings in quotes",
                )])
            }
        }
    }
}

/// Runs the command line of this process.
pub fn main() -> std::process::ExitCode {
    let cli = Cli::parse();
    match start(cli.command) {
        Ok(Outcome::Done) => std::process::ExitCode::SUCCESS,
        Ok(Outcome::Interrupted) => exit(ExitCode::Detached),
        Err(error) if output::reader_is_gone(&error) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            let (text, code) = report(&error);
            say(&text);
            exit(code)
        }
    }
}

fn exit(code: ExitCode) -> std::process::ExitCode {
    std::process::ExitCode::from(code as u8)
}

fn start(command: Command) -> anyhow::Result<Outcome> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let outcome = runtime.block_on(dispatch(command));
    runtime.shutdown_timeout(Duration::from_secs(2));
    outcome
}

async fn dispatch(command: Command) -> anyhow::Result<Outcome> {
    match command {
        Command::Serve(args) => serve::run(args).await?,
        Command::Run(args) => return run::run(args).await,
        Command::Submit(args) => return submit::run(args).await,
        Command::Watch(args) => return jobs::watch(args).await,
        Command::Jobs(args) => jobs::list(args).await?,
        Command::Job(args) => jobs::show(args).await?,
        Command::Cancel(args) => jobs::cancel(args).await?,
        Command::Checkpoints(args) => jobs::checkpoints(args).await?,
        Command::Evals(args) => jobs::evals(args).await?,
        Command::Nodes(args) => nodes::list(args).await?,
        Command::Drain(args) => nodes::drain(args).await?,
        Command::ConvertConfig(args) => convert_config::run(&args)?,
        Command::Plan(args) => plan::run(&args)?,
        Command::Completions(args) => {
            let mut script = Vec::new();
            clap_complete::generate(
                args.shell,
                &mut Cli::command(),
                "arcface-coordinator",
                &mut script,
            );
            output::print(&String::from_utf8_lossy(&script))?;
        }
    }
    Ok(Outcome::Done)
}

/// Text for standard error and the exit code.
fn report(error: &anyhow::Error) -> (String, ExitCode) {
    let failures = match (
        error.downcast_ref::<CallError>(),
        error.downcast_ref::<Complaints>(),
    ) {
        (Some(call), _) => call.failures(),
        (None, Some(complaints)) => complaints.0.iter().map(copy).collect(),
        (None, None) => return failure::report(error.as_ref()),
    };
    let code = failures.first().map_or(ExitCode::Failed, |failure| failure.code);
    let lines: Vec<_> = failures
        .iter()
        .map(|failure| failure::report(failure).0)
        .collect();
    (lines.join("\n"), code)
}

fn copy(failure: &Failure) -> Failure {
    Failure::new(failure.code, failure.message.as_str()).hint(failure.hint.as_str())
}

/// Says something to a person. That nobody listens is no reason to fail.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_an_example() {
        for command in Cli::command().get_subcommands() {
            let help = command
                .get_after_help()
                .map(ToString::to_string)
                .unwrap_or_default();
            assert!(
                help.contains("arcface-coordinator "),
                "{} has no example",
                command.get_name()
            );
        }
    }
}

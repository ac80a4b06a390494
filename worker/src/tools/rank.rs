//! `arcface-worker rank`: one training process. The agent starts it; people do not.

use crate::channel::ClientTls;
use crate::progress::Board;
use anyhow::Context;
use arcface_proto::failure::{ExitCode, Failure};
use arcface_proto::v1::RankAssignment;
use arcface_traces::Otlp;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::getppid;
use std::io::Read;

/// Longest assignment that is read: a manifest of thousands of parts fits ten times.
const LONGEST_ASSIGNMENT: u64 = 64 << 20;

/// Arguments of `rank`.
#[derive(clap::Args, Debug)]
pub struct RankArgs {
    /// Process id of the agent; the rank ends with it.
    #[arg(long, value_name = "PID")]
    parent_pid: Option<i32>,
    /// Standard output is the memory where the agent reads our progress.
    #[arg(long)]
    progress: bool,
    #[command(flatten)]
    tls: ClientTls,
    #[command(flatten)]
    otlp: Otlp,
}

/// Runs `rank`: the assignment comes as JSON on standard input.
pub fn run(args: RankArgs) -> anyhow::Result<()> {
    if let Some(parent) = args.parent_pid {
        end_with_parent(parent, Signal::SIGKILL)?;
    }
    let board = match args.progress {
        true => Board::on_standard_output().context("show progress to the agent")?,
        false => Board::unread(),
    };
    let mut text = String::new();
    std::io::stdin()
        .take(LONGEST_ASSIGNMENT)
        .read_to_string(&mut text)
        .context("read the assignment from standard input")?;
    let assignment: RankAssignment = serde_json::from_str(&text).map_err(|error| {
        Failure::new(
            ExitCode::Usage,
            format!("standard input is not a rank assignment: {error}"),
        )
        .hint("the agent starts ranks by itself: arcface-worker --join HOST:PORT")
    })?;
    let _traces = args.otlp.start("arcface-rank")?;
    crate::rank::run(assignment, args.tls, &board)
}

/// Asks the kernel for a signal when the process that started this one ends, so that no rank is left behind on its device.
///
/// # Errors
/// If that process is gone already.
pub fn end_with_parent(parent: i32, signal: Signal) -> anyhow::Result<()> {
    set_pdeathsig(signal).context("tie this process to its parent")?;
    // It may have died before the line above took effect.
    if getppid().as_raw() != parent {
        anyhow::bail!("the parent (process {parent}) is gone");
    }
    Ok(())
}

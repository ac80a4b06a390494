//! `nodes` and `drain`.

use super::{Format, Target, json, output, output::Output, render, say, words};
use clap::Args;

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  arcface-coordinator nodes --output json")]
pub(super) struct NodesArgs {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    format: Format,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  arcface-coordinator drain node-3          # before maintenance
  arcface-coordinator drain node-3 --undo   # after it")]
pub(super) struct DrainArgs {
    /// Node's id, as `nodes` lists it
    node: String,
    /// Give it ranks again
    #[arg(long)]
    undo: bool,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    format: Format,
}

pub(super) async fn list(args: NodesArgs) -> anyhow::Result<()> {
    let nodes = args.target.connect().await?.nodes().await?;
    match args.format.output {
        Output::Table => output::print(&render::nodes(&nodes))?,
        Output::Json => output::print_json(&nodes.iter().map(json::node).collect())?,
    }
    Ok(())
}

pub(super) async fn drain(args: DrainArgs) -> anyhow::Result<()> {
    let node = args.target.connect().await?.drain(args.node, args.undo).await?;
    match args.format.output {
        Output::Table => say(&format!(
            "{} is {}, {} on it",
            output::clean(&node.id),
            words::node_state(node.state()),
            words::count(node.ranks.len() as u64, "rank"),
        )),
        Output::Json => output::print_json(&json::node(&node))?,
    }
    Ok(())
}

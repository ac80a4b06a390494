//! `arcface-worker rank`.

/// Arguments of `rank`.
#[derive(clap::Args, Debug)]
pub struct RankArgs {}

/// Runs `rank`.
pub fn run(_args: RankArgs) -> anyhow::Result<()> {
    anyhow::bail!("rank is being built")
}

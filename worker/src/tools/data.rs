//! `arcface-worker data`.

/// Arguments of `data`.
#[derive(clap::Args, Debug)]
pub struct DataArgs {}

/// Runs `data`.
pub fn run(_args: DataArgs) -> anyhow::Result<()> {
    anyhow::bail!("data is being built")
}

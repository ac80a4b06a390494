//! `arcface-worker bench`.

/// Arguments of `bench`.
#[derive(clap::Args, Debug)]
pub struct BenchArgs {}

/// Runs `bench`.
pub fn run(_args: BenchArgs) -> anyhow::Result<()> {
    anyhow::bail!("bench is being built")
}

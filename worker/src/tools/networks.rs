//! `arcface-worker networks`.

/// Arguments of `networks`.
#[derive(clap::Args, Debug)]
pub struct NetworksArgs {}

/// Runs `networks`.
pub fn run(_args: NetworksArgs) -> anyhow::Result<()> {
    anyhow::bail!("networks is being built")
}

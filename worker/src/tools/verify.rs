//! `arcface-worker verify`.

/// Arguments of `verify`.
#[derive(clap::Args, Debug)]
pub struct VerifyArgs {}

/// Runs `verify`.
pub fn run(_args: VerifyArgs) -> anyhow::Result<()> {
    anyhow::bail!("verify is being built")
}

//! `arcface-worker export`.

/// Arguments of `export`.
#[derive(clap::Args, Debug)]
pub struct ExportArgs {}

/// Runs `export`.
pub fn run(_args: ExportArgs) -> anyhow::Result<()> {
    anyhow::bail!("export is being built")
}

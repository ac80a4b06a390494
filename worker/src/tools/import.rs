//! `arcface-worker import`.

/// Arguments of `import`.
#[derive(clap::Args, Debug)]
pub struct ImportArgs {}

/// Runs `import`.
pub fn run(_args: ImportArgs) -> anyhow::Result<()> {
    anyhow::bail!("import is being built")
}

//! `arcface-worker infer`.

/// Arguments of `infer`.
#[derive(clap::Args, Debug)]
pub struct InferArgs {}

/// Runs `infer`.
pub fn run(_args: InferArgs) -> anyhow::Result<()> {
    anyhow::bail!("infer is being built")
}

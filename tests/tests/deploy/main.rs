//! What lies in `deploy/` fits the programs and holds what docs/deployment.md says of it. Facts that break silently are
//! read from the files; the tools that these files are for look at them where `scripts/setup.sh deploy` has fetched them.
//! No image is built here and nothing is deployed: there is no Docker daemon, Kubernetes or Slurm to do it with.

mod chart;
mod compose;
mod flags;
mod images;
mod slurm;
mod tools;
mod units;

use anyhow::{Context, Result};
use arcface_tests::workspace;
use std::fs;

/// The version that images, chart and compose file carry.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Time that a worker takes for `--leave` and for ending its ranks, in seconds. Whoever stops it must wait longer.
const LEAVE_S: u64 = 20 + 10;

/// A file of the source tree.
fn read(path: &str) -> Result<String> {
    fs::read_to_string(workspace().join(path)).with_context(|| format!("read {path}"))
}

//! Starts the real binaries in scratch directories, waits for states with deadlines, prints every log on failure.
//!
//! A test is a closure that gets a [`Cluster`] and returns a result; [`Cluster::run`] starts the coordinator and the
//! workers, prints what every process wrote if the closure fails or panics, and kills whatever is left. Nothing here
//! sleeps to synchronise: [`wait::until`] polls a state and gives up at a deadline.
//!
//! The harness talks to the product the way a person does, through its command line and its files.

mod browser;
mod certificates;
mod cluster;
mod etcd;
pub mod http;
mod network;
mod process;
mod prometheus;
mod s3;
pub mod shipped;
mod synthetic;
pub mod wait;

pub use browser::Browser;
pub use certificates::Certificates;
pub use cluster::{Cluster, Options};
pub use etcd::{Etcd, free_port};
pub use network::Network;
pub use process::{Finished, Process, binary, command, living_in};
pub use prometheus::Prometheus;
pub use s3::S3;
pub use synthetic::{JobFile, write_identities};

use std::path::{Path, PathBuf};

/// Root of the source tree.
pub fn workspace() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests).to_path_buf()
}

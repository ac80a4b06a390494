//! A folder of a benchmark's files that goes when the benchmark does: at its end, after an error, and on Ctrl-C or SIGTERM,
//! which would leave gigabytes behind.

use anyhow::Context;
use nix::sys::signal::{SigSet, Signal, raise};
use std::{
    fs,
    path::{Path, PathBuf},
    thread,
};

/// A new folder, removed at the end.
pub(super) struct Scratch(PathBuf);

impl Scratch {
    /// Makes a hidden folder in `parent`, named after what it is for. Threads that are to be ended by signals must not run yet: from
    /// now on signals go to a thread that removes the folder first.
    pub(super) fn new(parent: &Path, purpose: &str) -> anyhow::Result<Self> {
        let path = parent.join(format!(".bench-{purpose}.{}", std::process::id()));
        remove_when_told_to_end(path.clone())?;
        fs::create_dir(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(Self(path))
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed stays in sight of the user, who chose the place.
        fs::remove_dir_all(&self.0).unwrap_or_default();
    }
}

/// Starts the thread that waits for the signals. It is not awaited: it ends the process, or ends with it.
fn remove_when_told_to_end(path: PathBuf) -> anyhow::Result<()> {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
    // Threads that begin later inherit it.
    signals.thread_block().context("hold signals back")?;
    thread::Builder::new()
        .name("scratch".into())
        .spawn(move || {
            let Ok(signal) = signals.wait() else {
                return;
            };
            // What is written meanwhile may make one attempt fail; none has to succeed.
            for _ in 0..100 {
                if fs::remove_dir_all(&path).is_ok() || !path.exists() {
                    break;
                }
            }
            // Without us in between it ends the process, as its parent expects to see.
            if signals.thread_unblock().is_ok() {
                raise(signal).unwrap_or_default();
            }
        })
        .context("start a thread")?;
    Ok(())
}

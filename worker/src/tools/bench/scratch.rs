//! A folder of a benchmark's files that goes when the benchmark does: at its end, after an error, and on Ctrl-C or SIGTERM,
//! which would leave gigabytes behind.

use anyhow::Context;
use nix::sys::signal::{SigSet, Signal, raise};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

/// A new folder, removed at the end.
pub(super) struct Scratch {
    path: PathBuf,
    /// A signal came, and is about to end the process.
    ends: Arc<AtomicBool>,
}

impl Scratch {
    /// Makes a hidden folder in `parent`, named after what it is for. Threads that are to be ended by signals must not run yet: from
    /// now on signals go to a thread that removes the folder first.
    pub(super) fn new(parent: &Path, purpose: &str) -> anyhow::Result<Self> {
        let path = parent.join(format!(".bench-{purpose}.{}", std::process::id()));
        let ends = Arc::default();
        remove_when_told_to_end(path.clone(), Arc::clone(&ends))?;
        fs::create_dir(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(Self { path, ends })
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // A benchmark whose folder was taken away fails, and would tell that before the signal ends it.
        while self.ends.load(Ordering::SeqCst) {
            thread::park();
        }
        // What cannot be removed stays in sight of the user, who chose the place.
        fs::remove_dir_all(&self.path).unwrap_or_default();
    }
}

/// Starts the thread that waits for the signals. It is not awaited: it ends the process, or ends with it.
fn remove_when_told_to_end(path: PathBuf, ends: Arc<AtomicBool>) -> anyhow::Result<()> {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
    // Threads that begin later inherit it.
    signals.thread_block().context("hold signals back")?;
    thread::Builder::new()
        .name("scratch".into())
        .spawn(move || {
            let Ok(signal) = signals.wait() else {
                return;
            };
            ends.store(true, Ordering::SeqCst);
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
            // It did not: whoever waits in `drop` must not wait for ever.
            #[expect(
                clippy::disallowed_methods,
                reason = "a signal ends the process, whatever its disposition; nothing of this thread is left to be written"
            )]
            std::process::exit(128 + signal as i32);
        })
        .context("start a thread")?;
    Ok(())
}

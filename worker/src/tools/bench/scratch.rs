//! A folder of a benchmark's files that goes when the benchmark does: at its end, after an error, and on Ctrl-C or SIGTERM,
//! which would leave gigabytes behind.

use anyhow::Context;
use nix::sys::signal::{SigSet, Signal, raise};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    thread,
};

/// A new folder, removed at the end.
pub(super) struct Scratch {
    path: PathBuf,
    /// Held by who removes the folder: after a signal until that has ended the process.
    end: Arc<Mutex<()>>,
}

impl Scratch {
    /// Makes a hidden folder in `parent`, named after what it is for. Threads that are to be ended by signals must not run yet: from
    /// now on signals go to a thread that removes the folder first.
    pub(super) fn new(parent: &Path, purpose: &str) -> anyhow::Result<Self> {
        let path = parent.join(format!(".bench-{purpose}.{}", std::process::id()));
        let end = Arc::default();
        remove_when_told_to_end(path.clone(), Arc::clone(&end))?;
        fs::create_dir(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(Self { path, end })
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // A benchmark whose folder was taken away fails, and would tell that before the signal ends it: it waits here.
        let _turn = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        // What cannot be removed stays in sight of the user, who chose the place.
        fs::remove_dir_all(&self.path).unwrap_or_default();
    }
}

/// Starts the thread that waits for the signals. It is not awaited: it ends the process, or ends with it.
fn remove_when_told_to_end(path: PathBuf, end: Arc<Mutex<()>>) -> anyhow::Result<()> {
    let all = [Signal::SIGINT, Signal::SIGTERM].into_iter();
    let signals = SigSet::from_iter(all.filter(|signal| !is_ignored(*signal)));
    // Threads that begin later inherit it.
    signals.thread_block().context("hold signals back")?;
    thread::Builder::new()
        .name("scratch".into())
        .spawn(move || {
            let Ok(signal) = signals.wait() else {
                return;
            };
            let _turn = end.lock().unwrap_or_else(PoisonError::into_inner);
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

/// True of a signal that the program was started to ignore, as what runs in the background of a script is: it stays without effect.
fn is_ignored(signal: Signal) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal as u32 - 1) & 1 == 1)
}

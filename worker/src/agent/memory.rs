//! The folder in this node's memory (tmpfs) in which ranks keep copies of their own and their buddies' state: one folder a
//! job, which outlives the ranks and ends with the agent. An agent that was killed cannot remove its folder; the next one on
//! the machine does, since nobody holds its lock any more.

use anyhow::Context;
use arcface_proto::types::{JobId, NodeId};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use tracing::{info, warn};

const LOCK: &str = ".lock";

/// One agent's folder, locked while it lives.
#[derive(Debug)]
pub struct MemoryRoot {
    path: PathBuf,
    _lock: File,
}

impl MemoryRoot {
    /// Makes the folder of `node` below `parent`, empty, and removes those of agents that are no more.
    ///
    /// # Errors
    /// If another agent of the same node id lives here, or what the system says.
    pub fn open(parent: &Path, node: &NodeId) -> anyhow::Result<Self> {
        let all = parent.join(format!("arcface-{}", nix::unistd::getuid()));
        let path = all.join(format!("node-{node}"));
        let failed = || format!("--memory-root: cannot make {}", path.display());
        fs::create_dir_all(&all).with_context(failed)?;
        // Held until the folder has its own lock: nobody takes it for one that was left.
        let starting = File::create(all.join(LOCK)).with_context(failed)?;
        starting.lock().with_context(failed)?;
        for left in fs::read_dir(&all).into_iter().flatten().flatten() {
            let folder = left.path();
            if folder.is_dir() && lock(&folder).is_some() {
                info!("removing {}: its agent is gone", folder.display());
                if let Err(error) = fs::remove_dir_all(&folder) {
                    warn!("{}: {error}", folder.display());
                }
            }
        }
        fs::create_dir_all(&path).with_context(failed)?;
        let lock = lock(&path).with_context(|| {
            format!(
                "--memory-root: another worker with node id {node} uses {}",
                path.display()
            )
        })?;
        Ok(Self { path, _lock: lock })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Jobs with copies in it.
    pub fn jobs(&self) -> Vec<JobId> {
        let folders = fs::read_dir(&self.path).into_iter().flatten().flatten();
        folders
            .filter_map(|folder| folder.file_name().to_str()?.parse().ok())
            .collect()
    }

    /// Removes the copies of a job.
    pub fn forget(&self, job: &JobId) {
        let folder = self.path.join(job.as_str());
        match fs::remove_dir_all(&folder) {
            Ok(()) => info!(%job, "copies in memory were removed: the job has ended"),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => warn!(%job, "copies in memory stay: {error}"),
        }
    }
}

impl Drop for MemoryRoot {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            warn!("{}: {error}", self.path.display());
        }
    }
}

/// A folder's lock, unless somebody has it. The system takes it from a process that ends, however it ends.
fn lock(folder: &Path) -> Option<File> {
    let file = File::create(folder.join(LOCK)).ok()?;
    file.try_lock().ok().map(|()| file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str) -> NodeId {
        name.parse().expect("a node id")
    }

    #[test]
    fn what_a_killed_agent_left_goes_and_what_a_living_one_has_stays() {
        let scratch = tempfile::tempdir().expect("scratch");
        let living = MemoryRoot::open(scratch.path(), &node("a")).expect("open");
        fs::create_dir_all(living.path().join("job-000000000001")).expect("copies");
        let killed = MemoryRoot::open(scratch.path(), &node("b")).expect("open");
        let left = killed.path().to_owned();
        // Its lock goes with its process; its folder stays.
        let MemoryRoot { path: _, _lock: held } = &killed;
        held.unlock().expect("unlock");
        std::mem::forget(killed);
        let next = MemoryRoot::open(scratch.path(), &node("c")).expect("open");
        assert!(!left.exists(), "left by a killed agent");
        assert_eq!(living.jobs(), ["job-000000000001".parse().expect("a job id")]);
        living.forget(&"job-000000000001".parse().expect("a job id"));
        assert!(living.jobs().is_empty());
        let path = next.path().to_owned();
        drop(next);
        assert!(!path.exists() && living.path().exists());
    }

    #[test]
    fn one_node_id_has_one_agent() {
        let scratch = tempfile::tempdir().expect("scratch");
        let _first = MemoryRoot::open(scratch.path(), &node("a")).expect("open");
        let second = MemoryRoot::open(scratch.path(), &node("a")).expect_err("taken");
        assert!(
            second.to_string().contains("another worker with node id a"),
            "{second:#}"
        );
    }
}

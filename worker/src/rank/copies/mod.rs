//! Copies of this rank's state in memory: on its own node and on another one (its buddy's), so that the loss of a node costs
//! some steps and no read from storage. The training thread makes one copy, as for a checkpoint; a thread of its own turns
//! that into parts, in the format of checkpoints, in a folder of the node's memory (tmpfs) that outlives the rank, sends them
//! to the buddy, and says where they are. What a new generation does with them is `gather`'s matter.

mod gather;
mod memory;

pub use gather::gather;
pub use memory::Memory;

use super::checkpoints::{Room, Snapshot, name};
use crate::checkpoint::write;
use crate::collective::Session;
use crate::collective::parts::{self, PartsServer};
use arcface_proto::v1::PartsCopied;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use tracing::{info, warn};

/// The rank whose node keeps copies for `rank`, where `nodes` has the node of every rank: on the next node, in the order in
/// which nodes first appear, the one with the same place among its ranks. None if all ranks are on one node.
pub fn buddy(rank: usize, nodes: &[String]) -> Option<usize> {
    let mut order: Vec<&String> = Vec::new();
    for node in nodes {
        if !order.contains(&node) {
            order.push(node);
        }
    }
    let own = nodes.get(rank)?;
    let next = order[(order.iter().position(|node| *node == own)? + 1) % order.len()];
    let place = nodes[..rank].iter().filter(|node| *node == own).count();
    let there: Vec<usize> = (0..nodes.len()).filter(|&other| nodes[other] == *next).collect();
    (next != own).then(|| there[place % there.len()])
}

/// Steps between copies, so that what is lost stays at or under `buddy_steps`: the newest set may still be on its way.
pub fn interval(buddy_steps: u64) -> u64 {
    (buddy_steps / 2).max(1)
}

/// Where a rank's copies go.
pub struct Destination {
    /// The job's folder in this node's memory.
    pub home: PathBuf,
    /// This node.
    pub node: String,
    /// The buddy's node, and where it takes parts.
    pub buddy: (String, String),
    /// What the buddy is told of us.
    pub session: Session,
    /// Takes the copies of others, as long as ours are made.
    pub server: PartsServer,
}

/// A copy for the thread.
struct Copy {
    snapshot: Snapshot,
    /// Folders that may go before it is written.
    keep: Vec<String>,
}

/// Makes copies every so many steps, on a thread of its own. When it is dropped, the thread is left to end by itself: it may be
/// sending to a node that does not answer, and a rank that has failed must say so at once.
pub struct Copier {
    interval: u64,
    generation: u64,
    copies: SyncSender<Box<Copy>>,
    returned: Receiver<Room>,
    room: Option<Room>,
    failed: Arc<AtomicBool>,
    /// The newest set that all ranks have made, or that this generation resumed from; and the one after it.
    whole: Option<String>,
    newest: Option<String>,
    late: bool,
}

impl Copier {
    /// Starts the thread. `resumed` is the folder that this generation has resumed from; `say` is told of parts that are where
    /// they belong.
    pub fn start(
        buddy_steps: u64,
        generation: u64,
        destination: Destination,
        resumed: Option<String>,
        say: impl Fn(PartsCopied) + Send + 'static,
    ) -> Self {
        let (copies, receiver) = sync_channel::<Box<Copy>>(1);
        let (give_back, returned) = sync_channel(1);
        let failed = Arc::new(AtomicBool::new(false));
        let outcome = failed.clone();
        std::thread::spawn(move || {
            for copy in receiver {
                remove_others(&destination.home, &copy.keep);
                let done = make(&destination, generation, &copy.snapshot);
                outcome.store(done.is_err(), Ordering::SeqCst);
                match done {
                    Ok(copied) => say(copied),
                    Err(error) => warn!(
                        step = copy.snapshot.state.step,
                        "no copy in memory, training goes on: {error}"
                    ),
                }
                let room = copy.snapshot.parts.into_iter().map(|(_, tensors)| tensors);
                // The training thread is at its end if it is not taken back.
                drop(give_back.try_send(room.collect()));
            }
        });
        Self {
            interval: interval(buddy_steps),
            generation,
            copies,
            returned,
            room: Some(Room::new()),
            failed,
            whole: resumed,
            newest: None,
            late: false,
        }
    }

    /// True if a copy is wanted after `done` steps.
    pub fn is_due(&self, done: u64) -> bool {
        done.is_multiple_of(self.interval)
    }

    /// True while the last copy is on its way.
    pub fn is_busy(&mut self) -> bool {
        if self.room.is_none() {
            self.room = match self.returned.try_recv() {
                Ok(room) => Some(room),
                Err(TryRecvError::Empty) => None,
                // Without the thread nothing is copied, and [`Copier::copy`] says so.
                Err(TryRecvError::Disconnected) => Some(Room::new()),
            };
        }
        self.room.is_none()
    }

    /// True if the last copy did not get where it belongs.
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::SeqCst)
    }

    /// The memory for the next copy; only when not busy.
    pub fn room(&mut self) -> Room {
        self.room.take().unwrap_or_default()
    }

    /// A copy is due, and a rank is still busy with the one before.
    pub fn waits(&mut self, step: u64) {
        if !std::mem::replace(&mut self.late, true) {
            warn!(
                step,
                "copies in memory take longer than {} steps: the loss of a node may cost more than checkpoint.buddy_steps",
                self.interval
            );
        }
    }

    /// Has a copy made. `last_is_whole`: every rank has made the last one.
    pub fn copy(&mut self, snapshot: Snapshot, last_is_whole: bool) {
        let newest = name(snapshot.state.step, self.generation);
        let last = self.newest.replace(newest.clone());
        if last_is_whole && last.is_some() {
            self.whole = last;
        }
        let keep = self.whole.iter().cloned().chain([newest]).collect();
        let copy = Box::new(Copy { snapshot, keep });
        if self.copies.send(copy).is_err() {
            warn!("the thread that makes copies in memory is gone: no more of them");
        }
    }
}

/// Writes a rank's parts into this node's memory and sends them to the buddy.
fn make(to: &Destination, generation: u64, snapshot: &Snapshot) -> Result<PartsCopied, String> {
    let directory = name(snapshot.state.step, generation);
    let folder = to.home.join(&directory);
    let mut parts = Vec::new();
    for (kind, tensors) in &snapshot.parts {
        let part = write::write_part(&folder, *kind, tensors).map_err(|error| error.to_string())?;
        let (node, endpoint) = &to.buddy;
        let file = format!("{directory}/{}", part.file);
        parts::put(endpoint, &to.session, &file, &folder.join(&part.file))
            .map_err(|error| format!("{} to {node} at {endpoint}: {error}", part.file))?;
        parts.push(part);
    }
    Ok(PartsCopied {
        parts: Some(snapshot.announce(directory, parts)),
        nodes: vec![to.node.clone(), to.buddy.0.clone()],
    })
}

/// Removes all folders of a job but those named. Ranks of one node share them: what another has removed is no error.
fn remove_others(home: &Path, keep: &[String]) {
    let folders = std::fs::read_dir(home).into_iter().flatten().flatten();
    for folder in folders {
        let name = folder.file_name();
        if !keep.iter().any(|kept| name == kept.as_str())
            && let Err(error) = std::fs::remove_dir_all(folder.path())
            && error.kind() != std::io::ErrorKind::NotFound
        {
            info!("old copies stay in memory: {}: {error}", folder.path().display());
        }
    }
}

#[cfg(test)]
mod tests;

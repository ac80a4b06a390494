//! The thread that writes a rank's checkpoints, and what rank 0 does on it once one was committed: the manifest beside the parts,
//! and the removal of what is not kept.

use super::{Room, Snapshot, directory, named};
use crate::checkpoint::{CheckpointError, Location};
use arcface_proto::v1::{CheckpointCommitted, CheckpointManifest, CommitCheckpointRequest};
use std::{
    cell::RefCell,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};
use tracing::{info, warn};

/// Copies in memory at once: one being written, one waiting. A third checkpoint waits until one of them is on the disk,
/// while training goes on. Their memory is used again and again: fresh pages would cost more than the copying.
const COPIES: usize = 2;
/// Commits that wait for the thread beside them; there is at most one a copy and those of before.
const WAITING_COMMITS: usize = 16;
/// Who waits for the thread looks so often whether it still moves.
const LOOK: Duration = Duration::from_secs(1);

enum Job {
    Write(Box<Snapshot>),
    Committed(Box<CheckpointCommitted>),
}

/// What went wrong with checkpoints so far. Clones count together.
#[derive(Clone, Debug, Default)]
pub struct Failures(Arc<[AtomicU64; 3]>);

/// What can go wrong: writing the parts, putting the manifest beside them, removing what is not kept.
#[derive(Clone, Copy)]
enum Stage {
    Write,
    Manifest,
    Remove,
}

impl Failures {
    fn count(&self, stage: Stage) {
        self.0[stage as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// How many, by stage.
    pub fn read(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let counts = self.0.iter().map(|count| count.load(Ordering::Relaxed));
        ["write", "manifest", "remove"].into_iter().zip(counts)
    }
}

/// The thread that writes.
pub struct Writer {
    location: Location,
    failures: Failures,
    jobs: Option<SyncSender<Job>>,
    /// Memory that the thread has written out.
    returned: Receiver<Room>,
    /// What has come back of it.
    room: RefCell<Vec<Room>>,
    /// Counts what the thread does, by chunks of bytes.
    moved: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    /// Starts it for a location and this generation. `commit` is told of parts that are durable.
    pub fn start(
        location: Location,
        generation: u64,
        commit: impl Fn(CommitCheckpointRequest) + Send + 'static,
    ) -> Self {
        let (jobs, receiver) = sync_channel(COPIES + WAITING_COMMITS);
        let (give_back, returned) = sync_channel(COPIES);
        for _ in 0..COPIES {
            // As many as the channel holds.
            drop(give_back.try_send(Room::new()));
        }
        let place = location.clone();
        let failures = Failures::default();
        let failed = failures.clone();
        let moved = Arc::new(AtomicU64::new(0));
        let moves = Arc::clone(&moved);
        let thread = std::thread::spawn(move || {
            let mut written = Written {
                generation,
                failures: failed,
                is_made: false,
                given_up: None,
                alive: &|| _ = moves.fetch_add(1, Ordering::Relaxed),
            };
            for job in receiver {
                match job {
                    Job::Write(snapshot) => {
                        written.write(&place, &snapshot, &commit);
                        let room = snapshot.parts.into_iter().map(|(_, tensors)| tensors);
                        // The training thread is at its end if it is not taken back.
                        drop(give_back.try_send(room.collect()));
                    }
                    Job::Committed(committed) => {
                        settle(&place, &committed, &written.failures);
                        written.sweep(&place, &committed);
                    }
                }
            }
        });
        Self {
            location,
            failures,
            jobs: Some(jobs),
            returned,
            room: RefCell::default(),
            moved,
            thread: Some(thread),
        }
    }

    /// What went wrong so far.
    pub fn failures(&self) -> &Failures {
        &self.failures
    }

    /// True while there is no room for another copy. Room does not go away but by [`Writer::room`].
    pub fn is_busy(&self) -> bool {
        let mut room = self.room.borrow_mut();
        loop {
            match self.returned.try_recv() {
                Ok(returned) => room.push(returned),
                Err(TryRecvError::Empty) => return room.is_empty(),
                // Without the thread nothing is written, and [`Writer::write`] says so.
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// The memory for a copy; waits for it while the writer is busy, and calls `alive` as long as that moves. Memory that has been
    /// used before comes first: where no two checkpoints overlap, there is never more than one copy.
    pub fn room(&self, alive: &dyn Fn()) -> Room {
        if self.is_busy() {
            return self.next_room(alive).unwrap_or_default();
        }
        let mut room = self.room.borrow_mut();
        room.sort_by_key(Vec::len);
        room.pop().unwrap_or_default()
    }

    /// Writes the parts and asks for their commit.
    pub fn write(&self, snapshot: Snapshot) {
        self.send(Job::Write(Box::new(snapshot)));
    }

    /// A checkpoint was committed: its manifest is put beside the parts, expired ones are removed. For rank 0 alone.
    pub fn committed(&self, committed: CheckpointCommitted) {
        self.send(Job::Committed(Box::new(committed)));
    }

    /// Training goes on from this checkpoint: its manifest is put beside the parts, should a rank 0 have died that was to do it. For
    /// rank 0 alone.
    pub fn resumed(&self, manifest: CheckpointManifest) {
        self.committed(CheckpointCommitted {
            manifest: Some(manifest),
            ..CheckpointCommitted::default()
        });
    }

    /// Waits until everything was done, and calls `alive` as long as that moves; gives the location back.
    pub fn finish(mut self, alive: &dyn Fn()) -> Location {
        drop(self.jobs.take());
        while self.next_room(alive).is_some() {}
        if let Some(thread) = self.thread.take() {
            // A panic there was printed there; the checkpoint was not committed.
            thread.join().unwrap_or_default();
        }
        self.location
    }

    /// The next memory that the thread gives back; none if it has ended.
    fn next_room(&self, alive: &dyn Fn()) -> Option<Room> {
        let mut seen = self.moved.load(Ordering::Relaxed);
        loop {
            match self.returned.recv_timeout(LOOK) {
                Ok(room) => return Some(room),
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => {
                    let moved = self.moved.load(Ordering::Relaxed);
                    if moved != seen {
                        seen = moved;
                        alive();
                    }
                }
            }
        }
    }

    fn send(&self, job: Job) {
        if self.jobs.as_ref().is_none_or(|jobs| jobs.send(job).is_err()) {
            warn!("the checkpoint thread is gone: no more checkpoints");
        }
    }
}

/// What the thread knows.
struct Written<'a> {
    generation: u64,
    failures: Failures,
    /// The place of all checkpoints was made.
    is_made: bool,
    /// The directory that could not be written last.
    given_up: Option<String>,
    /// Bytes are on their way.
    alive: &'a dyn Fn(),
}

impl Written<'_> {
    /// A checkpoint that cannot be written is a warning: the older ones stand, and training goes on. Nobody can commit it
    /// without this rank's parts, so what there is of it goes: a full disk has better use for the room.
    fn write(&mut self, location: &Location, snapshot: &Snapshot, commit: &impl Fn(CommitCheckpointRequest)) {
        let step = snapshot.state.step;
        let directory = directory(location, step, self.generation);
        if let Some(given_up) = self.given_up.take() {
            // A slower peer may have written to it since.
            self.remove(location, &given_up);
        }
        let begin = Instant::now();
        let parts = snapshot.parts.iter();
        let made = if self.is_made { Ok(()) } else { location.make() };
        let written: Result<Vec<_>, _> = made.and_then(|()| {
            self.is_made = true;
            parts
                .map(|(kind, tensors)| location.write_part(&directory, *kind, tensors, self.alive))
                .collect()
        });
        match written {
            Ok(parts) => {
                let took = begin.elapsed();
                commit(CommitCheckpointRequest {
                    persist_seconds: Some(took.as_secs_f64()),
                    ..snapshot.announce(directory, parts)
                });
            }
            Err(error) => {
                self.failures.count(Stage::Write);
                warn!(step, "no checkpoint, training goes on: {error}");
                self.remove(location, &directory);
                self.given_up = Some(directory);
            }
        }
    }

    fn remove(&self, location: &Location, directory: &str) {
        if let Err(error) = location.remove(directory) {
            self.failures.count(Stage::Remove);
            warn!("cannot remove {directory}: {error}");
        }
    }

    /// A checkpoint of this generation was committed: what is not kept goes. That is what earlier generations began and did not
    /// finish, or had in the list until a coordinator died that was to tell of its removal; and what this one began before: a
    /// peer could not write its parts, and never will. Only what the coordinator says is kept counts: without its list nothing is
    /// removed, and the list of an earlier generation's commit may be older than what that committed last.
    fn sweep(&self, location: &Location, committed: &CheckpointCommitted) {
        let kept = &committed.kept_directories;
        let Some(manifest) = &committed.manifest else {
            return;
        };
        if kept.is_empty() || generation_in(&manifest.directory) != Some(self.generation) {
            return;
        }
        let names = location.names().unwrap_or_else(|error| {
            self.failures.count(Stage::Remove);
            warn!("cannot look for checkpoints that are not kept: {error}");
            Vec::new()
        });
        for name in names {
            let Some((step, generation)) = named(&name) else {
                continue;
            };
            let directory = location.directory(&name);
            let is_past =
                generation < self.generation || generation == self.generation && step < manifest.step;
            if !is_past || kept.contains(&directory) || !is_ours(location, &directory, manifest) {
                continue;
            }
            (self.alive)();
            self.remove(location, &directory);
        }
    }
}

/// The generation that wrote a directory.
fn generation_in(directory: &str) -> Option<u64> {
    named(directory.rsplit('/').next()?).map(|(_, generation)| generation)
}

/// True unless the directory is a checkpoint of another job in the same place, or of one that cannot be told.
fn is_ours(location: &Location, directory: &str, ours: &CheckpointManifest) -> bool {
    match location.manifest_of(directory) {
        Ok(found) => found.is_none_or(|found| found.job_id == ours.job_id),
        Err(error) => {
            warn!("{directory} is not kept, and stays: {error}");
            false
        }
    }
}

/// Puts the manifest of a committed checkpoint beside its parts, and removes the expired ones.
pub fn settle(location: &Location, committed: &CheckpointCommitted, failures: &Failures) {
    if let Some(manifest) = &committed.manifest {
        let step = manifest.step;
        match describe(location, manifest) {
            Ok(false) => {}
            Ok(true) => info!(step, "checkpoint committed: {}", manifest.directory),
            Err(error) => {
                failures.count(Stage::Manifest);
                warn!(step, "no manifest beside the checkpoint: {error}");
            }
        }
    }
    for expired in &committed.expired_directories {
        if let Err(error) = location.remove(expired) {
            failures.count(Stage::Remove);
            warn!("cannot remove the expired checkpoint {expired}: {error}");
        }
    }
}

/// Puts a manifest beside its parts, unless it is there already: a commit may be told twice, and a generation that begins with a
/// checkpoint knows it without being told.
fn describe(location: &Location, manifest: &CheckpointManifest) -> Result<bool, CheckpointError> {
    // One that cannot be read is replaced.
    if let Ok(Some(found)) = location.manifest_of(&manifest.directory)
        && found == *manifest
    {
        return Ok(false);
    }
    location.write_manifest(manifest).map(|()| true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{sync::atomic::AtomicBool, thread};

    /// Who waits for a thread that moves says so: here that is what ends the waiting.
    #[test]
    fn a_wait_for_a_thread_that_moves_is_told() {
        let (give_back, returned) = sync_channel(1);
        let writer = Writer {
            location: Location::output("unused".as_ref()),
            failures: Failures::default(),
            jobs: None,
            returned,
            room: RefCell::default(),
            moved: Arc::default(),
            thread: None,
        };
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let moved = Arc::clone(&writer.moved);
            let done = &done;
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    moved.fetch_add(1, Ordering::Relaxed);
                    thread::yield_now();
                }
            });
            let room = writer.next_room(&|| drop(give_back.try_send(Room::new())));
            done.store(true, Ordering::Relaxed);
            assert!(room.is_some());
        });
        drop(give_back);
        // What was given back more than once meanwhile comes first.
        while writer.next_room(&|| {}).is_some() {}
    }
}

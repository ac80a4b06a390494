//! What a rank is doing, as its agent sees it: one record of fixed size in memory that both processes share. The rank
//! overwrites it without ever waiting for its agent; the agent reads it when it likes. It works with the network down,
//! and a rank that is stopped or stuck cannot help leaving its last word there.
//!
//! The memory is an anonymous file that the agent makes and gives the rank as standard output. The record lies behind
//! whatever a library might print there.

use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Where the record lies in the file, in bytes.
const OFFSET: u64 = 1 << 16;
/// Size of the record in bytes.
const BYTES: usize = 64;
/// First bytes of every record.
const MAGIC: u32 = 0x0141_5250;
/// Steps whose longest counts.
const STEPS: usize = 64;

/// What a rank does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Activity {
    /// Opens data, meets its peers, reads a checkpoint.
    #[default]
    Starting,
    /// Waits for its data loader.
    DataWait,
    /// Computes a forward pass.
    Forward,
    /// Computes the head.
    Head,
    /// Computes a backward pass.
    Backward,
    /// Sums gradients over the ranks.
    Comm,
    /// Updates weights.
    Optimizer,
    /// Copies its state for a checkpoint, waits until an older copy is written, or writes the model file.
    Checkpoint,
    /// Embeds verification sets.
    Evaluation,
    /// Has trained, and sees its last checkpoint off.
    Finishing,
}

impl Activity {
    const ALL: [Self; 10] = [
        Self::Starting,
        Self::DataWait,
        Self::Forward,
        Self::Head,
        Self::Backward,
        Self::Comm,
        Self::Optimizer,
        Self::Checkpoint,
        Self::Evaluation,
        Self::Finishing,
    ];

    /// For people: what the rank did "while ...".
    pub fn words(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::DataWait => "waiting for data",
            Self::Forward => "in the forward pass",
            Self::Head => "in the head",
            Self::Backward => "in the backward pass",
            Self::Comm => "summing gradients",
            Self::Optimizer => "updating weights",
            Self::Checkpoint => "in a checkpoint",
            Self::Evaluation => "evaluating",
            Self::Finishing => "finishing",
        }
    }
}

/// A collective operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Operation {
    /// None was called yet.
    #[default]
    None,
    /// `all_reduce`
    AllReduce,
    /// `all_gather`
    AllGather,
    /// `reduce_scatter`
    ReduceScatter,
    /// `broadcast`
    Broadcast,
    /// `barrier`
    Barrier,
}

impl Operation {
    const ALL: [Self; 6] = [
        Self::None,
        Self::AllReduce,
        Self::AllGather,
        Self::ReduceScatter,
        Self::Broadcast,
        Self::Barrier,
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::AllReduce => "all_reduce",
            Self::AllGather => "all_gather",
            Self::ReduceScatter => "reduce_scatter",
            Self::Broadcast => "broadcast",
            Self::Barrier => "barrier",
        }
    }
}

/// The record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Counts every change: one that stands still is a rank that stands still.
    pub updates: u64,
    /// What the rank does.
    pub activity: Activity,
    /// Steps finished.
    pub step: u64,
    /// Longest of the last steps in microseconds; 0 before the first.
    pub longest_step_us: u64,
    /// The last collective operation.
    pub operation: Operation,
    /// True while the rank is in it, waiting for its peers.
    pub in_operation: bool,
    /// Its number, from 1; the same on every rank.
    pub operations: u64,
    /// Bytes of its tensor.
    pub operation_bytes: u64,
}

impl Progress {
    /// The last collective operation, for people: `all_reduce #812 of 1572864 bytes`.
    pub fn last_operation(&self) -> Option<String> {
        (self.operation != Operation::None).then(|| {
            format!(
                "{} #{} of {} bytes",
                self.operation.name(),
                self.operations,
                self.operation_bytes
            )
        })
    }

    fn encode(&self) -> [u8; BYTES] {
        let mut record = [0; BYTES];
        record[..4].copy_from_slice(&MAGIC.to_le_bytes());
        record[4] = self.activity as u8;
        record[5] = self.operation as u8;
        record[6] = self.in_operation.into();
        let words = [
            self.updates,
            self.step,
            self.longest_step_us,
            self.operations,
            self.operation_bytes,
            0,
            self.updates,
        ];
        for (place, word) in record[8..].chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        record
    }

    /// Nothing for a record that was not written yet, or that was read while it was being written.
    fn decode(record: &[u8; BYTES]) -> Option<Self> {
        let word = |index: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&record[8 + index * 8..][..8]);
            u64::from_le_bytes(bytes)
        };
        let whole = record[..4] == MAGIC.to_le_bytes() && word(0) == word(6);
        whole.then_some(Self {
            updates: word(0),
            activity: *Activity::ALL.get(usize::from(record[4]))?,
            step: word(1),
            longest_step_us: word(2),
            operation: *Operation::ALL.get(usize::from(record[5]))?,
            in_operation: record[6] == 1,
            operations: word(3),
            operation_bytes: word(4),
        })
    }
}

/// The agent's side.
#[derive(Debug)]
pub struct Shared {
    file: File,
}

impl Shared {
    /// Makes the memory.
    ///
    /// # Errors
    /// If the kernel has none.
    pub fn new() -> io::Result<Self> {
        let file = memfd_create("arcface-rank-progress", MFdFlags::MFD_CLOEXEC)?;
        Ok(Self {
            file: File::from(file),
        })
    }

    /// What becomes the rank's standard output.
    ///
    /// # Errors
    /// If there are too many open files.
    pub fn for_rank(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// The newest record; nothing before the first.
    pub fn read(&self) -> Option<Progress> {
        let mut record = [0; BYTES];
        self.file.read_exact_at(&mut record, OFFSET).ok()?;
        Progress::decode(&record)
    }
}

struct Inner {
    progress: Progress,
    /// Nothing where nobody reads.
    file: Option<File>,
    recent_us: [u64; STEPS],
}

/// The rank's side. Clones write the same record.
#[derive(Clone)]
pub struct Board(Arc<Mutex<Inner>>);

impl Board {
    /// On standard output, which must come from [`Shared::for_rank`].
    ///
    /// # Errors
    /// If it does not take the first record.
    pub fn on_standard_output() -> io::Result<Self> {
        let file = File::from(io::stdout().as_fd().try_clone_to_owned()?);
        file.write_all_at(&Progress::default().encode(), OFFSET)?;
        Ok(Self::new(Some(file)))
    }

    /// That nobody reads.
    pub fn unread() -> Self {
        Self::new(None)
    }

    /// In this memory.
    ///
    /// # Errors
    /// If there are too many open files.
    #[cfg(test)]
    pub fn shown_to(reader: &Shared) -> io::Result<Self> {
        reader.for_rank().map(|file| Self::new(Some(file)))
    }

    fn new(file: Option<File>) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            progress: Progress::default(),
            file,
            recent_us: [0; STEPS],
        })))
    }

    /// The rank begins something else.
    pub fn enter(&self, activity: Activity) {
        self.update(|inner| inner.progress.activity = activity);
    }

    /// A step was finished in so long a time.
    pub fn stepped(&self, done: u64, took: Duration) {
        self.update(|inner| {
            let slot = (done % STEPS as u64) as usize;
            inner.recent_us[slot] = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1);
            inner.progress.step = done;
            inner.progress.longest_step_us = inner.recent_us.iter().copied().max().unwrap_or(0);
        });
    }

    /// A collective operation begins.
    pub fn begin(&self, operation: Operation, bytes: u64) {
        self.update(|Inner { progress, .. }| {
            progress.operation = operation;
            progress.in_operation = true;
            progress.operations += 1;
            progress.operation_bytes = bytes;
        });
    }

    /// It has ended.
    pub fn end(&self) {
        self.update(|inner| inner.progress.in_operation = false);
    }

    fn update(&self, change: impl FnOnce(&mut Inner)) {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut inner);
        inner.progress.updates += 1;
        let record = inner.progress.encode();
        if let Some(file) = &inner.file
            && file.write_all_at(&record, OFFSET).is_err()
        {
            inner.file = None; // Progress that cannot be shown must not end the training.
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_reads_what_the_rank_wrote_last() {
        let shared = Shared::new().unwrap();
        assert_eq!(shared.read(), None, "nothing yet");
        let board = Board::shown_to(&shared).unwrap();
        board.enter(Activity::Head);
        board.clone().begin(Operation::AllReduce, 4096);
        let seen = shared.read().unwrap();
        assert_eq!(
            (seen.updates, seen.activity, seen.in_operation),
            (2, Activity::Head, true)
        );
        assert_eq!(
            seen.last_operation().as_deref(),
            Some("all_reduce #1 of 4096 bytes")
        );
        board.end();
        board.stepped(7, Duration::from_millis(30));
        board.stepped(8, Duration::from_millis(20));
        let seen = shared.read().unwrap();
        assert_eq!((seen.updates, seen.step, seen.longest_step_us), (5, 8, 30_000));
        assert!(!seen.in_operation);
        // A long step is forgotten once enough others followed.
        for done in 9..9 + STEPS as u64 {
            board.stepped(done, Duration::from_millis(10));
        }
        assert_eq!(shared.read().unwrap().longest_step_us, 10_000);
    }

    #[test]
    fn a_torn_or_foreign_record_is_no_record() {
        let progress = Progress {
            updates: 3,
            ..Progress::default()
        };
        let whole = progress.encode();
        assert_eq!(Progress::decode(&whole), Some(progress));
        for (place, value) in [(0, 9), (4, 10), (5, 6), (8, 4), (56, 4)] {
            let mut torn = whole;
            torn[place] = value;
            assert_eq!(Progress::decode(&torn), None, "byte {place}");
        }
        assert_eq!(Progress::decode(&[0; BYTES]), None);
    }
}

//! What must survive: a small store of keys and bytes with compare-and-swap transactions. Knows nothing of jobs.
//!
//! Stored, by `control`, as protobuf records under these keys:
//!
//! | key | value | written |
//! | --- | --- | --- |
//! | `job/ID` | the job: specification, state, generation, placement, recoveries | before a submit or cancel is answered, before ranks are launched or killed |
//! | `request/ID` | the job that a request id made | in the job's own transaction |
//! | `checkpoint/JOB/STEP` | manifest of a committed checkpoint | in the commit's one transaction, with the job and the deletion of expired ones |
//! | `damaged/JOB/STEP/GENERATION` | manifest of a checkpoint that did not verify | moved from `checkpoint/` in the transaction that ends the generation |
//! | `evaluation/JOB/STEP/DATASET` | an evaluation result | when it is reported |
//! | `drain/NODE` | nothing | before a drain is answered |
//!
//! Rebuilt after a restart, in this order: jobs from their records; nodes when their agents join again; the state of
//! rank processes from what the agents list; rendezvous and prepared checkpoint parts from the ranks' repeated calls.
//! Metrics samples are not stored.

#[cfg(test)]
mod crashes;
mod embedded;
mod etcd;
#[cfg(test)]
mod suite;

pub use embedded::EmbeddedStore;
pub use etcd::{Candidate, EtcdStore, EtcdUrl, Tenure};

use std::{future::Future, path::PathBuf, pin::Pin};

/// A store's answer, later.
pub type StoreFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// Longest key in bytes.
pub const MAX_KEY_BYTES: usize = 1024;
/// Most bytes of the values of one transaction; etcd's default limit is 1.5 MiB.
pub const MAX_TRANSACTION_BYTES: usize = 1 << 20;
/// Most writes of one transaction, and most expectations; etcd's default limit is 128 of each kind.
pub const MAX_TRANSACTION_KEYS: usize = 100;

/// A value with its version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its key.
    pub key: String,
    /// Its bytes.
    pub value: Vec<u8>,
    /// Number of the transaction that wrote it: grows with every transaction of the store.
    pub revision: u64,
}

/// What a transaction expects to find.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expect {
    /// The key does not exist.
    Absent(String),
    /// The key was last written by that transaction.
    Revision(String, u64),
}

impl Expect {
    fn key(&self) -> &str {
        match self {
            Self::Absent(key) | Self::Revision(key, _) => key,
        }
    }
}

/// What a transaction writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    /// Sets a key.
    Put(String, Vec<u8>),
    /// Removes a key; one that does not exist is no error.
    Delete(String),
}

impl Write {
    fn key(&self) -> &str {
        match self {
            Self::Put(key, _) | Self::Delete(key) => key,
        }
    }
}

/// All or nothing: if every expectation holds, every write happens, in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transaction {
    /// What must hold.
    pub expect: Vec<Expect>,
    /// What is written.
    pub writes: Vec<Write>,
}

impl Transaction {
    /// Adds a write of a key.
    pub fn put(mut self, key: impl Into<String>, value: Vec<u8>) -> Self {
        self.writes.push(Write::Put(key.into(), value));
        self
    }

    /// Adds the removal of a key.
    pub fn delete(mut self, key: impl Into<String>) -> Self {
        self.writes.push(Write::Delete(key.into()));
        self
    }

    /// Expects that a key does not exist.
    pub fn expect_absent(mut self, key: impl Into<String>) -> Self {
        self.expect.push(Expect::Absent(key.into()));
        self
    }

    /// Expects a key as it was read.
    pub fn expect_revision(mut self, key: impl Into<String>, revision: u64) -> Self {
        self.expect.push(Expect::Revision(key.into(), revision));
        self
    }

    /// Refuses what no store takes.
    fn check(&self) -> Result<(), StoreError> {
        let too_large = |what, size, unit, limit| match size > limit {
            true => Err(StoreError::TooLarge {
                what,
                size,
                unit,
                limit,
            }),
            false => Ok(()),
        };
        let keys = self.writes.iter().map(Write::key);
        for key in keys.chain(self.expect.iter().map(Expect::key)) {
            too_large("key", key.len(), "bytes", MAX_KEY_BYTES)?;
            if key.is_empty() {
                return Err(StoreError::Failed("a key is empty".into()));
            }
        }
        too_large("transaction", self.writes.len(), "writes", MAX_TRANSACTION_KEYS)?;
        too_large(
            "transaction",
            self.expect.len(),
            "expectations",
            MAX_TRANSACTION_KEYS,
        )?;
        let bytes = self.writes.iter().map(|write| match write {
            Write::Put(_, value) => value.len(),
            Write::Delete(_) => 0,
        });
        too_large("transaction", bytes.sum(), "bytes", MAX_TRANSACTION_BYTES)
    }
}

/// Why a store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another coordinator has the store.
    #[error("store {} is in use by another coordinator", path.display())]
    InUse {
        /// Where it is.
        path: PathBuf,
    },
    /// What is there is not a store of ours, or it is damaged.
    #[error("store {} cannot be read: {problem}", path.display())]
    Damaged {
        /// Where it is.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// An expectation of the transaction does not hold; nothing was written. Read again, decide again.
    #[error("store key {key} was changed by somebody else")]
    Conflict {
        /// The key.
        key: String,
    },
    /// A coordinator with a higher epoch has taken over; nothing was written and nothing will be.
    #[error("this coordinator, of epoch {ours}, was replaced by one of epoch {newest}")]
    Fenced {
        /// Our epoch.
        ours: u64,
        /// The store's.
        newest: u64,
    },
    /// Too large; nothing was written.
    #[error("a store {what} of {size} {unit} is over the limit of {limit}")]
    TooLarge {
        /// Key or transaction.
        what: &'static str,
        /// Its size.
        size: usize,
        /// What the size counts: bytes, writes, expectations.
        unit: &'static str,
        /// The most there may be.
        limit: usize,
    },
    /// It failed for certain: nothing was written, a retry is safe.
    #[error("store: {0}")]
    Failed(String),
    /// It may or may not have been done: read before any retry. It does not happen after that read any more.
    #[error("store: outcome unknown: {0}")]
    Unknown(String),
}

/// A store. Its guarantees, which `suite` checks on every implementation:
///
/// - A transaction that was answered with success survives any crash, whole; one that was answered with an error other
///   than [`StoreError::Unknown`] left nothing behind.
/// - Transactions are serial: their revisions grow in the order in which they took effect, and a read that begins after
///   an answer sees that transaction.
/// - Opening a store gives an epoch higher than any before it. From then on every transaction of an older opening
///   fails with [`StoreError::Fenced`].
/// - Keys are listed in the order of their bytes.
pub trait StateStore: Send + Sync + 'static {
    /// Number of this opening: higher than that of every one before, at least 1.
    fn epoch(&self) -> u64;

    /// One entry.
    fn get<'a>(&'a self, key: &'a str) -> StoreFuture<'a, Option<Entry>>;

    /// Entries whose keys begin with `prefix` and come after `after` (if given), at most `limit`.
    fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> StoreFuture<'a, Vec<Entry>>;

    /// Performs a transaction and returns its revision.
    fn commit(&self, transaction: Transaction) -> StoreFuture<'_, u64>;
}

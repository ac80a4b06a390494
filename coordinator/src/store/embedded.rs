//! The default store: one redb file in a directory of this machine. The file is locked while it is open, so a second
//! coordinator on the same directory is refused.

use super::{Entry, Expect, StateStore, StoreError, StoreFuture, Transaction, Write};
use redb::{
    Database, DatabaseError, ReadableDatabase, ReadableTable, StorageError, Table, TableDefinition,
    TransactionError,
};
use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard},
};

/// Keys to 8 bytes of revision (little endian) and the value.
const ENTRIES: TableDefinition<&str, &[u8]> = TableDefinition::new("entries");
/// Counters of the store itself.
const COUNTERS: TableDefinition<&str, u64> = TableDefinition::new("counters");
const FORMAT: &str = "format";
const EPOCH: &str = "epoch";
const REVISION: &str = "revision";
/// Version of this layout.
const FORMAT_VERSION: u64 = 1;
const FILE: &str = "coordinator.redb";

/// Opens the file once more.
type Reopen = dyn Fn() -> Result<Database, StoreError> + Send + Sync;

/// An open store.
pub struct EmbeddedStore {
    /// None where an error closed it, and it could not be opened again yet.
    database: Arc<RwLock<Option<Database>>>,
    reopen: Arc<Reopen>,
    epoch: u64,
}

impl EmbeddedStore {
    /// Opens the store in a directory, which is made if it does not exist, and takes the next epoch. It blocks.
    ///
    /// # Errors
    /// [`StoreError::InUse`], [`StoreError::Damaged`], [`StoreError::Failed`].
    pub fn open(directory: &Path) -> Result<Self, StoreError> {
        let path = directory.join(FILE);
        fs::create_dir_all(directory).map_err(|error| {
            StoreError::Failed(format!("make directory {}: {error}", directory.display()))
        })?;
        let file = path.clone();
        let open = move || Database::create(&file).map_err(|error| opening(error, &file));
        let store = Self::on(open()?, &path, open)?;
        // A file that was just made is not there after a crash unless its directory was written too.
        fs::File::open(directory)
            .and_then(|directory| directory.sync_all())
            .map_err(|error| {
                StoreError::Failed(format!("sync directory {}: {error}", directory.display()))
            })?;
        Ok(store)
    }

    /// Takes the next epoch of a database, which `reopen` opens again after an error.
    pub(crate) fn on(
        database: Database,
        path: &Path,
        reopen: impl Fn() -> Result<Database, StoreError> + Send + Sync + 'static,
    ) -> Result<Self, StoreError> {
        let epoch = take_epoch(&database, path)?;
        Ok(Self {
            database: Arc::new(RwLock::new(Some(database))),
            reopen: Arc::new(reopen),
            epoch,
        })
    }

    /// Runs a blocking call to the database off the async threads. An error of the disk closes redb's database for good, so that the file is
    /// opened again: a full disk ends when somebody makes room.
    fn blocking<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Database) -> Result<T, StoreError> + Send + 'static,
    ) -> StoreFuture<'static, T> {
        let (database, open) = (self.database.clone(), self.reopen.clone());
        let work = move || {
            if read(&database).is_none() {
                reopen(&database, &*open)?;
            }
            let held = read(&database);
            let Some(opened) = &*held else {
                return Err(StoreError::Failed("it is closed".into()));
            };
            let done = call(opened);
            let may_be_closed = matches!(done, Err(StoreError::Failed(_) | StoreError::Unknown(_)));
            if may_be_closed && is_closed(opened) {
                drop(held);
                // Where the reason is still there, the next call tries it again.
                let _reported_then = reopen(&database, &*open);
            }
            done
        };
        Box::pin(async move {
            tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
                Err(StoreError::Unknown(format!("the store's thread ended: {error}")))
            })
        })
    }
}

/// Who reads or writes holds it open. A call that panicked has changed nothing here.
fn read(database: &RwLock<Option<Database>>) -> RwLockReadGuard<'_, Option<Database>> {
    database.read().unwrap_or_else(PoisonError::into_inner)
}

/// Whether redb takes nothing more until the file is opened again.
fn is_closed(database: &Database) -> bool {
    matches!(
        database.begin_write(),
        Err(TransactionError::Storage(StorageError::PreviousIo))
    )
}

/// Opens the file again, if it is still closed when nobody uses it.
fn reopen(database: &RwLock<Option<Database>>, open: &Reopen) -> Result<(), StoreError> {
    let mut slot = database.write().unwrap_or_else(PoisonError::into_inner);
    if slot.as_ref().is_some_and(|database| !is_closed(database)) {
        return Ok(());
    }
    // First the old one: a file is open once. Another coordinator that comes in between takes the next epoch, and fences this one.
    *slot = None;
    *slot = Some(open()?);
    tracing::warn!("the store was opened again after an error of its disk");
    Ok(())
}

impl StateStore for EmbeddedStore {
    fn epoch(&self) -> u64 {
        self.epoch
    }

    fn get<'a>(&'a self, key: &'a str) -> StoreFuture<'a, Option<Entry>> {
        let key = key.to_owned();
        self.blocking(move |database| {
            let entries = database
                .begin_read()
                .map_err(failed)?
                .open_table(ENTRIES)
                .map_err(failed)?;
            let value = entries.get(key.as_str()).map_err(failed)?;
            value.map(|value| decode(&key, value.value())).transpose()
        })
    }

    fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> StoreFuture<'a, Vec<Entry>> {
        let prefix = prefix.to_owned();
        let after = after.map(str::to_owned);
        self.blocking(move |database| {
            let entries = database
                .begin_read()
                .map_err(failed)?
                .open_table(ENTRIES)
                .map_err(failed)?;
            let start = after
                .as_deref()
                .filter(|after| **after > *prefix)
                .unwrap_or(&prefix);
            let mut found = Vec::new();
            for item in entries.range(start..).map_err(failed)? {
                let (key, value) = item.map_err(failed)?;
                let key = key.value();
                if !key.starts_with(&prefix) || found.len() == limit {
                    break;
                }
                if after.as_deref() != Some(key) {
                    found.push(decode(key, value.value())?);
                }
            }
            Ok(found)
        })
    }

    fn commit(&self, transaction: Transaction) -> StoreFuture<'_, u64> {
        if let Err(error) = transaction.check() {
            return Box::pin(async move { Err(error) });
        }
        let epoch = self.epoch;
        self.blocking(move |database| {
            let write = database.begin_write().map_err(failed)?;
            let revision = {
                let mut counters = write.open_table(COUNTERS).map_err(failed)?;
                let newest = counter(&counters, EPOCH)?;
                if newest != epoch {
                    return Err(StoreError::Fenced { ours: epoch, newest });
                }
                let revision = counter(&counters, REVISION)? + 1;
                counters.insert(REVISION, revision).map_err(failed)?;
                let mut entries = write.open_table(ENTRIES).map_err(failed)?;
                for expect in &transaction.expect {
                    check(&entries, expect)?;
                }
                for change in &transaction.writes {
                    apply(&mut entries, change, revision)?;
                }
                revision
            };
            // redb's default durability: synced to disk before it returns.
            write
                .commit()
                .map_err(|error| StoreError::Unknown(error.to_string()))?;
            Ok(revision)
        })
    }
}

fn check(entries: &Table<'_, &str, &[u8]>, expect: &Expect) -> Result<(), StoreError> {
    let (key, wanted) = match expect {
        Expect::Absent(key) => (key, None),
        Expect::Revision(key, revision) => (key, Some(*revision)),
    };
    let value = entries.get(key.as_str()).map_err(failed)?;
    let found = value
        .map(|value| decode(key, value.value()))
        .transpose()?
        .map(|entry| entry.revision);
    match found == wanted {
        true => Ok(()),
        false => Err(StoreError::Conflict { key: key.clone() }),
    }
}

fn apply(entries: &mut Table<'_, &str, &[u8]>, change: &Write, revision: u64) -> Result<(), StoreError> {
    match change {
        Write::Put(key, value) => {
            let mut bytes = revision.to_le_bytes().to_vec();
            bytes.extend_from_slice(value);
            entries.insert(key.as_str(), bytes.as_slice()).map_err(failed)?;
        }
        Write::Delete(key) => {
            entries.remove(key.as_str()).map_err(failed)?;
        }
    }
    Ok(())
}

/// Checks the layout's version and counts this opening.
fn take_epoch(database: &Database, path: &Path) -> Result<u64, StoreError> {
    let write = database.begin_write().map_err(failed)?;
    let epoch = {
        write.open_table(ENTRIES).map_err(failed)?;
        let mut counters = write.open_table(COUNTERS).map_err(failed)?;
        let format = counter(&counters, FORMAT)?;
        if format != 0 && format != FORMAT_VERSION {
            let problem = format!("it has layout {format}, this version knows layout {FORMAT_VERSION}");
            return Err(StoreError::Damaged {
                path: path.to_owned(),
                problem,
            });
        }
        let epoch = counter(&counters, EPOCH)? + 1;
        counters.insert(FORMAT, FORMAT_VERSION).map_err(failed)?;
        counters.insert(EPOCH, epoch).map_err(failed)?;
        epoch
    };
    write.commit().map_err(failed)?;
    Ok(epoch)
}

fn counter(counters: &impl ReadableTable<&'static str, u64>, name: &str) -> Result<u64, StoreError> {
    Ok(counters
        .get(name)
        .map_err(failed)?
        .map_or(0, |value| value.value()))
}

fn decode(key: &str, bytes: &[u8]) -> Result<Entry, StoreError> {
    let Some((revision, value)) = bytes.split_first_chunk::<8>() else {
        return Err(StoreError::Failed(format!(
            "key {key} holds {} bytes, fewer than its revision",
            bytes.len()
        )));
    };
    Ok(Entry {
        key: key.to_owned(),
        value: value.to_vec(),
        revision: u64::from_le_bytes(*revision),
    })
}

/// An error before or without a commit: nothing was written.
fn failed(error: impl Into<redb::Error>) -> StoreError {
    StoreError::Failed(error.into().to_string())
}

fn opening(error: DatabaseError, path: &Path) -> StoreError {
    let path = PathBuf::from(path);
    match error {
        DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch => {
            StoreError::InUse { path }
        }
        DatabaseError::Storage(StorageError::Io(error)) if error.kind() != io::ErrorKind::InvalidData => {
            StoreError::Failed(format!("open {}: {error}", path.display()))
        }
        other => StoreError::Damaged {
            path,
            problem: other.to_string(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::suite;

    #[tokio::test]
    async fn keeps_the_guarantees_of_a_store() {
        let directory = tempfile::tempdir().expect("scratch directory");
        let open = async || {
            let store: Arc<dyn StateStore> = Arc::new(EmbeddedStore::open(directory.path()).expect("open"));
            store
        };
        suite::run(open).await;
    }

    #[test]
    fn a_second_coordinator_is_refused_and_leaves_no_mark() {
        let directory = tempfile::tempdir().expect("scratch directory");
        let first = EmbeddedStore::open(directory.path()).expect("open");
        let second = EmbeddedStore::open(directory.path());
        assert!(matches!(second, Err(StoreError::InUse { .. })));
        drop(first);
        assert_eq!(
            EmbeddedStore::open(directory.path()).expect("open again").epoch(),
            2
        );
    }

    #[test]
    fn what_is_no_store_is_an_error_and_stays_as_it_is() {
        let directory = tempfile::tempdir().expect("scratch directory");
        let path = directory.path().join(FILE);
        let garbage: Vec<u8> = (0..10_000u32).map(|i| (i * 7) as u8).collect();
        fs::write(&path, &garbage).expect("write");
        let error = EmbeddedStore::open(directory.path()).err().expect("refused");
        assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
        assert!(error.to_string().contains(FILE), "{error}");
        assert_eq!(fs::read(&path).expect("read"), garbage);
    }

    #[test]
    fn a_truncated_store_is_an_error() {
        let directory = tempfile::tempdir().expect("scratch directory");
        drop(EmbeddedStore::open(directory.path()).expect("open"));
        let path = directory.path().join(FILE);
        let file = fs::OpenOptions::new().write(true).open(&path).expect("open file");
        file.set_len(file.metadata().expect("length").len() / 3)
            .expect("truncate");
        drop(file);
        let error = EmbeddedStore::open(directory.path()).err().expect("refused");
        assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
    }
}

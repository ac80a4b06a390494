//! A store in memory that survives its coordinator, and fails in every way that the trait allows: for certain, with
//! an outcome that nobody knows, slowly.

use crate::{determinism::Rng, double::Double, history::Shared};
use arcface_coordinator::store::{Entry, Expect, StateStore, StoreError, StoreFuture, Transaction, Write};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

/// Chances in percent, and the longest delay.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    pub fail: u64,
    pub unknown: u64,
    pub slow_ms: u64,
}

struct Inner {
    /// Entries with the epoch that wrote them.
    entries: BTreeMap<String, (Entry, u64)>,
    epoch: u64,
    revision: u64,
    faults: Faults,
    rng: Rng,
    double: Option<Double>,
    world: Shared,
}

/// What the store's openings share.
#[derive(Clone)]
pub struct Disk(Arc<Mutex<Inner>>);

/// How a transaction ends.
#[derive(Clone, Copy, PartialEq)]
enum Fate {
    Done,
    Failed,
    UnknownDone,
    UnknownLost,
}

impl Disk {
    pub fn new(rng: Rng, double: Option<Double>, world: Shared) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            entries: BTreeMap::new(),
            epoch: 0,
            revision: 0,
            faults: Faults::default(),
            rng,
            double,
            world,
        })))
    }

    /// Takes the next epoch: every opening before this one is fenced.
    pub fn open(&self) -> SimStore {
        let mut inner = self.0.lock().expect("store");
        inner.epoch += 1;
        SimStore {
            disk: self.clone(),
            epoch: inner.epoch,
        }
    }

    pub fn set_faults(&self, faults: Faults) {
        self.0.lock().expect("store").faults = faults;
    }

    /// All entries under a prefix, as they are.
    pub fn entries(&self, prefix: &str) -> Vec<Entry> {
        let inner = self.0.lock().expect("store");
        inner
            .entries
            .range(prefix.to_owned()..)
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(_, (entry, _))| entry.clone())
            .collect()
    }
}

/// One opening.
pub struct SimStore {
    disk: Disk,
    epoch: u64,
}

impl Inner {
    /// A delay before and one after, and whether a read works.
    fn read_weather(&mut self) -> (Duration, bool) {
        let faults = self.faults;
        let delay = self.rng.below(faults.slow_ms + 1);
        (Duration::from_millis(delay), !self.rng.percent(faults.fail))
    }

    fn write_weather(&mut self) -> (Duration, Fate, Duration) {
        let faults = self.faults;
        let mut delay = || Duration::from_millis(self.rng.below(faults.slow_ms + 1));
        let (before, after) = (delay(), delay());
        let fate = if self.rng.percent(faults.fail) {
            Fate::Failed
        } else if self.rng.percent(faults.unknown) {
            *self.rng.pick(&[Fate::UnknownDone, Fate::UnknownLost])
        } else {
            Fate::Done
        };
        (before, fate, after)
    }

    /// Planted: the table of request ids does not survive a change of coordinator.
    fn forgotten(&self, key: &str, reader: u64) -> bool {
        self.double == Some(Double::RequestIdsForgotten)
            && key.starts_with("request/")
            && self.entries.get(key).is_some_and(|(_, epoch)| *epoch != reader)
    }

    fn apply(&mut self, epoch: u64, transaction: Transaction) -> Result<u64, StoreError> {
        if epoch != self.epoch && self.double != Some(Double::NoEpochCompare) {
            return Err(StoreError::Fenced {
                ours: epoch,
                newest: self.epoch,
            });
        }
        for expect in &transaction.expect {
            let (key, wanted) = match expect {
                Expect::Absent(key) if self.forgotten(key, epoch) => continue,
                Expect::Absent(key) => (key, None),
                Expect::Revision(key, revision) => (key, Some(*revision)),
            };
            let found = self.entries.get(key).map(|(entry, _)| entry.revision);
            if found != wanted && self.double != Some(Double::NoEpochCompare) {
                return Err(StoreError::Conflict { key: key.clone() });
            }
        }
        self.revision += 1;
        self.world
            .lock()
            .expect("world")
            .stored(epoch, &transaction.writes);
        for write in transaction.writes {
            match write {
                Write::Put(key, value) => {
                    let entry = Entry {
                        key: key.clone(),
                        value,
                        revision: self.revision,
                    };
                    self.entries.insert(key, (entry, epoch));
                }
                Write::Delete(key) => {
                    self.entries.remove(&key);
                }
            }
        }
        Ok(self.revision)
    }
}

fn no_answer() -> StoreError {
    StoreError::Failed("the simulated disk refused".into())
}

impl StateStore for SimStore {
    fn epoch(&self) -> u64 {
        self.epoch
    }

    fn get<'a>(&'a self, key: &'a str) -> StoreFuture<'a, Option<Entry>> {
        Box::pin(async move {
            let (delay, works) = self.disk.0.lock().expect("store").read_weather();
            tokio::time::sleep(delay).await;
            let inner = self.disk.0.lock().expect("store");
            match works {
                true if inner.forgotten(key, self.epoch) => Ok(None),
                true => Ok(inner.entries.get(key).map(|(entry, _)| entry.clone())),
                false => Err(no_answer()),
            }
        })
    }

    fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> StoreFuture<'a, Vec<Entry>> {
        Box::pin(async move {
            let (delay, works) = self.disk.0.lock().expect("store").read_weather();
            tokio::time::sleep(delay).await;
            match works {
                true => Ok(self
                    .disk
                    .entries(prefix)
                    .into_iter()
                    .filter(|entry| after.is_none_or(|after| entry.key.as_str() > after))
                    .take(limit)
                    .collect()),
                false => Err(no_answer()),
            }
        })
    }

    fn commit(&self, transaction: Transaction) -> StoreFuture<'_, u64> {
        Box::pin(async move {
            let (before, fate, after) = self.disk.0.lock().expect("store").write_weather();
            tokio::time::sleep(before).await;
            let outcome = match fate {
                Fate::Failed => return Err(no_answer()),
                Fate::UnknownLost => Ok(0),
                Fate::Done | Fate::UnknownDone => {
                    let mut inner = self.disk.0.lock().expect("store");
                    inner.apply(self.epoch, transaction)
                }
            };
            tokio::time::sleep(after).await;
            match fate {
                Fate::UnknownDone | Fate::UnknownLost if outcome.is_ok() => {
                    Err(StoreError::Unknown("the answer was lost".into()))
                }
                _ => outcome,
            }
        })
    }
}

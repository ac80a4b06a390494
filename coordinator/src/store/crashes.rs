//! The embedded store after a crash at any point: what it wrote is recorded, and opened again from every state that the
//! disk may be left in. Writes that were not synced may be lost, torn, or there while earlier ones are not.

use super::{EmbeddedStore, StateStore, StoreError, Transaction};
use redb::{Database, StorageBackend};
use std::{
    collections::BTreeMap,
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

#[derive(Clone, Debug)]
enum Change {
    Write(u64, Vec<u8>),
    SetLength(u64),
    Sync,
}

/// A disk in memory that remembers every change.
#[derive(Clone, Debug, Default)]
struct Disk(Arc<Mutex<(Vec<u8>, Vec<Change>)>>, Arc<AtomicBool>);

fn apply(bytes: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Write(offset, data) => {
            let end = *offset as usize + data.len();
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[*offset as usize..end].copy_from_slice(data);
        }
        Change::SetLength(length) => bytes.resize(*length as usize, 0),
        Change::Sync => {}
    }
}

impl Disk {
    fn change(&self, change: Change) -> Result<(), io::Error> {
        if self.1.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let (bytes, log) = &mut *self.0.lock().expect("disk");
        apply(bytes, &change);
        log.push(change);
        Ok(())
    }

    /// From now on nothing is written, or everything again.
    fn is_full(&self, full: bool) {
        self.1.store(full, Ordering::SeqCst);
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> Result<u64, io::Error> {
        Ok(self.0.lock().expect("disk").0.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), io::Error> {
        let (bytes, _) = &*self.0.lock().expect("disk");
        let from = bytes.get(offset as usize..offset as usize + out.len());
        out.copy_from_slice(from.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?);
        Ok(())
    }

    fn set_len(&self, length: u64) -> Result<(), io::Error> {
        self.change(Change::SetLength(length))
    }

    fn sync_data(&self) -> Result<(), io::Error> {
        self.change(Change::Sync)
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), io::Error> {
        self.change(Change::Write(offset, data.to_vec()))
    }
}

/// What becomes of the writes that were not synced.
#[derive(Clone, Copy, Debug)]
enum Fate {
    Lost,
    Kept,
    /// The last is there up to its middle.
    Torn,
    /// Of the first only its second half, of the others all.
    TornFirst,
    /// Each, or half of it, is there or not, by this seed: the disk chose their order.
    Reordered(u64),
}

fn fates() -> impl Iterator<Item = Fate> {
    let reordered = (0..4).map(Fate::Reordered);
    [Fate::Lost, Fate::Kept, Fate::Torn, Fate::TornFirst]
        .into_iter()
        .chain(reordered)
}

fn half(change: &Change, first: bool) -> Change {
    match change {
        Change::Write(offset, data) => {
            // Disks write whole sectors.
            let middle = data.len() / 2 / 512 * 512;
            match first {
                true => Change::Write(*offset, data[..middle].to_vec()),
                false => Change::Write(*offset + middle as u64, data[middle..].to_vec()),
            }
        }
        other => other.clone(),
    }
}

/// The disk's bytes after a crash in which `unsynced` had this fate.
fn crashed(mut bytes: Vec<u8>, unsynced: &[Change], fate: Fate) -> Vec<u8> {
    let mut bits = match fate {
        Fate::Reordered(seed) => (seed + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ unsynced.len() as u64,
        _ => 0,
    };
    for (index, change) in unsynced.iter().enumerate() {
        let is_last = index + 1 == unsynced.len();
        bits = bits
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        match (fate, bits >> 62) {
            (Fate::Lost, _) => {}
            (Fate::Torn, _) if is_last => apply(&mut bytes, &half(change, true)),
            (Fate::TornFirst, _) if index == 0 => apply(&mut bytes, &half(change, false)),
            (Fate::Reordered(_), 0) => {}
            (Fate::Reordered(_), 1) => apply(&mut bytes, &half(change, true)),
            _ => apply(&mut bytes, change),
        }
    }
    bytes
}

fn open(disk: Disk) -> Result<EmbeddedStore, String> {
    let open = move || {
        Database::builder()
            .create_with_backend(disk.clone())
            .map_err(|error| StoreError::Failed(error.to_string()))
    };
    let database = open().map_err(|error| error.to_string())?;
    EmbeddedStore::on(database, "disk".as_ref(), open).map_err(|error| error.to_string())
}

/// The n-th transaction of the script: keys come, change and go; some values fill pages.
fn transaction(n: u64) -> Transaction {
    let value = |n: u64| vec![n as u8; [10, 700, 9_000][n as usize % 3]];
    let mut transaction = Transaction::default()
        .put(format!("job/{}", n % 5), value(n))
        .put(format!("request/{n}"), vec![n as u8]);
    if n >= 3 {
        transaction = transaction.delete(format!("request/{}", n - 3));
    }
    transaction
}

type State = BTreeMap<String, Vec<u8>>;

async fn state(store: &EmbeddedStore) -> State {
    let entries = store.list("", None, 1000).await.expect("list");
    entries
        .into_iter()
        .map(|entry| (entry.key, entry.value))
        .collect()
}

/// Room that somebody made is enough: nobody has to restart the coordinator.
#[tokio::test]
async fn a_disk_that_was_full_for_a_while_is_written_again() {
    let disk = Disk::default();
    let store = open(disk.clone()).expect("open");
    let put = |key: &str| store.commit(Transaction::default().put(key, vec![7; 9_000]));
    put("before").await.expect("room");
    disk.is_full(true);
    for attempt in 0..3 {
        let error = put(&format!("lost/{attempt}")).await.expect_err("no room");
        assert!(
            matches!(error, StoreError::Failed(_) | StoreError::Unknown(_)),
            "{error}"
        );
    }
    disk.is_full(false);
    put("after").await.expect("room again");
    let found = state(&store).await;
    let keys: Vec<&str> = found.keys().map(String::as_str).collect();
    assert_eq!(keys, ["after", "before"]);
    // Another coordinator opens it while it is closed here: it is that one's from then on.
    disk.is_full(true);
    put("lost").await.expect_err("no room");
    disk.is_full(false);
    drop(open(disk).expect("open"));
    assert!(matches!(put("late").await, Err(StoreError::Fenced { .. })));
}

#[tokio::test]
async fn no_crash_loses_what_was_acknowledged() {
    const TRANSACTIONS: u64 = 24;
    let disk = Disk::default();
    let store = open(disk.clone()).expect("a new store");
    let written = || disk.0.lock().expect("disk").1.len();
    // From this many changes on, the store has to be as it was acknowledged.
    let mut acknowledged = vec![(written(), State::new())];
    for n in 0..TRANSACTIONS {
        store.commit(transaction(n)).await.expect("commit");
        acknowledged.push((written(), state(&store).await));
    }
    // What closing it writes counts too.
    drop(store);
    let log = disk.0.lock().expect("disk").1.clone();
    let opened = acknowledged[0].0;

    let (mut points, mut states) = (0, 0);
    let mut synced = (0, Vec::new());
    for point in opened..=log.len() {
        let last_sync = log[..point]
            .iter()
            .rposition(|change| matches!(change, Change::Sync))
            .map_or(0, |at| at + 1);
        log[synced.0..last_sync]
            .iter()
            .for_each(|change| apply(&mut synced.1, change));
        synced.0 = last_sync;
        let unsynced = &log[last_sync..point];
        let known = acknowledged.partition_point(|(at, _)| *at <= point) - 1;
        points += 1;
        for fate in fates() {
            let left = Disk::default();
            left.0.lock().expect("disk").0 = crashed(synced.1.clone(), unsynced, fate);
            let store =
                open(left).unwrap_or_else(|error| panic!("crash after write {point}, {fate:?}: {error}"));
            let found = state(&store).await;
            // A transaction that was under way may have happened or not.
            let possible = &acknowledged[known..(known + 2).min(acknowledged.len())];
            assert!(
                possible.iter().any(|(_, state)| *state == found),
                "crash after write {point}, {fate:?}: transaction {known} is lost, or half of the next is there"
            );
            assert_eq!(store.epoch(), 2, "crash after write {point}, {fate:?}");
            states += 1;
            if unsynced.is_empty() {
                break; // There is nothing whose fate could differ.
            }
        }
    }
    println!("{points} crash points, {states} states of the disk, {TRANSACTIONS} transactions, none lost");
}

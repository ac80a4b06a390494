//! State in etcd, for several coordinators of which one leads. Written for etcd 3.4 and later, and for what 3.4 is
//! known to do wrong: a keep-alive may succeed after its lease was revoked, a linearizable read may be stale after a
//! pause of the member, a watch may miss a deletion. So nothing that must be right rests on these three:
//!
//! - The leader's key is created by one transaction, if it does not exist. Its create revision is the epoch.
//! - Every transaction compares that the key still has that create revision. A leader that was replaced, however late
//!   it notices, writes nothing. The lease behind the key only decides how soon another may try ([`Candidate`]).
//! - Every read is in a transaction with the same comparison, and its revision must not be older than the newest one
//!   that this process has seen.
//! - Every transaction compares the key's modification revision, too. When an outcome is unknown, the leader writes
//!   its key again (the create revision stays) before anything else: from then on the lost transaction has happened
//!   or never will, and a read tells which.
//!
//! Below the prefix: `leader` (its value is the leader's address), `format` (version of this layout), `state/KEY`.

mod election;
mod endpoints;
#[cfg(test)]
mod tests;
mod url;

pub use election::{Candidate, Tenure};
pub use url::EtcdUrl;

use super::{Entry, Expect, StateStore, StoreError, StoreFuture, Transaction, Write};
use endpoints::{CallError, Endpoints, transact};
use etcd_client::{
    Compare, CompareOp, GetOptions, KeyValue, PutOptions, Txn, TxnOp, TxnOpResponse, TxnResponse,
};
use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};
use tokio::time::timeout;

/// Longest time for one operation with all its repetitions. A change of etcd's own leader takes 1.3 to 1.6 s.
const OPERATION: Duration = Duration::from_secs(3);
/// Longest wait for one member's answer to a transaction: it is not repeated, so it gets most of the operation.
const WRITE: Duration = Duration::from_millis(2500);
/// Longest wait for one member's answer to a read or to what may be repeated.
const ATTEMPT: Duration = Duration::from_secs(1);
/// Between two tries.
const AGAIN: Duration = Duration::from_millis(50);
/// Records read at once.
const PAGE: usize = 200;
/// Version of this layout.
const FORMAT_VERSION: &str = "1";

/// The store of a coordinator that leads, for one term.
pub struct EtcdStore {
    endpoints: Arc<Endpoints>,
    url: EtcdUrl,
    /// Create revision of the leader's key.
    epoch: i64,
    lease: i64,
    /// What the leader's key holds.
    address: String,
    /// Newest known modification revision of the leader's key.
    renewed: AtomicI64,
    /// Newest revision that etcd has shown to us.
    newest: AtomicI64,
    /// True after a transaction with an unknown outcome, until the leader's key was written again.
    unsettled: AtomicBool,
    settling: tokio::sync::Mutex<()>,
}

/// Marks the store unsettled unless the outcome of a transaction became known, also if its caller gave up waiting.
struct InFlight<'a> {
    unsettled: &'a AtomicBool,
    known: bool,
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        if !self.known {
            self.unsettled.store(true, Ordering::SeqCst);
        }
    }
}

/// How a transaction ended.
enum Outcome {
    Done(TxnResponse),
    /// The leader's key was written again meanwhile: nothing was done, and it may be tried with the new revision.
    Renewed,
}

impl EtcdStore {
    fn new(endpoints: Arc<Endpoints>, url: EtcdUrl, epoch: i64, lease: i64, address: String) -> Self {
        Self {
            endpoints,
            url,
            epoch,
            lease,
            address,
            renewed: AtomicI64::new(epoch),
            newest: AtomicI64::new(epoch),
            unsettled: AtomicBool::new(false),
            settling: tokio::sync::Mutex::new(()),
        }
    }

    /// Checks the layout's version; writes it into an empty store.
    async fn check_format(&self) -> Result<(), StoreError> {
        let key = self.url.format_key();
        let found = self.read(TxnOp::get(key.clone(), None)).await?;
        match found.first().map(KeyValue::value) {
            None => {
                let expect = vec![Compare::create_revision(key.clone(), CompareOp::Equal, 0)];
                let write = vec![TxnOp::put(key, FORMAT_VERSION, None)];
                self.write(expect, write, Vec::new()).await.map(|_| ())
            }
            Some(format) if format == FORMAT_VERSION.as_bytes() => Ok(()),
            Some(format) => Err(StoreError::Damaged {
                path: PathBuf::from(self.url.to_string()),
                problem: format!(
                    "it has layout {:?}, this version knows layout {FORMAT_VERSION}",
                    String::from_utf8_lossy(format)
                ),
            }),
        }
    }

    fn is_leader(&self) -> Compare {
        Compare::create_revision(self.url.leader_key(), CompareOp::Equal, self.epoch)
    }

    fn is_renewed(&self, revision: i64) -> Compare {
        Compare::mod_revision(self.url.leader_key(), CompareOp::Equal, revision)
    }

    fn fenced(&self, newest: i64) -> StoreError {
        StoreError::Fenced {
            ours: self.epoch as u64,
            newest: newest.max(0) as u64,
        }
    }

    fn saw(&self, answer: &TxnResponse) -> i64 {
        let revision = answer.header().map_or(0, |header| header.revision());
        self.newest.fetch_max(revision, Ordering::SeqCst);
        revision
    }

    /// Makes sure that transactions with unknown outcomes are over: writes the leader's key again if there are some.
    async fn settle(&self) -> Result<(), StoreError> {
        if !self.unsettled.load(Ordering::SeqCst) {
            return Ok(());
        }
        let _turn = self.settling.lock().await;
        if !self.unsettled.load(Ordering::SeqCst) {
            return Ok(());
        }
        let leader = self.url.leader_key();
        let options = PutOptions::new().with_lease(self.lease);
        let renew = Txn::new()
            .when(vec![self.is_leader()])
            .and_then(vec![TxnOp::put(
                leader.clone(),
                self.address.as_str(),
                Some(options),
            )])
            .or_else(vec![TxnOp::get(leader, None)]);
        let answer = self
            .endpoints
            .repeat(
                ATTEMPT,
                AGAIN,
                |client| transact(client, renew.clone()),
                |error| tracing::debug!(error, "renew the leader's key"),
            )
            .await;
        let revision = self.saw(&answer);
        if !answer.succeeded() {
            return Err(self.fenced(first_of(&answer, 0).map_or(0, |key| key.create_revision())));
        }
        // In this order: a transaction that is sent with the new revision and lost must find the mark cleared before.
        self.unsettled.store(false, Ordering::SeqCst);
        self.renewed.fetch_max(revision, Ordering::SeqCst);
        Ok(())
    }

    /// Reads under the comparison with our epoch, and nothing older than what we have seen.
    async fn read(&self, read: TxnOp) -> Result<Vec<KeyValue>, StoreError> {
        self.settle().await?;
        let oldest = self.newest.load(Ordering::SeqCst);
        let query = Txn::new()
            .when(vec![self.is_leader()])
            .and_then(vec![read])
            .or_else(vec![TxnOp::get(self.url.leader_key(), None)]);
        loop {
            let answer = self
                .endpoints
                .repeat(
                    ATTEMPT,
                    AGAIN,
                    |client| transact(client, query.clone()),
                    |error| tracing::debug!(error, "read from etcd"),
                )
                .await;
            let revision = self.saw(&answer);
            if revision < oldest {
                tracing::warn!(revision, oldest, "etcd gave a stale answer; it is asked again");
                tokio::time::sleep(AGAIN).await;
                continue;
            }
            if !answer.succeeded() {
                return Err(self.fenced(first_of(&answer, 0).map_or(0, |key| key.create_revision())));
            }
            return Ok(match answer.op_responses().into_iter().next() {
                Some(TxnOpResponse::Get(mut found)) => found.take_kvs(),
                _ => Vec::new(),
            });
        }
    }

    /// One transaction, until its outcome is known. `reads` tell why an expectation failed.
    async fn write(
        &self,
        expect: Vec<Compare>,
        writes: Vec<TxnOp>,
        reads: Vec<TxnOp>,
    ) -> Result<TxnResponse, StoreError> {
        loop {
            self.settle().await?;
            match self.try_write(&expect, &writes, &reads).await? {
                Outcome::Done(answer) => return Ok(answer),
                Outcome::Renewed => {}
            }
        }
    }

    async fn try_write(
        &self,
        expect: &[Compare],
        writes: &[TxnOp],
        reads: &[TxnOp],
    ) -> Result<Outcome, StoreError> {
        let renewed = self.renewed.load(Ordering::SeqCst);
        let fence = [self.is_leader(), self.is_renewed(renewed)];
        let why = [TxnOp::get(self.url.leader_key(), None)];
        let transaction = Txn::new()
            .when([&fence[..], expect].concat())
            .and_then(writes.to_vec())
            .or_else([&why[..], reads].concat());
        let mut flight = InFlight {
            unsettled: &self.unsettled,
            known: false,
        };
        let sent = self
            .endpoints
            .call(WRITE, |client| transact(client, transaction))
            .await;
        let answer = match sent {
            Ok(answer) => answer,
            Err(CallError::Failed(why)) => {
                flight.known = true;
                return Err(StoreError::Failed(why));
            }
            Err(CallError::Unknown(why)) => return Err(StoreError::Unknown(why)),
        };
        flight.known = true;
        self.saw(&answer);
        if answer.succeeded() {
            return Ok(Outcome::Done(answer));
        }
        match first_of(&answer, 0) {
            Some(leader) if leader.create_revision() == self.epoch && leader.mod_revision() != renewed => {
                self.renewed.fetch_max(leader.mod_revision(), Ordering::SeqCst);
                Ok(Outcome::Renewed)
            }
            Some(leader) if leader.create_revision() == self.epoch => Ok(Outcome::Done(answer)),
            leader => Err(self.fenced(leader.map_or(0, |leader| leader.create_revision()))),
        }
    }

    async fn transaction(&self, transaction: Transaction) -> Result<u64, StoreError> {
        let expect = transaction.expect.iter().map(|expect| self.compare(expect));
        let reads = transaction.expect.iter().map(|expect| {
            TxnOp::get(
                self.url.state_key(expect.key()),
                Some(GetOptions::new().with_keys_only()),
            )
        });
        // etcd takes every key once: the last write of a key is the one that stays.
        let mut last: BTreeMap<&str, &Write> = BTreeMap::new();
        for write in &transaction.writes {
            last.insert(write.key(), write);
        }
        let writes = last.values().map(|write| match write {
            Write::Put(key, value) => TxnOp::put(self.url.state_key(key), value.clone(), None),
            Write::Delete(key) => TxnOp::delete(self.url.state_key(key), None),
        });
        let answer = self
            .write(expect.collect(), writes.collect(), reads.collect())
            .await?;
        if answer.succeeded() {
            return Ok(answer.header().map_or(0, |header| header.revision()) as u64);
        }
        let broken = transaction
            .expect
            .iter()
            .enumerate()
            .find(|(index, expect)| {
                // The leader's key was read before those of the expectations.
                let found = first_of(&answer, index + 1).map(|entry| entry.mod_revision() as u64);
                match expect {
                    Expect::Absent(_) => found.is_some(),
                    Expect::Revision(_, revision) => found != Some(*revision),
                }
            })
            .map(|(_, expect)| expect.key().to_owned());
        Err(StoreError::Conflict {
            key: broken.unwrap_or_default(),
        })
    }

    fn compare(&self, expect: &Expect) -> Compare {
        match expect {
            Expect::Absent(key) => Compare::create_revision(self.url.state_key(key), CompareOp::Equal, 0),
            Expect::Revision(key, revision) => {
                // A revision that etcd cannot have is one that no key has.
                let revision = i64::try_from(*revision).unwrap_or(i64::MAX);
                Compare::mod_revision(self.url.state_key(key), CompareOp::Equal, revision)
            }
        }
    }

    fn entry(&self, found: &KeyValue) -> Result<Entry, StoreError> {
        let key = found.key_str().ok().and_then(|key| self.url.key_of(key));
        let key = key.ok_or_else(|| {
            StoreError::Failed(format!("etcd has a key that is not text below {}", self.url))
        })?;
        Ok(Entry {
            key: key.to_owned(),
            value: found.value().to_vec(),
            revision: found.mod_revision() as u64,
        })
    }

    async fn page(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<Entry>, StoreError> {
        let first = self.url.state_key(prefix);
        // The first key after a key is the same with a zero byte; the end of a prefix has its last byte one higher.
        let start = after.filter(|after| *after >= prefix).map_or_else(
            || first.clone().into_bytes(),
            |after| {
                let mut next = self.url.state_key(after).into_bytes();
                next.push(0);
                next
            },
        );
        let mut end = first.into_bytes();
        if let Some(last) = end.last_mut() {
            // The prefix of all keys ends with a slash, so there is a last byte, and in UTF-8 none is 255.
            *last += 1;
        }
        if start >= end {
            return Ok(Vec::new());
        }
        let options = GetOptions::new()
            .with_range(end)
            .with_limit(i64::try_from(limit).unwrap_or(i64::MAX));
        let found = self.read(TxnOp::get(start, Some(options))).await?;
        found.iter().map(|found| self.entry(found)).collect()
    }
}

/// The first key that the operation number `index` of an answer has read.
fn first_of(answer: &TxnResponse, index: usize) -> Option<KeyValue> {
    match answer.op_responses().into_iter().nth(index)? {
        TxnOpResponse::Get(mut found) => found.take_kvs().into_iter().next(),
        _ => None,
    }
}

/// Bounds an operation. One that was cut off has written nothing, or its outcome is unknown.
async fn bounded<T>(
    too_late: fn(String) -> StoreError,
    operation: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, StoreError> {
    timeout(OPERATION, operation)
        .await
        .unwrap_or_else(|_| Err(too_late(format!("etcd did not answer within {OPERATION:?}"))))
}

impl StateStore for EtcdStore {
    fn epoch(&self) -> u64 {
        self.epoch as u64
    }

    fn get<'a>(&'a self, key: &'a str) -> StoreFuture<'a, Option<Entry>> {
        Box::pin(bounded(StoreError::Failed, async move {
            let found = self.read(TxnOp::get(self.url.state_key(key), None)).await?;
            found.first().map(|found| self.entry(found)).transpose()
        }))
    }

    fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> StoreFuture<'a, Vec<Entry>> {
        Box::pin(async move {
            let mut found: Vec<Entry> = Vec::new();
            while found.len() < limit {
                let size = PAGE.min(limit - found.len());
                let last = found.last().map(|entry| entry.key.clone());
                let page = bounded(
                    StoreError::Failed,
                    self.page(prefix, last.as_deref().or(after), size),
                )
                .await?;
                let is_last = page.len() < size;
                found.extend(page);
                if is_last {
                    break;
                }
            }
            Ok(found)
        })
    }

    fn commit(&self, transaction: Transaction) -> StoreFuture<'_, u64> {
        if let Err(error) = transaction.check() {
            return Box::pin(async move { Err(error) });
        }
        Box::pin(bounded(StoreError::Unknown, self.transaction(transaction)))
    }
}

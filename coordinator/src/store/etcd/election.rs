//! Who leads. A candidate creates the leader's key under a lease, if there is none; a keeper renews the lease and
//! looks at the key. The lease decides when others may try; what keeps an old leader from writing is the comparison
//! in every transaction (see the module above). A leader that could not renew its lease stops by its own clock before
//! the lease has lapsed, so that two do not serve at once for longer than clocks drift.

use super::{AGAIN, ATTEMPT, Endpoints, EtcdStore, EtcdUrl, first_of, transact};
use crate::store::{StateStore, StoreError};
use etcd_client::{
    Client, Compare, CompareOp, Error, EventType, GetResponse, KeyValue, PutOptions, TlsOptions, Txn, TxnOp,
    WatchOptions, WatchStream,
};
use nix::time::{ClockId, clock_gettime};
use std::{
    sync::{Arc, Mutex, OnceLock, PoisonError, atomic::Ordering},
    time::Duration,
};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

/// Longest wait for etcd when the coordinator starts.
const FIRST_ANSWER: Duration = Duration::from_secs(5);
/// Between two looks at the leader's key, beside the watch: watches can be lost.
const POLL: Duration = Duration::from_millis(700);
/// Between two tries when etcd does not answer.
const AWAY: Duration = Duration::from_millis(300);
/// Longest wait for the release of the key.
const RELEASE: Duration = Duration::from_secs(2);

/// Time since the machine started, with the time that it slept: a lease goes on while a machine is suspended.
fn boot_time() -> Duration {
    // The clock exists on every Linux that Rust supports; if it failed, every lease would count as lapsed.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::MAX, Duration::from)
}

/// A coordinator that would lead.
pub struct Candidate {
    endpoints: Arc<Endpoints>,
    url: EtcdUrl,
    address: String,
    ttl: Duration,
    leader: watch::Sender<Option<String>>,
    /// The last complaint: the same one is made once.
    complaint: Mutex<String>,
}

/// What a try to lead has found.
pub(super) enum Try {
    Elected(Tenure),
    Held(KeyValue, i64),
}

impl Candidate {
    /// Reaches etcd, with TLS where the URL is https. `address` is where clients find this coordinator; `ttl` is the lease's time in whole seconds
    /// (etcd raises one under 2 s).
    ///
    /// # Errors
    /// [`StoreError::Failed`] if no member answers.
    pub async fn connect(
        url: EtcdUrl,
        tls: Option<TlsOptions>,
        address: String,
        ttl: Duration,
    ) -> Result<Self, StoreError> {
        let candidate = Self {
            endpoints: Arc::new(Endpoints::new(&url, tls.as_ref()).await?),
            url,
            address,
            ttl,
            leader: watch::Sender::new(None),
            complaint: Mutex::default(),
        };
        let mut last = "no answer".to_owned();
        let look = candidate.endpoints.repeat(
            ATTEMPT,
            AGAIN,
            |client| get(client, candidate.url.leader_key()),
            |error| last = error,
        );
        let found = timeout(FIRST_ANSWER, look).await;
        match found {
            Ok(_) => Ok(candidate),
            Err(_) => Err(StoreError::Failed(last)),
        }
    }

    /// The address of who leads, as last seen.
    pub fn leader(&self) -> watch::Receiver<Option<String>> {
        self.leader.subscribe()
    }

    /// Waits until this coordinator leads. Does not end while another leads or etcd is away.
    pub async fn campaign(&self) -> Tenure {
        loop {
            match self.attempt().await {
                Ok(Try::Elected(tenure)) => {
                    self.saw(Some(self.address.clone()));
                    return tenure;
                }
                Ok(Try::Held(leader, revision)) => {
                    self.saw(Some(String::from_utf8_lossy(leader.value()).into_owned()));
                    self.wait_for_end(&leader, revision).await;
                }
                Err(error) => {
                    self.saw(None);
                    self.complain(&error);
                    sleep(AWAY).await;
                }
            }
        }
    }

    fn saw(&self, leader: Option<String>) {
        if leader.is_some() {
            self.complaint
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clear();
        }
        self.leader.send_if_modified(|known| {
            let news = *known != leader;
            if news {
                tracing::info!(leader = leader.as_deref().unwrap_or("nobody"), "the leader is");
                *known = leader;
            }
            news
        });
    }

    fn complain(&self, error: &str) {
        let mut last = self.complaint.lock().unwrap_or_else(PoisonError::into_inner);
        if *last != error {
            tracing::warn!(error, "this coordinator cannot lead now; it is tried again");
            error.clone_into(&mut last);
        }
    }

    /// The leader's key and the revision of the answer.
    async fn look(&self) -> Result<(Option<KeyValue>, i64), String> {
        let look = |client| get(client, self.url.leader_key());
        let mut answer = self
            .endpoints
            .call(ATTEMPT, look)
            .await
            .map_err(|error| error.into_text())?;
        let revision = answer.header().map_or(0, |header| header.revision());
        Ok((answer.take_kvs().into_iter().next(), revision))
    }

    pub(super) async fn attempt(&self) -> Result<Try, String> {
        if let (Some(leader), revision) = self.look().await? {
            return Ok(Try::Held(leader, revision));
        }
        let sent = boot_time();
        let seconds = self.ttl.as_secs().max(1) as i64;
        let grant = |mut client: Client| async move { client.lease_grant(seconds, None).await };
        let grant = self
            .endpoints
            .call(ATTEMPT, grant)
            .await
            .map_err(|error| error.into_text())?;
        let (lease, ttl) = (grant.id(), Duration::from_secs(grant.ttl().max(1) as u64));
        let key = self.url.leader_key();
        let options = PutOptions::new().with_lease(lease);
        let create = Txn::new()
            .when(vec![Compare::create_revision(key.clone(), CompareOp::Equal, 0)])
            .and_then(vec![TxnOp::put(
                key.clone(),
                self.address.as_str(),
                Some(options),
            )])
            .or_else(vec![TxnOp::get(key, None)]);
        // Repeating does no harm: a key that an earlier try has made has our lease.
        let mut failure = String::new();
        let created = timeout(
            ttl / 2,
            self.endpoints.repeat(
                ATTEMPT,
                AGAIN,
                |client| transact(client, create.clone()),
                |error| failure = error,
            ),
        )
        .await;
        let Ok(created) = created else {
            // The lease lapses by itself, and a key with it.
            return Err(failure);
        };
        let revision = created.header().map_or(0, |header| header.revision());
        let epoch = match (created.succeeded(), first_of(&created, 0)) {
            (true, _) => revision,
            (false, Some(leader)) if leader.lease() == lease => leader.create_revision(),
            (false, leader) => {
                self.release(lease).await;
                return leader
                    .map(|leader| Try::Held(leader, revision))
                    .ok_or_else(|| "the leader's key is neither there nor absent".to_owned());
            }
        };
        let store = EtcdStore::new(
            self.endpoints.clone(),
            self.url.clone(),
            epoch,
            lease,
            self.address.clone(),
        );
        store.newest.fetch_max(revision, Ordering::SeqCst);
        if let Err(error) = store.check_format().await {
            self.release(lease).await;
            return Err(error.to_string());
        }
        Ok(Try::Elected(Tenure::begin(Arc::new(store), ttl, sent)))
    }

    async fn release(&self, lease: i64) {
        release(&self.endpoints, lease).await;
    }

    /// Waits until another's key seems to be gone: watched, and looked at now and then.
    async fn wait_for_end(&self, leader: &KeyValue, revision: i64) {
        let mut watching = self.watch(revision + 1).await;
        loop {
            let gone = match &mut watching {
                Some(stream) => tokio::select! {
                    gone = saw_deletion(stream) => gone,
                    () = sleep(POLL) => None,
                },
                None => {
                    sleep(POLL).await;
                    None
                }
            };
            match gone {
                Some(true) => return,
                // Compacted, or the member is gone: the looks go on without it.
                Some(false) => watching = None,
                None => match self.look().await {
                    Ok((Some(found), _)) if found.create_revision() == leader.create_revision() => {
                        self.saw(Some(String::from_utf8_lossy(found.value()).into_owned()));
                    }
                    Ok(_) => return,
                    Err(error) => {
                        self.saw(None);
                        self.complain(&error);
                    }
                },
            }
        }
    }

    async fn watch(&self, revision: i64) -> Option<WatchStream> {
        let options = WatchOptions::new().with_start_revision(revision);
        let key = self.url.leader_key();
        let begin = |mut client: Client| async move { client.watch(key, Some(options)).await };
        self.endpoints.call(ATTEMPT, begin).await.ok()
    }
}

/// True if the key was deleted, false if the watch is over.
async fn saw_deletion(stream: &mut WatchStream) -> Option<bool> {
    loop {
        match stream.message().await {
            Ok(Some(answer)) if answer.canceled() => return Some(false),
            Ok(Some(answer)) => {
                if answer
                    .events()
                    .iter()
                    .any(|event| event.event_type() == EventType::Delete)
                {
                    return Some(true);
                }
            }
            Ok(None) | Err(_) => return Some(false),
        }
    }
}

async fn get(mut client: Client, key: String) -> Result<GetResponse, Error> {
    client.get(key, None).await
}

async fn release(endpoints: &Endpoints, lease: i64) {
    let revoke = endpoints.repeat(
        ATTEMPT,
        AGAIN,
        |mut client| async move {
            match client.lease_revoke(lease).await {
                Ok(_) => Ok(()),
                // It has lapsed, or an earlier try has revoked it.
                Err(Error::GRpcStatus(status)) if status.code() == tonic::Code::NotFound => Ok(()),
                Err(error) => Err(error),
            }
        },
        |error| tracing::debug!(error, "release the leader's key"),
    );
    if timeout(RELEASE, revoke).await.is_err() {
        tracing::warn!("the leader's key was not released: it lapses with its lease");
    }
}

/// The time for which this coordinator leads.
pub struct Tenure {
    pub(super) store: Arc<EtcdStore>,
    over: Arc<Over>,
    _keeper: AbortOnDropHandle<()>,
}

#[derive(Default)]
struct Over {
    token: CancellationToken,
    why: OnceLock<String>,
}

impl Tenure {
    fn begin(store: Arc<EtcdStore>, ttl: Duration, sent: Duration) -> Self {
        let over = Arc::new(Over::default());
        let keeper = Keeper {
            store: store.clone(),
            ttl,
            good_until: sent + ttl - guard(ttl),
        };
        let ending = over.clone();
        let keeper = tokio::spawn(async move {
            let why = keeper.keep().await;
            // Set once: there is one keeper.
            let _first = ending.why.set(why);
            ending.token.cancel();
        });
        Self {
            store,
            over,
            _keeper: AbortOnDropHandle::new(keeper),
        }
    }

    /// The store, for as long as the tenure lasts; later every write to it is refused.
    pub fn store(&self) -> Arc<dyn StateStore> {
        self.store.clone()
    }

    /// Waits until this coordinator may not lead any more, and says why.
    pub async fn over(&self) -> String {
        self.over.token.cancelled().await;
        self.over.why.get().cloned().unwrap_or_default()
    }

    /// Ends the tenure, so that another coordinator leads at once.
    pub async fn resign(self) {
        let store = self.store.clone();
        drop(self);
        release(&store.endpoints, store.lease).await;
    }
}

/// What is left of a lease when its leader stops: for clocks that drift and a task that is late.
fn guard(ttl: Duration) -> Duration {
    ttl / 10
}

struct Keeper {
    store: Arc<EtcdStore>,
    ttl: Duration,
    good_until: Duration,
}

impl Keeper {
    /// Renews the lease until it cannot, and says why.
    async fn keep(mut self) -> String {
        let period = self.ttl / 5;
        let mut failure = "etcd does not answer".to_owned();
        loop {
            let begun = boot_time();
            let left = self.good_until.saturating_sub(begun);
            if left.is_zero() {
                return format!("the lease could not be renewed: {failure}");
            }
            match timeout(left, self.renew()).await {
                Ok(Ok(())) => {
                    // What was good when the question was sent is good for the lease's time from then on.
                    self.good_until = begun + self.ttl - guard(self.ttl);
                    sleep(period).await;
                }
                Ok(Err(End::Over(why))) => return why,
                Ok(Err(End::Again(why))) => {
                    failure = why;
                    sleep(AGAIN).await;
                }
                Err(_) => {}
            }
        }
    }

    /// Renews the lease, and sees whether the key is still ours: etcd 3.4 may answer well for a lease that is gone.
    async fn renew(&self) -> Result<(), End> {
        let store = &self.store;
        let again = |error: super::CallError| End::Again(error.into_text());
        let lease = store.lease;
        let renew = |mut client: Client| async move {
            match client.lease_keep_alive(lease).await {
                Ok(_) => Ok(true),
                Err(Error::LeaseKeepAliveError(_)) => Ok(false),
                Err(error) => Err(error),
            }
        };
        if !store.endpoints.call(ATTEMPT, renew).await.map_err(again)? {
            return Err(End::Over("the lease has lapsed".into()));
        }
        let query = Txn::new()
            .when(vec![store.is_leader()])
            .or_else(vec![TxnOp::get(store.url.leader_key(), None)]);
        let oldest = store.newest.load(Ordering::SeqCst);
        let look = |client| transact(client, query);
        let answer = store.endpoints.call(ATTEMPT, look).await.map_err(again)?;
        match (store.saw(&answer) >= oldest, answer.succeeded()) {
            (true, true) => Ok(()),
            (true, false) => Err(End::Over(match first_of(&answer, 0) {
                Some(leader) => format!("{} leads now", String::from_utf8_lossy(leader.value())),
                None => "the leader's key is gone".into(),
            })),
            (false, _) => Err(End::Again("etcd gave a stale answer".into())),
        }
    }
}

/// Why a lease was not renewed.
enum End {
    /// The tenure is over.
    Over(String),
    /// Another try may succeed.
    Again(String),
}

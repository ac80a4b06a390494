//! Tests of the store on etcd, of elections, and of what etcd does when it is away, slow or full.

use super::*;
use crate::store::suite;
use etcd_client::{AlarmAction, AlarmOptions, AlarmType, Client};
use server::Etcd;
use std::{net::SocketAddr, sync::Mutex};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
    time::timeout,
};

#[path = "../../../../tests/harness/etcd.rs"]
mod server;

/// Longest wait for anything: generous, because the machine may be busy.
const DEADLINE: Duration = Duration::from_secs(30);
/// The shortest that etcd grants with its default election timeout.
const TTL: Duration = Duration::from_secs(2);

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(DEADLINE, future)
        .await
        .unwrap_or_else(|_| panic!("{what} did not happen within {DEADLINE:?}"))
}

fn start() -> Option<Etcd> {
    Etcd::start().expect("start etcd")
}

async fn candidate(url: &str, name: &str) -> Candidate {
    let url = url.parse().expect("url");
    Candidate::connect(url, None, name.to_owned(), TTL)
        .await
        .expect("reach etcd")
}

async fn elected(candidate: &Candidate) -> Tenure {
    within("election", candidate.campaign()).await
}

async fn raw(etcd: &Etcd) -> Client {
    Client::connect([etcd.url()], None).await.expect("connect")
}

fn put(key: &str, value: &str) -> Transaction {
    Transaction::default().put(key, value.as_bytes().to_vec())
}

async fn value(store: &dyn StateStore, key: &str) -> Option<String> {
    let entry = store.get(key).await.expect("get");
    entry.map(|entry| String::from_utf8(entry.value).expect("text"))
}

/// Everything that follows the connection of a client to etcd can be cut, in both directions at once.
struct Proxy {
    address: SocketAddr,
    broken: watch::Sender<Cut>,
    task: JoinHandle<()>,
}

#[derive(Clone, Copy, PartialEq)]
enum Cut {
    None,
    /// Requests arrive, answers do not.
    Answers,
    /// Connections are closed.
    Closed,
}

impl Proxy {
    async fn start(etcd: &Etcd) -> Self {
        let address = etcd.url().strip_prefix("http://").map(str::parse);
        let to: SocketAddr = address.expect("a URL").expect("an address");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("address");
        let broken = watch::Sender::new(Cut::None);
        let seen = broken.subscribe();
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(forward(client, to, seen.clone()));
            }
        });
        Self {
            address,
            broken,
            task,
        }
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    fn cut(&self, cut: Cut) {
        self.broken.send_replace(cut);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn forward(mut client: TcpStream, to: SocketAddr, mut seen: watch::Receiver<Cut>) {
    let mut server = TcpStream::connect(to).await.expect("reach etcd");
    tokio::select! {
        _ = copy_bidirectional(&mut client, &mut server) => return,
        cut = seen.wait_for(|cut| *cut != Cut::None) => {
            if cut.is_ok_and(|cut| *cut == Cut::Closed) {
                return;
            }
        }
    }
    // What etcd answers is read and thrown away until the connection is to be closed.
    let (mut from_client, _to_client) = client.split();
    let (mut from_server, mut to_server) = server.split();
    let mut nowhere = tokio::io::sink();
    tokio::select! {
        _ = tokio::io::copy(&mut from_client, &mut to_server) => {}
        _ = tokio::io::copy(&mut from_server, &mut nowhere) => {}
        _ = seen.wait_for(|cut| *cut != Cut::Answers) => {}
    }
}

#[tokio::test]
async fn keeps_the_guarantees_of_a_store() {
    let Some(etcd) = start() else { return };
    let candidate = candidate(&etcd.url(), "a").await;
    let last: Mutex<Option<Tenure>> = Mutex::new(None);
    let open = async || {
        let before = last.lock().expect("lock").take();
        if let Some(tenure) = before {
            tenure.resign().await;
        }
        let tenure = elected(&candidate).await;
        let store = tenure.store();
        *last.lock().expect("lock") = Some(tenure);
        store
    };
    suite::run(open).await;
}

#[tokio::test]
async fn one_of_two_leads_and_its_resignation_makes_way_at_once() {
    let Some(etcd) = start() else { return };
    let (a, b) = (
        candidate(&etcd.url(), "a:1").await,
        candidate(&etcd.url(), "b:1").await,
    );
    let first = elected(&a).await;
    let mut known = b.leader();
    let second = tokio::spawn(async move { b.campaign().await });
    let leader = within("b to see a", known.wait_for(|leader| leader.is_some())).await;
    assert_eq!(leader.expect("known").as_deref(), Some("a:1"));
    assert!(!second.is_finished());
    let epoch = first.store().epoch();
    // Sooner than any lease can lapse.
    first.resign().await;
    let second = timeout(TTL / 2, second)
        .await
        .expect("at once")
        .expect("no panic");
    assert!(second.store().epoch() > epoch);
    second.resign().await;
}

#[tokio::test]
async fn a_leader_that_is_gone_is_replaced_when_its_lease_lapses() {
    let Some(etcd) = start() else { return };
    let (a, b) = (
        candidate(&etcd.url(), "a:1").await,
        candidate(&etcd.url(), "b:1").await,
    );
    let first = elected(&a).await;
    let store = first.store();
    store.commit(put("k", "a")).await.expect("commit");
    // Its keeper ends, its lease is not revoked: as if the process had died.
    drop(first);
    let second = elected(&b).await;
    assert_eq!(value(&*second.store(), "k").await.as_deref(), Some("a"));
    let late = store.commit(put("k", "late")).await;
    let epoch = second.store().epoch();
    assert!(
        matches!(late, Err(StoreError::Fenced { newest, .. }) if newest == epoch),
        "{late:?}"
    );
    assert!(
        matches!(store.get("k").await, Err(StoreError::Fenced { .. })),
        "reads are fenced too"
    );
    assert_eq!(value(&*second.store(), "k").await.as_deref(), Some("a"));
}

#[tokio::test]
async fn a_leader_whose_key_was_taken_writes_nothing_and_learns_of_it() {
    let Some(etcd) = start() else { return };
    let tenure = elected(&candidate(&etcd.url(), "a:1").await).await;
    let store = tenure.store();
    store.commit(put("k", "before")).await.expect("commit");
    // The lease lives on: only the key is another one, of the same name and value.
    let mut client = raw(&etcd).await;
    client.delete("/arcface/leader", None).await.expect("delete");
    let between = store.commit(put("k", "between")).await;
    assert!(
        matches!(between, Err(StoreError::Fenced { newest: 0, .. })),
        "{between:?}"
    );
    client.put("/arcface/leader", "a:1", None).await.expect("put");
    let late = store.commit(put("k", "late").expect_absent("other")).await;
    assert!(matches!(late, Err(StoreError::Fenced { .. })), "{late:?}");
    let found = client.get("/arcface/state/k", None).await.expect("get");
    assert_eq!(found.kvs()[0].value(), b"before");
    let why = within("the end of the tenure", tenure.over()).await;
    // The keeper looks when it is time: between the two writes of this test, or after both.
    let reasons = ["the leader's key is gone", "a:1 leads now"];
    assert!(reasons.iter().any(|reason| why.contains(reason)), "{why}");
}

#[tokio::test]
async fn a_lost_answer_is_unknown_and_a_read_tells_what_happened() {
    let Some(etcd) = start() else { return };
    let proxy = Proxy::start(&etcd).await;
    let tenure = elected(&candidate(&proxy.url(), "a:1").await).await;
    let store = tenure.store();
    store.commit(put("k", "old")).await.expect("commit");

    proxy.cut(Cut::Answers);
    let outcome = within("an outcome", store.commit(put("k", "new"))).await;
    assert!(matches!(outcome, Err(StoreError::Unknown(_))), "{outcome:?}");
    proxy.cut(Cut::Closed);
    proxy.cut(Cut::None);
    let entry = within("an answer", store.get("k"))
        .await
        .expect("get")
        .expect("entry");
    assert_eq!(entry.value, b"new", "etcd had it before the answer was lost");
    let next = put("k", "newer").expect_revision("k", entry.revision);
    store
        .commit(next)
        .await
        .expect("the revision of the lost answer is the right one");
}

#[tokio::test]
async fn a_transaction_that_comes_late_has_no_effect_after_the_read() {
    let Some(etcd) = start() else { return };
    let tenure = elected(&candidate(&etcd.url(), "a:1").await).await;
    let store = tenure.store.clone();
    store.commit(put("k", "old")).await.expect("commit");
    // A transaction as this leader would send it, kept back on its way until the leader has given it up.
    let before = store.renewed.load(Ordering::SeqCst);
    let late = Txn::new()
        .when(vec![store.is_leader(), store.is_renewed(before)])
        .and_then(vec![TxnOp::put("/arcface/state/k", "late", None)]);
    drop(InFlight {
        unsettled: &store.unsettled,
        known: false,
    });
    assert_eq!(value(&*store, "k").await.as_deref(), Some("old"));
    let mut client = raw(&etcd).await;
    let answer = client.txn(late).await.expect("an answer");
    assert!(
        !answer.succeeded(),
        "the leader's key was written again before the read"
    );
    store
        .commit(put("k", "next"))
        .await
        .expect("the leader itself goes on");
    let leader = client.get("/arcface/leader", None).await.expect("get");
    assert_eq!(leader.kvs()[0].create_revision() as u64, store.epoch());
    assert_eq!(leader.kvs()[0].lease(), store.lease);
}

#[tokio::test]
async fn a_key_that_was_renewed_by_a_late_try_is_taken_as_it_is() {
    let Some(etcd) = start() else { return };
    let tenure = elected(&candidate(&etcd.url(), "a:1").await).await;
    let options = PutOptions::new().with_lease(tenure.store.lease);
    let renewed = raw(&etcd)
        .await
        .put("/arcface/leader", "a:1", Some(options))
        .await;
    renewed.expect("put");
    tenure.store().commit(put("k", "1")).await.expect("commit");
}

#[tokio::test]
async fn a_short_absence_of_etcd_is_waited_out_and_a_long_one_ends_the_tenure() {
    let Some(mut etcd) = start() else { return };
    let candidate = candidate(&etcd.url(), "a:1").await;
    let tenure = elected(&candidate).await;
    let store = tenure.store();
    store.commit(put("k", "1")).await.expect("commit");
    etcd.kill().expect("kill");
    let refused = store.commit(put("k", "2")).await;
    assert!(
        matches!(refused, Err(StoreError::Failed(_) | StoreError::Unknown(_))),
        "{refused:?}"
    );
    let why = within("the end of the tenure", tenure.over()).await;
    assert!(why.contains("could not be renewed"), "{why}");
    etcd.resume().expect("resume");
    // The old key lapses first: etcd gives every lease its full time when it starts.
    let again = elected(&candidate).await;
    assert!(again.store().epoch() > store.epoch());
    assert_eq!(value(&*again.store(), "k").await.as_deref(), Some("1"));
}

#[tokio::test]
async fn compaction_changes_nothing_for_a_leader_and_a_waiting_candidate() {
    let Some(etcd) = start() else { return };
    let (a, b) = (
        candidate(&etcd.url(), "a:1").await,
        candidate(&etcd.url(), "b:1").await,
    );
    let first = elected(&a).await;
    let store = first.store();
    let mut known = b.leader();
    let second = tokio::spawn(async move { b.campaign().await });
    within("b to see a", known.wait_for(|leader| leader.is_some()))
        .await
        .expect("known");
    let mut revision = 0;
    for round in 0..20 {
        revision = store.commit(put("k", &round.to_string())).await.expect("commit");
    }
    raw(&etcd)
        .await
        .compact(revision as i64, None)
        .await
        .expect("compact");
    assert_eq!(value(&*store, "k").await.as_deref(), Some("19"));
    store
        .commit(put("k", "20").expect_revision("k", revision))
        .await
        .expect("commit");
    first.resign().await;
    let second = within("b to lead", second).await.expect("no panic");
    assert_eq!(value(&*second.store(), "k").await.as_deref(), Some("20"));
}

#[tokio::test]
async fn an_etcd_without_space_refuses_for_certain_and_the_leader_goes_on() {
    let Some(etcd) = start() else { return };
    let tenure = elected(&candidate(&etcd.url(), "a:1").await).await;
    let store = tenure.store();
    let revision = store.commit(put("k", "1")).await.expect("commit");
    let mut client = raw(&etcd).await;
    let member = client
        .status()
        .await
        .expect("status")
        .header()
        .expect("header")
        .member_id();
    let alarm = async |client: &mut Client, action| {
        let mut options = AlarmOptions::new();
        options.with_member(member);
        client
            .alarm(action, AlarmType::Nospace, Some(options))
            .await
            .expect("alarm");
    };
    alarm(&mut client, AlarmAction::Activate).await;
    let refused = store.commit(put("k", "2").expect_revision("k", revision)).await;
    assert!(
        matches!(&refused, Err(StoreError::Failed(why)) if why.contains("space")),
        "{refused:?}"
    );
    assert_eq!(value(&*store, "k").await.as_deref(), Some("1"));
    alarm(&mut client, AlarmAction::Deactivate).await;
    store
        .commit(put("k", "2").expect_revision("k", revision))
        .await
        .expect("commit");
}

#[tokio::test]
async fn another_layout_is_refused() {
    let Some(etcd) = start() else { return };
    raw(&etcd)
        .await
        .put("/arcface/format", "99", None)
        .await
        .expect("put");
    let candidate = candidate(&etcd.url(), "a:1").await;
    let error = match candidate.attempt().await {
        Err(error) => error,
        Ok(_) => panic!("elected on a store of another layout"),
    };
    assert!(error.contains("layout \"99\""), "{error}");
}

#[tokio::test]
async fn an_etcd_that_is_not_there_is_said_within_seconds() {
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    let url = format!("http://{}", nobody.local_addr().expect("address"));
    drop(nobody);
    let gone = Candidate::connect(url.parse().expect("url"), None, "a:1".into(), TTL).await;
    let error = gone.err().expect("nobody is there").to_string();
    assert!(error.contains(&url) && error.contains("refused"), "{error}");
}

//! The control task on a store whose answers get lost: what is in the store decides, and nothing happens twice.

use arcface_coordinator::{
    control::{self, ControlError, Handle},
    server::Timers,
    store::{EmbeddedStore, Entry, StateStore, StoreError, StoreFuture, Transaction},
};
use arcface_proto::{
    convert,
    spec::JobSpec,
    v1::{self, CommitCheckpointRequest, RankId},
};
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};
use tokio_util::sync::CancellationToken;

/// A store that does what it is told, and while `mute` says neither that it did nor what it has.
struct Mute {
    store: EmbeddedStore,
    mute: AtomicBool,
}

fn no_answer<T>() -> Result<T, StoreError> {
    Err(StoreError::Unknown("the answer was lost".into()))
}

impl StateStore for Mute {
    fn epoch(&self) -> u64 {
        self.store.epoch()
    }

    fn get<'a>(&'a self, key: &'a str) -> StoreFuture<'a, Option<Entry>> {
        Box::pin(async move {
            match self.mute.load(Ordering::SeqCst) && key.starts_with("job/") {
                true => no_answer(),
                false => self.store.get(key).await,
            }
        })
    }

    fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> StoreFuture<'a, Vec<Entry>> {
        self.store.list(prefix, after, limit)
    }

    fn commit(&self, transaction: Transaction) -> StoreFuture<'_, u64> {
        Box::pin(async move {
            let revision = self.store.commit(transaction).await?;
            match self.mute.load(Ordering::SeqCst) {
                true => no_answer(),
                false => Ok(revision),
            }
        })
    }
}

fn spec(output: &str) -> JobSpec {
    let wire = v1::JobSpec {
        output: Some(output.into()),
        model: Some(v1::ModelSection {
            network: Some("tiny".into()),
            ..Default::default()
        }),
        data: Some(v1::DataSection {
            rec: Some("/data".into()),
            ..Default::default()
        }),
        ..Default::default()
    };
    convert::job_spec(&wire).expect("a valid job")
}

async fn start() -> (Arc<Mute>, Handle, tempfile::TempDir, CancellationToken) {
    let directory = tempfile::tempdir().expect("scratch directory");
    let store = Arc::new(Mute {
        store: EmbeddedStore::open(directory.path()).expect("open"),
        mute: AtomicBool::new(false),
    });
    let stop = CancellationToken::new();
    let (handle, _) = control::start(store.clone(), Timers::default(), stop.clone())
        .await
        .expect("start");
    (store, handle, directory, stop)
}

/// Found by seed 97 of the simulation: the repetition was answered with "there is no job". A coordinator that cannot find out what
/// the store has does not go on: it loads its state anew.
#[tokio::test]
async fn a_submit_whose_answer_was_lost_gives_its_job_when_it_is_repeated() {
    let (store, control, _directory, stop) = start().await;
    store.mute.store(true, Ordering::SeqCst);
    let lost = control.submit(spec("out"), "once".into(), false).await;
    assert!(matches!(lost, Err(ControlError::Unavailable(_))), "{lost:?}");
    store.mute.store(false, Ordering::SeqCst);
    let ended = control.submit(spec("out"), "once".into(), false).await;
    assert!(matches!(ended, Err(ControlError::Unavailable(_))), "{ended:?}");
    let (control, _) = control::start(store.clone(), Timers::default(), stop)
        .await
        .expect("start again");
    let first = control
        .submit(spec("out"), "once".into(), false)
        .await
        .expect("the job");
    let again = control
        .submit(spec("out"), "once".into(), false)
        .await
        .expect("the job");
    assert_eq!(first.id, again.id);
    let jobs = store.list("job/", None, 10).await.expect("list");
    assert_eq!(jobs.len(), 1, "one request, one job");
    assert_eq!(control.job(first.id).await.expect("it is known").revision, 1);
}

/// Submits that come together share a transaction, and each has its own answer.
#[tokio::test]
async fn submits_at_the_same_time_are_all_there_once() {
    let (store, control, _directory, _stop) = start().await;
    let submits: Vec<_> = (0..200)
        .map(|number| {
            let control = control.clone();
            // Every request comes twice.
            let request = format!("request-{}", number / 2);
            tokio::spawn(async move { control.submit(spec(&request), request.clone(), false).await })
        })
        .collect();
    let mut ids = Vec::new();
    for submit in submits {
        ids.push(submit.await.expect("no panic").expect("accepted").id);
    }
    assert!(
        ids.chunks(2).all(|twice| twice[0] == twice[1]),
        "the same request is the same job"
    );
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 100);
    assert_eq!(store.list("job/", None, 1_000).await.expect("list").len(), 100);
}

/// Found by seed 976 of the simulation: a replaced coordinator told the ranks of a newer generation that theirs was
/// over.
#[tokio::test]
async fn a_rank_of_a_newer_generation_is_asked_to_try_another_coordinator() {
    let (_store, control, _directory, _stop) = start().await;
    let job = control
        .submit(spec("out"), String::new(), false)
        .await
        .expect("accepted");
    let rank = RankId {
        job_id: job.id,
        generation: 7,
        rank: 0,
    };
    let answer = control
        .commit_checkpoint(rank, CommitCheckpointRequest::default())
        .await;
    assert!(matches!(answer, Err(ControlError::Unavailable(_))), "{answer:?}");
}

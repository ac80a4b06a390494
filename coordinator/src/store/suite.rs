//! What every store must do. `open` opens the same store anew; the one before it is dropped first.

use super::{MAX_TRANSACTION_BYTES, StateStore, StoreError, Transaction};
use std::sync::Arc;

/// Runs the whole suite on an empty store.
pub async fn run(open: &dyn Fn() -> Arc<dyn StateStore>) {
    let store = open();
    reads_its_writes(&*store).await;
    lists_in_order(&*store).await;
    is_all_or_nothing(&*store).await;
    refuses_what_is_too_large(&*store).await;
    one_of_many_wins(store.clone()).await;
    let epoch = store.epoch();
    drop(store);
    let store = open();
    assert_eq!(store.epoch(), epoch + 1, "every opening has its own epoch");
    survives(&*store).await;
}

async fn value(store: &dyn StateStore, key: &str) -> Option<Vec<u8>> {
    store.get(key).await.expect("get").map(|entry| entry.value)
}

async fn reads_its_writes(store: &dyn StateStore) {
    assert_eq!(value(store, "a/1").await, None);
    let first = store
        .commit(Transaction::default().put("a/1", b"one".to_vec()))
        .await
        .expect("commit");
    let second = store
        .commit(Transaction::default().put("a/2", Vec::new()))
        .await
        .expect("commit");
    assert!(second > first, "revisions grow");
    assert_eq!(
        store.get("a/1").await.expect("get").expect("entry").revision,
        first
    );
    assert_eq!(value(store, "a/2").await, Some(Vec::new()));
    store
        .commit(Transaction::default().delete("a/2").delete("a/never"))
        .await
        .expect("delete");
    assert_eq!(value(store, "a/2").await, None);
}

async fn lists_in_order(store: &dyn StateStore) {
    let keys = ["l/b", "l/a", "l/c/x", "l2", "k", "l/c"];
    let all = keys.iter().fold(Transaction::default(), |txn, key| {
        txn.put(*key, key.as_bytes().to_vec())
    });
    store.commit(all).await.expect("commit");
    let list = async |after: Option<&str>, limit| -> Vec<String> {
        let entries = store.list("l/", after, limit).await.expect("list");
        assert!(entries.iter().all(|entry| entry.value == entry.key.as_bytes()));
        entries.into_iter().map(|entry| entry.key).collect()
    };
    assert_eq!(list(None, 10).await, ["l/a", "l/b", "l/c", "l/c/x"]);
    assert_eq!(list(None, 2).await, ["l/a", "l/b"]);
    assert_eq!(list(Some("l/b"), 10).await, ["l/c", "l/c/x"]);
    assert_eq!(list(Some("l/bb"), 1).await, ["l/c"]);
    assert_eq!(list(Some("k"), 1).await, ["l/a"]);
    assert!(list(Some("l/z"), 10).await.is_empty());
}

async fn is_all_or_nothing(store: &dyn StateStore) {
    let revision = store
        .commit(Transaction::default().put("t/x", b"1".to_vec()))
        .await
        .expect("commit");
    for wrong in [
        Transaction::default().expect_absent("t/x"),
        Transaction::default().expect_revision("t/x", revision - 1),
        Transaction::default().expect_revision("t/none", revision),
        Transaction::default()
            .expect_revision("t/x", revision)
            .expect_absent("t/x"),
    ] {
        let outcome = store.commit(wrong.put("t/y", b"2".to_vec()).delete("t/x")).await;
        assert!(matches!(outcome, Err(StoreError::Conflict { .. })), "{outcome:?}");
    }
    assert_eq!(value(store, "t/x").await, Some(b"1".to_vec()));
    assert_eq!(value(store, "t/y").await, None);
    let right = Transaction::default()
        .expect_revision("t/x", revision)
        .expect_absent("t/y");
    store
        .commit(right.put("t/y", b"2".to_vec()).delete("t/x"))
        .await
        .expect("commit");
    assert_eq!(value(store, "t/x").await, None);
    assert_eq!(value(store, "t/y").await, Some(b"2".to_vec()));
}

async fn refuses_what_is_too_large(store: &dyn StateStore) {
    let large = Transaction::default().put("s/large", vec![0; MAX_TRANSACTION_BYTES + 1]);
    assert!(matches!(
        store.commit(large).await,
        Err(StoreError::TooLarge { .. })
    ));
    let no_key = Transaction::default().put("", Vec::new());
    assert!(matches!(
        store.commit(no_key).await,
        Err(StoreError::TooLarge { .. })
    ));
    let fits = Transaction::default().put("s/fits", vec![7; MAX_TRANSACTION_BYTES]);
    store.commit(fits).await.expect("commit");
    assert_eq!(value(store, "s/large").await, None);
}

/// Many at once want to be the one who makes a key: exactly one is.
async fn one_of_many_wins(store: Arc<dyn StateStore>) {
    let tries = (0..16u8).map(|i| {
        let store = store.clone();
        tokio::spawn(async move {
            store
                .commit(Transaction::default().expect_absent("race").put("race", vec![i]))
                .await
                .map(|_| i)
        })
    });
    let mut winners = Vec::new();
    for attempt in tries.collect::<Vec<_>>() {
        match attempt.await.expect("no panic") {
            Ok(i) => winners.push(i),
            Err(error) => assert!(matches!(error, StoreError::Conflict { .. }), "{error}"),
        }
    }
    assert_eq!(winners.len(), 1, "{winners:?}");
    assert_eq!(value(&*store, "race").await, Some(winners));
}

async fn survives(store: &dyn StateStore) {
    assert_eq!(value(store, "a/1").await, Some(b"one".to_vec()));
    assert_eq!(value(store, "a/2").await, None);
    assert_eq!(value(store, "t/y").await, Some(b"2".to_vec()));
    assert_eq!(store.list("l/", None, 10).await.expect("list").len(), 4);
    let before = store.get("a/1").await.expect("get").expect("entry").revision;
    let after = store
        .commit(Transaction::default().put("a/1", Vec::new()))
        .await
        .expect("commit");
    assert!(after > before, "revisions go on after a restart");
}

//! What every store must do. `open` opens the same store anew; the one before it is dropped first.

use super::{
    MAX_KEY_BYTES, MAX_TRANSACTION_BYTES, MAX_TRANSACTION_KEYS, StateStore, StoreError, Transaction,
};
use std::sync::Arc;

/// Runs the whole suite on an empty store.
pub async fn run(open: impl AsyncFn() -> Arc<dyn StateStore>) {
    let store = open().await;
    reads_its_writes(&*store).await;
    lists_in_order(&*store).await;
    is_all_or_nothing(&*store).await;
    keeps_the_last_of_several_writes(&*store).await;
    lists_more_than_a_page(&*store).await;
    refuses_what_is_too_large(&*store).await;
    one_of_many_wins(store.clone()).await;
    let epoch = store.epoch();
    drop(store);
    let store = open().await;
    assert!(store.epoch() > epoch, "every opening has a higher epoch");
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

async fn keeps_the_last_of_several_writes(store: &dyn StateStore) {
    let twice = Transaction::default()
        .put("w/a", b"1".to_vec())
        .put("w/a", b"2".to_vec())
        .put("w/b", b"1".to_vec())
        .delete("w/b")
        .delete("w/c")
        .put("w/c", b"3".to_vec());
    store.commit(twice).await.expect("commit");
    assert_eq!(value(store, "w/a").await, Some(b"2".to_vec()));
    assert_eq!(value(store, "w/b").await, None);
    assert_eq!(value(store, "w/c").await, Some(b"3".to_vec()));
}

async fn lists_more_than_a_page(store: &dyn StateStore) {
    for hundred in 0..5 {
        let keys = (0..100).fold(Transaction::default(), |txn, i| {
            txn.put(format!("p/{hundred}{i:02}"), Vec::new())
        });
        store.commit(keys).await.expect("commit");
    }
    let all = store.list("p/", None, 1000).await.expect("list");
    assert!(all.iter().map(|entry| &entry.key).is_sorted());
    assert_eq!(all.len(), 500);
    let some = store.list("p/", Some("p/099"), 350).await.expect("list");
    assert_eq!(
        (some.len(), some[0].key.as_str(), some[349].key.as_str()),
        (350, "p/100", "p/449")
    );
}

async fn refuses_what_is_too_large(store: &dyn StateStore) {
    let large = Transaction::default().put("s/large", vec![0; MAX_TRANSACTION_BYTES + 1]);
    assert!(matches!(
        store.commit(large).await,
        Err(StoreError::TooLarge { .. })
    ));
    let no_key = Transaction::default().put("", Vec::new());
    assert!(matches!(store.commit(no_key).await, Err(StoreError::Failed(_))));
    let long = "k".repeat(MAX_KEY_BYTES + 1);
    let many = |count| (0..count).fold(Transaction::default(), |txn, i| txn.delete(format!("s/{i}")));
    let doubtful = (0..=MAX_TRANSACTION_KEYS).fold(Transaction::default(), |txn, i| {
        txn.expect_absent(format!("s/{i}"))
    });
    for large in [
        Transaction::default().delete(long.as_str()),
        Transaction::default().expect_absent(long.as_str()),
        many(MAX_TRANSACTION_KEYS + 1),
        doubtful,
    ] {
        let refused = store.commit(large).await;
        assert!(matches!(refused, Err(StoreError::TooLarge { .. })), "{refused:?}");
    }
    let most = (0..MAX_TRANSACTION_KEYS).fold(many(MAX_TRANSACTION_KEYS), |txn, i| {
        txn.expect_absent(format!("s/{i}"))
    });
    store.commit(most).await.expect("commit");
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

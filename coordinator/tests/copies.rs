//! Copies in the memory of nodes as the coordinator deals with them: what a generation is told to resume from, with fakes for
//! agents and ranks.

mod fakes;

use arcface_proto::v1::{self, JobState, RankError, report_request::Report};
use fakes::{Agent, Cluster, Rank, generation, spec, training};

#[tokio::test]
async fn copies_in_memory_are_resumed_from_where_they_are_newer_and_at_hand() {
    let cluster = Cluster::start().await;
    let (id, mut a, mut b, zero, one) = training(&cluster, spec(2)).await;
    assert_eq!(zero.assignment.nodes, ["node-a", "node-b"]);
    one.commit(20).await.expect("taken");
    assert!(zero.commit(20).await.expect("taken"));
    // One set is whole, of the next one rank 0's parts are missing.
    one.copied(28, &["node-b", "node-a"]).await;
    zero.copied(28, &["node-a", "node-b"]).await;
    one.copied(36, &["node-b", "node-a"]).await;
    let one = one.heard(&cluster).await;
    zero.metrics(37).await;
    cluster.job_when(&id, "reports", |job| job.step == 37).await;
    b.exit(&one.assignment, None, Some(9)).await;

    let resumed = |rank: &Rank| {
        let copies = &rank.assignment.resume_copies;
        let step = rank.assignment.resume.as_ref().map(|manifest| manifest.step);
        (
            step,
            copies
                .iter()
                .map(|copies| copies.nodes.clone())
                .collect::<Vec<_>>(),
        )
    };
    let (zero, one) = generation(&cluster, &mut a, &mut b).await;
    let at = |nodes: [&str; 2]| nodes.map(str::to_owned).to_vec();
    let (on_a, on_b) = (at(["node-a", "node-b"]), at(["node-b", "node-a"]));
    assert_eq!(resumed(&zero), (Some(28), vec![on_a.clone(), on_a, on_b]));
    assert_eq!(resumed(&one), resumed(&zero));
    zero.metrics(29).await;
    let job = cluster.job_in(&id, JobState::Running).await;
    let recovery = job.recoveries.last().expect("a recovery");
    assert_eq!(
        (recovery.resumed_step, recovery.lost_steps, recovery.from_memory),
        (Some(28), Some(9), true)
    );
    assert_eq!(job.checkpoint_step, Some(20), "copies are no checkpoint");

    // They cannot be had: the committed checkpoint it is, and they are not tried again.
    zero.report(Report::Error(RankError {
        message: "cannot resume".into(),
        damaged: Some(v1::DamagedCheckpoint {
            step: 28,
            file: "head-0-5.safetensors".into(),
            detail: "node-b at 127.0.0.1:9: connection refused".into(),
            in_memory: true,
        }),
        ..Default::default()
    }))
    .await;
    let (zero, one) = generation(&cluster, &mut a, &mut b).await;
    assert_eq!(resumed(&zero), (Some(20), vec![]));
    let job = cluster.job_in(&id, JobState::Running).await;
    let recovery = job.recoveries.last().expect("a recovery");
    assert_eq!(
        recovery.reason,
        "rank 0 on node-a: the copies of step 28 in memory cannot be used: node-b at 127.0.0.1:9: connection refused"
    );
    assert!(!recovery.from_memory);

    // A checkpoint that is as new has precedence.
    for step in [40, 41] {
        zero.copied(step, &["node-a", "node-b"]).await;
        one.copied(step, &["node-a", "node-b"]).await;
    }
    let one = one.heard(&cluster).await;
    one.commit(41).await.expect("taken");
    assert!(zero.commit(41).await.expect("taken"));
    b.exit(&one.assignment, None, Some(9)).await;
    let (zero, one) = generation(&cluster, &mut a, &mut b).await;
    assert_eq!(resumed(&zero), (Some(41), vec![]));

    // The job ends: who has copies may forget them.
    for (rank, agent) in [(&zero, &a), (&one, &b)] {
        rank.finished(100).await;
        agent.exit(&rank.assignment, Some(0), None).await;
    }
    zero.close().await;
    one.close().await;
    cluster.job_in(&id, JobState::Succeeded).await;
    assert_eq!((a.forgot().await, b.forgot().await), (id.clone(), id));
}

#[tokio::test]
async fn a_node_that_was_restarted_has_lost_its_copies_and_others_have_them() {
    let cluster = Cluster::start().await;
    let (_, mut a, b, zero, one) = training(&cluster, spec(2)).await;
    // Rank 0's parts on both nodes, rank 1's on its own alone.
    zero.copied(10, &["node-a", "node-b"]).await;
    one.copied(10, &["node-b"]).await;
    zero.copied(20, &["node-a", "node-b"]).await;
    one.copied(20, &["node-b", "node-a"]).await;
    one.close().await;
    zero.close().await;
    let ranks = b.vanish();
    ranks.lock().expect("ranks").clear();
    let mut b = Agent::join_as(&cluster, "node-b", "boot-2", 1, ranks)
        .await
        .expect("joins");
    let (zero, _one) = generation(&cluster, &mut a, &mut b).await;
    let copies = &zero.assignment.resume_copies;
    assert_eq!(
        zero.assignment.resume.as_ref().map(|manifest| manifest.step),
        Some(20)
    );
    assert!(
        !copies.is_empty() && copies.iter().all(|copies| copies.nodes == ["node-a"]),
        "{copies:?}"
    );
}

#[tokio::test]
async fn copies_are_progress_that_starts_the_count_of_failures_anew() {
    let cluster = Cluster::start().await;
    let mut spec = spec(2);
    spec.job.get_or_insert_default().max_restarts = Some(1);
    let (id, mut a, mut b, mut zero, mut one) = training(&cluster, spec).await;
    for step in [10, 20, 30] {
        zero.copied(step, &["node-a", "node-b"]).await;
        one.copied(step, &["node-a", "node-b"]).await;
        zero.close().await;
        let dying = one.heard(&cluster).await;
        b.exit(&dying.assignment, None, Some(9)).await;
        (zero, one) = generation(&cluster, &mut a, &mut b).await;
    }
    // Without new ones, the second failure in a row is one too many.
    b.exit(&one.assignment, None, Some(9)).await;
    let job = cluster.job_in(&id, JobState::Failed).await;
    assert!(
        job.reason.starts_with("gave up after 1 restarts"),
        "{}",
        job.reason
    );
}

//! Nodes that are to be left: jobs make a checkpoint and go on elsewhere.

mod fakes;

use arcface_proto::v1::{self, DrainNodeRequest, JobState, ListNodesRequest, Node, report_response};
use fakes::{Agent, Cluster, Rank, generation, spec, training, within};
use tonic::{Code, Status};

/// Drains a node, or takes that back.
async fn drain(cluster: &Cluster, node: &str, undo: bool) -> Result<Node, Status> {
    let request = DrainNodeRequest {
        node_id: node.into(),
        undo,
    };
    let answer = cluster.nodes().drain_node(request).await?;
    Ok(answer.into_inner().node.expect("node"))
}

async fn asked_for_a_checkpoint(zero: &mut Rank) {
    let command = within("command", zero.commands.message())
        .await
        .expect("stream")
        .expect("command")
        .command;
    assert!(
        matches!(command, Some(report_response::Command::CheckpointNow(_))),
        "{command:?}"
    );
}

#[tokio::test]
async fn a_drained_node_is_left_after_a_checkpoint_and_stays_drained() {
    let cluster = Cluster::start().await;
    let (id, mut a, b, mut zero, one) = training(&cluster, spec(2)).await;
    let mut c = Agent::join(&cluster, "node-c", 1).await;
    let node = drain(&cluster, "node-b", false).await.expect("drain");
    assert_eq!(node.state(), v1::NodeState::Draining);
    asked_for_a_checkpoint(&mut zero).await;
    one.commit(5).await.expect("taken");
    assert!(zero.commit(5).await.expect("taken"));
    let (zero, one) = generation(&cluster, &mut a, &mut c).await;
    assert_eq!(
        zero.assignment.resume.as_ref().map(|manifest| manifest.step),
        Some(5)
    );
    assert_eq!(one.assignment.node_id, "node-c");
    assert_eq!(
        cluster.job_in(&id, JobState::Running).await.recoveries[0].kind,
        "drained"
    );

    drop((a, c));
    let ranks = b.vanish();
    let cluster = cluster.restart().await;
    let _b = Agent::join_as(&cluster, "node-b", "boot-1", 1, ranks)
        .await
        .expect("welcome");
    let nodes = cluster
        .nodes()
        .list_nodes(ListNodesRequest::default())
        .await
        .expect("list")
        .into_inner()
        .nodes;
    let b = nodes.iter().find(|node| node.id == "node-b").expect("node-b");
    assert_eq!(b.state(), v1::NodeState::Draining);
    let unknown = drain(&cluster, "node-z", false).await.expect_err("unknown");
    assert_eq!(unknown.code(), Code::NotFound);
}

#[tokio::test]
async fn an_agent_that_stops_is_left_after_a_checkpoint_and_welcome_again() {
    let cluster = Cluster::start().await;
    let (id, mut a, mut b, mut zero, one) = training(&cluster, spec(2)).await;
    b.leaves().await;
    asked_for_a_checkpoint(&mut zero).await;
    one.commit(7).await.expect("taken");
    assert!(zero.commit(7).await.expect("taken"));
    assert_eq!(b.killed().await.generation, 1);
    let waits = |job: &v1::Job| job.reason.starts_with("wants 2 ranks, 1 slot free");
    cluster.job_until(&id, "waits for another node", waits).await;

    // Its successor on the same node is no leaver.
    b.vanish();
    let mut b = Agent::join_as(&cluster, "node-b", "boot-2", 1, Default::default())
        .await
        .expect("welcome");
    let (zero, _one) = generation(&cluster, &mut a, &mut b).await;
    assert_eq!(
        zero.assignment.resume.as_ref().map(|manifest| manifest.step),
        Some(7)
    );
    let job = cluster.job_in(&id, JobState::Running).await;
    assert_eq!(job.recoveries[0].kind, "drained");
}

#[tokio::test]
async fn a_drain_outlives_the_coordinator_that_was_asked_for_it() {
    let cluster = Cluster::start().await;
    let (id, a, b, mut zero, one) = training(&cluster, spec(2)).await;
    drain(&cluster, "node-b", false).await.expect("drain");
    asked_for_a_checkpoint(&mut zero).await;
    let (ranks_a, ranks_b) = (a.vanish(), b.vanish());
    let cluster = cluster.restart().await;
    let mut a = Agent::join_as(&cluster, "node-a", "boot-1", 1, ranks_a)
        .await
        .expect("welcome");
    let _b = Agent::join_as(&cluster, "node-b", "boot-1", 1, ranks_b)
        .await
        .expect("welcome");
    let mut c = Agent::join(&cluster, "node-c", 1).await;
    let mut zero = Rank::connect(&cluster, zero.assignment).await;
    let one = Rank::connect(&cluster, one.assignment).await;
    zero.metrics(3).await;
    asked_for_a_checkpoint(&mut zero).await;
    one.commit(5).await.expect("taken");
    assert!(zero.commit(5).await.expect("taken"));
    let (_zero, one) = generation(&cluster, &mut a, &mut c).await;
    assert_eq!(one.assignment.node_id, "node-c");
    let job = cluster.job_in(&id, JobState::Running).await;
    assert_eq!(job.recoveries[0].kind, "drained");
}

#[tokio::test]
async fn a_drain_that_is_taken_back_ends_no_generation() {
    let cluster = Cluster::start().await;
    let (id, _a, _b, mut zero, one) = training(&cluster, spec(2)).await;
    drain(&cluster, "node-b", false).await.expect("drain");
    asked_for_a_checkpoint(&mut zero).await;
    let node = drain(&cluster, "node-b", true).await.expect("undone");
    assert_eq!(node.state(), v1::NodeState::Healthy);
    one.commit(5).await.expect("taken");
    assert!(zero.commit(5).await.expect("taken"));
    zero.metrics(6).await;
    let trains = |job: &v1::Job| job.step == 6;
    cluster.job_until(&id, "trains on", trains).await;
    let job = cluster.job(&id).await;
    assert_eq!((job.generation, job.recoveries.len()), (1, 0), "{job:?}");
}

//! Nodes that are not heard: lost ones, and those that a coordinator which stood still could not hear.

mod fakes;

use arcface_proto::v1::JobState;
use fakes::{Agent, Cluster, TIMERS, spec, training};
use std::time::Duration;

#[tokio::test]
async fn a_lost_node_shrinks_an_elastic_job_and_its_old_rank_is_stopped_when_it_comes_back() {
    let cluster = Cluster::start().await;
    let mut elastic = spec(2);
    let section = elastic.job.as_mut().expect("section");
    section.elastic = Some("shrink".into());
    section.min_world_size = Some(1);
    let (id, mut a, b, ..) = training(&cluster, elastic).await;
    let ranks_b = b.vanish();
    let alone = a.launched().await;
    assert_eq!((alone.generation, alone.world_size, alone.rank), (2, 1, 0));
    let job = cluster.job(&id).await;
    assert_eq!(job.recoveries[0].kind, "lost");
    assert!(
        job.recoveries[0].detected_s >= 2.5 && job.recoveries[0].detected_s < 4.0,
        "{:?}",
        job.recoveries
    );
    let mut b = Agent::join_as(&cluster, "node-b", "boot-1", 1, ranks_b)
        .await
        .expect("welcome");
    assert_eq!(b.killed().await.generation, 1);
    assert_eq!(cluster.job(&id).await.generation, 2, "the job goes on");
}

/// A pause of the coordinator's process or machine: whatever nodes said meanwhile is heard after it.
#[tokio::test]
async fn a_coordinator_that_stood_still_takes_no_node_for_lost() {
    let cluster = Cluster::start().await;
    let (id, a, b, ..) = training(&cluster, spec(2)).await;
    for _ in 0..2 {
        // Coordinator and agents run on this very thread, as tasks: all of them stand still.
        std::thread::sleep(Duration::from_millis(TIMERS.lost_ms + 1_000));
        // Silence is looked for at every tick, and a heartbeat comes in between.
        tokio::time::sleep(Duration::from_millis(4 * TIMERS.heartbeat_ms)).await;
    }
    let job = cluster.job(&id).await;
    assert_eq!((job.state(), job.generation), (JobState::Running, 1), "{job:?}");
    assert!(job.recoveries.is_empty());
    drop((a, b));
}

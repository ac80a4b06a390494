//! Which generations belong to one trace, as their assignments say. What a collector gets of it is in `tests/tests/traces.rs`.

mod fakes;

use arcface_proto::v1::RankAssignment;
use arcface_traces::Otlp;
use clap::Parser;
use fakes::{Agent, Cluster, Rank, spec};

#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    otlp: Otlp,
}

/// The trace that a generation's spans lie in.
fn trace(assignment: &RankAssignment) -> &str {
    let fields: Vec<&str> = assignment.trace_parent.split('-').collect();
    let ["00", trace, _, "01"] = fields[..] else {
        panic!("no context: {:?}", assignment.trace_parent);
    };
    trace
}

async fn trains(cluster: &Cluster, id: &str, assignment: RankAssignment, step: u64) {
    let rank = Rank::connect(cluster, assignment).await;
    rank.rendezvous().await.expect("met");
    rank.started(0).await;
    rank.metrics(step).await;
    cluster.job_when(id, "trains", |job| job.step == step).await;
    rank.close().await;
}

#[tokio::test]
async fn failures_on_the_way_are_of_its_trace_and_a_failure_in_training_begins_another() {
    // Nobody listens there: spans are lost, which disturbs nobody.
    let flags = Flags::parse_from(["test", "--otlp", "http://127.0.0.1:9"]);
    let _traces = flags.otlp.start("test").expect("it need not be there");
    let cluster = Cluster::start().await;
    let mut agent = Agent::join(&cluster, "node-a", 1).await;
    let mut patient = spec(1);
    patient.job.as_mut().expect("section").max_restarts = Some(10);
    let id = cluster.submit(patient).await;

    let first = agent.launched().await;
    agent.exit(&first, Some(1), None).await;
    let second = agent.launched().await;
    assert_eq!(
        second.trace_parent, first.trace_parent,
        "no step was done between"
    );
    trains(&cluster, &id, second.clone(), 5).await;

    agent.exit(&second, None, Some(9)).await;
    let third = agent.launched().await;
    assert_ne!(trace(&third), trace(&first), "a recovery is not the submit");
    agent.exit(&third, None, Some(9)).await;
    let fourth = agent.launched().await;
    assert_eq!(
        fourth.trace_parent, third.trace_parent,
        "it goes on to a new step"
    );
    trains(&cluster, &id, fourth.clone(), 6).await;

    agent.exit(&fourth, None, Some(9)).await;
    let fifth = agent.launched().await;
    assert_ne!(trace(&fifth), trace(&third));

    // Nothing of it is stored: the submit of a job that waited ended with the coordinator that took it in.
    let other = cluster.submit(spec(1)).await;
    agent.vanish();
    let cluster = cluster.restart().await;
    let mut agent = Agent::join(&cluster, "node-b", 1).await;
    let waiting = agent.launched().await;
    assert_eq!((waiting.job_id, waiting.trace_parent.as_str()), (other, ""));
}

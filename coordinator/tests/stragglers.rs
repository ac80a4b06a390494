//! What the coordinator makes of the paces that ranks tell: who is named, where, and until when.

mod fakes;

use arcface_proto::v1::{self, JobState, report_request::Report, watch_job_response::Event};
use fakes::{Cluster, generation, spec, training, within};

#[tokio::test]
async fn a_slow_rank_is_named_and_forgotten_with_its_generation() {
    let cluster = Cluster::start().await;
    let (id, mut a, mut b, zero, one) = training(&cluster, spec(2)).await;
    let mut events = cluster.watch(&id).await;
    let pace = |input_s, forward_s| {
        let seconds = [("data_wait", input_s), ("forward", forward_s), ("eval", 99.0)];
        Report::Pace(v1::RankPace {
            step: 10,
            steps: 5,
            busy_seconds: seconds.map(|(phase, seconds)| (phase.to_owned(), seconds)).into(),
            figures: None,
        })
    };
    within("rank 1 is named", async {
        while cluster.job(&id).await.stragglers.is_empty() {
            zero.report(pace(0.0, 0.5)).await;
            one.report(pace(1.0, 0.7)).await;
        }
    })
    .await;
    let found = within("the event", async {
        loop {
            let event = events.message().await.expect("watch").expect("an event").event;
            if let Some(Event::Straggler(found)) = event {
                return found;
            }
        }
    })
    .await;
    assert_eq!(
        (found.rank, found.node.as_str(), found.over),
        (1, "node-b", false)
    );
    assert_eq!(found.cause, "input");
    assert!((found.ratio - 3.4).abs() < 1e-9, "{found:?}");
    let job = cluster.job(&id).await;
    assert_eq!((job.state(), job.generation), (JobState::Running, 1));
    assert_eq!(job.stragglers, [found]);

    b.exit(&one.assignment, None, Some(9)).await;
    let _next = generation(&cluster, &mut a, &mut b).await;
    assert_eq!(cluster.job_in(&id, JobState::Running).await.stragglers, []);
}

//! The coordinator as agents, ranks and clients meet it: whole lives of jobs over real gRPC, with fakes on the other
//! side.

mod fakes;

use arcface_proto::v1::{
    self, CancelJobRequest, Evaluation, GetClusterRequest, JobState, ListCheckpointsRequest,
    ListEvaluationsRequest, ListNodesRequest, RankError, report_request::Report, report_response,
    watch_job_response::Event,
};
use fakes::{Agent, Cluster, Rank, generation, spec, training, within};
use tonic::Code;

#[tokio::test]
async fn a_job_waits_with_a_reason_trains_and_succeeds() {
    let cluster = Cluster::start().await;
    let id = cluster.submit(spec(2)).await;
    let reason = |job: &v1::Job| job.reason == "wants 2 ranks, 0 slots free on 0 nodes";
    cluster.job_until(&id, "says what it waits for", reason).await;
    let mut a = Agent::join(&cluster, "node-a", 1).await;
    cluster
        .job_until(&id, "waits for one more", |job| {
            job.reason.contains("1 slot free on 1 node")
        })
        .await;
    let mut b = Agent::join(&cluster, "node-b", 1).await;
    let (mut zero, one) = generation(&cluster, &mut a, &mut b).await;
    cluster.job_in(&id, JobState::Running).await;
    assert_eq!(
        (zero.assignment.world_size, zero.assignment.local_world_size),
        (2, 1)
    );
    assert_eq!(
        zero.assignment
            .spec
            .as_ref()
            .and_then(|s| s.train.as_ref())
            .and_then(|t| t.lr),
        Some(0.1)
    );

    let mut events = cluster.watch(&id).await;
    zero.metrics(10).await;
    let evaluation = Evaluation {
        dataset: "lfw".into(),
        step: 10,
        pairs: 6000,
        accuracy: 0.9,
        ..Default::default()
    };
    zero.report(Report::Evaluation(evaluation)).await;
    for step in [10, 20, 30, 40] {
        assert!(
            !one.commit(step).await.expect("taken"),
            "rank 0's parts are missing"
        );
        assert!(zero.commit(step).await.expect("taken"), "step {step} is complete");
        assert!(
            zero.commit(step).await.expect("taken"),
            "repeating it changes nothing"
        );
    }
    // keep = 3: the fourth lets the first go.
    let expired = within("expiry", async {
        loop {
            let message = zero.commands.message().await.expect("stream").expect("command");
            if let Some(report_response::Command::CheckpointCommitted(committed)) = message.command
                && !committed.expired_directories.is_empty()
            {
                return committed;
            }
        }
    })
    .await;
    assert_eq!(expired.expired_directories, ["checkpoints/step-10"]);
    assert_eq!(expired.manifest.expect("manifest").step, 40);

    for rank in [&zero, &one] {
        rank.finished(100).await;
    }
    a.exit(&zero.assignment, Some(0), None).await;
    b.exit(&one.assignment, Some(0), None).await;
    zero.close().await;
    one.close().await;
    let mut seen = Vec::new();
    let last = within("the end of the watch", async {
        let mut last = None;
        while let Some(message) = events.message().await.expect("watch") {
            match message.event.expect("event") {
                Event::Job(job) => last = Some(job),
                Event::Metrics(metrics) => seen.push(format!("metrics {}", metrics.step)),
                Event::Evaluation(evaluation) => {
                    seen.push(format!("{} {}", evaluation.dataset, evaluation.accuracy))
                }
                Event::Checkpoint(manifest) => seen.push(format!("checkpoint {}", manifest.step)),
                other => panic!("unexpected {other:?}"),
            }
        }
        last.expect("a job")
    })
    .await;
    assert_eq!(
        seen,
        [
            "metrics 10",
            "lfw 0.9",
            "checkpoint 10",
            "checkpoint 20",
            "checkpoint 30",
            "checkpoint 40"
        ]
    );
    assert_eq!(last.state(), JobState::Succeeded);
    assert_eq!(
        (last.step, last.checkpoint_step, last.loss),
        (100, Some(40), Some(9.5))
    );

    // It is all there after a restart.
    let cluster = cluster.restart().await;
    let job = cluster.job(&id).await;
    assert_eq!(
        (job.state(), job.step, job.generation),
        (JobState::Succeeded, 100, 1)
    );
    let request = ListCheckpointsRequest {
        job_id: id.clone(),
        ..Default::default()
    };
    let manifests = cluster
        .jobs()
        .list_checkpoints(request)
        .await
        .expect("list")
        .into_inner()
        .checkpoints;
    assert_eq!(
        manifests.iter().map(|manifest| manifest.step).collect::<Vec<_>>(),
        [40, 30, 20]
    );
    assert_eq!(manifests[0].parts.len(), 3);
    let request = ListEvaluationsRequest {
        job_id: id.clone(),
        ..Default::default()
    };
    let evaluations = cluster
        .jobs()
        .list_evaluations(request)
        .await
        .expect("list")
        .into_inner()
        .evaluations;
    assert_eq!(
        (
            evaluations.len(),
            evaluations[0].accuracy,
            evaluations[0].generation
        ),
        (1, 0.9, 1)
    );
    let mut events = cluster.watch(&id).await;
    let first = events.message().await.expect("watch").expect("snapshot");
    assert!(matches!(first.event, Some(Event::Job(job)) if job.state() == JobState::Succeeded));
    assert!(
        within("end", events.message()).await.expect("watch").is_none(),
        "nothing follows the end"
    );
}

#[tokio::test]
async fn a_dead_rank_ends_its_generation_and_the_next_resumes_from_the_checkpoint() {
    let cluster = Cluster::start().await;
    let (id, mut a, mut b, mut zero, one) = training(&cluster, spec(2)).await;
    one.commit(20).await.expect("taken");
    assert!(zero.commit(20).await.expect("taken"));
    zero.metrics(30).await;
    cluster.job_when(&id, "reports", |job| job.step == 30).await;
    b.exit(&one.assignment, None, Some(9)).await;
    assert_eq!(a.killed().await.generation, 1, "the whole generation ends");

    let (new_zero, new_one) = generation(&cluster, &mut a, &mut b).await;
    assert_eq!(new_zero.id.generation, 2);
    assert_eq!(
        new_zero.assignment.resume.as_ref().map(|manifest| manifest.step),
        Some(20)
    );
    assert_eq!(
        (
            new_zero.assignment.node_id.as_str(),
            new_one.assignment.node_id.as_str()
        ),
        ("node-a", "node-b")
    );
    new_zero.metrics(31).await;
    let done = |job: &v1::Job| job.state() == JobState::Running;
    let job = cluster.job_until(&id, "trains again", done).await;
    let recovery = &job.recoveries[0];
    assert_eq!(
        (recovery.reason.as_str(), recovery.kind.as_str()),
        ("rank 1 on node-b was killed by signal 9", "crash")
    );
    assert_eq!((recovery.resumed_step, recovery.lost_steps), (Some(20), Some(10)));

    // The old generation's messages are refused.
    zero.metrics(40).await;
    assert_eq!(zero.refused().await.code(), Code::FailedPrecondition);
    let stale = zero.commit(40).await.expect_err("stale");
    assert_eq!(stale.code(), Code::FailedPrecondition, "{stale}");
    assert_eq!(
        zero.rendezvous().await.expect_err("stale").code(),
        Code::FailedPrecondition
    );
    assert_eq!(cluster.job(&id).await.checkpoint_step, Some(20));

    // A report of the wrong rank does not pass for another.
    let mut forged = Rank::connect(&cluster, new_one.assignment.clone()).await;
    forged.metrics(50).await;
    assert_eq!(forged.refused().await.code(), Code::InvalidArgument);
    new_zero.metrics(41).await;
    assert!(new_zero.commit(41).await.is_ok());
}

#[tokio::test]
async fn a_checkpoint_that_lacks_the_parts_of_a_rank_at_its_end_is_given_up() {
    let cluster = Cluster::start().await;
    let (id, _a, _b, zero, one) = training(&cluster, spec(2)).await;
    assert!(!zero.commit(20).await.expect("taken"), "rank 1 may still write");
    one.finished(20).await;
    one.close().await;
    let refused = zero.commit(20).await.expect_err("nobody will write them");
    assert_eq!(
        (refused.code(), refused.message()),
        (
            Code::FailedPrecondition,
            "step 20 stays without the parts of rank 1, which is at its end"
        )
    );
    assert_eq!(cluster.job(&id).await.checkpoint_step, None);
}

#[tokio::test]
async fn a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used() {
    let cluster = Cluster::start().await;
    let (id, mut a, mut b, zero, one) = training(&cluster, spec(2)).await;
    for step in [10, 20] {
        one.commit(step).await.expect("taken");
        assert!(zero.commit(step).await.expect("taken"));
    }
    zero.metrics(25).await;
    b.exit(&one.assignment, None, Some(9)).await;
    let (zero, _one) = generation(&cluster, &mut a, &mut b).await;
    let resumed = |rank: &Rank| rank.assignment.resume.as_ref().map(|manifest| manifest.step);
    assert_eq!(resumed(&zero), Some(20));

    let mut events = cluster.watch(&id).await;
    let found = |step| {
        Report::Error(RankError {
            message: "cannot resume".into(),
            damaged: Some(v1::DamagedCheckpoint {
                step,
                file: "head-0-5.safetensors".into(),
                detail: "head-0-5.safetensors: 7 bytes, but 10 were committed".into(),
                in_memory: false,
            }),
            ..Default::default()
        })
    };
    zero.report(found(20)).await;
    let event = within("the damage", async {
        loop {
            let event = events.message().await.expect("watch").expect("an event").event;
            if let Some(Event::Checkpoint(manifest)) = event {
                return manifest;
            }
        }
    })
    .await;
    let damage = event.damage.expect("damage");
    assert_eq!(
        (event.step, damage.file.as_str(), damage.generation),
        (20, "head-0-5.safetensors", 2)
    );

    let (zero, one) = generation(&cluster, &mut a, &mut b).await;
    assert_eq!((zero.id.generation, resumed(&zero)), (3, Some(10)));
    zero.metrics(11).await;
    let job = cluster.job_in(&id, JobState::Running).await;
    assert_eq!(job.checkpoint_step, Some(10));
    let last = job.recoveries.last().expect("a recovery");
    assert_eq!((last.kind.as_str(), last.resumed_step), ("damaged", Some(10)));
    assert_eq!(
        last.reason,
        "rank 0 on node-a: the checkpoint of step 20 is damaged: head-0-5.safetensors: 7 bytes, but 10 were committed"
    );

    // The same step again: the damaged one stays on record, counts for no retention, and is not told to be removed.
    let kept = |step| {
        let request = ListCheckpointsRequest {
            job_id: id.clone(),
            ..Default::default()
        };
        let mut jobs = cluster.jobs();
        async move {
            let all = jobs.list_checkpoints(request).await.expect("list").into_inner();
            let listed = all.checkpoints.iter();
            let listed: Vec<_> = listed
                .map(|manifest| (manifest.step, manifest.generation, manifest.damage.is_some()))
                .collect();
            assert_eq!(listed.first().map(|first| first.0), Some(step));
            listed
        }
    };
    for step in [20, 30, 40] {
        one.commit(step).await.expect("taken");
        assert!(zero.commit(step).await.expect("taken"));
    }
    assert_eq!(
        kept(40).await,
        [(40, 3, false), (30, 3, false), (20, 3, false), (20, 1, true)]
    );

    // Everything is damaged: the job says so, and does not start over.
    let (mut zero, mut one) = (zero, one);
    for step in [40, 30, 20] {
        b.exit(&one.assignment, None, Some(9)).await;
        (zero, one) = generation(&cluster, &mut a, &mut b).await;
        assert_eq!(resumed(&zero), Some(step));
        zero.report(found(step)).await;
        if step > 20 {
            (zero, one) = generation(&cluster, &mut a, &mut b).await;
        }
    }
    zero.close().await;
    let job = cluster.job_in(&id, JobState::Failed).await;
    assert!(
        job.reason
            .ends_with("no committed checkpoint is left to go back to"),
        "{}",
        job.reason
    );
    assert_eq!(
        kept(40).await.iter().filter(|(_, _, damaged)| *damaged).count(),
        4
    );
}

#[tokio::test]
async fn a_permanent_error_fails_the_job_at_once() {
    let cluster = Cluster::start().await;
    let (id, mut a, mut b, zero, _one) = training(&cluster, spec(2)).await;
    let error = RankError {
        message: "record 7: label 12 is outside [0, 10)".into(),
        permanent: true,
        ..Default::default()
    };
    zero.report(Report::Error(error)).await;
    let job = cluster.job_in(&id, JobState::Failed).await;
    assert_eq!(
        job.reason,
        "rank 0 on node-a: record 7: label 12 is outside [0, 10)"
    );
    a.killed().await;
    b.killed().await;
    assert_eq!(cluster.job(&id).await.generation, 1, "no second try");
}

#[tokio::test]
async fn a_crash_loop_gives_up_and_says_why() {
    let cluster = Cluster::start().await;
    let mut a = Agent::join(&cluster, "node-a", 1).await;
    let mut spec = spec(1);
    spec.job.as_mut().expect("section").max_restarts = Some(2);
    let id = cluster.submit(spec).await;
    for attempt in 1..=3 {
        let rank = a.launched().await;
        assert_eq!(rank.generation, attempt);
        a.exit(&rank, Some(1), None).await;
    }
    let job = cluster.job_in(&id, JobState::Failed).await;
    assert_eq!(
        job.reason,
        "gave up after 2 restarts: rank 0 on node-a exited with 1"
    );
    assert_eq!((job.generation, job.recoveries.len()), (3, 2));
}

#[tokio::test]
async fn a_cancel_stops_the_ranks_and_is_final() {
    let cluster = Cluster::start().await;
    let (id, mut a, mut b, zero, _one) = training(&cluster, spec(2)).await;
    let cancel = CancelJobRequest {
        job_id: id.clone(),
        reason: "enough".into(),
    };
    let job = cluster
        .jobs()
        .cancel_job(cancel.clone())
        .await
        .expect("cancel")
        .into_inner()
        .job
        .expect("job");
    assert_eq!(
        (job.state(), job.reason.as_str()),
        (JobState::Cancelling, "cancelled: enough")
    );
    assert_eq!(a.killed().await.grace_ms, 100);
    b.killed().await;
    cluster.job_in(&id, JobState::Cancelled).await;
    assert_eq!(
        zero.commit(10).await.expect_err("over").code(),
        Code::FailedPrecondition
    );
    let again = cluster
        .jobs()
        .cancel_job(cancel)
        .await
        .expect("no error")
        .into_inner()
        .job
        .expect("job");
    assert_eq!(again.state(), JobState::Cancelled);
    let totals = cluster
        .nodes()
        .get_cluster(GetClusterRequest {})
        .await
        .expect("cluster")
        .into_inner();
    assert_eq!(
        (totals.slots_total, totals.slots_used, totals.jobs_active),
        (2, 0, 0)
    );
}

#[tokio::test]
async fn a_restart_of_the_coordinator_does_not_disturb_training() {
    let cluster = Cluster::start().await;
    let (id, a, b, zero, one) = training(&cluster, spec(2)).await;
    zero.metrics(10).await;
    one.commit(10).await.expect("taken");
    let (ranks_a, ranks_b) = (a.vanish(), b.vanish());
    let epoch = cluster
        .nodes()
        .get_cluster(GetClusterRequest {})
        .await
        .expect("cluster")
        .into_inner()
        .epoch;

    let cluster = cluster.restart().await;
    let totals = cluster
        .nodes()
        .get_cluster(GetClusterRequest {})
        .await
        .expect("cluster")
        .into_inner();
    assert_eq!(totals.epoch, epoch + 1);
    let _a = Agent::join_as(&cluster, "node-a", "boot-1", 1, ranks_a)
        .await
        .expect("welcome");
    let _b = Agent::join_as(&cluster, "node-b", "boot-1", 1, ranks_b)
        .await
        .expect("welcome");
    let zero = Rank::connect(&cluster, zero.assignment).await;
    let one = Rank::connect(&cluster, one.assignment).await;
    let mut events = cluster.watch(&id).await;
    zero.metrics(20).await;
    within("metrics of the same generation", async {
        loop {
            let event = events.message().await.expect("watch").expect("event").event;
            match event {
                Some(Event::Metrics(metrics)) if metrics.step == 20 => return,
                Some(Event::Job(job)) => assert_eq!((job.state(), job.generation), (JobState::Running, 1)),
                _ => {}
            }
        }
    })
    .await;
    // A checkpoint that pended is committed when its parts are told again.
    one.commit(10).await.expect("taken");
    assert!(zero.commit(10).await.expect("taken"));
    let nodes = cluster
        .nodes()
        .list_nodes(ListNodesRequest::default())
        .await
        .expect("list")
        .into_inner()
        .nodes;
    assert!(nodes.iter().all(|node| node.ranks.len() == 1), "{nodes:?}");
    let job = cluster.job(&id).await;
    assert_eq!((job.generation, job.recoveries.len()), (1, 0));
}

/// The store has the commit, and the coordinator died before rank 0 had heard of it: nobody else writes the manifest, and removes what
/// is not kept.
#[tokio::test]
async fn rank_0_hears_of_a_commit_whose_coordinator_died_over_it() {
    let cluster = Cluster::start().await;
    let (_id, a, b, zero, one) = training(&cluster, spec(2)).await;
    for step in [10, 20] {
        one.commit(step).await.expect("taken");
        assert!(zero.commit(step).await.expect("taken"));
    }
    let (ranks_a, ranks_b) = (a.vanish(), b.vanish());
    let cluster = cluster.restart().await;
    for (node, ranks) in [("node-a", ranks_a), ("node-b", ranks_b)] {
        Agent::join_as(&cluster, node, "boot-1", 1, ranks)
            .await
            .expect("welcome");
    }
    let mut zero = Rank::connect(&cluster, zero.assignment).await;
    let one = Rank::connect(&cluster, one.assignment).await;
    assert!(one.commit(20).await.expect("taken"), "told again");
    assert!(zero.commit(20).await.expect("taken"), "told again");
    zero.metrics(21).await;
    let command = within("command", zero.commands.message())
        .await
        .expect("stream")
        .expect("command")
        .command;
    let Some(report_response::Command::CheckpointCommitted(committed)) = command else {
        panic!("{command:?}");
    };
    assert_eq!(committed.manifest.map(|manifest| manifest.step), Some(20));
    assert_eq!(committed.kept_directories.len(), 2);
}

#[tokio::test]
async fn ranks_that_died_while_no_coordinator_ran_are_replaced() {
    let cluster = Cluster::start().await;
    let (id, a, b, ..) = training(&cluster, spec(2)).await;
    let (ranks_a, ranks_b) = (a.vanish(), b.vanish());
    ranks_b.lock().expect("ranks").clear();
    let cluster = cluster.restart().await;
    let mut a = Agent::join_as(&cluster, "node-a", "boot-1", 1, ranks_a)
        .await
        .expect("welcome");
    let mut b = Agent::join_as(&cluster, "node-b", "boot-1", 1, ranks_b)
        .await
        .expect("welcome");
    let (zero, _one) = generation(&cluster, &mut a, &mut b).await;
    assert_eq!(zero.id.generation, 2);
    let job = cluster.job_in(&id, JobState::Running).await;
    assert!(
        job.recoveries[0].reason.starts_with("rank 1 on node-b is gone"),
        "{:?}",
        job.recoveries
    );
}

#[tokio::test]
async fn a_second_agent_with_the_id_of_a_healthy_node_is_refused_and_a_restarted_one_is_not() {
    let cluster = Cluster::start().await;
    let (id, a, mut b, ..) = training(&cluster, spec(2)).await;
    let refused = Agent::join_as(&cluster, "node-a", "boot-2", 1, Default::default())
        .await
        .err()
        .expect("refused");
    assert_eq!(refused.code(), Code::AlreadyExists);
    assert!(
        refused.message().contains("node-a has already joined"),
        "{refused}"
    );

    a.vanish();
    let mut a = within("the old stream's end", async {
        loop {
            match Agent::join_as(&cluster, "node-a", "boot-2", 1, Default::default()).await {
                Ok(agent) => return agent,
                Err(status) => assert_eq!(status.code(), Code::AlreadyExists),
            }
            tokio::task::yield_now().await;
        }
    })
    .await;
    let _ranks = generation(&cluster, &mut a, &mut b).await;
    let job = cluster.job_in(&id, JobState::Running).await;
    assert_eq!(
        job.recoveries[0].reason,
        "the agent on node-a was restarted; it had run rank 0"
    );
}

#[tokio::test]
async fn a_watcher_that_does_not_read_misses_events_and_is_told_how_many() {
    let cluster = Cluster::start().await;
    let mut a = Agent::join(&cluster, "node-a", 1).await;
    let id = cluster.submit(spec(1)).await;
    let rank = Rank::connect(&cluster, a.launched().await).await;
    rank.started(0).await;
    cluster.job_in(&id, JobState::Running).await;
    let mut slow = cluster.narrow_watch(&id).await;
    // Several times the buffer and what HTTP/2 takes in flight (64 KiB of window, 400 KiB of the server's buffer).
    let steps = 20_000;
    for step in 1..=steps {
        rank.metrics(step).await;
    }
    rank.finished(steps).await;
    // The word of the exit overtakes the reports on another stream; they count all the same.
    a.exit(&rank.assignment, Some(0), None).await;
    rank.close().await;
    cluster.job_in(&id, JobState::Succeeded).await;
    let (mut got, mut missed, mut last_step) = (0, 0, 0);
    while let Some(message) = within("events", slow.message()).await.expect("watch") {
        match message.event.expect("event") {
            Event::Metrics(metrics) => {
                assert!(metrics.step > last_step, "in order");
                last_step = metrics.step;
                got += 1;
            }
            Event::Missed(count) => missed += count,
            _ => {}
        }
    }
    assert!(missed > 0, "the buffer is bounded: {got} got");
    // The markers count all events, of which all but the last change of state are metrics.
    assert_eq!(got + missed, steps, "no silent gap");
    assert_eq!(last_step, steps, "the newest are kept");
}

//! What clients meet: submitting, finding and listing jobs, reflection, metrics, and a coordinator that cannot start.

mod fakes;

use arcface_coordinator::server;
use arcface_proto::{
    failure::{ExitCode, report},
    v1::{self, GetJobRequest, JobState, ListJobsRequest, SubmitJobRequest},
};
use fakes::{Cluster, options, spec, training, within};
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::Code;
use tonic_types::StatusExt;

#[tokio::test]
async fn a_submit_is_idempotent_by_its_request_id_also_after_a_restart() {
    let cluster = Cluster::start().await;
    let request = SubmitJobRequest {
        request_id: "r1".into(),
        spec: Some(spec(2)),
        validate_only: false,
    };
    let first = cluster
        .jobs()
        .submit_job(request.clone())
        .await
        .expect("submit")
        .into_inner()
        .job
        .expect("job");
    let again = cluster
        .jobs()
        .submit_job(request.clone())
        .await
        .expect("submit")
        .into_inner()
        .job
        .expect("job");
    assert_eq!(first.id, again.id);
    assert_eq!(
        first
            .spec
            .as_ref()
            .and_then(|s| s.train.as_ref())
            .and_then(|t| t.batch_size),
        Some(128),
        "defaults"
    );

    let cluster = cluster.restart().await;
    let again = cluster
        .jobs()
        .submit_job(request.clone())
        .await
        .expect("submit")
        .into_inner()
        .job
        .expect("job");
    assert_eq!(first.id, again.id);
    let other = SubmitJobRequest {
        spec: Some(spec(3)),
        ..request
    };
    let refused = cluster.jobs().submit_job(other).await.expect_err("another job");
    assert_eq!(refused.code(), Code::AlreadyExists, "{refused}");
    let jobs = cluster
        .jobs()
        .list_jobs(ListJobsRequest::default())
        .await
        .expect("list")
        .into_inner()
        .jobs;
    assert_eq!(jobs.len(), 1);
}

/// Two jobs would write over each other's checkpoints and network.
#[tokio::test]
async fn an_output_directory_belongs_to_one_job_until_that_has_ended() {
    let cluster = Cluster::start().await;
    let first = spec(1);
    let id = cluster.submit(first.clone()).await;
    let written_otherwise = format!("./{}/", first.output());
    for validate_only in [true, false] {
        let request = SubmitJobRequest {
            spec: Some(v1::JobSpec {
                output: Some(written_otherwise.clone()),
                ..first.clone()
            }),
            validate_only,
            ..Default::default()
        };
        let refused = cluster
            .jobs()
            .submit_job(request)
            .await
            .expect_err("its output is taken");
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
        assert!(refused.message().contains(&id), "{refused}");
    }
    let cancel = v1::CancelJobRequest {
        job_id: id.clone(),
        ..Default::default()
    };
    cluster.jobs().cancel_job(cancel).await.expect("cancelled");
    assert_ne!(cluster.submit(first).await, id);
}

#[tokio::test]
async fn a_bad_job_lists_every_bad_field_and_stores_nothing() {
    let cluster = Cluster::start().await;
    let mut bad = spec(0);
    bad.head = Some(v1::HeadSection {
        sample_rate: Some(1.5),
        ..Default::default()
    });
    let request = SubmitJobRequest {
        spec: Some(bad),
        ..Default::default()
    };
    let refused = cluster.jobs().submit_job(request).await.expect_err("refused");
    assert_eq!(refused.code(), Code::InvalidArgument);
    let details = refused.get_details_bad_request().expect("google.rpc.BadRequest");
    let fields: Vec<_> = details
        .field_violations
        .iter()
        .map(|violation| violation.field.as_str())
        .collect();
    assert!(
        fields.contains(&"job.world_size") && fields.contains(&"head.sample_rate"),
        "{fields:?}"
    );

    let valid = SubmitJobRequest {
        spec: Some(spec(1)),
        validate_only: true,
        ..Default::default()
    };
    let job = cluster
        .jobs()
        .submit_job(valid)
        .await
        .expect("valid")
        .into_inner()
        .job
        .expect("job");
    assert_eq!(job.id, "");
    let jobs = cluster
        .jobs()
        .list_jobs(ListJobsRequest::default())
        .await
        .expect("list")
        .into_inner()
        .jobs;
    assert!(jobs.is_empty());
}

#[tokio::test]
async fn jobs_are_found_by_prefix_and_listed_in_pages_newest_first() {
    let cluster = Cluster::start().await;
    let mut ids = Vec::new();
    for _ in 0..5 {
        ids.push(cluster.submit(spec(1)).await);
    }
    assert_eq!(cluster.job(&ids[2][..14]).await.id, ids[2], "a prefix");
    let ambiguous = cluster
        .jobs()
        .get_job(GetJobRequest {
            job_id: "job-".into(),
        })
        .await
        .expect_err("five");
    assert_eq!(ambiguous.code(), Code::InvalidArgument, "{ambiguous}");
    let missing = cluster
        .jobs()
        .get_job(GetJobRequest {
            job_id: "nothing".into(),
        })
        .await
        .expect_err("none");
    assert_eq!(missing.code(), Code::NotFound, "{missing}");

    let (mut seen, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = ListJobsRequest {
            page_size: 2,
            page_token,
            states: vec![JobState::Queued.into()],
        };
        let page = cluster
            .jobs()
            .list_jobs(request)
            .await
            .expect("list")
            .into_inner();
        assert!(page.jobs.len() <= 2);
        seen.extend(
            page.jobs
                .into_iter()
                .map(|job| (job.submitted_at.expect("time").seconds, job.id)),
        );
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert!(
        seen.windows(2).all(|pair| pair[0].0 >= pair[1].0),
        "newest first: {seen:?}"
    );
    let mut found: Vec<String> = seen.into_iter().map(|(_, id)| id).collect();
    found.sort();
    ids.sort();
    assert_eq!(found, ids, "every job once");

    let garbage = ListJobsRequest {
        page_token: "x".into(),
        ..Default::default()
    };
    assert_eq!(
        cluster
            .jobs()
            .list_jobs(garbage)
            .await
            .expect_err("refused")
            .code(),
        Code::InvalidArgument
    );
    let too_many = ListJobsRequest {
        page_size: 1001,
        ..Default::default()
    };
    assert_eq!(
        cluster
            .jobs()
            .list_jobs(too_many)
            .await
            .expect_err("refused")
            .code(),
        Code::InvalidArgument
    );
}

#[tokio::test]
async fn foreign_clients_find_health_and_reflection_and_prometheus_its_metrics() {
    let cluster = Cluster::start().await;
    let (_id, _a, _b, zero, _one) = training(&cluster, spec(2)).await;
    zero.metrics(10).await;
    let mut health = tonic_health::pb::health_client::HealthClient::new(cluster.channel.clone());
    for service in ["", "arcface.v1.JobService", "arcface.v1.RankService"] {
        let request = tonic_health::pb::HealthCheckRequest {
            service: service.into(),
        };
        let answer = health.check(request).await.expect("health").into_inner();
        assert_eq!(
            answer.status(),
            tonic_health::pb::health_check_response::ServingStatus::Serving,
            "{service:?}"
        );
    }
    use tonic_reflection::pb::v1alpha::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers = ServerReflectionClient::new(cluster.channel.clone())
        .server_reflection_info(tokio_stream::iter([request]))
        .await
        .expect("reflection")
        .into_inner();
    let answer = answers
        .message()
        .await
        .expect("stream")
        .expect("answer")
        .message_response
        .expect("response");
    let MessageResponse::ListServicesResponse(list) = answer else {
        panic!("{answer:?}")
    };
    let names: Vec<_> = list.service.iter().map(|service| service.name.as_str()).collect();
    for name in [
        "arcface.v1.JobService",
        "arcface.v1.WorkerService",
        "grpc.health.v1.Health",
    ] {
        assert!(names.contains(&name), "{names:?}");
    }

    let address = cluster.running.metrics.expect("metrics address");
    let scrape = async || {
        let mut socket = tokio::net::TcpStream::connect(address).await.expect("connect");
        socket
            .write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            .await
            .expect("ask");
        let mut text = String::new();
        socket.read_to_string(&mut text).await.expect("read");
        text
    };
    let text = within("the loss", async {
        loop {
            let text = scrape().await;
            if text.contains("arcface_train_loss{") {
                return text;
            }
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(text.starts_with("HTTP/1.1 200 OK\r\n"));
    for name in [
        "arcface_build_info{version=",
        "arcface_job_state{",
        "arcface_train_steps_total{",
        "arcface_train_step_duration_seconds_bucket{",
        "arcface_coordinator_nodes{state=\"healthy\"}",
        "arcface_grpc_requests_total{service=\"arcface.v1.JobService\",method=\"SubmitJob\",code=\"Ok\"}",
    ] {
        assert!(text.contains(name), "{name} is not in {text}");
    }
}

#[tokio::test]
async fn a_second_coordinator_on_the_store_or_the_port_is_one_clear_line() {
    let cluster = Cluster::start().await;
    let error = server::start(options(cluster.store.path()))
        .await
        .err()
        .expect("the store is in use");
    let (text, code) = report(&*error);
    assert_eq!(code, ExitCode::Unreachable, "{text}");
    assert!(
        text.contains("is in use by another coordinator") && text.contains("\nhint: "),
        "{text}"
    );

    let other = Arc::new(tempfile::tempdir().expect("scratch directory"));
    let mut taken = options(other.path());
    taken.listen = cluster.running.grpc;
    let error = server::start(taken).await.err().expect("the port is in use");
    let (text, code) = report(&*error);
    assert_eq!(code, ExitCode::Unreachable);
    assert!(
        text.contains(&format!("listen on {}: the port is in use", cluster.running.grpc)),
        "{text}"
    );
    assert!(
        std::fs::read_dir(other.path()).expect("read").next().is_none(),
        "the store was not touched"
    );

    let addresses = std::fs::read_to_string(cluster.store.path().join("addresses")).expect("address file");
    let metrics = cluster.running.metrics.expect("metrics");
    assert_eq!(
        addresses,
        format!("grpc={}\nmetrics={metrics}\n", cluster.running.grpc)
    );
}

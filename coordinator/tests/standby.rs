//! Two coordinators on one etcd, over real gRPC: what a standby answers, who is told, and how one follows the other.

#[path = "../../tests/harness/etcd.rs"]
mod etcd;
mod fakes;

use arcface_coordinator::server::{self, Running, ServeOptions, StoreUrl};
use arcface_proto::{
    redirect,
    v1::{GetJobRequest, ListJobsRequest, SubmitJobRequest, job_service_client::JobServiceClient},
};
use etcd::Etcd;
use fakes::{options, spec, within};
use std::process::Command;
use tempfile::TempDir;
use tonic::{Code, Status, transport::Channel};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_types::StatusExt;

const JOBS: &str = "arcface.v1.JobService";

struct Member {
    running: Running,
    channel: Channel,
    _scratch: TempDir,
}

impl Member {
    async fn start(etcd: &Etcd) -> Self {
        let scratch = TempDir::new().expect("scratch directory");
        let options = ServeOptions {
            store: StoreUrl::Etcd(etcd.url().parse().expect("url")),
            ..options(scratch.path())
        };
        let running = server::start(options).await.expect("start a coordinator");
        let channel = Channel::from_shared(format!("http://{}", running.grpc))
            .expect("address")
            .connect()
            .await
            .expect("connect");
        Self {
            running,
            channel,
            _scratch: scratch,
        }
    }

    fn jobs(&self) -> JobServiceClient<Channel> {
        JobServiceClient::new(self.channel.clone())
    }

    async fn health(&self, service: &str) -> ServingStatus {
        let request = HealthCheckRequest {
            service: service.into(),
        };
        let answer = HealthClient::new(self.channel.clone()).check(request).await;
        answer.expect("health").into_inner().status()
    }

    /// Waits until it leads: told by its health, which changes with the role.
    async fn leads(&self) {
        let request = HealthCheckRequest { service: JOBS.into() };
        let mut changes = HealthClient::new(self.channel.clone())
            .watch(request)
            .await
            .expect("watch health")
            .into_inner();
        within("leading", async {
            while let Some(change) = changes.message().await.expect("health") {
                if change.status() == ServingStatus::Serving {
                    return;
                }
            }
            panic!("the health watch ended");
        })
        .await;
    }

    /// Asks it for jobs until it names a leader: it learns of one a moment after it was elected.
    async fn refusal(&self) -> Status {
        within("a refusal with the leader's name", async {
            loop {
                let answer = self.jobs().list_jobs(ListJobsRequest::default()).await;
                let status = answer.expect_err("a standby lists no jobs");
                if status.metadata().contains_key(redirect::LEADER) {
                    return status;
                }
                tokio::task::yield_now().await;
            }
        })
        .await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_names_the_leader_and_follows_it() {
    let Some(etcd) = Etcd::start().expect("start etcd") else {
        return;
    };
    let first = Member::start(&etcd).await;
    first.leads().await;
    let second = Member::start(&etcd).await;
    let leader = first.running.grpc.to_string();

    let status = second.refusal().await;
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains(&format!("{leader} leads")), "{status}");
    assert_eq!(
        status.metadata().get(redirect::ROLE).expect("role"),
        redirect::STANDBY
    );
    assert_eq!(*status.metadata().get(redirect::LEADER).expect("leader"), *leader);
    let info = status.get_details_error_info().expect("an ErrorInfo");
    assert_eq!(
        (info.reason.as_str(), info.domain.as_str()),
        (redirect::NOT_LEADING, redirect::DOMAIN)
    );
    assert_eq!(info.metadata.get(redirect::LEADER), Some(&leader));
    assert_eq!(
        second.health("").await,
        ServingStatus::Serving,
        "its process is well"
    );
    assert_eq!(second.health(JOBS).await, ServingStatus::NotServing);
    assert_eq!(first.health(JOBS).await, ServingStatus::Serving);

    let request = SubmitJobRequest {
        request_id: "r1".into(),
        spec: Some(spec(2)),
        validate_only: false,
    };
    let submitted = first
        .jobs()
        .submit_job(request.clone())
        .await
        .expect("submit")
        .into_inner();
    let id = submitted.job.expect("a job").id;
    // The command line is told the standby alone, and finds the leader.
    let standby = second.running.grpc.to_string();
    let listed = tokio::task::spawn_blocking(move || {
        Command::new(env!("CARGO_BIN_EXE_arcface-coordinator"))
            .args(["jobs", "--output", "json", "--coordinator", &standby])
            .output()
    });
    let listed = within("the list", listed).await.expect("no panic").expect("run");
    let (stdout, stderr) = (
        String::from_utf8_lossy(&listed.stdout),
        String::from_utf8_lossy(&listed.stderr),
    );
    assert!(
        listed.status.success() && stdout.contains(&id),
        "{stdout}{stderr}"
    );

    within("shutdown", first.running.shutdown())
        .await
        .expect("a clean end");
    second.leads().await;
    let request_job = GetJobRequest { job_id: id.clone() };
    let job = second
        .jobs()
        .get_job(request_job)
        .await
        .expect("get")
        .into_inner()
        .job;
    assert_eq!(job.expect("a job").id, id, "what was acknowledged is there");
    let again = second
        .jobs()
        .submit_job(request)
        .await
        .expect("submit")
        .into_inner();
    assert_eq!(
        again.job.expect("a job").id,
        id,
        "idempotent over a change of the leader"
    );
    within("shutdown", second.running.shutdown())
        .await
        .expect("a clean end");
}

//! People and programs that submit, cancel and drain, and ask again when no answer comes.

use crate::{determinism::Rng, history::Shared, net};
use arcface_proto::v1::{
    self, CancelJobRequest, DrainNodeRequest, SubmitJobRequest, cluster_service_client::ClusterServiceClient,
    job_service_client::JobServiceClient,
};
use std::time::Duration;
use tokio::time::{sleep, timeout};
use tonic::{Code, Response, Status, transport::Channel};

/// What happens to one job.
#[derive(Clone, Debug)]
pub struct Plan {
    pub name: String,
    pub submit_ms: u64,
    /// So long after its submit was answered.
    pub cancel_ms: Option<u64>,
    pub spec: v1::JobSpec,
}

/// A drain that is taken back.
#[derive(Clone, Debug)]
pub struct Drain {
    pub node: String,
    pub at_ms: u64,
    pub for_ms: u64,
}

pub fn plan(rng: &mut Rng, index: usize, slots: u64) -> Plan {
    let world_size = rng.between(1, slots.min(4)) as u32;
    let name = format!("job-{index}");
    let spec = v1::JobSpec {
        output: Some(format!("work_dirs/{name}")),
        job: Some(v1::JobSection {
            name: Some(name.clone()),
            world_size: Some(world_size),
            min_world_size: Some(rng.between(1, u64::from(world_size)) as u32),
            elastic: Some(rng.pick(&["off", "shrink"]).to_string()),
            max_restarts: Some(1_000_000),
            ..Default::default()
        }),
        model: Some(v1::ModelSection {
            network: Some("tiny".into()),
            ..Default::default()
        }),
        data: Some(v1::DataSection {
            rec: Some("/data".into()),
            ..Default::default()
        }),
        // The fake ranks' steps: an epoch is one.
        train: Some(v1::TrainSection {
            num_epoch: Some(rng.between(20, 120) as u32),
            ..Default::default()
        }),
        checkpoint: Some(v1::CheckpointSection {
            every_steps: Some(rng.between(4, 20)),
            keep: Some(rng.between(1, 3) as u32),
            ..Default::default()
        }),
        ..Default::default()
    };
    Plan {
        name,
        submit_ms: rng.between(0, 6_000),
        cancel_ms: rng.percent(35).then(|| rng.between(0, 8_000)),
        spec,
    }
}

/// Asks every coordinator in turn until one answers.
async fn ask<T>(
    hosts: &[String],
    call: impl AsyncFn(Channel) -> Result<Response<T>, Status>,
) -> Result<T, Status> {
    loop {
        for host in hosts {
            let Ok(channel) = net::connect(host).await else {
                continue;
            };
            match timeout(Duration::from_secs(3), call(channel)).await {
                Ok(Ok(answer)) => return Ok(answer.into_inner()),
                Ok(Err(status))
                    if matches!(
                        status.code(),
                        Code::NotFound | Code::InvalidArgument | Code::AlreadyExists
                    ) =>
                {
                    return Err(status);
                }
                Ok(Err(_)) | Err(_) => {}
            }
        }
        sleep(Duration::from_millis(200)).await;
    }
}

/// The life of one job as its owner sees it.
pub async fn own(plan: Plan, hosts: Vec<String>, world: Shared, mut rng: Rng) {
    sleep(Duration::from_millis(plan.submit_ms)).await;
    let request = SubmitJobRequest {
        spec: Some(plan.spec.clone()),
        request_id: plan.name.clone(),
        validate_only: false,
    };
    // A program that did not see the first answer, or saw it twice.
    let times = if rng.percent(30) { 2 } else { 1 };
    let mut id = String::new();
    for _ in 0..times {
        let answer = ask(&hosts, async |channel| {
            JobServiceClient::new(channel).submit_job(request.clone()).await
        })
        .await;
        match answer.map(|answer| answer.job.unwrap_or_default().id) {
            Ok(acked) => {
                world.lock().expect("world").submit_acked(&plan.name, &acked);
                id = acked;
            }
            Err(status) => {
                let how = format!("the submit of {} was refused: {status}", plan.name);
                return world.lock().expect("world").broken("I12", how);
            }
        }
        sleep(Duration::from_millis(rng.between(0, 1_000))).await;
    }
    let Some(cancel_ms) = plan.cancel_ms else { return };
    sleep(Duration::from_millis(cancel_ms)).await;
    let request = CancelJobRequest {
        job_id: id,
        reason: "enough".into(),
    };
    // A replaced coordinator may not know the job; the one after it does.
    for _ in 0..50 {
        let answer = ask(&hosts, async |channel| {
            JobServiceClient::new(channel).cancel_job(request.clone()).await
        })
        .await;
        if let Ok(answer) = answer {
            return world
                .lock()
                .expect("world")
                .cancel_acked(&plan.name, &answer.job.unwrap_or_default());
        }
        sleep(Duration::from_millis(300)).await;
    }
    let how = format!("the cancel of {} was refused to the end", plan.name);
    world.lock().expect("world").broken("I13", how);
}

/// Drains a node and takes it back.
pub async fn drain(drain: Drain, hosts: Vec<String>) {
    sleep(Duration::from_millis(drain.at_ms)).await;
    for draining in [true, false] {
        let request = DrainNodeRequest {
            node_id: drain.node.clone(),
            undo: !draining,
        };
        let _ = ask(&hosts, async |channel| {
            ClusterServiceClient::new(channel)
                .drain_node(request.clone())
                .await
        })
        .await;
        sleep(Duration::from_millis(drain.for_ms)).await;
    }
}

//! A coordinator's host: the real control task and the real services, on the simulated store and network.

use crate::{history::Shared, net, store::Disk};
use arcface_coordinator::{
    api::{ClusterApi, JobApi, RankApi, Router, WorkerApi},
    control::{self, Clock},
    server::Timers,
};
use arcface_proto::v1::{
    cluster_service_server::ClusterServiceServer, job_service_server::JobServiceServer,
    rank_service_server::RankServiceServer, worker_service_server::WorkerServiceServer,
};
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio_util::sync::CancellationToken;

fn wall() -> SystemTime {
    SystemTime::UNIX_EPOCH + turmoil::since_epoch().unwrap_or_default()
}

/// Serves while it is this host's turn, and starts again when it ended, as a supervisor would.
pub async fn run(name: &'static str, world: Shared, disk: Disk, timers: Timers) -> turmoil::Result {
    loop {
        if world.lock().expect("world").leader != name {
            // Stands by until the schedule starts it anew.
            std::future::pending::<()>().await;
        }
        let ended = serve(disk.clone(), timers).await;
        note(&world, format!("coordinator {name} ended: {ended}"));
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

fn note(world: &Shared, event: String) {
    world.lock().expect("world").event(event);
}

/// Why it ended.
async fn serve(disk: Disk, timers: Timers) -> String {
    let store = Arc::new(disk.open());
    let stop = CancellationToken::new();
    let _stopped_with_us = stop.clone().drop_guard();
    let clock = Clock::new(wall);
    let (control, task) = match control::start_with(clock, store, timers, stop.clone()).await {
        Ok(started) => started,
        Err(error) => return error.to_string(),
    };
    let router = Router::default()
        .with(JobServiceServer::new(JobApi {
            control: control.clone(),
            stop: stop.clone(),
        }))
        .with(ClusterServiceServer::new(ClusterApi {
            control: control.clone(),
        }))
        .with(WorkerServiceServer::new(WorkerApi {
            control: control.clone(),
            stop: stop.clone(),
        }))
        .with(RankServiceServer::new(RankApi {
            control,
            stop: stop.clone(),
        }));
    let incoming = match net::accept().await {
        Ok(incoming) => incoming,
        Err(error) => return error.to_string(),
    };
    let server = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(2)))
        .http2_keepalive_timeout(Some(Duration::from_secs(2)))
        .serve_with_incoming(router, incoming);
    tokio::select! {
        ended = server => format!("{ended:?}"),
        ended = task => format!("{ended:?}"),
    }
}

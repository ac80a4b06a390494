//! Who leads, and what a coordinator does while it leads: a term. With the embedded store there is one term, the
//! process's life. With etcd terms come and go, and between them the coordinator stands by.

use super::{MAX_REQUEST_BYTES, Timers, store_failure};
use crate::{
    api::{ClusterApi, JobApi, RankApi, Role, Router, WorkerApi},
    control::{self, Handle},
    exporter,
    store::{Candidate, StateStore, StoreError, Tenure},
    telemetry,
};
use anyhow::Context;
use arcface_proto::v1::{
    cluster_service_server::ClusterServiceServer, job_service_server::JobServiceServer,
    rank_service_server::RankServiceServer, worker_service_server::WorkerServiceServer,
};
use std::{sync::Arc, time::Duration};
use tokio::{sync::watch, task::JoinHandle, time::sleep};
use tokio_util::sync::CancellationToken;
use tonic::server::NamedService;
use tonic_health::{ServingStatus, server::HealthReporter};

/// After a term that ended on an error, before the next candidacy: others come first.
const PAUSE: Duration = Duration::from_millis(500);

/// How this coordinator comes to lead.
pub(super) enum Leadership {
    /// Nobody else can have the store.
    Alone(Arc<dyn StateStore>),
    /// One of several candidates.
    Elected(Box<Candidate>),
}

/// What requests and health checks are told about the role.
pub(super) struct Desk {
    role: watch::Sender<Role>,
    health: HealthReporter,
}

impl Desk {
    /// The coordinator stands by at first.
    pub async fn new(health: HealthReporter) -> Self {
        let desk = Self {
            role: watch::Sender::new(Role::StandsBy(None)),
            health,
        };
        desk.report(ServingStatus::NotServing).await;
        desk
    }

    /// The role, for the front.
    pub fn role(&self) -> watch::Receiver<Role> {
        self.role.subscribe()
    }

    async fn lead(&self, term: &Term) {
        exporter::show_cluster(true);
        self.role.send_replace(Role::Leads {
            services: term.services.clone(),
            control: term.handle.clone(),
        });
        self.report(ServingStatus::Serving).await;
    }

    async fn stand_by(&self, leader: Option<String>) {
        metrics::gauge!(telemetry::COORDINATOR_IS_LEADER).set(0.0);
        exporter::show_cluster(false);
        self.role.send_replace(Role::StandsBy(leader));
        self.report(ServingStatus::NotServing).await;
    }

    /// Health by service is the leader's; the empty name stands for the process, which answers in any role.
    async fn report(&self, status: ServingStatus) {
        for name in names() {
            self.health.set_service_status(name, status).await;
        }
    }

    /// Health when the process is about to end.
    async fn close(&self) {
        self.report(ServingStatus::NotServing).await;
        self.health
            .set_service_status("", ServingStatus::NotServing)
            .await;
    }
}

/// Names of the services of a leader.
fn names() -> [&'static str; 4] {
    [
        <JobServiceServer<JobApi> as NamedService>::NAME,
        <ClusterServiceServer<ClusterApi> as NamedService>::NAME,
        <WorkerServiceServer<WorkerApi> as NamedService>::NAME,
        <RankServiceServer<RankApi> as NamedService>::NAME,
    ]
}

fn services(control: &Handle, stop: &CancellationToken) -> Router {
    let jobs = JobApi {
        control: control.clone(),
        stop: stop.clone(),
    };
    let cluster = ClusterApi {
        control: control.clone(),
    };
    let workers = WorkerApi {
        control: control.clone(),
        stop: stop.clone(),
    };
    let ranks = RankApi {
        control: control.clone(),
        stop: stop.clone(),
    };
    Router::default()
        .with(JobServiceServer::new(jobs).max_decoding_message_size(MAX_REQUEST_BYTES))
        .with(ClusterServiceServer::new(cluster).max_decoding_message_size(MAX_REQUEST_BYTES))
        .with(WorkerServiceServer::new(workers).max_decoding_message_size(MAX_REQUEST_BYTES))
        .with(RankServiceServer::new(ranks).max_decoding_message_size(MAX_REQUEST_BYTES))
}

/// The process's signals to its terms.
#[derive(Clone)]
pub(super) struct Stops {
    /// The process is to end: streams end.
    pub streams: CancellationToken,
    /// Streams have ended: what they had accepted is stored, now the control task ends.
    pub control: CancellationToken,
}

/// A loaded state and the services that work on it.
struct Term {
    services: Router,
    handle: Handle,
    stop_streams: CancellationToken,
    stop_control: CancellationToken,
    control: JoinHandle<Result<(), StoreError>>,
}

impl Term {
    async fn begin(store: Arc<dyn StateStore>, timers: Timers, stops: &Stops) -> Result<Self, StoreError> {
        let stop_streams = stops.streams.child_token();
        let stop_control = stops.control.child_token();
        let (handle, control) = control::start(store, timers, stop_control.clone()).await?;
        Ok(Self {
            services: services(&handle, &stop_streams),
            handle,
            stop_streams,
            stop_control,
            control,
        })
    }

    /// Until the control task has ended, because it was stopped or on an error.
    async fn ended(&mut self) -> anyhow::Result<Result<(), StoreError>> {
        (&mut self.control).await.context("control task")
    }

    /// Ends it now: nothing that it does counts any more.
    async fn cut(mut self) {
        self.stop_streams.cancel();
        self.stop_control.cancel();
        if !self.control.is_finished() {
            self.control.abort();
            // It was cancelled, which is what was wanted.
            let _cancelled = self.ended().await;
        }
    }
}

/// Starts to lead, or to stand by, and goes on until the process ends. The first term of the embedded store has begun
/// when this returns.
///
/// # Errors
/// A state that cannot be loaded.
pub(super) async fn start(
    leadership: Leadership,
    timers: Timers,
    desk: Desk,
    stops: Stops,
) -> anyhow::Result<JoinHandle<anyhow::Result<()>>> {
    match leadership {
        Leadership::Alone(store) => {
            let mut term = Term::begin(store, timers, &stops).await.map_err(store_failure)?;
            desk.lead(&term).await;
            Ok(tokio::spawn(async move {
                let stopping = stops.streams.clone();
                let closing = async {
                    stopping.cancelled().await;
                    desk.close().await;
                };
                let (ended, ()) = tokio::join!(
                    async {
                        let ended = term.ended().await;
                        stops.streams.cancel();
                        ended
                    },
                    closing
                );
                ended?.map_err(store_failure)
            }))
        }
        Leadership::Elected(candidate) => Ok(tokio::spawn(async move {
            let ended = take_turns(&candidate, timers, &desk, &stops).await;
            desk.close().await;
            ended
        })),
    }
}

/// Stands by and leads in turns.
async fn take_turns(candidate: &Candidate, timers: Timers, desk: &Desk, stops: &Stops) -> anyhow::Result<()> {
    loop {
        let tenure = tokio::select! {
            tenure = campaign(candidate, desk) => tenure,
            () = stops.streams.cancelled() => return Ok(()),
        };
        let mut term = match Term::begin(tenure.store(), timers, stops).await {
            Ok(term) => term,
            Err(error) => {
                tracing::error!(%error, "elected, but the state cannot be loaded; another candidate may try");
                give_up(tenure).await;
                continue;
            }
        };
        desk.lead(&term).await;
        tracing::info!(epoch = tenure.store().epoch(), "leads");
        let why = tokio::select! {
            ended = term.ended() => match ended? {
                Err(error) => error.to_string(),
                // Stopped in the right order: the last changes are stored.
                Ok(()) => {
                    tenure.resign().await;
                    return Ok(());
                }
            },
            why = tenure.over() => why,
        };
        tracing::warn!(why, "leads no more; running jobs train on");
        desk.stand_by(None).await;
        term.cut().await;
        give_up(tenure).await;
    }
}

/// Until elected. Requests are told meanwhile who leads.
async fn campaign(candidate: &Candidate, desk: &Desk) -> Tenure {
    let mut leader = candidate.leader();
    let telling = async {
        loop {
            let leads = leader.borrow_and_update().clone();
            desk.stand_by(leads).await;
            if leader.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    };
    tokio::select! {
        tenure = candidate.campaign() => tenure,
        () = telling => unreachable!("telling goes on for as long as the candidate is there"),
    }
}

/// Lets others lead, also if etcd does not answer now.
async fn give_up(tenure: Tenure) {
    tokio::spawn(tenure.resign());
    sleep(PAUSE).await;
}

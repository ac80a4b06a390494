//! A coordinator on free ports with fake agents and ranks that speak to it over real gRPC: no process is spawned, and
//! every wait is for a state, with a deadline. Each test file uses its part of it.
#![allow(dead_code)]

use arcface_coordinator::server::{self, Running, ServeOptions, StoreUrl, Timers};
use arcface_proto::v1::{
    self, CheckpointPart, CommitCheckpointRequest, GetJobRequest, Heartbeat, Hello, Job, JobState,
    JoinRequest, JoinResponse, KillRanks, NodeRank, RankAssignment, RankExited, RankId, RankStarted,
    RendezvousRequest, ReportRequest, ReportResponse, StepMetrics, SubmitJobRequest, TrainingFinished,
    WatchJobRequest, WatchJobResponse, cluster_service_client::ClusterServiceClient,
    job_service_client::JobServiceClient, join_request, join_response,
    rank_service_client::RankServiceClient, report_request::Report, watch_job_response,
    worker_service_client::WorkerServiceClient,
};
use std::{
    collections::BTreeMap,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};
use tempfile::TempDir;
use tokio::{sync::mpsc, task::JoinHandle, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming, transport::Channel};

/// Longest wait for anything: generous, because the machine may be busy.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// Short where a test waits for them, long where a busy machine could make them fire by mistake.
pub const TIMERS: Timers = Timers {
    heartbeat_ms: 50,
    suspect_ms: 1_500,
    lost_ms: 2_500,
    orphan_ms: 60_000,
    rejoin_ms: 5_000,
    rendezvous_ms: 20_000,
    backoff_ms: 20,
    backoff_max_ms: 100,
    grace_ms: 100,
    leader_ms: 2_000,
};

pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(DEADLINE, future)
        .await
        .unwrap_or_else(|_| panic!("{what} did not happen within {DEADLINE:?}"))
}

/// A coordinator and the directory of its store.
pub struct Cluster {
    pub running: Running,
    pub store: Arc<TempDir>,
    pub channel: Channel,
}

impl Cluster {
    pub async fn start() -> Self {
        Self::start_on(Arc::new(tempfile::tempdir().expect("scratch directory"))).await
    }

    pub async fn start_on(store: Arc<TempDir>) -> Self {
        let running = server::start(options(store.path()))
            .await
            .expect("start a coordinator");
        let channel = Channel::from_shared(format!("http://{}", running.grpc))
            .expect("address")
            .connect()
            .await
            .expect("connect");
        Self {
            running,
            store,
            channel,
        }
    }

    /// Ends this coordinator and starts another on the same store.
    pub async fn restart(self) -> Self {
        let store = self.store.clone();
        drop(self.channel);
        within("shutdown", self.running.shutdown())
            .await
            .expect("a clean shutdown");
        Self::start_on(store).await
    }

    pub fn jobs(&self) -> JobServiceClient<Channel> {
        JobServiceClient::new(self.channel.clone())
    }

    pub fn nodes(&self) -> ClusterServiceClient<Channel> {
        ClusterServiceClient::new(self.channel.clone())
    }

    pub fn ranks(&self) -> RankServiceClient<Channel> {
        RankServiceClient::new(self.channel.clone())
    }

    pub async fn submit(&self, spec: v1::JobSpec) -> String {
        let request = SubmitJobRequest {
            spec: Some(spec),
            ..Default::default()
        };
        let answer = self
            .jobs()
            .submit_job(request)
            .await
            .expect("submit")
            .into_inner();
        answer.job.expect("a job").id
    }

    pub async fn job(&self, id: &str) -> Job {
        let request = GetJobRequest { job_id: id.into() };
        self.jobs()
            .get_job(request)
            .await
            .expect("get")
            .into_inner()
            .job
            .expect("a job")
    }

    /// Asks until a job's progress, of which watchers get no job event, is as wanted.
    pub async fn job_when(&self, id: &str, what: &str, wanted: impl Fn(&Job) -> bool) -> Job {
        within(&format!("{id} {what}"), async {
            loop {
                let job = self.job(id).await;
                if wanted(&job) {
                    return job;
                }
                tokio::task::yield_now().await;
            }
        })
        .await
    }

    /// A watch on a connection of its own that lets little through before it is read.
    pub async fn narrow_watch(&self, id: &str) -> Streaming<WatchJobResponse> {
        let channel = Channel::from_shared(format!("http://{}", self.running.grpc))
            .expect("address")
            .initial_stream_window_size(65_535)
            .connect()
            .await
            .expect("connect");
        let request = WatchJobRequest { job_id: id.into() };
        let answer = JobServiceClient::new(channel).watch_job(request).await;
        answer.expect("watch").into_inner()
    }

    pub async fn watch(&self, id: &str) -> Streaming<WatchJobResponse> {
        let request = WatchJobRequest { job_id: id.into() };
        self.jobs().watch_job(request).await.expect("watch").into_inner()
    }

    /// Waits until a job is as wanted.
    pub async fn job_until(&self, id: &str, what: &str, wanted: impl Fn(&Job) -> bool) -> Job {
        let mut events = self.watch(id).await;
        within(&format!("{id} {what}"), async {
            loop {
                let event = events
                    .message()
                    .await
                    .expect("watch")
                    .expect("the job has ended otherwise")
                    .event;
                if let Some(watch_job_response::Event::Job(job)) = event
                    && wanted(&job)
                {
                    return job;
                }
            }
        })
        .await
    }

    pub async fn job_in(&self, id: &str, state: JobState) -> Job {
        self.job_until(id, state.as_str_name(), |job| job.state() == state)
            .await
    }
}

pub fn options(store: &Path) -> ServeOptions {
    ServeOptions {
        listen: "127.0.0.1:0".parse().expect("address"),
        metrics: Some("127.0.0.1:0".parse().expect("address")),
        store: StoreUrl::Embedded(store.to_owned()),
        advertise: None,
        tls: None,
        etcd_tls: None,
        address_file: Some(store.join("addresses")),
        timers: TIMERS,
    }
}

/// The smallest job of a world size, with an output directory of its own.
pub fn spec(world_size: u32) -> v1::JobSpec {
    static JOBS: AtomicU32 = AtomicU32::new(0);
    let number = JOBS.fetch_add(1, Ordering::Relaxed);
    v1::JobSpec {
        output: Some(format!("work_dirs/{number}")),
        job: Some(v1::JobSection {
            world_size: Some(world_size),
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
        ..Default::default()
    }
}

type Ranks = Arc<Mutex<BTreeMap<(String, u64, u32), NodeRank>>>;

/// An agent that starts what it is told to start and, unless told otherwise, stops what it is told to stop.
pub struct Agent {
    pub ranks: Ranks,
    outgoing: mpsc::Sender<JoinRequest>,
    launched: mpsc::Receiver<RankAssignment>,
    killed: mpsc::Receiver<KillRanks>,
    forgotten: mpsc::Receiver<String>,
    task: JoinHandle<()>,
}

impl Agent {
    pub async fn join(cluster: &Cluster, node: &str, slots: u32) -> Self {
        Self::join_as(cluster, node, "boot-1", slots, Ranks::default())
            .await
            .expect("welcome")
    }

    /// Joins with ranks that already run.
    pub async fn join_as(
        cluster: &Cluster,
        node: &str,
        boot_id: &str,
        slots: u32,
        ranks: Ranks,
    ) -> Result<Self, Status> {
        let (outgoing, receiver) = mpsc::channel(64);
        let hello = Hello {
            node_id: node.into(),
            boot_id: boot_id.into(),
            copies_of: Vec::new(),
            address: "127.0.0.1".into(),
            slots,
            device: "cpu".into(),
            version: "0.0.0".into(),
            ranks: ranks.lock().expect("ranks").values().cloned().collect(),
        };
        say(&outgoing, join_request::Message::Hello(hello)).await;
        let mut client = WorkerServiceClient::new(cluster.channel.clone());
        let mut incoming = client.join(ReceiverStream::new(receiver)).await?.into_inner();
        let welcome = within("welcome", incoming.message()).await?.expect("a message");
        assert!(
            matches!(welcome.message, Some(join_response::Message::Welcome(_))),
            "{welcome:?}"
        );
        let (launches, launched) = mpsc::channel(64);
        let (kills, killed) = mpsc::channel(64);
        let (forgets, forgotten) = mpsc::channel(64);
        let orders = Orders {
            launches,
            kills,
            forgets,
        };
        let task = tokio::spawn(obey(incoming, outgoing.clone(), ranks.clone(), orders));
        Ok(Self {
            ranks,
            outgoing,
            launched,
            killed,
            forgotten,
            task,
        })
    }

    /// The next rank that it was told to start.
    pub async fn launched(&mut self) -> RankAssignment {
        within("launch", self.launched.recv())
            .await
            .expect("the agent's stream has ended")
    }

    /// The next order to stop.
    pub async fn killed(&mut self) -> KillRanks {
        within("kill", self.killed.recv())
            .await
            .expect("the agent's stream has ended")
    }

    /// The next job whose copies it was told to forget.
    pub async fn forgot(&mut self) -> String {
        within("forget", self.forgotten.recv())
            .await
            .expect("the agent's stream has ended")
    }

    /// One of its ranks ends by itself.
    pub async fn exit(&self, rank: &RankAssignment, exit_code: Option<i32>, signal: Option<i32>) {
        let key = (rank.job_id.clone(), rank.generation, rank.rank);
        let rank = self.ranks.lock().expect("ranks").remove(&key);
        let exited = RankExited {
            rank,
            exit_code,
            signal,
            ..Default::default()
        };
        say(&self.outgoing, join_request::Message::RankExited(exited)).await;
    }

    /// Says that it is about to stop.
    pub async fn leaves(&self) {
        say(&self.outgoing, join_request::Message::Leaving(v1::Leaving {})).await;
    }

    /// Falls silent; its ranks live on and can be joined with again.
    pub fn vanish(self) -> Ranks {
        self.task.abort();
        self.ranks
    }
}

async fn say(outgoing: &mpsc::Sender<JoinRequest>, message: join_request::Message) {
    // An ended stream shows where the test reads.
    let _ = outgoing
        .send(JoinRequest {
            message: Some(message),
        })
        .await;
}

/// What an agent was told, for the test.
struct Orders {
    launches: mpsc::Sender<RankAssignment>,
    kills: mpsc::Sender<KillRanks>,
    forgets: mpsc::Sender<String>,
}

async fn obey(
    mut incoming: Streaming<JoinResponse>,
    outgoing: mpsc::Sender<JoinRequest>,
    ranks: Ranks,
    orders: Orders,
) {
    let Orders {
        launches,
        kills,
        forgets,
    } = orders;
    let mut beats = tokio::time::interval(Duration::from_millis(TIMERS.heartbeat_ms));
    let mut sequence = 0;
    let running = || ranks.lock().expect("ranks").values().cloned().collect::<Vec<_>>();
    loop {
        let message = tokio::select! {
            _ = beats.tick() => {
                sequence += 1;
                let heartbeat = Heartbeat { sequence, ranks: running() };
                say(&outgoing, join_request::Message::Heartbeat(heartbeat)).await;
                continue;
            }
            message = incoming.message() => message,
        };
        let Ok(Some(JoinResponse {
            message: Some(message),
            ..
        })) = message
        else {
            return;
        };
        match message {
            join_response::Message::Launch(launch) => {
                for assignment in launch.assignments {
                    let rank = NodeRank {
                        job_id: assignment.job_id.clone(),
                        generation: assignment.generation,
                        rank: assignment.rank,
                        pid: 100 + assignment.rank,
                    };
                    let key = (rank.job_id.clone(), rank.generation, rank.rank);
                    if ranks.lock().expect("ranks").insert(key, rank.clone()).is_none() {
                        say(
                            &outgoing,
                            join_request::Message::RankStarted(RankStarted { rank: Some(rank) }),
                        )
                        .await;
                        let _ = launches.send(assignment).await;
                    }
                }
            }
            join_response::Message::Kill(kill) => {
                let doomed: Vec<NodeRank> = running()
                    .into_iter()
                    .filter(|rank| rank.job_id == kill.job_id && rank.generation <= kill.generation)
                    .collect();
                for rank in doomed {
                    ranks
                        .lock()
                        .expect("ranks")
                        .remove(&(rank.job_id.clone(), rank.generation, rank.rank));
                    let exited = RankExited {
                        rank: Some(rank),
                        signal: Some(9),
                        requested: true,
                        ..Default::default()
                    };
                    say(&outgoing, join_request::Message::RankExited(exited)).await;
                }
                let _ = kills.send(kill).await;
            }
            join_response::Message::Forget(forget) => {
                let _ = forgets.send(forget.job_id).await;
            }
            _ => {}
        }
    }
}

/// The training process of an assignment.
pub struct Rank {
    pub id: RankId,
    pub assignment: RankAssignment,
    client: RankServiceClient<Channel>,
    reports: mpsc::Sender<ReportRequest>,
    pub commands: Streaming<ReportResponse>,
}

impl Rank {
    /// Opens the reports.
    pub async fn connect(cluster: &Cluster, assignment: RankAssignment) -> Self {
        let id = RankId {
            job_id: assignment.job_id.clone(),
            generation: assignment.generation,
            rank: assignment.rank,
        };
        let (reports, receiver) = mpsc::channel(64);
        let mut client = cluster.ranks();
        let commands = client
            .report(ReceiverStream::new(receiver))
            .await
            .expect("report")
            .into_inner();
        Self {
            id,
            assignment,
            client,
            reports,
            commands,
        }
    }

    pub async fn report(&self, report: Report) {
        let request = ReportRequest {
            rank: Some(self.id.clone()),
            report: Some(report),
        };
        self.reports
            .send(request)
            .await
            .expect("the report stream takes it");
    }

    pub async fn started(&self, step: u64) {
        self.report(Report::Started(v1::TrainingStarted {
            step,
            total_steps: 100,
            num_classes: 10,
            num_image: 640,
            from_memory: !self.assignment.resume_copies.is_empty(),
            restore_seconds: None,
        }))
        .await;
    }

    pub async fn finished(&self, step: u64) {
        self.report(Report::Finished(TrainingFinished {
            step,
            ..Default::default()
        }))
        .await;
    }

    pub async fn metrics(&self, step: u64) {
        let metrics = StepMetrics {
            step,
            total_steps: 100,
            loss: 9.5,
            learning_rate: 0.1,
            samples_per_second: 100.0,
            step_seconds: 0.01,
            ..Default::default()
        };
        self.report(Report::Metrics(metrics)).await;
    }

    pub async fn rendezvous(&self) -> Result<Vec<String>, Status> {
        let request = RendezvousRequest {
            rank: Some(self.id.clone()),
            endpoint: format!("127.0.0.1:{}", 5000 + self.id.rank),
            ..Default::default()
        };
        let answer = within("rendezvous", self.client.clone().rendezvous(request)).await?;
        Ok(answer.into_inner().endpoints)
    }

    pub async fn commit(&self, step: u64) -> Result<bool, Status> {
        let request = self.parts(step);
        let answer = within("commit", self.client.clone().commit_checkpoint(request)).await?;
        Ok(answer.into_inner().committed)
    }

    /// Says that its parts are in the memory of nodes.
    /// The same after writing for so long; true once it is committed.
    pub async fn commit_after(&self, step: u64, seconds: f64) -> bool {
        let request = CommitCheckpointRequest {
            persist_seconds: Some(seconds),
            ..self.parts(step)
        };
        let answer = within("commit", self.client.clone().commit_checkpoint(request)).await;
        answer.expect("an answer").into_inner().committed
    }

    pub async fn copied(&self, step: u64, nodes: &[&str]) {
        self.report(Report::Copied(v1::PartsCopied {
            parts: Some(self.parts(step)),
            nodes: nodes.iter().map(|node| (*node).to_owned()).collect(),
        }))
        .await;
    }

    fn parts(&self, step: u64) -> CommitCheckpointRequest {
        let (rank, world_size) = (self.id.rank, self.assignment.world_size);
        let range = arcface_proto::types::ClassRange::of_rank(10, rank, world_size);
        let part = |file: String, class_lo, class_hi| CheckpointPart {
            file,
            bytes: 10,
            blake3: "ab".repeat(32),
            class_lo,
            class_hi,
        };
        let mut parts = vec![part(
            format!("head-{}-{}.safetensors", range.lo, range.hi),
            range.lo,
            range.hi,
        )];
        if rank == 0 {
            parts.push(part("backbone.safetensors".into(), 0, 0));
        }
        CommitCheckpointRequest {
            rank: Some(self.id.clone()),
            step,
            epoch: 0,
            epoch_samples: step * 64,
            directory: format!("checkpoints/step-{step}"),
            num_classes: 10,
            parts,
            scaler: None,
            persist_seconds: None,
            num_image: Some(640),
        }
    }

    /// Ends its reports as a process at its end does: what it said is read when this returns.
    pub async fn close(mut self) {
        drop(self.reports);
        let ended = async { while let Ok(Some(_)) = self.commands.message().await {} };
        within("end of the reports", ended).await;
    }

    /// The same, and opens its reports again.
    pub async fn heard(self, cluster: &Cluster) -> Self {
        let assignment = self.assignment.clone();
        self.close().await;
        Self::connect(cluster, assignment).await
    }

    /// The status that ends its report stream.
    pub async fn refused(&mut self) -> Status {
        within("refusal", async {
            loop {
                match self.commands.message().await {
                    Ok(Some(_)) => {}
                    Ok(None) => panic!("the stream ended without a status"),
                    Err(status) => return status,
                }
            }
        })
        .await
    }
}

/// A job of two ranks on two nodes that trains.
pub async fn training(cluster: &Cluster, spec: v1::JobSpec) -> (String, Agent, Agent, Rank, Rank) {
    let mut a = Agent::join(cluster, "node-a", 1).await;
    let mut b = Agent::join(cluster, "node-b", 1).await;
    let id = cluster.submit(spec).await;
    let (zero, one) = generation(cluster, &mut a, &mut b).await;
    cluster.job_in(&id, JobState::Running).await;
    (id, a, b, zero, one)
}

/// The two ranks of a generation, which have met and started.
pub async fn generation(cluster: &Cluster, a: &mut Agent, b: &mut Agent) -> (Rank, Rank) {
    let zero = Rank::connect(cluster, a.launched().await).await;
    let one = Rank::connect(cluster, b.launched().await).await;
    assert_eq!((zero.id.rank, one.id.rank), (0, 1));
    let (endpoints, others) = tokio::join!(zero.rendezvous(), one.rendezvous());
    assert_eq!(endpoints.expect("met"), ["127.0.0.1:5000", "127.0.0.1:5001"]);
    assert!(others.is_ok());
    let step = zero
        .assignment
        .resume
        .as_ref()
        .map_or(0, |manifest| manifest.step);
    zero.started(step).await;
    one.started(step).await;
    (zero, one)
}

//! The agent against a coordinator of this test's own, with shell scripts as ranks.

use super::*;
use crate::device::{DeviceChoice, resolve};
use arcface_proto::v1::worker_service_server::{WorkerService, WorkerServiceServer};
use arcface_proto::v1::{HeartbeatAck, JobSpec, LaunchRanks, Welcome};
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request as Call, Response as Answer, Status, Streaming};

const JOB: &str = "job-0123456789ab";
/// Nothing here takes long; this only turns a hang into a failure.
const DEADLINE: Duration = Duration::from_secs(20);

type Outgoing = mpsc::Sender<Result<JoinResponse, Status>>;

/// Answers Hello and heartbeats, passes everything on to the test.
#[derive(Clone)]
struct Fake {
    epoch: u64,
    orphan_ms: u32,
    acknowledge: Arc<Mutex<bool>>,
    events: mpsc::Sender<(Request, Outgoing)>,
}

#[tonic::async_trait]
impl WorkerService for Fake {
    type JoinStream = ReceiverStream<Result<JoinResponse, Status>>;

    async fn join(&self, call: Call<Streaming<JoinRequest>>) -> Result<Answer<Self::JoinStream>, Status> {
        let mut incoming = call.into_inner();
        let (outgoing, receiver) = mpsc::channel(64);
        let fake = self.clone();
        tokio::spawn(async move {
            while let Ok(Some(JoinRequest {
                message: Some(message),
            })) = incoming.message().await
            {
                let answer = match &message {
                    Request::Hello(_) => Some(Response::Welcome(Welcome {
                        heartbeat_ms: 20,
                        orphan_ms: fake.orphan_ms,
                    })),
                    Request::Heartbeat(heartbeat) if *fake.acknowledge.lock().unwrap() => {
                        Some(Response::HeartbeatAck(HeartbeatAck {
                            sequence: heartbeat.sequence,
                        }))
                    }
                    _ => None,
                };
                if answer.is_some() {
                    let epoch = fake.epoch;
                    outgoing
                        .send(Ok(JoinResponse {
                            epoch,
                            message: answer,
                        }))
                        .await
                        .ok();
                }
                if fake.events.send((message, outgoing.clone())).await.is_err() {
                    return; // the coordinator of this test is gone: so is the stream
                }
            }
        });
        Ok(Answer::new(ReceiverStream::new(receiver)))
    }
}

struct Coordinator {
    address: SocketAddr,
    events: mpsc::Receiver<(Request, Outgoing)>,
    outgoing: Option<Outgoing>,
    epoch: u64,
    acknowledge: Arc<Mutex<bool>>,
    stop: CancellationToken,
    server: JoinHandle<()>,
}

impl Coordinator {
    async fn start(at: Option<SocketAddr>, epoch: u64, orphan_ms: u32) -> Self {
        let at = at.unwrap_or_else(|| "127.0.0.1:0".parse().unwrap());
        let listener = tokio::net::TcpListener::bind(at).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, events) = mpsc::channel(1024);
        let acknowledge = Arc::new(Mutex::new(true));
        let fake = Fake {
            epoch,
            orphan_ms,
            acknowledge: acknowledge.clone(),
            events: sender,
        };
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let server = tokio::spawn(async move {
            tonic::transport::Server::builder()
                .serve_with_incoming_shutdown(
                    WorkerServiceServer::new(fake),
                    TcpListenerStream::new(listener),
                    stopped.cancelled_owned(),
                )
                .await
                .unwrap();
        });
        Self {
            address,
            events,
            outgoing: None,
            epoch,
            acknowledge,
            stop,
            server,
        }
    }

    /// The next message that `pick` wants; others are dropped.
    async fn expect<T>(&mut self, what: &str, pick: impl Fn(Request) -> Option<T>) -> T {
        let wait = async {
            loop {
                let (message, outgoing) = self.events.recv().await.expect("the server lives");
                self.outgoing = Some(outgoing);
                if let Some(found) = pick(message) {
                    return found;
                }
            }
        };
        tokio::time::timeout(DEADLINE, wait)
            .await
            .unwrap_or_else(|_| panic!("no {what} came"))
    }

    async fn hello(&mut self) -> Hello {
        self.expect("hello", |message| match message {
            Request::Hello(hello) => Some(hello),
            _ => None,
        })
        .await
    }

    async fn started(&mut self) -> arcface_proto::v1::NodeRank {
        self.expect("rank start", |message| match message {
            Request::RankStarted(started) => started.rank,
            _ => None,
        })
        .await
    }

    async fn exited(&mut self) -> RankExited {
        self.expect("rank exit", |message| match message {
            Request::RankExited(exit) => Some(exit),
            _ => None,
        })
        .await
    }

    async fn heartbeat_with(&mut self, ranks: usize) {
        self.expect("heartbeat", |message| match message {
            Request::Heartbeat(heartbeat) => (heartbeat.ranks.len() == ranks).then_some(()),
            _ => None,
        })
        .await
    }

    async fn send_as(&self, epoch: u64, message: Response) {
        let message = Some(message);
        let outgoing = self.outgoing.as_ref().expect("an agent joined");
        outgoing.send(Ok(JoinResponse { epoch, message })).await.unwrap();
    }

    async fn launch(&self, generation: u64, ranks: std::ops::Range<u32>, output: &str) {
        let assignments = ranks
            .map(|rank| RankAssignment {
                job_id: JOB.into(),
                generation,
                rank,
                world_size: 2,
                local_world_size: 2,
                spec: Some(JobSpec {
                    output: Some(output.into()),
                    ..Default::default()
                }),
                ..Default::default()
            })
            .collect();
        self.send_as(self.epoch, Response::Launch(LaunchRanks { assignments }))
            .await;
    }

    async fn kill(&self, generation: u64, grace_ms: u32) {
        let kill = KillRanks {
            job_id: JOB.into(),
            generation,
            grace_ms,
        };
        self.send_as(self.epoch, Response::Kill(kill)).await;
    }
}

struct Running {
    stop: mpsc::Sender<()>,
    agent: JoinHandle<anyhow::Result<()>>,
    scratch: tempfile::TempDir,
}

impl Running {
    /// An agent with two slots whose ranks run `script`; `$1` is `--parent-pid`.
    fn start(coordinators: &[SocketAddr], script: &str) -> Self {
        Self::start_with(coordinators, script, Duration::ZERO, None)
    }

    /// The same; it waits so long for its ranks to leave, and keeps its state in a directory.
    fn start_with(
        coordinators: &[SocketAddr],
        script: &str,
        leave: Duration,
        state_dir: Option<&Path>,
    ) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let options = AgentOptions {
            tls: ClientTls::default(),
            coordinators: coordinators.iter().map(SocketAddr::to_string).collect(),
            node_id: "node-a".parse().unwrap(),
            advertise: None,
            slots: 2,
            hardware: resolve(DeviceChoice::Cpu).expect("a CPU"),
            output_root: scratch.path().to_str().unwrap().into(),
            data_roots: vec!["/data".into()],
            memory_root: None,
            hang_after: None,
            rank_command: RankCommand {
                program: "/bin/sh".into(),
                args: ["-c", script, "rank"].map(OsString::from).to_vec(),
                threads: Some(3),
            },
            leave,
            state_dir: state_dir.map(Path::to_owned),
        };
        let (stop, stopped) = mpsc::channel(2);
        let agent = tokio::spawn(run(options, stopped));
        Self { stop, agent, scratch }
    }

    async fn stop(self) {
        self.stop.send(()).await.unwrap();
        tokio::time::timeout(DEADLINE, self.agent)
            .await
            .unwrap()
            .unwrap()
            .unwrap();
    }
}

/// Waits in a way that SIGTERM ends at once; a plain `sleep` would outlive its shell.
const FOREVER: &str = "cat >/dev/null; while :; do sleep 0.05; done";

fn is_alive(pid: u32) -> bool {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), None).is_ok()
}

#[tokio::test]
async fn it_says_who_it_is_and_gives_a_rank_its_assignment() {
    let mut coordinator = Coordinator::start(None, 1, 60_000).await;
    // The script copies its input to standard error, so that it comes back through the rank's log.
    let agent = Running::start(
        &[coordinator.address],
        "cat >&2; echo >&2; echo OMP $OMP_NUM_THREADS >&2",
    );
    let hello = coordinator.hello().await;
    assert_eq!(
        (hello.node_id.as_str(), hello.slots, hello.address.as_str()),
        ("node-a", 2, "127.0.0.1")
    );
    coordinator.heartbeat_with(0).await;
    coordinator.launch(1, 0..1, "work/job").await;
    let started = coordinator.started().await;
    let exit = coordinator.exited().await;
    assert_eq!(exit.exit_code, Some(0));
    assert_eq!(exit.rank.as_ref().unwrap().pid, started.pid);
    assert_eq!(exit.last_error, "OMP 3");
    let log = std::fs::read_to_string(agent.scratch.path().join("work/job/rank-0.log")).unwrap();
    let json = log
        .lines()
        .find(|line| line.starts_with('{'))
        .expect("the assignment");
    let assignment: RankAssignment = serde_json::from_str(json).unwrap();
    assert_eq!(assignment.coordinators, [coordinator.address.to_string()]);
    assert_eq!(assignment.data_roots, ["/data"]);
    assert_eq!(assignment.address, "127.0.0.1");
    assert_eq!(assignment.device, "cpu");
    agent.stop().await;
}

#[tokio::test]
async fn an_exit_carries_code_signal_and_the_error_line() {
    let mut coordinator = Coordinator::start(None, 1, 60_000).await;
    let script = "cat >/dev/null; echo 'error: bad record' >&2; echo 'hint: repair it' >&2; exit 3";
    let agent = Running::start(&[coordinator.address], script);
    coordinator.hello().await;
    coordinator.launch(1, 0..1, "j").await;
    let exit = coordinator.exited().await;
    assert_eq!(
        (exit.exit_code, exit.last_error.as_str()),
        (Some(3), "error: bad record")
    );
    assert!(!exit.requested);
    agent.stop().await;
}

#[tokio::test]
async fn ranks_are_killed_as_groups_when_told() {
    let mut coordinator = Coordinator::start(None, 1, 60_000).await;
    let agent = Running::start(
        &[coordinator.address],
        "trap '' TERM; sleep 600 & cat >/dev/null; wait",
    );
    coordinator.hello().await;
    coordinator.launch(1, 0..2, "j").await;
    let first = coordinator.started().await;
    coordinator.started().await;
    coordinator.heartbeat_with(2).await;
    // SIGTERM is ignored by these; the grace ends in SIGKILL, for their children too.
    coordinator.kill(1, 50).await;
    for _ in 0..2 {
        let exit = coordinator.exited().await;
        assert_eq!(exit.signal, Some(9));
        assert!(exit.requested);
    }
    assert!(!is_alive(first.pid));
    coordinator.heartbeat_with(0).await;
    agent.stop().await;
}

#[tokio::test]
async fn a_new_generation_starts_after_the_old_one_is_reaped() {
    let mut coordinator = Coordinator::start(None, 1, 60_000).await;
    let agent = Running::start(&[coordinator.address], FOREVER);
    coordinator.hello().await;
    coordinator.launch(1, 0..2, "j").await;
    let old = [coordinator.started().await, coordinator.started().await];
    coordinator.launch(2, 0..2, "j").await;
    let new = coordinator.started().await;
    assert_eq!(new.generation, 2);
    assert!(old.iter().all(|rank| !is_alive(rank.pid)));
    // An assignment of the dead generation is refused: nothing more starts.
    coordinator.started().await;
    coordinator.launch(1, 0..2, "j").await;
    coordinator.heartbeat_with(2).await;
    agent.stop().await;
}

#[tokio::test]
async fn ranks_outlive_a_coordinator_that_comes_back_and_exits_are_told_again() {
    let mut first = Coordinator::start(None, 1, 60_000).await;
    let agent = Running::start(&[first.address], FOREVER);
    let hello = first.hello().await;
    first.launch(1, 0..1, "j").await;
    let rank = first.started().await;
    first.heartbeat_with(1).await;
    let address = first.address;
    drop(first.events);
    drop(first.outgoing);
    first.stop.cancel();
    first.server.await.unwrap();
    let mut second = Coordinator::start(Some(address), 2, 60_000).await;
    let again = second.hello().await;
    assert_eq!(again.boot_id, hello.boot_id);
    assert_eq!(again.ranks, std::slice::from_ref(&rank));
    // This one stops acknowledging, so the exit counts as untold and comes again on the next connection.
    *second.acknowledge.lock().unwrap() = false;
    assert!(is_alive(rank.pid));
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(rank.pid as i32),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
    assert_eq!(second.exited().await.signal, Some(9));
    second.hello().await;
    assert_eq!(second.exited().await.signal, Some(9));
    *second.acknowledge.lock().unwrap() = true;
    agent.stop().await;
}

#[tokio::test]
async fn an_agent_that_stops_lets_jobs_leave_until_it_is_told_twice() {
    for twice in [false, true] {
        let mut coordinator = Coordinator::start(None, 1, 60_000).await;
        let agent = Running::start_with(&[coordinator.address], FOREVER, Duration::from_secs(600), None);
        coordinator.hello().await;
        coordinator.launch(1, 0..1, "j").await;
        let rank = coordinator.started().await;
        coordinator.heartbeat_with(1).await;
        agent.stop.send(()).await.unwrap();
        coordinator
            .expect("word that it leaves", |message| {
                matches!(message, Request::Leaving(_)).then_some(())
            })
            .await;
        assert!(is_alive(rank.pid));
        match twice {
            // As the coordinator does once the checkpoint is committed.
            false => coordinator.kill(1, 0).await,
            true => agent.stop.send(()).await.unwrap(),
        }
        let exit = coordinator.exited().await;
        assert_eq!(
            (exit.requested, exit.signal),
            (!twice, Some(if twice { 15 } else { 9 }))
        );
        // Its end is waited for; another word changes nothing.
        let ended = tokio::time::timeout(DEADLINE, agent.agent).await;
        ended.unwrap().unwrap().unwrap();
    }
}

#[tokio::test]
async fn commands_of_an_older_epoch_are_refused() {
    let mut coordinator = Coordinator::start(None, 7, 60_000).await;
    let agent = Running::start(&[coordinator.address], FOREVER);
    coordinator.hello().await;
    coordinator.launch(1, 0..1, "j").await;
    let rank = coordinator.started().await;
    let kill = KillRanks {
        job_id: JOB.into(),
        generation: 9,
        grace_ms: 0,
    };
    coordinator.send_as(6, Response::Kill(kill)).await;
    // The stream keeps its order: the launch is answered after the stale kill was read.
    coordinator.launch(1, 1..2, "j").await;
    coordinator.started().await;
    assert!(is_alive(rank.pid));
    coordinator.heartbeat_with(2).await;
    agent.stop().await;
}

#[tokio::test]
async fn a_restarted_agent_obeys_no_coordinator_that_was_replaced_before() {
    let state = tempfile::tempdir().unwrap();
    let start = |coordinators: &[SocketAddr]| {
        Running::start_with(coordinators, FOREVER, Duration::ZERO, Some(state.path()))
    };
    let mut leads = Coordinator::start(None, 7, 60_000).await;
    let agent = start(&[leads.address]);
    leads.hello().await;
    leads.heartbeat_with(0).await;
    agent.stop().await;

    let mut replaced = Coordinator::start(None, 6, 60_000).await;
    let agent = start(&[replaced.address, leads.address]);
    replaced.hello().await;
    replaced.launch(1, 0..1, "j").await;
    assert!(leads.hello().await.ranks.is_empty(), "nothing was started");
    leads.launch(1, 1..2, "j").await;
    assert_eq!(leads.started().await.rank, 1);

    let second = start(&[leads.address]);
    let refused = tokio::time::timeout(DEADLINE, second.agent)
        .await
        .unwrap()
        .unwrap();
    let refused = refused.expect_err("the directory is in use").to_string();
    assert!(refused.contains("another worker uses it"), "{refused}");
    agent.stop().await;
}

#[tokio::test]
async fn orphaned_ranks_are_killed() {
    let mut coordinator = Coordinator::start(None, 1, 300).await;
    let agent = Running::start(&[coordinator.address], FOREVER);
    coordinator.hello().await;
    coordinator.launch(1, 0..1, "j").await;
    coordinator.started().await;
    *coordinator.acknowledge.lock().unwrap() = false;
    let exit = coordinator.exited().await;
    assert!(exit.last_error.contains("orphan"), "{}", exit.last_error);
    assert!(!exit.requested);
    *coordinator.acknowledge.lock().unwrap() = true;
    agent.stop().await;
}

#[tokio::test]
async fn a_stopped_agent_ends_its_ranks_and_says_so() {
    let mut coordinator = Coordinator::start(None, 1, 60_000).await;
    let agent = Running::start(&[coordinator.address], FOREVER);
    coordinator.hello().await;
    coordinator.launch(1, 0..1, "j").await;
    let rank = coordinator.started().await;
    let stopping = tokio::spawn(agent.stop());
    let exit = coordinator.exited().await;
    assert_eq!(exit.last_error, "the worker was stopped");
    stopping.await.unwrap();
    assert!(!is_alive(rank.pid));
}

#[tokio::test]
async fn the_next_address_is_tried_when_one_is_dead() {
    let dead = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dead_address = dead.local_addr().unwrap();
    drop(dead);
    let mut coordinator = Coordinator::start(None, 1, 60_000).await;
    let agent = Running::start(&[dead_address, coordinator.address], FOREVER);
    coordinator.hello().await;
    agent.stop().await;
}

/// Stands by, and says who leads.
struct Standby(SocketAddr);

#[tonic::async_trait]
impl WorkerService for Standby {
    type JoinStream = ReceiverStream<Result<JoinResponse, Status>>;

    async fn join(&self, _: Call<Streaming<JoinRequest>>) -> Result<Answer<Self::JoinStream>, Status> {
        let mut status = Status::unavailable("this coordinator stands by");
        let metadata = status.metadata_mut();
        metadata.insert("arcface-role", "standby".parse().unwrap());
        metadata.insert("arcface-leader", self.0.to_string().parse().unwrap());
        Err(status)
    }
}

#[tokio::test]
async fn a_standby_leads_to_the_leader() {
    let mut leader = Coordinator::start(None, 1, 60_000).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let standby = listener.local_addr().unwrap();
    let server = tokio::spawn(tonic::transport::Server::builder().serve_with_incoming_shutdown(
        WorkerServiceServer::new(Standby(leader.address)),
        TcpListenerStream::new(listener),
        std::future::pending(),
    ));
    let agent = Running::start(&[standby], FOREVER);
    leader.hello().await;
    agent.stop().await;
    server.abort();
}

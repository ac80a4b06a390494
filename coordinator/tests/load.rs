//! The real coordinator under load, on the embedded store and on a real etcd: agents that send heartbeats, ten thousand
//! jobs that wait, submits from many sides, agents that all vanish at once. By default a short form runs, which checks
//! that nothing is lost or wrongly called lost and prints its figures; `ARCFACE_LOAD=full` runs it in full and holds the
//! figures to their bars (`docs/benchmarks/control_plane.md`).

use arcface_proto::v1::{
    self, GetClusterRequest, Heartbeat, Hello, JoinRequest, ListJobsRequest, ListNodesRequest, NodeState,
    SubmitJobRequest, cluster_service_client::ClusterServiceClient, job_service_client::JobServiceClient,
    join_request::Message as Request, join_response::Message as Response,
    worker_service_client::WorkerServiceClient,
};
use server::Etcd;
use std::{
    fs,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tempfile::TempDir;
use tokio::{sync::mpsc, task::JoinSet, time::sleep};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

#[path = "../../tests/harness/etcd.rs"]
mod server;

/// One coordinator at a time has the machine.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

const HEARTBEAT: Duration = Duration::from_millis(500);
/// Agents that share a connection: under the server's limit of streams.
const AGENTS_PER_CONNECTION: usize = 100;
const SUBMITTERS: usize = 64;
/// Agents that vanish are a tenth.
const VANISH: usize = 10;

struct Size {
    agents: usize,
    jobs: u64,
    steady: Duration,
    full: bool,
}

fn size() -> Size {
    match std::env::var("ARCFACE_LOAD").as_deref() {
        Ok("full") => Size {
            agents: 1_000,
            jobs: 10_000,
            steady: Duration::from_secs(20),
            full: true,
        },
        _ => Size {
            agents: 100,
            jobs: 500,
            steady: Duration::from_secs(2),
            full: false,
        },
    }
}

/// The coordinator's process.
struct Server {
    child: Child,
    address: String,
    _directory: TempDir,
}

impl Server {
    /// On a store's URL; `None` is the embedded one. It leads when this returns.
    async fn start(store: Option<String>) -> Self {
        let directory = tempfile::tempdir().expect("scratch directory");
        let file = directory.path().join("addresses");
        let child = Command::new(env!("CARGO_BIN_EXE_arcface-coordinator"))
            .args(["serve", "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"])
            .arg("--store")
            .arg(store.unwrap_or_else(|| format!("embedded:{}", directory.path().join("store").display())))
            .arg("--address-file")
            .arg(&file)
            .env("ARCFACE_LOG", "error")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("start the coordinator");
        let mut server = Self {
            child,
            address: String::new(),
            _directory: directory,
        };
        let deadline = Instant::now() + Duration::from_secs(30);
        while server.address.is_empty() {
            assert!(Instant::now() < deadline, "the coordinator does not answer");
            sleep(Duration::from_millis(10)).await;
            let text = fs::read_to_string(&file).unwrap_or_default();
            let line = text.lines().find_map(|line| line.strip_prefix("grpc="));
            server.address = line.unwrap_or_default().to_owned();
        }
        let mut cluster = ClusterServiceClient::new(server.channel().await);
        while let Err(standing_by) = cluster.get_cluster(GetClusterRequest {}).await {
            assert!(
                Instant::now() < deadline,
                "the coordinator does not lead: {standing_by}"
            );
            sleep(Duration::from_millis(10)).await;
        }
        server
    }

    async fn channel(&self) -> Channel {
        let address = format!("http://{}", self.address);
        Channel::from_shared(address)
            .expect("address")
            .connect()
            .await
            .expect("connect")
    }

    /// Seconds of processor time so far.
    fn cpu_s(&self) -> f64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).expect("stat");
        let after_name = stat.rsplit_once(')').expect("a name").1;
        let words: Vec<&str> = after_name.split_whitespace().collect();
        // Fields 14 and 15, in hundredths of a second.
        let ticks: u64 = [words[11], words[12]]
            .iter()
            .map(|word| word.parse::<u64>().expect("ticks"))
            .sum();
        ticks as f64 / 100.0
    }

    fn rss_mib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("status");
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .expect("VmRSS");
        line.split_whitespace()
            .next()
            .expect("a number")
            .parse::<u64>()
            .expect("kB")
            / 1024
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the agents share.
#[derive(Default)]
struct Acks {
    measuring: AtomicBool,
    joined: AtomicU64,
    latencies_us: Mutex<Vec<u64>>,
}

/// An agent without ranks; its end is the end of its stream.
async fn agent(channel: Channel, number: usize, agents: usize, acks: Arc<Acks>) {
    let (outgoing, receiver) = mpsc::channel(16);
    let say = async |message| {
        outgoing
            .send(JoinRequest {
                message: Some(message),
            })
            .await
            .expect("the stream is open")
    };
    say(Request::Hello(Hello {
        node_id: format!("node-{number}"),
        boot_id: "boot".into(),
        copies_of: Vec::new(),
        address: "127.0.0.1".into(),
        slots: 1,
        device: "cpu".into(),
        version: "0".into(),
        ranks: Vec::new(),
    }))
    .await;
    let mut client = WorkerServiceClient::new(channel);
    let mut incoming = client
        .join(ReceiverStream::new(receiver))
        .await
        .expect("join")
        .into_inner();
    incoming.message().await.expect("welcome").expect("welcome");
    acks.joined.fetch_add(1, Ordering::Relaxed);
    // Spread over the period, as agents that started at any time are.
    sleep(HEARTBEAT * number as u32 / agents as u32).await;
    let mut ticks = tokio::time::interval(HEARTBEAT);
    for sequence in 1.. {
        ticks.tick().await;
        let sent = Instant::now();
        say(Request::Heartbeat(Heartbeat {
            sequence,
            ranks: Vec::new(),
        }))
        .await;
        let answer = incoming.message().await.expect("ack").expect("ack");
        assert!(matches!(answer.message, Some(Response::HeartbeatAck(ack)) if ack.sequence == sequence));
        if acks.measuring.load(Ordering::Relaxed) {
            acks.latencies_us
                .lock()
                .expect("latencies")
                .push(sent.elapsed().as_micros() as u64);
        }
    }
}

/// A job that no cluster of this test has the slots for: it waits.
fn spec(number: u64) -> v1::JobSpec {
    v1::JobSpec {
        output: Some(format!("work_dirs/{number}")),
        job: Some(v1::JobSection {
            // Several sizes: the planner has several questions.
            world_size: Some(2_000 + (number % 7) as u32),
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

async fn submit(channel: Channel, next: Arc<AtomicU64>, jobs: u64) {
    let mut client = JobServiceClient::new(channel);
    loop {
        let number = next.fetch_add(1, Ordering::Relaxed);
        if number >= jobs {
            return;
        }
        let request = SubmitJobRequest {
            spec: Some(spec(number)),
            request_id: format!("request-{number}"),
            validate_only: false,
        };
        client.submit_job(request).await.expect("submit");
    }
}

fn percentile(values: &mut [u64], percent: usize) -> f64 {
    values.sort_unstable();
    let index = (values.len() * percent / 100).min(values.len().saturating_sub(1));
    values.get(index).copied().unwrap_or(0) as f64 / 1000.0
}

/// Milliseconds of a page of the job list, from the newest to the oldest.
async fn list_all(channel: Channel, jobs: u64) -> Vec<u64> {
    let mut client = JobServiceClient::new(channel);
    let (mut pages_us, mut seen, mut page_token) = (Vec::new(), 0, String::new());
    loop {
        let asked = Instant::now();
        let request = ListJobsRequest {
            page_size: 100,
            page_token,
            ..Default::default()
        };
        let page = client.list_jobs(request).await.expect("list").into_inner();
        pages_us.push(asked.elapsed().as_micros() as u64);
        seen += page.jobs.len() as u64;
        page_token = page.next_page_token;
        if page_token.is_empty() {
            assert_eq!(seen, jobs, "every acknowledged submit is in the list, once");
            return pages_us;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_agents_and_ten_thousand_jobs() {
    let _alone = ALONE.lock().await;
    let server = Server::start(None).await;
    load(&server, "embedded", 1_000.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_agents_and_ten_thousand_jobs_on_etcd() {
    let _alone = ALONE.lock().await;
    let Some(etcd) = Etcd::start().expect("start etcd") else {
        return;
    };
    let server = Server::start(Some(format!("etcd:{}", etcd.url()))).await;
    load(&server, "etcd", 300.0).await;
}

/// The whole load on one coordinator, which shall take so many durable submits a second.
async fn load(server: &Server, store: &str, least_submits_per_s: f64) {
    let Size {
        agents,
        jobs,
        steady,
        full,
    } = size();
    let acks = Arc::new(Acks::default());
    let mut tasks = Vec::new();
    let mut channel = server.channel().await;
    for number in 0..agents {
        if number.is_multiple_of(AGENTS_PER_CONNECTION) {
            channel = server.channel().await;
        }
        tasks.push(tokio::spawn(agent(channel.clone(), number, agents, acks.clone())));
    }
    while acks.joined.load(Ordering::Relaxed) < agents as u64 {
        sleep(Duration::from_millis(10)).await;
    }

    let started = Instant::now();
    let next = Arc::new(AtomicU64::new(0));
    let mut submitters = JoinSet::new();
    let clients = [server.channel().await, server.channel().await];
    for index in 0..SUBMITTERS {
        submitters.spawn(submit(clients[index % 2].clone(), next.clone(), jobs));
    }
    while let Some(done) = submitters.join_next().await {
        done.expect("a submitter");
    }
    let submits_per_s = jobs as f64 / started.elapsed().as_secs_f64();

    let (cpu_s, started) = (server.cpu_s(), Instant::now());
    acks.measuring.store(true, Ordering::Relaxed);
    sleep(steady).await;
    acks.measuring.store(false, Ordering::Relaxed);
    let cores = (server.cpu_s() - cpu_s) / started.elapsed().as_secs_f64();
    let mut latencies = std::mem::take(&mut *acks.latencies_us.lock().expect("latencies"));
    let (p50_ms, p99_ms) = (percentile(&mut latencies, 50), percentile(&mut latencies, 99));
    let mut pages = list_all(clients[0].clone(), jobs).await;
    let page_p99_ms = percentile(&mut pages, 99);

    let gone = agents / VANISH;
    let vanished = Instant::now();
    tasks.drain(..gone).for_each(|task| task.abort());
    let mut cluster = ClusterServiceClient::new(clients[1].clone());
    let (lost_s, lost) = loop {
        let nodes = cluster
            .list_nodes(ListNodesRequest::default())
            .await
            .expect("list")
            .into_inner()
            .nodes;
        let lost: Vec<String> = nodes
            .into_iter()
            .filter(|node| node.state() == NodeState::Lost)
            .map(|node| node.id)
            .collect();
        let waited_s = vanished.elapsed().as_secs_f64();
        if lost.len() >= gone || waited_s > 30.0 {
            break (waited_s, lost);
        }
        sleep(Duration::from_millis(50)).await;
    };
    let wrong = lost
        .iter()
        .filter(|id| id["node-".len()..].parse::<usize>().expect("a number") >= gone)
        .count();
    println!(
        "{store}, {agents} agents, {jobs} jobs: heartbeats acknowledged in p50 {p50_ms:.2} ms, p99 {p99_ms:.2} ms ({} acks); \
         {cores:.2} cores, {} MiB; {submits_per_s:.0} submits/s; list page p99 {page_p99_ms:.2} ms; \
         {gone} lost agents flagged in {lost_s:.2} s, {wrong} others",
        latencies.len(),
        server.rss_mib()
    );
    assert_eq!(
        (lost.len(), wrong),
        (gone, 0),
        "lost agents, and others called lost"
    );
    assert!(latencies.len() >= agents, "every agent was answered");
    if full {
        assert!(p99_ms <= 20.0, "p99 of a heartbeat's answer");
        assert!(cores <= 0.5, "processor time");
        assert!(submits_per_s >= least_submits_per_s, "durable submits a second");
        assert!(page_p99_ms <= 50.0, "p99 of a list page");
        assert!(lost_s <= 4.0, "lost agents flagged");
    }
    tasks.iter().for_each(|task| task.abort());
}

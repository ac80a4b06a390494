//! An agent as the worker's is: one stream to whichever coordinator answers, the highest epoch obeyed alone, launches
//! and kills fenced by their generation, exits repeated until they are acknowledged, orphans killed.

use crate::{
    determinism::Rng,
    double::Double,
    history::{Key, Shared},
    net,
    rank::Rank,
};
use arcface_coordinator::server::Timers;
use arcface_proto::v1::{
    Heartbeat, Hello, JoinRequest, JoinResponse, NodeRank, RankAssignment, RankExited, RankStarted,
    join_request::Message as Request, join_response::Message as Response,
    worker_service_client::WorkerServiceClient,
};
use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};
use tokio::{
    sync::{Notify, mpsc},
    time::{Instant, interval, sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;

/// A node's fixed facts.
pub struct Node {
    pub name: String,
    pub slots: u32,
    pub coordinators: Vec<String>,
    pub timers: Timers,
    pub world: Shared,
    pub double: Option<Double>,
}

/// What a connection says.
enum Link {
    Up(mpsc::Sender<JoinRequest>, u64),
    Said(JoinResponse),
    Down,
    Retry,
}

/// A running rank.
struct Running {
    pid: u32,
    /// Ends it because the coordinator wanted it.
    stop: Arc<Notify>,
    stopping: bool,
}

/// An exit that the coordinator may not know of, and the heartbeat that follows it on the same stream.
struct Untold {
    exit: RankExited,
    covered_by: Option<u64>,
}

struct Agent {
    node: Arc<Node>,
    boot: String,
    rng: Rng,
    links: mpsc::Sender<(u64, Link)>,
    exits: mpsc::Sender<(Key, Exit)>,
    link: u64,
    tries: usize,
    outgoing: Option<mpsc::Sender<JoinRequest>>,
    epoch: u64,
    sequence: u64,
    sent: VecDeque<(u64, Instant)>,
    heard: Instant,
    running: BTreeMap<Key, Running>,
    waiting: Vec<RankAssignment>,
    newest: BTreeMap<String, u64>,
    killed: BTreeMap<String, u64>,
    exited: BTreeMap<Key, RankExited>,
    untold: Vec<Untold>,
    pids: u32,
}

#[derive(Clone, Copy, Debug)]
enum Exit {
    Code(i32),
    Signal,
    Requested,
}

/// The agent's process.
pub async fn run(node: Arc<Node>, seed: u64) -> turmoil::Result {
    let (links, mut link_events) = mpsc::channel(256);
    let (exits, mut exit_events) = mpsc::channel(64);
    let boot = node.world.lock().expect("world").boot(&node.name);
    let mut agent = Agent {
        rng: Rng::new(seed ^ boot.bytes().map(u64::from).sum::<u64>()),
        boot,
        links,
        exits,
        link: 0,
        tries: 0,
        outgoing: None,
        epoch: 0,
        sequence: 0,
        sent: VecDeque::new(),
        heard: Instant::now(),
        running: BTreeMap::new(),
        waiting: Vec::new(),
        newest: BTreeMap::new(),
        killed: BTreeMap::new(),
        exited: BTreeMap::new(),
        untold: Vec::new(),
        pids: 100,
        node,
    };
    agent.connect();
    let mut ticks = interval(Duration::from_millis(agent.node.timers.heartbeat_ms));
    loop {
        tokio::select! {
            biased;
            Some((link, event)) = link_events.recv() => agent.on_link(link, event),
            Some((key, exit)) = exit_events.recv() => agent.on_exit(key, exit),
            _ = ticks.tick() => agent.on_tick(),
        }
    }
}

/// One connection, from its first packet to its last.
async fn link(number: u64, host: String, hello: JoinRequest, links: mpsc::Sender<(u64, Link)>) {
    let opened = timeout(Duration::from_secs(2), async {
        let channel = net::connect(&host).await.ok()?;
        let (outgoing, receiver) = mpsc::channel(256);
        outgoing.send(hello).await.ok()?;
        let mut client = WorkerServiceClient::new(channel);
        let mut incoming = client
            .join(ReceiverStream::new(receiver))
            .await
            .ok()?
            .into_inner();
        let welcome = incoming.message().await.ok()??;
        Some((outgoing, incoming, welcome.epoch))
    })
    .await;
    if let Ok(Some((outgoing, mut incoming, epoch))) = opened {
        let _ = links.send((number, Link::Up(outgoing, epoch))).await;
        while let Ok(Some(message)) = incoming.message().await {
            let _ = links.send((number, Link::Said(message))).await;
        }
    }
    let _ = links.send((number, Link::Down)).await;
}

impl Agent {
    fn list(&self) -> Vec<NodeRank> {
        let wire = |(key, running): (&Key, &Running)| NodeRank {
            job_id: key.0.clone(),
            generation: key.1,
            rank: key.2,
            pid: running.pid,
        };
        self.running.iter().map(wire).collect()
    }

    fn connect(&mut self) {
        self.link += 1;
        let host = self.node.coordinators[self.tries % self.node.coordinators.len()].clone();
        let hello = Hello {
            node_id: self.node.name.clone(),
            boot_id: self.boot.clone(),
            copies_of: Vec::new(),
            address: self.node.name.clone(),
            slots: self.node.slots,
            device: "cpu".into(),
            version: "0.0.0".into(),
            ranks: self.list(),
        };
        let hello = JoinRequest {
            message: Some(Request::Hello(hello)),
        };
        tokio::task::spawn_local(link(self.link, host, hello, self.links.clone()));
    }

    /// Gives the connection up and tries the next coordinator.
    fn lost(&mut self) {
        self.outgoing = None;
        self.tries += 1;
        self.link += 1;
        let delay = match self.tries % self.node.coordinators.len() {
            0 => self.rng.between(100, 500),
            _ => 20,
        };
        let (number, links) = (self.link, self.links.clone());
        tokio::task::spawn_local(async move {
            sleep(Duration::from_millis(delay)).await;
            let _ = links.send((number, Link::Retry)).await;
        });
    }

    fn on_link(&mut self, number: u64, event: Link) {
        if number != self.link {
            return;
        }
        match event {
            Link::Retry => self.connect(),
            Link::Down => self.lost(),
            Link::Up(_, epoch) if epoch < self.epoch && self.compares() => self.lost(),
            Link::Up(outgoing, epoch) => {
                self.epoch = epoch;
                self.outgoing = Some(outgoing);
                self.heard = Instant::now();
                self.sent.clear();
                let mut untold = std::mem::take(&mut self.untold);
                untold.iter_mut().for_each(|untold| {
                    untold.covered_by = None;
                    self.send(Request::RankExited(untold.exit.clone()));
                });
                self.untold = untold;
            }
            Link::Said(response) => self.on_message(response),
        }
    }

    fn compares(&self) -> bool {
        self.node.double != Some(Double::AgentForgetsEpoch)
    }

    fn on_message(&mut self, response: JoinResponse) {
        if response.epoch < self.epoch && self.compares() {
            return;
        }
        self.epoch = response.epoch;
        match response.message {
            Some(Response::HeartbeatAck(ack)) => {
                while self
                    .sent
                    .front()
                    .is_some_and(|(sequence, _)| *sequence <= ack.sequence)
                {
                    self.heard = self.sent.pop_front().map_or(self.heard, |(_, at)| at);
                }
                self.untold
                    .retain(|untold| untold.covered_by.is_none_or(|by| by > ack.sequence));
            }
            Some(Response::Launch(launch)) => {
                self.obeyed(response.epoch);
                for assignment in launch.assignments {
                    self.launch(assignment);
                }
            }
            Some(Response::Kill(kill)) => {
                self.obeyed(response.epoch);
                let killed = self.killed.entry(kill.job_id.clone()).or_default();
                *killed = (*killed).max(kill.generation);
                self.stop(&kill.job_id, kill.generation, u64::from(kill.grace_ms));
            }
            _ => {}
        }
    }

    fn obeyed(&self, epoch: u64) {
        self.node.world.lock().expect("world").obeyed(&self.boot, epoch);
    }

    fn launch(&mut self, assignment: RankAssignment) {
        let key: Key = (assignment.job_id.clone(), assignment.generation, assignment.rank);
        let newest = self.newest.entry(key.0.clone()).or_default();
        if key.1 < *newest || self.killed.get(&key.0).is_some_and(|killed| key.1 <= *killed) {
            return;
        }
        *newest = key.1;
        if let Some(exit) = self.exited.get(&key).cloned() {
            return self.tell_exit(exit);
        }
        let waits = self.waiting.iter().any(|waiting| {
            (waiting.job_id.as_str(), waiting.generation, waiting.rank) == (key.0.as_str(), key.1, key.2)
        });
        if self.running.contains_key(&key) || waits {
            return;
        }
        self.stop(&key.0, key.1 - 1, 0);
        self.waiting.push(assignment);
        self.start_waiting();
    }

    /// Ends a job's ranks up to a generation.
    fn stop(&mut self, job: &str, generation: u64, grace_ms: u64) {
        let doomed =
            |assignment: &RankAssignment| assignment.job_id == job && assignment.generation <= generation;
        let dropped: Vec<RankAssignment> = self.waiting.extract_if(.., |waiting| doomed(waiting)).collect();
        for assignment in dropped {
            let key = (assignment.job_id, assignment.generation, assignment.rank);
            self.exit_known(key, 0, Exit::Requested);
        }
        let due = self
            .running
            .iter_mut()
            .filter(|(key, running)| key.0 == job && key.1 <= generation && !running.stopping);
        for (_, running) in due {
            running.stopping = true;
            let stop = running.stop.clone();
            tokio::task::spawn_local(async move {
                sleep(Duration::from_millis(grace_ms)).await;
                stop.notify_one();
            });
        }
    }

    /// Starts what waits, once no older generation of its job runs here and a slot is free.
    fn start_waiting(&mut self) {
        while let Some(index) = self.waiting.iter().position(|waiting| {
            let older = |key: &Key| key.0 == waiting.job_id && key.1 < waiting.generation;
            !self.running.keys().any(older) && (self.running.len() as u32) < self.node.slots
        }) {
            let assignment = self.waiting.remove(index);
            self.spawn(assignment);
        }
    }

    fn spawn(&mut self, assignment: RankAssignment) {
        let key: Key = (assignment.job_id.clone(), assignment.generation, assignment.rank);
        self.pids += 1;
        let (stop, doom) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let running = Running {
            pid: self.pids,
            stop: stop.clone(),
            stopping: false,
        };
        let spec = assignment.spec.clone().unwrap_or_default();
        let every = spec
            .checkpoint
            .as_ref()
            .and_then(|checkpoint| checkpoint.every_steps)
            .unwrap_or(10);
        let world_size = assignment.world_size;
        let rank = Rank {
            node: self.node.clone(),
            key: key.clone(),
            total_steps: spec
                .train
                .as_ref()
                .and_then(|train| train.num_epoch)
                .map_or(40, u64::from),
            every: every.max(1),
            step_ms: 40,
            assignment: Arc::new(assignment),
        };
        let world = self.node.world.clone();
        world
            .lock()
            .expect("world")
            .started(&key, &self.node.name, world_size, doom.clone());
        let exits = self.exits.clone();
        let (rng, process) = (Rng::new(self.rng.next()), key.clone());
        tokio::task::spawn_local(async move {
            let exit = tokio::select! {
                biased;
                () = stop.notified() => Exit::Requested,
                () = doom.notified() => Exit::Signal,
                code = rank.run(rng) => Exit::Code(code),
            };
            world.lock().expect("world").ended(&process, &format!("{exit:?}"));
            let _ = exits.send((process, exit)).await;
        });
        let rank = NodeRank {
            job_id: key.0.clone(),
            generation: key.1,
            rank: key.2,
            pid: running.pid,
        };
        self.running.insert(key, running);
        self.send(Request::RankStarted(RankStarted { rank: Some(rank) }));
    }

    fn on_exit(&mut self, key: Key, exit: Exit) {
        let pid = self.running.remove(&key).map_or(0, |running| running.pid);
        self.exit_known(key, pid, exit);
        self.start_waiting();
    }

    fn exit_known(&mut self, key: Key, pid: u32, exit: Exit) {
        let (exit_code, signal, requested) = match exit {
            Exit::Code(code) => (Some(code), None, false),
            Exit::Signal => (None, Some(9), false),
            Exit::Requested => (None, Some(9), true),
        };
        let told = RankExited {
            rank: Some(NodeRank {
                job_id: key.0.clone(),
                generation: key.1,
                rank: key.2,
                pid,
            }),
            exit_code,
            signal,
            last_error: String::new(),
            requested,
            stalled_ms: None,
        };
        self.exited.insert(key, told.clone());
        self.tell_exit(told);
    }

    fn tell_exit(&mut self, exit: RankExited) {
        self.send(Request::RankExited(exit.clone()));
        self.untold.push(Untold {
            exit,
            covered_by: None,
        });
    }

    fn send(&mut self, message: Request) {
        let request = JoinRequest {
            message: Some(message),
        };
        if let Some(outgoing) = &self.outgoing
            && outgoing.try_send(request).is_err()
        {
            self.lost();
        }
    }

    fn on_tick(&mut self) {
        let silence_ms = self.heard.elapsed().as_millis() as u64;
        if silence_ms > self.node.timers.orphan_ms {
            self.waiting.clear();
            for running in self.running.values_mut().filter(|running| !running.stopping) {
                running.stopping = true;
                running.stop.notify_one();
            }
        }
        if self.outgoing.is_none() {
            return;
        }
        if silence_ms > 6 * self.node.timers.heartbeat_ms {
            return self.lost();
        }
        self.sequence += 1;
        self.sent.push_back((self.sequence, Instant::now()));
        let (sequence, ranks) = (self.sequence, self.list());
        self.send(Request::Heartbeat(Heartbeat { sequence, ranks }));
        for untold in self
            .untold
            .iter_mut()
            .filter(|untold| untold.covered_by.is_none())
        {
            untold.covered_by = Some(sequence);
        }
    }
}

//! The node agent: joins the coordinator, sends heartbeats, starts rank processes when told, reaps them, kills them
//! when told or when orphaned. It never touches a tensor and does not know what a rank computes.
//!
//! One task owns all state ([`run`]); the pure parts are `table` (what a command means), `stall` (when a rank hangs),
//! `liveness` and `crate::dial`.

mod epoch;
mod gpus;
mod link;
mod liveness;
mod memory;
mod outbox;
mod process;
mod route;
mod stall;
mod table;
#[cfg(test)]
mod tests;

pub use memory::MemoryRoot;
pub use process::RankCommand;

use crate::channel::ClientTls;
use crate::device::Hardware;
use crate::telemetry as names;
use arcface_proto::types::{Generation, JobId, NodeId};
use arcface_proto::v1::{
    Heartbeat, Hello, JoinRequest, JoinResponse, KillRanks, Leaving, RankAssignment, RankStarted,
};
use arcface_proto::v1::{RankExited, join_request::Message as Request, join_response::Message as Response};
use arcface_traces::Span;
use epoch::Epoch;
use gpus::Gpus;
use link::{Link, LinkEvent};
use liveness::Liveness;
use outbox::Outbox;
use process::RankProcess;
use stall::Watchdog;
use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};
use table::{Effect, ExitFacts, RankKey, Table};
use tokio::sync::mpsc;
use tracing::{error, info, warn};

/// Time between SIGTERM and SIGKILL for ranks of an agent that stops.
const STOP_GRACE: Duration = Duration::from_secs(5);
/// Longest time that a stopping agent waits for its ranks and for the coordinator to hear of it.
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// Heartbeat period before the first Welcome sets it.
const FIRST_HEARTBEAT: Duration = Duration::from_millis(500);

/// What an agent is started with.
#[derive(Debug)]
pub struct AgentOptions {
    /// Coordinators, `host:port`, in the order of trying; at least one.
    pub coordinators: Vec<String>,
    /// How they are connected to.
    pub tls: ClientTls,
    /// Node's id.
    pub node_id: NodeId,
    /// Host at which this node's ranks listen for their peers; `None`: the address that faces the coordinator.
    pub advertise: Option<String>,
    /// Ranks at once.
    pub slots: u32,
    /// What it computes on; a GPU for each slot, where it is GPUs.
    pub hardware: Hardware,
    /// Folder of relative job outputs; empty: the current directory, and absolute outputs anywhere.
    pub output_root: String,
    /// Folders that training data may be read from; empty: any.
    pub data_roots: Vec<String>,
    /// Memory for copies of the ranks' state; `None`: this node keeps none.
    pub memory_root: Option<MemoryRoot>,
    /// Shortest time without progress after which a training rank counts as hung; `None`: none ever does.
    pub hang_after: Option<Duration>,
    /// What a rank process is.
    pub rank_command: RankCommand,
    /// How long an agent that stops waits for its ranks' jobs to make a checkpoint and leave.
    pub leave: Duration,
    /// Where the highest epoch is kept; `None`: in memory, so that a restarted agent obeys any coordinator.
    pub state_dir: Option<PathBuf>,
}

/// Where an agent is on its way out.
#[derive(Clone, Copy, Debug)]
enum Stage {
    Serving,
    /// The coordinator knows; ranks may finish a checkpoint until then.
    Leaving(tokio::time::Instant),
    /// Ranks are ended; it returns at the latest then.
    Stopping(tokio::time::Instant),
}

impl Stage {
    fn ends(self) -> Option<tokio::time::Instant> {
        match self {
            Self::Serving => None,
            Self::Leaving(at) | Self::Stopping(at) => Some(at),
        }
    }

    fn is_serving(self) -> bool {
        matches!(self, Self::Serving)
    }
}

/// Runs the agent until a first word on `shutdown`: then it tells the coordinator, so that jobs make a checkpoint and
/// leave, stops what is left after [`AgentOptions::leave`] or at a second word, and returns.
///
/// Await it on the main thread (`Runtime::block_on`): rank processes are started on the calling thread, and end
/// with it.
///
/// # Errors
/// A state directory that is in use, damaged or not to be written. What goes wrong later is logged and tried again.
pub async fn run(options: AgentOptions, mut shutdown: mpsc::Receiver<()>) -> anyhow::Result<()> {
    let (exits_sender, mut exits) = mpsc::channel(64);
    let epoch = match &options.state_dir {
        Some(directory) => Epoch::open(directory)?,
        None => Epoch::in_memory(),
    };
    let mut agent = Agent::new(options, epoch, exits_sender);
    let mut stage = Stage::Serving;
    let mut ticks = tokio::time::interval(agent.heartbeat);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            event = agent.link.next() => {
                if agent.on_link(event, !stage.is_serving()) {
                    ticks = tokio::time::interval(agent.heartbeat);
                    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
                }
            }
            Some((key, facts)) = exits.recv() => agent.on_exit(&key, facts),
            _ = ticks.tick() => agent.on_tick(Instant::now()),
            Some(()) = shutdown.recv() => stage = agent.on_shutdown(stage),
            () = sleep_until(stage.ends()) => match stage {
                Stage::Stopping(_) => {
                    warn!("stopped before every rank and message was seen off");
                    return Ok(());
                }
                _ => stage = agent.on_shutdown(stage),
            }
        }
        let told = !agent.link.is_up() || agent.outbox.is_empty();
        if !stage.is_serving() && agent.table.is_idle() && told {
            info!("stopped");
            return Ok(());
        }
    }
}

async fn sleep_until(at: Option<tokio::time::Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

struct Agent {
    options: AgentOptions,
    boot_id: String,
    advertise: String,
    table: Table,
    processes: HashMap<RankKey, RankProcess>,
    gpus: Gpus,
    watchdogs: HashMap<RankKey, Watchdog>,
    exits: mpsc::Sender<(RankKey, ExitFacts)>,
    link: Link,
    outbox: Outbox,
    liveness: Liveness,
    /// Highest epoch that a coordinator has shown: commands of lower ones are refused.
    epoch: Epoch,
    heartbeat: Duration,
    orphan: Option<Duration>,
    last_complaint: String,
}

impl Agent {
    fn new(options: AgentOptions, epoch: Epoch, exits: mpsc::Sender<(RankKey, ExitFacts)>) -> Self {
        metrics::gauge!(names::AGENT_SLOTS).set(f64::from(options.slots));
        metrics::gauge!(names::AGENT_RANKS).set(0.0);
        metrics::gauge!(names::AGENT_JOINED).set(0.0);
        Self {
            boot_id: uuid::Uuid::new_v4().to_string(),
            advertise: String::new(),
            table: Table::new(options.slots),
            processes: HashMap::new(),
            gpus: Gpus::new(&options.hardware.gpus),
            watchdogs: HashMap::new(),
            exits,
            link: Link::new(options.coordinators.clone(), options.tls.clone()),
            outbox: Outbox::default(),
            liveness: Liveness::new(Instant::now()),
            epoch,
            heartbeat: FIRST_HEARTBEAT,
            orphan: None,
            last_complaint: String::new(),
            options,
        }
    }

    /// The next stage of stopping. With nothing to wait for, or nobody to tell, it is the last.
    fn on_shutdown(&mut self, stage: Stage) -> Stage {
        let now = tokio::time::Instant::now();
        let may_leave = stage.is_serving() && !self.options.leave.is_zero() && !self.table.is_idle();
        match stage {
            Stage::Stopping(_) => stage,
            _ if may_leave && self.link.send(leaving()) => {
                let limit = self.options.leave;
                info!(?limit, "stopping: jobs may make a checkpoint and leave");
                Stage::Leaving(now + limit)
            }
            _ => {
                info!("stopping: ranks are ended");
                let effects = self.table.stop_all("the worker was stopped", STOP_GRACE);
                self.perform(effects);
                Stage::Stopping(now + STOP_LIMIT)
            }
        }
    }

    /// True if the heartbeat's period may have changed.
    fn on_link(&mut self, event: LinkEvent, stopping: bool) -> bool {
        match event {
            LinkEvent::Due => {
                let hello = self.hello();
                self.link.connect(hello);
            }
            LinkEvent::Joined {
                address,
                epoch,
                welcome,
                hello_sent,
            } => {
                if let Err(reason) = self.obey(epoch) {
                    let lost = self.link.abandon(&reason);
                    return self.on_link(lost, stopping);
                }
                self.liveness.joined(hello_sent);
                self.heartbeat = Duration::from_millis(u64::from(welcome.heartbeat_ms.max(10)));
                self.orphan =
                    Some(Duration::from_millis(u64::from(welcome.orphan_ms))).filter(|d| !d.is_zero());
                self.last_complaint.clear();
                metrics::gauge!(names::AGENT_JOINED).set(1.0);
                info!(coordinator = %address, epoch, heartbeat_ms = welcome.heartbeat_ms, "joined");
                for exit in self.outbox.resend() {
                    self.link.send(Request::RankExited(exit));
                }
                if stopping {
                    self.link.send(leaving());
                }
                return true;
            }
            LinkEvent::Message(message) => self.on_message(message, stopping),
            LinkEvent::Lost {
                address,
                reason,
                attempts,
            } => {
                metrics::gauge!(names::AGENT_JOINED).set(0.0);
                metrics::counter!(names::AGENT_CONNECTIONS_LOST).increment(1);
                // The same complaint is made once, not at every try.
                let complaint = format!("{address}: {reason}");
                if complaint != self.last_complaint || attempts.is_multiple_of(20) {
                    warn!(coordinator = %address, attempts, "not joined, trying on: {reason}");
                    self.last_complaint = complaint;
                }
            }
        }
        false
    }

    /// Whether a coordinator of that epoch may command this node. From then on, no older one may.
    fn obey(&mut self, epoch: u64) -> Result<(), String> {
        let newest = self.epoch.newest();
        if epoch < newest {
            let advice = self.epoch.advice();
            return Err(format!(
                "its epoch {epoch} is older than {newest}, which was seen before{advice}"
            ));
        }
        let raised = self.epoch.raise(epoch);
        raised.map_err(|error| format!("its epoch {epoch} cannot be kept in the state directory: {error}"))
    }

    fn on_message(&mut self, message: JoinResponse, stopping: bool) {
        if let Err(reason) = self.obey(message.epoch) {
            warn!(epoch = message.epoch, "refused a command: {reason}");
            return;
        }
        match message.message {
            Some(Response::HeartbeatAck(ack)) => {
                if self.liveness.acknowledged(ack.sequence) {
                    metrics::counter!(names::AGENT_HEARTBEATS).increment(1);
                    self.outbox.acknowledged(ack.sequence);
                }
            }
            Some(Response::Launch(_)) if stopping => warn!("refused to launch ranks: the worker stops"),
            Some(Response::Launch(launch)) => {
                for assignment in launch.assignments {
                    let assignment = self.completed(assignment);
                    let effects = self.table.launch(assignment);
                    self.perform(effects);
                }
            }
            Some(Response::Kill(kill)) => self.on_kill(&kill),
            Some(Response::Forget(forget)) => match (forget.job_id.parse(), &self.options.memory_root) {
                (Ok(job), Some(memory)) => memory.forget(&job),
                (Ok(_), None) => {}
                (Err(invalid), _) => warn!("refused to forget a job's copies: {invalid}"),
            },
            Some(Response::Welcome(_)) | None => {}
        }
    }

    fn on_kill(&mut self, kill: &KillRanks) {
        match kill.job_id.parse::<JobId>() {
            Ok(job) => {
                let grace = Duration::from_millis(u64::from(kill.grace_ms));
                info!(%job, through_generation = kill.generation, "told to stop ranks");
                let effects = self.table.kill(&job, Generation(kill.generation), grace);
                self.perform(effects);
            }
            Err(invalid) => warn!("refused a kill command: {invalid}"),
        }
    }

    /// The fields of an assignment that only the node knows.
    fn completed(&self, mut assignment: RankAssignment) -> RankAssignment {
        assignment.coordinators = self.options.coordinators.clone();
        assignment.output_root = self.options.output_root.clone();
        assignment.data_roots = self.options.data_roots.clone();
        assignment.device = self.options.hardware.device.as_str().into();
        let memory = self.options.memory_root.as_ref();
        assignment.memory_root = memory.map_or(String::new(), |memory| memory.path().display().to_string());
        if assignment.address.is_empty() {
            assignment.address = self.advertise.clone();
        }
        assignment
    }

    fn on_exit(&mut self, key: &RankKey, facts: ExitFacts) {
        self.processes.remove(key);
        self.gpus.give_back(key);
        self.watchdogs.remove(key);
        metrics::gauge!(names::AGENT_RANKS).set(self.processes.len() as f64);
        let effects = self.table.exited(key, facts);
        self.perform(effects);
    }

    fn on_tick(&mut self, now: Instant) {
        let silence = self.liveness.silence(now);
        metrics::gauge!(names::AGENT_HEARTBEAT_AGE).set(silence.as_secs_f64());
        if let Some(orphan) = self.orphan.filter(|orphan| silence > *orphan) {
            let reason = format!("killed as an orphan: no word from the coordinator for {orphan:?}");
            let effects = self.table.stop_all(&reason, Duration::ZERO);
            if !effects.is_empty() {
                error!(?silence, "orphaned: ranks are killed");
            }
            self.perform(effects);
        }
        self.watch_ranks(now);
        if !self.link.is_up() {
            return;
        }
        // A connection that looks open but carries no answers is worse than none.
        let patience = (self.heartbeat * 6).max(Duration::from_secs(3));
        let ranks = self.table.running();
        let sequence = self.liveness.next_sequence(now);
        let sent = self.link.send(Request::Heartbeat(Heartbeat { sequence, ranks }));
        if !sent || silence > patience {
            let lost = self.link.abandon("heartbeats are not answered");
            self.on_link(lost, false);
            return;
        }
        self.outbox.heartbeat_sent(sequence);
    }

    /// Kills ranks that hang, with or without a coordinator.
    fn watch_ranks(&mut self, now: Instant) {
        let Some(floor) = self.options.hang_after else {
            return;
        };
        let mut hung = Vec::new();
        for (key, dog) in &mut self.watchdogs {
            let Some(process) = self.processes.get(key) else {
                continue;
            };
            if let Some(stall) = dog.look(process.progress(), process.is_stopped(), floor, now) {
                hung.push((key.clone(), stall));
            }
        }
        for (key, stall) in hung {
            // Once: a killed process makes no progress either.
            self.watchdogs.remove(&key);
            error!(job = %key.job, generation = key.generation.0, rank = key.rank.0, "rank hangs and is killed: {}", stall.what);
            metrics::counter!(names::AGENT_RANK_HANGS).increment(1);
            let effects = self.table.hangs(&key, &stall.what, stall.silent);
            self.perform(effects.into_iter().collect());
        }
    }

    fn perform(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Spawn(key, assignment) => self.spawn(key, &assignment),
                Effect::Kill(key, grace) => {
                    if let Some(process) = self.processes.get(&key) {
                        process.kill(grace);
                    }
                }
                Effect::Report(exit) => self.report(exit),
                Effect::Refuse(why) => warn!("refused a command: {why}"),
            }
        }
    }

    fn spawn(&mut self, key: RankKey, assignment: &RankAssignment) {
        let span = Span::under(&assignment.trace_parent, "spawn", SystemTime::now())
            .text("job_id", key.job.as_str())
            .number("generation", key.generation.0)
            .number("rank", key.rank.0.into())
            .text("node", self.options.node_id.as_str());
        let gpu = self.gpus.take(&key);
        let spawned = process::spawn(
            &self.options.rank_command,
            &key,
            assignment,
            gpu,
            self.exits.clone(),
        );
        let span = match &spawned {
            Ok(_) => span,
            Err(cause) => span.failed(&format!("{cause:#}")),
        };
        span.end(SystemTime::now());
        match spawned {
            Ok(process) => {
                info!(job = %key.job, generation = key.generation.0, rank = key.rank.0, pid = process.pid, "rank started");
                metrics::counter!(names::AGENT_RANK_STARTS).increment(1);
                self.table.spawned(&key, process.pid);
                let rank = Some(key.to_wire(process.pid));
                // If it does not arrive, Hello and every heartbeat list the rank.
                self.link.send(Request::RankStarted(RankStarted { rank }));
                self.watchdogs.insert(key.clone(), Watchdog::new(Instant::now()));
                self.processes.insert(key, process);
                metrics::gauge!(names::AGENT_RANKS).set(self.processes.len() as f64);
            }
            Err(cause) => {
                self.gpus.give_back(&key);
                let facts = ExitFacts {
                    exit_code: Some(1),
                    last_error: format!("cannot start the rank: {cause:#}"),
                    ..ExitFacts::default()
                };
                let effects = self.table.exited(&key, facts);
                self.perform(effects);
            }
        }
    }

    fn report(&mut self, exit: RankExited) {
        let outcome = match (exit.requested, exit.exit_code) {
            _ if exit.stalled_ms.is_some() => "hang",
            (true, _) => "requested",
            (false, Some(0)) => "ok",
            (false, Some(_)) => "error",
            (false, None) => "signal",
        };
        metrics::counter!(names::AGENT_RANK_EXITS, "outcome" => outcome).increment(1);
        let rank = exit.rank.clone().unwrap_or_default();
        info!(
            job = %rank.job_id, generation = rank.generation, rank = rank.rank, pid = rank.pid,
            exit_code = exit.exit_code, signal = exit.signal, requested = exit.requested, "rank ended"
        );
        let joined = self.link.is_up();
        let sent = self.link.send(Request::RankExited(exit.clone()));
        self.outbox.push(exit);
        if joined && !sent {
            // Sent again after the reconnect; a heartbeat on this connection must not count as its receipt.
            let lost = self.link.abandon("messages pile up");
            self.on_link(lost, false);
        }
    }

    /// Jobs of which this node has copies.
    fn copies_of(&self) -> Vec<String> {
        let jobs = self.options.memory_root.iter().flat_map(MemoryRoot::jobs);
        jobs.map(|job| job.to_string()).collect()
    }

    fn hello(&mut self) -> JoinRequest {
        let address = match &self.options.advertise {
            Some(address) => address.clone(),
            None => route::facing_address(&self.options.coordinators),
        };
        if address != self.advertise && !is_loopback(&address) {
            warn!(
                "ranks listen at {address} without encryption while they train: whoever reaches it can read and \
                 disturb them; use a private network"
            );
        }
        self.advertise = address;
        JoinRequest {
            message: Some(Request::Hello(Hello {
                node_id: self.options.node_id.to_string(),
                boot_id: self.boot_id.clone(),
                address: self.advertise.clone(),
                slots: self.options.slots,
                device: self.options.hardware.device.as_str().into(),
                version: env!("CARGO_PKG_VERSION").into(),
                ranks: self.table.running(),
                copies_of: self.copies_of(),
            })),
        }
    }
}

fn leaving() -> Request {
    Request::Leaving(Leaving {})
}

fn is_loopback(host: &str) -> bool {
    host == "localhost"
        || host
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

//! The one task that owns the cluster's state. It takes commands from [`Handle`]s, asks the pure modules what they
//! mean, and performs effects after the store has said yes. Only it reads the clock and calls the store.
//!
//! A coordinator that restarts finds its jobs in the store. Their ranks train on; when their agents join again and
//! list them, they are taken over as they are. Ranks that are not listed are gone, and their jobs recover.

mod copies;
mod curve;
mod episode;
mod error;
mod figures;
mod handle;
mod jobs;
mod ledger;
mod look;
mod measure;
mod nodes;
mod planning;
mod prepared;
mod ranks;
mod records;
mod rendezvous;
mod watch;

pub use curve::Curve;
pub use error::ControlError;
pub use handle::{AgentSession, Handle, JobFilter, ReportSession, Watch};
pub use look::{Look, RankLook};
pub use nodes::rank_list;
pub use watch::{BUFFER as WATCH_BUFFER, Watcher};

use crate::{
    goodput::Goodput,
    job::{self, Job, Now},
    membership::{self, Membership},
    server::Timers,
    store::{StateStore, StoreError, Transaction},
    straggler::Paces,
};
use arcface_proto::{
    types::{Generation, JobId, NodeId},
    v1::{self, CheckpointManifest, ReportResponse},
};
use episode::Episode;
use handle::Command;
use ledger::Ledger;
use planning::Unplanned;
use prepared::Prepared;
use prost::Message;
use records::keys;
use rendezvous::Rendezvous;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;

/// Commands that may wait for the task; callers beyond it wait with a deadline.
const COMMANDS: usize = 1024;
/// Jobs that are not at their end; a submit beyond it is refused.
const MAX_LIVE_JOBS: usize = 10_000;
/// Nodes that may be known at once.
const MAX_NODES: usize = 5_000;
/// Events that wait for a store that does not answer.
const MAX_RETRIES: usize = 10_000;
/// A turn of the task that takes longer was held up by the store; one that comes later was not run.
const HELD_UP: Duration = Duration::from_millis(200);
/// Between two settings of the cluster's gauges: no scrape is more frequent.
const MEASURE_MS: u64 = 1000;
/// A lost node is shown for so long.
const FORGET_MS: u64 = 600_000;

/// The clocks: the runtime's for durations, which a simulation moves by itself, and one that tells the time of day. The
/// monotonic one leaves out the time for which the store held up this task, or nothing ran it: messages that wait meanwhile are no
/// silence of their senders.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    start: Instant,
    wall: fn() -> SystemTime,
    held_up: Duration,
}

impl Clock {
    /// Starts now; `wall` tells the time of day.
    pub fn new(wall: fn() -> SystemTime) -> Self {
        Self {
            start: Instant::now(),
            wall,
            held_up: Duration::ZERO,
        }
    }

    fn now(&self) -> Now {
        Now {
            mono_ms: self.start.elapsed().saturating_sub(self.held_up).as_millis() as u64,
            // A clock before 1970 shows as 1970: times of day are shown, never compared.
            unix_ms: (self.wall)()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_millis() as u64),
        }
    }
}

/// A job and everything that hangs on it.
struct Entry {
    job: Job,
    /// Counts the stored changes of the job.
    revision: u64,
    /// The store's revision of its record.
    store_revision: u64,
    /// Newest committed checkpoint.
    resume: Option<CheckpointManifest>,
    rendezvous: Rendezvous,
    prepared: Prepared,
    copies: copies::Copies,
    /// Open report streams by rank, with the stream's number.
    reports: HashMap<u32, (u64, mpsc::Sender<ReportResponse>)>,
    /// Commands for rank 0 that came while it had no stream.
    outbox: VecDeque<ReportResponse>,
    watchers: watch::Hub,
    /// When ranks were last told to stop.
    killed_ms: Option<u64>,
    phase_seconds: measure::PhaseSeconds,
    /// Steps that this generation was last known to have skipped.
    skipped: (Generation, u64),
    /// What the ranks of this generation do by themselves.
    paces: Paces,
    /// What they count.
    figures: figures::Figures,
    /// When they had met, monotonic, until they are ready to train.
    met_ms: Option<u64>,
    /// What the job's time went into.
    goodput: Goodput,
    /// Its spans.
    episode: Episode,
    /// Loss and speed over the steps, as this coordinator has heard of them.
    curve: Curve,
    /// Classes that the ranks have found.
    classes_found: Option<u32>,
    /// Counts evaluations and checkpoints that were stored or found damaged.
    history: u64,
}

impl Entry {
    fn new(job: Job, revision: u64, store_revision: u64) -> Self {
        Self {
            job,
            revision,
            store_revision,
            resume: None,
            rendezvous: Rendezvous::default(),
            prepared: Prepared::default(),
            copies: copies::Copies::default(),
            reports: HashMap::new(),
            outbox: VecDeque::new(),
            watchers: watch::Hub::default(),
            killed_ms: None,
            phase_seconds: measure::PhaseSeconds::new(),
            skipped: (Generation(0), 0),
            paces: Paces::default(),
            figures: figures::Figures::default(),
            met_ms: None,
            goodput: Goodput::default(),
            episode: Episode::default(),
            curve: Curve::default(),
            classes_found: None,
            history: 0,
        }
    }

    /// The job for the wire, with what only this coordinator knows of it.
    fn to_wire(&self) -> v1::Job {
        let stragglers = self.paces.stragglers();
        v1::Job {
            stragglers: stragglers
                .map(|found| records::straggler_to_wire(&self.job, found, false))
                .collect(),
            ..records::job_to_wire(&self.job, self.revision)
        }
    }

    /// Checkpoint parts, reports and paces are of one generation: it is over, or the next begins.
    fn forget_generation(&mut self) {
        self.prepared.clear();
        self.copies.end_generation();
        self.reports.clear();
        measure::stragglers_over(&self.job.id, &self.paces);
        self.paces = Paces::default();
        self.figures.over(&self.job.id);
        self.met_ms = None;
    }
}

/// The state of the cluster.
struct Control {
    store: Arc<dyn StateStore>,
    clock: Clock,
    timers: Timers,
    limits: job::Limits,
    serving_since_ms: u64,
    jobs: BTreeMap<JobId, Entry>,
    ledger: Ledger,
    unplanned: Unplanned,
    members: Membership,
    agents: HashMap<NodeId, nodes::Agent>,
    drains: BTreeSet<NodeId>,
    next_stream: u64,
    /// Events whose change the store did not take yet, in their order.
    retries: VecDeque<(JobId, job::Event)>,
    /// Good exits of ranks whose last reports may still be on their way.
    deferred: Vec<nodes::DeferredExit>,
    /// When the gauges of the cluster are set next.
    measure_ms: u64,
    /// Jobs that have ended, with the time, until their metrics are retired.
    retiring: VecDeque<(u64, JobId)>,
    /// Jobs that have ended and whose curves are kept.
    kept_curves: VecDeque<JobId>,
    /// Set when this coordinator must stop.
    fatal: Option<StoreError>,
}

/// Loads the store and starts the task. It ends when `stop` is cancelled, or with the error that ended it.
///
/// # Errors
/// A store that cannot be read.
pub async fn start(
    store: Arc<dyn StateStore>,
    timers: Timers,
    stop: CancellationToken,
) -> Result<(Handle, JoinHandle<Result<(), StoreError>>), StoreError> {
    start_with(Clock::new(SystemTime::now), store, timers, stop).await
}

/// [`start()`] with other clocks than the system's.
///
/// # Errors
/// A store that cannot be read.
pub async fn start_with(
    clock: Clock,
    store: Arc<dyn StateStore>,
    timers: Timers,
    stop: CancellationToken,
) -> Result<(Handle, JoinHandle<Result<(), StoreError>>), StoreError> {
    let mut control = Control::load(clock, store, timers).await?;
    let (sender, receiver) = mpsc::channel(COMMANDS);
    let task = tokio::spawn(async move { control.run(receiver, stop).await });
    Ok((Handle::new(sender), task))
}

impl Control {
    /// Everything that a restart rebuilds from the store; see `store` for the order.
    async fn load(clock: Clock, store: Arc<dyn StateStore>, timers: Timers) -> Result<Self, StoreError> {
        let now = clock.now();
        let mut control = Self {
            store,
            serving_since_ms: now.unix_ms,
            timers,
            limits: job::Limits {
                backoff_ms: timers.backoff_ms,
                backoff_max_ms: timers.backoff_max_ms,
                spawn_ms: timers.rendezvous_ms,
                grace_ms: timers.grace_ms,
            },
            jobs: BTreeMap::new(),
            ledger: Ledger::default(),
            unplanned: Unplanned::default(),
            members: Membership::new(membership::Limits {
                suspect_ms: timers.suspect_ms,
                lost_ms: timers.lost_ms,
                rejoin_ms: timers.rejoin_ms,
                orphan_ms: timers.orphan_ms,
                forget_ms: FORGET_MS.max(timers.orphan_ms * 2),
            }),
            agents: HashMap::new(),
            drains: BTreeSet::new(),
            next_stream: 0,
            retries: VecDeque::new(),
            measure_ms: 0,
            retiring: VecDeque::new(),
            kept_curves: VecDeque::new(),
            deferred: Vec::new(),
            fatal: None,
            clock,
        };
        for record in control.list_all(keys::JOBS).await? {
            let (job, revision) = records::decode(&record.value).map_err(|problem| {
                StoreError::Failed(format!("record {} cannot be read: {problem}", record.key))
            })?;
            if !job.phase.is_terminal() {
                for rank in &job.ranks {
                    control.members.await_node(rank.node.clone(), now.mono_ms);
                }
            }
            let id = job.id.clone();
            let mut entry = Entry::new(job, revision, record.revision);
            if ledger::is_live(&entry.job) {
                entry.resume = control.newest_checkpoint(&id).await?;
                tracing::info!(job = %id, state = %entry.job.phase, generation = %entry.job.generation, "job loaded");
            }
            control.take_in(entry);
        }
        for record in control.list_all(keys::DRAINS).await? {
            if let Some(Ok(node)) = record.key.strip_prefix(keys::DRAINS).map(str::parse) {
                control.drains.insert(node);
            }
        }
        tracing::info!(
            epoch = control.store.epoch(),
            jobs = control.jobs.len(),
            live = control.ledger.live().len(),
            "state loaded"
        );
        Ok(control)
    }

    async fn list_all(&self, prefix: &str) -> Result<Vec<crate::store::Entry>, StoreError> {
        const PAGE: usize = 1000;
        let mut all: Vec<crate::store::Entry> = Vec::new();
        loop {
            let page = self
                .store
                .list(prefix, all.last().map(|entry| entry.key.as_str()), PAGE)
                .await?;
            let is_last = page.len() < PAGE;
            all.extend(page);
            if is_last {
                return Ok(all);
            }
        }
    }

    async fn newest_checkpoint(&self, id: &JobId) -> Result<Option<CheckpointManifest>, StoreError> {
        let records = self.list_all(&keys::checkpoints(id)).await?;
        let newest = records
            .last()
            .map(|record| CheckpointManifest::decode(record.value.as_slice()));
        newest
            .transpose()
            .map_err(|error| StoreError::Failed(format!("checkpoints of {id} cannot be read: {error}")))
    }

    async fn run(
        &mut self,
        mut commands: mpsc::Receiver<Command>,
        stop: CancellationToken,
    ) -> Result<(), StoreError> {
        let period = Duration::from_millis((self.timers.heartbeat_ms / 5).clamp(5, 100));
        let mut ticks = tokio::time::interval(period);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        metrics::gauge!(crate::telemetry::COORDINATOR_IS_LEADER).set(1.0);
        let mut waiting = Vec::new();
        loop {
            let waited = Instant::now();
            let commanded = tokio::select! {
                () = stop.cancelled() => break,
                received = commands.recv_many(&mut waiting, jobs::MAX_BATCH) => match received {
                    0 => break,
                    _ => true,
                },
                _ = ticks.tick() => false,
            };
            // A tick that comes late by more: this process was stopped, or its machine, and what nodes said meanwhile was not heard.
            let late = waited.elapsed().saturating_sub(period);
            if late > HELD_UP {
                self.clock.held_up += late;
            }
            let begun = Instant::now();
            match commanded {
                true => self.commands(&mut waiting).await,
                false => self.tick().await,
            }
            if self.unplanned.any() {
                self.schedule().await;
            }
            let took = begun.elapsed();
            if took > HELD_UP {
                self.clock.held_up += took;
            }
            if let Some(error) = self.fatal.take() {
                metrics::gauge!(crate::telemetry::COORDINATOR_IS_LEADER).set(0.0);
                tracing::error!(%error, "this coordinator must stop or load its state anew");
                return Err(error);
            }
        }
        metrics::gauge!(crate::telemetry::COORDINATOR_IS_LEADER).set(0.0);
        Ok(())
    }

    /// What has come since the last time, in its order; submits that follow each other are taken in together.
    async fn commands(&mut self, waiting: &mut Vec<Command>) {
        let mut submits = Vec::new();
        for command in waiting.drain(..) {
            match command {
                Command::Submit(submit) => submits.push(submit),
                other => {
                    if !submits.is_empty() {
                        self.submit_all(std::mem::take(&mut submits)).await;
                    }
                    self.command(other).await;
                }
            }
            if self.fatal.is_some() {
                return; // What is left is answered when the task ends: this coordinator may not act any more.
            }
        }
        self.submit_all(submits).await;
    }

    async fn tick(&mut self) {
        let now = self.clock.now();
        for _ in 0..self.retries.len() {
            let Some((id, event)) = self.retries.pop_front() else {
                break;
            };
            let before = self.retries.len();
            self.happened(&id, event).await;
            if self.retries.len() > before {
                break; // The store still refuses; the rest keeps its order behind this one.
            }
        }
        for change in self.members.tick(now.mono_ms) {
            self.node_changed(change).await;
        }
        let mut late = Vec::new();
        for id in self.ledger.placed() {
            let Some(entry) = self.jobs.get_mut(id) else {
                continue;
            };
            entry.rendezvous.tick(now.mono_ms, self.timers.rendezvous_ms);
            let waited_ms = now.mono_ms.saturating_sub(entry.job.launched_ms);
            if entry.job.phase == job::Phase::Starting && waited_ms >= self.limits.spawn_ms {
                late.push(id.clone());
            }
        }
        for id in late {
            self.happened(&id, job::Event::Tick).await;
        }
        self.settle_exits(now, None).await;
        self.unplanned.ticked(now.mono_ms, self.members.version());
        if now.mono_ms >= self.measure_ms {
            self.measure_ms = now.mono_ms + MEASURE_MS;
            self.measure(now);
        }
    }

    /// Commits a job's new state and what belongs to it.
    async fn store_job(&mut self, next: &Job, with: Transaction) -> Result<(), ControlError> {
        let Some(entry) = self.jobs.get(&next.id) else {
            return Err(ControlError::not_found("job", next.id.as_str()));
        };
        let key = keys::job(&next.id);
        let record = records::encode(next, entry.revision + 1);
        let transaction = with
            .expect_revision(&key, entry.store_revision)
            .put(&key, record.clone());
        let store_revision = match self.store.commit(transaction).await {
            Ok(revision) => revision,
            Err(StoreError::Unknown(why)) => match self.find_out(&key, &record, why).await? {
                Some(revision) => revision,
                None => return Err(not_done()),
            },
            Err(error) => return Err(self.store_failed(error)),
        };
        if let Some(entry) = self.jobs.get_mut(&next.id) {
            entry.store_revision = store_revision;
            entry.revision += 1;
        }
        Ok(())
    }

    /// After an unknown outcome: the revision if the record is in the store. It is a part of the whole transaction.
    /// If the store does not say, memory and store may differ from here on: this coordinator must load anew.
    async fn find_out(&mut self, key: &str, record: &[u8], why: String) -> Result<Option<u64>, ControlError> {
        match self.store.get(key).await {
            Ok(Some(stored)) if stored.value == record => Ok(Some(stored.revision)),
            Ok(_) => Ok(None),
            Err(error) => {
                tracing::warn!(%error, "the outcome of a change cannot be found out");
                self.fatal = Some(StoreError::Unknown(why.clone()));
                Err(StoreError::Unknown(why).into())
            }
        }
    }

    /// A store that has another owner ends this coordinator; other failures are the caller's.
    fn store_failed(&mut self, error: StoreError) -> ControlError {
        let answer = ControlError::Unavailable(error.to_string());
        if matches!(error, StoreError::Fenced { .. } | StoreError::Conflict { .. }) {
            self.fatal = Some(error);
        }
        answer
    }
}

/// A change whose outcome was unknown for a moment and that did not happen.
fn not_done() -> ControlError {
    ControlError::Unavailable("the store did not answer in time, and did not take the change".into())
}

//! A rank process without a tensor: it meets its peers, takes synchronous steps, writes and announces checkpoint parts,
//! reports, and ends.

use crate::{
    agent::Node,
    determinism::Rng,
    double::Double,
    history::{Barrier, Key, classes, digest},
    net,
};
use arcface_proto::v1::{
    CheckpointPart, CommitCheckpointRequest, RankAssignment, RankError, RankId, RendezvousRequest,
    ReportRequest, StepMetrics, TrainingFinished, TrainingStarted, rank_service_client::RankServiceClient,
    report_request::Report, report_response::Command,
};
use std::{sync::Arc, time::Duration};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, transport::Channel};

const NUM_CLASSES: u32 = 10;
/// Longest that a step may take.
const HANG_MS: u64 = 1500;

/// What one process is.
#[derive(Clone)]
pub struct Rank {
    pub node: Arc<Node>,
    pub key: Key,
    pub assignment: Arc<RankAssignment>,
    /// Steps of the job, and between checkpoints.
    pub total_steps: u64,
    pub every: u64,
    pub step_ms: u64,
}

/// What the reporter says, newest first.
#[derive(Clone, Default)]
struct Progress {
    step: u64,
    finished: bool,
    error: Option<RankError>,
}

impl Rank {
    fn id(&self) -> RankId {
        RankId {
            job_id: self.key.0.clone(),
            generation: self.key.1,
            rank: self.key.2,
        }
    }

    /// Calls the coordinator, whichever answers, until it gives more than "not now".
    async fn call<T>(
        &self,
        limit_ms: u64,
        call: impl AsyncFn(RankServiceClient<Channel>) -> Result<T, Status>,
    ) -> Result<T, Status> {
        loop {
            for host in &self.node.coordinators {
                let Ok(channel) = net::connect(host).await else {
                    continue;
                };
                let answer = timeout(
                    Duration::from_millis(limit_ms),
                    call(RankServiceClient::new(channel)),
                )
                .await;
                match answer {
                    Ok(Ok(answer)) => return Ok(answer),
                    Ok(Err(status)) if !transient(&status) => return Err(status),
                    Ok(Err(_)) | Err(_) => {}
                }
            }
            sleep(Duration::from_millis(150)).await;
        }
    }

    /// Runs to its end: the exit status.
    pub async fn run(self, mut rng: Rng) -> i32 {
        sleep(Duration::from_millis(rng.between(20, 150))).await;
        let start = self
            .assignment
            .resume
            .as_ref()
            .map_or(0, |manifest| manifest.step);
        self.world().resumed(&self.key, self.assignment.resume.as_ref());
        let met = self
            .call(6_000, async |mut client| {
                let request = RendezvousRequest {
                    rank: Some(self.id()),
                    endpoint: format!("{}:{}", self.node.name, 5000 + self.key.2),
                    ..Default::default()
                };
                client.rendezvous(request).await
            })
            .await;
        if met.is_err() {
            return 1;
        }
        let mut tasks = JoinSet::new();
        let (progress, changes) = watch::channel(Progress {
            step: start,
            ..Default::default()
        });
        let (commands, mut told) = mpsc::channel(32);
        let (over, mut ended) = watch::channel(false);
        tasks.spawn_local(self.clone().report(start, changes, commands, over));
        let mut writers = JoinSet::new();
        let mut step = start;
        while step < self.total_steps {
            sleep(Duration::from_millis(self.step_ms)).await;
            if let Err(peer) = self.step(step + 1).await {
                let error = RankError {
                    message: "the ring broke".into(),
                    permanent: false,
                    peer,
                    rollback_step: None,
                    ..RankError::default()
                };
                progress.send_modify(|progress| progress.error = Some(error));
                sleep(Duration::from_millis(60)).await;
                return 1;
            }
            step += 1;
            progress.send_modify(|progress| progress.step = step);
            if *ended.borrow_and_update() {
                return 1;
            }
            while let Ok(command) = told.try_recv() {
                match command {
                    Command::CheckpointNow(_) => self.world().checkpoint_at(&self.key, step + 2),
                    Command::CheckpointCommitted(committed) => {
                        for directory in committed.expired_directories {
                            self.world().deleted(&self.key, &directory);
                        }
                    }
                }
            }
            let last = step == self.total_steps;
            if step.is_multiple_of(self.every) || last || self.world().wants_checkpoint(&self.key, step) {
                writers.spawn_local(self.clone().checkpoint(step, rng.between(5, 120)));
            }
        }
        // Parts that no coordinator takes now are given up after a while: the job is trained.
        let written = async { while writers.join_next().await.is_some() {} };
        let _ = timeout(Duration::from_secs(20), written).await;
        progress.send_modify(|progress| progress.finished = true);
        sleep(Duration::from_millis(rng.between(0, 100))).await;
        0
    }

    fn world(&self) -> std::sync::MutexGuard<'_, crate::history::World> {
        self.node.world.lock().expect("world")
    }

    /// One synchronous step; the peer that is to blame, if one is.
    async fn step(&self, step: u64) -> Result<(), Option<u32>> {
        self.world().arrive(&self.key, step);
        let mut waited_ms = 0;
        loop {
            let barrier = self.world().barrier(&self.key, step);
            match barrier {
                Barrier::Done => return Ok(()),
                Barrier::Gone(peer) => return Err(Some(peer)),
                Barrier::Wait if waited_ms >= HANG_MS => return Err(None),
                Barrier::Wait => {}
            }
            sleep(Duration::from_millis(20)).await;
            waited_ms += 20;
        }
    }

    /// Writes this rank's parts, then announces them until the checkpoint is committed or the generation is over.
    async fn checkpoint(self, step: u64, write_ms: u64) {
        sleep(Duration::from_millis(write_ms)).await;
        let (rank, world_size) = (self.key.2, self.assignment.world_size);
        let off_by_one = self.node.double == Some(Double::ClassSplitOffByOne);
        let range = classes(NUM_CLASSES, rank, world_size, off_by_one);
        let part = |file: String, class_lo, class_hi| CheckpointPart {
            file,
            bytes: 10,
            blake3: digest(&self.key, step),
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
        let directory = format!("checkpoints/step-{step}-g{}", self.key.1);
        self.world().wrote(&self.key, &directory, &parts);
        let request = CommitCheckpointRequest {
            rank: Some(self.id()),
            step,
            epoch: 0,
            epoch_samples: step * 64,
            directory,
            num_classes: NUM_CLASSES,
            parts,
            scaler: None,
            persist_seconds: None,
            num_image: Some(640),
        };
        loop {
            let answer = self
                .call(3_000, async |mut client| {
                    client.commit_checkpoint(request.clone()).await
                })
                .await;
            match answer {
                Ok(answer) if answer.get_ref().committed => return,
                Ok(_) => sleep(Duration::from_millis(200)).await,
                Err(status) => {
                    if status.code() == Code::InvalidArgument {
                        self.world().broken("I7", status.message().to_owned());
                    }
                    return;
                }
            }
        }
    }

    /// Keeps a report stream open, and begins each with what the coordinator must know.
    async fn report(
        self,
        start: u64,
        mut changes: watch::Receiver<Progress>,
        commands: mpsc::Sender<Command>,
        over: watch::Sender<bool>,
    ) {
        loop {
            for host in &self.node.coordinators {
                let Ok(channel) = net::connect(host).await else {
                    continue;
                };
                let ended = self.report_to(channel, start, &mut changes, &commands).await;
                if ended.is_err_and(|status| !transient(&status)) {
                    over.send_replace(true);
                    return;
                }
            }
            sleep(Duration::from_millis(100)).await;
        }
    }

    async fn report_to(
        &self,
        channel: Channel,
        start: u64,
        changes: &mut watch::Receiver<Progress>,
        commands: &mpsc::Sender<Command>,
    ) -> Result<(), Status> {
        let (sender, receiver) = mpsc::channel(16);
        let mut client = RankServiceClient::new(channel);
        let say = async |report| {
            let request = ReportRequest {
                rank: Some(self.id()),
                report: Some(report),
            };
            sender
                .send(request)
                .await
                .map_err(|_| Status::unavailable("the stream ended"))
        };
        say(Report::Started(TrainingStarted {
            step: start,
            total_steps: self.total_steps,
            num_classes: NUM_CLASSES,
            num_image: 640,
            from_memory: false,
            restore_seconds: None,
        }))
        .await?;
        changes.mark_changed();
        let answer = timeout(
            Duration::from_secs(2),
            client.report(ReceiverStream::new(receiver)),
        )
        .await;
        let mut incoming = answer
            .map_err(|_| Status::unavailable("no answer"))??
            .into_inner();
        loop {
            tokio::select! {
                biased;
                message = incoming.message() => match message? {
                    Some(response) => if let Some(command) = response.command {
                        let _ = commands.try_send(command);
                    },
                    None => return Ok(()),
                },
                changed = changes.changed() => {
                    if changed.is_err() {
                        return Err(Status::cancelled("the rank has ended"));
                    }
                    let now = changes.borrow_and_update().clone();
                    if let Some(error) = now.error {
                        say(Report::Error(error)).await?;
                    } else if now.finished {
                        say(Report::Finished(TrainingFinished { step: now.step, ..Default::default() })).await?;
                    } else if self.key.2 == 0 && now.step > start && now.step.is_multiple_of(5) {
                        say(Report::Metrics(StepMetrics {
                            step: now.step,
                            total_steps: self.total_steps,
                            loss: 9.5,
                            step_seconds: 0.05,
                            ..Default::default()
                        })).await?;
                    }
                }
            }
        }
    }
}

/// The coordinator was away, or is about to be.
fn transient(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unavailable
            | Code::Unknown
            | Code::DeadlineExceeded
            | Code::Internal
            | Code::Cancelled
            | Code::Aborted
    )
}

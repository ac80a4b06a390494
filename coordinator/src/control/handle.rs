//! What the rest of the coordinator sees of the control task: calls with deadlines, no channel.

use super::{ControlError, Curve, Look, rendezvous, watch::Watcher};
use crate::membership::Hello;
use arcface_proto::{
    spec::JobSpec,
    types::{JobId, NodeId},
    v1::{
        CheckpointManifest, CommitCheckpointRequest, Evaluation, GetClusterResponse, Job, JobState,
        JoinResponse, Node, RankId, RendezvousRequest, RendezvousResponse, ReportResponse, join_request,
        report_request,
    },
};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// Longest that a call waits for the control task; it answers within milliseconds unless the store's disk hangs.
const CALL_LIMIT: Duration = Duration::from_secs(10);

type Answer<T> = oneshot::Sender<Result<T, ControlError>>;

/// Which jobs to list.
#[derive(Clone, Debug, Default)]
pub struct JobFilter {
    /// Only these states; empty for all.
    pub states: Vec<JobState>,
    /// Only jobs older than this one: when it was submitted (ms since the Unix epoch) and its id.
    pub before: Option<(u64, JobId)>,
    /// Most in the answer.
    pub limit: usize,
}

/// A job's events from now on.
pub struct Watch {
    /// The job as it stands.
    pub snapshot: Job,
    /// What follows.
    pub events: Watcher,
}

/// An agent that was taken in.
pub struct AgentSession {
    /// Its node.
    pub node: NodeId,
    /// Number of its stream: messages on an older one are refused.
    pub stream: u64,
    /// What to send it, Welcome first. Its end means that another stream took over.
    pub commands: mpsc::Receiver<JoinResponse>,
}

/// A rank whose reports are taken.
pub struct ReportSession {
    /// Number of its stream.
    pub stream: u64,
    /// What to send it. Its end means that its generation is over.
    pub commands: mpsc::Receiver<ReportResponse>,
}

impl ReportSession {
    /// A session of a generation that is over: it takes no commands.
    pub fn closed() -> Self {
        Self {
            stream: 0,
            commands: mpsc::channel(1).1,
        }
    }
}

/// A job to be.
pub(super) struct Submit {
    pub spec: Box<JobSpec>,
    pub request_id: String,
    pub validate_only: bool,
    pub answer: Answer<Job>,
}

pub(super) enum Command {
    Submit(Submit),
    GetJob {
        id: String,
        answer: Answer<Job>,
    },
    Look {
        id: String,
        answer: Answer<Look>,
    },
    Curve {
        id: String,
        answer: Answer<Curve>,
    },
    ListJobs {
        filter: JobFilter,
        answer: Answer<Vec<Job>>,
    },
    Cancel {
        id: String,
        reason: String,
        answer: Answer<Job>,
    },
    Watch {
        id: String,
        answer: Answer<Watch>,
    },
    Checkpoints {
        id: String,
        answer: Answer<Vec<CheckpointManifest>>,
    },
    Evaluations {
        id: String,
        after: Option<String>,
        limit: usize,
        answer: Answer<Vec<(String, Evaluation)>>,
    },
    ListNodes {
        answer: Answer<Vec<Node>>,
    },
    Drain {
        node: NodeId,
        draining: bool,
        answer: Answer<Node>,
    },
    Cluster {
        answer: Answer<GetClusterResponse>,
    },
    Join {
        hello: Box<Hello>,
        answer: Answer<AgentSession>,
    },
    AgentSays {
        node: NodeId,
        stream: u64,
        message: join_request::Message,
        answer: Answer<()>,
    },
    AgentLeft {
        node: NodeId,
        stream: u64,
    },
    Rendezvous {
        rank: RankId,
        request: RendezvousRequest,
        reply: rendezvous::Reply,
    },
    OpenReport {
        rank: RankId,
        answer: Answer<ReportSession>,
    },
    RankSays {
        rank: RankId,
        report: report_request::Report,
        answer: Answer<()>,
    },
    CloseReport {
        rank: RankId,
        stream: u64,
    },
    CommitCheckpoint {
        rank: RankId,
        request: Box<CommitCheckpointRequest>,
        answer: Answer<bool>,
    },
}

/// Calls to the control task. Cheap to clone. Every call fails with [`ControlError::Unavailable`] once the task has
/// ended, and when it does not answer in time.
#[derive(Clone)]
pub struct Handle {
    commands: mpsc::Sender<Command>,
}

fn stopping() -> ControlError {
    ControlError::Unavailable("the coordinator is stopping".into())
}

impl Handle {
    pub(super) fn new(commands: mpsc::Sender<Command>) -> Self {
        Self { commands }
    }

    async fn ask<T>(&self, command: impl FnOnce(Answer<T>) -> Command) -> Result<T, ControlError> {
        let (sender, answer) = oneshot::channel();
        let call = async {
            self.commands
                .send(command(sender))
                .await
                .map_err(|_| stopping())?;
            answer.await.map_err(|_| stopping())?
        };
        tokio::time::timeout(CALL_LIMIT, call).await.unwrap_or_else(|_| {
            Err(ControlError::Unavailable(format!(
                "the coordinator did not answer within {CALL_LIMIT:?}"
            )))
        })
    }

    /// Stores a job and queues it. The same `request_id` (if it is not empty) gives the same job again.
    ///
    /// # Errors
    /// A request id that was used for another job, too many jobs, a store that does not take it.
    pub async fn submit(
        &self,
        spec: JobSpec,
        request_id: String,
        validate_only: bool,
    ) -> Result<Job, ControlError> {
        self.ask(|answer| {
            Command::Submit(Submit {
                spec: Box::new(spec),
                request_id,
                validate_only,
                answer,
            })
        })
        .await
    }

    /// One job, by its id or a prefix of it that names one job.
    ///
    /// # Errors
    /// No such job, or several.
    pub async fn job(&self, id: String) -> Result<Job, ControlError> {
        self.ask(|answer| Command::GetJob { id, answer }).await
    }

    /// One job with what goes on in it, by its id or a prefix of it.
    ///
    /// # Errors
    /// No such job, or several.
    pub async fn look(&self, id: String) -> Result<Look, ControlError> {
        self.ask(|answer| Command::Look { id, answer }).await
    }

    /// A job's loss and speed over its steps.
    ///
    /// # Errors
    /// No such job, or several.
    pub async fn curve(&self, id: String) -> Result<Curve, ControlError> {
        self.ask(|answer| Command::Curve { id, answer }).await
    }

    /// Jobs, newest first.
    ///
    /// # Errors
    /// Only those of every call.
    pub async fn jobs(&self, filter: JobFilter) -> Result<Vec<Job>, ControlError> {
        self.ask(|answer| Command::ListJobs { filter, answer }).await
    }

    /// Asks a job to end.
    ///
    /// # Errors
    /// No such job, a store that does not take it.
    pub async fn cancel(&self, id: String, reason: String) -> Result<Job, ControlError> {
        self.ask(|answer| Command::Cancel { id, reason, answer }).await
    }

    /// A job and its events from now on.
    ///
    /// # Errors
    /// No such job, too many watchers.
    pub async fn watch(&self, id: String) -> Result<Watch, ControlError> {
        self.ask(|answer| Command::Watch { id, answer }).await
    }

    /// A job's committed checkpoints, newest first.
    ///
    /// # Errors
    /// No such job, a store that cannot be read.
    pub async fn checkpoints(&self, id: String) -> Result<Vec<CheckpointManifest>, ControlError> {
        self.ask(|answer| Command::Checkpoints { id, answer }).await
    }

    /// A job's evaluations, oldest first, each with the token that asks for those after it.
    ///
    /// # Errors
    /// No such job, a store that cannot be read.
    pub async fn evaluations(
        &self,
        id: String,
        after: Option<String>,
        limit: usize,
    ) -> Result<Vec<(String, Evaluation)>, ControlError> {
        self.ask(|answer| Command::Evaluations {
            id,
            after,
            limit,
            answer,
        })
        .await
    }

    /// All nodes, by id.
    ///
    /// # Errors
    /// Only those of every call.
    pub async fn nodes(&self) -> Result<Vec<Node>, ControlError> {
        self.ask(|answer| Command::ListNodes { answer }).await
    }

    /// Drains a node, or takes that back.
    ///
    /// # Errors
    /// No such node, a store that does not take it.
    pub async fn drain(&self, node: NodeId, draining: bool) -> Result<Node, ControlError> {
        self.ask(|answer| Command::Drain {
            node,
            draining,
            answer,
        })
        .await
    }

    /// Totals.
    ///
    /// # Errors
    /// Only those of every call.
    pub async fn cluster(&self) -> Result<GetClusterResponse, ControlError> {
        self.ask(|answer| Command::Cluster { answer }).await
    }

    /// Takes in an agent.
    ///
    /// # Errors
    /// Another agent with that id, too many nodes.
    pub async fn join(&self, hello: Hello) -> Result<AgentSession, ControlError> {
        self.ask(|answer| Command::Join {
            hello: Box::new(hello),
            answer,
        })
        .await
    }

    /// A message of an agent.
    ///
    /// # Errors
    /// Another stream speaks for the node now.
    pub async fn agent_says(
        &self,
        node: NodeId,
        stream: u64,
        message: join_request::Message,
    ) -> Result<(), ControlError> {
        self.ask(|answer| Command::AgentSays {
            node,
            stream,
            message,
            answer,
        })
        .await
    }

    /// An agent's stream ended.
    pub async fn agent_left(&self, node: NodeId, stream: u64) {
        // A task that has ended knows of no streams.
        let _ = self.commands.send(Command::AgentLeft { node, stream }).await;
    }

    /// Waits until all ranks of a generation have called it. The control task sets the deadline.
    ///
    /// # Errors
    /// A stale generation, a generation that ends first, ranks that do not come.
    pub async fn rendezvous(
        &self,
        rank: RankId,
        request: RendezvousRequest,
    ) -> Result<RendezvousResponse, ControlError> {
        let (reply, answer) = oneshot::channel();
        let command = Command::Rendezvous { rank, request, reply };
        self.commands.send(command).await.map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())?
    }

    /// Opens a rank's reports.
    ///
    /// # Errors
    /// A stale generation.
    pub async fn open_report(&self, rank: RankId) -> Result<ReportSession, ControlError> {
        self.ask(|answer| Command::OpenReport { rank, answer }).await
    }

    /// A report of a rank.
    ///
    /// # Errors
    /// A stale generation, a report that this rank may not send, a store that does not take it.
    pub async fn rank_says(&self, rank: RankId, report: report_request::Report) -> Result<(), ControlError> {
        self.ask(|answer| Command::RankSays { rank, report, answer })
            .await
    }

    /// A rank's report stream ended.
    pub async fn close_report(&self, rank: RankId, stream: u64) {
        // A task that has ended knows of no streams.
        let _ = self.commands.send(Command::CloseReport { rank, stream }).await;
    }

    /// A rank's parts of a checkpoint are durable. True once the checkpoint is committed.
    ///
    /// # Errors
    /// A stale generation, parts that do not fit together, a store that does not take it.
    pub async fn commit_checkpoint(
        &self,
        rank: RankId,
        request: CommitCheckpointRequest,
    ) -> Result<bool, ControlError> {
        self.ask(|answer| Command::CommitCheckpoint {
            rank,
            request: Box::new(request),
            answer,
        })
        .await
    }
}

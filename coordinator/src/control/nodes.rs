//! Commands about nodes and messages of agents.

use super::{AgentSession, Control, ControlError, MAX_NODES, keys};
use crate::{
    job::{self, Event, Exit, Phase, Process},
    membership::{Change, Hello, Joined, Liveness, Member, RankKey, RankList},
    store::Transaction,
};
use arcface_proto::{
    timestamp::from_unix_ms,
    types::{Generation, JobId, NodeId, Rank},
    v1::{
        GetClusterResponse, HeartbeatAck, JoinResponse, Node, NodeRank, NodeState, RankExited, Welcome,
        join_request, join_response,
    },
};
use tokio::sync::mpsc;

/// Commands that may wait for one agent's stream; more means that it does not read.
const AGENT_BUFFER: usize = 256;
/// Ranks that one agent may list.
const MAX_LISTED: usize = 4096;
/// Longest last line of a rank's standard error.
const MAX_ERROR_CHARS: usize = 1000;
/// A kill that had no effect is repeated after its grace and this much.
const KILL_AGAIN_MS: u64 = 2000;

/// Longest that a good exit waits for the end of the rank's reports: a connection that died with its process closes
/// at once, one whose network died does not.
const LAST_REPORTS_MS: u64 = 2000;

/// A rank's exit with 0 that came, on its agent's stream, before the end of the rank's own stream. It may end the job,
/// and an ended job takes no reports: the last ones go first.
pub(super) struct DeferredExit {
    key: RankKey,
    event: Event,
    until_ms: u64,
}

/// The stream that speaks for a node.
pub(super) struct Agent {
    stream: u64,
    commands: mpsc::Sender<JoinResponse>,
}

/// Keys of the ranks in a list; entries that are malformed or too many are left out.
pub fn rank_list(ranks: &[NodeRank]) -> RankList {
    ranks
        .iter()
        .take(MAX_LISTED)
        .filter_map(|rank| Some((rank_key(rank)?, rank.pid)))
        .collect()
}

fn rank_key(rank: &NodeRank) -> Option<RankKey> {
    Some(RankKey {
        job: rank.job_id.parse().ok()?,
        generation: Generation(rank.generation),
        rank: Rank(rank.rank),
    })
}

/// One line of bounded length without control characters: what a process wrote goes into logs and answers.
pub(super) fn tame(text: &str) -> String {
    let cleaned: String = text
        .trim()
        .chars()
        .take(MAX_ERROR_CHARS)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    cleaned
}

impl Control {
    /// Takes in an agent and settles what its ranks are.
    pub(super) async fn join(&mut self, hello: Hello) -> Result<AgentSession, ControlError> {
        let now = self.clock.now();
        let node = hello.node.clone();
        if !self.members.members().contains_key(&node) && self.members.members().len() >= MAX_NODES {
            return Err(ControlError::Exhausted(format!(
                "{MAX_NODES} nodes have already joined"
            )));
        }
        let slots = hello.slots;
        let copies_of = hello.copies_of.clone();
        self.next_stream += 1;
        let stream = self.next_stream;
        let joined = self
            .members
            .hello(hello, stream, now.mono_ms, now.unix_ms)
            .map_err(|duplicate| ControlError::AlreadyExists(duplicate.to_string()))?;
        self.unplanned.slots_freed();
        self.members.drain(&node, self.drains.contains(&node));
        let (commands, receiver) = mpsc::channel(AGENT_BUFFER);
        // The old stream's sender is dropped: that stream ends.
        self.agents.insert(node.clone(), Agent { stream, commands });
        tracing::info!(%node, slots, ?joined, "node joined");
        let welcome = Welcome {
            heartbeat_ms: self.timers.heartbeat_ms.min(u32::MAX.into()) as u32,
            orphan_ms: self.timers.orphan_ms.min(u32::MAX.into()) as u32,
        };
        self.tell_agent(&node, join_response::Message::Welcome(welcome));
        for id in self.jobs_on(&node) {
            if joined == Joined::Restarted {
                self.happened(&id, Event::NodeRestarted { node: node.clone() })
                    .await;
            } else if let Some(listed) = self.listed(&id, &node, true) {
                self.happened(&id, listed).await;
            }
        }
        // A drain outlives the coordinator that was asked for it; what its jobs were told does not.
        if self.drains.contains(&node) {
            self.leave(&node).await;
        }
        self.stop_strays(&node, now);
        for id in copies_of {
            match self.jobs.get_mut(&id) {
                Some(entry) if !entry.job.phase.is_terminal() => entry.copies.kept_on(node.clone()),
                _ => self.forget_copies(&node, &id),
            }
        }
        Ok(AgentSession {
            node,
            stream,
            commands: receiver,
        })
    }

    /// Live jobs with ranks on a node.
    fn jobs_on(&self, node: &NodeId) -> Vec<JobId> {
        self.ledger.on(node).cloned().collect()
    }

    /// What an agent's newest list says of a job, if that differs from what we know.
    fn listed(&self, id: &JobId, node: &NodeId, joined: bool) -> Option<Event> {
        let job = &self.jobs.get(id)?.job;
        let list = &self.members.members().get(node)?.hello.ranks;
        if self.deferred.iter().any(|exit| &exit.key.job == id) {
            return None; // A rank is off the list because it ended well.
        }
        let on_list = |index: usize| {
            let key = RankKey {
                job: id.clone(),
                generation: job.generation,
                rank: Rank(index as u32),
            };
            list.get(&key).map(|pid| (key.rank, *pid))
        };
        let known = |(index, rank): (usize, &job::RankState)| match (on_list(index), rank.process) {
            (Some((_, pid)), Process::Alive(known)) => known == pid && rank.missing == 0,
            (Some(_), Process::Reaped) | (None, Process::Reaped) => true,
            (None, Process::Launching) => !joined,
            _ => false,
        };
        let here = || {
            job.ranks
                .iter()
                .enumerate()
                .filter(|(_, rank)| &rank.node == node)
        };
        if here().all(known) {
            return None;
        }
        let ranks = here().filter_map(|(index, _)| on_list(index)).collect();
        Some(Event::Listed {
            node: node.clone(),
            ranks,
            joined,
        })
    }

    /// Stops ranks on a node that should not run: of jobs that ended, of old generations, of unknown jobs.
    fn stop_strays(&mut self, node: &NodeId, now: job::Now) {
        let Some(member) = self.members.members().get(node) else {
            return;
        };
        let mut strays: Vec<(JobId, u64)> = Vec::new();
        for key in member.hello.ranks.keys() {
            let wanted = self.jobs.get(&key.job).is_some_and(|entry| {
                let grace_ms = match entry.job.phase {
                    Phase::Cancelling => self.timers.grace_ms,
                    _ => 0,
                };
                let told = entry
                    .killed_ms
                    .is_some_and(|at| now.mono_ms < at + grace_ms + KILL_AGAIN_MS);
                let stands = key.generation == entry.job.generation && entry.job.phase.wants_ranks();
                stands || told
            });
            if !wanted {
                strays.push((key.job.clone(), key.generation.0));
            }
        }
        strays.dedup();
        for (id, generation) in strays {
            tracing::warn!(job = %id, generation, %node, "ranks run that should not: stop them");
            if let Some(entry) = self.jobs.get_mut(&id) {
                entry.killed_ms = Some(now.mono_ms);
            }
            self.kill(node, &id, generation, 0);
        }
    }

    /// Sends to a node's agent. A stream that does not take it is closed; the agent joins again and is told anew.
    pub(super) fn tell_agent(&mut self, node: &NodeId, message: join_response::Message) {
        let response = JoinResponse {
            epoch: self.store.epoch(),
            message: Some(message),
        };
        let Some(agent) = self.agents.get(node) else {
            return;
        };
        if agent.commands.try_send(response).is_err() {
            let stream = agent.stream;
            tracing::warn!(%node, "the agent does not read its commands; its stream is closed");
            self.agent_left(node, stream);
        }
    }

    pub(super) fn agent_left(&mut self, node: &NodeId, stream: u64) {
        self.members.disconnected(node, stream);
        if self.agents.get(node).is_some_and(|agent| agent.stream == stream) {
            self.agents.remove(node);
            tracing::info!(%node, "stream of a node ended");
        }
    }

    pub(super) async fn agent_says(
        &mut self,
        node: &NodeId,
        stream: u64,
        message: join_request::Message,
    ) -> Result<(), ControlError> {
        let now = self.clock.now();
        let silent_ms = self
            .members
            .members()
            .get(node)
            .map_or(0, |member| now.mono_ms.saturating_sub(member.heard_ms));
        let list = match &message {
            join_request::Message::Heartbeat(heartbeat) => Some(rank_list(&heartbeat.ranks)),
            _ => None,
        };
        if !self.members.heard(node, stream, list, now.mono_ms) {
            return Err(ControlError::Refused(format!(
                "another stream speaks for node {node} now"
            )));
        }
        match message {
            join_request::Message::Hello(_) => {
                return Err(ControlError::Refused("a stream begins with Hello, once".into()));
            }
            join_request::Message::Heartbeat(heartbeat) => {
                let sequence = heartbeat.sequence;
                self.tell_agent(
                    node,
                    join_response::Message::HeartbeatAck(HeartbeatAck { sequence }),
                );
                for id in self.jobs_on(node) {
                    if let Some(listed) = self.listed(&id, node, false) {
                        self.happened(&id, listed).await;
                    }
                }
                self.stop_strays(node, now);
            }
            join_request::Message::RankStarted(started) => {
                let rank = started.rank.unwrap_or_default();
                let key = rank_key(&rank)
                    .ok_or_else(|| ControlError::invalid("rank_started.rank", "is malformed"))?;
                self.members.rank_changed(node, key.clone(), Some(rank.pid));
                let event = Event::Spawned {
                    generation: key.generation,
                    rank: key.rank,
                    pid: rank.pid,
                };
                if self.runs_on(&key, node) {
                    self.happened(&key.job, event).await;
                }
            }
            join_request::Message::RankExited(exited) => self.rank_exited(node, exited, silent_ms).await?,
            join_request::Message::Leaving(_) => {
                tracing::info!(%node, "node leaves");
                self.members.drain(node, true);
                self.leave(node).await;
            }
        }
        Ok(())
    }

    async fn rank_exited(
        &mut self,
        node: &NodeId,
        exited: RankExited,
        silent_ms: u64,
    ) -> Result<(), ControlError> {
        let rank = exited.rank.unwrap_or_default();
        let key = rank_key(&rank).ok_or_else(|| ControlError::invalid("rank_exited.rank", "is malformed"))?;
        self.members.rank_changed(node, key.clone(), None);
        if !self.runs_on(&key, node) {
            return Ok(());
        }
        let exit = Exit {
            code: exited.exit_code,
            stalled_ms: exited.stalled_ms,
            signal: exited.signal,
            last_error: tame(&exited.last_error),
            requested: exited.requested,
        };
        let event = Event::Exited {
            generation: key.generation,
            rank: key.rank,
            exit,
            silent_ms,
        };
        let reports_open = self
            .jobs
            .get(&key.job)
            .is_some_and(|entry| entry.reports.contains_key(&key.rank.0));
        if exited.exit_code == Some(0) && reports_open {
            let until_ms = self.clock.now().mono_ms + LAST_REPORTS_MS;
            self.deferred.push(DeferredExit { key, event, until_ms });
            return Ok(());
        }
        self.happened(&key.job, event).await;
        Ok(())
    }

    /// Lets deferred exits happen: those of a rank whose reports have ended, and all that waited long enough.
    pub(super) async fn settle_exits(&mut self, now: job::Now, ended: Option<(&JobId, Rank)>) {
        let due = |exit: &mut DeferredExit| {
            now.mono_ms >= exit.until_ms || ended == Some((&exit.key.job, exit.key.rank))
        };
        let exits: Vec<DeferredExit> = self.deferred.extract_if(.., due).collect();
        for exit in exits {
            self.happened(&exit.key.job, exit.event).await;
        }
    }

    /// True if the newest generation placed that rank on that node: an agent speaks only for its own ranks.
    fn runs_on(&self, key: &RankKey, node: &NodeId) -> bool {
        self.jobs.get(&key.job).is_some_and(|entry| {
            entry.job.generation == key.generation
                && entry
                    .job
                    .ranks
                    .get(key.rank.0 as usize)
                    .is_some_and(|rank| &rank.node == node)
        })
    }

    pub(super) async fn node_changed(&mut self, change: Change) {
        match change {
            Change::Suspect(node) => tracing::warn!(%node, "heartbeat is late"),
            Change::Lost(node, silent_ms) => {
                tracing::warn!(%node, silent_ms, "node is lost");
                for id in self.jobs_on(&node) {
                    self.happened(
                        &id,
                        Event::NodeLost {
                            node: node.clone(),
                            silent_ms,
                        },
                    )
                    .await;
                }
            }
            Change::Orphaned(node) => {
                tracing::info!(%node, "the lost node's agent has ended its ranks by now");
                for id in self.jobs_on(&node) {
                    self.happened(&id, Event::NodeOrphaned { node: node.clone() })
                        .await;
                }
            }
            Change::Forgotten(node) => {
                tracing::info!(%node, "node forgotten");
                self.agents.remove(&node);
            }
        }
    }

    /// Has every job with ranks on a node make a checkpoint and go on elsewhere.
    async fn leave(&mut self, node: &NodeId) {
        for id in self.jobs_on(node) {
            self.happened(&id, Event::Drain { node: node.clone() }).await;
        }
    }

    pub(super) async fn drain(&mut self, node: NodeId, draining: bool) -> Result<Node, ControlError> {
        if !self.members.members().contains_key(&node) && !self.drains.contains(&node) {
            return Err(ControlError::not_found("node", node.as_str()));
        }
        let transaction = match draining {
            true => Transaction::default().put(keys::drain(&node), Vec::new()),
            false => Transaction::default().delete(keys::drain(&node)),
        };
        if let Err(error) = self.store.commit(transaction).await {
            return Err(self.store_failed(error));
        }
        match draining {
            true => self.drains.insert(node.clone()),
            false => self.drains.remove(&node),
        };
        self.members.drain(&node, draining);
        self.unplanned.slots_freed();
        tracing::info!(%node, draining, "drain changed");
        if draining {
            self.leave(&node).await;
        } else {
            for id in self.jobs_on(&node) {
                self.happened(&id, Event::Stay { node: node.clone() }).await;
            }
        }
        let now = self.clock.now();
        let member = self.members.members().get(&node);
        member
            .map(|member| node_to_wire(member, now))
            .ok_or_else(|| ControlError::not_found("node", node.as_str()))
    }

    pub(super) fn nodes(&self) -> Vec<Node> {
        let now = self.clock.now();
        self.members
            .members()
            .values()
            .map(|member| node_to_wire(member, now))
            .collect()
    }

    pub(super) fn cluster(&self) -> GetClusterResponse {
        let used = self.used_slots();
        let mut totals = GetClusterResponse {
            version: env!("CARGO_PKG_VERSION").into(),
            epoch: self.store.epoch(),
            serving_since: Some(from_unix_ms(self.serving_since_ms)),
            jobs_queued: self.ledger.queued(),
            jobs_active: self.ledger.active(),
            ..GetClusterResponse::default()
        };
        for (id, member) in self.members.members() {
            match member.liveness == Liveness::Healthy && !member.draining {
                true => {
                    totals.nodes_healthy += 1;
                    totals.slots_total += member.hello.slots;
                    totals.slots_used += used.get(id).copied().unwrap_or(0);
                }
                false => totals.nodes_other += 1,
            }
        }
        totals
    }
}

fn node_to_wire(member: &Member, now: job::Now) -> Node {
    let state = match member.liveness {
        Liveness::Lost => NodeState::Lost,
        Liveness::Suspect | Liveness::Awaited => NodeState::Suspect,
        Liveness::Healthy if member.draining => NodeState::Draining,
        Liveness::Healthy => NodeState::Healthy,
    };
    let hello = &member.hello;
    Node {
        id: hello.node.to_string(),
        address: hello.address.clone(),
        state: state.into(),
        reason: member.reason(now.mono_ms),
        slots: hello.slots,
        device: hello.device.clone(),
        version: hello.version.clone(),
        ranks: hello
            .ranks
            .iter()
            .map(|(key, pid)| NodeRank {
                job_id: key.job.to_string(),
                generation: key.generation.0,
                rank: key.rank.0,
                pid: *pid,
            })
            .collect(),
        joined_at: (member.joined_unix_ms > 0).then(|| from_unix_ms(member.joined_unix_ms)),
        heartbeat_age_ms: now.mono_ms.saturating_sub(member.heard_ms),
    }
}

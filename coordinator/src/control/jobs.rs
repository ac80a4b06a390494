//! Commands about jobs, and the path that every event of a job takes: decide, store, then act.

use super::{
    Control, ControlError, Entry, MAX_LIVE_JOBS, MAX_RETRIES, Watch,
    episode::Episode,
    handle::{Command, JobFilter, Submit},
    keys, ledger, measure, not_done, records,
};
use crate::{
    goodput::Goodput,
    job::{self, Effect, Event, Job, Phase, Process},
    planted::{Bug, planted},
    store::{StoreError, Transaction},
};
use arcface_proto::{
    convert,
    spec::JobSpec,
    timestamp::from_unix_ms,
    types::{JobId, NodeId},
    v1::{
        self, CheckpointManifest, CheckpointNow, Evaluation, ForgetCopies, KillRanks, LaunchRanks,
        RankAssignment, ReportResponse, join_response, report_response, watch_job_response,
    },
};
use prost::Message;
use std::collections::{BTreeMap, BTreeSet};
use tokio::sync::oneshot;

/// Watchers of one job.
const MAX_WATCHERS: usize = 1000;
/// Commands that wait for rank 0 to open its stream.
const MAX_OUTBOX: usize = 16;

/// Jobs that one transaction takes in: etcd's default limit is 128 writes, and each job is two.
pub(super) const MAX_BATCH: usize = 50;
/// Their records end a batch at this; the largest record is smaller than what the store has room for beyond it.
const MAX_BATCH_BYTES: usize = 512 << 10;

/// A submit that will be a job once the store has it.
struct Accepted {
    job: Job,
    record: Vec<u8>,
    request_id: String,
    answer: oneshot::Sender<Result<v1::Job, ControlError>>,
}

/// Gives an answer to a caller; one that has gone away needs none.
pub(super) fn reply<T>(answer: oneshot::Sender<T>, value: T) {
    let _ = answer.send(value);
}

impl Control {
    pub(super) async fn command(&mut self, command: Command) {
        match command {
            Command::Submit(submit) => self.submit_all(vec![submit]).await,
            Command::GetJob { id, answer } => reply(answer, self.find(&id).map(Entry::to_wire)),
            Command::Look { id, answer } => reply(answer, self.look(&id)),
            Command::Curve { id, answer } => reply(answer, self.curve(&id)),
            Command::ListJobs { filter, answer } => reply(answer, Ok(self.list_jobs(&filter))),
            Command::Cancel { id, reason, answer } => reply(answer, self.cancel(&id, reason).await),
            Command::Watch { id, answer } => reply(answer, self.watch(&id)),
            Command::Checkpoints { id, answer } => reply(answer, self.checkpoints(&id).await),
            Command::Evaluations {
                id,
                after,
                limit,
                answer,
            } => reply(answer, self.evaluations(&id, after, limit).await),
            Command::ListNodes { answer } => reply(answer, Ok(self.nodes())),
            Command::Drain {
                node,
                draining,
                answer,
            } => reply(answer, self.drain(node, draining).await),
            Command::Cluster { answer } => reply(answer, Ok(self.cluster())),
            Command::Join { hello, answer } => reply(answer, self.join(*hello).await),
            Command::AgentSays {
                node,
                stream,
                message,
                answer,
            } => reply(answer, self.agent_says(&node, stream, message).await),
            Command::AgentLeft { node, stream } => self.agent_left(&node, stream),
            Command::Rendezvous { rank, request, reply } => self.rendezvous(&rank, request, reply),
            Command::OpenReport { rank, answer } => reply(answer, self.open_report(&rank)),
            Command::RankSays { rank, report, answer } => reply(answer, self.rank_says(&rank, report).await),
            Command::CloseReport { rank, stream } => self.close_report(&rank, stream).await,
            Command::CommitCheckpoint {
                rank,
                request,
                answer,
            } => reply(answer, self.commit_checkpoint(&rank, &request).await),
        }
    }

    /// A job by its id, or by a prefix of it that names one.
    pub(super) fn find(&self, text: &str) -> Result<&Entry, ControlError> {
        if let Ok(id) = text.parse::<JobId>() {
            return self
                .jobs
                .get(&id)
                .ok_or_else(|| ControlError::not_found("job", text));
        }
        if text.is_empty() {
            return Err(ControlError::invalid("job_id", "is missing"));
        }
        let matches = |id: &JobId| {
            id.as_str().starts_with(text)
                || id
                    .as_str()
                    .strip_prefix("job-")
                    .is_some_and(|id| id.starts_with(text))
        };
        let mut found = self
            .jobs
            .iter()
            .filter(|(id, _)| matches(id))
            .map(|(_, entry)| entry);
        match (found.next(), found.count()) {
            (None, _) => Err(ControlError::not_found("job", text)),
            (Some(entry), 0) => Ok(entry),
            (Some(_), more) => Err(ControlError::invalid(
                "job_id",
                format!("{text:?} begins {} jobs", more + 1),
            )),
        }
    }

    /// Takes in jobs that were submitted at about the same time: one transaction makes them all durable, since a disk
    /// syncs one large write as fast as a small one. Each is answered for itself, and none before the store has it.
    pub(super) async fn submit_all(&mut self, submits: Vec<Submit>) {
        let now = self.clock.now();
        let mut batch: Vec<Accepted> = Vec::new();
        let mut transaction = Transaction::default();
        for submit in submits {
            let same = |accepted: &Accepted| {
                !submit.request_id.is_empty() && accepted.request_id == submit.request_id
            };
            if batch.iter().any(same) {
                // A repetition of one that is not stored yet: it is, before this one is looked at.
                self.store_submits(std::mem::take(&mut batch), std::mem::take(&mut transaction))
                    .await;
            }
            let job = match self.accept(&submit, &batch, now).await {
                Ok(job) => job,
                Err(answer) => {
                    reply(submit.answer, answer);
                    continue;
                }
            };
            let record = records::encode(&job, 1);
            let key = keys::job(&job.id);
            transaction = transaction.expect_absent(&key).put(&key, record.clone());
            if !submit.request_id.is_empty() {
                let request = records::StoredRequest {
                    job_id: job.id.to_string(),
                };
                let key = keys::request(&submit.request_id);
                transaction = transaction.expect_absent(&key).put(key, request.encode_to_vec());
            }
            batch.push(Accepted {
                job,
                record,
                request_id: submit.request_id,
                answer: submit.answer,
            });
            let bytes: usize = batch.iter().map(|accepted| accepted.record.len()).sum();
            if batch.len() == MAX_BATCH || bytes > MAX_BATCH_BYTES {
                self.store_submits(std::mem::take(&mut batch), std::mem::take(&mut transaction))
                    .await;
            }
        }
        self.store_submits(batch, transaction).await;
    }

    /// The job that a submit makes, or its answer if it makes none. `before` are accepted and not yet stored.
    async fn accept(
        &mut self,
        submit: &Submit,
        before: &[Accepted],
        now: job::Now,
    ) -> Result<Job, Result<v1::Job, ControlError>> {
        match self.repeated(&submit.request_id, &submit.spec).await {
            Ok(None) => {}
            Ok(Some(job)) => return Err(Ok(job)),
            Err(error) => return Err(Err(error)),
        }
        let mut id = JobId::from_random(uuid::Uuid::new_v4().as_u64_pair().0);
        while self.jobs.contains_key(&id) {
            id = JobId::from_random(uuid::Uuid::new_v4().as_u64_pair().0);
        }
        let job = Job::new(id, (*submit.spec).clone(), now.unix_ms);
        let output = &job.spec.output;
        let same = |accepted: &&Accepted| ledger::folder(&accepted.job.spec.output) == ledger::folder(output);
        let before_it = before.iter().find(same).map(|accepted| &accepted.job.id);
        if let Some(writer) = self.ledger.writer(output).or(before_it) {
            return Err(Err(ControlError::Refused(format!(
                "output: {output:?} belongs to {writer}, which has not ended: cancel it, or choose another directory (--set output=DIR)"
            ))));
        }
        if submit.validate_only {
            return Err(Ok(v1::Job {
                id: String::new(),
                submitted_at: None,
                ..records::job_to_wire(&job, 0)
            }));
        }
        if self.ledger.live().len() + before.len() >= MAX_LIVE_JOBS {
            return Err(Err(ControlError::Exhausted(format!(
                "{MAX_LIVE_JOBS} jobs already wait or run"
            ))));
        }
        Ok(job)
    }

    async fn store_submits(&mut self, batch: Vec<Accepted>, transaction: Transaction) {
        if batch.is_empty() {
            return;
        }
        let outcome = self.store.commit(transaction).await;
        for accepted in batch {
            let Accepted {
                job, record, answer, ..
            } = accepted;
            let stored = match &outcome {
                Ok(revision) => Ok(*revision),
                Err(StoreError::Unknown(why)) => {
                    let key = keys::job(&job.id);
                    let found = self.find_out(&key, &record, why.clone()).await;
                    found.and_then(|revision| revision.ok_or_else(not_done))
                }
                Err(_) if planted(Bug::AckBeforeStore) => Ok(0),
                Err(error) => Err(ControlError::Unavailable(error.to_string())),
            };
            match stored {
                Err(error) => reply(answer, Err(error)),
                Ok(revision) => {
                    tracing::info!(job = %job.id, name = %job.spec.name, world_size = job.spec.world_size, "job submitted");
                    let wire = records::job_to_wire(&job, 1);
                    let mut entry = Entry::new(job, 1, revision);
                    entry.episode = Episode::submitted(&entry.job, self.clock.now());
                    self.take_in(entry);
                    reply(answer, Ok(wire));
                }
            }
        }
        if let Err(error) = outcome {
            // The callers have their answers; a store that has another owner ends this coordinator.
            self.store_failed(error);
        }
    }

    /// A job that the store has is ours from now on.
    pub(super) fn take_in(&mut self, mut entry: Entry) {
        entry.goodput = Goodput::begin(self.clock.now().mono_ms, entry.job.progress.step);
        measure::job_loaded(&entry.job);
        self.ledger.change(None, &entry.job);
        self.unplanned.job(&entry.job);
        self.jobs.insert(entry.job.id.clone(), entry);
    }

    /// The job that a request id made before. Its submit may have had an outcome that we did not learn: then the store
    /// has it, and we do not.
    async fn repeated(&mut self, request_id: &str, spec: &JobSpec) -> Result<Option<v1::Job>, ControlError> {
        if request_id.is_empty() {
            return Ok(None);
        }
        let Some(stored) = self.store.get(&keys::request(request_id)).await? else {
            return Ok(None);
        };
        let request = records::StoredRequest::decode(stored.value.as_slice())
            .map_err(|error| ControlError::Unavailable(format!("record of request {request_id}: {error}")))?;
        let id = request.job_id.parse::<JobId>();
        if let Ok(id) = id.as_ref()
            && !self.jobs.contains_key(id)
            && let Some(stored) = self.store.get(&keys::job(id)).await?
        {
            let (job, revision) = records::decode(&stored.value).map_err(|problem| {
                ControlError::Unavailable(format!("record {} cannot be read: {problem}", stored.key))
            })?;
            tracing::info!(job = %id, "a submit whose outcome was not known had been stored");
            self.take_in(Entry::new(job, revision, stored.revision));
        }
        let entry = self.find(&request.job_id)?;
        match entry.job.spec == *spec {
            true => Ok(Some(entry.to_wire())),
            false => Err(ControlError::AlreadyExists(format!(
                "request id {request_id:?} was used for {}, which is another job",
                entry.job.id
            ))),
        }
    }

    fn list_jobs(&self, filter: &JobFilter) -> Vec<v1::Job> {
        let wanted =
            |phase| filter.states.is_empty() || filter.states.contains(&records::phase_to_wire(phase));
        // Jobs at their end pile up: who asks for none of them does not wait for us to pass them by.
        let live = !Phase::ALL
            .into_iter()
            .any(|phase| phase.is_terminal() && wanted(phase));
        self.ledger
            .newest_first(filter.before.as_ref(), live)
            .filter_map(|id| self.jobs.get(id))
            .filter(|entry| wanted(entry.job.phase))
            .take(filter.limit)
            .map(Entry::to_wire)
            .collect()
    }

    async fn cancel(&mut self, id: &str, reason: String) -> Result<v1::Job, ControlError> {
        let id = self.find(id)?.job.id.clone();
        self.apply(&id, &Event::Cancel { reason }, Transaction::default())
            .await?;
        let entry = self.find(id.as_str())?;
        Ok(entry.to_wire())
    }

    fn watch(&mut self, id: &str) -> Result<Watch, ControlError> {
        let id = self.find(id)?.job.id.clone();
        let entry = self
            .jobs
            .get_mut(&id)
            .ok_or_else(|| ControlError::not_found("job", id.as_str()))?;
        if entry.watchers.len() >= MAX_WATCHERS {
            return Err(ControlError::Exhausted(format!(
                "{MAX_WATCHERS} clients already watch {id}"
            )));
        }
        let events = entry.watchers.watch();
        if entry.job.phase.is_terminal() {
            entry.watchers.close();
        }
        Ok(Watch {
            snapshot: entry.to_wire(),
            events,
        })
    }

    async fn checkpoints(&self, id: &str) -> Result<Vec<CheckpointManifest>, ControlError> {
        let id = &self.find(id)?.job.id;
        let mut records = self.list_all(&keys::checkpoints(id)).await?;
        records.extend(self.list_all(&keys::damaged_checkpoints(id)).await?);
        let mut manifests: Vec<CheckpointManifest> = records
            .iter()
            .map(|record| decoded(&record.key, &record.value))
            .collect::<Result<_, _>>()?;
        manifests.sort_by_key(|manifest| std::cmp::Reverse((manifest.step, manifest.generation)));
        Ok(manifests)
    }

    async fn evaluations(
        &self,
        id: &str,
        after: Option<String>,
        limit: usize,
    ) -> Result<Vec<(String, Evaluation)>, ControlError> {
        let prefix = keys::evaluations(&self.find(id)?.job.id);
        let after = after.map(|token| format!("{prefix}{token}"));
        let records = self.store.list(&prefix, after.as_deref(), limit).await?;
        records
            .into_iter()
            .map(|record| {
                let token = record.key.strip_prefix(&prefix).unwrap_or_default().to_owned();
                Ok((token, decoded(&record.key, &record.value)?))
            })
            .collect()
    }

    /// An event of the cluster itself: nobody is there to try again, so we do if the store does not take it.
    pub(super) async fn happened(&mut self, id: &JobId, event: Event) {
        match self.apply(id, &event, Transaction::default()).await {
            Ok(()) => {}
            Err(ControlError::Unavailable(error)) => {
                tracing::error!(job = %id, error, "the store did not take a change; it is tried again");
                if self.retries.len() < MAX_RETRIES {
                    self.retries.push_back((id.clone(), event));
                }
            }
            Err(refused) => tracing::info!(job = %id, %refused, "event refused"),
        }
    }

    /// Decides, stores, then acts. An event that is refused or not stored leaves nothing behind.
    pub(super) async fn apply(
        &mut self,
        id: &JobId,
        event: &Event,
        with: Transaction,
    ) -> Result<(), ControlError> {
        let now = self.clock.now();
        let entry = self
            .jobs
            .get(id)
            .ok_or_else(|| ControlError::not_found("job", id.as_str()))?;
        let (next, effects) = job::step(&entry.job, event, now, &self.limits)?;
        if effects.contains(&Effect::Persist) || with != Transaction::default() {
            self.store_job(&next, with).await?;
        }
        let Some(entry) = self.jobs.get_mut(id) else {
            return Ok(());
        };
        let before = std::mem::replace(&mut entry.job, next);
        let after = &entry.job;
        if before.phase != after.phase {
            tracing::info!(job = %id, generation = %after.generation, from = %before.phase, to = %after.phase,
                reason = %after.reason, "job changed");
        }
        measure::job_changed(&before, after);
        entry.episode.moved(&before, after, now);
        if before.phase != after.phase {
            entry.goodput.moved(before.phase, after.phase, now.mono_ms);
            measure::job_time(after, &entry.goodput);
        }
        if after.phase == Phase::Running
            && let Some(met_ms) = entry.met_ms.take()
        {
            measure::loaded(after, now.mono_ms.saturating_sub(met_ms));
        }
        let mut keepers = BTreeSet::new();
        let ended = after.phase.is_terminal() && !before.phase.is_terminal();
        if ended {
            self.retiring.push_back((now.mono_ms, id.clone()));
            keepers = entry.copies.forget();
        }
        if before.phase != after.phase || before.ranks != after.ranks {
            self.ledger.change(Some(&before), after);
            self.unplanned.moved(&before, after);
        }
        for effect in effects {
            self.perform(id, effect, now);
        }
        for node in keepers {
            self.forget_copies(&node, id);
        }
        if ended {
            self.keep_curve(id);
        }
        Ok(())
    }

    fn perform(&mut self, id: &JobId, effect: Effect, now: job::Now) {
        let Some(entry) = self.jobs.get_mut(id) else {
            return;
        };
        match effect {
            Effect::Persist => {}
            Effect::Launch(node) => {
                if node.is_none() {
                    entry.rendezvous.open(entry.job.ranks.len());
                    entry.forget_generation();
                    let members = self.members.members();
                    entry
                        .copies
                        .choose(entry.job.checkpoint_step, &entry.job.placement(), |node| {
                            members.get(node).map(|member| member.hello.boot_id.as_str())
                        });
                }
                self.launch(id, node.as_ref());
            }
            Effect::Kill { grace_ms } => {
                entry.killed_ms = Some(now.mono_ms);
                let generation = entry.job.generation.0;
                let nodes: BTreeSet<NodeId> = entry.job.ranks.iter().map(|rank| rank.node.clone()).collect();
                for node in nodes {
                    self.kill(&node, id, generation, grace_ms);
                }
            }
            Effect::EndGeneration => {
                entry
                    .rendezvous
                    .end(&format!("generation {} has ended", entry.job.generation));
                entry.forget_generation();
            }
            Effect::CheckpointNow => {
                let command = report_response::Command::CheckpointNow(CheckpointNow {});
                self.tell_rank_0(
                    id,
                    ReportResponse {
                        command: Some(command),
                    },
                );
            }
            Effect::Notify => {
                let wire = entry.to_wire();
                entry
                    .watchers
                    .publish(from_unix_ms(now.unix_ms), &watch_job_response::Event::Job(wire));
                if entry.job.phase.is_terminal() {
                    entry.watchers.close();
                }
            }
            Effect::NotifyRecovery(index) => {
                if let Some(recovery) = entry.job.recoveries.get(index) {
                    let event = watch_job_response::Event::Recovery(records::recovery_to_wire(recovery));
                    entry.watchers.publish(from_unix_ms(now.unix_ms), &event);
                }
            }
        }
    }

    /// Tells agents to start the ranks that are to be launched. One that is not connected is told when it joins.
    fn launch(&mut self, id: &JobId, only: Option<&NodeId>) {
        let Some(entry) = self.jobs.get(id) else { return };
        let job = &entry.job;
        let spec = convert::job_spec_to_wire(&job.spec);
        let (resume, resume_copies) = match entry.copies.chosen() {
            Some((manifest, copies)) => (Some(manifest.clone()), copies.clone()),
            None => (entry.resume.clone(), Vec::new()),
        };
        let nodes: Vec<String> = job.ranks.iter().map(|rank| rank.node.to_string()).collect();
        let mut by_node: BTreeMap<NodeId, Vec<RankAssignment>> = BTreeMap::new();
        let mut first_rank = 0;
        for run in job.ranks.chunk_by(|a, b| a.node == b.node) {
            let node = &run[0].node;
            let address = self
                .members
                .members()
                .get(node)
                .map_or("", |member| member.hello.address.as_str());
            for (local_rank, state) in run.iter().enumerate() {
                let wanted = state.process == Process::Launching && only.is_none_or(|only| only == node);
                if wanted {
                    by_node.entry(node.clone()).or_default().push(RankAssignment {
                        job_id: id.to_string(),
                        generation: job.generation.0,
                        rank: (first_rank + local_rank) as u32,
                        world_size: job.ranks.len() as u32,
                        local_rank: local_rank as u32,
                        local_world_size: run.len() as u32,
                        node_id: node.to_string(),
                        address: address.to_owned(),
                        spec: Some(spec.clone()),
                        resume: resume.clone(),
                        resume_copies: resume_copies.clone(),
                        nodes: nodes.clone(),
                        left_out_steps: job.left_out_steps.clone(),
                        trace_parent: entry.episode.context(),
                        ..RankAssignment::default()
                    });
                }
            }
            first_rank += run.len();
        }
        let generation = job.generation;
        for (node, assignments) in by_node {
            tracing::info!(job = %id, %generation, %node, ranks = assignments.len(), "launch");
            self.tell_agent(&node, join_response::Message::Launch(LaunchRanks { assignments }));
        }
    }

    /// Tells an agent to stop a job's ranks up to a generation.
    pub(super) fn kill(&mut self, node: &NodeId, id: &JobId, generation: u64, grace_ms: u64) {
        let kill = KillRanks {
            job_id: id.to_string(),
            generation,
            grace_ms: grace_ms.min(u32::MAX.into()) as u32,
        };
        self.tell_agent(node, join_response::Message::Kill(kill));
    }

    /// Tells an agent that what it keeps in memory of a job has no use any more. One that does not hear it lists the job when
    /// it joins again.
    pub(super) fn forget_copies(&mut self, node: &NodeId, id: &JobId) {
        let forget = ForgetCopies {
            job_id: id.to_string(),
        };
        self.tell_agent(node, join_response::Message::Forget(forget));
    }

    /// Sends to rank 0, or keeps it until rank 0 has a stream.
    pub(super) fn tell_rank_0(&mut self, id: &JobId, response: ReportResponse) {
        let Some(entry) = self.jobs.get_mut(id) else {
            return;
        };
        let sent = entry
            .reports
            .get(&0)
            .is_some_and(|(_, stream)| stream.try_send(response.clone()).is_ok());
        if !sent {
            if entry.outbox.len() == MAX_OUTBOX {
                entry.outbox.pop_front();
            }
            entry.outbox.push_back(response);
        }
    }
}

fn decoded<T: Message + Default>(key: &str, bytes: &[u8]) -> Result<T, ControlError> {
    T::decode(bytes)
        .map_err(|error| ControlError::Unavailable(format!("record {key} cannot be read: {error}")))
}

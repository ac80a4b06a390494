//! Messages of rank processes: rendezvous, reports, checkpoints. Each is fenced by its generation.

use super::{
    Control, ControlError, ReportSession, copies::Holder, keys, measure, nodes::tame, records, rendezvous,
};
use crate::{
    goodput::Steps,
    job::{self, Event, Progress, Refused},
    planted::{Bug, planted},
    store::{Transaction, Write},
    straggler::{News, Pace},
};
use arcface_proto::{
    timestamp::from_unix_ms,
    types::{Generation, JobId, NodeId, Rank},
    v1::{
        CheckpointCommitted, CheckpointDamage, CheckpointManifest, CommitCheckpointRequest,
        DamagedCheckpoint, Evaluation, PartsCopied, RankError, RankId, RankPace, RendezvousRequest,
        ReportResponse, StepMetrics, report_request::Report, report_response, watch_job_response,
    },
};
use prost::Message;
use tokio::sync::mpsc;

/// Commands that may wait for one rank.
const RANK_BUFFER: usize = 32;
/// Longest name of a data set: it is part of a key and a label.
const MAX_DATASET_BYTES: usize = 200;

/// What a new checkpoint makes of the older ones.
#[derive(Default)]
struct Retention {
    /// Directories of all that stay, the new one first.
    kept: Vec<String>,
    /// Directories that go.
    expired: Vec<String>,
    /// The deletions of their manifests.
    deletions: Vec<Write>,
}

impl Control {
    /// The job that a rank belongs to, if its generation is the newest and stands.
    fn fenced(&mut self, rank: &RankId) -> Result<&mut super::Entry, ControlError> {
        let id: JobId = rank
            .job_id
            .parse()
            .map_err(|error: arcface_proto::types::InvalidId| {
                ControlError::invalid("rank.job_id", error.to_string())
            })?;
        let entry = self
            .jobs
            .get_mut(&id)
            .ok_or_else(|| ControlError::not_found("job", id.as_str()))?;
        let job = &entry.job;
        let generation = Generation(rank.generation);
        if generation > job.generation && !planted(Bug::NoGenerationCompare) {
            // Its rank is to ask on: a refusal would end a generation that stands.
            return Err(ControlError::Unavailable(format!(
                "generation {generation} of {id} was opened by a coordinator that replaced this one"
            )));
        }
        if generation != job.generation && !planted(Bug::NoGenerationCompare) {
            return Err(Refused::Stale {
                job: id,
                got: generation,
                current: job.generation,
            }
            .into());
        }
        if !job.phase.wants_ranks() {
            return Err(Refused::Ended {
                job: id,
                generation,
                phase: job.phase,
            }
            .into());
        }
        let world_size = job.ranks.len();
        if rank.rank as usize >= world_size {
            return Err(Refused::NoSuchRank {
                job: id,
                rank: Rank(rank.rank),
                world_size,
            }
            .into());
        }
        Ok(entry)
    }

    pub(super) fn rendezvous(&mut self, rank: &RankId, request: RendezvousRequest, reply: rendezvous::Reply) {
        let now = self.clock.now();
        match self.fenced(rank) {
            Err(error) => super::jobs::reply(reply, Err(error)),
            Ok(entry) => {
                let world_size = entry.job.ranks.len();
                let complete = entry.rendezvous.join(
                    rank.rank,
                    world_size,
                    rendezvous::Endpoints {
                        ring: request.endpoint,
                        parts: request.parts_endpoint,
                    },
                    request.nccl_unique_id,
                    reply,
                    now.mono_ms,
                );
                if complete {
                    entry.met_ms = Some(now.mono_ms);
                    entry.episode.met(now);
                    measure::met(&entry.job, now);
                    tracing::info!(job = %entry.job.id, generation = rank.generation, world_size, "ranks have met");
                }
            }
        }
    }

    pub(super) fn open_report(&mut self, rank: &RankId) -> Result<ReportSession, ControlError> {
        self.next_stream += 1;
        let stream = self.next_stream;
        let entry = self.fenced(rank)?;
        let (sender, commands) = mpsc::channel(RANK_BUFFER);
        if rank.rank == 0 {
            // The buffer holds more than the outbox.
            entry
                .outbox
                .drain(..)
                .for_each(|response| drop(sender.try_send(response)));
        }
        entry.reports.insert(rank.rank, (stream, sender));
        Ok(ReportSession { stream, commands })
    }

    pub(super) async fn close_report(&mut self, rank: &RankId, stream: u64) {
        let Ok(id) = rank.job_id.parse::<JobId>() else {
            return;
        };
        let Some(entry) = self.jobs.get_mut(&id) else {
            return;
        };
        if entry
            .reports
            .get(&rank.rank)
            .is_some_and(|(open, _)| *open == stream)
        {
            entry.reports.remove(&rank.rank);
            self.settle_exits(self.clock.now(), Some((&id, Rank(rank.rank))))
                .await;
        }
    }

    pub(super) async fn rank_says(&mut self, rank: &RankId, report: Report) -> Result<(), ControlError> {
        let generation = Generation(rank.generation);
        // A permanent error may come after a peer's complaint has ended the generation: the job decides.
        let id: JobId = match &report {
            Report::Error(_) => rank
                .job_id
                .parse()
                .map_err(|_| ControlError::invalid("rank.job_id", "is not a job id"))?,
            _ => self.fenced(rank)?.job.id.clone(),
        };
        let rank = Rank(rank.rank);
        if rank != Rank(0) && matches!(report, Report::Metrics(_) | Report::Evaluation(_)) {
            return Err(ControlError::invalid(
                "rank.rank",
                "only rank 0 reports metrics and evaluations",
            ));
        }
        let none = Transaction::default();
        match report {
            Report::Started(started) => {
                let is_new = self.jobs.get(&id).is_some_and(|entry| {
                    let state = entry.job.ranks.get(rank.0 as usize);
                    state.is_some_and(|state| !state.started)
                });
                if let Some(entry) = self.jobs.get_mut(&id).filter(|_| started.num_classes > 0) {
                    entry.classes_found = Some(started.num_classes);
                }
                let event = Event::Started {
                    generation,
                    rank,
                    step: started.step,
                    total_steps: started.total_steps,
                    from_memory: started.from_memory,
                };
                self.apply(&id, &event, none).await?;
                // It is said again on every new stream.
                if let Some(seconds) = started.restore_seconds.filter(|_| is_new) {
                    measure::restored(&id, seconds);
                }
                Ok(())
            }
            Report::Metrics(metrics) => self.metrics(&id, generation, metrics).await,
            Report::Pace(mut pace) => {
                if let Some(figures) = pace.figures.take()
                    && let Some(entry) = self.jobs.get_mut(&id)
                    && let Some(state) = entry.job.ranks.get(rank.0 as usize)
                {
                    entry.figures.told(&id, rank, &state.node, figures);
                }
                self.pace(&id, rank, &pace);
                Ok(())
            }
            Report::Evaluation(evaluation) => self.evaluation(&id, generation, evaluation).await,
            Report::Copied(copied) => self.copied(&id, generation, rank, copied).await,
            Report::Error(RankError {
                damaged: Some(found), ..
            }) if found.in_memory => self.copies_lost(&id, generation, rank, &found).await,
            Report::Error(RankError {
                damaged: Some(found), ..
            }) => self.damaged(&id, generation, rank, found).await,
            Report::Error(error) => {
                let event = Event::Error {
                    generation,
                    rank,
                    message: tame(&error.message),
                    permanent: error.permanent,
                    peer: error.peer.map(Rank),
                    rollback_step: error.rollback_step,
                };
                self.apply(&id, &event, none).await
            }
            Report::Finished(finished) => {
                self.apply(
                    &id,
                    &Event::Finished {
                        generation,
                        rank,
                        step: finished.step,
                        reason: tame(&finished.reason),
                    },
                    none,
                )
                .await
            }
        }
    }

    async fn metrics(
        &mut self,
        id: &JobId,
        generation: Generation,
        metrics: StepMetrics,
    ) -> Result<(), ControlError> {
        let finite = |value: f64| value.is_finite().then_some(value);
        let progress = Progress {
            step: metrics.step,
            total_steps: metrics.total_steps,
            epoch: metrics.epoch,
            loss: finite(metrics.loss),
            learning_rate: finite(metrics.learning_rate),
            samples_per_second: finite(metrics.samples_per_second),
        };
        let before = self.jobs.get(id).map_or(0, |entry| entry.job.progress.step);
        let event = Event::Metrics {
            generation,
            progress,
            step_seconds: metrics.step_seconds,
        };
        self.apply(id, &event, Transaction::default()).await?;
        let now = self.clock.now();
        if let Some(entry) = self.jobs.get_mut(id) {
            let steps = metrics.step.saturating_sub(before);
            let skipped = measure::newly_skipped(&mut entry.skipped, generation, metrics.skipped_steps);
            measure::trained(&entry.job, steps, skipped, &metrics, &mut entry.phase_seconds);
            let checkpoint_s = metrics.phase_seconds.get("checkpoint").copied().unwrap_or(0.0);
            let trained = Steps {
                from: before,
                to: metrics.step,
                // Casts saturate, and make 0 of what is no number.
                checkpoint_ms: (checkpoint_s * 1000.0) as u64,
            };
            entry.goodput.trained(trained, now.mono_ms);
            if steps > 0 {
                let later_s = (steps - 1) as f64 * metrics.step_seconds;
                entry.episode.trained(&entry.job, later_s, now);
            }
            measure::job_time(&entry.job, &entry.goodput);
            entry
                .curve
                .add(progress.step, progress.loss, progress.samples_per_second);
            entry.watchers.publish(
                from_unix_ms(now.unix_ms),
                &watch_job_response::Event::Metrics(metrics),
            );
        }
        Ok(())
    }

    /// Compares a rank with its peers, and tells who holds them up.
    fn pace(&mut self, id: &JobId, rank: Rank, told: &RankPace) {
        let now = self.clock.now();
        let Some(entry) = self.jobs.get_mut(id) else {
            return;
        };
        let seconds = |phase: &str| {
            let seconds = told.busy_seconds.get(phase).copied().unwrap_or(0.0);
            // A rank that tells nonsense harms only itself.
            if seconds.is_finite() {
                seconds.max(0.0) / told.steps.max(1) as f64
            } else {
                0.0
            }
        };
        let pace = Pace {
            input_s: seconds("data_wait"),
            compute_s: ["forward", "head", "backward", "comm", "optimizer"]
                .map(seconds)
                .iter()
                .sum(),
        };
        for news in entry.paces.report(rank.0, entry.job.ranks.len(), pace) {
            let (straggler, over) = match news {
                News::Found(found) => (found, false),
                News::Over(found) => (found, true),
            };
            let wire = records::straggler_to_wire(&entry.job, straggler, over);
            let (rank, node, ratio) = (straggler.rank, &wire.node, straggler.ratio);
            match over {
                false => {
                    tracing::warn!(job = %id, generation = %entry.job.generation, rank, node, cause = %straggler.cause, ratio,
                    "rank holds up the others")
                }
                true => tracing::info!(job = %id, rank, node, "rank keeps up again"),
            }
            measure::straggler(id, straggler, over);
            entry.watchers.publish(
                from_unix_ms(now.unix_ms),
                &watch_job_response::Event::Straggler(wire),
            );
        }
    }

    async fn evaluation(
        &mut self,
        id: &JobId,
        generation: Generation,
        mut evaluation: Evaluation,
    ) -> Result<(), ControlError> {
        let dataset = &evaluation.dataset;
        if dataset.is_empty() || dataset.len() > MAX_DATASET_BYTES || dataset.chars().any(char::is_control) {
            let problem = format!("is not 1 to {MAX_DATASET_BYTES} bytes of printable text");
            return Err(ControlError::invalid("evaluation.dataset", problem));
        }
        let now = self.clock.now();
        evaluation.generation = generation.0;
        evaluation.at = Some(from_unix_ms(now.unix_ms));
        let key = keys::evaluation(id, evaluation.step, dataset);
        let transaction = Transaction::default().put(key, evaluation.encode_to_vec());
        if let Err(error) = self.store.commit(transaction).await {
            return Err(self.store_failed(error));
        }
        let accuracy = evaluation.ijb.is_none().then_some(evaluation.accuracy);
        tracing::info!(job = %id, dataset, step = evaluation.step, accuracy, "evaluated");
        if let Some(entry) = self.jobs.get_mut(id) {
            measure::evaluated(id, &evaluation);
            entry.history += 1;
            entry.watchers.publish(
                from_unix_ms(now.unix_ms),
                &watch_job_response::Event::Evaluation(evaluation),
            );
        }
        Ok(())
    }

    /// A rank's parts are in the memory of some nodes.
    async fn copied(
        &mut self,
        id: &JobId,
        generation: Generation,
        rank: Rank,
        copied: PartsCopied,
    ) -> Result<(), ControlError> {
        let members = self.members.members();
        let holders = copied.nodes.iter().filter_map(|node| {
            let (node, member) = members.get_key_value(&node.parse::<NodeId>().ok()?)?;
            Some(Holder {
                node: node.clone(),
                boot_id: member.hello.boot_id.clone(),
            })
        });
        let holders: Vec<Holder> = holders.collect();
        let parts = copied.parts.unwrap_or_default();
        let Some(entry) = self.jobs.get_mut(id) else {
            return Ok(());
        };
        let speaker = RankId {
            job_id: id.to_string(),
            generation: generation.0,
            rank: rank.0,
        };
        let world_size = entry.job.ranks.len() as u32;
        if let Some(step) = entry.copies.add(&speaker, &parts, holders, world_size)? {
            tracing::debug!(job = %id, step, "copies in memory are whole");
            measure::copied(id, step);
            let event = Event::Copied { generation };
            return self.apply(id, &event, Transaction::default()).await;
        }
        Ok(())
    }

    /// The set of copies that a generation was to resume from cannot be used: the next one does without.
    async fn copies_lost(
        &mut self,
        id: &JobId,
        generation: Generation,
        rank: Rank,
        found: &DamagedCheckpoint,
    ) -> Result<(), ControlError> {
        let detail = tame(&found.detail);
        tracing::warn!(job = %id, step = found.step, detail, "copies in memory cannot be used");
        if let Some(entry) = self.jobs.get_mut(id)
            && entry.job.generation == generation
        {
            entry.copies.lose_newest();
            measure::checkpoint_failed(id, measure::RESTORE, 1);
        }
        let event = Event::Error {
            generation,
            rank,
            message: format!(
                "the copies of step {} in memory cannot be used: {detail}",
                found.step
            ),
            permanent: false,
            peer: None,
            rollback_step: None,
        };
        self.apply(id, &event, Transaction::default()).await
    }

    /// Sets aside the checkpoint that a generation could not resume from: it is listed among the damaged ones from then
    /// on, counts for no retention, and its files stay. The next generation resumes from the newest one before it.
    async fn damaged(
        &mut self,
        id: &JobId,
        generation: Generation,
        rank: Rank,
        found: DamagedCheckpoint,
    ) -> Result<(), ControlError> {
        let now = self.clock.now();
        let resume = self.jobs.get(id).and_then(|entry| entry.resume.clone());
        let Some(mut manifest) = resume.filter(|manifest| manifest.step == found.step) else {
            let refused = format!(
                "{id} does not resume from step {}: it was told already",
                found.step
            );
            return Err(ControlError::Refused(refused));
        };
        let damage = CheckpointDamage {
            file: tame(&found.file),
            detail: tame(&found.detail),
            generation: generation.0,
            found_at: Some(from_unix_ms(now.unix_ms)),
        };
        let before = Some(manifest.clone());
        let left = self.checkpoint_before(id, manifest.step).await?;
        let event = Event::Damaged {
            generation,
            rank,
            message: format!(
                "the checkpoint of step {} is damaged: {}",
                manifest.step, damage.detail
            ),
            left: left.as_ref().map(|manifest| manifest.step),
        };
        tracing::warn!(job = %id, step = manifest.step, directory = manifest.directory, file = damage.file,
            detail = damage.detail, going_back_to = ?left.as_ref().map(|manifest| manifest.step), "checkpoint is damaged");
        manifest.damage = Some(damage);
        let transaction = Transaction::default()
            .delete(keys::checkpoint(id, manifest.step))
            .put(
                keys::damaged_checkpoint(id, manifest.step, manifest.generation),
                manifest.encode_to_vec(),
            );
        if let Some(entry) = self.jobs.get_mut(id) {
            entry.resume = left;
        }
        let applied = self.apply(id, &event, transaction).await;
        let Some(entry) = self.jobs.get_mut(id) else {
            return applied;
        };
        if applied.is_err() {
            entry.resume = before;
            return applied;
        }
        measure::damaged(id);
        measure::checkpoint_failed(id, measure::RESTORE, 1);
        entry.history += 1;
        let event = watch_job_response::Event::Checkpoint(manifest);
        entry.watchers.publish(from_unix_ms(now.unix_ms), &event);
        Ok(())
    }

    /// The newest committed checkpoint before a step.
    async fn checkpoint_before(
        &self,
        id: &JobId,
        step: u64,
    ) -> Result<Option<CheckpointManifest>, ControlError> {
        let records = self.list_all(&keys::checkpoints(id)).await?;
        let before = keys::checkpoint(id, step);
        let newest = records.iter().rev().find(|record| record.key < before);
        let manifest = newest.map(|record| CheckpointManifest::decode(record.value.as_slice()));
        manifest.transpose().map_err(|error| {
            ControlError::Unavailable(format!("checkpoints of {id} cannot be read: {error}"))
        })
    }

    /// Takes one rank's parts, and commits the checkpoint when they are the last.
    pub(super) async fn commit_checkpoint(
        &mut self,
        rank: &RankId,
        request: &CommitCheckpointRequest,
    ) -> Result<bool, ControlError> {
        let now = self.clock.now();
        let entry = self.fenced(rank)?;
        let id = entry.job.id.clone();
        match entry.job.checkpoint_step {
            // Repeated after its answer was lost, or written again by a generation that resumed from it.
            Some(newest) if request.step == newest => {
                if rank.rank == 0 {
                    self.tell_of_newest(&id).await?;
                }
                return Ok(true);
            }
            Some(newest) if request.step < newest => {
                let refused = format!(
                    "step {} is older than the committed checkpoint of step {newest}",
                    request.step
                );
                return Err(ControlError::Refused(refused));
            }
            _ => {}
        }
        let world_size = entry.job.ranks.len() as u32;
        let Some(mut manifest) = entry.prepared.add(rank, request, world_size)? else {
            let done = |peer: &u32| entry.job.ranks[*peer as usize].done;
            return match entry.prepared.missing(request.step, world_size).find(done) {
                None => Ok(false),
                Some(peer) => Err(ControlError::Refused(format!(
                    "step {} stays without the parts of rank {peer}, which is at its end",
                    request.step
                ))),
            };
        };
        let persist_seconds = entry.prepared.persist_seconds(request.step);
        let keep = entry.job.spec.checkpoint.kept() as usize;
        manifest.committed_at = Some(from_unix_ms(now.unix_ms));
        let retention = self.retention(&id, keep, &manifest).await?;
        if planted(Bug::ExpireBeforeCommit) {
            let too_early = CheckpointCommitted {
                manifest: Some(manifest.clone()),
                expired_directories: retention.expired.clone(),
                kept_directories: retention.kept.clone(),
            };
            self.committed(&id, manifest.clone(), too_early, now);
        }
        let mut transaction =
            Transaction::default().put(keys::checkpoint(&id, manifest.step), manifest.encode_to_vec());
        transaction.writes.extend(retention.deletions);
        // Known before the effects of the event run: a drained job is relaunched from this checkpoint.
        let before = self
            .jobs
            .get_mut(&id)
            .and_then(|entry| entry.resume.replace(manifest.clone()));
        let event = Event::Committed {
            generation: Generation(rank.generation),
            step: manifest.step,
        };
        if let Err(error) = self.apply(&id, &event, transaction).await {
            if let Some(entry) = self.jobs.get_mut(&id) {
                entry.resume = before;
            }
            if matches!(error, ControlError::Unavailable(_)) {
                measure::checkpoint_failed(&id, measure::COMMIT, 1);
            }
            return Err(error);
        }
        if let Some(seconds) = persist_seconds {
            measure::persisted(&id, seconds);
        }
        let committed = CheckpointCommitted {
            manifest: Some(manifest.clone()),
            expired_directories: retention.expired,
            kept_directories: retention.kept,
        };
        self.committed(&id, manifest, committed, now);
        Ok(true)
    }

    /// Tells rank 0 of the newest checkpoint again: a coordinator may have died between the commit and the word of it.
    async fn tell_of_newest(&mut self, id: &JobId) -> Result<(), ControlError> {
        let mut records = self.list_all(&keys::checkpoints(id)).await?;
        records.extend(self.list_all(&keys::damaged_checkpoints(id)).await?);
        let kept: Result<Vec<String>, _> = records.iter().map(directory).collect();
        let newest = self.jobs.get(id).and_then(|entry| entry.resume.clone());
        let committed = CheckpointCommitted {
            manifest: newest,
            expired_directories: Vec::new(),
            // One that cannot be read would have no place on the list: without a list, nothing is swept.
            kept_directories: kept.unwrap_or_default(),
        };
        self.tell_of_checkpoint(id, committed);
        Ok(())
    }

    fn tell_of_checkpoint(&mut self, id: &JobId, committed: CheckpointCommitted) {
        let command = report_response::Command::CheckpointCommitted(committed);
        self.tell_rank_0(
            id,
            ReportResponse {
                command: Some(command),
            },
        );
    }

    /// What is kept beside the newest checkpoint, and what goes. Damaged ones are kept and do not count.
    async fn retention(
        &self,
        id: &JobId,
        keep: usize,
        newest: &CheckpointManifest,
    ) -> Result<Retention, ControlError> {
        let old = self.list_all(&keys::checkpoints(id)).await?;
        let surplus = (old.len() + 1).saturating_sub(keep.max(1));
        let mut retention = Retention {
            kept: vec![newest.directory.clone()],
            ..Retention::default()
        };
        let damaged = self.list_all(&keys::damaged_checkpoints(id)).await?;
        for record in old.iter().skip(surplus).chain(&damaged) {
            // One that cannot be read would have no place on a list of what is kept: without a list, nothing is swept.
            match directory(record) {
                Ok(directory) => retention.kept.push(directory),
                Err(error) => {
                    return Err(ControlError::Unavailable(format!(
                        "record {}: {error}",
                        record.key
                    )));
                }
            }
        }
        for record in old.into_iter().take(surplus) {
            match directory(&record) {
                Ok(directory) if !retention.kept.contains(&directory) => retention.expired.push(directory),
                Ok(_) => {}
                Err(error) => tracing::warn!(key = record.key, %error, "expired checkpoint cannot be read"),
            }
            retention.deletions.push(Write::Delete(record.key));
        }
        Ok(retention)
    }

    fn committed(
        &mut self,
        id: &JobId,
        manifest: CheckpointManifest,
        committed: CheckpointCommitted,
        now: job::Now,
    ) {
        tracing::info!(job = %id, step = manifest.step, directory = manifest.directory, "checkpoint committed");
        let Some(entry) = self.jobs.get_mut(id) else {
            return;
        };
        entry.prepared.committed(manifest.step);
        measure::checkpointed(id, &manifest, now);
        entry.history += 1;
        let event = watch_job_response::Event::Checkpoint(manifest);
        entry.watchers.publish(from_unix_ms(now.unix_ms), &event);
        self.tell_of_checkpoint(id, committed);
    }
}

/// Where the checkpoint of a record lies.
fn directory(record: &crate::store::Entry) -> Result<String, prost::DecodeError> {
    CheckpointManifest::decode(record.value.as_slice()).map(|manifest| manifest.directory)
}

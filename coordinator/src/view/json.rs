//! Messages as JSON for programs. Pure. The keys are a contract: they are added to, never renamed.

use super::words::{checkpoint_url, job_state, node_state, timestamp};
use arcface_proto::v1;
use serde_json::{Map, Value, json};

/// A job with its evaluations, as `job ID` prints it.
pub fn job(job: &v1::Job, evaluations: &[v1::Evaluation]) -> Value {
    let mut value = job_summary(job);
    value["evaluations"] = evaluations.iter().map(evaluation).collect();
    value
}

/// A job as `jobs` lists it; `evaluations` stays an empty list.
pub fn job_summary(job: &v1::Job) -> Value {
    let mut value = job_row(job);
    value["evaluations"] = json!([]);
    value["recoveries"] = job.recoveries.iter().map(recovery).collect();
    value["stragglers"] = job.stragglers.iter().map(straggler).collect();
    value["spec"] = json!(job.spec.as_ref().and_then(|s| serde_json::to_value(s).ok()));
    value
}

/// A job without its history and its file: what a long list of jobs has room for.
pub fn job_row(job: &v1::Job) -> Value {
    let spec = job.spec.as_ref();
    let section = spec.and_then(|s| s.job.as_ref());
    json!({
        "id": job.id,
        "name": section.and_then(|j| j.name.as_ref()),
        "state": job_state(job.state()),
        "reason": job.reason,
        "generation": job.generation,
        "world_size": job.world_size,
        "world_size_wanted": section.and_then(|j| j.world_size),
        "step": job.step,
        "total_steps": job.total_steps,
        "epoch": job.epoch,
        "loss": job.loss,
        "learning_rate": job.learning_rate,
        "samples_per_second": job.samples_per_second,
        "eta_seconds": eta_seconds(job),
        "checkpoint_step": job.checkpoint_step,
        "submitted_at": job.submitted_at.as_ref().map(timestamp),
        "started_at": job.started_at.as_ref().map(timestamp),
        "ended_at": job.ended_at.as_ref().map(timestamp),
        "output": spec.and_then(|s| s.output.as_ref()),
    })
}

/// Seconds to the end at the speed of the last log interval; `None` for a job that does not train now.
fn eta_seconds(job: &v1::Job) -> Option<f64> {
    let spec = job.spec.as_ref()?;
    // The global batch stays as it is when the world shrinks or grows.
    let batch = u64::from(spec.train.as_ref()?.batch_size?) * u64::from(spec.job.as_ref()?.world_size?);
    let speed = job.samples_per_second.filter(|speed| *speed > 0.0)?;
    let left = job.total_steps.checked_sub(job.step)? as f64 * batch as f64 / speed;
    (job.state() == v1::JobState::Running && job.total_steps > 0).then_some(left)
}

/// Totals of the cluster.
pub fn cluster(cluster: &v1::GetClusterResponse) -> Value {
    json!({
        "version": cluster.version,
        "epoch": cluster.epoch,
        "nodes_healthy": cluster.nodes_healthy,
        "nodes_other": cluster.nodes_other,
        "slots_total": cluster.slots_total,
        "slots_used": cluster.slots_used,
        "jobs_queued": cluster.jobs_queued,
        "jobs_active": cluster.jobs_active,
        "serving_since": cluster.serving_since.as_ref().map(timestamp),
    })
}

/// One recovery.
pub fn recovery(recovery: &v1::Recovery) -> Value {
    json!({
        "reason": recovery.reason,
        "kind": recovery.kind,
        "generation": recovery.from_generation,
        "detected_s": recovery.detected_s,
        "resumed_step": recovery.resumed_step,
        "from_memory": recovery.from_memory,
        "lost_steps": recovery.lost_steps,
        "total_s": recovery.total_s,
        "detected_at": recovery.detected_at.as_ref().map(timestamp),
    })
}

/// One rank that holds up the others.
pub fn straggler(straggler: &v1::Straggler) -> Value {
    json!({
        "rank": straggler.rank,
        "node": straggler.node,
        "cause": straggler.cause,
        "ratio": straggler.ratio,
    })
}

/// One evaluation.
pub fn evaluation(evaluation: &v1::Evaluation) -> Value {
    // Null where a benchmark does not have it.
    let of_set = |value: f64| evaluation.ijb.is_none().then_some(value);
    let ijb = evaluation.ijb.as_ref().map(|ijb| {
        json!({
            "images": ijb.images,
            "templates": ijb.templates,
            "auc": ijb.auc,
            "rank": sorted(&ijb.rank),
            "dir_at_far": sorted(&ijb.dir_at_far),
        })
    });
    json!({
        "dataset": evaluation.dataset,
        "step": evaluation.step,
        "pairs": evaluation.pairs,
        "accuracy": of_set(evaluation.accuracy),
        "accuracy_std": of_set(evaluation.accuracy_std),
        "xnorm": of_set(evaluation.xnorm),
        "tar_at_far": sorted(&evaluation.tar_at_far),
        "ijb": ijb,
        "seconds": evaluation.seconds,
        "generation": evaluation.generation,
        "at": evaluation.at.as_ref().map(timestamp),
    })
}

/// One committed checkpoint.
pub fn checkpoint(manifest: &v1::CheckpointManifest) -> Value {
    json!({
        "step": manifest.step,
        "epoch": manifest.epoch,
        "epoch_samples": manifest.epoch_samples,
        "generation": manifest.generation,
        "world_size": manifest.world_size,
        "num_classes": manifest.num_classes,
        "directory": manifest.directory,
        "bytes": manifest.parts.iter().map(|part| part.bytes).sum::<u64>(),
        "committed_at": manifest.committed_at.as_ref().map(timestamp),
        "damage": manifest.damage.as_ref().map(|damage| json!({
            "file": damage.file,
            "detail": damage.detail,
            "generation": damage.generation,
            "found_at": damage.found_at.as_ref().map(timestamp),
        })),
        "parts": manifest.parts.iter().map(|part| json!({
            "file": part.file,
            "bytes": part.bytes,
            "blake3": part.blake3,
            "class_lo": part.class_lo,
            "class_hi": part.class_hi,
        })).collect::<Vec<_>>(),
    })
}

/// The same with its URL, if the job has a `location` for checkpoints.
pub fn listed_checkpoint(manifest: &v1::CheckpointManifest, location: Option<&str>) -> Value {
    let mut value = checkpoint(manifest);
    value["url"] = location.map(|location| checkpoint_url(location, manifest)).into();
    value
}

/// One node.
pub fn node(node: &v1::Node) -> Value {
    let rank = |rank: &v1::NodeRank| json!({"job": rank.job_id, "rank": rank.rank, "pid": rank.pid, "generation": rank.generation});
    json!({
        "id": node.id,
        "address": node.address,
        "state": node_state(node.state()),
        "reason": node.reason,
        "slots": node.slots,
        "device": node.device,
        "version": node.version,
        "ranks": node.ranks.iter().map(rank).collect::<Vec<_>>(),
        "joined_at": node.joined_at.as_ref().map(timestamp),
        "heartbeat_age_ms": node.heartbeat_age_ms,
    })
}

/// One event of `watch`: `{at, event, EVENT: {..}}`. `None` for an event that this version does not know.
pub fn event(response: &v1::WatchJobResponse) -> Option<Value> {
    use v1::watch_job_response::Event;
    let (name, body) = match response.event.as_ref()? {
        Event::Job(job) => ("job", job_summary(job)),
        Event::Metrics(metrics) => ("metrics", step_metrics(metrics)),
        Event::Evaluation(done) => ("evaluation", evaluation(done)),
        Event::Checkpoint(manifest) => ("checkpoint", checkpoint(manifest)),
        Event::Recovery(done) => ("recovery", recovery(done)),
        Event::Straggler(found) => {
            let mut body = straggler(found);
            body["over"] = json!(found.over);
            ("straggler", body)
        }
        Event::Missed(count) => ("missed", json!(count)),
    };
    let mut value = Map::new();
    value.insert("at".into(), json!(response.at.as_ref().map(timestamp)));
    value.insert("event".into(), json!(name));
    value.insert(name.into(), body);
    Some(Value::Object(value))
}

fn step_metrics(metrics: &v1::StepMetrics) -> Value {
    json!({
        "step": metrics.step,
        "total_steps": metrics.total_steps,
        "epoch": metrics.epoch,
        "loss": metrics.loss,
        "learning_rate": metrics.learning_rate,
        "samples_per_second": metrics.samples_per_second,
        "grad_norm": metrics.grad_norm,
        "eta_seconds": metrics.eta_seconds,
        "step_seconds": metrics.step_seconds,
        "phase_seconds": sorted(&metrics.phase_seconds),
        "loss_scale": metrics.loss_scale,
        "skipped_steps": metrics.skipped_steps,
        "checkpoint_stall_seconds": metrics.checkpoint_stall_seconds,
        "checkpoint_suggested_seconds": metrics.checkpoint_suggested_seconds,
    })
}

/// A map in a fixed order: the hash map of the wire has none.
fn sorted(map: &std::collections::HashMap<String, f64>) -> Value {
    let mut entries: Vec<_> = map.iter().collect();
    entries.sort_by_key(|(key, _)| *key);
    Value::Object(
        entries
            .into_iter()
            .map(|(key, value)| (key.clone(), json!(value)))
            .collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_left_is_that_of_the_global_batch_at_the_present_speed() {
        let mut job = v1::Job {
            spec: Some(v1::JobSpec {
                job: Some(v1::JobSection {
                    world_size: Some(4),
                    ..Default::default()
                }),
                train: Some(v1::TrainSection {
                    batch_size: Some(8),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            state: v1::JobState::Running.into(),
            // Shrunk: the batch is still 4 times 8.
            world_size: 2,
            step: 900,
            total_steps: 1000,
            samples_per_second: Some(64.0),
            ..Default::default()
        };
        assert_eq!(job_row(&job)["eta_seconds"], 50.0);
        job.set_state(v1::JobState::Recovering);
        assert!(job_row(&job)["eta_seconds"].is_null());
        assert!(job_row(&v1::Job::default())["eta_seconds"].is_null());
    }
}

//! Messages as text for people: tables with a header and two spaces between columns. Pure.

use super::output::clean;
use super::words::{self, bytes, checkpoint_url, has_ended, job_state, node_state, timestamp};
use arcface_proto::v1;
use std::fmt::Write;

/// Columns under a header, numbers to the right. The last column is not padded.
pub(super) struct Table {
    header: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

#[derive(Clone, Copy, PartialEq)]
pub(super) enum Align {
    Left,
    Right,
}
use Align::{Left, Right};

impl Table {
    pub(super) fn new(header: &[(&'static str, Align)]) -> Self {
        Self {
            header: header.to_vec(),
            rows: Vec::new(),
        }
    }

    pub(super) fn row<const N: usize>(&mut self, cells: [String; N]) {
        debug_assert_eq!(N, self.header.len());
        self.rows.push(cells.map(|cell| clean(&cell)).into());
    }

    pub(super) fn text(&self) -> String {
        let names = self
            .header
            .iter()
            .map(|(name, _)| (*name).to_owned())
            .collect::<Vec<_>>();
        let lines = || std::iter::once(&names).chain(&self.rows);
        let width = |column: usize| {
            lines()
                .map(|line| line[column].chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<_> = (0..names.len()).map(width).collect();
        let mut text = String::new();
        for cells in lines() {
            let mut line = String::new();
            for ((cell, width), (_, align)) in cells.iter().zip(&widths).zip(&self.header) {
                let padding = " ".repeat(width - cell.chars().count());
                match align {
                    Left => line.extend([cell, padding.as_str(), "  "]),
                    Right => line.extend([padding.as_str(), cell, "  "]),
                }
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

fn dash(text: String) -> String {
    if text.is_empty() { "-".into() } else { text }
}

fn or_dash<T>(value: Option<T>, show: impl Fn(T) -> String) -> String {
    dash(value.map(show).unwrap_or_default())
}

fn job_name(job: &v1::Job) -> String {
    let name = job
        .spec
        .as_ref()
        .and_then(|s| s.job.as_ref())
        .and_then(|j| j.name.clone());
    clean(&name.unwrap_or_default())
}

fn progress(job: &v1::Job) -> String {
    if job.total_steps == 0 {
        dash(String::new())
    } else {
        format!("{}/{}", job.step, job.total_steps)
    }
}

/// The list of jobs.
pub fn jobs(jobs: &[v1::Job]) -> String {
    let mut table = Table::new(&[
        ("ID", Left),
        ("NAME", Left),
        ("STATE", Left),
        ("RANKS", Right),
        ("STEP", Right),
        ("LOSS", Right),
        ("SAMPLES/S", Right),
        ("SUBMITTED", Left),
        ("REASON", Left),
    ]);
    for job in jobs {
        let trains = !has_ended(job.state());
        table.row([
            job.id.clone(),
            dash(job_name(job)),
            job_state(job.state()).into(),
            job.world_size.to_string(),
            progress(job),
            or_dash(job.loss, |loss| format!("{loss:.3}")),
            or_dash(job.samples_per_second.filter(|_| trains), words::speed),
            or_dash(job.submitted_at.as_ref(), timestamp),
            job.reason.clone(),
        ]);
    }
    table.text()
}

/// One job in full.
pub fn job(job: &v1::Job, evaluations: &[v1::Evaluation]) -> String {
    let spec = job.spec.clone().unwrap_or_default();
    let wanted = spec.job.as_ref().and_then(|j| j.world_size).unwrap_or(0);
    let epochs = spec.train.as_ref().and_then(|t| t.num_epoch).unwrap_or(0);
    let mut lines: Vec<(&str, String)> = vec![("job", job.id.clone()), ("name", job_name(job))];
    lines.push(("state", words::with_reason(job_state(job.state()), &job.reason)));
    if job.generation > 0 {
        lines.push((
            "ranks",
            format!("{} of {wanted}, generation {}", job.world_size, job.generation),
        ));
    } else {
        lines.push(("ranks", format!("{wanted} wanted")));
    }
    if job.total_steps > 0 {
        let percent = 100.0 * job.step as f64 / job.total_steps as f64;
        let epoch = (u64::from(job.epoch) + 1).min(u64::from(epochs).max(1));
        lines.push((
            "progress",
            format!(
                "step {} of {} ({percent:.1} %), epoch {epoch} of {epochs}",
                job.step, job.total_steps
            ),
        ));
    }
    if let Some(loss) = job.loss {
        let rate = job
            .learning_rate
            .map_or_else(String::new, |lr| format!(", learning rate {}", words::rate(lr)));
        lines.push(("loss", format!("{loss:.4}{rate}")));
    }
    if let Some(speed) = job.samples_per_second {
        lines.push(("speed", format!("{} samples/s", words::speed(speed))));
    }
    if let Some(step) = job.checkpoint_step {
        lines.push(("checkpoint", format!("step {step}")));
    }
    if let Some(network) = spec.model.as_ref().and_then(|m| m.network.as_ref()) {
        lines.push(("network", network.clone()));
    }
    if let Some(data) = spec.data.as_ref().and_then(|d| d.rec.as_ref()) {
        lines.push(("data", data.clone()));
    }
    lines.push(("output", spec.output.clone().unwrap_or_default()));
    for (name, time) in [
        ("submitted", &job.submitted_at),
        ("started", &job.started_at),
        ("ended", &job.ended_at),
    ] {
        if let Some(time) = time {
            lines.push((name, timestamp(time)));
        }
    }
    for straggler in &job.stragglers {
        lines.push(("straggler", words::straggler(straggler)));
    }
    let mut text = String::new();
    for (name, value) in lines {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{name:<11} {}", clean(&value));
    }
    if !evaluations.is_empty() {
        text.push_str("\nlast evaluations\n");
        let newest: Vec<_> = words::newest_of_each(evaluations).into_iter().cloned().collect();
        text.push_str(&self::evaluations(&newest));
    }
    if !job.recoveries.is_empty() {
        text.push_str("\nrecoveries\n");
        for recovery in &job.recoveries {
            let _ = writeln!(
                text,
                "generation {}  {}",
                recovery.from_generation,
                words::recovery(recovery)
            );
        }
    }
    text
}

/// Evaluations, one a line.
pub fn evaluations(evaluations: &[v1::Evaluation]) -> String {
    let mut table = Table::new(&[
        ("STEP", Right),
        ("SET", Left),
        ("PAIRS", Right),
        ("ACCURACY", Right),
        ("STD", Right),
        ("XNORM", Right),
        ("TAR@FAR", Left),
        ("SECONDS", Right),
    ]);
    for evaluation in evaluations {
        // A benchmark has none of these.
        let of_set = |value: f64, digits: usize| {
            or_dash(evaluation.ijb.is_none().then_some(value), |value| {
                format!("{value:.digits$}")
            })
        };
        table.row([
            evaluation.step.to_string(),
            evaluation.dataset.clone(),
            evaluation.pairs.to_string(),
            of_set(evaluation.accuracy, 4),
            of_set(evaluation.accuracy_std, 4),
            of_set(evaluation.xnorm, 2),
            or_dash(words::tightest(evaluation), |(far, tar)| {
                format!("{tar:.4} @ {far}")
            }),
            format!("{:.1}", evaluation.seconds),
        ]);
    }
    table.text()
}

/// Committed checkpoints, one a line; below them those that were set aside because they are damaged. `location` is that of
/// the job, if it has one.
pub fn checkpoints(checkpoints: &[v1::CheckpointManifest], location: Option<&str>) -> String {
    let place = |manifest: &v1::CheckpointManifest| match location {
        Some(location) => checkpoint_url(location, manifest),
        None => manifest.directory.clone(),
    };
    let mut table = Table::new(&[
        ("STEP", Right),
        ("EPOCH", Right),
        ("GENERATION", Right),
        ("RANKS", Right),
        ("FILES", Right),
        ("SIZE", Right),
        ("COMMITTED", Left),
        ("DIRECTORY", Left),
    ]);
    for manifest in checkpoints.iter().filter(|manifest| manifest.damage.is_none()) {
        table.row([
            manifest.step.to_string(),
            manifest.epoch.to_string(),
            manifest.generation.to_string(),
            manifest.world_size.to_string(),
            manifest.parts.len().to_string(),
            bytes(
                manifest
                    .parts
                    .iter()
                    .fold(0u64, |sum, part| sum.saturating_add(part.bytes)),
            ),
            or_dash(manifest.committed_at.as_ref(), timestamp),
            place(manifest),
        ]);
    }
    let mut text = table.text();
    let damaged: Vec<_> = checkpoints
        .iter()
        .filter_map(|manifest| Some((manifest, manifest.damage.as_ref()?)))
        .collect();
    if !damaged.is_empty() {
        text.push_str("\ndamaged, not used any more\n");
    }
    for (manifest, damage) in damaged {
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "step {}  {}  {} (found by generation {})",
            manifest.step,
            clean(&place(manifest)),
            clean(&damage.detail),
            damage.generation
        );
    }
    text
}

/// Nodes, one a line.
pub fn nodes(nodes: &[v1::Node]) -> String {
    let mut table = Table::new(&[
        ("ID", Left),
        ("ADDRESS", Left),
        ("STATE", Left),
        ("DEVICE", Left),
        ("SLOTS", Right),
        ("RANKS", Left),
        ("HEARTBEAT", Right),
        ("REASON", Left),
    ]);
    for node in nodes {
        let ranks = node
            .ranks
            .iter()
            .map(|rank| format!("{}/{}", rank.job_id, rank.rank))
            .collect::<Vec<_>>();
        table.row([
            node.id.clone(),
            node.address.clone(),
            node_state(node.state()).into(),
            dash(node.device.clone()),
            format!("{}/{}", node.ranks.len(), node.slots),
            dash(ranks.join(" ")),
            format!("{:.1} s", node.heartbeat_age_ms as f64 / 1000.0),
            node.reason.clone(),
        ]);
    }
    table.text()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::json;
    use arcface_proto::timestamp::from_unix_ms;
    use serde_json::json as value;

    fn a_job() -> v1::Job {
        v1::Job {
            id: "job-0123456789ab".into(),
            spec: Some(v1::JobSpec {
                output: Some("work_dirs/demo".into()),
                job: Some(v1::JobSection {
                    name: Some("demo".into()),
                    world_size: Some(2),
                    ..Default::default()
                }),
                model: Some(v1::ModelSection {
                    network: Some("tiny".into()),
                    ..Default::default()
                }),
                data: Some(v1::DataSection {
                    rec: Some("/faces".into()),
                    ..Default::default()
                }),
                train: Some(v1::TrainSection {
                    num_epoch: Some(10),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            state: v1::JobState::Running.into(),
            generation: 2,
            world_size: 2,
            step: 120,
            total_steps: 600,
            epoch: 1,
            loss: Some(12.34567),
            learning_rate: Some(0.095),
            samples_per_second: Some(185.23),
            recoveries: vec![v1::Recovery {
                reason: "rank 1 on node-2 was killed by signal 9".into(),
                kind: "crash".into(),
                from_generation: 1,
                detected_s: 0.84,
                resumed_step: Some(100),
                lost_steps: Some(12),
                from_memory: false,
                total_s: Some(8.31),
                detected_at: Some(from_unix_ms(1_795_000_100_000)),
            }],
            submitted_at: Some(from_unix_ms(1_795_000_000_000)),
            started_at: Some(from_unix_ms(1_795_000_002_000)),
            checkpoint_step: Some(100),
            stragglers: vec![v1::Straggler {
                rank: 1,
                node: "node-2".into(),
                cause: "compute".into(),
                ratio: 2.34,
                over: false,
            }],
            ..Default::default()
        }
    }

    fn an_evaluation() -> v1::Evaluation {
        v1::Evaluation {
            dataset: "synthetic".into(),
            step: 100,
            generation: 1,
            pairs: 600,
            accuracy: 0.9371,
            accuracy_std: 0.01234,
            xnorm: 11.5,
            tar_at_far: [("1e-3".to_owned(), 0.75), ("1e-2".to_owned(), 0.9)].into(),
            seconds: 2.25,
            at: Some(from_unix_ms(1_795_000_050_000)),
            ijb: None,
        }
    }

    #[test]
    fn a_job_in_full() {
        assert_eq!(
            job(&a_job(), &[an_evaluation()]),
            "\
job         job-0123456789ab
name        demo
state       running
ranks       2 of 2, generation 2
progress    step 120 of 600 (20.0 %), epoch 2 of 10
loss        12.3457, learning rate 0.095
speed       185 samples/s
checkpoint  step 100
network     tiny
data        /faces
output      work_dirs/demo
submitted   2026-11-18T11:06:40Z
started     2026-11-18T11:06:42Z
straggler   rank 1 on node-2 holds up the others: 2.3 times their own time a step, by compute

last evaluations
STEP  SET        PAIRS  ACCURACY     STD  XNORM  TAR@FAR        SECONDS
 100  synthetic    600    0.9371  0.0123  11.50  0.7500 @ 1e-3      2.2

recoveries
generation 1  rank 1 on node-2 was killed by signal 9: detected after 0.8 s, resumed from step 100, 12 steps lost, back after 8.3 s
"
        );
    }

    #[test]
    fn jobs_in_a_table() {
        let queued = v1::Job {
            id: "job-ffffffffffff".into(),
            state: v1::JobState::Queued.into(),
            reason: "wants 4 slots,\n2 are free".into(),
            submitted_at: Some(from_unix_ms(1_795_000_000_000)),
            ..Default::default()
        };
        assert_eq!(
            jobs(&[a_job(), queued]),
            "\
ID                NAME  STATE    RANKS     STEP    LOSS  SAMPLES/S  SUBMITTED             REASON
job-0123456789ab  demo  running      2  120/600  12.346        185  2026-11-18T11:06:40Z
job-ffffffffffff  -     queued       0        -       -          -  2026-11-18T11:06:40Z  wants 4 slots, 2 are free
"
        );
    }

    #[test]
    fn nodes_in_a_table() {
        let node = v1::Node {
            id: "node-1".into(),
            address: "127.0.0.1".into(),
            state: v1::NodeState::Healthy.into(),
            slots: 2,
            device: "cpu".into(),
            ranks: vec![v1::NodeRank {
                job_id: "job-0123456789ab".into(),
                generation: 1,
                rank: 0,
                pid: 42,
            }],
            heartbeat_age_ms: 240,
            ..Default::default()
        };
        assert_eq!(
            nodes(std::slice::from_ref(&node)),
            "\
ID      ADDRESS    STATE    DEVICE  SLOTS  RANKS               HEARTBEAT  REASON
node-1  127.0.0.1  healthy  cpu       1/2  job-0123456789ab/0      0.2 s
"
        );
        let printed = json::node(&node);
        assert_eq!(printed["state"], "healthy");
        assert_eq!(
            printed["ranks"],
            value!([{"job": "job-0123456789ab", "rank": 0, "pid": 42, "generation": 1}])
        );
    }

    #[test]
    fn checkpoints_in_a_table() {
        let part = |file: &str, bytes| v1::CheckpointPart {
            file: file.into(),
            bytes,
            ..Default::default()
        };
        let manifest = v1::CheckpointManifest {
            step: 100,
            epoch: 1,
            generation: 1,
            world_size: 2,
            directory: "checkpoints/100".into(),
            parts: vec![
                part("backbone.safetensors", 25_690_112),
                part("head-0-50.safetensors", 1024),
            ],
            committed_at: Some(from_unix_ms(1_795_000_000_000)),
            ..Default::default()
        };
        let table = "\
STEP  EPOCH  GENERATION  RANKS  FILES      SIZE  COMMITTED             DIRECTORY
 100      1           1      2      2  24.5 MiB  2026-11-18T11:06:40Z  checkpoints/100
";
        assert_eq!(checkpoints(std::slice::from_ref(&manifest), None), table);
        let elsewhere = checkpoints(std::slice::from_ref(&manifest), Some("s3://faces/r50/"));
        assert!(
            elsewhere.ends_with("Z  s3://faces/r50/checkpoints/100\n"),
            "{elsewhere}"
        );
        let damaged = v1::CheckpointManifest {
            step: 120,
            directory: "checkpoints/120".into(),
            damage: Some(v1::CheckpointDamage {
                file: "backbone.safetensors".into(),
                detail: "backbone.safetensors: 7 bytes, but 9 were committed".into(),
                generation: 2,
                found_at: None,
            }),
            ..manifest.clone()
        };
        assert_eq!(
            checkpoints(&[damaged, manifest], None),
            format!(
                "{table}
damaged, not used any more
step 120  checkpoints/120  backbone.safetensors: 7 bytes, but 9 were committed (found by generation 2)
"
            )
        );
    }

    #[test]
    fn json_has_the_keys_that_programs_read() {
        let printed = json::job(&a_job(), &[an_evaluation()]);
        assert_eq!(printed["state"], "running");
        for key in [
            "id",
            "generation",
            "world_size",
            "step",
            "epoch",
            "loss",
            "samples_per_second",
        ] {
            assert!(!printed[key].is_null(), "{key}");
        }
        assert_eq!(printed["recoveries"][0]["lost_steps"], 12);
        assert_eq!(printed["recoveries"][0]["detected_s"], 0.84);
        assert_eq!(
            printed["stragglers"],
            serde_json::json!([{"rank": 1, "node": "node-2", "cause": "compute", "ratio": 2.34}])
        );
        assert_eq!(
            printed["evaluations"][0]["tar_at_far"],
            value!({"1e-2": 0.9, "1e-3": 0.75})
        );
        assert_eq!(printed["spec"]["model"]["network"], "tiny");
        let before_the_first_step = json::job(&v1::Job::default(), &[]);
        assert!(before_the_first_step["loss"].is_null());
        assert_eq!(before_the_first_step["evaluations"], value!([]));
    }
}

//! What the coordinator tells its operators: log lines on standard error, and the one list of metric names, kinds
//! and labels behind `/metrics`. Knows nothing of who records what, and opens no socket.

use arcface_proto::{
    buckets::{COLLECTIVE_SECONDS, DECODE_SECONDS},
    failure::{ExitCode, Failure},
};
use std::{fs::File, io::IsTerminal, sync::Mutex};
use tracing_subscriber::{EnvFilter, fmt::writer::BoxMakeWriter};

/// The commit that was built, where the build said so.
pub const COMMIT: &str = match option_env!("ARCFACE_COMMIT") {
    Some(commit) => commit,
    None => "unknown",
};

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people: one line an event.
    Text,
    /// For machines: one JSON object an event.
    Json,
}

impl LogFormat {
    /// Text on a terminal, JSON elsewhere: what is not read by a person is collected by a program.
    pub fn of_stderr() -> Self {
        if std::io::stderr().is_terminal() {
            Self::Text
        } else {
            Self::Json
        }
    }
}

/// What is logged when nothing else was asked for: state changes of our own, warnings of the libraries.
pub const DEFAULT_FILTER: &str = "info,h2=warn,hyper=warn,tonic=warn,tower=warn";

/// Where log lines go.
#[derive(Debug)]
pub enum LogSink {
    /// Standard error, coloured on a terminal unless `NO_COLOR` is set.
    Stderr,
    /// A file, opened by the caller.
    File(File),
}

/// Starts logging for the whole process. `filter` is in the language of `ARCFACE_LOG`: `info`,
/// `arcface_coordinator::control=debug,info`.
///
/// # Errors
/// If the filter is malformed or logging was already started.
pub fn start_logging(format: LogFormat, filter: &str, sink: LogSink) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(filter).map_err(|error| {
        Failure::new(ExitCode::Usage, format!("log filter {filter:?}: {error}"))
            .hint("ARCFACE_LOG=info, or ARCFACE_LOG=arcface_coordinator=debug,info")
    })?;
    let on_terminal = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let (colours, writer) = match sink {
        LogSink::Stderr => (on_terminal, BoxMakeWriter::new(std::io::stderr)),
        LogSink::File(file) => (false, BoxMakeWriter::new(Mutex::new(file))),
    };
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer);
    let started = match format {
        LogFormat::Json => builder
            .json()
            .flatten_event(true)
            .with_span_list(false)
            .try_init(),
        LogFormat::Text => builder.with_ansi(colours).with_target(false).try_init(),
    };
    started.map_err(|error| anyhow::anyhow!("start logging: {error}"))
}

/// What a metric's value does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MetricKind {
    /// Only grows; its name ends in `_total`.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Observations in the buckets given, in seconds.
    Histogram(&'static [f64]),
}

/// A metric as Prometheus sees it.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// Name; base units, after <https://prometheus.io/docs/practices/naming/>.
    pub name: &'static str,
    /// What its value does.
    pub kind: MetricKind,
    /// Labels. Never `job` or `instance`, which belong to the scrape; never free text.
    pub labels: &'static [&'static str],
    /// One sentence.
    pub help: &'static str,
}

/// From a cache hit to a slow disk: request handling.
const REQUEST_BUCKETS: &[f64] = &[
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
];
/// From a tiny network on one GPU to r200 on a CPU: one training step.
const STEP_BUCKETS: &[f64] = &[
    0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0,
];
/// From a restarted process to a replaced machine: recovery and rendezvous.
const RECOVERY_BUCKETS: &[f64] = &[
    0.5, 1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0,
];

/// From a small network on a local disk to hundreds of gigabytes in an object store.
const CHECKPOINT_BUCKETS: &[f64] = &[0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];

macro_rules! metrics {
    ($($constant:ident = $name:literal, $kind:expr, [$($label:literal),*], $help:literal;)+) => {
        $(#[doc = $help] pub const $constant: &str = $name;)+

        /// Every metric of the coordinator.
        pub const METRICS: &[Metric] = &[
            $(Metric { name: $name, kind: $kind, labels: &[$($label),*], help: $help }),+
        ];
    };
}

metrics! {
    BUILD_INFO =
        "arcface_build_info", MetricKind::Gauge, ["version", "commit"],
        "Always 1; the labels tell the version.";
    COORDINATOR_IS_LEADER =
        "arcface_coordinator_is_leader", MetricKind::Gauge, [],
        "1 while this process serves and owns the store.";
    COORDINATOR_NODES =
        "arcface_coordinator_nodes", MetricKind::Gauge, ["state"],
        "Nodes that have joined, by state.";
    COORDINATOR_SLOTS =
        "arcface_coordinator_slots", MetricKind::Gauge, ["use"],
        "Slots of healthy nodes: free or used.";
    HEARTBEAT_AGE_SECONDS =
        "arcface_coordinator_heartbeat_age_seconds", MetricKind::Gauge, ["node"],
        "Age of the newest heartbeat of a node, in seconds; a lost node is shown until it is forgotten, unless it was drained.";
    JOB_INFO =
        "arcface_job_info", MetricKind::Gauge, ["job_id", "name", "backbone", "head"],
        "Always 1; the labels tell what a job is called and what it trains.";
    JOB_STATE =
        "arcface_job_state", MetricKind::Gauge, ["job_id", "state"],
        "1 for the state that a job is in, 0 for the others.";
    JOB_WORLD_SIZE =
        "arcface_job_world_size", MetricKind::Gauge, ["job_id"],
        "Ranks of the newest generation of a job.";
    JOB_WORLD_SIZE_TARGET =
        "arcface_job_world_size_target", MetricKind::Gauge, ["job_id"],
        "Ranks that a job asked for.";
    JOB_TIME_SECONDS_TOTAL =
        "arcface_job_time_seconds_total", MetricKind::Counter, ["job_id", "kind"],
        "Seconds of a job by what they went into: productive, redone (steps that were lost), restart (starting, failing, stopping), checkpoint (holding up training), queued.";
    RENDEZVOUS_GENERATION =
        "arcface_rendezvous_generation", MetricKind::Gauge, ["job_id"],
        "Newest generation of a job.";
    RENDEZVOUS_DURATION_SECONDS =
        "arcface_rendezvous_duration_seconds", MetricKind::Histogram(RECOVERY_BUCKETS), ["job_id"],
        "Seconds from the launch of a generation until all its ranks had met.";
    TRAIN_STEPS_TOTAL =
        "arcface_train_steps_total", MetricKind::Counter, ["job_id"],
        "Steps that a job has finished, steps done again after a recovery counted again.";
    TRAIN_SAMPLES_TOTAL =
        "arcface_train_samples_total", MetricKind::Counter, ["job_id"],
        "Samples that a job has trained on.";
    TRAIN_SAMPLES_PER_SECOND =
        "arcface_train_samples_per_second", MetricKind::Gauge, ["job_id"],
        "Samples a second over all ranks, mean of the last log interval.";
    TRAIN_STEP_DURATION_SECONDS =
        "arcface_train_step_duration_seconds", MetricKind::Histogram(STEP_BUCKETS), ["job_id", "rank"],
        "Seconds that a training step takes.";
    TRAIN_PHASE_SECONDS_TOTAL =
        "arcface_train_phase_seconds_total", MetricKind::Counter, ["job_id", "rank", "phase"],
        "Seconds spent by phase: data_wait, forward, head, backward, comm, optimizer, checkpoint, eval.";
    TRAIN_LOSS =
        "arcface_train_loss", MetricKind::Gauge, ["job_id"],
        "Loss, mean of the last log interval.";
    TRAIN_LEARNING_RATE =
        "arcface_train_learning_rate", MetricKind::Gauge, ["job_id"],
        "Learning rate of the last step.";
    TRAIN_GRAD_NORM =
        "arcface_train_grad_norm", MetricKind::Gauge, ["job_id"],
        "Norm of the gradient of the backbone before clipping.";
    EMBEDDING_NORM =
        "arcface_embedding_norm", MetricKind::Gauge, ["job_id"],
        "Norm of embeddings, mean of the last log interval.";
    TRAIN_FLOPS_PER_SAMPLE =
        "arcface_train_flops_per_sample", MetricKind::Gauge, ["job_id"],
        "Floating-point operations of the backbone to train on one sample, three times those of a forward pass.";
    TRAIN_LOSS_SCALE =
        "arcface_train_loss_scale", MetricKind::Gauge, ["job_id"],
        "Loss scale of a job that trains in fp16.";
    TRAIN_NONFINITE_STEPS_TOTAL =
        "arcface_train_nonfinite_steps_total", MetricKind::Counter, ["job_id"],
        "Steps that were left out because loss or gradient were not finite, or that updated only the head.";
    TRAIN_ROLLBACKS_TOTAL =
        "arcface_train_rollbacks_total", MetricKind::Counter, ["job_id"],
        "Times that a job went back to a checkpoint to leave out a step.";
    TRAIN_PROGRESS_RATIO =
        "arcface_train_progress_ratio", MetricKind::Gauge, ["job_id"],
        "Share of the steps of a job that are done, 0 to 1.";
    TRAIN_ETA_SECONDS =
        "arcface_train_eta_seconds", MetricKind::Gauge, ["job_id"],
        "Seconds to the end of a job at its present speed.";
    STRAGGLER_RATIO =
        "arcface_train_straggler_ratio", MetricKind::Gauge, ["job_id", "rank"],
        "Own time a step of a rank that holds up the others, over their median, when it was found; 0 once it keeps up.";
    HEAD_CLASSES =
        "arcface_head_classes", MetricKind::Gauge, ["job_id"],
        "Classes of a job over all ranks.";
    HEAD_SHARD_ROWS =
        "arcface_head_shard_rows", MetricKind::Gauge, ["job_id", "rank"],
        "Classes in a rank's shard; 0 between generations.";
    HEAD_SAMPLED_ROWS =
        "arcface_head_sampled_rows", MetricKind::Gauge, ["job_id", "rank"],
        "Classes of a rank's shard in the softmax of the newest micro-batch.";
    HEAD_POSITIVE_ROWS =
        "arcface_head_positive_rows", MetricKind::Gauge, ["job_id", "rank"],
        "Classes of a rank's shard that have samples in the newest micro-batch.";
    HEAD_SAMPLE_RATIO =
        "arcface_head_sample_ratio", MetricKind::Gauge, ["job_id", "rank"],
        "Share of a rank's shard in the softmax of the newest micro-batch, 0 to 1.";
    HEAD_TARGET_COSINE =
        "arcface_head_target_cosine", MetricKind::Gauge, ["job_id"],
        "Cosine of samples with their own class, before the margin, mean since the report of a rank before.";
    WORKER_GPU_INFO =
        "arcface_worker_gpu_info", MetricKind::Gauge, ["job_id", "node", "rank", "gpu", "uuid"],
        "1 while a rank computes on that GPU, 0 afterwards; uuid joins with the UUID of dcgm-exporter.";
    GPU_MEMORY_ALLOCATED_BYTES =
        "arcface_gpu_memory_allocated_bytes", MetricKind::Gauge, ["job_id", "rank"],
        "Bytes of GPU memory that the tensors of a rank take; 0 between generations.";
    GPU_MEMORY_RESERVED_BYTES =
        "arcface_gpu_memory_reserved_bytes", MetricKind::Gauge, ["job_id", "rank"],
        "Bytes of GPU memory that a rank holds for tensors, those that are free included; 0 between generations.";
    GPU_MEMORY_PEAK_BYTES =
        "arcface_gpu_memory_peak_bytes", MetricKind::Gauge, ["job_id", "rank"],
        "The most bytes of GPU memory that the tensors of a rank have taken at once; 0 between generations.";
    DATA_SAMPLES_TOTAL =
        "arcface_data_samples_total", MetricKind::Counter, ["job_id", "rank"],
        "Images that a rank has loaded, some of them ahead of training.";
    DATA_CACHED_SAMPLES_TOTAL =
        "arcface_data_cached_samples_total", MetricKind::Counter, ["job_id", "rank"],
        "Of these, images that data.cache had: they were not read and decoded again.";
    DATA_BYTES_TOTAL =
        "arcface_data_bytes_total", MetricKind::Counter, ["job_id", "rank"],
        "Bytes of the images that a rank has read, as they lie in the data set.";
    DATA_ERRORS_TOTAL =
        "arcface_data_errors_total", MetricKind::Counter, ["job_id", "rank"],
        "Records that a rank could not read.";
    DATA_QUEUE_DEPTH =
        "arcface_data_queue_depth", MetricKind::Gauge, ["job_id", "rank"],
        "Micro-batches that lie ready on a rank, 4 at most.";
    DATA_DECODE_SECONDS =
        "arcface_data_decode_seconds", MetricKind::Histogram(DECODE_SECONDS), ["job_id"],
        "Seconds that a loader thread takes to read and decode an image.";
    COMM_COLLECTIVE_SECONDS =
        "arcface_comm_collective_seconds", MetricKind::Histogram(COLLECTIVE_SECONDS), ["job_id", "op"],
        "Seconds that a collective operation takes on a rank, waiting for the slowest rank included.";
    COMM_BYTES_TOTAL =
        "arcface_comm_bytes_total", MetricKind::Counter, ["job_id", "op"],
        "Bytes of the tensors that ranks gave to collective operations.";
    WORKER_FAILURES_TOTAL =
        "arcface_worker_failures_total", MetricKind::Counter, ["job_id", "reason"],
        "Failures that ended a generation, by kind.";
    WORKER_RESTARTS_TOTAL =
        "arcface_worker_restarts_total", MetricKind::Counter, ["job_id"],
        "Generations that were opened after a failure.";
    RECOVERY_DURATION_SECONDS =
        "arcface_recovery_duration_seconds", MetricKind::Histogram(RECOVERY_BUCKETS), ["job_id", "stage"],
        "Seconds by stage: detect (last sign of life until the failure was seen), rendezvous (launch until the ranks had met), load (until they could train), total (last sign of life until the next new step).";
    CHECKPOINT_BYTES =
        "arcface_checkpoint_bytes", MetricKind::Gauge, ["job_id"],
        "Bytes of the newest committed checkpoint.";
    CHECKPOINT_LAST_COMMITTED_TIMESTAMP_SECONDS =
        "arcface_checkpoint_last_committed_timestamp_seconds", MetricKind::Gauge, ["job_id"],
        "When the newest checkpoint was committed, in seconds since the Unix epoch.";
    CHECKPOINT_STALL_SECONDS =
        "arcface_checkpoint_stall_seconds", MetricKind::Gauge, ["job_id"],
        "Seconds that the last checkpoint held up training on rank 0.";
    CHECKPOINT_PERSIST_SECONDS =
        "arcface_checkpoint_persist_seconds", MetricKind::Histogram(CHECKPOINT_BUCKETS), ["job_id"],
        "Seconds that the slowest rank took to write its parts of a committed checkpoint, beside training.";
    CHECKPOINT_RESTORE_SECONDS =
        "arcface_checkpoint_restore_seconds", MetricKind::Histogram(CHECKPOINT_BUCKETS), ["job_id"],
        "Seconds that a rank took to read, verify and take over what it resumed from.";
    CHECKPOINT_FAILURES_TOTAL =
        "arcface_checkpoint_failures_total", MetricKind::Counter, ["job_id", "stage"],
        "Failures by stage: write (a rank's parts), commit (the store), manifest (the file beside the parts), remove (what is not kept), restore (damaged files or copies).";
    CHECKPOINT_SUGGESTED_INTERVAL_SECONDS =
        "arcface_checkpoint_suggested_interval_seconds", MetricKind::Gauge, ["job_id"],
        "Seconds between checkpoints that would lose the least time at that stall and checkpoint.rank_mttf_hours.";
    CHECKPOINT_DAMAGED_TOTAL =
        "arcface_checkpoint_damaged_total", MetricKind::Counter, ["job_id"],
        "Committed checkpoints that did not verify when a generation was to resume from them.";
    CHECKPOINT_LAST_COMMITTED_STEP =
        "arcface_checkpoint_last_committed_step", MetricKind::Gauge, ["job_id"],
        "Step of the newest committed checkpoint.";
    CHECKPOINT_LAST_COPIED_STEP =
        "arcface_checkpoint_last_copied_step", MetricKind::Gauge, ["job_id"],
        "Step of the newest set of copies in the memory of nodes.";
    EVAL_ACCURACY_RATIO =
        "arcface_eval_accuracy_ratio", MetricKind::Gauge, ["job_id", "dataset"],
        "Newest verification accuracy of a data set, 0 to 1.";
    EVAL_TAR_RATIO =
        "arcface_eval_tar_ratio", MetricKind::Gauge, ["job_id", "dataset", "far"],
        "Newest true accept rate of a data set at a false accept rate, 0 to 1.";
    EVAL_DURATION_SECONDS =
        "arcface_eval_duration_seconds", MetricKind::Gauge, ["job_id", "dataset"],
        "Seconds that the newest evaluation of a data set took.";
    GRPC_REQUESTS_TOTAL =
        "arcface_grpc_requests_total", MetricKind::Counter, ["service", "method", "code"],
        "Calls answered, by canonical status code.";
    GRPC_REQUEST_DURATION_SECONDS =
        "arcface_grpc_request_duration_seconds", MetricKind::Histogram(REQUEST_BUCKETS), ["service", "method"],
        "Seconds until a call was answered; for streams, until the first answer.";
}

/// Tells the installed metrics recorder what every metric means. Call once, after it was installed; the buckets
/// have to be set on the exporter before: see [`buckets`].
pub fn describe() {
    for metric in METRICS {
        match metric.kind {
            MetricKind::Counter => metrics::describe_counter!(metric.name, metric.help),
            MetricKind::Gauge => metrics::describe_gauge!(metric.name, metric.help),
            MetricKind::Histogram(_) => metrics::describe_histogram!(metric.name, metric.help),
        }
    }
}

/// Histograms with the upper bounds of their buckets in seconds. Without them the exporter makes summaries, which
/// cannot be added over ranks.
pub fn buckets() -> impl Iterator<Item = (&'static str, &'static [f64])> {
    METRICS.iter().filter_map(|metric| match metric.kind {
        MetricKind::Histogram(bounds) => Some((metric.name, bounds)),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn metrics_are_named_as_prometheus_advises() {
        let names: BTreeSet<_> = METRICS.iter().map(|m| m.name).collect();
        assert_eq!(names.len(), METRICS.len(), "a name occurs twice");
        for Metric {
            name,
            kind,
            labels,
            help,
        } in METRICS
        {
            assert!(name.starts_with("arcface_") && !name.ends_with("_ms"), "{name}");
            assert_eq!(name.ends_with("_total"), *kind == MetricKind::Counter, "{name}");
            assert!(
                help.ends_with('.') && help.len() > 10 && !help.contains('"'),
                "{name}: {help:?}"
            );
            assert!(
                !labels.contains(&"job") && !labels.contains(&"instance"),
                "{name}: {labels:?}"
            );
        }
    }

    #[test]
    fn buckets_rise() {
        assert!(buckets().count() >= 4);
        for (name, bounds) in buckets() {
            assert!(bounds.windows(2).all(|w| w[0] < w[1]), "{name}");
        }
    }
}

//! Turns what ranks count into metrics. Ranks count from the start of their generation; what is new is added here.

use crate::{histograms, telemetry as t};
use arcface_proto::{
    types::{JobId, NodeId, Rank},
    v1::{CollectiveFigures, FigureSum, FigureTimes, RankFigures, RankGpu},
};
use metrics::{counter, gauge};
use std::collections::BTreeMap;

/// Collective operations that are counted; other names are left out, because a label is never free text.
const OPERATIONS: [&str; 5] = [
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "broadcast",
    "barrier",
];
/// What may go wrong with a checkpoint on a rank.
pub(super) const RANK_STAGES: [&str; 3] = ["write", "manifest", "remove"];
/// Most buckets that are taken from a rank.
const MAX_BUCKETS: usize = 64;

/// What the ranks of a generation told last.
#[derive(Default)]
pub(super) struct Figures {
    ranks: BTreeMap<u32, RankFigures>,
    /// Target cosines between the last two reports of each rank.
    cosines: BTreeMap<u32, FigureSum>,
    /// The GPU of each rank that has one, by node.
    gpus: BTreeMap<u32, (NodeId, RankGpu)>,
}

impl Figures {
    /// A rank on `node` tells what it has counted so far.
    pub(super) fn told(&mut self, id: &JobId, rank: Rank, node: &NodeId, mut now: RankFigures) {
        let before = self.ranks.remove(&rank.0).unwrap_or_default();
        let (job, number) = (id.as_str(), rank.0.to_string());
        let of_job = |name: &'static str| gauge!(name, "job_id" => job.to_owned());
        let of_rank = |name: &'static str| gauge!(name, "job_id" => job.to_owned(), "rank" => number.clone());

        of_job(t::HEAD_CLASSES).set(f64::from(now.classes));
        of_rank(t::HEAD_SHARD_ROWS).set(f64::from(now.shard_rows));
        of_rank(t::HEAD_SAMPLED_ROWS).set(f64::from(now.sampled_rows));
        of_rank(t::HEAD_POSITIVE_ROWS).set(f64::from(now.positive_rows));
        let ratio = f64::from(now.sampled_rows) / f64::from(now.shard_rows.max(1));
        of_rank(t::HEAD_SAMPLE_RATIO).set(ratio);
        of_rank(t::DATA_QUEUE_DEPTH).set(f64::from(now.queue_depth));
        if now.flops_per_sample.is_finite() && now.flops_per_sample > 0.0 {
            of_job(t::TRAIN_FLOPS_PER_SAMPLE).set(now.flops_per_sample);
        }
        for (name, before, now) in [
            (t::DATA_SAMPLES_TOTAL, before.samples, now.samples),
            (
                t::DATA_CACHED_SAMPLES_TOTAL,
                before.cached_samples,
                now.cached_samples,
            ),
            (t::DATA_BYTES_TOTAL, before.sample_bytes, now.sample_bytes),
            (t::DATA_ERRORS_TOTAL, before.data_errors, now.data_errors),
        ] {
            counter!(name, "job_id" => job.to_owned(), "rank" => number.clone())
                .increment(now.saturating_sub(before));
        }
        // A label is never free text.
        if let Some(gpu) = now.gpu.take().filter(|gpu| is_uuid(&gpu.uuid)) {
            of_rank(t::GPU_MEMORY_ALLOCATED_BYTES).set(gpu.allocated as f64);
            of_rank(t::GPU_MEMORY_RESERVED_BYTES).set(gpu.reserved as f64);
            of_rank(t::GPU_MEMORY_PEAK_BYTES).set(gpu.peak as f64);
            computes_on(id, rank.0, node, &gpu).set(1.0);
            self.gpus.insert(rank.0, (node.clone(), gpu));
        }
        for stage in RANK_STAGES {
            let count = |figures: &RankFigures| figures.checkpoint_failures.get(stage).copied().unwrap_or(0);
            counter!(t::CHECKPOINT_FAILURES_TOTAL, "job_id" => job.to_owned(), "stage" => stage)
                .increment(count(&now).saturating_sub(count(&before)));
        }
        add_times(
            t::DATA_DECODE_SECONDS,
            &[job],
            before.decode.as_ref(),
            now.decode.as_ref(),
        );
        for operation in OPERATIONS {
            let Some(figures) = now.collectives.get(operation) else {
                continue;
            };
            let before = before.collectives.get(operation);
            add_times(
                t::COMM_COLLECTIVE_SECONDS,
                &[job, operation],
                before.and_then(|before| before.times.as_ref()),
                figures.times.as_ref(),
            );
            let bytes = |figures: &CollectiveFigures| figures.bytes;
            counter!(t::COMM_BYTES_TOTAL, "job_id" => job.to_owned(), "op" => operation)
                .increment(bytes(figures).saturating_sub(before.map_or(0, bytes)));
        }
        if let Some(mean) = self.cosine(rank, before.target_cosines, now.target_cosines) {
            of_job(t::HEAD_TARGET_COSINE).set(mean);
        }
        self.ranks.insert(rank.0, now);
    }

    /// Mean of the cosines that all ranks told of last, after one of them has told again. Each sample's own class is in one
    /// shard, so the ranks' samples are different ones.
    fn cosine(&mut self, rank: Rank, before: Option<FigureSum>, now: Option<FigureSum>) -> Option<f64> {
        let (before, now) = (before.unwrap_or_default(), now?);
        let since = FigureSum {
            sum: now.sum - before.sum,
            count: now.count.saturating_sub(before.count),
        };
        if since.count > 0 && since.sum.is_finite() {
            self.cosines.insert(rank.0, since);
        }
        let sum: f64 = self.cosines.values().map(|own| own.sum).sum();
        let counts = self.cosines.values().map(|own| own.count);
        let count = counts.fold(0, u64::saturating_add);
        (count > 0).then(|| sum / count as f64)
    }

    /// The generation of these ranks is over: there may be fewer in the next.
    pub(super) fn over(&mut self, id: &JobId) {
        let before = std::mem::take(self);
        for (rank, (node, gpu)) in before.gpus {
            computes_on(id, rank, &node, &gpu).set(0.0);
            for name in [
                t::GPU_MEMORY_ALLOCATED_BYTES,
                t::GPU_MEMORY_RESERVED_BYTES,
                t::GPU_MEMORY_PEAK_BYTES,
            ] {
                gauge!(name, "job_id" => id.to_string(), "rank" => rank.to_string()).set(0.0);
            }
        }
        for rank in before.ranks.into_keys() {
            for name in [
                t::HEAD_SHARD_ROWS,
                t::HEAD_SAMPLED_ROWS,
                t::HEAD_POSITIVE_ROWS,
                t::HEAD_SAMPLE_RATIO,
                t::DATA_QUEUE_DEPTH,
            ] {
                gauge!(name, "job_id" => id.to_string(), "rank" => rank.to_string()).set(0.0);
            }
        }
    }
}

/// The metric that says where a rank computes.
fn computes_on(id: &JobId, rank: u32, node: &NodeId, gpu: &RankGpu) -> metrics::Gauge {
    gauge!(
        t::WORKER_GPU_INFO,
        "job_id" => id.to_string(),
        "node" => node.to_string(),
        "rank" => rank.to_string(),
        "gpu" => gpu.index.to_string(),
        "uuid" => gpu.uuid.clone()
    )
}

/// Whether it has the form of a GPU's uuid: "GPU-" and hexadecimal digits in groups.
fn is_uuid(text: &str) -> bool {
    let digits = |rest: &str| rest.chars().all(|c| c.is_ascii_hexdigit() || c == '-');
    text.len() <= 64 && text.strip_prefix("GPU-").is_some_and(digits)
}

/// Adds the times that are new.
fn add_times(name: &'static str, labels: &[&str], before: Option<&FigureTimes>, now: Option<&FigureTimes>) {
    let Some(now) = now else { return };
    let buckets = 0..now.counts.len().min(now.seconds.len()).min(MAX_BUCKETS);
    let (counts, seconds): (Vec<u64>, Vec<f64>) = buckets
        .map(|bucket| {
            let count = before.and_then(|before| before.counts.get(bucket)).copied();
            let seconds = before.and_then(|before| before.seconds.get(bucket)).copied();
            (
                now.counts[bucket].saturating_sub(count.unwrap_or(0)),
                now.seconds[bucket] - seconds.unwrap_or(0.0),
            )
        })
        .unzip();
    histograms::add(name, labels, &counts, &seconds);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_is_over_what_each_rank_told_last() {
        let mut figures = Figures::default();
        let sum = |sum, count| Some(FigureSum { sum, count });
        assert_eq!(figures.cosine(Rank(0), None, sum(2.0, 4)), Some(0.5));
        assert_eq!(figures.cosine(Rank(1), None, sum(0.0, 4)), Some(0.25));
        assert_eq!(
            figures.cosine(Rank(0), sum(2.0, 4), sum(10.0, 12)),
            Some(8.0 / 12.0)
        );
        // None of its classes was in the batch: what it told before stands.
        assert_eq!(
            figures.cosine(Rank(1), sum(0.0, 4), sum(0.0, 4)),
            Some(8.0 / 12.0)
        );
        assert_eq!(figures.cosine(Rank(1), None, None), None);
        assert_eq!(Figures::default().cosine(Rank(0), None, sum(f64::NAN, 1)), None);
    }
}

//! What a rank counts for the metrics: taken from what training has in any case, told at log intervals. Nothing here changes a
//! step.

use super::checkpoints::Failures;
use super::phases::Calls;
use crate::data::Loaded;
use crate::device::Placement;
use crate::head::{Seen, Total};
use crate::model::Backbone;
use arcface_proto::v1::{CollectiveFigures, FigureSum, FigureTimes, RankFigures, RankGpu};

/// What heads saw of micro-batches that counted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sight {
    newest: Seen,
    all: Means,
    /// Of `all`, what was taken.
    taken: Means,
}

/// What there are means of.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Means {
    /// Cosines of samples with their own class, where that is in this rank's shard.
    pub target_cosines: Total,
    /// Norms of the embeddings of all ranks.
    pub norms: Total,
}

impl Sight {
    /// Adds a micro-batch.
    pub fn add(&mut self, seen: &Seen) {
        self.newest = *seen;
        self.all.target_cosines += seen.target_cosines;
        self.all.norms += seen.norms;
    }

    /// What was added since the last call.
    pub fn take(&mut self) -> Means {
        let before = std::mem::replace(&mut self.taken, self.all);
        let since = |all: Total, before: Total| Total {
            sum: all.sum - before.sum,
            count: all.count - before.count,
        };
        Means {
            target_cosines: since(self.all.target_cosines, before.target_cosines),
            norms: since(self.all.norms, before.norms),
        }
    }
}

/// The mean, if there is anything to take it of.
pub fn mean(total: Total) -> Option<f64> {
    (total.count > 0).then(|| total.sum / total.count as f64)
}

/// Floating-point operations to train the backbone on one sample: a multiply-accumulate is two, and going back through
/// the layers takes twice what going forward does.
pub fn flops_per_sample(backbone: &Backbone) -> f64 {
    3.0 * 2.0 * backbone.macs() as f64
}

/// The GPU of a place, and its memory.
pub fn gpu(placement: &Placement) -> Option<RankGpu> {
    let gpu = placement.gpu()?;
    let memory = placement.memory().unwrap_or_default();
    Some(RankGpu {
        index: gpu.index,
        uuid: gpu.uuid.clone(),
        allocated: memory.allocated,
        reserved: memory.reserved,
        peak: memory.peak,
    })
}

/// Everything that is counted.
pub struct Counted<'a> {
    /// Classes over all ranks.
    pub classes: u32,
    /// Of these, in this rank's shard.
    pub shard_rows: u32,
    /// What the head saw.
    pub sight: &'a Sight,
    /// What the loader did.
    pub loaded: Loaded,
    /// Collective operations.
    pub calls: Vec<Calls>,
    /// What went wrong with checkpoints, if they are made.
    pub checkpoint_failures: Option<&'a Failures>,
    /// See [`flops_per_sample`]; on rank 0.
    pub flops_per_sample: Option<f64>,
    /// Where it computes.
    pub placement: &'a Placement,
}

/// What the coordinator is told of it.
pub fn to_wire(counted: Counted<'_>) -> RankFigures {
    let Sight { newest, all, .. } = counted.sight;
    let times = |(counts, seconds)| Some(FigureTimes { counts, seconds });
    let collectives = counted.calls.into_iter().map(|calls| {
        let figures = CollectiveFigures {
            times: times(calls.times),
            bytes: calls.bytes,
        };
        (calls.operation.to_owned(), figures)
    });
    let failures = counted.checkpoint_failures.into_iter().flat_map(Failures::read);
    RankFigures {
        classes: counted.classes,
        shard_rows: counted.shard_rows,
        sampled_rows: newest.sampled_rows,
        positive_rows: newest.positive_rows,
        target_cosines: Some(FigureSum {
            sum: all.target_cosines.sum,
            count: all.target_cosines.count,
        }),
        samples: counted.loaded.samples,
        sample_bytes: counted.loaded.bytes,
        data_errors: counted.loaded.errors,
        cached_samples: counted.loaded.cached,
        queue_depth: u32::try_from(counted.loaded.ready).unwrap_or(u32::MAX),
        decode: times(counted.loaded.decode),
        collectives: collectives.collect(),
        checkpoint_failures: failures.map(|(stage, count)| (stage.to_owned(), count)).collect(),
        flops_per_sample: counted.flops_per_sample.unwrap_or_default(),
        gpu: gpu(counted.placement),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_are_those_since_the_last_time() {
        let mut sight = Sight::default();
        let seen = |cosines: &[f64], norms: &[f64]| Seen {
            sampled_rows: 8,
            positive_rows: 2,
            target_cosines: cosines.iter().copied().collect(),
            norms: norms.iter().copied().collect(),
        };
        sight.add(&seen(&[0.25, 0.75], &[10.0, 20.0, 30.0]));
        sight.add(&seen(&[], &[40.0]));
        let means = sight.take();
        assert_eq!(
            (mean(means.target_cosines), mean(means.norms)),
            (Some(0.5), Some(25.0))
        );
        assert_eq!(sight.take(), Means::default());
        assert_eq!(mean(sight.take().norms), None, "every step was left out");
        sight.add(&seen(&[-0.5], &[1.0]));
        let means = sight.take();
        assert_eq!(
            (mean(means.target_cosines), mean(means.norms)),
            (Some(-0.5), Some(1.0))
        );
        assert_eq!(sight.all.target_cosines.count, 3, "sums go on");
    }
}

//! What the reference's trainer takes for the same job: PyTorch, the logits built as a matrix, dense SGD or AdamW over the
//! whole shard, the classifier in f32. From its algorithm; the peaks of its head on a CPU are in the tests.
//!
//! B rows of all ranks, C classes of the shard that take part, D the embedding's length. In the order of a step:
//!
//! 1. *Forward*: the class weights of length 1 (and at a rate below 1 those that take part, gathered); the cosines, cut to
//!    \[-1, 1\]; the logits with margin: three B x C matrices.
//! 2. *The loss backward*: cosines and probabilities, a one-hot matrix and a copy of the rows that have their class here, and
//!    their product with the loss's gradient.
//! 3. *The normalisation backward*: four C x D matrices beside the gradient that comes in.
//! 4. *The update*: a dense gradient of the whole shard, and what weight decay makes of it.
//!
//! Its published table is older (2021): then autograd went through the margin, which kept a copy of the cosines for each of its
//! operations, and the exponentials were apart from the logits. At the highest moment that makes nine B x C matrices.

use super::{
    Account, Device, Job, Line, Moment, Part, count,
    ours::{CPU_RUNTIME, CUDA_CONTEXT, CUDA_WORKSPACES, NCCL_BUFFERS},
    product,
};

const F32: u64 = 4;
const IMAGE: u64 = 3 * 112 * 112 * F32;

/// B x C matrices when the loss goes backward, beside the one-hot rows.
const MATRICES: u64 = 3;
/// Those of the trainer of 2021: logits, two kept by the margin, probabilities, and five while an inverse cosine or a cosine is
/// differentiated; its one-hot rows were gone then.
const MATRICES_2021: u64 = 9;

/// The account of one of its ranks. It has no micro-batches but those of its accumulation.
pub fn reference(job: &Job, device: Device) -> Account {
    account(job, device, head(job, MATRICES, true))
}

/// The same of the trainer that its published table of 2021 was measured with.
pub fn reference_of_2021(job: &Job, device: Device) -> Account {
    account(job, device, head(job, MATRICES_2021, false))
}

fn account(job: &Job, device: Device, head: Line) -> Account {
    let (trainable, slots) = (job.trainable(), job.slots());
    let parameters = trainable + job.network.frozen.of(job.embedding_size);
    let rows = job.global_batch.div_ceil(job.world_size);
    let (shard, dim) = (job.shard(), product([job.centers, job.embedding_size]));
    let full = product([shard, dim, F32]);
    let mut always = vec![
        Line::new(
            Part::Parameters,
            product([parameters, F32]),
            format!("{} parameters x 4 B", count(parameters)),
        ),
        Line::new(
            Part::Optimizer,
            product([slots, trainable, F32]),
            format!("{slots} x {} parameters x 4 B", count(trainable)),
        ),
        Line::new(
            Part::Statistics,
            job.network.buffer_bytes.of(job.embedding_size),
            "running means and variances",
        ),
        Line::new(
            Part::Exchange,
            product([trainable, F32]),
            "buckets of DistributedDataParallel",
        ),
        Line::new(
            Part::Images,
            product([2, rows, IMAGE]),
            format!("2 x {rows} images x 147 KiB"),
        ),
        Line::new(
            Part::HeadWeights,
            full,
            format!("{} classes x {dim} x 4 B", count(shard)),
        ),
        Line::new(
            Part::HeadOptimizer,
            product([slots, full]),
            format!("{slots} x {} classes x {dim} x 4 B", count(shard)),
        ),
    ];
    always.push(match device {
        Device::Cuda => Line::assumed(
            Part::Runtime,
            CUDA_CONTEXT + CUDA_WORKSPACES,
            "CUDA context with its kernels, workspaces",
        ),
        Device::Cpu => Line::assumed(Part::Runtime, CPU_RUNTIME, "process, libtorch, threads"),
    });
    if job.world_size > 1 && device == Device::Cuda {
        always.push(Line::assumed(Part::Collective, NCCL_BUFFERS, "NCCL's channels"));
    }
    let gradients = || {
        Line::new(
            Part::Gradients,
            product([trainable, F32]),
            "made anew in every step",
        )
    };
    let head_gradient = |bytes| Line::new(Part::HeadGradient, bytes, "dense");
    let pass = job.pass();
    let activations = |bytes| {
        let how = format!("{rows} images x {:.1} MB", pass.kept.per_image as f64 / 1e6);
        Line::new(Part::Activations, bytes, how)
    };
    let embeddings = Line::new(
        Part::Embeddings,
        product([4, job.global_batch, job.embedding_size, F32]),
        "gathered, of length 1, and their gradients",
    );
    let largest = product([2, job.network.largest_parameter(job.embedding_size), F32]);
    Account::highest(
        always,
        [
            (
                Moment::Head,
                vec![activations(pass.kept.bytes(rows)), embeddings, head],
            ),
            (
                Moment::Backward,
                vec![activations(pass.highest(rows)), gradients(), head_gradient(full)],
            ),
            (
                Moment::Update,
                vec![
                    gradients(),
                    head_gradient(full),
                    Line::new(
                        Part::Update,
                        largest.max(full),
                        "weight decay added to the gradient",
                    ),
                ],
            ),
        ],
    )
}

/// The classifier at the highest of its stages.
fn head(job: &Job, matrices: u64, one_hot: bool) -> Line {
    let classes = job.sampled();
    let weights = product([classes, job.centers, job.embedding_size, F32]);
    let logits = product([job.global_batch, classes, F32]);
    let is_sampled = u64::from(job.sample_rate < 1.0);
    let full = match is_sampled {
        1 => product([job.shard(), job.centers, job.embedding_size, F32]),
        _ => 0,
    };
    // The rows with their class here, as a one-hot matrix and as a copy.
    let one_hot = match one_hot {
        true => product([2, logits]) / job.world_size,
        false => 0,
    };
    let stages = [
        (1 + is_sampled, matrices, one_hot),
        (5 + is_sampled, 0, 0),
        // The gathered rows' gradient goes into one of all rows.
        (1 + is_sampled, 0, full),
    ];
    let bytes = |(rows, matrices, more): (u64, u64, u64)| {
        product([rows, weights])
            .saturating_add(product([matrices, logits]))
            .saturating_add(more)
    };
    let highest = stages.into_iter().max_by_key(|stage| bytes(*stage));
    let (rows, matrices, more) = highest.unwrap_or((0, 0, 0));
    let and_more = match more {
        0 => "",
        _ if matrices > 0 => ", and the one-hot rows twice",
        _ => ", and a gradient of all",
    };
    Line::new(
        Part::HeadWorkspace,
        bytes((rows, matrices, more)),
        format!(
            "{matrices} x {} x {} logits x 4 B, {rows} copies of {} class weights{and_more}",
            count(job.global_batch),
            count(classes),
            count(classes)
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::networks::Network;
    use crate::spec::{HeadImplementation, Optimizer, Precision};

    /// The reference's head alone in one process on a CPU, D = 512, B = 128: peaks of resident memory over 10 steps, as
    /// measured; MB. A PyTorch process grows by about 200 MB of its own in its first step.
    #[test]
    fn the_head_takes_what_was_measured() {
        const PROCESS: f64 = 200.0;
        for (classes, rate, measured) in [
            (100_000, 1.0, 1568.0),
            (500_000, 1.0, 7308.0),
            (1_000_000, 1.0, 14_478.0),
            (100_000, 0.1, 1102.0),
            (500_000, 0.1, 4410.0),
            (1_000_000, 0.1, 8363.0),
        ] {
            let job = Job {
                network: Network::find("tiny").expect("a line"),
                embedding_size: 512,
                gradient_checkpointing: false,
                freeze_batch_norm: false,
                num_classes: classes,
                centers: 1,
                sample_rate: rate,
                implementation: HeadImplementation::Plain,
                optimizer: Optimizer::Sgd,
                precision: Precision::Fp32,
                gradient_acc: 1,
                global_batch: 128,
                batch_size: 128,
                world_size: 1,
                evaluates: false,
                cache: 0,
            };
            let full = product([job.shard(), 512, F32]);
            // Its steps: forward and backward, or the update with the gradient and what weight decay makes of it.
            let peak = (2 * full + head(&job, MATRICES, true).bytes).max(4 * full) as f64 / 1e6 + PROCESS;
            let off = peak / measured - 1.0;
            println!(
                "{classes} classes, rate {rate}: {peak:.0} MB, measured {measured:.0}, {:+.1} %",
                100.0 * off
            );
            assert!(
                off.abs() < 0.1,
                "{classes} classes, rate {rate}: {peak} MB, measured {measured}"
            );
        }
    }
}

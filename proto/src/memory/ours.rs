//! What a rank of our worker takes. Every formula names what in the worker's sources it follows.

use super::{Account, Device, Job, Line, Moment, Part, count, networks, product};
use crate::spec::{HeadImplementation, Optimizer, Precision};

/// Bytes of an f32.
const F32: u64 = 4;
/// Bytes of an image as training takes it: three colours, f32.
const IMAGE: u64 = 3 * 112 * 112 * F32;
/// Batches that wait decoded, `PREFETCH` in `worker/src/rank/train.rs`. They are in the memory of the process, not of a GPU.
const AHEAD: u64 = 4;
/// Copies of the state in memory at once, `COPIES` in `worker/src/rank/checkpoints/writer.rs`.
const COPIES: u64 = 2;
/// Images of a batch of an evaluation beside training, `BATCH` in `worker/src/rank/evaluate/background.rs`.
const EVALUATION_BATCH: u64 = 32;
/// What one of them takes on its way through a network: four maps of the widest networks' first layers, 64 x 112 x 112.
const EVALUATION_IMAGE: u64 = 4 * 64 * 112 * 112 * F32;

/// Multiples of the head's operands, `PANEL` in `worker/src/head/tiled/kernel/gemm.rs`.
const PANEL: u64 = 32;
/// Classes of a lane at least, and how many lanes there are at most: `worker/src/head/tiled/sweep.rs`.
const LANE_CLASSES: u64 = 240;
const MOST_LANES: u64 = 32;
const LANE_ELEMENTS: u64 = 16 << 20;
/// Terms that wait for the update take this part of weights and optimizer state at most, `KEPT_PART` in `worker/src/head/tiled/mod.rs`.
const KEPT_PART: u64 = 25;

/// The process and libtorch on a CPU: code, threads' stacks, compiled convolutions. Measured with `bench step --network tiny`
/// on the 2 cores of `docs/planning.md`; more cores take a little more.
pub(super) const CPU_RUNTIME: u64 = 175 << 20;
/// Context of a GPU with the kernels of cuDNN, cuBLAS and libtorch that a training step loads. An assumption: between 400 and
/// 800 MiB on GPUs from Volta to Hopper.
pub(super) const CUDA_CONTEXT: u64 = 600 << 20;
/// Workspaces of convolutions and matrix products. An assumption: cuBLAS takes 8 MiB a handle and 32 on Hopper (PyTorch's
/// default), cuDNN what its choice of algorithm asks for.
pub(super) const CUDA_WORKSPACES: u64 = 256 << 20;
/// Buffers of NCCL's channels. An assumption: a few MiB for each of some dozen channels.
pub(super) const NCCL_BUFFERS: u64 = 256 << 20;
/// Scratch of the ring on CPUs, `SCRATCH_BYTES` in `worker/src/collective/links.rs`.
const RING_BUFFERS: u64 = 256 << 10;
/// Classes of a tile on a GPU. An assumption, between the sizes that are best on CPUs.
const CUDA_TILE: u64 = 16_384;

/// The account of one rank, the one with the largest shard, and the backbone's checkpoint part.
pub fn ours(job: &Job, device: Device) -> Account {
    let mut always = state(job);
    always.extend(inputs(job, device));
    always.extend(surroundings(job, device));
    let mut moments = [
        (Moment::Head, forward(job, device)),
        (Moment::Backward, backward(job, device)),
        (Moment::Update, update(job)),
    ];
    match (job.implementation, device) {
        (HeadImplementation::Plain, _) => {
            for (moment, lines) in &mut moments {
                lines.extend(plain_head(job, *moment));
            }
        }
        (HeadImplementation::Tiled, Device::Cpu) => always.extend(tiled_head_cpu(job)),
        (HeadImplementation::Tiled, Device::Cuda) => always.extend(tiled_head_cuda(job)),
    }
    Account::highest(always, moments)
}

/// Weights, gradients and optimizer buffers.
fn state(job: &Job) -> Vec<Line> {
    let (trainable, slots) = (job.trainable(), job.slots());
    let parameters = trainable + job.network.frozen.of(job.embedding_size);
    let statistics = job.network.buffer_bytes.of(job.embedding_size);
    let (rows, width) = (job.shard(), product([job.centers, job.embedding_size]));
    let buffers = match job.optimizer {
        Optimizer::Sgd => "momentum",
        Optimizer::AdamW => "two moments",
    };
    let since = match job.is_lazy() {
        true => product([rows, 4]),
        false => 0,
    };
    let head_buffers = product([slots, rows, width, F32]);
    let of_rows = format!("{} classes x {width} x 4 B", count(rows));
    let lazily = match job.is_lazy() {
        true => ", and 4 B a class: when it was touched last",
        false => "",
    };
    vec![
        Line::new(
            Part::Parameters,
            product([parameters, F32]),
            format!("{} parameters x 4 B, f32 in every precision", count(parameters)),
        ),
        Line::new(
            Part::Gradients,
            product([trainable, F32]),
            format!("{} parameters x 4 B, kept between steps", count(trainable)),
        ),
        Line::new(
            Part::Optimizer,
            product([slots, trainable, F32]),
            format!("{buffers} of {} parameters x 4 B", count(trainable)),
        ),
        Line::new(
            Part::Statistics,
            product([2, statistics]),
            "running means and variances, and as they were before the step",
        ),
        Line::new(Part::HeadWeights, product([rows, width, F32]), of_rows.clone()),
        Line::new(
            Part::HeadOptimizer,
            head_buffers.saturating_add(since),
            format!("{buffers} of {of_rows}{lazily}"),
        ),
    ]
}

fn inputs(job: &Job, device: Device) -> Vec<Line> {
    let rows = job.rows();
    let batch = product([rows, IMAGE]);
    match device {
        Device::Cpu => vec![
            Line::new(Part::Images, batch, format!("{rows} images x 147 KiB")),
            Line::new(
                Part::Ahead,
                product([AHEAD, batch]),
                format!("{AHEAD} batches that wait decoded"),
            ),
            Line::new(Part::Cache, job.cache, "data.cache, once it is full"),
        ],
        Device::Cuda => vec![Line::assumed(
            Part::Images,
            product([2, batch]),
            format!("{rows} images x 147 KiB, and the next batch on its way"),
        )],
    }
}

/// What is there beside the training itself.
fn surroundings(job: &Job, device: Device) -> Vec<Line> {
    let parameters = product([job.network.trainable.of(job.embedding_size), F32]);
    let mut lines = Vec::new();
    if job.evaluates {
        let images = product([EVALUATION_BATCH, EVALUATION_IMAGE]);
        // `Inference` in `worker/src/model/inference.rs`.
        let prepared = match job.precision {
            Precision::Fp32 => parameters,
            Precision::Bf16 | Precision::Fp16 => parameters / 2,
        };
        lines.push(Line::assumed(
            Part::Evaluation,
            parameters.saturating_add(prepared).saturating_add(images),
            format!("the network twice again, as it is and as it is evaluated, and {EVALUATION_BATCH} images in it"),
        ));
    }
    if device == Device::Cpu {
        let head = product([1 + job.slots(), job.shard(), job.centers, job.embedding_size, F32]);
        let state = product([1 + job.slots(), parameters]).saturating_add(head);
        lines.push(Line::new(
            Part::Checkpoints,
            product([COPIES, state]),
            format!("{COPIES} copies of weights and optimizer state at most, of rank 0"),
        ));
    }
    if job.world_size > 1 {
        lines.push(match device {
            Device::Cuda => Line::assumed(Part::Collective, NCCL_BUFFERS, "NCCL's channels"),
            Device::Cpu => Line::new(Part::Collective, RING_BUFFERS, "scratch of the ring"),
        });
    }
    lines.push(match device {
        Device::Cuda => Line::assumed(
            Part::Runtime,
            CUDA_CONTEXT + CUDA_WORKSPACES,
            "CUDA context with its kernels, workspaces of cuDNN and cuBLAS",
        ),
        Device::Cpu => Line::assumed(Part::Runtime, CPU_RUNTIME, "process, libtorch, threads"),
    });
    lines
}

fn activations(job: &Job, device: Device, bytes: u64, what: &str) -> Line {
    let kept = job.pass_on(device).kept;
    let rows = job.rows();
    let per_image = kept.per_image as f64 / 1e6;
    let casts = match kept.fixed as f64 / 1e6 {
        fixed if job.precision != Precision::Fp32 => {
            format!(", and {fixed:.1} MB of weights in {}", job.precision.as_str())
        }
        _ => String::new(),
    };
    let again = match job.gradient_checkpointing {
        true => " with the trunk's computed again",
        false => "",
    };
    Line::new(
        Part::Activations,
        bytes,
        format!("{rows} images x {per_image:.1} MB{again}{casts}{what}"),
    )
}

/// Everything is kept, and the embeddings of all ranks have come.
fn forward(job: &Job, device: Device) -> Vec<Line> {
    // Gathered, and their gradient; with other ranks also as they are sent and as they come back.
    let copies = if job.world_size > 1 { 4 } else { 2 };
    vec![
        activations(job, device, job.pass_on(device).kept.bytes(job.rows()), ""),
        Line::new(
            Part::Embeddings,
            product([copies, job.rows_of_all(), job.embedding_size, F32]),
            format!(
                "{copies} x {} rows x {} x 4 B",
                count(job.rows_of_all()),
                job.embedding_size
            ),
        ),
    ]
}

fn backward(job: &Job, device: Device) -> Vec<Line> {
    // The gradient of the embedding layer is new in the moment that the table's longer ones are about.
    let longer = job.embedding_size.saturating_sub(networks::EMBEDDING_SIZE);
    let layer = product([longer, job.network.largest.per_dim, F32]);
    let bytes = job.pass_on(device).highest(job.rows()).saturating_add(layer);
    let mut lines = vec![
        activations(job, device, bytes, ", and gradients on their way back"),
        Line::new(
            Part::Embeddings,
            product([2, job.rows(), job.embedding_size, F32]),
            format!("2 x {} rows x {} x 4 B", job.rows(), job.embedding_size),
        ),
    ];
    if job.world_size > 1 {
        // Their sum begins while earlier layers are still on their way (`worker/src/rank/gradients.rs`).
        lines.push(exchange(job, "at most, in buckets on their way to other ranks"));
    }
    lines
}

fn exchange(job: &Job, how: &str) -> Line {
    Line::new(
        Part::Exchange,
        product([job.trainable(), F32]),
        format!("{} gradients x 4 B, {how}", count(job.trainable())),
    )
}

fn update(job: &Job) -> Vec<Line> {
    vec![exchange(job, "in buckets")]
}

/// Temporaries of the plain head's size while it is updated (`worker/src/optim/`); the backbone is updated in place.
fn copies_of_update(job: &Job) -> u64 {
    match job.optimizer {
        Optimizer::Sgd => 1,
        Optimizer::AdamW => 2,
    }
}

/// The tiled head on a CPU (`worker/src/head/tiled/`): micro-batches as operands until the update, sums of the lanes, kept terms.
fn tiled_head_cpu(job: &Job) -> Vec<Line> {
    let batch = job.rows_of_all();
    let (padded, columns) = (
        job.embedding_size.next_multiple_of(PANEL),
        batch.next_multiple_of(PANEL),
    );
    let micro = product([3, columns, padded, F32]);
    let elements = product([batch, padded]);
    let by_memory = (LANE_ELEMENTS / elements.max(1)).max(4);
    let lanes = job
        .sampled()
        .div_ceil(LANE_CLASSES)
        .clamp(1, MOST_LANES.min(by_memory));
    let sums = product([lanes, elements, F32]);
    let of_state = product([job.shard(), job.embedding_size, F32, 1 + job.slots()]) / KEPT_PART;
    let term = match job.precision {
        Precision::Fp32 => F32,
        Precision::Bf16 | Precision::Fp16 => F32 / 2,
    };
    let kept = product([job.sampled(), columns, term]).min(of_state);
    vec![Line::new(
        Part::HeadWorkspace,
        product([job.pending(), micro])
            .saturating_add(sums)
            .saturating_add(kept),
        format!(
            "{} micro-batches as operands, 3 x {columns} x {padded} x 4 B each; {lanes} sums of {batch} x {padded} x 4 B; \
             {kept} B of terms for the update",
            job.pending()
        ),
    )]
}

/// The tiled head on a GPU (`worker/src/head/cuda/`): a tile's cosines, weights of length 1 and gradient; with gradient
/// accumulation the gradient of all rows that are touched.
fn tiled_head_cuda(job: &Job) -> Vec<Line> {
    let (batch, dim) = (job.rows_of_all(), job.embedding_size);
    let tile = job.sampled().min(CUDA_TILE);
    let half = match job.precision {
        Precision::Fp32 => 0,
        Precision::Bf16 | Precision::Fp16 => 2,
    };
    let cosines = product([batch, tile, F32 + half]);
    let rows = product([tile, dim, 2 * F32 + half]);
    let operands = product([3, batch, dim, F32]);
    let mut lines = vec![Line::assumed(
        Part::HeadWorkspace,
        cosines.saturating_add(rows).saturating_add(operands),
        format!(
            "a tile of {} classes: cosines with {} rows, weights, gradient",
            count(tile),
            count(batch)
        ),
    )];
    if job.pending() > 1 {
        lines.push(Line::assumed(
            Part::HeadGradient,
            product([job.sampled(), dim, F32]),
            format!("accumulated, of {} classes x {dim} x 4 B", count(job.sampled())),
        ));
    }
    lines
}

/// The plain head (`worker/src/head/plain.rs`), which builds the logits and a dense gradient.
fn plain_head(job: &Job, moment: Moment) -> Vec<Line> {
    let centers = job.centers;
    let full = product([job.shard(), centers, job.embedding_size, F32]);
    let sampled = product([job.sampled(), centers, job.embedding_size, F32]);
    let logits = product([job.rows_of_all(), job.sampled(), F32]);
    let is_sampled = u64::from(job.sample_rate < 1.0);
    let accumulates = job.pending() > 1;
    let gradient = |bytes| {
        Line::new(
            Part::HeadGradient,
            bytes,
            format!("dense, {} classes", count(job.shard())),
        )
    };
    match moment {
        Moment::Head => {
            // Which centre is the nearest (i64), and the cosines of the others.
            let several = u64::from(centers > 1);
            let margin = (1 + is_sampled, 4 + 3 * several, 0);
            let keeping = (4 + is_sampled, 3 + several * (1 + centers), 1);
            let bytes = |(rows, matrices, dense): (u64, u64, u64)| {
                let dense = if accumulates { 0 } else { dense };
                product([rows, sampled])
                    .saturating_add(product([matrices, logits]))
                    .saturating_add(product([dense, full]))
            };
            let stages = [margin, keeping];
            let (rows, matrices, dense) = stages
                .into_iter()
                .max_by_key(|stage| bytes(*stage))
                .unwrap_or(margin);
            let dense_too = if dense > 0 && !accumulates {
                ", and the dense gradient"
            } else {
                ""
            };
            let work = Line::new(
                Part::HeadWorkspace,
                bytes((rows, matrices, dense)),
                format!(
                    "{matrices} x {} x {} logits x 4 B, {rows} copies of {} classes{dense_too}",
                    count(job.rows_of_all()),
                    count(job.sampled()),
                    count(job.sampled())
                ),
            );
            match accumulates {
                true => vec![work, gradient(full)],
                false => vec![work],
            }
        }
        Moment::Backward => vec![gradient(full)],
        Moment::Update => vec![
            gradient(full),
            Line::new(
                Part::HeadWorkspace,
                product([copies_of_update(job), full]),
                format!(
                    "the update of {} classes at once, {} copies",
                    count(job.shard()),
                    copies_of_update(job)
                ),
            ),
        ],
    }
}

//! How fast the ranks of one machine exchange tensors: every operation of the ring over loopback, or of NCCL between GPUs.

use super::timing::{median, min, time};
use crate::collective::{
    Collective, CollectiveError, NcclCollective, ReduceOp, TcpCollective, Timeouts, local,
};
use crate::device::{self, DeviceChoice};
use anyhow::Context;
use arcface_proto::failure::Failure;
use serde_json::{Value, json};
use std::{thread, time::Duration};
use tch::{Device, Kind, Tensor};

/// Longest operation, and longest time for NCCL to come up.
const LIMIT: Duration = Duration::from_secs(120);

/// What carries the tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Backend {
    /// The ring, between CPUs.
    Tcp,
    /// NCCL, between GPUs: one a rank.
    Nccl,
}

impl Backend {
    fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Nccl => "nccl",
        }
    }

    /// Where rank `rank` has its tensors.
    fn device(self, rank: u32) -> Device {
        match self {
            Self::Tcp => Device::Cpu,
            Self::Nccl => Device::Cuda(rank as usize),
        }
    }

    fn join(self, ring: TcpCollective) -> Result<Box<dyn Collective>, CollectiveError> {
        let rank = ring.rank();
        let timeouts = Timeouts {
            connect: LIMIT,
            operation: LIMIT,
        };
        Ok(match self {
            Self::Tcp => Box::new(ring),
            Self::Nccl => Box::new(NcclCollective::start(ring, rank, timeouts)?),
        })
    }
}

/// Arguments of `bench collective`.
#[derive(clap::Args, Debug)]
pub struct CollectiveArgs {
    /// Ranks, each a thread of this process.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    ranks: u32,
    /// Size of the tensor that an operation moves, in MiB: of the whole one where ranks have parts.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=8192))]
    mib: u32,
    /// What carries the tensors: the ring over loopback, or NCCL between this machine's GPUs.
    #[arg(long, value_enum, default_value_t = Backend::Tcp)]
    backend: Backend,
}

impl CollectiveArgs {
    /// What the result says it holds for.
    pub(super) fn device(&self) -> &'static str {
        match self.backend {
            Backend::Tcp => "cpu",
            Backend::Nccl => "cuda",
        }
    }
}

/// An operation on tensors of `elements` f32.
type Operation = fn(&mut dyn Collective, &Tensor) -> Result<(), CollectiveError>;

const OPERATIONS: [(&str, Operation); 5] = [
    ("all_reduce", |comm, whole| {
        comm.all_reduce(&mut whole.shallow_clone(), ReduceOp::Max)
    }),
    ("all_gather", |comm, whole| {
        let rows = whole.size()[0] / i64::from(comm.world_size());
        comm.all_gather(&whole.narrow(0, 0, rows)).map(drop)
    }),
    ("reduce_scatter", |comm, whole| {
        comm.reduce_scatter(whole).map(drop)
    }),
    ("broadcast", |comm, whole| {
        comm.broadcast(&mut whole.shallow_clone(), 0)
    }),
    ("barrier", |comm, _| comm.barrier()),
];

/// The result as JSON: milliseconds, and GB/s of the tensor's size.
pub(super) fn measure(repetitions: u32, args: &CollectiveArgs) -> anyhow::Result<Value> {
    let backend = args.backend;
    if backend == Backend::Nccl {
        // Says in one line what is missing, and lets libtorch find its GPUs.
        device::resolve(DeviceChoice::Cuda).map_err(|failure| Failure {
            message: format!("--backend nccl: {}", failure.message),
            ..failure
        })?;
    }
    let world = local::world(args.ranks, LIMIT)?;
    let ranks = i64::from(args.ranks);
    // Whole rows for every rank.
    let elements = (i64::from(args.mib) << 20) / 4 / ranks * ranks;
    let times = thread::scope(|scope| {
        let measure = |ring: TcpCollective| -> anyhow::Result<Vec<Vec<f64>>> {
            let device = backend.device(ring.rank());
            let mut comm = backend.join(ring)?;
            let whole = Tensor::ones([elements], (Kind::Float, device));
            let one = |(_, operation): &(&str, Operation)| {
                time(repetitions, |_| {
                    // Nobody begins before the last one has ended.
                    comm.barrier()?;
                    Ok(operation(comm.as_mut(), &whole)?)
                })
            };
            OPERATIONS.iter().map(one).collect()
        };
        let threads: Vec<_> = world
            .into_iter()
            .map(|comm| scope.spawn(move || measure(comm)))
            .collect();
        let joined: anyhow::Result<Vec<_>> = threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| anyhow::anyhow!("a rank panicked"))?)
            .collect();
        joined
    })?;
    let rank_0 = times.first().context("no rank")?;
    let mut result = json!({
        "bench": "collective", "transport": backend.name(), "ranks": args.ranks, "bytes": elements * 4,
    });
    for ((name, _), times) in OPERATIONS.iter().zip(rank_0) {
        result[format!("{name}_median_ms")] = median(times).into();
        result[format!("{name}_min_ms")] = min(times).into();
        if *name != "barrier" {
            result[format!("{name}_gb_per_second")] = (elements as f64 * 4.0 / 1e6 / median(times)).into();
        }
    }
    Ok(result)
}

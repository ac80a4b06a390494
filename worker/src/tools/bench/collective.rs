//! How fast the ranks of one machine exchange tensors: every operation of the ring, over loopback.

use super::timing::{median, min, time};
use crate::collective::{Collective, CollectiveError, ReduceOp, TcpCollective, local};
use anyhow::Context;
use serde_json::{Value, json};
use std::{thread, time::Duration};
use tch::{Device, Kind, Tensor};

/// Longest operation.
const LIMIT: Duration = Duration::from_secs(120);

/// Arguments of `bench collective`.
#[derive(clap::Args, Debug)]
pub struct CollectiveArgs {
    /// Ranks, each a thread of this process.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    ranks: u32,
    /// Size of the tensor that an operation moves, in MiB: of the whole one where ranks have parts.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=8192))]
    mib: u32,
}

/// An operation on tensors of `elements` f32.
type Operation = fn(&mut TcpCollective, &Tensor) -> Result<(), CollectiveError>;

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
    let world = local::world(args.ranks, LIMIT)?;
    let ranks = i64::from(args.ranks);
    // Whole rows for every rank.
    let elements = (i64::from(args.mib) << 20) / 4 / ranks * ranks;
    let times = thread::scope(|scope| {
        let measure = |mut comm: TcpCollective| -> anyhow::Result<Vec<Vec<f64>>> {
            let whole = Tensor::ones([elements], (Kind::Float, Device::Cpu));
            let one = |(_, operation): &(&str, Operation)| {
                time(repetitions, |_| {
                    // Nobody begins before the last one has ended.
                    comm.barrier()?;
                    Ok(operation(&mut comm, &whole)?)
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
        "bench": "collective", "transport": "tcp", "ranks": args.ranks, "bytes": elements * 4,
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

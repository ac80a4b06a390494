//! Communication between the ranks of one generation. Nothing else opens a socket between ranks; this module
//! knows neither head nor model.
//!
//! `tcp.rs` has the ring's algorithms, `links.rs` its connections and who is to blame for their end, `connect.rs`
//! how they come up, `wire.rs` what they carry, `reduce.rs` and `memory.rs` the arithmetic on a tensor's bytes. `nccl/` moves
//! tensors between GPUs, with the ring beside it. `parts.rs` moves whole files, beside the ring; `beside.rs` lets sums go on
//! while the training thread computes.

mod beside;
mod connect;
mod links;
pub mod local;
mod memory;
pub mod nccl;
pub mod parts;
mod reduce;
#[cfg(test)]
mod suite;
pub mod tcp;
mod wire;

pub use beside::Beside;
pub use connect::{Listener, Session, Timeouts};
pub use nccl::NcclCollective;
pub use tcp::TcpCollective;

use std::time::Duration;
use tch::Tensor;

/// The operations that the head and the gradient sum need. Calls are collective: every rank makes the same calls
/// in the same order with tensors of the same shape and kind. Tensors are contiguous; kinds are f32, f64, bf16,
/// f16 and i64 (and u8 for everything but reductions).
///
/// Every rank gets the same bits. On the ring the order of a reduction depends on rank and world size alone; NCCL chooses it
/// by the machines' topology too (see [`nccl`]). When a call returns, its result is there.
///
/// # Errors
/// After any error the communicator is dead: every later call fails at once. Nothing is retried here; the
/// generation ends.
pub trait Collective: Send {
    /// This rank, from 0.
    fn rank(&self) -> u32;

    /// Number of ranks.
    fn world_size(&self) -> u32;

    /// Reduces over all ranks, in place.
    fn all_reduce(&mut self, tensor: &mut Tensor, op: ReduceOp) -> Result<(), CollectiveError>;

    /// `[n, ...]` on each rank to `[W * n, ...]`, in rank order, on all.
    fn all_gather(&mut self, local: &Tensor) -> Result<Tensor, CollectiveError>;

    /// `[W * n, ...]` on each rank, summed; rank r gets rows `r*n .. (r+1)*n`.
    fn reduce_scatter(&mut self, full: &Tensor) -> Result<Tensor, CollectiveError>;

    /// Copies `root`'s tensor into everyone's, in place.
    fn broadcast(&mut self, tensor: &mut Tensor, root: u32) -> Result<(), CollectiveError>;

    /// Returns when every rank has called it.
    fn barrier(&mut self) -> Result<(), CollectiveError>;

    /// Begins a sum over all ranks, in place, that may go on while the caller computes something else: the tensor is not to be
    /// touched until [`finish_sums`](Self::finish_sums) has returned. Several may be begun; no other call comes in between.
    fn begin_sum(&mut self, tensor: &mut Tensor) -> Result<(), CollectiveError> {
        self.all_reduce(tensor, ReduceOp::Sum)
    }

    /// Waits for all sums that were begun.
    fn finish_sums(&mut self) -> Result<(), CollectiveError> {
        Ok(())
    }
}

/// How values of ranks are combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReduceOp {
    /// Sum.
    Sum,
    /// Largest.
    Max,
}

/// Why a collective call failed.
#[derive(Debug, thiserror::Error)]
pub enum CollectiveError {
    /// A peer's connection broke: its process is gone.
    #[error("{operation}: rank {peer} of {world_size} is gone: {cause}")]
    PeerLost {
        /// The operation that noticed.
        operation: &'static str,
        /// The peer.
        peer: u32,
        /// Ranks in the world.
        world_size: u32,
        /// What the system said.
        cause: String,
    },
    /// A peer did not answer in time.
    #[error("{operation}: no word from rank {peer} of {world_size} for {waited:?}")]
    Timeout {
        /// The operation.
        operation: &'static str,
        /// The peer that was waited for.
        peer: u32,
        /// Ranks in the world.
        world_size: u32,
        /// How long.
        waited: Duration,
    },
    /// The ranks did not make the same call: a bug, named instead of a hang or wrong numbers.
    #[error("{operation}: rank {peer} made another call: {detail}")]
    Mismatch {
        /// The operation.
        operation: &'static str,
        /// The peer.
        peer: u32,
        /// Both calls.
        detail: String,
    },
    /// What carries the operation failed on this rank or did not end it in time, and no peer is known to be the cause.
    #[error("{operation} on rank {rank} of {world_size}: {detail}")]
    Failed {
        /// The operation.
        operation: &'static str,
        /// This rank.
        rank: u32,
        /// Ranks in the world.
        world_size: u32,
        /// What is said of it.
        detail: String,
    },
    /// This communicator failed before.
    #[error("{operation}: the communicator failed before: {first}")]
    Dead {
        /// The operation.
        operation: &'static str,
        /// The first failure.
        first: String,
    },
    /// The tensor cannot be sent: not contiguous, an unsupported kind, rows that do not divide.
    #[error("{operation}: {detail}")]
    Unsupported {
        /// The operation.
        operation: &'static str,
        /// Why.
        detail: String,
    },
}

//! Collectives between GPUs, over NCCL, with the ring over TCP beside it. Where a tensor lives decides: one in the memory of the
//! rank's GPU goes through NCCL, any other over the ring, and so do barriers. All ranks' tensors of a call live alike.
//!
//! The ring comes up first and brings NCCL up: rank 0 broadcasts the world's id over it. Before each operation a rank tells the
//! next one which call it makes, over the ring: NCCL itself compares nothing, and would hang or give wrong numbers where
//! ranks disagree. A call returns when its result is there, so an `Ok` holds here as on the ring, and nothing is computed
//! from sums that were aborted. `watchdog.rs` sees to it that every wait ends; `library.rs` has NCCL's functions.
//!
//! Reductions: NCCL reduces each element once and hands the result round (ring, tree, in the NVLink switch), so every rank has
//! the same bits. It chooses algorithm and order by size, topology and version: the same machines give the same bits run after
//! run for rings and trees; other machines, or NCCL_ALGO, may give other last bits; for sums in the switch NVIDIA promises no order.

pub mod library;
#[cfg(test)]
pub(super) mod tests;
mod watchdog;

use super::{
    Collective, CollectiveError, ReduceOp, TcpCollective, Timeouts,
    tcp::{check, check_reducible, check_root, rows_of_each, shape_of_all, unsupported},
    wire::Operation,
};
use crate::device::streams::{CudaTimeline, Timeline};
use library::{Comm, ID_BYTES, Library, State, Work};
use std::{sync::Arc, time::Duration};
use tch::{Device, Kind, Tensor, no_grad};
use watchdog::Watchdog;

pub use watchdog::Trouble;

/// NCCL and the GPU's streams, or what is in the way.
pub type Opened = Result<(Arc<Library>, Box<dyn Timeline>), Trouble>;

/// What the first calls are named in errors: NCCL comes up.
const CONNECT: &str = "connect";

/// One rank's end of a world of GPUs.
pub struct NcclCollective {
    rank: u32,
    world_size: u32,
    /// Where tensors live that go through NCCL.
    device: Device,
    /// Of an operation.
    limit: Duration,
    /// Ends the communicator when it goes, and so before the stream.
    watchdog: Watchdog,
    timeline: Box<dyn Timeline>,
}

impl NcclCollective {
    /// Brings NCCL up between the ranks of `ring`, this one on the GPU that CUDA and libtorch count as `ordinal`. Collective:
    /// every rank calls it next after the ring is up. `ordinal`'s context becomes the calling thread's.
    ///
    /// # Errors
    /// As its operations; `Failed` if this rank lacks the driver, the GPU or NCCL. The peers are told.
    pub fn start(ring: TcpCollective, ordinal: u32, timeouts: Timeouts) -> Result<Self, CollectiveError> {
        let device = Device::Cuda(ordinal as usize);
        let open = || -> Opened {
            let library = Arc::new(Library::open(None)?);
            Ok((library, Box::new(CudaTimeline::open(ordinal)?)))
        };
        Self::over(ring, open, device, timeouts)
    }

    /// The same with any library and timeline, for tensors that live on `device`.
    ///
    /// # Errors
    /// As [`Self::start`]; `Failed` with what `open` says.
    pub fn over(
        mut ring: TcpCollective,
        open: impl FnOnce() -> Opened,
        device: Device,
        timeouts: Timeouts,
    ) -> Result<Self, CollectiveError> {
        let (rank, world_size) = (ring.rank(), ring.world_size());
        let failed = |detail: String| CollectiveError::Failed {
            operation: CONNECT,
            rank,
            world_size,
            detail,
        };
        let opened = open().map_err(|trouble| failed(trouble.to_string()));
        let begun = opened.and_then(|(library, timeline)| {
            let id = agree_on_id(&mut ring, &library, failed)?;
            let comm = Comm::begin(library, &id, rank, world_size);
            Ok((comm.map_err(|error| failed(error.to_string()))?, timeline))
        });
        let (comm, timeline) = match begun {
            Ok(begun) => begun,
            Err(error) => {
                ring.fail(&error);
                return Err(error);
            }
        };
        let watchdog = Watchdog::start(comm, ring, rank, world_size)
            .map_err(|error| failed(format!("start a thread: {error}")))?;
        let connected = watchdog.wait(CONNECT, timeouts.connect, || is_ready(watchdog.comm()));
        connected.inspect_err(|error| watchdog.end(error))?;
        Ok(Self {
            rank,
            world_size,
            device,
            limit: timeouts.operation,
            watchdog,
            timeline,
        })
    }

    /// Closes the ring's connections without a word, as a killed process does.
    #[cfg(test)]
    pub(super) fn sever(&mut self) {
        self.watchdog.ring().sever();
    }

    /// Runs one operation; an error ends the communicator, here and on the peers.
    fn run<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<T, CollectiveError>,
    ) -> Result<T, CollectiveError> {
        let result = self.watchdog.late_verdict().and_then(|()| work(self));
        if let Err(error) = &result {
            self.watchdog.end(error);
        }
        result
    }

    /// One of the ring's own.
    fn on_ring<T>(
        &mut self,
        work: impl FnOnce(&mut TcpCollective) -> Result<T, CollectiveError>,
    ) -> Result<T, CollectiveError> {
        self.run(|this| work(&mut this.watchdog.ring()))
    }

    fn is_here(&self, tensor: &Tensor) -> bool {
        tensor.device() == self.device
    }

    /// Compares the call with the neighbours', and waits for the previous rank to make it.
    fn announce(&self, operation: Operation, tensor: &Tensor, detail: u32) -> Result<(), CollectiveError> {
        if !tensor.is_contiguous() {
            return Err(unsupported(operation, "the tensor is not contiguous".to_owned()));
        }
        let kind = tensor.kind();
        let bytes = tensor.numel() * kind.elt_size_in_bytes();
        self.watchdog.ring().announce(operation, kind, detail, bytes)
    }

    /// Gives it to the GPU behind what is computed there, and waits until it is done.
    fn perform(&mut self, operation: Operation, work: &Work<'_>) -> Result<(), CollectiveError> {
        if work.is_empty() {
            return Ok(());
        }
        let (comm, timeline) = (self.watchdog.comm(), &mut self.timeline);
        let mut given = false;
        let mut marked = false;
        self.watchdog.wait(operation.name(), self.limit, || {
            if !given {
                timeline.follow_compute()?;
                comm.enqueue(work, timeline.stream())?;
                given = true;
            }
            if !is_ready(comm)? {
                return Ok(false);
            }
            if !marked {
                timeline.mark()?;
                marked = true;
            }
            // An error that came meanwhile may have ended it.
            Ok(timeline.reached()? && is_ready(comm)?)
        })
    }

    /// NCCL's maximum of a number and NaN is the number. So where a rank has one travels beside the numbers.
    fn maximum(&mut self, operation: Operation, tensor: &mut Tensor) -> Result<(), CollectiveError> {
        let both = no_grad(|| {
            let nan = tensor.isnan();
            let numbers = tensor.masked_fill(&nan, f64::NEG_INFINITY);
            Tensor::stack(&[&numbers, &nan.to_kind(tensor.kind())], 0)
        });
        let op = ReduceOp::Max;
        self.perform(operation, &Work::AllReduce { tensor: &both, op })?;
        no_grad(|| {
            let nan_anywhere = both.get(1).to_kind(Kind::Bool);
            tensor.copy_(&both.get(0).masked_fill(&nan_anywhere, f64::NAN));
        });
        Ok(())
    }
}

/// True once NCCL has no call on its way.
fn is_ready(comm: &Comm) -> Result<bool, Trouble> {
    Ok(comm.state()? == State::Ready)
}

/// Rank 0 names the world, and tells all.
fn agree_on_id(
    ring: &mut TcpCollective,
    library: &Library,
    failed: impl Fn(String) -> CollectiveError,
) -> Result<[u8; ID_BYTES], CollectiveError> {
    let id = match ring.rank() {
        0 => library.unique_id().map_err(|error| failed(error.to_string()))?,
        _ => [0; ID_BYTES],
    };
    let mut told = Tensor::from_slice(&id);
    ring.broadcast(&mut told, 0)?;
    let id = Vec::<u8>::try_from(told).map_err(|error| failed(error.to_string()))?;
    id.try_into()
        .map_err(|_| failed("the id has another size".to_owned()))
}

impl Collective for NcclCollective {
    fn rank(&self) -> u32 {
        self.rank
    }

    fn world_size(&self) -> u32 {
        self.world_size
    }

    fn all_reduce(&mut self, tensor: &mut Tensor, op: ReduceOp) -> Result<(), CollectiveError> {
        if !self.is_here(tensor) {
            return self.on_ring(|ring| ring.all_reduce(tensor, op));
        }
        let operation = Operation::AllReduce;
        self.run(|this| {
            let kind = check_reducible(operation, tensor)?;
            this.announce(operation, tensor, op as u32)?;
            match (op, kind) {
                (ReduceOp::Sum, _) | (_, Kind::Int64) => {
                    this.perform(operation, &Work::AllReduce { tensor, op })
                }
                (ReduceOp::Max, _) => this.maximum(operation, tensor),
            }
        })
    }

    fn all_gather(&mut self, local: &Tensor) -> Result<Tensor, CollectiveError> {
        if !self.is_here(local) {
            return self.on_ring(|ring| ring.all_gather(local));
        }
        let operation = Operation::AllGather;
        self.run(|this| {
            let kind = check(operation, local)?;
            let shape = shape_of_all(operation, local, this.world_size)?;
            this.announce(operation, local, 0)?;
            let all = Tensor::empty(&shape, (kind, this.device));
            this.perform(operation, &Work::AllGather { local, all: &all })?;
            Ok(all)
        })
    }

    fn reduce_scatter(&mut self, full: &Tensor) -> Result<Tensor, CollectiveError> {
        if !self.is_here(full) {
            return self.on_ring(|ring| ring.reduce_scatter(full));
        }
        let operation = Operation::ReduceScatter;
        self.run(|this| {
            let kind = check_reducible(operation, full)?;
            let mut shape = full.size();
            let rows = rows_of_each(operation, full, i64::from(this.world_size))?;
            shape[0] = rows;
            this.announce(operation, full, 0)?;
            let own = Tensor::empty(&shape, (kind, this.device));
            this.perform(operation, &Work::ReduceScatter { full, own: &own })?;
            Ok(own)
        })
    }

    fn broadcast(&mut self, tensor: &mut Tensor, root: u32) -> Result<(), CollectiveError> {
        if !self.is_here(tensor) {
            return self.on_ring(|ring| ring.broadcast(tensor, root));
        }
        let operation = Operation::Broadcast;
        self.run(|this| {
            check(operation, tensor)?;
            check_root(root, this.world_size)?;
            this.announce(operation, tensor, root)?;
            this.perform(operation, &Work::Broadcast { tensor, root })
        })
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.on_ring(Collective::barrier)
    }
}

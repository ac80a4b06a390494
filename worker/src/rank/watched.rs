//! The ranks' collective operations, shown on the board and timed: the last one tells where a hung rank stands, and their
//! time is no rank's own.

use super::phases::Together;
use crate::collective::{Collective, CollectiveError, ReduceOp};
use crate::progress::{Board, Operation};
use std::time::Instant;
use tch::Tensor;

/// A communicator whose calls are shown and timed.
pub struct Watched {
    inner: Box<dyn Collective>,
    board: Board,
    together: Together,
    /// Bytes of the sums that were begun.
    begun: usize,
}

impl Watched {
    /// Shows the calls of `inner` on `board`, and counts their time in `together`.
    pub fn new(inner: Box<dyn Collective>, board: Board, together: Together) -> Self {
        Self {
            inner,
            board,
            together,
            begun: 0,
        }
    }

    fn show<T>(
        &mut self,
        operation: Operation,
        bytes: usize,
        call: impl FnOnce(&mut dyn Collective) -> Result<T, CollectiveError>,
    ) -> Result<T, CollectiveError> {
        self.board.begin(operation, bytes as u64);
        let begin = Instant::now();
        let result = call(self.inner.as_mut());
        self.together.add(operation, bytes, begin.elapsed());
        self.board.end();
        result
    }
}

fn bytes(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}

impl Collective for Watched {
    fn rank(&self) -> u32 {
        self.inner.rank()
    }

    fn world_size(&self) -> u32 {
        self.inner.world_size()
    }

    fn all_reduce(&mut self, tensor: &mut Tensor, op: ReduceOp) -> Result<(), CollectiveError> {
        self.show(Operation::AllReduce, bytes(tensor), |inner| {
            inner.all_reduce(tensor, op)
        })
    }

    fn all_gather(&mut self, local: &Tensor) -> Result<Tensor, CollectiveError> {
        self.show(Operation::AllGather, bytes(local), |inner| {
            inner.all_gather(local)
        })
    }

    fn reduce_scatter(&mut self, full: &Tensor) -> Result<Tensor, CollectiveError> {
        self.show(Operation::ReduceScatter, bytes(full), |inner| {
            inner.reduce_scatter(full)
        })
    }

    fn broadcast(&mut self, tensor: &mut Tensor, root: u32) -> Result<(), CollectiveError> {
        self.show(Operation::Broadcast, bytes(tensor), |inner| {
            inner.broadcast(tensor, root)
        })
    }

    fn begin_sum(&mut self, tensor: &mut Tensor) -> Result<(), CollectiveError> {
        self.begun += bytes(tensor);
        self.inner.begin_sum(tensor)
    }

    /// Only what is waited for at the end counts as time together: before, this rank computes.
    fn finish_sums(&mut self) -> Result<(), CollectiveError> {
        let bytes = std::mem::take(&mut self.begun);
        self.show(Operation::AllReduce, bytes, |inner| inner.finish_sums())
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.show(Operation::Barrier, 0, |inner| inner.barrier())
    }
}

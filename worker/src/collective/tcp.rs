//! Collectives over TCP: a ring, for ranks on CPUs. Knows the algorithms; the connections are `links.rs`' and
//! `connect.rs`' matter.
//!
//! A reduction cuts the tensor into one segment per rank. Segment s is summed along the ring from rank s on, always in
//! that order, and the finished segment travels round once more: every rank gets the same bits, and each sends
//! 2 (W-1)/W of the tensor.

use super::{
    Collective, CollectiveError, ReduceOp,
    links::{Links, SCRATCH_BYTES, Sink},
    memory, reduce,
    wire::{Header, Operation},
};
use std::{ops::Range, time::Duration};
use tch::{Device, Kind, Tensor, no_grad};

/// Bytes of a piece of a broadcast: rank after rank passes them on, so small pieces keep all of them busy.
const BROADCAST_PIECE: usize = 1 << 20;

/// The step of a header that only says which call a rank makes: no tensor has so many.
const ANNOUNCED: u32 = u32::MAX;

/// One rank's end of a ring over TCP. Made by [`Listener::connect`](super::Listener::connect).
pub struct TcpCollective {
    /// `None` in a world of one.
    links: Option<Links>,
    sequence: u64,
    scratch: Vec<u64>,
    /// The first error, once there was one.
    dead: Option<String>,
}

impl TcpCollective {
    /// A world of one, without a socket.
    pub fn alone() -> Self {
        Self::new(None)
    }

    /// A world over connections.
    pub(super) fn over(links: Links) -> Self {
        Self::new(Some(links))
    }

    fn new(links: Option<Links>) -> Self {
        Self {
            links,
            sequence: 0,
            scratch: vec![0; SCRATCH_BYTES / size_of::<u64>()],
            dead: None,
        }
    }

    /// Closes the connections without a word, as a killed process does.
    #[cfg(test)]
    pub(super) fn sever(&mut self) {
        if let Some(links) = &mut self.links {
            links.sever();
        }
    }

    /// Tells the next rank which call this one makes of a communicator beside the ring, and hears the same of the previous
    /// rank. So calls that differ are named, and a rank that does not come is found as in the ring's own operations.
    pub(super) fn announce(
        &mut self,
        operation: Operation,
        kind: Kind,
        detail: u32,
        bytes: usize,
    ) -> Result<(), CollectiveError> {
        self.run(operation, |this| {
            let call = Header {
                step: ANNOUNCED,
                ..this.header(operation, kind, detail, bytes)
            };
            match &mut this.links {
                Some(links) => links.transfer(Some(message(call, &[])), call, Sink::Copy(&mut [])),
                None => Ok(()),
            }
        })
    }

    /// Looks, without waiting, whether a peer is gone or has told of a failure. Each is told once.
    pub(super) fn look(&mut self, operation: &'static str) -> Result<(), CollectiveError> {
        self.links.as_mut().map_or(Ok(()), |links| links.hear(operation))
    }

    /// Tells the peers that this rank waits, for nobody in particular.
    pub(super) fn tell_waiting(&mut self) {
        if let Some(links) = &mut self.links {
            links.tell_waiting();
        }
    }

    /// The first peer that has not said lately that it waits too.
    pub(super) fn first_silent(&self, lately: Duration) -> Option<u32> {
        self.links.as_ref()?.first_silent(lately)
    }

    /// The first peer that has left in good order.
    pub(super) fn first_left(&self) -> Option<u32> {
        self.links.as_ref()?.first_left()
    }

    /// Ends the communicator, here and on the peers, which are told why. The first failure counts.
    pub(super) fn fail(&mut self, error: &CollectiveError) {
        self.dead.get_or_insert_with(|| error.to_string());
        if let Some(links) = &mut self.links {
            links.fail(error);
        }
    }

    /// Runs one operation; an error ends the communicator, here and on the peers.
    fn run<T>(
        &mut self,
        operation: Operation,
        work: impl FnOnce(&mut Self) -> Result<T, CollectiveError>,
    ) -> Result<T, CollectiveError> {
        if let Some(first) = &self.dead {
            return Err(CollectiveError::Dead {
                operation: operation.name(),
                first: first.clone(),
            });
        }
        self.sequence += 1;
        let result = work(self);
        if let Err(error) = &result {
            self.fail(error);
        }
        result
    }

    /// Header of this call's messages, but for step and payload.
    fn header(&self, operation: Operation, kind: Kind, detail: u32, total: usize) -> Header {
        Header {
            operation,
            kind: reduce::code(kind),
            detail,
            step: 0,
            sequence: self.sequence,
            total: total as u64,
            payload: 0,
        }
    }

    /// Sums (or ...) segment by segment round the ring: afterwards rank r has segment `(r + 1 + shift) mod W` whole.
    fn reduce_segments(
        &mut self,
        call: Header,
        buffer: &mut [u8],
        kind: Kind,
        op: ReduceOp,
        shift: u32,
    ) -> Result<(), CollectiveError> {
        let Some(links) = &mut self.links else {
            return Ok(());
        };
        let (rank, world) = (links.rank() + shift, links.world_size());
        let scratch: &mut [u8] = bytemuck::cast_slice_mut(&mut self.scratch);
        for step in 0..world - 1 {
            let send = segment(buffer.len(), kind, rank + world - step, world);
            let receive = segment(buffer.len(), kind, rank + 2 * world - step - 1, world);
            let (send, into) = send_and_receive(buffer, send, receive);
            let header = Header { step, ..call };
            let message = message(header, send);
            let sink = Sink::Reduce {
                into,
                kind,
                op,
                scratch: &mut *scratch,
            };
            links.transfer(Some(message), header, sink)?;
        }
        Ok(())
    }

    /// Passes whole segments round the ring; rank r starts with segment `(r + shift) mod W`.
    fn gather_segments(
        &mut self,
        call: Header,
        buffer: &mut [u8],
        kind: Kind,
        shift: u32,
        first_step: u32,
    ) -> Result<(), CollectiveError> {
        let Some(links) = &mut self.links else {
            return Ok(());
        };
        let (rank, world) = (links.rank() + shift, links.world_size());
        for step in 0..world - 1 {
            let send = segment(buffer.len(), kind, rank + world - step, world);
            let receive = segment(buffer.len(), kind, rank + 2 * world - step - 1, world);
            let (send, into) = send_and_receive(buffer, send, receive);
            let header = Header {
                step: first_step + step,
                ..call
            };
            links.transfer(Some(message(header, send)), header, Sink::Copy(into))?;
        }
        Ok(())
    }

    /// Passes the root's bytes from rank to rank, piece by piece.
    fn pass_on(&mut self, call: Header, buffer: &mut [u8], root: u32) -> Result<(), CollectiveError> {
        let Some(links) = &mut self.links else {
            return Ok(());
        };
        let world = links.world_size();
        let distance = (links.rank() + world - root) % world;
        let pieces = buffer.len().div_ceil(BROADCAST_PIECE).max(1);
        let piece = |index: usize| {
            let start = index * BROADCAST_PIECE;
            start..(start + BROADCAST_PIECE).min(buffer.len())
        };
        let ranges: Vec<Range<usize>> = (0..pieces).map(piece).collect();
        let (receives, sends) = (distance > 0, distance < world - 1);
        // In turn t a rank receives piece t and sends piece t-1, which it received before; the root has them all.
        let turns = if receives && sends { pieces + 1 } else { pieces };
        for turn in 0..turns {
            let receive = ranges.get(turn).filter(|_| receives).cloned();
            let send_index = if receives { turn.checked_sub(1) } else { Some(turn) };
            let send = send_index.filter(|_| sends);
            let empty = receive.clone().unwrap_or(buffer.len()..buffer.len());
            let range = send.map_or(0..0, |index| ranges[index].clone());
            let (bytes, into) = send_and_receive(buffer, range, empty);
            let at = |step: usize| Header {
                step: step as u32,
                ..call
            };
            let outgoing = send.map(|index| message(at(index), bytes));
            let sink = match receive {
                Some(_) => Sink::Copy(into),
                None => Sink::Nothing,
            };
            links.transfer(outgoing, at(turn), sink)?;
        }
        Ok(())
    }
}

impl Collective for TcpCollective {
    fn rank(&self) -> u32 {
        self.links.as_ref().map_or(0, Links::rank)
    }

    fn world_size(&self) -> u32 {
        self.links.as_ref().map_or(1, Links::world_size)
    }

    fn all_reduce(&mut self, tensor: &mut Tensor, op: ReduceOp) -> Result<(), CollectiveError> {
        let operation = Operation::AllReduce;
        self.run(operation, |this| {
            let kind = check_reducible(operation, tensor)?;
            let buffer = memory::bytes_mut(tensor).ok_or_else(|| not_plain(operation))?;
            let call = this.header(operation, kind, op as u32, buffer.len());
            this.reduce_segments(call, buffer, kind, op, 0)?;
            let steps_done = this.world_size() - 1;
            this.gather_segments(call, buffer, kind, 1, steps_done)
        })
    }

    fn all_gather(&mut self, local: &Tensor) -> Result<Tensor, CollectiveError> {
        let operation = Operation::AllGather;
        self.run(operation, |this| {
            let kind = check(operation, local)?;
            let bytes = memory::bytes(local).ok_or_else(|| not_plain(operation))?;
            let (rank, world) = (this.rank(), this.world_size());
            let shape = shape_of_all(operation, local, world)?;
            let mut all = Tensor::empty(&shape, (kind, Device::Cpu));
            let buffer = memory::bytes_mut(&mut all).ok_or_else(|| not_plain(operation))?;
            let own = segment(buffer.len(), kind, rank, world);
            buffer[own].copy_from_slice(bytes);
            let call = this.header(operation, kind, 0, buffer.len());
            this.gather_segments(call, buffer, kind, 0, 0)?;
            Ok(all)
        })
    }

    fn reduce_scatter(&mut self, full: &Tensor) -> Result<Tensor, CollectiveError> {
        let operation = Operation::ReduceScatter;
        self.run(operation, |this| {
            let kind = check_reducible(operation, full)?;
            let (rank, world) = (i64::from(this.rank()), i64::from(this.world_size()));
            let own = rows_of_each(operation, full, world)?;
            let mut sums = no_grad(|| full.copy());
            let buffer = memory::bytes_mut(&mut sums).ok_or_else(|| not_plain(operation))?;
            let call = this.header(operation, kind, 0, buffer.len());
            // Ends with segment r on rank r: one place later than an all_reduce, that is W-1 further.
            this.reduce_segments(call, buffer, kind, ReduceOp::Sum, (world - 1) as u32)?;
            Ok(no_grad(|| sums.narrow(0, rank * own, own).copy()))
        })
    }

    fn broadcast(&mut self, tensor: &mut Tensor, root: u32) -> Result<(), CollectiveError> {
        let operation = Operation::Broadcast;
        self.run(operation, |this| {
            let kind = check(operation, tensor)?;
            check_root(root, this.world_size())?;
            let buffer = memory::bytes_mut(tensor).ok_or_else(|| not_plain(operation))?;
            let call = this.header(operation, kind, root, buffer.len());
            this.pass_on(call, buffer, root)
        })
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        let operation = Operation::Barrier;
        self.run(operation, |this| {
            let call = this.header(operation, Kind::Uint8, 0, 0);
            // After t turns a rank knows that t ranks before it have come: an empty gather.
            this.gather_segments(call, &mut [], Kind::Uint8, 0, 0)
        })
    }
}

/// Bytes of segment `index mod world`: whole elements, the rest spread over the first segments.
fn segment(bytes: usize, kind: Kind, index: u32, world: u32) -> Range<usize> {
    let size = reduce::element_size(kind).unwrap_or(1);
    let (elements, index, world) = (bytes / size, (index % world) as usize, world as usize);
    let (share, rest) = (elements / world, elements % world);
    let start = share * index + index.min(rest);
    let length = share + usize::from(index < rest);
    start * size..(start + length) * size
}

/// Two disjoint parts of a buffer, one to send and one to write.
fn send_and_receive(buffer: &mut [u8], send: Range<usize>, receive: Range<usize>) -> (&[u8], &mut [u8]) {
    if send.end <= receive.start {
        let (low, high) = buffer.split_at_mut(receive.start);
        (&low[send], &mut high[..receive.len()])
    } else {
        let (low, high) = buffer.split_at_mut(send.start);
        (&high[..send.len()], &mut low[receive])
    }
}

fn message(header: Header, payload: &[u8]) -> (Header, &[u8]) {
    let payload_bytes = payload.len() as u64;
    let header = Header {
        payload: payload_bytes,
        ..header
    };
    (header, payload)
}

pub(super) fn unsupported(operation: Operation, detail: String) -> CollectiveError {
    CollectiveError::Unsupported {
        operation: operation.name(),
        detail,
    }
}

fn not_plain(operation: Operation) -> CollectiveError {
    unsupported(
        operation,
        "the tensor is not contiguous, or not in the CPU's memory".to_owned(),
    )
}

/// The shape of what all ranks have together.
pub(super) fn shape_of_all(
    operation: Operation,
    local: &Tensor,
    world: u32,
) -> Result<Vec<i64>, CollectiveError> {
    let mut shape = local.size();
    let rows = shape.first_mut().ok_or_else(|| no_rows(operation))?;
    *rows *= i64::from(world);
    Ok(shape)
}

/// Rows of `full` that each rank gets.
pub(super) fn rows_of_each(operation: Operation, full: &Tensor, world: i64) -> Result<i64, CollectiveError> {
    let rows = *full.size().first().ok_or_else(|| no_rows(operation))?;
    match rows % world {
        0 => Ok(rows / world),
        _ => Err(unsupported(
            operation,
            format!("{rows} rows do not divide among {world} ranks"),
        )),
    }
}

pub(super) fn check_root(root: u32, world_size: u32) -> Result<(), CollectiveError> {
    if root < world_size {
        return Ok(());
    }
    Err(unsupported(
        Operation::Broadcast,
        format!("there is no rank {root} to copy from"),
    ))
}

fn no_rows(operation: Operation) -> CollectiveError {
    unsupported(operation, "a tensor without dimensions has no rows".to_owned())
}

pub(super) fn check(operation: Operation, tensor: &Tensor) -> Result<Kind, CollectiveError> {
    let kind = tensor.kind();
    match reduce::element_size(kind) {
        Some(_) => Ok(kind),
        None => Err(unsupported(
            operation,
            format!("tensors of kind {kind:?} cannot be sent"),
        )),
    }
}

pub(super) fn check_reducible(operation: Operation, tensor: &Tensor) -> Result<Kind, CollectiveError> {
    let kind = check(operation, tensor)?;
    match reduce::reducible(kind) {
        true => Ok(kind),
        false => Err(unsupported(
            operation,
            format!("tensors of kind {kind:?} cannot be reduced"),
        )),
    }
}

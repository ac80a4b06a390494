//! A communicator on a thread of its own, so that sums go on while the training thread computes. Knows no network: what
//! it is given does the work. Calls are done in the order in which they are made.

use super::{Collective, CollectiveError, ReduceOp};
use std::{
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread::JoinHandle,
};
use tch::Tensor;

/// Calls that wait for the thread, before whoever makes another one waits too.
const WAITING: usize = 64;

/// Done on the thread.
type Call = Box<dyn FnOnce(&mut dyn Collective) + Send>;

/// See the head of this file. Dropping it waits for the call under way.
pub struct Beside {
    rank: u32,
    world_size: u32,
    calls: Option<SyncSender<Call>>,
    /// What will be heard of each sum that was begun.
    sums: Vec<Receiver<Result<(), CollectiveError>>>,
    thread: Option<JoinHandle<()>>,
}

impl Beside {
    /// Moves a communicator to a thread. One of a single rank stays: it has nothing to wait for.
    pub fn start(mut inner: Box<dyn Collective>) -> Box<dyn Collective> {
        let (rank, world_size) = (inner.rank(), inner.world_size());
        if world_size == 1 {
            return inner;
        }
        let (calls, queue) = sync_channel::<Call>(WAITING);
        let thread = std::thread::spawn(move || {
            for call in queue {
                call(inner.as_mut());
            }
        });
        Box::new(Self {
            rank,
            world_size,
            calls: Some(calls),
            sums: Vec::new(),
            thread: Some(thread),
        })
    }

    /// Hands a call to the thread.
    fn send(&self, call: Call) {
        // A thread that is gone has panicked; whoever waits for its answer hears of it.
        if let Some(calls) = &self.calls {
            let _gone = calls.send(call);
        }
    }

    /// Hands a call to the thread and waits for its end.
    fn call<T: Send + 'static>(
        &self,
        operation: &'static str,
        call: impl FnOnce(&mut dyn Collective) -> Result<T, CollectiveError> + Send + 'static,
    ) -> Result<T, CollectiveError> {
        let (sender, answer) = sync_channel(1);
        self.send(Box::new(move |inner| {
            // The caller waits below.
            let _heard = sender.send(call(inner));
        }));
        answer.recv().unwrap_or_else(|_| Err(gone(operation)))
    }
}

fn gone(operation: &'static str) -> CollectiveError {
    CollectiveError::Dead {
        operation,
        first: "its thread has ended".to_owned(),
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        drop(self.calls.take());
        if let Some(thread) = self.thread.take() {
            // A panic there was printed there.
            thread.join().unwrap_or_default();
        }
    }
}

impl Collective for Beside {
    fn rank(&self) -> u32 {
        self.rank
    }

    fn world_size(&self) -> u32 {
        self.world_size
    }

    fn all_reduce(&mut self, tensor: &mut Tensor, op: ReduceOp) -> Result<(), CollectiveError> {
        // Another handle to the same numbers.
        let mut tensor = tensor.shallow_clone();
        self.call("all_reduce", move |inner| inner.all_reduce(&mut tensor, op))
    }

    fn all_gather(&mut self, local: &Tensor) -> Result<Tensor, CollectiveError> {
        let local = local.shallow_clone();
        self.call("all_gather", move |inner| inner.all_gather(&local))
    }

    fn reduce_scatter(&mut self, full: &Tensor) -> Result<Tensor, CollectiveError> {
        let full = full.shallow_clone();
        self.call("reduce_scatter", move |inner| inner.reduce_scatter(&full))
    }

    fn broadcast(&mut self, tensor: &mut Tensor, root: u32) -> Result<(), CollectiveError> {
        let mut tensor = tensor.shallow_clone();
        self.call("broadcast", move |inner| inner.broadcast(&mut tensor, root))
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.call("barrier", |inner| inner.barrier())
    }

    fn begin_sum(&mut self, tensor: &mut Tensor) -> Result<(), CollectiveError> {
        let mut tensor = tensor.shallow_clone();
        let (done, summed) = sync_channel(1);
        self.sums.push(summed);
        self.send(Box::new(move |inner| {
            let summed = inner.all_reduce(&mut tensor, ReduceOp::Sum);
            // Before the other side hears of it: from then on the numbers are its own.
            drop(tensor);
            let _heard = done.send(summed);
        }));
        Ok(())
    }

    fn finish_sums(&mut self) -> Result<(), CollectiveError> {
        let sums = self.sums.drain(..);
        let heard = sums.map(|sum| sum.recv().unwrap_or_else(|_| Err(gone("all_reduce"))));
        // All are waited for. The first error says what happened, the others that it had.
        heard.fold(Ok(()), Result::and)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::local;
    use std::{thread, time::Duration};
    use tch::{Device, Kind};

    /// Runs `work` on every rank of a world.
    fn on_ranks(world_size: u32, work: impl Fn(Box<dyn Collective>) + Sync) {
        let world = local::world(world_size, Duration::from_secs(20)).expect("loopback");
        thread::scope(|scope| {
            for comm in world {
                scope.spawn(|| work(Beside::start(Box::new(comm))));
            }
        });
    }

    #[test]
    fn sums_that_are_begun_are_there_when_they_are_finished() {
        for world_size in [1, 2, 3] {
            on_ranks(world_size, |mut comm| {
                let rank = f64::from(comm.rank());
                let total: f64 = (0..world_size).map(f64::from).sum();
                for round in 0..5 {
                    let mut tensors: Vec<Tensor> = (0..4)
                        .map(|i| Tensor::full([1000 * i + 1], rank + i as f64, (Kind::Float, Device::Cpu)))
                        .collect();
                    for tensor in &mut tensors {
                        comm.begin_sum(tensor).expect("begun");
                    }
                    comm.finish_sums().expect("finished");
                    for (i, tensor) in tensors.iter().enumerate() {
                        let expected = total + i as f64 * f64::from(world_size);
                        assert!(tensor.eq(expected).all().int64_value(&[]) == 1, "{round}");
                    }
                    let gathered = comm.all_gather(&Tensor::from_slice(&[rank])).expect("gathered");
                    assert_eq!(gathered.sum(Kind::Double).double_value(&[]), total);
                }
                comm.finish_sums().expect("nothing was begun");
            });
        }
    }

    #[test]
    fn a_peer_that_is_gone_is_told_when_the_sums_are_finished() {
        on_ranks(2, |mut comm| {
            if comm.rank() == 1 {
                return;
            }
            let mut tensors = [Tensor::ones([8], (Kind::Float, Device::Cpu)), Tensor::from(1f32)];
            for tensor in &mut tensors {
                comm.begin_sum(tensor).expect("begun");
            }
            let error = comm.finish_sums().expect_err("rank 1 is gone");
            assert!(
                matches!(error, CollectiveError::PeerLost { peer: 1, .. }),
                "{error}"
            );
            let error = comm.barrier().expect_err("it stays dead");
            assert!(matches!(error, CollectiveError::Dead { .. }), "{error}");
        });
    }
}

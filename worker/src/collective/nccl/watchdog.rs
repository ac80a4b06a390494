//! Who watches an operation on GPUs while the rank waits for it, and ends the communicator when it cannot end well. A thread of its
//! own, since the rank's may hang in a call of NCCL or the driver: an abort from outside lets it go.
//!
//! It asks NCCL for asynchronous errors, looks at the ring's connections, which tell who is gone, and at the clock. The rank's
//! thread only waits; what it meets itself it hands over here, so that one thread judges. Reads the clock: a deadline has no
//! other form.

use super::library::{Comm, NcclError, State};
use crate::{
    collective::{CollectiveError, TcpCollective},
    device::streams::StreamError,
};
use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// Between two looks. A lost peer is noticed so much later than on the ring, at most.
const LOOK: Duration = Duration::from_millis(20);
/// How long the ring may take to tell whose fault an error is that NCCL told first.
const GRACE: Duration = Duration::from_secs(1);
/// How much longer than a peer, which had its part and left, an operation may take here.
const AFTER_LEAVING: Duration = Duration::from_secs(5);
/// How long the rank waits for an abort, and for a watchdog that has something to say.
const ABORT_LIMIT: Duration = Duration::from_secs(5);
/// How long an orderly end may take.
const CLOSE_LIMIT: Duration = Duration::from_secs(10);

/// Waits between two questions whether an operation is done: it spins at first, since most take less than the system needs to
/// wake a thread.
const SPINS: u32 = 200;
const SHORTEST_PAUSE: Duration = Duration::from_micros(20);
const LONGEST_PAUSE: Duration = Duration::from_micros(100);

/// What a rank meets while it gives an operation to its GPU.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    /// From NCCL.
    #[error(transparent)]
    Nccl(#[from] NcclError),
    /// From the driver, which may tell of anything that was computed.
    #[error(transparent)]
    Stream(#[from] StreamError),
}

/// An operation that is not done yet.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Call {
    operation: &'static str,
    began: Instant,
    limit: Duration,
}

/// What the two threads tell each other.
#[derive(Default)]
struct Now {
    /// What the rank waits for.
    call: Option<Call>,
    /// An error that the rank met in it.
    met: Option<Trouble>,
    /// Why the communicator ends, until the rank has taken it.
    verdict: Option<CollectiveError>,
    /// The rank itself has ended the communicator.
    over: bool,
    /// The rank leaves in good order.
    leaving: bool,
    /// The communicator has ended.
    ended: bool,
}

struct Shared {
    comm: Comm,
    /// In the rank's hands but while a call is under way.
    ring: Mutex<TcpCollective>,
    now: Mutex<Now>,
    changed: Condvar,
    rank: u32,
    world_size: u32,
}

/// A communicator, its ring, and the thread that watches them.
pub struct Watchdog {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watchdog {
    /// Begins to watch.
    ///
    /// # Errors
    /// If the system starts no thread; the communicator and the ring end with it.
    pub fn start(comm: Comm, ring: TcpCollective, rank: u32, world_size: u32) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            comm,
            ring: Mutex::new(ring),
            now: Mutex::default(),
            changed: Condvar::new(),
            rank,
            world_size,
        });
        let watched = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("nccl-watchdog".to_owned())
            .spawn(move || watched.watch());
        match thread {
            Ok(thread) => Ok(Self {
                shared,
                thread: Some(thread),
            }),
            Err(error) => {
                shared.comm.abort();
                Err(error)
            }
        }
    }

    /// The communicator.
    pub fn comm(&self) -> &Comm {
        &self.shared.comm
    }

    /// The ring, for an operation of its own.
    pub fn ring(&self) -> MutexGuard<'_, TcpCollective> {
        lock(&self.shared.ring)
    }

    /// A verdict on an earlier operation that came after its end.
    ///
    /// # Errors
    /// That verdict.
    pub fn late_verdict(&self) -> Result<(), CollectiveError> {
        self.shared.now().verdict.take().map_or(Ok(()), Err)
    }

    /// Waits until `done` is true, under the watchdog's eyes. `done` does not wait; what it fails with is explained by the
    /// watchdog, and it is not called again then.
    ///
    /// # Errors
    /// What is said on [`CollectiveError`]; at most some seconds after `limit`.
    pub fn wait(
        &self,
        operation: &'static str,
        limit: Duration,
        mut done: impl FnMut() -> Result<bool, Trouble>,
    ) -> Result<(), CollectiveError> {
        let began = Instant::now();
        let call = Call {
            operation,
            began,
            limit,
        };
        let mut failed = false;
        let (mut turns, mut pause) = (0, SHORTEST_PAUSE);
        self.shared.now().call = Some(call);
        loop {
            let asked = if failed { Ok(false) } else { done() };
            let mut now = self.shared.now();
            if let Some(verdict) = now.verdict.take() {
                // Until then it may still write to the tensors.
                let goes_on = |now: &mut Now| !now.ended;
                let wait = self.shared.changed.wait_timeout_while(now, ABORT_LIMIT, goes_on);
                let (mut now, _) = wait.unwrap_or_else(PoisonError::into_inner);
                now.call = None;
                return Err(verdict);
            }
            match asked {
                // Only without a verdict: an abort ends operations too.
                Ok(true) => {
                    (now.call, now.met) = (None, None);
                    return Ok(());
                }
                Ok(false) => {}
                Err(error) => {
                    (failed, now.met) = (true, Some(error));
                    self.shared.changed.notify_all();
                }
            }
            if began.elapsed() > limit + GRACE + ABORT_LIMIT {
                now.call = None;
                return Err(self
                    .shared
                    .failure(operation, "NCCL does not come back from a call".to_owned()));
            }
            turns += 1;
            if turns < SPINS && !failed {
                drop(now);
                thread::yield_now();
            } else {
                let wait = self.shared.changed.wait_timeout(now, pause);
                drop(wait.unwrap_or_else(PoisonError::into_inner));
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }

    /// The rank's communicator ends with `error`: tells the peers, and aborts it in the background.
    pub fn end(&self, error: &CollectiveError) {
        self.ring().fail(error);
        self.shared.now().over = true;
        self.shared.changed.notify_all();
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        {
            let mut now = self.shared.now();
            // A rank that panics has not told its peers that it leaves; neither does NCCL.
            (now.leaving, now.over) = (true, now.over || thread::panicking());
        }
        self.shared.changed.notify_all();
        let Some(thread) = self.thread.take() else { return };
        let limit = CLOSE_LIMIT + ABORT_LIMIT;
        let wait = self
            .shared
            .changed
            .wait_timeout_while(self.shared.now(), limit, |now| !now.ended);
        let (now, _) = wait.unwrap_or_else(PoisonError::into_inner);
        let ended = now.ended;
        drop(now);
        if !ended {
            // It hangs in a call of NCCL. It ends with the process, which has nothing else to do any more.
            tracing::warn!(rank = self.shared.rank, "NCCL's communicator does not end");
        } else if thread.join().is_err() {
            tracing::error!(rank = self.shared.rank, "NCCL's watchdog panicked");
        }
    }
}

impl Shared {
    fn now(&self) -> MutexGuard<'_, Now> {
        lock(&self.now)
    }

    fn failure(&self, operation: &'static str, detail: String) -> CollectiveError {
        CollectiveError::Failed {
            operation,
            rank: self.rank,
            world_size: self.world_size,
            detail,
        }
    }

    /// The thread: until the communicator has ended, one way or another.
    fn watch(&self) {
        let mut told = None;
        let mut left = None;
        loop {
            let wait = self.changed.wait_timeout(self.now(), LOOK);
            let (mut now, _) = wait.unwrap_or_else(PoisonError::into_inner);
            if now.over || now.leaving {
                let by_force = now.over;
                drop(now);
                match by_force {
                    true => self.comm.abort(),
                    false => self.comm.close(CLOSE_LIMIT),
                }
                break;
            }
            let Some(call) = now.call else { continue };
            let met = now.met.take();
            drop(now);
            let verdict = self.judge(call, met, &mut left);
            if let Some(verdict) = verdict {
                lock(&self.ring).fail(&verdict);
                // Before the abort, which ends operations as if they were done.
                self.now().verdict = Some(verdict);
                self.comm.abort();
                break;
            }
            self.keep_peers_informed(call, &mut told);
        }
        self.now().ended = true;
        self.changed.notify_all();
    }

    /// Why `call` cannot end well, if so. `left` is the peer that was seen to have left during a call, and when.
    fn judge(
        &self,
        call: Call,
        met: Option<Trouble>,
        left: &mut Option<(Call, u32, Instant)>,
    ) -> Option<CollectiveError> {
        if let Err(told) = self.look_at_ring(call) {
            return Some(told);
        }
        if let Some(trouble) = met.or_else(|| self.comm.state().err().map(Trouble::from)) {
            return Some(self.explain(call, trouble));
        }
        let waited = call.began.elapsed();
        if waited >= call.limit {
            return self.is_current(call).then(|| self.too_late(call, waited));
        }
        let seen = left.filter(|(during, ..)| *during == call);
        let gone = seen.or_else(|| {
            let peer = self.ask_ring(|ring| ring.first_left())??;
            Some((call, peer, Instant::now()))
        });
        *left = gone;
        let (_, peer, _) = gone.filter(|(_, _, at)| at.elapsed() >= AFTER_LEAVING)?;
        self.is_current(call).then(|| CollectiveError::PeerLost {
            operation: call.operation,
            peer,
            world_size: self.world_size,
            cause: "it has left".to_owned(),
        })
    }

    fn look_at_ring(&self, call: Call) -> Result<(), CollectiveError> {
        self.ask_ring(|ring| ring.look(call.operation)).unwrap_or(Ok(()))
    }

    /// `None` while the rank's thread uses the ring itself: it hears then what there is to hear.
    fn ask_ring<T>(&self, ask: impl FnOnce(&mut TcpCollective) -> T) -> Option<T> {
        match self.ring.try_lock() {
            Ok(mut ring) => Some(ask(&mut ring)),
            Err(TryLockError::Poisoned(ring)) => Some(ask(&mut ring.into_inner())),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    fn is_current(&self, call: Call) -> bool {
        self.now().call == Some(call)
    }

    /// An error of NCCL or the driver: the ring may know whose fault it is, a moment later.
    fn explain(&self, call: Call, trouble: Trouble) -> CollectiveError {
        let since = Instant::now();
        while since.elapsed() < GRACE {
            if let Err(told) = self.look_at_ring(call) {
                tracing::warn!(rank = self.rank, "{}: {trouble}", call.operation);
                return told;
            }
            thread::sleep(LOOK);
        }
        self.failure(call.operation, trouble.to_string())
    }

    /// All that live say that they wait; so one that says nothing is the one that is waited for.
    fn too_late(&self, call: Call, waited: Duration) -> CollectiveError {
        let silent = self
            .ask_ring(|ring| ring.first_silent(call.limit * 3 / 8))
            .flatten();
        match silent {
            Some(peer) => CollectiveError::Timeout {
                operation: call.operation,
                peer,
                world_size: self.world_size,
                waited,
            },
            None => {
                let state = match self.comm.state() {
                    Ok(State::Busy) => "NCCL is still busy with it",
                    _ => "it was given to the GPU and is not done",
                };
                self.failure(call.operation, format!("{state} after {waited:?}"))
            }
        }
    }

    fn keep_peers_informed(&self, call: Call, told: &mut Option<Instant>) {
        let due = told.is_none_or(|at| at.elapsed() >= call.limit / 8);
        if due && call.began.elapsed() >= call.limit / 2 {
            self.ask_ring(TcpCollective::tell_waiting);
            *told = Some(Instant::now());
        }
    }
}

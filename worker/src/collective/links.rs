//! The connections of one rank while they are up: moves a message to the next rank and one from the previous at
//! once, and finds out who is to blame when they stop moving.
//!
//! Every pair of ranks has a control connection. A dead process closes all of its own, so every rank that waits
//! sees it at once, wherever in the ring it stands. A rank that fails says why before it closes, so nobody takes
//! the messenger for the culprit. A rank that waits for long says for whom, so a stopped process is found by
//! following those words to the one that says nothing. Reads the clock: a deadline has no other form.

use super::{
    CollectiveError, ReduceOp,
    reduce::reduce,
    wire::{CONTROL_BYTES, Control, Fault, HEADER_BYTES, Header, Verdict},
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::{
    io::{self, ErrorKind, Read, Write},
    net::{Shutdown, TcpStream},
    os::fd::AsFd,
    time::{Duration, Instant},
};
use tch::Kind;

/// How long a broken data connection waits for the control connections to tell the cause.
const GRACE: Duration = Duration::from_secs(1);
/// Bytes that are read before they are reduced: they stay in the cache.
pub const SCRATCH_BYTES: usize = 256 * 1024;

/// Where the bytes of a message go.
pub enum Sink<'a> {
    /// Nowhere: nothing is received.
    Nothing,
    /// Written over these.
    Copy(&'a mut [u8]),
    /// Combined with these, through aligned scratch memory.
    Reduce {
        /// The running result.
        into: &'a mut [u8],
        /// Kind of the elements.
        kind: Kind,
        /// How they are combined.
        op: ReduceOp,
        /// [`SCRATCH_BYTES`] bytes.
        scratch: &'a mut [u8],
    },
}

struct Peer {
    control: TcpStream,
    frame: [u8; CONTROL_BYTES],
    have: usize,
    /// Said goodbye.
    left: bool,
    closed: bool,
    /// Whom it said it waits for, and when.
    waiting: Option<(u32, Instant)>,
}

/// The connections of one rank.
pub struct Links {
    rank: u32,
    to_next: TcpStream,
    from_prev: TcpStream,
    /// By rank; `None` at this rank's own place.
    peers: Vec<Option<Peer>>,
    deadline: Duration,
    failed: bool,
}

/// Waits until one of the sockets is ready or the time is over. An interrupted wait is a short one.
pub fn poll_for(sockets: &mut [PollFd], time: Duration) {
    let millis = u16::try_from(time.as_millis().max(1)).unwrap_or(u16::MAX);
    // EINTR and the like: the caller looks at its sockets and its clock either way.
    let _ = poll(sockets, PollTimeout::from(millis));
}

impl Links {
    /// Takes over the connections; `controls` by rank, `None` for this one.
    pub fn new(
        rank: u32,
        to_next: TcpStream,
        from_prev: TcpStream,
        controls: Vec<Option<TcpStream>>,
        deadline: Duration,
    ) -> Self {
        let peer = |control| Peer {
            control,
            frame: [0; CONTROL_BYTES],
            have: 0,
            left: false,
            closed: false,
            waiting: None,
        };
        Self {
            rank,
            to_next,
            from_prev,
            peers: controls.into_iter().map(|control| control.map(peer)).collect(),
            deadline,
            failed: false,
        }
    }

    /// This rank.
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// Number of ranks.
    pub fn world_size(&self) -> u32 {
        self.peers.len() as u32
    }

    fn next(&self) -> u32 {
        (self.rank + 1) % self.world_size()
    }

    fn prev(&self) -> u32 {
        (self.rank + self.world_size() - 1) % self.world_size()
    }

    /// Sends a message to the next rank (if there is one to send) while it receives one from the previous rank
    /// (unless the sink is `Nothing`), whose header must be `expected` but for the payload's length, which is the
    /// sink's.
    pub fn transfer(
        &mut self,
        send: Option<(Header, &[u8])>,
        expected: Header,
        sink: Sink<'_>,
    ) -> Result<(), CollectiveError> {
        let operation = expected.operation.name();
        let mut outgoing = Outgoing::new(send);
        let mut incoming = Incoming::new(expected, sink);
        let mut moved_at = Instant::now();
        let mut told_at = None;
        loop {
            let sent = outgoing.write(&self.to_next);
            let sent = sent.map_err(|error| self.broken(operation, self.next(), &error))?;
            let received = match incoming.read(&self.from_prev) {
                Ok(received) => received,
                Err(Broken::Io(error)) => return Err(self.broken(operation, self.prev(), &error)),
                Err(Broken::Other(detail)) => {
                    return Err(CollectiveError::Mismatch {
                        operation,
                        peer: self.prev(),
                        detail,
                    });
                }
            };
            if outgoing.done() && incoming.done() {
                return Ok(());
            }
            if sent + received > 0 {
                (moved_at, told_at) = (Instant::now(), None);
                continue;
            }
            let on = if incoming.done() { self.next() } else { self.prev() };
            self.wait(operation, &outgoing, &incoming, on, moved_at, &mut told_at)?;
        }
    }

    /// Waits for a socket, reads what the peers say, keeps them informed, and ends at the deadline.
    fn wait(
        &mut self,
        operation: &'static str,
        outgoing: &Outgoing<'_>,
        incoming: &Incoming<'_>,
        on: u32,
        moved_at: Instant,
        told_at: &mut Option<Instant>,
    ) -> Result<(), CollectiveError> {
        let quiet = moved_at.elapsed();
        if quiet >= self.deadline {
            return Err(CollectiveError::Timeout {
                operation,
                peer: self.silent_one(on),
                world_size: self.world_size(),
                waited: quiet,
            });
        }
        if quiet >= self.deadline / 2 && told_at.is_none_or(|at| at.elapsed() >= self.deadline / 8) {
            self.tell_all(&Control::Waiting { on });
            *told_at = Some(Instant::now());
        }
        let data = [
            (!outgoing.done(), &self.to_next, PollFlags::POLLOUT),
            (!incoming.done(), &self.from_prev, PollFlags::POLLIN),
        ];
        let data = data.into_iter().filter(|(wanted, ..)| *wanted);
        let mut polled: Vec<PollFd> = data.map(|(_, s, flags)| PollFd::new(s.as_fd(), flags)).collect();
        polled.extend(
            self.open_controls()
                .map(|s| PollFd::new(s.as_fd(), PollFlags::POLLIN)),
        );
        poll_for(&mut polled, (self.deadline - quiet).min(self.deadline / 8));
        drop(polled);
        self.hear(operation)
    }

    fn open_controls(&self) -> impl Iterator<Item = &TcpStream> {
        let open = self.peers.iter().flatten().filter(|peer| !peer.closed);
        open.map(|peer| &peer.control)
    }

    /// Reads all control connections, without waiting. A rank's own word about a culprit counts more than a closed
    /// connection. Each failure is told once.
    pub fn hear(&mut self, operation: &'static str) -> Result<(), CollectiveError> {
        let world_size = self.world_size();
        let mut gone = None;
        let mut verdict = None;
        for (rank, peer) in (0u32..).zip(&mut self.peers) {
            let Some(peer) = peer else { continue };
            let end = peer.hear(&mut verdict);
            if let Some(cause) = end.filter(|_| !peer.left) {
                gone.get_or_insert((rank, cause));
            }
        }
        if let Some(verdict) = verdict {
            return Err(sentence(operation, world_size, verdict));
        }
        match gone {
            Some((peer, cause)) => Err(CollectiveError::PeerLost {
                operation,
                peer,
                world_size,
                cause,
            }),
            None => Ok(()),
        }
    }

    /// A data connection broke: the peer at its other end is gone, or closed it because of a third.
    fn broken(&mut self, operation: &'static str, peer: u32, error: &io::Error) -> CollectiveError {
        let noticed_at = Instant::now();
        loop {
            if let Err(told) = self.hear(operation) {
                return told;
            }
            let left = self.peers[peer as usize].as_ref().is_some_and(|peer| peer.left);
            let waited = noticed_at.elapsed();
            if left || waited >= GRACE {
                return CollectiveError::PeerLost {
                    operation,
                    peer,
                    world_size: self.world_size(),
                    cause: if left {
                        "it has left".to_owned()
                    } else {
                        error.to_string()
                    },
                };
            }
            let controls = self.open_controls();
            let mut polled: Vec<PollFd> = controls
                .map(|s| PollFd::new(s.as_fd(), PollFlags::POLLIN))
                .collect();
            poll_for(&mut polled, GRACE - waited);
        }
    }

    /// Follows "I wait for ..." from the rank that this one waits for, to the first that did not say so lately.
    fn silent_one(&self, on: u32) -> u32 {
        let lately = self.deadline * 3 / 8;
        let mut suspect = on;
        for _ in 0..self.world_size() {
            let peer = self.peers.get(suspect as usize).and_then(Option::as_ref);
            match peer.and_then(|peer| peer.waiting) {
                // It does not know for whom: everyone but the one that is waited for says that they wait.
                Some((its, at)) if at.elapsed() <= lately && its == suspect => {
                    return self.first_silent(lately).unwrap_or(on);
                }
                Some((its, at)) if at.elapsed() <= lately => suspect = its,
                _ => break,
            }
        }
        // Everyone waits for someone: the nearest is as good as any.
        if suspect == self.rank || suspect >= self.world_size() {
            on
        } else {
            suspect
        }
    }

    /// Tells every peer why this rank's communicator ended. The first failure counts.
    pub fn fail(&mut self, error: &CollectiveError) {
        if !std::mem::replace(&mut self.failed, true) {
            let verdict = verdict(error, self.rank);
            self.tell_all(&Control::Abort(verdict));
        }
    }

    /// Ends every connection without a word.
    #[cfg(test)]
    pub fn sever(&mut self) {
        self.failed = true;
        let controls = self.peers.iter().flatten().map(|peer| &peer.control);
        for stream in controls.chain([&self.to_next, &self.from_prev]) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Tells every peer that this rank waits, for nobody in particular.
    pub fn tell_waiting(&mut self) {
        self.tell_all(&Control::Waiting { on: self.rank });
    }

    /// The first peer that has not said lately that it waits too.
    pub fn first_silent(&self, lately: Duration) -> Option<u32> {
        self.first(|peer| peer.waiting.is_none_or(|(_, at)| at.elapsed() > lately))
    }

    /// The first peer that has left in good order.
    pub fn first_left(&self) -> Option<u32> {
        self.first(|peer| peer.left)
    }

    fn first(&self, is_meant: impl Fn(&Peer) -> bool) -> Option<u32> {
        let all = (0u32..).zip(&self.peers);
        let mut peers = all.filter_map(|(rank, peer)| Some((rank, peer.as_ref()?)));
        peers.find(|(_, peer)| is_meant(peer)).map(|(rank, _)| rank)
    }

    fn tell_all(&mut self, control: &Control) {
        let frame = control.encode();
        for peer in self.peers.iter_mut().flatten().filter(|peer| !peer.closed) {
            // Frames are small and few, so the socket takes them whole. One that does not belongs to a peer that
            // has long stopped reading: nothing more can be told to it.
            if !matches!(peer.control.write(&frame), Ok(CONTROL_BYTES)) {
                let _ = peer.control.shutdown(Shutdown::Write);
            }
        }
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        if !self.failed && !std::thread::panicking() {
            self.tell_all(&Control::Goodbye);
        }
        for peer in self.peers.iter_mut().flatten() {
            let _ = peer.control.shutdown(Shutdown::Write);
            // Closing with unread bytes would send a reset instead of an orderly end.
            let mut rest = [0; CONTROL_BYTES];
            while peer.control.read(&mut rest).is_ok_and(|n| n > 0) {}
        }
    }
}

impl Peer {
    /// Reads the frames that have come; the first abort goes to `verdict`. Says why, if the connection has ended.
    fn hear(&mut self, verdict: &mut Option<Verdict>) -> Option<String> {
        while !self.closed {
            match self.control.read(&mut self.frame[self.have..]) {
                Ok(0) => {
                    self.closed = true;
                    return Some("its connection is closed".to_owned());
                }
                Ok(n) => self.have += n,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    self.closed = true;
                    return Some(error.to_string());
                }
            }
            if self.have < CONTROL_BYTES {
                continue;
            }
            self.have = 0;
            match Control::decode(&self.frame) {
                Some(Control::Goodbye) => self.left = true,
                Some(Control::Waiting { on }) => self.waiting = Some((on, Instant::now())),
                Some(Control::Abort(its)) => {
                    verdict.get_or_insert(its);
                }
                None => {
                    self.closed = true;
                    return Some("it sent what is no control frame".to_owned());
                }
            }
        }
        None
    }
}

/// What the peers are told about an error of `rank`.
fn verdict(error: &CollectiveError, rank: u32) -> Verdict {
    let (culprit, fault, text) = match error {
        CollectiveError::PeerLost { peer, cause, .. } => (*peer, Fault::Lost, cause.clone()),
        CollectiveError::Timeout { peer, waited, .. } => {
            let waited_ms = u64::try_from(waited.as_millis()).unwrap_or(u64::MAX);
            (*peer, Fault::Silent { waited_ms }, String::new())
        }
        CollectiveError::Mismatch { peer, detail, .. } => (*peer, Fault::Mismatch, detail.clone()),
        // Its own words name the rank already.
        CollectiveError::Failed { detail, .. } => (rank, Fault::Lost, detail.clone()),
        other => (rank, Fault::Lost, other.to_string()),
    };
    Verdict { culprit, fault, text }
}

/// The error of a rank that was told a verdict.
fn sentence(operation: &'static str, world_size: u32, verdict: Verdict) -> CollectiveError {
    let Verdict { culprit, fault, text } = verdict;
    match fault {
        Fault::Lost => CollectiveError::PeerLost {
            operation,
            peer: culprit,
            world_size,
            cause: text,
        },
        Fault::Silent { waited_ms } => CollectiveError::Timeout {
            operation,
            peer: culprit,
            world_size,
            waited: Duration::from_millis(waited_ms),
        },
        Fault::Mismatch => CollectiveError::Mismatch {
            operation,
            peer: culprit,
            detail: text,
        },
    }
}

struct Outgoing<'a> {
    header: [u8; HEADER_BYTES],
    payload: &'a [u8],
    sent: usize,
    total: usize,
}

impl<'a> Outgoing<'a> {
    fn new(message: Option<(Header, &'a [u8])>) -> Self {
        match message {
            Some((header, payload)) => Self {
                header: header.encode(),
                payload,
                sent: 0,
                total: HEADER_BYTES + payload.len(),
            },
            None => Self {
                header: [0; HEADER_BYTES],
                payload: &[],
                sent: 0,
                total: 0,
            },
        }
    }

    fn done(&self) -> bool {
        self.sent == self.total
    }

    /// Writes what the socket takes; bytes written.
    fn write(&mut self, mut stream: &TcpStream) -> io::Result<usize> {
        let before = self.sent;
        while !self.done() {
            let written = match self.sent < HEADER_BYTES {
                true => {
                    let parts = [&self.header[self.sent..], self.payload].map(io::IoSlice::new);
                    stream.write_vectored(&parts)
                }
                false => stream.write(&self.payload[self.sent - HEADER_BYTES..]),
            };
            match written {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => self.sent += n,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(self.sent - before)
    }
}

enum Broken {
    Io(io::Error),
    Other(String),
}

struct Incoming<'a> {
    expected: Header,
    header: [u8; HEADER_BYTES],
    /// Bytes of the header that have come.
    have: usize,
    sink: Sink<'a>,
    /// Bytes of the payload that are in their place.
    placed: usize,
    /// Bytes that wait in the scratch memory.
    held: usize,
    total: usize,
}

impl<'a> Incoming<'a> {
    fn new(expected: Header, sink: Sink<'a>) -> Self {
        let (have, total) = match &sink {
            Sink::Nothing => (HEADER_BYTES, 0),
            Sink::Copy(into) | Sink::Reduce { into, .. } => (0, into.len()),
        };
        Self {
            expected: Header {
                payload: total as u64,
                ..expected
            },
            header: [0; HEADER_BYTES],
            have,
            sink,
            placed: 0,
            held: 0,
            total,
        }
    }

    fn done(&self) -> bool {
        self.have == HEADER_BYTES && self.placed == self.total
    }

    /// Reads what has come; bytes read. Stops after one piece of payload, so that sending goes on.
    fn read(&mut self, mut stream: &TcpStream) -> Result<usize, Broken> {
        let mut received = 0;
        while !self.done() {
            let in_header = self.have < HEADER_BYTES;
            let room: &mut [u8] = match (in_header, &mut self.sink) {
                (true, _) => &mut self.header[self.have..],
                (false, Sink::Copy(into)) => &mut into[self.placed..],
                (false, Sink::Reduce { scratch, .. }) => {
                    let block = scratch.len().min(self.total - self.placed);
                    &mut scratch[self.held..block]
                }
                (false, Sink::Nothing) => break,
            };
            match stream.read(room) {
                Ok(0) => return Err(Broken::Io(ErrorKind::UnexpectedEof.into())),
                Ok(n) if in_header => {
                    (self.have, received) = (self.have + n, received + n);
                    self.check_header()?;
                }
                Ok(n) => {
                    self.place(n);
                    return Ok(received + n);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(Broken::Io(error)),
            }
        }
        Ok(received)
    }

    fn check_header(&self) -> Result<(), Broken> {
        if self.have < HEADER_BYTES {
            return Ok(());
        }
        match Header::decode(&self.header) {
            Some(header) if header == self.expected => Ok(()),
            Some(header) => Err(Broken::Other(format!("{header}, here {}", self.expected))),
            None => Err(Broken::Other("what came is no header".to_owned())),
        }
    }

    /// `n` more bytes lie where the last read put them.
    fn place(&mut self, n: usize) {
        match &mut self.sink {
            Sink::Reduce {
                into,
                kind,
                op,
                scratch,
            } => {
                self.held += n;
                let block = scratch.len().min(self.total - self.placed);
                if self.held == block {
                    let into = &mut into[self.placed..self.placed + block];
                    reduce(*kind, *op, into, &scratch[..block]);
                    (self.placed, self.held) = (self.placed + block, 0);
                }
            }
            Sink::Copy(_) | Sink::Nothing => self.placed += n,
        }
    }
}

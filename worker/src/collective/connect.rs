//! Brings up the connections of a world: one control connection per pair of ranks, one data connection from each
//! rank to the next. A caller of another job or generation, or one that is no rank at all, is refused and
//! disturbs nobody. Knows the handshake; knows no tensor.

use super::{
    CollectiveError,
    links::{Links, poll_for},
    tcp::TcpCollective,
    wire::{HELLO_BYTES, Hello, Role, WELCOME},
};
use nix::poll::{PollFd, PollFlags};
use std::{
    collections::VecDeque,
    io::{self, ErrorKind, Read, Write},
    net::{TcpListener, TcpStream, ToSocketAddrs},
    os::fd::AsFd,
    time::{Duration, Instant},
};

/// Connections that may be waiting to say who they are; the oldest is dropped for a new one.
const MAX_STRANGERS: usize = 256;

/// The attempt that a world belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// Job id.
    pub job: String,
    /// Generation of the job.
    pub generation: u64,
}

impl Session {
    pub(super) fn digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key("arcface ring session 1");
        hasher.update(&self.generation.to_le_bytes());
        hasher.update(self.job.as_bytes());
        *hasher.finalize().as_bytes()
    }
}

/// How long to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// For all ranks to connect.
    pub connect: Duration,
    /// For the next byte within an operation; so also for the slowest rank to come to it.
    pub operation: Duration,
}

/// The port at which a rank accepts its peers.
#[derive(Debug)]
pub struct Listener {
    inner: TcpListener,
}

impl Listener {
    /// Binds a free port of `host` (a name or an address), and tells which.
    ///
    /// # Errors
    /// What the system says.
    pub fn bind(host: &str) -> io::Result<(Self, u16)> {
        let inner = TcpListener::bind((host, 0))?;
        let port = inner.local_addr()?.port();
        Ok((Self { inner }, port))
    }

    /// Connects to all peers. `endpoints` are "host:port" by rank, this one's included; every rank passes the same
    /// list and session. Every peer's listener must be bound already. A world of one opens no connection.
    ///
    /// # Errors
    /// `PeerLost` for a peer that cannot be reached or refuses; `Timeout` naming the first rank that did not come.
    ///
    /// # Panics
    /// If `rank` is not an index of `endpoints`.
    pub fn connect(
        self,
        session: &Session,
        rank: u32,
        endpoints: &[String],
        timeouts: Timeouts,
    ) -> Result<TcpCollective, CollectiveError> {
        assert!((rank as usize) < endpoints.len(), "rank {rank} has no endpoint");
        let setup = Setup::new(session, rank, endpoints.len() as u32, timeouts.connect);
        setup.run(&self.inner, endpoints, timeouts.operation)
    }
}

/// A connection on which a message of fixed size is still coming.
struct Pending<const N: usize> {
    stream: TcpStream,
    bytes: [u8; N],
    have: usize,
}

impl<const N: usize> Pending<N> {
    fn new(stream: TcpStream) -> Self {
        Self {
            stream,
            bytes: [0; N],
            have: 0,
        }
    }

    /// Reads what there is, never past the message. True when it is complete.
    fn read(&mut self) -> io::Result<bool> {
        while self.have < N {
            match self.stream.read(&mut self.bytes[self.have..]) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.have += n,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}

/// A connection that this rank dialled, until the peer has welcomed it.
struct Dialled {
    peer: u32,
    role: Role,
    reply: Pending<{ WELCOME.len() }>,
}

struct Setup {
    rank: u32,
    world_size: u32,
    hello: Hello,
    deadline: Instant,
    waited: Duration,
    controls: Vec<Option<TcpStream>>,
    to_next: Option<TcpStream>,
    from_prev: Option<TcpStream>,
}

impl Setup {
    fn new(session: &Session, rank: u32, world_size: u32, timeout: Duration) -> Self {
        Self {
            rank,
            world_size,
            hello: Hello {
                role: Role::Control,
                from: rank,
                to: rank,
                world_size,
                generation: session.generation,
                session: session.digest(),
            },
            deadline: Instant::now() + timeout,
            waited: timeout,
            controls: (0..world_size).map(|_| None).collect(),
            to_next: None,
            from_prev: None,
        }
    }

    /// Dials first, without waiting for an answer, and then accepts: no two ranks wait for each other's answer.
    fn run(
        mut self,
        listener: &TcpListener,
        endpoints: &[String],
        operation: Duration,
    ) -> Result<TcpCollective, CollectiveError> {
        if self.world_size == 1 {
            return Ok(TcpCollective::alone());
        }
        let mut dialled: Vec<Dialled> = (0..self.rank)
            .map(|peer| self.dial(peer, Role::Control, endpoints))
            .collect::<Result<_, _>>()?;
        dialled.push(self.dial(self.next(), Role::Data, endpoints)?);
        let unusable = |error: io::Error| self.lost(self.rank, &format!("its listener fails: {error}"));
        listener.set_nonblocking(true).map_err(unusable)?;

        let mut strangers: VecDeque<Pending<HELLO_BYTES>> = VecDeque::new();
        while let Some(missing) = self.missing(&dialled) {
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(CollectiveError::Timeout {
                    operation: "connect",
                    peer: missing,
                    world_size: self.world_size,
                    waited: self.waited,
                });
            }
            let sockets = dialled.iter().map(|dialled| &dialled.reply.stream);
            let sockets = sockets.chain(strangers.iter().map(|stranger| &stranger.stream));
            let mut polled: Vec<PollFd> = vec![PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
            polled.extend(sockets.map(|stream| PollFd::new(stream.as_fd(), PollFlags::POLLIN)));
            poll_for(&mut polled, left);
            drop(polled);

            // Ready or not, reading says so at once: every socket is non-blocking, and there are few.
            self.take_replies(&mut dialled)?;
            self.accept(listener, &mut strangers);
            self.take_hellos(&mut strangers);
        }
        let (Some(to_next), Some(from_prev)) = (self.to_next, self.from_prev) else {
            unreachable!("nothing is missing");
        };
        let links = Links::new(self.rank, to_next, from_prev, self.controls, operation);
        Ok(TcpCollective::over(links))
    }

    fn next(&self) -> u32 {
        (self.rank + 1) % self.world_size
    }

    fn prev(&self) -> u32 {
        (self.rank + self.world_size - 1) % self.world_size
    }

    /// The first rank that has not come or not answered.
    fn missing(&self, dialled: &[Dialled]) -> Option<u32> {
        let unanswered = dialled.iter().map(|dialled| dialled.peer);
        let uncalled =
            (self.rank + 1..self.world_size).filter(|&peer| self.controls[peer as usize].is_none());
        let prev = self.from_prev.is_none().then(|| self.prev());
        unanswered.chain(uncalled).chain(prev).min()
    }

    fn dial(&self, peer: u32, role: Role, endpoints: &[String]) -> Result<Dialled, CollectiveError> {
        let endpoint = &endpoints[peer as usize];
        let failed = |what: &str, error: io::Error| self.lost(peer, &format!("{what} {endpoint}: {error}"));
        let addresses = endpoint
            .to_socket_addrs()
            .map_err(|error| failed("resolve", error))?;
        let mut refused = io::Error::new(ErrorKind::NotFound, "the name has no address");
        for address in addresses {
            let left = self.deadline.saturating_duration_since(Instant::now());
            match TcpStream::connect_timeout(&address, left.max(Duration::from_millis(1))) {
                Ok(mut stream) => {
                    let hello = Hello {
                        role,
                        to: peer,
                        ..self.hello
                    };
                    // A fresh socket takes these few bytes at once.
                    let greet = stream.write_all(&hello.encode()).and_then(|()| prepare(&stream));
                    greet.map_err(|error| failed("greet", error))?;
                    return Ok(Dialled {
                        peer,
                        role,
                        reply: Pending::new(stream),
                    });
                }
                Err(error) => refused = error,
            }
        }
        Err(failed("connect to", refused))
    }

    fn take_replies(&mut self, dialled: &mut Vec<Dialled>) -> Result<(), CollectiveError> {
        let mut waiting = Vec::with_capacity(dialled.len());
        for mut connection in dialled.drain(..) {
            match connection.reply.read() {
                Ok(false) => waiting.push(connection),
                Ok(true) if connection.reply.bytes == WELCOME => match connection.role {
                    Role::Control => self.controls[connection.peer as usize] = Some(connection.reply.stream),
                    Role::Data => self.to_next = Some(connection.reply.stream),
                },
                Ok(true) => return Err(self.lost(connection.peer, "what answers is no rank")),
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                    return Err(self.lost(connection.peer, "it refused this rank, or ended"));
                }
                Err(error) => return Err(self.lost(connection.peer, &error.to_string())),
            }
        }
        *dialled = waiting;
        Ok(())
    }

    fn accept(&self, listener: &TcpListener, strangers: &mut VecDeque<Pending<HELLO_BYTES>>) {
        // An error of accept belongs to the caller's connection, not to this rank: the deadline covers the rest.
        while let Ok((stream, address)) = listener.accept() {
            if let Err(error) = prepare(&stream) {
                tracing::warn!(%address, %error, "dropped a connection to the ring");
                continue;
            }
            if strangers.len() == MAX_STRANGERS {
                strangers.pop_front();
            }
            strangers.push_back(Pending::new(stream));
        }
    }

    fn take_hellos(&mut self, strangers: &mut VecDeque<Pending<HELLO_BYTES>>) {
        for mut stranger in std::mem::take(strangers) {
            match stranger.read() {
                Ok(false) => strangers.push_back(stranger),
                Ok(true) => {
                    if let Err(reason) = self.admit(stranger) {
                        tracing::warn!(rank = self.rank, reason, "refused a connection to the ring");
                    }
                }
                Err(error) => tracing::warn!(rank = self.rank, %error, "a connection to the ring broke"),
            }
        }
    }

    /// Puts a connection to its place if it is one of ours; dropping it is the refusal.
    fn admit(&mut self, mut stranger: Pending<HELLO_BYTES>) -> Result<(), String> {
        let hello = Hello::decode(&stranger.bytes).ok_or("it speaks another protocol")?;
        if hello.session != self.hello.session {
            return Err(format!(
                "it is of another job or generation ({}, here {})",
                hello.generation, self.hello.generation
            ));
        }
        let (rank, world_size, prev) = (self.rank, self.world_size, self.prev());
        if hello.to != rank || hello.world_size != world_size || hello.from >= world_size {
            let Hello {
                from,
                to,
                world_size: of,
                ..
            } = hello;
            return Err(format!(
                "rank {from} of {of} looks for rank {to}, this is {rank} of {world_size}"
            ));
        }
        let place = match hello.role {
            Role::Control if hello.from > rank => &mut self.controls[hello.from as usize],
            Role::Data if hello.from == prev => &mut self.from_prev,
            role => return Err(format!("rank {} does not call for {role:?}", hello.from)),
        };
        if place.is_some() {
            return Err(format!("rank {} is connected already", hello.from));
        }
        stranger
            .stream
            .write_all(&WELCOME)
            .map_err(|error| error.to_string())?;
        *place = Some(stranger.stream);
        Ok(())
    }

    fn lost(&self, peer: u32, cause: &str) -> CollectiveError {
        CollectiveError::PeerLost {
            operation: "connect",
            peer,
            world_size: self.world_size,
            cause: cause.to_owned(),
        }
    }
}

/// A peer's machine that acknowledges nothing for so long is out of reach. The machine answers, not the process: one that
/// is busy, or stopped, is no matter of the network.
const UNREACHABLE: Duration = Duration::from_secs(8);
/// Between two questions to a machine from which nothing comes.
const PROBE: Duration = Duration::from_secs(2);

/// Ring steps are round trips: no waiting for more to send, no blocking. A network that swallows everything breaks the
/// connection, whether it is written to or waited at.
fn prepare(stream: &TcpStream) -> io::Result<()> {
    let socket = socket2::SockRef::from(stream);
    let probes = socket2::TcpKeepalive::new()
        .with_time(PROBE)
        .with_interval(PROBE)
        .with_retries((UNREACHABLE.as_secs() / PROBE.as_secs() - 1) as u32);
    socket.set_tcp_keepalive(&probes)?;
    socket.set_tcp_user_timeout(Some(UNREACHABLE))?;
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)
}

//! The agent's one connection: tries the coordinators in order, says Hello, waits for Welcome, and hands messages
//! up. It decides nothing; a broken connection is an event, and the next try comes after a jittered delay.

use super::backoff;
use arcface_proto::v1::worker_service_client::WorkerServiceClient;
use arcface_proto::v1::{JoinRequest, JoinResponse, Welcome, join_request, join_response};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Endpoint;

/// Time for connecting and being welcomed.
const JOIN_TIMEOUT: Duration = Duration::from_secs(5);
/// Messages that may wait for a slow connection; more means it is dead.
const OUTGOING: usize = 256;

/// What happened on the connection.
#[derive(Debug)]
pub enum LinkEvent {
    /// It is time for the next try: call [`Link::connect`].
    Due,
    /// Hello was answered.
    Joined {
        /// Coordinator.
        address: String,
        /// Its epoch.
        epoch: u64,
        /// Its timers.
        welcome: Welcome,
        /// When Hello was sent.
        hello_sent: Instant,
    },
    /// A later message.
    Message(JoinResponse),
    /// A try failed or the connection broke.
    Lost {
        /// Coordinator.
        address: String,
        /// Why.
        reason: String,
        /// Tries without success so far.
        attempts: u32,
    },
}

struct Session {
    address: String,
    incoming: Streaming<JoinResponse>,
    outgoing: mpsc::Sender<JoinRequest>,
}

struct Opened {
    session: Session,
    epoch: u64,
    welcome: Welcome,
    hello_sent: Instant,
}

enum State {
    Waiting(tokio::time::Instant),
    Connecting(String, JoinHandle<Result<Opened, String>>),
    Up(Box<Session>),
}

/// The connection, up or being tried.
pub struct Link {
    addresses: Vec<String>,
    next: usize,
    attempts: u32,
    state: State,
}

impl Link {
    /// Not connected; the first try is due at once. `addresses` are `host:port`, at least one.
    pub fn new(addresses: Vec<String>) -> Self {
        Self {
            addresses,
            next: 0,
            attempts: 0,
            state: State::Waiting(tokio::time::Instant::now()),
        }
    }

    /// True after Welcome, until the connection breaks.
    pub fn is_up(&self) -> bool {
        matches!(self.state, State::Up(_))
    }

    /// Begins a try with the next coordinator; `hello` opens the stream.
    pub fn connect(&mut self, hello: JoinRequest) {
        let address = self.addresses[self.next % self.addresses.len()].clone();
        self.next = self.next.wrapping_add(1);
        let attempt = open(address.clone(), hello);
        let task = tokio::spawn(async move {
            match tokio::time::timeout(JOIN_TIMEOUT, attempt).await {
                Ok(result) => result,
                Err(_) => Err(format!("no answer within {JOIN_TIMEOUT:?}")),
            }
        });
        self.state = State::Connecting(address, task);
    }

    /// The next event. Cancel safe.
    pub async fn next(&mut self) -> LinkEvent {
        match &mut self.state {
            State::Waiting(due) => {
                tokio::time::sleep_until(*due).await;
                LinkEvent::Due
            }
            State::Connecting(address, task) => {
                let address = address.clone();
                match task.await {
                    Ok(Ok(opened)) => {
                        self.attempts = 0;
                        // After a loss the same coordinator is tried first: its epoch is the newest known.
                        self.next = self.next.wrapping_sub(1);
                        self.state = State::Up(Box::new(opened.session));
                        LinkEvent::Joined {
                            address,
                            epoch: opened.epoch,
                            welcome: opened.welcome,
                            hello_sent: opened.hello_sent,
                        }
                    }
                    Ok(Err(reason)) => self.lost(address, reason),
                    Err(_) => self.lost(address, "the connection task ended".into()),
                }
            }
            State::Up(session) => {
                let address = session.address.clone();
                match session.incoming.message().await {
                    Ok(Some(message)) => LinkEvent::Message(message),
                    Ok(None) => self.lost(address, "the coordinator closed the stream".into()),
                    Err(status) => self.lost(address, describe(&status)),
                }
            }
        }
    }

    /// Sends a message. False if there is no connection that takes it.
    pub fn send(&mut self, message: join_request::Message) -> bool {
        let State::Up(session) = &self.state else {
            return false;
        };
        let request = JoinRequest {
            message: Some(message),
        };
        session.outgoing.try_send(request).is_ok()
    }

    /// Gives the connection up, for `reason`.
    pub fn abandon(&mut self, reason: &str) -> LinkEvent {
        let address = match &self.state {
            State::Up(session) => session.address.clone(),
            State::Connecting(address, task) => {
                task.abort();
                address.clone()
            }
            State::Waiting(_) => String::new(),
        };
        self.next = self.next.wrapping_add(1);
        self.lost(address, reason.to_owned())
    }

    fn lost(&mut self, address: String, reason: String) -> LinkEvent {
        self.attempts = self.attempts.saturating_add(1);
        // Every address gets its try before the waiting begins.
        let round = (self.attempts - 1) / self.addresses.len() as u32;
        let delay = match self.attempts as usize % self.addresses.len() {
            0 => backoff::delay(round, random_unit()),
            _ => Duration::from_millis(20),
        };
        self.state = State::Waiting(tokio::time::Instant::now() + delay);
        LinkEvent::Lost {
            address,
            reason,
            attempts: self.attempts,
        }
    }
}

/// Jitter needs no reproducibility: the random bits of a fresh UUID do.
fn random_unit() -> f64 {
    f64::from(uuid::Uuid::new_v4().as_fields().0) / f64::from(u32::MAX)
}

async fn open(address: String, hello: JoinRequest) -> Result<Opened, String> {
    let channel = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|error| error.to_string())?
        .connect_timeout(JOIN_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(5))
        .keep_alive_timeout(Duration::from_secs(5))
        .keep_alive_while_idle(true)
        .connect()
        .await
        .map_err(|error| root_cause(&error))?;
    let (outgoing, receiver) = mpsc::channel(OUTGOING);
    // The coordinator answers the call only when it has read Hello, so that goes first.
    outgoing
        .send(hello)
        .await
        .map_err(|_| "the stream closed at once".to_owned())?;
    let hello_sent = Instant::now();
    let mut incoming = WorkerServiceClient::new(channel)
        .join(ReceiverStream::new(receiver))
        .await
        .map_err(|status| describe(&status))?
        .into_inner();
    let first = incoming
        .message()
        .await
        .map_err(|status| describe(&status))?
        .ok_or("the coordinator closed the stream")?;
    match first.message {
        Some(join_response::Message::Welcome(welcome)) => Ok(Opened {
            session: Session {
                address,
                incoming,
                outgoing,
            },
            epoch: first.epoch,
            welcome,
            hello_sent,
        }),
        _ => Err("the coordinator's first message was not Welcome".into()),
    }
}

fn describe(status: &tonic::Status) -> String {
    match status.code() {
        tonic::Code::Unknown | tonic::Code::Unavailable if !status.message().is_empty() => {
            status.message().to_owned()
        }
        code => format!("{code:?}: {}", status.message()),
    }
}

fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

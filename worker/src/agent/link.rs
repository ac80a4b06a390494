//! The agent's one connection: tries the coordinators in order, says Hello, waits for Welcome, and hands messages
//! up. It decides nothing; a broken connection is an event, and the next try comes after a jittered delay.

use crate::channel::ClientTls;
use crate::dial::{Answer, Dial};
use arcface_proto::redirect;
use arcface_proto::v1::worker_service_client::WorkerServiceClient;
use arcface_proto::v1::{JoinRequest, JoinResponse, Welcome, join_request, join_response};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

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

/// Why a try did not succeed.
struct NotJoined {
    reason: String,
    answer: Answer,
}

impl NotJoined {
    fn because(reason: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            answer: Answer::None,
        }
    }

    fn of(status: &tonic::Status) -> Self {
        Self {
            reason: describe(status),
            answer: answer_of(status),
        }
    }
}

enum State {
    Waiting(tokio::time::Instant),
    Connecting(String, JoinHandle<Result<Opened, NotJoined>>),
    Up(Box<Session>),
}

/// The connection, up or being tried.
pub struct Link {
    dial: Dial,
    tls: ClientTls,
    state: State,
}

impl Link {
    /// Not connected; the first try is due at once. `addresses` are `host:port`, at least one.
    pub fn new(addresses: Vec<String>, tls: ClientTls) -> Self {
        Self {
            dial: Dial::new(addresses),
            tls,
            state: State::Waiting(tokio::time::Instant::now()),
        }
    }

    /// True after Welcome, until the connection breaks.
    pub fn is_up(&self) -> bool {
        matches!(self.state, State::Up(_))
    }

    /// Begins a try with the next coordinator; `hello` opens the stream.
    pub fn connect(&mut self, hello: JoinRequest) {
        let address = self.dial.next_address().unwrap_or_default();
        let attempt = open(address.clone(), self.tls.clone(), hello);
        let task = tokio::spawn(async move {
            match tokio::time::timeout(JOIN_TIMEOUT, attempt).await {
                Ok(result) => result,
                Err(_) => Err(NotJoined::because(format!("no answer within {JOIN_TIMEOUT:?}"))),
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
                        // After a loss it is tried first: its epoch is the newest known.
                        self.dial.reached(&address);
                        self.state = State::Up(Box::new(opened.session));
                        LinkEvent::Joined {
                            address,
                            epoch: opened.epoch,
                            welcome: opened.welcome,
                            hello_sent: opened.hello_sent,
                        }
                    }
                    Ok(Err(not_joined)) => self.lost(address, not_joined),
                    Err(_) => self.lost(address, NotJoined::because("the connection task ended")),
                }
            }
            State::Up(session) => {
                let address = session.address.clone();
                match session.incoming.message().await {
                    Ok(Some(message)) => LinkEvent::Message(message),
                    Ok(None) => self.lost(address, NotJoined::because("the coordinator closed the stream")),
                    Err(status) => self.lost(address, NotJoined::of(&status)),
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
        self.dial.skip();
        self.lost(address, NotJoined::because(reason))
    }

    fn lost(&mut self, address: String, not_joined: NotJoined) -> LinkEvent {
        let NotJoined { reason, answer } = not_joined;
        let delay = self.dial.failed(answer, random_unit());
        self.state = State::Waiting(tokio::time::Instant::now() + delay);
        LinkEvent::Lost {
            address,
            reason,
            attempts: self.dial.attempts(),
        }
    }
}

/// Whether a coordinator says that it stands by, and who leads.
fn answer_of(status: &tonic::Status) -> Answer {
    let text = |key: &str| status.metadata().get(key).and_then(|value| value.to_str().ok());
    Answer::of(text(redirect::ROLE), text(redirect::LEADER))
}

/// Jitter needs no reproducibility: the random bits of a fresh UUID do.
fn random_unit() -> f64 {
    f64::from(uuid::Uuid::new_v4().as_fields().0) / f64::from(u32::MAX)
}

async fn open(address: String, tls: ClientTls, hello: JoinRequest) -> Result<Opened, NotJoined> {
    let channel = tls
        .connect(&address, JOIN_TIMEOUT)
        .await
        .map_err(NotJoined::because)?;
    let (outgoing, receiver) = mpsc::channel(OUTGOING);
    // The coordinator answers the call only when it has read Hello, so that goes first.
    outgoing
        .send(hello)
        .await
        .map_err(|_| NotJoined::because("the stream closed at once"))?;
    let hello_sent = Instant::now();
    let mut incoming = WorkerServiceClient::new(channel)
        .join(ReceiverStream::new(receiver))
        .await
        .map_err(|status| NotJoined::of(&status))?
        .into_inner();
    let first = incoming
        .message()
        .await
        .map_err(|status| NotJoined::of(&status))?
        .ok_or_else(|| NotJoined::because("the coordinator closed the stream"))?;
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
        _ => Err(NotJoined::because(
            "the coordinator's first message was not Welcome",
        )),
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

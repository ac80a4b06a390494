//! Calls to one etcd member of several: to the same one while it answers, to the next when it does not. Every call is
//! bounded, and its failure says whether etcd may have done what was asked.

use super::EtcdUrl;
use crate::store::StoreError;
use etcd_client::{Client, ConnectOptions, Error, TlsOptions};
use std::{
    error::Error as _,
    io,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};
use tokio::time::timeout;
use tonic::Code;

/// Longest wait for a connection: a member whose machine is gone must not use up the time of a call.
const CONNECT: Duration = Duration::from_millis(700);
/// A silent connection is asked this often whether the other end lives, and given up after as long again.
const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// Longest answer: a page of records.
const MAX_ANSWER_BYTES: usize = 256 << 20;

/// Why a call gave no answer.
#[derive(Debug)]
pub(super) enum CallError {
    /// etcd did nothing: it was not reached, or it said no.
    Failed(String),
    /// It may have been done.
    Unknown(String),
}

impl CallError {
    pub fn into_text(self) -> String {
        match self {
            Self::Failed(text) | Self::Unknown(text) => text,
        }
    }
}

/// The members of an etcd cluster.
pub(super) struct Endpoints {
    members: Vec<(String, Client)>,
    current: AtomicUsize,
}

impl Endpoints {
    /// Prepares connections; none is made yet.
    pub async fn new(url: &EtcdUrl, tls: Option<&TlsOptions>) -> Result<Self, StoreError> {
        let mut members = Vec::new();
        for endpoint in url.endpoints() {
            let options = ConnectOptions::new()
                .with_connect_timeout(CONNECT)
                .with_keep_alive(KEEP_ALIVE, KEEP_ALIVE)
                .with_keep_alive_while_idle(true);
            // A member that lost the rest of its cluster refuses instead of letting calls wait.
            let mut options = options.with_require_leader(true);
            if let Some(tls) = tls {
                options = options.with_tls(tls.clone());
            }
            let client = Client::connect([endpoint.as_str()], Some(options))
                .await
                .map_err(|error| StoreError::Failed(format!("etcd at {endpoint}: {error}")))?;
            members.push((endpoint.clone(), client));
        }
        Ok(Self {
            members,
            current: AtomicUsize::new(0),
        })
    }

    /// Calls the current member, once.
    pub async fn call<T, F: Future<Output = Result<T, Error>>>(
        &self,
        limit: Duration,
        call: impl FnOnce(Client) -> F,
    ) -> Result<T, CallError> {
        let index = self.current.load(Ordering::Relaxed);
        let (endpoint, client) = &self.members[index % self.members.len()];
        let failure = match timeout(limit, call(client.clone())).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => classify(endpoint, &error),
            Err(_) => CallError::Unknown(format!("etcd at {endpoint}: no answer within {limit:?}")),
        };
        // Whatever it was, the next member may do better. One of several callers moves on.
        let _moved =
            self.current
                .compare_exchange(index, index.wrapping_add(1), Ordering::Relaxed, Ordering::Relaxed);
        Err(failure)
    }

    /// Calls until there is an answer, changing members; what is called must do no harm when repeated. The caller
    /// limits the time of it all.
    pub async fn repeat<T, F: Future<Output = Result<T, Error>>>(
        &self,
        limit: Duration,
        pause: Duration,
        call: impl Fn(Client) -> F,
        mut failed: impl FnMut(String),
    ) -> T {
        loop {
            match self.call(limit, &call).await {
                Ok(answer) => return answer,
                Err(error) => failed(error.into_text()),
            }
            tokio::time::sleep(pause).await;
        }
    }
}

/// A transaction, with room for what it reads.
pub(super) async fn transact(
    client: Client,
    transaction: etcd_client::Txn,
) -> Result<etcd_client::TxnResponse, Error> {
    client
        .kv_client()
        .max_decoding_message_size(MAX_ANSWER_BYTES)
        .txn(transaction)
        .await
}

fn classify(endpoint: &str, error: &Error) -> CallError {
    let Error::GRpcStatus(status) = error else {
        return CallError::Unknown(format!("etcd at {endpoint}: {error}"));
    };
    let text = match root_cause(status) {
        Some(cause) => format!("etcd at {endpoint}: {cause}"),
        None => format!("etcd at {endpoint}: {}", status.message()),
    };
    // Answers of etcd itself to what it did not begin. NOSPACE and a full queue are ResourceExhausted.
    let refused = matches!(
        status.code(),
        Code::InvalidArgument
            | Code::ResourceExhausted
            | Code::FailedPrecondition
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::NotFound
            | Code::OutOfRange
    );
    match refused || was_not_connected(status) {
        true => CallError::Failed(text),
        false => CallError::Unknown(text),
    }
}

/// True if the connection itself was refused: only connecting can fail in this way, so nothing was sent.
fn was_not_connected(status: &tonic::Status) -> bool {
    let mut cause = status.source();
    while let Some(error) = cause {
        let refused = error
            .downcast_ref::<io::Error>()
            .is_some_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
        if refused {
            return true;
        }
        cause = error.source();
    }
    false
}

fn root_cause(status: &tonic::Status) -> Option<String> {
    let mut cause = status.source()?;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    Some(cause.to_string())
}

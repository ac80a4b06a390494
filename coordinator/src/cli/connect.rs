//! The client side of the coordinator's API: the coordinator that leads is found among those that are known, every
//! call has a deadline, pages are gathered, and status codes turned into what a person reads. Prints nothing.

use arcface_proto::failure::{ExitCode, Failure};
use arcface_proto::redirect;
use arcface_proto::v1::{
    self, cluster_service_client::ClusterServiceClient, job_service_client::JobServiceClient,
};
use std::{
    collections::VecDeque,
    error::Error,
    future::Future,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::{Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_types::StatusExt;

/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// Longest wait for an answer; a coordinator answers in milliseconds.
const ANSWER: Duration = Duration::from_secs(15);
/// Longest search for a coordinator that leads while others say that they stand by: a failover takes half of it.
const SEARCH: Duration = Duration::from_secs(15);
/// First wait after a round of all addresses; it doubles up to [`LONGEST_WAIT`].
const FIRST_WAIT: Duration = Duration::from_millis(100);
/// Longest wait between two rounds.
const LONGEST_WAIT: Duration = Duration::from_secs(1);
/// A silent connection is asked this often whether the other end lives, and given up after as long again.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// Longest answer.
const MAX_ANSWER_BYTES: usize = 64 << 20;
/// Items asked for at once.
const PAGE: u32 = 1000;

/// A call that did not give what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// No answer. Trying again may help.
    #[error("cannot reach the coordinator at {address}: {cause}")]
    Unreachable {
        /// Where it was looked for.
        address: String,
        /// Why not, short.
        cause: String,
    },
    /// The coordinator answered that it cannot do it now: its store fails, or it stands by. Trying again may help.
    #[error("the coordinator at {address} cannot answer now: {cause}")]
    Unable {
        /// Where it is.
        address: String,
        /// Why not, in its words.
        cause: String,
    },
    /// The coordinator said no.
    #[error("{}", .0.message())]
    Refused(Box<Status>),
}

impl CallError {
    fn of(address: &str, status: Status) -> Self {
        // Only a coordinator says when to try again: what connections and proxies say has no such detail.
        if status.code() == Code::Unavailable && status.get_details_retry_info().is_some() {
            return Self::Unable {
                address: address.into(),
                cause: status.message().to_owned(),
            };
        }
        let lost = status.source().is_some() && matches!(status.code(), Code::Unknown | Code::Internal);
        if lost
            || matches!(
                status.code(),
                Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled
            )
        {
            let cause = match status.source() {
                Some(source) => root_cause(source),
                None => status.message().to_owned(),
            };
            return Self::Unreachable {
                address: address.into(),
                cause,
            };
        }
        Self::Refused(Box::new(status))
    }

    /// True if another coordinator, or a later attempt, may answer.
    fn may_pass(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Unable { .. })
    }

    /// What a person reads: a line for every bad field, else one.
    pub fn failures(&self) -> Vec<Failure> {
        match self {
            Self::Unreachable { .. } => vec![
                Failure::new(ExitCode::Unreachable, self.to_string())
                    .hint("start one with `arcface-coordinator serve`, or name it (or several) with --coordinator or ARCFACE_COORDINATOR; one with TLS wants --tls-ca"),
            ],
            Self::Unable { .. } => vec![
                Failure::new(ExitCode::Unreachable, self.to_string())
                    .hint("running jobs go on; try again, and see the coordinator's log if it lasts"),
            ],
            Self::Refused(status) => refusals(status),
        }
    }
}

fn refusals(status: &Status) -> Vec<Failure> {
    let code = match status.code() {
        Code::InvalidArgument | Code::OutOfRange => ExitCode::Usage,
        Code::NotFound => ExitCode::NotFound,
        _ => ExitCode::Unreachable,
    };
    let fields = status
        .get_details_bad_request()
        .map(|bad| bad.field_violations)
        .unwrap_or_default();
    if !fields.is_empty() {
        return fields
            .into_iter()
            .map(|field| {
                // The API has one text for a field: the hint stands at its end in brackets.
                let hinted = field
                    .description
                    .strip_suffix(')')
                    .and_then(|text| text.split_once(" (hint: "));
                let (problem, hint) = hinted.unwrap_or((&field.description, ""));
                Failure::new(code, format!("{}: {problem}", field.field)).hint(hint)
            })
            .collect();
    }
    let message = match status.message() {
        "" => format!("the coordinator answered {:?}", status.code()),
        message => message.to_owned(),
    };
    let hint = match status.code() {
        Code::NotFound => "`arcface-coordinator jobs` and `nodes` list what there is",
        Code::Unimplemented => "is there a coordinator of this version at that address?",
        _ => "",
    };
    vec![Failure::new(code, message).hint(hint)]
}

/// The innermost error's text, without what only a programmer wants to know.
fn root_cause(error: &(dyn Error + 'static)) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    let text = innermost.to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut letters = text.chars();
    letters
        .next()
        .map_or_else(String::new, |first| first.to_lowercase().chain(letters).collect())
}

/// Checks `HOST:PORT` on the command line; `http://` in front is allowed.
///
/// # Errors
/// What an address looks like.
pub fn parse_address(text: &str) -> Result<String, String> {
    let address = text.strip_prefix("http://").unwrap_or(text).trim_end_matches('/');
    let valid = address.rsplit_once(':').is_some_and(|(host, port)| {
        let bracketed = host.starts_with('[') && host.ends_with(']');
        !host.is_empty()
            && (bracketed || !host.contains([':', '/', ' ', '@']))
            && port.parse::<u16>().is_ok_and(|p| p > 0)
    });
    if valid {
        Ok(address.to_owned())
    } else {
        Err("an address is HOST:PORT, as 127.0.0.1:1234".into())
    }
}

/// The coordinators of a cluster, with a connection to the one that answered last.
#[derive(Clone, Debug)]
pub struct Coordinator {
    addresses: Arc<Vec<String>>,
    tls: Option<ClientTlsConfig>,
    connection: Arc<Mutex<Connection>>,
}

#[derive(Clone, Debug)]
struct Connection {
    address: String,
    channel: Channel,
}

impl Connection {
    async fn open(address: &str, tls: Option<&ClientTlsConfig>) -> Result<Self, CallError> {
        let unreachable = |cause: String| CallError::Unreachable {
            address: address.into(),
            cause,
        };
        let scheme = if tls.is_some() { "https" } else { "http" };
        let mut endpoint = Endpoint::from_shared(format!("{scheme}://{address}"))
            .map_err(|error| unreachable(root_cause(&error)))?
            .connect_timeout(CONNECT)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .keep_alive_while_idle(true);
        if let Some(tls) = tls {
            endpoint = endpoint
                .tls_config(tls.clone())
                .map_err(|error| unreachable(root_cause(&error)))?;
        }
        match timeout(CONNECT, endpoint.connect()).await {
            Ok(Ok(channel)) => Ok(Self {
                address: address.into(),
                channel,
            }),
            Ok(Err(error)) => Err(unreachable(root_cause(&error))),
            Err(_) => Err(unreachable(format!(
                "no connection within {} s",
                CONNECT.as_secs()
            ))),
        }
    }
}

/// The search of one call for the coordinator that leads.
struct Search {
    until: Instant,
    wait: Duration,
    /// Addresses that were not tried in this round.
    untried: VecDeque<String>,
    /// In this round one has said that it stands by: there is a cluster, and somebody will lead it.
    standby: bool,
}

/// `None` if the coordinator leads; else what it says of the leader.
fn standby(status: &Status) -> Option<Option<String>> {
    let metadata = status.metadata();
    metadata
        .get(redirect::ROLE)
        .filter(|role| *role == redirect::STANDBY)?;
    let leader = metadata
        .get(redirect::LEADER)
        .and_then(|leader| leader.to_str().ok());
    Some(leader.and_then(|leader| parse_address(leader).ok()))
}

/// Between half of a wait and all of it, so that clients do not come back in one instant. The random bits of a fresh
/// UUID do: nothing has to be reproduced.
fn jittered(wait: Duration) -> Duration {
    let random = f64::from(uuid::Uuid::new_v4().as_fields().0) / f64::from(u32::MAX);
    wait.mul_f64(0.5 + 0.5 * random)
}

impl Coordinator {
    /// Connects to the first of several `HOST:PORT` that is there; which one leads is found out by the calls.
    ///
    /// # Errors
    /// [`CallError::Unreachable`] if none is, with the reason of the last.
    pub async fn connect(addresses: &[String], tls: Option<ClientTlsConfig>) -> Result<Self, CallError> {
        let mut failure = CallError::Unreachable {
            address: String::new(),
            cause: "no address".into(),
        };
        for address in addresses {
            match Connection::open(address, tls.as_ref()).await {
                Ok(connection) => {
                    return Ok(Self {
                        addresses: Arc::new(addresses.to_vec()),
                        tls,
                        connection: Arc::new(Mutex::new(connection)),
                    });
                }
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    /// Where they are, as they were named: `HOST:PORT,HOST:PORT`.
    pub fn addresses(&self) -> String {
        self.addresses.join(",")
    }

    fn connection(&self) -> Connection {
        self.connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Calls the coordinator that leads. One that stands by names it, or there will be one soon; one that cannot be
    /// reached is left for the next. Calls may be repeated: every one is idempotent.
    async fn ask<T, F>(&self, call: impl Fn(Channel) -> F) -> Result<T, CallError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let mut search = None;
        loop {
            let Connection { address, channel } = self.connection();
            let (error, leader) = match timeout(ANSWER, call(channel)).await {
                Ok(Ok(response)) => return Ok(response.into_inner()),
                Ok(Err(status)) => match standby(&status) {
                    Some(leader) => (CallError::of(&address, status), Some(leader)),
                    None => (CallError::of(&address, status), None),
                },
                Err(_) => {
                    let cause = format!("no answer within {} s", ANSWER.as_secs());
                    let address = address.clone();
                    (CallError::Unreachable { address, cause }, None)
                }
            };
            let lost = error.may_pass() && self.addresses.len() > 1;
            if leader.is_none() && !lost {
                return Err(error);
            }
            let search = search.get_or_insert_with(|| Search {
                until: Instant::now() + SEARCH,
                wait: FIRST_WAIT,
                untried: self
                    .addresses
                    .iter()
                    .filter(|other| **other != address)
                    .cloned()
                    .collect(),
                standby: false,
            });
            search.standby |= leader.is_some();
            let named = leader.flatten().filter(|leader| *leader != address);
            self.find(search, named, error).await?;
        }
    }

    /// Connects to the next coordinator: the one that was named as the leader, else those of the list in turn.
    async fn find(
        &self,
        search: &mut Search,
        mut named: Option<String>,
        mut error: CallError,
    ) -> Result<(), CallError> {
        loop {
            let Some(address) = named.take().or_else(|| search.untried.pop_front()) else {
                if !search.standby || Instant::now() > search.until {
                    return Err(error);
                }
                search.standby = false;
                search.untried = self.addresses.iter().cloned().collect();
                sleep(jittered(search.wait)).await;
                search.wait = (search.wait * 2).min(LONGEST_WAIT);
                continue;
            };
            match Connection::open(&address, self.tls.as_ref()).await {
                Ok(connection) => {
                    *self.connection.lock().unwrap_or_else(PoisonError::into_inner) = connection;
                    return Ok(());
                }
                Err(unreachable) => error = unreachable,
            }
        }
    }

    async fn ask_jobs<T, F>(&self, call: impl Fn(JobServiceClient<Channel>) -> F) -> Result<T, CallError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        self.ask(|channel| call(JobServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES)))
            .await
    }

    async fn ask_cluster<T, F>(
        &self,
        call: impl Fn(ClusterServiceClient<Channel>) -> F,
    ) -> Result<T, CallError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        self.ask(|channel| {
            call(ClusterServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES))
        })
        .await
    }

    /// Submits a job.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn submit(&self, request_id: String, spec: v1::JobSpec) -> Result<v1::Job, CallError> {
        let request = v1::SubmitJobRequest {
            request_id,
            spec: Some(spec),
            validate_only: false,
        };
        let response = self
            .ask_jobs(|mut jobs| {
                let request = deadline(request.clone());
                async move { jobs.submit_job(request).await }
            })
            .await?;
        Ok(response.job.unwrap_or_default())
    }

    /// One job, by id or the beginning of it.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn job(&self, job_id: &str) -> Result<v1::Job, CallError> {
        let request = v1::GetJobRequest {
            job_id: job_id.into(),
        };
        Ok(self
            .ask_jobs(|mut jobs| {
                let request = deadline(request.clone());
                async move { jobs.get_job(request).await }
            })
            .await?
            .job
            .unwrap_or_default())
    }

    /// Jobs, newest first, at most `limit`; in any state if `states` is empty.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn jobs(&self, limit: usize, states: &[v1::JobState]) -> Result<Vec<v1::Job>, CallError> {
        let mut jobs = Vec::new();
        let mut page_token = String::new();
        loop {
            let page_size = u32::try_from(limit - jobs.len()).map_or(PAGE, |left| left.clamp(1, PAGE));
            let states = states.iter().map(|state| *state as i32).collect();
            let request = v1::ListJobsRequest {
                page_size,
                page_token,
                states,
            };
            let page = self
                .ask_jobs(|mut jobs| {
                    let request = deadline(request.clone());
                    async move { jobs.list_jobs(request).await }
                })
                .await?;
            jobs.extend(page.jobs);
            if page.next_page_token.is_empty() || jobs.len() >= limit {
                jobs.truncate(limit);
                return Ok(jobs);
            }
            page_token = page.next_page_token;
        }
    }

    /// Asks a job to end.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn cancel(&self, job_id: &str, reason: String) -> Result<v1::Job, CallError> {
        let request = v1::CancelJobRequest {
            job_id: job_id.into(),
            reason,
        };
        Ok(self
            .ask_jobs(|mut jobs| {
                let request = deadline(request.clone());
                async move { jobs.cancel_job(request).await }
            })
            .await?
            .job
            .unwrap_or_default())
    }

    /// Events of a job. The stream itself has no deadline: keep-alive ends it when the coordinator is gone.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn watch(&self, job_id: &str) -> Result<Watch, CallError> {
        let request = v1::WatchJobRequest {
            job_id: job_id.into(),
        };
        let stream = self
            .ask_jobs(|mut jobs| {
                let request = request.clone();
                async move { jobs.watch_job(request).await }
            })
            .await?;
        Ok(Watch {
            address: self.connection().address,
            stream,
        })
    }

    /// Committed checkpoints, newest first.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn checkpoints(&self, job_id: &str) -> Result<Vec<v1::CheckpointManifest>, CallError> {
        let mut all = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = v1::ListCheckpointsRequest {
                job_id: job_id.into(),
                page_size: PAGE,
                page_token,
            };
            let page = self
                .ask_jobs(|mut jobs| {
                    let request = deadline(request.clone());
                    async move { jobs.list_checkpoints(request).await }
                })
                .await?;
            all.extend(page.checkpoints);
            if page.next_page_token.is_empty() {
                return Ok(all);
            }
            page_token = page.next_page_token;
        }
    }

    /// Evaluations, oldest first.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn evaluations(&self, job_id: &str) -> Result<Vec<v1::Evaluation>, CallError> {
        let mut all = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = v1::ListEvaluationsRequest {
                job_id: job_id.into(),
                page_size: PAGE,
                page_token,
            };
            let page = self
                .ask_jobs(|mut jobs| {
                    let request = deadline(request.clone());
                    async move { jobs.list_evaluations(request).await }
                })
                .await?;
            all.extend(page.evaluations);
            if page.next_page_token.is_empty() {
                return Ok(all);
            }
            page_token = page.next_page_token;
        }
    }

    /// Nodes by id.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn nodes(&self) -> Result<Vec<v1::Node>, CallError> {
        let mut all = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = v1::ListNodesRequest {
                page_size: PAGE,
                page_token,
            };
            let page = self
                .ask_cluster(|mut cluster| {
                    let request = deadline(request.clone());
                    async move { cluster.list_nodes(request).await }
                })
                .await?;
            all.extend(page.nodes);
            if page.next_page_token.is_empty() {
                return Ok(all);
            }
            page_token = page.next_page_token;
        }
    }

    /// Takes a node out of use, or back in.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn drain(&self, node_id: String, undo: bool) -> Result<v1::Node, CallError> {
        let request = v1::DrainNodeRequest { node_id, undo };
        Ok(self
            .ask_cluster(|mut cluster| {
                let request = deadline(request.clone());
                async move { cluster.drain_node(request).await }
            })
            .await?
            .node
            .unwrap_or_default())
    }
}

/// The events of one job.
pub struct Watch {
    address: String,
    stream: Streaming<v1::WatchJobResponse>,
}

impl Watch {
    /// The next event; `None` when the coordinator has closed the stream.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn next(&mut self) -> Result<Option<v1::WatchJobResponse>, CallError> {
        self.stream
            .message()
            .await
            .map_err(|status| CallError::of(&self.address, status))
    }
}

fn deadline<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(ANSWER);
    request
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic_types::{ErrorDetails, FieldViolation};

    #[test]
    fn addresses_are_host_and_port() {
        for text in ["127.0.0.1:1234", "http://head-node:80/", "[::1]:1234"] {
            assert!(parse_address(text).is_ok(), "{text}");
        }
        for text in [
            "",
            "host",
            ":1234",
            "host:0",
            "host:70000",
            "a b:1",
            "::1:1234",
            "user@host:1",
            "https://h:1",
        ] {
            assert!(parse_address(text).is_err(), "{text}");
        }
    }

    #[test]
    fn status_codes_become_exit_codes() {
        let code = |status: Status| CallError::of("h:1", status).failures()[0].code;
        assert_eq!(code(Status::not_found("job x: no such job")), ExitCode::NotFound);
        assert_eq!(code(Status::invalid_argument("no")), ExitCode::Usage);
        assert_eq!(code(Status::failed_precondition("no")), ExitCode::Unreachable);
        assert_eq!(code(Status::permission_denied("no")), ExitCode::Unreachable);
        assert_eq!(code(Status::unavailable("no")), ExitCode::Unreachable);
    }

    /// A coordinator whose store failed was said not to be there, with the advice to start one.
    #[test]
    fn a_coordinator_that_answers_is_reached() {
        let said = |status: Status| CallError::of("h:1", status).failures()[0].message.clone();
        let details = ErrorDetails::with_retry_info(Some(Duration::from_secs(1)));
        assert_eq!(
            said(Status::with_error_details(
                Code::Unavailable,
                "the store is full",
                details
            )),
            "the coordinator at h:1 cannot answer now: the store is full"
        );
        assert_eq!(
            said(Status::unavailable("no healthy upstream")),
            "cannot reach the coordinator at h:1: no healthy upstream"
        );
    }

    #[test]
    fn every_bad_field_has_its_line() {
        let details = ErrorDetails::with_bad_request(vec![
            FieldViolation::new("head.sample_rate", "1.5 is not in (0, 1]"),
            FieldViolation::new("train.lr", "0 is not a positive number"),
        ]);
        let status = Status::with_error_details(Code::InvalidArgument, "2 bad fields", details);
        let lines: Vec<_> = CallError::of("h:1", status)
            .failures()
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(
            lines,
            [
                "head.sample_rate: 1.5 is not in (0, 1]",
                "train.lr: 0 is not a positive number"
            ]
        );
    }
}

//! The only gRPC of a rank: rendezvous, the report stream, checkpoint commits, earlier evaluations. It runs on a thread of its own, so
//! training never waits for a coordinator: one that is away is tried again, what matters is kept until it is back,
//! and of the step metrics only the latest.

use super::failure::RankFailure;
use super::outbox::Outbox;
use crate::channel::ClientTls;
use crate::dial::{Answer, Dial};
use arcface_proto::redirect;
use arcface_proto::v1::job_service_client::JobServiceClient;
use arcface_proto::v1::rank_service_client::RankServiceClient;
use arcface_proto::v1::report_request::Report;
use arcface_proto::v1::report_response::Command;
use arcface_proto::v1::{
    CommitCheckpointRequest, Evaluation, ListEvaluationsRequest, RankId, RendezvousRequest,
    RendezvousResponse, ReportRequest,
};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::runtime::Runtime;
use tokio::sync::{Notify, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tracing::{info, warn};

/// Time for one connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Time for one commit call; it is made again if it passes.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(30);
/// Checkpoints whose parts are offered again while those of other ranks are missing; older ones are given up.
const OFFERED: usize = 2;
/// Time until parts are offered again: at first, and at most. A coordinator only remembers parts until the checkpoint is whole,
/// so the next one has to be told of them too.
const OFFER_AGAIN: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// Earlier evaluations in one answer.
const EVALUATIONS_AT_ONCE: u32 = 1000;
/// Time for all ranks of a generation to meet. The coordinator has its own limit, which is shorter.
const RENDEZVOUS_LIMIT: Duration = Duration::from_secs(600);

/// The rank's voice. Dropping it abandons what was not sent.
pub struct Reporter {
    runtime: Runtime,
    shared: Arc<Shared>,
    commands: mpsc::Receiver<Command>,
    commits: mpsc::Sender<CommitCheckpointRequest>,
    /// Checkpoints that are neither committed nor refused nor given up.
    open_commits: watch::Receiver<usize>,
    open_commits_sender: Arc<watch::Sender<usize>>,
    finished: watch::Receiver<bool>,
}

struct Shared {
    rank: RankId,
    /// Nobody tried yet; every connection has its own.
    dial: Dial,
    tls: ClientTls,
    outbox: Mutex<Outbox>,
    news: Notify,
}

impl Shared {
    fn say(&self, report: Report) {
        self.outbox().push(report);
        self.news.notify_one();
    }

    fn outbox(&self) -> MutexGuard<'_, Outbox> {
        // The outbox is changed by single assignments: a panic elsewhere leaves it whole.
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reporter {
    /// Starts to report for `rank` to the one of `coordinators` ("host:port") that leads.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub fn start(rank: RankId, coordinators: Vec<String>, tls: ClientTls) -> Result<Self, RankFailure> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("report")
            .enable_all()
            .build()
            .map_err(|error| RankFailure::transient(format!("start the reporting thread: {error}")))?;
        let shared = Arc::new(Shared {
            rank,
            dial: Dial::new(coordinators),
            tls,
            outbox: Mutex::default(),
            news: Notify::new(),
        });
        let (command_sender, commands) = mpsc::channel(64);
        let (commits, commit_receiver) = mpsc::channel(16);
        let (open_commits_sender, open_commits) = watch::channel(0);
        let open_commits_sender = Arc::new(open_commits_sender);
        let (finish, finished) = watch::channel(false);
        runtime.spawn(report(shared.clone(), command_sender, finish));
        runtime.spawn(commit(
            shared.clone(),
            commit_receiver,
            open_commits_sender.clone(),
        ));
        Ok(Self {
            runtime,
            shared,
            commands,
            commits,
            open_commits,
            open_commits_sender,
            finished,
        })
    }

    /// Meets the other ranks: gives the endpoints of its ring and of its parts (empty for none), and gets everyone's, by
    /// rank.
    ///
    /// # Errors
    /// If the generation ended, or the ranks did not all come.
    pub fn rendezvous(
        &self,
        endpoint: String,
        parts_endpoint: String,
    ) -> Result<RendezvousResponse, RankFailure> {
        let request = RendezvousRequest {
            rank: Some(self.shared.rank.clone()),
            endpoint,
            nccl_unique_id: Vec::new(),
            parts_endpoint,
        };
        let meet = async {
            let mut dial = self.shared.dial.clone();
            loop {
                let tried = async {
                    let (mut client, _) = connect(&mut dial, &self.shared.tls).await?;
                    client.rendezvous(request.clone()).await
                };
                match tried.await {
                    Ok(answer) => return Ok(answer.into_inner()),
                    Err(status) if is_away(&status) => pause(&mut dial, &status).await,
                    Err(status) => return Err(refusal("rendezvous", &status)),
                }
            }
        };
        self.runtime.block_on(async {
            match tokio::time::timeout(RENDEZVOUS_LIMIT, meet).await {
                Ok(result) => result,
                Err(_) => Err(RankFailure::transient(format!(
                    "rendezvous: the ranks did not meet within {RENDEZVOUS_LIMIT:?}"
                ))),
            }
        })
    }

    /// The job's evaluations so far, oldest first. Waits for a coordinator that is away.
    ///
    /// # Errors
    /// If there is none within the time for ranks to meet, or it refuses.
    pub fn evaluations(&self) -> Result<Vec<Evaluation>, RankFailure> {
        let ask = async {
            let mut dial = self.shared.dial.clone();
            let mut all = Vec::new();
            let mut page_token = String::new();
            loop {
                let request = ListEvaluationsRequest {
                    job_id: self.shared.rank.job_id.clone(),
                    page_size: EVALUATIONS_AT_ONCE,
                    page_token: page_token.clone(),
                };
                let tried = async {
                    let (channel, address) = channel(&mut dial, &self.shared.tls).await?;
                    let page = JobServiceClient::new(channel).list_evaluations(request).await?;
                    Ok::<_, Status>((page.into_inner(), address))
                };
                match tried.await {
                    Ok((page, address)) => {
                        dial.reached(&address);
                        all.extend(page.evaluations);
                        if page.next_page_token.is_empty() {
                            return Ok(all);
                        }
                        page_token = page.next_page_token;
                    }
                    Err(status) if is_away(&status) => pause(&mut dial, &status).await,
                    Err(status) => return Err(refusal("earlier evaluations", &status)),
                }
            }
        };
        self.runtime.block_on(async {
            match tokio::time::timeout(RENDEZVOUS_LIMIT, ask).await {
                Ok(result) => result,
                Err(_) => Err(RankFailure::transient(format!(
                    "earlier evaluations: no coordinator told them within {RENDEZVOUS_LIMIT:?}"
                ))),
            }
        })
    }

    /// Queues a report; metrics replace older metrics that were not sent.
    pub fn say(&self, report: Report) {
        self.shared.say(report);
    }

    /// The same from another thread.
    pub fn teller(&self) -> impl Fn(Report) + Send + 'static {
        let shared = self.shared.clone();
        move |report| shared.say(report)
    }

    /// The next command that has arrived.
    pub fn command(&mut self) -> Option<Command> {
        self.commands.try_recv().ok()
    }

    /// Waits for the next command, at most `limit`.
    pub fn command_within(&mut self, limit: Duration) -> Option<Command> {
        let commands = &mut self.commands;
        self.runtime
            .block_on(async { tokio::time::timeout(limit, commands.recv()).await.ok().flatten() })
    }

    /// A handle that asks for commits, for the thread that writes checkpoints.
    pub fn committer(&self) -> Committer {
        Committer {
            rank: self.shared.rank.clone(),
            commits: self.commits.clone(),
            open: self.open_commits_sender.clone(),
        }
    }

    /// Waits until every checkpoint that this rank has parts of is committed or never will be, at most `limit`. False if that
    /// is not known of some.
    pub fn wait_for_commits(&mut self, limit: Duration) -> bool {
        let open = &mut self.open_commits;
        self.runtime.block_on(async {
            let settled = tokio::time::timeout(limit, open.wait_for(|open| *open == 0)).await;
            matches!(settled, Ok(Ok(_)))
        })
    }

    /// Says the last word and waits until the coordinator has it, at most `limit`. False if it may not have.
    pub fn finish(mut self, last: Report, limit: Duration) -> bool {
        self.say(last);
        let finished = &mut self.finished;
        let told = self.runtime.block_on(async {
            let told = tokio::time::timeout(limit, finished.wait_for(|told| *told)).await;
            matches!(told, Ok(Ok(_)))
        });
        self.runtime.shutdown_background();
        told
    }
}

/// Asks for commits from another thread.
#[derive(Clone)]
pub struct Committer {
    rank: RankId,
    commits: mpsc::Sender<CommitCheckpointRequest>,
    open: Arc<watch::Sender<usize>>,
}

impl Committer {
    /// Queues a commit; `request.rank` is filled in. Waits while too many are unanswered.
    pub fn commit(&self, mut request: CommitCheckpointRequest) {
        request.rank = Some(self.rank.clone());
        self.open.send_modify(|open| *open += 1);
        if self.commits.blocking_send(request).is_err() {
            self.open.send_modify(|open| *open -= 1);
        }
    }
}

/// Keeps a report stream open until the last word was received.
async fn report(shared: Arc<Shared>, commands: mpsc::Sender<Command>, finish: watch::Sender<bool>) {
    let mut dial = shared.dial.clone();
    loop {
        // A stream begins with its first report: there is nothing to connect for before.
        while shared.outbox().is_empty() {
            shared.news.notified().await;
        }
        let mut opened = None;
        let ended = stream(&shared, &mut dial, &mut opened, &commands).await;
        let status = match ended {
            Ok(()) => {
                finish.send_replace(true);
                return;
            }
            Err(status) => status,
        };
        match (is_away(&status), opened) {
            (true, Some(address)) => {
                info!("the coordinator is away ({}), training goes on", status.message());
                dial.reached(&address);
            }
            (true, None) => {}
            (false, _) => warn!("reports are refused: {}", status.message()),
        }
        shared.outbox().requeue();
        pause(&mut dial, &status).await;
    }
}

/// One stream; `Ok` when the coordinator has taken the last word. `opened` gets its address.
async fn stream(
    shared: &Shared,
    dial: &mut Dial,
    opened: &mut Option<String>,
    commands: &mpsc::Sender<Command>,
) -> Result<(), Status> {
    let (mut client, address) = connect(dial, &shared.tls).await?;
    let (sender, receiver) = mpsc::channel(16);
    let mut incoming = client.report(ReceiverStream::new(receiver)).await?.into_inner();
    *opened = Some(address);
    let mut sender = Some(sender);
    loop {
        if let Some(open) = &sender {
            let next = shared.outbox().next();
            if let Some(report) = next {
                let last = matches!(report, Report::Finished(_) | Report::Error(_));
                let request = ReportRequest {
                    rank: Some(shared.rank.clone()),
                    report: Some(report),
                };
                open.send(request)
                    .await
                    .map_err(|_| Status::unavailable("the report stream broke"))?;
                if last {
                    // The coordinator ends its side when it has read ours to the end.
                    sender = None;
                }
                continue;
            }
        }
        tokio::select! {
            () = shared.news.notified(), if sender.is_some() => {}
            message = incoming.message() => match (message?, &sender) {
                (Some(answer), _) => {
                    if let Some(command) = answer.command {
                        // A training thread that takes no commands is near its end.
                        let _dropped = commands.try_send(command);
                    }
                }
                (None, None) => return Ok(()),
                (None, Some(_)) => return Err(Status::unavailable("the coordinator ended the report stream")),
            },
        }
    }
}

/// Offers the parts of each checkpoint until it is committed: a coordinator that is away is waited for, a refusal is final.
async fn commit(
    shared: Arc<Shared>,
    mut requests: mpsc::Receiver<CommitCheckpointRequest>,
    open: Arc<watch::Sender<usize>>,
) {
    let mut dial = shared.dial.clone();
    // Oldest first.
    let mut offers: Vec<CommitCheckpointRequest> = Vec::new();
    let (soon, late) = OFFER_AGAIN;
    let mut pause = soon;
    loop {
        tokio::select! {
            request = requests.recv() => {
                let Some(request) = request else { return };
                offers.push(request);
                pause = soon;
            }
            () = tokio::time::sleep(pause), if !offers.is_empty() => pause = late.min(pause * 2),
        }
        let offered = offers.len();
        let mut waiting = Vec::new();
        for request in offers {
            match answered(&mut dial, &shared.tls, &request).await {
                Ok(true) => {}
                Ok(false) => waiting.push(request),
                Err(status) => warn!(
                    step = request.step,
                    "the checkpoint was refused: {}",
                    status.message()
                ),
            }
        }
        let given_up = waiting.len().saturating_sub(OFFERED);
        offers = waiting.split_off(given_up);
        open.send_modify(|open| *open -= offered - offers.len());
    }
}

/// Whether the checkpoint is committed by now. The error is a refusal.
async fn answered(
    dial: &mut Dial,
    tls: &ClientTls,
    request: &CommitCheckpointRequest,
) -> Result<bool, Status> {
    loop {
        let tried = async {
            let (mut client, address) = connect(dial, tls).await?;
            let answer = client.commit_checkpoint(request.clone()).await?;
            Ok((answer.into_inner().committed, address))
        };
        let result = tokio::time::timeout(COMMIT_TIMEOUT, tried).await;
        match result.unwrap_or_else(|_| Err(Status::unavailable("no answer"))) {
            Ok((committed, address)) => {
                dial.reached(&address);
                return Ok(committed);
            }
            Err(status) if is_away(&status) => pause(dial, &status).await,
            Err(status) => return Err(status),
        }
    }
}

/// The rank service of the next coordinator to try, and its address.
async fn connect(dial: &mut Dial, tls: &ClientTls) -> Result<(RankServiceClient<Channel>, String), Status> {
    let (channel, address) = channel(dial, tls).await?;
    Ok((RankServiceClient::new(channel), address))
}

/// A connection to the next coordinator to try, and its address.
async fn channel(dial: &mut Dial, tls: &ClientTls) -> Result<(Channel, String), Status> {
    let address = dial
        .next_address()
        .ok_or_else(|| Status::invalid_argument("the assignment names no coordinator"))?;
    let channel = tls
        .connect(&address, CONNECT_TIMEOUT)
        .await
        .map_err(|why| Status::unavailable(format!("{address}: {why}")))?;
    Ok((channel, address))
}

/// True if another try may find a coordinator that answers: it is away, or stopping.
fn is_away(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unavailable | Code::Unknown | Code::Internal | Code::ResourceExhausted | Code::Cancelled
    )
}

fn refusal(what: &str, status: &Status) -> RankFailure {
    RankFailure::transient(format!("{what}: {}", status.message()))
}

/// Waits until the next try. Jitter needs no reproducibility: the random bits of a fresh UUID do.
async fn pause(dial: &mut Dial, status: &Status) {
    let text = |key: &str| status.metadata().get(key).and_then(|value| value.to_str().ok());
    let answer = Answer::of(text(redirect::ROLE), text(redirect::LEADER));
    let unit = f64::from(uuid::Uuid::new_v4().as_fields().0) / f64::from(u32::MAX);
    tokio::time::sleep(dial.failed(answer, unit)).await;
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;
    use arcface_proto::v1::rank_service_server::{RankService, RankServiceServer};
    use arcface_proto::v1::{CommitCheckpointResponse, ReportResponse};
    use tokio_stream::wrappers::TcpListenerStream;
    use tonic::{Request, Response, Streaming};

    /// What a coordinator answers to offers, in turn, and the steps that it was offered.
    struct Answers {
        left: Mutex<VecDeque<Result<bool, Status>>>,
        offered: Arc<Mutex<Vec<u64>>>,
    }

    #[tonic::async_trait]
    impl RankService for Answers {
        type ReportStream = ReceiverStream<Result<ReportResponse, Status>>;

        async fn rendezvous(
            &self,
            _request: Request<RendezvousRequest>,
        ) -> Result<Response<RendezvousResponse>, Status> {
            Err(Status::unimplemented("not asked for"))
        }

        async fn report(
            &self,
            _reports: Request<Streaming<ReportRequest>>,
        ) -> Result<Response<Self::ReportStream>, Status> {
            Err(Status::unimplemented("not asked for"))
        }

        async fn commit_checkpoint(
            &self,
            request: Request<CommitCheckpointRequest>,
        ) -> Result<Response<CommitCheckpointResponse>, Status> {
            self.offered.lock().unwrap().push(request.into_inner().step);
            let answer = self.left.lock().unwrap().pop_front();
            let committed = answer.unwrap_or(Err(Status::internal("asked once too often")))?;
            Ok(Response::new(CommitCheckpointResponse { committed }))
        }
    }

    /// Offers parts of `steps` to a coordinator that answers so; the steps that it was offered until all were settled.
    fn offered(steps: &[u64], answers: Vec<Result<bool, Status>>) -> Vec<u64> {
        let server = Runtime::new().unwrap();
        let listener = server
            .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
            .unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let offered = Arc::default();
        let service = RankServiceServer::new(Answers {
            left: Mutex::new(answers.into()),
            offered: Arc::clone(&offered),
        });
        let serving = tonic::transport::Server::builder().add_service(service);
        server.spawn(serving.serve_with_incoming(TcpListenerStream::new(listener)));

        let mut reporter = Reporter::start(RankId::default(), vec![address], ClientTls::default()).unwrap();
        let committer = reporter.committer();
        for &step in steps {
            committer.commit(CommitCheckpointRequest {
                step,
                ..Default::default()
            });
        }
        assert!(reporter.wait_for_commits(Duration::from_secs(60)));
        let offered = offered.lock().unwrap();
        offered.clone()
    }

    #[test]
    fn parts_are_offered_until_the_checkpoint_is_committed() {
        let away = Status::unavailable("about to stop");
        // The third answer is that of a coordinator which remembers nothing.
        let answers = vec![Ok(false), Err(away), Ok(false), Ok(false), Ok(true)];
        assert_eq!(offered(&[7], answers), [7; 5]);
    }

    #[test]
    fn a_refusal_is_final() {
        let refused = Status::failed_precondition("rank 1 is at its end");
        assert_eq!(offered(&[7], vec![Ok(false), Err(refused)]), [7, 7]);
    }
}

//! `arcface.v1.RankService`: the rank processes.

use super::{Answers, send, status, stream};
use crate::control::{ControlError, Handle, ReportSession};
use arcface_proto::v1::{
    CommitCheckpointRequest, CommitCheckpointResponse, RankId, RendezvousRequest, RendezvousResponse,
    ReportRequest, ReportResponse, rank_service_server::RankService, report_request::Report,
};
use std::time::Duration;
use tokio::{sync::mpsc, time::timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

/// Longest that a report stream may stay without its first report.
const FIRST_REPORT_LIMIT: Duration = Duration::from_secs(600);

/// The service.
pub struct RankApi {
    /// The control task.
    pub control: Handle,
    /// Ends open streams.
    pub stop: CancellationToken,
}

fn rank_of(rank: Option<RankId>) -> Result<RankId, Status> {
    rank.ok_or_else(|| status::invalid("rank", "is missing"))
}

#[tonic::async_trait]
impl RankService for RankApi {
    async fn rendezvous(
        &self,
        request: Request<RendezvousRequest>,
    ) -> Result<Response<RendezvousResponse>, Status> {
        let request = request.into_inner();
        let rank = rank_of(request.rank.clone())?;
        tokio::select! {
            met = self.control.rendezvous(rank, request) => met.map(Response::new).map_err(status::from_control),
            () = self.stop.cancelled() => Err(status::stopping()),
        }
    }

    type ReportStream = Answers<ReportResponse>;

    async fn report(
        &self,
        request: Request<Streaming<ReportRequest>>,
    ) -> Result<Response<Self::ReportStream>, Status> {
        let messages = request.into_inner();
        let (sender, receiver) = mpsc::channel(16);
        // Answered at once: a rank waits for the answer before it sends its first report.
        tokio::spawn(serve(self.control.clone(), messages, sender, self.stop.clone()));
        Ok(Response::new(stream(receiver)))
    }

    async fn commit_checkpoint(
        &self,
        request: Request<CommitCheckpointRequest>,
    ) -> Result<Response<CommitCheckpointResponse>, Status> {
        let request = request.into_inner();
        let rank = rank_of(request.rank.clone())?;
        let committed = self
            .control
            .commit_checkpoint(rank, request)
            .await
            .map_err(status::from_control)?;
        Ok(Response::new(CommitCheckpointResponse { committed }))
    }
}

async fn serve(
    control: Handle,
    mut messages: Streaming<ReportRequest>,
    answers: mpsc::Sender<Result<ReportResponse, Status>>,
    stop: CancellationToken,
) {
    let first = tokio::select! {
        first = timeout(FIRST_REPORT_LIMIT, messages.message()) => first,
        () = stop.cancelled() => {
            let _ = answers.try_send(Err(status::stopping()));
            return;
        }
    };
    let Ok(Ok(Some(ReportRequest { rank, report }))) = first else {
        return;
    };
    if let Err(status) = serve_rank(&control, rank, report, messages, &answers, &stop).await {
        // A rank that does not read now sees the stream end.
        let _ = answers.try_send(Err(status));
    }
}

/// Both directions of one rank's stream, from its first report.
async fn serve_rank(
    control: &Handle,
    rank: Option<RankId>,
    first: Option<Report>,
    mut messages: Streaming<ReportRequest>,
    answers: &mpsc::Sender<Result<ReportResponse, Status>>,
    stop: &CancellationToken,
) -> Result<(), Status> {
    let rank = rank_of(rank)?;
    // A rank may have a last word when its generation is over; the control task decides about it.
    let opened = match (control.open_report(rank.clone()).await, &first) {
        (Ok(session), _) => session,
        (Err(ControlError::Refused(_)), Some(Report::Error(_))) => ReportSession::closed(),
        (Err(error), _) => return Err(status::from_control(error)),
    };
    let stream = opened.stream;
    let ended = exchange(control, &rank, first, opened, &mut messages, answers, stop).await;
    control.close_report(rank, stream).await;
    ended
}

async fn exchange(
    control: &Handle,
    rank: &RankId,
    first: Option<Report>,
    mut session: ReportSession,
    messages: &mut Streaming<ReportRequest>,
    answers: &mpsc::Sender<Result<ReportResponse, Status>>,
    stop: &CancellationToken,
) -> Result<(), Status> {
    if let Some(report) = first {
        control
            .rank_says(rank.clone(), report)
            .await
            .map_err(status::from_control)?;
    }
    let mut open = true;
    loop {
        tokio::select! {
            // What a rank said last counts, also if it has gone since.
            biased;
            message = messages.message() => {
                let Ok(Some(ReportRequest { rank: from, report })) = message else { return Ok(()) };
                if from.as_ref() != Some(rank) {
                    return Err(status::invalid("rank", "is another one than this stream began with"));
                }
                if let Some(report) = report {
                    control.rank_says(rank.clone(), report).await.map_err(status::from_control)?;
                }
            }
            command = session.commands.recv(), if open => match command {
                Some(command) => if send(answers, Ok(command), stop).await.is_err() { return Ok(()) },
                // The generation is over; the rank may still say why it ends.
                None => open = false,
            },
            () = answers.closed() => return Ok(()),
            () = stop.cancelled() => return Err(status::stopping()),
        }
    }
}

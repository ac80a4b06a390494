//! `arcface.v1.JobService`.

use super::{Answers, page, send, status, stream};
use crate::control::{Handle, JobFilter};
use arcface_proto::{
    convert,
    timestamp::{from_unix_ms, to_unix_ms},
    v1::{
        CancelJobRequest, CancelJobResponse, GetJobRequest, GetJobResponse, JobState, ListCheckpointsRequest,
        ListCheckpointsResponse, ListEvaluationsRequest, ListEvaluationsResponse, ListJobsRequest,
        ListJobsResponse, SubmitJobRequest, SubmitJobResponse, WatchJobRequest, WatchJobResponse,
        job_service_server::JobService, watch_job_response::Event,
    },
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

/// Longest request id.
const MAX_REQUEST_ID_CHARS: usize = 128;
/// Longest reason of a cancel.
const MAX_REASON_CHARS: usize = 500;
/// Elements of a page if the client does not say.
const DEFAULT_PAGE: usize = 50;

/// The service.
pub struct JobApi {
    /// The control task.
    pub control: Handle,
    /// Ends open streams.
    pub stop: CancellationToken,
}

#[tonic::async_trait]
impl JobService for JobApi {
    async fn submit_job(
        &self,
        request: Request<SubmitJobRequest>,
    ) -> Result<Response<SubmitJobResponse>, Status> {
        let SubmitJobRequest {
            request_id,
            spec,
            validate_only,
        } = request.into_inner();
        let printable = request_id.chars().all(|c| c.is_ascii_graphic());
        if request_id.chars().count() > MAX_REQUEST_ID_CHARS || !printable {
            let problem =
                format!("is not at most {MAX_REQUEST_ID_CHARS} printable characters without spaces");
            return Err(status::invalid("request_id", problem));
        }
        let spec = spec.ok_or_else(|| status::invalid("spec", "is missing"))?;
        let spec = convert::job_spec(&spec).map_err(|violations| status::from_violations(&violations))?;
        let job = self
            .control
            .submit(spec, request_id, validate_only)
            .await
            .map_err(status::from_control)?;
        Ok(Response::new(SubmitJobResponse { job: Some(job) }))
    }

    async fn get_job(&self, request: Request<GetJobRequest>) -> Result<Response<GetJobResponse>, Status> {
        let job = self
            .control
            .job(request.into_inner().job_id)
            .await
            .map_err(status::from_control)?;
        Ok(Response::new(GetJobResponse { job: Some(job) }))
    }

    async fn list_jobs(
        &self,
        request: Request<ListJobsRequest>,
    ) -> Result<Response<ListJobsResponse>, Status> {
        let request = request.into_inner();
        let size = page::size(request.page_size, DEFAULT_PAGE)?;
        let states = request
            .states
            .iter()
            .map(|state| {
                JobState::try_from(*state)
                    .map_err(|_| status::invalid("states", format!("{state} is no state")))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let token = request.page_token.split_once('/');
        let before = token.and_then(|(ms, id)| Some((ms.parse().ok()?, id.parse().ok()?)));
        if before.is_none() && !request.page_token.is_empty() {
            return Err(status::invalid("page_token", "is not a token of this list"));
        }
        // One more than the page: whether there is a next one.
        let filter = JobFilter {
            states,
            before,
            limit: size + 1,
        };
        let mut jobs = self.control.jobs(filter).await.map_err(status::from_control)?;
        let more = jobs.len() > size;
        jobs.truncate(size);
        let next_page_token = match jobs.last() {
            Some(last) if more => {
                format!("{}/{}", last.submitted_at.as_ref().map_or(0, to_unix_ms), last.id)
            }
            _ => String::new(),
        };
        Ok(Response::new(ListJobsResponse {
            jobs,
            next_page_token,
        }))
    }

    async fn cancel_job(
        &self,
        request: Request<CancelJobRequest>,
    ) -> Result<Response<CancelJobResponse>, Status> {
        let CancelJobRequest { job_id, reason } = request.into_inner();
        if reason.chars().count() > MAX_REASON_CHARS || reason.chars().any(char::is_control) {
            let problem = format!("is not one line of at most {MAX_REASON_CHARS} characters");
            return Err(status::invalid("reason", problem));
        }
        let job = self
            .control
            .cancel(job_id, reason)
            .await
            .map_err(status::from_control)?;
        Ok(Response::new(CancelJobResponse { job: Some(job) }))
    }

    type WatchJobStream = Answers<WatchJobResponse>;

    async fn watch_job(
        &self,
        request: Request<WatchJobRequest>,
    ) -> Result<Response<Self::WatchJobStream>, Status> {
        let watch = self
            .control
            .watch(request.into_inner().job_id)
            .await
            .map_err(status::from_control)?;
        // One answer at a time: what waits longer waits in the watcher's own bounded buffer.
        let (sender, receiver) = mpsc::channel(1);
        let stop = self.stop.clone();
        tokio::spawn(async move {
            let mut events = watch.events;
            let now_ms = std::time::UNIX_EPOCH
                .elapsed()
                .map_or(0, |elapsed| elapsed.as_millis() as u64);
            let snapshot = WatchJobResponse {
                at: Some(from_unix_ms(now_ms)),
                event: Some(Event::Job(watch.snapshot)),
            };
            let mut next = Some(snapshot);
            while let Some(event) = next {
                if send(&sender, Ok(event), &stop).await.is_err() {
                    break;
                }
                next = tokio::select! {
                    event = events.next() => event,
                    () = sender.closed() => None,
                    () = stop.cancelled() => None,
                };
            }
            if stop.is_cancelled() {
                // A client that does not read now will see the connection end.
                let _ = sender.try_send(Err(status::stopping()));
            }
        });
        Ok(Response::new(stream(receiver)))
    }

    async fn list_checkpoints(
        &self,
        request: Request<ListCheckpointsRequest>,
    ) -> Result<Response<ListCheckpointsResponse>, Status> {
        let request = request.into_inner();
        let size = page::size(request.page_size, DEFAULT_PAGE)?;
        let offset = page::offset(&request.page_token)?;
        let all = self
            .control
            .checkpoints(request.job_id)
            .await
            .map_err(status::from_control)?;
        let (checkpoints, next_page_token) = page::cut(all, offset, size);
        Ok(Response::new(ListCheckpointsResponse {
            checkpoints,
            next_page_token,
        }))
    }

    async fn list_evaluations(
        &self,
        request: Request<ListEvaluationsRequest>,
    ) -> Result<Response<ListEvaluationsResponse>, Status> {
        let request = request.into_inner();
        let size = page::size(request.page_size, DEFAULT_PAGE)?;
        let after = Some(request.page_token).filter(|token| !token.is_empty());
        let mut found = self
            .control
            .evaluations(request.job_id, after, size + 1)
            .await
            .map_err(status::from_control)?;
        let more = found.len() > size;
        found.truncate(size);
        let next_page_token = match found.last() {
            Some((token, _)) if more => token.clone(),
            _ => String::new(),
        };
        let evaluations = found.into_iter().map(|(_, evaluation)| evaluation).collect();
        Ok(Response::new(ListEvaluationsResponse {
            evaluations,
            next_page_token,
        }))
    }
}

//! The gRPC rim: decode, ask `control::Handle`, encode. No decisions are taken here, and nothing else knows gRPC
//! status codes than `status`.

mod cluster;
mod front;
mod job;
mod page;
mod rank;
mod router;
mod status;
mod worker;

pub use cluster::ClusterApi;
pub use front::{Front, Role};
pub use job::JobApi;
pub use rank::RankApi;
pub use router::Router;
pub use status::stopping;
pub use worker::WorkerApi;

use std::pin::Pin;
use tokio::sync::mpsc;
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;
use tonic::Status;

/// A stream of answers.
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Sends on an answer stream, unless its client has gone or the coordinator stops.
async fn send<T>(
    answers: &mpsc::Sender<Result<T, Status>>,
    answer: Result<T, Status>,
    stop: &CancellationToken,
) -> Result<(), ()> {
    tokio::select! {
        sent = answers.send(answer) => sent.map_err(|_| ()),
        () = stop.cancelled() => Err(()),
    }
}

fn stream<T: Send + 'static>(receiver: mpsc::Receiver<Result<T, Status>>) -> Answers<T> {
    Box::pin(ReceiverStream::new(receiver))
}

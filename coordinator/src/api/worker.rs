//! `arcface.v1.WorkerService`: the agents' streams.

use super::{Answers, send, status, stream};
use crate::{
    control::{AgentSession, Handle, rank_list},
    membership,
};
use arcface_proto::v1::{
    Hello, JoinRequest, JoinResponse, join_request::Message, worker_service_server::WorkerService,
};
use std::time::Duration;
use tokio::{sync::mpsc, time::timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

/// Longest that a stream may stay without its Hello.
const HELLO_LIMIT: Duration = Duration::from_secs(10);
/// Most slots of one node.
const MAX_SLOTS: u32 = 1024;
/// Jobs that a node may say it has copies of; what is beyond it is forgotten at a later join.
const MAX_COPIES: usize = 1000;
/// Longest address, boot id and the like.
const MAX_TEXT_CHARS: usize = 256;

/// The service.
pub struct WorkerApi {
    /// The control task.
    pub control: Handle,
    /// Ends open streams.
    pub stop: CancellationToken,
}

#[tonic::async_trait]
impl WorkerService for WorkerApi {
    type JoinStream = Answers<JoinResponse>;

    async fn join(
        &self,
        request: Request<Streaming<JoinRequest>>,
    ) -> Result<Response<Self::JoinStream>, Status> {
        let mut messages = request.into_inner();
        let first = timeout(HELLO_LIMIT, messages.message())
            .await
            .map_err(|_| status::invalid("hello", format!("did not come within {HELLO_LIMIT:?}")))??;
        let Some(Message::Hello(hello)) = first.and_then(|first| first.message) else {
            return Err(status::invalid("hello", "is not the first message"));
        };
        let session = self
            .control
            .join(checked(hello)?)
            .await
            .map_err(status::from_control)?;
        let (sender, receiver) = mpsc::channel(16);
        tokio::spawn(serve(
            self.control.clone(),
            session,
            messages,
            sender,
            self.stop.clone(),
        ));
        Ok(Response::new(stream(receiver)))
    }
}

/// Both directions of one agent's stream, until either side or a newer stream ends it.
async fn serve(
    control: Handle,
    mut session: AgentSession,
    mut messages: Streaming<JoinRequest>,
    answers: mpsc::Sender<Result<JoinResponse, Status>>,
    stop: CancellationToken,
) {
    let (node, stream) = (session.node.clone(), session.stream);
    let end = loop {
        tokio::select! {
            command = session.commands.recv() => match command {
                Some(command) => if send(&answers, Ok(command), &stop).await.is_err() { break None },
                None => break Some(status::from_control(crate::control::ControlError::Aborted(
                    "another stream speaks for this node now".into(),
                ))),
            },
            message = messages.message() => match message {
                Ok(Some(JoinRequest { message: Some(message) })) => {
                    if let Err(error) = control.agent_says(node.clone(), stream, message).await {
                        break Some(status::from_control(error));
                    }
                }
                // A message of a later version: nothing that we know how to do.
                Ok(Some(JoinRequest { message: None })) => {}
                Ok(None) | Err(_) => break None,
            },
            () = answers.closed() => break None,
            () = stop.cancelled() => break Some(status::stopping()),
        }
    };
    if let Some(status) = end {
        // An agent that does not read now sees the stream end.
        let _ = answers.try_send(Err(status));
    }
    control.agent_left(node, stream).await;
}

/// Hello with every field in its bounds.
fn checked(hello: Hello) -> Result<membership::Hello, Status> {
    let node = hello
        .node_id
        .parse()
        .map_err(|error: arcface_proto::types::InvalidId| {
            status::invalid("hello.node_id", error.to_string())
        })?;
    for (path, text) in [
        ("hello.boot_id", &hello.boot_id),
        ("hello.address", &hello.address),
        ("hello.device", &hello.device),
        ("hello.version", &hello.version),
    ] {
        let plain = (1..=MAX_TEXT_CHARS).contains(&text.chars().count())
            && text.chars().all(|c| c.is_ascii_graphic());
        if !plain {
            return Err(status::invalid(
                path,
                format!("is not 1 to {MAX_TEXT_CHARS} printable characters"),
            ));
        }
    }
    if !(1..=MAX_SLOTS).contains(&hello.slots) {
        return Err(status::invalid(
            "hello.slots",
            format!("{} is not in 1..={MAX_SLOTS}", hello.slots),
        ));
    }
    let mut copies_of = Vec::new();
    for id in hello.copies_of.iter().take(MAX_COPIES) {
        let id = id.parse().map_err(|error: arcface_proto::types::InvalidId| {
            status::invalid("hello.copies_of", error.to_string())
        })?;
        copies_of.push(id);
    }
    Ok(membership::Hello {
        node,
        copies_of,
        ranks: rank_list(&hello.ranks),
        boot_id: hello.boot_id,
        address: hello.address,
        slots: hello.slots,
        device: hello.device,
        version: hello.version,
    })
}

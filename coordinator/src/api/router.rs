//! Sends each request to its gRPC service by the first part of the path, and counts it. A closed set of services
//! needs no web framework, and the labels of the request metrics stay a closed set too.

use crate::telemetry::{GRPC_REQUEST_DURATION_SECONDS, GRPC_REQUESTS_TOTAL};
use std::{
    collections::BTreeMap,
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};
use tonic::{
    Code, Status,
    body::Body,
    codegen::{Service, http},
    server::NamedService,
};

type Request = http::Request<Body>;
type Response = http::Response<Body>;
type Answer = Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send>>;

/// A gRPC service without its type.
trait Mounted: Send + Sync {
    fn answer(&self, request: Request) -> Answer;
}

impl<S> Mounted for S
where
    S: Service<Request, Response = Response, Error = Infallible> + Clone + Send + Sync + 'static,
    S::Future: Send,
{
    fn answer(&self, request: Request) -> Answer {
        // Generated gRPC servers are always ready, so there is no poll_ready to wait for.
        Box::pin(Service::call(&mut self.clone(), request))
    }
}

/// The services of one server.
#[derive(Clone, Default)]
pub struct Router {
    services: Arc<BTreeMap<&'static str, Box<dyn Mounted>>>,
}

impl Router {
    /// A router with one service more.
    ///
    /// # Panics
    /// If the router was cloned before: it is put together before it serves.
    pub fn with<S>(mut self, service: S) -> Self
    where
        S: Service<Request, Response = Response, Error = Infallible>
            + NamedService
            + Clone
            + Send
            + Sync
            + 'static,
        S::Future: Send,
    {
        Arc::get_mut(&mut self.services)
            .expect("a router is put together before it is shared")
            .insert(S::NAME, Box::new(service));
        self
    }
}

impl Service<Request> for Router {
    type Response = Response;
    type Error = Infallible;
    type Future = Answer;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request) -> Answer {
        let mut parts = request.uri().path().trim_start_matches('/').splitn(2, '/');
        let (service, method) = (parts.next().unwrap_or(""), parts.next().unwrap_or("").to_owned());
        let Some((name, mounted)) = self.services.get_key_value(service) else {
            let status = Status::unimplemented(format!("there is no service {service:?} here"));
            return Box::pin(async move { Ok(status.into_http()) });
        };
        let (name, started, answer) = (*name, Instant::now(), mounted.answer(request));
        Box::pin(async move {
            let response = answer.await?;
            count(name, &method, &response, started);
            Ok(response)
        })
    }
}

/// A stream is counted when it opens: its end has no fixed relation to the work.
fn count(service: &'static str, method: &str, response: &Response, started: Instant) {
    let code = Status::from_header_map(response.headers()).map_or(Code::Ok, |status| status.code());
    // A method that does not exist is a text that a stranger chose: no label may come from it.
    let method = match code {
        Code::Unimplemented => "unknown".to_owned(),
        _ => method.to_owned(),
    };
    metrics::counter!(GRPC_REQUESTS_TOTAL,
        "service" => service, "method" => method.clone(), "code" => format!("{code:?}"))
    .increment(1);
    metrics::histogram!(GRPC_REQUEST_DURATION_SECONDS, "service" => service, "method" => method)
        .record(started.elapsed());
}

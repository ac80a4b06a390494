//! What answers a request: health and reflection always; everything else only on the coordinator that leads. The
//! others say who does.

use super::{Router, status};
use crate::control::Handle;
use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};
use tokio::sync::watch;
use tonic::{
    body::Body,
    codegen::{Service, http},
};

/// Package of the services that only a leader answers.
const OURS: &str = "/arcface.v1.";

/// What this coordinator is at the moment.
#[derive(Clone)]
pub enum Role {
    /// It answers.
    Leads {
        /// With these services.
        services: Router,
        /// Who knows the state of the cluster.
        control: Handle,
    },
    /// Another one may lead; its address, if it is known.
    StandsBy(Option<String>),
}

/// All requests of one server.
#[derive(Clone)]
pub struct Front {
    always: Router,
    role: watch::Receiver<Role>,
}

impl Front {
    /// `always` answers whatever the role is.
    pub fn new(always: Router, role: watch::Receiver<Role>) -> Self {
        Self { always, role }
    }
}

impl Service<http::Request<Body>> for Front {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        if !request.uri().path().starts_with(OURS) {
            return self.always.call(request);
        }
        let role = self.role.borrow().clone();
        match role {
            Role::Leads { mut services, .. } => services.call(request),
            Role::StandsBy(leader) => {
                let status = status::not_leading(leader.as_deref());
                Box::pin(async move { Ok(status.into_http()) })
            }
        }
    }
}

//! What there is at which path, and what an error is in HTTP. GET and HEAD alone: nothing here changes anything.

use super::{
    answer::{JSON, TEXT, Tagged, answer},
    assets,
    cache::Cache,
    data::{self, Query},
};
use crate::{
    api::Role,
    control::{ControlError, Handle},
    exporter,
};
use axum::{
    Router,
    extract::{Path, State},
    http::{HeaderMap, StatusCode, Uri},
    response::Response,
    routing::get,
};
use metrics_exporter_prometheus::PrometheusHandle;
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::sync::watch;

/// The format that Prometheus scrapes.
const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Who can answer.
#[derive(Clone)]
struct Site {
    recorder: &'static PrometheusHandle,
    role: watch::Receiver<Role>,
    cache: Arc<Cache>,
}

/// Everything that is served.
pub fn site(recorder: &'static PrometheusHandle, role: watch::Receiver<Role>) -> Router {
    let mut router = Router::new()
        .route("/metrics", get(metrics))
        .route("/api/v1/cluster", get(cluster))
        .route("/api/v1/jobs", get(jobs))
        .route("/api/v1/jobs/{id}", get(job))
        .route("/api/v1/jobs/{id}/curve", get(curve))
        .route("/api/v1/jobs/{id}/evaluations", get(evaluations))
        .route("/api/v1/jobs/{id}/checkpoints", get(checkpoints))
        .route("/api/v1/nodes", get(nodes));
    for (path, file) in assets::all() {
        router = router.route(
            path,
            get(move |headers: HeaderMap| async move { file.answer(&headers) }),
        );
    }
    router
        .fallback(missing)
        .method_not_allowed_fallback(read_only)
        .with_state(Site {
            recorder,
            role,
            cache: Arc::new(Cache::new()),
        })
}

async fn metrics(State(site): State<Site>) -> Response {
    answer(StatusCode::OK, METRICS, exporter::render(site.recorder))
}

async fn missing() -> Response {
    let text = "there is no such page: the status page is at /, the metrics are at /metrics\n";
    answer(StatusCode::NOT_FOUND, TEXT, text)
}

async fn read_only() -> Response {
    answer(
        StatusCode::METHOD_NOT_ALLOWED,
        TEXT,
        "only GET and HEAD are answered\n",
    )
}

async fn cluster(State(site): State<Site>, uri: Uri, headers: HeaderMap) -> Response {
    if let Err(leader) = site.control() {
        return tagged(StatusCode::OK, &data::standby(leader.as_deref())).answer(&headers);
    }
    site.ask(&uri, &headers, data::cluster).await
}

async fn jobs(State(site): State<Site>, uri: Uri, headers: HeaderMap) -> Response {
    let query = Query::parse(uri.query());
    site.ask(&uri, &headers, |control| async move {
        data::jobs(control, query?).await
    })
    .await
}

async fn nodes(State(site): State<Site>, uri: Uri, headers: HeaderMap) -> Response {
    let query = Query::parse(uri.query());
    site.ask(&uri, &headers, |control| async move {
        data::nodes(control, query?).await
    })
    .await
}

async fn job(State(site): State<Site>, Path(id): Path<String>, uri: Uri, headers: HeaderMap) -> Response {
    site.ask(&uri, &headers, |control| data::job(control, id)).await
}

async fn curve(State(site): State<Site>, Path(id): Path<String>, uri: Uri, headers: HeaderMap) -> Response {
    site.ask(&uri, &headers, |control| data::curve(control, id)).await
}

async fn evaluations(
    State(site): State<Site>,
    Path(id): Path<String>,
    uri: Uri,
    headers: HeaderMap,
) -> Response {
    site.ask(&uri, &headers, |control| data::evaluations(control, id))
        .await
}

async fn checkpoints(
    State(site): State<Site>,
    Path(id): Path<String>,
    uri: Uri,
    headers: HeaderMap,
) -> Response {
    site.ask(&uri, &headers, |control| data::checkpoints(control, id))
        .await
}

impl Site {
    /// The control task, or who leads if this coordinator does not.
    fn control(&self) -> Result<Handle, Option<String>> {
        match &*self.role.borrow() {
            Role::Leads { control, .. } => Ok(control.clone()),
            Role::StandsBy(leader) => Err(leader.clone()),
        }
    }

    /// The answer to a question to the control task, shared by all who ask the same at about the same time.
    async fn ask<A>(&self, uri: &Uri, headers: &HeaderMap, question: impl FnOnce(Handle) -> A) -> Response
    where
        A: Future<Output = Result<Value, ControlError>>,
    {
        let control = match self.control() {
            Ok(control) => control,
            Err(leader) => {
                let mut value = data::standby(leader.as_deref());
                value["error"] = "this coordinator stands by".into();
                return tagged(StatusCode::SERVICE_UNAVAILABLE, &value).answer(headers);
            }
        };
        let made = async {
            match question(control).await {
                Ok(value) => tagged(StatusCode::OK, &value),
                Err(error) => tagged(status_of(&error), &json!({"error": error.to_string()})),
            }
        };
        self.cache.get(&uri.to_string(), made).await.answer(headers)
    }
}

fn tagged(status: StatusCode, value: &Value) -> Tagged {
    Tagged::new(status, JSON, value.to_string())
}

fn status_of(error: &ControlError) -> StatusCode {
    match error {
        ControlError::NotFound { .. } => StatusCode::NOT_FOUND,
        ControlError::Invalid { .. } => StatusCode::BAD_REQUEST,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    }
}

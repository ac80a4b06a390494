//! The HTTP side of a coordinator: `/metrics` for Prometheus, the status page for people and the JSON that it shows. Read-only, and
//! open to whoever reaches the address. Knows connections; what is asked for is `routes`' business.
//!
//! axum routes and hyper speaks HTTP; between them stands only what axum's own `serve` lacks: a bound on connections and on
//! the time that each may take.

mod answer;
mod assets;
mod cache;
mod data;
mod routes;

use crate::{api::Role, exporter};
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use metrics_exporter_prometheus::PrometheusHandle;
use std::{pin::pin, sync::Arc, time::Duration};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    time::{interval, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

/// Connections at the same time; a browser that shows the page has one.
const MAX_CONNECTIONS: usize = 256;
/// Longest wait for the head of a request, and so for the next request of a connection.
const HEAD_LIMIT: Duration = Duration::from_secs(10);
/// Longest head; cookies of other services on this host come along.
const MAX_HEAD_BYTES: usize = 32 << 10;
/// A connection ends after its next answer when it is so old: one that reads too slowly holds its place no longer.
const OLD: Duration = Duration::from_secs(60);
/// Longest that an answer may take that was begun on an old connection.
const LAST_ANSWER: Duration = Duration::from_secs(10);
/// Wait after a failed accept (no file descriptors left): trying at once would only spin.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Serves until `stop` is cancelled. `role` says what the coordinator is at the moment.
pub async fn serve(
    listener: TcpListener,
    recorder: &'static PrometheusHandle,
    role: watch::Receiver<Role>,
    stop: CancellationToken,
) {
    let site = routes::site(recorder, role);
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut upkeep = interval(exporter::UPKEEP);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = upkeep.tick() => recorder.run_upkeep(),
            accepted = listener.accept() => match accepted {
                Ok((socket, _)) => {
                    // One over the limit is closed at once; Prometheus and browsers come again.
                    let Ok(permit) = connections.clone().try_acquire_owned() else { continue };
                    let (site, stop) = (site.clone(), stop.clone());
                    tokio::spawn(async move {
                        if let Err(error) = converse(socket, site, stop).await {
                            tracing::debug!(%error, "HTTP connection");
                        }
                        drop(permit);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "accept an HTTP connection");
                    sleep(ACCEPT_AGAIN).await;
                }
            },
        }
    }
}

/// Answers the requests of one connection, until it ends or is old.
async fn converse(socket: TcpStream, site: Router, stop: CancellationToken) -> Result<(), hyper::Error> {
    if let Err(error) = socket.set_nodelay(true) {
        tracing::debug!(%error, "set nodelay");
    }
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_LIMIT)
            .max_buf_size(MAX_HEAD_BYTES)
            .serve_connection(TokioIo::new(socket), TowerToHyperService::new(site))
    );
    tokio::select! {
        ended = connection.as_mut() => return ended,
        () = sleep(OLD) => {}
        () = stop.cancelled() => {}
    }
    connection.as_mut().graceful_shutdown();
    timeout(LAST_ANSWER, connection).await.unwrap_or(Ok(()))
}

//! A world of ranks inside one process, for tests and benchmarks: the ring over loopback.

use super::{
    CollectiveError,
    connect::{Listener, Session, Timeouts},
    tcp::TcpCollective,
};
use std::{io, thread, time::Duration};

/// Why a local world did not come up.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// A port could not be bound.
    #[error("bind a port of the loopback: {0}")]
    Bind(#[from] io::Error),
    /// The ranks could not connect.
    #[error(transparent)]
    Connect(#[from] CollectiveError),
}

/// Connects `world_size` ranks over loopback, in rank order; each then belongs to a thread of its own. `operation`
/// is the deadline of their operations.
///
/// # Errors
/// What the system says.
pub fn world(world_size: u32, operation: Duration) -> Result<Vec<TcpCollective>, LocalError> {
    let timeouts = Timeouts {
        connect: Duration::from_secs(20),
        operation,
    };
    let session = Session {
        job: "local".to_owned(),
        generation: 1,
    };
    let mut listeners = Vec::new();
    let mut endpoints = Vec::new();
    for _ in 0..world_size {
        let (listener, port) = Listener::bind("127.0.0.1")?;
        listeners.push(listener);
        endpoints.push(format!("127.0.0.1:{port}"));
    }
    let (endpoints, session) = (&endpoints, &session);
    let ranks: Result<Vec<_>, _> = thread::scope(|scope| {
        let connect = |(rank, listener): (u32, Listener)| {
            scope.spawn(move || listener.connect(session, rank, endpoints, timeouts))
        };
        let threads: Vec<_> = (0..).zip(listeners).map(connect).collect();
        let join =
            |thread: thread::ScopedJoinHandle<'_, _>| thread.join().expect("connecting does not panic");
        threads.into_iter().map(join).collect()
    });
    Ok(ranks?)
}

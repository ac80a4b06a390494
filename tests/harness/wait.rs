//! Waiting for a state: polled, with a deadline, and an error that says what was seen last.

use anyhow::{Context, Result, bail};
use std::{
    thread,
    time::{Duration, Instant},
};

/// Between two looks; short against every deadline in the tests.
const POLL: Duration = Duration::from_millis(50);

/// What a look found.
pub enum Seen<T> {
    /// What was waited for.
    Yes(T),
    /// Not yet; what there is instead, for the message at the deadline.
    NotYet(String),
}

/// Looks until `look` says yes.
///
/// # Errors
/// At the deadline, naming `what` and what was seen last; at once if `look` fails.
pub fn until<T>(what: &str, deadline: Duration, mut look: impl FnMut() -> Result<Seen<T>>) -> Result<T> {
    let start = Instant::now();
    loop {
        let seen = match look().with_context(|| format!("while waiting for {what}"))? {
            Seen::Yes(value) => return Ok(value),
            Seen::NotYet(seen) => seen,
        };
        if start.elapsed() > deadline {
            bail!("waited {deadline:?} for {what}, still: {seen}");
        }
        thread::sleep(POLL);
    }
}

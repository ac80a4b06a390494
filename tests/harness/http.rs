//! One question over HTTP, for pages of this machine: no more of the protocol than that.

use anyhow::{Context, Result, ensure};
use std::{
    fmt::Write as _,
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

/// For an answer on a machine that compiles beside it.
const ANSWER: Duration = Duration::from_secs(20);

/// The body of a page, with whatever status it comes if that is `200` or `400` (where Prometheus explains a refusal).
///
/// # Errors
/// If there is no such answer.
pub fn get(address: &str, path: &str) -> Result<String> {
    let mut socket = TcpStream::connect(address).with_context(|| format!("connect to {address}"))?;
    socket.set_read_timeout(Some(ANSWER))?;
    // Of version 1.0, so that the answer comes in one piece and ends with the connection.
    socket.write_all(format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n").as_bytes())?;
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer)?;
    let answer = String::from_utf8(answer)?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .with_context(|| format!("{address}{path} answered {answer:?}"))?;
    let status = head.split_whitespace().nth(1).unwrap_or_default();
    ensure!(
        matches!(status, "200" | "400"),
        "{address}{path} answered {head}: {body}"
    );
    Ok(body.to_owned())
}

/// Text as it may stand in a query.
pub(crate) fn quoted(text: &str) -> String {
    text.bytes().fold(String::new(), |mut quoted, byte| {
        match byte.is_ascii_alphanumeric() {
            true => quoted.push(char::from(byte)),
            // Writing into a string cannot fail.
            false => _ = write!(quoted, "%{byte:02X}"),
        }
        quoted
    })
}

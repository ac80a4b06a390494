//! One question over HTTP, for pages of this machine: no more of the protocol than that.

use anyhow::{Context, Result, ensure};
use std::{
    fmt::Write as _,
    io::{BufRead, BufReader, Read, Write},
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

/// The status and the body of an answer to any request. The answer says how long it is, or ends with the connection.
///
/// # Errors
/// If there is no answer.
pub fn request(address: &str, method: &str, path: &str, body: &str) -> Result<(u16, String)> {
    let mut socket = TcpStream::connect(address).with_context(|| format!("connect to {address}"))?;
    socket.set_read_timeout(Some(ANSWER))?;
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n",
        body.len()
    );
    socket.write_all(head.as_bytes())?;
    socket.write_all(body.as_bytes())?;
    let mut reader = BufReader::new(socket);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let status = line
        .split_whitespace()
        .nth(1)
        .and_then(|status| status.parse().ok());
    let status = status.with_context(|| format!("{method} {address}{path} answered {line:?}"))?;
    let mut length = None;
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        match line.trim_end().split_once(':') {
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                length = Some(value.trim().parse().context("a length")?);
            }
            Some(_) => {}
            None => break,
        }
    }
    let mut answer = Vec::new();
    reader.take(length.unwrap_or(u64::MAX)).read_to_end(&mut answer)?;
    Ok((status, String::from_utf8(answer)?))
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

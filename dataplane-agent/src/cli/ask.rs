//! Questions to a running agent over its socket.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use anyhow::Context;
use serde::de::DeserializeOwned;

/// How long an agent may be silent.
pub const WITHIN: Duration = Duration::from_secs(10);

/// What an agent said.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub body: String,
}

impl Answer {
    /// What the agent said, unless it said no.
    pub fn value<T: DeserializeOwned>(&self) -> anyhow::Result<T> {
        let status = self.status;
        anyhow::ensure!(status == 200, "the agent answered with status {status}");
        serde_json::from_str(&self.body).context("failed to read the agent's answer")
    }
}

/// What the agent at `socket` says of a path.
pub fn value<T: DeserializeOwned>(socket: &Path, path: &str) -> anyhow::Result<T> {
    reach(socket, path)?.value()
}

/// What the agent at `socket` says of a path, be it that there is nothing there.
pub fn reach(socket: &Path, path: &str) -> anyhow::Result<Answer> {
    reach_within(socket, path, WITHIN)
}

/// The same, where the agent may be silent no longer than `within`.
pub fn reach_within(socket: &Path, path: &str, within: Duration) -> anyhow::Result<Answer> {
    ask(socket, path, within).with_context(|| format!("failed to reach an agent at {}", socket.display()))
}

/// Asks for a path. `within`: how long the agent may be silent.
pub fn ask(socket: &Path, path: &str, within: Duration) -> anyhow::Result<Answer> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(within))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    anyhow::ensure!(!answer.is_empty(), "the agent hung up");
    parse(&answer).with_context(|| {
        let first = answer.lines().next().unwrap_or_default();
        format!("the agent answered `{first}`")
    })
}

fn parse(answer: &str) -> Option<Answer> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    Some(Answer {
        status,
        body: body.to_owned(),
    })
}

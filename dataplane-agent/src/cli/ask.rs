//! Questions to a running agent over its socket.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use anyhow::{Context, anyhow};
use serde::de::DeserializeOwned;

use crate::health::{PROGRAM, Refusal};

/// How long an agent may be silent.
pub const WITHIN: Duration = Duration::from_secs(10);

/// This program's version.
const OWN: &str = env!("CARGO_PKG_VERSION");

/// It took the question, and has not answered in time.
#[derive(Debug, thiserror::Error)]
#[error("the agent is silent: no answer within {} s", .0.as_secs_f32())]
pub struct Silent(Duration);

/// What an agent said.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub body: String,
    /// The agent's. The first ones told none.
    version: Option<String>,
}

impl Answer {
    /// What the agent said, unless it said no.
    pub fn value<T: DeserializeOwned>(&self) -> anyhow::Result<T> {
        let status = self.status;
        if let Ok(Refusal { error }) = serde_json::from_str(&self.body)
            && status != 200
        {
            return Err(anyhow!("the agent {error}{}", self.other_version()));
        }
        anyhow::ensure!(
            status == 200,
            "the agent answered with status {status}{}",
            self.other_version()
        );
        serde_json::from_str(&self.body)
            .with_context(|| format!("failed to read the agent's answer{}", self.other_version()))
    }

    /// The agent's. The first ones told none.
    pub fn version(&self) -> Option<&str> {
        self.version.as_deref()
    }

    /// In brackets, that this program is of another version than the agent.
    pub fn other_version(&self) -> String {
        match self.version.as_deref() {
            Some(OWN) => String::new(),
            Some(version) => format!(" (it is of version {version}, this command of {OWN})"),
            None => format!(" (it tells no version, so it is older than this command, {OWN})"),
        }
    }
}

/// What the agent at `socket` says of a path.
pub fn value<T: DeserializeOwned>(socket: &Path, path: &str) -> anyhow::Result<T> {
    value_within(socket, path, WITHIN)
}

/// The same, where the agent may be silent no longer than `within`.
pub fn value_within<T: DeserializeOwned>(socket: &Path, path: &str, within: Duration) -> anyhow::Result<T> {
    reach_within(socket, path, within)?.value()
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
    let mut stream = UnixStream::connect(socket).map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => {
            anyhow!(error).context("who may not write to its socket cannot ask it: run as root")
        }
        _ => error.into(),
    })?;
    stream.set_read_timeout(Some(within))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream
        .read_to_string(&mut answer)
        .map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => anyhow::Error::from(Silent(within)),
            _ => error.into(),
        })?;
    anyhow::ensure!(!answer.is_empty(), "the agent hung up");
    parse(&answer).with_context(|| {
        let first = answer.lines().next().unwrap_or_default();
        format!("the agent answered `{first}`")
    })
}

fn parse(answer: &str) -> Option<Answer> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let mut headers = head.lines().filter_map(|line| line.split_once(": "));
    let served_by = headers.find(|(name, _)| name.eq_ignore_ascii_case("server"));
    let version = served_by.and_then(|(_, program)| program.strip_prefix(PROGRAM));
    Some(Answer {
        status,
        body: body.to_owned(),
        version: version.map(str::to_owned),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::served::Served;

    fn said(head: &str, body: &str) -> String {
        let answer = parse(&format!("HTTP/1.1 {head}\r\n\r\n{body}")).unwrap();
        format!("{:#}", answer.value::<Served>().unwrap_err())
    }

    #[test]
    fn an_answer_of_another_version_that_cannot_be_read_names_both() {
        let versions = format!("(it is of version 99.1.0, this command of {OWN})");
        let other = "Content-Type: application/json\r\nServer: dataplane-agent/99.1.0";
        assert_eq!(
            said(&format!("200 OK\r\n{other}"), "{\"services\": []}"),
            format!(
                "failed to read the agent's answer {versions}: missing field `objects` at line 1 column 16"
            )
        );
        assert_eq!(
            said(&format!("404 Not Found\r\n{other}"), "{}"),
            format!("the agent answered with status 404 {versions}")
        );
        let older = said("200 OK\r\nContent-Type: application/json", "{}");
        assert!(
            older.contains(&format!(
                "it tells no version, so it is older than this command, {OWN}"
            )),
            "{older}"
        );
        let same = said(
            &format!("503 Service Unavailable\r\nserver: dataplane-agent/{OWN}"),
            "{}",
        );
        assert_eq!(same, "the agent answered with status 503");
    }
}

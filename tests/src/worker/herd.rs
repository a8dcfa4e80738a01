//! Herds: many TCP connections of one client that are kept, and asked all at once who is at their other end.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::probe::{connect, identify};
use super::protocol::{Attempt, HerdReport, Proto, Response, any};

/// A kept connection and the name of the responder it began with.
#[derive(Debug)]
struct Member {
    stream: TcpStream,
    backend: String,
}

/// The herds of this worker, by name.
#[derive(Debug, Default)]
pub struct Herds(Mutex<HashMap<String, Vec<Member>>>);

impl Herds {
    /// Opens more connections, one after the other, each with an exchange.
    pub fn open(&self, name: &str, to: SocketAddr, connections: u32, timeout_ms: u64) -> Response {
        let timeout = Duration::from_millis(timeout_ms);
        let mut report = HerdReport::default();
        let mut members = Vec::new();
        for _ in 0..connections {
            match open(to, timeout) {
                Ok(member) => {
                    *report.alive.entry(member.backend.clone()).or_default() += 1;
                    members.push(member);
                }
                Err(how) => report.broken.push((String::new(), how)),
            }
        }
        let mut herds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        herds.entry(name.to_owned()).or_default().extend(members);
        Response::Herd(report)
    }

    /// One exchange on every connection. What breaks is told once, and no longer part of the herd.
    pub fn exchange(&self, name: &str, timeout_ms: u64) -> Response {
        let timeout = Duration::from_millis(timeout_ms);
        let members = {
            let mut herds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            herds.remove(name).unwrap_or_default()
        };
        let sent: Vec<_> = members
            .iter()
            .map(|member| (&member.stream).write_all(b"continue\n"))
            .collect();
        let mut report = HerdReport::default();
        let mut left = Vec::new();
        for (member, sent) in members.into_iter().zip(sent) {
            let outcome = sent.map_err(|error| error.to_string()).and_then(|()| {
                let backend = answer(&member.stream, "continue", timeout)?;
                if backend == member.backend {
                    Ok(())
                } else {
                    Err(format!("{backend} answered"))
                }
            });
            match outcome {
                Ok(()) => {
                    *report.alive.entry(member.backend.clone()).or_default() += 1;
                    left.push(member);
                }
                Err(how) => report.broken.push((member.backend, how)),
            }
        }
        let mut herds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        herds.entry(name.to_owned()).or_default().extend(left);
        Response::Herd(report)
    }
}

fn open(to: SocketAddr, timeout: Duration) -> Result<Member, String> {
    let stream = connect(Proto::Tcp, any(to, 0), to, timeout).map_err(|error| error.to_string())?;
    (&stream)
        .write_all(b"begin\n")
        .map_err(|error| error.to_string())?;
    let backend = answer(&stream, "begin", timeout)?;
    Ok(Member { stream, backend })
}

/// The name of the responder that answers `line`.
fn answer(stream: &TcpStream, line: &str, timeout: Duration) -> Result<String, String> {
    let mut answer = String::new();
    stream
        .set_read_timeout(Some(timeout))
        .and_then(|()| BufReader::new(stream).read_line(&mut answer))
        .map_err(|error| format!("no answer: {error}"))?;
    match identify(answer.as_bytes(), line, Instant::now()) {
        Attempt::Answered { by, .. } => Ok(by.name),
        other => Err(format!("{other:?}")),
    }
}

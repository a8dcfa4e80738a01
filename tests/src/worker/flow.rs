//! Flows that stay: a TCP connection that is kept open, or one UDP socket with a datagram a second.

use std::collections::HashMap;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::socket::{setsockopt, sockopt};

use super::probe::{any, connect, exchange, failure, identify};
use super::protocol::{Attempt, Datagram, Proto, Response};

const PERIOD: Duration = Duration::from_secs(1);

type History = Arc<Mutex<Vec<Option<Attempt>>>>;

#[derive(Debug)]
enum Flow {
    Stream(Arc<TcpStream>),
    Datagrams(History),
}

/// The flows of this worker, by name.
#[derive(Debug, Default)]
pub struct Flows(Mutex<HashMap<String, Flow>>);

impl Flows {
    /// Opens a flow. TCP: connects and exchanges once. UDP: begins to send.
    pub fn start(
        &self,
        name: String,
        proto: Proto,
        source_port: Option<u16>,
        to: SocketAddr,
        timeout_ms: u64,
    ) -> Result<Response> {
        if proto == Proto::Udp {
            let history = datagrams(source_port, to)?;
            self.insert(name, Flow::Datagrams(history));
            return Ok(Response::Done);
        }
        let start = Instant::now();
        let timeout = Duration::from_millis(timeout_ms);
        let attempt = match connect(proto, source_port, to, timeout) {
            Ok(stream) => {
                let attempt = exchange(&stream, "start", timeout, start);
                self.insert(name, Flow::Stream(Arc::new(stream)));
                attempt
            }
            Err(error) => failure(&error, start, true),
        };
        Ok(Response::Attempts(vec![attempt]))
    }

    /// One exchange on a kept connection.
    pub fn exchange(&self, name: &str, timeout_ms: u64) -> Result<Response> {
        let stream = match self.0.lock().unwrap_or_else(PoisonError::into_inner).get(name) {
            Some(Flow::Stream(stream)) => Arc::clone(stream),
            _ => bail!("there is no connection {name}"),
        };
        let attempt = exchange(
            &stream,
            "continue",
            Duration::from_millis(timeout_ms),
            Instant::now(),
        );
        Ok(Response::Attempts(vec![attempt]))
    }

    /// The datagrams from number `from` on, answered or not yet.
    pub fn history(&self, name: &str, from: u64) -> Result<Response> {
        let flows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Flow::Datagrams(history)) = flows.get(name) else {
            bail!("there is no datagram flow {name}")
        };
        let history = history.lock().unwrap_or_else(PoisonError::into_inner);
        let datagrams = history.iter().enumerate().skip(usize::try_from(from)?);
        Ok(Response::History {
            next: history.len() as u64,
            datagrams: datagrams
                .map(|(number, attempt)| Datagram {
                    number: number as u64,
                    attempt: attempt.clone(),
                })
                .collect(),
        })
    }

    fn insert(&self, name: String, flow: Flow) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(name, flow);
    }
}

/// One unconnected socket: a thread sends a numbered datagram each second, another notes the answers and errors.
fn datagrams(source_port: Option<u16>, to: SocketAddr) -> Result<History> {
    let local = any(to, source_port.unwrap_or(0));
    let socket = UdpSocket::bind(local).with_context(|| format!("failed to bind {local}"))?;
    // Without it an unconnected socket never hears of an ICMP error.
    if to.is_ipv4() {
        setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?;
    } else {
        setsockopt(&socket, sockopt::Ipv6RecvErr, &true)?;
    }
    let history = History::default();
    let (receiver, answers) = (socket.try_clone()?, Arc::clone(&history));
    thread::spawn(move || receive(&receiver, &answers));
    let sent = Arc::clone(&history);
    thread::spawn(move || {
        loop {
            let start = Instant::now();
            let line = {
                let mut sent = sent.lock().unwrap_or_else(PoisonError::into_inner);
                sent.push(None);
                format!("{}", sent.len() - 1)
            };
            // A pending ICMP error of an earlier datagram is returned by the send that comes after it.
            let result = socket.send_to(line.as_bytes(), to).or_else(|error| {
                note_error(&sent, &failure(&error, start, true));
                socket.send_to(line.as_bytes(), to)
            });
            if let Err(error) = result {
                note_error(&sent, &failure(&error, start, true));
            }
            thread::sleep(PERIOD.saturating_sub(start.elapsed()));
        }
    });
    Ok(history)
}

fn receive(socket: &UdpSocket, history: &History) {
    let mut data = [0; 4096];
    loop {
        let start = Instant::now();
        match socket.recv(&mut data) {
            Ok(length) => {
                let text = String::from_utf8_lossy(&data[..length]);
                let Some(number) = echoed_number(&text) else {
                    continue;
                };
                let attempt = identify(text.as_bytes(), &number.to_string(), Instant::now());
                if let Some(slot) = history
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .get_mut(number)
                {
                    *slot = Some(attempt);
                }
            }
            Err(error) => note_error(history, &failure(&error, start, true)),
        }
    }
}

fn echoed_number(text: &str) -> Option<usize> {
    let reply: serde_json::Value = serde_json::from_str(text).ok()?;
    reply.get("echo")?.as_str()?.parse().ok()
}

/// An error names no datagram: it is noted at the last one that has no answer.
fn note_error(history: &History, attempt: &Attempt) {
    let mut history = history.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(slot) = history.iter_mut().rev().find(|slot| slot.is_none()) {
        *slot = Some(attempt.clone());
    }
}

//! Streams: numbered datagrams at a steady rate from one connected socket, and which of them were answered, by whom.
//!
//! A process that is told that its peer is gone (an ICMP error, or its socket ended) opens a new socket, as DNS and
//! syslog clients do, and sends once more what had no answer yet.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::socket::{setsockopt, sockopt};

use super::protocol::{Reply, Response, any};
use super::responder::RECEIVE_BUFFER;

/// What is sent again by a new socket: so many of the last datagrams, if nobody has answered them.
const RESENT: usize = 2000;
/// Between looks at the clock and the socket.
const STEP: Duration = Duration::from_micros(500);

#[derive(Debug, Default)]
struct Seen {
    /// By number: an index into `names` of who answered first.
    answered: Vec<Option<u16>>,
    names: Vec<String>,
    /// Sockets opened after the first, with the error that was the reason.
    reopened: Vec<String>,
    stop: bool,
}

/// The streams of this worker, by name.
#[derive(Debug, Default)]
pub struct Streams(Mutex<HashMap<String, Arc<Mutex<Seen>>>>);

impl Streams {
    /// Begins to send to `to`.
    pub fn start(&self, name: String, to: SocketAddr, per_second: u32) -> Result<Response> {
        let socket = open(to)?;
        let seen = Arc::new(Mutex::new(Seen::default()));
        let theirs = Arc::clone(&seen);
        thread::spawn(move || send(socket, to, per_second, &theirs));
        lock(&self.0).insert(name, seen);
        Ok(Response::Done)
    }

    /// What became of the datagrams so far. With `stop`, nothing more is sent, and what is late is waited for.
    pub fn report(&self, name: &str, stop: bool) -> Result<Response> {
        let seen = lock(&self.0)
            .get(name)
            .cloned()
            .with_context(|| format!("there is no stream {name}"))?;
        if stop {
            lock(&seen).stop = true;
            thread::sleep(Duration::from_millis(500));
        }
        let seen = lock(&seen);
        Ok(Response::Stream {
            answered: seen
                .answered
                .iter()
                .map(|by| by.map(|name| seen.names[usize::from(name)].clone()))
                .collect(),
            reopened: seen.reopened.clone(),
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn open(to: SocketAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind(any(to, 0))?;
    setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER)?;
    socket.connect(to)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn send(mut socket: UdpSocket, to: SocketAddr, per_second: u32, seen: &Mutex<Seen>) {
    let start = Instant::now();
    let mut stopped: Option<Instant> = None;
    loop {
        if lock(seen).stop && stopped.is_none() {
            stopped = Some(Instant::now());
        }
        if stopped.is_some_and(|at| at.elapsed() > Duration::from_millis(400)) {
            return;
        }
        let due = (start.elapsed().as_micros() * u128::from(per_second) / 1_000_000) as usize;
        let mut error = None;
        while stopped.is_none() && lock(seen).answered.len() < due {
            let number = {
                let mut seen = lock(seen);
                seen.answered.push(None);
                seen.answered.len() - 1
            };
            if let Err(first) = send_one(&socket, number) {
                error = Some(first);
                break;
            }
        }
        error = receive(&socket, seen).or(error);
        if let Some(error) = error {
            lock(seen).reopened.push(error.to_string());
            // Until somebody is there again.
            while let Err(error) = open(to).map(|new| socket = new) {
                thread::sleep(Duration::from_millis(1));
                let mut seen = lock(seen);
                if seen.stop {
                    return;
                }
                seen.reopened.push(format!("{error:#}"));
            }
            let again: Vec<usize> = {
                let answered = &lock(seen).answered;
                let first = answered.len().saturating_sub(RESENT);
                (first..answered.len())
                    .filter(|number| answered[*number].is_none())
                    .collect()
            };
            for number in again {
                // The next look at the socket finds what is wrong with it.
                let _ = send_one(&socket, number);
            }
        }
        thread::sleep(STEP);
    }
}

fn send_one(socket: &UdpSocket, number: usize) -> std::io::Result<()> {
    match socket.send(number.to_string().as_bytes()) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
        other => other.map(drop),
    }
}

/// Notes every answer that is there; the error if there is one.
fn receive(socket: &UdpSocket, seen: &Mutex<Seen>) -> Option<std::io::Error> {
    let mut data = [0; 4096];
    loop {
        let length = match socket.recv(&mut data) {
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
            Err(error) => return Some(error),
        };
        let Ok(reply) = serde_json::from_slice::<Reply>(&data[..length]) else {
            continue;
        };
        let Ok(number) = reply.echo.parse::<usize>() else {
            continue;
        };
        let mut seen = lock(seen);
        let known = seen.names.iter().position(|name| *name == reply.identity.name);
        let by = known.unwrap_or_else(|| {
            seen.names.push(reply.identity.name);
            seen.names.len() - 1
        });
        if let Some(slot) = seen.answered.get_mut(number) {
            slot.get_or_insert(by as u16);
        }
    }
}

//! Flows that stay: a TCP connection that is kept open, or a stream of datagrams, one a second.
//!
//! Streams of datagrams from one source port share a socket, as two destinations may be asked from one port.

use std::collections::HashMap;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::socket::{setsockopt, sockopt};

use super::probe::{connect, exchange, failure, identify};
use super::protocol::{Attempt, Datagram, Proto, Response, plain};

const PERIOD: Duration = Duration::from_secs(1);

/// Where a flow begins and where it goes.
#[derive(Debug, Clone, Copy)]
pub struct Route {
    pub proto: Proto,
    pub from: SocketAddr,
    pub to: SocketAddr,
}

#[derive(Debug)]
enum Flow {
    Stream(Arc<TcpStream>),
    /// The connection could not be opened: so it went.
    Failed(Attempt),
    Datagrams(Arc<Stream>),
}

/// Datagrams to one destination and what became of each.
#[derive(Debug)]
struct Stream {
    number: usize,
    to: SocketAddr,
    history: Mutex<Vec<Option<Attempt>>>,
    ended: AtomicBool,
}

/// A socket and the streams that use it. It is closed with the last of them.
#[derive(Debug)]
struct Shared {
    socket: UdpSocket,
    streams: Mutex<Vec<Weak<Stream>>>,
}

/// The flows of this worker, by name.
#[derive(Debug, Default)]
pub struct Flows {
    by_name: Mutex<HashMap<String, Flow>>,
    sockets: Mutex<HashMap<SocketAddr, Weak<Shared>>>,
}

impl Flows {
    /// Opens a flow; one of the same name ends. TCP: connects and exchanges once. UDP: begins to send.
    pub fn start(&self, name: String, route: Route, timeout_ms: u64) -> Result<Response> {
        self.end(&name);
        if route.proto == Proto::Udp {
            let stream = self.datagrams(route)?;
            self.insert(name, Flow::Datagrams(stream));
            return Ok(Response::Done);
        }
        let start = Instant::now();
        let timeout = Duration::from_millis(timeout_ms);
        let (attempt, flow) = match connect(route.proto, route.from, route.to, timeout) {
            Ok(stream) => {
                let attempt = exchange(&stream, "start", timeout, start);
                (attempt, Flow::Stream(Arc::new(stream)))
            }
            Err(error) => {
                let attempt = failure(&error, start, true);
                (attempt.clone(), Flow::Failed(attempt))
            }
        };
        self.insert(name, flow);
        Ok(Response::Attempts(vec![attempt]))
    }

    /// One exchange on a kept connection.
    pub fn exchange(&self, name: &str, timeout_ms: u64) -> Result<Response> {
        let stream = match lock(&self.by_name).get(name) {
            Some(Flow::Stream(stream)) => Arc::clone(stream),
            Some(Flow::Failed(attempt)) => return Ok(Response::Attempts(vec![attempt.clone()])),
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
        let flows = lock(&self.by_name);
        let Some(Flow::Datagrams(stream)) = flows.get(name) else {
            bail!("there is no datagram flow {name}")
        };
        let history = lock(&stream.history);
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
        lock(&self.by_name).insert(name, flow);
    }

    fn end(&self, name: &str) {
        if let Some(Flow::Datagrams(stream)) = lock(&self.by_name).remove(name) {
            stream.ended.store(true, Ordering::Relaxed);
        }
    }

    /// Begins a stream: a thread sends a numbered datagram each second.
    fn datagrams(&self, Route { from, to, .. }: Route) -> Result<Arc<Stream>> {
        let shared = self.socket(from)?;
        let stream = {
            let mut streams = lock(&shared.streams);
            let stream = Arc::new(Stream {
                number: streams.len(),
                to,
                history: Mutex::default(),
                ended: AtomicBool::new(false),
            });
            streams.push(Arc::downgrade(&stream));
            stream
        };
        let sender = Arc::clone(&stream);
        thread::spawn(move || {
            while !sender.ended.load(Ordering::Relaxed) {
                let start = Instant::now();
                sender.send(&shared.socket);
                thread::sleep(PERIOD.saturating_sub(start.elapsed()));
            }
        });
        Ok(stream)
    }

    /// The socket that is bound to `from`; unspecified ports are never shared.
    fn socket(&self, from: SocketAddr) -> Result<Arc<Shared>> {
        let mut sockets = lock(&self.sockets);
        if let Some(shared) = sockets.get(&from).and_then(Weak::upgrade) {
            return Ok(shared);
        }
        let socket = UdpSocket::bind(from).with_context(|| format!("failed to bind {from}"))?;
        // Without it an unconnected socket never hears of an ICMP error.
        if from.is_ipv4() {
            setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?;
        } else {
            setsockopt(&socket, sockopt::Ipv6RecvErr, &true)?;
        }
        socket.set_read_timeout(Some(PERIOD))?;
        let shared = Arc::new(Shared {
            socket,
            streams: Mutex::default(),
        });
        let receiver = Arc::downgrade(&shared);
        thread::spawn(move || {
            while let Some(shared) = receiver.upgrade() {
                shared.receive();
            }
        });
        if from.port() != 0 {
            sockets.insert(from, Arc::downgrade(&shared));
        }
        Ok(shared)
    }
}

impl Stream {
    fn send(&self, socket: &UdpSocket) {
        let start = Instant::now();
        let line = {
            let mut history = lock(&self.history);
            history.push(None);
            format!("{} {}", self.number, history.len() - 1)
        };
        // A pending ICMP error of an earlier datagram is returned by the send that comes after it.
        let result = socket.send_to(line.as_bytes(), self.to).or_else(|error| {
            self.note_error(&failure(&error, start, true));
            socket.send_to(line.as_bytes(), self.to)
        });
        if let Err(error) = result {
            self.note_error(&failure(&error, start, true));
        }
    }

    fn note(&self, number: usize, attempt: Attempt) {
        if let Some(slot) = lock(&self.history).get_mut(number) {
            *slot = Some(attempt);
        }
    }

    /// An error names no datagram: it is noted at the last one that has no answer.
    fn note_error(&self, attempt: &Attempt) {
        let mut history = lock(&self.history);
        if let Some(slot) = history.iter_mut().rev().find(|slot| slot.is_none()) {
            *slot = Some(attempt.clone());
        }
    }
}

impl Shared {
    /// Waits for one answer or error, at most for a period.
    fn receive(&self) {
        let mut data = [0; 4096];
        let start = Instant::now();
        match self.socket.recv_from(&mut data) {
            Ok((length, from)) => self.answer(&data[..length], from),
            Err(error) => match failure(&error, start, true) {
                Attempt::Silent => {}
                // An error names no destination either.
                attempt => self
                    .streams()
                    .iter()
                    .for_each(|stream| stream.note_error(&attempt)),
            },
        }
    }

    fn answer(&self, answer: &[u8], from: SocketAddr) {
        let text = String::from_utf8_lossy(answer);
        let Some((line, stream, number)) = echoed(&text) else {
            return;
        };
        let streams = self.streams();
        let Some(stream) = streams.iter().find(|candidate| candidate.number == stream) else {
            return;
        };
        let attempt = if plain(from) == plain(stream.to) {
            identify(answer, &line, Instant::now())
        } else {
            Attempt::Broken {
                how: format!("the answer came from {}", plain(from)),
            }
        };
        stream.note(number, attempt);
    }

    fn streams(&self) -> Vec<Arc<Stream>> {
        lock(&self.streams).iter().filter_map(Weak::upgrade).collect()
    }
}

/// The line that was sent, and the numbers of stream and datagram in it.
fn echoed(text: &str) -> Option<(String, usize, usize)> {
    let reply: serde_json::Value = serde_json::from_str(text).ok()?;
    let line = reply.get("echo")?.as_str()?;
    let (stream, number) = line.split_once(' ')?;
    Some((line.to_owned(), stream.parse().ok()?, number.parse().ok()?))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

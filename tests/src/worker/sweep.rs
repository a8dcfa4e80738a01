//! Sweeps: one connection or datagram to each of many targets, all at once on one thread. A target that should answer is
//! tried again; one that should not is listened to for as long as the others need, and a while at least.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Socket, Type};

use super::probe::{failure, identify, open};
use super::protocol::{Attempt, Proto, Sweep, Swept, Target, any};
use super::sctp::{self, Association, Heard};

/// Ports that sweeps begin at; the kernel's own range.
pub const PORTS: std::ops::RangeInclusive<u16> = 33000..=60999;
/// Before a refused target is tried again.
const PAUSE: Duration = Duration::from_millis(100);
/// How long to wait for something to happen.
const STEP_MS: u16 = 10;
/// How many ports are tried for one that is free.
const TRIES: usize = 64;

/// Tries all targets; what became of each, in their order.
pub fn run(sweep: &Sweep) -> Vec<Swept> {
    let start = Instant::now();
    let silence = Duration::from_millis(sweep.silence_ms);
    let mut ports = Ports(sweep.first_port);
    let mut cells: Vec<Cell> = sweep.targets.iter().map(Cell::new).collect();
    loop {
        let now = Instant::now();
        let waiting = cells.iter().any(|cell| cell.target.answers && cell.is_open());
        let closing = !waiting && now.duration_since(start) >= silence;
        for cell in &mut cells {
            cell.begin(sweep, &mut ports, now);
            cell.expire(sweep, closing, now, silence / 2);
        }
        if !cells.iter().any(Cell::is_open) {
            break;
        }
        for number in ready(&cells) {
            cells[number].advance(sweep);
        }
    }
    cells.into_iter().map(Cell::into_result).collect()
}

/// Waits a moment; the cells whose sockets have something to say.
fn ready(cells: &[Cell]) -> Vec<usize> {
    let tries = cells
        .iter()
        .enumerate()
        .filter_map(|(number, cell)| Some((number, cell.open.as_ref()?)));
    let (numbers, mut descriptors): (Vec<usize>, Vec<PollFd<'_>>) = tries
        .map(|(number, open)| {
            let flags = if open.asked {
                PollFlags::POLLIN
            } else {
                PollFlags::POLLOUT
            };
            (number, PollFd::new(open.socket.as_fd(), flags))
        })
        .unzip();
    match poll(&mut descriptors, PollTimeout::from(STEP_MS)) {
        Ok(_) => {}
        Err(_) => thread::sleep(Duration::from_millis(u64::from(STEP_MS))),
    }
    let happened = |descriptor: &PollFd<'_>| descriptor.any().unwrap_or_default();
    numbers
        .into_iter()
        .zip(&descriptors)
        .filter_map(|(number, descriptor)| happened(descriptor).then_some(number))
        .collect()
}

/// The next source port: none is used twice before all others were.
struct Ports(u16);

impl Ports {
    fn next(&mut self) -> u16 {
        let port = if PORTS.contains(&self.0) {
            self.0
        } else {
            *PORTS.start()
        };
        self.0 = port + 1;
        port
    }
}

/// A target and what is known of it.
struct Cell<'a> {
    target: &'a Target,
    open: Option<Open>,
    tries: u32,
    sources: Vec<SocketAddr>,
    reached: bool,
    not_before: Option<Instant>,
    result: Option<Attempt>,
}

/// A try under way.
struct Open {
    socket: Socket,
    /// Of a kernel without SCTP.
    association: Option<Association>,
    began: Instant,
    asked: bool,
    asked_again: bool,
    line: String,
    answer: Vec<u8>,
}

impl<'a> Cell<'a> {
    fn new(target: &'a Target) -> Self {
        Self {
            target,
            open: None,
            tries: 0,
            sources: Vec::new(),
            reached: false,
            not_before: None,
            result: None,
        }
    }

    fn is_open(&self) -> bool {
        self.result.is_none()
    }

    fn into_result(self) -> Swept {
        Swept {
            attempt: self.result.unwrap_or(Attempt::Silent),
            reached: self.reached,
            tries: self.tries,
            sources: self.sources,
        }
    }

    fn begin(&mut self, sweep: &Sweep, ports: &mut Ports, now: Instant) {
        let waits = self.not_before.is_some_and(|time| now < time);
        if !self.is_open() || self.open.is_some() || waits {
            return;
        }
        self.tries += 1;
        match connect(self.target, ports) {
            Ok((socket, association)) => {
                // Known as soon as the destination is.
                let local = match &association {
                    Some(association) => Some(association.from()),
                    None => socket.local_addr().ok().and_then(|addr| addr.as_socket()),
                };
                self.sources.extend(local);
                self.open = Some(Open {
                    socket,
                    association,
                    began: now,
                    asked: false,
                    asked_again: false,
                    line: format!("sweep {} {}", self.target.to, self.tries),
                    answer: Vec::new(),
                });
            }
            Err(error) => self.end(sweep, failure(&error, now, true)),
        }
    }

    /// Ends what has taken too long; asks a silent target of datagrams once more at half-time.
    fn expire(&mut self, sweep: &Sweep, closing: bool, now: Instant, half_time: Duration) {
        let Some(open) = &mut self.open else { return };
        let age = now.duration_since(open.began);
        if self.target.proto == Proto::Udp && open.asked && !open.asked_again && age >= half_time {
            open.asked_again = true;
            let _ = open.socket.send(open.line.as_bytes());
        }
        let is_late = if self.target.answers {
            age >= Duration::from_millis(sweep.patience_ms)
        } else {
            closing
        };
        if is_late {
            self.end(sweep, Attempt::Silent);
        }
    }

    /// Takes one step on a socket that is ready.
    fn advance(&mut self, sweep: &Sweep) {
        let Some(open) = &mut self.open else { return };
        let began = open.began;
        if !open.asked {
            match open.ask() {
                Ok(is_connected) => self.reached |= is_connected,
                Err(error) => self.end(sweep, failure(&error, began, true)),
            }
            return;
        }
        if let Some(association) = &open.association {
            let heard = association.hear(&open.socket);
            if let Ok(Heard::Acknowledged | Heard::Answer(_)) = heard {
                self.reached = true;
            }
            match heard {
                Ok(Heard::Acknowledged) => {
                    // Where it cannot be sent, no answer comes.
                    let _ = association.ask(&open.socket, &open.line);
                }
                Ok(Heard::Answer(answer)) => {
                    let attempt = identify(&answer, &open.line, began);
                    self.end(sweep, attempt);
                }
                Ok(Heard::Nothing) => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => self.end(sweep, failure(&error, began, true)),
            }
            return;
        }
        let mut data = [0; 4096];
        match open.socket.read(&mut data) {
            Ok(length) => {
                self.reached = true;
                open.answer.extend_from_slice(&data[..length]);
                if self.target.proto == Proto::Udp || length == 0 || data[..length].contains(&b'\n') {
                    let attempt = identify(&open.answer, &open.line, began);
                    self.end(sweep, attempt);
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => {
                let attempt = failure(&error, began, self.target.proto == Proto::Udp);
                self.end(sweep, attempt);
            }
        }
    }

    /// A try has ended: with an answer, without one for good, or to be made again.
    fn end(&mut self, sweep: &Sweep, attempt: Attempt) {
        if let Some(open) = self.open.take()
            && self.target.proto != Proto::Udp
        {
            // Nothing waits for the other end.
            let _ = open.socket.set_linger(Some(Duration::ZERO));
        }
        let answered = attempt.backend().is_some();
        if self.target.answers && !answered && attempt != Attempt::Unsupported && self.tries < sweep.tries {
            self.not_before = Some(Instant::now() + PAUSE);
            return;
        }
        self.result = Some(if self.reached && attempt == Attempt::Silent {
            Attempt::Broken {
                how: "connected, but no answer".to_owned(),
            }
        } else {
            attempt
        });
    }
}

impl Open {
    /// Sends the line once the connection is there, or what begins an association. Whether the other end is known to be there.
    fn ask(&mut self) -> std::io::Result<bool> {
        if let Some(error) = self.socket.take_error()? {
            return Err(error);
        }
        self.asked = true;
        if let Some(association) = &self.association {
            return association.begin(&self.socket).map(|()| false);
        }
        self.socket.write_all(format!("{}\n", self.line).as_bytes())?;
        Ok(self.socket.r#type()? == Type::STREAM)
    }
}

/// A socket that is on its way to the target, from the next port that is free.
fn connect(target: &Target, ports: &mut Ports) -> std::io::Result<(Socket, Option<Association>)> {
    if target.proto == Proto::Sctp && !sctp::is_in_kernel() {
        let (socket, association) = Association::new(target.to, ports.next())?;
        return Ok((socket, Some(association)));
    }
    let socket = open(target.proto, target.to)?;
    socket.set_nonblocking(true)?;
    let mut bound = Ok(());
    for _ in 0..TRIES {
        bound = socket.bind(&any(target.to, ports.next()).into());
        if bound.is_ok() {
            break;
        }
    }
    bound?;
    match socket.connect(&target.to.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok((socket, None)),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::worker::{arrivals, responder};

    #[test]
    fn who_answers_is_told_from_who_does_not() {
        let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let free = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let (tcp, udp) = (free_port(), free_port());
        let name: Arc<str> = Arc::from("somebody");
        arrivals::take();
        responder::listen(&name, Proto::Tcp, tcp).unwrap();
        responder::listen(&name, Proto::Udp, udp).unwrap();
        let target = |proto, to: SocketAddr, answers| Target { proto, to, answers };
        let sweep = Sweep {
            targets: vec![
                target(Proto::Tcp, ([127, 0, 0, 1], tcp).into(), true),
                target(Proto::Udp, ([127, 0, 0, 1], udp).into(), false),
                target(Proto::Udp, silent.local_addr().unwrap(), false),
                target(Proto::Tcp, free, true),
            ],
            first_port: 40000,
            silence_ms: 100,
            patience_ms: 1000,
            tries: 2,
        };
        let swept = run(&sweep);
        assert!(matches!(&swept[0].attempt, Attempt::Answered { by, .. } if by.name == "somebody"));
        assert!(swept[1].reached && swept[1].attempt.backend().is_some());
        assert_eq!((swept[2].reached, &swept[2].attempt), (false, &Attempt::Silent));
        assert!(
            matches!(swept[3].attempt, Attempt::Refused { .. }),
            "{:?}",
            swept[3]
        );
        assert_eq!(swept[3].tries, 2);
        let seen = arrivals::take();
        let arrived = |number: usize, proto, port| seen.contains(&(proto, port, swept[number].sources[0]));
        assert!(arrived(0, Proto::Tcp, tcp), "{seen:?}");
        assert!(arrived(1, Proto::Udp, udp), "{seen:?}");
    }

    fn free_port() -> u16 {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.local_addr().unwrap().port()
    }
}

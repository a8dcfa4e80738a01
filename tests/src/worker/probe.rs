//! New connections: who answers, or how it fails.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Error, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

use super::protocol::{Attempt, Probe, Proto, Reply, Response, any};

const LINE: &str = "who are you";
/// As many connections are tried at once.
const AT_ONCE: u32 = 64;
/// How many ports are tried for one that was not used before.
const TRIES: usize = 256;

/// Makes the connections of a probe, in order or all at once.
pub fn run(probe: &Probe) -> Vec<Attempt> {
    if probe.parallel {
        return side_by_side(probe);
    }
    let mut attempts: Vec<Attempt> = Vec::new();
    let mut failures = 0;
    for number in 0..probe.connections {
        if number > 0 {
            thread::sleep(Duration::from_millis(probe.interval_ms));
        }
        let attempt = connect_once(probe);
        failures += u32::from(attempt.backend().is_none());
        let first = probe
            .first_backend
            .clone()
            .or_else(|| attempts.first().and_then(Attempt::backend));
        let changed = first.is_some() && attempt.backend().is_some() && first != attempt.backend();
        attempts.push(attempt);
        if failures >= probe.stop_after_failures || (probe.until_backend_changes && changed) {
            break;
        }
    }
    attempts
}

fn side_by_side(probe: &Probe) -> Vec<Attempt> {
    let mut attempts = Vec::new();
    let mut left = probe.connections;
    while left > 0 {
        let now = left.min(AT_ONCE);
        left -= now;
        thread::scope(|scope| {
            let threads: Vec<_> = (0..now).map(|_| scope.spawn(|| connect_once(probe))).collect();
            attempts.extend(threads.into_iter().filter_map(|thread| thread.join().ok()));
        });
    }
    attempts
}

fn connect_once(probe: &Probe) -> Attempt {
    let start = Instant::now();
    let timeout = Duration::from_millis(probe.timeout_ms);
    if probe.proto == Proto::Udp {
        return datagram(probe, timeout, start);
    }
    match fresh_socket(probe).and_then(|socket| dial(socket, probe.proto, probe.to, timeout)) {
        Ok(stream) => {
            // The port is free again at once: a probe may use it for its next connection.
            let _ = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
            exchange(&stream, LINE, timeout, start)
        }
        Err(error) => failure(&error, start, true),
    }
}

/// Opens a connection, from a fixed address or port if one is given.
pub fn connect(
    proto: Proto,
    from: SocketAddr,
    to: SocketAddr,
    timeout: Duration,
) -> std::io::Result<TcpStream> {
    let socket = open(proto, to)?;
    if !from.ip().is_unspecified() || from.port() != 0 {
        socket.set_reuse_address(true)?;
        socket.bind(&from.into())?;
    }
    dial(socket, proto, to, timeout)
}

pub(super) fn open(proto: Proto, to: SocketAddr) -> std::io::Result<Socket> {
    let (kind, protocol) = match proto {
        Proto::Tcp => (Type::STREAM, Protocol::TCP),
        Proto::Udp => (Type::DGRAM, Protocol::UDP),
        Proto::Sctp => (Type::STREAM, Protocol::from(libc::IPPROTO_SCTP)),
    };
    Socket::new(Domain::for_address(to), kind, Some(protocol))
}

fn dial(socket: Socket, proto: Proto, to: SocketAddr, timeout: Duration) -> std::io::Result<TcpStream> {
    socket.connect_timeout(&to.into(), timeout)?;
    socket
        .set_tcp_nodelay(true)
        .or_else(|error| if proto == Proto::Sctp { Ok(()) } else { Err(error) })?;
    Ok(socket.into())
}

/// One question and its answer on an open connection.
pub fn exchange(stream: &TcpStream, line: &str, timeout: Duration, start: Instant) -> Attempt {
    let talk = || -> std::io::Result<String> {
        stream.set_read_timeout(Some(timeout))?;
        let mut writer = stream;
        writer.write_all(format!("{line}\n").as_bytes())?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer)?;
        Ok(answer)
    };
    match talk() {
        Ok(answer) => identify(answer.as_bytes(), line, start),
        Err(error) => match failure(&error, start, false) {
            Attempt::Silent => Attempt::Broken {
                how: "connected, but no answer".to_owned(),
            },
            other => other,
        },
    }
}

/// Decodes a responder's answer to `line`.
pub fn identify(answer: &[u8], line: &str, start: Instant) -> Attempt {
    match serde_json::from_slice::<Reply>(answer) {
        Ok(reply) if reply.echo == line => Attempt::Answered {
            by: reply.identity,
            ms: elapsed(start),
        },
        Ok(reply) => Attempt::Broken {
            how: format!("the answer repeats {:?}", reply.echo),
        },
        Err(_) if answer.is_empty() => Attempt::Broken {
            how: "the connection was closed".to_owned(),
        },
        Err(error) => Attempt::Broken {
            how: format!("the answer is damaged: {error}"),
        },
    }
}

/// A socket that asks from a port that this process has not asked anybody from before, unless the probe names one.
///
/// What comes from a port of earlier belongs to what came from it then: a datagram to the same destination goes on with its
/// backend as long as that serves, and where the destination is another one, both ways may lead to one backend, translated by
/// different nodes, of which none can tell the answers apart (ARCHITECTURE, "Known limits").
///
/// A port that the probe names is bound, as by an application that wants that one. Any other is taken when the socket
/// connects: socket hooks leave TCP sockets alone that have a port before.
fn fresh_socket(probe: &Probe) -> std::io::Result<Socket> {
    static USED: Mutex<BTreeSet<(Proto, bool, u16)>> = Mutex::new(BTreeSet::new());
    let mut held = Vec::new();
    loop {
        let socket = open(probe.proto, probe.to)?;
        let named = probe.from.port() != 0;
        socket.set_reuse_address(named && probe.proto != Proto::Udp)?;
        socket.bind(&probe.from.into())?;
        if named {
            return Ok(socket);
        }
        let port = socket.local_addr()?.as_socket().map_or(0, |local| local.port());
        let is_new = USED.lock().unwrap_or_else(PoisonError::into_inner).insert((
            probe.proto,
            probe.to.is_ipv6(),
            port,
        ));
        if is_new || held.len() >= TRIES {
            return takes_later(probe, port).map(|later| later.unwrap_or(socket));
        }
        // Kept until another is found, so that the kernel does not choose it again.
        held.push(socket);
    }
}

/// A socket that takes `port` when it connects; none where that can't be arranged (SCTP, Linux before 6.3).
fn takes_later(probe: &Probe, port: u16) -> std::io::Result<Option<Socket>> {
    let socket = open(probe.proto, probe.to)?;
    if probe.proto == Proto::Sctp || set_port_range(&socket, port).is_err() {
        return Ok(None);
    }
    setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
    socket.bind(&probe.from.into())?;
    Ok(Some(socket))
}

/// `IP_LOCAL_PORT_RANGE` (ip(7), Linux 6.3), which is for IPv6 sockets too: the only port that the kernel may choose.
fn set_port_range(socket: &Socket, port: u16) -> std::io::Result<()> {
    const IP_LOCAL_PORT_RANGE: libc::c_int = 51;
    let range = u32::from(port) << 16 | u32::from(port);
    // SAFETY: the option's value is one `u32`, of which the kernel reads four bytes.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            IP_LOCAL_PORT_RANGE,
            (&raw const range).cast(),
            size_of::<u32>() as libc::socklen_t,
        )
    };
    Errno::result(set).map(drop).map_err(Into::into)
}

fn datagram(probe: &Probe, timeout: Duration, start: Instant) -> Attempt {
    let talk = || -> std::io::Result<Vec<u8>> {
        let socket: UdpSocket = fresh_socket(probe)?.into();
        socket.connect(probe.to)?;
        socket.set_read_timeout(Some(timeout))?;
        socket.send(LINE.as_bytes())?;
        let mut answer = [0; 4096];
        let length = socket.recv(&mut answer)?;
        Ok(answer[..length].to_vec())
    };
    match talk() {
        Ok(answer) => identify(&answer, LINE, start),
        Err(error) => failure(&error, start, true),
    }
}

/// Sorts an error: refused (only where nothing was established), silence, or broken.
pub fn failure(error: &Error, start: Instant, refusable: bool) -> Attempt {
    if matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock) {
        return Attempt::Silent;
    }
    let errno = error.raw_os_error().map(Errno::from_raw);
    match errno {
        Some(Errno::ECONNREFUSED | Errno::EHOSTUNREACH | Errno::ENETUNREACH | Errno::EACCES) if refusable => {
            Attempt::Refused {
                how: format!("{:?}", errno.unwrap_or(Errno::UnknownErrno)),
                ms: elapsed(start),
            }
        }
        // A socket hook that drops: it has no other word for it, and nothing comes back from anywhere.
        Some(Errno::EPERM) if refusable => Attempt::Silent,
        Some(Errno::EPROTONOSUPPORT | Errno::ESOCKTNOSUPPORT) => Attempt::Unsupported,
        _ => Attempt::Broken {
            how: error.to_string(),
        },
    }
}

fn elapsed(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// Fetches a page over HTTP/1.0; a port that is closed or silent comes back as one attempt.
pub fn http_get(to: SocketAddr, path: &str, timeout_ms: u64) -> Result<Response> {
    let start = Instant::now();
    let timeout = Duration::from_millis(timeout_ms);
    let stream = match connect(Proto::Tcp, any(to, 0), to, timeout) {
        Ok(stream) => stream,
        Err(error) => return Ok(Response::Attempts(vec![failure(&error, start, true)])),
    };
    let mut page = String::new();
    let mut talk = || -> std::io::Result<()> {
        stream.set_read_timeout(Some(timeout))?;
        (&stream).write_all(
            format!("GET {path} HTTP/1.0\r\nHost: {to}\r\nConnection: close\r\n\r\n").as_bytes(),
        )?;
        (&stream).take(65536).read_to_string(&mut page).map(drop)
    };
    talk().context("the port is open, but no page came")?;
    let (head, body) = page.split_once("\r\n\r\n").context("the answer is not HTTP")?;
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok())
        .context("the answer has no status")?;
    Ok(Response::Http {
        status,
        body: body.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn no_port_asks_twice_even_of_another_destination() -> std::io::Result<()> {
        let listeners = [
            TcpListener::bind("127.0.0.1:0")?,
            TcpListener::bind("127.0.0.1:0")?,
        ];
        for proto in [Proto::Udp, Proto::Tcp] {
            let mut seen = BTreeSet::new();
            for number in 0..2000 {
                let listener = &listeners[number % 2];
                let to = listener.local_addr()?;
                let probe = Probe {
                    proto,
                    to,
                    from: any(to, 0),
                    connections: 1,
                    parallel: false,
                    interval_ms: 0,
                    timeout_ms: 0,
                    stop_after_failures: 1,
                    until_backend_changes: false,
                    first_backend: None,
                };
                let socket = fresh_socket(&probe)?;
                socket.connect(&to.into())?;
                if proto == Proto::Tcp {
                    listener.accept()?;
                }
                let port = socket.local_addr()?.as_socket().map(|local| local.port());
                assert!(seen.insert(port), "{proto:?} {port:?} after {number}");
            }
        }
        Ok(())
    }
}

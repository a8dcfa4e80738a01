//! SCTP without the kernel's: crafted packets by raw sockets, where the kernel has no SCTP of its own. An association as far as
//! middleboxes see it (RFC 9260, 5.1 and 6): INIT, INIT ACK, COOKIE ECHO with DATA, DATA.
//!
//! The responder keeps nothing: what it has to know of a client is in each packet. Needs `CAP_NET_RAW`.

use std::collections::BTreeSet;
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result};
use nix::libc;
use socket2::{Domain, Protocol, Socket, Type};

use super::arrivals;
use super::protocol::{Identity, Proto, Reply, plain};
use super::responder::{answer_from, receive, show_destinations};

/// Bytes of the common header.
const HEADER: usize = 12;
/// Of the header of a chunk.
const CHUNK: usize = 4;
/// Of a DATA chunk, before its payload.
const DATA: usize = 16;
/// The largest packet that is read.
const LARGEST: usize = 2048;
/// Every client's and responder's: nobody else speaks here.
const TAG: u32 = 0x5ca1_ab1e;

/// Chunk types (RFC 9260, 3.2).
mod chunk {
    pub const DATA: u8 = 0;
    pub const INIT: u8 = 1;
    pub const INIT_ACK: u8 = 2;
    pub const COOKIE_ECHO: u8 = 10;
}

/// Whether the kernel opens SCTP sockets.
pub fn is_in_kernel() -> bool {
    let sctp = Protocol::from(libc::IPPROTO_SCTP);
    Socket::new(Domain::IPV4, Type::STREAM, Some(sctp)).is_ok()
}

/// What a packet says.
#[derive(Debug, PartialEq, Eq)]
enum Said<'a> {
    Init,
    InitAck,
    /// Payload.
    Data(&'a [u8]),
    Other,
}

/// A packet: source and destination port, and what it says first, or with a cookie before it.
#[derive(Debug, PartialEq, Eq)]
struct Packet<'a> {
    from: u16,
    to: u16,
    said: Said<'a>,
}

impl<'a> Packet<'a> {
    /// Reads what begins with the common header; `None` where it is no packet, or its checksum is wrong.
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        let port = |at: usize| Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
        let found = u32::from_le_bytes(bytes.get(8..HEADER)?.try_into().ok()?);
        if found != checksum(bytes) {
            return None;
        }
        let mut rest = bytes.get(HEADER..)?;
        let said = loop {
            let [kind, _, high, low, ..] = *rest else {
                return None;
            };
            let length = usize::from(u16::from_be_bytes([high, low]));
            let chunk = rest.get(..length)?;
            match kind {
                chunk::INIT => break Said::Init,
                chunk::INIT_ACK => break Said::InitAck,
                chunk::DATA => break Said::Data(chunk.get(DATA..)?),
                chunk::COOKIE_ECHO if length >= CHUNK => rest = rest.get(length.next_multiple_of(4)..)?,
                _ => break Said::Other,
            }
        };
        Some(Self {
            from: port(0)?,
            to: port(2)?,
            said,
        })
    }
}

/// The Castagnoli checksum of a packet, its own field taken as zero (RFC 9260, 6.8 and appendix A: in the order of bytes in which it is sent).
fn checksum(bytes: &[u8]) -> u32 {
    let (before, behind) = (&bytes[..8], bytes.get(HEADER..).unwrap_or_default());
    let crc = crc32c::crc32c(before);
    crc32c::crc32c_append(crc32c::crc32c_append(crc, &[0; 4]), behind)
}

fn packet(from: u16, to: u16, tag: u32, chunks: &[(u8, u8, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(from.to_be_bytes());
    bytes.extend(to.to_be_bytes());
    bytes.extend(tag.to_be_bytes());
    bytes.extend([0; 4]);
    for (kind, flags, value) in chunks {
        let length = (CHUNK + value.len()) as u16;
        bytes.extend([*kind, *flags]);
        bytes.extend(length.to_be_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    let checksum = checksum(&bytes);
    bytes[8..HEADER].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

/// Tag, receive window, one stream each way, first number; of an INIT ACK with a cookie.
fn beginning(cookie: bool) -> Vec<u8> {
    let mut value = Vec::new();
    value.extend(TAG.to_be_bytes());
    value.extend(0x1_0000_u32.to_be_bytes());
    value.extend([0, 1, 0, 1]);
    value.extend(1_u32.to_be_bytes());
    if cookie {
        // Parameter 7, a state cookie of four bytes.
        value.extend([0, 7, 0, 8]);
        value.extend(TAG.to_be_bytes());
    }
    value
}

/// The whole message of stream 0: number, stream, its sequence, protocol, payload.
fn data(payload: &[u8]) -> (u8, u8, Vec<u8>) {
    const WHOLE: u8 = 3;
    let mut value = Vec::new();
    value.extend(1_u32.to_be_bytes());
    value.extend([0; 8]);
    value.extend(payload);
    (chunk::DATA, WHOLE, value)
}

/// An association, asked from a raw socket.
#[derive(Debug)]
pub struct Association {
    from: SocketAddr,
    to: SocketAddr,
}

/// What came back.
#[derive(Debug, PartialEq, Eq)]
pub enum Heard {
    /// The other end is there; the question follows.
    Acknowledged,
    Answer(Vec<u8>),
    /// Nothing of this association.
    Nothing,
}

impl Association {
    /// From a port, with the socket that its packets go through; nothing is sent yet.
    pub fn new(to: SocketAddr, port: u16) -> io::Result<(Socket, Self)> {
        let socket = raw(to.ip())?;
        socket.set_nonblocking(true)?;
        socket.connect(&SocketAddr::new(to.ip(), 0).into())?;
        let local = socket.local_addr()?.as_socket();
        let from = local.map_or(to, |local| SocketAddr::new(local.ip(), port));
        Ok((socket, Self { from, to }))
    }

    pub fn from(&self) -> SocketAddr {
        self.from
    }

    /// Sends INIT.
    pub fn begin(&self, socket: &Socket) -> io::Result<()> {
        let init = (chunk::INIT, 0, beginning(false));
        let bytes = packet(self.from.port(), self.to.port(), 0, &[init]);
        socket.send(&bytes).map(|_| ())
    }

    /// Sends a line, with the cookie.
    pub fn ask(&self, socket: &Socket, line: &str) -> io::Result<()> {
        let cookie = (chunk::COOKIE_ECHO, 0, TAG.to_be_bytes().to_vec());
        let chunks = [cookie, data(line.as_bytes())];
        let bytes = packet(self.from.port(), self.to.port(), TAG, &chunks);
        socket.send(&bytes).map(|_| ())
    }

    /// Reads one packet.
    pub fn hear(&self, socket: &Socket) -> io::Result<Heard> {
        let mut buffer = [0; LARGEST];
        let mut reader = socket;
        let length = reader.read(&mut buffer)?;
        let packet = payload(&buffer[..length], self.to.is_ipv4()).and_then(Packet::parse);
        let packet = packet.filter(|packet| (packet.from, packet.to) == (self.to.port(), self.from.port()));
        Ok(match packet.map(|packet| packet.said) {
            Some(Said::InitAck) => Heard::Acknowledged,
            Some(Said::Data(answer)) => Heard::Answer(answer.to_vec()),
            _ => Heard::Nothing,
        })
    }
}

/// Answers at `port` of every address, both families, until the process ends.
pub fn listen(name: &Arc<str>, port: u16) -> Result<()> {
    static PORTS: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    let mut ports = PORTS.lock().unwrap_or_else(PoisonError::into_inner);
    let is_first = ports.is_empty();
    ports.insert(port);
    if !is_first {
        return Ok(());
    }
    for any in [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()] {
        let socket = raw(any).context("failed to open a raw socket for SCTP")?;
        show_destinations(&socket, any)?;
        let name = Arc::clone(name);
        thread::spawn(move || {
            loop {
                let listens = |port| {
                    PORTS
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .contains(&port)
                };
                // An answer that cannot be sent is the client's to report.
                let _ = answer(&name, &socket, any.is_ipv4(), listens);
            }
        });
    }
    Ok(())
}

fn answer(name: &str, socket: &Socket, is_v4: bool, listens: impl Fn(u16) -> bool) -> Result<()> {
    let mut buffer = [0; LARGEST];
    let (length, client, local) = receive(socket, &mut buffer)?;
    let Some(asked) = payload(&buffer[..length], is_v4).and_then(Packet::parse) else {
        return Ok(());
    };
    let Packet { from, to: port, said } = asked;
    let client = plain(SocketAddr::new(client.ip(), from));
    let reply = match said {
        Said::Init if listens(port) => {
            arrivals::note(Proto::Sctp, port, client);
            (chunk::INIT_ACK, 0, beginning(true))
        }
        Said::Data(line) if listens(port) => {
            arrivals::note(Proto::Sctp, port, client);
            let identity = Identity {
                name: name.to_owned(),
                at: SocketAddr::new(local, port),
                client,
            };
            let echo = String::from_utf8_lossy(line).into_owned();
            data(&serde_json::to_vec(&Reply { identity, echo })?)
        }
        _ => return Ok(()),
    };
    let bytes = packet(port, from, TAG, &[reply]);
    answer_from(socket, local, SocketAddr::new(client.ip(), 0), &bytes)
}

fn raw(like: IpAddr) -> io::Result<Socket> {
    let domain = if like.is_ipv4() {
        Domain::IPV4
    } else {
        Domain::IPV6
    };
    Socket::new(domain, Type::RAW, Some(Protocol::from(libc::IPPROTO_SCTP)))
}

/// Raw sockets of IPv4 show the header of IP, those of IPv6 do not.
fn payload(bytes: &[u8], is_v4: bool) -> Option<&[u8]> {
    let header = if is_v4 {
        usize::from(*bytes.first()? & 15) * 4
    } else {
        0
    };
    bytes.get(header..)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_read_as_they_were_made() {
        let cookie = (chunk::COOKIE_ECHO, 0, vec![1, 2, 3]);
        let mut bytes = packet(33000, 80, TAG, &[cookie, data(b"question")]);
        let said = Said::Data(b"question");
        let (from, to) = (33000, 80);
        assert_eq!(Packet::parse(&bytes), Some(Packet { from, to, said }));
        bytes[HEADER + CHUNK] ^= 1;
        assert_eq!(Packet::parse(&bytes), None, "the checksum is wrong");
        let init = packet(33000, 80, 0, &[(chunk::INIT, 0, beginning(false))]);
        assert_eq!(Packet::parse(&init).map(|packet| packet.said), Some(Said::Init));
        assert_eq!(Packet::parse(&init[..HEADER + 2]), None);
        // The check value of CRC32c (RFC 3720, B.4): 32 bytes of zero.
        assert_eq!(checksum(&[0; 32]), 0x8a91_36aa);
    }

    #[test]
    fn an_association_is_answered_where_somebody_listens() {
        if is_in_kernel() {
            return;
        }
        let name: Arc<str> = Arc::from("somebody");
        listen(&name, 39_999).unwrap();
        for ip in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
            let (socket, association) = Association::new((ip, 39_999).into(), 33_001).unwrap();
            socket.set_nonblocking(false).unwrap();
            socket
                .set_read_timeout(Some(std::time::Duration::from_secs(5)))
                .unwrap();
            let hear = || loop {
                match association.hear(&socket).unwrap() {
                    Heard::Nothing => {}
                    other => break other,
                }
            };
            association.begin(&socket).unwrap();
            assert_eq!(hear(), Heard::Acknowledged);
            association.ask(&socket, "who").unwrap();
            let Heard::Answer(answer) = hear() else {
                panic!("no answer");
            };
            let reply: Reply = serde_json::from_slice(&answer).unwrap();
            assert_eq!(
                (reply.echo.as_str(), reply.identity.name.as_str()),
                ("who", "somebody")
            );
            assert_eq!(reply.identity.client, (ip, 33_001).into());
        }
    }
}

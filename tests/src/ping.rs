//! ICMP echo, without a program for it.

use std::io::{ErrorKind, Read};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use socket2::{Domain, Protocol, Socket, Type};

/// Asks an address from the calling thread's namespace; whether an answer came that brings back identifier, sequence
/// number and payload, with right checksums: those of ICMP are not checked by the kernel for a raw IPv4 socket.
pub fn is_answered(to: IpAddr, payload: &[u8], within: Duration) -> Result<bool> {
    let (domain, protocol, request, reply) = match to {
        IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4, 8, 0),
        IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6, 128, 129),
    };
    let mut socket = Socket::new(domain, Type::RAW, Some(protocol)).context("failed to open a raw socket")?;
    // Of its own answers alone: a raw socket sees everybody's.
    socket.connect(&SocketAddr::new(to, 0).into())?;
    let mut message = [&[request, 0, 0, 0, 0x12, 0x34, 0, 7], payload].concat();
    let sum = checksum(&message).to_be_bytes();
    message[2..4].copy_from_slice(&sum);
    socket.send(&message)?;
    let end = Instant::now() + within;
    let mut buffer = vec![0; 1 << 16];
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        socket.set_read_timeout(Some(left))?;
        let length = match socket.read(&mut buffer) {
            Ok(length) => length,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => continue,
            Err(error) => return Err(error).context("failed to read an answer"),
        };
        let header = if to.is_ipv4() { 20 } else { 0 };
        let answer = buffer.get(header..length).unwrap_or_default();
        let is_right = to.is_ipv6() || checksum(answer) == 0;
        if answer.first() == Some(&reply) && is_right && answer.get(4..) == message.get(4..) {
            return Ok(true);
        }
    }
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = 0;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
    }
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

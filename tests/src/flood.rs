//! Floods of first packets, each from an address of its own.

use std::io::IoSlice;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::AsRawFd;

use anyhow::{Context, Result};
use etherparse::PacketBuilder;
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrIn, sendmmsg};
use socket2::{Domain, Protocol, Socket, Type};

/// The first source: of 4 million addresses that no test network has (RFC 6598).
const FIRST_SOURCE: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 0);
const BATCH: usize = 128;

/// Sends a SYN from each of `count` addresses, beginning with number `first`, by way of the routes of the calling
/// thread's network namespace.
pub fn syns(to: SocketAddrV4, first: u32, count: u32) -> Result<()> {
    // Whoever sends by this protocol writes the IP header too.
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))
        .context("failed to open a raw socket")?;
    let addresses = [Some(SockaddrIn::from(to)); BATCH];
    let mut headers = MultiHeaders::preallocate(BATCH, None);
    let mut number = first;
    while number < first + count {
        let packets: Vec<_> = (number..first + count).take(BATCH).map(|n| syn(to, n)).collect();
        let slices: Vec<_> = packets.iter().map(|packet| [IoSlice::new(packet)]).collect();
        let sent = sendmmsg(
            socket.as_raw_fd(),
            &mut headers,
            &slices,
            &addresses[..slices.len()],
            [],
            MsgFlags::empty(),
        );
        match sent {
            Ok(results) => number += u32::try_from(results.count())?.max(1),
            // The device's queue is full.
            Err(Errno::ENOBUFS | Errno::EAGAIN) => std::thread::yield_now(),
            Err(error) => return Err(error).context("failed to send SYNs"),
        }
    }
    Ok(())
}

/// The SYN from source `number`.
fn syn(to: SocketAddrV4, number: u32) -> Vec<u8> {
    let source = Ipv4Addr::from_bits(FIRST_SOURCE.to_bits() + number);
    let builder = PacketBuilder::ipv4(source.octets(), to.ip().octets(), 64)
        .tcp(1024 + (number % 60_000) as u16, to.port(), number, 64_240)
        .syn();
    let mut packet = Vec::with_capacity(40);
    // Writing into memory does not fail.
    let _ = builder.write(&mut packet, &[]);
    packet
}

//! `SOCK_REVERSE_V4` and `SOCK_REVERSE_V6`, read: which backend the socket hooks gave a connected socket.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use dataplane_common::sock::{SockAddr4, SockAddr6, SockBackend, SockKey4, SockKey6};

use crate::bpf::{map_names as names, pins::Pins, sys::MapFd};

/// The maps, opened from their pins.
#[derive(Debug)]
pub struct GivenSockets {
    v4: MapFd<SockKey4, SockAddr4>,
    v6: MapFd<SockKey6, SockAddr6>,
}

impl GivenSockets {
    pub fn open(pins: &Pins) -> io::Result<Self> {
        Ok(Self {
            v4: MapFd::new(pins.open_map(names::SOCK_REVERSE_V4)?)?,
            v6: MapFd::new(pins.open_map(names::SOCK_REVERSE_V6)?)?,
        })
    }

    /// The backend that the socket with this cookie was given when it was connected, if that is `peer`.
    pub fn backend(&self, cookie: u64, peer: SocketAddr) -> io::Result<Option<SockBackend>> {
        let port_be = peer.port().to_be();
        let (connected, given) = match peer.ip() {
            IpAddr::V4(addr) => {
                let key = SockKey4::new(cookie, u32::from_ne_bytes(addr.octets()), port_be);
                let Some(asked) = self.v4.lookup(&key)? else {
                    return Ok(None);
                };
                (asked.connected, asked.given)
            }
            IpAddr::V6(addr) => {
                let key = SockKey6::new(cookie, bytemuck::cast(addr.octets()), port_be);
                let Some(asked) = self.v6.lookup(&key)? else {
                    return Ok(None);
                };
                (asked.connected, asked.given)
            }
        };
        Ok((connected != 0).then_some(given))
    }
}

//! Senders of datagrams that never stop, and sockets that count them.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use dataplane_tests::netns::NetNs;

/// Between two datagrams to each address.
const PAUSE: Duration = Duration::from_micros(500);

/// Whom the senders send to, and until when.
#[derive(Debug, Default)]
pub struct Targets {
    addresses: Mutex<BTreeSet<IpAddr>>,
    ended: AtomicBool,
}

impl Targets {
    pub fn set(&self, addresses: impl IntoIterator<Item = IpAddr>) {
        *self.addresses.lock().expect("no sender panics") = addresses.into_iter().collect();
    }

    pub fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }

    /// Sends to all of them, again and again, until the end.
    pub fn flood(&self, socket: &UdpSocket, port: u16) {
        while !self.ended.load(Ordering::Relaxed) {
            let addresses = self.addresses.lock().expect("no sender panics").clone();
            for address in addresses {
                // Where nobody is yet, there is no way.
                let _ = socket.send_to(b"flood", (address, port));
            }
            thread::sleep(PAUSE);
        }
    }
}

/// A socket of a namespace.
pub fn socket(netns: &NetNs, port: u16) -> Result<UdpSocket> {
    netns.enter(|| {
        let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
        let socket = UdpSocket::bind(any).context("failed to open a socket")?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    })
}

/// How many datagrams have arrived since the last call, or as many as a socket keeps.
pub fn arrived(socket: &UdpSocket) -> u64 {
    let mut buffer = [0; 16];
    let mut count = 0;
    while socket.recv_from(&mut buffer).is_ok() {
        count += 1;
    }
    count
}

//! Change notices. A notice only says that it is time to look again; its content is not used, so a lost one
//! (`ENOBUFS`) is itself just a notice.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use tokio::io::unix::AsyncFd;

use crate::bpf::sys;

/// `RTNLGRP_*`: links, IPv4 addresses and routes, IPv6 addresses and routes, namespace ids.
const GROUPS: [u32; 6] = [1, 5, 7, 9, 11, 28];

/// A socket that becomes readable when the network changes.
#[derive(Debug)]
pub struct Events {
    socket: Socket,
    /// A second descriptor of the same socket.
    readiness: AsyncFd<OwnedFd>,
}

impl Events {
    /// Must be called inside a tokio runtime.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        socket.set_non_blocking(true)?;
        for group in GROUPS {
            socket.add_membership(group)?;
        }
        // Also notices from the pods' namespaces, such as a new address. Needs CAP_NET_BROADCAST; without it those
        // are found by looking again.
        let _ = socket.set_listen_all_namespaces(true);
        let readiness = sys::watch_readable(socket.as_fd().try_clone_to_owned()?)?;
        Ok(Self { socket, readiness })
    }

    /// Returns when something has changed, having consumed all notices.
    pub async fn changed(&self) -> io::Result<()> {
        let mut guard = self.readiness.readable().await?;
        let mut buffer = Vec::with_capacity(65536);
        loop {
            buffer.clear();
            match self.socket.recv(&mut buffer, 0) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    guard.clear_ready();
                    return Ok(());
                }
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

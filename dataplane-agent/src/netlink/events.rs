//! Change notices. A notice only says that it is time to look again; its content is not used further, so a lost one
//! (`ENOBUFS`) is itself just a notice.

use std::{
    cell::RefCell,
    io,
    os::fd::{AsFd, OwnedFd},
};

use netlink_sys::{
    Socket, SocketAddr,
    protocols::{NETLINK_NETFILTER, NETLINK_ROUTE},
};
use tokio::io::unix::AsyncFd;

use super::{
    firewall,
    socket::{Message, split},
    tables::{Link, parse_link},
};
use crate::bpf::sys;

/// `RTNLGRP_*`: links, IPv4 addresses and routes, IPv6 addresses and routes, namespace ids.
const GROUPS: [u32; 6] = [1, 5, 7, 9, 11, 28];
/// `RTNLGRP_LINK`.
const LINK_GROUP: u32 = 1;
/// `NFNLGRP_NFTABLES`.
const NFTABLES_GROUP: u32 = 7;
/// Bytes of the largest notice.
const NOTICE_AT_MOST: usize = 65536;

/// A socket that becomes readable when the network changes.
#[derive(Debug)]
pub struct Events(Notices);

impl Events {
    /// Must be called inside a tokio runtime.
    pub fn open() -> io::Result<Self> {
        let notices = Notices::open(NETLINK_ROUTE, &GROUPS, |socket| {
            // Also notices from the pods' namespaces, such as a new address. Needs CAP_NET_BROADCAST; without it those
            // are found by looking again.
            let _ = socket.set_listen_all_namespaces(true);
        })?;
        Ok(Self(notices))
    }

    /// Returns when something has changed, having consumed all notices.
    pub async fn changed(&self) -> io::Result<()> {
        self.0.any(|_| true).await
    }
}

/// A socket that becomes readable when a device of this namespace comes or changes.
#[derive(Debug)]
pub struct LinkEvents(Notices);

impl LinkEvents {
    /// Must be called inside a tokio runtime.
    pub fn open() -> io::Result<Self> {
        Notices::open(NETLINK_ROUTE, &[LINK_GROUP], |_| {}).map(Self)
    }

    /// Returns when some have, and which.
    pub async fn changed(&self) -> io::Result<Vec<Link>> {
        let links = RefCell::default();
        let take = |datagram: &[u8]| {
            let found = split(datagram).filter_map(|notice| {
                parse_link(&Message {
                    kind: notice.kind,
                    body: notice.body.to_vec(),
                })
            });
            let mut links: std::cell::RefMut<'_, Vec<Link>> = links.borrow_mut();
            links.extend(found);
            true
        };
        self.0.any(take).await?;
        Ok(links.into_inner())
    }
}

/// A socket that becomes readable when nftables' rules change.
#[derive(Debug)]
pub struct ChainEvents(Notices);

impl ChainEvents {
    /// Must be called inside a tokio runtime.
    pub fn open() -> io::Result<Self> {
        Notices::open(NETLINK_NETFILTER, &[NFTABLES_GROUP], |_| {}).map(Self)
    }

    /// Returns when a chain has come or gone, having consumed all notices.
    pub async fn changed(&self) -> io::Result<()> {
        let is_chain = |datagram: &[u8]| split(datagram).any(|notice| firewall::is_of_chain(notice.kind));
        self.0.any(is_chain).await
    }
}

#[derive(Debug)]
struct Notices {
    socket: Socket,
    /// A second descriptor of the same socket.
    readiness: AsyncFd<OwnedFd>,
}

impl Notices {
    fn open(protocol: isize, groups: &[u32], configure: impl FnOnce(&mut Socket)) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        socket.set_non_blocking(true)?;
        for &group in groups {
            socket.add_membership(group)?;
        }
        configure(&mut socket);
        let readiness = sys::watch_readable(socket.as_fd().try_clone_to_owned()?)?;
        Ok(Self { socket, readiness })
    }

    /// Consumes notices until there are none left and one of them counted.
    async fn any(&self, counts: impl Fn(&[u8]) -> bool) -> io::Result<()> {
        let mut buffer = Vec::with_capacity(NOTICE_AT_MOST);
        loop {
            let mut guard = self.readiness.readable().await?;
            let mut found = false;
            loop {
                buffer.clear();
                match self.socket.recv(&mut buffer, 0) {
                    Ok(_) => found |= counts(&buffer),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => found = true,
                    Err(error) => return Err(error),
                }
            }
            guard.clear_ready();
            if found {
                return Ok(());
            }
        }
    }
}

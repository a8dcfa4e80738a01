//! Connected UDP sockets of this host that the socket hooks led to an endpoint which is gone: no packet of theirs would
//! tell, because they know the endpoint alone. They are destroyed, so that their processes hear of it.
//!
//! TCP sockets are left alone: a connection outlives the choice of its endpoint. Those in pods' namespaces cannot be
//! seen from here; the datapath answers their datagrams (`dataplane_common::begin::given`).

use std::{collections::BTreeSet, io, net::SocketAddr};

use crate::{
    netlink::{
        socket::RequestSocket,
        sockets::{connected, destroy, probe, unable},
    },
    store::{Store, sockets::GivenSockets},
    sync::{self, Report},
};

use super::Agent;

/// The way to them; without it, sockets stay connected to endpoints that are gone.
#[derive(Debug)]
pub struct HostSockets {
    given: GivenSockets,
    netlink: RequestSocket,
    /// To be looked at again: a connect may have been under way.
    again: BTreeSet<SocketAddr>,
    /// Those of them that were lost before the wait for a grace period began.
    waiting: BTreeSet<SocketAddr>,
}

impl HostSockets {
    /// Fails where the kernel cannot end sockets.
    pub fn new(given: GivenSockets) -> io::Result<Self> {
        let mut netlink = RequestSocket::open_sock_diag()?;
        probe(&mut netlink)?;
        Ok(Self {
            given,
            netlink,
            again: BTreeSet::new(),
            waiting: BTreeSet::new(),
        })
    }

    /// Ends the sockets that were given one of these endpoints, where it serves their Service no longer.
    pub(super) fn end(&mut self, lost: BTreeSet<SocketAddr>, store: &dyn Store) {
        if !lost.is_empty() {
            self.sweep(|peer| lost.contains(&peer), store);
            self.again.extend(lost);
        }
    }

    /// To be called before a grace period.
    pub(super) fn begin_wait(&mut self) {
        self.waiting.append(&mut self.again);
    }

    /// The same for those that were being connected meanwhile. After the grace period.
    pub(super) fn end_late_ones(&mut self, store: &dyn Store) {
        let lost = std::mem::take(&mut self.waiting);
        if !lost.is_empty() {
            self.sweep(|peer| lost.contains(&peer), store);
        }
    }

    /// The same for all that were lost while no agent ran.
    pub(super) fn end_all(&mut self, store: &dyn Store) {
        self.sweep(|_| true, store);
    }

    fn sweep(&mut self, is_meant: impl Fn(SocketAddr) -> bool, store: &dyn Store) {
        let mut ended = 0;
        match self.try_sweep(is_meant, store, &mut ended) {
            Ok(()) if ended > 0 => {
                tracing::info!(
                    sockets = ended,
                    "ended connected UDP sockets whose endpoint is gone"
                );
            }
            Ok(()) => {}
            Err(error) => tracing::warn!("failed to end UDP sockets whose endpoint is gone: {error}"),
        }
    }

    fn try_sweep(
        &mut self,
        is_meant: impl Fn(SocketAddr) -> bool,
        store: &dyn Store,
        ended: &mut usize,
    ) -> io::Result<()> {
        for socket in connected(&mut self.netlink)? {
            let peer = socket.peer();
            if is_meant(peer)
                && let Some(given) = self.given.backend(socket.cookie(), peer)?
                && !sync::serves(store, given)
            {
                *ended += usize::from(destroy(&mut self.netlink, &socket)?);
            }
        }
        Ok(())
    }
}

/// `None` where the kernel cannot end sockets, which is logged.
pub(super) fn open(given: GivenSockets) -> Option<HostSockets> {
    HostSockets::new(given)
        .inspect_err(|error| tracing::warn!("{}", unable(error)))
        .ok()
}

impl Agent {
    /// Ends the sockets that a run has left without their endpoint.
    pub(super) fn end_sockets(&mut self, report: &Report) {
        let is_first = !self.progress.borrow().started;
        let (Some(sockets), store) = (&mut self.sockets, &*self.store) else {
            return;
        };
        tokio::task::block_in_place(|| {
            if is_first {
                sockets.end_all(store);
            } else {
                sockets.end(report.lost.clone(), store);
            }
        });
    }
}

//! What the tables serve, read as the kernel side reads them: frontend → service → slice of `MAGLEV` → backends; and the backends
//! of each Service, also those that no slice has any more. For commands: no agent has to run.

use std::{collections::BTreeMap, net::SocketAddr};

use dataplane_common::{
    backend::{Backend, backend_flags, backend_state},
    service::{Scope, ServiceHead, TABLE_SIZES},
};

use super::{Store, StoreError};
use crate::{
    compile::FrontendAddr,
    model::Protocol,
    sync::{encode, find_slice},
};

/// A frontend.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TableFrontend {
    /// With the unspecified address: every address of this node.
    pub at: FrontendAddr,
    /// Whether its clients are outside this node.
    pub external: bool,
    /// By address.
    pub backends: Vec<TableBackend>,
    /// Whose it is, as [`encode::owner`] has it.
    pub owner: u32,
    /// Index into `SERVICES`.
    pub service: u32,
}

/// A backend of a frontend.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TableBackend {
    pub addr: SocketAddr,
    /// One of [`backend_state`].
    pub state: u8,
    /// A pod or process of this node.
    pub local: bool,
    /// Slots of its service's table.
    pub slots: u32,
    /// Slots that the table has.
    pub of: u32,
    pub id: u32,
}

impl TableBackend {
    #[must_use]
    pub fn state(&self) -> &'static str {
        state(self.state)
    }

    /// Of new connections, from 0 to 1.
    #[must_use]
    pub fn share(&self) -> f64 {
        f64::from(self.slots) / f64::from(self.of.max(1))
    }
}

/// A backend of a Service, or of a Pod with host ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableEndpoint {
    pub id: u32,
    /// Whose it is, as [`encode::owner`] has it.
    pub owner: u32,
    pub addr: SocketAddr,
    pub proto: Protocol,
    /// One of [`backend_state`].
    pub state: u8,
    /// A pod or process of this node.
    pub local: bool,
}

/// Every endpoint to which connections go or may go on.
pub fn endpoints(store: &dyn Store) -> Result<Vec<TableEndpoint>, StoreError> {
    let mut endpoints = Vec::new();
    for id in 0..store.limits().backends {
        let backend = store.read_backend(id)?;
        let Some(owned) =
            encode::owned_backend(&backend).filter(|_| backend.head.state != backend_state::GONE)
        else {
            continue;
        };
        endpoints.push(TableEndpoint {
            id,
            owner: owned.owner,
            addr: SocketAddr::new(owned.key.addr, owned.key.port),
            proto: owned.key.proto,
            state: backend.head.state,
            local: is_local(&backend),
        });
    }
    Ok(endpoints)
}

fn is_local(backend: &Backend) -> bool {
    backend.head.flags & (backend_flags::LOCAL | backend_flags::HOST) != 0
}

/// A [`backend_state`] in a word.
#[must_use]
pub fn state(state: u8) -> &'static str {
    match state {
        backend_state::ACTIVE => "active",
        backend_state::DRAINING => "draining",
        backend_state::SERVING => "serving",
        _ => "gone",
    }
}

/// Every frontend, by address, port, protocol and clients. An answer to echo requests is none.
pub fn read(store: &dyn Store) -> Result<Vec<TableFrontend>, StoreError> {
    let mut frontends = Vec::new();
    for (key, value) in store.frontends()? {
        let Some((at, scope)) = encode::frontend_addr(&key) else {
            continue;
        };
        if value.service >= store.limits().services {
            continue;
        }
        let mut backends = backends(store, store.read_service(value.service)?.head)?;
        backends.sort();
        frontends.push(TableFrontend {
            at,
            external: scope == Scope::External,
            backends,
            owner: value.owner,
            service: value.service,
        });
    }
    frontends.sort();
    Ok(frontends)
}

/// The backends of a slice. One that is changed at this moment may show some of both states.
fn backends(store: &dyn Store, head: ServiceHead) -> Result<Vec<TableBackend>, StoreError> {
    let of = TABLE_SIZES[usize::from(head.size_class & 15)];
    let Some(slice) = find_slice(store, head)? else {
        return Ok(Vec::new());
    };
    let mut words = vec![0; slice.len as usize];
    store.read_maglev(slice.start, &mut words)?;
    let (ids, slots) = words.split_at((head.slots_offset - slice.start) as usize);
    let ids = encode::slice_ids(ids);
    let mut shares: BTreeMap<u32, u32> = ids.iter().map(|id| (*id, 0)).collect();
    for slot in 0..of as usize {
        let number = (slots[slot / 4] >> (slot % 4 * 16)) as u16;
        if let Some(share) = ids.get(usize::from(number)).and_then(|id| shares.get_mut(id)) {
            *share += 1;
        }
    }
    let limit = store.limits().backends;
    shares
        .into_iter()
        .filter(|(id, _)| *id < limit)
        .map(|(id, slots)| {
            let backend = store.read_backend(id)?;
            let is_ipv6 = backend.head.flags & backend_flags::IPV6 != 0;
            Ok(TableBackend {
                addr: SocketAddr::new(
                    encode::ip(backend.addr_be, is_ipv6),
                    u16::from_be(backend.head.port_be),
                ),
                state: backend.head.state,
                local: is_local(&backend),
                slots,
                of,
                id,
            })
        })
        .collect()
}

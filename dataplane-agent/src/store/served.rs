//! What the tables serve, read as the kernel side reads them: frontend → service → slice of `MAGLEV` → backends. For commands:
//! no agent has to run.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use dataplane_common::{
    addr::proto,
    backend::{backend_flags, backend_state},
    service::{Scope, ServiceHead, TABLE_SIZES, service_flags},
};

use super::{FrontendKey, Store, StoreError};
use crate::sync::encode;

/// A frontend.
#[expect(
    clippy::struct_excessive_bools,
    reason = "as many independent flags of its service"
)]
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TableFrontend {
    /// Unspecified: every address of this node.
    pub addr: IpAddr,
    pub port: u16,
    pub proto: u8,
    /// Whether its clients are outside this node.
    pub external: bool,
    /// Where it has no backends: its packets are dropped, not refused.
    pub drops: bool,
    pub affinity: bool,
    /// Source ranges decide who may use it.
    pub ranges: bool,
    /// By address.
    pub backends: Vec<TableBackend>,
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
}

impl TableBackend {
    #[must_use]
    pub fn state(&self) -> &'static str {
        match self.state {
            backend_state::ACTIVE => "active",
            backend_state::DRAINING => "draining",
            backend_state::SERVING => "serving",
            _ => "gone",
        }
    }
}

/// Every frontend, by address, port, protocol and clients. An answer to echo requests is none.
pub fn read(store: &dyn Store) -> Result<Vec<TableFrontend>, StoreError> {
    let mut frontends = Vec::new();
    for (key, value) in store.frontends()? {
        let (addr, port_be, proto, scope) = match key {
            FrontendKey::V4(key) => (
                IpAddr::from(key.addr_be.to_ne_bytes()),
                key.port_be,
                key.proto,
                key.scope,
            ),
            FrontendKey::V6(key) => (
                IpAddr::from(bytemuck::cast::<_, [u8; 16]>(key.addr_be)),
                key.port_be,
                key.proto,
                key.scope,
            ),
        };
        if matches!(proto, proto::ICMP | proto::ICMPV6) || value.service >= store.limits().services {
            continue;
        }
        let head = store.read_service(value.service)?.head;
        let has = |flag| head.flags & flag != 0;
        let mut frontend = TableFrontend {
            addr,
            port: u16::from_be(port_be),
            proto,
            external: scope == Scope::External as u8,
            drops: has(service_flags::DROP_WHEN_EMPTY),
            affinity: has(service_flags::AFFINITY),
            ranges: has(service_flags::RANGES),
            backends: backends(store, head)?,
        };
        frontend.backends.sort();
        frontends.push(frontend);
    }
    frontends.sort();
    Ok(frontends)
}

/// The backends of a slice. One that is changed at this moment may show some of both states.
fn backends(store: &dyn Store, head: ServiceHead) -> Result<Vec<TableBackend>, StoreError> {
    let of = TABLE_SIZES[usize::from(head.size_class & 15)];
    let end = head
        .slots_offset
        .saturating_add(encode::slot_words(head.size_class));
    if head.size_class == 0 || head.slots_offset == 0 || end > store.limits().maglev {
        return Ok(Vec::new());
    }
    let mut count = [0];
    store.read_maglev(head.slots_offset - 1, &mut count)?;
    let slice = usize::try_from(count[0])
        .ok()
        .and_then(|ids| encode::slice_at(head.slots_offset, ids, head.size_class));
    let Some(slice) = slice else {
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
                local: backend.head.flags & (backend_flags::LOCAL | backend_flags::HOST) != 0,
                slots,
                of,
            })
        })
        .collect()
}

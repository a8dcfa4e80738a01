//! Services as a new flow meets them: whose address it is, and who is chosen how often.

use std::net::{IpAddr, SocketAddr};

use dataplane_common::{
    addr::{Tuple, V4, V6},
    backend::backend_state,
    balance::{find_service, flow_hash, slot_of},
    device::own_flags,
    service::{Scope, TABLE_SIZES},
    tables::Env,
};

use super::World;
use crate::sync::encode;

/// What a service chooses from.
#[derive(Debug)]
pub struct Choice {
    /// Ids of backends.
    pub ids: Vec<u32>,
    /// A number in `ids` for each slot of the Maglev table.
    slots: Vec<u16>,
}

impl World {
    /// The index of the service at an address and port.
    pub fn find_service(&self, at: SocketAddr, proto: u8, scope: Scope) -> Option<u32> {
        let addr = encode::any_addr(at.ip());
        let port_be = at.port().to_be();
        match at {
            SocketAddr::V4(_) => {
                find_service::<V4, _>(self, addr[0], port_be, proto, scope, own_flags::NODE_PORT)
            }
            SocketAddr::V6(_) => {
                find_service::<V6, _>(self, addr, port_be, proto, scope, own_flags::NODE_PORT)
            }
        }
    }

    /// What a service chooses from; empty where it has no endpoint.
    pub fn choice(&self, service: u32) -> Choice {
        let mut choice = Choice {
            ids: Vec::new(),
            slots: Vec::new(),
        };
        let Some(head) = self.service_head(service).filter(|head| head.size_class != 0) else {
            return choice;
        };
        let size = TABLE_SIZES[usize::from(head.size_class & 15)];
        let word = |index: u32| self.maglev(index).unwrap_or_default();
        let lanes = |index: u32| bytemuck::cast::<u64, [u16; 4]>(word(index).to_le());
        let count = word(head.slots_offset.wrapping_sub(1)).min(u64::from(u16::MAX) + 1) as u32;
        choice.ids.extend((0..count).map(|number| {
            let ids = word(head.slots_offset.wrapping_sub(2).wrapping_sub(number >> 1));
            (ids >> ((number & 1) * 32)) as u32
        }));
        for index in 0..size.div_ceil(4) {
            choice
                .slots
                .extend(lanes(head.slots_offset.wrapping_add(index)).map(u16::from_le));
        }
        choice.slots.truncate(size as usize);
        choice
    }

    /// Where a backend is, unless it is gone.
    pub fn backend_at(&self, id: u32) -> Option<SocketAddr> {
        let backend = self.backend(id)?;
        let is_v6 = backend.head.flags & dataplane_common::backend::backend_flags::IPV6 != 0;
        let addr = encode::ip(backend.addr_be, is_v6);
        (backend.head.state != backend_state::GONE)
            .then(|| SocketAddr::new(addr, u16::from_be(backend.head.port_be)))
    }
}

impl Choice {
    pub fn slots(&self) -> u32 {
        self.slots.len() as u32
    }

    /// How many slots each backend has, in the order of `ids`.
    pub fn shares(&self) -> Vec<u32> {
        let mut shares = vec![0; self.ids.len()];
        for number in &self.slots {
            if let Some(share) = shares.get_mut(usize::from(*number)) {
                *share += 1;
            }
        }
        shares
    }

    /// The number in `ids` of who gets a flow of a service without affinity.
    pub fn of_flow(&self, from: SocketAddr, to: SocketAddr, proto: u8) -> Option<usize> {
        let (src, dst) = (encode::any_addr(from.ip()), encode::any_addr(to.ip()));
        let (sport_be, dport_be) = (from.port().to_be(), to.port().to_be());
        let hash = if from.is_ipv4() {
            let tuple = Tuple {
                src: src[0],
                dst: dst[0],
                sport_be,
                dport_be,
            };
            flow_hash::<V4>(&tuple, proto)
        } else {
            let tuple = Tuple {
                src,
                dst,
                sport_be,
                dport_be,
            };
            flow_hash::<V6>(&tuple, proto)
        };
        self.slots
            .get(slot_of(hash, self.slots()) as usize)
            .map(|number| usize::from(*number))
    }

    /// For each backend a source port from `first` on that leads to it, where there is one.
    pub fn source_ports(&self, from: IpAddr, first: u16, to: SocketAddr, proto: u8) -> Vec<Option<u16>> {
        let mut ports = vec![None; self.ids.len()];
        let mut missing = ports.len();
        for port in first..=u16::MAX {
            if missing == 0 {
                break;
            }
            let number = self.of_flow(SocketAddr::new(from, port), to, proto);
            if let Some(slot) = number.and_then(|number| ports.get_mut(number))
                && slot.is_none()
            {
                *slot = Some(port);
                missing -= 1;
            }
        }
        ports
    }
}

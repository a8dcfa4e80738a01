//! Services as a new flow meets them: whose address it is, and who is chosen how often.

use std::net::{IpAddr, SocketAddr};

use dataplane_common::{
    addr::{Family, Tuple, V4, V6},
    backend::backend_state,
    balance::{find_service, flow_hash, slot_of},
    device::own_flags,
    service::{Scope, TABLE_SIZES, service_flags},
    tables::{Env, Tables},
};

use super::{MapFamily, World};
use crate::sync::encode;

/// What a service chooses from.
#[derive(Debug)]
pub struct Choice {
    /// Ids of backends.
    pub ids: Vec<u32>,
    /// A number in `ids` for each slot of the Maglev table.
    slots: Vec<u16>,
}

/// The endpoint of a client of a service with session affinity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OfClient {
    /// This backend, as it is remembered.
    Remembered(u32),
    /// Nobody remembers the client: its address alone leads it to the backend with this number in [`Choice::ids`].
    ByAddress(usize),
    /// It comes too late, and its flow decides.
    ByFlow,
}

impl World {
    /// Which endpoint a client of a service with session affinity gets, as the datapath chooses it.
    pub fn kept(&self, index: u32, choice: &Choice, client: IpAddr) -> Option<OfClient> {
        let words = encode::any_addr(client);
        match client {
            IpAddr::V4(_) => self.kept_as::<V4>(index, choice, words[0]),
            IpAddr::V6(_) => self.kept_as::<V6>(index, choice, words),
        }
    }

    fn kept_as<F: MapFamily>(&self, index: u32, choice: &Choice, client: F::Addr) -> Option<OfClient> {
        let service = self.service(index)?;
        // The clients of a service port are known by one of its entries.
        let owner = match service.head.flags & service_flags::AFFINITY_SHARED {
            0 => index,
            _ => service.affinity,
        };
        let clients_of = self.service(owner)?;
        let key = F::affinity_key(owner, clients_of.head.generation, client);
        let known = Tables::<F>::affinity(self, &key);
        if let Some(known) = known {
            let age = self.now_eighths().wrapping_sub(known.seen_eighths);
            if age.cast_signed() > clients_of.affinity.cast_signed() {
                return Some(OfClient::ByFlow);
            }
            let backend = self.backend_head(known.backend);
            let is_same = backend.is_some_and(|backend| backend.generation == known.backend_generation);
            if is_same && choice.ids.contains(&known.backend) {
                return Some(OfClient::Remembered(known.backend));
            }
        }
        choice.of_client::<F>(client).map(OfClient::ByAddress)
    }

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
        self.at(hash)
    }

    /// The number in `ids` of who gets a client of a service with affinity that nobody remembers, whatever its flow.
    fn of_client<F: Family>(&self, client: F::Addr) -> Option<usize> {
        let tuple = Tuple {
            src: client,
            ..Tuple::default()
        };
        self.at(flow_hash::<F>(&tuple, 0))
    }

    /// The number in `ids` that a hash falls to.
    fn at(&self, hash: u32) -> Option<usize> {
        let slot = self.slots.get(slot_of(hash, self.slots()) as usize)?;
        Some(usize::from(*slot))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_that_nobody_remembers_is_led_by_its_address_alone() {
        let choice = Choice {
            ids: vec![7, 8, 9],
            slots: (0..251).map(|slot| slot % 3).collect(),
        };
        let mut met = [false; 3];
        for last in 0..64 {
            let number = choice.of_client::<V4>(u32::from_ne_bytes([10, 244, 1, last]));
            // As of a flow of no protocol without ports to nowhere.
            let from: SocketAddr = ([10, 244, 1, last], 0).into();
            assert_eq!(number, choice.of_flow(from, ([0, 0, 0, 0], 0).into(), 0));
            met[number.unwrap()] = true;
        }
        assert_eq!(met, [true; 3]);
    }
}

//! From our own types to the tables' entries and back.

use std::{hash::Hasher, net::IpAddr};

use dataplane_common::{
    addr::{AnyAddr, proto},
    backend::{Backend, BackendHead, backend_flags},
    service::{
        ECHO_PORT, FrontendKey4, FrontendKey6, Scope, Service, ServiceHead, TABLE_SIZES, service_flags,
    },
};

use siphasher::sip::SipHasher24;

use super::{arena::Slice, backends::OwnedBackend};
use crate::{
    compile::{BackendKey, FrontendAddr},
    host::PodInterface,
    model::{Kind, ObjectRef, Protocol},
    store::FrontendKey,
};

pub fn any_addr(addr: IpAddr) -> AnyAddr {
    match addr {
        IpAddr::V4(addr) => [u32::from(addr).to_be(), 0, 0, 0],
        IpAddr::V6(addr) => words(addr.octets()),
    }
}

fn words(octets: [u8; 16]) -> [u32; 4] {
    bytemuck::cast(octets)
}

pub fn ip(addr: AnyAddr, is_ipv6: bool) -> IpAddr {
    if is_ipv6 {
        IpAddr::from(bytemuck::cast::<[u32; 4], [u8; 16]>(addr))
    } else {
        IpAddr::from(addr[0].to_ne_bytes())
    }
}

pub fn frontend_key(frontend: &FrontendAddr, scope: Scope) -> FrontendKey {
    let FrontendAddr { addr, port, proto } = frontend;
    let (port_be, proto, scope) = (port.to_be(), proto.number(), scope as u8);
    match addr {
        IpAddr::V4(addr) => FrontendKey::V4(FrontendKey4 {
            addr_be: u32::from(*addr).to_be(),
            port_be,
            proto,
            scope,
        }),
        IpAddr::V6(addr) => FrontendKey::V6(FrontendKey6 {
            addr_be: words(addr.octets()),
            port_be,
            proto,
            scope,
        }),
    }
}

/// The key that says that echo requests to an address are answered.
pub fn echo_key(addr: IpAddr, scope: Scope) -> FrontendKey {
    let (port_be, scope) = (ECHO_PORT, scope as u8);
    match addr {
        IpAddr::V4(addr) => FrontendKey::V4(FrontendKey4 {
            addr_be: u32::from(addr).to_be(),
            port_be,
            proto: proto::ICMP,
            scope,
        }),
        IpAddr::V6(addr) => FrontendKey::V6(FrontendKey6 {
            addr_be: words(addr.octets()),
            port_be,
            proto: proto::ICMPV6,
            scope,
        }),
    }
}

/// The way back; `None` for a key that was never ours.
pub fn frontend_addr(key: &FrontendKey) -> Option<(FrontendAddr, Scope)> {
    let (addr, port_be, proto, scope) = match key {
        FrontendKey::V4(key) => (
            IpAddr::from(key.addr_be.to_ne_bytes()),
            key.port_be,
            key.proto,
            key.scope,
        ),
        FrontendKey::V6(key) => (ip(key.addr_be, true), key.port_be, key.proto, key.scope),
    };
    let scopes = [Scope::Internal, Scope::External];
    let scope = scopes.into_iter().find(|known| *known as u8 == scope)?;
    let frontend = FrontendAddr {
        addr,
        port: u16::from_be(port_be),
        proto: protocol(proto)?,
    };
    Some((frontend, scope))
}

/// What the values of frontends and backends say of their owner: the same in every version and after every restart.
pub fn owner(owner: &ObjectRef) -> u32 {
    let ObjectRef { kind, name } = owner;
    let mut hasher = SipHasher24::new();
    if *kind != Kind::Service {
        hasher.write(kind.as_str().as_bytes());
        hasher.write_u8(b' ');
    }
    hasher.write(name.namespace().as_bytes());
    hasher.write_u8(b'/');
    hasher.write(name.name().as_bytes());
    hasher.finish() as u32
}

/// How the clients of a service with affinity are remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Affinity {
    /// Under its own index, for so many seconds.
    Own(u32),
    /// As those of another one.
    Of { index: u32 },
}

impl Affinity {
    /// Bits of `service_flags`.
    pub fn flags(affinity: Option<Self>) -> u8 {
        match affinity {
            None => 0,
            Some(Affinity::Own(_)) => service_flags::AFFINITY,
            Some(Affinity::Of { .. }) => service_flags::AFFINITY | service_flags::AFFINITY_SHARED,
        }
    }
}

/// A service's entry around its head.
pub fn service(frontend: &FrontendAddr, head: ServiceHead, affinity: Option<Affinity>) -> Service {
    let FrontendAddr { addr, port, proto } = frontend;
    Service {
        head,
        addr_be: any_addr(*addr),
        port_be: port.to_be(),
        proto: proto.number(),
        family: if addr.is_ipv4() { 4 } else { 6 },
        affinity: match affinity {
            None => 0,
            Some(Affinity::Own(seconds)) => eighths(seconds),
            Some(Affinity::Of { index }) => index,
        },
    }
}

/// Eighths of a tick (2^27 ns) that are no less than so many seconds. Up to 19 years.
fn eighths(seconds: u32) -> u32 {
    (u64::from(seconds) * 1_000_000_000).div_ceil(1 << 27) as u32
}

/// The address and port that a service's entry is about; `None` for an entry that was never used.
pub fn service_frontend(service: &Service) -> Option<FrontendAddr> {
    Some(FrontendAddr {
        addr: ip(service.addr_be, service.family == 6),
        port: u16::from_be(service.port_be),
        proto: protocol(service.proto)?,
    })
}

/// Whose backend an entry is, and its address and port; `None` for an entry that was never used.
pub fn owned_backend(backend: &Backend) -> Option<OwnedBackend> {
    let flags = backend.head.flags;
    (backend.head.generation != 0).then(|| OwnedBackend {
        key: BackendKey {
            addr: ip(backend.addr_be, flags & backend_flags::IPV6 != 0),
            port: u16::from_be(backend.head.port_be),
            proto: if flags & backend_flags::UDP != 0 {
                Protocol::Udp
            } else {
                Protocol::Tcp
            },
        },
        owner: backend.owner,
    })
}

pub fn protocol(number: u8) -> Option<Protocol> {
    match number {
        proto::TCP => Some(Protocol::Tcp),
        proto::UDP => Some(Protocol::Udp),
        _ => None,
    }
}

/// The name of a protocol that packets have here.
pub fn protocol_name(number: u8) -> Option<&'static str> {
    match number {
        proto::TCP => Some("TCP"),
        proto::UDP => Some("UDP"),
        proto::SCTP => Some("SCTP"),
        proto::ICMP => Some("ICMP"),
        proto::ICMPV6 => Some("ICMPv6"),
        _ => None,
    }
}

/// Where a backend is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whereabouts<'a> {
    /// In this host's own network namespace.
    Host,
    /// A pod of this node, with its interface once that is known.
    Local(Option<&'a PodInterface>),
    Remote,
}

pub fn backend(backend: &OwnedBackend, generation: u32, state: u8, place: Whereabouts<'_>) -> Backend {
    let OwnedBackend { key, owner } = backend;
    let mut flags = 0;
    if key.addr.is_ipv6() {
        flags |= backend_flags::IPV6;
    }
    if key.proto == Protocol::Udp {
        flags |= backend_flags::UDP;
    }
    let interface = match place {
        Whereabouts::Host => {
            flags |= backend_flags::HOST;
            None
        }
        Whereabouts::Local(interface) => {
            flags |= backend_flags::LOCAL;
            interface
        }
        Whereabouts::Remote => None,
    };
    if interface.is_some_and(|interface| interface.fast_path) {
        flags |= backend_flags::FAST_PATH;
    }
    Backend {
        head: BackendHead {
            generation,
            port_be: key.port.to_be(),
            state,
            flags,
        },
        addr_be: any_addr(key.addr),
        ifindex: interface.map_or(0, |interface| interface.ifindex),
        pod_mac: interface.map_or_else(Default::default, |interface| interface.pod_mac),
        host_mac: interface.map_or_else(Default::default, |interface| interface.host_mac),
        owner: *owner,
        unused: 0,
    }
}

/// Elements that a list of ids takes, with the one that says how many they are.
fn id_words(ids: usize) -> u32 {
    ids.div_ceil(2) as u32 + 1
}

/// Elements that the slots of a table take.
pub fn slot_words(class: u8) -> u32 {
    TABLE_SIZES[usize::from(class & 15)].div_ceil(4)
}

/// Elements of a slice.
pub fn slice_len(ids: usize, class: u8) -> u32 {
    id_words(ids) + slot_words(class)
}

/// Where the slots begin in a slice.
pub fn slots_offset(slice: Slice, ids: usize) -> u32 {
    slice.start + id_words(ids)
}

/// The slice that begins so many ids before its slots; `None` when it would begin before the table.
pub fn slice_at(slots_offset: u32, ids: usize, class: u8) -> Option<Slice> {
    Some(Slice {
        start: slots_offset.checked_sub(id_words(ids))?,
        len: slice_len(ids, class),
    })
}

/// Makes `words` the elements of a slice, in the layout that [`Service`] documents: ids backwards from the slots. `slots` number the
/// ids as they stand in `ids`, the slice in ascending order.
pub fn slice_words(words: &mut Vec<u64>, ids: &[u32], slots: &[u16]) {
    let mut order: Vec<u16> = (0..ids.len()).map(|number| number as u16).collect();
    order.sort_unstable_by_key(|&number| ids[usize::from(number)]);
    let mut number_of = vec![0u64; ids.len()];
    for (place, &number) in order.iter().enumerate() {
        number_of[usize::from(number)] = place as u64;
    }
    let id = |number: &u16| u64::from(ids[usize::from(*number)]);
    words.clear();
    words.extend(
        order
            .chunks(2)
            .map(|pair| id(&pair[0]) | pair.get(1).map_or(0, id) << 32),
    );
    words.reverse();
    words.push(ids.len() as u64);
    words.extend(slots.chunks(4).map(|four| {
        four.iter().enumerate().fold(0, |word, (lane, slot)| {
            word | number_of[usize::from(*slot)] << (lane * 16)
        })
    }));
}

/// The ids of a slice, ascending. `words` is what comes before its slots; what makes no sense has none.
pub fn slice_ids(words: &[u64]) -> Vec<u32> {
    let Some((count, pairs)) = words.split_last() else {
        return Vec::new();
    };
    let ids = pairs
        .iter()
        .rev()
        .flat_map(|pair| [*pair as u32, (*pair >> 32) as u32]);
    ids.take(usize::try_from(*count).unwrap_or(0)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_reads_as_it_was_written() {
        for ids in [vec![7], vec![9, 7], vec![2, 3, 1]] {
            let slots: Vec<u16> = (0..101).map(|slot| slot % ids.len() as u16).collect();
            let mut words = Vec::new();
            slice_words(&mut words, &ids, &slots);
            assert_eq!(words.len() as u32, slice_len(ids.len(), 1));
            let slots_at = words.len() - slot_words(1) as usize;
            assert_eq!(words[slots_at - 1], ids.len() as u64);
            let listed = slice_ids(&words[..slots_at]);
            let mut sorted = ids.clone();
            sorted.sort_unstable();
            assert_eq!(listed, sorted);
            for (slot, number) in slots.iter().enumerate() {
                let place = words[slots_at + slot / 4] >> (slot % 4 * 16) & 0xffff;
                assert_eq!(listed[place as usize], ids[usize::from(*number)]);
            }
        }
    }

    #[test]
    fn a_timeout_is_never_cut_short() {
        assert_eq!(eighths(1), 8);
        for seconds in [1, 10_800, 86_400] {
            assert!(u64::from(eighths(seconds)) << 27 >= u64::from(seconds) * 1_000_000_000);
        }
    }

    #[test]
    fn addresses_are_in_network_order() {
        assert_eq!(
            any_addr("10.96.0.1".parse().unwrap())[0].to_ne_bytes(),
            [10, 96, 0, 1]
        );
        let v6: IpAddr = "fd00::1".parse().unwrap();
        assert_eq!(ip(any_addr(v6), true), v6);
    }
}

//! From a service's address to one of its backends: frontend → service → Maglev slot → backend.

use crate::{
    addr::{Family, Tuple},
    service::{Scope, ServiceHead, TABLE_SIZES, port_set_index},
    tables::{Env, Tables},
};

/// The hash by which a flow chooses its slot: the same on every node, so that a flow which arrives at another node
/// meets the same backend.
#[inline(always)]
pub fn flow_hash<F: Family>(tuple: &Tuple<F::Addr>, proto: u8) -> u32 {
    // Multiply and fold (wyhash's round) over the addresses and ports: two multiplications for IPv4.
    const A: u64 = 0xa076_1d64_78bd_642f;
    const B: u64 = 0xe703_7ed1_a0b4_28db;
    let mut hash = A ^ u64::from(proto);
    let src = F::words(&tuple.src);
    let dst = F::words(&tuple.dst);
    let mut i = 0;
    while i < src.len() && i < dst.len() {
        let word = u64::from(src[i]) << 32 | u64::from(dst[i]);
        hash = (hash ^ word).wrapping_mul(B);
        hash ^= hash >> 32;
        i += 1;
    }
    hash = (hash ^ (u64::from(tuple.sport_be) << 16 | u64::from(tuple.dport_be))).wrapping_mul(A);
    hash ^= hash >> 29;
    hash = hash.wrapping_mul(B);
    (hash >> 32) as u32
}

/// The service at a destination, if there is one: the exact address first, then node ports on own addresses.
#[inline(always)]
pub fn find_service<F: Family, T: Tables<F> + Env>(
    tables: &T,
    dst: F::Addr,
    dport_be: u16,
    proto: u8,
    scope: Scope,
) -> Option<u32> {
    let port = u16::from_be(dport_be);
    let ports = tables.ports(port_set_index(proto, port));
    let bit = 1u64 << (port & 63);
    if ports.any & bit == 0 {
        return None;
    }
    if let Some(service) = tables.frontend(&F::frontend_key(dst, dport_be, proto, scope)) {
        return Some(service);
    }
    if ports.wildcard & bit == 0 || tables.own_address(dst) & crate::device::own_flags::NODE_PORT == 0 {
        return None;
    }
    tables.frontend(&F::frontend_key(F::Addr::default(), dport_be, proto, scope))
}

/// The backend id that `hash` falls to, in the layout that [`crate::service::Service`] documents. `None` when the
/// slice is out of range.
#[inline(always)]
pub fn choose<T: Env>(tables: &T, head: ServiceHead, hash: u32) -> Option<u32> {
    let size = TABLE_SIZES[usize::from(head.size_class & 15)];
    // The hash is uniform, so a multiplication picks a slot as evenly as a remainder, and costs less.
    let slot = ((u64::from(hash) * u64::from(size)) >> 32) as u32;
    let word = tables.maglev(head.slots_offset.wrapping_add(slot >> 2))?;
    let number = (word >> ((slot & 3) * 16)) as u32 & 0xffff;
    let word = tables.maglev(head.slots_offset.wrapping_sub(1).wrapping_sub(number >> 1))?;
    Some((word >> ((number & 1) * 32)) as u32)
}

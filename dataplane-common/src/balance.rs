//! From a service's address to one of its backends: frontend → service → Maglev slot → backend.

use crate::{
    addr::{Family, Tuple},
    config::is_over,
    pipeline::{Work, World},
    service::{Affinity, Scope, ServiceHead, TABLE_SIZES, port_set_index, service_flags},
    tables::{Env, Tables},
};

// Of wyhash's round: multiply and fold.
const A: u64 = 0xa076_1d64_78bd_642f;
const B: u64 = 0xe703_7ed1_a0b4_28db;

/// The hash by which a flow chooses its slot: the same on every node, so that a flow which arrives at another node
/// meets the same backend.
#[inline(always)]
pub fn flow_hash<F: Family>(tuple: &Tuple<F::Addr>, proto: u8) -> u32 {
    // Over the addresses and ports: three multiplications for IPv4.
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

/// The hash by which a socket chooses its slot. Cookies count up, and one multiplication would make steps of one length of that,
/// as Maglev's permutations are: a backend whose step is the same would get many sockets in a row, and another one none.
#[inline(always)]
pub fn cookie_hash(cookie: u64) -> u32 {
    let hash = cookie.wrapping_mul(A);
    ((hash ^ hash >> 32).wrapping_mul(B) >> 32) as u32
}

/// The service at a destination, if there is one: the exact address first, then node ports on own addresses that have
/// one of the flags `node_port_flags` ([`own_flags`](crate::device::own_flags)).
#[inline(always)]
pub fn find_service<F: Family, T: Tables<F> + Env>(
    tables: &T,
    dst: F::Addr,
    dport_be: u16,
    proto: u8,
    scope: Scope,
    node_port_flags: u32,
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
    if ports.wildcard & bit == 0 || tables.own_address(dst) & node_port_flags == 0 {
        return None;
    }
    tables.frontend(&F::frontend_key(F::Addr::default(), dport_be, proto, scope))
}

/// The slot of a table of so many that a hash falls to. The hash is uniform, so a multiplication picks one as evenly as a
/// remainder, and costs less.
#[inline(always)]
pub const fn slot_of(hash: u32, size: u32) -> u32 {
    ((hash as u64 * size as u64) >> 32) as u32
}

/// The backend id that `hash` falls to, in the layout that [`crate::service::Service`] documents. `None` when the
/// slice is out of range.
#[inline(always)]
pub fn choose<T: Env>(tables: &T, head: ServiceHead, hash: u32) -> Option<u32> {
    let size = TABLE_SIZES[usize::from(head.size_class & 15)];
    let slot = slot_of(hash, size);
    let word = tables.maglev(head.slots_offset.wrapping_add(slot >> 2))?;
    let number = (word >> ((slot & 3) * 16)) as u32 & 0xffff;
    id_at(tables, head, number)
}

/// Number `number` of the list of backend ids.
#[inline(always)]
fn id_at<T: Env>(tables: &T, head: ServiceHead, number: u32) -> Option<u32> {
    let word = tables.maglev(head.slots_offset.wrapping_sub(2).wrapping_sub(number >> 1))?;
    Some((word >> ((number & 1) * 32)) as u32)
}

/// Whether a backend is one of those that the service chooses from. By halving: bit by bit, the highest number whose id
/// is not above.
///
/// How many ids there are is read anew for each bit, and the number forgotten: of one that it has compared or composed
/// before, the verifier knows enough to follow each way through the loop.
#[inline(always)]
fn has_backend<T: Env>(tables: &T, head: ServiceHead, id: u32) -> bool {
    let mut number = 0u32;
    for bit in 0..16u32 {
        let next = number | 0x8000 >> bit;
        let Some(count) = tables.maglev(head.slots_offset.wrapping_sub(1)) else {
            return false;
        };
        if next < count as u32 {
            let Some(found) = id_at(tables, head, next) else {
                return false;
            };
            if found <= id {
                number = next;
            }
        }
        number = tables.forget(number);
    }
    id_at(tables, head, number) == Some(id)
}

/// In place of a backend id: none.
pub const NO_BACKEND: u32 = u32::MAX;

/// The backend of a client of a service with affinity: the one that it had, by whichever frontend of the service port, if it came back in time and that is still
/// chosen from, else a new one, which is remembered. A client that nobody remembers is led by its address alone, to the
/// same backend on every node; one that comes too late by its flow, so that it may meet another than before.
/// [`NO_BACKEND`] when the slice is out of range.
#[inline(always)]
pub(crate) fn choose_for_client<F: Family, W: World<F>>(world: &W, work: &Work<F>, head: ServiceHead) -> u32 {
    let mut tuple = work.headers.tuple;
    let mut owner = work.service;
    let mut generation = head.generation;
    if head.flags & service_flags::AFFINITY_SHARED != 0 {
        owner = world.service_affinity(work.service);
        let Some(head) = world.service_head(owner) else {
            return NO_BACKEND;
        };
        generation = head.generation;
    }
    let key = F::affinity_key(owner, generation, tuple.src);
    let now = world.now_eighths();
    let known = world.affinity(&key);
    let is_late = known.is_some_and(|known| is_over(now, known.seen_eighths, world.service_affinity(owner)));
    if !is_late
        && let Some(known) = known
        && let Some(backend) = world.backend_head(known.backend)
        && backend.generation == known.backend_generation
        && has_backend(world, head, known.backend)
    {
        if known.seen_eighths != now {
            world.touch_affinity(&key, now);
        }
        return known.backend;
    }
    if !is_late {
        tuple.dst = F::Addr::default();
        tuple.sport_be = 0;
        tuple.dport_be = 0;
    }
    let Some(id) = choose(world, head, flow_hash::<F>(&tuple, 0)) else {
        return NO_BACKEND;
    };
    if let Some(backend) = world.backend_head(id) {
        let affinity = Affinity {
            backend: id,
            backend_generation: backend.generation,
            seen_eighths: now,
        };
        world.put_affinity(&key, &affinity);
    }
    id
}

//! Socket hooks: a process that connects or sends to a service is given a backend before there is a packet.
//!
//! IPv4-mapped addresses on IPv6 sockets are looked up, and written back, as IPv4.

use core::ptr;

use aya_ebpf::{
    bindings::bpf_sock_addr,
    btf_maps::LruHashMap,
    helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_set_retval},
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use dataplane_common::{
    addr::{Family, V4, V6, proto},
    backend::{Backend, backend_state},
    balance::{NO_BACKEND, choose, cookie_hash, find_service},
    config::config_flags,
    device::own_flags,
    reason::Reason,
    service::{Scope, service_flags},
    sock::{SockAddr4, SockAddr6, SockBackend, SockKey4, SockKey6, SockService},
    tables::{Env, Tables},
};

use crate::{
    maps::{COUNTERS, SOCK_CHOSEN, SOCK_REVERSE_V4, SOCK_REVERSE_V6},
    traffic,
    world::{Aligned, World, config},
};

/// What the kernel does next with the system call.
const PROCEED: i32 = 1;
const REFUSE: i32 = 0;
/// `-ECONNREFUSED`, `-EPERM`.
const REFUSED: i32 = -111;
const NOT_PERMITTED: i32 = -1;
/// The third word of an IPv4-mapped address (RFC 4291, section 2.5.5.2).
const MAPPED: u32 = 0xffffu32.to_be();

/// The socket's destination, as the hook shows it.
#[derive(Clone, Copy)]
enum Destination {
    V4(u32),
    V6([u32; 4]),
}

impl Destination {
    #[inline(always)]
    fn is_loopback(&self) -> bool {
        match self {
            Self::V4(addr) => V4::is_loopback(addr),
            Self::V6(addr) => V6::is_loopback(addr),
        }
    }
}

#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    forward(ctx.sock_addr, false, true)
}
#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    forward(ctx.sock_addr, true, true)
}
#[cgroup_sock_addr(sendmsg4)]
pub fn sendmsg4(ctx: SockAddrContext) -> i32 {
    forward(ctx.sock_addr, false, false)
}
#[cgroup_sock_addr(sendmsg6)]
pub fn sendmsg6(ctx: SockAddrContext) -> i32 {
    forward(ctx.sock_addr, true, false)
}
#[cgroup_sock_addr(recvmsg4)]
pub fn recvmsg4(ctx: SockAddrContext) -> i32 {
    reverse(ctx.sock_addr, false)
}
#[cgroup_sock_addr(recvmsg6)]
pub fn recvmsg6(ctx: SockAddrContext) -> i32 {
    reverse(ctx.sock_addr, true)
}
#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    reverse(ctx.sock_addr, false)
}
#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    reverse(ctx.sock_addr, true)
}

#[inline(always)]
fn destination(ctx: *mut bpf_sock_addr, v6: bool) -> Destination {
    // SAFETY: the context is valid while the program runs; every field is read by a load of its own.
    unsafe {
        if !v6 {
            return Destination::V4(ptr::read_volatile(&raw const (*ctx).user_ip4));
        }
        let words = &raw const (*ctx).user_ip6;
        let word = |i: usize| ptr::read_volatile(words.cast::<u32>().add(i));
        let addr = [word(0), word(1), word(2), word(3)];
        if addr[0] == 0 && addr[1] == 0 && addr[2] == MAPPED {
            Destination::V4(addr[3])
        } else {
            Destination::V6(addr)
        }
    }
}

#[inline(always)]
fn set_destination(ctx: *mut bpf_sock_addr, v6: bool, destination: Destination, port_be: u16) {
    // SAFETY: as in `destination`; these fields are writable at these hooks.
    unsafe {
        ptr::write_volatile(&raw mut (*ctx).user_port, u32::from(port_be));
        match destination {
            Destination::V4(addr) if !v6 => ptr::write_volatile(&raw mut (*ctx).user_ip4, addr),
            // The rest of a mapped address stays.
            Destination::V4(addr) => {
                ptr::write_volatile((&raw mut (*ctx).user_ip6).cast::<u32>().add(3), addr)
            }
            Destination::V6(addr) => {
                let words = (&raw mut (*ctx).user_ip6).cast::<u32>();
                ptr::write_volatile(words, addr[0]);
                ptr::write_volatile(words.add(1), addr[1]);
                ptr::write_volatile(words.add(2), addr[2]);
                ptr::write_volatile(words.add(3), addr[3]);
            }
        }
    }
}

/// Whether this socket's process is one we translate for.
#[inline(always)]
fn concerns(ctx: *mut bpf_sock_addr) -> bool {
    config(|c| &c.flags) & config_flags::SOCKET_HOST_ONLY == 0 || is_host(ctx)
}

/// Whether this socket is in the host's network namespace.
#[inline(always)]
fn is_host(ctx: *mut bpf_sock_addr) -> bool {
    // SAFETY: the context is valid while the program runs.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.cast()) };
    cookie == config(|c| &c.host_netns_cookie)
}

/// Whether this socket has a port of its own already, by bind.
///
/// Such a port may be that of other sockets too (`SO_REUSEADDR`), one for each service address it talks to. If two of
/// those were given the same backend they would be one connection: the kernel refuses the second (`EADDRNOTAVAIL`).
/// The packet path translates these, and takes another port for the second.
#[inline(always)]
fn has_port(ctx: *mut bpf_sock_addr) -> bool {
    // SAFETY: the context is valid while the program runs, and so is its socket, which this hook always has.
    unsafe {
        let sk = ptr::read_volatile(&raw const (*ctx).__bindgen_anon_1.sk);
        !sk.is_null() && ptr::read_volatile(&raw const (*sk).src_port) != 0
    }
}

/// connect and sendmsg: service address → backend.
#[inline(always)]
fn forward(ctx: *mut bpf_sock_addr, v6: bool, connects: bool) -> i32 {
    // SAFETY: the context is valid while the program runs.
    let (l4_proto, port) = unsafe {
        (
            ptr::read_volatile(&raw const (*ctx).protocol) as u8,
            ptr::read_volatile(&raw const (*ctx).user_port) as u16,
        )
    };
    if (l4_proto != proto::TCP && l4_proto != proto::UDP) || !concerns(ctx) {
        return PROCEED;
    }
    let destination = destination(ctx, v6);
    let left_to_packets = connects && l4_proto == proto::TCP && has_port(ctx) && !destination.is_loopback();
    let chosen = match destination {
        _ if left_to_packets => Ok(None),
        Destination::V4(addr) => pick::<V4>(ctx, addr, port, l4_proto).map(|found| {
            found.map(|picked| {
                let key = SockKey4::new(picked.cookie, picked.addr, picked.port_be);
                remember(
                    &SOCK_REVERSE_V4,
                    &key,
                    &SockAddr4 {
                        addr_be: addr,
                        port_be: port,
                        connected: u16::from(connects),
                        given: picked.backend,
                    },
                );
                (Destination::V4(picked.addr), picked.port_be)
            })
        }),
        Destination::V6(addr) => pick::<V6>(ctx, addr, port, l4_proto).map(|found| {
            found.map(|picked| {
                let key = SockKey6::new(picked.cookie, picked.addr, picked.port_be);
                remember(
                    &SOCK_REVERSE_V6,
                    &key,
                    &SockAddr6 {
                        addr_be: addr,
                        port_be: port,
                        connected: u16::from(connects),
                        given: picked.backend,
                    },
                );
                (Destination::V6(picked.addr), picked.port_be)
            })
        }),
    };
    match chosen {
        Ok(None) => {
            if connects && l4_proto == proto::UDP {
                forget(ctx, destination, port);
            }
            PROCEED
        }
        Ok(Some((backend, backend_port))) => {
            set_destination(ctx, v6, backend, backend_port);
            PROCEED
        }
        Err(error) => {
            // SAFETY: a helper that stores an error number.
            unsafe { bpf_set_retval(error) };
            REFUSE
        }
    }
}

/// What a socket is given in place of a service.
struct Picked<A> {
    addr: A,
    port_be: u16,
    cookie: u64,
    backend: SockBackend,
}

impl<A> Picked<A> {
    #[inline(always)]
    fn new<F: Family<Addr = A>>(id: u32, backend: &Backend, cookie: u64) -> Self {
        Self {
            addr: F::from_any(backend.addr_be),
            port_be: backend.head.port_be,
            cookie,
            backend: SockBackend {
                backend: id,
                backend_generation: backend.head.generation,
            },
        }
    }
}

/// The backend for a socket that wants `addr`: `Ok(None)` if that is no service, an error number if it has none.
#[inline(always)]
fn pick<F: Family>(
    ctx: *mut bpf_sock_addr,
    addr: F::Addr,
    port: u16,
    l4_proto: u8,
) -> Result<Option<Picked<F::Addr>>, i32>
where
    World<bpf_sock_addr>: Tables<F> + Env,
{
    let world = World::new(ctx);
    // Loopback addresses are each namespace's own.
    if F::is_loopback(&addr) && !is_host(ctx) {
        return Ok(None);
    }
    let flags = own_flags::NODE_PORT | own_flags::HOST_NODE_PORT;
    let Some(index) = find_service::<F, _>(&world, addr, port, l4_proto, Scope::Internal, flags) else {
        return Ok(None);
    };
    let Some(head) = world.service_head(index) else {
        return Ok(None);
    };
    // Affinity and source ranges are about the client's address, which a socket does not have yet: the packet path sees
    // to them.
    let not_here = service_flags::DELETED | service_flags::AFFINITY | service_flags::RANGES;
    if head.flags & not_here != 0 {
        return Ok(None);
    }
    if head.size_class == 0 {
        return if head.flags & service_flags::DROP_WHEN_EMPTY != 0 {
            refuse(index, Reason::NoLocalEndpoints, NOT_PERMITTED)
        } else {
            refuse(index, Reason::NoEndpoints, REFUSED)
        };
    }
    // SAFETY: the context is valid while the program runs.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.cast()) };
    let key = SockService {
        cookie,
        service: index,
        service_generation: u32::from(head.generation),
    };
    // A datagram goes where the socket's last one went, for as long as that backend serves.
    if l4_proto == proto::UDP
        && let Some((id, backend)) = chosen_before(&world, &key)
    {
        return Ok(Some(Picked::new::<F>(id, &backend, cookie)));
    }
    let Some(id) = choose(&world, head, cookie_hash(cookie)) else {
        return refuse(index, Reason::BadIndex, REFUSED);
    };
    let Some(backend) = world.backend(id) else {
        return refuse(index, Reason::BadIndex, REFUSED);
    };
    let picked = Picked::new::<F>(id, &backend, cookie);
    world.count_connection(index, id);
    if l4_proto == proto::UDP {
        remember(&SOCK_CHOSEN, &key, &picked.backend);
    }
    Ok(Some(picked))
}

/// Counts what has no backend. Without a way to hand over an error number it is left to the packet path, which counts it.
#[inline(always)]
fn refuse<T>(service: u32, reason: Reason, error: i32) -> Result<Option<T>, i32> {
    if config(|c| &c.flags) & config_flags::SET_RETVAL == 0 {
        return Ok(None);
    }
    if let Some(counter) = COUNTERS.get_ptr_mut(reason as u32) {
        // SAFETY: an element that exists. In a system call a packet's program may count in between, on this CPU.
        unsafe { traffic::add(counter, 1) };
    }
    traffic::count_dropped(service, NO_BACKEND);
    Err(error)
}

/// The backend that a UDP socket was given before, if it still serves.
#[inline(always)]
fn chosen_before<W: Env>(world: &W, key: &SockService) -> Option<(u32, Backend)> {
    // SAFETY: the value is checked against the backend's generation, so a torn one is not believed.
    let chosen = unsafe { SOCK_CHOSEN.get(key) }?;
    let backend = world.backend(chosen.backend)?;
    let serves = matches!(backend.head.state, backend_state::ACTIVE | backend_state::SERVING);
    (serves && backend.head.generation == chosen.backend_generation).then_some((chosen.backend, backend))
}

#[inline(always)]
fn remember<K: Copy, V: Copy, const M: usize, const F: usize>(
    map: &LruHashMap<K, V, M, F>,
    key: &K,
    value: &V,
) {
    let (key, value) = (Aligned(*key), Aligned(*value));
    // A full LRU map evicts; without the entry only the name of the peer is the backend's.
    let _ = map.insert(key.in_place(), value.in_place(), 0);
}

/// A socket that is connected to an address by itself is not told that a service has lost that one.
#[inline(always)]
fn forget(ctx: *mut bpf_sock_addr, destination: Destination, port_be: u16) {
    // SAFETY: the context is valid while the program runs.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.cast()) };
    // Hardly ever is there an entry.
    match destination {
        Destination::V4(addr) => {
            let _ = SOCK_REVERSE_V4.remove(SockKey4::new(cookie, addr, port_be));
        }
        Destination::V6(addr) => {
            let _ = SOCK_REVERSE_V6.remove(SockKey6::new(cookie, addr, port_be));
        }
    }
}

/// recvmsg and getpeername: backend → the service address that the socket asked for.
#[inline(always)]
fn reverse(ctx: *mut bpf_sock_addr, v6: bool) -> i32 {
    if !concerns(ctx) {
        return PROCEED;
    }
    // SAFETY: the context is valid while the program runs.
    let (port, cookie) = unsafe {
        (
            ptr::read_volatile(&raw const (*ctx).user_port) as u16,
            bpf_get_socket_cookie(ctx.cast()),
        )
    };
    match destination(ctx, v6) {
        Destination::V4(addr) => {
            let key = SockKey4::new(cookie, addr, port);
            // SAFETY: an address of this map is hardly ever replaced by another one.
            if let Some(asked) = unsafe { SOCK_REVERSE_V4.get(key) } {
                set_destination(ctx, v6, Destination::V4(asked.addr_be), asked.port_be);
            }
        }
        Destination::V6(addr) => {
            let key = SockKey6::new(cookie, addr, port);
            // SAFETY: as above.
            if let Some(asked) = unsafe { SOCK_REVERSE_V6.get(key) } {
                set_destination(ctx, v6, Destination::V6(asked.addr_be), asked.port_be);
            }
        }
    }
    PROCEED
}

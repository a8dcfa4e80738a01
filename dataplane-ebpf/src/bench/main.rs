//! What `cargo xtask bench datapath` measures against: a trampoline that restores the packet and walks the flows, and
//! floor programs that do only the unavoidable lookups of a case, on maps of the same shape and size.
#![no_std]
#![no_main]
// Additions that other CPUs see, see `traffic`.
#![feature(asm_experimental_arch)]

use core::ptr;

use aya_ebpf::{
    bindings::{__sk_buff, xdp_action, xdp_md},
    btf_maps::{Array, ProgramArray},
    macros::{btf_map, classifier, xdp},
    programs::{TcContext, XdpContext},
};
use dataplane_common::{
    addr::{Family, Rewrite, Tuple, V4, ethertype, proto},
    balance::{choose, flow_hash},
    flow::{Exit, FlowMeta, Side},
    packet::Packet,
    parse::{ETHERNET_LEN, Fragment, Headers, Ipv4Header, TcpHeader},
    policy::PolicyFlowKey4,
    rewrite::{RewriteIp, rewrite, write_macs},
    service::{Scope, port_set_index},
    tables::{Entry, Env, PolicyEntry, Route, Router, Tables},
};

use crate::{
    access::{SkbPacket, XdpPacket},
    world::{Sender, World, work},
};

#[path = "../access.rs"]
#[expect(dead_code, reason = "shared with the datapath")]
mod access;
#[path = "../maps.rs"]
#[expect(dead_code, reason = "shared with the datapath")]
mod maps;
#[path = "../policies.rs"]
mod policies;
#[path = "../traffic.rs"]
mod traffic;
#[path = "../world.rs"]
mod world;

/// `TCX_NEXT`.
const NEXT: i32 = -1;

/// The frame that every run begins with, and where the walk over the flows is.
#[repr(C)]
pub struct Walk {
    pub frame: [u32; 16],
    pub step: u32,
    /// The number of flows, a power of two, less one.
    pub mask: u32,
    /// Host byte order.
    pub client: u32,
    /// Not 0: client and port are the packet's destination.
    pub to_client: u32,
}

#[btf_map]
static WALK: Array<Walk, 1> = Array::new();
#[btf_map]
static TARGET_XDP: ProgramArray<1> = ProgramArray::new();
#[btf_map]
static TARGET_TC: ProgramArray<1> = ProgramArray::new();

/// Writes the next flow's packet.
#[inline(always)]
fn restore(data: usize, end: usize) {
    let Some(walk) = WALK.get_ptr_mut(0) else {
        return;
    };
    if data + 64 > end {
        return;
    }
    // SAFETY: the element exists and 64 bytes of the packet have just been checked. Whole words although packets are
    // not aligned to them: the target allows it, and byte stores would stall the loads that follow.
    unsafe {
        let step = (*walk).step;
        (*walk).step = step.wrapping_add(1);
        let flow = step.wrapping_mul(0x9e37_79b1) & (*walk).mask;
        let mut i = 0;
        while i < 16 {
            ptr::write_volatile((data as *mut u32).add(i), (*walk).frame[i]);
            i += 1;
        }
        let addr_be = ((*walk).client + (flow >> 15)).to_be();
        let port_be = (1024 + (flow & 0x7fff) as u16).to_be();
        if (*walk).to_client == 0 {
            ptr::write_volatile((data + 26) as *mut u32, addr_be);
            ptr::write_volatile((data + 34) as *mut u16, port_be);
        } else {
            ptr::write_volatile((data + 30) as *mut u32, addr_be);
            ptr::write_volatile((data + 36) as *mut u16, port_be);
        }
    }
}

#[xdp(frags)]
pub fn trampoline_xdp(ctx: XdpContext) -> u32 {
    restore(ctx.data(), ctx.data_end());
    // SAFETY: a failure is what an empty array means: the trampoline alone.
    unsafe { TARGET_XDP.tail_call(&ctx, 0) };
    xdp_action::XDP_PASS
}

#[classifier]
pub fn trampoline_tc(ctx: TcContext) -> i32 {
    // SAFETY: the context is valid while the program runs; fields are loads and stores of their own. What the target
    // has left in the packet's metadata is taken back.
    unsafe {
        ptr::write_volatile(&raw mut (*ctx.skb.skb).tc_index, 0);
    }
    restore(ctx.data(), ctx.data_end());
    // SAFETY: as above.
    unsafe { TARGET_TC.tail_call(&ctx, 0) };
    NEXT
}

/// Whole IPv4 packets without options, TCP, and nothing else.
#[inline(always)]
fn parse<P: Packet>(packet: &P) -> Option<Headers<u32>> {
    let kind: u16 = packet.load(12)?;
    let ip: Ipv4Header = packet.load(ETHERNET_LEN)?;
    if u16::from_be(kind) != ethertype::IPV4
        || ip.version_ihl != 0x45
        || u16::from_be(ip.fragment_be) & 0x3fff != 0
        || ip.proto != proto::TCP
    {
        return None;
    }
    let l4 = ETHERNET_LEN + V4::HEADER_LEN;
    let tcp: TcpHeader = packet.load(l4)?;
    Some(Headers {
        tuple: Tuple {
            src: ip.src_be,
            dst: ip.dst_be,
            sport_be: tcp.sport_be,
            dport_be: tcp.dport_be,
        },
        l4: l4 as u16,
        l3_len: u16::from_be(ip.len_be),
        proto: ip.proto,
        ttl: ip.ttl,
        fragment: Fragment::Whole,
        tcp_flags: tcp.flags,
        payload: true,
    })
}

/// Whether a frontend has the packet's port: one array lookup.
#[inline(always)]
fn port_in_use<W: Env>(world: &W, headers: &Headers<u32>) -> bool {
    let port = u16::from_be(headers.tuple.dport_be);
    world.ports(port_set_index(headers.proto, port)).any & 1u64 << (port & 63) != 0
}

/// Whether the frontend is missed, after the flow has been.
#[inline(always)]
fn is_frontend<C: Sender>(world: &World<C>, headers: &Headers<u32>, scope: Scope) -> bool {
    let key = V4::frontend_key(headers.tuple.dst, headers.tuple.dport_be, headers.proto, scope);
    Tables::<V4>::frontend(world, &key).is_some()
}

#[xdp(frags)]
pub fn floor_pass_xdp(ctx: XdpContext) -> u32 {
    let world = World::<xdp_md>::new(ctx.ctx);
    let Some(headers) = parse(&XdpPacket(ctx.ctx)) else {
        return xdp_action::XDP_ABORTED;
    };
    if port_in_use(&world, &headers) {
        let key = V4::flow_key(&headers.tuple, headers.proto, Side::Ingress);
        if Tables::<V4>::flow(&world, &key).is_some() || is_frontend(&world, &headers, Scope::External) {
            return xdp_action::XDP_ABORTED;
        }
    }
    xdp_action::XDP_PASS
}

#[classifier]
pub fn floor_pass_tc(ctx: TcContext) -> i32 {
    let world = World::<__sk_buff>::new(ctx.skb.skb);
    let Some(headers) = parse(&SkbPacket(ctx.skb.skb)) else {
        return 2;
    };
    let key = V4::flow_key(&headers.tuple, headers.proto, Side::Ingress);
    if Tables::<V4>::flow(&world, &key).is_some()
        || port_in_use(&world, &headers) && is_frontend(&world, &headers, Scope::Internal)
    {
        return 2;
    }
    NEXT
}

/// Flow hit → backend array → rewrite.
#[classifier]
pub fn floor_established_tc(ctx: TcContext) -> i32 {
    let world = World::<__sk_buff>::new(ctx.skb.skb);
    let mut packet = SkbPacket(ctx.skb.skb);
    match established(&mut packet, &world) {
        Some(()) => NEXT,
        None => 2,
    }
}

#[inline(always)]
fn established<P: Packet, C: Sender>(packet: &mut P, world: &World<C>) -> Option<()> {
    let headers = parse(packet)?;
    let key = V4::flow_key(&headers.tuple, headers.proto, Side::Ingress);
    let entry = Tables::<V4>::flow(world, &key)?;
    let flow = entry.flow();
    if world.backend_head(flow.meta.backend)?.generation != flow.meta.backend_generation {
        return None;
    }
    rewrite::<V4, P>(packet, ETHERNET_LEN, &headers, V4::rewrite(flow))
}

/// Flow hit → backend array → route → time to live, link layer, rewrite.
#[xdp(frags)]
pub fn floor_nodeport_xdp(ctx: XdpContext) -> u32 {
    let world = World::<xdp_md>::new(ctx.ctx);
    match nodeport(&mut XdpPacket(ctx.ctx), &world, ctx.ctx) {
        Some(()) => xdp_action::XDP_TX,
        None => xdp_action::XDP_ABORTED,
    }
}

#[inline(always)]
fn nodeport(packet: &mut XdpPacket, world: &World<xdp_md>, ctx: *mut xdp_md) -> Option<()> {
    let headers = parse(packet)?;
    let key = V4::flow_key(&headers.tuple, headers.proto, Side::Ingress);
    let entry = Tables::<V4>::flow(world, &key)?;
    let flow = entry.flow();
    if world.backend_head(flow.meta.backend)?.generation != flow.meta.backend_generation {
        return None;
    }
    // SAFETY: the context is valid while the program runs.
    let ifindex = unsafe { (*ctx).ingress_ifindex };
    let new = V4::rewrite(flow);
    let route = Router::<V4>::route(world, ifindex, new.src, new.dst, headers.proto, headers.l3_len);
    let Route::Found { mac_dst, mac_src, .. } = route else {
        return None;
    };
    V4::decrement_ttl(packet, ETHERNET_LEN)?;
    write_macs(packet, mac_dst, mac_src)?;
    rewrite::<V4, _>(packet, ETHERNET_LEN, &headers, new)
}

/// The headers and nothing else.
#[classifier]
pub fn floor_headers_tc(ctx: TcContext) -> i32 {
    match policy_flow_key(&ctx) {
        Some(_) => NEXT,
        None => 2,
    }
}

/// Hit of a flow that policies have allowed.
#[classifier]
pub fn floor_policy_flow_tc(ctx: TcContext) -> i32 {
    let world = World::<__sk_buff>::new(ctx.skb.skb);
    let known = policy_flow_key(&ctx).and_then(|key| Tables::<V4>::policy_flow(&world, &key));
    match known {
        // SAFETY: the context is valid while the program runs.
        Some(known) if known.flow().ifindex == unsafe { (*ctx.skb.skb).ifindex } => NEXT,
        _ => 2,
    }
}

/// Stored, so that the compiler leaves none of it out.
#[inline(always)]
fn policy_flow_key(ctx: &TcContext) -> Option<PolicyFlowKey4> {
    let headers = parse(&SkbPacket(ctx.skb.skb))?;
    let mut key = V4::policy_flow_key(&headers.tuple, headers.proto);
    // SAFETY: a value of its own, written and read as what it is.
    unsafe {
        ptr::write_volatile(&raw mut key, key);
    }
    Some(key)
}

/// What a service asks of a first packet beyond the choice of a backend.
#[derive(Clone, Copy, PartialEq, Eq)]
enum More {
    Nothing,
    /// One lookup of the client, who is known.
    Affinity,
    /// One longest-prefix match.
    Range,
}

/// Flow miss → frontend → service → Maglev → backend → nobody has the answers' key → one insert → rewrite.
#[classifier]
pub fn floor_new_tc(ctx: TcContext) -> i32 {
    new(&ctx, More::Nothing)
}

/// The same, with the backend that the client is known to have.
#[classifier]
pub fn floor_affinity_tc(ctx: TcContext) -> i32 {
    new(&ctx, More::Affinity)
}

/// The same behind a source range.
#[classifier]
pub fn floor_ranges_tc(ctx: TcContext) -> i32 {
    new(&ctx, More::Range)
}

#[inline(always)]
fn new(ctx: &TcContext, more: More) -> i32 {
    let world = World::<__sk_buff>::new(ctx.skb.skb);
    match begin(&mut SkbPacket(ctx.skb.skb), &world, more) {
        Some(()) => NEXT,
        None => 2,
    }
}

#[inline(always)]
fn begin(packet: &mut SkbPacket, world: &World<__sk_buff>, more: More) -> Option<()> {
    let headers = parse(packet)?;
    let tuple = &headers.tuple;
    let key = V4::flow_key(tuple, headers.proto, Side::Ingress);
    if Tables::<V4>::flow(world, &key).is_some() {
        return None;
    }
    let key = V4::frontend_key(tuple.dst, tuple.dport_be, headers.proto, Scope::Internal);
    let service = Tables::<V4>::frontend(world, &key)?;
    let head = world.service_head(service)?;
    if more == More::Range && !Tables::<V4>::in_source_range(world, service, &tuple.src) {
        return None;
    }
    let id = if more == More::Affinity {
        let client = V4::affinity_key(service, head.generation, tuple.src);
        Tables::<V4>::affinity(world, &client)?.backend
    } else {
        choose(world, head, flow_hash::<V4>(tuple, headers.proto))?
    };
    let backend = world.backend(id)?;
    let meta = FlowMeta {
        backend: id,
        backend_generation: backend.head.generation,
        service,
        service_generation: head.generation,
        exit: Exit::Pass as u8,
        ..FlowMeta::default()
    };
    let new = Tuple {
        src: tuple.src,
        dst: V4::from_any(backend.addr_be),
        sport_be: tuple.sport_be,
        dport_be: backend.head.port_be,
    };
    let key = V4::flow_key(&new.reversed(), headers.proto, Side::Egress);
    if Tables::<V4>::flow(world, &key).is_some() {
        return None;
    }
    let work = work(&maps::WORK_V4)?;
    work.reply = V4::flow(&tuple.reversed(), meta);
    Tables::<V4>::put_half_open(world, &key, &work.reply, false).ok()?;
    rewrite::<V4, _>(packet, ETHERNET_LEN, &headers, Rewrite::of(&new))
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: nothing here panics; the linker would reject an object in which this is reachable.
    unsafe { core::hint::unreachable_unchecked() }
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";

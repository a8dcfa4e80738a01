//! TC classifiers: the same logic for what XDP passed, for pods and for host processes.

use core::ptr;

use aya_ebpf::{
    bindings::{__sk_buff, bpf_fib_lookup, bpf_redir_neigh, bpf_redir_neigh__bindgen_ty_1},
    helpers::generated::{
        bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer, bpf_skb_change_head, bpf_skb_change_type,
        bpf_skb_set_tunnel_key,
    },
    macros::classifier,
    programs::TcContext,
};
use dataplane_common::{
    addr::{Mac, V4, V6, ethertype},
    device::device_flags,
    packet::Packet,
    parse::ETHERNET_LEN,
    pipeline::Context,
    reason::Reason,
    rewrite::write_macs,
    tables::Env,
    verdict::{Action, Hook, Verdict},
};

use crate::{access::SkbPacket, debug::process, maps::WORK_SCRATCH, monitor, stages::Apart, world::World};

/// `TC_ACT_UNSPEC`, which is `TCX_NEXT`: whoever comes next at this hook sees the packet too.
const NEXT: i32 = -1;
/// `TC_ACT_SHOT`.
const SHOT: i32 = 2;
/// `BPF_F_INGRESS` of `bpf_redirect`.
const INGRESS: u64 = 1;
/// `PACKET_HOST` (linux/if_packet.h): a packet is for this host.
const PACKET_HOST: u32 = 0;
/// In `tc_index` of a packet that we have redirected: the next hook of ours lets it pass, once.
const TRANSLATED: u32 = 0xd7a9;

#[classifier]
pub fn from_netdev(ctx: TcContext) -> i32 {
    run(ctx.skb.skb, Hook::FromNetdev, ETHERNET_LEN)
}

#[classifier]
pub fn to_netdev(ctx: TcContext) -> i32 {
    run(ctx.skb.skb, Hook::ToNetdev, ETHERNET_LEN)
}

/// `from_netdev` of devices without link layer (tun, WireGuard, IPIP).
#[classifier]
pub fn from_l3dev(ctx: TcContext) -> i32 {
    run(ctx.skb.skb, Hook::FromNetdev, 0)
}

/// `to_netdev` of devices without link layer.
#[classifier]
pub fn to_l3dev(ctx: TcContext) -> i32 {
    run(ctx.skb.skb, Hook::ToNetdev, 0)
}

#[classifier]
pub fn to_lo(ctx: TcContext) -> i32 {
    run(ctx.skb.skb, Hook::ToLo, ETHERNET_LEN)
}

#[classifier]
pub fn from_pod(ctx: TcContext) -> i32 {
    run(ctx.skb.skb, Hook::FromPod, ETHERNET_LEN)
}

#[classifier]
pub fn to_pod(ctx: TcContext) -> i32 {
    run(ctx.skb.skb, Hook::ToPod, ETHERNET_LEN)
}

#[inline(always)]
fn run(skb: *mut __sk_buff, hook: Hook, l3: usize) -> i32 {
    // SAFETY: the context is valid while the program runs; each field is a load of its own.
    let (tc_index, protocol, ifindex) = unsafe {
        (
            ptr::read_volatile(&raw const (*skb).tc_index),
            ptr::read_volatile(&raw const (*skb).protocol),
            ptr::read_volatile(&raw const (*skb).ifindex),
        )
    };
    if tc_index == TRANSLATED {
        // SAFETY: as above; the field is writable.
        unsafe { ptr::write_volatile(&raw mut (*skb).tc_index, 0) };
        return NEXT;
    }
    if matches!(hook, Hook::FromNetdev | Hook::ToNetdev) && is_tagged(skb) {
        return NEXT;
    }
    // What a device has handed in has entered by one.
    let is_egress = matches!(hook, Hook::ToNetdev | Hook::ToLo | Hook::ToPod);
    let at = Context {
        hook,
        ifindex,
        // SAFETY: as above.
        from_host: is_egress && unsafe { ptr::read_volatile(&raw const (*skb).ingress_ifindex) } == 0,
        l3,
    };
    let world = World::new(skb);
    let mut stages = Apart(skb);
    let mut packet = SkbPacket(skb);
    let verdict = match u16::from_be(protocol as u16) {
        ethertype::IPV4 => {
            packet.pull_headers::<V4>(l3);
            process::<V4, _, _, _>(&mut packet, &world, &at, &mut stages)
        }
        ethertype::IPV6 => {
            packet.pull_headers::<V6>(l3);
            process::<V6, _, _, _>(&mut packet, &world, &at, &mut stages)
        }
        _ => Verdict::PASS,
    };
    if verdict.action() == Action::Drop {
        monitor::dropped(skb, hook, l3, verdict.value());
        return SHOT;
    }
    if l3 == 0 {
        act_without_link_layer(skb, &world, hook, ifindex, verdict)
    } else {
        act(skb, hook, ifindex, verdict)
    }
}

/// Whether a packet belongs to a VLAN device on top of this one, which does the work: a redirect from here would take
/// the tag along. VLAN 0 is priority alone.
#[inline(always)]
fn is_tagged(skb: *mut __sk_buff) -> bool {
    // SAFETY: the context is valid while the program runs; each field is a load of its own.
    unsafe {
        ptr::read_volatile(&raw const (*skb).vlan_present) != 0
            && ptr::read_volatile(&raw const (*skb).vlan_tci) & 0x0fff != 0
    }
}

/// Turns a verdict into a return code.
#[inline(always)]
fn act(skb: *mut __sk_buff, hook: Hook, own_ifindex: u32, verdict: Verdict) -> i32 {
    let at_ingress = matches!(hook, Hook::FromNetdev | Hook::FromPod);
    let to = verdict.value();
    match verdict.action() {
        Action::Pass => return NEXT,
        // A packet that goes straight into a pod meets no hook of ours on its way.
        Action::Pod if at_ingress => {
            // SAFETY: the context is valid while the program runs; helpers without other pointers.
            return unsafe {
                // What a bridge's port takes for another host's, a pod would drop (the helper sees to that since 6.15).
                if ptr::read_volatile(&raw const (*skb).pkt_type) != PACKET_HOST {
                    bpf_skb_change_type(skb, PACKET_HOST);
                }
                bpf_redirect_peer(to, 0) as i32
            };
        }
        _ => {}
    }
    // SAFETY: the context is valid while the program runs and the field is writable; helpers without pointers.
    unsafe {
        ptr::write_volatile(&raw mut (*skb).tc_index, TRANSLATED);
        match verdict.action() {
            Action::Host => bpf_redirect(to, INGRESS) as i32,
            Action::Resolve => resolve(skb, to, at_ingress),
            Action::Answer => bpf_redirect(own_ifindex, if at_ingress { 0 } else { INGRESS }) as i32,
            _ => bpf_redirect(to, 0) as i32,
        }
    }
}

/// Sends a packet out to the next hop that the last query for a route has found, and whose link-layer address the kernel finds.
///
/// At egress it has a route already (`dst_entry`), to where it was before. Told no next hop, `bpf_redirect_neigh` gives it
/// another and, before 6.18, forgets to release that one, which keeps devices and network namespaces from being removed. Told one,
/// it leaves the old route, and once the address is known, `neigh_update` sends what has waited for it to that route's neighbour.
/// So the route goes first: a tunnel's key takes its place, which no device reads but tunnels that take their far end from it.
#[inline(never)]
fn resolve(skb: *mut __sk_buff, ifindex: u32, at_ingress: bool) -> i32 {
    let Some(scratch) = WORK_SCRATCH.get_ptr(0) else {
        return SHOT;
    };
    // SAFETY: a per-CPU element of the query's size and alignment, all of whose fields are integers in any reading; the context is
    // valid while the program runs; the helpers read the key, whose shortest form has 8 bytes, and the next hop while they run.
    unsafe {
        let query = &*(&raw const (*scratch).route).cast::<bpf_fib_lookup>();
        let mut next_hop = bpf_redir_neigh {
            nh_family: query.family.into(),
            __bindgen_anon_1: bpf_redir_neigh__bindgen_ty_1 {
                ipv6_nh: query.__bindgen_anon_4.ipv6_dst,
            },
        };
        if !at_ingress {
            let mut no_tunnel = [0u32; 2];
            bpf_skb_set_tunnel_key(
                skb,
                no_tunnel.as_mut_ptr().cast(),
                size_of_val(&no_tunnel) as u32,
                0,
            );
        }
        bpf_redirect_neigh(ifindex, &raw mut next_hop, size_of::<bpf_redir_neigh>() as i32, 0) as i32
    }
}

/// [`act`] at a device without link layer. The kernel takes the header off what is redirected to such a device; what is
/// redirected from it to any other, it drops, unless a header was made. A function of its own: its stack is not the
/// entry program's, below which all stages' is.
#[inline(never)]
fn act_without_link_layer(
    skb: *mut __sk_buff,
    world: &World<__sk_buff>,
    hook: Hook,
    own_ifindex: u32,
    verdict: Verdict,
) -> i32 {
    let to = verdict.value();
    let (device, flags) = match verdict.action() {
        Action::Pass => return NEXT,
        // Nothing enters or leaves a pod by a device without link layer.
        Action::Pod => {
            world.count(Reason::RewriteFailed as u32);
            return SHOT;
        }
        Action::Answer if hook as u8 == Hook::FromNetdev as u8 => (own_ifindex, 0),
        Action::Answer => (own_ifindex, INGRESS),
        Action::Host => (to, INGRESS),
        _ => (to, 0),
    };
    let found = world.device(device);
    let has_link_layer = found.is_none_or(|found| found.flags & device_flags::ETHERNET != 0);
    if has_link_layer {
        let mac = found.map_or(Mac::default(), |found| found.mac);
        if add_header(skb, mac).is_none() {
            world.count(Reason::RewriteFailed as u32);
            return SHOT;
        }
    }
    // SAFETY: as in `act`.
    unsafe {
        ptr::write_volatile(&raw mut (*skb).tc_index, TRANSLATED);
        if has_link_layer && flags == 0 {
            resolve(skb, device, hook as u8 == Hook::FromNetdev as u8)
        } else {
            bpf_redirect(device, flags) as i32
        }
    }
}

/// Makes room for an Ethernet header, and writes one to `mac`. Whoever finds the neighbour writes another.
#[inline(always)]
fn add_header(skb: *mut __sk_buff, mac: Mac) -> Option<()> {
    // SAFETY: the context is valid while the program runs; the helper checks the length.
    let (protocol, result) = unsafe {
        (
            ptr::read_volatile(&raw const (*skb).protocol),
            bpf_skb_change_head(skb, ETHERNET_LEN as u32, 0),
        )
    };
    if result != 0 {
        return None;
    }
    let mut packet = SkbPacket(skb);
    write_macs(&mut packet, mac, Mac::default())?;
    packet.store(12, protocol as u16)
}

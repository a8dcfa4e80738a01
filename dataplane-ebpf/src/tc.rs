//! TC classifiers: the same logic for what XDP passed, for pods and for host processes.

use core::ptr;

use aya_ebpf::{
    bindings::__sk_buff,
    helpers::generated::{bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer},
    macros::classifier,
    programs::TcContext,
};
use dataplane_common::{
    addr::{V4, V6, ethertype},
    parse::ETHERNET_LEN,
    pipeline::Context,
    verdict::{Action, Hook, Verdict},
};

use crate::{access::SkbPacket, debug::process, stages::Apart, world::World};

/// `TC_ACT_UNSPEC`, which is `TCX_NEXT`: whoever comes next at this hook sees the packet too.
const NEXT: i32 = -1;
/// `TC_ACT_SHOT`.
const SHOT: i32 = 2;
/// `BPF_F_INGRESS` of `bpf_redirect`.
const INGRESS: u64 = 1;
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
    let (tc_index, protocol, ifindex, ingress) = unsafe {
        (
            ptr::read_volatile(&raw const (*skb).tc_index),
            ptr::read_volatile(&raw const (*skb).protocol),
            ptr::read_volatile(&raw const (*skb).ifindex),
            ptr::read_volatile(&raw const (*skb).ingress_ifindex),
        )
    };
    if tc_index == TRANSLATED {
        // SAFETY: as above; the field is writable.
        unsafe { ptr::write_volatile(&raw mut (*skb).tc_index, 0) };
        return NEXT;
    }
    let at = Context {
        hook,
        ifindex,
        from_host: ingress == 0,
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
    act(skb, hook, ifindex, verdict)
}

/// Turns a verdict into a return code.
#[inline(always)]
fn act(skb: *mut __sk_buff, hook: Hook, own_ifindex: u32, verdict: Verdict) -> i32 {
    let at_ingress = matches!(hook, Hook::FromNetdev | Hook::FromPod);
    let to = verdict.value();
    match verdict.action() {
        Action::Pass => return NEXT,
        Action::Drop => return SHOT,
        // SAFETY: a helper without pointers. A packet that goes straight into a pod meets no hook of ours on its way.
        Action::Pod if at_ingress => return unsafe { bpf_redirect_peer(to, 0) as i32 },
        _ => {}
    }
    // SAFETY: the context is valid while the program runs and the field is writable; helpers without pointers, or
    // with a null pointer that they allow.
    let result = unsafe {
        ptr::write_volatile(&raw mut (*skb).tc_index, TRANSLATED);
        match verdict.action() {
            Action::Host => bpf_redirect(to, INGRESS),
            Action::Resolve => bpf_redirect_neigh(to, ptr::null_mut(), 0, 0),
            Action::Answer => bpf_redirect(own_ifindex, if at_ingress { 0 } else { INGRESS }),
            _ => bpf_redirect(to, 0),
        }
    };
    result as i32
}

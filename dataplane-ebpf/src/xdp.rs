//! `xdp` on uplinks: finishes what leaves by a route, and passes everything else unchanged to TC.

use aya_ebpf::{bindings::xdp_action, helpers::generated::bpf_redirect, macros::xdp, programs::XdpContext};
use dataplane_common::{
    addr::{V4, V6, ethertype},
    packet::Packet,
    parse::ETHERNET_LEN,
    pipeline::{Context, process},
    verdict::{Hook, Verdict},
};

use crate::{access::XdpPacket, world::World};

#[xdp(frags)]
pub fn xdp(ctx: XdpContext) -> u32 {
    let mut packet = XdpPacket(ctx.ctx);
    let Some(kind) = packet.load::<u16>(12) else {
        return xdp_action::XDP_PASS;
    };
    // SAFETY: the context is valid while the program runs.
    let ifindex = unsafe { (*ctx.ctx).ingress_ifindex };
    let at = Context { hook: Hook::Xdp, ifindex, from_host: false, l3: ETHERNET_LEN };
    let world = World::new(ctx.ctx);
    let verdict = match u16::from_be(kind) {
        ethertype::IPV4 => process::<V4, _, _>(&mut packet, &world, &at),
        ethertype::IPV6 => process::<V6, _, _>(&mut packet, &world, &at),
        _ => Verdict::Pass,
    };
    match verdict {
        Verdict::Pass => xdp_action::XDP_PASS,
        Verdict::Transmit { ifindex: out } if out == ifindex => xdp_action::XDP_TX,
        // SAFETY: a helper without pointers.
        Verdict::Transmit { ifindex: out } => unsafe { bpf_redirect(out, 0) as u32 },
        Verdict::Drop(_) => xdp_action::XDP_DROP,
        Verdict::Pod { .. } | Verdict::Host { .. } | Verdict::Resolve { .. } | Verdict::Answer => {
            xdp_action::XDP_ABORTED
        }
    }
}

//! `xdp` on uplinks: finishes what leaves by a route, and passes everything else unchanged to TC.

use aya_ebpf::{bindings::xdp_action, helpers::generated::bpf_redirect, macros::xdp, programs::XdpContext};
use dataplane_common::{
    addr::{V4, V6, ethertype},
    packet::Packet,
    parse::ETHERNET_LEN,
    pipeline::Context,
    reason::Reason,
    tables::Env,
    verdict::{Action, Hook, Verdict},
};

use crate::{access::XdpPacket, debug::process, monitor, stages::Apart, world::World};

// No function may have a section's name, `xdp`.
#[xdp(frags)]
pub fn xdp_frags(ctx: XdpContext) -> u32 {
    run(&ctx)
}

/// For kernels that know no frames in several buffers (before 5.18, `config_flags::XDP_FRAGS`).
#[xdp]
pub fn xdp_linear(ctx: XdpContext) -> u32 {
    run(&ctx)
}

#[inline(always)]
fn run(ctx: &XdpContext) -> u32 {
    let mut packet = XdpPacket(ctx.ctx);
    let Some(kind) = packet.load::<u16>(12) else {
        return xdp_action::XDP_PASS;
    };
    // SAFETY: the context is valid while the program runs.
    let ifindex = unsafe { (*ctx.ctx).ingress_ifindex };
    let at = Context {
        hook: Hook::Xdp,
        ifindex,
        from_host: false,
        l3: ETHERNET_LEN,
    };
    let world = World::new(ctx.ctx);
    let mut stages = Apart(ctx.ctx);
    let verdict = match u16::from_be(kind) {
        ethertype::IPV4 => process::<V4, _, _, _>(&mut packet, &world, &at, &mut stages),
        ethertype::IPV6 => process::<V6, _, _, _>(&mut packet, &world, &at, &mut stages),
        _ => Verdict::PASS,
    };
    match verdict.action() {
        Action::Pass => xdp_action::XDP_PASS,
        Action::Transmit if verdict.value() == ifindex => xdp_action::XDP_TX,
        // SAFETY: a helper without pointers.
        Action::Transmit => unsafe { bpf_redirect(verdict.value(), 0) as u32 },
        Action::Drop => {
            monitor::dropped(ctx.ctx, Hook::Xdp, ETHERNET_LEN, verdict.value());
            xdp_action::XDP_DROP
        }
        // XDP leaves all these to TC.
        _ => {
            world.count(Reason::RewriteFailed as u32);
            xdp_action::XDP_ABORTED
        }
    }
}

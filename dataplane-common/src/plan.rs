//! How a new flow will be translated: which source its backend sees, and by which way both directions leave.

use crate::{
    addr::{Family, Mac},
    backend::{Backend, backend_flags},
    config::config_flags,
    device::{Device, device_flags},
    exit::macs,
    flow::{Exit, Side},
    packet::Packet,
    parse::Headers,
    pipeline::{Context, World},
    reason::Reason,
    tables::Route,
    verdict::Hook,
};

/// How a new flow is going to be translated, in both directions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan<A> {
    /// The source that the backend will see.
    pub(crate) src: A,
    /// The source port has to come from the range for translation.
    pub(crate) changes_port: bool,
    pub(crate) exit: Exit,
    pub(crate) reply_side: Side,
    pub(crate) reply_exit: Exit,
    /// For `Exit::Host` and `Exit::Pod` of the reply, and for `Exit::Host` of the request.
    pub(crate) ifindex: u32,
    pub(crate) mac_dst: Mac,
    pub(crate) mac_src: Mac,
}

/// `Ok(None)`: not for this hook, pass the packet unchanged.
#[inline(always)]
pub(crate) fn plan<F: Family, P: Packet, W: World<F>>(
    packet: &P,
    world: &W,
    at: &Context,
    headers: &Headers<F::Addr>,
    backend: &Backend,
) -> Result<Option<Plan<F::Addr>>, Reason> {
    let tuple = &headers.tuple;
    let addr = F::from_any(backend.addr_be);
    let is_host = backend.head.flags & backend_flags::HOST != 0;
    let is_local = backend.head.flags & backend_flags::LOCAL != 0;
    let mut plan = Plan {
        src: tuple.src,
        changes_port: false,
        exit: Exit::Pass,
        reply_side: Side::Egress,
        reply_exit: Exit::Pass,
        ifindex: at.ifindex,
        mac_dst: Mac::default(),
        mac_src: Mac::default(),
    };
    match at.hook {
        Hook::ToPod => return Ok(None),
        Hook::FromPod if addr == tuple.src => {
            // Hairpin: the pod sees the service's address, so that its answer comes back here.
            plan.src = tuple.dst;
            plan.changes_port = world.own_address(tuple.dst) != 0;
            plan.exit = Exit::Back;
            plan.reply_side = Side::Ingress;
            plan.reply_exit = Exit::Back;
        }
        Hook::FromPod => {
            if world.config(|c| &c.flags) & config_flags::FAST_PATH != 0
                && backend.head.flags & backend_flags::FAST_PATH != 0
                && backend.ifindex != 0
            {
                let (dst, src) = macs(packet)?;
                plan.exit = Exit::Pod;
                plan.reply_side = Side::Ingress;
                plan.reply_exit = Exit::Pod;
                plan.mac_dst = src;
                plan.mac_src = dst;
            }
        }
        Hook::Xdp | Hook::FromNetdev => {
            if is_host || is_local {
                // Through the stack; the answer is translated where it leaves.
                return Ok(if at.hook == Hook::Xdp { None } else { Some(plan) });
            }
            let Some(src) = snat_address::<F, W>(world, at, headers, &tuple.src, addr, true)? else {
                return Ok(None);
            };
            plan.src = src;
            plan.changes_port = true;
            plan.exit = Exit::Route;
            plan.reply_side = Side::Ingress;
            plan.reply_exit = Exit::Route;
        }
        Hook::ToNetdev | Hook::ToLo => {
            plan.ifindex = at.ifindex;
            if at.hook == Hook::ToNetdev && at.l3 != 0 {
                let (dst, src) = macs(packet)?;
                plan.mac_dst = src;
                plan.mac_src = dst;
            }
            if is_host {
                if at.hook == Hook::ToNetdev {
                    // Own address to own address by way of an uplink: the backend sees the service's address.
                    plan.src = tuple.dst;
                    plan.exit = Exit::Host;
                    plan.reply_exit = Exit::Host;
                }
                return Ok(Some(plan));
            }
            plan.reply_side = Side::Ingress;
            plan.reply_exit = Exit::Host;
            plan.exit = Exit::Route;
            if F::is_loopback(&tuple.src) {
                // Nobody could answer it, and nobody may see it.
                let lo = world.device(at.ifindex).ok_or(Reason::NoSnatAddress)?;
                plan.src = own_source::<F>(&lo).ok_or(Reason::NoSnatAddress)?;
                plan.changes_port = true;
            }
            if is_local {
                // Without link layer there is no header to write the pod's address into.
                if backend.ifindex != 0 && at.l3 != 0 {
                    plan.exit = Exit::Pod;
                }
            } else if let Some(better) = snat_address::<F, W>(world, at, headers, &plan.src, addr, false)? {
                plan.src = better;
                plan.changes_port = true;
            }
        }
    }
    Ok(Some(plan))
}

/// The address of this node that fits the way to `dst`. Without `always`, `None` where the packet may keep its own;
/// with it, `None` where XDP has to leave the packet to TC.
#[inline(always)]
fn snat_address<F: Family, W: World<F>>(
    world: &W,
    at: &Context,
    headers: &Headers<F::Addr>,
    src: &F::Addr,
    dst: F::Addr,
    always: bool,
) -> Result<Option<F::Addr>, Reason> {
    let ifindex = match world.route(at.ifindex, src, &dst, headers.proto, 0) {
        Route::Found { ifindex, .. } => ifindex,
        // XDP leaves to TC what it could not finish.
        _ if at.hook == Hook::Xdp => return Ok(None),
        Route::NoNeighbour { ifindex } => ifindex,
        Route::TooBig { .. } | Route::None => return Err(Reason::NoRoute),
    };
    if !always && ifindex == at.ifindex {
        return Ok(None);
    }
    let Some(device) = world.device(ifindex) else {
        return if always {
            Err(Reason::NoSnatAddress)
        } else {
            Ok(None)
        };
    };
    if at.hook == Hook::Xdp && ifindex != at.ifindex && device.flags & device_flags::XDP == 0 {
        return Ok(None);
    }
    if !always && (device.flags & device_flags::TUNNEL == 0 && !is_tunnel::<F, W>(world, at.ifindex)) {
        return Ok(None);
    }
    own_source::<F>(&device).map(Some).ok_or(Reason::NoSnatAddress)
}

/// The source of what is translated to leave by a device.
#[inline(always)]
fn own_source<F: Family>(device: &Device) -> Option<F::Addr> {
    let addr = if F::VERSION == 4 {
        [device.snat4_be, 0, 0, 0]
    } else {
        device.snat6_be
    };
    (addr != [0; 4]).then_some(F::from_any(addr))
}

/// Whether what enters or leaves by a device may be expected to have addresses of that device alone.
#[inline(always)]
fn is_tunnel<F: Family, W: World<F>>(world: &W, ifindex: u32) -> bool {
    world
        .device(ifindex)
        .is_some_and(|device| device.flags & device_flags::TUNNEL != 0)
}

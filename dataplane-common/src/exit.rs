//! How a translated packet leaves its hook: to the stack, into a pod, back into this host, or out by a route.

use core::mem::offset_of;

use crate::{
    addr::{Mac, proto},
    device::device_flags,
    flow::{Exit, Side, flow_flags},
    packet::Packet,
    parse::{Headers, TcpHeader, UdpHeader},
    pipeline::{Context, World},
    reason::Reason,
    rewrite::{RewriteIp, write_macs},
    tables::Route,
    verdict::{Action, Hook, Verdict},
};

/// What [`leave`] found.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Leave {
    Exit(Verdict),
    /// Not for this hook: nothing was written.
    Unchanged,
    TooBig(u16),
    Drop(Reason),
}

/// Writes the link-layer header and the time to live for the way that the flow's packets take, and names it.
#[inline(always)]
pub(crate) fn leave<F: RewriteIp, P: Packet, W: World<F>>(
    packet: &mut P,
    world: &W,
    at: &Context,
    headers: &Headers<F::Addr>,
    flow: &F::Flow,
) -> Leave {
    let meta = F::meta(flow);
    let exit = meta.exit & 0x0f;
    if exit == Exit::Pass as u8 {
        return Leave::Exit(Verdict::ONWARD);
    }
    let verdict = if exit == Exit::Back as u8 {
        macs(packet)
            .ok()
            .and_then(|(dst, src)| write_macs(packet, src, dst))
            .map(|()| Verdict::to(Action::Pod, at.ifindex))
    } else if exit == Exit::Host as u8 {
        if at.ifindex == meta.ifindex && at.side() as u8 == Side::Ingress as u8 {
            return Leave::Exit(Verdict::ONWARD);
        }
        write_link(packet, at, meta.mac_dst, meta.mac_src).map(|()| Verdict::to(Action::Host, meta.ifindex))
    } else if exit == Exit::Pod as u8 && meta.flags & flow_flags::REPLY != 0 {
        write_link(packet, at, meta.mac_dst, meta.mac_src).map(|()| Verdict::to(Action::Pod, meta.ifindex))
    } else if exit == Exit::Pod as u8 {
        match world.backend(meta.backend) {
            Some(backend) if backend.ifindex != 0 => {
                if let Some(mtu) = too_big_for_pod::<F, P, W>(packet, world, at, headers, flow) {
                    return Leave::TooBig(mtu);
                }
                write_link(packet, at, backend.pod_mac, backend.host_mac)
                    .map(|()| Verdict::to(Action::Pod, backend.ifindex))
            }
            _ => return route::<F, P, W>(packet, world, at, headers, flow),
        }
    } else {
        return route::<F, P, W>(packet, world, at, headers, flow);
    };
    verdict.map_or(Leave::Drop(Reason::RewriteFailed), Leave::Exit)
}

/// Out by the route to the packet's new destination.
#[inline(always)]
fn route<F: RewriteIp, P: Packet, W: World<F>>(
    packet: &mut P,
    world: &W,
    at: &Context,
    headers: &Headers<F::Addr>,
    flow: &F::Flow,
) -> Leave {
    let new = F::rewrite(flow);
    let len = len_on_wire(packet, at, headers);
    let found = world.route(at.ifindex, new.src, new.dst, headers.proto, len);
    let verdict = match found {
        Route::None => return Leave::Drop(Reason::NoRoute),
        Route::TooBig { mtu } if at.hook != Hook::Xdp => return Leave::TooBig(mtu),
        Route::Found { ifindex, .. } if at.hook == Hook::Xdp && ifindex != at.ifindex => {
            let able = world
                .device(ifindex)
                .is_some_and(|d| d.flags & device_flags::XDP != 0);
            if !able {
                return Leave::Unchanged;
            }
            Verdict::to(Action::Transmit, ifindex)
        }
        Route::TooBig { .. } | Route::NoNeighbour { .. } if at.hook == Hook::Xdp => return Leave::Unchanged,
        Route::Found { ifindex, .. } => Verdict::to(Action::Transmit, ifindex),
        Route::NoNeighbour { ifindex } => Verdict::to(Action::Resolve, ifindex),
        Route::TooBig { mtu } => return Leave::TooBig(mtu),
    };
    if !at.from_host {
        if headers.ttl <= 1 {
            return Leave::Drop(Reason::TtlExceeded);
        }
        if F::decrement_ttl(packet, at.l3).is_none() {
            return Leave::Drop(Reason::RewriteFailed);
        }
    }
    if let Route::Found { mac_dst, mac_src, .. } = found
        && write_link(packet, at, mac_dst, mac_src).is_none()
    {
        return Leave::Drop(Reason::RewriteFailed);
    }
    Leave::Exit(verdict)
}

/// The layer 3 length of what leaves: of a packet that is still to be cut, that of its largest segment.
#[inline(always)]
fn len_on_wire<A, P: Packet>(packet: &P, at: &Context, headers: &Headers<A>) -> u16 {
    let gso_size = packet.gso_size();
    if gso_size == 0 {
        return headers.l3_len;
    }
    let mut header_bytes = headers.l4() - at.l3 + size_of::<UdpHeader>();
    if headers.proto == proto::TCP {
        let [offset, _flags]: [u8; 2] = packet
            .load(headers.l4() + offset_of!(TcpHeader, offset))
            .unwrap_or_default();
        header_bytes = headers.l4() - at.l3 + usize::from(offset >> 4) * 4;
    }
    (gso_size as usize + header_bytes).min(usize::from(u16::MAX)) as u16
}

/// IPv6 requires that every link carries this many bytes (RFC 8200, section 5): smaller packets need no look at the MTU.
const MIN_MTU: u16 = 1280;

/// The MTU of the way into a pod of this node, where that is smaller than the packet. What is sent out by the pod's
/// interface has to fit, or is dropped without a word; what is led into the pod from a device's ingress has not.
#[inline(always)]
fn too_big_for_pod<F: RewriteIp, P: Packet, W: World<F>>(
    packet: &P,
    world: &W,
    at: &Context,
    headers: &Headers<F::Addr>,
    flow: &F::Flow,
) -> Option<u16> {
    if at.side() as u8 == Side::Ingress as u8 {
        return None;
    }
    let len = len_on_wire(packet, at, headers);
    if len <= MIN_MTU {
        return None;
    }
    let new = F::rewrite(flow);
    match world.route(at.ifindex, new.src, new.dst, headers.proto, len) {
        Route::TooBig { mtu } => Some(mtu),
        _ => None,
    }
}

/// Writes link-layer addresses where there is a link-layer header.
#[inline(always)]
fn write_link<P: Packet>(packet: &mut P, at: &Context, dst: Mac, src: Mac) -> Option<()> {
    if at.l3 == 0 {
        Some(())
    } else {
        write_macs(packet, dst, src)
    }
}

/// Destination and source of the frame.
#[inline(always)]
pub(crate) fn macs<P: Packet>(packet: &P) -> Result<(Mac, Mac), Reason> {
    let [dst, src]: [Mac; 2] = packet.load(0).ok_or(Reason::Truncated)?;
    Ok((dst, src))
}

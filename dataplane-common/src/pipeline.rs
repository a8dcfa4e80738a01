//! The path of a packet: parse → flow → (service → backend → new flow) → rewrite → exit.
//!
//! One function serves all hooks; what differs between them is data ([`Context`]), known at load time where it
//! decides anything. Translation is symmetric around the kernel's stack: a flow that is translated before the stack
//! (ingress) is translated back behind it (egress) at the same device, and a flow that skips the stack skips it both
//! ways. Where a direction is seen is part of its key ([`Side`]), so no hook can translate a packet twice.
//!
//! What happens to a packet of an established flow is all in this file. A first answer or a first packet goes on in
//! [`crate::begin`], which keeps what is large in [`Work`]: a BPF program has 512 bytes of stack in all.

use crate::{
    addr::{Family, proto},
    backend::backend_state,
    balance::find_service,
    exit::{Leave, leave},
    flow::{Exit, FlowMeta, Side, flow_flags, flow_state},
    packet::Packet,
    parse::{Fragment, Headers, parse_l4, tcp},
    reason::Reason,
    rewrite::{RewriteIp, rewrite},
    service::{Scope, port_set_index, service_flags},
    tables::{Entry, Env, Router, Tables},
    verdict::{Action, Hook, Verdict},
};

/// Where the packet is.
#[derive(Clone, Copy, Debug)]
pub struct Context {
    pub hook: Hook,
    /// The device whose hook this is.
    pub ifindex: u32,
    /// Sent by a process of this host: it has entered by no device.
    pub from_host: bool,
    /// Offset of the IP header: 14, or 0 on devices without link layer.
    pub l3: usize,
}

impl Context {
    #[inline(always)]
    pub(crate) fn side(&self) -> Side {
        match self.hook {
            Hook::Xdp | Hook::FromNetdev | Hook::FromPod => Side::Ingress,
            Hook::ToNetdev | Hook::ToLo | Hook::ToPod => Side::Egress,
        }
    }

    /// Who is the client of a packet that begins a flow here, if flows may begin here at all.
    #[inline(always)]
    pub(crate) fn scope(&self) -> Option<Scope> {
        match self.hook {
            Hook::Xdp | Hook::FromNetdev => Some(Scope::External),
            Hook::FromPod => Some(Scope::Internal),
            Hook::ToNetdev | Hook::ToLo if self.from_host => Some(Scope::Internal),
            Hook::ToNetdev | Hook::ToLo | Hook::ToPod => None,
        }
    }
}

/// Everything that the datapath asks for, in one bound.
pub trait World<F: Family>: Tables<F> + Env + Router<F> {}
impl<F: Family, W: Tables<F> + Env + Router<F>> World<F> for W {}

/// What is being made of one packet. All zeros is a valid value.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Work<F: Family> {
    pub headers: Headers<F::Addr>,
    pub key: F::FlowKey,
    /// A new flow's entry for its packets.
    pub forward: F::Flow,
    /// A new flow's entry for its answers.
    pub reply: F::Flow,
}

/// Decides about one packet and writes what has to be written into it.
///
/// Each stage is a function of its own that has returned before the next is called: their stacks do not add up.
#[inline(always)]
pub fn process<F: RewriteIp, P: Packet, W: World<F>>(
    packet: &mut P,
    world: &W,
    at: &Context,
    work: &mut Work<F>,
) -> Verdict {
    let mut verdict = established::<F, P, W>(packet, world, at, work);
    if verdict.action() == Action::Miss {
        verdict = crate::begin::miss::<F, P, W>(packet, world, at, work);
    } else if verdict.action() == Action::Icmp {
        verdict = crate::icmp::process::<F, P, W>(packet, world, at, work);
    }
    if verdict.action() == Action::Refuse {
        verdict = crate::answer::refuse::<F, P, W>(packet, world, at, &work.headers);
    } else if verdict.action() == Action::TooBig {
        let mtu = verdict.value() as u16;
        verdict = crate::answer::too_big::<F, P, W>(packet, world, at, &work.headers, mtu);
    }
    verdict
}

/// The first stage: parses the packet, and finishes it if a live entry speaks for it.
#[inline(never)]
fn established<F: RewriteIp, P: Packet, W: World<F>>(
    packet: &mut P,
    world: &W,
    at: &Context,
    work: &mut Work<F>,
) -> Verdict {
    match parse::<F, P>(packet, at, &mut work.headers) {
        Ok(Kind::Flow) => forward::<F, P, W>(packet, world, at, work),
        Ok(Kind::Icmp) => Verdict::to(Action::Icmp, 0),
        Ok(Kind::Other) => Verdict::PASS,
        Err(reason) => {
            world.count(reason);
            Verdict::PASS
        }
    }
}

/// What kind of attention a packet needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Flow,
    Icmp,
    Other,
}

#[inline(always)]
fn parse<F: RewriteIp, P: Packet>(
    packet: &mut P,
    at: &Context,
    headers: &mut Headers<F::Addr>,
) -> Result<Kind, Reason> {
    *headers = F::parse_ip(packet, at.l3)?;
    if headers.proto != proto::TCP && headers.proto != proto::UDP {
        let concerns =
            headers.proto == F::ICMP && at.hook != Hook::Xdp && headers.fragment == Fragment::Whole;
        return Ok(if concerns { Kind::Icmp } else { Kind::Other });
    }
    if headers.fragment != Fragment::Whole && at.hook == Hook::Xdp {
        return Ok(Kind::Other);
    }
    if headers.fragment == Fragment::Later {
        return Err(Reason::FragmentPassed);
    }
    if !packet.is_gso() && !packet.covers(at.l3 + usize::from(headers.l3_len)) {
        return Err(Reason::Truncated);
    }
    parse_l4::<F, P>(packet, at.l3, headers)?;
    Ok(Kind::Flow)
}

/// A TCP or UDP packet.
#[inline(always)]
fn forward<F: RewriteIp, P: Packet, W: World<F>>(
    packet: &mut P,
    world: &W,
    at: &Context,
    work: &mut Work<F>,
) -> Verdict {
    let headers = &work.headers;
    if at.hook == Hook::Xdp && !xdp_concerns::<F, W>(world, headers) {
        return Verdict::PASS;
    }
    let now = world.now_ticks();
    work.key = F::flow_key(&headers.tuple, headers.proto, at.side());
    if let Some(entry) = world.flow(&work.key) {
        let flow = entry.flow();
        let meta = F::meta(flow);
        if is_live::<F, W>(world, meta, headers, now, at) {
            if at.hook == Hook::Xdp && !xdp_finishes(meta) {
                return Verdict::PASS;
            }
            let state = if headers.has_flags(tcp::FIN | tcp::RST) {
                flow_state::CLOSING
            } else if headers.payload {
                flow_state::OPEN
            } else {
                meta.state
            };
            if state != meta.state || now != meta.seen_ticks {
                entry.touch(now, state);
            }
            return finish::<F, P, W>(packet, world, at, headers, flow);
        }
    } else if !may_begin_or_answer::<F, W>(world, at, headers, now) {
        return Verdict::PASS;
    }
    Verdict::to(Action::Miss, 0)
}

/// Whether XDP has anything to do with a packet: it is for a frontend's port, or an answer to a translated source.
#[inline(always)]
fn xdp_concerns<F: Family, W: World<F>>(world: &W, headers: &Headers<F::Addr>) -> bool {
    let port = u16::from_be(headers.tuple.dport_be);
    let config = world.config();
    if port >= config.snat_port_min && port <= config.snat_port_max {
        return true;
    }
    world.ports(port_set_index(headers.proto, port)).any & 1u64 << (port & 63) != 0
}

/// XDP finishes only what leaves by a route; all else passes unchanged to TC.
#[inline(always)]
pub(crate) fn xdp_finishes(meta: &FlowMeta) -> bool {
    meta.exit & 0x0f == Exit::Route as u8
}

/// Whether a packet without a flow can be anything to us. Array lookups decide that for most packets.
#[inline(always)]
fn may_begin_or_answer<F: Family, W: World<F>>(
    world: &W,
    at: &Context,
    headers: &Headers<F::Addr>,
    now: u32,
) -> bool {
    if may_be_first_answer(world, headers, now) {
        return true;
    }
    let port = u16::from_be(headers.tuple.dport_be);
    at.scope().is_some() && world.ports(port_set_index(headers.proto, port)).any & 1u64 << (port & 63) != 0
}

/// Whether a packet without an entry in `FLOWS` could be the first answer of a flow in `HALF_OPEN`. Only a SYN-ACK
/// or a RST is, in TCP, unless flows were begun in mid-stream lately.
#[inline(always)]
pub(crate) fn may_be_first_answer<A, W: Env>(world: &W, headers: &Headers<A>, now: u32) -> bool {
    if headers.proto == proto::UDP || headers.has_flags(tcp::SYN | tcp::RST) {
        return !headers.is_syn();
    }
    let midstream = world.midstream_ticks();
    midstream != 0 && now.wrapping_sub(midstream) <= world.config().half_open_ticks
}

/// Whether an entry of `FLOWS` still speaks for its packets.
#[inline(always)]
fn is_live<F: Family, W: World<F>>(
    world: &W,
    meta: &FlowMeta,
    headers: &Headers<F::Addr>,
    now: u32,
    at: &Context,
) -> bool {
    let is_tcp = headers.proto == proto::TCP;
    if now.wrapping_sub(meta.seen_ticks) > timeout_ticks(world, is_tcp, meta.state) {
        return false;
    }
    if meta.flags & flow_flags::REPLY != 0 {
        return true;
    }
    // A client that begins anew from the port of a connection that has ended.
    if is_tcp && meta.state != flow_state::OPEN && headers.is_syn() {
        return false;
    }
    let (Some(backend), Some(service)) = (world.backend_head(meta.backend), world.service_head(meta.service))
    else {
        return false;
    };
    if backend.generation != meta.backend_generation
        || backend.state == backend_state::GONE
        || !is_tcp && backend.state == backend_state::DRAINING
        || service.generation != meta.service_generation
    {
        return false;
    }
    // TCP outlives its service, unless the address belongs to somebody else by now.
    service.flags & service_flags::DELETED == 0 || is_tcp && !belongs_to_another::<F, W>(world, at, headers)
}

#[inline(never)]
fn belongs_to_another<F: Family, W: World<F>>(world: &W, at: &Context, headers: &Headers<F::Addr>) -> bool {
    let tuple = &headers.tuple;
    at.scope().is_some_and(|scope| {
        find_service::<F, W>(world, tuple.dst, tuple.dport_be, headers.proto, scope).is_some()
    })
}

/// How long an idle entry of `FLOWS` is believed.
#[inline(always)]
pub(crate) fn timeout_ticks<W: Env>(world: &W, is_tcp: bool, state: u8) -> u32 {
    let config = world.config();
    match (is_tcp, state) {
        (true, flow_state::OPEN) => config.tcp_ticks,
        (true, _) => config.tcp_closing_ticks,
        (false, _) => config.udp_ticks,
    }
}

/// Rewrites the packet and sends it where its flow goes.
#[inline(always)]
pub(crate) fn finish<F: RewriteIp, P: Packet, W: World<F>>(
    packet: &mut P,
    world: &W,
    at: &Context,
    headers: &Headers<F::Addr>,
    flow: &F::Flow,
) -> Verdict {
    let exit = match leave::<F, P, W>(packet, world, at, headers, flow) {
        Leave::Exit(verdict) => verdict,
        Leave::Unchanged => return Verdict::PASS,
        Leave::TooBig(mtu) => return Verdict::to(Action::TooBig, mtu.into()),
        Leave::Drop(reason) => return drop_packet::<F, W>(world, reason),
    };
    match rewrite::<F, P>(packet, at.l3, headers, &F::rewrite(flow)) {
        Some(()) => exit,
        None => drop_packet::<F, W>(world, Reason::RewriteFailed),
    }
}

#[inline(always)]
pub(crate) fn drop_packet<F: Family, W: World<F>>(world: &W, reason: Reason) -> Verdict {
    world.count(reason);
    Verdict::drop(reason)
}

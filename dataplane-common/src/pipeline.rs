//! The path of a packet: parse → flow → (service → backend → new flow) → rewrite → exit.
//!
//! One function serves all hooks; what differs between them is data ([`Context`]), known at compile time where it
//! decides anything. Translation is symmetric around the kernel's stack: a flow that is translated before the stack
//! (ingress) is translated back behind it (egress) at the same device, and a flow that skips the stack skips it both
//! ways. Where a direction is seen is part of its key ([`Side`]), so no hook can translate a packet twice.

use crate::{
    addr::{Family, Mac, Tuple, proto},
    backend::{Backend, backend_flags, backend_state},
    balance::{choose, find_service, flow_hash},
    config::config_flags,
    device::device_flags,
    flow::{Exit, FlowMeta, Side, flow_flags, flow_state},
    packet::Packet,
    parse::{Fragment, Headers, parse_l4, tcp},
    reason::Reason,
    rewrite::{RewriteIp, rewrite, write_macs},
    service::{Scope, port_set_index, service_flags},
    tables::{Entry, Env, InsertError, Route, Router, Tables},
    verdict::{Hook, Verdict},
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
    fn scope(&self) -> Option<Scope> {
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

/// Decides about one packet and writes what has to be written into it.
#[inline(never)]
pub fn process<F: RewriteIp, P: Packet, W: World<F>>(packet: &mut P, world: &W, at: &Context) -> Verdict {
    match parse_and_process::<F, P, W>(packet, world, at) {
        Ok(verdict) => verdict,
        Err(reason) => {
            world.count(reason);
            Verdict::Pass
        }
    }
}

#[inline(always)]
fn parse_and_process<F: RewriteIp, P: Packet, W: World<F>>(
    packet: &mut P,
    world: &W,
    at: &Context,
) -> Result<Verdict, Reason> {
    let mut headers = F::parse_ip(packet, at.l3)?;
    if headers.proto != proto::TCP && headers.proto != proto::UDP {
        if headers.proto == F::ICMP && at.hook != Hook::Xdp && headers.fragment == Fragment::Whole {
            return Ok(crate::icmp::process::<F, P, W>(packet, world, at, &headers));
        }
        return Ok(Verdict::Pass);
    }
    if headers.fragment == Fragment::Later {
        return if at.hook == Hook::Xdp {
            Ok(Verdict::Pass)
        } else {
            Err(Reason::FragmentPassed)
        };
    }
    if !packet.is_gso() && !packet.covers(at.l3 + usize::from(headers.l3_len)) {
        return Err(Reason::Truncated);
    }
    parse_l4::<F, P>(packet, at.l3, &mut headers)?;
    Ok(forward::<F, P, W>(packet, world, at, &headers))
}

/// A TCP or UDP packet. What happens to a packet of an established flow is all in here; the rest is [`miss`].
#[inline(always)]
fn forward<F: RewriteIp, P: Packet, W: World<F>>(
    packet: &mut P,
    world: &W,
    at: &Context,
    headers: &Headers<F::Addr>,
) -> Verdict {
    if at.hook == Hook::Xdp && !xdp_concerns::<F, W>(world, headers) {
        return Verdict::Pass;
    }
    let now = world.now_ticks();
    let key = F::flow_key(&headers.tuple, headers.proto, at.side());
    if let Some(entry) = world.flow(&key) {
        let flow = entry.load();
        let meta = F::meta(&flow);
        if is_live::<F, W>(world, &meta, headers, now, at) {
            if at.hook == Hook::Xdp && !xdp_finishes(&meta) {
                return Verdict::Pass;
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
            return finish::<F, P, W>(packet, world, at, headers, &F::rewrite(&flow), &meta);
        }
    } else if !may_concern::<F, W>(world, at, headers, now) {
        return Verdict::Pass;
    }
    miss::<F, P, W>(packet, world, at, headers)
}

/// Whether a packet without a flow can be anything to us. Decides for most packets, by array lookups alone.
#[inline(always)]
fn may_concern<F: Family, W: World<F>>(
    world: &W,
    at: &Context,
    headers: &Headers<F::Addr>,
    now: u32,
) -> bool {
    if may_be_first_reply(world, headers, now) {
        return true;
    }
    let port = u16::from_be(headers.tuple.dport_be);
    at.scope().is_some() && world.ports(port_set_index(headers.proto, port)).any & 1u64 << (port & 63) != 0
}

/// A packet without a live entry in `FLOWS`: a first answer, or the beginning of a flow, or nothing to us.
#[inline(never)]
fn miss<F: RewriteIp, P: Packet, W: World<F>>(
    packet: &mut P,
    world: &W,
    at: &Context,
    headers: &Headers<F::Addr>,
) -> Verdict {
    let flow = match first_answer::<F, W>(world, at, headers) {
        Ok(Some(flow)) => flow,
        Ok(None) => match begin::<F, P, W>(packet, world, at, headers) {
            Ok(flow) => flow,
            Err(verdict) => return verdict,
        },
        Err(verdict) => return verdict,
    };
    finish::<F, P, W>(packet, world, at, headers, &F::rewrite(&flow), &F::meta(&flow))
}

/// The entry of `HALF_OPEN` that a packet answers, now promoted.
#[inline(always)]
fn first_answer<F: Family, W: World<F>>(
    world: &W,
    at: &Context,
    headers: &Headers<F::Addr>,
) -> Result<Option<F::Flow>, Verdict> {
    let now = world.now_ticks();
    if !may_be_first_reply(world, headers, now) {
        return Ok(None);
    }
    let key = F::flow_key(&headers.tuple, headers.proto, at.side());
    let Some(entry) = world.half_open(&key) else {
        return Ok(None);
    };
    let flow = entry.load();
    let meta = F::meta(&flow);
    if now.wrapping_sub(meta.seen_ticks) > world.config().half_open_ticks {
        return Ok(None);
    }
    if at.hook == Hook::Xdp && !xdp_finishes(&meta) {
        return Err(Verdict::Pass);
    }
    match promote::<F, W>(world, at, headers, &flow, now) {
        None => Ok(Some(flow)),
        Some(reason) => Err(drop_packet::<F, W>(world, reason)),
    }
}

/// Whether XDP has anything to do with a packet: it is for a frontend's port, or an answer to a translated source.
#[inline(always)]
fn xdp_concerns<F: Family, W: World<F>>(world: &W, headers: &Headers<F::Addr>) -> bool {
    if headers.fragment != Fragment::Whole {
        return false;
    }
    let port = u16::from_be(headers.tuple.dport_be);
    let config = world.config();
    if port >= config.snat_port_min && port <= config.snat_port_max {
        return true;
    }
    world.ports(port_set_index(headers.proto, port)).any & 1u64 << (port & 63) != 0
}

/// XDP finishes only what leaves by a route; all else passes unchanged to TC.
#[inline(always)]
fn xdp_finishes(meta: &FlowMeta) -> bool {
    meta.exit & 0x0f == Exit::Route as u8
}

/// Whether a packet without an entry in `FLOWS` could be the first answer of a flow in `HALF_OPEN`. Only a SYN-ACK
/// or a RST is, in TCP, unless flows were begun in mid-stream lately.
#[inline(always)]
fn may_be_first_reply<A, W: Env>(world: &W, headers: &Headers<A>, now: u32) -> bool {
    if headers.proto == proto::UDP || headers.has_flags(tcp::SYN | tcp::RST) {
        return true;
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
    let Some(backend) = world.backend(meta.backend) else {
        return false;
    };
    if backend.head.generation != meta.backend_generation
        || backend.head.state == backend_state::GONE
        || !is_tcp && backend.head.state == backend_state::DRAINING
    {
        return false;
    }
    let Some(service) = world.service_head(meta.service) else {
        return false;
    };
    if service.generation != meta.service_generation {
        return false;
    }
    if service.flags & service_flags::DELETED != 0 {
        // TCP lives on, unless the address belongs to somebody else by now.
        let tuple = &headers.tuple;
        return is_tcp
            && match at.scope() {
                Some(scope) => {
                    find_service::<F, W>(world, tuple.dst, tuple.dport_be, headers.proto, scope).is_none()
                }
                None => false,
            };
    }
    true
}

/// The first packet of a flow, or of one that has been forgotten: the flow's entry for its direction. `Err`: what
/// becomes of a packet that begins none.
#[inline(always)]
fn begin<F: RewriteIp, P: Packet, W: World<F>>(
    packet: &mut P,
    world: &W,
    at: &Context,
    headers: &Headers<F::Addr>,
) -> Result<F::Flow, Verdict> {
    let tuple = &headers.tuple;
    let scope = at.scope().ok_or(Verdict::Pass)?;
    let service =
        find_service::<F, W>(world, tuple.dst, tuple.dport_be, headers.proto, scope).ok_or(Verdict::Pass)?;
    let Some(head) = world.service_head(service) else {
        return Err(drop_packet::<F, W>(world, Reason::BadIndex));
    };
    if head.flags & service_flags::DELETED != 0 {
        return Err(Verdict::Pass);
    }
    if head.size_class == 0 {
        return Err(if at.hook == Hook::Xdp {
            Verdict::Pass
        } else if head.flags & service_flags::DROP_WHEN_EMPTY != 0 {
            drop_packet::<F, W>(world, Reason::NoLocalEndpoints)
        } else {
            answered::<F, W>(
                world,
                crate::answer::refuse::<F, P, W>(packet, world, at, headers),
            )
        });
    }
    if headers.fragment != Fragment::Whole {
        return Err(drop_packet::<F, W>(world, Reason::FragmentService));
    }
    let id = choose(world, head, flow_hash::<F>(tuple, headers.proto));
    let Some(backend) = id.and_then(|id| world.backend(id)) else {
        return Err(drop_packet::<F, W>(world, Reason::BadIndex));
    };
    let plan = match plan::<F, P, W>(packet, world, at, headers, &backend) {
        Ok(Some(plan)) => plan,
        Ok(None) => return Err(Verdict::Pass),
        Err(reason) => return Err(drop_packet::<F, W>(world, reason)),
    };
    let mut flags = flow_flags::REPLY;
    if plan.changes_port {
        flags |= flow_flags::SNAT;
    }
    if at.side() as u8 == Side::Egress as u8 {
        flags |= flow_flags::OTHER_EGRESS;
    }
    if plan.reply_side as u8 == Side::Egress as u8 {
        flags |= flow_flags::SELF_EGRESS;
    }
    let reply = FlowMeta {
        backend: id.unwrap_or(0),
        backend_generation: backend.head.generation,
        service,
        service_generation: head.generation,
        flags,
        exit: plan.reply_exit as u8 | (plan.exit as u8) << 4,
        seen_ticks: world.now_ticks(),
        ifindex: plan.ifindex,
        state: flow_state::OPEN,
        unused: [0; 3],
        mac_dst: plan.mac_dst,
        mac_src: plan.mac_src,
    };
    let new = Tuple {
        src: plan.src,
        dst: F::from_any(backend.addr_be),
        sport_be: headers.tuple.sport_be,
        dport_be: backend.head.port_be,
    };
    let mut forward = F::flow(&new, forward_meta(&reply));
    match claim::<F, W>(world, headers, &mut forward, &reply) {
        None => Ok(forward),
        Some(reason) => Err(drop_packet::<F, W>(world, reason)),
    }
}

/// How a new flow is going to be translated, in both directions.
#[derive(Clone, Copy, Debug)]
struct Plan<A> {
    /// The source that the backend will see.
    src: A,
    /// The source port has to come from the range for translation.
    changes_port: bool,
    exit: Exit,
    reply_side: Side,
    reply_exit: Exit,
    /// For `Exit::Host` and `Exit::Pod` of the reply, and for `Exit::Host` of the request.
    ifindex: u32,
    mac_dst: Mac,
    mac_src: Mac,
}

/// `Ok(None)`: not for this hook, pass the packet unchanged.
#[inline(always)]
fn plan<F: Family, P: Packet, W: World<F>>(
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
            if world.config().flags & config_flags::FAST_PATH != 0
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
            let Some(src) = snat_address::<F, W>(world, at, headers, addr, true)? else {
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
            if is_local {
                if backend.ifindex != 0 {
                    plan.exit = Exit::Pod;
                }
            } else if let Some(src) = snat_address::<F, W>(world, at, headers, addr, false)? {
                plan.src = src;
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
    dst: F::Addr,
    always: bool,
) -> Result<Option<F::Addr>, Reason> {
    let ifindex = match world.route(at.ifindex, headers.tuple.src, dst, headers.proto, 0) {
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
    if !always && device.flags & device_flags::TUNNEL == 0 {
        return Ok(None);
    }
    let addr = if F::VERSION == 4 {
        [device.snat4_be, 0, 0, 0]
    } else {
        device.snat6_be
    };
    if addr == [0; 4] {
        return Err(Reason::NoSnatAddress);
    }
    Ok(Some(F::from_any(addr)))
}

/// Source ports that are tried for one flow.
const SNAT_ATTEMPTS: u32 = 8;

/// Remembers how the answers of a new flow are to be translated, and finds a source port under which no other flow
/// towards the same backend is remembered: `forward` gets it. The result is why that failed, if it did.
#[inline(never)]
fn claim<F: Family, W: World<F>>(
    world: &W,
    headers: &Headers<F::Addr>,
    forward: &mut F::Flow,
    reply: &FlowMeta,
) -> Option<Reason> {
    let config = world.config();
    let span = u32::from(config.snat_port_max.wrapping_sub(config.snat_port_min)) + 1;
    let mut candidate = flow_hash::<F>(&headers.tuple, headers.proto ^ 0xff);
    let value = F::flow(&headers.tuple.reversed(), *reply);
    for attempt in 0..SNAT_ATTEMPTS {
        if reply.flags & flow_flags::SNAT != 0 || attempt > 0 {
            let port =
                u32::from(config.snat_port_min) + ((u64::from(candidate) * u64::from(span)) >> 32) as u32;
            F::set_rewrite_sport(forward, (port as u16).to_be());
            candidate = candidate.wrapping_mul(0x9e37_79b1).wrapping_add(0x7f4a_7c15);
        }
        match claim_port::<F, W>(world, headers, forward, &value) {
            Claim::Mine => return None,
            Claim::Taken => {}
            Claim::Failed => return Some(Reason::FlowInsertFailed),
        }
    }
    Some(Reason::SnatPortsExhausted)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Claim {
    Mine,
    Taken,
    Failed,
}

impl From<Result<(), InsertError>> for Claim {
    #[inline(always)]
    fn from(result: Result<(), InsertError>) -> Self {
        if result.is_ok() { Self::Mine } else { Self::Failed }
    }
}

/// Tries the source port in `forward`; `value` is the entry for the answers.
#[inline(never)]
fn claim_port<F: Family, W: World<F>>(
    world: &W,
    headers: &Headers<F::Addr>,
    forward: &F::Flow,
    value: &F::Flow,
) -> Claim {
    let is_tcp = headers.proto == proto::TCP;
    let reply = F::meta(value);
    let now = reply.seen_ticks;
    let key = F::flow_key(&F::rewrite(forward).reversed(), headers.proto, side_of(&reply));
    if let Some(occupant) = world.flow(&key) {
        let flow = occupant.load();
        if F::rewrite(&flow) == F::rewrite(value) {
            // Ours: the request's entry was evicted, or the client begins anew. Enter both again.
            return world
                .put_flow(&key, value)
                .and_then(|()| put_forward::<F, W>(world, headers, forward))
                .into();
        }
        let meta = F::meta(&flow);
        if now.wrapping_sub(meta.seen_ticks) <= timeout_ticks(world, is_tcp, meta.state) {
            return Claim::Taken;
        }
    }
    // A datagram of a flow that was never answered finds its own entry here most of the time.
    if !is_tcp && let Some(claim) = claim_occupied::<F, W>(world, &key, value) {
        return claim;
    }
    if is_tcp && !headers.has_flags(tcp::SYN) && world.midstream_ticks() != now {
        world.set_midstream_ticks(now);
    }
    match world.put_half_open(&key, value, false) {
        Ok(()) => Claim::Mine,
        Err(InsertError::Failed) => Claim::Failed,
        Err(InsertError::Exists) => claim_occupied::<F, W>(world, &key, value).unwrap_or(Claim::Failed),
    }
}

/// Takes over an entry of `HALF_OPEN`, if it is the same flow's or expired. `None`: there is none.
#[inline(always)]
fn claim_occupied<F: Family, W: World<F>>(world: &W, key: &F::FlowKey, value: &F::Flow) -> Option<Claim> {
    let reply = F::meta(value);
    let occupant = world.half_open(key)?;
    let flow = occupant.load();
    let meta = F::meta(&flow);
    let same = F::rewrite(&flow) == F::rewrite(value);
    if same && same_generation(&meta, &reply) {
        if meta.seen_ticks != reply.seen_ticks {
            occupant.touch(reply.seen_ticks, flow_state::OPEN);
        }
        return Some(Claim::Mine);
    }
    if !same && reply.seen_ticks.wrapping_sub(meta.seen_ticks) <= world.config().half_open_ticks {
        return Some(Claim::Taken);
    }
    Some(world.put_half_open(key, value, true).into())
}

#[inline(never)]
fn put_forward<F: Family, W: World<F>>(
    world: &W,
    headers: &Headers<F::Addr>,
    forward: &F::Flow,
) -> Result<(), InsertError> {
    let key = F::flow_key(&headers.tuple, headers.proto, side_of(&F::meta(forward)));
    world.put_flow(&key, forward)
}

/// The side at which packets of an entry are seen.
#[inline(always)]
fn side_of(meta: &FlowMeta) -> Side {
    if meta.flags & flow_flags::SELF_EGRESS != 0 {
        Side::Egress
    } else {
        Side::Ingress
    }
}

/// How long an idle entry of `FLOWS` is believed.
#[inline(always)]
fn timeout_ticks<W: Env>(world: &W, is_tcp: bool, state: u8) -> u32 {
    let config = world.config();
    match (is_tcp, state) {
        (true, flow_state::OPEN) => config.tcp_ticks,
        (true, _) => config.tcp_closing_ticks,
        (false, _) => config.udp_ticks,
    }
}

#[inline(always)]
fn same_generation(a: &FlowMeta, b: &FlowMeta) -> bool {
    a.backend == b.backend
        && a.backend_generation == b.backend_generation
        && a.service == b.service
        && a.service_generation == b.service_generation
        && a.exit == b.exit
        && a.ifindex == b.ifindex
}

/// The entry of the other direction.
#[inline(always)]
fn forward_meta(reply: &FlowMeta) -> FlowMeta {
    let mut forward = *reply;
    forward.flags &= !(flow_flags::REPLY | flow_flags::OTHER_EGRESS | flow_flags::SELF_EGRESS);
    if reply.flags & flow_flags::OTHER_EGRESS != 0 {
        forward.flags |= flow_flags::SELF_EGRESS;
    }
    if reply.flags & flow_flags::SELF_EGRESS != 0 {
        forward.flags |= flow_flags::OTHER_EGRESS;
    }
    forward.exit = reply.exit >> 4 | reply.exit << 4;
    forward
}

/// The backend has answered: both directions enter `FLOWS`.
#[inline(never)]
fn promote<F: Family, W: World<F>>(
    world: &W,
    at: &Context,
    headers: &Headers<F::Addr>,
    flow: &F::Flow,
    now: u32,
) -> Option<Reason> {
    let mut meta = F::meta(flow);
    meta.seen_ticks = now;
    let client = F::rewrite(flow);
    let backend = headers.tuple.reversed();
    let forward_meta = forward_meta(&meta);
    let key = F::flow_key(&client.reversed(), headers.proto, side_of(&forward_meta));
    if headers.proto == proto::TCP
        && let Some(entry) = world.flow(&key)
    {
        // The client may already be connected to the backend of another of its SYNs.
        let occupant = entry.load();
        let other = F::meta(&occupant);
        if F::rewrite(&occupant) != backend
            && other.state == flow_state::OPEN
            && now.wrapping_sub(other.seen_ticks) <= world.config().half_open_ticks
            && world
                .backend(other.backend)
                .is_some_and(|b| b.head.generation == other.backend_generation)
        {
            return Some(Reason::FlowSuperseded);
        }
    }
    if world.put_flow(&key, &F::flow(&backend, forward_meta)).is_err() {
        return Some(Reason::FlowInsertFailed);
    }
    put_reply::<F, W>(world, at, headers, &F::flow(&client, meta))
        .err()
        .map(|_| Reason::FlowInsertFailed)
}

#[inline(never)]
fn put_reply<F: Family, W: World<F>>(
    world: &W,
    at: &Context,
    headers: &Headers<F::Addr>,
    flow: &F::Flow,
) -> Result<(), InsertError> {
    world.put_flow(&F::flow_key(&headers.tuple, headers.proto, at.side()), flow)
}

/// Rewrites the packet and sends it where its flow goes.
#[inline(always)]
fn finish<F: RewriteIp, P: Packet, W: World<F>>(
    packet: &mut P,
    world: &W,
    at: &Context,
    headers: &Headers<F::Addr>,
    new: &Tuple<F::Addr>,
    meta: &FlowMeta,
) -> Verdict {
    let exit = match leave::<F, P, W>(packet, world, at, headers, new, meta) {
        Leave::Exit(verdict) => verdict,
        Leave::Unchanged => return Verdict::Pass,
        Leave::TooBig(mtu) => {
            return answered::<F, W>(
                world,
                crate::answer::too_big::<F, P, W>(packet, world, at, headers, mtu),
            );
        }
        Leave::Drop(reason) => return drop_packet::<F, W>(world, reason),
    };
    match rewrite::<F, P>(packet, at.l3, headers, new) {
        Some(()) => exit,
        None => drop_packet::<F, W>(world, Reason::RewriteFailed),
    }
}

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
    new: &Tuple<F::Addr>,
    meta: &FlowMeta,
) -> Leave {
    let exit = meta.exit & 0x0f;
    if exit == Exit::Pass as u8 {
        return Leave::Exit(Verdict::Pass);
    }
    let verdict = if exit == Exit::Back as u8 {
        macs(packet)
            .ok()
            .and_then(|(dst, src)| write_macs(packet, src, dst))
            .map(|()| Verdict::Pod { ifindex: at.ifindex })
    } else if exit == Exit::Host as u8 {
        if at.ifindex == meta.ifindex && at.side() as u8 == Side::Ingress as u8 {
            return Leave::Exit(Verdict::Pass);
        }
        write_link(packet, at, meta.mac_dst, meta.mac_src).map(|()| Verdict::Host {
            ifindex: meta.ifindex,
        })
    } else if exit == Exit::Pod as u8 && meta.flags & flow_flags::REPLY != 0 {
        write_link(packet, at, meta.mac_dst, meta.mac_src).map(|()| Verdict::Pod {
            ifindex: meta.ifindex,
        })
    } else if exit == Exit::Pod as u8 {
        match world.backend(meta.backend) {
            Some(backend) if backend.ifindex != 0 => {
                write_link(packet, at, backend.pod_mac, backend.host_mac).map(|()| Verdict::Pod {
                    ifindex: backend.ifindex,
                })
            }
            _ => return route::<F, P, W>(packet, world, at, headers, new),
        }
    } else {
        return route::<F, P, W>(packet, world, at, headers, new);
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
    new: &Tuple<F::Addr>,
) -> Leave {
    let len = if packet.is_gso() { 0 } else { headers.l3_len };
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
            Verdict::Transmit { ifindex }
        }
        Route::TooBig { .. } | Route::NoNeighbour { .. } if at.hook == Hook::Xdp => return Leave::Unchanged,
        Route::Found { ifindex, .. } => Verdict::Transmit { ifindex },
        Route::NoNeighbour { ifindex } => Verdict::Resolve { ifindex },
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
fn macs<P: Packet>(packet: &P) -> Result<(Mac, Mac), Reason> {
    let [dst, src]: [Mac; 2] = packet.load(0).ok_or(Reason::Truncated)?;
    Ok((dst, src))
}

/// The verdict on a packet that an answer was made of, or could not.
#[inline(always)]
fn answered<F: Family, W: World<F>>(world: &W, failure: Option<Reason>) -> Verdict {
    match failure {
        None => Verdict::Answer,
        // The refusal itself has been counted.
        Some(Reason::NoEndpoints) => Verdict::Drop(Reason::NoEndpoints),
        Some(reason) => drop_packet::<F, W>(world, reason),
    }
}

#[inline(always)]
pub(crate) fn drop_packet<F: Family, W: World<F>>(world: &W, reason: Reason) -> Verdict {
    world.count(reason);
    Verdict::Drop(reason)
}

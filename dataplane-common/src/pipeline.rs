//! The path of a packet: parse → flow → (service → backend → new flow) → rewrite → exit.
//!
//! One function serves all hooks; what differs between them is data ([`Context`]), known at load time where it
//! decides anything. Translation is symmetric around the kernel's stack: a flow that is translated before the stack
//! (ingress) is translated back behind it (egress) at the same device, and a flow that skips the stack skips it both
//! ways. Where a direction is seen is part of its key ([`Side`]), so no hook can translate a packet twice.
//!
//! What happens to a packet of an established flow is all in this file. A first packet goes on in [`crate::begin`], a
//! first answer in [`crate::half_open`], which keep what is large in [`Work`]: a BPF program has 512 bytes of stack in all.

use crate::{
    addr::{AnyAddr, Family, Tuple, proto},
    answer,
    backend::backend_state,
    balance::find_service,
    begin,
    config::{config_flags, is_over},
    device::own_flags,
    enforce,
    exit::{Leave, leave},
    flow::{Exit, FlowMeta, Side, flow_flags, flow_state},
    fragment::{self, Waiting},
    half_open, icmp,
    packet::Packet,
    parse::{Fragment, Headers, parse_l4, tcp},
    policy::{Judged, PeerTables, PolicyFlow, VerdictEvent},
    reason::Reason,
    rewrite::{RewriteIp, rewrite},
    service::{Scope, port_set_index, service_flags},
    source,
    tables::{Entry, Env, Router, Tables},
    traffic::Sample,
    unbound,
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
    /// In one number: functions that are verified apart have no other arguments.
    #[inline(always)]
    pub fn to_raw(&self) -> u64 {
        u64::from(self.ifindex) << 32
            | (self.l3 as u64) << 16
            | u64::from(self.from_host) << 8
            | self.hook as u64
    }

    /// The context of [`Self::to_raw`].
    #[inline(always)]
    pub fn from_raw(raw: u64) -> Self {
        Self {
            hook: Hook::from_number(raw as u8),
            ifindex: (raw >> 32) as u32,
            from_host: raw >> 8 & 1 != 0,
            // The mask changes nothing: it tells the verifier.
            l3: (raw >> 16 & 0x0f) as usize,
        }
    }

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
pub trait World<F: Family>: Tables<F> + Env + Router<F> + PeerTables<F> {}
impl<F: Family, W: Tables<F> + Env + Router<F> + PeerTables<F>> World<F> for W {}

/// What is being made of one packet that is not established. All zeros is a valid value.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Work<F: Family> {
    pub headers: Headers<F::Addr>,
    /// Of the packet that an ICMP error quotes.
    pub quoted: Headers<F::Addr>,
    pub key: F::FlowKey,
    /// The service that the packet is for, or [`NO_SERVICE`].
    pub service: u32,
    /// The backend that is chosen for a new flow.
    pub backend: u32,
    /// The service's when the backend was chosen.
    pub service_generation: u16,
    /// A new flow's entry for its packets.
    pub forward: F::Flow,
    /// A new flow's entry for its answers.
    pub reply: F::Flow,
    /// The datagram that a fragment belongs to, and what is remembered of it.
    pub datagram_key: F::DatagramKey,
    pub datagram: F::Datagram,
    /// Where it comes from.
    pub source: AnyAddr,
    /// The flow at a pod, as the pod would send it, behind the translation of services.
    pub from_pod: Tuple<F::Addr>,
    pub policy_key: F::PolicyFlowKey,
    pub policy_flow: PolicyFlow,
    /// The verdict of a pod's policies, and that of before where both directions are asked.
    pub judged: Judged,
    pub judged_first: Judged,
    pub told: VerdictEvent,
    /// The [`EventKind`](crate::monitor::EventKind) of a packet that is to be translated, or 0. Whoever reads it sets it back.
    pub noted: u32,
    pub unused: u32,
}

/// In [`Work::service`]: an index that no table is large enough for.
pub(crate) const NO_SERVICE: u32 = u32::MAX;
/// In [`Work::service`]: for none, but from a port that a translated flow may have.
pub(crate) const DIRECT: u32 = NO_SERVICE - 1;

/// The stages of [`process`] that a kernel program calls apart, and the space that they share.
///
/// What most packets are, nothing to us or established, is decided by [`glance`] in the entry program's registers. For
/// the others there are functions of their own: a BPF program has 512 bytes of stack along a chain of calls, and the
/// verifier looks at a global function once, not once for each way to get there.
pub trait Stages<F: RewriteIp, P: Packet, W: World<F>> {
    fn work(&mut self) -> Option<&mut Work<F>>;

    /// [`read`], into the shared space.
    #[inline(always)]
    fn read(&mut self, packet: &mut P, at: &Context) {
        if let Some(work) = self.work() {
            read::<F, P>(packet, at, &mut work.headers);
        }
    }

    /// [`glance`], with its headers in the shared space.
    #[inline(always)]
    fn glance(&mut self, packet: &mut P, world: &W, at: &Context) -> Verdict {
        match self.work() {
            Some(work) => glance::<F, P, W>(packet, world, at, &mut work.headers),
            None => Verdict::PASS,
        }
    }

    /// [`decide`], with the glance's headers in the shared space.
    #[inline(always)]
    fn decide(&mut self, packet: &mut P, world: &W, at: &Context, verdict: Verdict) -> Verdict {
        match self.work() {
            Some(work) => decide::<F, P, W>(packet, world, at, work, verdict),
            None => Verdict::PASS,
        }
    }

    /// [`begin`], of the flow that [`decide`] has planned in the shared space.
    #[inline(always)]
    fn begin(&mut self, world: &W, at: &Context) -> Verdict {
        match self.work() {
            Some(work) => begin::<F, W>(world, at, work),
            None => Verdict::PASS,
        }
    }

    /// [`conclude`], with what is in the shared space.
    #[inline(always)]
    fn conclude(&mut self, packet: &mut P, world: &W, at: &Context, verdict: Verdict) -> Verdict {
        match self.work() {
            Some(work) => conclude::<F, P, W>(packet, world, at, work, verdict),
            None => Verdict::PASS,
        }
    }

    // The stages of policies, see `enforce`.
    fn enforce(&mut self, packet: &mut P, world: &W, at: &Context, verdict: Verdict) -> Verdict;
    fn judge(&mut self, packet: &mut P, world: &W, at: &Context) -> Verdict;
    /// See `source`.
    fn source(&mut self, packet: &mut P, world: &W, at: &Context) -> Verdict;
    /// See `unbound`.
    fn guard(&mut self, packet: &mut P, world: &W, at: &Context) -> Verdict;

    // The stages of fragments, see `fragment`. XDP leaves fragments to TC.
    fn first(&mut self, packet: &mut P, world: &W, at: &Context) -> Verdict;
    fn later(&mut self, packet: &mut P, world: &W, at: &Context) -> Verdict;
    fn hold(&mut self, packet: &mut P, world: &W, at: &Context) -> Verdict;
    fn remember(&mut self, packet: &mut P, world: &W, at: &Context, verdict: Verdict) -> Waiting;
    fn release(&mut self, packet: &mut P, world: &W, at: &Context, waiting: Waiting);
    fn release_one(&mut self, packet: &mut P, world: &W, at: &Context, waiting: Waiting, index: u32);
}

/// Decides about one packet and writes what has to be written into it.
#[inline(always)]
pub fn process<F: RewriteIp, P: Packet, W: World<F>, S: Stages<F, P, W>>(
    packet: &mut P,
    world: &W,
    at: &Context,
    stages: &mut S,
) -> Verdict {
    if at.hook == Hook::Xdp && is_foreign::<F, P, W>(packet, world, at.l3) {
        return Verdict::PASS;
    }
    if source::is_asked::<F, P, W>(packet, world, at) {
        let verdict = stages.source(packet, world, at);
        if verdict.action() == Action::Drop {
            count_drop(world, at, verdict);
            return verdict;
        }
    }
    let mut verdict = if F::VERSION == 4 {
        let mut headers = Headers::default();
        let verdict = glance::<F, P, W>(packet, world, at, &mut headers);
        if verdict.is_pending() {
            stages.read(packet, at);
        }
        verdict
    } else {
        stages.glance(packet, world, at)
    };
    if verdict.is_pending() {
        // A copy in memory, so that the glance can have its own in registers.
        let at = Context { ..*at };
        verdict = match verdict.action() {
            Action::Enforce => Verdict::to(Action::Pass, verdict.value()),
            Action::Fragment => {
                fragment::process::<F, P, W, S>(packet, world, &at, stages, verdict.value() == 0)
            }
            _ => settle::<F, P, W, S>(packet, world, &at, stages, verdict),
        };
        if verdict.is_open() && enforce::is_asked(world, &at) {
            verdict = stages.enforce(packet, world, &at, verdict);
        }
    }
    if verdict.is_open() && unbound::is_guarded(world, at) {
        verdict = stages.guard(packet, world, at);
    }
    if verdict.action() == Action::Drop {
        count_drop(world, at, verdict);
    }
    verdict
}

/// Counts a packet that is dropped.
#[inline(always)]
fn count_drop<W: Env>(world: &W, at: &Context, verdict: Verdict) {
    world.count(verdict.value());
    if at.is_pod() {
        world.count_pod_drop(at.ifindex);
    }
}

/// Brings what [`glance`] has left undecided to an end.
#[inline(always)]
pub(crate) fn settle<F: RewriteIp, P: Packet, W: World<F>, S: Stages<F, P, W>>(
    packet: &mut P,
    world: &W,
    at: &Context,
    stages: &mut S,
    mut verdict: Verdict,
) -> Verdict {
    if verdict.action() == Action::Judge {
        verdict = stages.judge(packet, world, at);
    }
    if matches!(verdict.action(), Action::Miss | Action::Icmp | Action::Given) {
        verdict = stages.decide(packet, world, at, verdict);
    }
    if verdict.action() == Action::Next {
        verdict = stages.begin(world, at);
    }
    if verdict.is_pending() {
        verdict = stages.conclude(packet, world, at, verdict);
    }
    verdict
}

/// Decides what [`glance`] has left undecided. `NEXT`: to [`begin`] the flow that is planned in `work`.
#[inline(always)]
pub fn decide<F: RewriteIp, P: Packet, W: World<F>>(
    packet: &mut P,
    world: &W,
    at: &Context,
    work: &mut Work<F>,
    mut verdict: Verdict,
) -> Verdict {
    if verdict.action() == Action::Miss {
        work.service = verdict.value();
        verdict = half_open::find::<F, P, W>(packet, world, at, work);
        if verdict.action() == Action::Next && work.service == DIRECT {
            return begin::direct::<F, W>(world, at, work);
        }
        if verdict.action() == Action::Next {
            verdict = begin::select::<F, W>(world, at, work);
            if verdict.action() == Action::Next {
                verdict = begin::plan::<F, P, W>(packet, world, at, work);
            }
            begin::count_dropped::<F, W>(world, work, verdict);
        }
    } else if verdict.action() == Action::Icmp {
        verdict = icmp::echo::<F, P, W>(packet, world, at, work);
        if verdict.action() == Action::Next {
            verdict = icmp::find::<F, P, W>(packet, world, at, work);
        }
    } else if verdict.action() == Action::Given {
        verdict = begin::given::<F, W>(world, work);
    }
    verdict
}

/// Begins a flow, if policies allow it, and remembers it.
#[inline(always)]
pub fn begin<F: Family, W: World<F>>(world: &W, at: &Context, work: &mut Work<F>) -> Verdict {
    let verdict = match enforce::beginning::<F, W>(world, at, work) {
        Verdict::NEXT => begin::claim::<F, W>(world, work),
        decided => decided,
    };
    begin::count_dropped::<F, W>(world, work, verdict);
    verdict
}

/// Writes what has been decided: a translation, or an answer.
#[inline(always)]
pub fn conclude<F: RewriteIp, P: Packet, W: World<F>>(
    packet: &mut P,
    world: &W,
    at: &Context,
    work: &mut Work<F>,
    mut verdict: Verdict,
) -> Verdict {
    if verdict.action() == Action::Translate {
        verdict = if work.headers.proto == F::ICMP {
            icmp::finish::<F, P, W>(packet, world, at, work)
        } else {
            begin::translate::<F, P, W>(packet, world, at, work)
        };
    }
    if verdict.action() == Action::Refuse {
        verdict = answer::refuse::<F, P, W>(packet, world, at, &work.headers, verdict.value());
    } else if verdict.action() == Action::TooBig {
        let mtu = verdict.value() as u16;
        verdict = answer::too_big::<F, P, W>(packet, world, at, &work.headers, mtu);
    }
    verdict
}

/// Reads the headers, and finishes the packet if a live entry speaks for it or if it can't be anything to us.
#[inline(always)]
pub fn glance<F: RewriteIp, P: Packet, W: World<F>>(
    packet: &mut P,
    world: &W,
    at: &Context,
    headers: &mut Headers<F::Addr>,
) -> Verdict {
    let verdict = services::<F, P, W>(packet, world, at, headers);
    if verdict.is_open() && enforce::is_asked(world, at) {
        return enforce::glance::<F, W>(world, at, headers, verdict);
    }
    verdict
}

/// Reads the headers once more that a [`glance`] had in registers: where it decides, nothing of them is kept.
#[inline(always)]
pub fn read<F: RewriteIp, P: Packet>(packet: &P, at: &Context, headers: &mut Headers<F::Addr>) {
    // What can't be read, the glance has said.
    if F::parse_ip(packet, at.l3, headers).is_ok() && kind::<F>(headers, at) == Kind::Flow {
        let _ = parse_l4::<F, P>(packet, at.l3, headers);
    }
}

/// What services have to do with a packet, at the first look.
#[inline(always)]
fn services<F: RewriteIp, P: Packet, W: World<F>>(
    packet: &mut P,
    world: &W,
    at: &Context,
    headers: &mut Headers<F::Addr>,
) -> Verdict {
    if let Err(reason) = F::parse_ip(packet, at.l3, headers) {
        return not_understood::<F, W>(world, at, reason);
    }
    match kind::<F>(headers, at) {
        Kind::Other => Verdict::PASS,
        Kind::FirstFragment => Verdict::to(Action::Fragment, 0),
        Kind::LaterFragment => Verdict::to(Action::Fragment, 1),
        Kind::Icmp => Verdict::to(Action::Icmp, 0),
        Kind::Flow => established::<F, P, W>(packet, world, at, headers),
    }
}

/// A packet that is passed because it can't be read. XDP leaves the counting to TC, which sees it next.
#[inline(always)]
pub(crate) fn not_understood<F: Family, W: World<F>>(world: &W, at: &Context, reason: Reason) -> Verdict {
    if at.hook != Hook::Xdp {
        world.count(reason as u32);
    }
    Verdict::UNREADABLE
}

/// What kind of attention a packet needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Flow,
    Icmp,
    FirstFragment,
    LaterFragment,
    Other,
}

#[inline(always)]
fn kind<F: Family>(headers: &Headers<F::Addr>, at: &Context) -> Kind {
    let whole = headers.fragment == Fragment::Whole;
    if headers.proto == proto::TCP || headers.proto == proto::UDP {
        if whole {
            return Kind::Flow;
        }
    } else if whole {
        return if headers.proto == F::ICMP && at.hook != Hook::Xdp {
            Kind::Icmp
        } else {
            Kind::Other
        };
    }
    if at.hook == Hook::Xdp || !fragment::may_be_of_flow::<F>(headers) {
        Kind::Other
    } else if headers.fragment == Fragment::First {
        Kind::FirstFragment
    } else {
        Kind::LaterFragment
    }
}

/// A TCP or UDP packet: finishes it if a live entry speaks for it, and passes it if it can't be anything to us.
#[inline(always)]
pub(crate) fn established<F: RewriteIp, P: Packet, W: World<F>>(
    packet: &mut P,
    world: &W,
    at: &Context,
    headers: &mut Headers<F::Addr>,
) -> Verdict {
    if !packet.covers(at.l3 + usize::from(headers.l3_len)) && !packet.is_gso() {
        return not_understood::<F, W>(world, at, Reason::Truncated);
    }
    if let Err(reason) = parse_l4::<F, P>(packet, at.l3, headers) {
        return not_understood::<F, W>(world, at, reason);
    }
    let key = F::flow_key(&headers.tuple, headers.proto, at.side());
    let mut service = NO_SERVICE;
    if let Some(entry) = world.flow(&key) {
        let now = world.now_ticks();
        let flow = entry.flow();
        let meta = F::meta(flow);
        let liveness = liveness(world, meta, headers, now);
        // TCP outlives its service, unless the address belongs to somebody else by now.
        if liveness != Liveness::Live {
            if liveness == Liveness::Dead && headers.is_syn() {
                // What it was for has ended: it must not speak against the answer of another backend.
                entry.touch(meta.seen_ticks, flow_state::CLOSING);
            }
            service = service_of::<F, W>(world, at, headers);
        }
        if liveness == Liveness::Live || liveness == Liveness::Orphaned && service == NO_SERVICE {
            if at.hook == Hook::Xdp && !xdp_finishes(meta) {
                return Verdict::PASS;
            }
            if enforce::is_stale(world, at, meta) {
                return Verdict::to(Action::Judge, 0);
            }
            let state = state_after(headers, meta.state);
            if state != meta.state || now != meta.seen_ticks {
                entry.touch(now, state);
            }
            return finish::<F, P, W>(packet, world, at, headers, flow);
        }
    } else {
        service = service_of::<F, W>(world, at, headers);
    }
    if service == NO_SERVICE && may_be_direct(world, at, headers) {
        service = DIRECT;
    }
    if service != NO_SERVICE || may_be_first_answer(world, headers) && world.half_open(&key).is_some() {
        return Verdict::to(Action::Miss, service);
    }
    if at.hook == Hook::FromPod
        && headers.proto == proto::UDP
        && world.config(|c| &c.flags) & config_flags::SOCKET_PODS != 0
    {
        return Verdict::to(Action::Given, 0);
    }
    Verdict::PASS
}

/// The state of a flow after one of its packets.
#[inline(always)]
pub(crate) fn state_after<A>(headers: &Headers<A>, before: u8) -> u8 {
    if headers.has_flags(tcp::FIN | tcp::RST) {
        flow_state::CLOSING
    } else if headers.payload {
        flow_state::OPEN
    } else {
        before
    }
}

/// Whether XDP is done with a packet at the first look, as with most that arrive at a node: its headers are plain, and
/// its port is neither a frontend's nor one of those that sources are translated to.
#[inline(always)]
fn is_foreign<F: RewriteIp, P: Packet, W: World<F>>(packet: &P, world: &W, l3: usize) -> bool {
    let Some((l4_proto, dport_be)) = F::plain_port(packet, l3) else {
        return false;
    };
    let port = u16::from_be(dport_be);
    !is_for_translation(world, port)
        && world.ports(port_set_index(l4_proto, port)).any & 1u64 << (port & 63) == 0
}

/// Whether sources are translated to a port.
#[inline(always)]
fn is_for_translation<W: Env>(world: &W, port: u16) -> bool {
    port >= world.config(|c| &c.snat_port_min) && port <= world.config(|c| &c.snat_port_max)
}

/// Whether the kernel's stack sends a packet from a port that a translated flow may have: without an entry of its own,
/// its answers would be taken for the other's.
#[inline(always)]
fn may_be_direct<A, W: Env>(world: &W, at: &Context, headers: &Headers<A>) -> bool {
    at.hook as u8 == Hook::ToNetdev as u8 && is_for_translation(world, u16::from_be(headers.tuple.sport_be))
}

/// XDP finishes only what leaves by a route; all else passes unchanged to TC.
#[inline(always)]
pub(crate) fn xdp_finishes(meta: &FlowMeta) -> bool {
    meta.exit & 0x0f == Exit::Route as u8
}

/// Whether a packet without an entry in `FLOWS` could be the first answer of a flow in `HALF_OPEN`. Only a SYN-ACK
/// or a RST is, in TCP, unless flows were begun in mid-stream lately.
#[inline(always)]
pub(crate) fn may_be_first_answer<A, W: Env>(world: &W, headers: &Headers<A>) -> bool {
    if headers.proto == proto::UDP || headers.has_flags(tcp::SYN | tcp::RST) {
        return !headers.is_syn();
    }
    let midstream = world.midstream_ticks();
    midstream != 0 && !is_over(world.now_ticks(), midstream, world.config(|c| &c.half_open_ticks))
}

/// The service that a packet is for, or [`NO_SERVICE`]. No `Option`: what that leaves undefined in a register where
/// there is none, the verifier may find to be read.
#[inline(always)]
fn service_of<F: Family, W: World<F>>(world: &W, at: &Context, headers: &Headers<F::Addr>) -> u32 {
    let tuple = &headers.tuple;
    let Some(scope) = at.scope() else {
        return NO_SERVICE;
    };
    let is_lo = at.hook as u8 == Hook::ToLo as u8;
    let flags = if is_lo {
        own_flags::NODE_PORT | own_flags::HOST_NODE_PORT
    } else {
        own_flags::NODE_PORT
    };
    match find_service::<F, W>(world, tuple.dst, tuple.dport_be, headers.proto, scope, flags) {
        // From anywhere else, it is an attempt to reach what is not for others.
        Some(_) if !is_lo && F::is_loopback(&tuple.dst) => NO_SERVICE,
        found => found.unwrap_or(NO_SERVICE),
    }
}

/// Whether an entry still speaks for its packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Liveness {
    Live,
    /// Its service is gone, and it may outlive it.
    Orphaned,
    Dead,
}

#[inline(always)]
pub(crate) fn liveness<A, W: Env>(world: &W, meta: &FlowMeta, headers: &Headers<A>, now: u32) -> Liveness {
    let is_tcp = headers.proto == proto::TCP;
    if is_over(now, meta.seen_ticks, timeout_ticks(world, is_tcp, meta.state)) {
        return Liveness::Dead;
    }
    if meta.flags & flow_flags::REPLY != 0 {
        // A backend accepts a client that has begun anew: who speaks for it now, `HALF_OPEN` knows.
        return if meta.state == flow_state::CLOSING && headers.has_flags(tcp::SYN) {
            Liveness::Dead
        } else {
            Liveness::Live
        };
    }
    if meta.flags & flow_flags::DIRECT != 0 {
        // One that begins anew asks for its port anew.
        return if headers.is_syn() {
            Liveness::Dead
        } else {
            Liveness::Live
        };
    }
    // One by one: together, what is not there would be read from the stack (refused before 6.3).
    let Some(backend) = world.backend_head(meta.backend) else {
        return Liveness::Dead;
    };
    let Some(service) = world.service_head(meta.service) else {
        return Liveness::Dead;
    };
    if backend.generation != meta.backend_generation
        || backend.state == backend_state::GONE
        || !is_tcp && backend.state == backend_state::DRAINING
        || service.generation != meta.service_generation
    {
        return Liveness::Dead;
    }
    // A client that begins anew from the port of a connection that has ended, or whose backend takes no new ones.
    if is_tcp
        && headers.is_syn()
        && (meta.state != flow_state::OPEN || backend.state != backend_state::ACTIVE)
    {
        return Liveness::Dead;
    }
    match (service.flags & service_flags::DELETED != 0, is_tcp) {
        (false, _) => Liveness::Live,
        (true, true) => Liveness::Orphaned,
        (true, false) => Liveness::Dead,
    }
}

/// How long an idle entry of `FLOWS` is believed.
#[inline(always)]
pub(crate) fn timeout_ticks<W: Env>(world: &W, is_tcp: bool, state: u8) -> u32 {
    match (is_tcp, state) {
        (true, flow_state::OPEN) => world.config(|c| &c.tcp_ticks),
        (true, _) => world.config(|c| &c.tcp_closing_ticks),
        (false, _) => world.config(|c| &c.udp_ticks),
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
        Leave::Drop(reason) => return Verdict::drop(reason),
    };
    if rewrite::<F, P>(packet, at.l3, headers, F::rewrite(flow)).is_none() {
        return Verdict::drop(Reason::RewriteFailed);
    }
    if world.is_sampled() {
        let meta = F::meta(flow);
        let bytes = if packet.is_gso() {
            packet.len() - at.l3
        } else {
            headers.l3_len.into()
        };
        let sample = Sample {
            bytes: bytes as u32,
            is_reply: meta.flags & flow_flags::REPLY != 0,
        };
        world.count_sample(meta.service, meta.backend, sample);
    }
    exit
}

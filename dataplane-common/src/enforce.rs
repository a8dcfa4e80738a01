//! `from_pod` and `to_pod`: what the policies of a pod say of a packet, and what is remembered of it.
//!
//! Policies see pods, so the tuple that is judged is the one behind the translation of services. A translated flow keeps
//! in its entry when it was judged last ([`FlowMeta::judged`](crate::flow::FlowMeta::judged)); any other flow has an entry in
//! `POLICY_FLOWS` at each of its pods. Either way the first look finds it, and nothing else is asked until `POLICY_REVISION`
//! changes; then each flow is judged again, in the direction in which it began.
//!
//! What is not judged: replies (they belong to a flow that was), ICMP errors about such flows, neighbour discovery, a pod and
//! itself, and what this node sends itself, which has entered by no device and has an address of the node.
//!
//! A TCP segment in the middle of a connection that nothing is known of, because its entry was evicted or the policies are
//! newer, is allowed if it would be in either direction: who began cannot be told.

use crate::{
    addr::{Family, proto},
    config::{config_flags, is_over},
    flow::{Exit, FlowMeta, flow_flags, flow_state},
    icmp,
    packet::Packet,
    parse::{Fragment, Headers, parse_ports},
    pipeline::{Context, Work, World, state_after, timeout_ticks},
    policy::{self, Judgement, NO_RULE_INDEX, PolicyFlow, REVISION_NONE, SET_NONE, policy_flow_flags},
    reason::Reason,
    rewrite::RewriteIp,
    tables::{Entry, Env, PolicyEntry},
    unbound::is_unbound,
    verdict::{Action, Hook, Verdict},
};

impl Context {
    /// Whether this hook is a pod's interface.
    #[inline(always)]
    pub(crate) fn is_pod(&self) -> bool {
        matches!(self.hook, Hook::FromPod | Hook::ToPod)
    }
}

/// Whether policies have to be asked at this hook.
#[inline(always)]
pub(crate) fn is_asked<W: Env>(world: &W, at: &Context) -> bool {
    at.is_pod() && world.policy_revision() != REVISION_NONE
}

/// Whether a translated flow has to be judged before its packet goes on.
#[inline(always)]
pub(crate) fn is_stale<W: Env>(world: &W, at: &Context, meta: &FlowMeta) -> bool {
    if !at.is_pod() {
        return false;
    }
    let revision = world.policy_revision();
    meta.judged != revision
        && revision != REVISION_NONE
        && (meta.judged == REVISION_NONE || !keeps_verdicts(world))
}

/// A change of policies is for new flows only.
#[inline(always)]
fn keeps_verdicts<W: Env>(world: &W) -> bool {
    world.config(|c| &c.flags) & config_flags::POLICY_NEW_FLOWS_ONLY != 0
}

/// What a packet says about its flow.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    /// It begins one: not a reply, whatever is known.
    Beginning,
    /// It may begin one.
    Any,
    /// It belongs to one that has begun, in one direction or the other.
    Middle,
    /// No policy is about it.
    Exempt,
    /// It says that a packet of a flow was lost, and belongs to that.
    Error,
    /// That can't be told.
    Unreadable,
}

/// A packet that no translated flow speaks for: most belong to a flow that is allowed, and go on.
#[inline(always)]
pub(crate) fn glance<F: Family, W: World<F>>(
    world: &W,
    at: &Context,
    headers: &Headers<F::Addr>,
    verdict: Verdict,
) -> Verdict {
    let is_plain = headers.fragment == Fragment::Whole
        && match headers.proto {
            proto::TCP => !headers.is_syn(),
            proto => proto == proto::UDP,
        };
    if verdict == Verdict::PASS && is_plain && is_known::<F, W>(world, at, headers) {
        return Verdict::ONWARD;
    }
    Verdict::to(Action::Enforce, verdict.value())
}

/// Whether a packet that begins nothing belongs to a flow that is allowed, whichever end began it.
#[inline(always)]
fn is_known<F: Family, W: World<F>>(world: &W, at: &Context, headers: &Headers<F::Addr>) -> bool {
    let key = if at.hook as u8 == Hook::FromPod as u8 {
        F::policy_flow_key(&headers.tuple, headers.proto)
    } else {
        F::policy_flow_key(&headers.tuple.reversed(), headers.proto)
    };
    let Some(known) = world.policy_flow(&key) else {
        return false;
    };
    let now = world.now_ticks();
    is_live(world, at, known.flow(), headers.proto, now) && goes_on(world, &known, now)
}

/// Whether an entry speaks for packets at this interface.
#[inline(always)]
fn is_live<W: Env>(world: &W, at: &Context, flow: &PolicyFlow, l4_proto: u8, now: u32) -> bool {
    let timeout = timeout_ticks(world, l4_proto == proto::TCP, flow_state::OPEN);
    flow.ifindex == at.ifindex && !is_over(now, flow.seen_ticks, timeout)
}

/// Whether what was found when the flow of a live entry was judged is still so. Notes that the entry is in use.
#[inline(always)]
fn goes_on<W: Env, E: PolicyEntry>(world: &W, entry: &E, now: u32) -> bool {
    let flow = entry.flow();
    if flow.revision != world.policy_revision() && !keeps_verdicts(world) {
        return false;
    }
    if flow.seen_ticks != now {
        entry.touch(now);
    }
    true
}

/// A packet that no known flow speaks for; one that could not be read, if `verdict` says so.
#[inline(always)]
pub fn untranslated<F: RewriteIp, P: Packet, W: World<F>>(
    packet: &P,
    world: &W,
    at: &Context,
    work: &mut Work<F>,
    verdict: Verdict,
) -> Verdict {
    if verdict != Verdict::PASS {
        return unreadable(world, at);
    }
    let tuple = &work.headers.tuple;
    if tuple.src == tuple.dst {
        return Verdict::PASS;
    }
    let from_pod = at.hook as u8 == Hook::FromPod as u8;
    let part = world.forget(part::<F, P>(packet, work) as u32);
    if part == Part::Exempt as u32 {
        return Verdict::PASS;
    }
    if part == Part::Unreadable as u32 {
        return unreadable(world, at);
    }
    if part == Part::Error as u32 {
        if related::<F, P, W>(packet, world, at, work) {
            return Verdict::PASS;
        }
        work.headers.tuple.sport_be = 0;
        work.headers.tuple.dport_be = 0;
    }
    work.from_pod = if from_pod {
        work.headers.tuple
    } else {
        work.headers.tuple.reversed()
    };
    work.policy_key = F::policy_flow_key(&work.from_pod, work.headers.proto);
    let now = world.now_ticks();
    work.policy_flow = PolicyFlow {
        ifindex: at.ifindex,
        revision: REVISION_NONE,
        seen_ticks: now,
        flags: if from_pod { policy_flow_flags::FROM_POD } else { 0 },
    };
    if let Some(entry) = world.policy_flow(&work.policy_key) {
        let known = entry.flow();
        let is_own = (known.flags & policy_flow_flags::FROM_POD != 0) == from_pod;
        if is_live(world, at, known, work.headers.proto, now) && (is_own || part != Part::Beginning as u32) {
            if goes_on(world, &entry, now) {
                return Verdict::PASS;
            }
            work.policy_flow.flags = known.flags;
            work.policy_flow.revision = known.revision;
        }
    }
    enter::<F, W>(world, at, work, part == Part::Middle as u32)
}

/// What a packet says about its flow. Adds the ports to the headers where the protocol has some.
#[inline(always)]
fn part<F: RewriteIp, P: Packet>(packet: &P, work: &mut Work<F>) -> Part {
    let headers = &mut work.headers;
    match headers.proto {
        proto::TCP | proto::UDP if headers.fragment == Fragment::Later => Part::Unreadable,
        proto::TCP if headers.is_syn() => Part::Beginning,
        proto::TCP => Part::Middle,
        proto::SCTP if headers.fragment != Fragment::Later => {
            // RFC 9260, sections 3.1 and 3.2: the ports begin the common header, a chunk's type follows it.
            if parse_ports::<F, P>(packet, headers).is_err() {
                return Part::Unreadable;
            }
            match packet.load::<[u8; 2]>(headers.l4() + 12) {
                Some([1, _]) => Part::Beginning,
                Some(_) => Part::Middle,
                None => Part::Unreadable,
            }
        }
        proto if proto == F::ICMP && headers.fragment != Fragment::Later => {
            match packet.load::<[u8; 2]>(headers.l4()) {
                Some([kind, _]) => icmp_part::<F>(kind),
                None => Part::Unreadable,
            }
        }
        _ => Part::Any,
    }
}

/// Types: RFC 792; RFC 4443, RFC 4861 (neighbour discovery), RFC 2710 and RFC 3810 (multicast listeners).
#[inline(always)]
fn icmp_part<F: Family>(kind: u8) -> Part {
    if icmp::is_error::<F>(kind) {
        return Part::Error;
    }
    match (F::VERSION, kind) {
        (4, 8) | (6, 128) => Part::Beginning,
        (6, 130..=137 | 143) => Part::Exempt,
        _ => Part::Any,
    }
}

/// Whether an ICMP error is about a flow that the pod has. Apart, so that its stack does not add up with that of a verdict.
#[inline(never)]
fn related<F: RewriteIp, P: Packet, W: World<F>>(
    packet: &P,
    world: &W,
    at: &Context,
    work: &mut Work<F>,
) -> bool {
    let quoted = &mut work.quoted;
    if F::parse_ip(packet, work.headers.l4() + icmp::HEADER_LEN, quoted).is_err()
        || quoted.fragment == Fragment::Later
    {
        return false;
    }
    if matches!(quoted.proto, proto::TCP | proto::UDP | proto::SCTP)
        && parse_ports::<F, P>(packet, quoted).is_err()
    {
        return false;
    }
    // It travels against the packet that it quotes.
    work.from_pod = if at.hook as u8 == Hook::FromPod as u8 {
        quoted.tuple.reversed()
    } else {
        quoted.tuple
    };
    work.policy_key = F::policy_flow_key(&work.from_pod, quoted.proto);
    world
        .policy_flow(&work.policy_key)
        .is_some_and(|known| known.flow().ifindex == at.ifindex)
}

/// A packet of which it can't be told what flow it belongs to: no policy could allow it.
#[inline(never)]
fn unreadable<W: Env>(world: &W, at: &Context) -> Verdict {
    match world.pod_policy(at.ifindex) {
        Some(pod) if pod.ingress == SET_NONE && pod.egress == SET_NONE => Verdict::PASS,
        Some(_) => Verdict::drop(Reason::PolicyUnreadable),
        None => Verdict::drop(Reason::PolicyUnknownPod),
    }
}

/// Judges a flow that is not known, or was judged before the policies changed, and remembers it.
#[inline(never)]
fn enter<F: RewriteIp, W: World<F>>(world: &W, at: &Context, work: &mut Work<F>, is_middle: bool) -> Verdict {
    let is_known = work.policy_flow.revision != REVISION_NONE;
    // Before anything else is read: what changes meanwhile makes another revision.
    work.policy_flow.revision = world.policy_revision();
    if at.from_host && at.hook as u8 == Hook::ToPod as u8 && world.own_address(work.headers.tuple.src) != 0 {
        work.policy_flow.flags = policy_flow_flags::FROM_NODE;
    }
    if at.hook as u8 == Hook::FromPod as u8 && is_unbound::<F, W>(world, &work.headers.tuple.dst) {
        work.judged.ifindex = at.ifindex;
        work.judged.outward = 1;
        tell::<F, W>(world, work, Judgement::NONE, Reason::PolicyUnknownPod);
        return Verdict::drop(Reason::PolicyUnknownPod);
    }
    if work.policy_flow.flags & policy_flow_flags::FROM_NODE == 0 {
        let outward = work.policy_flow.flags & policy_flow_flags::FROM_POD != 0;
        let mut verdict = judge::<F, W>(world, at.ifindex, work, outward);
        if verdict != Verdict::PASS && is_middle && !is_known {
            work.judged_first = work.judged;
            verdict = judge::<F, W>(world, at.ifindex, work, !outward);
            if verdict == Verdict::PASS {
                work.policy_flow.flags ^= policy_flow_flags::FROM_POD;
            } else {
                work.judged = work.judged_first;
            }
        }
        report::<F, W>(world, work);
        if verdict != Verdict::PASS {
            if verdict == Verdict::drop(Reason::PolicyUnknownPod) {
                tell::<F, W>(world, work, Judgement::NONE, Reason::PolicyUnknownPod);
            }
            return verdict;
        }
    }
    world.put_policy_flow(&work.policy_key, &work.policy_flow);
    Verdict::PASS
}

/// What a pod's set says of `work.from_pod`: of what the pod sends, or else of what reaches it. `ifindex` is the pod's. What
/// decided is in `work.judged`, for [`report`].
#[inline(never)]
fn judge<F: Family, W: World<F>>(world: &W, ifindex: u32, work: &mut Work<F>, outward: bool) -> Verdict {
    work.judged.set = SET_NONE;
    work.judged.audit = SET_NONE;
    let Some(pod) = world.pod_policy(ifindex) else {
        work.judged.ifindex = ifindex;
        work.judged.outward = u32::from(outward);
        return Verdict::drop(Reason::PolicyUnknownPod);
    };
    let tuple = &work.from_pod;
    let (set, audit, port_be) = if outward {
        (pod.egress, pod.audit_egress, tuple.dport_be)
    } else {
        (pod.ingress, pod.audit_ingress, tuple.sport_be)
    };
    if set == SET_NONE && audit == SET_NONE {
        return Verdict::PASS;
    }
    let class = world.forget(policy::class::<F, W>(world, &tuple.dst));
    let judgement = world.judge(set, class, work.headers.proto, port_be);
    work.judged.ifindex = ifindex;
    work.judged.outward = u32::from(outward);
    work.judged.set = set;
    work.judged.audit = audit;
    work.judged.judgement = judgement.to_raw();
    if audit != set {
        work.judged.would_be = world.judge(audit, class, work.headers.proto, port_be).to_raw();
    }
    if judgement.is_allowed() {
        Verdict::PASS
    } else {
        Verdict::drop(denied(judgement))
    }
}

#[inline(always)]
fn denied(judgement: Judgement) -> Reason {
    if judgement.is_broken() {
        Reason::PolicyBroken
    } else {
        Reason::PolicyDenied
    }
}

/// Counts and tells the verdict in `work.judged`, which is final, and what a dry run would make of it. One that allows is told
/// where that is asked for.
#[inline(never)]
fn report<F: Family, W: World<F>>(world: &W, work: &mut Work<F>) {
    let (set, audit) = (work.judged.set, work.judged.audit);
    if set == SET_NONE && audit == SET_NONE {
        return;
    }
    let judgement = Judgement::from_raw(work.judged.judgement);
    let allowed = judgement.is_allowed();
    if set != SET_NONE {
        world.count_verdict(set, judgement, false);
    }
    if allowed {
        world.count(Reason::PolicyAllowed as u32);
        if world.config(|c| &c.flags) & config_flags::TELL_ALLOWED != 0 {
            tell::<F, W>(world, work, judgement, Reason::PolicyAllowed);
        }
    } else {
        tell::<F, W>(world, work, judgement, denied(judgement));
    }
    if audit == set {
        return;
    }
    let would_be = Judgement::from_raw(work.judged.would_be);
    if would_be.is_allowed() != allowed {
        let reason = if allowed {
            Reason::DryRunDenied
        } else {
            Reason::DryRunAllowed
        };
        world.count_verdict(audit, would_be, true);
        world.count(reason as u32);
        tell::<F, W>(world, work, would_be, reason);
    }
}

/// Tells user space of a verdict, unless there have been too many about the pod just now.
#[inline(never)]
pub(crate) fn tell<F: Family, W: World<F>>(
    world: &W,
    work: &mut Work<F>,
    judgement: Judgement,
    reason: Reason,
) {
    let ifindex = work.judged.ifindex;
    let allows = reason as u32 == Reason::PolicyAllowed as u32;
    let Some(untold) = world.may_tell(ifindex, allows) else {
        return;
    };
    let outward = work.judged.outward;
    let event = &mut work.told;
    let tuple = &work.from_pod;
    if outward != 0 {
        (event.src_be, event.dst_be) = (F::to_any(tuple.src), F::to_any(tuple.dst));
        (event.sport_be, event.dport_be) = (tuple.sport_be, tuple.dport_be);
    } else {
        (event.src_be, event.dst_be) = (F::to_any(tuple.dst), F::to_any(tuple.src));
        (event.sport_be, event.dport_be) = (tuple.dport_be, tuple.sport_be);
    }
    event.ifindex = ifindex;
    event.rule = judgement.rule().unwrap_or(NO_RULE_INDEX);
    event.reason = reason as u32;
    event.revision = world.policy_revision();
    event.untold = untold;
    event.family = F::VERSION;
    event.proto = work.headers.proto;
    event.outward = outward as u8;
    world.tell(event);
}

/// [`judge`] where its verdict is the final one.
#[inline(always)]
fn judge_at_once<F: Family, W: World<F>>(
    world: &W,
    ifindex: u32,
    work: &mut Work<F>,
    outward: bool,
) -> Verdict {
    let verdict = judge::<F, W>(world, ifindex, work, outward);
    report::<F, W>(world, work);
    verdict
}

/// A packet of a translated flow, whose entry is `work.forward`: what the policies of its pods say that meet here. With
/// the fast path, both do: the packet does not pass the other pod's hooks.
#[inline(never)]
pub(crate) fn translated<F: Family, W: World<F>>(world: &W, at: &Context, work: &mut Work<F>) -> Verdict {
    let meta = F::meta(&work.forward);
    let is_reply = meta.flags & flow_flags::REPLY != 0;
    let exit = meta.exit & 0x0f;
    // A pod and itself, and the node's own connection.
    if exit == Exit::Back as u8 || is_reply && exit == Exit::Host as u8 {
        return Verdict::PASS;
    }
    let mut far = 0;
    if exit == Exit::Pod as u8 {
        far = if is_reply {
            meta.ifindex
        } else {
            world.backend(meta.backend).map_or(0, |backend| backend.ifindex)
        };
    }
    let at_client = at.hook as u8 == Hook::ToPod as u8;
    work.from_pod = if at_client {
        work.headers.tuple.reversed()
    } else if is_reply {
        work.headers.tuple
    } else {
        F::rewrite(&work.forward).tuple()
    };
    // Seen by the client, on either side of netfilter's translation: as it would be behind it.
    if meta.flags & flow_flags::LEFT != 0
        && at_client == is_reply
        && let Some(backend) = world.backend(meta.backend)
    {
        work.from_pod.dst = F::from_any(backend.addr_be);
        work.from_pod.dport_be = backend.head.port_be;
    }
    let outward = at_client || !is_reply;
    let verdict = judge_at_once::<F, W>(world, at.ifindex, work, outward);
    if verdict != Verdict::PASS || far == 0 {
        return verdict;
    }
    work.from_pod = work.from_pod.reversed();
    judge_at_once::<F, W>(world, far, work, !outward)
}

/// Whether `work.forward` leads to an address of this node's pods that no interface is known for.
#[inline(never)]
fn leads_nowhere<F: Family, W: World<F>>(world: &W, at: &Context, work: &Work<F>) -> bool {
    let enters = matches!(at.hook, Hook::FromNetdev | Hook::FromPod);
    enters
        && F::meta(&work.forward).flags & flow_flags::REPLY == 0
        && is_unbound::<F, W>(world, F::rewrite(&work.forward).dst)
}

/// Judges a flow that is about to begin, whose entries are in `work`. `NEXT`: it may.
#[inline(always)]
pub(crate) fn beginning<F: Family, W: World<F>>(world: &W, at: &Context, work: &mut Work<F>) -> Verdict {
    let revision = world.policy_revision();
    if revision == REVISION_NONE {
        return Verdict::NEXT;
    }
    if leads_nowhere::<F, W>(world, at, work) {
        return Verdict::drop(Reason::PolicyUnknownPod);
    }
    if !at.is_pod() {
        return Verdict::NEXT;
    }
    let verdict = translated::<F, W>(world, at, work);
    if verdict != Verdict::PASS {
        return verdict;
    }
    F::meta_mut(&mut work.forward).judged = revision;
    F::meta_mut(&mut work.reply).judged = revision;
    Verdict::NEXT
}

/// Judges a translated flow again. `TRANSLATE`, by `work.forward`: it may go on.
#[inline(always)]
pub fn again<F: RewriteIp, W: World<F>>(world: &W, at: &Context, work: &mut Work<F>) -> Verdict {
    let revision = world.policy_revision();
    work.key = F::flow_key(&work.headers.tuple, work.headers.proto, at.side());
    let Some(entry) = world.flow(&work.key) else {
        // Evicted just now; a packet that is not translated must not go on.
        return Verdict::drop(Reason::RewriteFailed);
    };
    work.forward = *entry.flow();
    if leads_nowhere::<F, W>(world, at, work) {
        return Verdict::drop(Reason::PolicyUnknownPod);
    }
    let verdict = translated::<F, W>(world, at, work);
    if verdict != Verdict::PASS {
        return verdict;
    }
    let meta = F::meta(&work.forward);
    entry.touch(world.now_ticks(), state_after(&work.headers, meta.state));
    entry.set_judged(revision);
    Verdict::TRANSLATE
}

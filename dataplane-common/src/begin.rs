//! First packets, and packets of flows that have been forgotten: the backend is chosen, and the entry of its answers made.

use crate::{
    addr::{Family, Tuple, proto},
    backend::backend_state,
    balance::{NO_BACKEND, choose, choose_for_client, flow_hash},
    config::is_over,
    flow::{Exit, FlowEvent, FlowMeta, MIDSTREAM_LEFT, MIDSTREAM_LEFT_TCP, Side, flow_flags, flow_state},
    half_open::{enter_both, side_of, turn_around},
    monitor::EventKind,
    packet::Packet,
    parse::tcp,
    pipeline::{Context, DIRECT, NO_SERVICE, Work, World, finish, timeout_ticks},
    plan,
    policy::REVISION_NONE,
    reason::Reason,
    rewrite::RewriteIp,
    service::{ServiceHead, service_flags},
    tables::{Entry, InsertError},
    verdict::{Action, Hook, Verdict},
};

/// The first packet of a flow: the backend is chosen. `NEXT`: it is in `work`.
#[inline(never)]
pub(crate) fn select<F: Family, W: World<F>>(world: &W, at: &Context, work: &mut Work<F>) -> Verdict {
    if !work.headers.is_syn() && is_left(world.midstream_ticks(), work.headers.proto) {
        return Verdict::PASS;
    }
    let head = match usable::<F, W>(world, at, work) {
        Ok(head) => head,
        Err(verdict) => return verdict,
    };
    work.service_generation = head.generation;
    if work.backend != NO_BACKEND {
        return Verdict::NEXT;
    }
    work.backend = if head.flags & service_flags::AFFINITY == 0 {
        let hash = flow_hash::<F>(&work.headers.tuple, work.headers.proto);
        choose(world, head, hash).unwrap_or(NO_BACKEND)
    } else {
        choose_for_client::<F, W>(world, work, head)
    };
    Verdict::NEXT
}

/// Whether what is in no table and does not say that it begins something is netfilter's.
#[inline(always)]
fn is_left(midstream: u32, l4_proto: u8) -> bool {
    midstream == MIDSTREAM_LEFT || midstream == MIDSTREAM_LEFT_TCP && l4_proto == proto::TCP
}

/// The first packet of a flow whose backend is chosen: its entries are made. `NEXT`: they are to be entered by [`claim`].
#[inline(never)]
pub(crate) fn plan<F: RewriteIp, P: Packet, W: World<F>>(
    packet: &mut P,
    world: &W,
    at: &Context,
    work: &mut Work<F>,
) -> Verdict {
    let id = work.backend;
    let Some(backend) = world.backend(id) else {
        return Verdict::drop(Reason::BadIndex);
    };
    let plan = match plan::plan::<F, P, W>(packet, world, at, &work.headers, &backend) {
        Ok(Some(plan)) => plan,
        Ok(None) => return Verdict::PASS,
        Err(reason) => return Verdict::drop(reason),
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
        backend: id,
        backend_generation: backend.head.generation,
        service: work.service,
        service_generation: work.service_generation,
        flags,
        exit: plan.reply_exit as u8 | (plan.exit as u8) << 4,
        seen_ticks: world.now_ticks(),
        ifindex: plan.ifindex,
        state: flow_state::OPEN,
        sequence: [0; 3],
        mac_dst: plan.mac_dst,
        mac_src: plan.mac_src,
        judged: REVISION_NONE,
    };
    let tuple = &work.headers.tuple;
    let new = Tuple {
        src: plan.src,
        dst: F::from_any(backend.addr_be),
        sport_be: tuple.sport_be,
        dport_be: backend.head.port_be,
    };
    work.reply = F::flow(&tuple.reversed(), reply);
    F::set_rewrite(&mut work.forward, &new);
    turn_around(F::meta(&work.reply), F::meta_mut(&mut work.forward));
    Verdict::NEXT
}

/// A packet from a port of the range for translation that is for no service. `NEXT`: it is the first one of a flow of this
/// node's own, which is to claim the port as those do that we translate: it keeps it, or gets another one.
#[inline(always)]
pub(crate) fn direct<F: Family, W: World<F>>(world: &W, at: &Context, work: &mut Work<F>) -> Verdict {
    let tuple = &work.headers.tuple;
    let begins = work.headers.proto == proto::UDP || work.headers.is_syn();
    if !begins || world.own_address(tuple.src) == 0 {
        return Verdict::PASS;
    }
    let reply = FlowMeta {
        backend: NO_BACKEND,
        service: NO_SERVICE,
        flags: flow_flags::REPLY | flow_flags::DIRECT | flow_flags::OTHER_EGRESS,
        exit: Exit::Pass as u8 | (Exit::Pass as u8) << 4,
        seen_ticks: world.now_ticks(),
        ifindex: at.ifindex,
        ..FlowMeta::default()
    };
    work.reply = F::flow(&tuple.reversed(), reply);
    F::set_rewrite(&mut work.forward, tuple);
    turn_around(F::meta(&work.reply), F::meta_mut(&mut work.forward));
    Verdict::NEXT
}

/// The head of the packet's service, if there is one and it has somewhere to send the packet to.
#[inline(always)]
fn usable<F: Family, W: World<F>>(world: &W, at: &Context, work: &Work<F>) -> Result<ServiceHead, Verdict> {
    if work.service == NO_SERVICE {
        return Err(Verdict::PASS);
    }
    let head = world
        .service_head(work.service)
        .ok_or(Verdict::drop(Reason::BadIndex))?;
    if head.flags & service_flags::DELETED != 0 {
        return Err(Verdict::PASS);
    }
    if head.flags & service_flags::RANGES != 0
        && !world.in_source_range(work.service, &work.headers.tuple.src)
    {
        return Err(Verdict::drop(Reason::SourceRange));
    }
    if head.size_class == 0 {
        return Err(if at.hook == Hook::Xdp {
            Verdict::PASS
        } else if head.flags & service_flags::DROP_WHEN_EMPTY != 0 {
            Verdict::drop(Reason::NoLocalEndpoints)
        } else {
            Verdict::refuse(Reason::NoEndpoints)
        });
    }
    Ok(head)
}

/// Source ports that are tried for one flow.
const SNAT_ATTEMPTS: u32 = 8;

/// Remembers how the answers of a new flow are to be translated, and finds a source port under which no other flow
/// towards the same backend is remembered.
#[inline(never)]
pub(crate) fn claim<F: Family, W: World<F>>(world: &W, work: &mut Work<F>) -> Verdict {
    let (first, last) = (
        world.config(|c| &c.snat_port_min),
        world.config(|c| &c.snat_port_max),
    );
    let span = u32::from(last.wrapping_sub(first)) + 1;
    let mut candidate = flow_hash::<F>(&work.headers.tuple, work.headers.proto ^ 0xff);
    let changes_port = F::meta(&work.reply).flags & flow_flags::SNAT != 0;
    for attempt in 0..SNAT_ATTEMPTS {
        if changes_port || attempt > 0 {
            let port = u32::from(first) + ((u64::from(candidate) * u64::from(span)) >> 32) as u32;
            F::set_rewrite_sport(&mut work.forward, (port as u16).to_be());
            candidate = candidate.wrapping_mul(0x9e37_79b1).wrapping_add(0x7f4a_7c15);
        }
        match claim_port::<F, W>(world, work) {
            Verdict::NEXT => {}
            decided => return decided,
        }
    }
    Verdict::drop(Reason::SnatPortsExhausted)
}

/// Tries the source port in `work.forward`. `NEXT`: another flow has it.
#[inline(never)]
fn claim_port<F: Family, W: World<F>>(world: &W, work: &mut Work<F>) -> Verdict {
    let is_tcp = work.headers.proto == proto::TCP;
    let (now, side) = {
        let meta = F::meta(&work.reply);
        (meta.seen_ticks, side_of(meta))
    };
    work.key = F::flow_key(&F::rewrite(&work.forward).reversed(), work.headers.proto, side);
    if let Some(occupant) = world.flow(&work.key) {
        let flow = occupant.flow();
        let meta = F::meta(flow);
        if F::rewrite(flow) == F::rewrite(&work.reply) {
            if !work.headers.is_syn() {
                // Ours: the request's entry was evicted. Enter both again.
                let verdict = enter_both::<F, W>(world, work);
                if verdict == Verdict::TRANSLATE {
                    begun::<F, W>(world, work);
                }
                return verdict;
            }
            // The client begins anew, and whether this backend is the first to answer is yet to be seen.
            occupant.touch(meta.seen_ticks, flow_state::CLOSING);
        } else if !is_over(now, meta.seen_ticks, timeout_ticks(world, is_tcp, meta.state)) {
            return Verdict::NEXT;
        }
    }
    if is_tcp {
        if !work.headers.has_flags(tcp::SYN) && world.midstream_ticks() != now {
            world.set_midstream_ticks(now);
        }
        match world.put_half_open(&work.key, &work.reply, false) {
            Ok(()) => {
                begun::<F, W>(world, work);
                return Verdict::TRANSLATE;
            }
            Err(InsertError::Failed) => return Verdict::drop(Reason::FlowInsertFailed),
            Err(InsertError::Exists) => {}
        }
    }
    // A retransmission, or a datagram of a flow that was never finds its own entry.
    if let Some(occupant) = world.half_open(&work.key) {
        let flow = occupant.flow();
        let (meta, reply) = (F::meta(flow), F::meta(&work.reply));
        let same = F::rewrite(flow) == F::rewrite(&work.reply);
        if same && same_plan(meta, reply) {
            let mut state = meta.state;
            if work.headers.is_syn() {
                if state == flow_state::CLOSING {
                    // The one before was refused.
                    begun::<F, W>(world, work);
                }
                state = flow_state::OPEN;
            }
            if meta.seen_ticks != now || meta.state != state {
                occupant.touch(now, state);
            }
            return if is_tcp {
                Verdict::TRANSLATE
            } else {
                stay::<F, W>(world, work, now)
            };
        }
        if !same && !is_over(now, meta.seen_ticks, world.config(|c| &c.half_open_ticks)) {
            return Verdict::NEXT;
        }
    }
    match world.put_half_open(&work.key, &work.reply, true) {
        Ok(()) => {
            begun::<F, W>(world, work);
            Verdict::TRANSLATE
        }
        Err(_) => Verdict::drop(Reason::FlowInsertFailed),
    }
}

/// Counts a flow that begins.
#[inline(always)]
fn begun<F: Family, W: World<F>>(world: &W, work: &mut Work<F>) {
    let meta = F::meta(&work.reply);
    world.count_flow(FlowEvent::Begun);
    world.count_connection(meta.service, meta.backend);
    work.noted = EventKind::Begun as u32;
}

/// Counts a packet for a service that begins nothing.
#[inline(always)]
pub(crate) fn count_dropped<F: Family, W: World<F>>(world: &W, work: &Work<F>, verdict: Verdict) {
    if matches!(verdict.action(), Action::Drop | Action::Refuse) && work.service < DIRECT {
        world.count_dropped(work.service, work.backend);
    }
}

/// Remembers the backend of a datagram that is not its flow's first, though nobody has answered: flows that never are
/// (syslog, sFlow) stay where they are while others come and go. One-datagram floods enter no second entry.
#[inline(never)]
fn stay<F: Family, W: World<F>>(world: &W, work: &mut Work<F>, now: u32) -> Verdict {
    let side = side_of(F::meta(&work.forward));
    work.key = F::flow_key(&work.headers.tuple, work.headers.proto, side);
    if let Some(entry) = world.half_open(&work.key) {
        let (meta, forward) = (F::meta(entry.flow()), F::meta(&work.forward));
        if same_plan(meta, forward) {
            if meta.seen_ticks != now {
                entry.touch(now, meta.state);
            }
            return Verdict::TRANSLATE;
        }
    }
    // Without the entry, the flow moves with its service's table.
    let _ = world.put_half_open(&work.key, &work.forward, true);
    Verdict::TRANSLATE
}

/// A pod's datagram that is not for a service: its connected socket may have been given a backend that is gone. The
/// refusal tells the process, and whoever has got that address since is spared what is not meant for it.
#[inline(never)]
pub(crate) fn given<F: Family, W: World<F>>(world: &W, work: &Work<F>) -> Verdict {
    let tuple = &work.headers.tuple;
    let Some(given) = world.given(&tuple.dst, tuple.dport_be) else {
        return Verdict::PASS;
    };
    let Some(backend) = world.backend_head(given.backend) else {
        return Verdict::PASS;
    };
    let serves = backend.state == backend_state::ACTIVE || backend.state == backend_state::SERVING;
    if serves && backend.generation == given.backend_generation {
        Verdict::PASS
    } else {
        Verdict::refuse(Reason::EndpointGone)
    }
}

/// Translates the packet by the entry that it has got.
#[inline(never)]
pub(crate) fn translate<F: RewriteIp, P: Packet, W: World<F>>(
    packet: &mut P,
    world: &W,
    at: &Context,
    work: &mut Work<F>,
) -> Verdict {
    finish::<F, P, W>(packet, world, at, &work.headers, &work.forward)
}

/// Whether two entries for the same answers come from the same decision.
#[inline(always)]
fn same_plan(a: &FlowMeta, b: &FlowMeta) -> bool {
    a.backend == b.backend
        && a.backend_generation == b.backend_generation
        && a.service == b.service
        && a.service_generation == b.service_generation
        && a.exit == b.exit
        && a.ifindex == b.ifindex
}

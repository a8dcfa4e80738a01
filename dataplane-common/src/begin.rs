//! What is not established: first answers, first packets, and packets of flows that have been forgotten.

use crate::{
    addr::{Family, Tuple, proto},
    balance::{choose, find_service, flow_hash},
    flow::{FlowMeta, Side, flow_flags, flow_state},
    packet::Packet,
    parse::{Fragment, tcp},
    pipeline::{Context, Work, World, drop_packet, finish, may_be_first_answer, timeout_ticks, xdp_finishes},
    plan::plan,
    reason::Reason,
    rewrite::RewriteIp,
    service::service_flags,
    tables::{Entry, InsertError},
    verdict::{Action, Hook, Verdict},
};

/// What to do next with a packet that is not established. A scalar, so that it is returned in a register.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Try the next thing; at last, pass the packet unchanged.
    Next,
    /// Pass it unchanged, whatever else might be tried.
    Pass,
    /// Translate it by `work.forward`.
    Finish,
    /// The service has no endpoint.
    Refuse,
    BadIndex,
    NoLocalEndpoints,
    FragmentService,
    FlowInsertFailed,
    FlowSuperseded,
    SnatPortsExhausted,
    NoRoute,
    NoSnatAddress,
    Truncated,
}

impl Step {
    #[inline(always)]
    fn from_reason(reason: Reason) -> Self {
        match reason {
            Reason::NoRoute => Self::NoRoute,
            Reason::NoSnatAddress => Self::NoSnatAddress,
            _ => Self::Truncated,
        }
    }

    #[inline(always)]
    fn reason(self) -> Reason {
        match self {
            Self::Next | Self::Pass | Self::Finish | Self::Refuse | Self::NoRoute => Reason::NoRoute,
            Self::BadIndex => Reason::BadIndex,
            Self::NoLocalEndpoints => Reason::NoLocalEndpoints,
            Self::FragmentService => Reason::FragmentService,
            Self::FlowInsertFailed => Reason::FlowInsertFailed,
            Self::FlowSuperseded => Reason::FlowSuperseded,
            Self::SnatPortsExhausted => Reason::SnatPortsExhausted,
            Self::NoSnatAddress => Reason::NoSnatAddress,
            Self::Truncated => Reason::Truncated,
        }
    }
}

/// A packet without a live entry in `FLOWS`: a first answer, or the beginning of a flow, or nothing to us.
#[inline(never)]
pub(crate) fn miss<F: RewriteIp, P: Packet, W: World<F>>(
    packet: &mut P,
    world: &W,
    at: &Context,
    work: &mut Work<F>,
) -> Verdict {
    let mut step = first_answer::<F, W>(world, at, work);
    if step == Step::Next {
        step = begin::<F, P, W>(packet, world, at, work);
    }
    match step {
        Step::Next | Step::Pass => Verdict::PASS,
        Step::Finish => finish::<F, P, W>(packet, world, at, &work.headers, &work.forward),
        Step::Refuse => Verdict::to(Action::Refuse, 0),
        failed => drop_packet::<F, W>(world, failed.reason()),
    }
}

/// The first answer of a backend: both directions enter `FLOWS`, and `work.forward` is the answer's entry.
#[inline(never)]
fn first_answer<F: Family, W: World<F>>(world: &W, at: &Context, work: &mut Work<F>) -> Step {
    let now = world.now_ticks();
    if !may_be_first_answer(world, &work.headers, now) {
        return Step::Next;
    }
    let Some(entry) = world.half_open(&work.key) else {
        return Step::Next;
    };
    work.forward = *entry.flow();
    let meta = F::meta_mut(&mut work.forward);
    if now.wrapping_sub(meta.seen_ticks) > world.config().half_open_ticks {
        return Step::Next;
    }
    if at.hook == Hook::Xdp && !xdp_finishes(meta) {
        return Step::Pass;
    }
    meta.seen_ticks = now;
    let other = other_direction(meta);
    if world.put_flow(&work.key, &work.forward).is_err() {
        return Step::FlowInsertFailed;
    }
    let client = F::rewrite(&work.forward);
    let backend = work.headers.tuple.reversed();
    work.reply = F::flow(&backend, other);
    work.key = F::flow_key(&client.reversed(), work.headers.proto, side_of(&other));
    if work.headers.proto == proto::TCP
        && let Some(entry) = world.flow(&work.key)
    {
        // The client may already be connected to the backend of another of its SYNs.
        let occupant = entry.flow();
        let meta = F::meta(occupant);
        if F::rewrite(occupant) != backend
            && meta.state == flow_state::OPEN
            && now.wrapping_sub(meta.seen_ticks) <= world.config().half_open_ticks
            && world
                .backend_head(meta.backend)
                .is_some_and(|b| b.generation == meta.backend_generation)
        {
            return Step::FlowSuperseded;
        }
    }
    match world.put_flow(&work.key, &work.reply) {
        Ok(()) => Step::Finish,
        Err(_) => Step::FlowInsertFailed,
    }
}

/// The first packet of a flow: `work.forward` becomes its entry.
#[inline(always)]
fn begin<F: RewriteIp, P: Packet, W: World<F>>(
    packet: &mut P,
    world: &W,
    at: &Context,
    work: &mut Work<F>,
) -> Step {
    let (service, head) = match lookup::<F, W>(world, at, work) {
        Ok(found) => found,
        Err(step) => return step,
    };
    let id = choose(
        world,
        head,
        flow_hash::<F>(&work.headers.tuple, work.headers.proto),
    );
    let Some(id) = id else {
        return Step::BadIndex;
    };
    let Some(backend) = world.backend(id) else {
        return Step::BadIndex;
    };
    let plan = match plan::<F, P, W>(packet, world, at, &work.headers, &backend) {
        Ok(Some(plan)) => plan,
        Ok(None) => return Step::Pass,
        Err(reason) => return Step::from_reason(reason),
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
    let tuple = &work.headers.tuple;
    let new = Tuple {
        src: plan.src,
        dst: F::from_any(backend.addr_be),
        sport_be: tuple.sport_be,
        dport_be: backend.head.port_be,
    };
    work.reply = F::flow(&tuple.reversed(), reply);
    work.forward = F::flow(&new, other_direction(&reply));
    claim::<F, W>(world, work)
}

/// The service that a packet is for, if it has somewhere to send it to.
#[inline(always)]
fn lookup<F: Family, W: World<F>>(
    world: &W,
    at: &Context,
    work: &Work<F>,
) -> Result<(u32, crate::service::ServiceHead), Step> {
    let headers = &work.headers;
    let tuple = &headers.tuple;
    let scope = at.scope().ok_or(Step::Pass)?;
    let service =
        find_service::<F, W>(world, tuple.dst, tuple.dport_be, headers.proto, scope).ok_or(Step::Pass)?;
    let head = world.service_head(service).ok_or(Step::BadIndex)?;
    if head.flags & service_flags::DELETED != 0 {
        return Err(Step::Pass);
    }
    if head.size_class == 0 {
        return Err(if at.hook == Hook::Xdp {
            Step::Pass
        } else if head.flags & service_flags::DROP_WHEN_EMPTY != 0 {
            Step::NoLocalEndpoints
        } else {
            Step::Refuse
        });
    }
    if headers.fragment != Fragment::Whole {
        return Err(Step::FragmentService);
    }
    Ok((service, head))
}

/// Source ports that are tried for one flow.
const SNAT_ATTEMPTS: u32 = 8;

/// Remembers how the answers of a new flow are to be translated, and finds a source port under which no other flow
/// towards the same backend is remembered.
#[inline(always)]
fn claim<F: Family, W: World<F>>(world: &W, work: &mut Work<F>) -> Step {
    let config = world.config();
    let span = u32::from(config.snat_port_max.wrapping_sub(config.snat_port_min)) + 1;
    let mut candidate = flow_hash::<F>(&work.headers.tuple, work.headers.proto ^ 0xff);
    let changes_port = F::meta(&work.reply).flags & flow_flags::SNAT != 0;
    for attempt in 0..SNAT_ATTEMPTS {
        if changes_port || attempt > 0 {
            let port =
                u32::from(config.snat_port_min) + ((u64::from(candidate) * u64::from(span)) >> 32) as u32;
            F::set_rewrite_sport(&mut work.forward, (port as u16).to_be());
            candidate = candidate.wrapping_mul(0x9e37_79b1).wrapping_add(0x7f4a_7c15);
        }
        match claim_port::<F, W>(world, work) {
            Step::Next => {}
            decided => return decided,
        }
    }
    Step::SnatPortsExhausted
}

/// Tries the source port in `work.forward`. [`Step::Next`]: another flow has it.
#[inline(never)]
fn claim_port<F: Family, W: World<F>>(world: &W, work: &mut Work<F>) -> Step {
    let is_tcp = work.headers.proto == proto::TCP;
    let (now, side) = {
        let meta = F::meta(&work.reply);
        (meta.seen_ticks, side_of(meta))
    };
    work.key = F::flow_key(&F::rewrite(&work.forward).reversed(), work.headers.proto, side);
    if let Some(occupant) = world.flow(&work.key) {
        let flow = occupant.flow();
        if F::rewrite(flow) == F::rewrite(&work.reply) {
            // Ours: the request's entry was evicted, or the client begins anew. Enter both again.
            return enter_both::<F, W>(world, work);
        }
        let meta = F::meta(flow);
        if now.wrapping_sub(meta.seen_ticks) <= timeout_ticks(world, is_tcp, meta.state) {
            return Step::Next;
        }
    }
    if is_tcp {
        if !work.headers.has_flags(tcp::SYN) && world.midstream_ticks() != now {
            world.set_midstream_ticks(now);
        }
        match world.put_half_open(&work.key, &work.reply, false) {
            Ok(()) => return Step::Finish,
            Err(InsertError::Failed) => return Step::FlowInsertFailed,
            Err(InsertError::Exists) => {}
        }
    }
    // A retransmission, or a datagram of a flow that was never finds its own entry.
    if let Some(occupant) = world.half_open(&work.key) {
        let flow = occupant.flow();
        let (meta, reply) = (F::meta(flow), F::meta(&work.reply));
        let same = F::rewrite(flow) == F::rewrite(&work.reply);
        if same && same_plan(meta, reply) {
            if meta.seen_ticks != now {
                occupant.touch(now, flow_state::OPEN);
            }
            return Step::Finish;
        }
        if !same && now.wrapping_sub(meta.seen_ticks) <= world.config().half_open_ticks {
            return Step::Next;
        }
    }
    match world.put_half_open(&work.key, &work.reply, true) {
        Ok(()) => Step::Finish,
        Err(_) => Step::FlowInsertFailed,
    }
}

/// Enters both directions into `FLOWS`; `work.key` is that of the answers.
#[inline(always)]
fn enter_both<F: Family, W: World<F>>(world: &W, work: &mut Work<F>) -> Step {
    if world.put_flow(&work.key, &work.reply).is_err() {
        return Step::FlowInsertFailed;
    }
    let side = side_of(F::meta(&work.forward));
    work.key = F::flow_key(&work.headers.tuple, work.headers.proto, side);
    match world.put_flow(&work.key, &work.forward) {
        Ok(()) => Step::Finish,
        Err(_) => Step::FlowInsertFailed,
    }
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

/// The entry of the other direction.
#[inline(always)]
fn other_direction(this: &FlowMeta) -> FlowMeta {
    let mut other = *this;
    other.flags = this.flags & flow_flags::SNAT;
    if this.flags & flow_flags::REPLY == 0 {
        other.flags |= flow_flags::REPLY;
    }
    if this.flags & flow_flags::OTHER_EGRESS != 0 {
        other.flags |= flow_flags::SELF_EGRESS;
    }
    if this.flags & flow_flags::SELF_EGRESS != 0 {
        other.flags |= flow_flags::OTHER_EGRESS;
    }
    other.exit = this.exit.rotate_left(4);
    other
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

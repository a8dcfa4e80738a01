//! From `HALF_OPEN` into `FLOWS`: what a flow's packets do between its first one and the proof that both ends take
//! part in it.
//!
//! A first packet proves nothing: its source may be forged. Nor does the answer to it: a listening backend answers
//! every SYN, and many a UDP server every datagram. So the answer finds its entry in `HALF_OPEN` and adds the one of
//! the client's packets there, and both enter `FLOWS` when the client shows that the answer has reached it: in TCP by
//! acknowledging the backend's initial sequence number, in UDP by another datagram. A flood, answered or not, evicts
//! entries of `HALF_OPEN` alone.
//!
//! A client whose SYN is sent again may be answered by two backends, and has to hear one of them alone: the other's answer
//! would reset its connection. The first to enter the client's key into `HALF_OPEN` is that one, also of two CPUs.
//!
//! A TCP flow that begins in mid-stream is proved by the backend: only one that has the connection answers with
//! anything but a RST.

use core::mem::offset_of;

use crate::{
    addr::{Family, proto},
    backend::backend_state,
    balance::NO_BACKEND,
    config::is_over,
    flow::{FlowEvent, FlowMeta, Side, flow_flags, flow_state},
    monitor::EventKind,
    packet::Packet,
    parse::{TcpHeader, tcp},
    pipeline::{
        Context, Liveness, Work, World, liveness, may_be_first_answer, state_after, timeout_ticks,
        xdp_finishes,
    },
    reason::Reason,
    tables::{Entry, Env, InsertError},
    verdict::{Hook, Verdict},
};

/// How far behind the backend's initial sequence number the client may acknowledge at first: a SYN-ACK may carry data
/// (RFC 7413).
const FIRST_WINDOW: u32 = 1 << 16;
/// As many bits of a sequence number are kept.
const SEQUENCE_MASK: u32 = 0x00ff_ffff;

/// A packet without a live entry in `FLOWS`. `NEXT`: nor is there an answer known in `HALF_OPEN`, and `work.backend` is the
/// backend of the datagrams before it, or [`NO_BACKEND`]; `TRANSLATE`: by `work.forward`.
#[inline(never)]
pub(crate) fn find<F: Family, P: Packet, W: World<F>>(
    packet: &P,
    world: &W,
    at: &Context,
    work: &mut Work<F>,
) -> Verdict {
    work.backend = NO_BACKEND;
    // A backend is chosen for each SYN anew.
    if work.headers.is_syn() {
        return Verdict::NEXT;
    }
    let now = world.now_ticks();
    work.key = F::flow_key(&work.headers.tuple, work.headers.proto, at.side());
    let Some(entry) = world.half_open(&work.key) else {
        return moved::<F, W>(world, at, work);
    };
    work.forward = *entry.flow();
    let meta = F::meta_mut(&mut work.forward);
    if is_over(
        now,
        meta.seen_ticks,
        half_open_ticks(world, work.headers.proto, meta),
    ) {
        return Verdict::NEXT;
    }
    let is_answer = meta.flags & flow_flags::REPLY != 0;
    if is_answer && !may_be_first_answer(world, &work.headers) {
        return Verdict::NEXT;
    }
    if !is_answer && meta.state == flow_state::OPEN {
        if still_serves(world, meta, work.service) {
            work.backend = meta.backend;
        }
        return Verdict::NEXT;
    }
    if at.hook == Hook::Xdp && !xdp_finishes(meta) {
        return Verdict::PASS;
    }
    let seen = meta.seen_ticks;
    meta.seen_ticks = now;
    if work.headers.has_flags(tcp::RST) {
        // Refused or given up, and maybe begun anew.
        if !is_answer {
            entry.touch(now, flow_state::CLOSING);
        } else if refused(world, &entry) {
            work.noted = EventKind::RefusedByBackend as u32;
        }
        return Verdict::TRANSLATE;
    }
    if !is_answer {
        return confirmation::<F, P, W>(packet, world, work);
    }
    if work.headers.proto == proto::TCP && !work.headers.has_flags(tcp::SYN) {
        return midstream_answer::<F, W>(world, work);
    }
    if meta.state == flow_state::ANSWERED {
        if seen != now {
            entry.touch(now, flow_state::ANSWERED);
        }
        return Verdict::TRANSLATE;
    }
    match first_answer::<F, P, W>(packet, world, work) {
        Verdict::TRANSLATE => {
            entry.touch(now, flow_state::ANSWERED);
            Verdict::TRANSLATE
        }
        decided => decided,
    }
}

/// A packet whose flow another CPU has taken from `HALF_OPEN` into `FLOWS` since it was not found there: a client's first
/// acknowledgement and its first data leave it at the same time.
#[inline(always)]
fn moved<F: Family, W: World<F>>(world: &W, at: &Context, work: &mut Work<F>) -> Verdict {
    if work.headers.proto != proto::TCP {
        return Verdict::NEXT;
    }
    let Some(entry) = world.flow(&work.key) else {
        return Verdict::NEXT;
    };
    work.forward = *entry.flow();
    let now = world.now_ticks();
    let meta = F::meta(&work.forward);
    if liveness(world, meta, &work.headers, now) != Liveness::Live {
        return Verdict::NEXT;
    }
    if at.hook == Hook::Xdp && !xdp_finishes(meta) {
        return Verdict::PASS;
    }
    let state = state_after(&work.headers, meta.state);
    if state != meta.state || now != meta.seen_ticks {
        entry.touch(now, state);
    }
    Verdict::TRANSLATE
}

/// Counts an answer that refuses what an entry of `HALF_OPEN` is about, once for each flow that begins. False: it is not the
/// first answer, or none at all.
#[inline(always)]
pub(crate) fn refused<F: Family, W: World<F>>(world: &W, entry: &impl Entry<F>) -> bool {
    let meta = F::meta(entry.flow());
    let is_first = meta.flags & flow_flags::REPLY != 0 && meta.state == flow_state::OPEN;
    if is_first {
        entry.touch(meta.seen_ticks, flow_state::CLOSING);
        world.count(Reason::BackendRefused as u32);
        world.count_refused(meta.service, meta.backend);
    }
    is_first
}

/// Whether the backend that a flow has had without an answer is still its service's.
#[inline(always)]
fn still_serves<W: Env>(world: &W, meta: &FlowMeta, service: u32) -> bool {
    let (Some(backend), Some(head)) = (world.backend_head(meta.backend), world.service_head(service)) else {
        return false;
    };
    meta.service == service
        && meta.service_generation == head.generation
        && meta.backend_generation == backend.generation
        && (backend.state == backend_state::ACTIVE || backend.state == backend_state::SERVING)
}

/// How long an idle entry of `HALF_OPEN` is believed.
#[inline(always)]
fn half_open_ticks<W: Env>(world: &W, l4_proto: u8, meta: &FlowMeta) -> u32 {
    if l4_proto == proto::UDP && meta.state == flow_state::ANSWERED {
        timeout_ticks(world, false, meta.state)
    } else {
        world.config(|c| &c.half_open_ticks)
    }
}

/// The first answer: the entry of the client's packets joins its own in `HALF_OPEN`.
#[inline(always)]
fn first_answer<F: Family, P: Packet, W: World<F>>(packet: &P, world: &W, work: &mut Work<F>) -> Verdict {
    let is_tcp = work.headers.proto == proto::TCP;
    make_other::<F>(work);
    let meta = F::meta_mut(&mut work.reply);
    meta.state = flow_state::ANSWERED;
    if is_tcp {
        let Some(seq_be) = packet.load::<u32>(work.headers.l4() + offset_of!(TcpHeader, seq_be)) else {
            return Verdict::drop(Reason::RewriteFailed);
        };
        let [_, sequence @ ..] = (u32::from_be(seq_be) & SEQUENCE_MASK).to_be_bytes();
        meta.sequence = sequence;
        if let Some(entry) = world.flow(&work.key) {
            if goes::<F, W>(world, work, entry.flow()) {
                return Verdict::drop(Reason::FlowSuperseded);
            }
            // It would speak for the client's packets before `HALF_OPEN` is asked.
            world.remove_flow(&work.key);
        }
    }
    // Of two backends that answer at the same time, each on a CPU of its own, one finds the key taken.
    let mut entered = world.put_half_open(&work.key, &work.reply, !is_tcp);
    if entered == Err(InsertError::Exists) {
        if half_open_goes::<F, W>(world, work) {
            return Verdict::drop(Reason::FlowSuperseded);
        }
        entered = world.put_half_open(&work.key, &work.reply, true);
    }
    if entered.is_err() {
        return Verdict::drop(Reason::FlowInsertFailed);
    }
    world.count_flow(FlowEvent::Answered);
    Verdict::TRANSLATE
}

/// The backend goes on with a connection that began before us.
#[inline(always)]
fn midstream_answer<F: Family, W: World<F>>(world: &W, work: &mut Work<F>) -> Verdict {
    F::meta_mut(&mut work.forward).state = flow_state::OPEN;
    if world.put_flow(&work.key, &work.forward).is_err() {
        return Verdict::drop(Reason::FlowInsertFailed);
    }
    make_other::<F>(work);
    let superseded = match world.flow(&work.key) {
        Some(entry) => goes::<F, W>(world, work, entry.flow()),
        None => half_open_goes::<F, W>(world, work),
    };
    if superseded {
        return Verdict::drop(Reason::FlowSuperseded);
    }
    if world.put_flow(&work.key, &work.reply).is_err() {
        return Verdict::drop(Reason::FlowInsertFailed);
    }
    world.count_flow(FlowEvent::Established);
    Verdict::TRANSLATE
}

/// The client goes on after the answer: both directions enter `FLOWS`, unless it only guesses that there was one.
#[inline(always)]
fn confirmation<F: Family, P: Packet, W: World<F>>(packet: &P, world: &W, work: &mut Work<F>) -> Verdict {
    let is_tcp = work.headers.proto == proto::TCP;
    let meta = F::meta_mut(&mut work.forward);
    let now = meta.seen_ticks;
    if liveness(world, meta, &work.headers, now) != Liveness::Live {
        return Verdict::NEXT;
    }
    if is_tcp {
        let Some(ack_be) = packet.load::<u32>(work.headers.l4() + offset_of!(TcpHeader, ack_be)) else {
            return Verdict::drop(Reason::RewriteFailed);
        };
        let [a, b, c] = meta.sequence;
        let first = u32::from_be_bytes([0, a, b, c]).wrapping_add(1);
        if u32::from_be(ack_be).wrapping_sub(first) & SEQUENCE_MASK >= FIRST_WINDOW {
            return Verdict::TRANSLATE;
        }
    }
    meta.state = flow_state::OPEN;
    meta.sequence = [0; 3];
    make_other::<F>(work);
    if let Some(entry) = world.flow(&work.key) {
        // The answers' key was forgotten and another flow has it by now: find another port.
        let occupant = entry.flow();
        let meta = F::meta(occupant);
        if F::rewrite(occupant) != F::rewrite(&work.reply)
            && !is_over(now, meta.seen_ticks, timeout_ticks(world, is_tcp, meta.state))
        {
            return Verdict::NEXT;
        }
    }
    let verdict = enter_both::<F, W>(world, work);
    if is_tcp && verdict == Verdict::TRANSLATE {
        // Nothing is left for the next connection from this port.
        world.remove_half_open(&work.key);
        work.key = other_key::<F>(work);
        world.remove_half_open(&work.key);
    }
    verdict
}

/// Makes `work.reply` the entry for the packets against those of `work.forward`, and `work.key` its key.
#[inline(always)]
fn make_other<F: Family>(work: &mut Work<F>) {
    F::set_rewrite(&mut work.reply, &work.headers.tuple.reversed());
    turn_around(F::meta(&work.forward), F::meta_mut(&mut work.reply));
    work.key = other_key::<F>(work);
}

/// The key of `work.reply`.
#[inline(always)]
fn other_key<F: Family>(work: &Work<F>) -> F::FlowKey {
    let side = side_of(F::meta(&work.reply));
    F::flow_key(&F::rewrite(&work.forward).reversed(), work.headers.proto, side)
}

/// Whether what is known of an answer's client, by `work.key`, still speaks for it and for another backend than `work.reply`:
/// that one has answered one of its SYNs before.
#[inline(always)]
fn goes<F: Family, W: World<F>>(world: &W, work: &Work<F>, occupant: &F::Flow) -> bool {
    let meta = F::meta(occupant);
    F::rewrite(occupant) != F::rewrite(&work.reply)
        && meta.state != flow_state::CLOSING
        && !is_over(
            F::meta(&work.forward).seen_ticks,
            meta.seen_ticks,
            world.config(|c| &c.half_open_ticks),
        )
        && world
            .backend_head(meta.backend)
            .is_some_and(|b| b.generation == meta.backend_generation)
}

/// [`goes`], of what `HALF_OPEN` knows.
#[inline(always)]
fn half_open_goes<F: Family, W: World<F>>(world: &W, work: &Work<F>) -> bool {
    world
        .half_open(&work.key)
        .is_some_and(|entry| goes::<F, W>(world, work, entry.flow()))
}

/// Enters both directions into `FLOWS`; `work.key` is that of `work.reply`, and `work.forward` is the packet's.
#[inline(always)]
pub(crate) fn enter_both<F: Family, W: World<F>>(world: &W, work: &mut Work<F>) -> Verdict {
    if world.put_flow(&work.key, &work.reply).is_err() {
        return Verdict::drop(Reason::FlowInsertFailed);
    }
    let side = side_of(F::meta(&work.forward));
    work.key = F::flow_key(&work.headers.tuple, work.headers.proto, side);
    if world.put_flow(&work.key, &work.forward).is_err() {
        return Verdict::drop(Reason::FlowInsertFailed);
    }
    world.count_flow(FlowEvent::Established);
    Verdict::TRANSLATE
}

/// Makes `other` the entry of the other direction.
#[inline(always)]
pub(crate) fn turn_around(this: &FlowMeta, other: &mut FlowMeta) {
    *other = *this;
    let mut flags = this.flags & (flow_flags::SNAT | flow_flags::DIRECT);
    if this.flags & flow_flags::REPLY == 0 {
        flags |= flow_flags::REPLY;
    }
    if this.flags & flow_flags::OTHER_EGRESS != 0 {
        flags |= flow_flags::SELF_EGRESS;
    }
    if this.flags & flow_flags::SELF_EGRESS != 0 {
        flags |= flow_flags::OTHER_EGRESS;
    }
    other.flags = flags;
    other.exit = this.exit.rotate_left(4);
}

/// The side at which packets of an entry are seen.
#[inline(always)]
pub(crate) fn side_of(meta: &FlowMeta) -> Side {
    if meta.flags & flow_flags::SELF_EGRESS != 0 {
        Side::Egress
    } else {
        Side::Ingress
    }
}

//! Tells of single packets in `EVENTS`, while somebody watches. See `dataplane_common::monitor`.

use core::ptr;

use aya_ebpf::{
    bindings::{__sk_buff, BPF_RB_NO_WAKEUP, xdp_md},
    helpers::generated::{bpf_ktime_get_ns, bpf_skb_load_bytes, bpf_xdp_load_bytes},
    maps::ring_buf::RingBufEntry,
};
use dataplane_common::{
    addr::{Family, V4, V6, ethertype},
    config::config_flags,
    monitor::{CAPTURED, Event, EventKind, OUTWARD, What, monitor_state},
    packet::Packet,
    pipeline::Work,
    policy::{Judgement, NO_RULE_INDEX},
    reason::Reason,
    tables::Env,
    verdict::{Action, Hook, Verdict},
};

use crate::{
    access::{SkbPacket, XdpPacket},
    fragments::some_bytes,
    maps::{EVENTS, MONITOR, WORK_V4, WORK_V6},
    world::{World, config, work},
};

/// A context whose packets can be told of.
pub trait Watched {
    fn tell(ctx: *mut Self, what: What);
}

impl Watched for __sk_buff {
    #[inline(always)]
    fn tell(ctx: *mut Self, what: What) {
        tell_skb(ctx, what.to_raw());
    }
}

impl Watched for xdp_md {
    #[inline(always)]
    fn tell(ctx: *mut Self, what: What) {
        tell_xdp(ctx, what.to_raw());
    }
}

/// Whether anybody watches.
#[inline(always)]
fn is_watched() -> bool {
    MONITOR.get_ptr(0).is_some_and(|state| {
        // SAFETY: an element that exists; one aligned load.
        unsafe { ptr::read_volatile(state) != monitor_state::IDLE }
    })
}

/// Tells of a packet, if anybody watches. What is told of it is asked of the context, so that nobody has to keep it.
#[inline(always)]
fn tell<C: Watched>(ctx: *mut C, kind: EventKind, hook: Hook, l3: usize, value: u32) {
    if is_watched() {
        let what = What {
            kind: kind as u8,
            hook: hook as u8,
            l3: l3 as u8,
            value,
        };
        C::tell(ctx, what);
    }
}

/// Tells of a packet that is dropped.
#[inline(always)]
pub fn dropped<C: Watched>(ctx: *mut C, hook: Hook, l3: usize, reason: u32) {
    tell(ctx, EventKind::Dropped, hook, l3, reason);
}

/// Tells of what is about to be concluded.
#[inline(always)]
pub fn concludes<F: Family, C: Watched>(
    ctx: *mut C,
    hook: Hook,
    l3: usize,
    work: &mut Work<F>,
    verdict: Verdict,
) {
    const BEGUN: u32 = EventKind::Begun as u32;
    const REFUSED: u32 = EventKind::RefusedByBackend as u32;
    let noted = work.noted;
    work.noted = 0;
    let kind = match verdict.action() {
        Action::Translate => match noted {
            BEGUN => EventKind::Begun,
            REFUSED => EventKind::RefusedByBackend,
            _ => return,
        },
        Action::Refuse => EventKind::Refused,
        Action::TooBig => EventKind::TooBig,
        _ => return,
    };
    tell(ctx, kind, hook, l3, verdict.value());
}

/// Room for an event; where there is none, it is counted as missed.
#[inline(always)]
fn reserve() -> Option<RingBufEntry<Event>> {
    let state = MONITOR.get_ptr_mut(0)?;
    // SAFETY: an element that exists; one aligned load.
    if unsafe { ptr::read_volatile(state) } == monitor_state::WATCHED {
        if let Some(event) = EVENTS.reserve_untyped(0) {
            return Some(event);
        }
        // SAFETY: as above; one aligned store.
        unsafe { ptr::write_volatile(state, monitor_state::FULL) };
    }
    World::<__sk_buff>::new(ptr::null_mut()).count(Reason::EventMissed as u32);
    None
}

/// Everything but the packet's bytes. All of it is written: what is reserved has what was there before.
///
/// # Safety
/// `event` is reserved.
#[inline(always)]
unsafe fn describe(event: *mut Event, what: What, ifindex: u32, protocol_be: u16, length: usize) {
    let is_v4 = u16::from_be(protocol_be) == ethertype::IPV4;
    // SAFETY: the caller's.
    unsafe {
        (*event).at_ns = bpf_ktime_get_ns();
        (*event).ifindex = ifindex;
        (*event).length = length as u32;
        (*event).reason = what.value;
        (*event).rule = NO_RULE_INDEX;
        (*event).service = u32::MAX;
        (*event).backend = u32::MAX;
        (*event).src_be = [0; 4];
        (*event).dst_be = [0; 4];
        (*event).sport_be = 0;
        (*event).dport_be = 0;
        (*event).mtu = 0;
        (*event).captured = 0;
        (*event).kind = what.kind;
        (*event).hook = what.hook;
        (*event).l3 = what.l3;
        (*event).family = if is_v4 { 4 } else { 6 };
        (*event).pod = 0;
    }
    if is_v4 {
        if let Some(work) = work(&WORK_V4) {
            // SAFETY: the caller's.
            unsafe { describe_work::<V4>(event, work, what) };
        }
    } else if let Some(work) = work(&WORK_V6) {
        // SAFETY: the caller's.
        unsafe { describe_work::<V6>(event, work, what) };
    }
}

/// What of the packet is in the space that the stages share.
///
/// # Safety
/// `event` is reserved.
#[inline(always)]
unsafe fn describe_work<F: Family>(event: *mut Event, work: &Work<F>, what: What) {
    // SAFETY: the caller's.
    unsafe {
        let is_refused = what.kind == EventKind::RefusedByBackend as u8;
        if what.kind == EventKind::Begun as u8 || is_refused {
            let meta = F::meta(&work.forward);
            (*event).service = meta.service;
            (*event).backend = meta.backend;
            let goes = F::rewrite(&work.forward);
            (*event).src_be = F::to_any(*goes.src);
            (*event).dst_be = F::to_any(*goes.dst);
            (*event).sport_be = goes.sport_be;
            (*event).dport_be = goes.dport_be;
            (*event).reason = if is_refused {
                Reason::BackendRefused as u32
            } else {
                0
            };
        } else if what.kind == EventKind::TooBig as u8 {
            (*event).mtu = what.value as u16;
            (*event).reason = Reason::FragmentationNeeded as u32;
        } else if what.kind == EventKind::Dropped as u8 && what.value == Reason::PolicyDenied as u32 {
            let judgement = Judgement::from_raw(work.judged.judgement);
            (*event).rule = judgement.rule().unwrap_or(NO_RULE_INDEX);
            let outward = if work.judged.outward == 0 { 0 } else { OUTWARD };
            (*event).pod = work.judged.ifindex | outward;
        }
    }
}

/// See [`Watched::tell`]. Nobody is woken: who watches looks again and again.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn tell_skb(ctx: *mut __sk_buff, what: u64) -> u64 {
    let Some(mut reserved) = reserve() else {
        return 0;
    };
    let event = reserved.as_mut_ptr();
    let length = SkbPacket(ctx).len();
    // SAFETY: a reserved record, with room for as many bytes; the context is valid while the program runs, each field is a load of
    // its own, and the helper checks the packet's length.
    unsafe {
        let ifindex = ptr::read_volatile(&raw const (*ctx).ifindex);
        let protocol = ptr::read_volatile(&raw const (*ctx).protocol);
        describe(event, What::from_raw(what), ifindex, protocol as u16, length);
        if let Some(captured) = some_bytes(length.min(CAPTURED), CAPTURED)
            && bpf_skb_load_bytes(ctx.cast(), 0, (&raw mut (*event).bytes).cast(), captured) == 0
        {
            (*event).captured = captured as u16;
        }
    }
    reserved.submit(BPF_RB_NO_WAKEUP.into());
    0
}

/// See [`tell_skb`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn tell_xdp(ctx: *mut xdp_md, what: u64) -> u64 {
    let Some(mut reserved) = reserve() else {
        return 0;
    };
    let event = reserved.as_mut_ptr();
    let packet = XdpPacket(ctx);
    let length = packet.frame_len() as usize;
    let protocol = packet.load::<u16>(12).unwrap_or(0);
    // SAFETY: as in `tell_skb`.
    unsafe {
        let ifindex = ptr::read_volatile(&raw const (*ctx).ingress_ifindex);
        describe(event, What::from_raw(what), ifindex, protocol, length);
        let bytes = &raw mut (*event).bytes;
        if config(|c| &c.flags) & config_flags::XDP_FRAGS != 0 {
            if let Some(captured) = some_bytes(length.min(CAPTURED), CAPTURED)
                && bpf_xdp_load_bytes(ctx, 0, bytes.cast(), captured) == 0
            {
                (*event).captured = captured as u16;
            }
        } else {
            (*event).captured = copy(&packet, bytes.cast()) as u16;
        }
    }
    reserved.submit(BPF_RB_NO_WAKEUP.into());
    0
}

/// The first bytes of a frame, two by two; returns how many.
///
/// # Safety
/// There is room for [`CAPTURED`] bytes.
#[inline(always)]
unsafe fn copy(packet: &XdpPacket, to: *mut [u8; 2]) -> usize {
    for pair in 0..CAPTURED / 2 {
        let Some(bytes) = packet.load::<[u8; 2]>(2 * pair) else {
            return 2 * pair;
        };
        // SAFETY: the caller's.
        unsafe { *to.add(pair) = bytes };
    }
    CAPTURED
}

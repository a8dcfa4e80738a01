//! Tells of single packets in `EVENTS`, while somebody watches. See `dataplane_common::monitor`.

use core::ptr;

use aya_ebpf::{
    bindings::{__sk_buff, BPF_RB_NO_WAKEUP, xdp_md},
    helpers::generated::{
        bpf_ktime_get_ns, bpf_skb_load_bytes, bpf_xdp_load_bytes,
    },
};
use aya_ebpf::maps::ring_buf::RingBufEntry;
use dataplane_common::{
    addr::{Family, V4, V6},
    config::config_flags,
    monitor::{CAPTURED, Event, EventKind, What, monitor_state},
    packet::Packet,
    pipeline::{Context, Work},
    policy::{Judgement, NO_RULE_INDEX},
    reason::Reason,
    verdict::{Action, Verdict},
};

use crate::{
    access::{SkbPacket, XdpPacket},
    fragments::some_bytes,
    maps::{EVENTS, EVENTS_MISSED, MONITOR, WORK_V4, WORK_V6},
    world::{config, work},
};

/// A context whose packets can be told of.
pub trait Watched {
    /// Tells of a packet; arguments are [`Context::to_raw`] and [`What::to_raw`].
    fn tell(ctx: *mut Self, at: u64, what: u64);
}

impl Watched for __sk_buff {
    #[inline(always)]
    fn tell(ctx: *mut Self, at: u64, what: u64) {
        tell_skb(ctx, at, what);
    }
}

impl Watched for xdp_md {
    #[inline(always)]
    fn tell(ctx: *mut Self, at: u64, what: u64) {
        tell_xdp(ctx, at, what);
    }
}

/// Whether anybody watches.
#[inline(always)]
pub fn is_watched() -> bool {
    MONITOR.get_ptr(0).is_some_and(|state| {
        // SAFETY: an element that exists; one aligned load.
        unsafe { ptr::read_volatile(state) != monitor_state::IDLE }
    })
}

/// Tells of a packet that is dropped, if anybody watches.
#[inline(always)]
pub fn dropped<C: Watched>(ctx: *mut C, at: &Context, family: u8, reason: u32) {
    if is_watched() {
        C::tell(ctx, at.to_raw(), What::new(EventKind::Dropped, family, reason).to_raw());
    }
}

/// Tells of what is about to be concluded, if anybody watches.
#[inline(always)]
pub fn concludes<F: Family, C: Watched>(ctx: *mut C, at: &Context, work: &mut Work<F>, verdict: Verdict) {
    let has_begun = work.has_begun != 0;
    work.has_begun = 0;
    let kind = match verdict.action() {
        Action::Translate if has_begun => EventKind::Begun,
        Action::Refuse => EventKind::Refused,
        Action::TooBig => EventKind::TooBig,
        _ => return,
    };
    if is_watched() {
        C::tell(ctx, at.to_raw(), What::new(kind, F::VERSION, verdict.value()).to_raw());
    }
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
    if let Some(missed) = EVENTS_MISSED.get_ptr_mut(0) {
        // SAFETY: a per-CPU element, and programs do not migrate while they run.
        unsafe { *missed += 1 };
    }
    None
}

/// Everything but the packet's bytes.
///
/// # Safety
/// `event` is reserved.
#[inline(always)]
unsafe fn describe(event: *mut Event, at: u64, what: u64) {
    let (at, what) = (Context::from_raw(at), What::from_raw(what));
    // SAFETY: the caller's. All of it is written, since what is reserved has what was there before.
    unsafe {
        (*event).at_ns = bpf_ktime_get_ns();
        (*event).ifindex = at.ifindex;
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
        (*event).hook = at.hook as u8;
        (*event).l3 = at.l3 as u8;
        (*event).family = what.family;
        (*event).unused = [0; 4];
    }
    if what.family == 4 {
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
        if what.kind == EventKind::Begun as u8 {
            let meta = F::meta(&work.forward);
            (*event).service = meta.service;
            (*event).backend = meta.backend;
            let goes = F::rewrite(&work.forward);
            (*event).src_be = F::to_any(*goes.src);
            (*event).dst_be = F::to_any(*goes.dst);
            (*event).sport_be = goes.sport_be;
            (*event).dport_be = goes.dport_be;
            (*event).reason = 0;
        } else if what.kind == EventKind::TooBig as u8 {
            (*event).mtu = what.value as u16;
            (*event).reason = Reason::FragmentationNeeded as u32;
        } else if what.kind == EventKind::Dropped as u8 && what.value == Reason::PolicyDenied as u32 {
            let judgement = Judgement::from_raw(work.judged.judgement);
            (*event).rule = judgement.rule().unwrap_or(NO_RULE_INDEX);
        }
    }
}

/// See [`Watched::tell`]. Nobody is woken: who watches looks again and again.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn tell_skb(ctx: *mut __sk_buff, at: u64, what: u64) -> u64 {
    let Some(mut reserved) = reserve() else {
        return 0;
    };
    let event = reserved.as_mut_ptr();
    let length = SkbPacket(ctx).len();
    // SAFETY: a reserved record, with room for as many bytes; the helper checks the packet's length.
    unsafe {
        describe(event, at, what);
        (*event).length = length as u32;
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
extern "C" fn tell_xdp(ctx: *mut xdp_md, at: u64, what: u64) -> u64 {
    let Some(mut reserved) = reserve() else {
        return 0;
    };
    let event = reserved.as_mut_ptr();
    let packet = XdpPacket(ctx);
    // SAFETY: as in `tell_skb`.
    unsafe {
        describe(event, at, what);
        let length = packet.frame_len() as usize;
        (*event).length = length as u32;
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

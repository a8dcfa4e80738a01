//! Fragments follow their datagram's first one, which alone has the layer 4 header.
//!
//! A first fragment is translated like a whole packet, and leaves its verdict in `DATAGRAMS`. Later ones get the same
//! addresses and the same exit. Those that come before it are held: their bytes are kept, and the packet ends there. When
//! the first comes, copies of it with their bytes enter its hook once more, meet the verdict, and follow. A fragment that
//! cannot be held is passed as it came: if its datagram would have been translated, it is lost, as if it had been dropped;
//! if it is nothing to us, no harm is done.
//!
//! Of two CPUs, one with the first fragment and the other with a later one: a fragment is put into the store before its datagram is
//! looked at again, and the verdict is written before the store is searched, so one of both finds it. Whoever deletes it
//! from the store owns it.

use bytemuck::Zeroable;

use crate::{
    addr::{AnyAddr, Family, Tuple, proto},
    balance::flow_hash,
    config::is_over,
    datagram::{DatagramHead, FragmentSource, HELD_OF_DATAGRAM, HeldHead, WAYS, datagram_state},
    enforce,
    exit::{Leave, leave},
    packet::Packet,
    parse::{Fragment, Headers, parse_l4},
    pipeline::{Context, Stages, Work, World, established, not_understood, settle},
    reason::Reason,
    rewrite::RewriteIp,
    tables::{Entry, InsertError},
    verdict::{Action, Verdict},
};

/// The tables of fragments, and the store of those that are held. Only TC hooks ask for them.
pub trait Fragments<F: Family, P: Packet>: World<F> {
    /// Reads what is remembered of a datagram; false if it is nothing.
    fn datagram(&self, key: &F::DatagramKey, into: &mut F::Datagram) -> bool;
    fn datagram_head(&self, key: &F::DatagramKey) -> Option<DatagramHead>;
    /// Inserts, or replaces when `replace`.
    fn put_datagram(
        &self,
        key: &F::DatagramKey,
        datagram: &F::Datagram,
        replace: bool,
    ) -> Result<(), InsertError>;
    fn remove_datagram(&self, key: &F::DatagramKey);
    /// Counts one more fragment as held.
    fn add_held(&self, key: &F::DatagramKey);

    fn source(&self, source: &AnyAddr) -> Option<FragmentSource>;
    /// Inserts or replaces.
    fn put_source(&self, source: &AnyAddr, value: FragmentSource);
    fn add_to_source(&self, source: &AnyAddr, more: i32);

    /// Copies the frame, so that [`Store::put`] can store it. False: it is too large.
    fn copy(&self, packet: &P, head: HeldHead) -> bool;
}

/// The store of held fragments, by place.
pub trait Store<P: Packet> {
    /// Stores what was copied last, in a free place.
    fn put(&self, place: u32) -> Result<(), InsertError>;
    fn head(&self, place: u32) -> Option<HeldHead>;
    /// True: it was there, and is the caller's now.
    fn remove(&self, place: u32) -> bool;

    /// Keeps the frame of a first fragment while others take its place. False: it is too large.
    fn set_aside(&self, packet: &P) -> bool;
    /// Undoes what was done to the frame since.
    fn restore(&self, packet: &mut P);
    /// Makes the packet the one that is held at a place.
    fn become_held(&self, packet: &mut P, place: u32) -> bool;
    /// Sends a copy of the packet to this hook once more.
    fn send_again(&self, packet: &mut P, at: &Context);
}

/// Held fragments whose first one has come, in one number, because stages are verified apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    pub ticket: u32,
    /// How many there are about.
    pub held: u32,
    /// Their first one was not dropped.
    pub follow: bool,
}

impl Waiting {
    pub const NONE: Self = Self {
        ticket: 0,
        held: 0,
        follow: false,
    };

    #[inline(always)]
    pub fn to_raw(self) -> u64 {
        u64::from(self.ticket) << 32 | u64::from(self.held) << 1 | u64::from(self.follow)
    }

    /// The value of [`Self::to_raw`].
    #[inline(always)]
    pub fn from_raw(raw: u64) -> Self {
        Self {
            ticket: (raw >> 32) as u32,
            held: raw as u32 >> 1,
            follow: raw & 1 != 0,
        }
    }
}

/// Numbers beyond those that a datagram has counted under which fragments are looked for: other CPUs may have been
/// about to store some, or have counted at the same time.
const UNCOUNTED: u32 = 8;
/// Ticks beyond which a held fragment gives way to a newer one where there is no free place.
const PATIENCE: u32 = 1;

/// Whether a fragment may belong to a TCP or UDP packet. What follows IPv6's fragment header may be another extension.
#[inline(always)]
pub(crate) fn may_be_of_flow<F: Family>(headers: &Headers<F::Addr>) -> bool {
    let is_first = headers.fragment == Fragment::First;
    match headers.proto {
        proto::TCP | proto::UDP => true,
        0 | 43 | 60 => F::VERSION == 6,
        // Those after it could not tell that it is nothing to us.
        _ => F::VERSION == 6 && is_first,
    }
}

/// Decides about a fragment.
#[inline(always)]
pub(crate) fn process<F: RewriteIp, P: Packet, W: World<F>, S: Stages<F, P, W>>(
    packet: &mut P,
    world: &W,
    at: &Context,
    stages: &mut S,
    is_first: bool,
) -> Verdict {
    if is_first {
        let mut verdict = stages.first(packet, world, at);
        if verdict.is_pending() {
            verdict = settle::<F, P, W, S>(packet, world, at, stages, verdict);
        }
        if enforce::is_asked(world, at) && verdict.is_open() {
            verdict = stages.enforce(packet, world, at, verdict);
            if verdict == Verdict::PASS {
                verdict = Verdict::ONWARD;
            }
        }
        let waiting = stages.remember(packet, world, at, verdict);
        if waiting.held != 0 {
            stages.release(packet, world, at, waiting);
        }
        return verdict;
    }
    let mut verdict = stages.later(packet, world, at);
    if verdict.action() == Action::Next {
        verdict = stages.hold(packet, world, at);
        if verdict.action() == Action::Next {
            // The first one came just now.
            verdict = stages.later(packet, world, at);
        }
    }
    if verdict.action() == Action::Next {
        world.count(Reason::FragmentLimit as u32);
        return Verdict::UNREADABLE;
    }
    verdict
}

/// The first fragment: what [`established`] says, with the flow, if there is one, in `work.forward`.
#[inline(always)]
pub fn first<F: RewriteIp, P: Packet, W: World<F>>(
    packet: &mut P,
    world: &W,
    at: &Context,
    work: &mut Work<F>,
) -> Verdict {
    let head = F::datagram_head_mut(&mut work.datagram);
    head.state = datagram_state::NONE;
    let Some((next, id_be)) = F::fragment_id(packet, at.l3) else {
        return Verdict::PASS;
    };
    let is_flow = work.headers.proto == proto::TCP || work.headers.proto == proto::UDP;
    if !is_flow && !matches!(next, 0 | 43 | 60) {
        // Those after it are passed without asking.
        return Verdict::PASS;
    }
    head.state = datagram_state::WAITING;
    let (src, dst) = (work.headers.tuple.src, work.headers.tuple.dst);
    work.datagram_key = F::datagram_key(src, dst, id_be, next, at.hook);
    if !is_flow {
        return Verdict::PASS;
    }
    if parse_l4::<F, P>(packet, at.l3, &mut work.headers).is_ok() {
        work.key = F::flow_key(&work.headers.tuple, work.headers.proto, at.side());
        if let Some(entry) = world.flow(&work.key) {
            work.forward = *entry.flow();
        }
    }
    established::<F, P, W>(packet, world, at, &mut work.headers)
}

/// Remembers what became of a first fragment. The result tells which others have waited for it.
#[inline(always)]
pub fn remember<F: RewriteIp, P: Packet, W: Fragments<F, P>>(
    packet: &mut P,
    world: &W,
    at: &Context,
    work: &mut Work<F>,
    verdict: Verdict,
) -> Waiting {
    if F::datagram_head(&work.datagram).state == datagram_state::NONE {
        return Waiting::NONE;
    }
    let is_same = F::parse_ip(packet, at.l3, &mut work.quoted).is_ok()
        && work.quoted.tuple.src == work.headers.tuple.src
        && work.quoted.tuple.dst == work.headers.tuple.dst;
    let state = match verdict.action() {
        Action::Drop | Action::Answer => datagram_state::DROPPED,
        Action::Pass if is_same => datagram_state::PASSED,
        _ => datagram_state::TRANSLATED,
    };
    *F::datagram_flow_mut(&mut work.datagram) = if state == datagram_state::TRANSLATED {
        work.forward
    } else {
        F::Flow::zeroed()
    };
    *F::datagram_head_mut(&mut work.datagram) = DatagramHead {
        seen_ticks: world.now_ticks(),
        held: 0,
        state,
    };
    let key = &work.datagram_key;
    if world.put_datagram(key, &work.datagram, false) != Err(InsertError::Exists) {
        return Waiting::NONE;
    }
    let before = world.datagram_head(key);
    let _ = world.put_datagram(key, &work.datagram, true);
    let Some(before) = before.filter(|before| before.state == datagram_state::WAITING) else {
        return Waiting::NONE;
    };
    let held = before.held.min(HELD_OF_DATAGRAM);
    work.source = F::to_any(work.headers.tuple.src);
    world.add_to_source(&work.source, -held.cast_signed());
    Waiting {
        ticket: ticket::<F>(work),
        held,
        follow: state != datagram_state::DROPPED,
    }
}

/// A later fragment follows its first one. `NEXT`: that has not come.
#[inline(always)]
pub fn later<F: RewriteIp, P: Packet, W: Fragments<F, P>>(
    packet: &mut P,
    world: &W,
    at: &Context,
    work: &mut Work<F>,
) -> Verdict {
    if !packet.covers(at.l3 + usize::from(work.headers.l3_len)) {
        return not_understood::<F, W>(world, at, Reason::Truncated);
    }
    let Some((next, id_be)) = F::fragment_id(packet, at.l3) else {
        return Verdict::PASS;
    };
    let (src, dst) = (work.headers.tuple.src, work.headers.tuple.dst);
    work.datagram_key = F::datagram_key(src, dst, id_be, next, at.hook);
    if !world.datagram(&work.datagram_key, &mut work.datagram) {
        return Verdict::NEXT;
    }
    let head = F::datagram_head(&work.datagram);
    if !is_alive::<F, P, W>(world, head) {
        return Verdict::NEXT;
    }
    match head.state {
        datagram_state::PASSED => Verdict::ONWARD,
        datagram_state::DROPPED => Verdict::drop(Reason::FragmentDropped),
        datagram_state::TRANSLATED => follow::<F, P, W>(packet, world, at, work),
        _ => Verdict::NEXT,
    }
}

#[inline(always)]
fn is_alive<F: Family, P: Packet, W: Fragments<F, P>>(world: &W, head: &DatagramHead) -> bool {
    !is_over(
        world.now_ticks(),
        head.seen_ticks,
        world.config(|c| &c.fragment_ticks),
    )
}

/// Gives a later fragment the addresses of its first one, and sends it after it.
#[inline(always)]
fn follow<F: RewriteIp, P: Packet, W: World<F>>(
    packet: &mut P,
    world: &W,
    at: &Context,
    work: &Work<F>,
) -> Verdict {
    let flow = F::datagram_flow(&work.datagram);
    let exit = match leave::<F, P, W>(packet, world, at, &work.headers, flow) {
        Leave::Exit(verdict) => verdict,
        Leave::Unchanged => return Verdict::PASS,
        // The first one is as large, and has been answered.
        Leave::TooBig(_) => return Verdict::drop(Reason::FragmentationNeeded),
        Leave::Drop(reason) => return Verdict::drop(reason),
    };
    let (old, new) = (&work.headers.tuple, F::rewrite(flow));
    let Some(sum) = F::write_addresses(packet, at.l3, [&old.src, &old.dst], [new.src, new.dst]) else {
        return Verdict::drop(Reason::RewriteFailed);
    };
    if F::VERSION == 6 {
        packet.adjust_sum(sum);
    }
    exit
}

/// Puts a fragment whose first one has not come into the store. `NEXT`: now it has.
#[inline(always)]
pub fn hold<F: Family, P: Packet, W: Fragments<F, P> + Store<P>>(
    packet: &mut P,
    world: &W,
    work: &mut Work<F>,
) -> Verdict {
    let now = world.now_ticks();
    work.source = F::to_any(work.headers.tuple.src);
    let most = (world.config(|c| &c.held) / 8).max(HELD_OF_DATAGRAM);
    match world.source(&work.source) {
        Some(known) if !is_over(now, known.since_ticks, world.config(|c| &c.fragment_ticks)) => {
            if known.held >= most.cast_signed() {
                return no_room(world, Reason::FragmentLimit);
            }
        }
        _ => world.put_source(
            &work.source,
            FragmentSource {
                since_ticks: now,
                held: 0,
            },
        ),
    }
    let index = match enter::<F, P, W>(world, work, now) {
        Some(index) if index < HELD_OF_DATAGRAM => index,
        Some(_) => return no_room(world, Reason::FragmentLimit),
        None => return Verdict::NEXT,
    };
    let head = HeldHead {
        ticket: ticket::<F>(work),
        index,
        seen_ticks: now,
        length: packet.len() as u32,
    };
    if !world.copy(packet, head) {
        return no_room(world, Reason::FragmentTooLarge);
    }
    let place = place::<F, P, W>(world, &head);
    if place == NO_PLACE {
        return no_room(world, Reason::FragmentLimit);
    }
    world.add_to_source(&work.source, 1);
    world.add_held(&work.datagram_key);
    // The first one may have come meanwhile, and have missed this one.
    if let Some(datagram) = world.datagram_head(&work.datagram_key)
        && datagram.state != datagram_state::WAITING
        && let Some(stored) = world.head(place)
        && (stored.ticket, stored.index) == (head.ticket, head.index)
        && world.remove(place)
    {
        return Verdict::NEXT;
    }
    Verdict::drop(Reason::FragmentHeld)
}

#[inline(always)]
fn no_room<F: Family, W: World<F>>(world: &W, reason: Reason) -> Verdict {
    world.count(reason as u32);
    Verdict::UNREADABLE
}

/// Finds or makes the entry of a datagram that is waiting; how many fragments it has. `None`: its first one has come.
#[inline(always)]
fn enter<F: Family, P: Packet, W: Fragments<F, P>>(world: &W, work: &mut Work<F>, now: u32) -> Option<u32> {
    let mut known = world.datagram_head(&work.datagram_key);
    if let Some(head) = &known
        && !is_alive::<F, P, W>(world, head)
    {
        world.remove_datagram(&work.datagram_key);
        known = None;
    }
    if known.is_none() {
        *F::datagram_flow_mut(&mut work.datagram) = F::Flow::zeroed();
        *F::datagram_head_mut(&mut work.datagram) = DatagramHead {
            seen_ticks: now,
            held: 0,
            state: datagram_state::WAITING,
        };
        let _ = world.put_datagram(&work.datagram_key, &work.datagram, false);
        known = world.datagram_head(&work.datagram_key);
    }
    let head = known?;
    (head.state == datagram_state::WAITING).then_some(head.held)
}

/// In place of a place: none.
const NO_PLACE: u32 = u32::MAX;

/// The first of the [`WAYS`] places that a fragment may have.
#[inline(always)]
fn places<F: Family, W: World<F>>(world: &W, ticket: u32, index: u32) -> u32 {
    let sets = (world.config(|c| &c.held) / WAYS).max(1);
    ticket.wrapping_add(index) % sets * WAYS
}

/// Stores what was copied, in a place that is free, or whose time is up; where there is none, in that of one that has
/// waited for some time.
#[inline(always)]
fn place<F: Family, P: Packet, W: World<F> + Store<P>>(world: &W, head: &HeldHead) -> u32 {
    let first = places::<F, W>(world, head.ticket, head.index);
    for round in 0..2 * WAYS {
        let place = first + round % WAYS;
        if world.put(place).is_ok() {
            return place;
        }
        let Some(there) = world.head(place) else {
            continue;
        };
        let reason = if is_over(
            head.seen_ticks,
            there.seen_ticks,
            world.config(|c| &c.fragment_ticks),
        ) {
            Reason::FragmentTimedOut
        } else if round >= WAYS && is_over(head.seen_ticks, there.seen_ticks, PATIENCE) {
            Reason::FragmentEvicted
        } else {
            continue;
        };
        if world.remove(place) {
            world.count(reason as u32);
            if world.put(place).is_ok() {
                return place;
            }
        }
    }
    NO_PLACE
}

/// What a datagram's fragments are stored under. Two datagrams may have the same: a fragment that is sent on with those of
/// another is judged by its own address, and held once more.
#[inline(always)]
fn ticket<F: Family>(work: &Work<F>) -> u32 {
    let id_be = F::datagram_id(&work.datagram_key);
    let tuple = Tuple {
        sport_be: id_be as u16,
        dport_be: (id_be >> 16) as u16,
        ..work.headers.tuple
    };
    flow_hash::<F>(&tuple, 0)
}

/// Sends on all that have waited, one after the other; the packet is as before then.
#[inline(always)]
pub fn release<F: RewriteIp, P: Packet, W: World<F> + Store<P>, S: Stages<F, P, W>>(
    packet: &mut P,
    world: &W,
    at: &Context,
    stages: &mut S,
    mut waiting: Waiting,
) {
    waiting.follow &= world.set_aside(packet);
    for index in 0..HELD_OF_DATAGRAM {
        if index >= waiting.held + UNCOUNTED {
            break;
        }
        stages.release_one(packet, world, at, waiting, index);
    }
    if waiting.follow {
        world.restore(packet);
    }
}

/// Sends on what is stored of a datagram by one number; two, if two CPUs had found the same number to be free.
#[inline(always)]
pub fn release_one<F: Family, P: Packet, W: World<F> + Store<P>>(
    packet: &mut P,
    world: &W,
    at: &Context,
    waiting: Waiting,
    index: u32,
) {
    let first = places::<F, W>(world, waiting.ticket, index);
    for way in 0..WAYS {
        let place = first + way;
        let Some(head) = world.head(place) else { continue };
        if (head.ticket, head.index) != (waiting.ticket, index) {
            continue;
        }
        let in_time = !is_over(
            world.now_ticks(),
            head.seen_ticks,
            world.config(|c| &c.fragment_ticks),
        );
        let follows = in_time && waiting.follow && world.become_held(packet, place);
        // Read before it is deleted, and no more than that until it is known to be ours.
        if !world.remove(place) {
            continue;
        }
        if follows {
            world.count(Reason::FragmentReleased as u32);
            world.send_again(packet, at);
        } else if in_time {
            world.count(Reason::FragmentDropped as u32);
        } else {
            world.count(Reason::FragmentTimedOut as u32);
        }
    }
}

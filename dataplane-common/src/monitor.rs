//! `EVENTS`, what is told of single packets to whoever watches, and `MONITOR`, whether anybody does.
//!
//! Where nobody watches, a drop costs one load. A reader sets [`monitor_state::WATCHED`]. Whoever finds the ring full sets
//! [`monitor_state::FULL`], and from then on events are only counted, as [`Reason::EventMissed`](crate::reason::Reason::EventMissed), until the reader has made room and asks for more:
//! so it bounds what it costs the datapath by how often it asks, and knows how much it has missed.

use bytemuck::{Pod, Zeroable};

use crate::addr::AnyAddr;

/// The element of `MONITOR`.
pub mod monitor_state {
    /// Nobody watches.
    pub const IDLE: u32 = 0;
    /// Events are written.
    pub const WATCHED: u32 = 1;
    /// The ring was full: events are counted alone.
    pub const FULL: u32 = 2;
}

/// Bytes of a packet that are told.
pub const CAPTURED: usize = 128;

/// What has happened to a packet.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// Dropped, for [`Event::reason`].
    Dropped,
    /// Refused, for [`Event::reason`]: it is answered as a host with a closed port does, unless too many are.
    Refused,
    /// Larger than the path's MTU in [`Event::mtu`]: its sender is told, unless too many are.
    TooBig,
    /// The first of a flow, sent to a backend.
    Begun,
    /// The first answer to it, which refuses it.
    RefusedByBackend,
}

impl EventKind {
    pub const ALL: [EventKind; 5] = [
        EventKind::Dropped,
        EventKind::Refused,
        EventKind::TooBig,
        EventKind::Begun,
        EventKind::RefusedByBackend,
    ];
}

/// A record of `EVENTS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Event {
    /// When, on the monotonic clock, in nanoseconds.
    pub at_ns: u64,
    /// The device whose hook this is.
    pub ifindex: u32,
    /// Bytes of the packet.
    pub length: u32,
    /// The number of the [`Reason`](crate::reason::Reason), where there is one.
    pub reason: u32,
    /// Index into `RULES` of the rule that denied the packet, or [`NO_RULE_INDEX`](crate::policy::NO_RULE_INDEX).
    pub rule: u32,
    /// Of what began or was refused by its backend: index into `SERVICES` and into `BACKENDS`.
    pub service: u32,
    pub backend: u32,
    /// What the packet becomes then: IPv4 in the first word.
    pub src_be: AnyAddr,
    pub dst_be: AnyAddr,
    pub sport_be: u16,
    pub dport_be: u16,
    /// What the packet does not fit.
    pub mtu: u16,
    /// Bytes of the packet that are here.
    pub captured: u16,
    /// [`EventKind`].
    pub kind: u8,
    /// [`Hook`](crate::verdict::Hook).
    pub hook: u8,
    /// Offset of the IP header.
    pub l3: u8,
    /// 4 or 6.
    pub family: u8,
    /// Of what policies have denied: the host-side interface of the pod whose policies these are, and [`OUTWARD`].
    pub pod: u32,
    pub bytes: [u8; CAPTURED],
}

const _: () = assert!(size_of::<Event>() == 80 + CAPTURED);

/// In [`Event::pod`]: they are about what the pod sends, not about what reaches it.
pub const OUTWARD: u32 = 1 << 31;

/// What is to be told, in one number: functions that are verified apart have no other arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct What {
    /// [`EventKind`].
    pub kind: u8,
    /// [`Hook`](crate::verdict::Hook).
    pub hook: u8,
    /// Offset of the IP header.
    pub l3: u8,
    /// The reason, or the MTU.
    pub value: u32,
}

impl What {
    #[inline(always)]
    pub fn to_raw(self) -> u64 {
        u64::from(self.value) << 32
            | u64::from(self.l3) << 16
            | u64::from(self.hook) << 8
            | u64::from(self.kind)
    }

    /// What [`Self::to_raw`] was made of.
    #[inline(always)]
    pub fn from_raw(raw: u64) -> Self {
        Self {
            kind: raw as u8,
            hook: (raw >> 8) as u8,
            l3: (raw >> 16) as u8,
            value: (raw >> 32) as u32,
        }
    }
}

//! `FLOWS_V4`, `FLOWS_V6`, `HALF_OPEN_V4` and `HALF_OPEN_V6`: what is remembered of a translated flow.
//!
//! A flow has two entries, one for each direction, each keyed by the packet as its hook sees it before translation.
//! A first packet enters only the reply's entry, into `HALF_OPEN`, and the reply adds the other one there; both enter
//! `FLOWS` when the client has answered the reply. A second datagram without an answer enters its own into `HALF_OPEN`
//! too, so that flows which are never answered stay with their backend.

use bytemuck::{Pod, Zeroable};

use crate::addr::Mac;

/// Where a packet is seen: part of the key, so that each direction of a flow is translated at just one place.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// `xdp`, `from_netdev`, `from_pod`: before the kernel's stack.
    Ingress = 0,
    /// `to_netdev`, `to_lo`, `to_pod`: behind it.
    Egress = 1,
}

/// Key of `FLOWS_V4` and `HALF_OPEN_V4`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct FlowKey4 {
    pub src_be: u32,
    pub dst_be: u32,
    pub sport_be: u16,
    pub dport_be: u16,
    pub proto: u8,
    /// [`Side`].
    pub side: u8,
    pub unused: [u8; 2],
}

/// Key of `FLOWS_V6` and `HALF_OPEN_V6`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct FlowKey6 {
    pub src_be: [u32; 4],
    pub dst_be: [u32; 4],
    pub sport_be: u16,
    pub dport_be: u16,
    pub proto: u8,
    /// [`Side`].
    pub side: u8,
    pub unused: [u8; 2],
}

/// Bits of [`FlowMeta::flags`].
pub mod flow_flags {
    /// This entry is for packets from the backend to the client.
    pub const REPLY: u8 = 1;
    /// The source port comes from the range for translation.
    pub const SNAT: u8 = 2;
    /// This direction is seen at [`super::Side::Egress`].
    pub const SELF_EGRESS: u8 = 4;
    /// The other direction is seen at [`super::Side::Egress`].
    pub const OTHER_EGRESS: u8 = 8;
    /// Netfilter translates the flow, as it did before there was anything of ours: here its packets pass as they are. The
    /// entry's rewrite is what they have already; the backend says what policies judge.
    pub const LEFT: u8 = 16;
    /// Of no service: this node's own flow, from a port of the range for translation. Its source is the one that the kernel
    /// gave it (netfilter masquerades from any port), unless a translated flow had the port before.
    pub const DIRECT: u8 = 32;
}

/// Values of [`FlowMeta::state`].
pub mod flow_state {
    pub const OPEN: u8 = 0;
    /// A FIN or RST has passed in this direction and no data after it.
    pub const CLOSING: u8 = 1;
    /// In `HALF_OPEN`: there has been an answer, and the client has not gone on after it.
    pub const ANSWERED: u8 = 2;
}

/// In place of ticks in `MIDSTREAM`: what is in no table and may be in the middle of something is netfilter's, which is every
/// datagram and what is in the middle of a TCP connection. The agent says so from its first start until it has entered those flows.
pub const MIDSTREAM_LEFT: u32 = u32::MAX;
/// The same of TCP alone, where netfilter translates no datagrams.
pub const MIDSTREAM_LEFT_TCP: u32 = u32::MAX - 1;

/// How a translated packet leaves the hook.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// On to the kernel's stack, or out of the device that the stack chose.
    Pass = 0,
    /// Into the pod behind the host-side interface [`FlowMeta::ifindex`] (forward: the backend's).
    Pod = 1,
    /// Into this host's stack, as if it had arrived at [`FlowMeta::ifindex`].
    Host = 2,
    /// Out by the route to its new destination.
    Route = 3,
    /// Back into the pod that it came from (hairpin).
    Back = 4,
}

macro_rules! flow_events {
    ($($(#[doc = $doc:literal])+ $name:ident = $label:literal,)+) => {
        /// What happens to flows: index of `FLOW_EVENTS`, a per-CPU array of counts.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum FlowEvent { $($(#[doc = $doc])+ $name,)+ }

        impl FlowEvent {
            /// Every event, in the order of `FLOW_EVENTS`.
            pub const ALL: &[FlowEvent] = &[$(FlowEvent::$name,)+];

            /// The label in metrics and on the command line.
            pub const fn label(self) -> &'static str {
                match self { $(FlowEvent::$name => $label,)+ }
            }

            /// What it means, for people.
            pub const fn text(self) -> &'static str {
                match self { $(FlowEvent::$name => concat!($($doc,)+),)+ }
            }
        }
    };
}

flow_events! {
    /// A first packet was sent to a backend; the flow is half-open.
    Begun = "begun",
    /// A backend answered a half-open flow.
    Answered = "answered",
    /// Both ends have shown that they take part: the flow got its place among the established ones.
    Established = "established",
}

/// Elements of `FLOW_EVENTS`.
pub const FLOW_EVENTS: u32 = FlowEvent::ALL.len() as u32;

/// What both families remember of a flow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct FlowMeta {
    /// Index into `BACKENDS`; the entry holds only while the generation there is [`Self::backend_generation`].
    pub backend: u32,
    pub backend_generation: u32,
    /// Index into `SERVICES`; the entry holds only while the generation there is [`Self::service_generation`].
    pub service: u32,
    pub service_generation: u16,
    /// [`flow_flags`].
    pub flags: u8,
    /// [`Exit`] of this direction in the lower four bits, of the other one in the upper four.
    pub exit: u8,
    /// When a packet last used the entry, in ticks of 2^30 ns since boot.
    pub seen_ticks: u32,
    /// The device of [`Exit::Pod`] and [`Exit::Host`].
    pub ifindex: u32,
    /// [`flow_state`].
    pub state: u8,
    /// In `HALF_OPEN`, for the client's packets of TCP: the lower 24 bits of the backend's initial sequence number, most
    /// significant byte first. Elsewhere 0.
    pub sequence: [u8; 3],
    /// Link-layer addresses of a packet that leaves by [`Exit::Pod`] or [`Exit::Host`].
    pub mac_dst: Mac,
    pub mac_src: Mac,
    /// `POLICY_REVISION` when the policies of the pods at this hook allowed the flow.
    pub judged: u32,
}

/// Value of `FLOWS_V4` and `HALF_OPEN_V4`: the tuple that the packet gets, and the rest.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Flow4 {
    pub src_be: u32,
    pub dst_be: u32,
    pub sport_be: u16,
    pub dport_be: u16,
    pub meta: FlowMeta,
}

/// Value of `FLOWS_V6` and `HALF_OPEN_V6`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Flow6 {
    pub src_be: [u32; 4],
    pub dst_be: [u32; 4],
    pub sport_be: u16,
    pub dport_be: u16,
    pub meta: FlowMeta,
}

const _: () = assert!(size_of::<FlowKey4>() == 16);
const _: () = assert!(size_of::<FlowKey6>() == 40);
const _: () = assert!(size_of::<FlowMeta>() == 44);
const _: () = assert!(size_of::<Flow4>() == 56);
const _: () = assert!(size_of::<Flow6>() == 80);

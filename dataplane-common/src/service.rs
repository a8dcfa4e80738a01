//! `FRONTENDS_V4`, `FRONTENDS_V6`, `SERVICES`, `MAGLEV`, `PORTS`, `AFFINITY_V4`, `AFFINITY_V6`, `RANGES_V4` and
//! `RANGES_V6`: from an address and port to a backend id.
//!
//! A frontend maps to a service index that never changes while the frontend exists. What changes, the slice of
//! `MAGLEV`, is [`ServiceHead`]: one aligned 64-bit word, written and read at once.

use bytemuck::{Pod, Zeroable};

use crate::addr::AnyAddr;

/// Who may use a frontend. Traffic policies are two slices, one for each scope, so they cost no branch.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scope {
    /// Pods and host processes of this node.
    Internal = 0,
    /// Packets that arrive from outside the node.
    External = 1,
}

/// In a key of `FRONTENDS_V4` or `FRONTENDS_V6` with the family's ICMP as its protocol: echo requests to the address are
/// answered. The value says nothing.
pub const ECHO_PORT: u16 = 0;

/// Key of `FRONTENDS_V4`. A frontend on every node address (NodePort) has the unspecified address.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct FrontendKey4 {
    pub addr_be: u32,
    pub port_be: u16,
    pub proto: u8,
    /// [`Scope`].
    pub scope: u8,
}

/// Key of `FRONTENDS_V6`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct FrontendKey6 {
    pub addr_be: [u32; 4],
    pub port_be: u16,
    pub proto: u8,
    /// [`Scope`].
    pub scope: u8,
}

/// Value of `FRONTENDS_V4` and `FRONTENDS_V6`. Never changed in place: hash values are not read atomically.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Frontend {
    /// Index into `SERVICES`.
    pub service: u32,
    /// For the agent, which tells after a restart whether the frontend is still the same Service's.
    pub owner: u32,
}

/// The changing part of a [`Service`], one 64-bit word: always stored and loaded at once, relaxed.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct ServiceHead {
    /// Index into `MAGLEV` of the element that holds slots 0 to 3. The backend ids stand before it, see [`Service`].
    pub slots_offset: u32,
    /// Bumped when the index is given to another service, never by a change of backends.
    pub generation: u16,
    /// Index into [`TABLE_SIZES`]; 0 is a service without endpoints.
    pub size_class: u8,
    /// Bits of [`service_flags`].
    pub flags: u8,
}

/// Bits of [`ServiceHead::flags`].
pub mod service_flags {
    /// The service is gone; its index has not been reused. Established TCP flows may live on.
    pub const DELETED: u8 = 1;
    /// A service without endpoints drops instead of refusing (a Local traffic policy with endpoints elsewhere).
    pub const DROP_WHEN_EMPTY: u8 = 2;
    /// `ClientIP` session affinity: what a client was given is in `AFFINITY_V4` or `AFFINITY_V6`.
    pub const AFFINITY: u8 = 4;
    /// With [`AFFINITY`]: its clients are those of another entry, see [`super::Service::affinity`].
    pub const AFFINITY_SHARED: u8 = 16;
    /// Flows begin only from the source ranges that `RANGES_V4` or `RANGES_V6` has for the service.
    pub const RANGES: u8 = 8;
}

/// Value of `SERVICES`, an array by service index.
///
/// # The slice in `MAGLEV`
/// With `o = slots_offset`: slot `i` is the 16-bit lane `i % 4` (lane 0 lowest) of element `o + i / 4`, a number `b`
/// into the list of backend ids; id `b` is the 32-bit lane `b % 2` (lane 0 lowest) of element `o - 2 - b / 2`, and
/// element `o - 1` says how many ids there are. They ascend, so that whether a backend is one of them is told by halving.
/// So the ids come first and the slots follow, and one offset finds both.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Service {
    pub head: ServiceHead,
    /// The frontend's address, so that a reader can tell an index that was reused. Unspecified for node ports.
    pub addr_be: AnyAddr,
    pub port_be: u16,
    pub proto: u8,
    /// 4 or 6.
    pub family: u8,
    /// How long a client keeps its backend after its last connection began, in eighths of a tick (2^27 ns). With
    /// [`service_flags::AFFINITY_SHARED`] the index of the entry that says so: of the same service port and family,
    /// whose frontends remember a client together.
    pub affinity: u32,
}

/// Key of `AFFINITY_V4`: a client of a service with [`service_flags::AFFINITY`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct AffinityKey4 {
    /// Index into `SERVICES`, of the entry under which the service port's clients are remembered.
    pub service: u32,
    /// That entry's, so that who gets its index later does not inherit its clients.
    pub service_generation: u32,
    /// The client's own address.
    pub addr_be: u32,
}

/// Key of `AFFINITY_V6`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct AffinityKey6 {
    pub service: u32,
    pub service_generation: u32,
    pub addr_be: [u32; 4],
}

/// Value of `AFFINITY_V4` and `AFFINITY_V6`: the backend that a client was given.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Affinity {
    /// Index into `BACKENDS`.
    pub backend: u32,
    pub backend_generation: u32,
    /// When the client last began a flow, in eighths of a tick.
    pub seen_eighths: u32,
}

/// What a key of `RANGES_V4`, a longest prefix match, holds behind its prefix length: that is 32 for the service, which
/// has to be equal, and the length of the range.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct SourceRange4 {
    /// Index into `SERVICES`.
    pub service: u32,
    pub addr_be: u32,
}

/// What a key of `RANGES_V6` holds behind its prefix length.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct SourceRange6 {
    pub service: u32,
    pub addr_be: [u32; 4],
}

/// Bits of a source range before those of the address.
pub const RANGE_SERVICE_BITS: u32 = 32;

const _: () = assert!(size_of::<FrontendKey4>() == 8);
const _: () = assert!(size_of::<FrontendKey6>() == 20);
const _: () = assert!(size_of::<Frontend>() == 8);
const _: () = assert!(size_of::<ServiceHead>() == 8);
const _: () = assert!(size_of::<Service>() == 32);
const _: () = assert!(size_of::<AffinityKey4>() == 12);
const _: () = assert!(size_of::<AffinityKey6>() == 24);
const _: () = assert!(size_of::<Affinity>() == 12);
const _: () = assert!(size_of::<SourceRange4>() == 8);
const _: () = assert!(size_of::<SourceRange6>() == 20);

/// Sizes of Maglev tables: primes, about doubling. Index 0 means no table.
pub const TABLE_SIZES: [u32; 16] = [
    0, 101, 211, 503, 1009, 2003, 4001, 8009, 16381, 32749, 65521, 131_071, 262_139, 524_287, 1_048_573,
    2_097_143,
];

/// Slots a table has at least for each backend (Maglev, section 5.3: 1 % imbalance).
pub const SLOTS_PER_BACKEND: u32 = 100;

/// The size class of the table for `backends` backends.
pub fn size_class(backends: usize) -> u8 {
    if backends == 0 {
        return 0;
    }
    let wanted = backends as u64 * u64::from(SLOTS_PER_BACKEND);
    let mut class = 1;
    while class < TABLE_SIZES.len() - 1 && u64::from(TABLE_SIZES[class]) < wanted {
        class += 1;
    }
    class as u8
}

/// Element of `PORTS`, an array by `udp << 10 | port >> 6` (host byte order): which ports any frontend uses, so that
/// most packets that are not for a service are told by one array lookup.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct PortSet {
    /// Bit `port & 63`: a frontend of any address has this port.
    pub any: u64,
    /// Bit `port & 63`: a frontend on the unspecified address has this port.
    pub wildcard: u64,
}

/// Elements of `PORTS`.
pub const PORT_SETS: u32 = 2048;

/// The index into `PORTS` for a port in host byte order.
#[inline(always)]
pub fn port_set_index(proto: u8, port: u16) -> u32 {
    (if proto == crate::addr::proto::UDP { 1024 } else { 0 }) | u32::from(port >> 6)
}

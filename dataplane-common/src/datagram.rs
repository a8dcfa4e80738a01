//! `DATAGRAMS_V4`, `DATAGRAMS_V6`, `HELD` and `FRAGMENT_SOURCES`: what is remembered of datagrams that come in fragments.
//!
//! A datagram's first fragment leaves its verdict in `DATAGRAMS_*` for those without a layer 4 header. Fragments that come
//! before it wait in `HELD`, an associative store: the place of a fragment follows from its datagram and its number,
//! but for [`WAYS`] neighbours.

use bytemuck::{Pod, Zeroable};

use crate::flow::{Flow4, Flow6};

/// Key of `DATAGRAMS_V4` (RFC 791: source, destination, protocol and identification), for each hook apart.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct DatagramKey4 {
    pub src_be: u32,
    pub dst_be: u32,
    /// The identification, followed by zeros.
    pub id_be: u32,
    pub proto: u8,
    /// [`crate::verdict::Hook`].
    pub hook: u8,
    pub unused: [u8; 2],
}

/// Key of `DATAGRAMS_V6` (RFC 8200: source, destination and identification), for each hook apart.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct DatagramKey6 {
    pub src_be: [u32; 4],
    pub dst_be: [u32; 4],
    pub id_be: u32,
    /// 0: fragments of one datagram may name different ones.
    pub proto: u8,
    /// [`crate::verdict::Hook`].
    pub hook: u8,
    pub unused: [u8; 2],
}

/// Values of [`DatagramHead::state`].
pub mod datagram_state {
    /// Nothing is to be remembered.
    pub const NONE: u32 = 0;
    /// The first fragment has not come yet.
    pub const WAITING: u32 = 1;
    /// The first fragment passed as it came.
    pub const PASSED: u32 = 2;
    /// The first fragment was dropped, or answered.
    pub const DROPPED: u32 = 3;
    /// The first fragment was translated by the flow that stands beside.
    pub const TRANSLATED: u32 = 4;
}

/// What both families remember of a datagram.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct DatagramHead {
    /// When the entry was made, in ticks of 2^30 ns since boot.
    pub seen_ticks: u32,
    /// [`datagram_state`].
    pub state: u32,
    /// Fragments that have been held, while it is waiting. CPUs that add to it at once may lose a few: then two fragments
    /// have one number, or some a higher one than this.
    pub held: u32,
}

/// Value of `DATAGRAMS_V4`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Datagram4 {
    pub head: DatagramHead,
    pub flow: Flow4,
}

/// Value of `DATAGRAMS_V6`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Datagram6 {
    pub head: DatagramHead,
    pub flow: Flow6,
}

/// Places in `HELD` that a fragment may take.
pub const WAYS: u32 = 8;
/// Fragments of one datagram that are held: 64 KiB come in 45 at an MTU of 1500, in 54 at one of 1280.
pub const HELD_OF_DATAGRAM: u32 = 64;
/// Bytes of the largest frame that is held.
pub const HELD_BYTES: usize = 2048 - size_of::<HeldHead>();
/// Bytes of the largest first fragment for which held ones are sent on.
pub const FIRST_BYTES: usize = 9216;

/// What a held fragment is known by.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct HeldHead {
    /// A hash of its datagram's key.
    pub ticket: u32,
    /// Its number among those of its datagram, as they came.
    pub index: u32,
    /// When it came, as [`DatagramHead::seen_ticks`].
    pub seen_ticks: u32,
    /// Bytes of the frame.
    pub length: u32,
}

/// Value of `HELD`, a hash by place: who deletes an element owns what was in it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    pub head: HeldHead,
    pub bytes: [u8; HELD_BYTES],
}

/// Value of `FRAGMENT_SOURCES`, by source address of either family.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct FragmentSource {
    /// When counting began; after the time that fragments are held for, it begins anew.
    pub since_ticks: u32,
    /// Fragments held, less those released since.
    pub held: i32,
}

const _: () = assert!(size_of::<DatagramKey4>() == 16);
const _: () = assert!(size_of::<DatagramKey6>() == 40);
const _: () = assert!(size_of::<Datagram4>() == 68);
const _: () = assert!(size_of::<Datagram6>() == 92);
const _: () = assert!(size_of::<Held>() == 2048);
const _: () = assert!(size_of::<FragmentSource>() == 8);

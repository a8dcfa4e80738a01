//! `BACKENDS`, an array by backend id.
//!
//! Ids never move and are reused oldest first, under a new generation; a flow that remembers (id, generation) is
//! never sent to whoever got the id after its own backend. An endpoint that several Services share has an id for each:
//! when one of them loses it, the others' flows stay.

use bytemuck::{Pod, Zeroable};

use crate::addr::{AnyAddr, Mac};

/// Values of [`BackendHead::state`].
pub mod backend_state {
    /// Nobody. No flow may use it.
    pub const GONE: u8 = 0;
    /// Chosen for new flows by its Service.
    pub const ACTIVE: u8 = 1;
    /// Not chosen any more and not serving: TCP flows stay, also after it has left its slices; UDP flows move.
    pub const DRAINING: u8 = 2;
    /// Not chosen any more but still serving: all flows stay.
    pub const SERVING: u8 = 3;
}

/// The changing part of a [`Backend`], one 64-bit word: always stored and loaded at once, relaxed.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct BackendHead {
    pub generation: u32,
    pub port_be: u16,
    /// [`backend_state`].
    pub state: u8,
    /// [`backend_flags`].
    pub flags: u8,
}

/// Bits of [`BackendHead::flags`].
pub mod backend_flags {
    /// The address belongs to this node's own network namespace (a host-network pod of this node).
    pub const HOST: u8 = 1;
    /// A pod of this node; [`super::Backend::ifindex`] is its host-side interface once that is known.
    pub const LOCAL: u8 = 2;
    /// The interface takes part in the fast path: both its programs are attached.
    pub const FAST_PATH: u8 = 4;
    /// The address is IPv6. For the agent, which finds its backends again after a restart.
    pub const IPV6: u8 = 8;
    /// The port is UDP's, else TCP's. For the agent, likewise.
    pub const UDP: u8 = 16;
}

/// Value of `BACKENDS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Backend {
    pub head: BackendHead,
    pub addr_be: AnyAddr,
    /// The host-side interface of a pod of this node, else 0.
    pub ifindex: u32,
    /// The pod's own link-layer address.
    pub pod_mac: Mac,
    /// The link-layer address from which the pod expects its packets: that of its host-side interface or bridge.
    pub host_mac: Mac,
    /// Whose endpoint it is. For the agent, as [`crate::service::Frontend::owner`].
    pub owner: u32,
    pub unused: u32,
}

const _: () = assert!(size_of::<BackendHead>() == 8);
const _: () = assert!(size_of::<Backend>() == 48);

//! What becomes of a packet.

use crate::reason::Reason;

/// The decision. Everything in the packet has been written when it is returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// To whoever comes next at this hook, and on.
    Pass,
    Drop(Reason),
    /// Into the pod behind this host-side interface.
    Pod {
        ifindex: u32,
    },
    /// Into the host's stack, as if arrived at this device.
    Host {
        ifindex: u32,
    },
    /// Out of this device, link-layer header written.
    Transmit {
        ifindex: u32,
    },
    /// Out of this device; the kernel resolves the neighbour.
    Resolve {
        ifindex: u32,
    },
    /// An answer made of the packet, back to where it came from.
    Answer,
}

/// The places where packets are seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    Xdp,
    FromNetdev,
    ToNetdev,
    ToLo,
    FromPod,
    ToPod,
}

//! `POD_RANGES`, `BOUND_V4` and `BOUND_V6`: this node's pod addresses, and which of them a pod's interface is known for.
//!
//! Between a pod's first address and the moment when its interface is known and has its programs, nothing at that
//! interface asks policies. So other hooks refuse what is for an address of this node's range that no interface is bound to
//! yet: uplinks and tunnels, and the pods that are known. What the node sends itself passes none of them.

use bytemuck::{Pod, Zeroable};

use crate::{
    addr::{AnyAddr, Family},
    packet::Packet,
    pipeline::Context,
    policy::REVISION_NONE,
    reason::Reason,
    tables::{Env, Tables},
    verdict::{Hook, Verdict},
};

/// Element of `POD_RANGES`, an array of two, IPv4's first: the addresses that this node gives to its pods (`podCIDRs`). An
/// element of zeros holds none but the unspecified address.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct PodRange {
    pub network_be: AnyAddr,
    /// The bits in which addresses of the range differ.
    pub free_be: AnyAddr,
}

const _: () = assert!(size_of::<PodRange>() == 32);

/// Index into `POD_RANGES`.
#[inline(always)]
pub const fn range_index(version: u8) -> u32 {
    (version == 6) as u32
}

impl PodRange {
    #[inline(always)]
    fn holds<F: Family>(&self, addr: &F::Addr) -> bool {
        let words = F::words(addr).iter().zip(self.network_be).zip(self.free_be);
        words.fold(0, |differing, ((word, network), free)| {
            differing | ((word ^ network) & !free)
        }) == 0
    }
}

/// Whether an address is one of this node's pods, and no interface is known for it.
#[inline(always)]
pub(crate) fn is_unbound<F: Family, W: Tables<F> + Env>(world: &W, addr: &F::Addr) -> bool {
    let range = world.pod_range(range_index(F::VERSION));
    range.is_some_and(|range| range.holds::<F>(addr))
        && world.bound(addr).is_none()
        && world.own_address(*addr) == 0
}

/// Whether a packet that nobody has translated may go on from an uplink or tunnel: every one is asked, whatever it says of
/// its flow, because nothing is remembered there.
#[inline(always)]
pub fn guard<F: Family, P: Packet, W: Tables<F> + Env>(packet: &P, world: &W, at: &Context) -> Verdict {
    // The destination ends the fixed part of either header.
    match packet.load::<F::Addr>(at.l3 + F::HEADER_LEN - size_of::<F::Addr>()) {
        Some(dst) if is_unbound::<F, W>(world, &dst) => Verdict::drop(Reason::PolicyUnknownPod),
        _ => Verdict::PASS,
    }
}

/// Whether [`guard`] has to be asked at this hook.
#[inline(always)]
pub(crate) fn is_guarded<W: Env>(world: &W, at: &Context) -> bool {
    at.hook as u8 == Hook::FromNetdev as u8 && world.policy_revision() != REVISION_NONE
}

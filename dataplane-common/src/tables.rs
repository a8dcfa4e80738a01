//! What the datapath asks of its surroundings: lookups, inserts, the clock and the routing table.

use crate::{
    addr::Family,
    backend::{Backend, BackendHead},
    config::Config,
    device::Device,
    flow::FlowEvent,
    policy::{Judgement, PodPolicy, PolicyFlow, VerdictEvent},
    service::{Affinity, PortSet, ServiceHead},
    sock::SockBackend,
    traffic::Sample,
    unbound::PodRange,
};

/// An entry of a flow table, in place.
pub trait Entry<F: Family> {
    fn flow(&self) -> &F::Flow;
    /// Stores when the entry was last used, and its `flow_state`.
    fn touch(&self, seen_ticks: u32, state: u8);
    /// Stores [`FlowMeta::judged`](crate::flow::FlowMeta::judged).
    fn set_judged(&self, revision: u32);
}

/// An entry of `POLICY_FLOWS_*`, in place.
pub trait PolicyEntry {
    fn flow(&self) -> &PolicyFlow;
    /// Stores when the entry was last used.
    fn touch(&self, seen_ticks: u32);
}

/// Why an insert did nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InsertError {
    Exists,
    Failed,
}

/// The tables of one address family. Reads of a head are single 64-bit loads.
pub trait Tables<F: Family> {
    type Entry<'a>: Entry<F>
    where
        Self: 'a;
    type PolicyEntry<'a>: PolicyEntry
    where
        Self: 'a;

    fn flow(&self, key: &F::FlowKey) -> Option<Self::Entry<'_>>;
    fn half_open(&self, key: &F::FlowKey) -> Option<Self::Entry<'_>>;
    /// Inserts or replaces.
    fn put_flow(&self, key: &F::FlowKey, flow: &F::Flow) -> Result<(), InsertError>;
    /// Inserts, or replaces when `replace`.
    fn put_half_open(&self, key: &F::FlowKey, flow: &F::Flow, replace: bool) -> Result<(), InsertError>;
    /// Removes the entry, if it is still there.
    fn remove_flow(&self, key: &F::FlowKey);
    /// Removes the entry, if it is still there.
    fn remove_half_open(&self, key: &F::FlowKey);

    fn policy_flow(&self, key: &F::PolicyFlowKey) -> Option<Self::PolicyEntry<'_>>;
    /// Inserts or replaces. A full table evicts; where even that fails, the flow is judged anew.
    fn put_policy_flow(&self, key: &F::PolicyFlowKey, flow: &PolicyFlow);

    /// The service index of a frontend.
    fn frontend(&self, key: &F::FrontendKey) -> Option<u32>;
    /// [`own_flags`](crate::device::own_flags); 0: not an address of this node.
    fn own_address(&self, addr: F::Addr) -> u32;
    /// The interface of an address in `BOUND_*`.
    fn bound(&self, addr: &F::Addr) -> Option<u32>;
    /// Whether `SOURCES_*` has this address for an interface.
    fn has_source(&self, ifindex: u32, addr: &F::Addr) -> bool;

    /// The backend with this address and port that the socket which sends the packet was given when it was connected.
    fn given(&self, addr: &F::Addr, port_be: u16) -> Option<SockBackend>;
    /// Whether a client is in one of the source ranges of a service.
    fn in_source_range(&self, service: u32, client: &F::Addr) -> bool;
    fn affinity(&self, key: &F::AffinityKey) -> Option<Affinity>;
    /// Stores when an entry was last used, if it is still there.
    fn touch_affinity(&self, key: &F::AffinityKey, seen_eighths: u32);
    /// Inserts or replaces. A full table evicts; where even that fails, the client is chosen for anew.
    fn put_affinity(&self, key: &F::AffinityKey, affinity: &Affinity);
}

/// The tables that both families share, and the rest of the world.
pub trait Env {
    /// One of the constants.
    fn config<T: Copy>(&self, field: impl FnOnce(&Config) -> &T) -> T;
    /// Since boot, in ticks of 2^30 ns: [`Jiffies`](crate::config::Jiffies).
    fn now_ticks(&self) -> u32;
    /// The same clock in eighths of a tick.
    fn now_eighths(&self) -> u32;

    fn service_head(&self, index: u32) -> Option<ServiceHead>;
    /// [`Service::affinity`](crate::service::Service::affinity).
    fn service_affinity(&self, index: u32) -> u32;
    fn backend_head(&self, id: u32) -> Option<BackendHead>;
    fn backend(&self, id: u32) -> Option<Backend>;
    fn maglev(&self, index: u32) -> Option<u64>;
    fn ports(&self, index: u32) -> PortSet;
    fn device(&self, ifindex: u32) -> Option<Device>;

    /// `POLICY_REVISION`.
    fn policy_revision(&self) -> u32;
    /// `POD_RANGES`, by [`range_index`](crate::unbound::range_index).
    fn pod_range(&self, index: u32) -> Option<PodRange>;
    /// Whether an interface is in `SOURCE_CHECKED`.
    fn is_source_checked(&self, ifindex: u32) -> bool;
    /// `POD_POLICY`, by the pod's host-side interface.
    fn pod_policy(&self, ifindex: u32) -> Option<PodPolicy>;
    /// [`policy::judge`](crate::policy::judge) by these tables.
    fn judge(&self, set: u32, class: u32, proto: u8, port_be: u16) -> Judgement;
    /// Counts a verdict of a set: at the rule that decided, or at the set. `is_dry_run`: it is not in force.
    fn count_verdict(&self, set: u32, judgement: Judgement, is_dry_run: bool);
    /// Whether a verdict about the pod behind an interface may be told now; then, how many were not since the last one.
    /// Those that allow get half of what there is, so that they never leave out others.
    fn may_tell(&self, ifindex: u32, allows: bool) -> Option<u32>;
    /// Puts a record into `VERDICTS`; fills in the time.
    fn tell(&self, event: &mut VerdictEvent);

    /// Counts a [`Reason`](crate::reason::Reason), given by its number.
    fn count(&self, reason: u32);
    fn count_flow(&self, event: FlowEvent);
    /// Counts a packet that is dropped at a pod's interface.
    fn count_pod_drop(&self, ifindex: u32);
    /// Counts a connection that begins, at its service and its backend, if it has any.
    fn count_connection(&self, service: u32, backend: u32);
    /// Counts one that its backend refuses.
    fn count_refused(&self, service: u32, backend: u32);
    /// Counts a packet for a service, and a backend if one is chosen, that is dropped or refused before it begins anything.
    fn count_dropped(&self, service: u32, backend: u32);
    /// Whether the packet at hand is the one in [`SAMPLED`](crate::traffic::SAMPLED) that is counted.
    fn is_sampled(&self) -> bool;
    /// Counts a packet that is sampled, for all that are not.
    fn count_sample(&self, service: u32, backend: u32, sample: Sample);
    /// Takes one of this tick's refusals, if any is left.
    fn take_refusal(&self) -> bool;
    /// When a TCP flow was last begun in mid-stream, in ticks; 0 for never.
    fn midstream_ticks(&self) -> u32;
    fn set_midstream_ticks(&self, ticks: u32);

    /// The same number, about which the kernel's verifier has forgotten everything. Before 6.2 it tells apart all values
    /// that it can know of a number, and follows every way through a loop that makes one bit by bit.
    fn forget(&self, number: u32) -> u32;
}

/// Where a packet would go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// By this device, with these link-layer addresses (zero on devices without).
    Found {
        ifindex: u32,
        mac_dst: crate::addr::Mac,
        mac_src: crate::addr::Mac,
    },
    /// By this device, but the neighbour is still to be resolved.
    NoNeighbour {
        ifindex: u32,
    },
    /// The packet is larger than the route's MTU.
    TooBig {
        mtu: u16,
    },
    None,
}

/// The routing table, asked for a packet that entered at `ifindex`. `len` is its layer 3 length, 0 if unknown.
pub trait Router<F: Family> {
    fn route(&self, ifindex: u32, src: &F::Addr, dst: &F::Addr, proto: u8, len: u16) -> Route;
}

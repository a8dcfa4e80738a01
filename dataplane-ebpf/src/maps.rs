//! The maps, as BTF maps: `bpftool map dump` prints their fields by name. The numbers of entries here are defaults;
//! the agent sets them from its configuration before it loads the object.

use aya_ebpf::{
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf},
    macros::btf_map,
};
use dataplane_common::{
    addr::{AnyAddr, V4, V6},
    backend::Backend,
    datagram::{Datagram4, Datagram6, DatagramKey4, DatagramKey6, FIRST_BYTES, FragmentSource, Held},
    device::Device,
    flow::{self, Flow4, Flow6, FlowKey4, FlowKey6},
    pipeline::Work,
    policy::{
        Hits, PeerRulesKey, PodPolicy, PolicyFlow, PolicyFlowKey4, PolicyFlowKey6, PolicyRule, PolicySet,
        PortRulesKey, RuleBits, VerdictBudget,
    },
    reason::REASONS,
    service::{
        Affinity, AffinityKey4, AffinityKey6, Frontend, FrontendKey4, FrontendKey6, PORT_SETS, PortSet,
        Service, SourceRange4, SourceRange6,
    },
    sock::{SockAddr4, SockAddr6, SockBackend, SockKey4, SockKey6, SockService},
    source::{SOURCE_PLACES, Source4, Source6},
    traffic::Traffic,
    unbound::PodRange,
};

/// `BPF_F_NO_PREALLOC`: memory for entries that are there alone; only the agent makes them.
const NO_PREALLOC: usize = 1;
/// `BPF_F_MMAPABLE`: the agent writes through a mapping, so that a head changes by one 64-bit store.
pub const MMAPABLE: usize = 1 << 10;

#[btf_map]
pub static FRONTENDS_V4: HashMap<FrontendKey4, Frontend, 65536> = HashMap::new();
#[btf_map]
pub static FRONTENDS_V6: HashMap<FrontendKey6, Frontend, 65536> = HashMap::new();
#[btf_map]
pub static SERVICES: Array<Service, 65536, MMAPABLE> = Array::new();
#[btf_map]
pub static BACKENDS: Array<Backend, 65536, MMAPABLE> = Array::new();
#[btf_map]
pub static MAGLEV: Array<u64, 4194304, MMAPABLE> = Array::new();
#[btf_map]
pub static PORTS: Array<PortSet, { PORT_SETS as usize }> = Array::new();

/// The values say nothing.
#[btf_map]
pub static RANGES_V4: LpmTrie<SourceRange4, u32, 65536> = LpmTrie::new();
#[btf_map]
pub static RANGES_V6: LpmTrie<SourceRange6, u32, 65536> = LpmTrie::new();

#[btf_map]
pub static AFFINITY_V4: LruHashMap<AffinityKey4, Affinity, 65536> = LruHashMap::new();
#[btf_map]
pub static AFFINITY_V6: LruHashMap<AffinityKey6, Affinity, 65536> = LruHashMap::new();

#[btf_map]
pub static FLOWS_V4: LruHashMap<FlowKey4, Flow4, 131072> = LruHashMap::new();
#[btf_map]
pub static FLOWS_V6: LruHashMap<FlowKey6, Flow6, 131072> = LruHashMap::new();
#[btf_map]
pub static HALF_OPEN_V4: LruHashMap<FlowKey4, Flow4, 32768> = LruHashMap::new();
#[btf_map]
pub static HALF_OPEN_V6: LruHashMap<FlowKey6, Flow6, 32768> = LruHashMap::new();

#[btf_map]
pub static DATAGRAMS_V4: LruHashMap<DatagramKey4, Datagram4, 16384> = LruHashMap::new();
#[btf_map]
pub static DATAGRAMS_V6: LruHashMap<DatagramKey6, Datagram6, 16384> = LruHashMap::new();
#[btf_map]
pub static HELD: HashMap<u32, Held, 2048> = HashMap::new();
#[btf_map]
pub static FRAGMENT_SOURCES: LruHashMap<AnyAddr, FragmentSource, 4096> = LruHashMap::new();

#[btf_map]
pub static OWN_ADDRS_V4: HashMap<u32, u32, 1024> = HashMap::new();
#[btf_map]
pub static OWN_ADDRS_V6: HashMap<[u32; 4], u32, 1024> = HashMap::new();
#[btf_map]
pub static DEVICES: HashMap<u32, Device, 1024> = HashMap::new();

/// See `dataplane_common::policy::REVISION_NONE`. The object's only variable ([`dataplane_common::policy::VARIABLES`]): every
/// packet of a pod asks for it, and a variable's address is in the instruction.
#[unsafe(no_mangle)]
pub static mut POLICY_REVISION: u32 = 0;
/// This node's pod addresses, IPv4's first.
#[btf_map]
pub static POD_RANGES: Array<PodRange, 2> = Array::new();
/// Addresses of this node's pods, and the interfaces that lead there.
#[btf_map]
pub static BOUND_V4: HashMap<u32, u32, 4096, NO_PREALLOC> = HashMap::new();
#[btf_map]
pub static BOUND_V6: HashMap<[u32; 4], u32, 4096, NO_PREALLOC> = HashMap::new();
/// Of most interfaces of pods, the address that the pod sends from, at `dataplane_common::source::source_place`.
#[btf_map]
pub static SOURCES_V4: Array<Source4, { SOURCE_PLACES as usize }> = Array::new();
#[btf_map]
pub static SOURCES_V6: Array<Source6, { SOURCE_PLACES as usize }> = Array::new();
/// Interfaces whose pods send from their own addresses alone. The values say nothing.
#[btf_map]
pub static SOURCE_CHECKED: HashMap<u32, u32, 1024> = HashMap::new();
#[btf_map]
pub static POD_POLICY: HashMap<u32, PodPolicy, 1024> = HashMap::new();
#[btf_map]
pub static PEERS_V4: HashMap<u32, u32, 131072, NO_PREALLOC> = HashMap::new();
#[btf_map]
pub static PEERS_V6: HashMap<[u32; 4], u32, 131072, NO_PREALLOC> = HashMap::new();
#[btf_map]
pub static CIDRS_V4: LpmTrie<u32, u32, 16384> = LpmTrie::new();
#[btf_map]
pub static CIDRS_V6: LpmTrie<[u32; 4], u32, 16384> = LpmTrie::new();
#[btf_map]
pub static POLICY_SETS: Array<PolicySet, 4096> = Array::new();
#[btf_map]
pub static PEER_RULES: HashMap<PeerRulesKey, u32, 262144, NO_PREALLOC> = HashMap::new();
#[btf_map]
pub static PORT_RULES: LpmTrie<PortRulesKey, u32, 65536> = LpmTrie::new();
#[btf_map]
pub static RULE_BITS: Array<RuleBits, 16384> = Array::new();
#[btf_map]
pub static RULES: Array<PolicyRule, 32768> = Array::new();
/// `dataplane_common::policy::VerdictEvent`s.
#[btf_map]
pub static VERDICTS: RingBuf<(), 65536> = RingBuf::new();
#[btf_map]
pub static VERDICTS_TOLD: LruHashMap<u32, VerdictBudget, 1024> = LruHashMap::new();
#[btf_map]
pub static RULE_HITS: PerCpuArray<Hits, 32768> = PerCpuArray::new();
#[btf_map]
pub static SET_HITS: PerCpuArray<Hits, 4096> = PerCpuArray::new();
#[btf_map]
pub static POLICY_FLOWS_V4: LruHashMap<PolicyFlowKey4, PolicyFlow, 131072> = LruHashMap::new();
#[btf_map]
pub static POLICY_FLOWS_V6: LruHashMap<PolicyFlowKey6, PolicyFlow, 131072> = LruHashMap::new();

#[btf_map]
pub static SOCK_CHOSEN: LruHashMap<SockService, SockBackend, 32768> = LruHashMap::new();
#[btf_map]
pub static SOCK_REVERSE_V4: LruHashMap<SockKey4, SockAddr4, 32768> = LruHashMap::new();
#[btf_map]
pub static SOCK_REVERSE_V6: LruHashMap<SockKey6, SockAddr6, 32768> = LruHashMap::new();

/// By `dataplane_common::reason::Reason`.
#[btf_map]
pub static COUNTERS: PerCpuArray<u64, { REASONS as usize }> = PerCpuArray::new();

/// By `dataplane_common::flow::FlowEvent`.
#[btf_map]
pub static FLOW_EVENTS: PerCpuArray<u64, { flow::FLOW_EVENTS as usize }> = PerCpuArray::new();

/// What goes over each service and each backend, by their indices.
#[btf_map]
pub static SERVICE_TRAFFIC: Array<Traffic, 65536, MMAPABLE> = Array::new();
#[btf_map]
pub static BACKEND_TRAFFIC: Array<Traffic, 65536, MMAPABLE> = Array::new();

/// `dataplane_common::monitor::Event`s, for whoever watches.
#[btf_map]
pub static EVENTS: RingBuf<(), 524288> = RingBuf::new();
/// `dataplane_common::monitor::monitor_state`.
#[btf_map]
pub static MONITOR: Array<u32, 1> = Array::new();

/// When a TCP flow was last begun in mid-stream, in ticks; or [`flow::MIDSTREAM_LEFT`] or [`flow::MIDSTREAM_LEFT_TCP`].
#[btf_map]
pub static MIDSTREAM: Array<u32, 1> = Array::new();

/// `struct bpf_fib_lookup`, which has unions that field names would not help.
#[repr(C, align(8))]
pub struct RouteQuery(pub [u64; 8]);

/// Scratch space: what is being made of the packet at hand.
#[btf_map]
pub static WORK_V4: PerCpuArray<Work<V4>, 1> = PerCpuArray::new();
#[btf_map]
pub static WORK_V6: PerCpuArray<Work<V6>, 1> = PerCpuArray::new();

/// A frame that gives its place to others for a while.
#[repr(C)]
pub struct Aside {
    pub length: u32,
    pub bytes: [u8; FIRST_BYTES],
}

/// How many refusals a CPU has sent in a tick.
#[repr(C)]
pub struct Refusals {
    pub ticks: u32,
    pub sent: u32,
}

/// What a CPU needs now and then. In one map: a program may have 64 of them at the most.
#[repr(C)]
pub struct Scratch {
    /// What the routing table is asked, and answers.
    pub route: RouteQuery,
    /// A fragment on its way into `HELD`.
    pub held: Held,
    /// A first fragment while held ones are sent on.
    pub aside: Aside,
    pub refusals: Refusals,
    /// Translated packets until one is counted.
    pub until_sample: u32,
}
#[btf_map]
pub static WORK_SCRATCH: PerCpuArray<Scratch, 1> = PerCpuArray::new();

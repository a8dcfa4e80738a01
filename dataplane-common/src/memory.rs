//! The world in memory: tables in hash maps and vectors, a clock and routes that stand still, and a packet in a byte
//! vector. Tests run the datapath in it, alone and in step with the kernel build.

extern crate std;

mod policies;

use core::cell::{Cell, RefCell};
use std::{collections::HashMap, vec::Vec};

use bytemuck::{Pod, Zeroable};

use crate::{
    addr::{AnyAddr, Family, Mac, Tuple, V4, V6, ethertype},
    backend::{Backend, BackendHead},
    checksum,
    config::{Config, config_flags},
    datagram::{DatagramHead, FIRST_BYTES, FragmentSource, HELD_BYTES, HeldHead},
    device::Device,
    enforce,
    flow::{FLOW_EVENTS, FlowEvent},
    fragment::{self, Fragments, Store, Waiting},
    icmp,
    packet::{Checksum, Packet},
    parse::Headers,
    pipeline::{Context, Stages, Work, process},
    policy::{self, Judged, Judgement, PodPolicy, PolicyFlow, VerdictEvent},
    reason::{REASONS, Reason},
    rewrite::RewriteIp,
    service::{Affinity, PORT_SETS, PortSet, Service, ServiceHead, port_set_index},
    sock::SockBackend,
    source,
    tables::{Entry, Env, InsertError, Route, Router, Tables},
    traffic::{Sample, Traffic},
    unbound::{self, PodRange},
    verdict::{Action, Hook, Verdict},
};

pub use policies::{MemoryCidr, MemoryPolicyEntry, Policies};

/// The tables of one family.
#[derive(Clone, Debug)]
pub struct FamilyTables<F: Family> {
    pub frontends: HashMap<F::FrontendKey, u32>,
    pub own_addresses: HashMap<F::Addr, u32>,
    /// Addresses of pods whose interface is known.
    pub bound: HashMap<F::Addr, u32>,
    /// The address that an interface has in `SOURCES_*`.
    pub sources: HashMap<u32, F::Addr>,
    pub flows: RefCell<HashMap<F::FlowKey, F::Flow>>,
    pub half_open: RefCell<HashMap<F::FlowKey, F::Flow>>,
    pub affinity: RefCell<HashMap<F::AffinityKey, Affinity>>,
    pub datagrams: RefCell<HashMap<F::DatagramKey, F::Datagram>>,
    pub ranges: Vec<MemoryRange>,
    /// What socket hooks have given the socket that sends, by address and port.
    pub given: HashMap<(F::Addr, u16), SockBackend>,
    /// Peer classes of addresses.
    pub peers: HashMap<F::Addr, u32>,
    pub policy_flows: RefCell<HashMap<F::PolicyFlowKey, PolicyFlow>>,
}

impl<F: Family> Default for FamilyTables<F> {
    fn default() -> Self {
        Self {
            frontends: HashMap::new(),
            own_addresses: HashMap::new(),
            bound: HashMap::new(),
            sources: HashMap::new(),
            flows: RefCell::default(),
            half_open: RefCell::default(),
            affinity: RefCell::default(),
            datagrams: RefCell::default(),
            ranges: Vec::new(),
            given: HashMap::new(),
            peers: HashMap::new(),
            policy_flows: RefCell::default(),
        }
    }
}

/// A source range of a service.
#[derive(Clone, Copy, Debug)]
pub struct MemoryRange {
    /// Index into `services`.
    pub service: u32,
    pub network: AnyAddr,
    /// Leading bits of the address that have to match.
    pub length: u8,
}

/// A route to a network. The first that matches is taken.
#[derive(Clone, Copy, Debug)]
pub struct MemoryRoute {
    /// 4 or 6.
    pub version: u8,
    pub network: AnyAddr,
    /// Leading bits of the address that have to match.
    pub length: u8,
    /// 0: there is no way there by forwarding (local, blackhole).
    pub ifindex: u32,
    pub mtu: u16,
    /// Destination and source; `None` while the neighbour is not resolved.
    pub macs: Option<(Mac, Mac)>,
}

impl MemoryRoute {
    fn matches(&self, version: u8, addr: AnyAddr) -> bool {
        self.version == version && is_within(self.network, self.length, addr)
    }
}

/// Whether the leading bits of two addresses are the same.
fn is_within(network: AnyAddr, length: u8, addr: AnyAddr) -> bool {
    let mut left = u32::from(length);
    network.iter().zip(addr).all(|(network, word)| {
        let bits = left.min(32);
        left -= bits;
        let mask = u32::MAX.checked_shl(32 - bits).unwrap_or(0);
        (u32::from_be(*network) ^ u32::from_be(word)) & mask == 0
    })
}

/// All tables, and what else the datapath asks for.
#[derive(Clone, Debug)]
pub struct Memory {
    pub config: Config,
    pub now_ticks: u32,
    pub services: Vec<Service>,
    pub backends: Vec<Backend>,
    pub maglev: Vec<u64>,
    pub ports: Vec<PortSet>,
    pub devices: HashMap<u32, Device>,
    pub routes: Vec<MemoryRoute>,
    pub v4: FamilyTables<V4>,
    pub v6: FamilyTables<V6>,
    /// By [`Reason`].
    pub counters: RefCell<Vec<u64>>,
    /// By [`FlowEvent`].
    pub flow_events: RefCell<Vec<u64>>,
    pub refusals_left: Cell<u32>,
    pub midstream_ticks: Cell<u32>,
    pub fragments: HeldFragments,
    pub policies: Policies,
    pub traffic: MemoryTraffic,
}

/// What went over services and backends: every packet is one that is sampled.
#[derive(Clone, Debug, Default)]
pub struct MemoryTraffic {
    pub services: RefCell<HashMap<u32, Traffic>>,
    pub backends: RefCell<HashMap<u32, Traffic>>,
    pub pod_drops: RefCell<HashMap<u32, u64>>,
}

impl MemoryTraffic {
    fn add(&self, service: u32, backend: u32, change: impl Fn(&mut Traffic)) {
        for (all, index) in [(&self.services, service), (&self.backends, backend)] {
            // No table is so large.
            if index != u32::MAX {
                change(all.borrow_mut().entry(index).or_default());
            }
        }
    }
}

/// The store of held fragments, and what comes out of it.
#[derive(Clone, Debug, Default)]
pub struct HeldFragments {
    pub held: RefCell<HashMap<u32, (HeldHead, Vec<u8>)>>,
    pub sources: RefCell<HashMap<AnyAddr, FragmentSource>>,
    /// Frames that entered their hook once more, in order.
    pub sent_again: RefCell<Vec<Vec<u8>>>,
    copied: RefCell<(HeldHead, Vec<u8>)>,
    aside: RefCell<Vec<u8>>,
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            config: Config::default(),
            now_ticks: 1000,
            services: Vec::new(),
            backends: Vec::new(),
            maglev: Vec::new(),
            ports: std::vec![PortSet::default(); PORT_SETS as usize],
            devices: HashMap::new(),
            routes: Vec::new(),
            v4: FamilyTables::default(),
            v6: FamilyTables::default(),
            counters: RefCell::new(std::vec![0; REASONS as usize]),
            flow_events: RefCell::new(std::vec![0; FLOW_EVENTS as usize]),
            refusals_left: Cell::new(u32::MAX),
            midstream_ticks: Cell::new(0),
            fragments: HeldFragments::default(),
            policies: Policies::default(),
            traffic: MemoryTraffic::default(),
        }
    }
}

impl Memory {
    /// Runs one packet through a hook, as the kernel side's entry points do.
    pub fn run(&self, frame: &mut Frame, at: &Context) -> Verdict {
        frame.at_xdp = at.hook == Hook::Xdp;
        let Some(kind) = frame.load::<u16>(12) else {
            return Verdict::PASS;
        };
        match u16::from_be(kind) {
            ethertype::IPV4 => self.run_as::<V4>(frame, at),
            ethertype::IPV6 => self.run_as::<V6>(frame, at),
            _ => Verdict::PASS,
        }
    }

    fn run_as<F: MemoryFamily>(&self, frame: &mut Frame, at: &Context) -> Verdict {
        match process::<F, _, _, _>(frame, self, at, &mut Scratch(work::<F>())) {
            // However it came to that.
            verdict if verdict.action() == Action::Pass => Verdict::PASS,
            verdict => verdict,
        }
    }

    /// How often a reason was counted.
    pub fn counted(&self, reason: Reason) -> u64 {
        self.counters.borrow()[reason as usize]
    }

    /// Enters a port of a frontend into `ports`.
    pub fn add_port(&mut self, proto: u8, port: u16, wildcard: bool) {
        let set = &mut self.ports[port_set_index(proto, port) as usize];
        set.any |= 1 << (port & 63);
        if wildcard {
            set.wildcard |= 1 << (port & 63);
        }
    }

    /// Appends a slice of the smallest size class that spreads over `backends`, ascending and at least one; its
    /// `slots_offset`.
    pub fn add_slice(&mut self, backends: &[u32]) -> u32 {
        let ids: Vec<u64> = backends
            .chunks(2)
            .map(|pair| u64::from(pair[0]) | u64::from(*pair.get(1).unwrap_or(&0)) << 32)
            .collect();
        self.maglev.extend(ids.iter().rev());
        self.maglev.push(backends.len() as u64);
        let offset = self.maglev.len() as u32;
        let slots: Vec<u64> = (0..u64::from(crate::service::TABLE_SIZES[1]))
            .map(|slot| slot % backends.len() as u64)
            .collect();
        self.maglev.extend(slots.chunks(4).map(|lanes| {
            lanes
                .iter()
                .enumerate()
                .fold(0, |word, (lane, number)| word | number << (lane * 16))
        }));
        offset
    }
}

/// The space of one run.
struct Scratch<F: Family>(Work<F>);

impl<F: MemoryFamily> Stages<F, Frame, Memory> for Scratch<F> {
    fn work(&mut self) -> Option<&mut Work<F>> {
        Some(&mut self.0)
    }

    fn enforce(&mut self, packet: &mut Frame, world: &Memory, at: &Context, verdict: Verdict) -> Verdict {
        enforce::untranslated::<F, _, _>(packet, world, at, &mut self.0, verdict)
    }

    fn source(&mut self, packet: &mut Frame, world: &Memory, at: &Context) -> Verdict {
        source::judge::<F, _, _>(packet, world, at, &mut self.0)
    }

    fn guard(&mut self, packet: &mut Frame, world: &Memory, at: &Context) -> Verdict {
        unbound::guard::<F, _, _>(packet, world, at)
    }

    fn judge(&mut self, _packet: &mut Frame, world: &Memory, at: &Context) -> Verdict {
        enforce::again::<F, _>(world, at, &mut self.0)
    }

    fn first(&mut self, packet: &mut Frame, world: &Memory, at: &Context) -> Verdict {
        fragment::first::<F, _, _>(packet, world, at, &mut self.0)
    }

    fn later(&mut self, packet: &mut Frame, world: &Memory, at: &Context) -> Verdict {
        fragment::later::<F, _, _>(packet, world, at, &mut self.0)
    }

    fn hold(&mut self, packet: &mut Frame, world: &Memory, _at: &Context) -> Verdict {
        fragment::hold::<F, _, _>(packet, world, &mut self.0)
    }

    fn remember(&mut self, packet: &mut Frame, world: &Memory, at: &Context, verdict: Verdict) -> Waiting {
        fragment::remember::<F, _, _>(packet, world, at, &mut self.0, verdict)
    }

    fn release(&mut self, packet: &mut Frame, world: &Memory, at: &Context, waiting: Waiting) {
        fragment::release::<F, _, _, _>(packet, world, at, self, waiting);
    }

    fn release_one(
        &mut self,
        packet: &mut Frame,
        world: &Memory,
        at: &Context,
        waiting: Waiting,
        index: u32,
    ) {
        fragment::release_one::<F, _, _>(packet, world, at, waiting, index);
    }
}

impl<F: MemoryFamily> Fragments<F, Frame> for Memory {
    fn datagram(&self, key: &F::DatagramKey, into: &mut F::Datagram) -> bool {
        let datagrams = F::tables(self).datagrams.borrow();
        datagrams.get(key).is_some_and(|datagram| {
            *into = *datagram;
            true
        })
    }

    fn datagram_head(&self, key: &F::DatagramKey) -> Option<DatagramHead> {
        F::tables(self)
            .datagrams
            .borrow()
            .get(key)
            .map(|datagram| *F::datagram_head(datagram))
    }

    fn put_datagram(
        &self,
        key: &F::DatagramKey,
        datagram: &F::Datagram,
        replace: bool,
    ) -> Result<(), InsertError> {
        let mut datagrams = F::tables(self).datagrams.borrow_mut();
        if !replace && datagrams.contains_key(key) {
            return Err(InsertError::Exists);
        }
        datagrams.insert(*key, *datagram);
        Ok(())
    }

    fn remove_datagram(&self, key: &F::DatagramKey) {
        F::tables(self).datagrams.borrow_mut().remove(key);
    }

    fn add_held(&self, key: &F::DatagramKey) {
        if let Some(datagram) = F::tables(self).datagrams.borrow_mut().get_mut(key) {
            F::datagram_head_mut(datagram).held += 1;
        }
    }

    fn source(&self, source: &AnyAddr) -> Option<FragmentSource> {
        self.fragments.sources.borrow().get(source).copied()
    }

    fn put_source(&self, source: &AnyAddr, value: FragmentSource) {
        self.fragments.sources.borrow_mut().insert(*source, value);
    }

    fn add_to_source(&self, source: &AnyAddr, more: i32) {
        if let Some(known) = self.fragments.sources.borrow_mut().get_mut(source) {
            known.held += more;
        }
    }

    fn copy(&self, packet: &Frame, head: HeldHead) -> bool {
        self.fragments.copied.replace((head, packet.bytes.clone()));
        packet.bytes.len() <= HELD_BYTES
    }
}

impl Store<Frame> for Memory {
    fn put(&self, place: u32) -> Result<(), InsertError> {
        let mut held = self.fragments.held.borrow_mut();
        if held.contains_key(&place) {
            return Err(InsertError::Exists);
        }
        held.insert(place, self.fragments.copied.borrow().clone());
        Ok(())
    }

    fn head(&self, place: u32) -> Option<HeldHead> {
        self.fragments.held.borrow().get(&place).map(|held| held.0)
    }

    fn remove(&self, place: u32) -> bool {
        self.fragments.held.borrow_mut().remove(&place).is_some()
    }

    fn set_aside(&self, packet: &Frame) -> bool {
        self.fragments.aside.replace(packet.bytes.clone());
        packet.bytes.len() <= FIRST_BYTES
    }

    fn restore(&self, packet: &mut Frame) {
        packet.bytes.clone_from(&self.fragments.aside.borrow());
    }

    fn become_held(&self, packet: &mut Frame, place: u32) -> bool {
        self.fragments.held.borrow().get(&place).is_some_and(|held| {
            packet.bytes.clone_from(&held.1);
            true
        })
    }

    fn send_again(&self, packet: &mut Frame, _at: &Context) {
        self.fragments.sent_again.borrow_mut().push(packet.bytes.clone());
    }
}

/// As the kernel side's scratch space begins.
pub fn work<F: Family>() -> Work<F> {
    Work {
        headers: Headers::default(),
        quoted: Headers::default(),
        key: F::FlowKey::zeroed(),
        service: 0,
        backend: 0,
        service_generation: 0,
        forward: F::Flow::zeroed(),
        reply: F::Flow::zeroed(),
        datagram_key: F::DatagramKey::zeroed(),
        datagram: F::Datagram::zeroed(),
        source: AnyAddr::default(),
        from_pod: Tuple::default(),
        policy_key: F::PolicyFlowKey::zeroed(),
        policy_flow: PolicyFlow::default(),
        judged: Judged::default(),
        judged_first: Judged::default(),
        told: VerdictEvent::default(),
        noted: 0,
        unused: 0,
    }
}

/// A family whose tables [`Memory`] holds.
pub trait MemoryFamily: RewriteIp {
    fn tables(memory: &Memory) -> &FamilyTables<Self>;
}

impl MemoryFamily for V4 {
    fn tables(memory: &Memory) -> &FamilyTables<Self> {
        &memory.v4
    }
}

impl MemoryFamily for V6 {
    fn tables(memory: &Memory) -> &FamilyTables<Self> {
        &memory.v6
    }
}

/// An entry as it was found, and where to write to it.
#[derive(Debug)]
pub struct MemoryEntry<'a, F: Family> {
    table: &'a RefCell<HashMap<F::FlowKey, F::Flow>>,
    key: F::FlowKey,
    flow: F::Flow,
}

impl<F: Family> Entry<F> for MemoryEntry<'_, F> {
    fn flow(&self) -> &F::Flow {
        &self.flow
    }

    fn touch(&self, seen_ticks: u32, state: u8) {
        if let Some(flow) = self.table.borrow_mut().get_mut(&self.key) {
            let meta = F::meta_mut(flow);
            meta.seen_ticks = seen_ticks;
            meta.state = state;
        }
    }

    fn set_judged(&self, revision: u32) {
        if let Some(flow) = self.table.borrow_mut().get_mut(&self.key) {
            F::meta_mut(flow).judged = revision;
        }
    }
}

fn find<'a, F: Family>(
    table: &'a RefCell<HashMap<F::FlowKey, F::Flow>>,
    key: &F::FlowKey,
) -> Option<MemoryEntry<'a, F>> {
    let flow = *table.borrow().get(key)?;
    Some(MemoryEntry {
        table,
        key: *key,
        flow,
    })
}

impl<F: MemoryFamily> Tables<F> for Memory {
    type Entry<'a> = MemoryEntry<'a, F>;
    type PolicyEntry<'a> = MemoryPolicyEntry<'a, F>;

    fn flow(&self, key: &F::FlowKey) -> Option<MemoryEntry<'_, F>> {
        find(&F::tables(self).flows, key)
    }

    fn half_open(&self, key: &F::FlowKey) -> Option<MemoryEntry<'_, F>> {
        find(&F::tables(self).half_open, key)
    }

    fn put_flow(&self, key: &F::FlowKey, flow: &F::Flow) -> Result<(), InsertError> {
        F::tables(self).flows.borrow_mut().insert(*key, *flow);
        Ok(())
    }

    fn put_half_open(&self, key: &F::FlowKey, flow: &F::Flow, replace: bool) -> Result<(), InsertError> {
        let mut table = F::tables(self).half_open.borrow_mut();
        if !replace && table.contains_key(key) {
            return Err(InsertError::Exists);
        }
        table.insert(*key, *flow);
        Ok(())
    }

    fn remove_flow(&self, key: &F::FlowKey) {
        F::tables(self).flows.borrow_mut().remove(key);
    }

    fn remove_half_open(&self, key: &F::FlowKey) {
        F::tables(self).half_open.borrow_mut().remove(key);
    }

    fn policy_flow(&self, key: &F::PolicyFlowKey) -> Option<MemoryPolicyEntry<'_, F>> {
        MemoryPolicyEntry::find(&F::tables(self).policy_flows, key)
    }

    fn put_policy_flow(&self, key: &F::PolicyFlowKey, flow: &PolicyFlow) {
        F::tables(self).policy_flows.borrow_mut().insert(*key, *flow);
    }

    fn frontend(&self, key: &F::FrontendKey) -> Option<u32> {
        F::tables(self).frontends.get(key).copied()
    }

    fn own_address(&self, addr: F::Addr) -> u32 {
        F::tables(self).own_addresses.get(&addr).copied().unwrap_or(0)
    }

    fn bound(&self, addr: &F::Addr) -> Option<u32> {
        F::tables(self).bound.get(addr).copied()
    }

    fn has_source(&self, ifindex: u32, addr: &F::Addr) -> bool {
        F::tables(self).sources.get(&ifindex) == Some(addr)
    }

    fn given(&self, addr: &F::Addr, port_be: u16) -> Option<SockBackend> {
        F::tables(self).given.get(&(*addr, port_be)).copied()
    }

    fn in_source_range(&self, service: u32, client: &F::Addr) -> bool {
        let client = F::to_any(*client);
        let mut ranges = F::tables(self).ranges.iter();
        ranges.any(|range| range.service == service && is_within(range.network, range.length, client))
    }

    fn affinity(&self, key: &F::AffinityKey) -> Option<Affinity> {
        F::tables(self).affinity.borrow().get(key).copied()
    }

    fn touch_affinity(&self, key: &F::AffinityKey, seen_eighths: u32) {
        if let Some(affinity) = F::tables(self).affinity.borrow_mut().get_mut(key) {
            affinity.seen_eighths = seen_eighths;
        }
    }

    fn put_affinity(&self, key: &F::AffinityKey, affinity: &Affinity) {
        F::tables(self).affinity.borrow_mut().insert(*key, *affinity);
    }
}

impl Env for Memory {
    fn config<T: Copy>(&self, field: impl FnOnce(&Config) -> &T) -> T {
        *field(&self.config)
    }

    fn now_ticks(&self) -> u32 {
        self.now_ticks
    }

    fn now_eighths(&self) -> u32 {
        self.now_ticks << 3
    }

    fn service_head(&self, index: u32) -> Option<ServiceHead> {
        self.services.get(index as usize).map(|service| service.head)
    }

    fn service_affinity(&self, index: u32) -> u32 {
        let service = self.services.get(index as usize);
        service.map_or(0, |service| service.affinity)
    }

    fn backend_head(&self, id: u32) -> Option<BackendHead> {
        self.backends.get(id as usize).map(|backend| backend.head)
    }

    fn backend(&self, id: u32) -> Option<Backend> {
        self.backends.get(id as usize).copied()
    }

    fn maglev(&self, index: u32) -> Option<u64> {
        self.maglev.get(index as usize).copied()
    }

    fn ports(&self, index: u32) -> PortSet {
        self.ports.get(index as usize).copied().unwrap_or_default()
    }

    fn device(&self, ifindex: u32) -> Option<Device> {
        self.devices.get(&ifindex).copied()
    }

    fn policy_revision(&self) -> u32 {
        self.policies.revision
    }

    fn pod_range(&self, index: u32) -> Option<PodRange> {
        self.policies.ranges.get(index as usize).copied()
    }

    fn is_source_checked(&self, ifindex: u32) -> bool {
        self.policies.source_checked.contains(&ifindex)
    }

    fn pod_policy(&self, ifindex: u32) -> Option<PodPolicy> {
        self.policies.pods.get(&ifindex).copied()
    }

    fn judge(&self, set: u32, class: u32, proto: u8, port_be: u16) -> Judgement {
        policy::judge(&self.policies, set, class, proto, port_be)
    }

    fn count_verdict(&self, set: u32, judgement: Judgement, is_dry_run: bool) {
        self.policies.count(judgement.counted_at(set), is_dry_run);
    }

    fn may_tell(&self, _ifindex: u32, _allows: bool) -> Option<u32> {
        (self.config.verdicts_per_tick != 0).then_some(0)
    }

    fn tell(&self, event: &mut VerdictEvent) {
        self.policies.told.borrow_mut().push(*event);
    }

    fn count(&self, reason: u32) {
        self.counters.borrow_mut()[reason as usize] += 1;
    }

    fn count_flow(&self, event: FlowEvent) {
        self.flow_events.borrow_mut()[event as usize] += 1;
    }

    fn count_pod_drop(&self, ifindex: u32) {
        *self.traffic.pod_drops.borrow_mut().entry(ifindex).or_default() += 1;
    }

    fn count_connection(&self, service: u32, backend: u32) {
        self.traffic
            .add(service, backend, |traffic| traffic.connections += 1);
    }

    fn count_refused(&self, service: u32, backend: u32) {
        self.traffic.add(service, backend, |traffic| traffic.refused += 1);
    }

    fn count_dropped(&self, service: u32, backend: u32) {
        self.traffic.add(service, backend, |traffic| traffic.dropped += 1);
    }

    fn is_sampled(&self) -> bool {
        true
    }

    fn count_sample(&self, service: u32, backend: u32, sample: Sample) {
        self.traffic
            .add(service, backend, |traffic| traffic.count(sample));
    }

    fn take_refusal(&self) -> bool {
        let left = self.refusals_left.get();
        self.refusals_left.set(left.saturating_sub(1));
        left > 0
    }

    fn midstream_ticks(&self) -> u32 {
        self.midstream_ticks.get()
    }

    fn forget(&self, number: u32) -> u32 {
        number
    }

    fn set_midstream_ticks(&self, ticks: u32) {
        self.midstream_ticks.set(ticks);
    }
}

impl<F: Family> Router<F> for Memory {
    fn route(&self, _ifindex: u32, src: &F::Addr, dst: &F::Addr, _proto: u8, len: u16) -> Route {
        // Of this host.
        if F::is_loopback(dst) {
            return Route::None;
        }
        // As the kernel's answer is for IPv6 alone (`rt6_need_strict`).
        if F::VERSION == 6 && F::is_loopback(src) {
            return Route::None;
        }
        let dst = F::to_any(*dst);
        let route = self.routes.iter().find(|route| route.matches(F::VERSION, dst));
        let Some(&MemoryRoute {
            ifindex, mtu, macs, ..
        }) = route.filter(|route| route.ifindex != 0)
        else {
            return Route::None;
        };
        if len > mtu {
            let knows_mtu = self.config.flags & config_flags::FIB_MTU != 0;
            return Route::TooBig {
                mtu: if knows_mtu { mtu } else { icmp::plateau::<F>(len) },
            };
        }
        match macs {
            None => Route::NoNeighbour { ifindex },
            Some((mac_dst, mac_src)) => Route::Found {
                ifindex,
                mac_dst,
                mac_src,
            },
        }
    }
}

/// A packet in a byte vector.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frame {
    pub bytes: Vec<u8>,
    pub gso_size: u32,
    at_xdp: bool,
}

impl Frame {
    pub fn new(bytes: Vec<u8>) -> Self {
        Self {
            bytes,
            gso_size: 0,
            at_xdp: false,
        }
    }
}

impl Packet for Frame {
    fn len(&self) -> usize {
        self.bytes.len()
    }

    fn gso_size(&self) -> u32 {
        self.gso_size
    }

    fn load<T: Pod>(&self, offset: usize) -> Option<T> {
        let bytes = self.bytes.get(offset..offset + size_of::<T>())?;
        Some(bytemuck::pod_read_unaligned(bytes))
    }

    fn store<T: Pod>(&mut self, offset: usize, value: T) -> Option<()> {
        let bytes = self.bytes.get_mut(offset..offset + size_of::<T>())?;
        bytes.copy_from_slice(bytemuck::bytes_of(&value));
        Some(())
    }

    fn adjust_l4_checksum(&mut self, offset: usize, pseudo: u32, payload: u32, kind: Checksum) -> Option<()> {
        // XDP adds both differences at once, TC one after the other by a helper that leaves out what changes nothing.
        let steps = if self.at_xdp {
            [Some(checksum::add(pseudo, payload)), None]
        } else {
            [pseudo, payload].map(|difference| Some(difference).filter(|d| *d != 0))
        };
        for difference in steps.into_iter().flatten() {
            let old: u16 = self.load(offset)?;
            if kind.zero_is_none && old == 0 {
                return Some(());
            }
            let mut new = checksum::update(old, difference);
            if kind.zero_is_none && new == 0 {
                new = 0xffff;
            }
            self.store(offset, new)?;
        }
        Some(())
    }

    fn adjust_sum(&mut self, _difference: u32) {}

    fn resize(&mut self, len: usize) -> Option<()> {
        self.bytes.resize(len, 0);
        Some(())
    }
}

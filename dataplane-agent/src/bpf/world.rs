//! The datapath's surroundings as a packet would meet them now, read from the pinned maps: what `explain` runs the host
//! build in. Nothing is written: what the datapath enters, counts and tells stays in memory, and is gone with it. Flows are
//! taken for new ones, so the tables of flows are empty.

mod balance;
mod ends;

use std::{
    cell::{OnceCell, RefCell},
    io,
};

use bytemuck::Pod;
use dataplane_common::{
    addr::{AnyAddr, Family, V4, V6, ethertype},
    backend::{Backend, BackendHead},
    config::{Config, config_flags},
    device::Device,
    flow::FlowEvent,
    fragment::Waiting,
    memory::{Frame, work},
    pipeline::{Context, Stages, Work, process},
    policy::{
        self, Judgement, PeerRulesKey, PeerTables, PodPolicy, PolicyFlow, PolicyRule, PolicySet,
        PolicyTables, PortRulesKey, RuleBits, VerdictEvent, port_prefix,
    },
    reason::Reason,
    rewrite::RewriteIp,
    service::{Affinity, Frontend, PortSet, RANGE_SERVICE_BITS, Service, ServiceHead},
    sock::SockBackend,
    tables::{Entry, Env, InsertError, PolicyEntry, Route, Router, Tables},
    traffic::Sample,
    unbound::PodRange,
    verdict::{Action, Verdict},
};

pub use balance::{Choice, OfClient};

use super::{
    map_names as names,
    pins::Pins,
    sys::{self, MapFd},
};
use crate::{
    netlink::way::{Routing, Way},
    sync::encode,
};

/// The pinned maps that a new flow's first packet is decided by.
#[derive(Debug)]
pub struct World {
    config: Config,
    v4: OfFamily<V4>,
    v6: OfFamily<V6>,
    services: MapFd<u32, Service>,
    backends: MapFd<u32, Backend>,
    maglev: MapFd<u32, u64>,
    ports: MapFd<u32, PortSet>,
    devices: MapFd<u32, Device>,
    revision: MapFd<u32, u32>,
    pods: MapFd<u32, PodPolicy>,
    pod_ranges: MapFd<u32, PodRange>,
    /// The values say nothing.
    source_checked: MapFd<u32, u32>,
    policies: PolicyMaps,
    pub routing: Routing,
    seen: RefCell<Seen>,
}

/// What the datapath has told and counted.
#[derive(Debug, Default)]
struct Seen {
    told: Vec<VerdictEvent>,
    reasons: Vec<u32>,
    failed: Option<io::Error>,
}

/// What became of a packet.
#[derive(Debug)]
pub struct Outcome {
    pub verdict: Verdict,
    /// The packet, as it left.
    pub bytes: Vec<u8>,
    /// Verdicts of policies.
    pub told: Vec<VerdictEvent>,
    /// Why it was dropped, refused or answered.
    pub reasons: Vec<Reason>,
}

impl World {
    /// `config`: the constants that the programs were loaded with.
    pub fn open(pins: &Pins, config: Config) -> io::Result<Self> {
        Ok(Self {
            config: Config {
                flags: config.flags | config_flags::TELL_ALLOWED,
                verdicts_per_tick: u32::MAX,
                ..config
            },
            v4: OfFamily::open(pins)?,
            v6: OfFamily::open(pins)?,
            services: open(pins, names::SERVICES)?,
            backends: open(pins, names::BACKENDS)?,
            maglev: open(pins, names::MAGLEV)?,
            ports: open(pins, names::PORTS)?,
            devices: open(pins, names::DEVICES)?,
            revision: open(pins, names::POLICY_REVISION)?,
            pods: open(pins, names::POD_POLICY)?,
            pod_ranges: open(pins, names::POD_RANGES)?,
            source_checked: open(pins, names::SOURCE_CHECKED)?,
            policies: PolicyMaps {
                sets: Rows::open(pins, names::POLICY_SETS)?,
                peer_rules: open(pins, names::PEER_RULES)?,
                port_rules: open(pins, names::PORT_RULES)?,
                bits: Rows::open(pins, names::RULE_BITS)?,
                rules: Rows::open(pins, names::RULES)?,
            },
            routing: Routing::open()?,
            seen: RefCell::default(),
        })
    }

    /// Runs a packet through a hook.
    pub fn run(&self, bytes: Vec<u8>, at: &Context) -> io::Result<Outcome> {
        let mut frame = Frame::new(bytes);
        let kind = frame
            .bytes
            .get(12..14)
            .map(|kind| u16::from_be_bytes([kind[0], kind[1]]));
        let verdict = match kind {
            Some(ethertype::IPV4) => self.run_as::<V4>(&mut frame, at),
            Some(ethertype::IPV6) => self.run_as::<V6>(&mut frame, at),
            _ => Verdict::PASS,
        };
        let Seen {
            told,
            reasons,
            failed,
        } = self.seen.take();
        if let Some(error) = failed {
            return Err(error);
        }
        let reasons = reasons.iter().filter_map(|number| Reason::from_number(*number));
        Ok(Outcome {
            verdict,
            bytes: frame.bytes,
            told,
            reasons: reasons.collect(),
        })
    }

    fn run_as<F: MapFamily>(&self, frame: &mut Frame, at: &Context) -> Verdict {
        process::<F, _, _, _>(frame, self, at, &mut Scratch(work::<F>()))
    }

    pub fn service(&self, index: u32) -> Option<Service> {
        self.get(&self.services, &index)
    }

    /// A rule, by an event's [`VerdictEvent::rule`].
    pub fn rule(&self, index: u32) -> Option<PolicyRule> {
        self.policies.rule(index).copied()
    }

    /// What a map has; a failure is remembered, and ends the run.
    fn get<K: Pod, V: Pod>(&self, map: &MapFd<K, V>, key: &K) -> Option<V> {
        map.lookup(key).unwrap_or_else(|error| {
            self.seen.borrow_mut().failed.get_or_insert(error);
            None
        })
    }
}

fn open<K: Pod, V: Pod>(pins: &Pins, name: &str) -> io::Result<MapFd<K, V>> {
    MapFd::new(pins.open_map(name)?)
}

/// The maps of one family.
#[derive(Debug)]
struct OfFamily<F: MapFamily> {
    frontends: MapFd<F::FrontendKey, Frontend>,
    own_addresses: MapFd<F::Addr, u32>,
    /// The values say nothing.
    ranges: MapFd<F::RangeKey, u32>,
    affinity: MapFd<F::AffinityKey, Affinity>,
    peers: MapFd<F::Addr, u32>,
    cidrs: MapFd<F::CidrKey, u32>,
    bound: MapFd<F::Addr, u32>,
}

impl<F: MapFamily> OfFamily<F> {
    fn open(pins: &Pins) -> io::Result<Self> {
        let [frontends, own_addresses, ranges, affinity, peers, cidrs, bound] = F::NAMES;
        Ok(Self {
            frontends: open(pins, frontends)?,
            own_addresses: open(pins, own_addresses)?,
            ranges: open(pins, ranges)?,
            affinity: open(pins, affinity)?,
            peers: open(pins, peers)?,
            cidrs: open(pins, cidrs)?,
            bound: open(pins, bound)?,
        })
    }
}

/// A family's maps, and the keys of its longest prefix matches.
trait MapFamily: RewriteIp {
    /// Of frontends, own addresses, source ranges, clients, peers and their ranges, and pods' addresses.
    const NAMES: [&'static str; 7];
    type RangeKey: Pod;
    type CidrKey: Pod;

    fn maps(world: &World) -> &OfFamily<Self>;
    fn range_key(service: u32, client: &Self::Addr) -> Self::RangeKey;
    fn cidr_key(addr: &Self::Addr) -> Self::CidrKey;
}

impl MapFamily for V4 {
    const NAMES: [&'static str; 7] = [
        names::FRONTENDS_V4,
        names::OWN_ADDRS_V4,
        names::RANGES_V4,
        names::AFFINITY_V4,
        names::PEERS_V4,
        names::CIDRS_V4,
        names::BOUND_V4,
    ];
    type RangeKey = [u32; 3];
    type CidrKey = [u32; 2];

    fn maps(world: &World) -> &OfFamily<Self> {
        &world.v4
    }

    fn range_key(service: u32, client: &u32) -> [u32; 3] {
        [RANGE_SERVICE_BITS + 32, service, *client]
    }

    fn cidr_key(addr: &u32) -> [u32; 2] {
        [32, *addr]
    }
}

impl MapFamily for V6 {
    const NAMES: [&'static str; 7] = [
        names::FRONTENDS_V6,
        names::OWN_ADDRS_V6,
        names::RANGES_V6,
        names::AFFINITY_V6,
        names::PEERS_V6,
        names::CIDRS_V6,
        names::BOUND_V6,
    ];
    type RangeKey = [u32; 6];
    type CidrKey = [u32; 5];

    fn maps(world: &World) -> &OfFamily<Self> {
        &world.v6
    }

    fn range_key(service: u32, client: &AnyAddr) -> [u32; 6] {
        let [a, b, c, d] = *client;
        [RANGE_SERVICE_BITS + 128, service, a, b, c, d]
    }

    fn cidr_key(addr: &AnyAddr) -> [u32; 5] {
        let [a, b, c, d] = *addr;
        [128, a, b, c, d]
    }
}

/// The maps that a verdict is asked of.
#[derive(Debug)]
struct PolicyMaps {
    sets: Rows<PolicySet>,
    peer_rules: MapFd<PeerRulesKey, u32>,
    port_rules: MapFd<[u32; 3], u32>,
    bits: Rows<RuleBits>,
    rules: Rows<PolicyRule>,
}

/// An array whose elements stay where they were read.
#[derive(Debug)]
struct Rows<V> {
    map: MapFd<u32, V>,
    read: Kept<V>,
}

/// A list that only grows, so that what is in it can be referred to.
#[derive(Debug)]
struct Kept<V>(OnceCell<Box<(V, Kept<V>)>>);

impl<V> Kept<V> {
    fn add(&self, value: V) -> &V {
        match self.0.get() {
            Some(next) => next.1.add(value),
            None => &self.0.get_or_init(|| Box::new((value, Kept(OnceCell::new())))).0,
        }
    }
}

impl<V: Pod> Rows<V> {
    fn open(pins: &Pins, name: &str) -> io::Result<Self> {
        Ok(Self {
            map: open(pins, name)?,
            read: Kept(OnceCell::new()),
        })
    }

    fn get(&self, index: u32) -> Option<&V> {
        let value = self.map.lookup(&index).ok().flatten()?;
        Some(self.read.add(value))
    }
}

impl PolicyTables for PolicyMaps {
    fn set(&self, id: u32) -> Option<&PolicySet> {
        self.sets.get(id)
    }

    fn peer_rules(&self, key: PeerRulesKey) -> Option<u32> {
        self.peer_rules.lookup(&key).ok().flatten()
    }

    fn port_rules(&self, key: PortRulesKey) -> Option<u32> {
        let [set, rest] = bytemuck::cast(key);
        self.port_rules
            .lookup(&[port_prefix::PORT, set, rest])
            .ok()
            .flatten()
    }

    fn bits(&self, id: u32) -> Option<&RuleBits> {
        self.bits.get(id)
    }

    fn rule(&self, index: u32) -> Option<&PolicyRule> {
        self.rules.get(index)
    }
}

impl<F: MapFamily> PeerTables<F> for World {
    fn peer(&self, addr: &F::Addr) -> Option<u32> {
        self.get(&F::maps(self).peers, addr)
    }

    fn cidr(&self, addr: &F::Addr) -> Option<u32> {
        self.get(&F::maps(self).cidrs, &F::cidr_key(addr))
    }
}

/// There is none.
#[derive(Debug)]
pub enum NoEntry {}

impl<F: Family> Entry<F> for NoEntry {
    fn flow(&self) -> &F::Flow {
        match *self {}
    }

    fn touch(&self, _seen_ticks: u32, _state: u8) {}

    fn set_judged(&self, _revision: u32) {}
}

impl PolicyEntry for NoEntry {
    fn flow(&self) -> &PolicyFlow {
        match *self {}
    }

    fn touch(&self, _seen_ticks: u32) {}
}

impl<F: MapFamily> Tables<F> for World {
    type Entry<'a> = NoEntry;
    type PolicyEntry<'a> = NoEntry;

    fn flow(&self, _key: &F::FlowKey) -> Option<NoEntry> {
        None
    }

    fn half_open(&self, _key: &F::FlowKey) -> Option<NoEntry> {
        None
    }

    fn put_flow(&self, _key: &F::FlowKey, _flow: &F::Flow) -> Result<(), InsertError> {
        Ok(())
    }

    fn put_half_open(&self, _key: &F::FlowKey, _flow: &F::Flow, _replace: bool) -> Result<(), InsertError> {
        Ok(())
    }

    fn remove_flow(&self, _key: &F::FlowKey) {}

    fn remove_half_open(&self, _key: &F::FlowKey) {}

    fn policy_flow(&self, _key: &F::PolicyFlowKey) -> Option<NoEntry> {
        None
    }

    fn put_policy_flow(&self, _key: &F::PolicyFlowKey, _flow: &PolicyFlow) {}

    fn frontend(&self, key: &F::FrontendKey) -> Option<u32> {
        let frontend = self.get(&F::maps(self).frontends, key);
        frontend.map(|frontend| frontend.service)
    }

    fn own_address(&self, addr: F::Addr) -> u32 {
        self.get(&F::maps(self).own_addresses, &addr).unwrap_or(0)
    }

    fn bound(&self, addr: &F::Addr) -> Option<u32> {
        self.get(&F::maps(self).bound, addr)
    }

    /// What the first look would find is in the other tables too.
    fn has_source(&self, _ifindex: u32, _addr: &F::Addr) -> bool {
        false
    }

    /// No socket sends what is explained.
    fn given(&self, _addr: &F::Addr, _port_be: u16) -> Option<SockBackend> {
        None
    }

    fn in_source_range(&self, service: u32, client: &F::Addr) -> bool {
        self.get(&F::maps(self).ranges, &F::range_key(service, client))
            .is_some()
    }

    fn affinity(&self, key: &F::AffinityKey) -> Option<Affinity> {
        self.get(&F::maps(self).affinity, key)
    }

    fn touch_affinity(&self, _key: &F::AffinityKey, _seen_eighths: u32) {}

    fn put_affinity(&self, _key: &F::AffinityKey, _affinity: &Affinity) {}
}

impl Env for World {
    fn config<T: Copy>(&self, field: impl FnOnce(&Config) -> &T) -> T {
        *field(&self.config)
    }

    fn now_ticks(&self) -> u32 {
        sys::ticks()
    }

    fn now_eighths(&self) -> u32 {
        (sys::monotonic().as_nanos() >> 27) as u32
    }

    fn service_head(&self, index: u32) -> Option<ServiceHead> {
        self.service(index).map(|service| service.head)
    }

    fn service_affinity(&self, index: u32) -> u32 {
        self.service(index).map_or(0, |service| service.affinity)
    }

    fn backend_head(&self, id: u32) -> Option<BackendHead> {
        self.backend(id).map(|backend| backend.head)
    }

    fn backend(&self, id: u32) -> Option<Backend> {
        self.get(&self.backends, &id)
    }

    fn maglev(&self, index: u32) -> Option<u64> {
        self.get(&self.maglev, &index)
    }

    fn ports(&self, index: u32) -> PortSet {
        self.get(&self.ports, &index).unwrap_or_default()
    }

    fn device(&self, ifindex: u32) -> Option<Device> {
        self.get(&self.devices, &ifindex)
    }

    fn policy_revision(&self) -> u32 {
        self.get(&self.revision, &0).unwrap_or_default()
    }

    fn pod_range(&self, index: u32) -> Option<PodRange> {
        self.get(&self.pod_ranges, &index)
    }

    fn is_source_checked(&self, ifindex: u32) -> bool {
        self.get(&self.source_checked, &ifindex).is_some()
    }

    fn pod_policy(&self, ifindex: u32) -> Option<PodPolicy> {
        self.get(&self.pods, &ifindex)
    }

    fn judge(&self, set: u32, class: u32, proto: u8, port_be: u16) -> Judgement {
        policy::judge(&self.policies, set, class, proto, port_be)
    }

    fn count_verdict(&self, _set: u32, _judgement: Judgement, _is_dry_run: bool) {}

    fn may_tell(&self, _ifindex: u32, _allows: bool) -> Option<u32> {
        Some(0)
    }

    fn tell(&self, event: &mut VerdictEvent) {
        self.seen.borrow_mut().told.push(*event);
    }

    fn count(&self, reason: u32) {
        self.seen.borrow_mut().reasons.push(reason);
    }

    fn count_flow(&self, _event: FlowEvent) {}

    fn count_pod_drop(&self, _ifindex: u32) {}

    fn count_connection(&self, _service: u32, _backend: u32) {}

    fn count_refused(&self, _service: u32, _backend: u32) {}

    fn count_dropped(&self, _service: u32, _backend: u32) {}

    fn is_sampled(&self) -> bool {
        false
    }

    fn count_sample(&self, _service: u32, _backend: u32, _sample: Sample) {}

    fn take_refusal(&self) -> bool {
        true
    }

    fn midstream_ticks(&self) -> u32 {
        0
    }

    fn set_midstream_ticks(&self, _ticks: u32) {}

    fn forget(&self, number: u32) -> u32 {
        number
    }
}

/// The link-layer addresses are left to the kernel: who is led through here is sent nowhere.
impl<F: Family> Router<F> for World {
    fn route(&self, _ifindex: u32, _src: &F::Addr, dst: &F::Addr, _proto: u8, _len: u16) -> Route {
        let dst = encode::ip(F::to_any(*dst), F::VERSION == 6);
        match self.routing.way(dst) {
            Ok(Some(Way { ifindex, .. })) => Route::NoNeighbour { ifindex },
            Ok(None) => Route::None,
            Err(error) => {
                self.seen.borrow_mut().failed.get_or_insert(error);
                Route::None
            }
        }
    }
}

/// The space of one run.
struct Scratch<F: Family>(Work<F>);

/// What is explained is no fragment.
impl<F: MapFamily> Stages<F, Frame, World> for Scratch<F> {
    fn work(&mut self) -> Option<&mut Work<F>> {
        Some(&mut self.0)
    }

    fn enforce(&mut self, packet: &mut Frame, world: &World, at: &Context, verdict: Verdict) -> Verdict {
        dataplane_common::enforce::untranslated::<F, _, _>(packet, world, at, &mut self.0, verdict)
    }

    fn source(&mut self, packet: &mut Frame, world: &World, at: &Context) -> Verdict {
        dataplane_common::source::judge::<F, _, _>(packet, world, at, &mut self.0)
    }

    fn guard(&mut self, packet: &mut Frame, world: &World, at: &Context) -> Verdict {
        dataplane_common::unbound::guard::<F, _, _>(packet, world, at)
    }

    fn judge(&mut self, _packet: &mut Frame, world: &World, at: &Context) -> Verdict {
        dataplane_common::enforce::again::<F, _>(world, at, &mut self.0)
    }

    fn first(&mut self, _: &mut Frame, _: &World, _: &Context) -> Verdict {
        Verdict::PASS
    }

    fn later(&mut self, _: &mut Frame, _: &World, _: &Context) -> Verdict {
        Verdict::PASS
    }

    fn hold(&mut self, _: &mut Frame, _: &World, _: &Context) -> Verdict {
        Verdict::PASS
    }

    fn remember(&mut self, _: &mut Frame, _: &World, _: &Context, _: Verdict) -> Waiting {
        Waiting::NONE
    }

    fn release(&mut self, _: &mut Frame, _: &World, _: &Context, _: Waiting) {}

    fn release_one(&mut self, _: &mut Frame, _: &World, _: &Context, _: Waiting, _: u32) {}
}

impl Outcome {
    /// Why the packet went no further, if so.
    pub fn stopped(&self) -> Option<Reason> {
        match self.verdict.action() {
            Action::Drop => Reason::from_number(self.verdict.value()),
            Action::Answer => self.reasons.last().copied(),
            _ => None,
        }
    }
}

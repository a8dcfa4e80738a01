//! The tables of policies as the agent writes them: the part of [`Store`](super::Store) that `sync::policy` uses.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use dataplane_common::{
    policy::{Counted, Hits, PeerRulesKey, PodPolicy, PolicyRule, PolicySet, PortRulesKey, RuleBits},
    source::source_place,
    unbound::PodRange,
};
use ipnet::IpNet;

use super::StoreError;

/// How much fits, as set when the maps were made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PolicyLimits {
    /// Entries of `POD_POLICY`.
    pub pods: u32,
    /// Entries of each of `PEERS_V4` and `PEERS_V6`.
    pub peers: u32,
    /// Entries of each of `CIDRS_V4` and `CIDRS_V6`.
    pub ranges: u32,
    /// Elements of `POLICY_SETS` and `SET_HITS`.
    pub sets: u32,
    pub peer_rules: u32,
    pub port_rules: u32,
    /// Elements of `RULE_BITS`.
    pub bits: u32,
    /// Elements of `RULES` and `RULE_HITS`.
    pub rules: u32,
}

impl PolicyLimits {
    /// What goes with so many peers, ranges of addresses and rules.
    pub const fn new(peers: u32, ranges: u32, rules: u32) -> Self {
        Self {
            pods: 1024,
            peers,
            ranges,
            sets: at_least(rules / 8, 64),
            peer_rules: peers * 2,
            port_rules: rules * 2,
            bits: at_least(rules / 2, 64),
            rules,
        }
    }
}

const fn at_least(number: u32, least: u32) -> u32 {
    if number < least { least } else { number }
}

/// The datapath's tables of policies. Elements of arrays that were never written are zero.
pub trait PolicyStore {
    fn put_peer(&mut self, addr: IpAddr, class: u32) -> Result<(), StoreError>;
    fn delete_peer(&mut self, addr: IpAddr) -> Result<(), StoreError>;
    fn put_cidr(&mut self, range: IpNet, class: u32) -> Result<(), StoreError>;
    fn delete_cidr(&mut self, range: IpNet) -> Result<(), StoreError>;
    fn write_set(&mut self, id: u32, set: &PolicySet) -> Result<(), StoreError>;
    /// `bits`: an id in `RULE_BITS`.
    fn put_peer_rules(&mut self, key: PeerRulesKey, bits: u32) -> Result<(), StoreError>;
    fn delete_peer_rules(&mut self, key: PeerRulesKey) -> Result<(), StoreError>;
    /// `length`: `dataplane_common::policy::port_prefix`. `bits`: an id in `RULE_BITS`.
    fn put_port_rules(&mut self, length: u32, key: PortRulesKey, bits: u32) -> Result<(), StoreError>;
    fn delete_port_rules(&mut self, length: u32, key: PortRulesKey) -> Result<(), StoreError>;
    fn write_bits(&mut self, id: u32, bits: &RuleBits) -> Result<(), StoreError>;
    fn write_rule(&mut self, index: u32, rule: &PolicyRule) -> Result<(), StoreError>;
    fn put_pod_policy(&mut self, ifindex: u32, policy: &PodPolicy) -> Result<(), StoreError>;
    fn delete_pod_policy(&mut self, ifindex: u32) -> Result<(), StoreError>;
    fn write_policy_revision(&mut self, revision: u32) -> Result<(), StoreError>;
    fn put_bound(&mut self, addr: IpAddr, ifindex: u32) -> Result<(), StoreError>;
    fn delete_bound(&mut self, addr: IpAddr) -> Result<(), StoreError>;
    /// `place`: `dataplane_common::source::source_place`. `None`: of no interface.
    fn write_source(&mut self, place: SourcePlace, own: Option<(IpAddr, u32)>) -> Result<(), StoreError>;
    fn put_source_checked(&mut self, ifindex: u32) -> Result<(), StoreError>;
    fn delete_source_checked(&mut self, ifindex: u32) -> Result<(), StoreError>;
    /// `index`: `dataplane_common::unbound::range_index`.
    fn write_pod_range(&mut self, index: u32, range: &PodRange) -> Result<(), StoreError>;

    /// How often a rule or a set has decided since it was last cleared.
    fn hits(&self, of: Counted) -> Result<Hits, StoreError>;
    fn clear_hits(&mut self, of: Counted) -> Result<(), StoreError>;

    /// What the kernel holds.
    fn policy_rows(&self) -> Result<PolicyRows, StoreError>;
    fn bound_rows(&self) -> Result<BoundRows, StoreError>;
}

/// The tables of policies as they were found; of arrays, what is not zero.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicyRows {
    pub peers: Vec<(IpAddr, u32)>,
    pub cidrs: Vec<(IpNet, u32)>,
    pub sets: Vec<(u32, PolicySet)>,
    pub peer_rules: Vec<(PeerRulesKey, u32)>,
    /// With the length of the prefix.
    pub port_rules: Vec<(u32, PortRulesKey, u32)>,
    pub bits: Vec<(u32, RuleBits)>,
    pub rules: Vec<(u32, PolicyRule)>,
    pub pods: Vec<(u32, PodPolicy)>,
    pub revision: u32,
}

/// An element of `SOURCES_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SourcePlace {
    V4(u32),
    V6(u32),
}

impl SourcePlace {
    /// Where an interface has an address of this family.
    pub fn of(ifindex: u32, addr: IpAddr) -> Self {
        match addr {
            IpAddr::V4(_) => SourcePlace::V4(source_place(ifindex)),
            IpAddr::V6(_) => SourcePlace::V6(source_place(ifindex)),
        }
    }
}

/// `BOUND_*`, `POD_RANGES`, `SOURCES_*` and `SOURCE_CHECKED` as they were found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BoundRows {
    /// The interface of each address.
    pub addrs: BTreeMap<IpAddr, u32>,
    pub sources: BTreeMap<SourcePlace, (IpAddr, u32)>,
    /// Interfaces.
    pub checked: BTreeSet<u32>,
    pub ranges: [PodRange; 2],
}

//! The tables of policies in memory, and what they say: arrays read as the kernel's do, zero where nothing was written.

use std::{collections::BTreeMap, net::IpAddr};

use dataplane_common::{
    addr::Family,
    policy::{
        Counted, Hits, PeerRulesKey, PeerTables, PodPolicy, PolicyRule, PolicySet, PolicyTables,
        PortRulesKey, RuleBits,
    },
    unbound::PodRange,
};
use ipnet::IpNet;

use super::Memory;
use crate::{
    compile::policy::tables::{ip, longest_port},
    store::{
        StoreError,
        policy::{BoundRows, PolicyLimits, PolicyRows, PolicyStore, SourcePlace},
    },
};

/// Tables with the limits of the real ones.
#[derive(Clone, Debug)]
pub struct PolicyMemory {
    limits: PolicyLimits,
    pub peers: BTreeMap<IpAddr, u32>,
    pub cidrs: BTreeMap<IpNet, u32>,
    pub sets: Vec<PolicySet>,
    pub peer_rules: BTreeMap<PeerRulesKey, u32>,
    /// With the length of the prefix.
    pub port_rules: BTreeMap<(u32, PortRulesKey), u32>,
    pub bits: Vec<RuleBits>,
    pub rules: Vec<PolicyRule>,
    pub pods: BTreeMap<u32, PodPolicy>,
    pub revision: u32,
    pub hits: BTreeMap<Counted, Hits>,
    pub bound: BoundRows,
}

impl PolicyMemory {
    pub fn new(limits: PolicyLimits) -> Self {
        Self {
            limits,
            peers: BTreeMap::new(),
            cidrs: BTreeMap::new(),
            sets: vec![PolicySet::default(); limits.sets as usize],
            peer_rules: BTreeMap::new(),
            port_rules: BTreeMap::new(),
            bits: vec![RuleBits::default(); limits.bits as usize],
            rules: vec![PolicyRule::default(); limits.rules as usize],
            pods: BTreeMap::new(),
            revision: 0,
            hits: BTreeMap::new(),
            bound: BoundRows::default(),
        }
    }
}

impl<F: Family> PeerTables<F> for PolicyMemory {
    fn peer(&self, addr: &F::Addr) -> Option<u32> {
        self.peers.get(&ip::<F>(addr)).copied()
    }

    fn cidr(&self, addr: &F::Addr) -> Option<u32> {
        let addr = ip::<F>(addr);
        let holding = self.cidrs.iter().filter(|(range, _)| range.contains(&addr));
        let longest = holding.max_by_key(|(range, _)| range.prefix_len());
        longest.map(|(_, class)| *class)
    }
}

impl PolicyTables for PolicyMemory {
    fn set(&self, id: u32) -> Option<&PolicySet> {
        self.sets.get(id as usize)
    }

    fn peer_rules(&self, key: PeerRulesKey) -> Option<u32> {
        self.peer_rules.get(&key).copied()
    }

    fn port_rules(&self, key: PortRulesKey) -> Option<u32> {
        longest_port(key, |prefix| self.port_rules.get(prefix).copied())
    }

    fn bits(&self, id: u32) -> Option<&RuleBits> {
        self.bits.get(id as usize)
    }

    fn rule(&self, index: u32) -> Option<&PolicyRule> {
        self.rules.get(index as usize)
    }
}

/// Puts an entry if it is there already or there is room.
fn put<K: Ord, V>(
    table: &mut BTreeMap<K, V>,
    of_kind: impl Fn(&K) -> bool,
    (name, limit): (&'static str, u32),
    key: K,
    value: V,
) -> Result<(), StoreError> {
    if !table.contains_key(&key) && table.keys().filter(|key| of_kind(key)).count() >= limit as usize {
        return Err(StoreError::Full { table: name, limit });
    }
    table.insert(key, value);
    Ok(())
}

fn write<T: Copy>(array: &mut [T], table: &'static str, index: u32, value: &T) -> Result<(), StoreError> {
    let limit = array.len() as u32;
    let element = array.get_mut(index as usize);
    *element.ok_or(StoreError::Full { table, limit })? = *value;
    Ok(())
}

fn not_zero<T: Copy + Default + PartialEq>(array: &[T]) -> Vec<(u32, T)> {
    let elements = (0..).zip(array.iter().copied());
    elements.filter(|(_, element)| *element != T::default()).collect()
}

impl PolicyStore for Memory {
    fn put_peer(&mut self, addr: IpAddr, class: u32) -> Result<(), StoreError> {
        self.writes += 1;
        let (name, is_v4) = match addr {
            IpAddr::V4(_) => ("PEERS_V4", true),
            IpAddr::V6(_) => ("PEERS_V6", false),
        };
        let of_family = |key: &IpAddr| key.is_ipv4() == is_v4;
        let limit = self.policy.limits.peers;
        put(&mut self.policy.peers, of_family, (name, limit), addr, class)
    }

    fn delete_peer(&mut self, addr: IpAddr) -> Result<(), StoreError> {
        self.writes += 1;
        self.policy.peers.remove(&addr);
        Ok(())
    }

    fn put_cidr(&mut self, range: IpNet, class: u32) -> Result<(), StoreError> {
        self.writes += 1;
        let (name, is_v4) = match range {
            IpNet::V4(_) => ("CIDRS_V4", true),
            IpNet::V6(_) => ("CIDRS_V6", false),
        };
        let of_family = |key: &IpNet| key.addr().is_ipv4() == is_v4;
        let limit = self.policy.limits.ranges;
        put(&mut self.policy.cidrs, of_family, (name, limit), range, class)
    }

    fn delete_cidr(&mut self, range: IpNet) -> Result<(), StoreError> {
        self.writes += 1;
        self.policy.cidrs.remove(&range);
        Ok(())
    }

    fn write_set(&mut self, id: u32, set: &PolicySet) -> Result<(), StoreError> {
        self.writes += 1;
        write(&mut self.policy.sets, "POLICY_SETS", id, set)
    }

    fn put_peer_rules(&mut self, key: PeerRulesKey, bits: u32) -> Result<(), StoreError> {
        self.writes += 1;
        let limit = ("PEER_RULES", self.policy.limits.peer_rules);
        put(&mut self.policy.peer_rules, |_| true, limit, key, bits)
    }

    fn delete_peer_rules(&mut self, key: PeerRulesKey) -> Result<(), StoreError> {
        self.writes += 1;
        self.policy.peer_rules.remove(&key);
        Ok(())
    }

    fn put_port_rules(&mut self, length: u32, key: PortRulesKey, bits: u32) -> Result<(), StoreError> {
        self.writes += 1;
        let limit = ("PORT_RULES", self.policy.limits.port_rules);
        put(&mut self.policy.port_rules, |_| true, limit, (length, key), bits)
    }

    fn delete_port_rules(&mut self, length: u32, key: PortRulesKey) -> Result<(), StoreError> {
        self.writes += 1;
        self.policy.port_rules.remove(&(length, key));
        Ok(())
    }

    fn write_bits(&mut self, id: u32, bits: &RuleBits) -> Result<(), StoreError> {
        self.writes += 1;
        write(&mut self.policy.bits, "RULE_BITS", id, bits)
    }

    fn write_rule(&mut self, index: u32, rule: &PolicyRule) -> Result<(), StoreError> {
        self.writes += 1;
        write(&mut self.policy.rules, "RULES", index, rule)
    }

    fn put_pod_policy(&mut self, ifindex: u32, policy: &PodPolicy) -> Result<(), StoreError> {
        self.writes += 1;
        let limit = ("POD_POLICY", self.policy.limits.pods);
        put(&mut self.policy.pods, |_| true, limit, ifindex, *policy)
    }

    fn delete_pod_policy(&mut self, ifindex: u32) -> Result<(), StoreError> {
        self.writes += 1;
        self.policy.pods.remove(&ifindex);
        Ok(())
    }

    fn write_policy_revision(&mut self, revision: u32) -> Result<(), StoreError> {
        self.writes += 1;
        self.policy.revision = revision;
        Ok(())
    }

    fn hits(&self, of: Counted) -> Result<Hits, StoreError> {
        Ok(self.policy.hits.get(&of).copied().unwrap_or_default())
    }

    fn clear_hits(&mut self, of: Counted) -> Result<(), StoreError> {
        self.writes += 1;
        self.policy.hits.remove(&of);
        Ok(())
    }

    fn put_bound(&mut self, addr: IpAddr, ifindex: u32) -> Result<(), StoreError> {
        self.writes += 1;
        self.policy.bound.addrs.insert(addr, ifindex);
        Ok(())
    }

    fn delete_bound(&mut self, addr: IpAddr) -> Result<(), StoreError> {
        self.writes += 1;
        self.policy.bound.addrs.remove(&addr);
        Ok(())
    }

    fn write_source(&mut self, place: SourcePlace, own: Option<(IpAddr, u32)>) -> Result<(), StoreError> {
        self.writes += 1;
        match own {
            Some(own) => self.policy.bound.sources.insert(place, own),
            None => self.policy.bound.sources.remove(&place),
        };
        Ok(())
    }

    fn put_source_checked(&mut self, ifindex: u32) -> Result<(), StoreError> {
        self.writes += 1;
        self.policy.bound.checked.insert(ifindex);
        Ok(())
    }

    fn delete_source_checked(&mut self, ifindex: u32) -> Result<(), StoreError> {
        self.writes += 1;
        self.policy.bound.checked.remove(&ifindex);
        Ok(())
    }

    fn write_pod_range(&mut self, index: u32, range: &PodRange) -> Result<(), StoreError> {
        self.writes += 1;
        write(&mut self.policy.bound.ranges, "POD_RANGES", index, range)
    }

    fn bound_rows(&self) -> Result<BoundRows, StoreError> {
        Ok(self.policy.bound.clone())
    }

    fn policy_rows(&self) -> Result<PolicyRows, StoreError> {
        let PolicyMemory {
            limits: _,
            peers,
            cidrs,
            sets,
            peer_rules,
            port_rules,
            bits,
            rules,
            pods,
            revision,
            hits: _,
            bound: _,
        } = &self.policy;
        Ok(PolicyRows {
            peers: peers.iter().map(|(addr, class)| (*addr, *class)).collect(),
            cidrs: cidrs.iter().map(|(range, class)| (*range, *class)).collect(),
            sets: not_zero(sets),
            peer_rules: peer_rules.iter().map(|(key, bits)| (*key, *bits)).collect(),
            port_rules: port_rules
                .iter()
                .map(|((length, key), bits)| (*length, *key, *bits))
                .collect(),
            bits: not_zero(bits),
            rules: not_zero(rules),
            pods: pods.iter().map(|(ifindex, policy)| (*ifindex, *policy)).collect(),
            revision: *revision,
        })
    }
}

//! [`PolicyStore`] over the pinned maps. Nothing is read through a mapping: elements become visible with the row that
//! leads to them.

use std::net::IpAddr;

use dataplane_common::{
    policy::{Counted, Hits, PeerRulesKey, PodPolicy, PolicyRule, PolicySet, PortRulesKey, RuleBits},
    source::{Source4, Source6},
    unbound::PodRange,
};
use ipnet::IpNet;

use super::{Prefix, Table, addr4, addr6, io_error, key4, key6};
use crate::{
    bpf::{counters::VerdictCounts, map_names as names, pins::Pins},
    store::{
        StoreError,
        policy::{BoundRows, PolicyLimits, PolicyRows, PolicyStore, SourcePlace},
    },
    sync::encode::any_addr,
};

/// The maps of policies, opened from their pins.
#[derive(Debug)]
pub struct PolicyMaps {
    peers4: Table<u32, u32>,
    peers6: Table<[u32; 4], u32>,
    cidrs4: Table<Prefix<u32>, u32>,
    cidrs6: Table<Prefix<[u32; 4]>, u32>,
    sets: Table<u32, PolicySet>,
    peer_rules: Table<PeerRulesKey, u32>,
    port_rules: Table<Prefix<PortRulesKey>, u32>,
    bits: Table<u32, RuleBits>,
    rules: Table<u32, PolicyRule>,
    pods: Table<u32, PodPolicy>,
    revision: Table<u32, u32>,
    counts: VerdictCounts,
    bound4: Table<u32, u32>,
    bound6: Table<[u32; 4], u32>,
    sources4: Table<u32, Source4>,
    sources6: Table<u32, Source6>,
    /// The values say nothing.
    source_checked: Table<u32, u32>,
    pod_ranges: Table<u32, PodRange>,
}

impl PolicyMaps {
    pub fn open(pins: &Pins) -> Result<Self, StoreError> {
        Ok(Self {
            peers4: Table::open(pins, names::PEERS_V4)?,
            peers6: Table::open(pins, names::PEERS_V6)?,
            cidrs4: Table::open(pins, names::CIDRS_V4)?,
            cidrs6: Table::open(pins, names::CIDRS_V6)?,
            sets: Table::open(pins, names::POLICY_SETS)?,
            peer_rules: Table::open(pins, names::PEER_RULES)?,
            port_rules: Table::open(pins, names::PORT_RULES)?,
            bits: Table::open(pins, names::RULE_BITS)?,
            rules: Table::open(pins, names::RULES)?,
            pods: Table::open(pins, names::POD_POLICY)?,
            revision: Table::open(pins, names::POLICY_REVISION)?,
            counts: VerdictCounts::open(pins).map_err(|source| StoreError::Open {
                table: names::RULE_HITS,
                source,
            })?,
            bound4: Table::open(pins, names::BOUND_V4)?,
            bound6: Table::open(pins, names::BOUND_V6)?,
            sources4: Table::open(pins, names::SOURCES_V4)?,
            sources6: Table::open(pins, names::SOURCES_V6)?,
            source_checked: Table::open(pins, names::SOURCE_CHECKED)?,
            pod_ranges: Table::open(pins, names::POD_RANGES)?,
        })
    }

    pub fn limits(&self) -> PolicyLimits {
        PolicyLimits {
            pods: self.pods.map.info().max_entries,
            peers: self.peers4.map.info().max_entries,
            ranges: self.cidrs4.map.info().max_entries,
            sets: self.sets.map.info().max_entries,
            peer_rules: self.peer_rules.map.info().max_entries,
            port_rules: self.port_rules.map.info().max_entries,
            bits: self.bits.map.info().max_entries,
            rules: self.rules.map.info().max_entries,
        }
    }
}

impl PolicyStore for super::BpfStore {
    fn put_peer(&mut self, addr: IpAddr, class: u32) -> Result<(), StoreError> {
        match addr {
            IpAddr::V4(addr) => self.policy.peers4.put(&key4(addr), &class),
            IpAddr::V6(addr) => self.policy.peers6.put(&key6(addr), &class),
        }
    }

    fn delete_peer(&mut self, addr: IpAddr) -> Result<(), StoreError> {
        match addr {
            IpAddr::V4(addr) => self.policy.peers4.delete(&key4(addr)),
            IpAddr::V6(addr) => self.policy.peers6.delete(&key6(addr)),
        }
    }

    fn put_cidr(&mut self, range: IpNet, class: u32) -> Result<(), StoreError> {
        let length = u32::from(range.prefix_len());
        match range {
            IpNet::V4(range) => self
                .policy
                .cidrs4
                .put(&prefix(length, key4(range.network())), &class),
            IpNet::V6(range) => self
                .policy
                .cidrs6
                .put(&prefix(length, key6(range.network())), &class),
        }
    }

    fn delete_cidr(&mut self, range: IpNet) -> Result<(), StoreError> {
        let length = u32::from(range.prefix_len());
        match range {
            IpNet::V4(range) => self.policy.cidrs4.delete(&prefix(length, key4(range.network()))),
            IpNet::V6(range) => self.policy.cidrs6.delete(&prefix(length, key6(range.network()))),
        }
    }

    fn write_set(&mut self, id: u32, set: &PolicySet) -> Result<(), StoreError> {
        self.policy.sets.put(&id, set)
    }

    fn put_peer_rules(&mut self, key: PeerRulesKey, bits: u32) -> Result<(), StoreError> {
        self.policy.peer_rules.put(&key, &bits)
    }

    fn delete_peer_rules(&mut self, key: PeerRulesKey) -> Result<(), StoreError> {
        self.policy.peer_rules.delete(&key)
    }

    fn put_port_rules(&mut self, length: u32, key: PortRulesKey, bits: u32) -> Result<(), StoreError> {
        self.policy.port_rules.put(&prefix(length, key), &bits)
    }

    fn delete_port_rules(&mut self, length: u32, key: PortRulesKey) -> Result<(), StoreError> {
        self.policy.port_rules.delete(&prefix(length, key))
    }

    fn write_bits(&mut self, id: u32, bits: &RuleBits) -> Result<(), StoreError> {
        self.policy.bits.put(&id, bits)
    }

    fn write_rule(&mut self, index: u32, rule: &PolicyRule) -> Result<(), StoreError> {
        self.policy.rules.put(&index, rule)
    }

    fn put_pod_policy(&mut self, ifindex: u32, policy: &PodPolicy) -> Result<(), StoreError> {
        self.policy.pods.put(&ifindex, policy)
    }

    fn delete_pod_policy(&mut self, ifindex: u32) -> Result<(), StoreError> {
        self.policy.pods.delete(&ifindex)
    }

    fn write_policy_revision(&mut self, revision: u32) -> Result<(), StoreError> {
        self.policy.revision.put(&0, &revision)
    }

    fn hits(&self, of: Counted) -> Result<Hits, StoreError> {
        let hits = self.policy.counts.read(of);
        hits.map_err(|source| io_error("read", table_of(of), source))
    }

    fn clear_hits(&mut self, of: Counted) -> Result<(), StoreError> {
        let outcome = self.policy.counts.clear(of);
        outcome.map_err(|source| io_error("clear", table_of(of), source))
    }

    fn put_bound(&mut self, addr: IpAddr, ifindex: u32) -> Result<(), StoreError> {
        match addr {
            IpAddr::V4(addr) => self.policy.bound4.put(&key4(addr), &ifindex),
            IpAddr::V6(addr) => self.policy.bound6.put(&key6(addr), &ifindex),
        }
    }

    fn delete_bound(&mut self, addr: IpAddr) -> Result<(), StoreError> {
        match addr {
            IpAddr::V4(addr) => self.policy.bound4.delete(&key4(addr)),
            IpAddr::V6(addr) => self.policy.bound6.delete(&key6(addr)),
        }
    }

    fn write_source(&mut self, place: SourcePlace, own: Option<(IpAddr, u32)>) -> Result<(), StoreError> {
        match place {
            SourcePlace::V4(place) => {
                let own = own.map_or_else(Source4::default, |(addr, ifindex)| Source4 {
                    addr_be: any_addr(addr)[0],
                    ifindex,
                });
                self.policy.sources4.put(&place, &own)
            }
            SourcePlace::V6(place) => {
                let own = own.map_or_else(Source6::default, |(addr, ifindex)| Source6 {
                    addr_be: any_addr(addr),
                    ifindex,
                    unused: 0,
                });
                self.policy.sources6.put(&place, &own)
            }
        }
    }

    fn put_source_checked(&mut self, ifindex: u32) -> Result<(), StoreError> {
        self.policy.source_checked.put(&ifindex, &1)
    }

    fn delete_source_checked(&mut self, ifindex: u32) -> Result<(), StoreError> {
        self.policy.source_checked.delete(&ifindex)
    }

    fn write_pod_range(&mut self, index: u32, range: &PodRange) -> Result<(), StoreError> {
        self.policy.pod_ranges.put(&index, range)
    }

    fn bound_rows(&self) -> Result<BoundRows, StoreError> {
        let maps = &self.policy;
        let mut rows = BoundRows::default();
        maps.bound4.for_each(|addr, ifindex| {
            rows.addrs.insert(addr4(*addr), *ifindex);
        })?;
        maps.bound6.for_each(|addr, ifindex| {
            rows.addrs.insert(addr6(*addr), *ifindex);
        })?;
        maps.sources4.for_each(|place, own| {
            if *own != Source4::default() {
                let addr = addr4(own.addr_be);
                rows.sources.insert(SourcePlace::V4(*place), (addr, own.ifindex));
            }
        })?;
        maps.sources6.for_each(|place, own| {
            if *own != Source6::default() {
                let addr = addr6(own.addr_be);
                rows.sources.insert(SourcePlace::V6(*place), (addr, own.ifindex));
            }
        })?;
        maps.source_checked.for_each(|ifindex, _| {
            rows.checked.insert(*ifindex);
        })?;
        maps.pod_ranges.for_each(|index, range| {
            if let Some(known) = rows.ranges.get_mut(*index as usize) {
                *known = *range;
            }
        })?;
        Ok(rows)
    }

    fn policy_rows(&self) -> Result<PolicyRows, StoreError> {
        let maps = &self.policy;
        let mut rows = PolicyRows::default();
        // A longer prefix than the address cannot be in the table.
        let range = |addr: IpAddr, length: u32| IpNet::new(addr, u8::try_from(length).ok()?).ok();
        maps.peers4
            .for_each(|addr, class| rows.peers.push((addr4(*addr), *class)))?;
        maps.peers6
            .for_each(|addr, class| rows.peers.push((addr6(*addr), *class)))?;
        maps.cidrs4.for_each(|Prefix { length, data }, class| {
            rows.cidrs
                .extend(range(addr4(*data), *length).map(|range| (range, *class)));
        })?;
        maps.cidrs6.for_each(|Prefix { length, data }, class| {
            rows.cidrs
                .extend(range(addr6(*data), *length).map(|range| (range, *class)));
        })?;
        maps.sets.not_zero(&mut rows.sets)?;
        maps.peer_rules
            .for_each(|key, bits| rows.peer_rules.push((*key, *bits)))?;
        maps.port_rules.for_each(|Prefix { length, data }, bits| {
            rows.port_rules.push((*length, *data, *bits));
        })?;
        maps.bits.not_zero(&mut rows.bits)?;
        maps.rules.not_zero(&mut rows.rules)?;
        maps.pods
            .for_each(|ifindex, policy| rows.pods.push((*ifindex, *policy)))?;
        let revision = maps.revision.map.lookup(&0);
        rows.revision = revision
            .map_err(|source| io_error("read", maps.revision.name, source))?
            .unwrap_or_default();
        Ok(rows)
    }
}

impl<V: bytemuck::Pod + PartialEq> Table<u32, V> {
    /// The elements of an array that were written.
    fn not_zero(&self, elements: &mut Vec<(u32, V)>) -> Result<(), StoreError> {
        self.for_each(|index, value| {
            if *value != V::zeroed() {
                elements.push((*index, *value));
            }
        })
    }
}

fn table_of(of: Counted) -> &'static str {
    match of {
        Counted::Rule(_) => names::RULE_HITS,
        Counted::Set(_) => names::SET_HITS,
    }
}

fn prefix<T>(length: u32, data: T) -> Prefix<T> {
    Prefix { length, data }
}

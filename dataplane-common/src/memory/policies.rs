//! The tables of policies in memory.

extern crate std;

use core::cell::RefCell;
use std::{
    collections::{HashMap, HashSet},
    vec::Vec,
};

use super::{Memory, MemoryFamily, is_within};
use crate::{
    addr::{AnyAddr, Family},
    policy::{
        Counted, Hits, PeerRulesKey, PeerTables, PodPolicy, PolicyFlow, PolicyRule, PolicySet, PolicyTables,
        PortRulesKey, RuleBits, VerdictEvent, port_prefix,
    },
    tables::PolicyEntry,
    unbound::PodRange,
};

/// The tables of policies that both families share.
#[derive(Clone, Debug, Default)]
pub struct Policies {
    pub revision: u32,
    /// This node's pod addresses, IPv4's first.
    pub ranges: [PodRange; 2],
    /// By ifindex.
    pub pods: HashMap<u32, PodPolicy>,
    /// Interfaces whose pods send from their own addresses alone.
    pub source_checked: HashSet<u32>,
    /// Ranges and their classes.
    pub cidrs: Vec<MemoryCidr>,
    pub sets: Vec<PolicySet>,
    pub peer_rules: HashMap<PeerRulesKey, u32>,
    /// With the length of the prefix.
    pub port_rules: HashMap<(u32, PortRulesKey), u32>,
    pub bits: Vec<RuleBits>,
    pub rules: Vec<PolicyRule>,
    pub hits: RefCell<HashMap<Counted, Hits>>,
    /// What was told of verdicts.
    pub told: RefCell<Vec<VerdictEvent>>,
}

/// A range of `CIDRS_*`.
#[derive(Clone, Copy, Debug)]
pub struct MemoryCidr {
    pub version: u8,
    pub network: AnyAddr,
    pub length: u8,
    pub class: u32,
}

impl Policies {
    pub(super) fn count(&self, at: Counted, is_dry_run: bool) {
        let mut all = self.hits.borrow_mut();
        let hits = all.entry(at).or_default();
        let count = if is_dry_run {
            &mut hits.dry_run
        } else {
            &mut hits.decided
        };
        *count += 1;
    }
}

/// An entry of the policies' flows as it was found, and where to write to it.
#[derive(Debug)]
pub struct MemoryPolicyEntry<'a, F: Family> {
    table: &'a RefCell<HashMap<F::PolicyFlowKey, PolicyFlow>>,
    key: F::PolicyFlowKey,
    flow: PolicyFlow,
}

impl<'a, F: Family> MemoryPolicyEntry<'a, F> {
    pub(super) fn find(
        table: &'a RefCell<HashMap<F::PolicyFlowKey, PolicyFlow>>,
        key: &F::PolicyFlowKey,
    ) -> Option<Self> {
        let flow = *table.borrow().get(key)?;
        Some(Self {
            table,
            key: *key,
            flow,
        })
    }
}

impl<F: Family> PolicyEntry for MemoryPolicyEntry<'_, F> {
    fn flow(&self) -> &PolicyFlow {
        &self.flow
    }

    fn touch(&self, seen_ticks: u32) {
        if let Some(flow) = self.table.borrow_mut().get_mut(&self.key) {
            flow.seen_ticks = seen_ticks;
        }
    }
}

impl<F: MemoryFamily> PeerTables<F> for Memory {
    fn peer(&self, addr: &F::Addr) -> Option<u32> {
        F::tables(self).peers.get(addr).copied()
    }

    fn cidr(&self, addr: &F::Addr) -> Option<u32> {
        let addr = F::to_any(*addr);
        let cidrs = self
            .policies
            .cidrs
            .iter()
            .filter(|cidr| cidr.version == F::VERSION);
        let holding = cidrs.filter(|cidr| is_within(cidr.network, cidr.length, addr));
        holding.max_by_key(|cidr| cidr.length).map(|cidr| cidr.class)
    }
}

impl PolicyTables for Policies {
    fn set(&self, id: u32) -> Option<&PolicySet> {
        self.sets.get(id as usize)
    }

    fn peer_rules(&self, key: PeerRulesKey) -> Option<u32> {
        self.peer_rules.get(&key).copied()
    }

    fn port_rules(&self, key: PortRulesKey) -> Option<u32> {
        (0..=port_prefix::PORT).rev().find_map(|length| {
            let bits: u64 = bytemuck::cast(key);
            let mask = u64::MAX.checked_shl(64 - length).unwrap_or(0).to_be();
            self.port_rules
                .get(&(length, bytemuck::cast(bits & mask)))
                .copied()
        })
    }

    fn bits(&self, id: u32) -> Option<&RuleBits> {
        self.bits.get(id as usize)
    }

    fn rule(&self, index: u32) -> Option<&PolicyRule> {
        self.rules.get(index as usize)
    }
}

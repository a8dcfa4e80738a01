//! What a verdict asks of the policy tables.

use std::cell::Cell;

use dataplane_common::addr::Family;
use dataplane_common::policy::{
    PeerRulesKey, PeerTables, PolicyRule, PolicySet, PolicyTables, PortRulesKey, RuleBits,
};

/// Tables that count what they are asked.
#[derive(Debug)]
pub struct Counting<'a, T> {
    tables: &'a T,
    lookups: Cell<u32>,
}

impl<'a, T> Counting<'a, T> {
    pub fn new(tables: &'a T) -> Self {
        Self {
            tables,
            lookups: Cell::new(0),
        }
    }

    /// Lookups so far.
    pub fn lookups(&self) -> u32 {
        self.lookups.get()
    }

    fn count<V>(&self, value: V) -> V {
        self.lookups.set(self.lookups.get() + 1);
        value
    }
}

impl<F: Family, T: PeerTables<F>> PeerTables<F> for Counting<'_, T> {
    fn peer(&self, addr: &F::Addr) -> Option<u32> {
        self.count(self.tables.peer(addr))
    }
    fn cidr(&self, addr: &F::Addr) -> Option<u32> {
        self.count(self.tables.cidr(addr))
    }
}

impl<T: PolicyTables> PolicyTables for Counting<'_, T> {
    fn set(&self, id: u32) -> Option<&PolicySet> {
        self.count(self.tables.set(id))
    }
    fn peer_rules(&self, key: PeerRulesKey) -> Option<u32> {
        self.count(self.tables.peer_rules(key))
    }
    fn port_rules(&self, key: PortRulesKey) -> Option<u32> {
        self.count(self.tables.port_rules(key))
    }
    fn bits(&self, id: u32) -> Option<&RuleBits> {
        self.count(self.tables.bits(id))
    }
    fn rule(&self, index: u32) -> Option<&PolicyRule> {
        self.count(self.tables.rule(index))
    }
}

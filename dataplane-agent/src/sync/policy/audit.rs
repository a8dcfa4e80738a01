//! The tables as they should be found, row by row.

use std::{collections::HashMap, hash::Hash};

use dataplane_common::policy::PolicyRule;

use super::programmed::Programmed;
use crate::{compile::policy::classes::Place, store::policy::PolicyRows};

impl Programmed {
    /// Rows that are not as they were written. What no row leads to may hold anything.
    pub fn differing(&self, found: &PolicyRows) -> usize {
        let PolicyRows {
            peers,
            cidrs,
            sets,
            peer_rules,
            port_rules,
            bits,
            rules,
            pods,
            revision,
        } = found;
        let peers = peers.iter().map(|(addr, class)| (Place::Addr(*addr), *class));
        let cidrs = cidrs.iter().map(|(range, class)| (Place::Range(*range), *class));
        let places = self.places.iter().map(|(place, class)| (*place, *class));
        let of_classes = self.classes.iter().flat_map(|(class, of)| {
            let rows = of.rows.iter();
            rows.map(move |(set, bits)| ((*set, *class), *bits))
        });
        let peer_rules = peer_rules.iter().map(|(key, bits)| ((key.set, key.class), *bits));
        let of_sets = self.sets.values().flat_map(|set| &set.ports);
        let of_sets = of_sets.map(|(key, bits)| (*key, *bits));
        let port_rules = port_rules
            .iter()
            .map(|(length, key, bits)| ((*length, *key), *bits));
        let headers: HashMap<u32, _> = sets.iter().copied().collect();
        let headers = self
            .sets
            .iter()
            .filter(|(id, set)| headers.get(id).copied().unwrap_or_default() != set.header);
        usize::from(*revision != self.revision)
            + differing(
                self.pods.iter().map(|(ifindex, row)| (*ifindex, *row)),
                pods.iter().copied(),
            )
            + differing(places, peers.chain(cidrs))
            + differing(of_classes, peer_rules)
            + differing(of_sets, port_rules)
            + headers.count()
            + self.bits.differing(bits)
            + self.differing_rules(rules)
    }

    fn differing_rules(&self, found: &[(u32, PolicyRule)]) -> usize {
        let found: HashMap<u32, PolicyRule> = found.iter().copied().collect();
        let of_sets = self.sets.values().filter_map(|set| {
            let rules = &set.made.as_ref()?.key.rules;
            Some(rules.iter().zip(set.header.rules..))
        });
        let differs = of_sets.flatten().filter(|(rule, index)| {
            let expected = self.names.row(rule);
            found.get(index).copied().unwrap_or_default() != expected
        });
        differs.count()
    }
}

/// Keys with another value, or on one side alone.
fn differing<K: Eq + Hash, V: PartialEq>(
    expected: impl Iterator<Item = (K, V)>,
    found: impl Iterator<Item = (K, V)>,
) -> usize {
    let mut found: HashMap<K, V> = found.collect();
    let missing = expected
        .filter(|(key, value)| found.remove(key).as_ref() != Some(value))
        .count();
    missing + found.len()
}

//! What an earlier process left in the tables. It stays in force until pods are led away from it; where it says what is
//! compiled, it is adopted, so that a start without news writes nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use dataplane_common::policy::{CLASS_ANY, PolicyRule, SET_NONE};

use super::{
    PolicySyncer, Unused, Waiting, Wanted, build,
    programmed::{Programmed, SET_CLOSED, sets_of},
};
use crate::{
    compile::policy::{
        PolicyCompiler,
        classes::{ClassId, Place},
        sets::SetId,
        tables::port_key,
    },
    store::{Store, StoreError, policy::PolicyRows},
    sync::arena::Slice,
};

impl PolicySyncer {
    /// Reads what the tables hold already.
    pub fn restore(store: &dyn Store) -> Result<Self, StoreError> {
        Ok(Self::of(store, store.policy_rows()?))
    }

    fn of(store: &dyn Store, rows: PolicyRows) -> Self {
        let programmed = programmed(store, &rows);
        let last_revision = programmed.revision;
        Self {
            programmed,
            found: Some(rows.rules.into_iter().collect()),
            bound: BTreeMap::new(),
            is_on: false,
            touched: BTreeSet::new(),
            leaving: BTreeSet::new(),
            is_stale: false,
            last_revision,
            unused: Unused::None,
            waiting: Waiting::default(),
        }
    }

    /// Compares the tables with what we believe is in them, for the case that somebody else wrote there. The next run makes
    /// good what differs; returns how much that is.
    pub fn audit(&mut self, store: &dyn Store) -> Result<usize, StoreError> {
        let found = store.policy_rows()?;
        let differing = self.programmed.differing(&found);
        if differing > 0 {
            let totals = std::mem::take(&mut self.programmed.totals);
            *self = Self {
                bound: std::mem::take(&mut self.bound),
                is_stale: true,
                last_revision: self.last_revision.max(found.revision),
                unused: self.unused,
                ..Self::of(store, found)
            };
            self.programmed.totals = totals;
        }
        Ok(differing)
    }

    /// Recognises classes and sets that say what is compiled.
    pub(super) fn adopt(
        &mut self,
        compiler: &PolicyCompiler,
        wanted: &Wanted,
        needed: &BTreeSet<SetId>,
        rules: &BTreeMap<u32, PolicyRule>,
    ) {
        let mut votes: HashMap<u32, BTreeMap<ClassId, usize>> = HashMap::new();
        for (place, class) in &self.programmed.places {
            if let Some(label) = compiler.classes().of(*place) {
                *votes.entry(*class).or_default().entry(label).or_default() += 1;
            }
        }
        for (class, labels) in votes {
            let most = labels.into_iter().max_by_key(|(_, votes)| *votes);
            if let Some((label, _)) = most.filter(|_| class != CLASS_ANY) {
                self.programmed.label(class, label);
            }
        }
        let mut pairs = Vec::new();
        for (ifindex, sets) in wanted {
            if let Some(row) = self.programmed.pods.get(ifindex) {
                let of_pod = sets.iter().copied().zip(sets_of(row));
                pairs.extend(of_pod.filter(|(set, id)| *set != SET_NONE && *id > SET_CLOSED));
            }
        }
        for (set, id) in pairs {
            if !self.programmed.images.contains_key(&set) {
                self.adopt_set(compiler, set, id, rules);
            }
        }
        // Those of pods that have no interface yet.
        for set in needed {
            if !self.programmed.images.contains_key(set) {
                let old: Vec<u32> = self.programmed.old.iter().copied().collect();
                old.into_iter()
                    .find(|id| self.adopt_set(compiler, *set, *id, rules));
            }
        }
    }

    /// Adopts an old set if it says what a compiled one does.
    fn adopt_set(
        &mut self,
        compiler: &PolicyCompiler,
        set: SetId,
        id: u32,
        rules: &BTreeMap<u32, PolicyRule>,
    ) -> bool {
        let adopts = self.programmed.old.contains(&id) && self.is_image(compiler, set, id, rules);
        if adopts {
            self.programmed.old.remove(&id);
            self.programmed.images.insert(set, id);
            self.adopt_rules(compiler, set, id);
        }
        adopts
    }

    /// Whether a set that was found says what a compiled one does.
    fn is_image(
        &self,
        compiler: &PolicyCompiler,
        set: SetId,
        id: u32,
        rules: &BTreeMap<u32, PolicyRule>,
    ) -> bool {
        let programmed = &self.programmed;
        let (Some(made), Some(found)) = (compiler.sets().get(set), programmed.sets.get(&id)) else {
            return false;
        };
        let number = made.key.rules.len() as u32;
        if found.rules.map_or(0, |slice| slice.len) != number
            || found.header != build::header(made, found.header.rules, found.header.any_peer)
            || programmed.bits.get(found.header.any_peer) != made.any_peer
            || found.ports.len() != made.by_port.len()
        {
            return false;
        }
        let has_rules = made.key.rules.iter().zip(found.header.rules..).all(|(rule, at)| {
            let expected = programmed.names.row(rule);
            rules.get(&at).copied().unwrap_or_default() == expected
        });
        let has_ports = || {
            made.by_port.iter().all(|(prefix, content)| {
                let bits = found.ports.get(&(prefix.length, port_key(id, *prefix)));
                bits.is_some_and(|bits| programmed.bits.get(*bits) == *content)
            })
        };
        let labelled = || {
            programmed
                .classes
                .iter()
                .filter_map(|(class, of)| Some((*class, of.label?)))
        };
        let has_rows =
            || labelled().all(|(class, label)| programmed.row(id, class) == build::row(compiler, set, label));
        has_rules && has_ports() && has_rows()
    }

    fn adopt_rules(&mut self, compiler: &PolicyCompiler, set: SetId, id: u32) {
        let programmed = &mut self.programmed;
        let (Some(made), Some(found)) = (compiler.sets().get(set), programmed.sets.get_mut(&id)) else {
            return;
        };
        for rule in &made.key.rules {
            let number = programmed.names.number(&rule.policy);
            if found.policies.insert(number) {
                programmed.names.hold(number, &rule.policy);
            }
        }
        found.made = Some(made.clone());
    }
}

/// Every row, with everything that a row leads to. No class is labelled, and every set is an old one.
fn programmed(store: &dyn Store, rows: &PolicyRows) -> Programmed {
    let mut programmed = Programmed::new(store.limits().policy);
    let content: HashMap<u32, _> = rows.bits.iter().copied().collect();
    let content = |bits: u32| content.get(&bits).copied().unwrap_or_default();
    programmed.pods = rows.pods.iter().copied().collect();
    programmed.revision = rows.revision;
    let is_set = |id: u32| id > SET_CLOSED;
    let of_rows = rows.peer_rules.iter().map(|(key, _)| key.set);
    let of_ports = rows.port_rules.iter().map(|(_, key, _)| key.set);
    let of_headers = rows.sets.iter().map(|(id, _)| *id);
    // A set without rules has no row but those of its pods.
    let of_pods = rows.pods.iter().flat_map(|(_, row)| sets_of(row));
    let ids = of_rows.chain(of_ports).chain(of_headers).chain(of_pods);
    for id in ids.filter(|id| is_set(*id)) {
        programmed.sets.entry(id).or_default();
        programmed.old.insert(id);
    }
    for (id, header) in &rows.sets {
        if let Some(set) = programmed.sets.get_mut(id) {
            set.header = *header;
            programmed.bits.found(header.any_peer, content(header.any_peer));
        }
    }
    for (length, key, bits) in &rows.port_rules {
        if let Some(set) = programmed.sets.get_mut(&key.set) {
            set.ports.insert((*length, *key), *bits);
            programmed.bits.found(*bits, content(*bits));
        }
    }
    for (addr, class) in &rows.peers {
        programmed.add_place(Place::Addr(*addr), *class);
    }
    for (range, class) in &rows.cidrs {
        programmed.add_place(Place::Range(*range), *class);
    }
    for (key, bits) in rows.peer_rules.iter().filter(|(key, _)| is_set(key.set)) {
        programmed.add_class(key.class);
        programmed.bits.found(*bits, content(*bits));
        programmed.add_row(key.set, key.class, *bits);
    }
    let ids: Vec<u32> = programmed.sets.keys().copied().collect();
    for id in ids {
        reserve_rules(&mut programmed, id);
    }
    programmed
}

/// Takes the room of a set's rules. Each has a port, so the highest of them is the last rule.
fn reserve_rules(programmed: &mut Programmed, id: u32) {
    let Some(set) = programmed.sets.get(&id) else {
        return;
    };
    let last = |bits: &u32| programmed.bits.get(*bits).last();
    let last = set.ports.values().filter_map(last).max();
    let slice = last.map(|last| Slice {
        start: set.header.rules,
        len: last + 1,
    });
    let slice = slice.filter(|slice| programmed.rules.reserve(*slice));
    if let Some(set) = programmed.sets.get_mut(&id) {
        set.rules = slice;
    }
}

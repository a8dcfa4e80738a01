//! Policy sets: the rules of one direction of a pod in the order of precedence, as bits by peer and by port.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use dataplane_common::policy::{RuleBits, SET_NONE, SET_RULES};

use super::{
    atoms::AtomId,
    ports::{self, PortPrefix, PortSpan},
};
use crate::model::{
    ObjectRef,
    policy::{Action, Direction, Tier},
};

pub type SetId = u32;

/// What a set is made from. Pods for whom it is equal share the set.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SetKey {
    pub direction: Direction,
    /// A `NetworkPolicy` selects the pod, or its policies are more than a set holds.
    pub deny_by_default: bool,
    /// The `NetworkPolicy`s that select the pod, to whom it is put down what no rule decides. In the order of precedence.
    pub isolated_by: Vec<ObjectRef>,
    pub rules: Vec<ResolvedRule>,
}

/// A rule with its peers and ports as they are for one pod. Neither list is empty.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ResolvedRule {
    pub policy: ObjectRef,
    /// Its place in the policy's list.
    pub place: u32,
    pub tier: Tier,
    pub action: Action,
    /// `None`: every peer. Sorted.
    pub peers: Option<Arc<[AtomId]>>,
    /// `None`: every port and protocol. Sorted.
    pub ports: Option<Arc<[PortSpan]>>,
}

impl SetKey {
    /// Leaves out what can never decide: of equal rules of a tier all but the first. False when what is left is more than
    /// a set holds; then it denies everything.
    pub fn settle(&mut self) -> bool {
        let mut seen = HashSet::new();
        let rules = std::mem::take(&mut self.rules);
        let kept = rules
            .into_iter()
            .filter(|rule| seen.insert((rule.tier, rule.peers.clone(), rule.ports.clone())));
        self.rules = kept.collect();
        let fits = self.rules.len() <= SET_RULES as usize;
        if !fits {
            self.rules.clear();
            self.deny_by_default = true;
        }
        fits
    }

    /// Every policy has nothing to say: all is allowed.
    pub fn is_open(&self) -> bool {
        self.rules.is_empty() && !self.deny_by_default
    }

    pub fn atoms(&self) -> BTreeSet<AtomId> {
        let peers = self.rules.iter().filter_map(|rule| rule.peers.as_deref());
        peers.flatten().copied().collect()
    }
}

/// A set, ready for the tables. It never changes.
#[derive(Debug)]
pub struct PolicySet {
    pub key: SetKey,
    pub admin_rules: u16,
    /// Rules without peers.
    pub any_peer: RuleBits,
    /// Rules that an atom satisfies.
    pub by_atom: BTreeMap<AtomId, RuleBits>,
    pub by_port: BTreeMap<PortPrefix, RuleBits>,
}

impl PolicySet {
    pub fn new(key: SetKey) -> Self {
        let mut any_peer = RuleBits::default();
        let mut by_atom: BTreeMap<AtomId, RuleBits> = BTreeMap::new();
        let numbered = || (0..).zip(&key.rules);
        for (number, rule) in numbered() {
            match &rule.peers {
                None => any_peer.insert(number),
                Some(peers) => {
                    for atom in peers.iter() {
                        by_atom.entry(*atom).or_default().insert(number);
                    }
                }
            }
        }
        let by_port = ports::rows(numbered().map(|(number, rule)| (number, rule.ports.as_deref())));
        let admin = key.rules.iter().filter(|rule| rule.tier == Tier::Admin);
        let admin_rules = admin.count() as u16;
        Self {
            key,
            admin_rules,
            any_peer,
            by_atom,
            by_port,
        }
    }

    /// The rules that a class with these atoms satisfies.
    pub fn by_class(&self, atoms: &[AtomId]) -> RuleBits {
        let mut bits = self.any_peer;
        for atom in atoms {
            self.by_atom
                .get(atom)
                .into_iter()
                .for_each(|more| bits.extend(more));
        }
        bits
    }
}

/// All sets. One that no pod uses any more is kept until [`Sets::drop_unused`].
#[derive(Debug, Default)]
pub struct Sets {
    ids: HashMap<SetKey, SetId>,
    /// With the number of its users.
    by_id: BTreeMap<SetId, (Arc<PolicySet>, usize)>,
    with_atom: HashMap<AtomId, BTreeSet<SetId>>,
    unused: BTreeSet<SetId>,
    last: SetId,
}

impl Sets {
    pub fn iter(&self) -> impl Iterator<Item = (SetId, &Arc<PolicySet>)> {
        self.by_id.iter().map(|(id, (set, _))| (*id, set))
    }

    pub fn get(&self, id: SetId) -> Option<&Arc<PolicySet>> {
        self.by_id.get(&id).map(|(set, _)| set)
    }

    /// The sets that ask for an atom.
    pub fn with_atom(&self, atom: AtomId) -> impl Iterator<Item = SetId> {
        self.with_atom.get(&atom).into_iter().flatten().copied()
    }

    /// The set made from this, with one user more, and whether it is new.
    pub fn acquire(&mut self, key: SetKey) -> (SetId, bool) {
        if key.is_open() {
            return (SET_NONE, false);
        }
        if let Some(id) = self.ids.get(&key).copied() {
            self.retain(id);
            return (id, false);
        }
        self.last = if self.last == SetId::MAX {
            SET_NONE + 1
        } else {
            self.last + 1
        };
        self.ids.insert(key.clone(), self.last);
        for atom in key.atoms() {
            self.with_atom.entry(atom).or_default().insert(self.last);
        }
        self.by_id.insert(self.last, (Arc::new(PolicySet::new(key)), 1));
        (self.last, true)
    }

    pub fn retain(&mut self, id: SetId) {
        if let Some((_, users)) = self.by_id.get_mut(&id) {
            *users += 1;
            self.unused.remove(&id);
        }
    }

    pub fn release(&mut self, id: SetId) {
        if let Some((_, users)) = self.by_id.get_mut(&id) {
            *users -= 1;
            if *users == 0 {
                self.unused.insert(id);
            }
        }
    }

    /// Drops the sets that nobody uses.
    pub fn drop_unused(&mut self) -> BTreeMap<SetId, Arc<PolicySet>> {
        let unused = std::mem::take(&mut self.unused);
        let dropped = unused.into_iter().filter_map(|id| {
            let (set, _) = self.by_id.remove(&id)?;
            self.ids.remove(&set.key);
            for atom in set.key.atoms() {
                if let Some(sets) = self.with_atom.get_mut(&atom) {
                    sets.remove(&id);
                    if sets.is_empty() {
                        self.with_atom.remove(&atom);
                    }
                }
            }
            Some((id, set))
        });
        dropped.collect()
    }
}

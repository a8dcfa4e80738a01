//! What the tables of policies hold, as far as we wrote it or found it. A change is recorded when its write has succeeded.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use dataplane_common::policy::{
    CLASS_ANY, PeerRulesKey, PodPolicy, PolicySet, PortRulesKey, RuleBits, SET_NONE,
};
use ipnet::IpNet;

use super::{bits::Bits, hits::HitsByDecider, names::Names};
use crate::{
    compile::policy::{
        atoms::addr_bits,
        classes::{ClassId, Place},
        sets::{self, SetId},
    },
    store::{Store, StoreError, policy::PolicyLimits},
    sync::arena::{Arena, Slice},
};

/// The set that denies everything, for pods whose policies could not be written: it has no row anywhere.
pub const SET_CLOSED: u32 = SET_NONE + 1;

/// A set of the tables.
#[derive(Debug, Default)]
pub struct Set {
    pub header: PolicySet,
    /// Of `RULES`.
    pub rules: Option<Slice>,
    /// `RULE_BITS` by prefix of `PORT_RULES`.
    pub ports: BTreeMap<(u32, PortRulesKey), u32>,
    /// The classes for which it has a row of `PEER_RULES`.
    pub classes: BTreeSet<u32>,
    /// The numbers of its policies.
    pub policies: BTreeSet<u32>,
    /// What it was compiled from. `None`: an earlier process knew.
    pub made: Option<Arc<sets::PolicySet>>,
}

/// A class of the tables.
#[derive(Debug, Default)]
pub struct Class {
    /// The compiler's class that it is to all [images](Programmed::images). What other sets make of it is its own. `None`:
    /// an earlier process knew.
    pub label: Option<ClassId>,
    pub members: BTreeSet<Place>,
    /// `RULE_BITS` by set: its rows of `PEER_RULES`.
    pub rows: BTreeMap<u32, u32>,
}

/// The programmed state. Ids are those of the tables unless said otherwise.
#[derive(Debug)]
pub struct Programmed {
    limits: PolicyLimits,
    /// By ifindex.
    pub pods: BTreeMap<u32, PodPolicy>,
    pub revision: u32,
    pub places: BTreeMap<Place, u32>,
    /// How many ranges of each length are among the places, IPv4's first.
    lengths: [BTreeMap<u8, usize>; 2],
    pub classes: BTreeMap<u32, Class>,
    /// Classes without members, which nobody finds.
    pub empty: BTreeSet<u32>,
    /// Those of them that have been so since the wait for a grace period began.
    pub waiting: BTreeSet<u32>,
    /// By the compiler's class.
    by_label: HashMap<ClassId, BTreeSet<u32>>,
    last_class: u32,
    pub sets: BTreeMap<u32, Set>,
    /// The compiler's sets that pods are to have, and what they are in the tables.
    pub images: HashMap<SetId, u32>,
    /// Sets that are no image: pods are led away from them, or have been.
    pub old: BTreeSet<u32>,
    pub bits: Bits,
    pub rules: Arena,
    pub names: Names,
    /// What sets have decided that are gone.
    pub totals: HitsByDecider,
    pub writes: usize,
}

impl Programmed {
    pub fn new(limits: PolicyLimits) -> Self {
        let any = Class {
            label: Some(CLASS_ANY),
            ..Class::default()
        };
        Self {
            limits,
            pods: BTreeMap::new(),
            revision: 0,
            places: BTreeMap::new(),
            lengths: Default::default(),
            classes: [(CLASS_ANY, any)].into(),
            empty: BTreeSet::new(),
            waiting: BTreeSet::new(),
            by_label: HashMap::new(),
            last_class: CLASS_ANY,
            sets: BTreeMap::new(),
            images: HashMap::new(),
            old: BTreeSet::new(),
            bits: Bits::new(limits.bits),
            rules: Arena::new(limits.rules),
            names: Names::default(),
            totals: HitsByDecider::new(),
            writes: 0,
        }
    }

    /// A class that was found, or a new one.
    pub fn add_class(&mut self, id: u32) -> &mut Class {
        self.last_class = self.last_class.max(id);
        self.classes.entry(id).or_insert_with(|| {
            self.empty.insert(id);
            Class::default()
        })
    }

    /// A number that no class has.
    pub fn free_class(&self) -> u32 {
        let mut id = self.last_class;
        loop {
            id = id.wrapping_add(1);
            if id != CLASS_ANY && !self.classes.contains_key(&id) {
                return id;
            }
        }
    }

    /// A number that no set has.
    pub fn free_set(&self) -> Result<u32, StoreError> {
        let mut ids = SET_CLOSED + 1..self.limits.sets;
        ids.find(|id| !self.sets.contains_key(id))
            .ok_or(StoreError::Full {
                table: "POLICY_SETS",
                limit: self.limits.sets,
            })
    }

    pub fn free_rules(&mut self, len: u32) -> Result<Option<Slice>, StoreError> {
        if len == 0 {
            return Ok(None);
        }
        let slice = self.rules.allocate(len);
        slice.map(Some).ok_or(StoreError::Full {
            table: "RULES",
            limit: self.limits.rules,
        })
    }

    /// Says what a class is to the images.
    pub fn label(&mut self, id: u32, label: ClassId) {
        if let Some(class) = self.classes.get_mut(&id) {
            if let Some(before) = class.label.replace(label) {
                self.forget_label(before, id);
            }
            self.by_label.entry(label).or_default().insert(id);
        }
    }

    fn forget_label(&mut self, label: ClassId, id: u32) {
        if let Some(classes) = self.by_label.get_mut(&label) {
            classes.remove(&id);
            if classes.is_empty() {
                self.by_label.remove(&label);
            }
        }
    }

    pub fn with_label(&self, label: ClassId) -> impl Iterator<Item = u32> {
        self.by_label.get(&label).into_iter().flatten().copied()
    }

    /// The compiler's classes that are several in the tables.
    pub fn split_labels(&self) -> Vec<ClassId> {
        let split = self.by_label.iter().filter(|(_, classes)| classes.len() > 1);
        split.map(|(label, _)| *label).collect()
    }

    /// The class that the addresses of a place find: of a range, those that are in no longer one.
    pub fn resolve(&self, place: Place) -> u32 {
        let class = self.places.get(&place).copied();
        class.unwrap_or_else(|| self.resolve_beneath(place))
    }

    /// The class that they would find without their own row.
    pub fn resolve_beneath(&self, place: Place) -> u32 {
        let family = &self.lengths[usize::from(is_v6(place))];
        let find = |range| self.places.get(&Place::Range(range)).copied();
        let mut beneath = ranges_beneath(place, family.keys().rev().copied());
        beneath.find_map(find).unwrap_or(CLASS_ANY)
    }

    /// The rules of a set that a class satisfies.
    pub fn row(&self, set: u32, class: u32) -> RuleBits {
        let row = self.classes.get(&class).and_then(|class| class.rows.get(&set));
        let any = || self.sets.get(&set).map_or(0, |set| set.header.any_peer);
        self.bits.get(row.copied().unwrap_or_else(any))
    }

    /// What a class is to the sets that are no image.
    pub fn old_rows(&self, class: u32) -> BTreeMap<u32, u32> {
        let rows = self.classes.get(&class).map(|class| &class.rows);
        let rows = rows.filter(|_| !self.old.is_empty()).into_iter().flatten();
        rows.filter(|(set, _)| self.old.contains(set))
            .map(|(set, bits)| (*set, *bits))
            .collect()
    }

    /// Whether two classes are the same to every set.
    pub fn are_alike(&self, a: u32, b: u32) -> bool {
        let rows = |id: u32| self.classes.get(&id).map(|class| &class.rows);
        a == b || rows(a) == rows(b)
    }

    pub fn put_row(
        &mut self,
        store: &mut dyn Store,
        set: u32,
        class: u32,
        content: &RuleBits,
    ) -> Result<(), StoreError> {
        let bits = self.bits.hold(store, content)?;
        let outcome = store.put_peer_rules(PeerRulesKey { set, class }, bits);
        if outcome.is_err() {
            self.bits.release(bits);
        } else {
            self.writes += 1;
            self.add_row(set, class, bits);
        }
        outcome
    }

    /// Records a row whose bits are held.
    pub fn add_row(&mut self, set: u32, class: u32, bits: u32) {
        if let Some(of_class) = self.classes.get_mut(&class)
            && let Some(before) = of_class.rows.insert(set, bits)
        {
            self.bits.release(before);
        }
        if let Some(set) = self.sets.get_mut(&set) {
            set.classes.insert(class);
        }
    }

    fn delete_row(&mut self, store: &mut dyn Store, set: u32, class: u32) -> Result<(), StoreError> {
        store.delete_peer_rules(PeerRulesKey { set, class })?;
        self.writes += 1;
        let row = self
            .classes
            .get_mut(&class)
            .and_then(|class| class.rows.remove(&set));
        if let Some(bits) = row {
            self.bits.release(bits);
        }
        if let Some(set) = self.sets.get_mut(&set) {
            set.classes.remove(&class);
        }
        Ok(())
    }

    pub fn put_place(&mut self, store: &mut dyn Store, place: Place, class: u32) -> Result<(), StoreError> {
        match place {
            Place::Addr(addr) => store.put_peer(addr, class)?,
            Place::Range(range) => store.put_cidr(range, class)?,
        }
        self.writes += 1;
        self.add_place(place, class);
        Ok(())
    }

    /// Records a place.
    pub fn add_place(&mut self, place: Place, class: u32) {
        match self.places.insert(place, class) {
            Some(before) => self.leave(place, before),
            None => {
                if let Place::Range(range) = place {
                    let lengths = &mut self.lengths[usize::from(is_v6(place))];
                    *lengths.entry(range.prefix_len()).or_default() += 1;
                }
            }
        }
        self.add_class(class).members.insert(place);
        self.empty.remove(&class);
        self.waiting.remove(&class);
    }

    pub fn delete_place(&mut self, store: &mut dyn Store, place: Place) -> Result<(), StoreError> {
        match place {
            Place::Addr(addr) => store.delete_peer(addr)?,
            Place::Range(range) => store.delete_cidr(range)?,
        }
        self.writes += 1;
        if let Some(class) = self.places.remove(&place) {
            self.leave(place, class);
        }
        if let Place::Range(range) = place {
            let lengths = &mut self.lengths[usize::from(is_v6(place))];
            if let Some(count) = lengths.get_mut(&range.prefix_len()) {
                *count -= 1;
                if *count == 0 {
                    lengths.remove(&range.prefix_len());
                }
            }
        }
        Ok(())
    }

    fn leave(&mut self, place: Place, id: u32) {
        if let Some(class) = self.classes.get_mut(&id) {
            class.members.remove(&place);
            if class.members.is_empty() && id != CLASS_ANY {
                self.empty.insert(id);
            }
        }
    }

    /// Removes a class that nobody finds, with its rows.
    pub fn remove_class(&mut self, store: &mut dyn Store, id: u32) -> Result<(), StoreError> {
        let sets: Vec<u32> = self
            .classes
            .get(&id)
            .map_or_else(Vec::new, |class| class.rows.keys().copied().collect());
        for set in sets {
            self.delete_row(store, set, id)?;
        }
        self.empty.remove(&id);
        self.waiting.remove(&id);
        if let Some(Class {
            label: Some(label), ..
        }) = self.classes.remove(&id)
        {
            self.forget_label(label, id);
        }
        Ok(())
    }

    /// Removes a set that no pod has, with its rows.
    pub fn remove_set(&mut self, store: &mut dyn Store, id: u32) -> Result<(), StoreError> {
        let Some(set) = self.sets.get(&id) else {
            return Ok(());
        };
        let classes: Vec<u32> = set.classes.iter().copied().collect();
        let ports: Vec<(u32, PortRulesKey)> = set.ports.keys().copied().collect();
        for class in classes {
            self.delete_row(store, id, class)?;
        }
        for (length, key) in ports {
            store.delete_port_rules(length, key)?;
            self.writes += 1;
            let row = self
                .sets
                .get_mut(&id)
                .and_then(|set| set.ports.remove(&(length, key)));
            if let Some(bits) = row {
                self.bits.release(bits);
            }
        }
        self.take_hits(store, id)?;
        store.write_set(id, &PolicySet::default())?;
        self.writes += 1;
        if let Some(set) = self.sets.remove(&id) {
            self.bits.release(set.header.any_peer);
            set.rules.into_iter().for_each(|slice| self.rules.free(slice));
            self.names.release(&set.policies);
        }
        self.old.remove(&id);
        Ok(())
    }

    pub fn put_pod(
        &mut self,
        store: &mut dyn Store,
        ifindex: u32,
        policy: PodPolicy,
    ) -> Result<(), StoreError> {
        store.put_pod_policy(ifindex, &policy)?;
        self.writes += 1;
        self.pods.insert(ifindex, policy);
        Ok(())
    }

    pub fn delete_pod(&mut self, store: &mut dyn Store, ifindex: u32) -> Result<(), StoreError> {
        store.delete_pod_policy(ifindex)?;
        self.writes += 1;
        self.pods.remove(&ifindex);
        Ok(())
    }

    pub fn write_revision(&mut self, store: &mut dyn Store, revision: u32) -> Result<(), StoreError> {
        store.write_policy_revision(revision)?;
        self.writes += 1;
        self.revision = revision;
        Ok(())
    }

    /// Sets that are no image and that no pod has.
    pub fn unused_sets(&self) -> Vec<u32> {
        let used: BTreeSet<u32> = self.pods.values().flat_map(sets_of).collect();
        self.old.difference(&used).copied().collect()
    }

    /// A set that is an image no more.
    pub fn retire(&mut self, set: SetId) {
        self.old.extend(self.images.remove(&set));
    }
}

/// The four sets of a pod: ingress and egress, and both as they would be if no policy were a dry run.
pub fn sets_of(policy: &PodPolicy) -> [u32; 4] {
    let PodPolicy {
        ingress,
        egress,
        audit_ingress,
        audit_egress,
    } = *policy;
    [ingress, egress, audit_ingress, audit_egress]
}

pub fn is_v6(place: Place) -> bool {
    match place {
        Place::Addr(addr) => addr.is_ipv6(),
        Place::Range(range) => range.addr().is_ipv6(),
    }
}

/// The ranges of these lengths that hold a place and more.
pub fn ranges_beneath(place: Place, lengths: impl Iterator<Item = u8>) -> impl Iterator<Item = IpNet> {
    let (addr, end): (IpAddr, u8) = match place {
        Place::Addr(addr) => (addr, addr_bits(addr) + 1),
        Place::Range(range) => (range.network(), range.prefix_len()),
    };
    let lengths = lengths.filter(move |length| *length < end);
    lengths.filter_map(move |length| Some(IpNet::new(addr, length).ok()?.trunc()))
}

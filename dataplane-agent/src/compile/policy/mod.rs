//! Policies to policy sets and peer classes: pure, and by what an event touches.
//!
//! A pod of this node gets a *set* for each direction ([`sets`]): the rules of the policies that select it. The distinct
//! peers of those rules are *atoms* ([`atoms`]), and addresses that satisfy the same atoms are one *class* ([`classes`]). The
//! tables hold, for each set and class, the rules that the class satisfies, and for each set and port those that the port
//! satisfies ([`ports`]); what judges by them is [`dataplane_common::policy`].
//!
//! Ids keep their meaning while they are in use, so [`Changes`] can be written in the order of their fields, and at every moment
//! each verdict is that of before or that of after. [`PolicyCompiler::drop_unused`] lets go of what no pod uses any more; what
//! it moves is moved between classes that are the same to every set left, so it comes after the pods have left the old sets.

pub mod atoms;
pub mod classes;
pub mod named;
pub mod owners;
pub mod ports;
pub mod resolve;
pub mod sets;
pub mod tables;

#[cfg(test)]
pub(crate) mod random;
#[cfg(test)]
pub(crate) mod reference;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use dataplane_common::policy::{RuleBits, SET_NONE};
use ipnet::IpNet;

use atoms::{Atom, AtomId, Atoms};
use classes::{ClassId, Classes, News, Place};
use named::{Questions, is_peer};
use owners::Owners;
use sets::{SetId, Sets};

use crate::model::{
    Index, Name, ObjectRef, Pod, PolicyDirty, Problem,
    policy::{Direction, NamespaceSet, Peer},
};

/// Whose sets are compiled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subjects {
    /// The Pods of a node.
    Node(Arc<str>),
    These(BTreeSet<Name>),
}

/// A pod's sets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodPolicy {
    /// By [`Direction`]; [`SET_NONE`]: no policy has a say.
    pub sets: [SetId; 2],
    /// What they would be if no policy were a dry run; the same where none is.
    pub audit: [SetId; 2],
    /// The policies that have one, in the order of precedence.
    pub policies: [Vec<ObjectRef>; 2],
    pub problems: Vec<Problem>,
}

/// What an update has changed, in the order in which it is written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// New sets: header, rules and ports.
    pub sets: BTreeSet<SetId>,
    /// New rows of `PEER_RULES`; see [`PolicyCompiler::peer_rules`].
    pub peer_rules: BTreeSet<(SetId, ClassId)>,
    /// Places that have another class, or none.
    pub places: BTreeSet<Place>,
    /// Pods that have other sets or policies, or are not there any more.
    pub pods: BTreeSet<Name>,
    /// Classes that no place has any more: their rows go last.
    pub classes_gone: BTreeSet<ClassId>,
}

/// What is let go, in the order in which it is written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dropped {
    /// Places that have another class, or none.
    pub places: BTreeSet<Place>,
    /// These go with all their rows.
    pub sets: BTreeSet<SetId>,
    pub classes_gone: BTreeSet<ClassId>,
}

#[derive(Debug)]
pub struct PolicyCompiler {
    subjects: Subjects,
    atoms: Atoms,
    classes: Classes,
    sets: Sets,
    questions: Questions,
    pods: BTreeMap<Name, PodPolicy>,
    /// The pods that each policy selects.
    selected: HashMap<ObjectRef, BTreeSet<Name>>,
    owners: Owners,
    /// The ranges whose bounds matter, and to how many atoms.
    ranges: BTreeMap<IpNet, usize>,
}

impl PolicyCompiler {
    pub fn new(subjects: Subjects) -> Self {
        Self {
            subjects,
            atoms: Atoms::default(),
            classes: Classes::default(),
            sets: Sets::default(),
            questions: Questions::default(),
            pods: BTreeMap::new(),
            selected: HashMap::new(),
            owners: Owners::default(),
            ranges: BTreeMap::new(),
        }
    }

    /// Compiles what depends on a change.
    pub fn update(&mut self, index: &Index, dirty: &PolicyDirty) -> Changes {
        let PolicyDirty {
            policies,
            pods,
            namespaces,
            nodes,
        } = dirty;
        let mut subjects = BTreeSet::new();
        for name in nodes {
            self.node_changed(index, name);
        }
        let of_namespaces = namespaces.iter().flat_map(|name| index.pods_of(name.name()));
        let of_namespaces = of_namespaces.map(|pod| pod.name.clone());
        for name in pods.iter().cloned().chain(of_namespaces) {
            subjects.extend(self.peer_changed(index, &name));
            subjects.insert(name);
        }
        for key in policies {
            subjects.extend(self.selected.get(key).into_iter().flatten().cloned());
            if let Some(policy) = index.policies().get(key) {
                let candidates: Vec<&Pod> = match &policy.subject.namespaces {
                    NamespaceSet::One(namespace) => self.subjects_of(index, namespace).collect(),
                    NamespaceSet::Labelled(_) => self.all_subjects(index).collect(),
                };
                let selected = candidates.into_iter().filter(|pod| {
                    let namespace = index.namespace(pod.name.namespace());
                    policy.subject.matches(pod, namespace)
                });
                subjects.extend(selected.map(|pod| pod.name.clone()));
            }
        }
        let mut memo = resolve::Memo::default();
        let mut changed = BTreeSet::new();
        for name in subjects {
            if self.compile(index, &name, &mut memo) {
                changed.insert(name);
            }
        }
        let (made, sets) = memo.finish();
        for set in made {
            self.sets.release(set);
        }
        let News { moved, created, gone } = self.classes.take_news();
        let of_sets = sets
            .iter()
            .flat_map(|set| self.classes_of(*set).into_iter().map(|class| (*set, class)));
        let of_classes = created
            .into_iter()
            .flat_map(|class| self.sets_of(class).into_iter().map(move |set| (set, class)));
        Changes {
            peer_rules: of_sets.chain(of_classes).collect(),
            sets,
            places: moved,
            pods: changed,
            classes_gone: gone,
        }
    }

    /// Lets go of the sets that no pod uses.
    pub fn drop_unused(&mut self) -> Dropped {
        let sets = self.sets.drop_unused();
        for set in sets.values() {
            for id in set.key.atoms() {
                self.atoms.release(id);
            }
        }
        for (id, atom) in self.atoms.drop_unused() {
            self.classes.remove_atom(id);
            self.forget_ranges(&atom);
        }
        self.questions.drop_unused();
        let News { moved, gone, .. } = self.classes.take_news();
        Dropped {
            places: moved,
            sets: sets.into_keys().collect(),
            classes_gone: gone,
        }
    }

    /// The rules of a set that a class satisfies; `None`: those without peers, which needs no row.
    pub fn peer_rules(&self, set: SetId, class: ClassId) -> Option<RuleBits> {
        let set = self.sets.get(set)?;
        let bits = set.by_class(self.classes.atoms(class));
        (bits != set.any_peer).then_some(bits)
    }

    /// The classes for whom a set may have a row.
    pub fn classes_of(&self, set: SetId) -> BTreeSet<ClassId> {
        let atoms = self.sets.get(set).into_iter().flat_map(|set| set.by_atom.keys());
        atoms.flat_map(|atom| self.classes.with_atom(*atom)).collect()
    }

    /// The sets that may have a row for a class.
    pub fn sets_of(&self, class: ClassId) -> BTreeSet<SetId> {
        let atoms = self.classes.atoms(class).iter();
        atoms.flat_map(|atom| self.sets.with_atom(*atom)).collect()
    }

    pub fn pods(&self) -> &BTreeMap<Name, PodPolicy> {
        &self.pods
    }

    /// The policies that select Pods, with these.
    pub fn selected(&self) -> impl Iterator<Item = (&ObjectRef, &BTreeSet<Name>)> {
        self.selected.iter()
    }

    /// How many Pods a policy selects.
    pub fn count_selected(&self, policy: &ObjectRef) -> usize {
        self.selected.get(policy).map_or(0, BTreeSet::len)
    }

    /// The Pod that policies take an address for.
    pub fn pod_at(&self, addr: IpAddr) -> Option<&Name> {
        self.owners.pod_at(addr)
    }

    /// The policies that isolate a Pod in a direction, to whom it is put down what no rule decides. `audit`: as if none were a dry run.
    pub fn isolating(&self, pod: &Name, direction: Direction, audit: bool) -> &[ObjectRef] {
        let of_pod = self.pods.get(pod);
        let sets = of_pod.map(|of_pod| if audit { of_pod.audit } else { of_pod.sets });
        let set = sets.and_then(|sets| self.sets.get(sets[direction as usize]));
        set.map_or(&[], |set| &set.key.isolated_by)
    }

    pub fn classes(&self) -> &Classes {
        &self.classes
    }

    pub fn sets(&self) -> &Sets {
        &self.sets
    }

    fn is_subject(&self, pod: &Pod) -> bool {
        is_peer(pod)
            && match &self.subjects {
                Subjects::Node(node) => pod.node.as_deref() == Some(&**node),
                Subjects::These(pods) => pods.contains(&pod.name),
            }
    }

    /// The subjects that are known already; one that is not will be compiled because it has changed.
    fn all_subjects<'a>(&'a self, index: &'a Index) -> impl Iterator<Item = &'a Pod> {
        self.pods.keys().filter_map(|name| index.pod(name))
    }

    fn subjects_of<'a>(&'a self, index: &'a Index, namespace: &str) -> impl Iterator<Item = &'a Pod> {
        let first = Name::new(namespace, "");
        let namespace = first.namespace().to_owned();
        let names = self.pods.range(first..).map(|(name, _)| name);
        let names = names.take_while(move |name| name.namespace() == namespace);
        names.filter_map(|name| index.pod(name))
    }

    /// Compiles one pod; true when its sets are others than before.
    fn compile(&mut self, index: &Index, name: &Name, memo: &mut resolve::Memo) -> bool {
        let pod = index.pod(name).filter(|pod| self.is_subject(pod));
        let before = self.pods.remove(name);
        if pod.is_none() && before.is_none() {
            return false;
        }
        self.questions.forget(name);
        let now = pod.map(|pod| self.resolve(index, pod, memo));
        for key in before.iter().flat_map(|before| before.policies.iter().flatten()) {
            if let Some(pods) = self.selected.get_mut(key) {
                pods.remove(name);
                if pods.is_empty() {
                    self.selected.remove(key);
                }
            }
        }
        for key in now.iter().flat_map(|now| now.policies.iter().flatten()) {
            self.selected.entry(key.clone()).or_default().insert(name.clone());
        }
        for set in before
            .iter()
            .flat_map(|before| [before.sets, before.audit])
            .flatten()
        {
            self.sets.release(set);
        }
        let changed = before.as_ref() != now.as_ref();
        self.pods.extend(now.map(|now| (name.clone(), now)));
        changed
    }

    /// A Pod as a peer; returns the pods whose sets depend on the names of its ports.
    fn peer_changed(&mut self, index: &Index, name: &Name) -> BTreeSet<Name> {
        let pod = index.pod(name);
        for addr in self.owners.set_pod(name, pod) {
            self.classify(index, addr);
        }
        let pod = pod.map(|pod| (pod, index.namespace(pod.name.namespace())));
        self.questions.pod_changed(name, pod)
    }

    fn node_changed(&mut self, index: &Index, name: &Name) {
        for addr in self.owners.set_node(name, index.node_by_name(name)) {
            self.classify(index, addr);
        }
    }

    /// Says anew what an address satisfies.
    fn classify(&mut self, index: &Index, addr: IpAddr) {
        let (pod, node) = self.owners.at(index, addr);
        if pod.is_none() && node.is_none() {
            self.classes.remove(Place::Addr(addr));
            return;
        }
        let atoms = self.atoms.of_addr(addr, pod, node);
        self.classes.set(Place::Addr(addr), &atoms);
    }

    /// The atom's number; a new one becomes known to every class.
    fn intern(&mut self, index: &Index, atom: Atom) -> AtomId {
        if let Some(id) = self.atoms.id(&atom) {
            return id;
        }
        for range in atom.ranges() {
            let users = self.ranges.entry(range).or_default();
            *users += 1;
            if *users == 1 {
                let atoms = self.atoms.of_range(range);
                self.classes.set(Place::Range(range), &atoms);
            }
        }
        let places = self.places_of(index, &atom);
        let id = self.atoms.insert(atom);
        self.classes.add_atom(id, places);
        id
    }

    /// The places that satisfy an atom.
    fn places_of(&self, index: &Index, atom: &Atom) -> Vec<Place> {
        match &atom.peer {
            Some(Peer::Block(block)) => {
                let (network, last) = (block.range.network(), block.range.broadcast());
                let addrs = self.classes.between(Place::Addr(network), Place::Addr(last));
                let first = IpNet::new(network, 0).unwrap_or(block.range);
                let last = IpNet::new(last, atoms::addr_bits(last)).unwrap_or(block.range);
                let ranges = self.classes.between(Place::Range(first), Place::Range(last));
                let holds = |place: &Place| {
                    // Whose address it is matters to the names of its ports only.
                    let pod = match place {
                        Place::Addr(addr) if atom.port.is_some() => self.owners.at(index, *addr).0,
                        _ => None,
                    };
                    atom.holds(*place, pod, None)
                };
                addrs.chain(ranges).filter(holds).collect()
            }
            Some(Peer::Nodes(_)) => {
                let addrs = self.owners.node_addrs();
                let holds = |addr: &IpAddr| {
                    let (pod, node) = self.owners.at(index, *addr);
                    atom.holds(Place::Addr(*addr), pod, node)
                };
                addrs.filter(holds).map(Place::Addr).collect()
            }
            Some(Peer::Pods(pods)) => self.addrs_of(index.pods_in(&pods.namespaces), atom),
            None => self.addrs_of(index.pods(), atom),
        }
    }

    /// The addresses of those Pods, of namespaces that an atom is about, that satisfy it.
    fn addrs_of<'a>(&self, pods: impl Iterator<Item = &'a Pod>, atom: &Atom) -> Vec<Place> {
        let selected = pods.filter(|pod| atom.selects_in_namespace(pod));
        let owned = selected.flat_map(|pod| {
            let ips = pod.ips.iter().copied();
            ips.filter(|ip| self.owners.pod_at(*ip) == Some(&pod.name))
        });
        owned.map(Place::Addr).collect()
    }

    fn forget_ranges(&mut self, atom: &Atom) {
        for range in atom.ranges() {
            if let Some(users) = self.ranges.get_mut(&range) {
                *users -= 1;
                if *users == 0 {
                    self.ranges.remove(&range);
                    self.classes.remove(Place::Range(range));
                }
            }
        }
    }

    /// A pod's set for a direction.
    pub fn set_of(&self, pod: &Name, direction: Direction) -> SetId {
        self.pods
            .get(pod)
            .map_or(SET_NONE, |pod| pod.sets[direction as usize])
    }
}

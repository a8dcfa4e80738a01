//! Atoms: the distinct peers that the rules in force ask for. An address satisfies some of them, and those make its class.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;

use super::classes::Place;
use crate::model::{
    Namespace, Node, Pod, Protocol,
    policy::{NamespaceSet, Peer},
};

pub type AtomId = u32;

/// Something that a peer is or is not.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Atom {
    /// `None`: anybody.
    pub peer: Option<Peer>,
    /// It is a Pod, too, that calls a port so.
    pub port: Option<NamedPort>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamedPort {
    pub name: Arc<str>,
    pub proto: Protocol,
    pub port: u16,
}

impl NamedPort {
    fn is_of(&self, pod: &Pod) -> bool {
        let mut ports = pod.ports.iter();
        ports.any(|port| *port.name == *self.name && port.proto == self.proto && port.port == self.port)
    }
}

/// A Pod with its namespace, unless that is not known.
pub type PodAt<'a> = (&'a Pod, Option<&'a Namespace>);

impl Atom {
    /// Whether a place satisfies it, which is a range, or the address of a Pod or Node.
    pub fn holds(&self, place: Place, pod: Option<PodAt<'_>>, node: Option<&Node>) -> bool {
        match place {
            Place::Addr(addr) => self.is_satisfied_by(addr, pod, node),
            Place::Range(range) => holds_range(self, &range),
        }
    }

    /// Whether it is about a Pod, of a namespace that it is about.
    pub fn selects_in_namespace(&self, pod: &Pod) -> bool {
        let selected = match &self.peer {
            Some(Peer::Pods(pods)) => pods.pods.matches(&pod.labels),
            Some(Peer::Block(_) | Peer::Nodes(_)) => false,
            None => true,
        };
        selected && self.port.as_ref().is_none_or(|port| port.is_of(pod))
    }

    fn is_satisfied_by(&self, addr: IpAddr, pod: Option<PodAt<'_>>, node: Option<&Node>) -> bool {
        let named = |port: &NamedPort| pod.is_some_and(|(pod, _)| port.is_of(pod));
        let is_peer = |peer: &Peer| match peer {
            Peer::Pods(pods) => pod.is_some_and(|(pod, namespace)| pods.matches(pod, namespace)),
            Peer::Block(block) => block.contains(addr),
            Peer::Nodes(nodes) => node.is_some_and(|node| nodes.matches(&node.labels)),
        };
        self.peer.as_ref().is_none_or(is_peer) && self.port.as_ref().is_none_or(named)
    }

    /// The ranges whose bounds matter to it.
    pub fn ranges(&self) -> impl Iterator<Item = IpNet> {
        let block = match &self.peer {
            Some(Peer::Block(block)) => Some(block),
            _ => None,
        };
        let ranges = block.into_iter().flat_map(|block| {
            let except = block.except.iter().copied();
            std::iter::once(block.range).chain(except)
        });
        ranges.collect::<Vec<_>>().into_iter()
    }
}

/// All atoms in force, found by what they might be about.
#[derive(Debug, Default)]
pub struct Atoms {
    ids: HashMap<Atom, AtomId>,
    /// With the number of its users.
    by_id: BTreeMap<AtomId, (Atom, usize)>,
    last: AtomId,
    of_namespace: BTreeMap<Arc<str>, BTreeSet<AtomId>>,
    /// About ranges, by that.
    of_range: BTreeMap<IpNet, BTreeSet<AtomId>>,
    /// The same by the length of the range, IPv4's first.
    lengths: [BTreeMap<u8, BTreeSet<AtomId>>; 2],
    /// About Pods of labelled namespaces or of any.
    of_pods: BTreeSet<AtomId>,
    of_nodes: BTreeSet<AtomId>,
    unused: BTreeSet<AtomId>,
}

impl Atoms {
    pub fn id(&self, atom: &Atom) -> Option<AtomId> {
        self.ids.get(atom).copied()
    }

    pub fn get(&self, id: AtomId) -> Option<&Atom> {
        self.by_id.get(&id).map(|(atom, _)| atom)
    }

    /// Adds an atom that is not there yet, used by nobody.
    pub fn insert(&mut self, atom: Atom) -> AtomId {
        self.last += 1;
        let id = self.last;
        match &atom.peer {
            Some(Peer::Block(block)) => {
                self.of_range.entry(block.range).or_default().insert(id);
                let lengths = &mut self.lengths[family(&block.range)];
                lengths.entry(block.range.prefix_len()).or_default().insert(id);
            }
            Some(Peer::Pods(pods)) => match &pods.namespaces {
                NamespaceSet::One(namespace) => {
                    self.of_namespace.entry(namespace.clone()).or_default().insert(id);
                }
                NamespaceSet::Labelled(_) => {
                    self.of_pods.insert(id);
                }
            },
            Some(Peer::Nodes(_)) => {
                self.of_nodes.insert(id);
            }
            None => {
                self.of_pods.insert(id);
            }
        }
        self.ids.insert(atom.clone(), id);
        self.by_id.insert(id, (atom, 0));
        self.unused.insert(id);
        id
    }

    pub fn retain(&mut self, id: AtomId) {
        if let Some((_, users)) = self.by_id.get_mut(&id) {
            *users += 1;
            self.unused.remove(&id);
        }
    }

    pub fn release(&mut self, id: AtomId) {
        if let Some((_, users)) = self.by_id.get_mut(&id) {
            *users -= 1;
            if *users == 0 {
                self.unused.insert(id);
            }
        }
    }

    /// Drops the atoms that nobody uses.
    pub fn drop_unused(&mut self) -> Vec<(AtomId, Atom)> {
        let unused = std::mem::take(&mut self.unused);
        unused
            .into_iter()
            .filter_map(|id| Some((id, self.remove(id)?)))
            .collect()
    }

    fn remove(&mut self, id: AtomId) -> Option<Atom> {
        let (atom, _) = self.by_id.remove(&id)?;
        self.ids.remove(&atom);
        self.of_pods.remove(&id);
        self.of_nodes.remove(&id);
        match &atom.peer {
            Some(Peer::Block(block)) => {
                remove_from(&mut self.of_range, &block.range, id);
                remove_from(
                    &mut self.lengths[family(&block.range)],
                    &block.range.prefix_len(),
                    id,
                );
            }
            Some(Peer::Pods(pods)) => {
                if let NamespaceSet::One(namespace) = &pods.namespaces {
                    remove_from(&mut self.of_namespace, namespace, id);
                }
            }
            Some(Peer::Nodes(_)) | None => {}
        }
        Some(atom)
    }

    /// What an address satisfies, sorted.
    pub fn of_addr(&self, addr: IpAddr, pod: Option<PodAt<'_>>, node: Option<&Node>) -> Vec<AtomId> {
        let mut ids = self.of_prefixes(addr, addr_bits(addr));
        if let Some((pod, _)) = pod {
            ids.extend(self.of_namespace.get(pod.name.namespace()).into_iter().flatten());
            ids.extend(&self.of_pods);
        }
        if node.is_some() {
            ids.extend(&self.of_nodes);
        }
        ids.retain(|id| self.is_satisfied(*id, addr, pod, node));
        ids.sort_unstable();
        ids
    }

    /// What every address of a range satisfies that is in no longer range, sorted.
    pub fn of_range(&self, range: IpNet) -> Vec<AtomId> {
        let mut ids = self.of_prefixes(range.addr(), range.prefix_len());
        ids.retain(|id| self.get(*id).is_some_and(|atom| holds_range(atom, &range)));
        ids.sort_unstable();
        ids
    }

    fn is_satisfied(&self, id: AtomId, addr: IpAddr, pod: Option<PodAt<'_>>, node: Option<&Node>) -> bool {
        self.get(id)
            .is_some_and(|atom| atom.is_satisfied_by(addr, pod, node))
    }

    /// Those about a range that has the first `bits` bits of an address in it.
    fn of_prefixes(&self, addr: IpAddr, bits: u8) -> Vec<AtomId> {
        let lengths = self.lengths[usize::from(addr.is_ipv6())].range(..=bits);
        let ranges = lengths.filter_map(|(length, _)| Some(IpNet::new(addr, *length).ok()?.trunc()));
        let ids = ranges.filter_map(|range| self.of_range.get(&range)).flatten();
        ids.copied().collect()
    }
}

fn holds_range(atom: &Atom, range: &IpNet) -> bool {
    match atom {
        Atom {
            peer: Some(Peer::Block(block)),
            port: None,
        } => block.contains_range(range),
        _ => false,
    }
}

pub fn addr_bits(addr: IpAddr) -> u8 {
    if addr.is_ipv4() { 32 } else { 128 }
}

fn family(range: &IpNet) -> usize {
    usize::from(range.addr().is_ipv6())
}

fn remove_from<K: Ord>(ids_by: &mut BTreeMap<K, BTreeSet<AtomId>>, key: &K, id: AtomId) {
    if let Some(ids) = ids_by.get_mut(key) {
        ids.remove(&id);
        if ids.is_empty() {
            ids_by.remove(key);
        }
    }
}

//! Network policies of every kind, in one shape: a subject, and for each direction an ordered list of rules.
//!
//! What the API says by leaving something out is said here: `None` is "everything", an empty list is "nothing".
//! Sources: the API reference of NetworkPolicy (networking.k8s.io/v1) and of the network-policy-api
//! (policy.networking.k8s.io v1alpha1 and v1alpha2).

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
    sync::Arc,
};

pub use dataplane_common::policy::RuleAction as Action;
use ipnet::IpNet;

use super::{Labels, Namespace, ObjectRef, Pod, Protocol};

/// A policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    pub key: ObjectRef,
    pub tier: Tier,
    /// Within the tier, lowest first; 0 for kinds without.
    pub priority: u16,
    /// The pods that it is about.
    pub subject: PodSet,
    /// By [`Direction`]; `None`: it has nothing to say about the direction.
    pub rules: [Option<Vec<Rule>>; 2],
    /// It reports what it would do, and does nothing.
    pub dry_run: bool,
}

/// When a policy has its say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tier {
    Admin,
    /// `NetworkPolicy`: what it selects is denied unless a rule allows it.
    Namespace,
    Baseline,
}

/// As the pod sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    Ingress = 0,
    Egress = 1,
}

impl Direction {
    pub const ALL: [Direction; 2] = [Direction::Ingress, Direction::Egress];

    pub const fn as_str(self) -> &'static str {
        match self {
            Direction::Ingress => "ingress",
            Direction::Egress => "egress",
        }
    }
}

/// A rule of a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Its place in the policy's list.
    pub place: u32,
    /// Empty when it has none.
    pub name: Arc<str>,
    pub action: Action,
    /// `None`: every peer.
    pub peers: Option<Vec<Peer>>,
    /// `None`: every port and protocol.
    pub ports: Option<Vec<PortMatch>>,
}

/// The other end.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Peer {
    Pods(PodSet),
    Block(IpBlock),
    /// The addresses of Nodes with such labels.
    Nodes(Selector),
}

/// Pods by their namespace and labels. Those with the host's network are never among them.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PodSet {
    pub namespaces: NamespaceSet,
    pub pods: Selector,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum NamespaceSet {
    One(Arc<str>),
    Labelled(Selector),
}

/// A range without some parts of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IpBlock {
    pub range: IpNet,
    /// Sorted.
    pub except: Vec<IpNet>,
}

/// Destination ports.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PortMatch {
    Protocol(Protocol),
    /// Both ends included.
    Range(Protocol, u16, u16),
    /// What the destination pod calls so; without a protocol, any.
    Named(Option<Protocol>, Arc<str>),
}

/// A label selector; without requirements it selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Selector {
    /// Sorted.
    pub requirements: Vec<Requirement>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Requirement {
    pub key: Arc<str>,
    pub operator: Operator,
}

/// `NotIn` and `DoesNotExist` hold for labels that are not there.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Operator {
    In(BTreeSet<Arc<str>>),
    NotIn(BTreeSet<Arc<str>>),
    Exists,
    DoesNotExist,
}

impl Selector {
    pub fn matches(&self, labels: &Labels) -> bool {
        self.requirements.iter().all(|Requirement { key, operator }| {
            let value = labels.get(key);
            match operator {
                Operator::In(values) => value.is_some_and(|value| values.contains(value)),
                Operator::NotIn(values) => value.is_none_or(|value| !values.contains(value)),
                Operator::Exists => value.is_some(),
                Operator::DoesNotExist => value.is_none(),
            }
        })
    }
}

impl NamespaceSet {
    /// `namespace` is `None` while its object is not known: it has the label then that each has.
    pub fn matches(&self, name: &str, namespace: Option<&Namespace>) -> bool {
        match (self, namespace) {
            (NamespaceSet::One(one), _) => **one == *name,
            (NamespaceSet::Labelled(selector), Some(namespace)) => selector.matches(&namespace.labels),
            (NamespaceSet::Labelled(selector), None) => {
                let labels = BTreeMap::from([(Namespace::NAME_LABEL.to_owned(), name.to_owned())]);
                selector.matches(&Labels::new(&labels).unwrap_or_default())
            }
        }
    }
}

impl PodSet {
    pub fn matches(&self, pod: &Pod, namespace: Option<&Namespace>) -> bool {
        !pod.host_network
            && self.namespaces.matches(pod.name.namespace(), namespace)
            && self.pods.matches(&pod.labels)
    }
}

impl IpBlock {
    pub fn contains(&self, addr: IpAddr) -> bool {
        self.range.contains(&addr) && !self.except.iter().any(|except| except.contains(&addr))
    }

    /// Whether every address of a range is in it.
    pub fn contains_range(&self, range: &IpNet) -> bool {
        self.range.contains(range) && !self.except.iter().any(|except| except.contains(range))
    }
}

impl Policy {
    pub fn rules(&self, direction: Direction) -> Option<&[Rule]> {
        self.rules[direction as usize].as_deref()
    }

    /// Whether it only reports: on its own, or because its namespace's policies do.
    pub fn is_dry_run(&self, namespace: Option<&Namespace>) -> bool {
        let of_namespace =
            self.tier == Tier::Namespace && namespace.is_some_and(|namespace| namespace.dry_run);
        self.dry_run || of_namespace
    }

    /// Its place among all policies. Of equal priorities, which the API leaves open, `ClusterNetworkPolicy` comes first, and
    /// then the name decides.
    pub fn precedence(&self) -> impl Ord + '_ {
        (self.tier, self.priority, &self.key)
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Tier::Admin => "admin",
            Tier::Namespace => "NetworkPolicy",
            Tier::Baseline => "baseline",
        })
    }
}

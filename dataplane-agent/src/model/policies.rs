//! All policies, and what of a change they look at.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use super::{
    Kind, Name, ObjectRef,
    policy::{NamespaceSet, Policy},
};

/// The part of a change that policies look at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicyDirty {
    pub policies: BTreeSet<ObjectRef>,
    pub pods: BTreeSet<Name>,
    pub namespaces: BTreeSet<Name>,
    pub nodes: BTreeSet<Name>,
}

impl PolicyDirty {
    pub fn merge(&mut self, other: PolicyDirty) {
        let PolicyDirty {
            policies,
            pods,
            namespaces,
            nodes,
        } = other;
        self.policies.extend(policies);
        self.pods.extend(pods);
        self.namespaces.extend(namespaces);
        self.nodes.extend(nodes);
    }
}

/// Policies of every kind, by name and by the namespace that they are about.
#[derive(Debug, Default)]
pub struct Policies {
    by_key: BTreeMap<ObjectRef, Arc<Policy>>,
    counts: HashMap<Kind, usize>,
    /// Those that may be about any namespace stand under `None`.
    by_namespace: HashMap<Option<Arc<str>>, BTreeSet<ObjectRef>>,
}

impl Policies {
    /// Adds or replaces a policy; false when it is the same as before.
    pub fn apply(&mut self, policy: Arc<Policy>) -> bool {
        if self.by_key.get(&policy.key) == Some(&policy) {
            return false;
        }
        self.delete(&policy.key);
        let of = namespace(&policy);
        self.by_namespace
            .entry(of)
            .or_default()
            .insert(policy.key.clone());
        *self.counts.entry(policy.key.kind).or_default() += 1;
        self.by_key.insert(policy.key.clone(), policy);
        true
    }

    /// Removes a policy; false when there was none.
    pub fn delete(&mut self, key: &ObjectRef) -> bool {
        let Some(policy) = self.by_key.remove(key) else {
            return false;
        };
        if let Some(count) = self.counts.get_mut(&key.kind) {
            *count -= 1;
        }
        let of = namespace(&policy);
        if let Some(policies) = self.by_namespace.get_mut(&of) {
            policies.remove(key);
            if policies.is_empty() {
                self.by_namespace.remove(&of);
            }
        }
        true
    }

    pub fn get(&self, key: &ObjectRef) -> Option<&Policy> {
        self.by_key.get(key).map(|policy| &**policy)
    }

    /// How many there are of a kind.
    pub fn count(&self, kind: Kind) -> usize {
        self.counts.get(&kind).copied().unwrap_or(0)
    }

    pub fn keys(&self) -> impl Iterator<Item = &ObjectRef> {
        self.by_key.keys()
    }

    /// Those that may be about Pods of a namespace.
    pub fn about(&self, namespace: &str) -> impl Iterator<Item = &Policy> {
        [Some(Arc::from(namespace)), None]
            .into_iter()
            .filter_map(|of| self.by_namespace.get(&of))
            .flatten()
            .filter_map(|key| self.get(key))
    }
}

fn namespace(policy: &Policy) -> Option<Arc<str>> {
    match &policy.subject.namespaces {
        NamespaceSet::One(namespace) => Some(namespace.clone()),
        NamespaceSet::Labelled(_) => None,
    }
}

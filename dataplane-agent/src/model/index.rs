//! The state of the cluster as far as this node needs it: one synchronous writer API, which says what depends on
//! what was changed.

mod slices;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    mem,
    sync::Arc,
};

use self::slices::Slices;
use super::{
    EndpointSlice, Kind, Name, Namespace, Node, Object, ObjectRef, Packed, Pod, Service,
    policies::{Policies, PolicyDirty},
    policy::NamespaceSet,
    shared,
};

/// What a change touches. Merge several with [`Dirty::merge`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dirty {
    /// Services to compile again, or to drop where they are gone, and what they were when that was done last.
    pub services: BTreeMap<Name, Previous>,
    /// This node's object changed: what depends on its zone or addresses is to be looked at again.
    pub node: bool,
    /// Pods of this node changed.
    pub local_pods: bool,
    /// Pods that have, or had, host ports on this node.
    pub host_ports: BTreeSet<Name>,
    /// What policies look at.
    pub policy: PolicyDirty,
}

/// What a Service was before a change, or several.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Previous {
    /// What it is: something else has changed that it depends on.
    #[default]
    Same,
    Missing,
    Was(Packed<Service>),
}

impl Dirty {
    pub fn merge(&mut self, other: Dirty) {
        let Dirty {
            services,
            node,
            local_pods,
            host_ports,
            policy,
        } = other;
        for (name, previous) in services {
            let known = self.services.entry(name).or_default();
            if *known == Previous::Same {
                *known = previous;
            }
        }
        self.node |= node;
        self.local_pods |= local_pods;
        self.host_ports.extend(host_ports);
        self.policy.merge(policy);
    }

    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Every object, and the relations between them.
#[derive(Debug)]
pub struct Index {
    node_name: String,
    nodes: HashMap<Name, Arc<Node>>,
    namespaces: HashMap<Name, Arc<Namespace>>,
    /// By namespace, so that a selector looks only at its own; so are Services.
    pods: BTreeMap<Name, Arc<Pod>>,
    /// Those of this node.
    local_pods: BTreeMap<Name, Arc<Pod>>,
    services: BTreeMap<Name, Packed<Service>>,
    slices: Slices,
    policies: Policies,
}

impl Index {
    pub fn new(node_name: &str) -> Self {
        Self {
            node_name: node_name.to_owned(),
            nodes: HashMap::new(),
            namespaces: HashMap::new(),
            pods: BTreeMap::new(),
            local_pods: BTreeMap::new(),
            services: BTreeMap::new(),
            slices: Slices::default(),
            policies: Policies::default(),
        }
    }

    /// Once there is much: leaves of trees that came to be entry by entry are full to two thirds.
    pub fn pack_trees(&mut self) {
        self.services = mem::take(&mut self.services).into_iter().collect();
        self.pods = mem::take(&mut self.pods).into_iter().collect();
    }

    /// Adds or replaces an object.
    pub fn apply(&mut self, object: Object) -> Dirty {
        match object {
            Object::Node(node) => {
                let own = node.name.name() == self.node_name;
                let previous = self.nodes.insert(node.name.clone(), node.clone());
                if previous.as_ref() == Some(&node) {
                    return Dirty::default();
                }
                node_dirty(own, node.name.clone())
            }
            Object::Namespace(namespace) => {
                let name = namespace.name.clone();
                let previous = self.namespaces.insert(name.clone(), namespace.clone());
                namespace_dirty((previous != Some(namespace)).then_some(name))
            }
            Object::Pod(pod) => {
                let previous = self.pods.insert(pod.name.clone(), pod.clone());
                if self.is_local(&pod) {
                    self.local_pods.insert(pod.name.clone(), pod.clone());
                } else {
                    self.local_pods.remove(&pod.name);
                }
                if previous.as_ref() == Some(&pod) {
                    return Dirty::default();
                }
                self.pod_changed(previous.as_deref(), Some(&*pod))
            }
            Object::Service(name, service) => self.apply_service(name, service),
            Object::EndpointSlice(slice) => self.apply_slice(slice),
            Object::Policy(policy) => {
                let key = policy.key.clone();
                policy_dirty(self.policies.apply(policy).then_some(key))
            }
        }
    }

    /// Removes an object; removing what is missing changes nothing.
    pub fn delete(&mut self, object: &ObjectRef) -> Dirty {
        let name = &object.name;
        match object.kind {
            Kind::Node => {
                if self.nodes.remove(name).is_none() {
                    return Dirty::default();
                }
                node_dirty(name.name() == self.node_name, name.clone())
            }
            Kind::Namespace => {
                let gone = self.namespaces.remove(name).is_some();
                namespace_dirty(gone.then(|| name.clone()))
            }
            Kind::Pod => match self.pods.remove(name) {
                Some(pod) => {
                    self.local_pods.remove(name);
                    self.pod_changed(Some(&*pod), None)
                }
                None => Dirty::default(),
            },
            Kind::Service => {
                let gone = self.services.remove(name);
                services_dirty(gone.map(|gone| (name.clone(), Previous::Was(gone))))
            }
            Kind::EndpointSlice => {
                let gone = self.slices.remove(name);
                services_dirty(gone.and_then(|slice| of_slice(&slice)))
            }
            Kind::NetworkPolicy
            | Kind::ClusterNetworkPolicy
            | Kind::AdminNetworkPolicy
            | Kind::BaselineAdminNetworkPolicy => {
                let gone = self.policies.delete(object);
                policy_dirty(gone.then(|| object.clone()))
            }
        }
    }

    /// Makes the objects of one kind exactly these: a complete list has been read.
    pub fn reset(&mut self, kind: Kind, objects: Vec<(Name, Object)>) -> Dirty {
        let mut dirty = Dirty::default();
        let keep: BTreeSet<&Name> = objects.iter().map(|(name, _)| name).collect();
        for name in self.names(kind) {
            if !keep.contains(&name) {
                dirty.merge(self.delete(&ObjectRef { kind, name }));
            }
        }
        for (_, object) in objects {
            dirty.merge(self.apply(object));
        }
        dirty
    }

    fn names(&self, kind: Kind) -> Vec<Name> {
        match kind {
            Kind::Node => self.nodes.keys().cloned().collect(),
            Kind::Namespace => self.namespaces.keys().cloned().collect(),
            Kind::Pod => self.pods.keys().cloned().collect(),
            Kind::Service => self.services.keys().cloned().collect(),
            Kind::EndpointSlice => self.slices.names().cloned().collect(),
            Kind::NetworkPolicy
            | Kind::ClusterNetworkPolicy
            | Kind::AdminNetworkPolicy
            | Kind::BaselineAdminNetworkPolicy => {
                let of_kind = self.policies.keys().filter(|key| key.kind == kind);
                of_kind.map(|key| key.name.clone()).collect()
            }
        }
    }

    /// How many objects of a kind there are.
    pub fn count(&self, kind: Kind) -> usize {
        match kind {
            Kind::Node => self.nodes.len(),
            Kind::Namespace => self.namespaces.len(),
            Kind::Pod => self.pods.len(),
            Kind::Service => self.services.len(),
            Kind::EndpointSlice => self.slices.len(),
            kind => self.policies.count(kind),
        }
    }

    /// This node's own object.
    pub fn node(&self) -> Option<&Node> {
        self.nodes
            .get(&Name::new("", &self.node_name))
            .map(|node| &**node)
    }

    pub fn node_name(&self) -> &str {
        &self.node_name
    }

    pub fn service(&self, name: &Name) -> Option<Service> {
        let (name, service) = self.services.get_key_value(name)?;
        Some(unpack(name, service))
    }

    /// Every Service, in the order of their names.
    pub fn has_service(&self, name: &Name) -> bool {
        self.services.contains_key(name)
    }

    pub fn services(&self) -> impl Iterator<Item = Service> {
        self.services.iter().map(|(name, service)| unpack(name, service))
    }

    pub fn service_names(&self) -> impl Iterator<Item = &Name> {
        self.services.keys()
    }

    /// The slices of a Service, in the order of their names.
    pub fn slices<'a>(&'a self, service: &Name) -> impl Iterator<Item = &'a EndpointSlice> {
        self.slices.of(service)
    }

    /// A Pod of this node.
    pub fn local_pod(&self, name: &Name) -> Option<&Pod> {
        self.local_pods.get(name).map(|pod| &**pod)
    }

    /// The Pods that a Service selects, in the order of their names.
    pub fn selected_pods<'a>(&'a self, service: &'a Service) -> impl Iterator<Item = &'a Pod> {
        let selector = service.selector.as_str();
        self.pods_of(service.name.namespace())
            .filter(move |pod| selects(&service.name, selector, pod))
    }

    /// The Pods of this node that own an address.
    pub fn local_pods(&self) -> impl Iterator<Item = &Pod> {
        let pods = self.local_pods.values().filter(|pod| !pod.finished);
        pods.map(|pod| &**pod)
    }

    pub fn pod(&self, name: &Name) -> Option<&Pod> {
        self.pods.get(name).map(|pod| &**pod)
    }

    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.pods.values().map(|pod| &**pod)
    }

    /// The Pods of a namespace, in the order of their names.
    pub fn pods_of(&self, namespace: &str) -> impl Iterator<Item = &Pod> {
        in_namespace(&self.pods, namespace).map(|(_, pod)| &**pod)
    }

    /// The Pods of the namespaces of a set, namespace by namespace in the order of their names.
    pub fn pods_in<'a>(&'a self, set: &'a NamespaceSet) -> impl Iterator<Item = &'a Pod> {
        let (one, labelled) = match set {
            NamespaceSet::One(namespace) => (Some(&**namespace), None),
            NamespaceSet::Labelled(_) => (None, Some(self.namespaces_of_pods())),
        };
        let labelled = labelled.into_iter().flatten();
        let labelled = labelled.filter(|name| set.matches(name, self.namespace(name)));
        let namespaces = one.into_iter().chain(labelled);
        namespaces.flat_map(|namespace| self.pods_of(namespace))
    }

    /// The namespaces that have Pods, whether or not their own objects are there.
    fn namespaces_of_pods(&self) -> impl Iterator<Item = &str> {
        let mut next = self.pods.first_key_value();
        std::iter::from_fn(move || {
            let (name, _) = next?;
            next = self.pods.range(Name::behind(name.namespace())..).next();
            Some(name.namespace())
        })
    }

    pub fn namespace(&self, name: &str) -> Option<&Namespace> {
        self.namespaces.get(&Name::new("", name)).map(|one| &**one)
    }

    pub fn node_by_name(&self, name: &Name) -> Option<&Node> {
        self.nodes.get(name).map(|node| &**node)
    }

    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values().map(|node| &**node)
    }

    pub fn policies(&self) -> &Policies {
        &self.policies
    }

    /// Whether a Pod is of this node.
    pub fn is_local(&self, pod: &Pod) -> bool {
        pod.node.as_deref() == Some(&*self.node_name)
    }

    fn apply_service(&mut self, name: Name, service: Packed<Service>) -> Dirty {
        let previous = match self.services.get_mut(&name) {
            Some(known) if *known == service => return Dirty::default(),
            Some(known) => Previous::Was(mem::replace(known, service)),
            None => {
                self.services.insert(name.clone(), service);
                Previous::Missing
            }
        };
        services_dirty([(name, previous)])
    }

    fn apply_slice(&mut self, mut slice: Arc<EndpointSlice>) -> Dirty {
        // One copy of the Service's name will do.
        if let Some(owned) = Arc::get_mut(&mut slice)
            && let Some(service) = &mut owned.service
            && let Some((known, _)) = self.services.get_key_value(service)
        {
            *service = known.clone();
        }
        if self.slices.get(&slice.name) == Some(&slice) {
            return Dirty::default();
        }
        let current = of_slice(&slice);
        let previous = self.slices.insert(slice);
        let previous = previous.and_then(|previous| of_slice(&previous));
        services_dirty(previous.into_iter().chain(current))
    }

    fn pod_changed(&self, previous: Option<&Pod>, current: Option<&Pod>) -> Dirty {
        let versions = [previous, current];
        let pods = || versions.iter().flatten();
        let Some(name) = pods().next().map(|pod| &pod.name) else {
            return Dirty::default();
        };
        let selects_any = |service: &Name, packed: &Packed<Service>| {
            let selector = packed.first();
            pods().any(|pod| selects(service, selector, pod))
        };
        let services = in_namespace(&self.services, name.namespace())
            .filter(|(service, packed)| selects_any(service, packed))
            .map(|(service, _)| (service.clone(), Previous::Same))
            .collect();
        let has_host_ports = |pod: &&&Pod| self.is_local(pod) && !pod.host_ports.is_empty();
        Dirty {
            services,
            node: false,
            local_pods: pods().any(|pod| self.is_local(pod)),
            host_ports: pods()
                .find(has_host_ports)
                .map(|pod| pod.name.clone())
                .into_iter()
                .collect(),
            policy: PolicyDirty {
                pods: BTreeSet::from([name.clone()]),
                ..PolicyDirty::default()
            },
        }
    }
}

fn policy_dirty(key: Option<ObjectRef>) -> Dirty {
    Dirty {
        policy: PolicyDirty {
            policies: key.into_iter().collect(),
            ..PolicyDirty::default()
        },
        ..Dirty::default()
    }
}

fn namespace_dirty(name: Option<Name>) -> Dirty {
    Dirty {
        policy: PolicyDirty {
            namespaces: name.into_iter().collect(),
            ..PolicyDirty::default()
        },
        ..Dirty::default()
    }
}

fn node_dirty(own: bool, name: Name) -> Dirty {
    Dirty {
        node: own,
        policy: PolicyDirty {
            nodes: BTreeSet::from([name]),
            ..PolicyDirty::default()
        },
        ..Dirty::default()
    }
}

fn services_dirty(services: impl IntoIterator<Item = (Name, Previous)>) -> Dirty {
    Dirty {
        services: services.into_iter().collect(),
        ..Dirty::default()
    }
}

fn of_slice(slice: &EndpointSlice) -> Option<(Name, Previous)> {
    let service = slice.service.clone()?;
    Some((service, Previous::Same))
}

fn unpack(name: &Name, service: &Packed<Service>) -> Service {
    Service {
        name: name.clone(),
        ..service.unpack()
    }
}

/// `selector`: its text.
fn selects(service: &Name, selector: &str, pod: &Pod) -> bool {
    !selector.is_empty()
        && service.namespace() == pod.name.namespace()
        && shared::pairs(selector).all(|(key, value)| pod.labels.get(key) == Some(value))
}

fn in_namespace<'a, T>(
    objects: &'a BTreeMap<Name, T>,
    namespace: &str,
) -> impl Iterator<Item = (&'a Name, &'a T)> {
    let first = Name::new(namespace, "");
    objects
        .range(first.clone()..)
        .take_while(move |(name, _)| name.namespace() == first.namespace())
}

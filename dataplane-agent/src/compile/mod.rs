//! From the model to what the tables should say: pure, and by Service, so that an event costs what it touches.
//!
//! [`endpoints`] selects backends, [`services`] makes balancers of them, [`claims`] settles who owns an address and
//! port, [`maglev`] fills tables, [`health_checks`] answers load balancers, [`host_ports`] does for Pods what
//! [`services`] does for Services. [`Compiler`] strings them together. Network policies are a world of their own: [`policy`].

pub mod claims;
pub mod endpoints;
pub mod health_checks;
pub mod host_ports;
pub mod maglev;
mod packed;
pub mod policy;
pub mod services;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use claims::{Claim, Claims};
use health_checks::{Checks, HealthChecks};
use host_ports::OwnAddresses;

use ipnet::IpNet;
pub use packed::Parts;
use serde::{Deserialize, Serialize};

use crate::config::{ServiceEcho, SourceRangesFor};
use crate::model::{
    Dirty, Index, Kind, Name, ObjectRef, Origin, Pod, Previous, Problem, Protocol, Rejected, Service,
};

/// An endpoint's address, as `BACKENDS` has it. The order is the order in which Maglev tables number backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BackendKey {
    pub addr: IpAddr,
    pub port: u16,
    pub proto: Protocol,
}

/// What traffic is sent to: an address (unspecified for node ports) and port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FrontendAddr {
    pub addr: IpAddr,
    pub port: u16,
    pub proto: Protocol,
}

impl FrontendAddr {
    /// Those that serve what is sent to `at`: the one of that address alone first, then a node port.
    #[must_use]
    pub fn serving(at: SocketAddr, proto: Protocol) -> [Self; 2] {
        let any = match at {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let port = at.port();
        [at.ip(), any].map(|addr| Self { addr, port, proto })
    }
}

/// Which endpoints a balancer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    Cluster,
    /// Those of this node.
    Local,
}

/// Identifies a balancer for as long as its owner has it. Traffic policies are no part of it: flows outlive their
/// change.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BalancerKey {
    pub owner: ObjectRef,
    pub frontend: FrontendAddr,
    /// Of the two balancers that a frontend may have, that for clients outside alone.
    pub outside: bool,
}

impl BalancerKey {
    /// The other one that its frontend may have.
    #[must_use]
    pub fn twin(&self) -> Self {
        Self {
            outside: !self.outside,
            ..self.clone()
        }
    }
}

/// One entry of `SERVICES` and the frontends that lead to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(clippy::struct_excessive_bools, reason = "each is asked by somebody else")]
pub struct Balancer {
    pub frontend: FrontendAddr,
    /// Used by pods and host processes.
    pub internal: bool,
    /// Used by clients outside.
    pub external: bool,
    /// Sorted.
    #[serde(skip)]
    pub backends: Arc<[BackendKey]>,
    /// Without backends it drops instead of refusing.
    pub drop_when_empty: bool,
    /// How long a client keeps its backend, in seconds; `None`: each connection is on its own.
    pub affinity_s: Option<u32>,
    /// Whose clients these are: of this frontend, of the same port and family; `None`: its own.
    pub affinity_of: Option<FrontendAddr>,
    /// Who may begin connections, sorted; empty: everybody.
    pub source_ranges: Arc<[IpNet]>,
    /// Echo requests to the address are answered.
    pub echo: bool,
}

/// Everything that an object wants from the tables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Compiled {
    /// By frontend, that for clients outside alone last.
    pub balancers: Box<[Balancer]>,
    pub endpoints: Endpoints,
}

/// Every endpoint, chosen or not, each once, by key, with what is known of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoints {
    /// Those of a balancer, all of which serve on other nodes: most Services of a large cluster, and no list of their own.
    Plain(Arc<[BackendKey]>),
    Listed(Box<[(BackendKey, EndpointInfo)]>),
}

impl Default for Endpoints {
    fn default() -> Self {
        Self::Listed(Box::default())
    }
}

impl Endpoints {
    fn new(endpoints: BTreeMap<BackendKey, EndpointInfo>, balancers: &[Balancer]) -> Self {
        let is_all = |keys: &[BackendKey]| keys.iter().eq(endpoints.keys());
        if endpoints.values().all(|info| *info == EndpointInfo::PLAIN)
            && let Some(balancer) = balancers.iter().find(|balancer| is_all(&balancer.backends))
        {
            return Self::Plain(balancer.backends.clone());
        }
        Self::Listed(endpoints.into_iter().collect())
    }

    pub fn iter(&self) -> impl Iterator<Item = (BackendKey, EndpointInfo)> {
        let (plain, listed): (&[BackendKey], &[_]) = match self {
            Endpoints::Plain(keys) => (keys, &[]),
            Endpoints::Listed(listed) => (&[], listed),
        };
        let plain = plain.iter().map(|key| (*key, EndpointInfo::PLAIN));
        plain.chain(listed.iter().copied())
    }

    /// What is known of one of them.
    pub fn get(&self, key: &BackendKey) -> Option<EndpointInfo> {
        match self {
            Endpoints::Plain(keys) => keys.binary_search(key).ok().map(|_| EndpointInfo::PLAIN),
            Endpoints::Listed(listed) => {
                let place = listed.binary_search_by_key(key, |(key, _)| *key).ok()?;
                listed.get(place).map(|(_, info)| *info)
            }
        }
    }
}

impl Compiled {
    /// Puts together what an object wants, in whatever order it was found.
    pub fn new(mut balancers: Vec<Balancer>, endpoints: BTreeMap<BackendKey, EndpointInfo>) -> Self {
        balancers.sort_unstable_by_key(|balancer| (balancer.frontend, !balancer.internal));
        Self {
            endpoints: Endpoints::new(endpoints, &balancers),
            balancers: balancers.into(),
        }
    }

    /// How many ports, each in each family, have endpoints and none on this node, where the traffic policy for clients inside or for
    /// those outside wants one.
    pub fn without_local(&self) -> (usize, usize) {
        let dropping = self.balancers.iter().filter(|balancer| balancer.drop_when_empty);
        let ports: BTreeSet<(FrontendAddr, bool)> = dropping
            .map(|balancer| {
                (
                    balancer.affinity_of.unwrap_or(balancer.frontend),
                    balancer.internal,
                )
            })
            .collect();
        let inside = ports.iter().filter(|(_, internal)| *internal).count();
        (inside, ports.len() - inside)
    }

    /// One of the balancers of a frontend: see [`BalancerKey::outside`].
    pub fn balancer(&self, frontend: &FrontendAddr, outside: bool) -> Option<&Balancer> {
        let key = |balancer: &Balancer| (balancer.frontend, !balancer.internal);
        let place = self
            .balancers
            .binary_search_by_key(&(*frontend, outside), key)
            .ok()?;
        self.balancers.get(place)
    }
}

/// What is known of an endpoint besides its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointInfo {
    pub serving: bool,
    pub local: bool,
}

impl EndpointInfo {
    /// That of [`Endpoints::Plain`].
    const PLAIN: Self = Self {
        serving: true,
        local: false,
    };
}

/// An object's new state; `None`: it wants nothing any more.
pub type Update = (ObjectRef, Option<Arc<Compiled>>);

/// What is served, as far as it can be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// `spec.externalIPs`.
    pub external_ips: bool,
    /// What `spec.loadBalancerSourceRanges` guards.
    pub source_ranges_for: SourceRangesFor,
    pub service_echo: ServiceEcho,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            external_ips: true,
            source_ranges_for: SourceRangesFor::Lb,
            service_echo: ServiceEcho::Ignore,
        }
    }
}

/// Keeps what must be remembered between Services: who claims which address and port.
#[derive(Debug, Default)]
pub struct Compiler {
    options: Options,
    claims: Claims,
    health_checks: HealthChecks,
    /// `None` while they are not known: what is refused because of them is not told before.
    own_addresses: Option<OwnAddresses>,
    /// This node's Pods with host ports, and what they claim.
    host_ports: BTreeMap<ObjectRef, Claim>,
    problems: BTreeMap<ObjectRef, Vec<Problem>>,
}

impl Compiler {
    pub fn new(options: Options) -> Self {
        Self {
            options,
            ..Self::default()
        }
    }

    /// Keeps `externalIPs` from addresses by which the agent reaches the API server: whoever took them would end what it hears, also of
    /// the end of that Service.
    pub fn reserve(&mut self, servers: &[SocketAddr]) {
        let frontends = servers.iter().map(|server| FrontendAddr {
            addr: server.ip(),
            port: server.port(),
            proto: Protocol::Tcp,
        });
        self.claims.reserved = frontends.collect();
    }

    /// Compiles what has changed. A Service that gives up or gains an address because of another's change is among
    /// the updates too.
    pub fn update(&mut self, index: &Index, dirty: &Dirty) -> Vec<Update> {
        let mut owners: BTreeSet<ObjectRef> = dirty.services.keys().map(ObjectRef::service).collect();
        if dirty.node {
            owners.extend(index.service_names().map(ObjectRef::service));
        }
        for (name, previous) in &dirty.services {
            owners.extend(self.claim_of_service(index, name, previous));
        }
        let pods = dirty.host_ports.iter().map(|name| ObjectRef {
            kind: Kind::Pod,
            name: name.clone(),
        });
        let mut pods: BTreeSet<ObjectRef> = pods.collect();
        if !owners.is_empty() || !pods.is_empty() {
            // A node port may hide a host port of one address, and the other way round.
            pods.extend(self.host_ports.keys().cloned());
        }
        self.compile_with_pods(index, pods, owners)
    }

    /// Tells which addresses this node has; what depends on it is compiled again.
    pub fn set_own_addresses(&mut self, index: &Index, own: OwnAddresses) -> Vec<Update> {
        if self.own_addresses.as_ref() == Some(&own) {
            return Vec::new();
        }
        self.own_addresses = Some(own);
        let pods = self.host_ports.keys().cloned().collect();
        self.compile_with_pods(index, pods, BTreeSet::new())
    }

    fn compile_with_pods(
        &mut self,
        index: &Index,
        pods: BTreeSet<ObjectRef>,
        mut owners: BTreeSet<ObjectRef>,
    ) -> Vec<Update> {
        for pod in pods {
            owners.extend(self.claim_of_pod(index, &pod));
            owners.insert(pod);
        }
        owners
            .into_iter()
            .map(|owner| {
                let compiled = self.compile(index, &owner);
                (owner, compiled)
            })
            .collect()
    }

    /// Everything that an object does not get.
    pub fn problems(&self) -> Vec<(ObjectRef, Problem)> {
        let of_object = |(owner, problems): (&ObjectRef, &Vec<Problem>)| {
            let owner = owner.clone();
            let with_owner = move |problem: &Problem| (owner.clone(), problem.clone());
            problems.iter().map(with_owner).collect::<Vec<_>>()
        };
        let of_checks = self.health_checks.problems().into_iter();
        self.problems
            .iter()
            .flat_map(of_object)
            .chain(of_checks.map(|(name, problem)| (ObjectRef::service(&name), problem)))
            .collect()
    }

    /// The same as rejections, with what `origin` knows of an object.
    pub fn rejected(&self, origin: impl Fn(&ObjectRef) -> Option<Origin>) -> Vec<Rejected> {
        let reject = |(owner, problem): (ObjectRef, Problem)| Rejected {
            origin: origin(&owner),
            object: owner.to_string(),
            problem,
        };
        self.problems().into_iter().map(reject).collect()
    }

    /// The health checks that load balancers may ask for.
    pub fn health_checks(&self) -> Checks {
        self.health_checks.checks()
    }

    /// Whether an address belongs to a Service.
    pub fn is_service_address(&self, addr: IpAddr) -> bool {
        self.claims.has_address(addr)
    }

    /// Who is served at an address and port: of a node port it is the unspecified address.
    pub fn owner(&self, frontend: &FrontendAddr) -> Option<&ObjectRef> {
        self.claims.owner(frontend)
    }

    /// Once there is much: leaves of trees that came to be entry by entry are full to two thirds.
    pub fn pack_trees(&mut self) {
        self.claims.pack_tree();
    }

    /// Enters what a Service claims; returns the others that gain or lose by it.
    fn claim_of_service(&mut self, index: &Index, name: &Name, previous: &Previous) -> BTreeSet<ObjectRef> {
        let before = match previous {
            Previous::Same => return BTreeSet::new(),
            Previous::Missing => None,
            Previous::Was(service) => Some(service.unpack()),
        };
        let owner = ObjectRef::service(name);
        let claim = |service: Option<Service>| match service.filter(|service| service.proxied.is_here()) {
            Some(service) => {
                let frontends = services::frontends(&service, self.options).map(|(addr, ..)| addr);
                Claim::new(&owner, service.created_ns, frontends)
            }
            None => Claim::default(),
        };
        let (before, after) = (claim(before), claim(index.service(name)));
        self.claims.replace(&owner, &before, &after)
    }

    /// The same of a Pod of this node.
    fn claim_of_pod(&mut self, index: &Index, owner: &ObjectRef) -> BTreeSet<ObjectRef> {
        let pod = host_port_pod(index, owner);
        let after = match (pod, &self.own_addresses) {
            (Some(pod), Some(own)) => {
                let frontends = host_ports::frontends(pod, own).map(|(addr, ..)| addr);
                Claim::new(owner, pod.created_ns, frontends)
            }
            _ => Claim::default(),
        };
        let before = match pod {
            Some(_) => self.host_ports.insert(owner.clone(), after.clone()),
            None => self.host_ports.remove(owner),
        };
        self.claims.replace(owner, &before.unwrap_or_default(), &after)
    }

    fn compile(&mut self, index: &Index, owner: &ObjectRef) -> Option<Arc<Compiled>> {
        self.problems.remove(owner);
        let (compiled, problems) = if owner.kind == Kind::Pod {
            let pod = host_port_pod(index, owner)?;
            host_ports::compile(pod, self.own_addresses.as_ref()?, &self.claims)
        } else {
            let service = index
                .service(&owner.name)
                .filter(|service| service.proxied.is_here());
            self.health_checks.set(index, &owner.name, service.as_ref());
            services::compile(index, &service?, self.options, &self.claims)
        };
        if !problems.is_empty() {
            self.problems.insert(owner.clone(), problems);
        }
        Some(Arc::new(compiled))
    }
}

fn host_port_pod<'a>(index: &'a Index, owner: &ObjectRef) -> Option<&'a Pod> {
    let is_pod = owner.kind == Kind::Pod;
    let pod = is_pod.then(|| index.local_pod(&owner.name)).flatten();
    pod.filter(|pod| !pod.host_ports.is_empty())
}

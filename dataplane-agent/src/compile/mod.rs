//! From the model to what the tables should say: pure, and by Service, so that an event costs what it touches.
//!
//! [`endpoints`] selects backends, [`services`] makes balancers of them, [`claims`] settles who owns an address and
//! port, [`maglev`] fills tables. [`Compiler`] strings them together.

pub mod claims;
pub mod endpoints;
pub mod maglev;
pub mod services;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use claims::Claims;

use crate::model::{Dirty, Index, Kind, Name, ObjectRef, Origin, Problem, Protocol, Rejected};

/// An endpoint's address, as `BACKENDS` has it. The order is the order in which Maglev tables number backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BackendKey {
    pub addr: IpAddr,
    pub port: u16,
    pub proto: Protocol,
}

/// What traffic is sent to: an address (unspecified for node ports) and port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FrontendAddr {
    pub addr: IpAddr,
    pub port: u16,
    pub proto: Protocol,
}

/// Which endpoints a balancer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Policy {
    Cluster,
    /// Those of this node.
    Local,
}

/// Identifies a balancer for as long as its Service has it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BalancerKey {
    pub owner: Name,
    pub frontend: FrontendAddr,
    pub policy: Policy,
}

/// One entry of `SERVICES` and the frontends that lead to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Balancer {
    pub frontend: FrontendAddr,
    pub policy: Policy,
    /// Used by pods and host processes.
    pub internal: bool,
    /// Used by clients outside.
    pub external: bool,
    /// Sorted.
    pub backends: Arc<[BackendKey]>,
    /// Without backends it drops instead of refusing.
    pub drop_when_empty: bool,
}

/// Everything that a Service wants from the tables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Compiled {
    pub balancers: Vec<Balancer>,
    /// Every endpoint, chosen or not, and whether it serves.
    pub endpoints: BTreeMap<BackendKey, EndpointInfo>,
}

/// What is known of an endpoint besides its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndpointInfo {
    pub serving: bool,
    pub local: bool,
}

/// A Service's new state; `None`: it wants nothing any more.
pub type Update = (Name, Option<Arc<Compiled>>);

/// Keeps what must be remembered between Services: who claims which address and port.
#[derive(Debug, Default)]
pub struct Compiler {
    claims: Claims,
    problems: BTreeMap<Name, Vec<Problem>>,
}

impl Compiler {
    /// Compiles what has changed. A Service that gives up or gains an address because of another's change is among
    /// the updates too.
    pub fn update(&mut self, index: &Index, dirty: &Dirty) -> Vec<Update> {
        let mut names: BTreeSet<Name> = dirty.services.clone();
        if dirty.node {
            names.extend(index.services().map(|service| service.name.clone()));
        }
        let mut affected = BTreeSet::new();
        for name in &names {
            let service = index.service(name).filter(|service| service.proxied);
            affected.extend(self.claims.set(name, service));
        }
        names.extend(affected);
        names
            .into_iter()
            .map(|name| {
                let compiled = self.compile(index, &name);
                (name, compiled)
            })
            .collect()
    }

    /// Addresses and ports that a Service does not get, by Service.
    pub fn problems(&self) -> &BTreeMap<Name, Vec<Problem>> {
        &self.problems
    }

    /// The same as rejections, with what `origin` knows of a Service.
    pub fn rejected(&self, origin: impl Fn(&Name) -> Option<Origin>) -> Vec<Rejected> {
        let of_service = |(name, problems): (&Name, &Vec<Problem>)| {
            let object = ObjectRef {
                kind: Kind::Service,
                name: name.clone(),
            };
            let origin = origin(name);
            let reject = move |problem: &Problem| Rejected {
                origin: origin.clone(),
                object: object.to_string(),
                problem: problem.clone(),
            };
            problems.iter().map(reject).collect::<Vec<_>>()
        };
        self.problems.iter().flat_map(of_service).collect()
    }

    /// Whether an address belongs to a Service.
    pub fn is_service_address(&self, addr: IpAddr) -> bool {
        self.claims.has_address(addr)
    }

    fn compile(&mut self, index: &Index, name: &Name) -> Option<Arc<Compiled>> {
        let Some(service) = index.service(name).filter(|service| service.proxied) else {
            self.problems.remove(name);
            return None;
        };
        let (compiled, problems) = services::compile(index, service, &self.claims);
        if problems.is_empty() {
            self.problems.remove(name);
        } else {
            self.problems.insert(name.clone(), problems);
        }
        Some(Arc::new(compiled))
    }
}

//! What the tables should say, by table, and which entries to look at: kept up to date Service by Service.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use indexmap::IndexMap;

use dataplane_common::service::{PORT_SETS, PortSet, Scope, port_set_index};

use super::{backends::OwnedBackend, encode};
use crate::{
    compile::{BackendKey, Balancer, BalancerKey, Compiled, FrontendAddr},
    model::ObjectRef,
    store::FrontendKey,
};

/// How a backend is used, counted over balancers. Owners whose names hash alike share one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Uses {
    pub chosen: u32,
    pub serving: u32,
    pub local: u32,
    pub total: u32,
}

/// Entries that may differ from what is programmed.
#[derive(Debug, Default)]
pub struct Touched {
    pub balancers: BTreeSet<BalancerKey>,
    pub frontends: BTreeSet<FrontendKey>,
    pub backends: BTreeSet<OwnedBackend>,
    pub ports: BTreeSet<u32>,
}

impl Touched {
    pub fn is_empty(&self) -> bool {
        let Self {
            balancers,
            frontends,
            backends,
            ports,
        } = self;
        balancers.is_empty() && frontends.is_empty() && backends.is_empty() && ports.is_empty()
    }
}

/// The desired state.
#[derive(Debug)]
pub struct Desired {
    owners: HashMap<ObjectRef, Arc<Compiled>>,
    /// Who is served at an address and port.
    frontends: HashMap<FrontendAddr, ObjectRef>,
    /// Addresses whose echo requests are answered, and how many frontends want it.
    pub echoes: HashMap<FrontendKey, (IpAddr, u32)>,
    pub backends: IndexMap<OwnedBackend, Uses>,
    pub ports: Vec<PortSet>,
    /// Frontends of a port, and how many of these are on the unspecified address.
    port_uses: HashMap<(u8, u16), (u32, u32)>,
}

impl Default for Desired {
    fn default() -> Self {
        Self {
            owners: HashMap::new(),
            frontends: HashMap::new(),
            echoes: HashMap::new(),
            backends: IndexMap::new(),
            ports: vec![PortSet::default(); PORT_SETS as usize],
            port_uses: HashMap::new(),
        }
    }
}

impl Desired {
    /// Takes Services and Pods out, or replaces them. All that leave do so before any comes in, so that an address can pass
    /// from one to another.
    pub fn update(&mut self, updates: Vec<(ObjectRef, Option<Arc<Compiled>>)>, touched: &mut Touched) {
        let mut arriving = Vec::new();
        for (owner, compiled) in updates {
            if self.owners.get(&owner) == compiled.as_ref() {
                continue;
            }
            if let Some(previous) = self.owners.remove(&owner) {
                self.remove(&owner, &previous, touched);
            }
            arriving.extend(compiled.map(|compiled| (owner, compiled)));
        }
        for (owner, compiled) in arriving {
            self.add(&owner, &compiled, touched);
            self.owners.insert(owner, compiled);
        }
    }

    pub fn owners(&self) -> impl Iterator<Item = (&ObjectRef, &Compiled)> {
        self.owners.iter().map(|(owner, compiled)| (owner, &**compiled))
    }

    pub fn balancer(&self, key: &BalancerKey) -> Option<&Balancer> {
        let BalancerKey {
            owner,
            frontend,
            outside,
        } = key;
        self.owners.get(owner)?.balancer(frontend, *outside)
    }

    /// Every balancer, in no order.
    pub fn balancers(&self) -> impl Iterator<Item = BalancerKey> {
        let of_owner = |(owner, compiled): (&ObjectRef, &Compiled)| {
            let keys: Vec<BalancerKey> = compiled.balancers.iter().map(|one| key(owner, one)).collect();
            keys
        };
        self.owners().flat_map(of_owner)
    }

    /// To which balancer an entry of the frontends' tables should lead.
    pub fn frontend(&self, key: &FrontendKey) -> Option<BalancerKey> {
        let (addr, scope) = encode::frontend_addr(key)?;
        let owner = self.frontends.get(&addr)?;
        let compiled = self.owners.get(owner)?;
        let balancers = [false, true].into_iter();
        let mut balancers = balancers.filter_map(|outside| compiled.balancer(&addr, outside));
        let balancer = balancers.find(|balancer| scopes(balancer).any(|of| of == scope))?;
        Some(self::key(owner, balancer))
    }

    pub fn services(&self) -> usize {
        self.owners.len()
    }

    fn add(&mut self, owner: &ObjectRef, compiled: &Compiled, touched: &mut Touched) {
        let known_as = owned_by(owner);
        for (backend, info) in compiled.endpoints.iter() {
            let backend = known_as(&backend);
            let uses = self.backends.entry(backend).or_default();
            uses.total += 1;
            uses.serving += u32::from(info.serving);
            uses.local += u32::from(info.local);
            touched.backends.insert(backend);
        }
        for balancer in &compiled.balancers {
            for backend in balancer.backends.iter() {
                self.backends.entry(known_as(backend)).or_default().chosen += 1;
            }
            self.frontends.insert(balancer.frontend, owner.clone());
            for scope in scopes(balancer) {
                touched
                    .frontends
                    .insert(encode::frontend_key(&balancer.frontend, scope));
                self.use_port(&balancer.frontend, 1, touched);
                if balancer.echo {
                    let addr = balancer.frontend.addr;
                    let echo = encode::echo_key(addr, scope);
                    self.echoes.entry(echo).or_insert((addr, 0)).1 += 1;
                    touched.frontends.insert(echo);
                }
            }
            touched.balancers.insert(key(owner, balancer));
        }
    }

    fn remove(&mut self, owner: &ObjectRef, compiled: &Compiled, touched: &mut Touched) {
        let known_as = owned_by(owner);
        for balancer in &compiled.balancers {
            for backend in balancer.backends.iter() {
                if let Some(uses) = self.backends.get_mut(&known_as(backend)) {
                    uses.chosen -= 1;
                }
            }
            if self.frontends.get(&balancer.frontend) == Some(owner) {
                self.frontends.remove(&balancer.frontend);
            }
            for scope in scopes(balancer) {
                touched
                    .frontends
                    .insert(encode::frontend_key(&balancer.frontend, scope));
                self.use_port(&balancer.frontend, -1, touched);
                if balancer.echo {
                    let echo = encode::echo_key(balancer.frontend.addr, scope);
                    if let Some((_, uses)) = self.echoes.get_mut(&echo) {
                        *uses -= 1;
                        if *uses == 0 {
                            self.echoes.remove(&echo);
                        }
                    }
                    touched.frontends.insert(echo);
                }
            }
            touched.balancers.insert(key(owner, balancer));
        }
        for (backend, info) in compiled.endpoints.iter() {
            let backend = known_as(&backend);
            if let Some(uses) = self.backends.get_mut(&backend) {
                uses.total -= 1;
                uses.serving -= u32::from(info.serving);
                uses.local -= u32::from(info.local);
                if uses.total == 0 {
                    self.backends.swap_remove(&backend);
                }
            }
            touched.backends.insert(backend);
        }
    }

    fn use_port(&mut self, frontend: &FrontendAddr, change: i32, touched: &mut Touched) {
        let FrontendAddr { addr, port, proto } = frontend;
        let uses = self.port_uses.entry((proto.number(), *port)).or_default();
        uses.0 = uses.0.saturating_add_signed(change);
        if addr.is_unspecified() {
            uses.1 = uses.1.saturating_add_signed(change);
        }
        let (any, wildcard) = *uses;
        if any == 0 {
            self.port_uses.remove(&(proto.number(), *port));
        }
        let index = port_set_index(proto.number(), *port);
        let set = &mut self.ports[index as usize];
        let bit = 1 << (port & 63);
        set.any = if any > 0 { set.any | bit } else { set.any & !bit };
        set.wildcard = if wildcard > 0 {
            set.wildcard | bit
        } else {
            set.wildcard & !bit
        };
        touched.ports.insert(index);
    }
}

/// What an owner's backends are called.
fn owned_by(owner: &ObjectRef) -> impl Fn(&BackendKey) -> OwnedBackend {
    let owner = encode::owner(owner);
    move |key| OwnedBackend { key: *key, owner }
}

fn key(owner: &ObjectRef, balancer: &Balancer) -> BalancerKey {
    BalancerKey {
        owner: owner.clone(),
        frontend: balancer.frontend,
        outside: !balancer.internal,
    }
}

fn scopes(balancer: &Balancer) -> impl Iterator<Item = Scope> {
    let internal = balancer.internal.then_some(Scope::Internal);
    internal
        .into_iter()
        .chain(balancer.external.then_some(Scope::External))
}

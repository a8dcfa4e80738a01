//! What the tables should say, by table, and which entries to look at: kept up to date Service by Service.

use std::{
    collections::{BTreeSet, HashMap},
    hash::{BuildHasher, RandomState},
    mem,
    net::IpAddr,
    sync::Arc,
};

use hashbrown::HashTable;

use dataplane_common::service::{PORT_SETS, PortSet, Scope, port_set_index};

use super::{backends::OwnedBackend, encode};
use crate::{
    compile::{Balancer, BalancerKey, Compiled, FrontendAddr, Parts},
    model::{Kind, Name, ObjectRef, Packed},
    store::FrontendKey,
};

/// What a backend is to its owner. Owners whose names hash alike share one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Uses {
    /// Some balancer has it.
    pub chosen: bool,
    pub serving: bool,
    pub local: bool,
}

/// What an object wants.
#[derive(Debug)]
struct Owner {
    /// [`encode::owner`] of its name.
    hash: u32,
    // Of its [`ObjectRef`], which would take eight bytes more here.
    kind: Kind,
    name: Name,
    compiled: Kept,
}

const _: () = assert!(size_of::<Owner>() == 32);

impl Owner {
    fn is(&self, object: &ObjectRef) -> bool {
        (self.kind, &self.name) == (object.kind, &object.name)
    }

    fn object(&self) -> ObjectRef {
        ObjectRef {
            kind: self.kind,
            name: self.name.clone(),
        }
    }

    fn compiled(&self) -> Arc<Compiled> {
        match &self.compiled {
            Kept::Open(compiled) => compiled.clone(),
            Kept::Packed(packed) => Compiled::unpack(packed).into(),
        }
    }
}

/// Open until it is programmed, for that asks for every entry.
#[derive(Debug)]
enum Kept {
    Open(Arc<Compiled>),
    Packed(Packed<Parts>),
}

/// Every object that wants something, to be found by its name and by the hash of it.
#[derive(Debug, Default)]
struct Owners(HashTable<Owner>);

impl Owners {
    /// All 64 bits of it are to differ, for the table takes its places from some and its tags from others.
    fn spread(hash: u32) -> u64 {
        u64::from(hash) | u64::from(hash) << 32
    }

    fn get(&self, object: &ObjectRef) -> Option<Arc<Compiled>> {
        let of_object = self.of_hash(encode::owner(object));
        let mut of_object = of_object.filter(|owner| owner.is(object));
        of_object.next().map(Owner::compiled)
    }

    /// Nearly always at most one.
    fn of_hash(&self, hash: u32) -> impl Iterator<Item = &Owner> {
        let alike = self.0.iter_hash(Self::spread(hash));
        alike.filter(move |owner| owner.hash == hash)
    }

    /// An object that is not there yet.
    fn insert(&mut self, object: ObjectRef, compiled: Arc<Compiled>) {
        let hash = encode::owner(&object);
        let ObjectRef { kind, name } = object;
        let owner = Owner {
            hash,
            kind,
            name,
            compiled: Kept::Open(compiled),
        };
        let spread = |owner: &Owner| Self::spread(owner.hash);
        self.0.insert_unique(Self::spread(hash), owner, spread);
    }

    fn remove(&mut self, object: &ObjectRef) {
        let hash = Self::spread(encode::owner(object));
        if let Ok(found) = self.0.find_entry(hash, |owner| owner.is(object)) {
            found.remove();
        }
    }

    fn pack(&mut self, object: &ObjectRef, packed: Packed<Parts>) {
        let hash = Self::spread(encode::owner(object));
        if let Some(owner) = self.0.find_mut(hash, |owner| owner.is(object)) {
            owner.compiled = Kept::Packed(packed);
        }
    }
}

/// Who is served at an address and port: the hash of that, and of the owner's name.
#[derive(Debug, Default)]
struct Served {
    table: HashTable<(u32, u32)>,
    hasher: RandomState,
}

impl Served {
    fn hash(&self, frontend: &FrontendAddr) -> u32 {
        self.hasher.hash_one(frontend) as u32
    }

    /// Owners of which nearly always one has the frontend.
    fn owners(&self, frontend: &FrontendAddr) -> impl Iterator<Item = u32> {
        let hash = self.hash(frontend);
        let alike = self.table.iter_hash(Owners::spread(hash));
        alike
            .filter(move |(known, _)| *known == hash)
            .map(|(_, owner)| *owner)
    }

    fn insert(&mut self, frontend: &FrontendAddr, owner: u32) {
        let hash = self.hash(frontend);
        let spread = |(hash, _): &(u32, u32)| Owners::spread(*hash);
        self.table
            .insert_unique(Owners::spread(hash), (hash, owner), spread);
    }

    fn remove(&mut self, frontend: &FrontendAddr, owner: u32) {
        let entry = (self.hash(frontend), owner);
        let found = self
            .table
            .find_entry(Owners::spread(entry.0), |known| *known == entry);
        if let Ok(found) = found {
            found.remove();
        }
    }
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
    owners: Owners,
    /// Those that are not packed.
    open: Vec<ObjectRef>,
    served: Served,
    /// Addresses whose echo requests are answered, and how many frontends want it.
    pub echoes: HashMap<FrontendKey, (IpAddr, u32)>,
    pub ports: Vec<PortSet>,
    /// Frontends of a port, and how many of these are on the unspecified address.
    port_uses: HashMap<(u8, u16), (u32, u32)>,
}

impl Default for Desired {
    fn default() -> Self {
        Self {
            owners: Owners::default(),
            open: Vec::new(),
            served: Served::default(),
            echoes: HashMap::new(),
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
            let previous = self.owners.get(&owner);
            if previous == compiled {
                continue;
            }
            if let Some(previous) = previous {
                self.owners.remove(&owner);
                self.remove(&owner, &previous, touched);
            }
            arriving.extend(compiled.map(|compiled| (owner, compiled)));
        }
        for (owner, compiled) in arriving {
            self.add(&owner, &compiled, touched);
            self.open.push(owner.clone());
            self.owners.insert(owner, compiled);
        }
    }

    /// Packs what is programmed: it is looked at again when it changes.
    pub fn pack(&mut self) {
        let packed = |owner: ObjectRef| {
            let packed = self.owners.get(&owner)?.pack();
            Some((owner, packed))
        };
        // All before the first is replaced: what these take would otherwise lie scattered over what those leave.
        let packed: Vec<_> = mem::take(&mut self.open).into_iter().filter_map(packed).collect();
        for (owner, packed) in packed {
            self.owners.pack(&owner, packed);
        }
    }

    pub fn owners(&self) -> impl Iterator<Item = (ObjectRef, Arc<Compiled>)> {
        let owners = self.owners.0.iter();
        owners.map(|owner| (owner.object(), owner.compiled()))
    }

    pub fn balancer(&self, key: &BalancerKey) -> Option<Balancer> {
        let BalancerKey {
            owner,
            frontend,
            outside,
        } = key;
        self.owners.get(owner)?.balancer(frontend, *outside).cloned()
    }

    /// Every balancer, in no order.
    pub fn balancers(&self) -> impl Iterator<Item = BalancerKey> {
        let of_owner = |(owner, compiled): (ObjectRef, Arc<Compiled>)| {
            let keys: Vec<BalancerKey> = compiled.balancers.iter().map(|one| key(&owner, one)).collect();
            keys
        };
        self.owners().flat_map(of_owner)
    }

    /// To which balancer an entry of the frontends' tables should lead.
    pub fn frontend(&self, key: &FrontendKey) -> Option<BalancerKey> {
        let (addr, scope) = encode::frontend_addr(key)?;
        let owners = self.served.owners(&addr);
        let mut owners = owners.flat_map(|hash| self.owners.of_hash(hash));
        owners.find_map(|owner| {
            let compiled = owner.compiled();
            let balancers = [false, true].into_iter();
            let mut balancers = balancers.filter_map(|outside| compiled.balancer(&addr, outside));
            let balancer = balancers.find(|balancer| scopes(balancer).any(|of| of == scope))?;
            Some(self::key(&owner.object(), balancer))
        })
    }

    pub fn services(&self) -> usize {
        self.owners.0.len()
    }

    /// `None` for a backend that nobody wants.
    pub fn uses(&self, backend: &OwnedBackend) -> Option<Uses> {
        let OwnedBackend { key, owner } = backend;
        let mut found: Option<Uses> = None;
        for owner in self.owners.of_hash(*owner) {
            let compiled = owner.compiled();
            let Some(info) = compiled.endpoints.get(key) else {
                continue;
            };
            let has = |balancer: &Balancer| balancer.backends.binary_search(key).is_ok();
            let uses = found.get_or_insert_default();
            uses.chosen |= compiled.balancers.iter().any(has);
            uses.serving |= info.serving;
            uses.local |= info.local;
        }
        found
    }

    fn add(&mut self, owner: &ObjectRef, compiled: &Compiled, touched: &mut Touched) {
        touched.backends.extend(backends(owner, compiled));
        for balancer in &compiled.balancers {
            self.served.insert(&balancer.frontend, encode::owner(owner));
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
        let hash = encode::owner(owner);
        for balancer in &compiled.balancers {
            self.served.remove(&balancer.frontend, hash);
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
        touched.backends.extend(backends(owner, compiled));
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
fn backends(owner: &ObjectRef, compiled: &Compiled) -> impl Iterator<Item = OwnedBackend> {
    let owner = encode::owner(owner);
    let endpoints = compiled.endpoints.iter();
    endpoints.map(move |(key, _)| OwnedBackend { owner, key })
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

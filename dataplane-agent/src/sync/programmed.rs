//! What the tables hold, as far as we wrote it or found it: the bookkeeping behind every decision not to write.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    mem,
    net::IpAddr,
};

use ipnet::IpNet;

use dataplane_common::{
    device::Device,
    service::{PortSet, Scope, Service, port_set_index, service_flags},
};

use super::{
    arena::{Arena, Slice},
    backends::{self, OwnedBackend},
    desired::Desired,
    encode,
    frontends::Frontends,
    ids::Ids,
    service_ids::{ServiceId, ServiceIds},
};
use crate::{
    compile::{BalancerKey, FrontendAddr},
    store::{Store, StoreError},
};

/// An entry of `SERVICES` and its slice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot {
    pub value: Service,
    pub slice: Option<Slice>,
}

impl Slot {
    /// The backend ids that the slice begins with, ascending: `MAGLEV` is mapped, so they are not kept beside.
    pub fn ids(&self, store: &dyn Store) -> Result<Vec<u32>, StoreError> {
        let Some(slice) = self.slice else {
            return Ok(Vec::new());
        };
        let mut words = vec![0; (self.value.head.slots_offset - slice.start) as usize];
        store.read_maglev(slice.start, &mut words)?;
        Ok(encode::slice_ids(&words))
    }
}

/// The programmed state.
#[derive(Debug)]
pub struct Programmed {
    pub frontends: Frontends,
    /// By service index.
    pub ranges: HashMap<u32, BTreeSet<IpNet>>,
    pub ports: Vec<PortSet>,
    pub own_addresses: BTreeMap<IpAddr, u32>,
    pub devices: BTreeMap<u32, Device>,
    /// Of [`OwnedBackend`]s, which the table names: it is mapped.
    pub backend_ids: Ids,
    pub service_ids: ServiceIds,
    /// Balancers that are gone because a policy has changed. Their entries stay for the flows that they began.
    pub kept: BTreeSet<BalancerKey>,
    pub arena: Arena,
    /// By service index; without length where it has none.
    slices: Vec<Slice>,
    /// Services found at start that no balancer has adopted yet.
    pub found: BTreeSet<u32>,
    /// Services whose slices an earlier process wrote, until they have been compared.
    pub unverified: HashSet<u32>,
    pub garbage: Garbage,
    /// What was garbage when the wait for a grace period began.
    waiting: Garbage,
}

/// What programs may still use that have seen the tables of before.
#[derive(Debug, Default)]
pub struct Garbage {
    pub backends: BTreeSet<OwnedBackend>,
    pub slices: Vec<Slice>,
    services: BTreeSet<ServiceId>,
}

impl Garbage {
    fn is_empty(&self) -> bool {
        let Self {
            backends,
            slices,
            services,
        } = self;
        backends.is_empty() && slices.is_empty() && services.is_empty()
    }
}

impl Programmed {
    pub fn new(services: u32, backends: u32, maglev: u32) -> Self {
        Self {
            frontends: Frontends::default(),
            ranges: HashMap::new(),
            ports: Vec::new(),
            own_addresses: BTreeMap::new(),
            devices: BTreeMap::new(),
            backend_ids: Ids::new(backends),
            service_ids: ServiceIds::new(services),
            kept: BTreeSet::new(),
            arena: Arena::new(maglev),
            slices: Vec::new(),
            found: BTreeSet::new(),
            unverified: HashSet::new(),
            garbage: Garbage::default(),
            waiting: Garbage::default(),
        }
    }

    pub fn usage(&self) -> (usize, usize, u32) {
        (
            self.service_ids.used() - self.kept.len(),
            self.backend_ids.used(),
            self.arena.used(),
        )
    }

    /// The number of a backend that is in use.
    pub fn backend_id(&self, store: &dyn Store, backend: &OwnedBackend) -> Option<u32> {
        self.backend_ids.get(backend, |id| backends::named(store, id))
    }

    /// The entry of a service index; empty where nothing was ever written.
    pub fn slot(&self, store: &dyn Store, index: u32) -> Slot {
        let slice = self.slices.get(index as usize).copied();
        Slot {
            // Only an index beyond the table's end cannot be read.
            value: store.read_service(index).unwrap_or_default(),
            slice: slice.filter(|slice| slice.len > 0),
        }
    }

    pub fn set_slice(&mut self, index: u32, slice: Option<Slice>) {
        let place = index as usize;
        let none = Slice { start: 0, len: 0 };
        if self.slices.len() <= place {
            self.slices.resize(place + 1, none);
        }
        self.slices[place] = slice.unwrap_or(none);
    }

    /// The index of a balancer whose entry is in the table.
    pub fn written_service(&self, store: &dyn Store, key: &BalancerKey) -> Option<u32> {
        let index = self.service_ids.get(&ServiceId::Known(key.clone()))?;
        let Slot { value, .. } = self.slot(store, index);
        let is_live = value.head.flags & service_flags::DELETED == 0;
        (is_live && encode::service_frontend(&value) == Some(key.frontend)).then_some(index)
    }

    /// Whether the bits of `PORTS` send packets for a frontend to the frontends' table.
    pub fn lets_through(&self, frontend: &FrontendAddr) -> bool {
        let FrontendAddr { addr, port, proto } = frontend;
        let set = self.ports[port_set_index(proto.number(), *port) as usize];
        let bit = 1 << (port & 63);
        set.any & bit != 0 && (!addr.is_unspecified() || set.wildcard & bit != 0)
    }

    /// Gives a balancer without index the one that was found behind its frontends, if these were the same Service's:
    /// flows of another's must not meet its generation.
    pub fn adopt(&mut self, key: &BalancerKey, desired: &Desired) {
        if self.found.is_empty() || self.service_ids.get(&ServiceId::Known(key.clone())).is_some() {
            return;
        }
        for scope in [Scope::Internal, Scope::External] {
            let frontend = encode::frontend_key(&key.frontend, scope);
            if desired.frontend(&frontend).as_ref() == Some(key)
                && let Some(value) = self.frontends.get(&frontend)
                && value.owner == encode::owner(&key.owner)
                && self.found.remove(&value.service)
            {
                self.service_ids.adopt(value.service, key.clone());
                return;
            }
        }
    }

    /// Gives services found at start the names that they had: those behind their frontends, and those that a policy's change
    /// has left for the flows which they began. Says which these are. Before frontends are written.
    pub fn adopt_found(&mut self, store: &dyn Store, desired: &Desired) -> Vec<BalancerKey> {
        let mut kept = Vec::new();
        for index in self.found.clone() {
            let Some(frontend) = encode::service_frontend(&self.slot(store, index).value) else {
                continue;
            };
            for scope in [Scope::Internal, Scope::External] {
                let at = encode::frontend_key(&frontend, scope);
                let Some(key) = desired.frontend(&at) else {
                    continue;
                };
                let owner = encode::owner(&key.owner);
                if self.frontends.get(&at).is_none_or(|value| value.owner != owner) {
                    continue;
                }
                // What the frontend leads to, then what it led to under another policy.
                self.adopt(&key, desired);
                let has_index = |key: &BalancerKey| {
                    let id = ServiceId::Known(key.clone());
                    self.service_ids.get(&id).is_some()
                };
                let twin = key.twin();
                let Some(by) = [key, twin].into_iter().find(|key| !has_index(key)) else {
                    continue;
                };
                if self.found.remove(&index) {
                    self.service_ids.adopt(index, by.clone());
                    if desired.balancer(&by).is_none() {
                        kept.push(by);
                    }
                }
            }
        }
        kept
    }

    /// Services found at start that nobody has adopted.
    pub fn orphans(&self) -> Vec<ServiceId> {
        self.found.iter().copied().map(ServiceId::Found).collect()
    }

    pub fn has_orphans(&self) -> bool {
        !self.found.is_empty()
    }

    /// Whether a frontend still leads to a service that is about to be deleted.
    pub fn leads_to(&self, store: &dyn Store, index: u32, id: &ServiceId) -> bool {
        let frontend = match id {
            ServiceId::Known(key) => Some(key.frontend),
            ServiceId::Found(_) => encode::service_frontend(&self.slot(store, index).value),
        };
        frontend.is_some_and(|frontend| {
            [Scope::Internal, Scope::External].into_iter().any(|scope| {
                let value = self.frontends.get(&encode::frontend_key(&frontend, scope));
                value.is_some_and(|value| value.service == index)
            })
        })
    }

    /// Lets a service index go, after a grace period.
    pub fn discard(&mut self, id: ServiceId) {
        if let ServiceId::Found(index) = id {
            self.found.remove(&index);
        }
        self.garbage.services.insert(id);
    }

    pub fn has_garbage(&self) -> bool {
        !self.garbage.is_empty() || !self.waiting.is_empty()
    }

    /// From now on, a grace period is waited for.
    pub fn begin_reclaim(&mut self) {
        let Garbage {
            backends,
            slices,
            services,
        } = mem::take(&mut self.garbage);
        self.waiting.backends.extend(backends);
        self.waiting.slices.extend(slices);
        self.waiting.services.extend(services);
    }

    /// It is over: frees what was discarded before it began, save what has come back since, also if it was discarded
    /// again.
    pub fn end_reclaim(&mut self, store: &dyn Store, desired: &Desired) {
        let Garbage {
            backends,
            slices,
            services,
        } = mem::take(&mut self.waiting);
        for slice in slices {
            self.arena.free(slice);
        }
        for key in backends {
            if desired.uses(&key).is_none() && !self.garbage.backends.contains(&key) {
                self.backend_ids.retire(&key, |id| backends::named(store, id));
            }
        }
        for id in services {
            let is_back = matches!(&id, ServiceId::Known(key) if desired.balancer(key).is_some());
            if !is_back && !self.garbage.services.contains(&id) {
                self.service_ids.retire(&id);
            }
        }
    }
}

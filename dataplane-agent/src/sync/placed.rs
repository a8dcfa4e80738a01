//! Where the tables have what each object wants, for whoever reads what they count.

use std::collections::HashMap;

use dataplane_common::backend::Backend;

use super::{
    Syncer,
    backends::{self, OwnedBackend},
    encode,
    service_ids::ServiceId,
};
use crate::{
    compile::{BackendKey, Balancer, BalancerKey},
    model::ObjectRef,
    store::Store,
};

/// The places of one Service, or of a Pod with host ports.
#[derive(Debug, Default)]
pub struct Placed {
    /// Indexes into `SERVICES`.
    pub services: Vec<u32>,
    /// Ids of all endpoints that it has, or has had and whose connections may go on.
    pub backends: Vec<(u32, Backend)>,
}

impl Syncer {
    /// No service has had an index from here on.
    pub fn service_indices(&self) -> u32 {
        self.programmed.service_ids.end()
    }

    /// Who has an index of `SERVICES`, or had it last.
    pub fn service_owner(&self, index: u32) -> Option<ObjectRef> {
        match self.programmed.service_ids.name(index)? {
            ServiceId::Known(key) => Some(key.owner.clone()),
            ServiceId::Found(_) => None,
        }
    }

    /// How many endpoints new connections of a balancer are led to: those that had room in the tables.
    pub fn written_endpoints(&self, store: &dyn Store, owner: &ObjectRef, balancer: &Balancer) -> usize {
        let key = BalancerKey {
            owner: owner.clone(),
            frontend: balancer.frontend,
            outside: !balancer.internal,
        };
        let id = ServiceId::Known(key);
        let index = self.programmed.service_ids.get(&id);
        // Nothing gets there where the frontend has found no room.
        if !index.is_some_and(|index| self.programmed.leads_to(store, index, &id)) {
            return 0;
        }
        let owner = encode::owner(owner);
        let is_written = |key: &&BackendKey| {
            let backend = OwnedBackend { owner, key: **key };
            self.programmed.backend_id(store, &backend).is_some()
        };
        balancer.backends.iter().filter(is_written).count()
    }

    /// Of every object that is wanted, in no order.
    pub fn placed(&self, store: &dyn Store) -> Vec<(ObjectRef, Placed)> {
        let mut backends: HashMap<u32, Vec<(u32, Backend)>> = HashMap::new();
        for id in self.programmed.backend_ids.iter() {
            let backend = backends::read(store, id);
            backends.entry(backend.owner).or_default().push((id, backend));
        }
        let mut placed: HashMap<ObjectRef, Placed> = HashMap::new();
        for key in self.desired.balancers() {
            let index = self.programmed.service_ids.get(&ServiceId::Known(key.clone()));
            placed.entry(key.owner).or_default().services.extend(index);
        }
        for (owner, of_owner) in &mut placed {
            // Owners are known by their hashes: the two that share one have each other's.
            of_owner.backends = backends.get(&encode::owner(owner)).cloned().unwrap_or_default();
        }
        placed.into_iter().collect()
    }
}

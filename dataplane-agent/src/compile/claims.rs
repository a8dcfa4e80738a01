//! Who owns an address and port. The API server keeps cluster addresses and node ports apart, but nothing keeps two
//! Services from naming one external address, and a folder of manifests may hold anything.
//!
//! The owner is the oldest claimant, of equally old ones the first by name: the same on every node and after every
//! order of events.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use super::{FrontendAddr, services};
use crate::model::{Name, Service};

/// Every claim of every Service.
#[derive(Debug, Default)]
pub struct Claims {
    by_frontend: BTreeMap<FrontendAddr, BTreeSet<(i128, Name)>>,
    by_service: HashMap<Name, (i128, Vec<FrontendAddr>)>,
}

impl Claims {
    /// Replaces a Service's claims; returns the other Services that gain or lose by it.
    pub fn set(&mut self, name: &Name, service: Option<&Service>) -> BTreeSet<Name> {
        let before = self.by_service.remove(name);
        let after = service.map(|service| {
            let mut frontends: Vec<FrontendAddr> =
                services::frontends(service).map(|(addr, ..)| addr).collect();
            frontends.sort_unstable();
            frontends.dedup();
            (rank(service), frontends)
        });
        let mut affected = BTreeSet::new();
        if before != after {
            self.replace(name, before.as_ref(), after.as_ref(), &mut affected);
        }
        self.by_service.extend(after.map(|after| (name.clone(), after)));
        affected
    }

    fn replace(
        &mut self,
        name: &Name,
        before: Option<&(i128, Vec<FrontendAddr>)>,
        after: Option<&(i128, Vec<FrontendAddr>)>,
        affected: &mut BTreeSet<Name>,
    ) {
        if let Some((rank, frontends)) = before {
            for frontend in frontends {
                if let Some(claimants) = self.by_frontend.get_mut(frontend) {
                    claimants.remove(&(*rank, name.clone()));
                    affected.extend(claimants.iter().map(|(_, other)| other.clone()));
                    if claimants.is_empty() {
                        self.by_frontend.remove(frontend);
                    }
                }
            }
        }
        if let Some((rank, frontends)) = after {
            for frontend in frontends {
                let claimants = self.by_frontend.entry(*frontend).or_default();
                affected.extend(claimants.iter().map(|(_, other)| other.clone()));
                claimants.insert((*rank, name.clone()));
            }
        }
    }

    /// The Service that is served at an address and port.
    pub fn owner(&self, frontend: &FrontendAddr) -> Option<&Name> {
        self.by_frontend.get(frontend)?.first().map(|(_, name)| name)
    }

    /// Whether any Service claims an address.
    pub fn has_address(&self, addr: IpAddr) -> bool {
        let first = FrontendAddr {
            addr,
            port: 0,
            proto: crate::model::Protocol::Tcp,
        };
        self.by_frontend
            .range(first..)
            .next()
            .is_some_and(|(frontend, _)| frontend.addr == addr)
    }
}

/// Objects without a creation time come last.
fn rank(service: &Service) -> i128 {
    if service.created_ns == 0 {
        i128::MAX
    } else {
        service.created_ns
    }
}

//! Who owns an address and port. The API server keeps cluster addresses and node ports apart, but nothing keeps two
//! Services from naming one external address, and a folder of manifests may hold anything.
//!
//! The owner is the oldest Service, of equally old ones the first by name: the same on every node and after every
//! order of events. A Pod's host port comes after all Services, as its rules do behind kube-proxy's.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use super::FrontendAddr;
use crate::model::{Kind, ObjectRef};

/// Whether it is a Pod, and when it was created.
type Rank = (bool, i128);

/// What an object claims.
type Claim = (Rank, Vec<FrontendAddr>);

/// Every claim of every Service and of this node's Pods.
#[derive(Debug, Default)]
pub struct Claims {
    by_frontend: BTreeMap<FrontendAddr, BTreeSet<(Rank, ObjectRef)>>,
    by_owner: HashMap<ObjectRef, Claim>,
}

impl Claims {
    /// Replaces an object's claims; returns the others that gain or lose by it. `created_ns`: see
    /// [`Service::created_ns`](crate::model::Service::created_ns).
    pub fn set(
        &mut self,
        owner: &ObjectRef,
        created_ns: i128,
        mut frontends: Vec<FrontendAddr>,
    ) -> BTreeSet<ObjectRef> {
        let before = self.by_owner.remove(owner);
        frontends.sort_unstable();
        frontends.dedup();
        let after = (!frontends.is_empty()).then(|| (rank(owner, created_ns), frontends));
        let mut affected = BTreeSet::new();
        if before != after {
            self.replace(owner, before.as_ref(), after.as_ref(), &mut affected);
        }
        self.by_owner.extend(after.map(|after| (owner.clone(), after)));
        affected
    }

    fn replace(
        &mut self,
        owner: &ObjectRef,
        before: Option<&Claim>,
        after: Option<&Claim>,
        affected: &mut BTreeSet<ObjectRef>,
    ) {
        if let Some((rank, frontends)) = before {
            for frontend in frontends {
                if let Some(claimants) = self.by_frontend.get_mut(frontend) {
                    claimants.remove(&(*rank, owner.clone()));
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
                claimants.insert((*rank, owner.clone()));
            }
        }
    }

    /// Who is served at an address and port.
    pub fn owner(&self, frontend: &FrontendAddr) -> Option<&ObjectRef> {
        self.by_frontend.get(frontend)?.first().map(|(_, owner)| owner)
    }

    /// Whether a Service, and not only a Pod's host port, claims an address.
    pub fn has_address(&self, addr: IpAddr) -> bool {
        let first = FrontendAddr {
            addr,
            port: 0,
            proto: crate::model::Protocol::Tcp,
        };
        self.by_frontend
            .range(first..)
            .take_while(|(frontend, _)| frontend.addr == addr)
            .any(|(_, claimants)| {
                let first = claimants.first();
                first.is_some_and(|(_, owner)| owner.kind == Kind::Service)
            })
    }
}

/// Services come before Pods, objects without a creation time last.
fn rank(owner: &ObjectRef, created_ns: i128) -> Rank {
    let created_ns = if created_ns == 0 { i128::MAX } else { created_ns };
    (owner.kind != Kind::Service, created_ns)
}

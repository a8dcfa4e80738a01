//! Who owns an address and port. The API server keeps cluster addresses and node ports apart, but nothing keeps two
//! Services from naming one external address, and a folder of manifests may hold anything.
//!
//! The owner is the oldest Service, of equally old ones the first by name: the same on every node and after every
//! order of events. A Pod's host port comes after all Services, as its rules do behind kube-proxy's.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
};

use super::FrontendAddr;
use crate::model::{Kind, Name, ObjectRef};

/// Of two claims the one of lower rank is served. Services come before Pods, objects without a creation time last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank(u64);

impl Rank {
    const FIRST: Self = Self(0);

    fn new(owner: &ObjectRef, created_ns: i64) -> Self {
        let since_1677 = created_ns.cast_unsigned() ^ 1 << 63;
        let age = if created_ns == 0 { u64::MAX } else { since_1677 };
        Self(age >> 1 | u64::from(owner.kind != Kind::Service) << 63)
    }
}

/// What an object claims.
#[derive(Debug, PartialEq, Eq)]
struct Claim {
    rank: Rank,
    frontends: Box<[FrontendAddr]>,
}

/// Every claim of every Service and of this node's Pods.
#[derive(Debug)]
pub struct Claims {
    /// The first claim of a frontend is served.
    by_frontend: BTreeSet<(FrontendAddr, Rank, ObjectRef)>,
    by_owner: HashMap<ObjectRef, Claim>,
    /// Comes before every object.
    nobody: ObjectRef,
}

impl Default for Claims {
    fn default() -> Self {
        Self {
            by_frontend: BTreeSet::new(),
            by_owner: HashMap::new(),
            nobody: ObjectRef {
                kind: Kind::ALL[0],
                name: Name::FIRST,
            },
        }
    }
}

impl Claims {
    /// Replaces an object's claims; returns the others that gain or lose by it. `created_ns`: see
    /// [`Service::created_ns`](crate::model::Service::created_ns).
    pub fn set(
        &mut self,
        owner: &ObjectRef,
        created_ns: i64,
        mut frontends: Vec<FrontendAddr>,
    ) -> BTreeSet<ObjectRef> {
        frontends.sort_unstable();
        frontends.dedup();
        let after = (!frontends.is_empty()).then(|| Claim {
            rank: Rank::new(owner, created_ns),
            frontends: frontends.into(),
        });
        let mut affected = BTreeSet::new();
        if self.by_owner.get(owner) == after.as_ref() {
            return affected;
        }
        if let Some(Claim { rank, frontends }) = self.by_owner.remove(owner) {
            for frontend in frontends {
                self.by_frontend.remove(&(frontend, rank, owner.clone()));
                affected.extend(self.claimants(frontend).cloned());
            }
        }
        if let Some(Claim { rank, frontends }) = &after {
            for frontend in frontends {
                affected.extend(self.claimants(*frontend).cloned());
                self.by_frontend.insert((*frontend, *rank, owner.clone()));
            }
        }
        self.by_owner.extend(after.map(|after| (owner.clone(), after)));
        affected
    }

    /// Who claims a frontend, the one that is served first.
    fn claimants(&self, frontend: FrontendAddr) -> impl Iterator<Item = &ObjectRef> {
        self.by_frontend
            .range((frontend, Rank::FIRST, self.nobody.clone())..)
            .take_while(move |(at, ..)| *at == frontend)
            .map(|(_, _, owner)| owner)
    }

    /// Who is served at an address and port.
    pub fn owner(&self, frontend: &FrontendAddr) -> Option<&ObjectRef> {
        self.claimants(*frontend).next()
    }

    /// Whether a Service, and not only a Pod's host port, claims an address.
    pub fn has_address(&self, addr: IpAddr) -> bool {
        let first = FrontendAddr {
            addr,
            port: 0,
            proto: crate::model::Protocol::Tcp,
        };
        let mut claims = self
            .by_frontend
            .range((first, Rank::FIRST, self.nobody.clone())..)
            .take_while(|(frontend, ..)| frontend.addr == addr);
        claims.any(|(_, _, owner)| owner.kind == Kind::Service)
    }
}

//! Who owns an address and port. The API server keeps cluster addresses and node ports apart, but nothing keeps two
//! Services from naming one external address, and a folder of manifests may hold anything.
//!
//! The owner is the oldest Service, of equally old ones the first by name: the same on every node and after every
//! order of events. A Pod's host port comes after all Services, as its rules do behind kube-proxy's.

use std::{collections::BTreeSet, mem, net::IpAddr};

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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    rank: Rank,
    /// Sorted.
    frontends: Box<[FrontendAddr]>,
}

impl Default for Claim {
    /// Nothing.
    fn default() -> Self {
        Self {
            rank: Rank::FIRST,
            frontends: Box::default(),
        }
    }
}

impl Claim {
    /// `created_ns`: see [`Service::created_ns`](crate::model::Service::created_ns).
    pub fn new(owner: &ObjectRef, created_ns: i64, frontends: impl Iterator<Item = FrontendAddr>) -> Self {
        let mut frontends: Vec<FrontendAddr> = frontends.collect();
        if frontends.is_empty() {
            return Self::default();
        }
        frontends.sort_unstable();
        frontends.dedup();
        Self {
            rank: Rank::new(owner, created_ns),
            frontends: frontends.into(),
        }
    }
}

/// Every claim of every Service and of this node's Pods.
#[derive(Debug)]
pub struct Claims {
    /// The first claim of a frontend is served.
    by_frontend: BTreeSet<(FrontendAddr, Rank, ObjectRef)>,
    /// Comes before every object.
    nobody: ObjectRef,
    /// No Service may claim them for clients outside.
    pub reserved: Vec<FrontendAddr>,
}

impl Default for Claims {
    fn default() -> Self {
        Self {
            by_frontend: BTreeSet::new(),
            nobody: ObjectRef {
                kind: Kind::ALL[0],
                name: Name::FIRST,
            },
            reserved: Vec::new(),
        }
    }
}

impl Claims {
    /// See [`Compiler::pack_trees`](super::Compiler::pack_trees).
    pub(super) fn pack_tree(&mut self) {
        self.by_frontend = mem::take(&mut self.by_frontend).into_iter().collect();
    }

    /// Replaces what an object claims; returns the others that gain or lose by it.
    pub fn replace(&mut self, owner: &ObjectRef, before: &Claim, after: &Claim) -> BTreeSet<ObjectRef> {
        let mut affected = BTreeSet::new();
        if before == after {
            return affected;
        }
        for frontend in &before.frontends {
            self.by_frontend.remove(&(*frontend, before.rank, owner.clone()));
            affected.extend(self.claimants(*frontend).cloned());
        }
        for frontend in &after.frontends {
            affected.extend(self.claimants(*frontend).cloned());
            self.by_frontend.insert((*frontend, after.rank, owner.clone()));
        }
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

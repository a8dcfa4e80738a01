//! Who has an address, and which sets its policies are.

use std::{io, net::IpAddr};

use dataplane_common::{
    addr::{Family, V4, V6},
    device::own_flags,
    policy::{PolicySet, PolicyTables, REVISION_NONE, SET_NONE},
    tables::{Env, Tables},
};

use super::World;
use crate::{model::policy::Direction, sync::encode};

impl World {
    /// Whether an address is this node's.
    pub fn is_own(&self, addr: IpAddr) -> bool {
        let words = encode::any_addr(addr);
        let flags = match addr {
            IpAddr::V4(_) => Tables::<V4>::own_address(self, words[0]),
            IpAddr::V6(_) => Tables::<V6>::own_address(self, words),
        };
        flags != 0
    }

    /// The addresses of this node at which node ports answer, in order.
    pub fn node_ports_at(&self) -> io::Result<Vec<IpAddr>> {
        let mut found = Vec::new();
        let answers = |flags: u32| flags & own_flags::NODE_PORT != 0;
        self.v4.own_addresses.for_each(|addr, flags| {
            found.extend(answers(*flags).then(|| encode::ip(V4::to_any(*addr), false)));
        })?;
        self.v6.own_addresses.for_each(|addr, flags| {
            found.extend(answers(*flags).then(|| encode::ip(V6::to_any(*addr), true)));
        })?;
        found.sort_unstable();
        Ok(found)
    }

    /// The interface of the Pod of this node that has an address.
    pub fn interface_of(&self, addr: IpAddr) -> Option<u32> {
        let words = encode::any_addr(addr);
        match addr {
            IpAddr::V4(_) => Tables::<V4>::bound(self, &words[0]),
            IpAddr::V6(_) => Tables::<V6>::bound(self, &words),
        }
    }

    /// The sets that an interface's Pod has in a direction: that in force, and what it would be if no policy were a dry run. `None`
    /// where [`Self::is_unknown`].
    pub fn sets_of(&self, ifindex: u32, direction: Direction) -> Option<[u32; 2]> {
        if self.policy_revision() == REVISION_NONE {
            return Some([SET_NONE; 2]);
        }
        let pod = self.pod_policy(ifindex)?;
        Some(match direction {
            Direction::Ingress => [pod.ingress, pod.audit_ingress],
            Direction::Egress => [pod.egress, pod.audit_egress],
        })
    }

    /// Whether an interface is closed because nobody knows whose it is.
    pub fn is_unknown(&self, ifindex: u32) -> bool {
        self.policy_revision() != REVISION_NONE && self.pod_policy(ifindex).is_none()
    }

    pub fn set(&self, id: u32) -> Option<PolicySet> {
        self.policies.set(id).copied()
    }
}

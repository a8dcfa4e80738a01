//! What the agent makes of policies: which pods they are about and where, and what of them cannot be honoured.

use std::collections::BTreeMap;

use super::Agent;
use crate::{
    host::HostState,
    model::{Kind, Name, ObjectRef, Rejected},
    sync::policy::BoundPod,
};

impl Agent {
    /// The pods of this node whose interfaces are known, by ifindex.
    pub(super) fn bound_pods(&self, host: &HostState) -> BTreeMap<u32, BoundPod> {
        let bound = host.bound_pods.iter().filter_map(|(ifindex, pod)| {
            let (namespace, name) = pod.split_once('/')?;
            let name = Name::new(namespace, name);
            let addrs = self.index.pod(&name)?.ips.clone();
            Some((*ifindex, BoundPod { name, addrs }))
        });
        bound.collect()
    }

    /// Pods whose policies are more than a set holds.
    pub(super) fn rejected_by_policies(&self) -> impl Iterator<Item = Rejected> {
        self.policies.pods().iter().flat_map(move |(name, pod)| {
            let object = ObjectRef {
                kind: Kind::Pod,
                name: name.clone(),
            };
            pod.problems.iter().map(move |problem| Rejected {
                origin: self.origins.get(&object).cloned(),
                object: object.to_string(),
                problem: problem.clone(),
            })
        })
    }
}

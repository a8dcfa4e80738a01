//! Whose an address is: of several Pods that claim it, one that is not terminating, then the latest; and the Node that has
//! it.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, HashMap},
    net::IpAddr,
};

use super::{atoms::PodAt, named::is_peer};
use crate::model::{Index, Name, Node, Pod};

/// Who comes first has the address.
type Claim = (bool, Reverse<i64>, Name);

/// The Pods and Nodes of every address.
#[derive(Debug, Default)]
pub struct Owners {
    pods: HashMap<IpAddr, BTreeSet<Claim>>,
    claimed: HashMap<Name, (Claim, Vec<IpAddr>)>,
    nodes: HashMap<IpAddr, BTreeSet<Name>>,
    node_ips: HashMap<Name, Vec<IpAddr>>,
}

impl Owners {
    /// A Pod as it is now, if it is there and owns its addresses; returns the addresses that this is about.
    pub fn set_pod(&mut self, name: &Name, pod: Option<&Pod>) -> BTreeSet<IpAddr> {
        let mut addrs = BTreeSet::new();
        if let Some((claim, ips)) = self.claimed.remove(name) {
            for addr in &ips {
                remove(&mut self.pods, *addr, &claim);
            }
            addrs.extend(ips);
        }
        if let Some(pod) = pod.filter(|pod| is_peer(pod)) {
            let claim = (pod.terminating, Reverse(pod.created_ns), name.clone());
            for addr in &pod.ips {
                self.pods.entry(*addr).or_default().insert(claim.clone());
            }
            addrs.extend(&pod.ips);
            self.claimed.insert(name.clone(), (claim, pod.ips.clone()));
        }
        addrs
    }

    /// A Node as it is now; returns the addresses that this is about.
    pub fn set_node(&mut self, name: &Name, node: Option<&Node>) -> BTreeSet<IpAddr> {
        let before = self.node_ips.remove(name).unwrap_or_default();
        for addr in &before {
            remove(&mut self.nodes, *addr, name);
        }
        let mut addrs: BTreeSet<IpAddr> = before.into_iter().collect();
        if let Some(node) = node {
            for addr in &node.ips {
                self.nodes.entry(*addr).or_default().insert(name.clone());
            }
            addrs.extend(&node.ips);
            self.node_ips.insert(name.clone(), node.ips.clone());
        }
        addrs
    }

    pub fn at<'a>(&self, index: &'a Index, addr: IpAddr) -> (Option<PodAt<'a>>, Option<&'a Node>) {
        let pod = self.pod_at(addr).and_then(|name| index.pod(name));
        let pod = pod.map(|pod| (pod, index.namespace(pod.name.namespace())));
        let node = self.nodes.get(&addr).and_then(BTreeSet::first);
        (pod, node.and_then(|name| index.node_by_name(name)))
    }

    /// The Pod that has an address.
    pub fn pod_at(&self, addr: IpAddr) -> Option<&Name> {
        let claim = self.pods.get(&addr).and_then(BTreeSet::first);
        claim.map(|(.., name)| name)
    }

    /// The addresses of Nodes.
    pub fn node_addrs(&self) -> impl Iterator<Item = IpAddr> {
        self.nodes.keys().copied()
    }
}

fn remove<T: Ord>(owners: &mut HashMap<IpAddr, BTreeSet<T>>, addr: IpAddr, owner: &T) {
    if let Some(of_addr) = owners.get_mut(&addr) {
        of_addr.remove(owner);
        if of_addr.is_empty() {
            owners.remove(&addr);
        }
    }
}

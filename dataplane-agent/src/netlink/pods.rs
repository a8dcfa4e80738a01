//! Which host-side interface leads to which pod, found without entering any namespace: a veth's kernel record names
//! its peer's namespace, and that namespace's addresses can be listed from here.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use dataplane_common::addr::Mac;
use serde::{Deserialize, Serialize};

use super::{
    socket::RequestSocket,
    tables::{self, Link, Tables},
};
use crate::host::{Claim, WantedPods};

/// An interface as the kernel tells it apart: an ifindex is reused, the pair is not while either end lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct InterfaceId {
    pub ifindex: u32,
    pub namespace: i32,
}

/// A pod and the interface it was bound to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    pub interface: InterfaceId,
    pub name: String,
    pub pod_mac: Mac,
    pub host_mac: Mac,
}

/// What is behind a veth whose other end is in another namespace.
#[derive(Clone, Debug)]
struct Candidate {
    interface: InterfaceId,
    /// Addresses of the peer itself, then the namespace's others.
    peer_addresses: BTreeSet<IpAddr>,
    other_addresses: BTreeSet<IpAddr>,
    pod_mac: Mac,
}

/// Remembers which pod has which interface: a pod is bound once, and what another interface claims later does not
/// move it.
#[derive(Debug, Default)]
pub struct PodBinder {
    by_pod: BTreeMap<String, Binding>,
}

impl PodBinder {
    /// Looks for the wanted pods; returns whether some were not found.
    pub fn update(&mut self, socket: &mut RequestSocket, tables: &Tables, wanted: &WantedPods) -> bool {
        let pods = by_name(wanted);
        self.by_pod.retain(|pod, binding| {
            let link = tables.link(binding.interface.ifindex);
            let lives = link.and_then(interface_id) == Some(binding.interface);
            if let (true, Some(link)) = (lives, link) {
                binding.host_mac = host_mac(tables, link);
                binding.name.clone_from(&link.name);
            }
            // Whoever told knows better than what was found by address.
            let told = wanted.claims.get(pod);
            let told_otherwise = told.is_some_and(|claim| claimed(claim) != binding.interface);
            lives && !told_otherwise && (pods.contains_key(pod.as_str()) || told.is_some())
        });
        self.bind_claims(socket, tables, wanted);
        if pods.keys().all(|pod| self.by_pod.contains_key(*pod)) {
            return false;
        }
        let bound = self.by_pod.values().map(|binding| binding.interface);
        let taken: BTreeSet<InterfaceId> = bound.chain(wanted.claims.values().map(claimed)).collect();
        let free: Vec<&Link> = tables
            .links
            .iter()
            .filter(|link| interface_id(link).is_some_and(|interface| !taken.contains(&interface)))
            .collect();
        let candidates: Vec<Candidate> = free.iter().filter_map(|link| inspect(socket, link)).collect();
        self.bind(tables, &pods, &candidates);
        !pods.keys().all(|pod| self.by_pod.contains_key(*pod))
    }

    /// Binds what a CNI plugin has told, also where somebody else was found behind the interface.
    fn bind_claims(&mut self, socket: &mut RequestSocket, tables: &Tables, wanted: &WantedPods) {
        for (pod, claim) in &wanted.claims {
            let interface = claimed(claim);
            if self.by_pod.contains_key(pod) {
                continue;
            }
            let link = tables.link(claim.ifindex);
            let link = link.filter(|link| interface_id(link) == Some(interface));
            let Some((link, candidate)) = link.and_then(|link| Some((link, inspect(socket, link)?))) else {
                continue;
            };
            self.by_pod.retain(|_, binding| binding.interface != interface);
            let binding = Binding {
                interface,
                name: link.name.clone(),
                pod_mac: candidate.pod_mac,
                host_mac: host_mac(tables, link),
            };
            self.by_pod.insert(pod.clone(), binding);
        }
    }

    fn bind(&mut self, tables: &Tables, pods: &BTreeMap<&str, BTreeSet<IpAddr>>, candidates: &[Candidate]) {
        let mut taken = BTreeSet::new();
        for (&pod, addresses) in pods {
            if self.by_pod.contains_key(pod) {
                continue;
            }
            let free = || {
                candidates
                    .iter()
                    .filter(|candidate| !taken.contains(&candidate.interface))
            };
            // Links are listed by age: the oldest claim counts.
            let found = free()
                .find(|candidate| !candidate.peer_addresses.is_disjoint(addresses))
                .or_else(|| free().find(|candidate| !candidate.other_addresses.is_disjoint(addresses)));
            let Some((candidate, link)) =
                found.and_then(|found| Some((found, tables.link(found.interface.ifindex)?)))
            else {
                continue;
            };
            taken.insert(candidate.interface);
            let binding = Binding {
                interface: candidate.interface,
                name: link.name.clone(),
                pod_mac: candidate.pod_mac,
                host_mac: host_mac(tables, link),
            };
            self.by_pod.insert(pod.to_owned(), binding);
        }
    }

    pub fn get(&self, pod: &str) -> Option<&Binding> {
        self.by_pod.get(pod)
    }

    /// The bound pods, by ifindex.
    pub fn names(&self) -> BTreeMap<u32, String> {
        let names = self.by_pod.iter();
        names
            .map(|(pod, binding)| (binding.interface.ifindex, pod.clone()))
            .collect()
    }

    pub fn interfaces(&self) -> BTreeSet<u32> {
        self.by_pod
            .values()
            .map(|binding| binding.interface.ifindex)
            .collect()
    }
}

fn by_name(wanted: &WantedPods) -> BTreeMap<&str, BTreeSet<IpAddr>> {
    let mut pods: BTreeMap<&str, BTreeSet<IpAddr>> = BTreeMap::new();
    for (addr, pod) in &wanted.pods {
        pods.entry(pod).or_default().insert(*addr);
    }
    pods
}

fn claimed(claim: &Claim) -> InterfaceId {
    InterfaceId {
        ifindex: claim.ifindex,
        namespace: claim.namespace,
    }
}

/// The interfaces that may be a pod's.
pub fn candidates(tables: &Tables) -> BTreeSet<InterfaceId> {
    tables.links.iter().filter_map(interface_id).collect()
}

/// A veth whose other end is in another namespace.
pub fn interface_id(link: &Link) -> Option<InterfaceId> {
    let namespace = link
        .peer_namespace
        .filter(|_| link.kind == "veth" && link.peer != 0)?;
    Some(InterfaceId {
        ifindex: link.ifindex,
        namespace,
    })
}

/// None: the namespace has just gone, or the peer has.
fn inspect(socket: &mut RequestSocket, link: &Link) -> Option<Candidate> {
    let interface = interface_id(link)?;
    let addresses = tables::dump_addresses(socket, Some(interface.namespace)).ok()?;
    let peer = tables::get_link(socket, Some(interface.namespace), link.peer).ok()?;
    let (own, others): (Vec<_>, Vec<_>) = addresses
        .into_iter()
        .partition(|address| address.ifindex == link.peer);
    Some(Candidate {
        interface,
        peer_addresses: own.into_iter().map(|address| address.addr).collect(),
        other_addresses: others.into_iter().map(|address| address.addr).collect(),
        pod_mac: peer.mac,
    })
}

/// The link-layer address of the pod's next hop: the interface's own, or its bridge's.
fn host_mac(tables: &Tables, link: &Link) -> Mac {
    match tables.link(link.master) {
        Some(master) if master.kind == "bridge" => master.mac,
        _ => link.mac,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn veth(ifindex: u32) -> Link {
        Link {
            ifindex,
            name: format!("veth{ifindex}"),
            kind: "veth".into(),
            mac: Mac([2, 0, 0, 0, 0, ifindex as u8]),
            peer: 2,
            peer_namespace: Some(ifindex.cast_signed()),
            ..Link::default()
        }
    }

    fn candidate(link: &Link, addr: &str) -> Candidate {
        Candidate {
            interface: interface_id(link).unwrap(),
            peer_addresses: BTreeSet::from([addr.parse().unwrap()]),
            other_addresses: BTreeSet::new(),
            pod_mac: Mac::default(),
        }
    }

    #[test]
    fn the_next_hop_of_a_bridge_port_is_the_bridge() {
        let bridge = Link {
            ifindex: 9,
            kind: "bridge".into(),
            mac: Mac([9; 6]),
            ..Link::default()
        };
        let routed = veth(3);
        let port = Link { master: 9, ..veth(4) };
        let tables = Tables {
            links: vec![routed.clone(), port.clone(), bridge],
            ..Tables::default()
        };
        assert_eq!(host_mac(&tables, &routed), routed.mac);
        assert_eq!(host_mac(&tables, &port), Mac([9; 6]));
    }

    #[test]
    fn the_oldest_claim_counts_and_each_interface_serves_one_pod() {
        let tables = Tables {
            links: vec![veth(3), veth(4)],
            ..Tables::default()
        };
        let candidates: Vec<Candidate> = tables
            .links
            .iter()
            .map(|link| candidate(link, "10.0.1.5"))
            .collect();
        let addresses = BTreeSet::from(["10.0.1.5".parse().unwrap()]);
        let mut binder = PodBinder::default();
        binder.bind(
            &tables,
            &BTreeMap::from([("default/a", addresses.clone())]),
            &candidates,
        );
        assert_eq!(binder.get("default/a").unwrap().interface.ifindex, 3);
        binder.bind(
            &tables,
            &BTreeMap::from([("default/a", addresses)]),
            &candidates[1..],
        );
        assert_eq!(
            binder.get("default/a").unwrap().interface.ifindex,
            3,
            "a bound pod does not move"
        );
    }

    #[test]
    fn interfaces_inside_this_namespace_are_no_pods() {
        assert_eq!(
            interface_id(&Link {
                peer_namespace: None,
                ..veth(3)
            }),
            None
        );
        assert_eq!(
            interface_id(&Link {
                kind: "macvlan".into(),
                ..veth(3)
            }),
            None
        );
    }
}

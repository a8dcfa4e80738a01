//! What the agent makes of this node's pods: their addresses, the range that these come from, and whether one is expected
//! whose interface nobody knows yet.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::{Duration, Instant},
};

use dataplane_common::{policy::SET_NONE, unbound::PodRange};
use ipnet::IpNet;

use super::Agent;
use crate::{
    compile::policy::classes::Place,
    host::Unknown,
    model::{Cause, Kind, Name, ObjectRef, Pod, Problem, Rejected},
    sync::{bound::pod_ranges, policy::BoundPod},
};

/// A Pod whose address is known and that has no interface after this time has none that could be found.
const FOUND_WITHIN: Duration = Duration::from_secs(30);

/// What is kept of it.
#[derive(Debug, Default)]
pub struct Expected {
    /// Pods with an address and without an interface, and since when.
    since: BTreeMap<Name, Instant>,
    /// Those of them that have none that could be found.
    lost: BTreeSet<Name>,
    /// `None`: to be found out anew.
    ranges: Option<[PodRange; 2]>,
    /// Ranges that are not where this node's pods have their addresses from.
    contradicted: BTreeSet<IpNet>,
}

impl Expected {
    /// All that are without an interface have been so since then.
    #[cfg(test)]
    pub fn begin(&mut self, then: Instant) {
        self.since.values_mut().for_each(|since| *since = then);
    }

    /// Pods or this node's object have changed.
    pub fn forget_ranges(&mut self) {
        self.ranges = None;
    }
}

impl Agent {
    /// The interface of each address that a pod of this node has.
    pub(super) fn addresses_of(&self, bound: &BTreeMap<u32, BoundPod>) -> BTreeMap<IpAddr, u32> {
        let mut addrs = BTreeMap::new();
        for (ifindex, pod) in bound {
            let extra = self.index.pod(&pod.name).map_or(&[][..], |pod| &pod.extra_ips);
            let told = self
                .claims
                .get(&pod.name)
                .filter(|claim| claim.ifindex == *ifindex);
            let told = told.map_or(&[][..], |claim| &claim.addrs);
            let all = pod.addrs.iter().chain(extra).chain(told);
            addrs.extend(all.map(|addr| (*addr, *ifindex)));
        }
        addrs
    }

    /// The interfaces whose pods send from their own addresses alone.
    pub(super) fn source_checked(&self, bound: &BTreeMap<u32, BoundPod>) -> BTreeSet<u32> {
        let sends_for_others = |pod: &BoundPod| self.index.pod(&pod.name).is_some_and(|pod| pod.any_source);
        let checked = bound.iter().filter(|(_, pod)| !sends_for_others(pod));
        checked.map(|(ifindex, _)| *ifindex).collect()
    }

    /// The addresses that this node gives to its pods, as far as it is so: some pod networks go their own way and leave
    /// `podCIDRs` to whoever likes them.
    pub(super) fn pod_ranges(&mut self) -> [PodRange; 2] {
        if let Some(ranges) = self.expected.ranges {
            return ranges;
        }
        let cidrs = self.index.node().map_or(&[][..], |node| &node.pod_cidrs);
        let (kept, contradicted): (Vec<IpNet>, Vec<IpNet>) = cidrs
            .iter()
            .copied()
            .partition(|cidr| !self.is_contradicted(*cidr));
        let contradicted: BTreeSet<IpNet> = contradicted.into_iter().collect();
        for cidr in contradicted.difference(&self.expected.contradicted) {
            tracing::info!(
                %cidr,
                "Pods have their addresses from elsewhere, or others from there: addresses of this range are not refused before an interface is bound to them"
            );
        }
        self.expected.contradicted = contradicted;
        let ranges = pod_ranges(&kept);
        self.expected.ranges = Some(ranges);
        ranges
    }

    /// A Pod of this node has an address outside, or one of another node has one inside.
    fn is_contradicted(&self, cidr: IpNet) -> bool {
        let is_of_family = |ip: &IpAddr| ip.is_ipv4() == cidr.addr().is_ipv4();
        let own = self.index.local_pods().filter(|pod| !pod.host_network);
        let mut own = own.flat_map(|pod| pod.ips.iter().filter(|ip| is_of_family(ip)));
        if own.any(|ip| !cidr.contains(ip)) {
            return true;
        }
        let (first, last) = (Place::Addr(cidr.network()), Place::Addr(cidr.broadcast()));
        let inside = self.policies.classes().between(first, last);
        let mut pods = inside.filter_map(|place| match place {
            Place::Addr(addr) => self.index.pod(self.policies.pod_at(addr)?),
            Place::Range(_) => None,
        });
        pods.any(|pod| !pod.host_network && !self.index.is_local(pod))
    }

    /// Says what becomes of interfaces that nobody knows. Returns whether other Pods than before are without one.
    pub(super) fn publish_unknown(&mut self) -> bool {
        let (true, Some(host)) = (self.complete, &self.host) else {
            return false;
        };
        let bound: BTreeSet<&str> = host.bound_pods.values().map(String::as_str).collect();
        let lives = |pod: &&Pod| !pod.host_network && !pod.terminating;
        let local = self.index.local_pods().filter(lives);
        let without: Vec<&Pod> = local
            .filter(|pod| !bound.contains(pod.name.to_string().as_str()))
            .collect();
        let addressed: BTreeSet<&Name> = without
            .iter()
            .filter(|pod| !pod.ips.is_empty())
            .map(|pod| &pod.name)
            .collect();
        let since = &mut self.expected.since;
        since.retain(|name, _| addressed.contains(name));
        for name in addressed {
            since.entry(name.clone()).or_insert_with(Instant::now);
        }
        let is_lost = |name: &Name| {
            since
                .get(name)
                .is_some_and(|since| since.elapsed() >= FOUND_WITHIN)
        };
        let of_policies = self.policies.pods();
        let is_selected = |pod: &Pod| {
            let policy = of_policies.get(&pod.name);
            policy.is_some_and(|policy| policy.sets.iter().any(|set| *set != SET_NONE))
        };
        let unknown = if without.iter().any(|pod| is_selected(pod) && !is_lost(&pod.name)) {
            Unknown::Close
        } else {
            Unknown::Leave
        };
        let lost: BTreeSet<Name> = since.keys().filter(|name| is_lost(name)).cloned().collect();
        self.wanted.send_if_modified(|wanted| {
            let news = wanted.unknown != unknown;
            wanted.unknown = unknown;
            news
        });
        let news = lost != self.expected.lost;
        self.expected.lost = lost;
        news
    }

    /// Pods that no interface leads to: their traffic passes no hook.
    pub(super) fn lost_pods(&self) -> impl Iterator<Item = Rejected> {
        self.expected.lost.iter().map(|name| {
            let object = ObjectRef {
                kind: Kind::Pod,
                name: name.clone(),
            };
            let reason = "no veth of this node leads to it: policies about it are not enforced here, and Services that it asks for are not translated at its interface";
            Rejected {
                origin: self.origins.get(&object).cloned(),
                object: object.to_string(),
                problem: Problem::new("", reason).because(Cause::Unsupported),
            }
        })
    }
}

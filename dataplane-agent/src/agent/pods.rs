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
    model::{Name, Pod},
    sync::{bound::pod_ranges, policy::BoundPod},
};

/// A Pod whose address is known and that has no interface after this time has none that could be found.
const FOUND_WITHIN: Duration = Duration::from_secs(30);

/// What is kept of it.
#[derive(Debug, Default)]
pub struct Expected {
    /// Pods without an interface that policies select, and since when.
    since: BTreeMap<Name, Instant>,
    /// `None`: to be found out anew.
    ranges: Option<[PodRange; 2]>,
    /// Ranges that are not where this node's pods have their addresses from.
    contradicted: BTreeSet<IpNet>,
}

impl Expected {
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

    /// Says what becomes of interfaces that nobody knows.
    pub(super) fn publish_unknown(&mut self) {
        let (true, Some(host)) = (self.complete, &self.host) else {
            return;
        };
        let bound: BTreeSet<&str> = host.bound_pods.values().map(String::as_str).collect();
        let selected = self.policies.pods().iter().filter(|(name, policy)| {
            policy.sets.iter().any(|set| *set != SET_NONE) && !bound.contains(name.to_string().as_str())
        });
        let missing: Vec<Name> = selected.map(|(name, _)| name.clone()).collect();
        let since = &mut self.expected.since;
        since.retain(|name, _| missing.contains(name));
        for name in missing {
            since.entry(name).or_insert_with(Instant::now);
        }
        let mut since = since.iter();
        let index = &self.index;
        let is_expected = since.any(|(name, since)| {
            let may_be_found = |pod: &Pod| pod.ips.is_empty() || since.elapsed() < FOUND_WITHIN;
            index
                .pod(name)
                .is_some_and(|pod| !pod.terminating && may_be_found(pod))
        });
        let unknown = if is_expected {
            Unknown::Close
        } else {
            Unknown::Leave
        };
        self.wanted.send_if_modified(|wanted| {
            let news = wanted.unknown != unknown;
            wanted.unknown = unknown;
            news
        });
    }
}

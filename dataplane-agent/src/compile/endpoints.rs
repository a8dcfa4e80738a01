//! Endpoint selection: which endpoints of a Service port get new connections. Pure, and as kube-proxy does it
//! (its `topology.go` and `endpointslicecache.go`).

use std::{
    collections::{BTreeMap, btree_map::Entry},
    net::IpAddr,
    sync::Arc,
};

use crate::model::{Index, Placement, Pod, Service, ServicePort, SliceFamily, TargetPort};

/// An endpoint of one Service port.
#[derive(Clone, Debug, PartialEq)]
pub struct PortEndpoint {
    pub addr: IpAddr,
    pub port: u16,
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
    pub placement: Arc<Placement>,
}

impl PortEndpoint {
    pub fn node(&self) -> Option<&str> {
        self.placement.node.as_deref()
    }
}

/// From where endpoints are looked at.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    pub node: &'a str,
    pub zone: Option<&'a str>,
}

/// What [`select`] chose.
#[derive(Debug, PartialEq)]
pub struct Selection<'a> {
    /// For policy `Cluster`.
    pub cluster: Vec<&'a PortEndpoint>,
    /// For policy `Local`.
    pub local: Vec<&'a PortEndpoint>,
    /// Some node has an endpoint: an empty `local` drops, so that load balancers try elsewhere, instead of refusing.
    pub any_usable: bool,
}

/// Chooses the endpoints for new connections.
///
/// - `Cluster`: the ready ones; of these, where *every* ready endpoint carries hints and one of them hints here,
///   only those that hint here (this node before this zone). Without any: those that still serve while they
///   terminate.
/// - `Local`: the ready ones of this node; without any, those of this node that still serve while they terminate.
///   Hints do not count.
///
/// An endpoint that is neither ready nor terminating is never chosen, whether or not it serves.
pub fn select<'a>(endpoints: &'a [PortEndpoint], view: &View<'_>) -> Selection<'a> {
    let lingers = |endpoint: &&PortEndpoint| endpoint.serving && endpoint.terminating;
    let is_local = |endpoint: &&PortEndpoint| endpoint.node() == Some(view.node);

    let ready: Vec<&PortEndpoint> = endpoints.iter().filter(|endpoint| endpoint.ready).collect();
    let lingering: Vec<&PortEndpoint> = endpoints.iter().filter(lingers).collect();
    let any_usable = !ready.is_empty() || !lingering.is_empty();
    let with_fallback = |chosen: Vec<&'a PortEndpoint>, fallback: Vec<&'a PortEndpoint>| {
        if chosen.is_empty() { fallback } else { chosen }
    };
    let local = with_fallback(
        ready.iter().copied().filter(is_local).collect(),
        lingering.iter().copied().filter(is_local).collect(),
    );
    Selection {
        cluster: with_fallback(by_hints(ready, view), lingering),
        local,
        any_usable,
    }
}

/// Keeps the endpoints that hint at this node, or else at this zone, if hints are to be followed at all.
fn by_hints<'a>(ready: Vec<&'a PortEndpoint>, view: &View<'_>) -> Vec<&'a PortEndpoint> {
    let hinted = |hints: fn(&PortEndpoint) -> &[Arc<str>], here: &str| {
        let complete = ready.iter().all(|endpoint| !hints(endpoint).is_empty());
        let chosen: Vec<&PortEndpoint> = ready
            .iter()
            .copied()
            .filter(|endpoint| hints(endpoint).iter().any(|hint| **hint == *here))
            .collect();
        (complete && !chosen.is_empty()).then_some(chosen)
    };
    hinted(|endpoint| &endpoint.placement.node_hints, view.node)
        .or_else(|| hinted(|endpoint| &endpoint.placement.zone_hints, view.zone?))
        .unwrap_or(ready)
}

/// The endpoints of a port in one family, each address and port once, in order. They come from the Service's
/// slices, or, where it has a selector and no slice at all, from the Pods that it selects.
pub fn of_port(index: &Index, service: &Service, port: &ServicePort, ipv4: bool) -> Vec<PortEndpoint> {
    let mut found = BTreeMap::new();
    if are_of_pods(index, service) {
        for pod in index.selected_pods(service) {
            if let Some(endpoint) = from_pod(service, port, ipv4, pod) {
                add(&mut found, endpoint);
            }
        }
    } else {
        from_slices(index, service, port, ipv4, &mut found);
    }
    found.into_values().collect()
}

/// Whether the endpoints of a Service are the Pods that it selects, because it has no slice.
pub fn are_of_pods(index: &Index, service: &Service) -> bool {
    index.slices(&service.name).next().is_none() && !service.selector.is_empty()
}

type Found = BTreeMap<(IpAddr, u16), PortEndpoint>;

fn from_slices(index: &Index, service: &Service, port: &ServicePort, ipv4: bool, found: &mut Found) {
    let family = if ipv4 { SliceFamily::V4 } else { SliceFamily::V6 };
    for slice in index.slices(&service.name).filter(|slice| slice.family == family) {
        let ports = slice
            .ports
            .iter()
            .filter(|candidate| candidate.name == port.name && candidate.proto == port.proto);
        for number in ports.map(|port| port.port) {
            for endpoint in slice.endpoints.iter() {
                add(
                    found,
                    PortEndpoint {
                        addr: endpoint.addr,
                        port: number,
                        ready: endpoint.ready,
                        serving: endpoint.serving,
                        terminating: endpoint.terminating,
                        placement: endpoint.placement,
                    },
                );
            }
        }
    }
}

/// As the EndpointSlice controller makes an endpoint of a Pod.
fn from_pod(service: &Service, port: &ServicePort, ipv4: bool, pod: &Pod) -> Option<PortEndpoint> {
    if pod.finished {
        return None;
    }
    let addr = pod.ips.iter().copied().find(|ip| ip.is_ipv4() == ipv4)?;
    let number = match &port.target {
        TargetPort::Number(number) => *number,
        TargetPort::Name(name) => {
            let named = |candidate: &&crate::model::PodPort| {
                *candidate.name == **name && candidate.proto == port.proto
            };
            pod.ports.iter().find(named)?.port
        }
    };
    Some(PortEndpoint {
        addr,
        port: number,
        ready: service.publish_not_ready || pod.ready && !pod.terminating,
        serving: pod.ready,
        terminating: pod.terminating,
        placement: Arc::new(Placement {
            node: pod.node.clone(),
            ..Placement::default()
        }),
    })
}

/// Adds an endpoint; of two with one address and port the more usable one stays, whatever their order. It is local
/// if either is.
fn add(found: &mut Found, endpoint: PortEndpoint) {
    match found.entry((endpoint.addr, endpoint.port)) {
        Entry::Vacant(vacant) => {
            vacant.insert(endpoint);
        }
        Entry::Occupied(mut occupied) => {
            let other = occupied.get_mut();
            let rank = |endpoint: &PortEndpoint| {
                (
                    endpoint.ready,
                    endpoint.serving,
                    !endpoint.terminating,
                    endpoint.placement.clone(),
                )
            };
            let node = other.placement.node.clone();
            let node = node.or_else(|| endpoint.placement.node.clone());
            if rank(&endpoint) > rank(other) {
                *other = endpoint;
            }
            if other.placement.node.is_none() && node.is_some() {
                Arc::make_mut(&mut other.placement).node = node;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VIEW: View<'_> = View {
        node: "n1",
        zone: Some("a"),
    };

    /// `ready`, `not-ready`, `lingering` (serving and terminating) or `terminating`, `@node`, then zone hints.
    fn endpoint(last: u8, state: &str, node: &str, zones: &[&str]) -> PortEndpoint {
        PortEndpoint {
            addr: IpAddr::from([10, 0, 0, last]),
            port: 80,
            ready: state == "ready",
            serving: matches!(state, "ready" | "lingering"),
            terminating: matches!(state, "lingering" | "terminating"),
            placement: Arc::new(Placement {
                node: Some(node.into()),
                zone_hints: zones.iter().map(|zone| Arc::from(*zone)).collect(),
                node_hints: Box::default(),
            }),
        }
    }

    fn check(endpoints: &[PortEndpoint], cluster: &[u8], local: &[u8], any_usable: bool) {
        let last = |chosen: Vec<&PortEndpoint>| -> Vec<u8> {
            let addrs = chosen.into_iter().map(|endpoint| endpoint.addr.to_string());
            addrs
                .map(|addr| addr.rsplit('.').next().unwrap().parse().unwrap())
                .collect()
        };
        let selection = select(endpoints, &VIEW);
        assert_eq!(last(selection.cluster), cluster, "cluster");
        assert_eq!(last(selection.local), local, "local");
        assert_eq!(selection.any_usable, any_usable);
    }

    #[test]
    fn ready_ones_first_then_the_lingering() {
        check(
            &[
                endpoint(1, "ready", "n1", &[]),
                endpoint(2, "lingering", "n1", &[]),
            ],
            &[1],
            &[1],
            true,
        );
        check(
            &[
                endpoint(1, "ready", "n2", &[]),
                endpoint(2, "lingering", "n1", &[]),
            ],
            &[1],
            &[2],
            true,
        );
        check(
            &[
                endpoint(1, "not-ready", "n1", &[]),
                endpoint(2, "lingering", "n2", &[]),
            ],
            &[2],
            &[],
            true,
        );
        check(
            &[
                endpoint(1, "terminating", "n1", &[]),
                endpoint(2, "not-ready", "n1", &[]),
            ],
            &[],
            &[],
            false,
        );
    }

    #[test]
    fn hints_count_when_all_have_them_and_one_is_for_here() {
        check(
            &[
                endpoint(1, "ready", "n2", &["a"]),
                endpoint(2, "ready", "n1", &["b"]),
            ],
            &[1],
            &[2],
            true,
        );
        check(
            &[
                endpoint(1, "ready", "n2", &["a"]),
                endpoint(2, "ready", "n2", &[]),
            ],
            &[1, 2],
            &[],
            true,
        );
        check(
            &[
                endpoint(1, "ready", "n2", &["b"]),
                endpoint(2, "ready", "n2", &["c"]),
            ],
            &[1, 2],
            &[],
            true,
        );
        check(
            &[
                endpoint(1, "ready", "n2", &["a"]),
                endpoint(2, "not-ready", "n2", &[]),
            ],
            &[1],
            &[],
            true,
        );
    }
}

//! A Service's frontends, and the balancers behind them.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use super::{
    BackendKey, Balancer, Compiled, EndpointInfo, FrontendAddr, Options, Policy,
    claims::Claims,
    endpoints::{self, PortEndpoint, Selection, View},
};
use crate::model::{Index, ObjectRef, Problem, Service, ServicePort};

/// What kind of address a frontend has, which says whose policy counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reached {
    /// The internal policy, whoever the client is.
    ByClusterIp,
    /// The external policy for clients outside; clients inside reach every endpoint.
    FromOutside,
}

/// Every frontend of a Service with its port and the field that asks for it.
pub fn frontends(
    service: &Service,
    options: Options,
) -> impl Iterator<Item = (FrontendAddr, &ServicePort, Reached, String)> {
    let external_ips: &[IpAddr] = if options.external_ips {
        &service.external_ips
    } else {
        &[]
    };
    service.ports.iter().flat_map(move |port| {
        let at = |addr, number| FrontendAddr {
            addr,
            port: number,
            proto: port.proto,
        };
        let cluster = service.cluster_ips.iter().enumerate().map(move |(i, addr)| {
            let field = if i == 0 {
                "spec.clusterIP".to_owned()
            } else {
                format!("spec.clusterIPs[{i}]")
            };
            (at(*addr, port.port), port, Reached::ByClusterIp, field)
        });
        let external = external_ips.iter().map(move |addr| {
            let field = "spec.externalIPs".to_owned();
            (at(*addr, port.port), port, Reached::FromOutside, field)
        });
        let ingress = service.ingress_ips.iter().map(move |addr| {
            let field = "status.loadBalancer.ingress".to_owned();
            (at(*addr, port.port), port, Reached::FromOutside, field)
        });
        let families = [
            service.ipv4.then_some(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
            service.ipv6.then_some(IpAddr::V6(Ipv6Addr::UNSPECIFIED)),
        ];
        let node = port.node_port.into_iter().flat_map(move |number| {
            families.into_iter().flatten().map(move |addr| {
                let field = format!("spec.ports[{}].nodePort", port.place);
                (at(addr, number), port, Reached::FromOutside, field)
            })
        });
        cluster.chain(external).chain(ingress).chain(node)
    })
}

/// The endpoints of one port in one family, chosen for either policy.
struct Chosen {
    cluster: Arc<[BackendKey]>,
    local: Arc<[BackendKey]>,
    drop_local: bool,
}

/// Compiles one Service. What another Service owns becomes a problem.
pub fn compile(
    index: &Index,
    service: &Service,
    options: Options,
    claims: &Claims,
) -> (Compiled, Vec<Problem>) {
    let mut compiled = Compiled::default();
    let mut problems = Vec::new();
    if !options.external_ips && !service.external_ips.is_empty() {
        problems.push(Problem::new("spec.externalIPs", "switched off by --external-ips"));
    }
    let this = ObjectRef::service(&service.name);
    let mut chosen: BTreeMap<(usize, bool), Chosen> = BTreeMap::new();
    let mut taken: Vec<FrontendAddr> = Vec::new();
    for (frontend, port, reached, field) in frontends(service, options) {
        if taken.contains(&frontend) {
            continue;
        }
        taken.push(frontend);
        if let Some(owner) = claims.owner(&frontend)
            && *owner != this
        {
            let reason = format!("{} is taken by {owner}", describe(&frontend));
            problems.push(Problem::new(field, reason));
            continue;
        }
        let ipv4 = frontend.addr.is_ipv4();
        let chosen = chosen
            .entry((port.place, ipv4))
            .or_insert_with(|| choose(index, service, port, ipv4, &mut compiled.endpoints));
        let balancer = |policy, internal, external| Balancer {
            frontend,
            policy,
            internal,
            external,
            backends: match policy {
                Policy::Cluster => chosen.cluster.clone(),
                Policy::Local => chosen.local.clone(),
            },
            drop_when_empty: policy == Policy::Local && chosen.drop_local,
            affinity_s: service.affinity_s,
        };
        match reached {
            Reached::ByClusterIp if service.internal_local => {
                compiled.balancers.push(balancer(Policy::Local, true, true));
            }
            Reached::FromOutside if service.external_local => {
                compiled.balancers.push(balancer(Policy::Cluster, true, false));
                compiled.balancers.push(balancer(Policy::Local, false, true));
            }
            Reached::ByClusterIp | Reached::FromOutside => {
                compiled.balancers.push(balancer(Policy::Cluster, true, true));
            }
        }
    }
    (compiled, problems)
}

/// An address and port for people.
pub fn describe(frontend: &FrontendAddr) -> String {
    let FrontendAddr { addr, port, proto } = frontend;
    let proto = proto.as_str();
    match addr {
        addr if addr.is_unspecified() => format!("node port {port}/{proto}"),
        IpAddr::V4(addr) => format!("{addr}:{port}/{proto}"),
        IpAddr::V6(addr) => format!("[{addr}]:{port}/{proto}"),
    }
}

fn choose(
    index: &Index,
    service: &Service,
    port: &ServicePort,
    ipv4: bool,
    all: &mut BTreeMap<BackendKey, EndpointInfo>,
) -> Chosen {
    let endpoints = endpoints::of_port(index, service, port, ipv4);
    let view = View {
        node: index.node_name(),
        zone: index.node().and_then(|node| node.zone()),
    };
    let key = |endpoint: &PortEndpoint| BackendKey {
        addr: endpoint.addr,
        port: endpoint.port,
        proto: port.proto,
    };
    for endpoint in &endpoints {
        let info = EndpointInfo {
            serving: endpoint.serving || endpoint.ready,
            local: endpoint.node.as_deref() == Some(view.node),
        };
        // One address and port may stand behind several ports of the Service.
        let known = all.entry(key(endpoint)).or_insert(info);
        known.serving |= info.serving;
        known.local |= info.local;
    }
    let Selection {
        cluster,
        local,
        any_usable,
    } = endpoints::select(&endpoints, &view);
    let keys = |selected: Vec<&PortEndpoint>| -> Arc<[BackendKey]> {
        let mut keys: Vec<BackendKey> = selected.into_iter().map(key).collect();
        keys.sort_unstable();
        keys.into()
    };
    Chosen {
        drop_local: local.is_empty() && any_usable,
        cluster: keys(cluster),
        local: keys(local),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::decode::{Decoded, decode};

    #[test]
    fn external_addresses_can_be_switched_off() {
        let service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "a", "namespace": "ns"},
            "spec": {"clusterIP": "10.96.0.1", "externalIPs": ["198.51.100.1"], "ports": [{"port": 80}]},
        });
        let Decoded::Object { key, object, .. } = decode(&service) else {
            panic!("refused");
        };
        let mut index = Index::new("n1");
        index.apply(object);
        let service = index.service(&key.name).unwrap();
        let compiled = |external_ips| {
            let (compiled, problems) = compile(&index, service, Options { external_ips }, &Claims::default());
            let frontends = compiled
                .balancers
                .iter()
                .map(|balancer| describe(&balancer.frontend));
            let fields = problems.into_iter().map(|problem| problem.field);
            (frontends.collect::<Vec<_>>(), fields.collect::<Vec<_>>())
        };
        let both = vec!["10.96.0.1:80/TCP".to_owned(), "198.51.100.1:80/TCP".to_owned()];
        assert_eq!(compiled(true), (both.clone(), vec![]));
        assert_eq!(
            compiled(false),
            (both[..1].to_vec(), vec!["spec.externalIPs".to_owned()])
        );
    }
}

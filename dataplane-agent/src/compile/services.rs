//! A Service's frontends, and the balancers behind them.

use std::{
    collections::{BTreeMap, HashSet},
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use ipnet::IpNet;

use super::{
    BackendKey, Balancer, Compiled, EndpointInfo, FrontendAddr, Options, Policy,
    claims::Claims,
    endpoints::{self, PortEndpoint, Selection, View},
};
use crate::config::{ServiceEcho, SourceRangesFor};
use crate::model::{Cause, Index, ObjectRef, Problem, Service, ServicePort};

/// What kind of address a frontend has, which says whose policy counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reached {
    /// The internal policy, whoever the client is.
    ByClusterIp,
    /// The external policy for clients outside; clients inside reach every endpoint.
    FromOutside,
}

/// The field of a Service that asks for a frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// The first of `spec.clusterIPs` is `spec.clusterIP`.
    ClusterIp(usize),
    ExternalIp,
    Ingress,
    /// Of the port at this place.
    NodePort(u16),
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Field::ClusterIp(0) => f.write_str("spec.clusterIP"),
            Field::ClusterIp(place) => write!(f, "spec.clusterIPs[{place}]"),
            Field::ExternalIp => f.write_str("spec.externalIPs"),
            Field::Ingress => f.write_str("status.loadBalancer.ingress"),
            Field::NodePort(place) => write!(f, "spec.ports[{place}].nodePort"),
        }
    }
}

/// Every frontend of a Service with its port and the field that asks for it.
pub fn frontends(
    service: &Service,
    options: Options,
) -> impl Iterator<Item = (FrontendAddr, &ServicePort, Reached, Field)> {
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
            let field = Field::ClusterIp(i);
            (at(*addr, port.port), port, Reached::ByClusterIp, field)
        });
        let external = external_ips.iter().map(move |addr| {
            (
                at(*addr, port.port),
                port,
                Reached::FromOutside,
                Field::ExternalIp,
            )
        });
        let ingress = service
            .ingress_ips
            .iter()
            .map(move |addr| (at(*addr, port.port), port, Reached::FromOutside, Field::Ingress));
        let families = [
            service.ipv4.then_some(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
            service.ipv6.then_some(IpAddr::V6(Ipv6Addr::UNSPECIFIED)),
        ];
        let node = port.node_port.into_iter().flat_map(move |number| {
            families.into_iter().flatten().map(move |addr| {
                let field = Field::NodePort(port.place);
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
    let mut balancers = Vec::new();
    let mut endpoints = BTreeMap::new();
    let mut problems = Vec::new();
    if !options.external_ips && !service.external_ips.is_empty() {
        let problem = Problem::new("spec.externalIPs", "switched off by --external-ips");
        problems.push(problem.because(Cause::Disabled));
    }
    let this = ObjectRef::service(&service.name);
    let mut chosen: BTreeMap<(u16, bool), Chosen> = BTreeMap::new();
    // The first frontend of each port and family, where its clients are remembered: the cluster IP's.
    let mut first: BTreeMap<(u16, bool), FrontendAddr> = BTreeMap::new();
    let mut taken: HashSet<FrontendAddr> = HashSet::new();
    for (frontend, port, reached, field) in frontends(service, options) {
        if !taken.insert(frontend) {
            continue;
        }
        if let Some(owner) = claims.owner(&frontend)
            && *owner != this
        {
            let reason = format!("{} is taken by {owner}", describe(&frontend));
            problems.push(Problem::new(field.to_string(), reason).because(Cause::Conflict));
            continue;
        }
        if field == Field::ExternalIp && claims.reserved.contains(&frontend) {
            let reason = format!(
                "{} is where the agent reaches the API server",
                describe(&frontend)
            );
            problems.push(Problem::new(field.to_string(), reason).because(Cause::Conflict));
            continue;
        }
        let ipv4 = frontend.addr.is_ipv4();
        let chosen = chosen
            .entry((port.place, ipv4))
            .or_insert_with(|| choose(index, service, port, ipv4, &mut endpoints));
        let source_ranges = source_ranges(index, service, options, &frontend, reached);
        let first = *first.entry((port.place, ipv4)).or_insert(frontend);
        let balancer = |policy, internal, external| Balancer {
            frontend,
            internal,
            external,
            backends: match policy {
                Policy::Cluster => chosen.cluster.clone(),
                Policy::Local => chosen.local.clone(),
            },
            drop_when_empty: policy == Policy::Local && chosen.drop_local,
            affinity_s: service.affinity_s,
            affinity_of: (first != frontend || !internal).then_some(first),
            source_ranges: source_ranges.clone(),
            // Who is in no source range is to hear nothing, and an echo is for all or none.
            echo: options.service_echo == ServiceEcho::Answer
                && source_ranges.is_empty()
                && !frontend.addr.is_unspecified(),
        };
        match reached {
            Reached::ByClusterIp if service.internal_local => {
                balancers.push(balancer(Policy::Local, true, true));
            }
            Reached::FromOutside if service.external_local => {
                balancers.push(balancer(Policy::Cluster, true, false));
                balancers.push(balancer(Policy::Local, false, true));
            }
            Reached::ByClusterIp | Reached::FromOutside => {
                balancers.push(balancer(Policy::Cluster, true, true));
            }
        }
    }
    (Compiled::new(balancers, endpoints), problems)
}

/// Who may use a frontend; empty: everybody. As with kube-proxy, ranges say nothing of a family that none of them is of.
fn source_ranges(
    index: &Index,
    service: &Service,
    options: Options,
    frontend: &FrontendAddr,
    reached: Reached,
) -> Arc<[IpNet]> {
    let addr = frontend.addr;
    let is_guarded = service.ingress_ips.contains(&addr)
        || options.source_ranges_for == SourceRangesFor::All && reached == Reached::FromOutside;
    if !is_guarded {
        return Arc::default();
    }
    let of_family = |range: &&IpNet| matches!(range, IpNet::V4(_)) == addr.is_ipv4();
    let ranges = service.source_ranges.iter().filter(of_family);
    let mut ranges: Vec<IpNet> = ranges.map(IpNet::trunc).collect();
    let node_ips = index.node().map_or(&[][..], |node| &node.internal_ips);
    let lets_node_in = node_ips
        .iter()
        .any(|ip| ranges.iter().any(|range| range.contains(ip)));
    if lets_node_in && !addr.is_unspecified() {
        // Where the address is one of the node's own, its processes ask with that as their source.
        ranges.push(addr.into());
    }
    ranges.sort_unstable();
    ranges.dedup();
    ranges.into()
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
            local: endpoint.node() == Some(view.node),
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
    use serde_json::{Value, json};

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
        let options = |external_ips| Options {
            external_ips,
            ..Options::default()
        };
        let compiled = |external_ips| {
            let (compiled, problems) = compile(&index, &service, options(external_ips), &Claims::default());
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

    #[test]
    fn no_external_ip_takes_the_way_to_the_api_server() {
        let service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "ns", "name": "s"},
            "spec": {"clusterIP": "10.96.0.1", "externalIPs": ["192.0.2.1"], "ports": [
                {"name": "a", "port": 6443}, {"name": "b", "port": 80},
            ]},
        });
        let Decoded::Object { key, object, .. } = decode(&service) else {
            panic!("refused");
        };
        let mut index = Index::new("n1");
        let dirty = index.apply(object);
        let mut compiler = crate::compile::Compiler::default();
        compiler.reserve(&["192.0.2.1:6443".parse().unwrap()]);
        let updates = compiler.update(&index, &dirty);
        let of_service = updates.into_iter().find(|(owner, _)| *owner == key);
        let update = of_service.unwrap().1.unwrap();
        let mut served: Vec<String> = update
            .balancers
            .iter()
            .map(|one| describe(&one.frontend))
            .collect();
        served.sort_unstable();
        assert_eq!(
            served,
            ["10.96.0.1:6443/TCP", "10.96.0.1:80/TCP", "192.0.2.1:80/TCP"]
        );
        let service = index.service(&key.name).unwrap();
        let (_, problems) = compile(&index, &service, Options::default(), &compiler.claims);
        let reasons: Vec<&str> = problems.iter().map(|problem| &*problem.reason).collect();
        assert_eq!(
            reasons,
            ["192.0.2.1:6443/TCP is where the agent reaches the API server"]
        );
    }

    /// Service `s` of namespace `ns`, on node `n1`.
    fn compiled(documents: &[Value], options: Options) -> Compiled {
        let mut index = Index::new("n1");
        for document in documents {
            let Decoded::Object { object, .. } = decode(document) else {
                panic!("refused: {document}");
            };
            index.apply(object);
        }
        let name = crate::model::Name::new("ns", "s");
        let service = index.service(&name).unwrap();
        let (compiled, problems) = compile(&index, &service, options, &Claims::default());
        assert!(problems.is_empty(), "{problems:?}");
        compiled
    }

    /// What counts as a port without a local endpoint, for clients inside and outside.
    fn without_local(spec: &Value, nodes: &[&str]) -> (usize, usize) {
        let mut service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "s", "namespace": "ns"},
            "spec": {
                "type": "NodePort", "clusterIP": "10.96.0.1", "externalIPs": ["198.18.1.1"],
                "ports": [{"port": 80, "nodePort": 30080}],
            },
        });
        let fields = service["spec"].as_object_mut().unwrap();
        fields.extend(spec.as_object().unwrap().clone());
        let endpoints = nodes
            .iter()
            .enumerate()
            .map(|(place, node)| json!({"addresses": [format!("10.244.0.{place}")], "nodeName": node}));
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": "s-1", "namespace": "ns", "labels": {"kubernetes.io/service-name": "s"}},
            "endpoints": endpoints.collect::<Vec<Value>>(), "ports": [{"port": 8080}],
        });
        compiled(&[service, slice], Options::default()).without_local()
    }

    #[test]
    fn ports_without_a_local_endpoint_are_counted_once_however_they_are_reached() {
        let (inside, outside) = (
            json!({"internalTrafficPolicy": "Local"}),
            json!({"externalTrafficPolicy": "Local"}),
        );
        assert_eq!(without_local(&inside, &["n2"]), (1, 0));
        assert_eq!(without_local(&outside, &["n2", "n3"]), (0, 1));
        assert_eq!(without_local(&outside, &["n1", "n2"]), (0, 0));
        // Nobody has one: that is refused, not dropped.
        assert_eq!(without_local(&outside, &[]), (0, 0));
        assert_eq!(without_local(&json!({}), &["n2"]), (0, 0));
    }

    /// A Service's frontends and who may use them, with this node at 192.0.2.1.
    fn guards(ranges: &[&str], source_ranges_for: SourceRangesFor) -> Vec<String> {
        let documents: [Value; 2] = [
            json!({
                "apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"},
                "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
            }),
            json!({
                "apiVersion": "v1", "kind": "Service", "metadata": {"name": "s", "namespace": "ns"},
                "spec": {
                    "type": "LoadBalancer", "clusterIPs": ["10.96.0.1", "fd00::1"],
                    "ipFamilies": ["IPv4", "IPv6"], "externalIPs": ["198.18.1.1"],
                    "loadBalancerSourceRanges": ranges, "ports": [{"port": 80, "nodePort": 30080}],
                },
                "status": {"loadBalancer": {"ingress": [{"ip": "198.18.0.1"}, {"ip": "2001:db8::1"}]}},
            }),
        ];
        let options = Options {
            source_ranges_for,
            ..Options::default()
        };
        let compiled = compiled(&documents, options);
        let guarded = compiled
            .balancers
            .iter()
            .filter(|one| !one.source_ranges.is_empty());
        guarded
            .map(|one| {
                let ranges: Vec<String> = one.source_ranges.iter().map(ToString::to_string).collect();
                format!("{} {}", one.frontend.addr, ranges.join(" "))
            })
            .collect()
    }

    #[test]
    fn source_ranges_guard_the_addresses_of_the_load_balancer_each_family_its_own() {
        use SourceRangesFor::{All, Lb};
        assert!(guards(&[], All).is_empty());
        assert_eq!(guards(&["203.0.113.0/24"], Lb), ["198.18.0.1 203.0.113.0/24"]);
        assert_eq!(
            guards(&["203.0.113.0/24", "2001:db8:1::/64"], Lb),
            ["198.18.0.1 203.0.113.0/24", "2001:db8::1 2001:db8:1::/64"]
        );
        // A node inside a range may ask by the address itself.
        assert_eq!(
            guards(&["192.0.2.0/28"], Lb),
            ["198.18.0.1 192.0.2.0/28 198.18.0.1/32"]
        );
        assert_eq!(
            guards(&["192.0.2.0/28"], All),
            [
                "0.0.0.0 192.0.2.0/28",
                "198.18.0.1 192.0.2.0/28 198.18.0.1/32",
                "198.18.1.1 192.0.2.0/28 198.18.1.1/32"
            ]
        );
    }
}

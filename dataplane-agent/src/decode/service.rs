//! Services: addresses, ports and policies, with the API's defaults.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;
use k8s_openapi::{
    api::core::v1::{self as core, ServiceSpec},
    apimachinery::pkg::util::intstr::IntOrString,
};

use super::{ProtocolField, Refused, created_ns, label, parse_cidr, parse_ip, parse_port, parse_protocol};
use crate::model::{Labels, Name, Problem, Proxied, Service, ServicePort, TargetPort, shared};

/// Services with this label belong to another proxy.
const PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// Services with this label are headless for proxies.
const HEADLESS: &str = "service.kubernetes.io/headless";

/// The default of `sessionAffinityConfig.clientIP.timeoutSeconds`, and the most it may be.
const AFFINITY_S: i32 = 10_800;
const AFFINITY_AT_MOST_S: i32 = 86_400;

/// Every port of every protocol: more cannot be told apart.
const PORTS_AT_MOST: usize = 1 << 16;

pub fn decode(name: Name, service: core::Service, problems: &mut Vec<Problem>) -> Result<Service, Refused> {
    let spec = service.spec.unwrap_or_default();
    let mut refused = Refused::new();
    let kind = spec.type_.as_deref().unwrap_or("ClusterIP");
    if !matches!(kind, "ClusterIP" | "NodePort" | "LoadBalancer" | "ExternalName") {
        refused.push(Problem::new(
            "spec.type",
            format!("`{kind}` is no type of Service"),
        ));
    }
    let headless = spec.cluster_ip.as_deref() == Some("None");
    let has_label = |name| label(&service.metadata, name).is_some();
    let proxied = match kind {
        "ExternalName" => Proxied::ExternalName,
        _ if headless => Proxied::Headless,
        _ if has_label(PROXY_NAME) || has_label(HEADLESS) => Proxied::Elsewhere,
        _ => Proxied::Here,
    };

    let cluster_ips = if proxied.is_here() {
        cluster_ips(&spec, &mut refused)
    } else {
        Vec::new()
    };
    if proxied.is_here() && cluster_ips.is_empty() && refused.is_empty() {
        let reason = "missing: addresses are not allocated here, give one or `None`";
        problems.push(Problem::new("spec.clusterIP", reason));
    }
    let ports = ports(&spec, kind, proxied.is_here(), problems, &mut refused);
    let (ipv4, ipv6) = families(&spec, &cluster_ips, &mut refused);
    let mut external_ips = external_ips(&spec, problems);
    let mut ingress_ips = Vec::new();
    if kind == "LoadBalancer" {
        let ingress = service.status.and_then(|status| status.load_balancer);
        let ingress = ingress.and_then(|status| status.ingress).unwrap_or_default();
        ingress_ips = self::ingress_ips(&ingress, problems);
    }
    for (field, ips) in [
        ("spec.externalIPs", &mut external_ips),
        ("status.loadBalancer.ingress", &mut ingress_ips),
    ] {
        ips.retain(|ip| {
            let is_of_family = if ip.is_ipv4() { ipv4 } else { ipv6 };
            if !is_of_family && proxied.is_here() {
                problems.push(Problem::new(
                    field,
                    format!("{ip} is not of the Service's families"),
                ));
            }
            is_of_family
        });
    }
    let external = kind != "ClusterIP" || !external_ips.is_empty();
    let internal_local = is_local(
        spec.internal_traffic_policy.as_deref(),
        "spec.internalTrafficPolicy",
        &mut refused,
    );
    let external_local = is_local(
        spec.external_traffic_policy.as_deref(),
        "spec.externalTrafficPolicy",
        &mut refused,
    );
    let health_check_node_port = match spec.health_check_node_port {
        Some(port) if port != 0 && kind == "LoadBalancer" && external_local => {
            parse_port(port, || "spec.healthCheckNodePort".to_owned())
                .map_err(|problem| refused.push(problem))
                .ok()
        }
        _ => None,
    };
    let source_ranges = source_ranges(&spec, &mut refused);
    let affinity_s = affinity(&spec, &mut refused);
    let selector = Labels::new(&spec.selector.unwrap_or_default()).unwrap_or_else(|| {
        refused.push(Problem::new("spec.selector", "a key or value contains NUL"));
        Labels::default()
    });
    if !refused.is_empty() {
        return Err(refused);
    }
    Ok(Service {
        name,
        proxied,
        cluster_ips: cluster_ips.into(),
        external_ips: external_ips.into(),
        ingress_ips: ingress_ips.into(),
        ipv4,
        ipv6,
        ports: ports.into(),
        selector,
        internal_local,
        external_local: external_local && external,
        health_check_node_port,
        source_ranges: source_ranges.into(),
        affinity_s,
        publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
        created_ns: created_ns(&service.metadata),
    })
}

fn cluster_ips(spec: &ServiceSpec, refused: &mut Refused) -> Vec<IpAddr> {
    let mut texts: Vec<(String, &str)> = spec
        .cluster_ips
        .iter()
        .flatten()
        .enumerate()
        .map(|(i, ip)| (format!("spec.clusterIPs[{i}]"), ip.as_str()))
        .collect();
    if let Some(ip) = spec.cluster_ip.as_deref()
        && !texts.iter().any(|(_, text)| *text == ip)
    {
        texts.insert(0, ("spec.clusterIP".to_owned(), ip));
    }
    let mut ips: Vec<IpAddr> = Vec::new();
    for (field, text) in texts.into_iter().filter(|(_, text)| !text.is_empty()) {
        match parse_ip(text) {
            Ok(ip) if ip.is_unspecified() || ip.is_multicast() => {
                refused.push(Problem::new(field, format!("{ip} is no address for a Service")));
            }
            Ok(ip) if ips.contains(&ip) => {}
            Ok(ip) if ips.iter().any(|other| other.is_ipv4() == ip.is_ipv4()) => {
                refused.push(Problem::new(
                    field,
                    format!("{ip} is a second address of its family"),
                ));
            }
            Ok(ip) => ips.push(ip),
            Err(reason) => refused.push(Problem::new(field, reason)),
        }
    }
    ips
}

fn ports(
    spec: &ServiceSpec,
    kind: &str,
    proxied: bool,
    problems: &mut Vec<Problem>,
    refused: &mut Refused,
) -> Vec<ServicePort> {
    if !proxied {
        return Vec::new();
    }
    let specs = spec.ports.as_deref().unwrap_or_default();
    if specs.is_empty() {
        refused.push(Problem::new("spec.ports", "missing"));
    }
    let mut ports = Vec::new();
    let mut names = BTreeSet::new();
    let mut numbers = BTreeSet::new();
    if specs.len() > PORTS_AT_MOST {
        let reason = format!("{} ports are more than one Service can have", specs.len());
        refused.push(Problem::new("spec.ports", reason));
        return Vec::new();
    }
    for (place, spec) in specs.iter().enumerate() {
        let field = |what: &str| format!("spec.ports[{place}].{what}");
        let name = spec.name.as_deref().unwrap_or_default();
        if !names.insert(name) {
            let reason = if name.is_empty() && specs.len() > 1 {
                "missing, and another port has none".to_owned()
            } else {
                format!("`{name}` names two ports")
            };
            refused.push(Problem::new(field("name"), reason));
            continue;
        }
        let port = match parse_port(spec.port, || field("port")) {
            Ok(port) => port,
            Err(problem) => {
                refused.push(problem);
                continue;
            }
        };
        let node_port = match spec.node_port {
            None | Some(0) => None,
            // What an API server clears when the type changes; an older one lets it stand.
            Some(_) if kind == "ClusterIP" => {
                let reason = "ignored: a ClusterIP Service has none";
                problems.push(Problem::new(field("nodePort"), reason));
                None
            }
            Some(port) => parse_port(port, || field("nodePort"))
                .map_err(|problem| refused.push(problem))
                .ok(),
        };
        let target = match &spec.target_port {
            None | Some(IntOrString::Int(0)) => TargetPort::Number(port),
            Some(IntOrString::Int(number)) => match parse_port(*number, || field("targetPort")) {
                Ok(port) => TargetPort::Number(port),
                Err(problem) => {
                    refused.push(problem);
                    continue;
                }
            },
            Some(IntOrString::String(name)) if name.is_empty() => TargetPort::Number(port),
            Some(IntOrString::String(name)) => TargetPort::Name(shared::text(name)),
        };
        let proto = match parse_protocol(spec.protocol.as_deref(), || field("protocol")) {
            ProtocolField::Served(proto) => proto,
            ProtocolField::NotYet(problem) => {
                problems.push(problem);
                continue;
            }
            ProtocolField::Unknown(problem) => {
                refused.push(problem);
                continue;
            }
        };
        if !numbers.insert((port, proto)) {
            let reason = format!("{port}/{} stands twice", proto.as_str());
            refused.push(Problem::new(field("port"), reason));
            continue;
        }
        ports.push(ServicePort {
            place: place as u16,
            name: shared::text(name),
            proto,
            port,
            node_port,
            target,
        });
    }
    ports
}

/// The families of the Service: as it says, else those of its addresses, else IPv4.
fn families(spec: &ServiceSpec, cluster_ips: &[IpAddr], refused: &mut Refused) -> (bool, bool) {
    let mut families = (false, false);
    for (i, family) in spec.ip_families.iter().flatten().enumerate() {
        match family.as_str() {
            "IPv4" => families.0 = true,
            "IPv6" => families.1 = true,
            other => {
                let field = format!("spec.ipFamilies[{i}]");
                refused.push(Problem::new(field, format!("`{other}` is no address family")));
            }
        }
    }
    if families == (false, false) {
        families = (
            cluster_ips.iter().any(IpAddr::is_ipv4),
            cluster_ips.iter().any(IpAddr::is_ipv6),
        );
    }
    if families == (false, false) {
        families.0 = true;
    }
    families
}

fn external_ips(spec: &ServiceSpec, problems: &mut Vec<Problem>) -> Vec<IpAddr> {
    let texts = spec.external_ips.iter().flatten().enumerate();
    texts
        .filter_map(|(i, text)| address(text, || format!("spec.externalIPs[{i}]"), problems))
        .collect()
}

fn ingress_ips(ingress: &[core::LoadBalancerIngress], problems: &mut Vec<Problem>) -> Vec<IpAddr> {
    let mut ips = Vec::new();
    for (i, ingress) in ingress.iter().enumerate() {
        let Some(text) = ingress.ip.as_deref().filter(|ip| !ip.is_empty()) else {
            continue;
        };
        match ingress.ip_mode.as_deref() {
            None | Some("VIP") => {
                ips.extend(address(
                    text,
                    || format!("status.loadBalancer.ingress[{i}].ip"),
                    problems,
                ));
            }
            Some("Proxy") => {}
            // As kube-proxy does: it is not captured.
            Some(mode) => problems.push(Problem::new(
                format!("status.loadBalancer.ingress[{i}].ipMode"),
                format!("`{mode}` is neither VIP nor Proxy"),
            )),
        }
    }
    ips
}

fn address(text: &str, field: impl FnOnce() -> String, problems: &mut Vec<Problem>) -> Option<IpAddr> {
    match parse_ip(text) {
        Ok(ip) if ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() => {
            problems.push(Problem::new(field(), format!("{ip} is no address for a Service")));
            None
        }
        Ok(ip) => Some(ip),
        Err(reason) => {
            problems.push(Problem::new(field(), reason));
            None
        }
    }
}

/// Ranges may be padded with white space: that is how an older annotation was split.
fn source_ranges(spec: &ServiceSpec, refused: &mut Refused) -> Vec<IpNet> {
    let mut ranges = Vec::new();
    for (i, text) in spec.load_balancer_source_ranges.iter().flatten().enumerate() {
        match parse_cidr(text.trim()) {
            Ok(range) => ranges.push(range),
            Err(reason) => {
                let field = format!("spec.loadBalancerSourceRanges[{i}]");
                refused.push(Problem::new(field, reason));
            }
        }
    }
    ranges.sort_unstable();
    ranges.dedup();
    ranges
}

/// The timeout of `ClientIP` affinity in seconds.
fn affinity(spec: &ServiceSpec, refused: &mut Refused) -> Option<u32> {
    match spec.session_affinity.as_deref() {
        None | Some("" | "None") => return None,
        Some("ClientIP") => {}
        Some(other) => {
            let reason = format!("`{other}` is no session affinity");
            refused.push(Problem::new("spec.sessionAffinity", reason));
            return None;
        }
    }
    let config = spec.session_affinity_config.as_ref();
    let timeout = config.and_then(|config| config.client_ip.as_ref()?.timeout_seconds);
    let timeout = timeout.unwrap_or(AFFINITY_S);
    if !(1..=AFFINITY_AT_MOST_S).contains(&timeout) {
        let field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds";
        let reason = format!("{timeout} is not within 1-{AFFINITY_AT_MOST_S} seconds");
        refused.push(Problem::new(field, reason));
    }
    u32::try_from(timeout).ok()
}

fn is_local(policy: Option<&str>, field: &str, refused: &mut Refused) -> bool {
    match policy {
        None | Some("" | "Cluster") => false,
        Some("Local") => true,
        Some(other) => {
            refused.push(Problem::new(field, format!("`{other}` is no traffic policy")));
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn decoded(spec: &Value, status: &Value) -> Result<(Service, Vec<Problem>), Refused> {
        let mut object = json!({"metadata": {"name": "a"}, "spec": spec, "status": status});
        object["spec"]["clusterIP"] = json!("10.96.0.1");
        if spec["ports"].is_null() {
            object["spec"]["ports"] = json!([{"port": 80}]);
        }
        let mut problems = Vec::new();
        let service = serde_json::from_value(object).unwrap();
        decode(Name::new("ns", "a"), service, &mut problems).map(|service| (service, problems))
    }

    fn service(spec: &Value) -> Service {
        decoded(spec, &json!({})).unwrap().0
    }

    fn refused(spec: &Value) -> String {
        let refused = decoded(spec, &json!({})).unwrap_err();
        refused[0].field.clone()
    }

    #[test]
    fn a_health_check_belongs_to_a_local_load_balancer() {
        let port = |kind: &str, policy: &str, port: i32| {
            let spec = json!({"type": kind, "externalTrafficPolicy": policy, "healthCheckNodePort": port});
            service(&spec).health_check_node_port
        };
        assert_eq!(port("LoadBalancer", "Local", 31000), Some(31000));
        assert_eq!(port("LoadBalancer", "Local", 0), None);
        assert_eq!(port("LoadBalancer", "Cluster", 31000), None);
        assert_eq!(port("NodePort", "Local", 31000), None);
    }

    #[test]
    fn node_ports_that_a_type_has_not_are_ignored_by_name() {
        for (kind, port, node_port) in [
            ("NodePort", 30080, Some(30080)),
            ("ClusterIP", 30080, None),
            ("ClusterIP", 70_000, None),
        ] {
            let spec = json!({"type": kind, "ports": [{"port": 80, "nodePort": port}]});
            let (service, problems) = decoded(&spec, &json!({})).unwrap();
            assert_eq!(service.ports[0].node_port, node_port);
            let fields: Vec<_> = problems.iter().map(|one| &*one.field).collect();
            let expected: &[&str] = if kind == "ClusterIP" {
                &["spec.ports[0].nodePort"]
            } else {
                &[]
            };
            assert_eq!(fields, expected, "{kind} {port}");
        }
        let wrong = json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 70_000}]});
        assert_eq!(refused(&wrong), "spec.ports[0].nodePort");
    }

    #[test]
    fn source_ranges_are_trimmed_and_a_wrong_one_leaves_nobody_unguarded() {
        let ranges = |ranges: Value| json!({"type": "LoadBalancer", "loadBalancerSourceRanges": ranges});
        let found = service(&ranges(json!([
            " 203.0.113.000/25",
            "2001:db8::/32 ",
            "203.0.113.1/25"
        ])));
        let texts: Vec<String> = found.source_ranges.iter().map(ToString::to_string).collect();
        assert_eq!(texts, ["203.0.113.0/25", "2001:db8::/32"]);
        assert_eq!(
            refused(&ranges(json!(["10.0.0.0/8", "10.0.0.0/40"]))),
            "spec.loadBalancerSourceRanges[1]"
        );
    }

    #[test]
    fn affinity_has_kubernetes_limits() {
        let affinity = |timeout: Value| {
            let config = json!({"clientIP": {"timeoutSeconds": timeout}});
            json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": config})
        };
        assert_eq!(service(&json!({})).affinity_s, None);
        assert_eq!(service(&json!({"sessionAffinity": "None"})).affinity_s, None);
        assert_eq!(
            service(&json!({"sessionAffinity": "ClientIP"})).affinity_s,
            Some(10_800)
        );
        assert_eq!(service(&affinity(json!(1))).affinity_s, Some(1));
        assert_eq!(service(&affinity(json!(86_400))).affinity_s, Some(86_400));
        for wrong in [0, -1, 86_401] {
            let field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds";
            assert_eq!(refused(&affinity(json!(wrong))), field);
        }
        assert_eq!(
            refused(&json!({"sessionAffinity": "Cookie"})),
            "spec.sessionAffinity"
        );
    }

    #[test]
    fn ingress_is_captured_where_it_is_ours_to_capture() {
        let ingress = json!([
            {"ip": "198.18.0.1"}, {"ip": "198.18.0.2", "ipMode": "VIP"}, {"ip": "198.18.0.3", "ipMode": "Proxy"},
            {"hostname": "lb.example"}, {"ip": "198.18.000.004"}, {"ip": "2001:db8::1"}, {"ip": "198.18.0"},
            {"ip": "198.18.0.5", "ipMode": ""},
        ]);
        let status = json!({"loadBalancer": {"ingress": ingress}});
        let (service, problems) = decoded(&json!({"type": "LoadBalancer"}), &status).unwrap();
        let texts: Vec<String> = service.ingress_ips.iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            ["198.18.0.1", "198.18.0.2", "198.18.0.4"],
            "of the Service's family"
        );
        let problems: Vec<(&str, &str)> = problems.iter().map(|one| (&*one.field, &*one.reason)).collect();
        let expected = [
            ("status.loadBalancer.ingress[6].ip", "`198.18.0` is no IP address"),
            (
                "status.loadBalancer.ingress[7].ipMode",
                "`` is neither VIP nor Proxy",
            ),
            (
                "status.loadBalancer.ingress",
                "2001:db8::1 is not of the Service's families",
            ),
        ];
        assert_eq!(problems, expected);
        let (service, _) = decoded(&json!({"type": "NodePort"}), &status).unwrap();
        assert!(service.ingress_ips.is_empty());
    }

    #[test]
    fn services_of_others_are_left_alone() {
        let proxied = |labels: Value, spec: Value| {
            let object = json!({"metadata": {"name": "a", "labels": labels}, "spec": spec});
            let service = serde_json::from_value(object).unwrap();
            let mut problems = Vec::new();
            let service = decode(Name::new("ns", "a"), service, &mut problems).unwrap();
            assert_eq!(problems, []);
            service.proxied
        };
        let ports = json!([{"port": 80}]);
        let spec = json!({"clusterIP": "10.96.0.1", "ports": ports});
        assert_eq!(proxied(json!({}), spec.clone()), Proxied::Here);
        for name in [
            "service.kubernetes.io/service-proxy-name",
            "service.kubernetes.io/headless",
        ] {
            assert_eq!(proxied(json!({name: ""}), spec.clone()), Proxied::Elsewhere);
        }
        let headless = json!({"clusterIP": "None", "ports": ports});
        assert_eq!(proxied(json!({}), headless), Proxied::Headless);
        let named = json!({"type": "ExternalName", "externalName": "a.example"});
        assert_eq!(proxied(json!({}), named), Proxied::ExternalName);
    }
}

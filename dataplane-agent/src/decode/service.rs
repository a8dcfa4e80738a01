//! Services: addresses, ports and policies, with the API's defaults.

use std::{collections::BTreeSet, net::IpAddr};

use k8s_openapi::{
    api::core::v1::{self as core, ServiceSpec},
    apimachinery::pkg::util::intstr::IntOrString,
};

use super::{ProtocolField, Refused, label, parse_ip, parse_port, parse_protocol};
use crate::model::{Name, Problem, Service, ServicePort, TargetPort};

/// Services with this label belong to another proxy.
const PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// Services with this label are headless for proxies.
const HEADLESS: &str = "service.kubernetes.io/headless";

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
    let proxied = kind != "ExternalName"
        && !headless
        && label(&service.metadata, PROXY_NAME).is_none()
        && label(&service.metadata, HEADLESS).is_none();

    let cluster_ips = if proxied {
        cluster_ips(&spec, &mut refused)
    } else {
        Vec::new()
    };
    if proxied && cluster_ips.is_empty() && refused.is_empty() {
        let reason = "missing: addresses are not allocated here, give one or `None`";
        problems.push(Problem::new("spec.clusterIP", reason));
    }
    let ports = ports(&spec, kind, proxied, problems, &mut refused);
    let (ipv4, ipv6) = families(&spec, &cluster_ips, &mut refused);
    let mut external_ips = external_ips(&spec, problems);
    let mut ingress_ips = Vec::new();
    if kind == "LoadBalancer" {
        let ingress = service.status.and_then(|status| status.load_balancer);
        let ingress = ingress.and_then(|status| status.ingress).unwrap_or_default();
        ingress_ips = self::ingress_ips(&ingress, problems);
    }
    for ips in [&mut external_ips, &mut ingress_ips] {
        ips.retain(|ip| if ip.is_ipv4() { ipv4 } else { ipv6 });
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
    if !refused.is_empty() {
        return Err(refused);
    }
    Ok(Service {
        name,
        proxied,
        cluster_ips,
        external_ips,
        ingress_ips,
        ipv4,
        ipv6,
        ports,
        selector: spec.selector.unwrap_or_default(),
        internal_local,
        external_local: external_local && external,
        publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
        created_ns: service
            .metadata
            .creation_timestamp
            .map_or(0, |time| time.0.as_nanosecond()),
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
            Some(_) if kind == "ClusterIP" => {
                refused.push(Problem::new(field("nodePort"), "a ClusterIP Service has none"));
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
            Some(IntOrString::String(name)) => TargetPort::Name(name.clone()),
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
            place,
            name: name.into(),
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
    let vips = ingress
        .iter()
        .enumerate()
        .filter(|(_, ingress)| ingress.ip_mode.as_deref().is_none_or(|mode| mode == "VIP"));
    vips.filter_map(|(i, ingress)| {
        let text = ingress.ip.as_deref().filter(|ip| !ip.is_empty())?;
        address(text, || format!("status.loadBalancer.ingress[{i}].ip"), problems)
    })
    .collect()
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

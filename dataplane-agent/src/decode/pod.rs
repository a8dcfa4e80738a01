//! Pods: address, readiness, labels and named ports.

use std::net::IpAddr;

use k8s_openapi::api::core::v1 as core;

use super::{ProtocolField, parse_ip, parse_port, parse_protocol};
use crate::model::{Name, Pod, PodPort, Problem};

pub fn decode(name: Name, pod: core::Pod, problems: &mut Vec<Problem>) -> Pod {
    let spec = pod.spec.unwrap_or_default();
    let status = pod.status.unwrap_or_default();
    let ready = status
        .conditions
        .iter()
        .flatten()
        .any(|condition| condition.type_ == "Ready" && condition.status == "True");
    let mut texts: Vec<(String, String)> = status
        .pod_ips
        .into_iter()
        .flatten()
        .enumerate()
        .map(|(i, ip)| (format!("status.podIPs[{i}].ip"), ip.ip))
        .collect();
    if texts.is_empty() {
        texts.extend(status.pod_ip.map(|ip| ("status.podIP".to_owned(), ip)));
    }
    let mut ips: Vec<IpAddr> = Vec::new();
    for (field, text) in texts.into_iter().filter(|(_, text)| !text.is_empty()) {
        match parse_ip(&text) {
            Ok(ip) if ips.iter().any(|other| other.is_ipv4() == ip.is_ipv4()) => {}
            Ok(ip) => ips.push(ip),
            Err(reason) => problems.push(Problem::new(field, reason)),
        }
    }
    Pod {
        name,
        node: spec.node_name.filter(|node| !node.is_empty()).map(Into::into),
        labels: pod.metadata.labels.unwrap_or_default(),
        ips,
        host_network: spec.host_network.unwrap_or(false),
        finished: matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")),
        ready,
        terminating: pod.metadata.deletion_timestamp.is_some(),
        ports: ports(spec.init_containers.as_deref(), &spec.containers, problems),
    }
}

/// The named ports, of restartable init containers (sidecars) too.
fn ports(
    init: Option<&[core::Container]>,
    containers: &[core::Container],
    problems: &mut Vec<Problem>,
) -> Vec<PodPort> {
    let sidecars = init
        .into_iter()
        .flatten()
        .enumerate()
        .filter(|(_, container)| container.restart_policy.as_deref() == Some("Always"))
        .map(|(i, container)| ("initContainers", i, container));
    let main = containers
        .iter()
        .enumerate()
        .map(|(i, container)| ("containers", i, container));
    let mut ports = Vec::new();
    for (list, i, container) in main.chain(sidecars) {
        for (j, port) in container.ports.iter().flatten().enumerate() {
            let field = |what: &str| format!("spec.{list}[{i}].ports[{j}].{what}");
            let Some(name) = port.name.clone().filter(|name| !name.is_empty()) else {
                continue;
            };
            match (
                parse_port(port.container_port, || field("containerPort")),
                parse_protocol(port.protocol.as_deref(), || field("protocol")),
            ) {
                (Ok(port), ProtocolField::Served(proto)) => ports.push(PodPort { name, proto, port }),
                // A Pod may have SCTP ports without anybody asking us to serve them.
                (Ok(_), ProtocolField::NotYet(_)) => {}
                (Err(problem), _) | (_, ProtocolField::Unknown(problem)) => problems.push(problem),
            }
        }
    }
    ports
}

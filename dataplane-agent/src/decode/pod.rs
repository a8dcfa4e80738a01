//! Pods: address, readiness, labels, named ports and host ports.

use std::net::IpAddr;

use k8s_openapi::api::core::v1 as core;

use super::{ProtocolField, created_ns, labels, parse_ip, parse_port, parse_protocol};
use crate::model::{HostIp, HostPort, Name, Pod, PodPort, Problem, Protocol, shared};

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
    let annotation = |key: &str| pod.metadata.annotations.as_ref()?.get(key);
    let extra = annotation(Pod::EXTRA_ADDRESSES);
    let any_source = match annotation(Pod::ANY_SOURCE).map(|text| text.parse()) {
        None => false,
        Some(Ok(any)) => any,
        Some(Err(_)) => {
            let field = format!("metadata.annotations[{}]", Pod::ANY_SOURCE);
            problems.push(Problem::new(field, "neither \"true\" nor \"false\""));
            false
        }
    };
    // The Pod behind a mirror, which kubelet has from a file, has another UID than this object.
    let mirrored = annotation("kubernetes.io/config.mirror");
    let uid = mirrored.or(pod.metadata.uid.as_ref());
    let uid = Pod::uid_of(uid.map_or("", String::as_str));
    let mut extra_ips = Vec::new();
    let texts = extra.into_iter().flat_map(|text| text.split(','));
    for text in texts.map(str::trim).filter(|text| !text.is_empty()) {
        match parse_ip(text) {
            Ok(ip) => extra_ips.push(ip),
            Err(reason) => {
                let field = format!("metadata.annotations[{}]", Pod::EXTRA_ADDRESSES);
                problems.push(Problem::new(field, reason));
            }
        }
    }
    let mut ports = Ports::default();
    ports.read(spec.init_containers.as_deref(), &spec.containers, problems);
    Pod {
        name,
        node: spec
            .node_name
            .filter(|node| !node.is_empty())
            .map(|node| shared::text(&node)),
        ips,
        uid,
        extra_ips: extra_ips.into(),
        any_source,
        host_network: spec.host_network.unwrap_or(false),
        finished: matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")),
        ready,
        terminating: pod.metadata.deletion_timestamp.is_some(),
        running: status.phase.as_deref() == Some("Running"),
        ports: shared::pod_ports(ports.named),
        host_ports: ports.host,
        created_ns: created_ns(&pod.metadata),
        labels: labels(&pod.metadata.labels.unwrap_or_default(), problems).shared(),
    }
}

#[derive(Default)]
struct Ports {
    named: Vec<PodPort>,
    host: Vec<HostPort>,
}

impl Ports {
    /// Those of restartable init containers (sidecars) too.
    fn read(
        &mut self,
        init: Option<&[core::Container]>,
        containers: &[core::Container],
        problems: &mut Vec<Problem>,
    ) {
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
        for (list, i, container) in main.chain(sidecars) {
            for (j, port) in container.ports.iter().flatten().enumerate() {
                let field = format!("spec.{list}[{i}].ports[{j}]");
                if let Err(problem) = self.add(port, field) {
                    problems.push(problem);
                }
            }
        }
    }

    fn add(&mut self, port: &core::ContainerPort, field: String) -> Result<(), Problem> {
        let name = port.name.clone().filter(|name| !name.is_empty());
        let host_port = port.host_port.filter(|port| *port != 0);
        if name.is_none() && host_port.is_none() {
            return Ok(());
        }
        let number = parse_port(port.container_port, || format!("{field}.containerPort"))?;
        let (proto, not_served) =
            match parse_protocol(port.protocol.as_deref(), || format!("{field}.protocol")) {
                ProtocolField::Served(proto) => (proto, None),
                // A Pod may have SCTP ports without anybody asking us to serve them; policies may name them.
                ProtocolField::NotYet(problem) => (Protocol::Sctp, Some(problem)),
                ProtocolField::Unknown(problem) => return Err(problem),
            };
        self.named.extend(name.map(|name| PodPort {
            name: shared::text(&name),
            proto,
            port: number,
        }));
        let Some(host_port) = host_port else {
            return Ok(());
        };
        if let Some(problem) = not_served {
            return Err(problem);
        }
        let host_ip = match port.host_ip.as_deref().unwrap_or_default() {
            "" => HostIp::Any,
            text => {
                HostIp::One(parse_ip(text).map_err(|reason| Problem::new(format!("{field}.hostIP"), reason))?)
            }
        };
        let port = parse_port(host_port, || format!("{field}.hostPort"))?;
        self.host.push(HostPort {
            field,
            host_ip,
            port,
            proto,
            target: number,
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn host_ports_of_containers_and_sidecars_are_read() {
        let pod = json!({
            "metadata": {"name": "a"},
            "spec": {
                "containers": [{"name": "c", "ports": [
                    {"containerPort": 80, "hostPort": 8080, "hostIP": "192.0.2.1"},
                    {"containerPort": 81, "hostPort": 70000},
                    {"containerPort": 82, "hostPort": 8082, "protocol": "SCTP"},
                    {"containerPort": 83, "hostPort": 8083, "hostIP": "host"},
                    {"containerPort": 84, "protocol": "SCTP", "name": "unasked"},
                ]}],
                "initContainers": [
                    {"name": "s", "restartPolicy": "Always", "ports": [
                        {"name": "dns", "containerPort": 53, "hostPort": 53, "protocol": "UDP"},
                    ]},
                    {"name": "i", "ports": [{"containerPort": 90, "hostPort": 9090}]},
                ],
            },
        });
        let mut problems = Vec::new();
        let pod = decode(
            Name::new("ns", "a"),
            serde_json::from_value(pod).unwrap(),
            &mut problems,
        );
        let found: Vec<_> = pod
            .host_ports
            .iter()
            .map(|port| (&*port.field, port.port, port.target))
            .collect();
        let expected = [
            ("spec.containers[0].ports[0]", 8080, 80),
            ("spec.initContainers[0].ports[0]", 53, 53),
        ];
        assert_eq!(found, expected);
        let named: Vec<_> = pod.ports.iter().map(|port| (&*port.name, port.proto)).collect();
        assert_eq!(named, [("unasked", Protocol::Sctp), ("dns", Protocol::Udp)]);
        let fields: Vec<&str> = problems.iter().map(|problem| &*problem.field).collect();
        let expected = ["ports[1].hostPort", "ports[2].protocol", "ports[3].hostIP"];
        assert_eq!(
            fields,
            expected.map(|field| format!("spec.containers[0].{field}"))
        );
    }
}

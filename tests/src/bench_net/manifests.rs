//! The fleet as the agent reads it: one node, its two pods, and a Service with its `EndpointSlice` each, as JSON lists.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::fleet::{Fleet, SERVICE_PORT, Service};

/// Services a file: a folder of ten thousand files would measure the file system.
const A_FILE: usize = 1000;

/// A pod of the node.
#[derive(Debug, Clone, Copy)]
pub struct Pod {
    pub name: &'static str,
    pub ip: Ipv4Addr,
}

/// Writes the folder. `node` is the node's name and address.
pub fn write(folder: &Path, fleet: &Fleet, node: (&str, Ipv4Addr), pods: &[Pod]) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("failed to create {}", folder.display()))?;
    let mut objects = vec![json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": node.0},
        "spec": {"podCIDRs": ["10.244.1.0/24"]},
        "status": {"addresses": [{"type": "InternalIP", "address": node.1}]}
    })];
    objects.extend(pods.iter().map(|pod| {
        json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": pod.name, "namespace": "bench", "labels": {"name": pod.name}},
            "spec": {"nodeName": node.0, "containers": [{"name": "bench", "image": "example.org/bench:1"}]},
            "status": {"phase": "Running", "podIP": pod.ip, "podIPs": [{"ip": pod.ip}],
                       "conditions": [{"type": "Ready", "status": "True"}]}
        })
    }));
    write_list(&folder.join("node.json"), &objects)?;
    let services: Vec<Service> = fleet.services().collect();
    for (number, some) in services.chunks(A_FILE).enumerate() {
        let objects: Vec<Value> = some.iter().flat_map(objects_of).collect();
        write_list(&folder.join(format!("services-{number}.json")), &objects)?;
    }
    Ok(())
}

/// Policies that select both pods and allow what they say to each other by the last of so many rules a direction.
const RULES: u16 = 100;

/// Adds a policy for what `client` sends and one for what reaches `server`.
pub fn write_policies(folder: &Path, client: Pod, server: (Pod, u16)) -> Result<()> {
    let (server, port) = server;
    let policy = |subject: Pod, peer: Pod, kind: &str, rules: &str, peers: &str| {
        let rule = |peer: &str, port: u16| json!({peers: [{"podSelector": {"matchLabels": {"name": peer}}}], "ports": [{"port": port}]});
        let others = (1..RULES).map(|number| rule("nobody", port + number));
        let all: Vec<Value> = others.chain([rule(peer.name, port)]).collect();
        json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": subject.name, "namespace": "bench"},
            "spec": {"podSelector": {"matchLabels": {"name": subject.name}}, "policyTypes": [kind], rules: all}
        })
    };
    let items = [
        policy(client, server, "Egress", "egress", "to"),
        policy(server, client, "Ingress", "ingress", "from"),
    ];
    write_list(&folder.join("policies.json"), &items)
}

fn write_list(path: &Path, items: &[Value]) -> Result<()> {
    let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
    fs::write(path, list.to_string()).with_context(|| format!("failed to write {}", path.display()))
}

fn objects_of(service: &Service) -> [Value; 2] {
    let Service {
        name,
        address,
        endpoints,
    } = service;
    let port = endpoints.first().map_or(0, |(_, port)| *port);
    let ready: Vec<Value> = endpoints
        .iter()
        .map(|(ip, _)| json!({"addresses": [ip], "conditions": {"ready": true}}))
        .collect();
    [
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "bench"},
            "spec": {"type": "ClusterIP", "clusterIP": address, "clusterIPs": [address], "ipFamilies": ["IPv4"],
                     "ports": [{"name": "http", "protocol": "TCP", "port": SERVICE_PORT, "targetPort": port}]}
        }),
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": name, "namespace": "bench", "labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4", "endpoints": ready,
            "ports": [{"name": "http", "protocol": "TCP", "port": port}]
        }),
    ]
}

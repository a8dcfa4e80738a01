//! Devices without link layer, as WireGuard and other VPNs make them: nodes and a client joined by tun devices, with
//! Services on all of them. Needs root and the BPF object; without them the test says so and does nothing.
//!
//! - `node1` and `node2` have `tun0`, numbered for IPv4 and unnumbered for IPv6. `node3` is reached by Ethernet.
//! - `far` is a client behind `tun1` of `node1`, `ext` one behind its Ethernet uplink.

mod needs;

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use dataplane_tests::{
    agent::{AgentOptions, Agents},
    cluster::Cluster,
    links::{Links, Prefix, Route, host},
    manifests::{self, Manifests},
    netns::NetNs,
    process::Helper,
    shape::{ExternalShape, Network, NodeShape, PodShape, Shape, parse_prefix},
    tun::TunPair,
    worker::protocol::{self, Attempt, Probe, Proto, Request, Response},
};
use serde_json::{Value, json};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Services: name, last part of the cluster address, node port, and the Pod behind it.
const SERVICES: [(&str, u8, u16, Option<&str>); 5] = [
    ("local", 1, 30001, Some("be1")),
    ("across", 2, 30002, Some("be2")),
    ("beside", 3, 30003, Some("be3")),
    ("host", 4, 30004, Some("host1")),
    ("nobody", 5, 30005, None),
];
const PORT: u16 = 8080;

fn shape() -> Shape {
    let node = |number: u8| NodeShape {
        name: format!("node{number}"),
        addresses: vec![
            ip(&format!("192.168.77.1{number}")),
            ip(&format!("fd00:77::1{number}")),
        ],
        extra_addresses: Vec::new(),
        pod_cidrs: [
            format!("10.244.{number}.0/24"),
            format!("fd00:10:244:{number}::/64"),
        ]
        .iter()
        .map(|text| parse_prefix(text).unwrap())
        .collect(),
    };
    let pod = |name: &str, node: u8, last: u8| PodShape {
        name: name.to_owned(),
        node: format!("node{node}"),
        addresses: vec![
            ip(&format!("10.244.{node}.{last}")),
            ip(&format!("fd00:10:244:{node}::{last}")),
        ],
        host_network: false,
    };
    let host1 = PodShape {
        name: "host1".to_owned(),
        node: "node1".to_owned(),
        addresses: vec![ip("192.168.77.11"), ip("fd00:77::11")],
        host_network: true,
    };
    let external = |name: &str, number: u8| ExternalShape {
        name: name.to_owned(),
        addresses: vec![
            ip(&format!("203.0.113.{number}")),
            ip(&format!("2001:db8:{number}::9")),
        ],
    };
    Shape {
        nodes: vec![node(1), node(2), node(3)],
        pods: vec![
            pod("client1", 1, 10),
            pod("be1", 1, 21),
            pod("be2", 2, 21),
            pod("be3", 3, 21),
            host1,
        ],
        externals: vec![external("ext", 10), external("far", 20)],
        network: Network::Routed,
    }
}

struct Bed {
    _agents: Agents,
    _tuns: [TunPair; 2],
    cluster: Cluster,
}

impl Bed {
    fn build(name: &str, flags: &[&str]) -> Result<Self> {
        let cluster = Cluster::build(
            name,
            shape(),
            &Helper::built_with(Path::new(env!("CARGO_BIN_EXE_dataplane-agent")))?,
        )?;
        for pod in cluster.shape().pods.clone() {
            for proto in [Proto::Tcp, Proto::Udp] {
                cluster.listen(&pod.name, proto, PORT)?;
            }
        }
        let tuns = connect(&cluster)?;
        let folder = Manifests::create(&cluster.places().work)?;
        for object in objects(cluster.shape())? {
            folder.apply(&object)?;
        }
        let options = AgentOptions {
            program: PathBuf::from(env!("CARGO_BIN_EXE_dataplane-agent")),
            flags: flags.iter().map(ToString::to_string).collect(),
        };
        let mut agents = Agents::start(&cluster, folder.dir(), options)?;
        let problems = agents.settle();
        ensure!(problems.is_empty(), "{problems:?}");
        Ok(Self {
            _agents: agents,
            _tuns: tuns,
            cluster,
        })
    }

    fn ask(&self, from: &str, proto: Proto, to: SocketAddr) -> Result<Attempt> {
        let probe = Probe {
            proto,
            to,
            from: protocol::any(to, 0),
            connections: 1,
            parallel: false,
            interval_ms: 0,
            timeout_ms: 3000,
            stop_after_failures: 1,
            until_backend_changes: false,
            first_backend: None,
        };
        match self
            .cluster
            .worker(from)?
            .call(Request::Probe(probe), Duration::from_secs(10))?
        {
            Response::Attempts(attempts) => attempts.into_iter().next().context("no attempt"),
            other => bail!("unexpected answer {other:?}"),
        }
    }

    /// Asserts that `from` reaches `pod` at an address and port, and by which source the pod sees it.
    fn reaches(&self, from: &str, to: SocketAddr, pod: &str, seen_as: &str) -> Result<()> {
        for proto in [Proto::Tcp, Proto::Udp] {
            let what = format!("{from} -> {to} {proto:?}");
            // The second meets entries that are there already.
            for _ in 0..2 {
                let attempt = self.ask(from, proto, to)?;
                let Attempt::Answered { by, .. } = &attempt else {
                    bail!("{what}: {attempt:?}")
                };
                ensure!(by.name == pod, "{what} reached {}", by.name);
                ensure!(by.client.ip() == ip(seen_as), "{what} was seen as {}", by.client);
            }
        }
        Ok(())
    }

    fn is_refused(&self, from: &str, to: SocketAddr) -> Result<()> {
        for proto in [Proto::Tcp, Proto::Udp] {
            let attempt = self.ask(from, proto, to)?;
            ensure!(
                matches!(attempt, Attempt::Refused { .. }),
                "{from} -> {to} {proto:?}: {attempt:?}"
            );
        }
        Ok(())
    }
}

/// Puts tun devices between `node1` and `node2` and between `node1` and `far`, and routes to what is behind them.
fn connect(cluster: &Cluster) -> Result<[TunPair; 2]> {
    let (one, two) = (cluster.node_netns("node1")?, cluster.node_netns("node2")?);
    let far = NetNs::open(&cluster.places().netns("far"))?;
    let nodes = TunPair::create((one, "tun0"), (two, "tun0"))?;
    let client = TunPair::create((one, "tun1"), (&far, "tun1"))?;
    for (netns, device, addresses, routes) in [
        (
            one,
            "tun0",
            &["10.9.0.1"][..],
            &["10.9.0.2/32", "10.244.2.0/24", "fd00:10:244:2::/64"][..],
        ),
        (
            two,
            "tun0",
            &["10.9.0.2"],
            &["10.9.0.1/32", "10.244.1.0/24", "fd00:10:244:1::/64"],
        ),
        (one, "tun1", &[], &["203.0.113.20/32", "2001:db8:20::9/128"]),
        (
            &far,
            "tun1",
            &["203.0.113.20", "2001:db8:20::9"],
            &["192.168.77.11/32", "fd00:77::11/128"],
        ),
    ] {
        let mut links = Links::open(netns)?;
        links.set_up(device)?;
        for addr in addresses {
            links.add_address(device, host(ip(addr)))?;
        }
        for to in routes {
            links.add_route(parse_prefix(to)?, by(device))?;
        }
    }
    Ok([nodes, client])
}

fn by(device: &str) -> Route<'_> {
    Route {
        device: Some(device),
        ..Route::default()
    }
}

fn objects(shape: &Shape) -> Result<Vec<Value>> {
    let mut objects = Vec::new();
    for node in &shape.nodes {
        let addresses: Vec<Value> = node
            .addresses
            .iter()
            .map(|addr| json!({"type": "InternalIP", "address": addr}))
            .collect();
        let cidrs: Vec<String> = node
            .pod_cidrs
            .iter()
            .map(|(addr, len)| format!("{addr}/{len}"))
            .collect();
        objects.push(json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": node.name},
            "spec": {"podCIDRs": cidrs}, "status": {"addresses": addresses},
        }));
    }
    for pod in &shape.pods {
        objects.push(manifests::pod(pod, "ns", &shape.node(&pod.node)?.addresses));
    }
    for (name, number, node_port, pod) in SERVICES {
        let ports = |more: &Value| -> Vec<Value> {
            ["TCP", "UDP"]
                .iter()
                .map(|proto| {
                    let mut port = json!({"name": proto.to_lowercase(), "protocol": proto});
                    port.as_object_mut()
                        .unwrap()
                        .extend(more.as_object().unwrap().clone());
                    port
                })
                .collect()
        };
        objects.push(json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "ns"},
            "spec": {
                "type": "NodePort", "ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv4", "IPv6"],
                "clusterIP": format!("10.96.0.{number}"),
                "clusterIPs": [format!("10.96.0.{number}"), format!("fd00:96::{number}")],
                "ports": ports(&json!({"port": 80, "targetPort": PORT, "nodePort": node_port})),
            },
        }));
        let pod = shape.pods.iter().find(|one| Some(one.name.as_str()) == pod);
        for addr in pod.map(|pod| &pod.addresses[..]).unwrap_or_default() {
            let family = if addr.is_ipv4() { "IPv4" } else { "IPv6" };
            objects.push(json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
                "metadata": {"name": format!("{name}-{}", family.to_lowercase()), "namespace": "ns",
                    "labels": {"kubernetes.io/service-name": name}},
                "ports": ports(&json!({"port": PORT})),
                "endpoints": [{"addresses": [addr], "conditions": {"ready": true}, "nodeName": pod.map(|pod| &pod.node)}],
            }));
        }
    }
    Ok(objects)
}

/// A service's cluster address or node port, as `SERVICES` numbers them.
fn cluster_ip(number: u8) -> [SocketAddr; 2] {
    [
        (ip(&format!("10.96.0.{number}")), 80).into(),
        (ip(&format!("fd00:96::{number}")), 80).into(),
    ]
}

fn node_port(number: u8) -> [SocketAddr; 2] {
    let port = 30000 + u16::from(number);
    [
        (ip("192.168.77.11"), port).into(),
        (ip("fd00:77::11"), port).into(),
    ]
}

const TUN: [&str; 2] = ["10.9.0.1", "fd00:77::11"];
const NODE: [&str; 2] = ["192.168.77.11", "fd00:77::11"];

fn services_work_across_devices_without_link_layer(name: &str, flags: &[&str]) -> Result<()> {
    if !needs::ready() {
        return Ok(());
    }
    let bed = Bed::build(name, flags)?;
    for family in 0..2 {
        let far = ["203.0.113.20", "2001:db8:20::9"][family];
        let ext = ["203.0.113.10", "2001:db8:10::9"][family];
        let at = |number| node_port(number)[family];
        // From one tun device to the stack, to another tun device, to Ethernet, and back out with a refusal.
        bed.reaches("far", at(1), "be1", far)?;
        bed.reaches("far", at(2), "be2", TUN[family])?;
        bed.reaches("far", at(3), "be3", NODE[family])?;
        bed.reaches("far", at(4), "host1", far)?;
        bed.is_refused("far", at(5))?;
        // From Ethernet to a tun device.
        bed.reaches("ext", at(1), "be1", ext)?;
        bed.reaches("ext", at(2), "be2", TUN[family])?;
        // Pods keep their address.
        let client = ["10.244.1.10", "fd00:10:244:1::10"][family];
        bed.reaches("client1", cluster_ip(2)[family], "be2", client)?;
        // A process of the node, whose way to Service addresses is Ethernet.
        let at = |number| cluster_ip(number)[family];
        bed.reaches("node1", at(1), "be1", NODE[family])?;
        bed.reaches("node1", at(2), "be2", TUN[family])?;
        bed.reaches("node1", at(3), "be3", NODE[family])?;
    }
    // The same, when its way to Service addresses is a tun device.
    let mut links = Links::open(bed.cluster.node_netns("node1")?)?;
    let services: [Prefix; 2] = [(ip("10.96.0.0"), 16), (ip("fd00:96::"), 64)];
    for to in services {
        links.add_route(to, by("tun0"))?;
    }
    for family in 0..2 {
        let at = |number| cluster_ip(number)[family];
        bed.reaches("node1", at(1), "be1", TUN[family])?;
        bed.reaches("node1", at(2), "be2", TUN[family])?;
        bed.reaches("node1", at(3), "be3", NODE[family])?;
        // The Service's address, as everywhere when a node asks itself by way of an uplink.
        bed.reaches("node1", at(4), "host1", &at(4).ip().to_string())?;
        bed.is_refused("node1", at(5))?;
    }
    Ok(())
}

#[test]
fn services_work_across_devices_without_link_layer_by_tc() -> Result<()> {
    services_work_across_devices_without_link_layer(
        "l3tc",
        &["--socket-lb", "off", "--datapath", "tc", "--health-addr", "off"],
    )
}

#[test]
fn services_work_across_devices_without_link_layer_beside_xdp() -> Result<()> {
    services_work_across_devices_without_link_layer(
        "l3xdp",
        &["--socket-lb", "off", "--datapath", "xdp", "--health-addr", "off"],
    )
}

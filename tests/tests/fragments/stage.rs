//! Two nodes with an agent each, a client in a pod and one outside, and two Services: one has its backend on the first
//! node, the other on the second. Backends return what they get.

use std::env;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use dataplane_tests::agent::{AgentOptions, Agents};
use dataplane_tests::cluster::Cluster;
use dataplane_tests::manifests::{self, Manifests};
use dataplane_tests::netns::NetNs;
use dataplane_tests::process::Helper;
use dataplane_tests::shape::{ExternalShape, Network, NodeShape, PodShape, Shape, parse_prefix};
use nix::sys::socket::{setsockopt, sockopt};
use serde_json::{Value, json};

use crate::raw;

pub const CLIENT: &str = "client";
pub const OUTSIDE: &str = "outside";
pub const PORT: u16 = 7;
const BACKEND_PORT: u16 = 7007;
/// Services, their backends, and their node ports.
pub const SERVICES: [(&str, u8, u16); 2] = [("local", 1, 30007), ("remote", 2, 30008)];
/// A payload that begins with it comes back in fragments from the last to the first.
pub const REVERSE: u8 = b'r';

const PATIENCE: Duration = Duration::from_secs(3);

pub struct Stage {
    /// IPv6 fragments that are cut by hand have an extension header before the fragment header. Netfilter, which puts
    /// fragments together where it translates addresses, makes packets of them that the stack drops (`Ip6InHdrErrors`).
    pub extension_headers: bool,
    agent: PathBuf,
    // The agents are dropped before the cluster that they run in.
    agents: Agents,
    cluster: Cluster,
}

fn addresses(texts: &[String; 2]) -> Result<Vec<IpAddr>> {
    let parse = |text: &String| text.parse().with_context(|| format!("{text} is no address"));
    texts.iter().map(parse).collect()
}

/// The cluster address of a Service.
pub fn cluster_ip(service: u8, v6: bool) -> IpAddr {
    if v6 {
        [0xfd00, 0x96, 0, 0, 0, 0, 0, u16::from(service)].into()
    } else {
        [10, 96, 0, service].into()
    }
}

/// The first node's address.
pub fn node_ip(v6: bool) -> IpAddr {
    if v6 {
        [0xfd00, 0x77, 0, 0, 0, 0, 0, 0x11].into()
    } else {
        [192, 168, 77, 11].into()
    }
}

fn shape(network: Network) -> Result<Shape> {
    let node = |number: u8| -> Result<NodeShape> {
        let cidrs = [
            format!("10.244.{number}.0/24"),
            format!("fd00:10:244:{number}::/64"),
        ];
        Ok(NodeShape {
            name: format!("node{number}"),
            addresses: addresses(&[format!("192.168.77.1{number}"), format!("fd00:77::1{number}")])?,
            extra_addresses: Vec::new(),
            pod_cidrs: cidrs
                .iter()
                .map(|text| parse_prefix(text))
                .collect::<Result<_>>()?,
        })
    };
    let pod = |name: &str, node: u8, last: u8| -> Result<PodShape> {
        let own = [
            format!("10.244.{node}.{last}"),
            format!("fd00:10:244:{node}::{last}"),
        ];
        Ok(PodShape {
            name: name.to_owned(),
            node: format!("node{node}"),
            addresses: addresses(&own)?,
            host_network: false,
        })
    };
    Ok(Shape {
        nodes: vec![node(1)?, node(2)?],
        pods: vec![pod(CLIENT, 1, 10)?, pod("local", 1, 20)?, pod("remote", 2, 20)?],
        externals: vec![ExternalShape {
            name: OUTSIDE.to_owned(),
            addresses: addresses(&["203.0.113.10".to_owned(), "2001:db8:ff::10".to_owned()])?,
        }],
        network,
    })
}

fn objects(shape: &Shape) -> Result<Vec<Value>> {
    let mut objects = Vec::new();
    for node in &shape.nodes {
        let internal = |ip: &IpAddr| json!({"type": "InternalIP", "address": ip});
        let cidrs = node.pod_cidrs.iter().map(|(ip, length)| format!("{ip}/{length}"));
        objects.push(json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": node.name},
            "spec": {"podCIDRs": cidrs.collect::<Vec<_>>()},
            "status": {"addresses": node.addresses.iter().map(internal).collect::<Vec<_>>()},
        }));
    }
    for pod in &shape.pods {
        objects.push(manifests::pod(pod, "default", &shape.node(&pod.node)?.addresses));
    }
    for (number, (name, _, node_port)) in (1..).zip(SERVICES) {
        let ips = [cluster_ip(number, false), cluster_ip(number, true)];
        objects.push(json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"},
            "spec": {"type": "NodePort", "clusterIP": ips[0], "clusterIPs": ips, "ipFamilies": ["IPv4", "IPv6"],
                     "ports": [{"protocol": "UDP", "port": PORT, "targetPort": BACKEND_PORT, "nodePort": node_port}]},
        }));
        for ip in shape.addresses_of(name) {
            let family = if ip.is_ipv4() { "IPv4" } else { "IPv6" };
            objects.push(json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "metadata": {"name": format!("{name}-{}", family.to_lowercase()), "namespace": "default",
                             "labels": {"kubernetes.io/service-name": name}},
                "addressType": family,
                "endpoints": [{"addresses": [ip], "conditions": {"ready": true}}],
                "ports": [{"protocol": "UDP", "port": BACKEND_PORT}],
            }));
        }
    }
    Ok(objects)
}

/// A socket in the calling thread's namespace that has room for some datagrams of 64 KiB.
fn socket(at: SocketAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind(at).with_context(|| format!("failed to bind {at}"))?;
    setsockopt(&socket, sockopt::RcvBufForce, &(8 << 20))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// Answers until the process ends.
fn answer(netns: &NetNs, at: SocketAddr, extension_headers: bool) -> Result<()> {
    let socket = netns.enter(|| socket(at))?;
    let path = netns.path().to_owned();
    thread::spawn(move || {
        let mut bytes = vec![0; 65536];
        let mut id = 0u16;
        loop {
            let Ok((length, client)) = socket.recv_from(&mut bytes) else {
                continue;
            };
            let payload = &bytes[..length];
            if payload.first() == Some(&REVERSE) {
                id = id.wrapping_add(1);
                // Who waits for the answer tells that there is none.
                let _ = raw::fragments(at, client, id, payload, extension_headers).and_then(|packets| {
                    NetNs::open(&path)?.enter(|| raw::send(client.ip(), packets.iter().rev()))
                });
            } else {
                let _ = socket.send_to(payload, client);
            }
        }
    });
    Ok(())
}

impl Stage {
    /// Builds it, and waits until all is programmed.
    pub fn set(name: &str, agent: &Path, network: Network, flags: &[&str]) -> Result<Self> {
        let shape = shape(network)?;
        let objects = objects(&shape)?;
        let helper = Helper::new(env!("CARGO_BIN_EXE_dataplane-scenarios"));
        let cluster = Cluster::build(name, shape, &helper)?;
        let folder = Manifests::create(&cluster.places().work)?;
        for object in &objects {
            folder.apply(object)?;
        }
        let options = AgentOptions {
            program: agent.to_owned(),
            flags: flags.iter().map(|&flag| flag.to_owned()).collect(),
        };
        let extension_headers = network != Network::Vxlan;
        let mut stage = Self {
            extension_headers,
            agent: agent.to_owned(),
            agents: Agents::start(&cluster, folder.dir(), options)?,
            cluster,
        };
        for (backend, ..) in SERVICES {
            let netns = stage.netns(backend)?;
            for ip in stage.cluster.shape().addresses_of(backend) {
                answer(&netns, SocketAddr::new(ip, BACKEND_PORT), extension_headers)?;
            }
        }
        let problems = stage.agents.settle();
        ensure!(problems.is_empty(), "{}", problems.join("; "));
        Ok(stage)
    }

    /// The namespace of a node, a pod or the client outside.
    pub fn netns(&self, name: &str) -> Result<NetNs> {
        let places = self.cluster.places();
        let path = match name {
            OUTSIDE => places.netns(name),
            node if node.starts_with("node") => places.netns(node),
            pod => places.netns(&format!("pod-{pod}")),
        };
        NetNs::open(&path)
    }

    /// A socket of a client.
    pub fn socket(&self, client: &str, port: u16, v6: bool) -> Result<UdpSocket> {
        let own = self.cluster.shape().addresses_of(client);
        let ip = own.into_iter().find(|ip| ip.is_ipv6() == v6);
        let at = SocketAddr::new(ip.context("a client without an address")?, port);
        self.netns(client)?.enter(|| socket(at))
    }

    /// How often a reason was counted on a node.
    pub fn counted(&self, node: &str, reason: &str) -> Result<u64> {
        let netns = self.netns(node)?;
        let output = netns.enter(|| {
            Command::new(&self.agent)
                .args(["status", "-o", "json", "--bpffs"])
                .arg(self.cluster.places().bpffs.join(node))
                .output()
                .context("failed to run the agent")
        })?;
        let status: Value = serde_json::from_slice(&output.stdout)
            .with_context(|| format!("status: {}", String::from_utf8_lossy(&output.stderr)))?;
        let Some(counters) = status["counters"].as_array() else {
            bail!("status has no counters: {status}")
        };
        let found = counters.iter().find(|counter| counter["reason"] == reason);
        Ok(found.and_then(|counter| counter["count"].as_u64()).unwrap_or(0))
    }
}

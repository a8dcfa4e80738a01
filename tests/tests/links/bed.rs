//! Two nodes with agents, and a Service for each way that a client can take to a backend.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use dataplane_tests::agent::{self, AgentOptions, Agents, patient};
use dataplane_tests::cluster::Cluster;
use dataplane_tests::manifests::{self, Manifests, pod};
use dataplane_tests::netns::NetNs;
use dataplane_tests::process::Helper;
use dataplane_tests::shape::{ExternalShape, Network, NodeShape, PodShape, Shape, Uplink, parse_prefix};
use dataplane_tests::worker::protocol::{Direction, Proto, Request, Response, Transfer, Transferred};
use serde_json::json;

/// Bytes of one transfer; `DATAPLANE_TRANSFER_BYTES` says another number, for machines that are emulated.
const BYTES: u64 = 10_000_000;
const TIMEOUT: Duration = Duration::from_secs(20);
const PORT: u16 = 9000;

/// Who asks, where the backend is, and which of the two sends the bulk. Each way has a Service and a backend pod of its
/// own: what one transfer teaches a kernel about path MTUs is not known to the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Way {
    pub client: Client,
    pub is_local: bool,
    pub direction: Direction,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Client {
    /// Outside, by a node port of the first node.
    NodePort,
    /// A pod of the first node.
    Pod,
    /// A process of the first node.
    Host,
}

/// All ways.
pub fn ways() -> impl Iterator<Item = Way> {
    (0..12).map(Way::numbered)
}

impl Way {
    fn numbered(number: usize) -> Self {
        Self {
            client: [Client::NodePort, Client::Pod, Client::Host][number / 4],
            is_local: (number / 2).is_multiple_of(2),
            direction: [Direction::Upload, Direction::Download][number % 2],
        }
    }

    fn number(self) -> usize {
        ways().position(|way| way == self).unwrap_or_default()
    }

    pub fn client(self) -> &'static str {
        match self.client {
            Client::NodePort => "ext1",
            Client::Pod => "client1",
            Client::Host => "node1",
        }
    }

    pub fn backend(self) -> String {
        format!("be{}", self.number())
    }

    /// Of the backend pod.
    pub fn backend_address(self, ipv6: bool) -> IpAddr {
        let node = if self.is_local { 1 } else { 2 };
        let last = 20 + self.number();
        let text = if ipv6 {
            format!("fd00:10:244:{node}::{last}")
        } else {
            format!("10.244.{node}.{last}")
        };
        text.parse().expect("an address")
    }

    fn cluster_ip(self, ipv6: bool) -> IpAddr {
        let last = 10 + self.number();
        let text = if ipv6 {
            format!("fd00:10:96::{last}")
        } else {
            format!("10.96.0.{last}")
        };
        text.parse().expect("an address")
    }

    fn node_port(self) -> u16 {
        30100 + self.number() as u16
    }

    /// The node port at an address of the first node.
    pub fn at_node(self, ipv6: bool) -> SocketAddr {
        let ip = if ipv6 { "fd00:77::11" } else { "192.168.77.11" };
        SocketAddr::new(ip.parse().expect("an address"), self.node_port())
    }

    /// Where the client connects to. The ways from outside enter at an address each of the node, for the same reason.
    pub fn to(self, ipv6: bool) -> SocketAddr {
        let net = 77 + self.number();
        match (self.client, ipv6) {
            (Client::NodePort, false) => format!("192.168.{net}.11:{}", self.node_port()),
            (Client::NodePort, true) => format!("[fd00:{net}::11]:{}", self.node_port()),
            _ => return SocketAddr::new(self.cluster_ip(ipv6), 80),
        }
        .parse()
        .expect("an address")
    }
}

/// A running cluster whose agents have programmed everything.
#[derive(Debug)]
pub struct Bed {
    // Agents go first.
    agents: Agents,
    pub cluster: Cluster,
}

impl Bed {
    /// Builds the cluster, lets `change` alter its links, and starts the agents.
    pub fn build(
        name: &str,
        agent: PathBuf,
        flags: &[&str],
        (network, uplink): (Network, Uplink),
        change: impl FnOnce(&mut Cluster) -> Result<()>,
    ) -> Result<Self> {
        let helper = Helper::new(env!("CARGO_BIN_EXE_dataplane-scenarios"));
        let mut cluster = Cluster::build_on(name, shape(network), uplink, &helper)?;
        change(&mut cluster)?;
        let folder = Manifests::create(&cluster.places().work)?;
        write_objects(&cluster, &folder)?;
        for way in ways() {
            let request = Request::TransferListen { port: PORT };
            cluster.worker(&way.backend())?.call(request, patient(TIMEOUT))?;
            cluster.listen(&way.backend(), Proto::Udp, PORT)?;
        }
        let options = AgentOptions {
            program: agent,
            flags: flags.iter().map(ToString::to_string).collect(),
        };
        let mut agents = Agents::start(&cluster, folder.dir(), options)?;
        let problems = agents.settle();
        ensure!(problems.is_empty(), "{problems:?}");
        Ok(Self { agents, cluster })
    }

    /// One transfer, which has to arrive whole, at the way's own backend.
    fn transfer(&self, way: Way, ipv6: bool) -> Result<Transferred> {
        let transfer = Transfer {
            to: way.to(ipv6),
            direction: way.direction,
            bytes: match std::env::var("DATAPLANE_TRANSFER_BYTES") {
                Ok(number) => number.parse().context("DATAPLANE_TRANSFER_BYTES is no number")?,
                Err(_) => BYTES,
            },
            timeout_ms: patient(TIMEOUT).as_millis() as u64,
        };
        let worker = self.cluster.worker(way.client())?;
        match worker.call(
            Request::Transfer(transfer),
            patient(TIMEOUT) + Duration::from_secs(5),
        )? {
            Response::Transferred(done) => {
                ensure!(done.by.name == way.backend(), "{} answered", done.by.name);
                Ok(done)
            }
            other => bail!("unexpected answer {other:?}"),
        }
    }

    /// Makes the transfers of all ways in both families, and says all that failed.
    pub fn transfer_all(&mut self, check: impl Fn(Way, &Transferred) -> Result<()>) -> Result<()> {
        let mut failures = Vec::new();
        for way in ways() {
            for family in ["IPv4", "IPv6"] {
                let result = self.transfer(way, family == "IPv6").and_then(|done| {
                    println!("{family} {way:?}: {} ms, path MTU {}", done.ms, done.path_mtu);
                    check(way, &done)
                });
                if let Err(error) = result.context(format!("{family} {way:?}")) {
                    println!("FAILED {error:#}");
                    failures.push(format!("{error:#}"));
                }
            }
        }
        self.hold();
        ensure!(
            failures.is_empty(),
            "{} transfers failed:\n{}",
            failures.len(),
            failures.join("\n")
        );
        Ok(())
    }

    /// What `status` warns of.
    pub fn warnings(&self, node: &str) -> Result<Vec<String>> {
        let status = self.agents.status(node)?;
        serde_json::from_value(status["warnings"].clone()).context("no warnings")
    }

    /// What the agent of a node has logged.
    pub fn log(&self, node: &str) -> Result<String> {
        let log = self.agents.logs().find(|(name, _)| *name == node);
        let (_, path) = log.with_context(|| format!("no agent is on {node}"))?;
        Ok(std::fs::read_to_string(path)?)
    }

    /// Waits for Enter with everything in place, if `DATAPLANE_TEST_HOLD` is set.
    fn hold(&mut self) {
        if std::env::var_os("DATAPLANE_TEST_HOLD").is_some() {
            for (node, log) in self.agents.logs() {
                eprintln!("{node}: {}", log.display());
            }
            eprintln!("holding {}: press Enter", self.cluster.places().id);
            let _ = std::io::stdin().read_line(&mut String::new());
        }
    }
}

/// The devices of the switch and router.
pub fn underlay(cluster: &Cluster) -> Result<NetNs> {
    NetNs::open(&cluster.places().netns("underlay"))
}

/// The host-side interface of a pod.
pub fn pod_device(cluster: &Cluster, pod: &str) -> String {
    let number = cluster.shape().pods.iter().position(|shape| shape.name == pod);
    format!("veth{:04x}", number.unwrap_or_default())
}

fn addresses(texts: &[String]) -> Vec<IpAddr> {
    texts
        .iter()
        .map(|text| text.parse().expect("an address"))
        .collect()
}

fn shape(network: Network) -> Shape {
    let node = |number: u8| NodeShape {
        name: format!("node{number}"),
        addresses: addresses(&[format!("192.168.77.1{number}"), format!("fd00:77::1{number}")]),
        extra_addresses: (78..81)
            .flat_map(|net| {
                addresses(&[
                    format!("192.168.{net}.1{number}"),
                    format!("fd00:{net}::1{number}"),
                ])
            })
            .collect(),
        pod_cidrs: [
            format!("10.244.{number}.0/24"),
            format!("fd00:10:244:{number}::/64"),
        ]
        .iter()
        .map(|text| parse_prefix(text).expect("a network"))
        .collect(),
    };
    let mut pods = vec![PodShape {
        name: "client1".to_owned(),
        node: "node1".to_owned(),
        addresses: addresses(&["10.244.1.10".to_owned(), "fd00:10:244:1::10".to_owned()]),
        host_network: false,
    }];
    pods.extend(ways().map(|way| PodShape {
        name: way.backend(),
        node: if way.is_local { "node1" } else { "node2" }.to_owned(),
        addresses: vec![way.backend_address(false), way.backend_address(true)],
        host_network: false,
    }));
    Shape {
        nodes: vec![node(1), node(2)],
        pods,
        externals: vec![ExternalShape {
            name: "ext1".to_owned(),
            addresses: addresses(&["203.0.113.10".to_owned(), "2001:db8:ff::10".to_owned()]),
        }],
        network,
    }
}

fn write_objects(cluster: &Cluster, folder: &Manifests) -> Result<()> {
    for node in &cluster.shape().nodes {
        folder.apply(&manifests::node(node))?;
    }
    for shape in &cluster.shape().pods {
        let hosts = &cluster.shape().node(&shape.node)?.addresses;
        folder.apply(&pod(shape, "test", hosts))?;
    }
    for way in ways() {
        let name = way.backend();
        let ips = [way.cluster_ip(false), way.cluster_ip(true)];
        folder.apply(&json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "test"},
            "spec": {"type": "NodePort", "clusterIP": ips[0], "clusterIPs": ips, "ipFamilies": ["IPv4", "IPv6"],
                     "ports": [{"name": "tcp", "port": 80, "targetPort": PORT, "protocol": "TCP", "nodePort": way.node_port()},
                               {"name": "udp", "port": 80, "targetPort": PORT, "protocol": "UDP", "nodePort": way.node_port()}]},
        }))?;
        for ipv6 in [false, true] {
            let family = if ipv6 { "IPv6" } else { "IPv4" };
            let node = if way.is_local { "node1" } else { "node2" };
            folder.apply(&json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "metadata": {"name": format!("{name}-{}", family.to_lowercase()), "namespace": "test",
                             "labels": {"kubernetes.io/service-name": name}},
                "addressType": family,
                "ports": [{"name": "tcp", "port": PORT, "protocol": "TCP"},
                          {"name": "udp", "port": PORT, "protocol": "UDP"}],
                "endpoints": [{"addresses": [way.backend_address(ipv6)], "nodeName": node,
                               "conditions": {"ready": true, "serving": true, "terminating": false},
                               "targetRef": {"kind": "Pod", "namespace": "test", "name": name}}],
            }))?;
        }
    }
    Ok(())
}

/// A cluster of its own without socket hooks, in which the transfers of all ways have to arrive and to pass `check`. Nothing
/// is done where no agent is built.
pub fn transfers(
    name: &str,
    datapath: &str,
    network: Network,
    change: impl FnOnce(&mut Cluster) -> Result<()>,
    check: impl Fn(Way, &Transferred) -> Result<()>,
) -> Result<()> {
    let Some(agent) = agent::built() else {
        return Ok(());
    };
    let flags = ["--socket-lb", "off", "--datapath", datapath];
    let name = format!("{name}-{datapath}");
    Bed::build(&name, agent, &flags, (network, Uplink::Card), change)?.transfer_all(check)
}

/// Whether the sender has learned what the narrowest link of its path carries.
pub fn expect_path_mtu(done: &Transferred, mtu: u32) -> Result<()> {
    ensure!(
        done.path_mtu == mtu,
        "the sender thinks that the path MTU is {}",
        done.path_mtu
    );
    Ok(())
}

//! The cluster of these tests, in both families, and its agents.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use dataplane_tests::agent::{AgentOptions, Agents, patient};
use dataplane_tests::api::served::Served;
use dataplane_tests::cluster::Cluster;
use dataplane_tests::manifests::{self, Manifests, pod};
use dataplane_tests::process::Helper;
use dataplane_tests::shape::{ExternalShape, Network, NodeShape, PodShape, Shape, parse_prefix};
use dataplane_tests::worker::protocol::{HerdReport, Proto, Request, Response};
use serde_json::{Value, json};

pub const PORT: u16 = 8080;
pub const NODE_PORT: u16 = 30080;
/// The agents'. Few, so that two who take one of them at random meet.
pub const SNAT_PORTS: &str = "61000-61255";
/// Endpoints, with their nodes.
pub const BACKENDS: [(&str, u8); 3] = [("be1", 1), ("be2", 2), ("be3", 2)];
pub const SERVICE: [&str; 2] = ["10.96.0.41", "fd00:10:96::41"];
/// Who asks which address: a cluster address and a node port, whose endpoints are on the node and, with another source, on the
/// other one.
pub const CLIENTS: [(&str, &str); 6] = [
    ("client1", "10.96.0.41:80"),
    ("client1", "[fd00:10:96::41]:80"),
    ("ext1", "192.168.77.11:30080"),
    ("ext1", "[fd00:77::11]:30080"),
    ("node1", "10.96.0.41:80"),
    // An endpoint that may meet itself.
    ("be1", "10.96.0.41:80"),
];
/// Who sends datagrams all along, and where.
const STREAMS: [(&str, &str); 3] = [
    ("client1", "10.96.0.41:53"),
    ("ext1", "192.168.77.11:30053"),
    ("node1", "10.96.0.41:53"),
];
const DATAGRAM_PORT: u16 = 30053;
const PER_SECOND: u32 = 50;
/// Datagrams of a stream that may be without an answer: what was in flight when hooks came or went.
const IN_FLIGHT: usize = 5;
/// How long one exchange may take; machines that run tests are busy.
const EXCHANGE_MS: u64 = 20_000;
const CALL: Duration = Duration::from_mins(4);
const PATIENCE: Duration = Duration::from_secs(40);
/// The annotation by which a Node says how its datapath is.
const STATUS: &str = "dataplane/status";
/// What a Node says is written some 15 s apart.
const SAID_WITHIN: Duration = Duration::from_mins(1);

pub struct Stage {
    pub cluster: Cluster,
    folder: Manifests,
    program: PathBuf,
}

fn addresses(texts: &[String; 2]) -> Result<Vec<IpAddr>> {
    texts.iter().map(|text| Ok(text.parse()?)).collect()
}

/// The addresses of a backend, by its place.
pub fn backend_addresses(place: usize) -> [String; 2] {
    let node = BACKENDS[place].1;
    [
        format!("10.244.{node}.{}", 21 + place),
        format!("fd00:10:244:{node}::{}", 21 + place),
    ]
}

impl Stage {
    pub fn set(name: &str, served: Option<&Arc<Served>>, program: PathBuf) -> Result<Self> {
        let node = |number: u8| -> Result<NodeShape> {
            Ok(NodeShape {
                name: format!("node{number}"),
                addresses: addresses(&[format!("192.168.77.1{number}"), format!("fd00:77::1{number}")])?,
                extra_addresses: Vec::new(),
                pod_cidrs: vec![
                    parse_prefix(&format!("10.244.{number}.0/24"))?,
                    parse_prefix(&format!("fd00:10:244:{number}::/64"))?,
                ],
            })
        };
        let of_pod = |name: &str, node: u8, ips| -> Result<PodShape> {
            Ok(PodShape {
                name: name.to_owned(),
                node: format!("node{node}"),
                addresses: addresses(&ips)?,
                host_network: false,
            })
        };
        let client = ["10.244.1.10".to_owned(), "fd00:10:244:1::10".to_owned()];
        let mut pods = vec![of_pod("client1", 1, client)?];
        for (place, (name, node)) in BACKENDS.into_iter().enumerate() {
            pods.push(of_pod(name, node, backend_addresses(place))?);
        }
        let shape = Shape {
            nodes: vec![node(1)?, node(2)?],
            pods,
            externals: vec![ExternalShape {
                name: "ext1".to_owned(),
                addresses: addresses(&["203.0.113.10".to_owned(), "2001:db8:113::10".to_owned()])?,
            }],
            network: Network::Routed,
        };
        let helper = Helper::new(env!("CARGO_BIN_EXE_dataplane-scenarios"));
        let cluster = Cluster::build(name, shape, &helper)?;
        for (name, _) in BACKENDS {
            cluster.listen(name, Proto::Tcp, PORT)?;
            cluster.listen(name, Proto::Udp, PORT)?;
        }
        let folder = Manifests::create_in(&cluster.places().work, served)?;
        let stage = Self {
            cluster,
            folder,
            program,
        };
        stage.write_objects()?;
        Ok(stage)
    }

    fn write_objects(&self) -> Result<()> {
        let shape = self.cluster.shape();
        self.folder
            .apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "ns1"}}))?;
        for node in &shape.nodes {
            self.folder.apply(&manifests::node(node))?;
        }
        for one in &shape.pods {
            self.folder
                .apply(&pod(one, "ns1", &shape.node(&one.node)?.addresses))?;
        }
        self.folder.apply(&json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "svc1", "namespace": "ns1"},
            "spec": {
                "type": "NodePort", "clusterIP": SERVICE[0], "clusterIPs": SERVICE,
                "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack",
                "ports": [
                    {"name": "http", "port": 80, "protocol": "TCP", "targetPort": PORT, "nodePort": NODE_PORT},
                    {"name": "dns", "port": 53, "protocol": "UDP", "targetPort": PORT, "nodePort": DATAGRAM_PORT},
                ],
            },
        }))?;
        // A client that may reach the endpoints, and not the Service's address.
        let endpoints_of_service: Vec<Value> = ["TCP", "UDP"]
            .map(|protocol| json!({"port": PORT, "protocol": protocol}))
            .to_vec();
        self.folder.apply(&json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "client1", "namespace": "ns1"},
            "spec": {
                "podSelector": {"matchLabels": {"pod": "client1"}}, "policyTypes": ["Egress"],
                "egress": [{"to": [{"podSelector": {}}], "ports": endpoints_of_service}],
            },
        }))?;
        for (family, kind) in ["IPv4", "IPv6"].into_iter().enumerate() {
            let endpoints = BACKENDS.iter().enumerate().map(|(place, (name, node))| {
                json!({
                    "addresses": [backend_addresses(place)[family]],
                    "conditions": {"ready": true, "serving": true, "terminating": false},
                    "nodeName": format!("node{node}"),
                    "targetRef": {"kind": "Pod", "namespace": "ns1", "name": name},
                })
            });
            self.folder.apply(&json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": kind,
                "metadata": {
                    "name": format!("svc1-{}", kind.to_lowercase()), "namespace": "ns1",
                    "labels": {"kubernetes.io/service-name": "svc1"},
                },
                "endpoints": endpoints.collect::<Vec<Value>>(),
                "ports": [
                    {"name": "http", "port": PORT, "protocol": "TCP"},
                    {"name": "dns", "port": PORT, "protocol": "UDP"},
                ],
            }))?;
        }
        Ok(())
    }

    /// Waits until every client is answered.
    pub fn wait_until_served(&self) -> Result<()> {
        let end = Instant::now() + patient(PATIENCE);
        for (client, to) in CLIENTS {
            loop {
                let report = self.ask(client, &open("first", to, 1, 1000)?)?;
                if report.broken.is_empty() {
                    break;
                }
                ensure!(
                    Instant::now() < end,
                    "{client} gets no answer from {to}: {:?}",
                    report.broken
                );
                sleep(Duration::from_millis(200));
            }
        }
        Ok(())
    }

    /// More connections of a client's herd.
    pub fn open(&self, client: &str, herd: &str, to: &str, connections: u32) -> Result<HerdReport> {
        self.ask(client, &open(herd, to, connections, EXCHANGE_MS)?)
    }

    /// One exchange on every connection of a client's herd.
    pub fn exchange(&self, client: &str, herd: &str) -> Result<HerdReport> {
        let request = Request::HerdExchange {
            name: herd.to_owned(),
            timeout_ms: EXCHANGE_MS,
        };
        self.ask(client, &request)
    }

    /// Begins to send datagrams.
    pub fn start_streams(&self) -> Result<()> {
        for (client, to) in STREAMS {
            let request = Request::StreamStart {
                name: to.to_owned(),
                to: to.parse()?,
                per_second: PER_SECOND,
            };
            self.cluster.worker(client)?.call(request, CALL)?;
        }
        Ok(())
    }

    /// Ends the streams: each has met one endpoint from its first datagram to its last.
    pub fn end_streams(&self) -> Result<()> {
        for (client, to) in STREAMS {
            let request = Request::StreamReport {
                name: to.to_owned(),
                stop: true,
            };
            let Response::Stream { answered, reopened } = self.cluster.worker(client)?.call(request, CALL)?
            else {
                bail!("{client} has no stream to {to}");
            };
            let mut by: Vec<(usize, &String)> = Vec::new();
            for (number, who) in answered.iter().enumerate() {
                if let Some(who) = who
                    && by.last().is_none_or(|(_, last)| *last != who)
                {
                    by.push((number, who));
                }
            }
            let lost = answered.iter().filter(|by| by.is_none()).count();
            println!(
                "{lost} of {} datagrams of {client} to {to} got no answer; from these on they came from {by:?}",
                answered.len()
            );
            ensure!(
                by.len() == 1 && lost <= IN_FLIGHT && reopened.is_empty(),
                "{client} to {to}: answered by {by:?}, {lost} of {} without an answer, {reopened:?}",
                answered.len()
            );
        }
        Ok(())
    }

    fn ask(&self, client: &str, request: &Request) -> Result<HerdReport> {
        match self.cluster.worker(client)?.call(request.clone(), CALL)? {
            Response::Herd(report) => Ok(report),
            other => bail!("unexpected answer {other:?}"),
        }
    }

    /// Waits until a Node's annotation says that its datapath is ready, how its uplink is handled, and whether a condition holds.
    /// Objects of a folder are nobody's to annotate.
    pub fn wait_for_node_to_say(&self, node: &str, condition: &str, holds: bool) -> Result<()> {
        let Some(served) = self.folder.served() else {
            return Ok(());
        };
        let end = Instant::now() + patient(SAID_WITHIN);
        loop {
            let object = served.client.get(&format!("/api/v1/nodes/{node}"))?.done()?;
            let text = object["metadata"]["annotations"][STATUS]
                .as_str()
                .unwrap_or("null");
            let said: Value = serde_json::from_str(text).context("the annotation is no JSON")?;
            let unmet = said["unmet"].as_array();
            let is_met = unmet.is_some_and(|unmet| !unmet.iter().any(|one| one == condition));
            let has_uplink = said["devices"]["eth0"]["tc"].is_string();
            if said["ready"] == true && has_uplink && is_met == holds {
                return Ok(());
            }
            ensure!(Instant::now() < end, "{node} says {said}");
            sleep(Duration::from_millis(200));
        }
    }

    /// The agents, none of which runs.
    pub fn agents(&self) -> Takers {
        Takers {
            agents: None,
            nodes: self
                .cluster
                .shape()
                .nodes
                .iter()
                .map(|node| node.name.clone())
                .collect(),
        }
    }
}

fn open(herd: &str, to: &str, connections: u32, timeout_ms: u64) -> Result<Request> {
    Ok(Request::HerdOpen {
        name: herd.to_owned(),
        to: to.parse::<SocketAddr>()?,
        connections,
        timeout_ms,
    })
}

/// How many connections a report says are alive.
pub fn alive(report: &HerdReport) -> u32 {
    report.alive.values().sum()
}

/// The agents that take over.
pub struct Takers {
    agents: Option<Agents>,
    nodes: Vec<String>,
}

impl Takers {
    /// Starts them, and waits until they serve.
    pub fn start(&mut self, stage: &Stage) -> Result<()> {
        let flags = [
            "--health-addr",
            "off",
            "--metrics-bind-address",
            "off",
            "--snat-ports",
            SNAT_PORTS,
        ]
        .map(str::to_owned);
        let options = AgentOptions {
            program: stage.program.clone(),
            flags: flags.to_vec(),
        };
        let agents = self
            .agents
            .insert(Agents::reading(&stage.cluster, &stage.folder, options)?);
        let problems = agents.settle();
        ensure!(problems.is_empty(), "{}", problems.join("; "));
        Ok(())
    }

    /// Kills and starts them.
    pub fn restart(&mut self) -> Result<()> {
        let agents = self.running_mut()?;
        agents.kill_all();
        agents.start_all()?;
        let problems = agents.settle();
        ensure!(problems.is_empty(), "{}", problems.join("; "));
        Ok(())
    }

    /// Kills them, and removes what they have left.
    pub fn remove(&mut self) -> Result<()> {
        let nodes = self.nodes.clone();
        let agents = self.running_mut()?;
        agents.kill_all();
        for node in &nodes {
            let bpffs = agents.bpffs(node)?.display().to_string();
            let output = agents.run(node, &["cleanup", "--bpffs", &bpffs])?;
            ensure!(
                output.status.success(),
                "cleanup: {}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(())
    }

    pub fn running_mut(&mut self) -> Result<&mut Agents> {
        self.agents.as_mut().context("no agent runs")
    }

    pub fn running(&self) -> Result<&Agents> {
        self.agents.as_ref().context("no agent runs")
    }

    /// Connections that a node leaves to netfilter.
    pub fn left(&self, node: &str) -> Result<u64> {
        self.flows(node, "left")
    }

    /// Flows that the agents' programs have begun.
    pub fn begun(&self) -> Result<u64> {
        self.nodes.iter().map(|node| self.flows(node, "begun")).sum()
    }

    fn flows(&self, node: &str, event: &str) -> Result<u64> {
        let status = self.running()?.status(node)?;
        let events = status["flows"].as_array().context("no flow counters")?;
        let found = events.iter().find(|one| one["event"] == event);
        found
            .and_then(|one| one["count"].as_u64())
            .with_context(|| format!("no counter {event}"))
    }

    pub fn condition(&self, node: &str, kind: &str) -> Result<Value> {
        let status = self.running()?.status(node)?;
        let all: BTreeMap<String, Value> = status["conditions"]
            .as_array()
            .context("no conditions")?
            .iter()
            .map(|one| (one["type"].as_str().unwrap_or_default().to_owned(), one.clone()))
            .collect();
        all.get(kind)
            .cloned()
            .with_context(|| format!("no condition {kind}"))
    }

    pub fn wait_for_condition(&self, node: &str, kind: &str, holds: bool) -> Result<()> {
        let end = Instant::now() + patient(PATIENCE);
        loop {
            let condition = self.condition(node, kind)?;
            if condition["status"] == holds {
                return Ok(());
            }
            ensure!(Instant::now() < end, "{node}: {condition}");
            sleep(Duration::from_millis(200));
        }
    }
}

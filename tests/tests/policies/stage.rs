//! The cluster of these tests: two pods and a backend on the first node, another backend on the second, and a Service.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use dataplane_tests::agent::{AgentOptions, Agents};
use dataplane_tests::cluster::Cluster;
use dataplane_tests::manifests::{Manifests, pod};
use dataplane_tests::process::Helper;
use dataplane_tests::shape::{ExternalShape, Network, NodeShape, PodShape, Shape, parse_prefix};
use dataplane_tests::worker::protocol::{Attempt, HerdReport, Probe, Proto, Request, Response};
use serde_json::{Value, json};

pub const PORT: u16 = 8080;
/// The Service in front of both backends.
pub const SERVICE: &str = "10.96.0.9:80";
const CALL: Duration = Duration::from_mins(1);
/// Longer than any answer takes, and short enough that a denied probe does not send its SYN again.
const SILENCE_MS: u64 = 900;
const EXCHANGE_MS: u64 = 3000;

/// A cluster with its agents.
pub struct Stage {
    pub agents: Agents,
    pub cluster: Cluster,
    pub folder: Manifests,
}

/// Name, node, last part of the address.
const PODS: [(&str, u8, u8); 4] = [
    ("front", 1, 11),
    ("other", 1, 12),
    ("back1", 1, 21),
    ("back2", 2, 22),
];

pub fn address(name: &str, port: u16) -> Result<SocketAddr> {
    let (_, node, last) = PODS
        .iter()
        .find(|(pod, ..)| *pod == name)
        .with_context(|| format!("no pod {name}"))?;
    Ok(format!("10.244.{node}.{last}:{port}").parse()?)
}

impl Stage {
    pub fn set(name: &str, agent: &Path, flags: &[&str], policies: &[Value]) -> Result<Self> {
        let mut stage = Self::set_unsettled(name, agent, flags, policies)?;
        stage.settle()?;
        Ok(stage)
    }

    /// The same, and the agents may not be done yet.
    pub fn set_unsettled(name: &str, agent: &Path, flags: &[&str], policies: &[Value]) -> Result<Self> {
        let addresses = |text: String| -> Result<Vec<IpAddr>> { Ok(vec![text.parse()?]) };
        let node = |number: u8| -> Result<NodeShape> {
            Ok(NodeShape {
                name: format!("node{number}"),
                addresses: addresses(format!("192.168.77.1{number}"))?,
                extra_addresses: Vec::new(),
                pod_cidrs: vec![parse_prefix(&format!("10.244.{number}.0/24"))?],
            })
        };
        let shape = Shape {
            nodes: vec![node(1)?, node(2)?],
            pods: PODS
                .iter()
                .map(|(name, node, last)| {
                    Ok(PodShape {
                        name: (*name).to_owned(),
                        node: format!("node{node}"),
                        addresses: addresses(format!("10.244.{node}.{last}"))?,
                        host_network: false,
                    })
                })
                .collect::<Result<_>>()?,
            externals: vec![ExternalShape {
                name: "ext1".to_owned(),
                addresses: addresses("203.0.113.10".to_owned())?,
            }],
            network: Network::Routed,
        };
        let helper = Helper::new(env!("CARGO_BIN_EXE_dataplane-scenarios"));
        let cluster = Cluster::build(name, shape, &helper)?;
        for backend in ["back1", "back2"] {
            cluster.listen(backend, Proto::Tcp, PORT)?;
        }
        let folder = Manifests::create(&cluster.places().work)?;
        for node in &cluster.shape().nodes {
            let ips = node.addresses.iter();
            folder.apply(&json!({
                "apiVersion": "v1", "kind": "Node", "metadata": {"name": node.name},
                "status": {"addresses": ips.map(|ip| json!({"type": "InternalIP", "address": ip})).collect::<Vec<_>>()},
            }))?;
        }
        for one in &cluster.shape().pods {
            folder.apply(&pod(one, "shop", &cluster.shape().node(&one.node)?.addresses))?;
        }
        folder.apply(&json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "back", "namespace": "shop"},
            "spec": {"clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.9"], "ipFamilies": ["IPv4"],
                "ports": [{"port": 80, "protocol": "TCP", "targetPort": PORT}]},
        }))?;
        let endpoints: Vec<Value> = ["back1", "back2"]
            .iter()
            .map(|name| {
                Ok(json!({
                    "addresses": [address(name, 0)?.ip()], "conditions": {"ready": true},
                    "nodeName": cluster.shape().node_of(name),
                }))
            })
            .collect::<Result<_>>()?;
        folder.apply(&json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": "back-4", "namespace": "shop", "labels": {"kubernetes.io/service-name": "back"}},
            "endpoints": endpoints, "ports": [{"port": PORT, "protocol": "TCP"}],
        }))?;
        for policy in policies {
            folder.apply(policy)?;
        }
        let options = AgentOptions {
            program: agent.to_owned(),
            flags: ["--socket-lb", "off"]
                .iter()
                .chain(flags)
                .map(|flag| (*flag).to_owned())
                .collect(),
        };
        let agents = Agents::start(&cluster, folder.dir(), options)?;
        Ok(Self {
            agents,
            cluster,
            folder,
        })
    }

    /// Waits until the agents have programmed what the folder says.
    pub fn settle(&mut self) -> Result<()> {
        self.agents.settled()
    }

    /// Whether a new connection is answered.
    pub fn connects(&self, from: &str, to: SocketAddr) -> Result<bool> {
        self.connects_as(from, Ipv4Addr::UNSPECIFIED, to)
    }

    /// [`Self::connects`], from one of the addresses of the pod's interface.
    pub fn connects_as(&self, from: &str, source: Ipv4Addr, to: SocketAddr) -> Result<bool> {
        match self.probe(from, (source, 0).into(), to)? {
            Attempt::Answered { .. } => Ok(true),
            Attempt::Silent => Ok(false),
            other => bail!("{from} to {to}: {other:?}"),
        }
    }

    /// Who answers a new connection from a port.
    pub fn answers(&self, from: &str, port: u16, to: SocketAddr) -> Result<IpAddr> {
        match self.probe(from, (Ipv4Addr::UNSPECIFIED, port).into(), to)? {
            Attempt::Answered { by, .. } => Ok(by.at.ip()),
            other => bail!("{from} to {to}: {other:?}"),
        }
    }

    fn probe(&self, from: &str, source: SocketAddr, to: SocketAddr) -> Result<Attempt> {
        let probe = Probe {
            proto: Proto::Tcp,
            to,
            from: source,
            connections: 1,
            parallel: false,
            interval_ms: 0,
            timeout_ms: SILENCE_MS,
            stop_after_failures: 1,
            until_backend_changes: false,
            first_backend: None,
        };
        match self.cluster.worker(from)?.call(Request::Probe(probe), CALL)? {
            Response::Attempts(mut attempts) => attempts.pop().context("no attempt was made"),
            other => bail!("unexpected answer {other:?}"),
        }
    }

    /// Opens connections that stay.
    pub fn open(&self, from: &str, to: SocketAddr, connections: u32) -> Result<u32> {
        self.herd(
            from,
            Request::HerdOpen {
                name: "kept".to_owned(),
                to,
                connections,
                timeout_ms: EXCHANGE_MS,
            },
        )
    }

    /// How many of them still answer.
    pub fn alive(&self, from: &str) -> Result<u32> {
        self.herd(
            from,
            Request::HerdExchange {
                name: "kept".to_owned(),
                timeout_ms: EXCHANGE_MS,
            },
        )
    }

    fn herd(&self, from: &str, request: Request) -> Result<u32> {
        match self.cluster.worker(from)?.call(request, CALL)? {
            Response::Herd(HerdReport { alive, .. }) => Ok(alive.values().sum()),
            other => bail!("unexpected answer {other:?}"),
        }
    }

    /// What a command of a node's agent prints as JSON; of `verdicts`, a list of its lines.
    pub fn command(&self, node: &str, arguments: &[&str]) -> Result<Value> {
        let output = self.agents.command(node, arguments)?;
        let text = String::from_utf8_lossy(&output.stdout);
        if arguments.first() == Some(&"verdicts") {
            let lines = text.lines().map(serde_json::from_str);
            return Ok(Value::Array(lines.collect::<Result<_, _>>()?));
        }
        serde_json::from_str(&text).with_context(|| {
            let error = String::from_utf8_lossy(&output.stderr);
            format!("{arguments:?} printed no JSON: {text} {error}")
        })
    }

    /// The contents of every pinned table of a node.
    pub fn tables(&self, node: &str) -> Result<Vec<(PathBuf, String)>> {
        let folder = self.agents.bpffs(node)?;
        let mut tables = Vec::new();
        for version in folder.read_dir()?.flatten() {
            for table in version.path().join("maps").read_dir()?.flatten() {
                let path = table.path();
                let name = table.file_name().to_string_lossy().into_owned();
                if ["EVENTS", "VERDICTS", "MAGLEV"].contains(&name.as_str()) {
                    // Ring buffers have no entries, and what is mapped nobody but the agent writes.
                    continue;
                }
                let output = Command::new("bpftool")
                    .args(["map", "dump", "pinned"])
                    .arg(&path)
                    .output()
                    .context("failed to run bpftool")?;
                ensure!(output.status.success(), "failed to dump {}", path.display());
                let mut lines: Vec<&[u8]> = output.stdout.split(|byte| *byte == b'\n').collect();
                lines.sort_unstable();
                let lines = lines.iter().map(|line| String::from_utf8_lossy(line));
                tables.push((path.clone(), lines.collect::<Vec<_>>().join("\n")));
            }
        }
        tables.sort();
        Ok(tables)
    }

    /// How many packets a node has dropped for a reason.
    pub fn counted(&self, node: &str, reason: &str) -> Result<u64> {
        let status = self.agents.status(node)?;
        let counters = status["counters"].as_array().context("no counters")?;
        let found = counters.iter().find(|one| one["reason"] == reason);
        Ok(found.and_then(|one| one["count"].as_u64()).unwrap_or(0))
    }
}

/// A NetworkPolicy about the pods with a name; `spec` without its selector.
pub fn policy(name: &str, about: Option<&str>, dry_run: bool, mut spec: Value) -> Value {
    spec["podSelector"] = match about {
        Some(pod) => json!({"matchLabels": {"pod": pod}}),
        None => json!({}),
    };
    let annotations = if dry_run {
        json!({"dataplane/dry-run": "true"})
    } else {
        json!({})
    };
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": "shop", "annotations": annotations}, "spec": spec,
    })
}

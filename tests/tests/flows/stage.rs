//! The cluster of these tests: clients in a pod, on a node and outside, and backends on both nodes.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use dataplane_tests::agent::{AgentOptions, Agents};
use dataplane_tests::cluster::Cluster;
use dataplane_tests::manifests::{self, Manifests, pod};
use dataplane_tests::netns::set_sysctls;
use dataplane_tests::process::Helper;
use dataplane_tests::shape::{ExternalShape, Network, NodeShape, PodShape, Shape, parse_prefix};
use dataplane_tests::worker::protocol::{Direction, HerdReport, Probe, Proto, Request, Response, Transfer};
use serde_json::{Value, json};

pub const PORT: u16 = 8080;
/// How long one exchange may take; machines that run tests are busy.
const EXCHANGE_MS: u64 = 20_000;
const CALL: Duration = Duration::from_mins(4);

/// Which client asks which address: each sees another hook first.
pub const CLIENTS: [(&str, &str); 3] = [
    ("client1", "10.96.0.41:80"),
    ("node1", "10.96.0.41:80"),
    ("ext1", "192.168.77.11:30080"),
];
/// The load balancer's address, which `ext1` reaches by way of node1.
pub const BALANCER: &str = "198.51.100.41:80";

/// What the agents are started with.
#[derive(Debug, Clone, Copy)]
pub struct Mode {
    pub socket_lb: &'static str,
    pub datapath: &'static str,
    /// Further flags.
    pub more: &'static [&'static str],
}

impl Mode {
    /// Every connection is seen packet by packet, by programs of `datapath`.
    pub const fn without_sockets(datapath: &'static str) -> Self {
        Self {
            socket_lb: "off",
            datapath,
            more: &[],
        }
    }
}

/// How a backend stands in the slice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Ready,
    Terminating,
    NotReady,
}

/// A cluster with its agents.
pub struct Stage {
    pub agents: Agents,
    pub cluster: Cluster,
    folder: Manifests,
    /// The slice's endpoints.
    slice: BTreeMap<String, State>,
    /// Of the endpoints, as the slice says.
    target_port: u16,
}

fn addresses(text: &str) -> Result<Vec<IpAddr>> {
    Ok(vec![text.parse()?])
}

impl Stage {
    /// `backends` by name and node; all listen, and are in the slice as `slice` says.
    pub fn set(
        name: &str,
        mode: Mode,
        backends: &[(&str, u8)],
        ready: &[&str],
        agent: PathBuf,
    ) -> Result<Self> {
        let node = |number: u8| -> Result<NodeShape> {
            Ok(NodeShape {
                name: format!("node{number}"),
                addresses: addresses(&format!("192.168.77.1{number}"))?,
                extra_addresses: Vec::new(),
                pod_cidrs: vec![parse_prefix(&format!("10.244.{number}.0/24"))?],
            })
        };
        let mut pods = vec![PodShape {
            name: "client1".to_owned(),
            node: "node1".to_owned(),
            addresses: addresses("10.244.1.10")?,
            host_network: false,
        }];
        for (place, (name, node)) in backends.iter().enumerate() {
            pods.push(PodShape {
                name: (*name).to_owned(),
                node: format!("node{node}"),
                addresses: addresses(&format!("10.244.{node}.{}", 21 + place))?,
                host_network: false,
            });
        }
        let shape = Shape {
            nodes: vec![node(1)?, node(2)?],
            pods,
            externals: vec![ExternalShape {
                name: "ext1".to_owned(),
                addresses: addresses("203.0.113.10")?,
            }],
            network: Network::Routed,
        };
        let helper = Helper::new(env!("CARGO_BIN_EXE_dataplane-scenarios"));
        let mut cluster = Cluster::build(name, shape, &helper)?;
        let balancer: SocketAddr = BALANCER.parse()?;
        cluster.set_route("ext1", balancer.ip(), None)?;
        for (name, _) in backends {
            cluster.listen(name, Proto::Tcp, PORT)?;
        }
        let folder = Manifests::create(&cluster.places().work)?;
        for node in &cluster.shape().nodes {
            folder.apply(&manifests::node(node))?;
        }
        for one in &cluster.shape().pods {
            let mut manifest = pod(one, "ns1", &cluster.shape().node(&one.node)?.addresses);
            if one.name == "client1" {
                // Its floods come from a million addresses.
                manifest["metadata"]["annotations"] = json!({"dataplane/any-source": "true"});
            }
            folder.apply(&manifest)?;
        }
        folder.apply(&service())?;
        let flags = [
            &["--socket-lb", mode.socket_lb, "--datapath", mode.datapath],
            mode.more,
        ]
        .concat();
        let slice = ready
            .iter()
            .map(|name| ((*name).to_owned(), State::Ready))
            .collect();
        write_slice(&folder, &cluster, &slice, PORT)?;
        let options = AgentOptions {
            program: agent,
            flags: flags.into_iter().map(str::to_owned).collect(),
        };
        let agents = Agents::start(&cluster, folder.dir(), options)?;
        let mut stage = Self {
            agents,
            cluster,
            folder,
            slice,
            target_port: PORT,
        };
        stage.settle()?;
        Ok(stage)
    }

    /// Another object, or another version of one.
    pub fn apply(&self, object: &Value) -> Result<()> {
        self.folder.apply(object)
    }

    pub fn delete(&self, object: &Value) -> Result<()> {
        self.folder.delete(object)
    }

    /// Puts backends into the slice, or takes them out.
    pub fn put(&mut self, changes: &[(&str, Option<State>)]) -> Result<()> {
        for (name, state) in changes {
            match state {
                Some(state) => self.slice.insert((*name).to_owned(), *state),
                None => self.slice.remove(*name),
            };
        }
        self.write_slice()
    }

    /// Another port of the endpoints; they go on listening at [`PORT`].
    pub fn set_target_port(&mut self, port: u16) -> Result<()> {
        self.target_port = port;
        self.write_slice()
    }

    fn write_slice(&self) -> Result<()> {
        write_slice(&self.folder, &self.cluster, &self.slice, self.target_port)
    }

    /// Waits until the agents have programmed what the folder says.
    pub fn settle(&mut self) -> Result<()> {
        self.agents.settled()
    }

    /// The end of a pod: its process, and then its object.
    pub fn end(&mut self, name: &str) -> Result<()> {
        self.cluster.kill(name)?;
        let metadata = json!({"name": name, "namespace": "ns1"});
        self.folder
            .delete(&json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata}))
    }

    /// More connections of a client's herd.
    pub fn open(&self, client: &str, herd: &str, to: &str, connections: u32) -> Result<HerdReport> {
        let to: SocketAddr = to.parse()?;
        self.ask(
            client,
            Request::HerdOpen {
                name: herd.to_owned(),
                to,
                connections,
                timeout_ms: EXCHANGE_MS,
            },
        )
    }

    /// A connection that is not waited for.
    pub fn begin(&self, client: &str, herd: &str, to: &str) -> Result<HerdReport> {
        let to: SocketAddr = to.parse()?;
        self.ask(
            client,
            Request::HerdOpen {
                name: herd.to_owned(),
                to,
                connections: 1,
                timeout_ms: 200,
            },
        )
    }

    /// Datagrams from one port, one after the other; from a port of the kernel's choice each if that is 0.
    pub fn send_datagrams(&self, client: &str, port: u16, to: &str, count: u32) -> Result<()> {
        let probe = Request::Probe(Probe {
            proto: Proto::Udp,
            to: to.parse()?,
            from: ([0, 0, 0, 0], port).into(),
            connections: count,
            parallel: false,
            interval_ms: 0,
            timeout_ms: 2_000,
            stop_after_failures: count,
            until_backend_changes: false,
            first_backend: None,
        });
        self.cluster.worker(client)?.call(probe, CALL)?;
        Ok(())
    }

    /// One exchange on every connection of a client's herd.
    pub fn exchange(&self, client: &str, herd: &str) -> Result<HerdReport> {
        self.ask(
            client,
            Request::HerdExchange {
                name: herd.to_owned(),
                timeout_ms: EXCHANGE_MS,
            },
        )
    }

    /// A backend takes bulk transfers at this port.
    pub fn take_much(&self, backend: &str, port: u16) -> Result<()> {
        let request = Request::TransferListen { port };
        self.cluster.worker(backend)?.call(request, CALL).map(drop)
    }

    /// A bulk transfer to such a port, of a client that knows nothing of the path's MTU.
    pub fn send_much(&self, client: &str, to: &str) -> Result<()> {
        let request = Request::Transfer(Transfer {
            to: to.parse()?,
            direction: Direction::Upload,
            bytes: 100_000,
            timeout_ms: 2000,
        });
        let forget = || set_sysctls(&[("net/ipv4/route/flush", "1")]);
        self.cluster.member_netns(client)?.enter(forget)?;
        self.cluster.worker(client)?.call(request, CALL).map(drop)
    }

    fn ask(&self, client: &str, request: Request) -> Result<HerdReport> {
        match self.cluster.worker(client)?.call(request, CALL)? {
            Response::Herd(report) => Ok(report),
            other => bail!("unexpected answer {other:?}"),
        }
    }

    /// The page of a node's agent.
    pub fn metrics(&self, node: &str) -> Result<String> {
        self.cluster
            .page(node, 10249, "/metrics", Duration::from_secs(30))
    }

    /// How often something has happened to flows at a node.
    pub fn flow_events(&self, node: &str, event: &str) -> Result<u64> {
        let status = self.agents.status(node)?;
        let events = status["flows"].as_array().context("no flow counters")?;
        let found = events.iter().find(|one| one["event"] == event);
        found
            .and_then(|one| one["count"].as_u64())
            .with_context(|| format!("no counter {event}"))
    }
}

/// The Service.
pub fn service() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "svc1", "namespace": "ns1"},
        "spec": {
            "type": "LoadBalancer", "clusterIP": "10.96.0.41", "clusterIPs": ["10.96.0.41"], "ipFamilies": ["IPv4"],
            "ports": [{"port": 80, "protocol": "TCP", "targetPort": PORT, "nodePort": 30080}],
        },
        "status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.41"}]}},
    })
}

fn write_slice(
    folder: &Manifests,
    cluster: &Cluster,
    slice: &BTreeMap<String, State>,
    port: u16,
) -> Result<()> {
    let endpoint = |(name, state): (&String, &State)| -> Result<Value> {
        let shape = cluster.shape();
        let ready = *state == State::Ready;
        let serving = *state != State::NotReady;
        let terminating = *state == State::Terminating;
        Ok(json!({
            "addresses": shape.addresses_of(name),
            "conditions": {"ready": ready, "serving": serving, "terminating": terminating},
            "nodeName": shape.node_of(name),
            "targetRef": {"kind": "Pod", "namespace": "ns1", "name": name},
        }))
    };
    folder.apply(&json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": "svc1-4", "namespace": "ns1", "labels": {"kubernetes.io/service-name": "svc1"}},
        "endpoints": slice.iter().map(endpoint).collect::<Result<Vec<_>>>()?,
        "ports": [{"port": port, "protocol": "TCP"}],
    }))
}

/// How many connections a report says are alive.
pub fn alive(report: &HerdReport) -> u32 {
    report.alive.values().sum()
}

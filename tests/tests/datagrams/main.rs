//! Streams of 1,000 datagrams a second through the replacement of every endpoint. Lost is what was in flight: once the
//! agents say that a change is programmed, every datagram is answered, and by an endpoint that is in the slice.
//!
//! A connected socket that a socket hook led to an endpoint hears when that is gone. All others keep their one socket.

use std::path::PathBuf;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use dataplane_tests::agent::{self, AgentOptions, Agents};
use dataplane_tests::cluster::Cluster;
use dataplane_tests::manifests::{self, Manifests};
use dataplane_tests::process::Helper;
use dataplane_tests::shape::{ExternalShape, Network, NodeShape, PodShape, Shape, parse_prefix};
use dataplane_tests::worker::protocol::{Attempt, Proto, Request, Response};
use serde_json::{Value, json};

const PER_SECOND: u32 = 1000;
const CALL: Duration = Duration::from_secs(30);
/// How long every endpoint serves alone.
const PHASE: Duration = Duration::from_millis(700);
/// Pods by name, node, and last byte of their address.
const PODS: [(&str, u8, u8); 4] = [("client1", 1, 10), ("be1", 1, 21), ("be2", 2, 22), ("be3", 1, 23)];

/// A stream: its name and client, where it goes, and whether its socket is connected to the endpoint itself, by
/// `--socket-lb`.
struct Stream {
    name: &'static str,
    client: &'static str,
    to: &'static str,
    led_by_hooks: &'static [&'static str],
}

const STREAMS: [Stream; 4] = [
    Stream {
        name: "pod to ClusterIP",
        client: "client1",
        to: "10.96.0.41:80",
        led_by_hooks: &["all"],
    },
    Stream {
        name: "host to ClusterIP",
        client: "node1",
        to: "10.96.0.41:80",
        led_by_hooks: &["auto", "all"],
    },
    Stream {
        name: "host of another node to NodePort",
        client: "node2",
        to: "192.168.77.12:30080",
        led_by_hooks: &["auto", "all"],
    },
    Stream {
        name: "outside to NodePort",
        client: "ext1",
        to: "192.168.77.11:30080",
        led_by_hooks: &[],
    },
];

/// To an endpoint's own address: no service, so nothing ever happens to it.
const DIRECT: &str = "pod to be1 itself";

#[test]
fn without_socket_hooks_by_tc() -> Result<()> {
    every_endpoint_is_replaced("off", "tc")
}

#[test]
fn with_socket_hooks_for_the_host() -> Result<()> {
    every_endpoint_is_replaced("auto", "xdp")
}

#[test]
fn with_socket_hooks_for_all() -> Result<()> {
    every_endpoint_is_replaced("all", "xdp")
}

fn every_endpoint_is_replaced(socket_lb: &str, datapath: &str) -> Result<()> {
    let Some(agent) = agent::built() else {
        return Ok(());
    };
    let mut stage = Stage::set(socket_lb, datapath, agent)?;
    stage.change(&["be1"])?;
    for stream in &STREAMS {
        stage.start(stream.name, stream.client, stream.to)?;
    }
    stage.start(DIRECT, "client1", "10.244.1.21:8080")?;
    let open = Request::FlowStart {
        name: "tcp".to_owned(),
        proto: Proto::Tcp,
        from: "0.0.0.0:0".parse()?,
        to: "10.96.0.41:80".parse()?,
        timeout_ms: 5000,
    };
    stage.is_answered_by_be1("node1", open)?;

    // Of each phase: its endpoint, and the numbers of the first and last datagram of each stream.
    let mut phases = Vec::new();
    let mut before = "be1";
    for next in ["be1", "be2", "be3", "be1"] {
        if next != before {
            stage.change(&[before, next])?;
            stage.change(&[next])?;
        }
        let from = stage.sent()?;
        sleep(PHASE);
        phases.push((next, from, stage.sent()?));
        before = next;
        let exchange = Request::FlowExchange {
            name: "tcp".to_owned(),
            timeout_ms: 5000,
        };
        stage.is_answered_by_be1("node1", exchange)?;
    }
    for (place, stream) in STREAMS.iter().enumerate() {
        let (answered, reopened) = stage.report(stream.client, stream.name, true)?;
        let lost = answered.iter().filter(|by| by.is_none()).count();
        println!(
            "{socket_lb}: {}: {} sent, {lost} lost, {reopened:?}",
            stream.name,
            answered.len()
        );
        for (endpoint, from, to) in &phases {
            let phase = &answered[from[place]..to[place]];
            ensure!(
                !phase.is_empty(),
                "{}: nothing was sent to {endpoint}",
                stream.name
            );
            let wrong = phase.iter().filter(|by| by.as_deref() != Some(endpoint));
            let wrong: Vec<_> = wrong.collect();
            ensure!(
                wrong.is_empty(),
                "{}: {} of {} that were sent after the change to {endpoint} was programmed were not answered by it: {:?}",
                stream.name,
                wrong.len(),
                phase.len(),
                &wrong[..wrong.len().min(5)],
            );
        }
        if stream.led_by_hooks.contains(&socket_lb) {
            ensure!(
                reopened.len() >= 3,
                "{}: was told {} times of 3",
                stream.name,
                reopened.len()
            );
        } else {
            ensure!(reopened.is_empty(), "{}: {reopened:?}", stream.name);
        }
    }
    let (answered, reopened) = stage.report("client1", DIRECT, true)?;
    let lost = answered.iter().filter(|by| by.is_none()).count();
    ensure!(
        lost == 0 && reopened.is_empty(),
        "{DIRECT}: {lost} lost, {reopened:?}"
    );
    Ok(())
}

/// Two nodes with their agents.
struct Stage {
    agents: Agents,
    cluster: Cluster,
    folder: Manifests,
}

impl Stage {
    fn set(socket_lb: &str, datapath: &str, agent: PathBuf) -> Result<Self> {
        let nodes = [1, 2].map(|number: u8| -> Result<NodeShape> {
            Ok(NodeShape {
                name: format!("node{number}"),
                addresses: vec![format!("192.168.77.1{number}").parse()?],
                extra_addresses: Vec::new(),
                pod_cidrs: vec![parse_prefix(&format!("10.244.{number}.0/24"))?],
            })
        });
        let pods = PODS.map(|(name, node, last)| -> Result<PodShape> {
            Ok(PodShape {
                name: name.to_owned(),
                node: format!("node{node}"),
                addresses: vec![format!("10.244.{node}.{last}").parse()?],
                host_network: false,
            })
        });
        let shape = Shape {
            nodes: nodes.into_iter().collect::<Result<_>>()?,
            pods: pods.into_iter().collect::<Result<_>>()?,
            externals: vec![ExternalShape {
                name: "ext1".to_owned(),
                addresses: vec!["203.0.113.10".parse()?],
            }],
            network: Network::Routed,
        };
        let helper = Helper::new(env!("CARGO_BIN_EXE_dataplane-scenarios"));
        let cluster = Cluster::build(&format!("datagrams-{socket_lb}"), shape, &helper)?;
        let folder = Manifests::create(&cluster.places().work)?;
        for node in &cluster.shape().nodes {
            folder.apply(&json!({
                "apiVersion": "v1", "kind": "Node", "metadata": {"name": node.name},
                "spec": {"podCIDRs": []},
                "status": {"addresses": [{"type": "InternalIP", "address": node.addresses[0]}]},
            }))?;
        }
        for pod in &cluster.shape().pods {
            let host_ips = &cluster.shape().node(&pod.node)?.addresses;
            folder.apply(&manifests::pod(pod, "ns1", host_ips))?;
            if pod.name.starts_with("be") {
                cluster.listen(&pod.name, Proto::Udp, 8080)?;
                cluster.listen(&pod.name, Proto::Tcp, 8080)?;
            }
        }
        folder.apply(&service())?;
        let flags = ["--socket-lb", socket_lb, "--datapath", datapath].map(str::to_owned);
        let options = AgentOptions {
            program: agent,
            flags: flags.into(),
        };
        Ok(Self {
            agents: Agents::start(&cluster, folder.dir(), options)?,
            cluster,
            folder,
        })
    }

    /// Makes these the Service's endpoints; returns when that is programmed.
    fn change(&mut self, endpoints: &[&str]) -> Result<()> {
        self.folder.apply(&slice(endpoints))?;
        let problems = self.agents.settle();
        ensure!(problems.is_empty(), "{problems:?}");
        Ok(())
    }

    fn start(&self, name: &str, client: &str, to: &str) -> Result<()> {
        let request = Request::StreamStart {
            name: name.to_owned(),
            to: to.parse()?,
            per_second: PER_SECOND,
        };
        self.cluster.worker(client)?.call(request, CALL)?;
        Ok(())
    }

    fn report(&self, client: &str, name: &str, stop: bool) -> Result<(Vec<Option<String>>, Vec<String>)> {
        let name = name.to_owned();
        match self
            .cluster
            .worker(client)?
            .call(Request::StreamReport { name, stop }, CALL)?
        {
            Response::Stream { answered, reopened } => Ok((answered, reopened)),
            other => bail!("unexpected answer {other:?}"),
        }
    }

    /// How many datagrams each stream has sent.
    fn sent(&self) -> Result<Vec<usize>> {
        let sent = |stream: &Stream| Ok(self.report(stream.client, stream.name, false)?.0.len());
        STREAMS.iter().map(sent).collect()
    }

    fn is_answered_by_be1(&self, client: &str, request: Request) -> Result<()> {
        match self.cluster.worker(client)?.call(request, CALL)? {
            Response::Attempts(attempts) => match attempts.as_slice() {
                [Attempt::Answered { by, .. }] if by.name == "be1" => Ok(()),
                other => bail!("the TCP connection to be1: {other:?}"),
            },
            other => bail!("unexpected answer {other:?}"),
        }
    }
}

fn service() -> Value {
    let port = |proto: &str, node_port: u16| json!({"name": proto.to_lowercase(), "port": 80, "protocol": proto, "targetPort": 8080, "nodePort": node_port});
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "svc1", "namespace": "ns1"},
        "spec": {
            "type": "NodePort", "clusterIP": "10.96.0.41", "clusterIPs": ["10.96.0.41"], "ipFamilies": ["IPv4"],
            "ports": [port("UDP", 30080), port("TCP", 30080)], "selector": {"app": "svc1"},
        },
    })
}

fn slice(endpoints: &[&str]) -> Value {
    let chosen = PODS.iter().filter(|(name, ..)| endpoints.contains(name));
    let endpoints: Vec<Value> = chosen
        .map(|(name, node, last)| {
            json!({
                "addresses": [format!("10.244.{node}.{last}")], "conditions": {"ready": true},
                "nodeName": format!("node{node}"), "targetRef": {"kind": "Pod", "namespace": "ns1", "name": name},
            })
        })
        .collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": "svc1-1", "namespace": "ns1", "labels": {"kubernetes.io/service-name": "svc1"}},
        "endpoints": endpoints,
        "ports": [{"name": "udp", "port": 8080, "protocol": "UDP"}, {"name": "tcp", "port": 8080, "protocol": "TCP"}],
    })
}

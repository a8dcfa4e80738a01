//! The cluster, in both families, and what stays in it while everything else changes.
//!
//! Each node has a web server, a guarded server, a client that policies allow to reach it and one that they do not.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use dataplane_tests::agent::{AgentOptions, Agents};
use dataplane_tests::api::served::Served;
use dataplane_tests::cluster::Cluster;
use dataplane_tests::manifests::{self, Manifests, PodObject};
use dataplane_tests::process::Helper;
use dataplane_tests::shape::{ExternalShape, Network, NodeShape, PodShape, Shape, parse_prefix};
use dataplane_tests::traffic::{Pace, Traffic, Way};
use dataplane_tests::web;
use serde_json::{Value, json};

use crate::census::Census;
use crate::churn;

/// The numbers of the nodes.
pub const NODES: [u8; 3] = [1, 2, 3];
/// Where servers listen.
pub const PORT: u16 = 8080;
/// Where guarded servers take datagrams.
pub const UDP_PORT: u16 = 9090;
/// Roles of pods: the namespace that they are in, and the last part of their addresses.
const ROLES: [(&str, &str, u8); 4] = [
    ("web", WEB, 21),
    ("guard", GUARDED, 31),
    ("in", INSIDERS, 41),
    ("out", OUTSIDERS, 51),
];
pub const WEB: &str = "steady";
pub const GUARDED: &str = "guarded";
pub const INSIDERS: &str = "insiders";
pub const OUTSIDERS: &str = "outsiders";
/// Namespaces whose objects come and go.
pub const CHURN: [&str; 3] = ["churn-1", "churn-2", "churn-3"];
/// The services' addresses.
pub const WEB_SERVICE: [&str; 2] = ["10.96.0.80", "fd00:10:96::80"];
pub const GUARD_SERVICE: [&str; 2] = ["10.96.0.90", "fd00:10:96::90"];
const NODE_PORT: u16 = 30080;
/// Connections that are kept on each way.
const KEPT: u32 = 6;
/// A connection waits for a cable that is out, and for TCP to try again.
const PACE: Pace = Pace {
    period: Duration::from_millis(100),
    patience: Duration::from_secs(30),
};

/// Everything that runs.
pub struct Stage {
    // Dropped in this order: the agents before the cluster they run in.
    pub agents: Agents,
    pub cluster: Cluster,
    pub manifests: Arc<Manifests>,
    pub served: Option<Arc<Served>>,
}

/// The node with a number.
pub fn node(number: u8) -> String {
    format!("node{number}")
}

/// The addresses of the pod of a role on a node.
pub fn pod_addresses(role: &str, node: u8) -> [IpAddr; 2] {
    let last = ROLES
        .iter()
        .find(|known| known.0 == role)
        .map_or(0, |known| known.2);
    addresses(node, last)
}

/// Addresses of a node's pod network.
pub fn addresses(node: u8, last: u8) -> [IpAddr; 2] {
    [
        IpAddr::from([10, 244, node, last]),
        IpAddr::from([0xfd00, 0x10, 0x244, u16::from(node), 0, 0, 0, u16::from(last)]),
    ]
}

impl Stage {
    /// Builds the cluster, starts servers and agents, and waits until all is programmed.
    pub fn set(agent: &Path, mut flags: Vec<String>, served: Option<Served>) -> Result<Self> {
        let cluster = Cluster::build("chaos", shape()?, &Helper::find()?)?;
        for number in NODES {
            for role in ["web", "guard"] {
                let name = format!("{role}-{number}");
                web::serve(cluster.member_netns(&name)?.path().to_owned(), name, PORT)?;
            }
        }
        let served = served.map(Arc::new);
        let manifests = Arc::new(Manifests::create_in(&cluster.places().work, served.as_ref())?);
        let steady = objects(&cluster)?;
        steady.iter().try_for_each(|object| manifests.apply(object))?;
        flags.extend(["--metrics-bind-address".to_owned(), "127.0.0.1:10249".to_owned()]);
        let options = AgentOptions {
            program: agent.to_owned(),
            flags,
        };
        let mut stage = Self {
            agents: Agents::reading(&cluster, &manifests, options)?,
            cluster,
            manifests,
            served,
        };
        stage.settle()?;
        Ok(stage)
    }

    /// Waits until the agents have programmed what they were told.
    pub fn settle(&mut self) -> Result<()> {
        self.agents.settled()
    }

    /// Connections that must not break, and new ones that must not fail.
    pub fn traffic(&self) -> Result<Traffic> {
        let cluster = |service: [&str; 2], family: usize| (service[family].to_owned(), 80);
        let ways = [
            ("in-1", cluster(WEB_SERVICE, 0)),
            ("in-2", cluster(WEB_SERVICE, 1)),
            ("out-3", cluster(WEB_SERVICE, 0)),
            ("in-1", cluster(GUARD_SERVICE, 0)),
            ("in-3", cluster(GUARD_SERVICE, 1)),
            ("node1", cluster(WEB_SERVICE, 0)),
            ("outside", ("192.168.77.12".to_owned(), NODE_PORT)),
            ("outside", ("fd00:77::13".to_owned(), NODE_PORT)),
        ];
        let ways = ways.iter().map(|(from, (ip, port))| {
            Ok(Way {
                from: self.netns(from)?,
                to: web::address(ip, *port)?,
            })
        });
        let ways: Vec<Way> = ways.collect::<Result<_>>()?;
        Ok(Traffic::start(&ways, KEPT, PACE))
    }

    /// The namespace of a node, a pod or the client outside.
    pub fn netns(&self, name: &str) -> Result<PathBuf> {
        Ok(self.cluster.member_netns(name)?.path().to_owned())
    }

    /// What there is, counted.
    pub fn census(&self) -> Result<Census> {
        Census::take(self)
    }

    /// Takes everything away that has come, and puts the rest into its first state.
    pub fn without_churn(&mut self) -> Result<()> {
        self.manifests.replace(&objects(&self.cluster)?)?;
        self.settle()
    }
}

fn shape() -> Result<Shape> {
    let node = |number: u8| -> Result<NodeShape> {
        Ok(NodeShape {
            name: node(number),
            addresses: vec![
                [192, 168, 77, 10 + number].into(),
                format!("fd00:77::1{number}").parse()?,
            ],
            extra_addresses: Vec::new(),
            pod_cidrs: vec![
                parse_prefix(&format!("10.244.{number}.0/24"))?,
                parse_prefix(&format!("fd00:10:244:{number}::/64"))?,
            ],
        })
    };
    let pod = |role: &str, number: u8| PodShape {
        name: format!("{role}-{number}"),
        node: self::node(number),
        addresses: pod_addresses(role, number).to_vec(),
        host_network: false,
    };
    Ok(Shape {
        nodes: NODES.into_iter().map(node).collect::<Result<_>>()?,
        pods: NODES
            .into_iter()
            .flat_map(|number| ROLES.map(|(role, ..)| pod(role, number)))
            .collect(),
        externals: vec![ExternalShape {
            name: "outside".to_owned(),
            addresses: vec!["203.0.113.10".parse()?, "2001:db8:ff::10".parse()?],
        }],
        network: Network::Routed,
    })
}

/// What stays: also the first state of what changes.
fn objects(cluster: &Cluster) -> Result<Vec<Value>> {
    let shape = cluster.shape();
    let mut objects = Vec::new();
    objects.extend(shape.nodes.iter().map(manifests::node));
    let namespaces = ROLES.map(|(_, namespace, _)| namespace);
    for name in namespaces.into_iter().chain(CHURN) {
        objects.push(churn::namespace(name, "none"));
    }
    for (pod, (_, namespace, _)) in shape.pods.iter().zip(ROLES.iter().cycle()) {
        let role = pod.name.split('-').next().unwrap_or_default();
        let object = PodObject {
            namespace,
            name: &pod.name,
            labels: json!({"role": role}),
            ports: Vec::new(),
            node: &pod.node,
            node_ips: &shape.node(&pod.node)?.addresses,
            addresses: &pod.addresses,
            host_network: false,
        };
        objects.push(object.manifest());
    }
    let service = |namespace: &str, name: &str, ips: [&str; 2], ports: Value, kind: &str| {
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": namespace},
            "spec": {
                "type": kind, "clusterIP": ips[0], "clusterIPs": ips, "ipFamilies": ["IPv4", "IPv6"],
                "ipFamilyPolicy": "RequireDualStack", "ports": ports,
            },
        })
    };
    let port = json!({"name": "http", "port": 80, "protocol": "TCP", "targetPort": PORT});
    let mut node_port = port.clone();
    node_port["nodePort"] = json!(NODE_PORT);
    let datagrams = json!({"name": "dns", "port": UDP_PORT, "protocol": "UDP", "targetPort": UDP_PORT});
    objects.push(service(WEB, "web", WEB_SERVICE, json!([node_port]), "NodePort"));
    objects.push(service(
        GUARDED,
        "guard",
        GUARD_SERVICE,
        json!([port, datagrams]),
        "ClusterIP",
    ));
    for (namespace, role) in [(WEB, "web"), (GUARDED, "guard")] {
        for family in 0..2 {
            objects.push(churn::steady_slice(
                namespace,
                role,
                family,
                &[churn::State::Ready; 3],
            ));
        }
    }
    objects.push(json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "insiders-alone", "namespace": GUARDED},
        "spec": {
            "podSelector": {}, "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": INSIDERS}}}]}],
        },
    }));
    objects.push(json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "everywhere", "namespace": INSIDERS},
        "spec": {"podSelector": {}, "policyTypes": ["Egress"], "egress": [{}]},
    }));
    Ok(objects)
}

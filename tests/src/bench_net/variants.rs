//! The ways from client to server that are compared, each a node of its own: its rules, its connection tracking and its
//! programs touch nobody else's packets, so all can stand at once and take turns.

use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use dataplane_tests::agent::{AgentOptions, Agents};
use dataplane_tests::cluster::Cluster;
use dataplane_tests::process::Helper;
use dataplane_tests::shape::{Network, NodeShape, PodShape, Shape, parse_prefix};

use crate::fleet::{Fleet, SERVICE_PORT};
use crate::load::{self, Client};
use crate::manifests::{self, Pod};
use crate::report::{NFTABLES, OURS, PLAIN, POLICIES};
use crate::{iptables, nftables};

const NODE: &str = "node1";
const NODE_IP: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 11);
const CLIENT: Pod = Pod {
    name: "client",
    ip: Ipv4Addr::new(10, 244, 1, 10),
};
const SERVER: Pod = Pod {
    name: "server",
    ip: Ipv4Addr::new(10, 244, 1, 21),
};
const SERVER_PORT: u16 = 7000;

/// How the server is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The server's own address; no service, no netfilter.
    Plain,
    /// Through our agent.
    Ours,
    /// The same, with policies on both pods.
    Policies,
    Nftables,
    IptablesNft,
    IptablesLegacy,
}

impl Kind {
    pub const ALL: [Self; 6] = [
        Self::Plain,
        Self::Ours,
        Self::Policies,
        Self::Nftables,
        Self::IptablesNft,
        Self::IptablesLegacy,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => PLAIN,
            Self::Ours => OURS,
            Self::Policies => POLICIES,
            Self::Nftables => NFTABLES,
            Self::IptablesNft => "iptables-nft",
            Self::IptablesLegacy => "iptables-legacy",
        }
    }

    /// The program that loads the rules, if the machine has to have one.
    pub fn program(self) -> Option<&'static str> {
        match self {
            Self::Plain | Self::Ours | Self::Policies => None,
            Self::Nftables => Some("nft"),
            Self::IptablesNft => Some("iptables-nft-restore"),
            Self::IptablesLegacy => Some("iptables-legacy-restore"),
        }
    }
}

/// A node on which the fleet is programmed in one way.
#[derive(Debug)]
pub struct Variant {
    pub kind: Kind,
    pub client: Client,
    /// What the client calls.
    pub to: SocketAddrV4,
    /// How long programming the fleet took.
    pub load_seconds: f64,
    // Dropped in this order: the agent before the cluster it runs in.
    _agents: Option<Agents>,
    _cluster: Cluster,
}

impl Variant {
    /// Builds the node, programs the fleet, and starts client and server on `cpu`.
    pub fn build(kind: Kind, size: u32, agent: &Path, helper: &Helper, cpu: usize) -> Result<Self> {
        let name = format!(
            "bench-{}-{size}",
            kind.name().replace(", ", "-").replace(' ', "-")
        );
        let cluster = Cluster::build(&name, shape()?, helper)?;
        let fleet = Fleet::new(size, (SERVER.ip, SERVER_PORT));
        let started = Instant::now();
        let agents = program(kind, &fleet, &cluster, agent)
            .with_context(|| format!("failed to program {size} services for {}", kind.name()))?;
        let load_seconds = if kind == Kind::Plain {
            0.0
        } else {
            started.elapsed().as_secs_f64()
        };
        let netns = |pod: Pod| cluster.places().netns(&format!("pod-{}", pod.name));
        load::serve(netns(SERVER), cpu, SERVER_PORT)?;
        let client = Client::start(netns(CLIENT), cpu);
        let to = match kind {
            Kind::Plain => SocketAddrV4::new(SERVER.ip, SERVER_PORT),
            _ => SocketAddrV4::new(fleet.called(), SERVICE_PORT),
        };
        Ok(Self {
            kind,
            client,
            to,
            load_seconds,
            _agents: agents,
            _cluster: cluster,
        })
    }
}

fn shape() -> Result<Shape> {
    let pod = |pod: Pod| PodShape {
        name: pod.name.to_owned(),
        node: NODE.to_owned(),
        addresses: vec![pod.ip.into()],
        host_network: false,
    };
    Ok(Shape {
        nodes: vec![NodeShape {
            name: NODE.to_owned(),
            addresses: vec![NODE_IP.into()],
            extra_addresses: Vec::new(),
            pod_cidrs: vec![parse_prefix("10.244.1.0/24")?],
        }],
        pods: vec![pod(CLIENT), pod(SERVER)],
        externals: Vec::new(),
        network: Network::Routed,
    })
}

fn program(kind: Kind, fleet: &Fleet, cluster: &Cluster, agent: &Path) -> Result<Option<Agents>> {
    let rules = |text: String| load_rules(kind, &text, cluster);
    match kind {
        Kind::Plain => Ok(None),
        Kind::Ours => start_agent(fleet, cluster, agent, false).map(Some),
        Kind::Policies => start_agent(fleet, cluster, agent, true).map(Some),
        Kind::Nftables => rules(nftables::ruleset(fleet)).map(|()| None),
        Kind::IptablesNft | Kind::IptablesLegacy => rules(iptables::ruleset(fleet)).map(|()| None),
    }
}

fn start_agent(fleet: &Fleet, cluster: &Cluster, agent: &Path, with_policies: bool) -> Result<Agents> {
    let folder = cluster.places().work.join("manifests");
    manifests::write(&folder, fleet, (NODE, NODE_IP), &[CLIENT, SERVER])?;
    if with_policies {
        manifests::write_policies(&folder, CLIENT, (SERVER, SERVER_PORT))?;
    }
    let flags = ["--socket-lb", "off"].map(str::to_owned).to_vec();
    let mut agents = Agents::start(
        cluster,
        &folder,
        AgentOptions {
            program: agent.to_owned(),
            flags,
        },
    )?;
    agents.settled()?;
    Ok(agents)
}

fn load_rules(kind: Kind, text: &str, cluster: &Cluster) -> Result<()> {
    let name = kind.program().context("nothing loads rules here")?;
    let program = find(name).with_context(|| format!("there is no {name} here"))?;
    let file = cluster.places().work.join("rules");
    fs::write(&file, text).with_context(|| format!("failed to write {}", file.display()))?;
    let mut command = cluster.helper().enter(
        cluster.node_netns(NODE)?.path(),
        &cluster.node_cgroup(NODE)?.join("host"),
        &program,
    );
    if kind == Kind::Nftables {
        command.arg("-f");
    }
    let output = command
        .arg(&file)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("failed to start {name}"))?;
    if !output.status.success() {
        bail!(
            "{name} failed: {}",
            String::from_utf8_lossy(&output.stderr)
                .lines()
                .next()
                .unwrap_or_default()
        );
    }
    Ok(())
}

/// A program in PATH or the system directories.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|program| program.is_file())
}

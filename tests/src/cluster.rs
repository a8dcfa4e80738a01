//! The test cluster: nodes, pods, router and clients outside, each in a namespace with a worker.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::cgroup;
use crate::links::{Links, Route, host};
use crate::netns::{NetNs, set_sysctls};
use crate::places::{Owned, Places};
use crate::pod_network;
use crate::process::Helper;
use crate::shape::{Network, PodShape, Shape, Uplink, contains};
use crate::underlay::{COMMON, FORWARD, UPLINK, Underlay};
use crate::worker::Worker;
use crate::worker::protocol::{Proto, Request, Response};

const CALL: Duration = Duration::from_secs(10);

/// A running cluster. Dropping it removes everything it made.
#[derive(Debug)]
pub struct Cluster {
    shape: Shape,
    workers: HashMap<String, Worker>,
    nodes: Vec<Node>,
    /// Namespaces of pods and clients by name, held open while their workers run.
    namespaces: HashMap<String, NetNs>,
    /// The host-side devices of pods.
    ports: HashMap<String, String>,
    /// Pods that there have been, which number their devices.
    connected: usize,
    underlay: Underlay,
    helper: Helper,
    /// Removed last, after workers and namespaces.
    places: Owned,
}

#[derive(Debug)]
struct Node {
    netns: NetNs,
    links: Links,
    cgroup: PathBuf,
    /// Next hops put for single destinations.
    hops: HashMap<IpAddr, IpAddr>,
}

impl Cluster {
    /// Builds a cluster called `name` (unique within this process).
    pub fn build(name: &str, shape: Shape, helper: &Helper) -> Result<Self> {
        Self::build_on(name, shape, Uplink::default(), helper)
    }

    /// The same with other uplinks, which not every kernel has.
    pub fn build_on(name: &str, shape: Shape, uplink: Uplink, helper: &Helper) -> Result<Self> {
        check_names(&shape)?;
        let places = Owned(Places::create(name)?);
        let underlay = Underlay::create(&places.0, &shape.nodes)?;
        let mut cluster = Self {
            shape,
            workers: HashMap::new(),
            nodes: Vec::new(),
            namespaces: HashMap::new(),
            ports: HashMap::new(),
            connected: 0,
            underlay,
            helper: helper.clone(),
            places,
        };
        for index in 0..cluster.shape.nodes.len() {
            cluster.add_node(index, uplink)?;
        }
        for index in 0..cluster.shape.externals.len() {
            cluster.add_external(index)?;
        }
        for index in 0..cluster.shape.pods.len() {
            cluster.start_pod(index)?;
        }
        Ok(cluster)
    }

    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    pub fn places(&self) -> &Places {
        &self.places.0
    }

    pub fn helper(&self) -> &Helper {
        &self.helper
    }

    /// Takes the cable of a node out, or puts it in again.
    pub fn set_plugged(&mut self, node: &str, is_plugged: bool) -> Result<()> {
        let index = self.node_index(node)?;
        self.underlay.set_plugged(index, is_plugged)
    }

    /// The devices of a node.
    pub fn node_links(&mut self, node: &str) -> Result<&mut Links> {
        let index = self.node_index(node)?;
        Ok(&mut self.nodes[index].links)
    }

    /// The namespace of a node.
    pub fn node_netns(&self, name: &str) -> Result<&NetNs> {
        Ok(&self.nodes[self.node_index(name)?].netns)
    }

    /// The cgroup that holds all processes of a node, those of its pods included.
    pub fn node_cgroup(&self, name: &str) -> Result<&PathBuf> {
        Ok(&self.nodes[self.node_index(name)?].cgroup)
    }

    /// The worker of a node, pod or client outside.
    pub fn worker(&self, name: &str) -> Result<&Worker> {
        self.workers
            .get(name)
            .with_context(|| format!("there is no node, pod or client {name}"))
    }

    /// Kills the process of a pod or client: its connections are closed, and its address stays.
    pub fn kill(&mut self, name: &str) -> Result<()> {
        let worker = self.workers.remove(name);
        worker
            .map(drop)
            .with_context(|| format!("there is no process of {name}"))
    }

    /// Starts one more pod on a node that there is.
    pub fn add_pod(&mut self, pod: PodShape) -> Result<()> {
        self.shape.pods.push(pod);
        check_names(&self.shape)?;
        self.start_pod(self.shape.pods.len() - 1)
    }

    /// Ends a pod, with its process, its namespace and its device: its address may be another's at once.
    pub fn remove_pod(&mut self, name: &str) -> Result<()> {
        let index = self.shape.pods.iter().position(|pod| pod.name == name);
        let pod = self
            .shape
            .pods
            .remove(index.with_context(|| format!("there is no pod {name}"))?);
        self.kill(name)?;
        if let Some(port) = self.ports.remove(name) {
            let node = self.node_index(&pod.node)?;
            self.nodes[node].links.delete(&port)?;
        }
        if let Some(netns) = self.namespaces.remove(name) {
            netns.remove();
        }
        Ok(())
    }

    /// Tells the router the way to pods also where the network is an overlay, so that clients outside reach them.
    pub fn route_pods(&mut self) -> Result<()> {
        if self.shape.network != Network::Vxlan {
            return Ok(());
        }
        let nodes = self.shape.nodes.iter();
        nodes.clone().try_for_each(|node| self.underlay.route_pods(node))
    }

    /// The namespace of a pod or client outside.
    pub fn member_netns(&self, name: &str) -> Result<NetNs> {
        let pod = self.shape.pods.iter().any(|pod| pod.name == name);
        let place = if pod {
            format!("pod-{name}")
        } else {
            name.to_owned()
        };
        NetNs::open(&self.places.0.netns(&place))
    }

    /// Lets a pod (or any other member) answer at a port.
    pub fn listen(&self, name: &str, proto: Proto, port: u16) -> Result<()> {
        self.worker(name)?.call(Request::Listen { proto, port }, CALL)?;
        Ok(())
    }

    /// What a node answers at a port of its own, within a time.
    pub fn page(&self, node: &str, port: u16, path: &str, within: Duration) -> Result<String> {
        let request = Request::HttpGet {
            to: (Ipv4Addr::LOCALHOST, port).into(),
            path: path.to_owned(),
            timeout_ms: within.as_millis() as u64,
        };
        match self.worker(node)?.call(request, within * 2)? {
            Response::Http { body, .. } => Ok(body),
            other => bail!("{node} has no {path}: {other:?}"),
        }
    }

    /// Makes `via` the node that receives what `client` sends to `to`. Without it the packet goes to the client's own
    /// node, or to the node that has the address.
    pub fn set_route(&mut self, client: &str, to: IpAddr, via: Option<&str>) -> Result<()> {
        let owner = self.shape.owner(to).map(|node| node.name.as_str());
        let hop = match via {
            Some(node) if Some(node) != owner => Some(
                self.shape
                    .node(node)?
                    .address(to)
                    .with_context(|| format!("{node} has no address like {to}"))?,
            ),
            _ => None,
        };
        let Some(own) = self.shape.node_of(client) else {
            let hop = hop.or_else(|| self.entry_of(to));
            return self.underlay.set_next_hop(client, to, hop);
        };
        let hop = hop.filter(|_| via != Some(own));
        let index = self.node_index(own)?;
        let node = &mut self.nodes[index];
        if node.hops.get(&to).copied() == hop {
            return Ok(());
        }
        let route = |via| Route {
            via: Some(via),
            device: Some(UPLINK),
            ..Route::default()
        };
        if let Some(hop) = hop {
            node.links.add_route(host(to), route(hop))?;
            node.hops.insert(to, hop);
        } else if let Some(old) = node.hops.remove(&to) {
            node.links.delete_route(host(to), route(old))?;
        }
        Ok(())
    }

    /// Where the router sends what is for no node and no pod: the first node.
    fn entry_of(&self, to: IpAddr) -> Option<IpAddr> {
        let mut cidrs = self.shape.nodes.iter().flat_map(|node| &node.pod_cidrs);
        let known = self.shape.owner(to).is_some() || cidrs.any(|cidr| contains(*cidr, to));
        if known {
            None
        } else {
            self.shape.nodes.first()?.address(to)
        }
    }

    fn node_index(&self, name: &str) -> Result<usize> {
        self.shape
            .nodes
            .iter()
            .position(|node| node.name == name)
            .with_context(|| format!("there is no node {name}"))
    }

    fn add_node(&mut self, index: usize, uplink: Uplink) -> Result<()> {
        let shape = &self.shape.nodes[index];
        let netns = NetNs::create(&self.places.0.netns(&shape.name))?;
        netns.enter(|| {
            set_sysctls(&COMMON)?;
            set_sysctls(&FORWARD)?;
            pod_network::own_ports(&self.shape, 0)
        })?;
        let mut links = Links::open(&netns)?;
        links.set_up("lo")?;
        self.underlay
            .connect_node(index, shape, &netns, &mut links, (self.shape.network, uplink))?;
        pod_network::prepare_node(&self.shape, index, &netns, &mut links)?;
        let cgroup = self.places.0.cgroup.join(&shape.name);
        let host = cgroup.join("host");
        cgroup::create(&host)?;
        let worker = Worker::start(
            &shape.name,
            self.helper.worker(&shape.name, netns.path(), Some(&host)),
        )?;
        self.workers.insert(shape.name.clone(), worker);
        self.nodes.push(Node {
            netns,
            links,
            cgroup,
            hops: HashMap::new(),
        });
        Ok(())
    }

    fn add_external(&mut self, index: usize) -> Result<()> {
        let external = &self.shape.externals[index];
        let netns = NetNs::create(&self.places.0.netns(&external.name))?;
        self.underlay.connect_external(index, external, &netns)?;
        let worker = Worker::start(
            &external.name,
            self.helper.worker(&external.name, netns.path(), None),
        )?;
        self.workers.insert(external.name.clone(), worker);
        self.namespaces.insert(external.name.clone(), netns);
        Ok(())
    }

    fn start_pod(&mut self, index: usize) -> Result<()> {
        let pod = &self.shape.pods[index];
        let PodShape {
            name,
            node,
            host_network,
            ..
        } = pod;
        let node = self.node_index(node)?;
        let cgroup = self.nodes[node].cgroup.join("pods").join(name);
        cgroup::create(&cgroup)?;
        let worker = if *host_network {
            Worker::start(
                name,
                self.helper
                    .worker(name, self.nodes[node].netns.path(), Some(&cgroup)),
            )?
        } else {
            let netns = NetNs::create(&self.places.0.netns(&format!("pod-{name}")))?;
            let links = &mut self.nodes[node].links;
            pod_network::connect_pod(&self.shape, self.connected, pod, links, &netns)?;
            self.ports.insert(name.clone(), pod_network::port(self.connected));
            let worker = Worker::start(name, self.helper.worker(name, netns.path(), Some(&cgroup)))?;
            self.namespaces.insert(name.clone(), netns);
            worker
        };
        self.connected += 1;
        self.workers.insert(name.clone(), worker);
        Ok(())
    }
}

/// Clients are found by name alone, so no two members may share one.
fn check_names(shape: &Shape) -> Result<()> {
    let nodes = shape.nodes.iter().map(|node| &node.name);
    let pods = shape.pods.iter().map(|pod| &pod.name);
    let externals = shape.externals.iter().map(|external| &external.name);
    let mut seen = HashSet::new();
    for name in nodes.chain(pods).chain(externals) {
        ensure!(
            !name.is_empty() && !name.contains('/'),
            "{name:?} is no name for a node, pod or client"
        );
        if !seen.insert(name) {
            bail!("two nodes, pods or clients are called {name}");
        }
    }
    Ok(())
}

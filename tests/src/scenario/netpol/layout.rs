//! Which cluster a case needs: nodes from the networks of its pods, and who listens where.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::file::{Case, Host, Labels, Pod, Port};
use crate::links::Prefix;
use crate::shape::{ExternalShape, Network, NodeShape, PodShape, Shape, contains, network_of};
use crate::worker::protocol::Proto;

/// The nodes of a case.
#[derive(Debug)]
pub struct Layout {
    pub nodes: Vec<Node>,
}

/// A node, its addresses and the networks of its pods.
#[derive(Debug)]
pub struct Node {
    pub name: String,
    pub addresses: Vec<IpAddr>,
    pub labels: Labels,
    pub pod_cidrs: Vec<Prefix>,
}

/// The cluster of a case, which may serve every case of the same shape, and where its members have to answer.
#[derive(Debug, Clone)]
pub struct Needs {
    pub shape: Shape,
    /// The ports of each member, by its name in the cluster.
    pub ports: BTreeMap<String, BTreeSet<(Proto, u16)>>,
}

impl Layout {
    /// Pods of one network (/24, /64) are on one node, whose number is the network's; a host's address is the node of that
    /// number's, or one more node's.
    pub fn of(case: &Case) -> Result<Self> {
        let mut layout = Self { nodes: Vec::new() };
        let networks: BTreeSet<IpAddr> = case
            .all_pods()
            .filter_map(|pod| Some(network_of(first_address(pod)?).0))
            .collect();
        let numbers: Vec<u8> = networks.iter().map(|network| number(*network)).collect();
        let distinct: BTreeSet<u8> = numbers.iter().copied().collect();
        let usable =
            distinct.len() == numbers.len() && distinct.iter().all(|number| (1..=200).contains(number));
        for (index, network) in networks.iter().enumerate() {
            let number = if usable {
                numbers[index]
            } else {
                u8::try_from(index + 1)?
            };
            let mut pod_cidrs = BTreeSet::new();
            for pod in case.all_pods() {
                if first_address(pod).is_some_and(|ip| network_of(ip).0 == *network) {
                    pod_cidrs.extend(pod.ip.into_iter().chain(pod.ip6).map(network_of));
                }
            }
            layout.nodes.push(Node {
                name: format!("node{number}"),
                addresses: node_addresses(number),
                labels: Labels::from([("kubernetes.io/hostname".to_owned(), format!("node{number}"))]),
                pod_cidrs: pod_cidrs.into_iter().collect(),
            });
        }
        for host in &case.hosts {
            layout.add_host(host);
        }
        Ok(layout)
    }

    fn add_host(&mut self, host: &Host) {
        let addresses: Vec<IpAddr> = host.ip.into_iter().chain(host.ip6).collect();
        let known = self
            .nodes
            .iter_mut()
            .find(|node| addresses.iter().any(|ip| node.addresses.contains(ip)));
        if let Some(node) = known {
            node.labels.extend(
                host.nodelabels
                    .iter()
                    .map(|(key, value)| (key.clone(), value.clone())),
            );
            return;
        }
        self.nodes.push(Node {
            name: format!("host{}", self.nodes.len() + 1),
            addresses,
            labels: host.nodelabels.clone(),
            pod_cidrs: Vec::new(),
        });
    }

    /// The node that a pod's address says.
    pub fn node_of(&self, pod: &Pod) -> Result<&Node> {
        let ip = first_address(pod).with_context(|| format!("{} has no address", pod.id()))?;
        let mut nodes = self.nodes.iter();
        nodes
            .find(|node| node.pod_cidrs.iter().any(|cidr| contains(*cidr, ip)))
            .with_context(|| format!("no node has the network of {}", pod.id()))
    }

    /// The node that a host's address is one of.
    pub fn node_of_host(&self, host: &Host) -> Result<&Node> {
        let mut addresses = host.ip.into_iter().chain(host.ip6);
        let node = addresses.find_map(|ip| self.nodes.iter().find(|node| node.addresses.contains(&ip)));
        node.with_context(|| format!("{} is no node's address", host.id))
    }
}

impl Node {
    /// As the API shows it.
    pub fn manifest(&self) -> Value {
        let addresses: Vec<Value> = self
            .addresses
            .iter()
            .map(|ip| json!({"type": "InternalIP", "address": ip}))
            .collect();
        let cidrs: Vec<String> = self
            .pod_cidrs
            .iter()
            .map(|(ip, length)| format!("{ip}/{length}"))
            .collect();
        json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": self.name, "labels": self.labels},
            "spec": {"podCIDR": cidrs.first(), "podCIDRs": cidrs},
            "status": {"addresses": addresses},
        })
    }
}

impl Needs {
    /// What the state before the first step needs.
    pub fn of(case: &Case, layout: &Layout, network: Network) -> Result<Self> {
        let mut shape = Shape {
            nodes: layout.nodes.iter().map(node_shape).collect(),
            network,
            ..Shape::default()
        };
        let mut ports = BTreeMap::new();
        for pod in &case.pods {
            shape.pods.push(pod_shape(pod, layout)?);
            ports.insert(member(&pod.id()), listening(&pod.ports));
        }
        for host in &case.hosts {
            shape.pods.push(PodShape {
                name: member(&host.id),
                node: layout.node_of_host(host)?.name.clone(),
                addresses: host.ip.into_iter().chain(host.ip6).collect(),
                host_network: true,
            });
            ports.insert(member(&host.id), listening(&host.ports));
        }
        for external in &case.externals {
            shape.externals.push(ExternalShape {
                name: member(&external.id),
                addresses: external.ip.into_iter().chain(external.ip6).collect(),
            });
            ports.insert(member(&external.id), case.ports()?);
        }
        Ok(Self { shape, ports })
    }
}

/// The name of an id in the cluster, where `/` cannot be in a name. No Kubernetes name has a `_`.
pub fn member(id: &str) -> String {
    id.replace('/', "_")
}

/// A pod as the cluster knows it.
pub fn pod_shape(pod: &Pod, layout: &Layout) -> Result<PodShape> {
    if pod.ip.is_none() && pod.ip6.is_none() {
        bail!("{} has no address", pod.id());
    }
    Ok(PodShape {
        name: member(&pod.id()),
        node: layout.node_of(pod)?.name.clone(),
        addresses: pod.ip.into_iter().chain(pod.ip6).collect(),
        host_network: false,
    })
}

/// Where a member answers.
pub fn listening(ports: &[Port]) -> BTreeSet<(Proto, u16)> {
    ports.iter().map(|port| (port.proto, port.port)).collect()
}

fn node_shape(node: &Node) -> NodeShape {
    NodeShape {
        name: node.name.clone(),
        addresses: node.addresses.clone(),
        extra_addresses: Vec::new(),
        pod_cidrs: node.pod_cidrs.clone(),
    }
}

fn first_address(pod: &Pod) -> Option<IpAddr> {
    pod.ip.or(pod.ip6)
}

/// What tells the pod networks of nodes apart: 1 of `10.244.1.0`, and of `fd00:10:244:1::`.
fn number(network: IpAddr) -> u8 {
    match network {
        IpAddr::V4(ip) => ip.octets()[2],
        IpAddr::V6(ip) => ip.octets()[7],
    }
}

/// `192.168.77.11` and `fd00:77::11` for number 1, as the scenarios of services have them.
fn node_addresses(number: u8) -> Vec<IpAddr> {
    let host = 10 + number;
    let digits = u16::from(host / 100) << 8 | u16::from(host / 10 % 10) << 4 | u16::from(host % 10);
    vec![
        [192, 168, 77, host].into(),
        [0xfd00, 0x77, 0, 0, 0, 0, 0, digits].into(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case(pods: &[&str], host: &str) -> Case {
        let pods: Vec<Value> = pods
            .iter()
            .enumerate()
            .map(|(number, ip)| json!({"ns": "x", "name": format!("p{number}"), "ip": ip}))
            .collect();
        let text = json!({
            "schema": "scenario-netpol/1", "id": "n", "name": "n", "family": "IPv4", "namespaces": [], "pods": pods,
            "hosts": [{"id": "host/1", "ip": host, "ns": "x", "nodelabels": {"os": "linux"}}],
            "steps": [{"expected": {"ids": [], "table": {}}}],
        });
        Case::parse(text.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn a_node_for_each_network_of_pods() {
        let case = case(&["10.244.3.5", "10.244.1.7", "10.244.3.9"], "192.168.77.13");
        let layout = Layout::of(&case).unwrap();
        let names: Vec<&str> = layout.nodes.iter().map(|node| node.name.as_str()).collect();
        assert_eq!(names, ["node1", "node3"]);
        assert_eq!(layout.node_of(&case.pods[2]).unwrap().name, "node3");
        let host = layout.node_of_host(&case.hosts[0]).unwrap();
        assert_eq!(
            (host.name.as_str(), &host.labels["os"]),
            ("node3", &"linux".to_owned())
        );
        assert_eq!(host.addresses[1].to_string(), "fd00:77::13");
    }

    #[test]
    fn a_host_that_is_no_node_of_pods_is_one_more() {
        let layout = Layout::of(&case(&["10.244.1.5", "10.245.1.5"], "192.168.78.1")).unwrap();
        let names: Vec<&str> = layout.nodes.iter().map(|node| node.name.as_str()).collect();
        assert_eq!(names, ["node1", "node2", "host3"]);
    }
}

//! What a cluster consists of, as plain data.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};

use crate::links::Prefix;

/// How pods are connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// A veth for each pod and a host route to it, as the ptp plugin and kindnet do.
    #[default]
    Routed,
    /// A bridge on each node, and routes between nodes.
    Bridge,
    /// A bridge on each node, a VXLAN overlay between them, and masquerading of what leaves it.
    Vxlan,
}

/// What a node's uplink is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Uplink {
    #[default]
    Card,
    /// Two cards, one of them active.
    Bond,
    /// A tagged network on a card.
    Vlan,
    /// A tagged network on two cards.
    VlanOnBond,
}

impl Uplink {
    pub fn is_bonded(self) -> bool {
        matches!(self, Self::Bond | Self::VlanOnBond)
    }

    pub fn is_tagged(self) -> bool {
        matches!(self, Self::Vlan | Self::VlanOnBond)
    }
}

/// Nodes, pods and clients outside.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Shape {
    pub nodes: Vec<NodeShape>,
    pub pods: Vec<PodShape>,
    pub externals: Vec<ExternalShape>,
    pub network: Network,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeShape {
    pub name: String,
    /// The node's internal addresses, one or two families.
    pub addresses: Vec<IpAddr>,
    /// Addresses of the same device that the Node object does not name.
    pub extra_addresses: Vec<IpAddr>,
    pub pod_cidrs: Vec<Prefix>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodShape {
    pub name: String,
    pub node: String,
    pub addresses: Vec<IpAddr>,
    pub host_network: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExternalShape {
    pub name: String,
    pub addresses: Vec<IpAddr>,
}

impl Shape {
    pub fn node(&self, name: &str) -> Result<&NodeShape> {
        self.nodes
            .iter()
            .find(|node| node.name == name)
            .with_context(|| format!("there is no node {name}"))
    }

    /// The node that has `ip` on a device of its own.
    pub fn owner(&self, ip: IpAddr) -> Option<&NodeShape> {
        self.nodes
            .iter()
            .find(|node| node.addresses.contains(&ip) || node.extra_addresses.contains(&ip))
    }

    /// The node a pod or a host process runs on; none for clients outside.
    pub fn node_of(&self, client: &str) -> Option<&str> {
        let pod = self
            .pods
            .iter()
            .find(|pod| pod.name == client)
            .map(|pod| pod.node.as_str());
        pod.or_else(|| {
            self.nodes
                .iter()
                .find(|node| node.name == client)
                .map(|node| node.name.as_str())
        })
    }

    /// All addresses of a client, whatever its kind.
    pub fn addresses_of(&self, client: &str) -> Vec<IpAddr> {
        if let Some(node) = self.nodes.iter().find(|node| node.name == client) {
            return [node.addresses.as_slice(), &node.extra_addresses].concat();
        }
        let pod = self
            .pods
            .iter()
            .find(|pod| pod.name == client)
            .map(|pod| &pod.addresses);
        let external = || {
            self.externals
                .iter()
                .find(|external| external.name == client)
                .map(|e| &e.addresses)
        };
        pod.or_else(external).cloned().unwrap_or_default()
    }
}

impl NodeShape {
    /// The internal address of the family of `like`.
    pub fn address(&self, like: IpAddr) -> Option<IpAddr> {
        self.addresses
            .iter()
            .copied()
            .find(|ip| ip.is_ipv4() == like.is_ipv4())
    }
}

/// The network of `ip` as this test bed lays them out: /24 and /64.
pub fn network_of(ip: IpAddr) -> Prefix {
    match ip {
        IpAddr::V4(ip) => (Ipv4Addr::from_bits(ip.to_bits() & !0xff).into(), 24),
        IpAddr::V6(ip) => (Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64).into(), 64),
    }
}

/// The first address of the network of `ip`: the router's, or that of a node towards its pods.
pub fn gateway_of(ip: IpAddr) -> IpAddr {
    match network_of(ip).0 {
        IpAddr::V4(ip) => Ipv4Addr::from_bits(ip.to_bits() | 1).into(),
        IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() | 1).into(),
    }
}

/// The range all nodes' pod networks are cut from: /16 and /48.
pub fn cluster_range(pod_cidr: Prefix) -> Prefix {
    match pod_cidr.0 {
        IpAddr::V4(ip) => (Ipv4Addr::from_bits(ip.to_bits() >> 16 << 16).into(), 16),
        IpAddr::V6(ip) => (Ipv6Addr::from_bits(ip.to_bits() >> 80 << 80).into(), 48),
    }
}

/// Whether `ip` is in a network.
pub fn contains((network, length): Prefix, ip: IpAddr) -> bool {
    let length = u32::from(length);
    match (network, ip) {
        (IpAddr::V4(network), IpAddr::V4(ip)) => {
            (network.to_bits() ^ ip.to_bits())
                .checked_shr(32 - length)
                .unwrap_or_default()
                == 0
        }
        (IpAddr::V6(network), IpAddr::V6(ip)) => {
            (network.to_bits() ^ ip.to_bits())
                .checked_shr(128 - length)
                .unwrap_or_default()
                == 0
        }
        _ => false,
    }
}

/// Reads `10.244.1.0/24`.
pub fn parse_prefix(text: &str) -> Result<Prefix> {
    let Some((ip, length)) = text.split_once('/') else {
        bail!("{text} is not a network")
    };
    let ip = IpAddr::from_str(ip).map_err(|error| anyhow!("{text} is not a network: {error}"))?;
    let length = length
        .parse()
        .with_context(|| format!("{text} is not a network"))?;
    Ok((ip, length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gateways_are_the_first_address_of_a_network() {
        let gateway = |text: &str| gateway_of(text.parse().unwrap()).to_string();
        assert_eq!(gateway("192.168.77.12"), "192.168.77.1");
        assert_eq!(gateway("fd00:10:244:1::15"), "fd00:10:244:1::1");
    }

    #[test]
    fn a_network_contains_its_addresses_only() {
        let inside = |network, ip: &str| contains(parse_prefix(network).unwrap(), ip.parse().unwrap());
        assert!(inside("10.244.1.0/24", "10.244.1.200"));
        assert!(!inside("10.244.1.0/24", "10.244.2.1"));
        assert!(inside("0.0.0.0/0", "10.244.2.1"));
        assert!(!inside("fd00::/64", "10.244.2.1"));
    }

    #[test]
    fn the_cluster_range_holds_every_pod_network() {
        let range = |text| cluster_range(parse_prefix(text).unwrap());
        assert_eq!(range("10.244.3.0/24"), parse_prefix("10.244.0.0/16").unwrap());
        assert_eq!(
            range("fd00:10:244:3::/64"),
            parse_prefix("fd00:10:244::/48").unwrap()
        );
    }
}

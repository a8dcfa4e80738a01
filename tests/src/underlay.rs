//! The network the nodes stand in: one namespace that is their switch and their router, with the clients outside behind
//! it.
//!
//! What no route names is discarded in silence, so that an answer to such a packet can only come from a node.

use std::collections::HashMap;
use std::net::IpAddr;

use anyhow::{Context, Result};

use crate::facing_xdp::{self, Answer};
use crate::links::{Links, Route, everywhere, host};
use crate::netns::{NetNs, set_sysctls};
use crate::places::Places;
use crate::shape::{ExternalShape, Network, NodeShape, Uplink, gateway_of, network_of};

const BRIDGE: &str = "br0";
/// The tagged network of uplinks that are one.
const VLAN: u16 = 100;
/// Device of nodes, pods and clients outside.
pub const UPLINK: &str = "eth0";

/// What holds in every namespace: nobody waits for duplicate address detection, and every refusal is told (the kernel
/// limits ICMP errors to a few a second for each destination, fewer than a run causes).
pub const COMMON: [(&str, &str); 4] = [
    ("net/ipv6/conf/default/accept_dad", "0"),
    ("net/ipv6/conf/default/dad_transmits", "0"),
    ("net/ipv4/icmp_ratelimit", "0"),
    ("net/ipv6/icmp/ratelimit", "0"),
];
/// What makes a namespace a router.
pub const FORWARD: [(&str, &str); 2] = [
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv6/conf/all/forwarding", "1"),
];

/// Switch and router.
#[derive(Debug)]
pub struct Underlay {
    netns: NetNs,
    links: Links,
    /// The routing table of each client outside, and the next hops put there.
    tables: HashMap<String, (u8, HashMap<IpAddr, IpAddr>)>,
}

impl Underlay {
    /// A switch with the router's address of every network that nodes have addresses in.
    pub fn create(places: &Places, nodes: &[NodeShape]) -> Result<Self> {
        let netns = NetNs::create(&places.netns("underlay"))?;
        netns.enter(|| {
            set_sysctls(&COMMON)?;
            set_sysctls(&FORWARD)
        })?;
        let mut links = Links::open(&netns)?;
        links.set_up("lo")?;
        links.add_bridge(BRIDGE, None)?;
        links.set_up(BRIDGE)?;
        for ip in nodes
            .iter()
            .flat_map(|node| node.addresses.iter().chain(&node.extra_addresses))
        {
            links.add_address(BRIDGE, (gateway_of(*ip), network_of(*ip).1))?;
        }
        for any in ["0.0.0.0", "::"] {
            links.add_route(
                everywhere(any.parse()?),
                Route {
                    blackhole: true,
                    ..Route::default()
                },
            )?;
        }
        Ok(Self {
            netns,
            links,
            tables: HashMap::new(),
        })
    }

    /// Plugs a node in: its device, addresses and default routes, and the way to its pods.
    pub fn connect_node(
        &mut self,
        index: usize,
        node: &NodeShape,
        netns: &NetNs,
        links: &mut Links,
        (network, uplink): (Network, Uplink),
    ) -> Result<()> {
        self.plug(&port(index), netns, links, uplink)?;
        for ip in node.addresses.iter().chain(&node.extra_addresses) {
            links.add_address(UPLINK, (*ip, network_of(*ip).1))?;
        }
        for ip in &node.addresses {
            links.add_route(
                everywhere(*ip),
                Route {
                    via: Some(gateway_of(*ip)),
                    ..Route::default()
                },
            )?;
        }
        if network != Network::Vxlan {
            self.route_pods(node)?;
        }
        Ok(())
    }

    /// Takes a node's cable out, or puts it in again. A bond has another one.
    pub fn set_plugged(&mut self, index: usize, is_plugged: bool) -> Result<()> {
        if is_plugged {
            self.links.set_up(&port(index))
        } else {
            self.links.set_down(&port(index))
        }
    }

    /// Tells the router the way to a node's pods.
    pub fn route_pods(&mut self, node: &NodeShape) -> Result<()> {
        for cidr in &node.pod_cidrs {
            if let Some(via) = node.address(cidr.0) {
                self.links.add_route(
                    *cidr,
                    Route {
                        via: Some(via),
                        ..Route::default()
                    },
                )?;
            }
        }
        Ok(())
    }

    /// Connects a node's uplink with a port of the switch, or two.
    fn plug(&mut self, port: &str, netns: &NetNs, links: &mut Links, uplink: Uplink) -> Result<()> {
        let below = if uplink.is_tagged() { "under0" } else { UPLINK };
        if uplink.is_bonded() {
            links.add_bond(below)?;
        }
        let second = format!("{port}b");
        let cards = if uplink.is_bonded() {
            vec![(port, "card0"), (second.as_str(), "card1")]
        } else {
            vec![(port, below)]
        };
        for (port, card) in cards {
            self.links.add_veth(port, card, netns.fd(), None)?;
            self.netns.enter(|| facing_xdp::complete_checksums(port))?;
            if uplink.is_bonded() {
                links.set_bond(card, below)?;
            }
            let tagged = format!("{port}v");
            if uplink.is_tagged() {
                self.links.add_vlan(&tagged, port, VLAN)?;
                self.links.set_bridge(&tagged, BRIDGE, false)?;
                self.links.set_up(port)?;
                self.links.set_up(&tagged)?;
            } else {
                self.links.set_bridge(port, BRIDGE, false)?;
                self.links.attach_xdp(port, &facing_xdp::load(Answer::Pass)?)?;
                self.links.set_up(port)?;
            }
            links.set_up(card)?;
        }
        if uplink.is_tagged() {
            links.set_up(below)?;
            links.add_vlan(UPLINK, below, VLAN)?;
        }
        links.set_up(UPLINK)
    }

    /// Plugs a client outside in, with a routing table of its own at the router.
    pub fn connect_external(&mut self, index: usize, external: &ExternalShape, netns: &NetNs) -> Result<()> {
        netns.enter(|| set_sysctls(&COMMON))?;
        let mut links = Links::open(netns)?;
        let port = format!("x{}", index + 1);
        self.links.add_veth(&port, UPLINK, netns.fd(), None)?;
        self.links.set_up(&port)?;
        links.set_up("lo")?;
        links.set_up(UPLINK)?;
        let table = u8::try_from(10 + index).context("too many clients outside")?;
        for ip in &external.addresses {
            connect_point_to_point(
                (&mut self.links, &port),
                (&mut links, UPLINK),
                *ip,
                gateway_of(*ip),
            )?;
            self.links.add_rule(&port, table, *ip)?;
        }
        self.tables.insert(external.name.clone(), (table, HashMap::new()));
        Ok(())
    }

    /// Makes `via` the next hop of what `external` sends to `to`; none restores the ordinary way.
    pub fn set_next_hop(&mut self, external: &str, to: IpAddr, via: Option<IpAddr>) -> Result<()> {
        let (table, hops) = self
            .tables
            .get_mut(external)
            .with_context(|| format!("no client outside is {external}"))?;
        if hops.get(&to).copied() == via {
            return Ok(());
        }
        let table = Some(u32::from(*table));
        if let Some(via) = via {
            self.links.add_route(
                host(to),
                Route {
                    via: Some(via),
                    table,
                    ..Route::default()
                },
            )?;
            hops.insert(to, via);
        } else if let Some(old) = hops.remove(&to) {
            self.links.delete_route(
                host(to),
                Route {
                    via: Some(old),
                    table,
                    ..Route::default()
                },
            )?;
        }
        Ok(())
    }
}

/// The port of the switch that a node is plugged into.
fn port(index: usize) -> String {
    format!("n{}", index + 1)
}

/// Joins a router and a host by a veth without a common network: the host has `ip`, the router `gateway`, and each a
/// route to the other alone.
pub fn connect_point_to_point(
    (router, port): (&mut Links, &str),
    (links, device): (&mut Links, &str),
    ip: IpAddr,
    gateway: IpAddr,
) -> Result<()> {
    router.add_address(port, host(gateway))?;
    router.add_route(
        host(ip),
        Route {
            device: Some(port),
            ..Route::default()
        },
    )?;
    links.add_address(device, host(ip))?;
    links.add_route(
        host(gateway),
        Route {
            device: Some(device),
            ..Route::default()
        },
    )?;
    links.add_route(
        everywhere(ip),
        Route {
            via: Some(gateway),
            device: Some(device),
            ..Route::default()
        },
    )
}

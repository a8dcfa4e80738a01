//! Pod networks, as the common CNI plugins lay them out.

use std::io::Write;
use std::net::IpAddr;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::links::{Links, Prefix, Route, everywhere, host};
use crate::netns::{NetNs, set_sysctls};
use crate::shape::{Network, NodeShape, PodShape, Shape, cluster_range, gateway_of, network_of};
use crate::underlay::{COMMON, UPLINK, connect_point_to_point};

const BRIDGE: &str = "cni0";
const OVERLAY_MTU: u32 = 1450;
const OVERLAY6_MTU: u32 = 1430;

/// A pod tells its neighbours of its addresses, which may have been another's before.
const ANNOUNCE: [(&str, &str); 2] = [
    ("net/ipv4/conf/default/arp_notify", "1"),
    ("net/ipv6/conf/default/ndisc_notify", "1"),
];

/// The device of the overlay for the family of `like`.
fn overlay(like: IpAddr) -> (&'static str, u32) {
    if like.is_ipv4() {
        ("flannel.1", OVERLAY_MTU)
    } else {
        ("flannel-v6.1", OVERLAY6_MTU)
    }
}

/// The hardware address of a node's overlay device, known to all other nodes.
fn overlay_mac(node: usize, like: IpAddr) -> [u8; 6] {
    [
        0x02,
        0xf1,
        0x00,
        0x00,
        if like.is_ipv4() { 4 } else { 6 },
        node as u8 + 1,
    ]
}

/// What a node needs before its first pod: its bridge or overlay, and the ways to other nodes' pods.
pub fn prepare_node(shape: &Shape, index: usize, netns: &NetNs, links: &mut Links) -> Result<()> {
    let node = &shape.nodes[index];
    if shape.network != Network::Routed {
        links.add_bridge(BRIDGE, (shape.network == Network::Vxlan).then_some(OVERLAY_MTU))?;
        links.set_up(BRIDGE)?;
        for cidr in &node.pod_cidrs {
            links.add_address(BRIDGE, (gateway_of(cidr.0), cidr.1))?;
        }
    }
    if shape.network == Network::Vxlan {
        return prepare_overlay(shape, index, netns, links);
    }
    for (_, other) in others(shape, index) {
        for cidr in &other.pod_cidrs {
            if let Some(via) = other.address(cidr.0) {
                links.add_route(
                    *cidr,
                    Route {
                        via: Some(via),
                        ..Route::default()
                    },
                )?;
            }
        }
    }
    Ok(())
}

fn others(shape: &Shape, index: usize) -> impl Iterator<Item = (usize, &NodeShape)> {
    shape
        .nodes
        .iter()
        .enumerate()
        .filter(move |(other, _)| *other != index)
}

fn prepare_overlay(shape: &Shape, index: usize, netns: &NetNs, links: &mut Links) -> Result<()> {
    let node = &shape.nodes[index];
    for cidr in &node.pod_cidrs {
        let Some(local) = node.address(cidr.0) else {
            continue;
        };
        let (device, mtu) = overlay(local);
        links.add_vxlan(device, UPLINK, local, overlay_mac(index, local), mtu)?;
        links.set_up(device)?;
        links.add_address(device, host(network_of(cidr.0).0))?;
        masquerade(netns, *cidr)?;
    }
    for (number, other) in others(shape, index) {
        for cidr in &other.pod_cidrs {
            let Some(at) = other.address(cidr.0) else { continue };
            let (device, _) = overlay(at);
            let (mac, via) = (overlay_mac(number, at), cidr.0);
            links.add_neighbour(device, via, mac)?;
            links.add_forwarding(device, mac, at)?;
            links.add_route(
                *cidr,
                Route {
                    via: Some(via),
                    device: Some(device),
                    onlink: true,
                    ..Route::default()
                },
            )?;
        }
    }
    Ok(())
}

/// The four rules that flannel adds: what leaves the pod range, or enters it from elsewhere, takes the node's address. Unlike
/// flannel's, they keep ports: no flow of a probe has one of another's, see [`own_ports`].
fn masquerade(netns: &NetNs, cidr: Prefix) -> Result<()> {
    let family = if cidr.0.is_ipv4() { "ip" } else { "ip6" };
    let multicast = if cidr.0.is_ipv4() {
        "224.0.0.0/4"
    } else {
        "ff00::/8"
    };
    let text = |(ip, length): Prefix| format!("{ip}/{length}");
    let (all, own) = (text(cluster_range(cidr)), text(cidr));
    let rules = format!(
        "table {family} flannel {{
            chain postrouting {{
                type nat hook postrouting priority srcnat;
                {family} saddr {all} {family} daddr {all} return
                {family} saddr {all} {family} daddr != {multicast} masquerade
                {family} saddr != {all} {family} daddr {own} return
                {family} saddr != {all} {family} daddr {all} masquerade
            }}
        }}\n"
    );
    netns.enter(|| {
        let mut nft = Command::new("nft")
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .spawn()
            .context("failed to run nft, which the vxlan network needs (apt-get install nftables)")?;
        nft.stdin
            .take()
            .context("nft has no input")?
            .write_all(rules.as_bytes())?;
        ensure!(nft.wait()?.success(), "nft refused the masquerade rules");
        Ok(())
    })
}

/// The host-side device of the pod `number` of a cluster.
pub fn port(number: usize) -> String {
    format!("veth{number:04x}")
}

/// Where pods are masqueraded, leaves the clients of a node ports of their own, so that one's flow does not look like another's to
/// the same endpoint by another way, which no node on the way could tell apart (ARCHITECTURE, "Known limits"). Place 0 is the node's.
pub fn own_ports(shape: &Shape, place: usize) -> Result<()> {
    const FIRST: usize = 32768;
    const EACH: usize = 3136;
    const PODS: usize = 8;
    if shape.network != Network::Vxlan {
        return Ok(());
    }
    let first = FIRST + if place == 0 { 0 } else { (place - 1) % PODS + 1 } * EACH;
    let range = format!("{first} {}", first + EACH - 1);
    set_sysctls(&[("net/ipv4/ip_local_port_range", &range)])
}

/// Connects a pod's namespace to its node.
pub fn connect_pod(
    shape: &Shape,
    number: usize,
    pod: &PodShape,
    node_links: &mut Links,
    netns: &NetNs,
) -> Result<()> {
    netns.enter(|| {
        set_sysctls(&COMMON)?;
        set_sysctls(&ANNOUNCE)?;
        own_ports(shape, number + 1)
    })?;
    let mut links = Links::open(netns)?;
    let port = port(number);
    let mtu = (shape.network == Network::Vxlan).then_some(OVERLAY_MTU);
    node_links.add_veth(&port, UPLINK, netns.fd(), mtu)?;
    if shape.network != Network::Routed {
        node_links.set_bridge(&port, BRIDGE, true)?;
    }
    node_links.set_up(&port)?;
    links.set_up("lo")?;
    for ip in &pod.addresses {
        if *ip == gateway_of(*ip) {
            bail!("pod {} has the gateway's address {ip}", pod.name);
        }
        if shape.network != Network::Routed {
            // Before the device is up, which is when they are announced.
            links.add_address(UPLINK, (*ip, network_of(*ip).1))?;
        }
    }
    links.set_up(UPLINK)?;
    for ip in &pod.addresses {
        let gateway = gateway_of(*ip);
        if shape.network == Network::Routed {
            connect_point_to_point((node_links, &port), (&mut links, UPLINK), *ip, gateway)?;
        } else {
            links.add_route(
                everywhere(*ip),
                Route {
                    via: Some(gateway),
                    ..Route::default()
                },
            )?;
        }
    }
    Ok(())
}

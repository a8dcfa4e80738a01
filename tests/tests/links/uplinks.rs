//! Uplinks that are more than one card: bonds, VLAN devices on cards and on bonds, and tunnels. The device with the addresses
//! does the work; what is below it passes packets on as they are.

use std::net::Ipv4Addr;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use dataplane_tests::agent;
use dataplane_tests::cluster::Cluster;
use dataplane_tests::facing_xdp;
use dataplane_tests::links::{Links, Prefix, Route};
use dataplane_tests::netns::NetNs;
use dataplane_tests::places::Places;
use dataplane_tests::shape::{Network, Uplink, parse_prefix};
use dataplane_tests::wireguard::{self, KEYS};
use dataplane_tests::worker::protocol::Direction;

use crate::bed::{self, Bed, expect_path_mtu};

/// The device kinds that this kernel lacks, asked once.
fn lacking() -> Result<Vec<&'static str>> {
    static LACKING: Mutex<Option<Vec<&'static str>>> = Mutex::new(None);
    let mut asked = LACKING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(lacking) = &*asked {
        return Ok(lacking.clone());
    }
    let places = Places::create("kinds")?;
    let netns = NetNs::create(&places.netns("kinds"))?;
    let mut links = Links::open(&netns)?;
    links.set_up("lo")?;
    let mut lacking = Vec::new();
    if links.add_bond("bond0").is_err() {
        lacking.push("bonding");
    } else if links
        .attach_xdp("bond0", &facing_xdp::load(facing_xdp::Answer::Pass)?)
        .is_err()
    {
        lacking.push("XDP on bonds");
    }
    links.add_bridge("br0", None)?;
    if links.add_vlan("vlan0", "br0", 7).is_err() {
        lacking.push("8021q");
    }
    if links.add_wireguard("wg0").is_err() {
        lacking.push("wireguard");
    }
    let ends = [[192, 0, 2, 1], [192, 0, 2, 2]].map(Ipv4Addr::from);
    let tunnels = [("ipip1", false), ("sit1", true)];
    if tunnels
        .into_iter()
        .any(|(name, ipv6)| links.add_tunnel(name, ipv6, ends).is_err())
    {
        lacking.push("ipip");
    }
    drop(links);
    places.remove();
    Ok(asked.insert(lacking).clone())
}

/// `xdp`: whether the uplink can have XDP.
fn transfers(name: &str, uplink: Uplink, devices: &[&str], xdp: bool) -> Result<()> {
    let Some(agent) = agent::built() else {
        return Ok(());
    };
    let lacking = lacking().context("failed to ask for device kinds")?;
    if uplink.is_bonded() && lacking.contains(&"bonding") || uplink.is_tagged() && lacking.contains(&"8021q")
    {
        println!("skipped: this kernel has no {}", lacking.join(", no "));
        return Ok(());
    }
    let mut flags = vec!["--socket-lb", "off", "--datapath", "xdp"];
    for device in devices {
        flags.extend(["--device", device]);
    }
    let mut bed = Bed::build(name, agent, &flags, (Network::Routed, uplink), |_| Ok(()))?;
    bed.transfer_all(|_, _| Ok(()))?;
    // Bonds have it since 5.15.
    let xdp = xdp && !(uplink.is_bonded() && lacking.contains(&"XDP on bonds"));
    let log = bed.log("node1")?;
    ensure!(log.contains("no XDP") != xdp, "the agent says about XDP:\n{log}");
    Ok(())
}

/// Pods of different nodes reach each other by WireGuard, whose packets have no link layer, whose MTU is 1,420, and which
/// drops what comes from a source that the peer is not allowed.
fn wireguard(cluster: &mut Cluster) -> Result<()> {
    for (own, other) in [(0, 1), (1, 0)] {
        let (me, you) = (own + 1, other + 1);
        let netns = cluster.node_netns(&format!("node{me}"))?;
        let mut links = Links::open(netns)?;
        links.add_wireguard("wg0")?;
        let pods = pods_of(you)?;
        let peer = [
            parse_prefix(&format!("10.9.0.{you}/32"))?,
            parse_prefix(&format!("fd00:9::{you}/128"))?,
        ];
        let at = format!("192.168.77.1{you}:51820").parse()?;
        let allowed = [pods, peer].concat();
        wireguard::configure(netns, "wg0", KEYS[own].0, (KEYS[other].1, at), &allowed)?;
        links.set_up("wg0")?;
        links.add_address("wg0", (format!("10.9.0.{me}").parse()?, 24))?;
        links.add_address("wg0", (format!("fd00:9::{me}").parse()?, 64))?;
        for pods in pods {
            lead(cluster, &mut links, other, pods, "wg0")?;
        }
    }
    Ok(())
}

/// The same by tunnels of IP in IP, one for each family, which take 20 bytes.
fn ip_in_ip(cluster: &mut Cluster) -> Result<()> {
    for (own, other) in [(0, 1), (1, 0)] {
        let (me, you) = (own + 1, other + 1);
        let mut links = Links::open(cluster.node_netns(&format!("node{me}"))?)?;
        let ends = [
            format!("192.168.77.1{me}").parse()?,
            format!("192.168.77.1{you}").parse()?,
        ];
        let own_ends = [
            (format!("10.9.0.{me}").parse()?, 24),
            (format!("fd00:9::{me}").parse()?, 64),
        ];
        for (pods, own_end) in pods_of(you)?.into_iter().zip(own_ends) {
            let ipv6 = pods.0.is_ipv6();
            let name = if ipv6 { "sit1" } else { "ipip1" };
            links.add_tunnel(name, ipv6, ends)?;
            links.set_up(name)?;
            links.add_address(name, own_end)?;
            lead(cluster, &mut links, other, pods, name)?;
        }
    }
    Ok(())
}

/// The ranges of a node's pods.
fn pods_of(node: usize) -> Result<[Prefix; 2]> {
    Ok([
        parse_prefix(&format!("10.244.{node}.0/24"))?,
        parse_prefix(&format!("fd00:10:244:{node}::/64"))?,
    ])
}

/// Leads packets to the pods of a node, by its number in the shape, through a device.
fn lead(cluster: &Cluster, links: &mut Links, node: usize, pods: Prefix, device: &str) -> Result<()> {
    // The ordinary route names a gateway, and IPv6 would add this one to it.
    if let Some(via) = cluster.shape().nodes[node].address(pods.0) {
        let ordinary = Route {
            via: Some(via),
            ..Route::default()
        };
        links.delete_route(pods, ordinary)?;
    }
    let route = Route {
        device: Some(device),
        ..Route::default()
    };
    links.add_route(pods, route)
}

/// Transfers between pods of different nodes, whose packets go through a tunnel of that MTU.
fn tunnelled(name: &str, mtu: u32, tunnel: fn(&mut Cluster) -> Result<()>) -> Result<()> {
    bed::transfers(name, "xdp", Network::Routed, tunnel, |way, done| {
        if !way.is_local && way.direction == Direction::Upload {
            expect_path_mtu(done, mtu)?;
        }
        Ok(())
    })
}

#[test]
fn pods_behind_ip_in_ip() -> Result<()> {
    if agent::built().is_none() {
        return Ok(());
    }
    if lacking()?.contains(&"ipip") {
        println!("skipped: this kernel has no ipip or no sit");
        return Ok(());
    }
    if kernel()? < (5, 14) {
        return refused();
    }
    tunnelled("ipip", 1480, ip_in_ip)
}

/// Kernels that leave the outer headers before what comes out of such a tunnel: the agent says so.
fn refused() -> Result<()> {
    let Some(agent) = agent::built() else {
        return Ok(());
    };
    let flags = ["--socket-lb", "off", "--datapath", "tc"];
    let bed = Bed::build("ipip", agent, &flags, (Network::Routed, Uplink::Card), ip_in_ip)?;
    let warnings = bed.warnings("node1")?;
    for device in ["ipip1: ", "sit1: "] {
        let is_told = |one: &String| one.starts_with(device) && one.contains("kernels before 5.14");
        ensure!(warnings.iter().any(is_told), "{device}{warnings:#?}");
    }
    Ok(())
}

/// Major and minor number of this kernel.
fn kernel() -> Result<(u32, u32)> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut numbers = release.split('.').map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Ok((major, minor)),
        _ => bail!("no version: {release}"),
    }
}

#[test]
fn pods_behind_wireguard() -> Result<()> {
    if agent::built().is_none() {
        return Ok(());
    }
    if lacking()?.contains(&"wireguard") {
        println!("skipped: this kernel has no wireguard");
        return Ok(());
    }
    tunnelled("wireguard", 1420, wireguard)
}

#[test]
fn a_bond_has_xdp() -> Result<()> {
    transfers("bond", Uplink::Bond, &[], true)
}

/// A port that is named stands for its bond.
#[test]
fn a_bond_by_the_name_of_a_port() -> Result<()> {
    transfers("port", Uplink::Bond, &["card1"], true)
}

#[test]
fn a_vlan_is_left_to_tc() -> Result<()> {
    transfers("vlan", Uplink::Vlan, &[], false)
}

/// The card sees every packet first, with a tag.
#[test]
fn a_vlan_and_its_card() -> Result<()> {
    transfers("vlan-card", Uplink::Vlan, &["eth0", "under0"], false)
}

#[test]
fn a_vlan_on_a_bond() -> Result<()> {
    transfers("vlan-bond", Uplink::VlanOnBond, &["eth0", "under0"], false)
}

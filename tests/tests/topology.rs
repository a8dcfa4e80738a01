//! The cluster alone, without an agent: everyone reaches everyone by their own addresses, on each pod network.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use dataplane_tests::cluster::Cluster;
use dataplane_tests::facing_xdp::{self, Answer};
use dataplane_tests::links::Links;
use dataplane_tests::netns::NetNs;
use dataplane_tests::process::Helper;
use dataplane_tests::shape::{ExternalShape, Network, NodeShape, PodShape, Shape, parse_prefix};
use dataplane_tests::worker::protocol::{Attempt, Probe, Proto, Request, Response};

fn addresses(texts: &[&str]) -> Vec<IpAddr> {
    texts
        .iter()
        .map(|text| text.parse().expect("an address"))
        .collect()
}

fn shape(network: Network) -> Shape {
    let node = |number: u8| NodeShape {
        name: format!("node{number}"),
        addresses: addresses(&[&format!("192.168.77.1{number}"), &format!("fd00:77::1{number}")]),
        extra_addresses: addresses(&[&format!("192.168.78.1{number}")]),
        pod_cidrs: [
            format!("10.244.{number}.0/24"),
            format!("fd00:10:244:{number}::/64"),
        ]
        .iter()
        .map(|text| parse_prefix(text).expect("a network"))
        .collect(),
    };
    let pod = |name: &str, node: u8, last: u8| PodShape {
        name: name.to_owned(),
        node: format!("node{node}"),
        addresses: addresses(&[
            &format!("10.244.{node}.{last}"),
            &format!("fd00:10:244:{node}::{last}"),
        ]),
        host_network: false,
    };
    let host_pod = PodShape {
        name: "host2".to_owned(),
        node: "node2".to_owned(),
        addresses: addresses(&["192.168.77.12", "fd00:77::12"]),
        host_network: true,
    };
    Shape {
        nodes: vec![node(1), node(2)],
        pods: vec![
            pod("client1", 1, 10),
            pod("be1", 1, 21),
            pod("be2", 2, 21),
            host_pod,
        ],
        externals: vec![ExternalShape {
            name: "ext1".to_owned(),
            addresses: addresses(&["203.0.113.10", "2001:db8:ff::10"]),
        }],
        network,
    }
}

fn attempts(cluster: &Cluster, from: &str, proto: Proto, to: SocketAddr) -> Result<Vec<Attempt>> {
    let probe = Probe {
        proto,
        ..udp_probe(to)
    };
    match cluster
        .worker(from)?
        .call(Request::Probe(probe), Duration::from_secs(10))?
    {
        Response::Attempts(attempts) => Ok(attempts),
        other => bail!("unexpected answer {other:?}"),
    }
}

fn udp_probe(to: SocketAddr) -> Probe {
    Probe {
        proto: Proto::Udp,
        to,
        from: dataplane_tests::worker::protocol::any(to, 0),
        connections: 2,
        parallel: false,
        interval_ms: 0,
        timeout_ms: 1500,
        stop_after_failures: 1,
        until_backend_changes: false,
        first_backend: None,
    }
}

/// Asserts that `from` reaches the responder `name` at `to`, which sees one of the client's own addresses if `kept`.
fn reaches(cluster: &Cluster, from: &str, to: &str, name: &str, kept: bool) -> Result<()> {
    for proto in [Proto::Tcp, Proto::Udp] {
        for attempt in attempts(cluster, from, proto, to.parse()?)? {
            let Attempt::Answered { by, .. } = &attempt else {
                bail!("{from} -> {to} {proto:?}: {attempt:?}")
            };
            ensure!(by.name == name, "{from} -> {to} {proto:?} reached {}", by.name);
            let own = cluster.shape().addresses_of(from).contains(&by.client.ip());
            let gateway = cluster.shape().node_of(from) == Some(from);
            ensure!(
                !kept || own || gateway,
                "{from} -> {to} {proto:?} was seen as {}",
                by.client
            );
        }
    }
    Ok(())
}

fn everyone_reaches_everyone(network: Network, name: &str) -> Result<()> {
    let helper = Helper::new(env!("CARGO_BIN_EXE_dataplane-scenarios"));
    let mut cluster = Cluster::build(name, shape(network), &helper)?;
    for member in ["be1", "be2", "host2", "node1", "ext1"] {
        let port = if member == "host2" { 8080 } else { 80 };
        for proto in [Proto::Tcp, Proto::Udp] {
            cluster.listen(member, proto, port)?;
        }
    }
    for client in ["client1", "be1", "be2", "node1", "node2"] {
        reaches(&cluster, client, "10.244.1.21:80", "be1", true)?;
        reaches(&cluster, client, "[fd00:10:244:2::21]:80", "be2", true)?;
        reaches(&cluster, client, "192.168.77.12:8080", "host2", false)?;
        reaches(&cluster, client, "192.168.78.12:8080", "host2", false)?;
        reaches(&cluster, client, "[fd00:77::11]:80", "node1", false)?;
        reaches(
            &cluster,
            client,
            "203.0.113.10:80",
            "ext1",
            network != Network::Vxlan,
        )?;
        reaches(
            &cluster,
            client,
            "[2001:db8:ff::10]:80",
            "ext1",
            network != Network::Vxlan,
        )?;
    }
    reaches(&cluster, "ext1", "192.168.77.11:80", "node1", true)?;
    reaches(&cluster, "ext1", "[fd00:77::12]:8080", "host2", true)?;
    if network != Network::Vxlan {
        reaches(&cluster, "ext1", "10.244.2.21:80", "be2", true)?;
    }

    // A node forwards what the router sends it for another node's address, and the way can be changed back.
    cluster.set_route("ext1", "192.168.77.12".parse()?, Some("node1"))?;
    reaches(&cluster, "ext1", "192.168.77.12:8080", "host2", true)?;
    cluster.set_route("ext1", "192.168.77.12".parse()?, None)?;
    reaches(&cluster, "ext1", "192.168.77.12:8080", "host2", true)?;

    // Nothing answers for addresses that no one has; a closed port refuses.
    ensure!(attempts(&cluster, "client1", Proto::Tcp, "10.96.0.41:80".parse()?)? == [Attempt::Silent]);
    for to in ["192.168.77.11:81", "[fd00:10:244:2::21]:81"] {
        for proto in [Proto::Tcp, Proto::Udp] {
            let seen = attempts(&cluster, "client1", proto, to.parse()?)?;
            ensure!(
                matches!(seen.as_slice(), [Attempt::Refused { .. }]),
                "{to} {proto:?}: {seen:?}"
            );
        }
    }
    let id = cluster.places().id.clone();
    drop(cluster);
    for place in [
        "/run/netns",
        "/run",
        "/sys/fs/bpf",
        "/sys/fs/cgroup",
        "/sys/fs/cgroup/unified",
    ] {
        let Ok(listing) = std::fs::read_dir(place) else {
            continue;
        };
        for entry in listing.flatten() {
            let left = entry.file_name();
            ensure!(
                !left.to_string_lossy().starts_with(&id),
                "{} is left in {place}",
                left.display()
            );
        }
    }
    Ok(())
}

/// Frames that a node's XDP program sends back arrive at the switch.
#[test]
fn xdp_transmit_is_received() -> Result<()> {
    const COUNT: u32 = 50;
    let helper = Helper::new(env!("CARGO_BIN_EXE_dataplane-scenarios"));
    let cluster = Cluster::build("xdp", shape(Network::Routed), &helper)?;
    cluster.listen("node1", Proto::Udp, 80)?;
    // The router must know the node's address from here on: nothing is answered any more.
    let first = attempts(&cluster, "ext1", Proto::Udp, "192.168.77.11:80".parse()?)?;
    ensure!(
        first.iter().all(|attempt| attempt.backend().is_some()),
        "{first:?}"
    );
    let switch = NetNs::open(&cluster.places().netns("underlay"))?;
    let received = || switch.enter(|| received_packets("n1"));
    let mut links = Links::open(cluster.node_netns("node1")?)?;
    links.attach_xdp("eth0", &facing_xdp::load(Answer::Transmit)?)?;
    let before = received()?;
    let probe = Probe {
        connections: COUNT,
        parallel: true,
        timeout_ms: 500,
        ..udp_probe("192.168.77.11:80".parse()?)
    };
    cluster
        .worker("ext1")?
        .call(Request::Probe(probe), Duration::from_secs(10))?;
    let returned = received()? - before;
    ensure!(
        returned >= u64::from(COUNT),
        "{returned} of {COUNT} frames came back"
    );
    Ok(())
}

fn received_packets(device: &str) -> Result<u64> {
    let table = std::fs::read_to_string("/proc/thread-self/net/dev")?;
    let line = table
        .lines()
        .find_map(|line| line.trim().strip_prefix(device)?.strip_prefix(':'));
    let count = line
        .and_then(|line| line.split_whitespace().nth(1))
        .context("the device is not listed")?;
    Ok(count.parse()?)
}

#[test]
fn routed_network() -> Result<()> {
    everyone_reaches_everyone(Network::Routed, "routed")
}

#[test]
fn bridge_network() -> Result<()> {
    everyone_reaches_everyone(Network::Bridge, "bridge")
}

#[test]
fn vxlan_network() -> Result<()> {
    everyone_reaches_everyone(Network::Vxlan, "vxlan")
}

//! A link behind the balancer that carries 1,400 bytes: the sender learns it, through every kind of translation, whether
//! we say it ourselves, this node's stack or a router.

use std::net::IpAddr;

use anyhow::Result;
use dataplane_tests::cluster::Cluster;
use dataplane_tests::links::{Links, Route, host};
use dataplane_tests::netns::set_sysctls;
use dataplane_tests::shape::{Network, parse_prefix};
use dataplane_tests::worker::protocol::Direction;

use crate::bed::{Client, Way, expect_path_mtu, pod_device, transfers, underlay, ways};

const NARROW: u32 = 1400;

/// Where the narrow link is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// The way out of the node that balances: towards remote backends, and back to the client.
    Own,
    /// Behind a router: between the nodes both ways, and to the client.
    Router,
    /// Between a backend's node and its pod.
    Pod,
}

fn narrow(cluster: &mut Cluster, place: Place) -> Result<()> {
    let mut node1 = Links::open(cluster.node_netns("node1")?)?;
    let mut node2 = Links::open(cluster.node_netns("node2")?)?;
    let switch = underlay(cluster)?;
    let mut router = Links::open(&switch)?;
    let ip = |text: &str| -> IpAddr { text.parse().expect("an address") };
    let route = |via: &str| Route {
        via: Some(ip(via)),
        mtu: (place == Place::Own).then_some(NARROW),
        ..Route::default()
    };
    match place {
        Place::Own => {
            node1.add_route(parse_prefix("10.244.2.0/24")?, route("192.168.77.12"))?;
            node1.add_route(parse_prefix("fd00:10:244:2::/64")?, route("fd00:77::12"))?;
            node1.add_route(parse_prefix("203.0.113.10/32")?, route("192.168.77.1"))?;
            node1.add_route(parse_prefix("2001:db8:ff::10/128")?, route("fd00:77::1"))?;
        }
        Place::Router => {
            switch.enter(|| {
                set_sysctls(&[
                    ("net/ipv4/conf/all/send_redirects", "0"),
                    ("net/ipv4/conf/br0/send_redirects", "0"),
                ])
            })?;
            for (links, to) in [(&mut node1, 2), (&mut node2, 1)] {
                for (prefix, via, target) in [
                    (
                        format!("10.244.{to}.0/24"),
                        "192.168.77.1",
                        format!("192.168.77.1{to}"),
                    ),
                    (
                        format!("fd00:10:244:{to}::/64"),
                        "fd00:77::1",
                        format!("fd00:77::1{to}"),
                    ),
                ] {
                    links.add_route(parse_prefix(&prefix)?, route(via))?;
                    let narrow = Route {
                        mtu: Some(NARROW),
                        ..route(&target)
                    };
                    router.add_route(parse_prefix(&prefix)?, narrow)?;
                }
            }
            for net in 77..81 {
                for (address, via) in [
                    (format!("192.168.{net}.11"), "192.168.77.1"),
                    (format!("fd00:{net}::11"), "fd00:77::1"),
                ] {
                    node2.add_route(host(ip(&address)), route(via))?;
                    router.add_route(host(ip(&address)), narrow_to("br0"))?;
                }
            }
            for address in ["203.0.113.10", "2001:db8:ff::10"] {
                router.add_route(host(ip(address)), narrow_to("x1"))?;
            }
        }
        Place::Pod => {
            for way in ways() {
                let device = pod_device(cluster, &way.backend());
                let links = if way.is_local { &mut node1 } else { &mut node2 };
                for ipv6 in [false, true] {
                    links.add_route(host(way.backend_address(ipv6)), narrow_to(&device))?;
                }
            }
        }
    }
    Ok(())
}

fn narrow_to(device: &str) -> Route<'_> {
    Route {
        device: Some(device),
        mtu: Some(NARROW),
        ..Route::default()
    }
}

/// Whether the sender has to have learned of the narrow link.
fn is_narrow(place: Place, way: Way) -> bool {
    let from_outside = way.client == Client::NodePort;
    match (place, way.direction) {
        (Place::Own, Direction::Upload) => !way.is_local,
        (Place::Own, Direction::Download) => from_outside,
        (Place::Router, _) => !way.is_local || from_outside,
        // From a pod into another pod of its node we lead packets past the route and past the device's MTU.
        (Place::Pod, Direction::Upload) => !way.is_local || way.client != Client::Pod,
        (Place::Pod, Direction::Download) => false,
    }
}

fn transfers_complete(place: Place, datapath: &str) -> Result<()> {
    let name = format!("mtu-{place:?}").to_lowercase();
    transfers(
        &name,
        datapath,
        Network::Routed,
        |cluster| narrow(cluster, place),
        |way, done| expect_path_mtu(done, if is_narrow(place, way) { NARROW } else { 1500 }),
    )
}

#[test]
fn our_own_way_out_xdp() -> Result<()> {
    transfers_complete(Place::Own, "xdp")
}

#[test]
fn our_own_way_out_tc() -> Result<()> {
    transfers_complete(Place::Own, "tc")
}

#[test]
fn a_router_behind_us_xdp() -> Result<()> {
    transfers_complete(Place::Router, "xdp")
}

#[test]
fn a_router_behind_us_tc() -> Result<()> {
    transfers_complete(Place::Router, "tc")
}

#[test]
fn the_way_to_the_pod_xdp() -> Result<()> {
    transfers_complete(Place::Pod, "xdp")
}

#[test]
fn the_way_to_the_pod_tc() -> Result<()> {
    transfers_complete(Place::Pod, "tc")
}

//! The first packet to a neighbour whose link-layer address nobody has asked for yet: it waits for the answer, and arrives.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use dataplane_tests::agent::{self, patient};
use dataplane_tests::shape::{Network, Uplink};
use dataplane_tests::worker::protocol::{Attempt, Direction, Probe, Proto, Request, Response, any};

use crate::bed::{Bed, Client, Way, ways};

const TIMEOUT: Duration = Duration::from_secs(3);

/// One datagram, which nobody sends again, with all neighbours of the nodes forgotten.
fn is_answered(bed: &mut Bed, way: Way, to: SocketAddr) -> Result<()> {
    for node in ["node1", "node2"] {
        bed.cluster.node_links(node)?.forget_neighbours()?;
    }
    let probe = Probe {
        proto: Proto::Udp,
        to,
        from: any(to, 0),
        connections: 1,
        parallel: false,
        interval_ms: 0,
        timeout_ms: patient(TIMEOUT).as_millis() as u64,
        stop_after_failures: 1,
        until_backend_changes: false,
        first_backend: None,
    };
    let worker = bed.cluster.worker(way.client())?;
    let Response::Attempts(attempts) = worker.call(Request::Probe(probe), patient(TIMEOUT) * 2)? else {
        bail!("no attempts");
    };
    let name = match attempts.as_slice() {
        [Attempt::Answered { by, .. }] => &by.name,
        other => bail!("{other:?}"),
    };
    ensure!(*name == way.backend(), "{name} answered");
    Ok(())
}

fn first_datagrams_arrive(datapath: &str, network: Network) -> Result<()> {
    let Some(agent) = agent::built() else {
        return Ok(());
    };
    let flags = ["--socket-lb", "off", "--datapath", datapath];
    let name = format!("neighbours-{datapath}");
    let mut bed = Bed::build(&name, agent, &flags, (network, Uplink::Card), |_| Ok(()))?;
    let mut failures = Vec::new();
    // A datagram knows nothing of the direction of the bulk.
    for way in ways().filter(|way| way.direction == Direction::Upload) {
        for ipv6 in [false, true] {
            let mut places = vec![way.to(ipv6)];
            if way.client != Client::NodePort {
                // The node's own address: what a process of the node sends there has a route to `lo`.
                places.push(way.at_node(ipv6));
            }
            for to in places {
                if let Err(error) = is_answered(&mut bed, way, to) {
                    failures.push(format!("{way:?} to {to}: {error:#}"));
                }
            }
        }
    }
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(())
}

#[test]
fn first_datagrams_arrive_xdp() -> Result<()> {
    first_datagrams_arrive("xdp", Network::Routed)
}

#[test]
fn first_datagrams_arrive_tc() -> Result<()> {
    first_datagrams_arrive("tc", Network::Bridge)
}

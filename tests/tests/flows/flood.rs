//! A million SYNs, each from another address, at a service whose backends answer them all, while a thousand connections
//! run through the same node. Half of the connections are silent during the flood, and most belong to backends that
//! the service does not choose any more: who is forgotten, is led to another backend and breaks.

use std::net::SocketAddrV4;
use std::thread;

use anyhow::{Result, ensure};
use dataplane_tests::agent;
use dataplane_tests::flood;
use dataplane_tests::worker::protocol::HerdReport;

use crate::stage::{BALANCER, CLIENTS, Mode, Stage, alive};

/// Connections of each client in each of two herds.
const CONNECTIONS: u32 = 167;
const FLOOD: u32 = 1_000_000;

#[test]
fn from_outside_by_way_of_xdp() -> Result<()> {
    survive("fx", "xdp", "ext1", BALANCER, "answered")
}

#[test]
fn from_outside_by_way_of_tc() -> Result<()> {
    survive("ft", "tc", "ext1", "192.168.77.11:30080", "answered")
}

#[test]
fn from_a_pod() -> Result<()> {
    survive("fp", "xdp", "client1", "10.96.0.41:80", "begun")
}

/// `counter` is what shows at node1 that the flood has arrived.
fn survive(name: &str, datapath: &'static str, from: &str, to: &str, counter: &str) -> Result<()> {
    let Some(agent) = agent::built() else {
        return Ok(());
    };
    let mode = Mode::without_sockets(datapath);
    let backends = [("be1", 1), ("be2", 1), ("be3", 2), ("be4", 2)];
    let mut stage = Stage::set(name, mode, &backends, &["be1", "be2", "be3", "be4"], agent)?;
    for (client, to) in CLIENTS {
        for herd in ["busy", "silent"] {
            let report = stage.open(client, herd, to, CONNECTIONS)?;
            ensure!(report.broken.is_empty(), "{client} -> {to}: {:?}", report.broken);
            ensure!(report.alive.len() == 4, "{client} met {:?}", report.alive);
        }
    }
    // The flood meets a backend here, which answers it at this node.
    stage.put(&[("be2", None), ("be3", None), ("be4", None)])?;
    stage.settle()?;
    let whole = |stage: &Stage, herd: &str| -> Result<()> {
        for (client, _) in CLIENTS {
            let report = stage.exchange(client, herd)?;
            check(&report, client, herd)?;
        }
        Ok(())
    };
    whole(&stage, "busy")?;
    whole(&stage, "silent")?;

    let (before, established) = (
        stage.flow_events("node1", counter)?,
        stage.flow_events("node1", "established")?,
    );
    let target: SocketAddrV4 = to.parse()?;
    let netns = stage.cluster.member_netns(from)?;
    thread::scope(|scope| -> Result<()> {
        let flood = scope.spawn(|| netns.enter(|| flood::syns(target, 0, FLOOD)));
        while !flood.is_finished() {
            whole(&stage, "busy")?;
        }
        flood.join().unwrap_or(Ok(()))
    })?;
    let arrived = stage.flow_events("node1", counter)? - before;
    let established = stage.flow_events("node1", "established")? - established;
    println!("{arrived} of {FLOOD} SYNs were {counter}, {established} flows established meanwhile");
    // A queue on the way may be too short for some of them.
    ensure!(
        arrived > u64::from(FLOOD) / 2,
        "only {arrived} SYNs were {counter}"
    );
    ensure!(established == 0, "{established} forged flows were established");
    for _ in 0..2 {
        whole(&stage, "busy")?;
        whole(&stage, "silent")?;
    }
    Ok(())
}

fn check(report: &HerdReport, client: &str, herd: &str) -> Result<()> {
    let broken = &report.broken;
    ensure!(
        broken.is_empty() && alive(report) == CONNECTIONS,
        "{} of the {herd} connections of {client} broke, the first: {:?}",
        broken.len(),
        broken.first()
    );
    Ok(())
}

//! Connections that kube-proxy began, through the start of the agents and the end of kube-proxy: none is lost, and none of
//! those that begin meanwhile. Real packets in a cluster of two nodes; needs root and the agent that `cargo xtask build`
//! makes, and for kube-proxy itself the programs that `cargo xtask kube` builds.

mod back;
mod nftables;
mod proxy;
mod stage;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result, ensure};
use dataplane_tests::agent;
use dataplane_tests::api;
use dataplane_tests::api::served::Served;
use dataplane_tests::places::{Owned, Places};
use dataplane_tests::worker::protocol::HerdReport;

use crate::proxy::Proxies;
use crate::stage::{CLIENTS, Stage, alive};

/// Of each client.
const CONNECTIONS: u32 = 34;
/// Of all of them.
const AT_LEAST: u32 = 200;

#[test]
fn from_kube_proxy_by_iptables() -> Result<()> {
    with_kube_proxy("ti", |stage, proxies| {
        stage.wait_until_served()?;
        stage.start_streams()?;
        take_over(stage, proxies)?;
        stage.end_streams()
    })
}

/// A cluster that kube-proxy itself serves, in iptables mode.
fn with_kube_proxy(name: &str, test: impl FnOnce(&Stage, &mut Proxies) -> Result<()>) -> Result<()> {
    let (Some(program), Some(binaries)) = (agent::built(), api::binaries()) else {
        return Ok(());
    };
    let proxy = binaries.join("kube-proxy");
    if !proxy.is_file() {
        println!("skipped: there is no {}", proxy.display());
        return Ok(());
    }
    let folder = Owned(Places::create(&format!("{name}-api"))?);
    let served = Arc::new(Served::start(&binaries, &folder.0.work.join("server"))?);
    let stage = Stage::set(name, Some(&served), program)?;
    let mut proxies = Proxies::start(&stage.cluster, &served, &proxy)?;
    test(&stage, &mut proxies)
}

#[test]
fn from_its_rules_by_nftables() -> Result<()> {
    let Some(program) = agent::built() else {
        return Ok(());
    };
    let stage = Stage::set("tn", None, program)?;
    let mut proxies = Proxies::by_rules(&stage.cluster)?;
    take_over(&stage, &mut proxies)
}

fn take_over(stage: &Stage, proxies: &mut Proxies) -> Result<()> {
    stage.wait_until_served()?;
    for (number, (client, to)) in CLIENTS.into_iter().enumerate() {
        complete(
            &stage.open(client, &format!("old-{number}"), to, CONNECTIONS)?,
            client,
        )?;
    }
    all_alive(stage, "old", CONNECTIONS)?;

    // While the agents start, connections begin and go on.
    let stop = AtomicBool::new(false);
    let mut during = 0;
    let mut agents = stage.agents();
    thread::scope(|scope| -> Result<()> {
        let traffic = scope.spawn(|| traffic(stage, &stop));
        let started = agents.start(stage);
        stop.store(true, Ordering::SeqCst);
        during = traffic
            .join()
            .map_err(|_| anyhow::anyhow!("the traffic panicked"))??;
        started
    })?;
    println!("{during} connections of each client began while the agents started");
    let left: u64 = ["node1", "node2"]
        .into_iter()
        .map(|node| agents.left(node))
        .sum::<Result<u64>>()?;
    ensure!(left > 0, "no connection is left to netfilter");
    println!("{left} connections are left to netfilter");
    for node in ["node1", "node2"] {
        let condition = agents.condition(node, "OnlyProxy")?;
        ensure!(
            condition["status"] == false,
            "{node} does not see kube-proxy: {condition}"
        );
        stage.wait_for_node_to_say(node, "OnlyProxy", false)?;
    }

    proxies.end(&agents)?;
    all_alive(stage, "old", CONNECTIONS)?;
    all_alive(stage, "during", during)?;

    // From now on there is nobody else.
    let before = agents.begun()?;
    for (number, (client, to)) in CLIENTS.into_iter().enumerate() {
        complete(
            &stage.open(client, &format!("new-{number}"), to, CONNECTIONS)?,
            client,
        )?;
    }
    let begun = agents.begun()? - before;
    // Clients outside and in pods; those of the node go by socket hooks or packets.
    let expected =
        u64::from(CONNECTIONS) * CLIENTS.iter().filter(|(client, _)| *client != "node1").count() as u64;
    ensure!(
        begun >= expected,
        "{begun} of {expected} new connections are ours"
    );
    for node in ["node1", "node2"] {
        agents.wait_for_condition(node, "OnlyProxy", true)?;
        stage.wait_for_node_to_say(node, "OnlyProxy", true)?;
    }

    // An agent that comes later changes nothing.
    agents.restart()?;
    for herd in ["old", "new"] {
        all_alive(stage, herd, CONNECTIONS)?;
    }
    let total = CONNECTIONS * CLIENTS.len() as u32;
    println!("none of {total} connections was lost");
    ensure!(total >= AT_LEAST, "{total} connections");
    Ok(())
}

/// New connections and exchanges on all, until it is stopped. Returns how many connections each client has opened.
fn traffic(stage: &Stage, stop: &AtomicBool) -> Result<u32> {
    let mut opened = 0;
    while !stop.load(Ordering::SeqCst) {
        for (number, (client, to)) in CLIENTS.into_iter().enumerate() {
            let report = stage.open(client, &format!("during-{number}"), to, 1)?;
            complete(&report, client).context("while the agents started")?;
        }
        opened += 1;
        all_alive(stage, "old", CONNECTIONS).context("while the agents started")?;
    }
    Ok(opened)
}

fn all_alive(stage: &Stage, herd: &str, expected: u32) -> Result<()> {
    for (number, (client, to)) in CLIENTS.into_iter().enumerate() {
        let report = stage.exchange(client, &format!("{herd}-{number}"))?;
        complete(&report, client).with_context(|| format!("{herd} connections to {to}"))?;
        ensure!(
            alive(&report) == expected,
            "{client} has {} of {expected}",
            alive(&report)
        );
    }
    Ok(())
}

fn complete(report: &HerdReport, client: &str) -> Result<()> {
    ensure!(
        report.broken.is_empty(),
        "{} connections of {client} broke, the first: {:?}",
        report.broken.len(),
        report.broken.first()
    );
    Ok(())
}

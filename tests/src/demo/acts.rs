//! The acts of the demo, in order, and what each shows. Each returns what did not hold.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, bail};
use dataplane_tests::traffic::{Lap, Pace, Traffic, Way};
use dataplane_tests::web;
use dataplane_tests::worker::protocol::{Attempt, Request, Response};

use crate::kernel;
use crate::stage::{OUTSIDE, Stage};

/// Connections of each line of the second act.
const TRIES: u32 = 40;
const PATIENCE: Duration = Duration::from_secs(3);
/// Of connections that run.
const PACE: Pace = Pace {
    period: Duration::from_millis(20),
    patience: Duration::from_secs(5),
};
/// What a connection may wait at most while an agent dies, or an endpoint leaves.
const LONGEST: Duration = Duration::from_secs(1);

/// What did not hold, in words.
pub type Doubts = Vec<String>;

/// The addresses that the examples give their services.
#[derive(Debug)]
pub struct Addresses {
    cluster_ip: SocketAddr,
    cluster_ip6: SocketAddr,
    node1: SocketAddr,
    node2: SocketAddr,
    node1_v6: SocketAddr,
    empty: SocketAddr,
}

impl Addresses {
    pub fn of_the_examples() -> Result<Self> {
        Ok(Self {
            cluster_ip: web::address("10.96.0.80", 80)?,
            cluster_ip6: web::address("fd00:10:96::80", 80)?,
            node1: web::address("192.168.77.11", 30080)?,
            node2: web::address("192.168.77.12", 30080)?,
            node1_v6: web::address("fd00:77::11", 30080)?,
            empty: web::address("10.96.0.99", 80)?,
        })
    }
}

/// What the kernel of node1 holds.
pub fn programmed(stage: &Stage) -> Result<Doubts> {
    println!("1  What was programmed (node1, read with bpftool from the pinned maps)");
    let maps = kernel::maps(&stage.cluster.places().bpffs.join("node1"))?;
    let frontends = kernel::frontends(&maps)?;
    let backends = kernel::backends(&maps)?;
    println!("{}", wrapped("   frontends", &frontends));
    println!("{}\n", wrapped("   backends", &backends));
    let mut doubts = Doubts::new();
    if frontends.is_empty() || backends.is_empty() {
        doubts.push("the maps are empty".to_owned());
    }
    Ok(doubts)
}

/// Who answers which way, and how refusal looks.
pub fn answered(stage: &Stage, to: &Addresses) -> Result<Doubts> {
    let servers = stage.servers();
    let title = format!("2  Who answers {TRIES} new connections");
    println!("{title:<47}{}", columns(servers.iter()));
    let mut doubts = Doubts::new();
    for (client, what, to) in [
        ("client-1", "ClusterIP", to.cluster_ip),
        ("client-2", "ClusterIP", to.cluster_ip6),
        ("node2", "ClusterIP", to.cluster_ip),
        (OUTSIDE, "NodePort", to.node1),
        (OUTSIDE, "NodePort", to.node2),
        (OUTSIDE, "NodePort", to.node1_v6),
    ] {
        let (names, failures) = ask(stage, client, to)?;
        let way = format!("{client} → {what} {to}");
        println!("   {way:<44}{}", counts(&servers, &names));
        if let Some(first) = failures.first() {
            doubts.push(format!(
                "{way}: {} of {TRIES} failed, the first: {first}",
                failures.len()
            ));
        } else if let Some(never) = servers.iter().find(|server| !names.contains_key(*server)) {
            doubts.push(format!("{way}: {never} never answered"));
        }
    }
    let way = format!("client-2 → no endpoints {}", to.empty);
    match get(stage, "client-2", to.empty)? {
        Err(Attempt::Refused { ms, .. }) => println!("   {way:<44}refused after {ms} ms\n"),
        other => {
            println!("   {way:<44}{other:?}\n");
            doubts.push(format!("{way}: not refused"));
        }
    }
    Ok(doubts)
}

/// Starts the traffic of the last two acts: `kept` connections on each way, and new ones all the time.
pub fn traffic(stage: &Stage, to: &Addresses, kept: u32) -> Traffic {
    let way = |from: &str, to| Way {
        from: stage.netns(from),
        to,
    };
    Traffic::start(
        &[
            way("client-1", to.cluster_ip),
            way(OUTSIDE, to.node1),
            way(OUTSIDE, to.node2),
        ],
        kept,
        PACE,
    )
}

/// An endpoint leaves its services while connections run, some of them with it.
pub fn endpoint_leaves(stage: &mut Stage, traffic: &Traffic) -> Result<Doubts> {
    let leaving = stage.servers().pop().unwrap_or_default();
    println!("3  {leaving} leaves both services while connections run");
    let before = traffic.lap(Duration::from_secs(1), || Ok(()))?;
    let with_it = before.kept.get(&leaving).copied().unwrap_or_default();
    traffic.lap(Duration::ZERO, || stage.take_out(&leaving))?;
    // From here on the change is programmed.
    let after = traffic.lap(Duration::from_secs(1), || Ok(()))?;
    let mut doubts = tell(&after);
    println!(
        "   {with_it} of the kept connections are with {leaving}, and stay; of the new ones it got {}\n",
        after.fresh.get(&leaving).copied().unwrap_or_default()
    );
    if after.kept.get(&leaving).copied().unwrap_or_default() != with_it {
        doubts.push(format!("connections with {leaving} did not stay"));
    }
    if after.fresh.contains_key(&leaving) {
        doubts.push(format!("{leaving} still gets new connections"));
    }
    Ok(doubts)
}

/// The agents are killed and started again while connections run.
pub fn agents_die(stage: &mut Stage, traffic: &Traffic, times: u32) -> Result<Doubts> {
    println!("4  kill -9 of both agents, a second without them, start again; {times} times");
    let lap = traffic.lap(Duration::from_secs(1), || {
        for _ in 0..times {
            stage.agents.kill_all();
            std::thread::sleep(Duration::from_secs(1));
            stage.agents.start_all()?;
            stage.settle()?;
        }
        Ok(())
    })?;
    let doubts = tell(&lap);
    println!();
    Ok(doubts)
}

/// One line about kept and new connections.
fn tell(lap: &Lap) -> Doubts {
    let Lap {
        kept: _,
        broken,
        longest,
        fresh: _,
        failed,
    } = lap;
    println!(
        "   kept: {} run, {} broken; new: {} answered, {} failed; the longest wait for an answer {} ms",
        lap.kept_total(),
        broken.len(),
        lap.fresh_total(),
        failed.len(),
        longest.as_millis()
    );
    let mut doubts = Doubts::new();
    doubts.extend(
        broken
            .first()
            .map(|first| format!("a kept connection broke: {first}")),
    );
    doubts.extend(
        failed
            .first()
            .map(|first| format!("a new connection failed: {first}")),
    );
    if *longest > LONGEST {
        doubts.push(format!("an answer took {} ms", longest.as_millis()));
    }
    doubts
}

/// Pages from [`TRIES`] new connections: how often each server answered, and what failed.
fn ask(stage: &Stage, client: &str, to: SocketAddr) -> Result<(BTreeMap<String, u32>, Vec<String>)> {
    let (mut names, mut failures) = (BTreeMap::new(), Vec::new());
    for _ in 0..TRIES {
        match get(stage, client, to)? {
            Ok(name) => *names.entry(name).or_default() += 1,
            Err(attempt) => failures.push(format!("{attempt:?}")),
        }
    }
    Ok((names, failures))
}

/// One page: the server's name, or how it failed.
fn get(stage: &Stage, client: &str, to: SocketAddr) -> Result<Result<String, Attempt>> {
    let timeout_ms = PATIENCE.as_millis() as u64;
    let request = Request::HttpGet {
        to,
        path: "/".to_owned(),
        timeout_ms,
    };
    match stage.cluster.worker(client)?.call(request, PATIENCE * 2)? {
        Response::Http { body, .. } => Ok(Ok(web::name_in(&body).to_owned())),
        Response::Attempts(mut attempts) => Ok(Err(attempts.pop().unwrap_or(Attempt::Silent))),
        other => bail!("{client} answered something else: {other:?}"),
    }
}

fn counts(servers: &[String], names: &BTreeMap<String, u32>) -> String {
    columns(
        servers
            .iter()
            .map(|server| names.get(server).copied().unwrap_or_default()),
    )
}

/// A list of at most 100 columns a line, indented behind its title.
fn wrapped(title: &str, items: &[String]) -> String {
    let (mut text, mut column) = (format!("{title:<12}"), 12);
    for item in items {
        if column + item.len() > 98 {
            text.push_str("\n            ");
            column = 12;
        }
        text.push_str("  ");
        text.push_str(item);
        column += item.len() + 2;
    }
    text
}

fn columns(cells: impl Iterator<Item = impl Display>) -> String {
    cells.fold(String::new(), |line, cell| format!("{line}{cell:>7}"))
}

//! Pods that come and go while everybody floods them from their first millisecond: nothing that their policies forbid reaches
//! them from outside or from other pods, and with the CNI plugin nothing at all, in either direction.
//!
//! `DATAPLANE_STARTUP_PODS` says how many (30 unless it says; the promise is about 500). Needs root and what
//! `cargo xtask build` makes.

mod flood;
mod stage;

use anyhow::{Result, ensure};
use dataplane_tests::agent;
use dataplane_tests::shape::Network;

use stage::{Stage, Totals};

/// Pods that are there at once.
const AT_ONCE: usize = 10;

#[test]
fn without_the_plugin_nothing_reaches_them_from_outside_or_from_pods() -> Result<()> {
    for (name, network) in [("str", Network::Routed), ("stb", Network::Bridge)] {
        start_up(name, network, false)?;
    }
    Ok(())
}

#[test]
fn with_the_plugin_nothing_reaches_or_leaves_them() -> Result<()> {
    for (name, network) in [("scr", Network::Routed), ("scb", Network::Bridge)] {
        start_up(name, network, true)?;
    }
    Ok(())
}

fn pods() -> usize {
    let pods = std::env::var("DATAPLANE_STARTUP_PODS").ok();
    pods.and_then(|pods| pods.parse().ok()).unwrap_or(30)
}

/// `with_plugin`: their processes begin when the plugin says so, else at once.
fn start_up(name: &str, network: Network, with_plugin: bool) -> Result<()> {
    let Some(agent) = agent::built() else {
        return Ok(());
    };
    let mut stage = Stage::set(name, network, agent)?;
    let mut totals = Totals::default();
    let mut numbers = (0..pods()).peekable();
    while numbers.peek().is_some() {
        let wave: Vec<usize> = numbers.by_ref().take(AT_ONCE).collect();
        totals.add(stage.wave(&wave, with_plugin)?);
    }
    stage.end()?;
    println!("{network:?}, plugin {with_plugin}: {totals}");
    ensure!(
        totals.controls_reached * 2 > totals.controls,
        "most pods without policies were not reached, so the floods prove nothing: {totals}"
    );
    ensure!(totals.outside == 0, "from outside: {totals}");
    ensure!(totals.pods == 0, "from another pod: {totals}");
    if with_plugin {
        ensure!(totals.stranger_since_begin == 0, "from a container: {totals}");
        ensure!(totals.sent == 0, "from the pods: {totals}");
    }
    Ok(())
}

//! What commands say of connections, with the names that a running agent knows, and from the pinned tables alone once it is
//! killed.

use std::process::Output;

use anyhow::{Context, Result, ensure};
use dataplane_tests::agent;
use serde_json::Value;

use crate::stage::{Mode, Stage};

const NODE: &str = "node1";
const CONNECTIONS: usize = 20;
const AT: &str = "10.96.0.41:80/TCP";

#[test]
fn commands_answer_without_an_agent_too() -> Result<()> {
    let Some(agent) = agent::built() else {
        return Ok(());
    };
    let mode = Mode {
        socket_lb: "off",
        datapath: "tc",
    };
    let mut stage = Stage::set("seen", mode, &[("be1", 1), ("be2", 2)], &["be1", "be2"], agent)?;
    stage.open("client1", "all", "10.96.0.41:80", CONNECTIONS as u32)?;
    // Both ends have spoken, so that no entry is half-open.
    stage.exchange("client1", "all")?;

    let named = shown(
        &stage,
        &["flows", "--to", "svc/ns1/svc1", "--state", "established"],
    )?;
    let flows = named.as_array().context("no list of flows")?;
    ensure!(flows.len() == CONNECTIONS, "{named}");
    for flow in flows {
        ensure!(
            flow["from_pod"] == "ns1/client1"
                && flow["service"] == "svc/ns1/svc1"
                && ["ns1/be1", "ns1/be2"]
                    .iter()
                    .any(|pod| flow["endpoint_pod"] == *pod),
            "{flow}"
        );
    }
    ensure!(shown(&stage, &["flows", "--from", "ns1/be1"])? == Value::Array(Vec::new()));
    let services = shown(&stage, &["services", "ns1/svc1"])?;
    let running = frontend(&services)?;
    let backends = running["backends"].as_array().context("no backends")?;
    let flows: u64 = backends
        .iter()
        .filter_map(|backend| backend["flows"].as_u64())
        .sum();
    let shares: f64 = backends
        .iter()
        .filter_map(|backend| backend["share"].as_f64())
        .sum();
    ensure!(
        flows == CONNECTIONS as u64 && (shares - 1.0).abs() < 1e-6,
        "{running}"
    );

    stage.agents.kill_all();
    let unnamed = shown(&stage, &["flows", "--to", "10.96.0.41", "--port", "80/TCP"])?;
    let flows = unnamed.as_array().context("no list of flows")?;
    ensure!(
        flows.len() == CONNECTIONS && flows.iter().all(|flow| flow["from_pod"].is_null()),
        "{unnamed}"
    );
    let refused = run(&stage, &["flows", "--to", "svc/ns1/svc1"])?;
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(
        !refused.status.success() && text.contains("names are known to a running agent alone"),
        "{text}"
    );
    let alone = shown(&stage, &["services"])?;
    ensure!(frontend(&alone)? == running, "{alone}");
    let maps = shown(&stage, &["maps"])?;
    let of_flows = maps
        .as_array()
        .into_iter()
        .flatten()
        .find(|map| map["name"] == "FLOWS_V4");
    let entries = of_flows.and_then(|map| map["entries"].as_u64());
    ensure!(
        entries.is_some_and(|entries| entries >= 2 * CONNECTIONS as u64),
        "{of_flows:?}"
    );
    ensure!(stage.agents.status(NODE)?["agent_running"] == false);
    Ok(())
}

/// The frontend of the cluster address.
fn frontend(services: &Value) -> Result<Value> {
    let objects = services["objects"].as_array().into_iter().flatten();
    let frontends = objects.flat_map(|object| object["frontends"].as_array().into_iter().flatten());
    let found = frontends.into_iter().find(|frontend| frontend["at"] == AT);
    found.cloned().with_context(|| format!("no {AT} in {services}"))
}

fn shown(stage: &Stage, command: &[&str]) -> Result<Value> {
    let output = run(stage, command)?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} failed: {text}");
    serde_json::from_slice(&output.stdout).with_context(|| format!("{command:?} printed no JSON"))
}

fn run(stage: &Stage, command: &[&str]) -> Result<Output> {
    let bpffs = stage.agents.bpffs(NODE)?.display().to_string();
    let all = [command, &["--bpffs", &bpffs]].concat();
    if command == ["maps"] {
        return stage
            .agents
            .run(NODE, &[&all[..], &["--output", "json"]].concat());
    }
    stage.agents.command(NODE, &all)
}

//! What commands say of connections, with the names that a running agent knows, and from the pinned tables alone once it is
//! killed.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read as _;
use std::process::Output;

use anyhow::{Context, Result, ensure};
use dataplane_tests::agent;
use flate2::read::GzDecoder;
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
    let mode = Mode::without_sockets("tc");
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
    let nobody = run(&stage, &["flows", "--from", "ns1/nobody"])?;
    let said = String::from_utf8_lossy(&nobody.stderr).into_owned();
    ensure!(said.contains("no Pod is called ns1/nobody now"), "{said}");
    node_ports(&stage)?;
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

    levels_of_the_log(&stage)?;
    let report = archive(&stage, "running")?;
    let status = json(&report, "status.json")?;
    let folder = &status["source"]["folder"];
    ensure!(
        status["agent_running"] == true
            && folder["objects"].as_u64() > Some(0)
            && folder["last_look"].is_string(),
        "{status}"
    );
    ensure!(json(&report, "flows.json")?.as_array().map(Vec::len) >= Some(CONNECTIONS));
    ensure!(text(&report, "log.txt")?.lines().count() >= 1);

    stage.agents.kill_all();
    let report = archive(&stage, "killed")?;
    ensure!(json(&report, "status.json")?["agent_running"] == false);
    ensure!(json(&report, "flows.json")?.as_array().map(Vec::len) >= Some(CONNECTIONS));
    ensure!(text(&report, "policies.json.error")?.contains("failed to reach an agent"));
    ensure!(json(&report, "policies.json")?["pods"].is_array());
    ensure!(text(&report, "log.txt.error")?.contains("failed to reach an agent"));
    ensure!(text(&report, "flows.json.error")?.contains("no names: failed to reach an agent"));
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
    node_ports(&stage)?;
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

/// Levels are changed and set back, and what is no level changes nothing.
fn levels_of_the_log(stage: &Stage) -> Result<()> {
    let levels = |arguments: &[&str]| -> Result<(bool, String)> {
        let output = stage.agents.asking(NODE, &[&["log"], arguments].concat())?;
        let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        Ok((output.status.success(), text))
    };
    let (_, before) = levels(&[])?;
    let changed = levels(&["info,dataplane_agent::sync=debug"])?;
    ensure!(
        changed.0 && changed.1.contains("dataplane_agent::sync=debug"),
        "{changed:?}"
    );
    ensure!(!levels(&["info,dataplane_agent::sync=lots"])?.0);
    ensure!(levels(&[])? == changed, "nothing has changed");
    ensure!(levels(&["--reset"])? == (true, before));
    Ok(())
}

/// The files of a report, without their folder.
pub fn archive(stage: &Stage, name: &str) -> Result<HashMap<String, Vec<u8>>> {
    let path = stage.cluster.places().work.join(format!("{name}.tar.gz"));
    let (bpffs, to) = (stage.agents.bpffs(NODE)?, path.display().to_string());
    let bpffs = bpffs.display().to_string();
    let output = stage
        .agents
        .asking(NODE, &["bugreport", &to, "--bpffs", &bpffs])?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{complaint}");
    let file = File::open(&path).with_context(|| format!("failed to open {to}"))?;
    let mut read = tar::Archive::new(GzDecoder::new(file));
    let mut files = HashMap::new();
    for entry in read.entries()? {
        let mut entry = entry?;
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes)?;
        let path = entry.path()?.display().to_string();
        let (_, name) = path.split_once('/').context("no folder")?;
        files.insert(name.to_owned(), bytes);
    }
    Ok(files)
}

pub fn text(report: &HashMap<String, Vec<u8>>, name: &str) -> Result<String> {
    let bytes = report
        .get(name)
        .with_context(|| format!("no {name} among {:?}", report.keys()))?;
    Ok(String::from_utf8(bytes.clone())?)
}

fn json(report: &HashMap<String, Vec<u8>>, name: &str) -> Result<Value> {
    serde_json::from_str(&text(report, name)?).with_context(|| format!("{name} is no JSON"))
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

/// Node ports are what is at an address of the node.
fn node_ports(stage: &Stage) -> Result<()> {
    let addr = stage.cluster.shape().node(NODE)?.addresses[0].to_string();
    let there = shown(stage, &["services", &addr])?;
    let at = |frontend: &Value| frontend["at"].as_str().map(str::to_owned);
    let frontends = there["objects"][0]["frontends"].as_array();
    let found: Vec<_> = frontends.into_iter().flatten().filter_map(at).collect();
    ensure!(
        !found.is_empty() && found.iter().all(|at| at == "node port 30080/TCP (IPv4)"),
        "{there}"
    );
    Ok(())
}

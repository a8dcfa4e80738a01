//! Faults that operators meet, and the one command that names the cause of each.

use std::process::Output;

use anyhow::{Result, ensure};
use dataplane_tests::agent;
use serde_json::{Value, json};

use crate::monitor::{self, lines, while_connecting};
use crate::stage::{self, BALANCER, Mode, Stage, State};

const NODE: &str = "node1";
const NODE_PORT: &str = "192.168.77.11:30080";

#[test]
fn one_command_names_the_cause_of_a_fault() -> Result<()> {
    let Some(agent) = agent::built() else {
        return Ok(());
    };
    let mode = Mode {
        socket_lb: "off",
        datapath: "tc",
        more: &[],
    };
    let mut stage = Stage::set("faults", mode, &[("be1", 1), ("be2", 2)], &["be1", "be2"], agent)?;

    stage.put(&[("be1", Some(State::NotReady)), ("be2", None)])?;
    stage.settle()?;
    let said = explained(&stage)?;
    ensure!(said.contains("ns1/be1 (10.244.1.21) is not ready"), "{said}");
    stage.put(&[("be1", None)])?;
    stage.settle()?;
    let said = explained(&stage)?;
    ensure!(said.contains("no EndpointSlice of it has an endpoint"), "{said}");
    stage.put(&[("be1", Some(State::Ready)), ("be2", Some(State::Ready))])?;

    let policy = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "closed", "namespace": "ns1"},
        "spec": {"podSelector": {}, "policyTypes": ["Egress"]},
    });
    stage.apply(&policy)?;
    stage.settle()?;
    let said = explained(&stage)?;
    ensure!(said.contains("NetworkPolicy ns1/closed"), "{said}");
    let seen = watched(&stage, ("client1", "10.96.0.41:80"), &["--verdict", "drop"])?;
    ensure!(
        seen["reason"] == "policy-denied" && seen["by"]["policies"] == json!(["NetworkPolicy ns1/closed"]),
        "{seen}"
    );
    stage.delete(&policy)?;

    // No endpoint at the node that the client asks.
    let mut local = stage::service();
    local["spec"]["externalTrafficPolicy"] = json!("Local");
    stage.apply(&local)?;
    stage.put(&[("be1", None)])?;
    stage.settle()?;
    let seen = watched(&stage, ("ext1", NODE_PORT), &["--from", "203.0.113.10"])?;
    ensure!(
        seen["verdict"] == "drop"
            && seen["reason"] == "no-local-endpoints"
            && seen["service"] == "svc/ns1/svc1",
        "{seen}"
    );

    let mut ranges = stage::service();
    ranges["spec"]["loadBalancerSourceRanges"] = json!(["10.0.0.0/8"]);
    stage.apply(&ranges)?;
    stage.settle()?;
    let seen = watched(&stage, ("ext1", BALANCER), &["--from", "203.0.113.10"])?;
    ensure!(
        seen["verdict"] == "drop" && seen["reason"] == "source-range",
        "{seen}"
    );
    Ok(())
}

/// Why a Pod does not reach the Service.
fn explained(stage: &Stage) -> Result<String> {
    let query = [
        "explain",
        "--from",
        "ns1/client1",
        "--to",
        "svc/ns1/svc1",
        "--port",
        "80/TCP",
    ];
    let Output {
        status,
        stdout,
        stderr,
    } = stage.agents.asking(NODE, &query)?;
    let said = String::from_utf8_lossy(&stdout).into_owned();
    ensure!(!status.success(), "{said}{}", String::from_utf8_lossy(&stderr));
    Ok(said)
}

/// What `monitor` says first while a client tries to connect.
fn watched(stage: &Stage, client: (&str, &str), filter: &[&str]) -> Result<Value> {
    let arguments = [filter, &["--count", "1"]].concat();
    let output = while_connecting(stage, client, || monitor::run(stage, "json", &arguments))?;
    Ok(lines(&output)?.into_iter().next().unwrap_or_default())
}

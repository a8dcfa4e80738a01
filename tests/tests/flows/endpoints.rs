//! `endpoints`: which of a Service's endpoints refuses is seen at a glance, with an agent and without; and the metrics of the Service.

use anyhow::{Context, Result, bail, ensure};
use dataplane_tests::agent;
use serde_json::{Value, json};

use crate::{
    monitor,
    stage::{Mode, Stage},
};

const NODE: &str = "node1";
const AT: &str = "10.96.0.42:80";
const DEAF_AT: &str = "10.96.0.43:53";
/// Endpoints are chosen by a hash: none of two stays without any of so many.
const CONNECTIONS: u32 = 40;
const LISTENS: u16 = 8080;
/// Nobody listens here.
const CLOSED: u16 = 9;

#[test]
fn the_endpoint_that_refuses_is_seen() -> Result<()> {
    let Some(agent) = agent::built() else {
        return Ok(());
    };
    let mode = Mode {
        more: &["--service-metrics", "1"],
        ..Mode::without_sockets("tc")
    };
    let mut stage = Stage::set(
        "refusing",
        mode,
        &[("be1", 1), ("be2", 2)],
        &["be1", "be2"],
        agent,
    )?;
    for object in half_closed().into_iter().chain(deaf()) {
        stage.apply(&object)?;
    }
    stage.settle()?;
    let before = stage.metrics(NODE)?;
    ensure!(
        before.contains("{service_name=\"other\"") && !before.contains("\"half\""),
        "{before}"
    );
    for number in 0..CONNECTIONS {
        // Half of them are refused.
        let _refused = stage.begin("client1", &format!("herd{number}"), AT);
    }
    let rows = shown(&stage, &["ns1/half"])?;
    ensure!(rows.len() == 2, "{rows:#?}");
    let [open, closed] = [of(&rows, LISTENS)?, of(&rows, CLOSED)?];
    ensure!(
        open["object"] == "Service ns1/half"
            && open["pod"] == "ns1/be1"
            && open["node"] == "node1"
            && open["local"] == true,
        "{open:#}"
    );
    ensure!(
        closed["pod"] == "ns1/be2"
            && closed["node"] == "node2"
            && closed["local"] == false
            && closed["state"] == "active",
        "{closed:#}"
    );
    let count = |row: &Value, key: &str| row[key].as_u64().unwrap_or(0);
    ensure!(
        count(open, "refused") == 0 && count(open, "flows") == count(open, "connections"),
        "{open:#}"
    );
    ensure!(
        count(closed, "refused") == count(closed, "connections") && count(closed, "flows") == 0,
        "{closed:#}"
    );
    ensure!(
        count(open, "connections") + count(closed, "connections") == u64::from(CONNECTIONS),
        "{rows:#?}"
    );
    let after = stage.metrics(NODE)?;
    for (name, count) in [
        ("connections", u64::from(CONNECTIONS)),
        ("refused_connections", count(closed, "refused")),
    ] {
        let labels = "{service_name=\"half\",service_namespace=\"ns1\"}";
        let line = format!("dataplane_service_{name}_total{labels} {count}");
        ensure!(after.lines().any(|one| one == line), "no {line} in {after}");
    }
    datagrams(&stage)?;
    let unknown = asked(&stage, &["endpoints", "ns1/none"])?;
    ensure!(unknown.1.contains("there is no Service ns1/none"), "{unknown:?}");

    stage.agents.kill_all();
    let alone = shown(&stage, &[])?;
    ensure!(alone.len() == 5, "of all Services: {alone:#?}");
    let row = of(&alone, CLOSED)?;
    ensure!(
        row["object"].is_null() && row["pod"].is_null() && row["frontend"] == format!("{AT}/TCP"),
        "{row:#}"
    );
    for key in ["endpoint", "state", "share", "connections", "refused"] {
        ensure!(row[key] == closed[key], "{key}: {row:#}");
    }
    Ok(())
}

/// The datagrams of one client that nobody wants are one connection that is refused, and `monitor` shows which.
fn datagrams(stage: &Stage) -> Result<()> {
    stage.send_datagrams("client1", 4000, DEAF_AT, 3)?;
    let rows = shown(stage, &["ns1/deaf"])?;
    ensure!(
        rows.len() == 1 && rows[0]["connections"] == 1 && rows[0]["refused"] == 1,
        "{rows:#?}"
    );
    let asks = || {
        // One that is refused is no less of interest.
        let _refused = stage.send_datagrams("client1", 0, DEAF_AT, 1);
    };
    let watch = || {
        monitor::run(
            stage,
            "json",
            &["--to", "svc/ns1/deaf", "--verdict", "refuse", "--count", "1"],
        )
    };
    let told = monitor::lines(&monitor::while_doing(asks, watch)?)?;
    let [one] = &told[..] else {
        bail!("{told:#?}");
    };
    ensure!(
        one["protocol"] == "UDP"
            && one["reason"] == "backend-refused"
            && one["from_pod"] == "ns1/client1"
            && one["service"] == "svc/ns1/deaf"
            && one["to_port"] == 53
            && one["endpoint_pod"] == "ns1/be2"
            && one["endpoint"] == format!("10.244.2.22:{CLOSED}"),
        "{one:#}"
    );
    Ok(())
}

/// A Service of UDP where nobody listens.
fn deaf() -> Vec<Value> {
    vec![
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "deaf", "namespace": "ns1"},
            "spec": {"clusterIP": "10.96.0.43", "clusterIPs": ["10.96.0.43"], "ipFamilies": ["IPv4"],
                "ports": [{"port": 53, "protocol": "UDP"}]},
        }),
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": "deaf", "namespace": "ns1", "labels": {"kubernetes.io/service-name": "deaf"}},
            "endpoints": [{"addresses": ["10.244.2.22"], "conditions": {"ready": true}, "nodeName": "node2"}],
            "ports": [{"port": CLOSED, "protocol": "UDP"}],
        }),
    ]
}

/// A Service of which one endpoint's port is open.
fn half_closed() -> Vec<Value> {
    let slice = |name: &str, address: &str, node: &str, port: u16| {
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": name, "namespace": "ns1", "labels": {"kubernetes.io/service-name": "half"}},
            "endpoints": [{"addresses": [address], "conditions": {"ready": true}, "nodeName": node}],
            "ports": [{"port": port, "protocol": "TCP"}],
        })
    };
    vec![
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "half", "namespace": "ns1"},
            "spec": {"clusterIP": "10.96.0.42", "clusterIPs": ["10.96.0.42"], "ipFamilies": ["IPv4"],
                "ports": [{"port": 80, "protocol": "TCP"}]},
        }),
        slice("half-open", "10.244.1.21", "node1", LISTENS),
        slice("half-closed", "10.244.2.22", "node2", CLOSED),
    ]
}

fn of(rows: &[Value], port: u16) -> Result<&Value> {
    let half = rows.iter().filter(|row| {
        row["object"] == "Service ns1/half" || row["frontend"].as_str().is_some_and(|at| at.starts_with(AT))
    });
    let end = format!(":{port}");
    let mut found = half.filter(|row| row["endpoint"].as_str().is_some_and(|at| at.ends_with(&end)));
    found
        .next()
        .with_context(|| format!("no endpoint at port {port} in {rows:#?}"))
}

/// The rows of `endpoints`.
fn shown(stage: &Stage, arguments: &[&str]) -> Result<Vec<Value>> {
    let (stdout, stderr) = asked(stage, &[&["endpoints", "-o", "json"], arguments].concat())?;
    serde_json::from_str(&stdout).with_context(|| format!("no rows: {stdout}{stderr}"))
}

fn asked(stage: &Stage, arguments: &[&str]) -> Result<(String, String)> {
    let bpffs = stage.agents.bpffs(NODE)?.to_str().context("no path")?;
    let output = stage
        .agents
        .asking(NODE, &[arguments, &["--bpffs", bpffs]].concat())?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok((text(&output.stdout), text(&output.stderr)))
}

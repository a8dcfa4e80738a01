//! `explain` by the tables of running agents: what it says is what packets meet, and what the manifests say; and it leaves no
//! trace.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use dataplane_tests::agent::built;
use serde_json::Value;

use crate::policies;
use crate::stage::{PORT, SERVICE, Stage, address};

/// Who may ask whom at which port, and what is asked about it.
const FLOWS: [(&str, &str, &str); 10] = [
    ("shop/front", "shop/back1", "8080/TCP"),
    ("shop/other", "shop/back1", "8080/TCP"),
    ("shop/front", "shop/back1", "8080/UDP"),
    ("shop/other", "shop/back1", "9/UDP"),
    ("shop/other", "shop/back1", "9/TCP"),
    ("shop/other", "shop/back1", "ICMP"),
    ("shop/front", "shop/other", "53/TCP"),
    ("shop/back1", "shop/back1", "8080/TCP"),
    ("192.168.77.11", "shop/back1", "1/TCP"),
    ("203.0.113.10", "shop/back1", "8080/SCTP"),
];

fn explain(stage: &Stage, node: &str, (from, to, port): (&str, &str, &str), more: &[&str]) -> Result<Value> {
    let asked = ["explain", "--from", from, "--to", to, "--port", port];
    stage.command(node, &[&asked, more].concat())
}

#[test]
fn explain_agrees_with_manifests_and_with_packets_and_leaves_no_trace() -> Result<()> {
    let Some(agent) = built() else {
        return Ok(());
    };
    let stage = Stage::set("explain", &agent, &[], &policies())?;
    let folder = stage.folder.dir().to_str().context("no path")?;
    let before = stage.tables("node1")?;
    for flow in FLOWS {
        let here = explain(&stage, "node1", flow, &[])?;
        let there = explain(&stage, "node1", flow, &["--manifests", folder])?;
        for key in ["from", "to", "port", "allowed", "steps"] {
            let (here, there) = (&here["flows"][0][key], &there["flows"][0][key]);
            ensure!(here == there, "{flow:?}, {key}: {here:#}\nmanifests: {there:#}");
        }
    }
    service(&stage, folder)?;
    let after = stage.tables("node1")?;
    ensure!(
        before.len() == after.len() && before.len() > 40,
        "{}",
        before.len()
    );
    for ((table, before), (_, after)) in before.iter().zip(&after) {
        ensure!(
            before == after,
            "{} has changed:\n{before}\n\n{after}",
            table.display()
        );
    }
    for (from, to, port) in FLOWS {
        let names = (from.strip_prefix("shop/"), to.strip_prefix("shop/"));
        let ((Some(from), Some("back1")), "8080/TCP") = (names, port) else {
            continue;
        };
        let said = explain(&stage, "node1", (&format!("shop/{from}"), to, port), &[])?;
        let connects = stage.connects(from, address("back1", PORT)?)?;
        ensure!(said["flows"][0]["allowed"] == connects, "{from}: {said:#}");
    }
    // With a source port, it is the endpoint that packets from there get.
    for port in 40001..40009 {
        let flow = ("shop/front", "svc/shop/back", "80/TCP");
        let said = explain(&stage, "node1", flow, &["--source-port", &port.to_string()])?;
        let flows = said["flows"].as_array().context("no flows")?;
        let by = stage.answers("front", port, SERVICE.parse()?)?.to_string();
        ensure!(
            flows.len() == 1 && flows[0]["to"]["ip"] == by,
            "port {port}: {by} answers, {said:#}"
        );
    }
    Ok(())
}

/// A Service is each endpoint with its share.
fn service(stage: &Stage, folder: &str) -> Result<()> {
    for to in ["svc/shop/back", "10.96.0.9"] {
        for from in ["shop/front", "shop/other"] {
            let flow = (from, to, "80/TCP");
            let said = explain(stage, "node1", flow, &[])?;
            let flows = said["flows"].as_array().context("no flows")?;
            let slots = |of: &Value| of["share"]["slots"].as_u64().unwrap_or(0);
            let sum: u64 = flows.iter().map(slots).sum();
            ensure!(flows.len() == 2 && sum > 100, "{said:#}");
            ensure!(flows.iter().all(|flow| flow["share"]["of"] == sum), "{said:#}");
            // Of an endpoint on another node the one end is judged here, and the other is said to be elsewhere.
            let by_manifests = explain(stage, "node1", flow, &["--manifests", folder])?;
            let mut expected = BTreeMap::new();
            for flow in by_manifests["flows"].as_array().context("no flows")? {
                expected.insert(flow["to"]["ip"].to_string(), flow);
            }
            for flow in flows {
                let to = flow["to"]["ip"].to_string();
                let expected = expected.get(&to).with_context(|| format!("no {to}"))?;
                ensure!(flow["service"] == "shop/back" && flow["port"] == "8080/TCP");
                ensure!(flow["steps"][0] == expected["steps"][0], "{flow:#}\n{expected:#}");
                let is_here = to.contains("10.244.1.");
                ensure!(
                    !is_here || flow["steps"] == expected["steps"],
                    "{flow:#}\n{expected:#}"
                );
                ensure!(is_here == flow["elsewhere"].is_null(), "{flow:#}");
            }
        }
    }
    let lost = explain(
        stage,
        "node1",
        (
            "shop/front",
            SERVICE.split_once(':').unwrap_or_default().0,
            "81/TCP",
        ),
        &[],
    )?;
    ensure!(
        lost["flows"][0]["service"].is_null(),
        "no Service has this port: {lost:#}"
    );
    Ok(())
}

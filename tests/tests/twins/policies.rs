//! Tables of policy scenarios where everything connects: a cell that says so passes, one that says the reverse fails.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{DROPPING, Folder};

/// Two pods, of which `x/b` alone answers, and an address outside that answers at every port of the case.
fn case(id: &str, family: &str, rows: &Value) -> Value {
    let ports =
        json!([{"port": 80, "proto": "TCP", "name": "web"}, {"port": 80, "proto": "UDP", "name": ""}]);
    let pod = |name: &str, node: u8, ports: &Value| {
        json!({"ns": "x", "name": name, "labels": {}, "ip": format!("10.244.{node}.9"),
            "ip6": format!("fd00:10:244:{node}::9"), "ports": ports})
    };
    json!({
        "schema": "scenario-netpol/1", "id": id, "name": "twin", "family": family,
        "namespaces": [{"name": "x", "labels": {}}],
        "pods": [pod("a", 1, &json!([])), pod("b", 2, &ports)],
        "externals": [{"id": "ext/1", "ip": "203.0.113.10", "ip6": "2001:db8:ff::10"}],
        "steps": [{"actions": [], "expected": {
            "ids": ["x/a", "x/b", "ext/1"], "table": {"TCP/80": rows, "UDP/80": rows},
        }}],
    })
}

#[test]
fn a_wrong_cell_fails_its_case_and_no_other() -> Result<()> {
    for network in ["routed", "vxlan"] {
        let folder = Folder::create(&format!("cells-{network}"))?;
        let right = json!(["s..", "Xs.", "X.-"]);
        let wrong = json!(["sXX", ".sX", ".X-"]);
        for family in ["IPv4", "IPv6"] {
            for (word, rows) in [("right", &right), ("wrong", &wrong)] {
                let id = format!("{word}-{family}");
                folder.write(&format!("{id}.json"), &case(&id, family, rows))?;
            }
        }
        folder.write(
            "undefined.json",
            &case("undefined", "IPv4", &json!(["s?a", "ds-", "---"])),
        )?;
        let agent = folder.idle_agent()?;
        let output = folder.run(&agent, &["-o", "json", "--jobs", "1", "--network", network])?;
        let report: Value = serde_json::from_slice(&output.stdout).context("no document")?;
        ensure!(output.status.code() == Some(1), "{report:#}");
        ensure!(
            (&report["passed"], &report["failed"], &report["skipped"]) == (&json!(2), &json!(2), &json!(1)),
            "{report:#}"
        );
        for case in report["scenarios"].as_array().context("no scenarios")? {
            let id = case["id"].as_str().unwrap_or_default();
            let failed = case["probes"].as_array().context("no probes")?.len();
            let probed = &case["cells"]["probed"];
            match id.split('-').next() {
                Some("right") => ensure!((failed, probed) == (0, &json!(12)), "{case:#}"),
                // One each for six routes and two protocols, and the cluster is that of the first case.
                Some("wrong") => ensure!((failed, probed) == (12, &json!(12)), "{case:#}"),
                _ => ensure!(case["status"] == "skipped", "{case:#}"),
            }
            if id == "wrong-IPv6" {
                let reason = case["reason"].as_str().unwrap_or_default();
                ensure!(reason.contains("had served 3 cases"), "{case:#}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_drop_that_no_policy_accounts_for_fails_its_case() -> Result<()> {
    let folder = Folder::create("drops")?;
    folder.write(
        "right.json",
        &case("right", "IPv4", &json!(["s..", "Xs.", "X.-"])),
    )?;
    let agent = folder.agent(DROPPING)?;
    let (report, status) = folder.report(&agent)?;
    let reason = report["scenarios"][0]["reason"].as_str().unwrap_or_default();
    ensure!(
        status == Some(1) && reason.contains("policies, which account for 0"),
        "{report:#}"
    );
    Ok(())
}

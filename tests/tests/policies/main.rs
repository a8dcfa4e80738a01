//! What an agent tells of its policies, and how it is told to treat them, with real packets.

mod alone;
mod explained;
mod followed;
mod full;
mod incomplete;
mod sources;
mod stage;

use anyhow::{Context, Result, ensure};
use dataplane_tests::agent::built;
use serde_json::{Value, json};

use stage::{PORT, SERVICE, Stage, address, policy};

/// `front` reaches the first backend at its port and nobody else does; were it no dry run, `front` would reach port 53 alone.
fn policies() -> [Value; 2] {
    let from_front = json!([{"podSelector": {"matchLabels": {"pod": "front"}}}]);
    let ingress = json!([
        {"ports": [{"port": 9}]},
        {"from": from_front, "ports": [{"port": PORT}]},
    ]);
    let egress = json!([{"ports": [{"port": 53}]}]);
    [
        policy("back", Some("back1"), false, json!({"ingress": ingress})),
        policy(
            "trial",
            Some("front"),
            true,
            json!({"policyTypes": ["Egress"], "egress": egress}),
        ),
    ]
}

/// Verdicts that `policies` shows of a rule: in force, and of a dry run.
fn counts(shown: &Value, name: &str, rule: Option<u32>) -> Result<(u64, u64)> {
    let policies = shown["policies"].as_array().context("no policies")?;
    let policy = policies.iter().find(|policy| policy["policy"] == name);
    let rules = policy.and_then(|policy| policy["rules"].as_array());
    let mut rules = rules.with_context(|| format!("no {name} in {shown:#}"))?.iter();
    let row = rules.find(|row| row["rule"].as_u64() == rule.map(u64::from));
    let row = row.with_context(|| format!("no rule {rule:?} of {name} in {shown:#}"))?;
    let count = |key: &str| row[key].as_u64().with_context(|| format!("no {key} in {row}"));
    Ok((count("verdicts")?, count("dry_run")?))
}

#[test]
fn every_verdict_is_counted_and_told_with_what_gave_it() -> Result<()> {
    let Some(agent) = built() else {
        return Ok(());
    };
    let stage = Stage::set("told", &agent, &["--verdicts", "all"], &policies())?;
    let back = address("back1", PORT)?;
    for _ in 0..3 {
        ensure!(stage.connects("front", back)?, "allowed");
    }
    for _ in 0..4 {
        ensure!(!stage.connects("other", back)?, "denied");
    }
    let shown = stage.command("node1", &["policies"])?;
    let (back, trial) = ("NetworkPolicy shop/back", "NetworkPolicy shop/trial");
    ensure!(counts(&shown, back, Some(0))? == (0, 0), "{shown:#}");
    ensure!(counts(&shown, back, Some(1))? == (3, 0), "{shown:#}");
    let (denied, _) = counts(&shown, back, None)?;
    ensure!(denied >= 4, "{shown:#}");
    ensure!(counts(&shown, trial, Some(0))? == (0, 0), "{shown:#}");
    ensure!(counts(&shown, trial, None)? == (0, 3), "{shown:#}");

    let of_pod = stage.command("node1", &["policies", "shop/back1"])?;
    let rule = &of_pod["ingress"]["policies"][0]["rules"][1];
    ensure!(
        rule["verdicts"] == 3
            && rule["peers"] == "pods with pod=front in shop"
            && rule["ports"] == "8080/TCP",
        "{of_pod:#}"
    );
    ensure!(
        of_pod["ingress"]["isolated"] == true && of_pod["egress"]["isolated"] == false,
        "{of_pod:#}"
    );

    // Each dropped packet is one verdict that names who gave it, and there are no others.
    ensure!(stage.counted("node1", "policy-denied")? == denied);
    ensure!(
        stage.counted("node1", "policy-allowed")? == 6,
        "both ends of three"
    );
    ensure!(stage.counted("node1", "dry-run-denied")? == 3);
    let told = stage.command("node1", &["verdicts"])?;
    let told = told.as_array().context("no verdicts")?;
    let of = |verdict: &'static str| told.iter().filter(move |one| one["verdict"] == verdict);
    ensure!(of("Denied").count() as u64 == denied, "{told:#?}");
    for one in of("Denied") {
        ensure!(one["from"] == "shop/other (10.244.1.12)" && one["to"] == "shop/back1 (10.244.1.21)");
        ensure!(
            one["direction"] == "ingress" && one["port"] == "8080/TCP",
            "{one:#}"
        );
        ensure!(one["policy"] == back && one["rule"].is_null(), "{one:#}");
    }
    let ingress = of("Allowed").filter(|one| one["direction"] == "ingress");
    ensure!(ingress.clone().count() == 3, "{told:#?}");
    for one in ingress {
        ensure!(
            one["policy"] == back && one["rule"] == 1 && one["action"] == "allow",
            "{one:#}"
        );
    }
    ensure!(of("WouldDeny").all(|one| one["policy"] == trial) && of("WouldDeny").count() == 3);
    for node in ["node1", "node2"] {
        dropped_for_a_reason(&stage, node, denied)?;
    }
    Ok(())
}

/// Whatever was dropped at a node, policies have denied.
fn dropped_for_a_reason(stage: &Stage, node: &str, denied: u64) -> Result<()> {
    let status = stage.agents.status(node)?;
    for one in status["counters"].as_array().context("no counters")? {
        let of_policies = node == "node1" && one["reason"] == "policy-denied";
        let is_drop = one["meaning"]
            .as_str()
            .is_some_and(|text| text.contains("Dropped"));
        let expected = if of_policies { denied } else { 0 };
        ensure!(
            !is_drop || one["count"].as_u64() == Some(expected),
            "{node}: {one:#}"
        );
    }
    Ok(())
}

#[test]
fn a_change_ends_connections_that_it_denies_unless_it_is_for_new_flows() -> Result<()> {
    let Some(agent) = built() else {
        return Ok(());
    };
    for (changes, kept) in [("all", 0), ("new-flows", 5)] {
        let mut stage = Stage::set(
            &format!("change-{changes}"),
            &agent,
            &["--policy-changes", changes],
            &policies(),
        )?;
        let back = address("back1", PORT)?;
        ensure!(stage.open("front", back, 5)? == 5);
        ensure!(stage.alive("front")? == 5);
        let closed = policy("back", Some("back1"), false, json!({"policyTypes": ["Ingress"]}));
        stage.folder.apply(&closed)?;
        stage.settle()?;
        ensure!(!stage.connects("front", back)?, "{changes}: a new connection");
        let alive = stage.alive("front")?;
        ensure!(alive == kept, "{changes}: {alive} of 5 are left");
    }
    Ok(())
}

#[test]
fn as_a_dry_run_policies_report_and_do_nothing() -> Result<()> {
    let Some(agent) = built() else {
        return Ok(());
    };
    let stage = Stage::set("dry", &agent, &["--policy-mode", "dry-run"], &policies())?;
    let back = address("back1", PORT)?;
    for _ in 0..2 {
        ensure!(stage.connects("other", back)? && stage.connects("front", back)?);
    }
    let shown = stage.command("node1", &["policies"])?;
    ensure!(shown["policies"][0]["dry_run"] == true, "{shown:#}");
    let back = "NetworkPolicy shop/back";
    ensure!(counts(&shown, back, None)? == (0, 2), "{shown:#}");
    ensure!(counts(&shown, back, Some(1))? == (0, 0), "{shown:#}");
    ensure!(stage.counted("node1", "policy-denied")? == 0);
    let to: std::net::SocketAddr = SERVICE.parse()?;
    ensure!(stage.connects("other", to)?, "through the Service");
    Ok(())
}

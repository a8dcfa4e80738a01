//! Tables without room: each command names the table, or the endpoints, and the flag that makes room.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use dataplane_tests::agent::{built, patient};
use serde_json::{Value, json};

use crate::stage::{PORT, Stage, address, policy};

const NODE: &str = "node1";
/// How long it may take until agents that have started tell it.
const TOLD: Duration = Duration::from_secs(20);
const STEP: Duration = Duration::from_millis(100);
const NO_RULES: &str = "table RULES is full (2 entries, --max-policy-rules): nothing is allowed";
const NO_BACKENDS: &str =
    "10.96.0.9:80/TCP: 1 of 2 endpoints are not written: no backend id is free (2 backends, --max-backends)";

#[test]
fn what_has_no_room_is_named_with_the_flag_that_makes_some() -> Result<()> {
    let Some(agent) = built() else {
        return Ok(());
    };
    let flags = ["--max-policy-rules", "2", "--max-backends", "2"];
    // What does not fit is never programmed in full, so nobody can wait for that.
    let rules = json!([{"ports": [{"port": 9}]}, {"ports": [{"port": 10}]}, {"ports": [{"port": PORT}]}]);
    let back = policy("back", Some("back1"), false, json!({"ingress": rules}));
    let stage = Stage::set_unsettled("full", &agent, &flags, &[back])?;
    let end = Instant::now() + patient(TOLD);
    loop {
        let output = stage.agents.command(NODE, &["services", "--problems"])?;
        let problems = String::from_utf8_lossy(&output.stdout).into_owned();
        if problems.contains(NO_RULES) && problems.contains(NO_BACKENDS) {
            break;
        }
        ensure!(Instant::now() < end, "{problems}");
        sleep(STEP);
    }

    ensure!(!stage.connects("front", address("back1", PORT)?)?, "closed");
    let step = &explain(&stage, "shop/back1", "8080/TCP")?["steps"][1];
    let reason = step["reason"].as_str().unwrap_or_default();
    ensure!(
        reason == format!("its policies cannot be honoured: {NO_RULES}"),
        "{step:#}"
    );
    let of_pod = stage.command(NODE, &["policies", "shop/back1"])?;
    ensure!(of_pod["ingress"]["closed"] == NO_RULES, "{of_pod:#}");
    ensure!(of_pod["problems"].to_string().contains(NO_RULES), "{of_pod:#}");
    let verdicts = stage.command(NODE, &["verdicts"])?;
    let is_closed = |told: &Value| told["closed"] == NO_RULES;
    ensure!(
        verdicts.as_array().is_some_and(|told| told.iter().any(is_closed)),
        "{verdicts:#}"
    );
    let shown = stage.command(NODE, &["policies"])?;
    ensure!(shown["problems"].to_string().contains(NO_RULES), "{shown:#}");

    let flow = explain(&stage, "svc/shop/back", "80/TCP")?;
    ensure!(flow["notes"].to_string().contains(NO_BACKENDS), "{flow:#}");
    Ok(())
}

/// What is said of the first flow from `front`.
fn explain(stage: &Stage, to: &str, port: &str) -> Result<Value> {
    let asked = ["explain", "--from", "shop/front", "--to", to, "--port", port];
    let said = stage.command(NODE, &asked)?;
    Ok(said["flows"].get(0).cloned().unwrap_or(json!(null)))
}

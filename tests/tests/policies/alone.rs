//! Without an agent: after `kill -9` every command that reads answers from the pinned tables, and says of a flow what it said before;
//! what was not told yet waits for the next agent. An agent whose API server is gone when it starts is none yet.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dataplane_tests::agent::{built, patient};
use serde_json::{Value, json};

use crate::policies;
use crate::stage::{PORT, SERVICE, Stage, address};

const NODE: &str = "node1";
/// At an address where nobody listens.
const NO_SERVER: &str = "apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: \"http://127.0.0.1:9\"}}]
users: [{name: agent, user: {token: none}}]
contexts: [{name: test, context: {cluster: test, user: agent}}]
current-context: test
";
const SERVER_GONE: &str = "failed to reach the API server at http://127.0.0.1:9: ";
/// How long an agent that has started may take to tell what waited.
const TELLS: Duration = Duration::from_secs(5);
const STEP: Duration = Duration::from_millis(100);
/// Addresses of `front`, `other` and `back1`, of their node, of a client outside, and of the Service.
const FLOWS: [(&str, &str, &str); 10] = [
    ("10.244.1.11", "10.244.1.21", "8080/TCP"),
    ("10.244.1.12", "10.244.1.21", "8080/TCP"),
    ("10.244.1.12", "10.244.1.21", "9/TCP"),
    ("10.244.1.12", "10.244.1.21", "ICMP"),
    ("10.244.1.11", "10.244.1.12", "53/TCP"),
    ("10.244.1.21", "10.244.1.21", "8080/TCP"),
    ("192.168.77.11", "10.244.1.21", "1/TCP"),
    ("203.0.113.10", "10.244.1.21", "8080/SCTP"),
    ("10.244.1.11", "10.96.0.9", "80/TCP"),
    ("10.244.1.12", "10.96.0.9", "80/TCP"),
];

#[test]
fn after_a_kill_every_command_that_reads_answers_from_the_tables() -> Result<()> {
    let Some(agent) = built() else {
        return Ok(());
    };
    let mut stage = Stage::set("alone", &agent, &[], &policies())?;
    ensure!(stage.open("front", SERVICE.parse()?, 4)? == 4, "no connections");
    let back = address("back1", PORT)?;
    ensure!(!stage.connects("other", back)?, "denied");
    let before = verdicts_of_flows(&stage, true)?;
    let isolated = &asked(&stage, &["policies", "10.244.1.21"])?["ingress"]["isolated"];
    ensure!(*isolated == true, "by a name that the agent knows");

    stage.agents.kill_all();
    let after = verdicts_of_flows(&stage, false)?;
    for ((flow, before), after) in FLOWS.iter().zip(&before).zip(&after) {
        ensure!(
            before == after,
            "{flow:?}: {before:#}\nwithout an agent: {after:#}"
        );
    }
    ensure!(
        before[0]["allowed"] == true && before[1]["allowed"] == false,
        "{before:#?}"
    );
    tables(&stage)?;
    pods(&stage)?;
    names(&stage)?;
    verdicts(&mut stage)
}

#[test]
fn an_agent_whose_server_is_gone_takes_nothing_unread_for_nothing() -> Result<()> {
    let Some(agent) = built() else {
        return Ok(());
    };
    let mut stage = Stage::set("unread", &agent, &[], &policies())?;
    ensure!(stage.open("front", SERVICE.parse()?, 4)? == 4, "no connections");
    let before = verdicts_of_flows(&stage, true)?;
    stage.agents.kill_all();
    let kubeconfig = stage.cluster.places().work.join("kubeconfig");
    fs::write(&kubeconfig, NO_SERVER)?;
    let kubeconfig = kubeconfig.to_str().context("no path")?;
    let source = ["--source", "kube", "--kubeconfig", kubeconfig];
    stage.agents.set_source(NODE, &source)?;
    stage.agents.start_all()?;

    let after = verdicts_of_flows(&stage, false)?;
    ensure!(before == after, "{before:#?}\nunread: {after:#?}");
    for command in ["services", "endpoints", "flows", "policies"] {
        let said = stage.agents.asking(NODE, &with_tables(&stage, &[command])?)?;
        let why = String::from_utf8_lossy(&said.stderr);
        let unread = format!("the agent has not read all Services, Pods and policies yet: {SERVER_GONE}");
        ensure!(said.status.success() && why.contains(&unread), "{command}: {why}");
        let lines = String::from_utf8_lossy(&said.stdout).lines().count();
        ensure!(lines > 1, "{command}: nothing");
    }
    pods(&stage)?;
    names(&stage)?;
    refused(&stage, &["wait", "--timeout", "3"], SERVER_GONE)?;
    let (_, log) = stage.agents.logs().next().context("no log")?;
    let log = fs::read_to_string(log)?;
    ensure!(!log.contains("ERROR") && log.contains(SERVER_GONE), "{log}");
    Ok(())
}

/// Of each flow what does not depend on names.
fn verdicts_of_flows(stage: &Stage, named: bool) -> Result<Vec<Value>> {
    let verdict = |(from, to, port): &(&str, &str, &str)| {
        let said = asked(stage, &["explain", "--from", from, "--to", to, "--port", port])?;
        let flows = said["flows"].as_array().context("no flows")?;
        let mut of_ends = Vec::new();
        for flow in flows {
            ensure!(flow["to"]["pod"].is_string() == named, "{flow:#}");
            let steps = flow["steps"].as_array().context("no steps")?.iter();
            let steps = steps.map(|step| {
                let rule = &step["rule"];
                let reason = rule.is_null().then(|| step["reason"].clone());
                json!([
                    step["direction"],
                    step["allowed"],
                    rule["tier"],
                    rule["field"],
                    rule["action"],
                    reason,
                    step["dry_run"].is_null()
                ])
            });
            of_ends.push(
                json!({"to": flow["to"]["ip"], "port": flow["port"], "share": flow["share"],
                "allowed": flow["allowed"], "steps": steps.collect::<Vec<_>>()}),
            );
        }
        let all = flows.iter().all(|flow| flow["allowed"] == true);
        Ok(json!({"allowed": all, "of": of_ends}))
    };
    FLOWS.iter().map(verdict).collect()
}

/// What is served, which flows there are, and what the tables are.
fn tables(stage: &Stage) -> Result<()> {
    ensure!(stage.agents.status(NODE)?["agent_running"] == false);
    for wide in [&["services"][..], &["services", "-o", "wide"]] {
        let output = stage.agents.asking(NODE, &with_tables(stage, wide)?)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            output.status.success() && text.contains(SERVICE),
            "{wide:?}: {text}"
        );
        let has_endpoints = text.contains(&address("back1", PORT)?.to_string());
        ensure!(has_endpoints == (wide.len() > 1), "{wide:?}: {text}");
    }
    let flows = asked(stage, &["flows", "--from", "10.244.1.11"])?;
    ensure!(flows.as_array().map(Vec::len) == Some(4), "{flows:#}");
    let bpffs = stage.agents.bpffs(NODE)?.display().to_string();
    let maps = stage.agents.run(NODE, &["maps", "--bpffs", &bpffs])?;
    let text = String::from_utf8_lossy(&maps.stdout).into_owned();
    ensure!(maps.status.success() && text.contains("POD_POLICY"), "{text}");
    Ok(())
}

/// Pods are addresses, and policies numbers.
fn pods(stage: &Stage) -> Result<()> {
    let shown = asked(stage, &["policies"])?;
    let pods = shown["pods"].as_array().context("no pods")?;
    ensure!(pods.len() == 3, "{shown:#}");
    let back = pods.iter().find(|pod| pod["addresses"] == json!(["10.244.1.21"]));
    let back = back.with_context(|| format!("no back1 in {shown:#}"))?;
    ensure!(
        back["ingress"]["isolated"] == true && back["ingress"]["rules"] == 2 && back["device"].is_string(),
        "{back:#}"
    );
    ensure!(
        back["ingress"]["verdicts"].as_u64() >= Some(1) && back["egress"]["rules"] == 0,
        "{back:#}"
    );
    let of_back = asked(stage, &["policies", "10.244.1.21"])?;
    let rules = &of_back["ingress"]["policies"][0]["rules"];
    ensure!(
        rules[0]["peers"] == "any" && rules[0]["ports"] == "9/TCP" && rules[0]["action"] == "allow",
        "{of_back:#}"
    );
    ensure!(
        rules[1]["peers"] == "10.244.1.11" && rules[1]["ports"] == "8080/TCP" && rules[1]["rule"] == 1,
        "{of_back:#}"
    );
    let of_front = asked(stage, &["policies", "10.244.1.11"])?;
    ensure!(
        of_front["egress"]["isolated"] == false && of_front["egress"]["policies"][0]["dry_run"] == true,
        "{of_front:#}"
    );
    refused(
        stage,
        &["policies", "10.244.2.22"],
        "no Pod of this node with an interface of its own has the address 10.244.2.22",
    )
}

/// Who asks by name hears that nobody knows it.
fn names(stage: &Stage) -> Result<()> {
    let unknown = "names are known to a running agent alone";
    refused(stage, &["policies", "shop/back1"], unknown)?;
    refused(stage, &["services", "shop/back"], unknown)?;
    refused(stage, &["endpoints", "shop/back"], unknown)?;
    let problems = "problems are known to a running agent alone";
    refused(stage, &["services", "--problems"], problems)?;
    for (from, to) in [("shop/front", "10.244.1.21"), ("10.244.1.11", "svc/shop/back")] {
        let explain = ["explain", "--from", from, "--to", to, "--port", "80/TCP"];
        refused(stage, &explain, unknown)?;
    }
    Ok(())
}

/// What is denied meanwhile can be read, again and again, and the next agent tells it with names.
fn verdicts(stage: &mut Stage) -> Result<()> {
    let back = address("back1", PORT)?;
    ensure!(!stage.connects("other", back)?, "denied");
    for _ in 0..2 {
        let told = told(stage)?;
        let denied = told.iter().find(|one| one["from"] == "10.244.1.12");
        let denied = denied.with_context(|| format!("nothing of it in {told:#?}"))?;
        ensure!(
            denied["to"] == "10.244.1.21" && denied["port"] == "8080/TCP" && denied["verdict"] == "Denied",
            "{denied:#}"
        );
    }
    let waiting = told(stage)?.len();
    stage.agents.start_all()?;
    stage.settle()?;
    let end = Instant::now() + patient(TELLS);
    loop {
        let told = told(stage)?;
        let named = told
            .iter()
            .filter(|one| one["from"] == "shop/other (10.244.1.12)");
        let named = named
            .filter(|one| one["policy"] == "NetworkPolicy shop/back")
            .count();
        if named >= waiting {
            return Ok(());
        }
        ensure!(Instant::now() < end, "{waiting} waited: {told:#?}");
        sleep(STEP);
    }
}

fn told(stage: &Stage) -> Result<Vec<Value>> {
    match asked(stage, &["verdicts"])? {
        Value::Array(told) => Ok(told),
        other => anyhow::bail!("no list: {other}"),
    }
}

/// What a command prints as JSON; [`Stage::command`].
fn asked(stage: &Stage, arguments: &[&str]) -> Result<Value> {
    stage.command(NODE, &with_tables(stage, arguments)?)
}

fn with_tables<'a>(stage: &'a Stage, arguments: &[&'a str]) -> Result<Vec<&'a str>> {
    let bpffs = stage.agents.bpffs(NODE)?.to_str().context("no path")?;
    Ok([arguments, &["--bpffs", bpffs]].concat())
}

fn refused(stage: &Stage, arguments: &[&str], because: &str) -> Result<()> {
    let output = match arguments {
        ["wait", ..] => stage.agents.asking(NODE, arguments)?,
        _ => stage.agents.asking(NODE, &with_tables(stage, arguments)?)?,
    };
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        !output.status.success() && text.contains(because),
        "{arguments:?}: {text}"
    );
    Ok(())
}

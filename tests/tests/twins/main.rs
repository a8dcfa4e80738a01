//! Negative twins: for each kind of outcome a right expectation passes and a wrong one fails. No Service and no policy is
//! involved, so the agent is a program that does nothing.

mod policies;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

/// Opens what looks like its socket and stays.
const STAY: &str = r#"
for arg; do
    [ "$last" = --socket ] && : > "$arg"
    last=$arg
done
exec sleep 600
"#;
/// It has counted nothing.
const IDLE: &str = r#"echo '{"counters": [], "policies": []}'"#;
/// Each time, policies have denied one packet more, and there are none.
const DROPPING: &str = r#"
    echo >> "$0.asked"
    denied=$(wc -l < "$0.asked")
    echo '{"counters": [{"reason": "policy-denied", "meaning": "Dropped", "count": '"$denied"'}], "policies": []}'
"#;

struct Folder(PathBuf);

impl Folder {
    fn create(name: &str) -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("dataplane-twins-{}-{name}", std::process::id()));
        fs::create_dir_all(&dir)?;
        Ok(Self(dir))
    }

    fn write(&self, name: &str, scenario: &Value) -> Result<()> {
        Ok(fs::write(self.0.join(name), serde_json::to_vec(scenario)?)?)
    }

    fn idle_agent(&self) -> Result<PathBuf> {
        self.agent(IDLE)
    }

    /// An agent that does nothing, and says this whatever it is asked.
    fn agent(&self, says: &str) -> Result<PathBuf> {
        let path = self.0.join("agent.sh");
        let script = format!("#!/bin/sh\n[ \"$1\" = run ] || {{ {says}\n exit 0; }}{STAY}");
        fs::write(&path, script)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(path)
    }

    fn run(&self, agent: &Path, more: &[&str]) -> Result<Output> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dataplane-scenarios"));
        command.arg(&self.0).arg("--agent").arg(agent).args(more);
        command.output().context("failed to run the scenarios")
    }

    fn report(&self, agent: &Path) -> Result<(Value, Option<i32>)> {
        let output = self.run(agent, &["-o", "json"])?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let report =
            serde_json::from_slice(&output.stdout).with_context(|| format!("no document: {text}"))?;
        Ok((report, output.status.code()))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn scenario(id: &str, steps: &Value) -> Value {
    let node = |number: u8| {
        json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": format!("node{number}"), "labels": {}},
            "spec": {"podCIDRs": [format!("10.244.{number}.0/24"), format!("fd00:10:244:{number}::/64")]},
            "status": {"addresses": [
                {"type": "InternalIP", "address": format!("192.168.77.1{number}")},
                {"type": "InternalIP", "address": format!("fd00:77::1{number}")},
            ]},
        })
    };
    let pod = |name: &str, node: u8, last: u8, listen: &Value| {
        json!({"name": name, "node": format!("node{node}"), "ip": format!("10.244.{node}.{last}"),
            "ip6": format!("fd00:10:244:{node}::{last}"), "listen": listen})
    };
    let both = json!([{"proto": "TCP", "port": 80}, {"proto": "UDP", "port": 80}]);
    json!({
        "schema": "scenario-services/1", "id": id, "name": "twin",
        "nodes": [node(1), node(2)],
        "pods": [pod("client1", 1, 10, &json!([])), pod("be1", 1, 21, &both), pod("be2", 2, 21, &both)],
        "externals": [{"name": "ext1", "ip": "203.0.113.10", "ip6": "2001:db8:ff::10"}],
        "objects": [], "steps": steps,
    })
}

fn probe(id: &str, proto: &str, to: (&str, u16), expect: &Value) -> Value {
    json!({"id": id, "from": {"kind": "pod", "name": "client1", "ip": "10.244.1.10"},
        "to": {"ip": to.0, "port": to.1, "proto": proto}, "expect": expect})
}

const BE1: (&str, u16) = ("10.244.1.21", 80);
const CLOSED: (&str, u16) = ("10.244.1.21", 81);
const NOWHERE: (&str, u16) = ("10.96.0.41", 80);

fn outcomes(proto: &str) -> Vec<Value> {
    let reach = |backends: &[&str]| json!({"outcome": "reach", "backends": backends, "exact_set": true});
    let outcome = |outcome: &str, strict: bool| json!({"outcome": outcome, "strict_kind": strict});
    let with = |mut expect: Value, key: &str, value: Value| {
        expect[key] = value;
        expect
    };
    let one = || reach(&["10.244.1.21:80"]);
    let two = || reach(&["10.244.1.21:80", "10.244.2.21:80"]);
    let cases = [
        (
            "right reach",
            BE1,
            with(one(), "client_ip_preserved", json!(true)),
        ),
        (
            "right reach, pod",
            BE1,
            with(one(), "backend_pods", json!(["be1"])),
        ),
        ("right reach, sticky", BE1, with(two(), "sticky", json!(true))),
        ("wrong reach, other backend", BE1, reach(&["10.244.2.21:80"])),
        ("wrong reach, other port", BE1, reach(&["10.244.1.21:81"])),
        (
            "wrong reach, other pod",
            BE1,
            with(one(), "backend_pods", json!(["be2"])),
        ),
        ("wrong reach, missing backend", BE1, two()),
        ("wrong reach, closed", CLOSED, one()),
        ("wrong reach, nowhere", NOWHERE, one()),
        (
            "wrong reach, not sticky",
            BE1,
            with(one(), "sticky", json!(false)),
        ),
        ("right reject", CLOSED, outcome("reject", true)),
        ("right reject, dropped", NOWHERE, outcome("reject", false)),
        ("wrong reject", BE1, outcome("reject", false)),
        ("wrong reject, strictly", NOWHERE, outcome("reject", true)),
        ("right drop", NOWHERE, outcome("drop", true)),
        ("right drop, rejected", CLOSED, outcome("drop", false)),
        ("wrong drop", BE1, outcome("drop", false)),
        ("wrong drop, strictly", CLOSED, outcome("drop", true)),
        ("right fail", CLOSED, outcome("fail", false)),
        ("right fail, dropped", NOWHERE, outcome("fail", false)),
        ("wrong fail", BE1, outcome("fail", false)),
    ];
    cases
        .iter()
        .map(|(id, to, expect)| probe(&format!("{id} {proto}"), proto, *to, expect))
        .collect()
}

fn flow(id: &str, action: &str, proto: &str, to: (&str, u16), expect: &Value) -> Value {
    let name = id.split_once(' ').map_or(id, |(_, rest)| rest);
    let mut flow = probe(&format!("{id} {action}"), proto, to, expect);
    flow["flow"] = json!(name);
    flow["action"] = json!(action);
    flow["within_seconds"] = json!(3);
    flow
}

/// The probes' ids say how they must end.
fn check(report: &Value) -> Result<()> {
    let probes = report["scenarios"][0]["probes"].as_array().context("no probes")?;
    ensure!(!probes.is_empty(), "no probe was made: {report:#}");
    for probe in probes {
        let right = probe["id"].as_str().is_some_and(|id| id.starts_with("right"));
        ensure!(
            probe["status"] == if right { "passed" } else { "failed" },
            "{probe:#}"
        );
    }
    Ok(())
}

#[test]
fn wrong_expectations_fail() -> Result<()> {
    let folder = Folder::create("outcomes")?;
    let fetch = |id: &str, url: &str, expect: Value| json!({"id": id, "from": {"kind": "external", "name": "ext1"}, "http_get": url, "expect": expect});
    let mut probes = [outcomes("TCP"), outcomes("UDP")].concat();
    probes.extend([
        fetch(
            "right http, closed",
            "http://192.168.77.11:31000/healthz",
            json!({"outcome": "fail"}),
        ),
        fetch(
            "wrong http, open",
            "http://10.244.1.21:80/healthz",
            json!({"outcome": "fail"}),
        ),
        fetch(
            "wrong http",
            "http://192.168.77.11:31000/healthz",
            json!({"outcome": "http", "status": 200}),
        ),
    ]);
    folder.write("outcomes.json", &scenario("t1", &json!([{"probes": probes}])))?;
    let (report, code) = folder.report(&folder.idle_agent()?)?;
    ensure!(code == Some(1) && report["failed"] == 1, "{report:#}");
    check(&report)
}

#[test]
fn wrong_flows_fail() -> Result<()> {
    let folder = Folder::create("flows")?;
    let any_of = |pod: &str| json!({"outcome": "reach", "backends_pods_any_of": [pod]});
    let fail = json!({"outcome": "fail"});
    let mut probes = Vec::new();
    for action in ["start", "continue"] {
        for (id, proto) in [("right tcp", "TCP"), ("right udp", "UDP")] {
            probes.push(flow(id, action, proto, BE1, &any_of("be1")));
        }
        for (id, proto) in [("wrong tcp pod", "TCP"), ("wrong udp pod", "UDP")] {
            probes.push(flow(id, action, proto, BE1, &any_of("be2")));
        }
        for (id, proto) in [("wrong tcp open", "TCP"), ("wrong udp open", "UDP")] {
            probes.push(flow(id, action, proto, BE1, &fail));
        }
        probes.push(flow("right udp closed", action, "UDP", CLOSED, &fail));
        probes.push(flow("wrong udp silent", action, "UDP", NOWHERE, &any_of("be1")));
    }
    folder.write("flows.json", &scenario("t2", &json!([{"probes": probes}])))?;
    let (report, _) = folder.report(&folder.idle_agent()?)?;
    check(&report)
}

#[test]
fn an_agent_that_does_nothing_fails_every_service() -> Result<()> {
    let folder = Folder::create("true")?;
    let reach = json!({"outcome": "reach", "backends": ["10.244.1.21:80"], "exact_set": true});
    let probes = [
        probe("wrong tcp", "TCP", NOWHERE, &reach),
        probe("wrong udp", "UDP", NOWHERE, &reach),
    ];
    folder.write("true.json", &scenario("t3", &json!([{"probes": probes}])))?;
    let (report, code) = folder.report(Path::new("/bin/true"))?;
    ensure!(code == Some(1), "{report:#}");
    check(&report)
}

#[test]
fn what_the_schema_does_not_know_fails() -> Result<()> {
    let folder = Folder::create("schema")?;
    let reach = json!({"outcome": "reach", "backends": ["10.244.1.21:80"]});
    let good = json!([{"probes": [probe("p1", "TCP", BE1, &reach)]}]);
    let mut count = 0;
    let mut broken = |pointer: &str, key: &str, value: Value| -> Result<()> {
        let mut scenario = scenario(&format!("b{count}"), &good);
        scenario.pointer_mut(pointer).context("no such place")?[key] = value;
        folder.write(&format!("b{count}.json"), &scenario)?;
        count += 1;
        Ok(())
    };
    broken("", "surprise", json!(1))?;
    broken("", "schema", json!("scenario-services/2"))?;
    broken("", "config", json!({"surprise": 1}))?;
    broken("", "config", json!({"agent_args": ["--socket-lb=all"]}))?;
    broken("/pods/0", "surprise", json!(1))?;
    broken("/steps/0", "surprise", json!(1))?;
    broken("/steps/0", "actions", json!([{"verb": "surprise"}]))?;
    broken("/steps/0", "actions", json!([{"verb": "wait"}]))?;
    broken(
        "/steps/0",
        "actions",
        json!([{"verb": "create", "object": {"apiVersion": "v1", "kind": "Surprise"}}]),
    )?;
    broken(
        "",
        "objects",
        json!([{"apiVersion": "v2", "kind": "Service", "metadata": {"name": "a"}}]),
    )?;
    broken("/steps/0/probes/0", "surprise", json!(1))?;
    broken("/steps/0/probes/0/from", "kind", json!("surprise"))?;
    broken("/steps/0/probes/0/to", "proto", json!("surprise"))?;
    broken("/steps/0/probes/0/expect", "outcome", json!("surprise"))?;
    broken("/steps/0/probes/0/expect", "surprise", json!(1))?;
    broken("", "steps", json!([]))?;
    folder.write("undefined.json", &{
        let undefined = json!({"outcome": "fail", "undefined": "implementations differ"});
        scenario("u", &json!([{"probes": [probe("p1", "TCP", BE1, &undefined)]}]))
    })?;
    let (report, code) = folder.report(Path::new("/bin/true"))?;
    ensure!(code == Some(1), "{report:#}");
    ensure!(
        report["failed"] == count && report["skipped"] == 1 && report["passed"] == 0,
        "{report:#}"
    );
    for scenario in report["scenarios"].as_array().context("no scenarios")? {
        ensure!(
            scenario["reason"]
                .as_str()
                .is_some_and(|reason| !reason.is_empty()),
            "{scenario:#}"
        );
    }
    Ok(())
}

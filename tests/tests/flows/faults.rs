//! Faults that operators meet, and the one command that names the cause of each.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dataplane_tests::agent;
use dataplane_tests::links::Route;
use serde_json::{Value, json};

use crate::monitor::{self, lines, while_connecting};
use crate::seen;
use crate::stage::{self, BALANCER, Mode, PORT, Stage, State};

const NODE: &str = "node1";
const CLUSTER_IP: &str = "10.96.0.41:80";
const NODE_PORT: &str = "192.168.77.11:30080";
const DROPPED: &str = "dataplane_service_dropped_packets_total{";
/// By which the agent would be known to the API server.
const TOKEN: &str = "eyJhbGciOi.of-the-agent";
/// Nothing listens there.
const CLOSED: u16 = 8181;
/// Where bulk transfers are taken.
const MUCH: u16 = 8282;
/// A neighbour that was known is asked for five seconds before it is given up, on a machine that is idle.
const PATIENCE: Duration = Duration::from_mins(2);

#[test]
fn one_command_names_the_cause_of_a_fault() -> Result<()> {
    let Some(agent) = agent::built() else {
        return Ok(());
    };
    // An uplink that is a veth has no XDP unless it is asked for.
    let mode = Mode {
        more: &["--service-metrics", "1"],
        ..Mode::without_sockets("auto")
    };
    let mut stage = Stage::set("faults", mode, &[("be1", 1), ("be2", 2)], &["be1", "be2"], agent)?;
    endpoints_are_not_ready(&mut stage)?;
    a_policy_denies(&mut stage)?;
    the_target_port_is_wrong(&mut stage)?;
    no_endpoint_is_local(&mut stage)?;
    the_client_is_in_no_source_range(&mut stage)?;
    packets_are_larger_than_the_path(&mut stage)?;
    the_node_of_the_endpoint_is_gone(&mut stage)?;
    a_device_has_no_xdp(&stage)?;
    a_table_is_full(&mut stage)?;
    the_api_server_is_gone(&mut stage)
}

/// What a process is refused before it sends a packet is counted too.
#[test]
fn what_socket_hooks_refuse_is_counted() -> Result<()> {
    const REFUSED: &str = r#"dataplane_packets_total{outcome="refused",reason="no-endpoints"}"#;
    let Some(agent) = agent::built() else {
        return Ok(());
    };
    let mode = Mode {
        socket_lb: "all",
        datapath: "tc",
        more: &["--service-metrics", "1"],
    };
    let stage = Stage::set("refused", mode, &[("be1", 1)], &[], agent)?;
    for client in ["client1", "node1"] {
        let before = [at_services(&stage, DROPPED)?, at_services(&stage, REFUSED)?];
        let refused = stage.begin(client, "herd", CLUSTER_IP)?;
        ensure!(stage::alive(&refused) == 0, "{refused:?}");
        let counted = [at_services(&stage, DROPPED)?, at_services(&stage, REFUSED)?];
        ensure!(
            counted == before.map(|count| count + 1),
            "{client}: {counted:?} after {before:?}"
        );
    }
    Ok(())
}

fn endpoints_are_not_ready(stage: &mut Stage) -> Result<()> {
    stage.put(&[("be1", Some(State::NotReady)), ("be2", None)])?;
    stage.settle()?;
    explained(stage, false, "ns1/be1 (10.244.1.21) is not ready")?;
    stage.put(&[("be1", None)])?;
    stage.settle()?;
    explained(stage, false, "no EndpointSlice of it has an endpoint")?;
    stage.put(&[("be1", Some(State::Ready)), ("be2", Some(State::Ready))])
}

fn a_policy_denies(stage: &mut Stage) -> Result<()> {
    let policy = |name: &str, direction: &str, rules: Value| {
        let mut policy = json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": name, "namespace": "ns1"},
            "spec": {"podSelector": {}, "policyTypes": [direction]},
        });
        policy["spec"][direction.to_lowercase()] = rules;
        policy
    };
    let egress = policy("closed", "Egress", json!([]));
    stage.apply(&egress)?;
    stage.settle()?;
    denied_by(stage, "NetworkPolicy ns1/closed")?;
    stage.delete(&egress)?;
    // By the endpoint's on the client's node: where the client sends, both are asked.
    let policies = [
        policy("open", "Egress", json!([{}])),
        policy("shut", "Ingress", json!([])),
    ];
    stage.put(&[("be1", Some(State::Ready)), ("be2", None)])?;
    policies.iter().try_for_each(|policy| stage.apply(policy))?;
    stage.settle()?;
    denied_by(stage, "NetworkPolicy ns1/shut")?;
    policies.iter().try_for_each(|policy| stage.delete(policy))?;
    stage.put(&[("be1", Some(State::Ready)), ("be2", Some(State::Ready))])
}

fn denied_by(stage: &Stage, policy: &str) -> Result<()> {
    explained(stage, false, policy)?;
    let seen = dropped(stage, ("client1", CLUSTER_IP), &["--verdict", "drop"])?;
    ensure!(
        seen["reason"] == "policy-denied" && seen["by"]["policies"] == json!([policy]),
        "{seen}"
    );
    Ok(())
}

fn the_target_port_is_wrong(stage: &mut Stage) -> Result<()> {
    stage.set_target_port(CLOSED)?;
    stage.settle()?;
    for (client, to, from) in [
        ("client1", CLUSTER_IP, "10.244.1.10"),
        ("ext1", NODE_PORT, "203.0.113.10"),
    ] {
        let filter = ["--verdict", "refuse", "--from", from];
        let seen = watched(stage, (client, to), &filter)?;
        let endpoint = seen["endpoint"].as_str().unwrap_or_default();
        ensure!(
            seen["reason"] == "backend-refused"
                && seen["service"] == "svc/ns1/svc1"
                && endpoint.ends_with(&format!(":{CLOSED}")),
            "{seen}"
        );
    }
    explained(stage, true, &format!("nothing listens at {CLOSED}/TCP"))?;
    stage.set_target_port(PORT)
}

fn no_endpoint_is_local(stage: &mut Stage) -> Result<()> {
    let mut local = stage::service();
    local["spec"]["externalTrafficPolicy"] = json!("Local");
    stage.apply(&local)?;
    stage.put(&[("be1", None)])?;
    stage.settle()?;
    let seen = dropped(stage, ("ext1", NODE_PORT), &["--from", "203.0.113.10"])?;
    ensure!(
        seen["verdict"] == "drop"
            && seen["reason"] == "no-local-endpoints"
            && seen["service"] == "svc/ns1/svc1",
        "{seen}"
    );
    let query = [
        "--from",
        "203.0.113.10",
        "--to",
        "192.168.77.11",
        "--port",
        "30080/TCP",
    ];
    let cause = "ns1/be2 (10.244.2.22) is ready, on node node2";
    explains(stage, &query, false, cause)?;
    // By name it is what a client outside can ask.
    let query = ["--from", "203.0.113.10", "--to", "svc/ns1/svc1", "--port"];
    let asked = "asked at 198.51.100.41:80, a load balancer address of it";
    explains(stage, &[&query[..], &["80/TCP"]].concat(), false, asked)?;
    let asked = "asked at 192.168.77.11:30080, a node port of it";
    explains(stage, &[&query[..], &["30080/TCP"]].concat(), false, asked)
}

fn the_client_is_in_no_source_range(stage: &mut Stage) -> Result<()> {
    let mut ranges = stage::service();
    ranges["spec"]["loadBalancerSourceRanges"] = json!(["10.0.0.0/8"]);
    stage.apply(&ranges)?;
    stage.settle()?;
    let seen = dropped(stage, ("ext1", BALANCER), &["--from", "203.0.113.10"])?;
    ensure!(
        seen["verdict"] == "drop" && seen["reason"] == "source-range",
        "{seen}"
    );
    let query = [
        "--from",
        "203.0.113.10",
        "--to",
        "198.51.100.41",
        "--port",
        "80/TCP",
    ];
    let cause = "source-range: ";
    explains(stage, &query, false, cause)?;
    let ranges = "spec.loadBalancerSourceRanges of Service ns1/svc1 are 10.0.0.0/8";
    explains(stage, &query, false, ranges)?;
    stage.apply(&stage::service())
}

/// The endpoint is on the other node, and the way there is narrower than what clients outside send.
fn packets_are_larger_than_the_path(stage: &mut Stage) -> Result<()> {
    stage.take_much("be2", MUCH)?;
    stage.set_target_port(MUCH)?;
    stage.settle()?;
    let pods = (IpAddr::V4(Ipv4Addr::new(10, 244, 2, 0)), 24);
    let wide = Route {
        via: Some([192, 168, 77, 12].into()),
        ..Route::default()
    };
    let narrow = Route {
        mtu: Some(1300),
        ..wide
    };
    let links = stage.cluster.node_links(NODE)?;
    links.delete_route(pods, wide)?;
    links.add_route(pods, narrow)?;
    let filter = ["--verdict", "too-big", "--count", "1"];
    let output = monitor::while_doing(
        || {
            let _unfinished = stage.send_much("ext1", NODE_PORT);
        },
        || monitor::run(stage, "json", &filter),
    )?;
    let seen = lines(&output)?.into_iter().next().unwrap_or_default();
    ensure!(
        seen["mtu"] == 1300 && seen["reason"] == "fragmentation-needed",
        "{seen}"
    );
    // A Pod's packets leave by the stack, which tells their sender: where it is narrow, `explain` says.
    explained(
        stage,
        true,
        "is reached by eth0 with MTU 1300, next hop 192.168.77.12",
    )?;
    let links = stage.cluster.node_links(NODE)?;
    links.delete_route(pods, narrow)?;
    links.add_route(pods, wide)?;
    stage.set_target_port(PORT)
}

fn the_node_of_the_endpoint_is_gone(stage: &mut Stage) -> Result<()> {
    stage.settle()?;
    explained(
        stage,
        true,
        "10.244.2.22 is reached by eth0 with MTU 1500, next hop 192.168.77.12",
    )?;
    stage.cluster.set_plugged("node2", false)?;
    let end = Instant::now() + agent::patient(PATIENCE);
    let cause = "next hop 192.168.77.12 (neighbour FAILED), which does not answer";
    for herd in 0.. {
        let _unanswered = stage.begin("client1", &format!("gone{herd}"), CLUSTER_IP);
        match explained(stage, true, cause) {
            Ok(()) => break,
            Err(error) if Instant::now() > end => return Err(error),
            Err(_) => {}
        }
    }
    stage.cluster.set_plugged("node2", true)
}

fn a_device_has_no_xdp(stage: &Stage) -> Result<()> {
    status(stage, "the other end of a veth may not take what XDP sends")
}

fn a_table_is_full(stage: &mut Stage) -> Result<()> {
    stage.agents.kill_all();
    stage.agents.set_flags(&["--max-services", "8"]);
    stage.agents.start_all()?;
    for number in 1..9 {
        stage.apply(&json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": format!("many{number}"), "namespace": "ns1"},
            "spec": {"clusterIP": format!("10.96.1.{number}"), "ports": [{"port": 80}]},
        }))?;
    }
    status(stage, "problem: TablesHaveRoom: ")
}

/// Nothing answers at its address when the agent starts; packets go on.
fn the_api_server_is_gone(stage: &mut Stage) -> Result<()> {
    let kubeconfig = stage.cluster.places().work.join("kubeconfig");
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "users": [{"name": "u", "user": {"token": TOKEN}}],
    });
    fs::write(&kubeconfig, config.to_string()).context("failed to write a kubeconfig")?;
    let flags = [
        "--source",
        "kube",
        "--kubeconfig",
        &kubeconfig.display().to_string(),
    ];
    stage.agents.kill_all();
    stage.agents.set_source(NODE, &flags)?;
    stage.agents.start_all()?;
    status(stage, "onnection refused")?;
    let report = stage.open("client1", "served", CLUSTER_IP, 1)?;
    ensure!(stage::alive(&report) == 1, "{report:?}");
    no_token_is_reported(stage)
}

/// What the agent knows of secrets is in no file of the archive.
fn no_token_is_reported(stage: &Stage) -> Result<()> {
    let report = seen::archive(stage, "secret")?;
    ensure!(seen::text(&report, "status.json")?.contains("onnection refused"));
    for (name, bytes) in &report {
        let is_in = bytes
            .windows(TOKEN.len())
            .any(|window| window == TOKEN.as_bytes());
        ensure!(!is_in, "{name} has the agent's token");
    }
    Ok(())
}

/// What `status` says, once it says so.
fn status(stage: &Stage, cause: &str) -> Result<()> {
    let bpffs = stage.agents.bpffs(NODE)?.display().to_string();
    let end = Instant::now() + agent::patient(Duration::from_secs(20));
    loop {
        let output = stage.agents.run(NODE, &["status", "--bpffs", &bpffs])?;
        let said = String::from_utf8_lossy(&output.stdout);
        if said.contains(cause) {
            return Ok(());
        }
        ensure!(Instant::now() < end, "{said}");
    }
}

/// Why a Pod does not reach the Service, or what is known of the way there.
fn explained(stage: &Stage, is_allowed: bool, cause: &str) -> Result<()> {
    let query = [
        "--from",
        "ns1/client1",
        "--to",
        "svc/ns1/svc1",
        "--port",
        "80/TCP",
    ];
    explains(stage, &query, is_allowed, cause)
}

fn explains(stage: &Stage, query: &[&str], is_allowed: bool, cause: &str) -> Result<()> {
    let output = stage.agents.asking(NODE, &[&["explain"], query].concat())?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success() == is_allowed && said.contains(cause),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// The same of a packet that is dropped, which is counted at its Service.
fn dropped(stage: &Stage, client: (&str, &str), filter: &[&str]) -> Result<Value> {
    let before = at_services(stage, DROPPED)?;
    let seen = watched(stage, client, filter)?;
    let counted = at_services(stage, DROPPED)?;
    ensure!(counted > before, "{counted} as before: {seen}");
    Ok(seen)
}

/// What a metric says of all Services together.
fn at_services(stage: &Stage, metric: &str) -> Result<u64> {
    let page = stage.metrics(NODE)?;
    let values = page
        .lines()
        .filter(|line| line.starts_with(metric))
        .map(|line| line.rsplit(' ').next().unwrap_or_default().parse::<u64>());
    let values: Vec<u64> = values.collect::<Result<_, _>>()?;
    ensure!(!values.is_empty(), "no {metric} in {page}");
    Ok(values.iter().sum())
}

/// What `monitor` says first while a client tries to connect.
fn watched(stage: &Stage, client: (&str, &str), filter: &[&str]) -> Result<Value> {
    let arguments = [filter, &["--count", "1"]].concat();
    let output = while_connecting(stage, client, || monitor::run(stage, "json", &arguments))?;
    let said = String::from_utf8_lossy(&output.stderr);
    let seen = lines(&output)?.into_iter().next();
    seen.with_context(|| format!("nothing seen of {client:?} by {filter:?}: {said}"))
}

//! `docs/bpftool.md` is true: its functions and its commands, in its order, each with what the answers before it said. In
//! place of the example's addresses they get those of a cluster, and the way has to end where the page says that it does.

mod walk;

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use dataplane_common::reason::Reason;
use dataplane_tests::agent;
use dataplane_tests::netns::set_sysctls;
use serde_json::{Value, json};
use walk::{Both, PAGE, Walk, number, same, text};

use crate::stage::{Mode, Stage, State, alive};

const NODE: &str = "node1";
/// The last one has left the Service but for a connection.
const ENDPOINTS: [(&str, u8); 4] = [("be1", 1), ("be2", 2), ("be3", 1), ("gone", 2)];
const CHOSEN: [&str; 3] = ["10.244.1.21", "10.244.1.23", "10.244.2.22"];
const GONE: &str = "10.244.2.24";
const CLIENT: Both<&str> = ["10.244.1.10"; 2];
const POD: Both<&str> = ["10.244.1.21"; 2];
const VIP: Both<&str> = ["10.96.0.80", "10.96.0.41"];
const OUTSIDE: Both<&str> = ["192.168.77.10", "203.0.113.10"];
/// The client's ports of its connections through the Service and to the Pod.
const PORTS: [u16; 2] = [41000, 42002];

#[test]
fn the_commands_of_the_page_answer_what_it_says() -> Result<()> {
    let Some(agent) = agent::built() else {
        return Ok(());
    };
    let stage = set(agent)?;
    let mut walk = Walk::begin(stage.agents.bpffs(NODE)?)?;
    walk.sums()?;
    let judged = a_service(&mut walk)?;
    policies(&mut walk, judged)?;
    counters(&mut walk)?;
    walk.end()
}

/// A Service with three endpoints and one that drains, a policy about the first, and the page's connections.
fn set(agent: PathBuf) -> Result<Stage> {
    let mode = Mode::without_sockets("tc");
    let mut stage = Stage::set("bpftool", mode, &ENDPOINTS, &["gone"], agent)?;
    stage.apply(&json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "be1", "namespace": "ns1"},
        "spec": {"podSelector": {"matchLabels": {"pod": "be1"}}, "policyTypes": ["Ingress"], "ingress": [
            {"from": [{"ipBlock": {"cidr": "203.0.113.0/24"}}], "ports": [{"port": 9090}]},
            {"from": [{"podSelector": {"matchLabels": {"pod": "client1"}}}], "ports": [{"port": 8080}]},
        ]},
    }))?;
    stage.settle()?;
    stage.open("client1", "old", "10.96.0.41:80", 1)?;
    let chosen = ["be1", "be2", "be3"].map(|name| (name, Some(State::Ready)));
    stage.put(&[&chosen[..], &[("gone", None)]].concat())?;
    stage.settle()?;
    for (port, to) in PORTS.iter().zip(["10.96.0.41:80", "10.244.1.21:8080"]) {
        let range = format!("{port} {port}");
        let only = || set_sysctls(&[("net/ipv4/ip_local_port_range", &range)]);
        stage.cluster.member_netns("client1")?.enter(only)?;
        stage.open("client1", to, to, 1)?;
        // Both ends have spoken, so that no entry is half-open.
        same(alive(&stage.exchange("client1", to)?), 1)?;
    }
    // What the policy denies.
    stage.begin("be3", "denied", "10.244.1.21:8080")?;
    Ok(stage)
}

/// From a frontend to its backends, and a flow to one of them: the revision of policies that allowed it.
fn a_service(walk: &mut Walk) -> Result<Both<u64>> {
    let frontend = walk.ask("FRONTENDS_V4", &[text(VIP), text([80; 2])])?;
    walk.finds_nothing(&["10.96.0.41", "81"])?;
    walk.ask("FRONTENDS_V4", &[text(["0.0.0.0"; 2]), text([30080; 2])])?;
    let own = walk.ask("OWN_ADDRS_V4", &[text(["192.168.77.11"; 2])])?;
    same(number(&own, "/value")?, [5; 2])?;
    let index = number(&frontend, "/value/service")?;
    let service = walk.ask("SERVICES", &[text(index)])?;
    same(walk.quad(&service[1], "/value/addr_be/0")?.as_str(), VIP[1])?;

    let offset = [text(number(&service, "/value/head/slots_offset")?)];
    same(number(&walk.ask("MAGLEV", &offset)?, "/value")?, [3; 2])?;
    let first = number(&walk.ask("MAGLEV", &offset)?, "/value")?;
    let third = number(&walk.ask("MAGLEV", &offset)?, "/value")?;
    let slots = number(&walk.ask("MAGLEV", &offset)?, "/value")?;
    let lanes = |slots: u64| (0..4).map(move |lane| slots >> (16 * lane) & 0xffff);
    same(slots.map(|slots| lanes(slots).all(|slot| slot < 3)), [true; 2])?;
    let lower = |pair: u64| pair & 0xffff_ffff;
    walk.ask("BACKENDS", &[text(first.map(lower))])?;
    let mut chosen = BTreeSet::new();
    for backend in [lower(first[1]), first[1] >> 32, lower(third[1])] {
        let found = walk.again(&[&backend.to_string()])?;
        let (value, head) = (&found["value"], &found["value"]["head"]);
        let addr = walk.quad(value, "/addr_be/0")?;
        same(walk.shell(&format!("port {}", head["port_be"]))?.as_str(), "8080")?;
        same(&head["state"], &json!(1))?;
        same(value["ifindex"] != 0, addr.starts_with("10.244.1."))?;
        chosen.insert(addr);
    }
    same(chosen, CHOSEN.map(str::to_owned).into())?;
    // The first number that is given: there was no other endpoint yet.
    let gone = walk.ask("BACKENDS", &[text([4, 1])])?;
    same(number(&gone, "/value/head/state")?, [2; 2])?;
    same(walk.quad(&gone[1], "/value/addr_be/0")?.as_str(), GONE)?;

    let ends = [text(CLIENT), text(VIP), text([PORTS[0]; 2]), text([80; 2])];
    let flow = walk.ask("FLOWS_V4", &ends)?;
    same(number(&flow, "/value/meta/service")?, index)?;
    let to = walk.quad(&flow[1], "/value/dst_be")?;
    ensure!(CHOSEN.contains(&to.as_str()), "{to}");
    let clock = PAGE.split('`').find(|code| code.starts_with("awk "));
    let now: u64 = walk.shell(clock.context("the page has no clock")?)?.parse()?;
    let [_, seen] = number(&flow, "/value/meta/seen_ticks")?;
    ensure!(seen <= now + 1 && now < seen + 600, "{seen} at {now}");
    number(&flow, "/value/meta/judged")
}

/// From a Pod to the rule that lets the client in, and the flow that it has allowed.
fn policies(walk: &mut Walk, judged: Both<u64>) -> Result<()> {
    let revision = number(&walk.ask("POLICY_REVISION", &[])?, "/value")?;
    same(revision, judged)?;
    let interface = number(&walk.ask("BOUND_V4", &[text(POD)])?, "/value")?;
    let pod = walk.ask("POD_POLICY", &[text(interface)])?;
    let set = number(&pod, "/value/ingress")?;
    let rules = number(&walk.ask("POLICY_SETS", &[text(set)])?, "/value/rules")?;
    let class = number(&walk.ask("PEERS_V4", &[text(CLIENT)])?, "/value")?;
    walk.ask("CIDRS_V4", &[text([32; 2]), text(OUTSIDE)])?;
    let by_peer = walk.ask("PEER_RULES", &[text(set), text(class)])?;
    let by_port = walk.ask("PORT_RULES", &[text([64; 2]), text(set), text([8080; 2])])?;
    walk.finds_nothing(&["64", &set[1].to_string(), "22"])?;
    // Each has the one rule alone.
    let bits = number(&by_peer, "/value")?;
    same(number(&by_port, "/value")?, bits)?;
    let bits = number(&walk.ask("RULE_BITS", &[text(bits)])?, "/value/words/0")?;
    let rule = [0, 1].map(|of| rules[of] + u64::from(bits[of].trailing_zeros()));
    let found = walk.ask("RULES", &[text(rule)])?;
    same(number(&found, "/value/place")?, [0, 1])?;
    same(number(&found, "/value/action")?, [1; 2])?;
    let [_, hits] = walk.ask("RULE_HITS", &[text(rule)])?;
    ensure!(total(&hits, "/value/decided") > 0, "{hits}");

    let ends = [text(POD), text(CLIENT), text([8080; 2]), text([PORTS[1]; 2])];
    let flow = walk.ask("POLICY_FLOWS_V4", &ends)?;
    same(number(&flow, "/value/ifindex")?, interface)?;
    same(number(&flow, "/value/revision")?, revision)
}

fn counters(walk: &mut Walk) -> Result<()> {
    let [_, denied] = walk.ask("COUNTERS", &[text([Reason::PolicyDenied as u32; 2])])?;
    ensure!(total(&denied, "/value") > 0, "{denied}");
    let [_, events] = walk.ask("FLOW_EVENTS", &[])?;
    // Two connections at least, of which each began, was answered and was established.
    let all = events.as_array().context("no list")?;
    same(all.len(), 3)?;
    ensure!(all.iter().all(|event| total(event, "/value") >= 2), "{events}");
    Ok(())
}

/// What all CPUs have counted.
fn total(entry: &Value, pointer: &str) -> u64 {
    let values = entry["values"].as_array().into_iter().flatten();
    values.filter_map(|one| one.pointer(pointer)?.as_u64()).sum()
}

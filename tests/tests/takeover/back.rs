//! Installed beside kube-proxy and removed again: the machine is as it was before, by what its own tools say, kube-proxy serves,
//! and its connections have outlived both.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use dataplane_tests::agent;

use crate::proxy::Proxies;
use crate::stage::{CLIENTS, Stage};
use crate::{CONNECTIONS, all_alive, complete, with_kube_proxy};

const NODES: [&str; 2] = ["node1", "node2"];
/// Rules, programs at every hook, qdiscs and parameters.
const ASKED: [(&str, &[&str]); 7] = [
    ("iptables-save", &[]),
    ("ip6tables-save", &[]),
    ("nft", &["--stateless", "list", "ruleset"]),
    ("bpftool", &["--json", "net", "show"]),
    ("bpftool", &["cgroup", "tree"]),
    ("tc", &["qdisc", "show"]),
    ("sysctl", &["-a", "-r", r"^net\.(ipv4|ipv6|core)\."]),
];

#[test]
fn beside_kube_proxy_by_iptables() -> Result<()> {
    with_kube_proxy("bi", |stage, _| go_and_come_back(stage))
}

#[test]
fn beside_its_rules_by_nftables() -> Result<()> {
    let Some(program) = agent::built() else {
        return Ok(());
    };
    let stage = Stage::set("bn", None, program)?;
    let _rules = Proxies::by_rules(&stage.cluster)?;
    go_and_come_back(&stage)
}

fn go_and_come_back(stage: &Stage) -> Result<()> {
    stage.wait_until_served()?;
    open(stage, "old")?;
    let before = machine(stage)?;
    let mut agents = stage.agents();
    agents.start(stage)?;
    open(stage, "during")?;
    ensure!(machine(stage)? != before, "nothing shows that agents run");
    agents.remove()?;
    all_alive(stage, "old", CONNECTIONS)?;
    open(stage, "new")?;
    for (asked, said) in machine(stage)? {
        ensure!(
            before[&asked] == said,
            "{asked} said\n{}\nand now says\n{said}",
            before[&asked]
        );
    }
    Ok(())
}

fn open(stage: &Stage, herd: &str) -> Result<()> {
    for (number, (client, to)) in CLIENTS.into_iter().enumerate() {
        let report = stage.open(client, &format!("{herd}-{number}"), to, CONNECTIONS)?;
        complete(&report, client).with_context(|| format!("{herd} connections to {to}"))?;
    }
    Ok(())
}

/// What the tools say of each node, without what counts by itself.
fn machine(stage: &Stage) -> Result<BTreeMap<String, String>> {
    let mut said = BTreeMap::new();
    for node in NODES {
        let cluster = &stage.cluster;
        let cgroup = cluster.node_cgroup(node)?;
        for (program, arguments) in ASKED {
            let mut command = cluster.helper().enter(
                cluster.node_netns(node)?.path(),
                &cgroup.join("host"),
                Path::new("/usr/bin/env"),
            );
            command.arg(program).args(arguments);
            if arguments.first() == Some(&"cgroup") {
                command.arg(cgroup);
            }
            let asked = format!("{node}: {program} {}", arguments.join(" "));
            let output = command.output().with_context(|| asked.clone())?;
            ensure!(
                output.status.success(),
                "{asked}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            said.insert(
                asked,
                text.lines().filter_map(steady).collect::<Vec<_>>().join("\n"),
            );
        }
    }
    Ok(said)
}

/// A line without packet counts; comments say the time.
fn steady(line: &str) -> Option<&str> {
    if line.starts_with('#') {
        return None;
    }
    let line = if line.starts_with(':') {
        line.split(" [").next().unwrap_or(line)
    } else {
        line
    };
    Some(line)
}

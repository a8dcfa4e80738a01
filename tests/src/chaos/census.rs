//! What there is, counted: entries of tables, programs, maps and links of the kernel, and what agents hold.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::faults::SPARED;
use crate::stage::{self, NODES, Stage};

const METRICS: u16 = 10249;
/// How long an agent may take to tell them.
const ANSWER: Duration = Duration::from_secs(10);
/// Ends the names of what is counted in the whole machine, others' too.
const IN_THE_KERNEL: &str = " in the kernel";
/// Tables that hold traffic, not objects.
const OF_TRAFFIC: [&str; 7] = [
    "flows",
    "half_open",
    "affinity",
    "sock",
    "fragment",
    "held",
    "datagrams",
];
/// What an agent's memory may grow by in the second half: lists of the last changes, and pages that come and go.
const MEMORY: u64 = 6 << 20;
/// What its descriptors may grow by: connections to the server that are being made.
const DESCRIPTORS: usize = 8;

/// Counts by what is counted.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Census(BTreeMap<String, u64>);

impl Census {
    pub fn take(stage: &Stage) -> Result<Self> {
        let mut counts = BTreeMap::new();
        for kind in ["prog", "map", "link"] {
            for (name, count) in kernel_objects(kind)? {
                counts.insert(format!("{kind} {name}{IN_THE_KERNEL}"), count);
            }
        }
        for number in NODES {
            let node = stage::node(number);
            for (table, entries) in entries(stage, &node)? {
                counts.insert(format!("entries of {table} on {node}"), entries);
            }
        }
        Ok(Self(counts))
    }

    /// What is not the same later; of what the whole machine has, what is more.
    pub fn grown_to(&self, later: &Self) -> Vec<String> {
        let names: std::collections::BTreeSet<_> = self.0.keys().chain(later.0.keys()).collect();
        let count = |of: &Self, name: &String| of.0.get(name).copied().unwrap_or_default();
        names
            .into_iter()
            .filter(|name| {
                let (before, after) = (count(self, name), count(later, name));
                before != after && (after > before || !name.ends_with(IN_THE_KERNEL))
            })
            .map(|name| {
                format!(
                    "{name}: {} before, {} after",
                    count(self, name),
                    count(later, name)
                )
            })
            .collect()
    }
}

/// Kills every agent and starts it again, which must find nothing to write; then takes everything away that agents ever made,
/// and starts them from nothing, which must make as many entries of each table.
pub fn equal_to_a_start_from_nothing(stage: &mut Stage) -> Result<Vec<String>> {
    let mut doubts = Vec::new();
    stage.agents.kill_all();
    stage.agents.start_all()?;
    stage.settle()?;
    let mut grown = BTreeMap::new();
    for number in NODES {
        let node = stage::node(number);
        let writes = metric(stage, &node, "dataplane_table_writes_total")?;
        if writes != 0 {
            doubts.push(format!(
                "a start on {node} found {writes} entries that were not what they should be"
            ));
        }
        grown.insert(node.clone(), (entries(stage, &node)?, served(stage, &node)?));
    }
    stage.agents.kill_all();
    for number in NODES {
        let node = stage::node(number);
        let bpffs = stage.agents.bpffs(&node)?.display().to_string();
        let cleanup = stage.agents.run(&node, &["cleanup", "--bpffs", &bpffs])?;
        if !cleanup.status.success() {
            doubts.push(format!(
                "cleaning up on {node}: {}",
                String::from_utf8_lossy(&cleanup.stderr).trim()
            ));
        }
    }
    stage.agents.start_all()?;
    stage.settle()?;
    for number in NODES {
        let node = stage::node(number);
        let fresh = entries(stage, &node)?;
        let (grown, grown_services) = grown.remove(&node).unwrap_or_default();
        let fresh_services = served(stage, &node)?;
        if grown_services.is_empty() {
            doubts.push(format!("the tables of {node} serve nothing"));
        }
        let differs = |(at, backends): (&String, &String), of: &BTreeMap<String, String>| {
            (of.get(at) != Some(backends)).then(|| format!("{at} of {node}: {backends}"))
        };
        doubts.extend(grown_services.iter().filter_map(|one| {
            Some(format!(
                "{}; not so in a start from nothing",
                differs(one, &fresh_services)?
            ))
        }));
        doubts.extend(fresh_services.iter().filter_map(|one| {
            Some(format!(
                "{}; so only in a start from nothing",
                differs(one, &grown_services)?
            ))
        }));
        doubts.extend(
            fresh
                .iter()
                .filter(|(table, entries)| grown.get(*table) != Some(entries))
                .map(|(table, entries)| {
                    format!(
                        "{table} of {node} had {} entries; a start from nothing makes {entries}",
                        grown.get(table).copied().unwrap_or_default()
                    )
                }),
        );
    }
    Ok(doubts)
}

/// What the tables serve: by frontend and clients, its backends with their states and shares.
fn served(stage: &Stage, node: &str) -> Result<BTreeMap<String, String>> {
    let bpffs = stage.agents.bpffs(node)?.display().to_string();
    // No agent answers there, so this is what the tables hold.
    let command = [
        "services",
        "--socket",
        "/nonexistent",
        "--bpffs",
        &bpffs,
        "--output",
        "json",
    ];
    let output = stage.agents.run(node, &command)?;
    let text = String::from_utf8_lossy(&output.stderr);
    let shown: Value =
        serde_json::from_slice(&output.stdout).with_context(|| format!("`services` failed: {text}"))?;
    let frontends = shown["objects"][0]["frontends"]
        .as_array()
        .context("`services` lists no frontends")?;
    Ok(frontends
        .iter()
        .map(|frontend| {
            let mut backends = frontend["backends"].clone();
            for backend in backends.as_array_mut().into_iter().flatten() {
                backend["flows"].take();
            }
            (
                format!("{} for {}", frontend["at"], frontend["clients"]),
                backends.to_string(),
            )
        })
        .collect())
}

/// Entries of the tables that hold what objects say.
fn entries(stage: &Stage, node: &str) -> Result<BTreeMap<String, u64>> {
    let status = stage.agents.status(node)?;
    let tables = status["tables"]
        .as_array()
        .context("`status` tells of no tables")?;
    Ok(tables
        .iter()
        .filter_map(|table| Some((table["name"].as_str()?.to_owned(), table["entries"].as_u64()?)))
        .filter(|(name, _)| {
            let name = name.to_lowercase();
            !OF_TRAFFIC.iter().any(|of_traffic| name.contains(of_traffic))
        })
        .collect())
}

/// Programs, maps or links of the whole machine, by name or kind.
fn kernel_objects(kind: &str) -> Result<BTreeMap<String, u64>> {
    let output = Command::new("bpftool")
        .args(["--json", kind, "list"])
        .output()
        .context("failed to start bpftool (`cargo xtask setup` installs it)")?;
    let list: Value = serde_json::from_slice(&output.stdout).context("bpftool printed no JSON")?;
    let mut counts = BTreeMap::new();
    for object in list.as_array().into_iter().flatten() {
        let name = ["name", "attach_type", "type"]
            .iter()
            .find_map(|field| object[field].as_str());
        *counts.entry(name.unwrap_or("unnamed").to_owned()).or_default() += 1;
    }
    Ok(counts)
}

/// A metric of a node's agent that has no labels.
fn metric(stage: &Stage, node: &str, name: &str) -> Result<u64> {
    let text = stage.cluster.page(node, METRICS, "/metrics", ANSWER)?;
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
    value.with_context(|| format!("{node} has no metric {name}"))
}

/// How what the spared agent holds grows in the second half.
pub struct Growth {
    from: Duration,
    first: Option<(u64, usize)>,
}

impl Growth {
    pub fn new(end: Duration) -> Self {
        Self {
            from: end * 6 / 10,
            first: None,
        }
    }

    /// Takes what the agent has once it is up: one that was started just now has opened next to nothing.
    pub fn look(&mut self, stage: &Stage, at: Duration) -> Result<()> {
        let is_ready = || {
            stage
                .agents
                .ask(&stage::node(SPARED), "/readyz")
                .is_ok_and(|page| page["ready"] == true)
        };
        if self.first.is_none() && at > self.from && is_ready() {
            self.first = held(stage)?;
        }
        Ok(())
    }

    pub fn judged(&self, stage: &Stage) -> Result<Vec<String>> {
        let (Some((memory, descriptors)), Some((memory_now, descriptors_now))) = (self.first, held(stage)?)
        else {
            return Ok(vec!["the run was too short to tell what leaks".to_owned()]);
        };
        println!(
            "the agent of node{SPARED}: {} MiB and {descriptors} descriptors, then {} MiB and {descriptors_now}",
            mebibytes(memory),
            mebibytes(memory_now)
        );
        let mut doubts = Vec::new();
        if memory_now > memory + MEMORY {
            doubts.push(format!(
                "an agent's memory grew from {memory} to {memory_now} bytes"
            ));
        }
        if descriptors_now > descriptors + DESCRIPTORS {
            doubts.push(format!(
                "an agent's descriptors grew from {descriptors} to {descriptors_now}"
            ));
        }
        Ok(doubts)
    }
}

/// As people read it, in tenths.
fn mebibytes(bytes: u64) -> String {
    let tenths = (bytes * 10) >> 20;
    format!("{}.{}", tenths / 10, tenths % 10)
}

/// Bytes of memory of its own, and descriptors, of the agent that is let live.
fn held(stage: &Stage) -> Result<Option<(u64, usize)>> {
    let Some(pid) = stage.agents.pid(&stage::node(SPARED))? else {
        return Ok(None);
    };
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = status
        .lines()
        .find_map(|line| {
            line.strip_prefix("RssAnon:")?
                .trim()
                .strip_suffix("kB")?
                .trim()
                .parse::<u64>()
                .ok()
        })
        .context("a process has no RssAnon")?;
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd"))?.count();
    Ok(Some((kib * 1024, descriptors)))
}

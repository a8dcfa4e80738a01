//! One scenario, from a fresh cluster to a verdict.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::file::{Action, Config, NodePortAddresses, Scenario, Step, Verb};
use super::judge::Status;
use super::probing::{self, History};
use super::report::{ProbeReport, ScenarioReport};
use crate::agent::{AgentOptions, Agents};
use crate::api::client::Refused;
use crate::api::served::Served;
use crate::cluster::Cluster;
use crate::manifests::{self, Manifests};
use crate::process::Helper;
use crate::shape::{ExternalShape, Network, NodeShape, PodShape, Shape, parse_prefix};
use crate::worker::sctp;

/// What is the same for all scenarios of a run.
#[derive(Debug, Clone)]
pub struct RunOptions {
    pub network: Network,
    pub agent: AgentOptions,
    pub helper: Helper,
    /// The server that agents follow, if they read no folder.
    pub served: Option<Arc<Served>>,
    /// Where to keep the agents' logs.
    pub logs: Option<PathBuf>,
    /// Wait for Enter before a cluster is removed.
    pub hold: bool,
    /// Ask the agents about each cell of policy scenarios too.
    pub explain: bool,
}

/// Runs a scenario in a cluster called `name`. Whatever goes wrong is in the report.
pub fn run(scenario: &Scenario, name: &str, options: &RunOptions) -> ScenarioReport {
    let start = Instant::now();
    let mut report =
        ScenarioReport::without_probes(&scenario.id, &scenario.name, Status::Passed, String::new());
    report.reason = None;
    if probing::all_undefined(scenario) {
        report.status = Status::Skipped;
        report.reason = Some("every probe is undefined".to_owned());
        return report;
    }
    if probing::only_sctp(scenario) && !sctp::is_in_kernel() {
        report.status = Status::Skipped;
        report.reason = Some("the kernel lacks SCTP, and nothing else is probed".to_owned());
        return report;
    }
    let mut problems = Vec::new();
    let result = drive(scenario, name, options, &mut report.probes, &mut problems);
    let refused = Refused::or_problem(result, &mut problems);
    let failed = report
        .probes
        .iter()
        .filter(|probe| probe.status == Status::Failed)
        .count();
    let counted = report.probes.iter().any(|probe| probe.status == Status::Passed);
    if failed > 0 {
        problems.insert(0, format!("{failed} of {} probes failed", report.probes.len()));
    }
    if !problems.is_empty() {
        report.status = Status::Failed;
        report.reason = Some(problems.join("; "));
    } else if refused.is_some() {
        report.status = Status::Skipped;
        report.reason = refused;
    } else if !counted {
        report.status = Status::Skipped;
        report.reason = Some("no probe could be made with this kernel".to_owned());
    }
    report.seconds = start.elapsed().as_secs_f64();
    report
}

fn drive(
    scenario: &Scenario,
    name: &str,
    options: &RunOptions,
    probes: &mut Vec<ProbeReport>,
    problems: &mut Vec<String>,
) -> Result<()> {
    let shape = shape(scenario, options.network)?;
    let mut cluster = Cluster::build(name, shape, &options.helper).context("failed to build the cluster")?;
    for pod in &scenario.pods {
        for listen in &pod.listen {
            cluster.listen(&pod.name, listen.proto, listen.port)?;
        }
    }
    let folder = Manifests::create_in(&cluster.places().work, options.served.as_ref())?;
    write_objects(scenario, cluster.shape(), &folder)?;
    let mut agent = options.agent.clone();
    agent.flags.extend(flags(scenario));
    let mut agents = Agents::reading(&cluster, &folder, agent)?;
    let mut running = true;
    let mut history = History::default();
    let mut steps = || -> Result<()> {
        problems.extend(agents.settle());
        for (number, step) in scenario.steps.iter().enumerate() {
            let place = || format!("step {}", number + 1);
            let changed = act(step, &folder, &mut agents, &mut running).with_context(place)?;
            if running && changed {
                problems.extend(agents.settle());
            }
            probes.extend(probing::step(&mut cluster, scenario, number, &mut history).with_context(place)?);
        }
        problems.extend(agents.ended());
        Ok(())
    };
    let result = steps();
    let mut told = HashSet::new();
    problems.retain(|problem| told.insert(problem.clone()));
    keep_logs(options, &scenario.id, &agents)?;
    if options.hold {
        hold(cluster.places().id.as_str())?;
    }
    result
}

/// Applies a step's actions in order; whether the folder or the agents changed.
fn act(step: &Step, folder: &Manifests, agents: &mut Agents, running: &mut bool) -> Result<bool> {
    let mut changed = false;
    for Action {
        verb,
        object,
        seconds,
        note: _,
    } in &step.actions
    {
        let object = || object.as_ref().context("an action needs an object");
        changed |= *verb != Verb::Wait;
        match verb {
            Verb::Create | Verb::Update => folder.apply(object()?)?,
            Verb::Delete => folder.delete(object()?)?,
            Verb::Wait => {
                if *running && changed {
                    // Time counts from when the changes before it are in effect.
                    agents.settle();
                }
                sleep(Duration::from_secs_f64(seconds.unwrap_or_default()));
            }
            Verb::AgentStop => {
                agents.kill_all();
                *running = false;
            }
            Verb::AgentStart => {
                agents.start_all()?;
                *running = true;
            }
        }
    }
    Ok(changed)
}

/// Copies the agents' logs to where they are wanted, if anywhere.
pub fn keep_logs(options: &RunOptions, id: &str, agents: &Agents) -> Result<()> {
    let Some(dir) = &options.logs else { return Ok(()) };
    for (node, log) in agents.logs() {
        let kept = dir.join(format!("{id}-{node}.log"));
        std::fs::copy(log, &kept).with_context(|| format!("failed to keep {}", kept.display()))?;
    }
    Ok(())
}

/// Waits for Enter.
pub fn hold(id: &str) -> Result<()> {
    eprintln!("the cluster {id} is up: `ip netns list`, `ip netns exec {id}-node1 …`; Enter removes it");
    std::io::stdin()
        .read_line(&mut String::new())
        .context("failed to read the terminal")?;
    Ok(())
}

fn flags(scenario: &Scenario) -> Vec<String> {
    let Config {
        node_port_addresses,
        node_zone: _,
        agent_args,
    } = &scenario.config;
    let addresses = node_port_addresses.as_ref().map(|addresses| match addresses {
        NodePortAddresses::Word(_) => "primary".to_owned(),
        NodePortAddresses::Ranges(ranges) => ranges.join(","),
    });
    let addresses = addresses.map(|value| ["--node-port-addresses".to_owned(), value]);
    addresses
        .into_iter()
        .flatten()
        .chain(agent_args.iter().cloned())
        .collect()
}

/// The cluster that a scenario asks for.
pub fn shape(scenario: &Scenario, network: Network) -> Result<Shape> {
    let both = |ip: Option<IpAddr>, ip6: Option<IpAddr>| ip.into_iter().chain(ip6).collect::<Vec<_>>();
    Ok(Shape {
        nodes: scenario
            .nodes
            .iter()
            .map(|node| node_shape(node, &scenario.node_extra_ips))
            .collect::<Result<_>>()?,
        pods: scenario
            .pods
            .iter()
            .map(|pod| PodShape {
                name: pod.name.clone(),
                node: pod.node.clone(),
                addresses: both(pod.ip, pod.ip6),
                host_network: pod.host_network,
            })
            .collect(),
        externals: scenario
            .externals
            .iter()
            .map(|external| ExternalShape {
                name: external.name.clone(),
                addresses: both(external.ip, external.ip6),
            })
            .collect(),
        network,
    })
}

fn node_shape(node: &Value, extra: &BTreeMap<String, Vec<IpAddr>>) -> Result<NodeShape> {
    let name = node["metadata"]["name"]
        .as_str()
        .context("a node has no name")?
        .to_owned();
    let addresses = node["status"]["addresses"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    let internal = addresses.iter().filter(|address| address["type"] == "InternalIP");
    let cidrs = node["spec"]["podCIDRs"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    Ok(NodeShape {
        addresses: internal
            .filter_map(|address| address["address"].as_str())
            .map(|text| {
                text.parse()
                    .with_context(|| format!("{name}: {text} is no address"))
            })
            .collect::<Result<_>>()?,
        extra_addresses: extra.get(&name).cloned().unwrap_or_default(),
        pod_cidrs: cidrs
            .iter()
            .filter_map(Value::as_str)
            .map(parse_prefix)
            .collect::<Result<_>>()?,
        name,
    })
}

fn write_objects(scenario: &Scenario, shape: &Shape, folder: &Manifests) -> Result<()> {
    for node in &scenario.nodes {
        let mut node = node.clone();
        let name = node["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        if let Some(zone) = scenario.config.node_zone.get(&name) {
            set_zone(&mut node, zone.as_deref());
        }
        folder.apply(&node)?;
    }
    let mut namespaces: Vec<&str> = scenario
        .objects
        .iter()
        .filter_map(|o| o["metadata"]["namespace"].as_str())
        .collect();
    namespaces.sort_unstable();
    namespaces.dedup();
    for namespace in namespaces {
        let labels = json!({"kubernetes.io/metadata.name": namespace});
        let metadata = json!({"name": namespace, "labels": labels});
        folder.apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}))?;
    }
    for pod in &shape.pods {
        let host_ips = &shape.node(&pod.node)?.addresses;
        folder.apply(&manifests::pod(pod, pod_namespace(scenario, &pod.name), host_ips))?;
    }
    scenario
        .objects
        .iter()
        .try_for_each(|object| folder.apply(object))
}

fn set_zone(node: &mut Value, zone: Option<&str>) {
    const ZONE: &str = "topology.kubernetes.io/zone";
    if let Some(zone) = zone {
        node["metadata"]["labels"][ZONE] = json!(zone);
    } else if let Some(labels) = node["metadata"]["labels"].as_object_mut() {
        labels.remove(ZONE);
    }
}

/// The namespace that some endpoint says a pod is in.
fn pod_namespace<'a>(scenario: &'a Scenario, pod: &str) -> &'a str {
    let changed = scenario
        .steps
        .iter()
        .flat_map(|step| &step.actions)
        .filter_map(|action| action.object.as_ref());
    let endpoints = scenario
        .objects
        .iter()
        .chain(changed)
        .filter_map(|object| object["endpoints"].as_array())
        .flatten();
    let mut references = endpoints
        .map(|endpoint| &endpoint["targetRef"])
        .filter(|target| target["name"] == pod);
    references
        .find_map(|target| target["namespace"].as_str())
        .unwrap_or("ns1")
}

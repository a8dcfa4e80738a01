//! Makes the probes of a step and hands what they saw to the judge.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::thread;

use anyhow::{Context as _, Result, anyhow, bail};

use super::file::{FromKind, Outcome, Probe, Reference, Scenario};
use super::flows::Flows;
use super::judge::{Context, Judgement, Observation, Status, expected, judge};
use super::plan;
use super::report::ProbeReport;
use crate::cluster::Cluster;
use crate::shape::{Network, Shape, cluster_range, gateway_of};
use crate::worker::protocol::{Attempt, Proto, Request, Response};

/// What earlier probes of a scenario have seen.
#[derive(Debug, Default)]
pub struct History {
    flows: Flows,
    by_probe: HashMap<String, Vec<String>>,
    by_route: HashMap<(String, SocketAddr), Vec<String>>,
}

/// Makes all probes of a step, in groups, and reports them in the file's order.
pub fn step(
    cluster: &mut Cluster,
    scenario: &Scenario,
    number: usize,
    history: &mut History,
) -> Result<Vec<ProbeReport>> {
    let mut reports = Vec::new();
    for group in plan::groups(scenario, &scenario.steps[number].probes) {
        for probe in &group {
            if let Some(to) = plan::target(probe) {
                cluster
                    .set_route(&probe.from.name, to.ip(), probe.via_node.as_deref())
                    .with_context(|| format!("probe {}", probe.id))?;
            }
        }
        let observations = match group.as_slice() {
            [probe] => vec![alone(cluster, probe, history)],
            probes => side_by_side(cluster, probes, history),
        };
        for (probe, observation) in group.iter().zip(observations) {
            reports.push(report(cluster.shape(), probe, number + 1, &observation, history));
        }
    }
    Ok(reports)
}

fn alone(cluster: &Cluster, probe: &Probe, history: &mut History) -> Result<Observation> {
    match &probe.flow {
        Some(name) => history.flows.probe(cluster, name, probe),
        None => observe(cluster, probe, history),
    }
}

fn side_by_side(cluster: &Cluster, probes: &[&Probe], history: &History) -> Vec<Result<Observation>> {
    thread::scope(|scope| {
        let threads: Vec<_> = probes
            .iter()
            .map(|probe| scope.spawn(move || observe(cluster, probe, history)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| Err(anyhow!("a probe panicked"))))
            .collect()
    })
}

/// One probe that is not a flow.
fn observe(cluster: &Cluster, probe: &Probe, history: &History) -> Result<Observation> {
    let worker = cluster.worker(&probe.from.name)?;
    if let Some(url) = &probe.http_get {
        let (to, path) =
            plan::parse_url(url).with_context(|| format!("{url} is not an address to fetch from"))?;
        let timeout = plan::timeout(probe);
        let timeout_ms = u64::try_from(timeout.as_millis())?;
        return match worker.call(Request::HttpGet { to, path, timeout_ms }, timeout * 4)? {
            Response::Http { status, body } => Ok(Observation::Http { status, body }),
            Response::Attempts(attempts) => Ok(Observation::Attempts(attempts)),
            other => bail!("unexpected answer {other:?}"),
        };
    }
    let to = probe.to.context("a probe needs a destination")?;
    let request = plan::request(
        cluster.shape(),
        probe,
        to,
        history
            .before(probe)
            .and_then(|backends| backends.last().cloned()),
    );
    let bound = plan::bound(&request);
    match worker.call(Request::Probe(request), bound)? {
        Response::Attempts(attempts) => Ok(Observation::Attempts(attempts)),
        other => bail!("unexpected answer {other:?}"),
    }
}

impl History {
    /// What the same client saw at the same destination before.
    fn before(&self, probe: &Probe) -> Option<&Vec<String>> {
        self.by_route
            .get(&(probe.from.name.clone(), plan::target(probe)?))
    }

    /// The backends a probe must stay on.
    fn reference(&self, probe: &Probe) -> Option<Vec<String>> {
        match probe.must_equal_backend.as_ref()? {
            Reference::Previous(false) => None,
            Reference::Previous(true) => Some(self.before(probe).cloned().unwrap_or_default()),
            Reference::Named(name) => Some(
                self.by_probe
                    .get(name)
                    .cloned()
                    .unwrap_or_else(|| vec![name.clone()]),
            ),
        }
    }

    fn note(&mut self, probe: &Probe, observation: &Observation) {
        let Observation::Attempts(attempts) = observation else {
            return;
        };
        let mut backends: Vec<String> = Vec::new();
        for backend in attempts.iter().filter_map(Attempt::backend) {
            backends.retain(|other| *other != backend);
            backends.push(backend);
        }
        if let (Some(to), false) = (plan::target(probe), backends.is_empty()) {
            self.by_route
                .insert((probe.from.name.clone(), to), backends.clone());
        }
        self.by_probe.insert(probe.id.clone(), backends);
    }
}

fn report(
    shape: &Shape,
    probe: &Probe,
    step: usize,
    observation: &Result<Observation>,
    history: &mut History,
) -> ProbeReport {
    let context = context(shape, probe, history);
    let Judgement { status, seen, note } = match observation {
        Ok(observation) => judge(&probe.expect, &context, observation),
        Err(error) => Judgement {
            status: if probe.counts() {
                Status::Failed
            } else {
                Status::Undefined
            },
            seen: format!("{error:#}"),
            note: None,
        },
    };
    if let Ok(observation) = observation {
        history.note(probe, observation);
    }
    let to = probe.to.map_or_else(
        || probe.http_get.clone().unwrap_or_default(),
        |to| format!("{} {}", to.addr(), format!("{:?}", to.proto).to_lowercase()),
    );
    let via = probe
        .via_node
        .as_ref()
        .map_or_else(String::new, |node| format!(" via {node}"));
    ProbeReport {
        id: probe.id.clone(),
        step,
        status,
        expected: expected(&probe.expect, &context),
        seen,
        route: format!("{} -> {to}{via}", probe.from.name),
        note,
    }
}

fn context(shape: &Shape, probe: &Probe, history: &History) -> Context {
    let name = &probe.from.name;
    let pod = shape.pods.iter().find(|pod| pod.name == *name);
    let on_host = probe.from.kind == FromKind::Node || pod.is_some_and(|pod| pod.host_network);
    let mut client_ips = shape.addresses_of(name);
    if on_host && let Some(node) = shape.node_of(name).and_then(|node| shape.node(node).ok()) {
        // A host process leaves by any device of its node.
        client_ips.extend(node.addresses.iter().chain(&node.extra_addresses));
        client_ips.extend(node.pod_cidrs.iter().map(|cidr| gateway_of(cidr.0)));
    }
    let ranges = || {
        shape
            .nodes
            .iter()
            .flat_map(|node| &node.pod_cidrs)
            .map(|cidr| cluster_range(*cidr))
            .collect()
    };
    let masquerades = shape.network == Network::Vxlan && pod.is_some() && !on_host;
    Context {
        client: name.clone(),
        client_ips,
        masqueraded_outside: masquerades.then(ranges),
        min_share: probe.min_share,
        must_equal: history.reference(probe),
        must_change: plan::until_change(probe)
            .then(|| history.before(probe).and_then(|seen| seen.last().cloned())),
    }
}

/// Whether nothing but SCTP decides about a scenario.
pub fn only_sctp(scenario: &Scenario) -> bool {
    let is_sctp = |probe: &Probe| probe.to.is_some_and(|to| to.proto == Proto::Sctp);
    scenario.probes().filter(|probe| probe.counts()).all(is_sctp)
}

/// Whether no probe decides about a scenario.
pub fn all_undefined(scenario: &Scenario) -> bool {
    scenario
        .probes()
        .all(|probe| !probe.counts() || probe.expect.outcome == Outcome::Undefined)
}

//! A cluster with its agents that serves one case after the other: each finds the objects of its own and no others, and
//! probes from source ports that no case before had.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;

use super::file::Pod;
use super::layout::{Layout, Needs, listening, member, pod_shape};
use crate::agent::Agents;
use crate::cluster::Cluster;
use crate::manifests::Manifests;
use crate::scenario::run::RunOptions;
use crate::worker::PORTS;
use crate::worker::protocol::{Attempt, Proto, Request, Response, Sweep, Swept, Target};

/// What no answer has come from for this long, and for as long as all expected answers took, is denied. The kernel sends
/// its second SYN after a second, so one SYN decides.
const SILENCE: Duration = Duration::from_millis(400);
/// How long a try may take where an answer is expected.
const PATIENCE: Duration = Duration::from_millis(1500);
/// How often a target that should answer is tried.
const TRIES: u32 = 4;
const CALL: Duration = Duration::from_secs(30);

/// A cluster, its agents and the folder they read.
#[derive(Debug)]
pub struct Bed {
    agents: Agents,
    folder: Manifests,
    cluster: Cluster,
    needs: Needs,
    next_port: u16,
    explains: bool,
    /// How many cases were begun here.
    pub cases: usize,
    /// Whether a case has changed the cluster itself.
    pub is_changed: bool,
}

/// What one member tries: the cell's number and the target.
pub type Tries = BTreeMap<String, Vec<(usize, Target)>>;

/// What agents say of a flow.
#[derive(Debug)]
pub struct Said {
    pub allowed: bool,
    pub reasons: Vec<String>,
}

/// What arrived at each member: protocol, port and client.
pub type Arrivals = BTreeMap<String, BTreeSet<(Proto, u16, SocketAddr)>>;

impl Bed {
    /// Builds a cluster and starts agents that find these objects.
    pub fn build(name: &str, needs: Needs, objects: &[Value], options: &RunOptions) -> Result<Self> {
        let mut cluster = Cluster::build(name, needs.shape.clone(), &options.helper)
            .context("failed to build the cluster")?;
        cluster.route_pods()?;
        for (member, ports) in &needs.ports {
            listen(&cluster, member, ports)?;
        }
        let folder = Manifests::create_in(&cluster.places().work, options.served.as_ref())?;
        folder.replace(objects)?;
        let agents = Agents::reading(&cluster, &folder, options.agent.clone())?;
        Ok(Self {
            agents,
            folder,
            cluster,
            needs,
            next_port: *PORTS.start(),
            explains: options.explain,
            cases: 0,
            is_changed: false,
        })
    }

    /// Whether a case that needs this can run here.
    pub fn serves(&self, needs: &Needs) -> bool {
        !self.is_changed && self.needs.shape == needs.shape
    }

    /// Begins a case that this serves: its objects and no others, and everybody listens where the case says.
    pub fn begin(&mut self, needs: &Needs, objects: &[Value]) -> Result<()> {
        self.cases += 1;
        for (member, ports) in &needs.ports {
            let listening = self.needs.ports.entry(member.clone()).or_default();
            let missing: BTreeSet<_> = ports.difference(listening).copied().collect();
            listen(&self.cluster, member, &missing)?;
            listening.extend(missing);
        }
        self.folder.replace(objects)
    }

    pub fn folder(&self) -> &Manifests {
        &self.folder
    }

    pub fn id(&self) -> &str {
        &self.cluster.places().id
    }

    /// Agents' log files by node.
    pub fn agents(&mut self) -> &mut Agents {
        &mut self.agents
    }

    /// Whether agents are asked what they would do.
    pub fn explains(&self) -> bool {
        self.explains
    }

    /// What the agents of two members say of a flow between their addresses; `None` where neither is a pod.
    pub fn explain(
        &self,
        from: &(String, IpAddr),
        to: &(String, IpAddr),
        (proto, port): (Proto, u16),
    ) -> Result<Option<Said>> {
        let shape = self.cluster.shape();
        let nodes: BTreeSet<&str> = [from, to]
            .iter()
            .filter_map(|(member, _)| shape.node_of(member))
            .collect();
        let mut said = Said {
            allowed: true,
            reasons: Vec::new(),
        };
        let proto = format!("{proto:?}").to_uppercase();
        let path = format!("/explain?from={}&to={}&port={port}/{proto}", from.1, to.1);
        for node in &nodes {
            let answer = self.agents.ask(node, &path)?;
            let flows = answer["flows"].as_array().filter(|flows| flows.len() == 1);
            let flow = &flows.with_context(|| format!("{path} of {node}: {answer}"))?[0];
            said.allowed &= flow["allowed"] == true;
            let steps = flow["steps"].as_array().into_iter().flatten();
            said.reasons.extend(steps.map(|step| {
                let (direction, reason) = (&step["direction"], &step["reason"]);
                format!("{node}, {direction}: {reason}")
            }));
        }
        Ok((!nodes.is_empty()).then_some(said))
    }

    /// Starts a pod that was not there when the cluster was built.
    pub fn create_pod(&mut self, pod: &Pod, layout: &Layout) -> Result<()> {
        self.is_changed = true;
        let shape = pod_shape(pod, layout)?;
        let name = shape.name.clone();
        self.cluster.add_pod(shape)?;
        listen(&self.cluster, &name, &listening(&pod.ports))
    }

    /// Ends a pod.
    pub fn delete_pod(&mut self, id: &str) -> Result<()> {
        self.is_changed = true;
        self.cluster.remove_pod(&member(id))
    }

    /// Tries everything at once. Where the machine is slow, targets that must not answer are listened to once more, for longer
    /// than any answer took. By number, what became of each; and what arrived, whoever was answered.
    pub fn sweep(&mut self, tries: &Tries) -> Result<(BTreeMap<usize, Swept>, Arrivals)> {
        self.arrivals()?;
        let mut swept = self.try_all(tries, SILENCE)?;
        let slowest = swept
            .values()
            .filter_map(|swept| answer_time(&swept.attempt))
            .max();
        let needed = slowest.unwrap_or_default() * 4;
        if needed > SILENCE {
            let mut again = tries.clone();
            for targets in again.values_mut() {
                targets.retain(|(number, target)| {
                    !target.answers && !swept.get(number).is_some_and(|swept| swept.reached)
                });
            }
            again.retain(|_, targets| !targets.is_empty());
            for (number, mut later) in self.try_all(&again, needed.min(PATIENCE * 2))? {
                if let Some(earlier) = swept.remove(&number) {
                    later.sources.extend(earlier.sources);
                    later.tries += earlier.tries;
                }
                swept.insert(number, later);
            }
        }
        Ok((swept, self.arrivals()?))
    }

    fn try_all(&mut self, tries: &Tries, silence: Duration) -> Result<BTreeMap<usize, Swept>> {
        let longest = tries.values().map(Vec::len).max().unwrap_or_default();
        let first_port = self.take_ports(longest);
        let cluster = &self.cluster;
        thread::scope(|scope| {
            let calls: Vec<_> = tries
                .iter()
                .map(|(member, targets)| {
                    scope.spawn(move || call(cluster, member, targets, (first_port, silence)))
                })
                .collect();
            let mut swept = BTreeMap::new();
            for call in calls {
                swept.extend(call.join().unwrap_or_else(|_| Err(anyhow!("a sweep panicked")))?);
            }
            Ok(swept)
        })
    }

    /// Source ports for so many tries of each member, and for some that are tried again.
    fn take_ports(&mut self, tries: usize) -> u16 {
        let wanted = u16::try_from(tries + tries / 2 + 16).unwrap_or(u16::MAX);
        if PORTS.end() - self.next_port < wanted {
            self.next_port = *PORTS.start();
        }
        let first = self.next_port;
        self.next_port = first.saturating_add(wanted).min(*PORTS.end());
        first
    }

    fn arrivals(&self) -> Result<Arrivals> {
        let shape = self.cluster.shape();
        let pods = shape.pods.iter().map(|pod| &pod.name);
        let members = pods.chain(shape.externals.iter().map(|external| &external.name));
        members
            .map(
                |member| match self.cluster.worker(member)?.call(Request::Arrivals, CALL)? {
                    Response::Arrivals(seen) => Ok((member.clone(), seen.into_iter().collect())),
                    other => bail!("unexpected answer {other:?}"),
                },
            )
            .collect()
    }
}

fn listen(cluster: &Cluster, member: &str, ports: &BTreeSet<(Proto, u16)>) -> Result<()> {
    ports
        .iter()
        .try_for_each(|(proto, port)| cluster.listen(member, *proto, *port))
}

fn call(
    cluster: &Cluster,
    member: &str,
    targets: &[(usize, Target)],
    (first_port, silence): (u16, Duration),
) -> Result<Vec<(usize, Swept)>> {
    let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let request = Request::Sweep(Sweep {
        targets: targets.iter().map(|(_, target)| *target).collect(),
        first_port,
        silence_ms: millis(silence),
        patience_ms: millis(PATIENCE),
        tries: TRIES,
    });
    match cluster.worker(member)?.call(request, CALL + PATIENCE * TRIES)? {
        Response::Swept(swept) => Ok(targets.iter().map(|(number, _)| *number).zip(swept).collect()),
        other => bail!("unexpected answer {other:?}"),
    }
}

fn answer_time(attempt: &Attempt) -> Option<Duration> {
    match attempt {
        Attempt::Answered { ms, .. } => Some(Duration::from_millis(*ms)),
        _ => None,
    }
}

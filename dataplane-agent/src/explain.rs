//! What the policies of a cluster say of a flow, and why: the tables are compiled for its two ends and asked, as the
//! datapath asks them.

mod ends;

use std::{collections::BTreeSet, net::IpAddr};

use dataplane_common::addr::proto;
use serde::Serialize;

pub use ends::{End, Error, Port};

use ends::{Found, Target};

use crate::{
    compile::policy::{
        PodPolicy, PolicyCompiler, Subjects,
        sets::SetId,
        tables::{Tables, judge},
    },
    model::{Index, Kind, Name, ObjectRef, Pod, PolicyDirty, Problem, policy::Direction},
};

/// The answer for one pair of addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Explained {
    pub from: Place,
    pub to: Place,
    /// Of the target.
    pub port: String,
    /// The Service whose endpoint the target is, if one is asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    pub allowed: bool,
    pub steps: Vec<Step>,
}

/// An end of a flow, as it was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Place {
    pub ip: IpAddr,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
}

/// What is decided at one end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Step {
    /// `egress` of the source or `ingress` of the target.
    pub direction: &'static str,
    pub at: Place,
    pub allowed: bool,
    /// The rule that decided; absent when none did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<Decision>,
    pub reason: String,
    /// What would be decided if no policy were a dry run, where that is something else.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dry_run: Option<String>,
    /// The policies that have a say about the pod in this direction, first those of higher precedence.
    pub selected_by: Vec<String>,
}

/// A rule of a policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Decision {
    /// `kind namespace/name`.
    pub policy: String,
    pub tier: String,
    /// Where the rule stands, such as `spec.ingress[0]`.
    pub field: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    pub action: &'static str,
}

/// Judges a flow by all policies of the index: for Pods with two addresses in both families, and for a Service with each
/// of its endpoints.
pub fn explain(index: &Index, from: &End, to: &End, port: Port) -> Result<Vec<Explained>, Error> {
    let from = ends::sources(index, from)?;
    let client = from.iter().find_map(|(_, pod)| *pod);
    let to = ends::targets(index, to, port, client)?;
    let found = from.iter().chain(to.iter().map(|target| &target.found));
    let pods = found.filter_map(|(_, pod)| Some(pod.as_ref()?.name.clone()));
    let mut compiler = PolicyCompiler::new(Subjects::These(pods.collect()));
    compiler.update(index, &everything(index));
    let judge = Judge {
        index,
        tables: Tables::of(&compiler),
        compiler: &compiler,
    };
    let pairs = from.iter().flat_map(|from| to.iter().map(move |to| (*from, to)));
    let pairs = pairs.filter(|((from, _), to)| from.is_ipv4() == to.found.0.is_ipv4());
    let explained: Vec<Explained> = pairs.map(|(from, to)| judge.flow(from, to)).collect();
    if explained.is_empty() {
        return Err(Error::Families);
    }
    Ok(explained)
}

fn everything(index: &Index) -> PolicyDirty {
    PolicyDirty {
        policies: index.policies().keys().cloned().collect(),
        pods: index.pods().map(|pod| pod.name.clone()).collect(),
        namespaces: BTreeSet::new(),
        nodes: index.nodes().map(|node| node.name.clone()).collect(),
    }
}

struct Judge<'a> {
    index: &'a Index,
    compiler: &'a PolicyCompiler,
    tables: Tables,
}

impl Judge<'_> {
    fn flow(&self, from: Found<'_>, target: &Target<'_>) -> Explained {
        let to = target.found;
        let steps = [(Direction::Egress, from, to), (Direction::Ingress, to, from)];
        let steps: Vec<Step> = steps
            .into_iter()
            .filter_map(|(direction, (ip, pod), peer)| {
                Some(self.step(direction, ip, pod?, peer, target.port))
            })
            .collect();
        Explained {
            from: place(from),
            to: place(to),
            port: target.port.to_string(),
            service: target.via.map(ToString::to_string),
            allowed: steps.iter().all(|step| step.allowed),
            steps,
        }
    }

    fn step(
        &self,
        direction: Direction,
        ip: IpAddr,
        pod: &Pod,
        (peer, other): Found<'_>,
        port: Port,
    ) -> Step {
        let step = |allowed, rule, reason: &str| Step {
            direction: direction.as_str(),
            at: place((ip, Some(pod))),
            allowed,
            rule,
            reason: reason.to_owned(),
            dry_run: None,
            selected_by: Vec::new(),
        };
        if pod.host_network {
            return step(true, None, "it has its node's network: policies are not about it");
        }
        if other.is_some_and(|other| other.name == pod.name) {
            return step(true, None, "a Pod always reaches itself");
        }
        let own_node = pod
            .node
            .as_deref()
            .and_then(|node| self.index.node_by_name(&Name::new("", node)));
        if direction == Direction::Ingress && own_node.is_some_and(|node| node.ips.contains(&peer)) {
            return step(true, None, "its own node always reaches it");
        }
        let number = match (port.proto, peer) {
            (Some(proto), _) => proto.number(),
            (None, IpAddr::V4(_)) => proto::ICMP,
            (None, IpAddr::V6(_)) => proto::ICMPV6,
        };
        let flow = (peer, number, port.number);
        let none = PodPolicy::default();
        let of_pod = self.compiler.pods().get(&pod.name).unwrap_or(&none);
        let policies = &of_pod.policies[direction as usize];
        let namespace = self.index.namespace(pod.name.namespace());
        let is_dry_run = |key: &&ObjectRef| {
            let policy = self.index.policies().get(key);
            policy.is_some_and(|policy| policy.is_dry_run(namespace))
        };
        let in_earnest: Vec<&ObjectRef> = policies.iter().filter(|key| !is_dry_run(key)).collect();
        let problem = of_pod.problems.first();
        let (allowed, rule, reason) = self.verdict(
            direction,
            of_pod.sets[direction as usize],
            flow,
            &in_earnest,
            problem,
        );
        let all: Vec<&ObjectRef> = policies.iter().collect();
        let audit = self.verdict(direction, of_pod.audit[direction as usize], flow, &all, problem);
        let describe = |key: &ObjectRef| {
            let suffix = if is_dry_run(&key) { " (dry run)" } else { "" };
            format!("{key}{suffix}")
        };
        Step {
            selected_by: policies.iter().map(describe).collect(),
            dry_run: (audit.0 != allowed).then(|| {
                let verdict = if audit.0 { "allowed" } else { "denied" };
                format!("{verdict}: {}", audit.2)
            }),
            ..step(allowed, rule, &reason)
        }
    }

    /// What a set says of a flow with a peer, a protocol and a port, and why; `policies`: those that made the set.
    fn verdict(
        &self,
        direction: Direction,
        set: SetId,
        (peer, proto, port): (IpAddr, u8, u16),
        policies: &[&ObjectRef],
        problem: Option<&Problem>,
    ) -> (bool, Option<Decision>, String) {
        let judgement = judge(&self.tables, set, peer, proto, port);
        let rule = judgement.rule().and_then(|rule| self.decision(direction, rule));
        let isolated = policies.iter().any(|policy| policy.kind == Kind::NetworkPolicy);
        let reason = match (&rule, judgement.is_allowed()) {
            (Some(rule), _) => format!("{} {} of {}: {}", rule.tier, rule.field, rule.policy, rule.action),
            (None, true) if policies.is_empty() => "no policy selects it in this direction".to_owned(),
            (None, true) => "no rule decides, and no NetworkPolicy selects it in this direction".to_owned(),
            (None, false) => match problem {
                Some(problem) => problem.reason.clone(),
                None if isolated => {
                    "a NetworkPolicy selects it in this direction, and no rule allows this".to_owned()
                }
                None => "its policies cannot be honoured".to_owned(),
            },
        };
        (judgement.is_allowed(), rule, reason)
    }

    fn decision(&self, direction: Direction, rule: u32) -> Option<Decision> {
        let row = self.tables.rules.get(rule as usize)?;
        let policy = self
            .index
            .policies()
            .get(self.tables.policies.get(row.policy as usize)?)?;
        let mut rules = policy.rules(direction)?.iter();
        let rule = rules.find(|rule| rule.place == row.place)?;
        Some(Decision {
            policy: policy.key.to_string(),
            tier: policy.tier.to_string(),
            field: format!("spec.{}[{}]", direction.as_str(), rule.place),
            name: rule.name.to_string(),
            action: rule.action.label(),
        })
    }
}

fn place((ip, pod): Found<'_>) -> Place {
    Place {
        ip,
        pod: pod.map(|pod| pod.name.to_string()),
    }
}

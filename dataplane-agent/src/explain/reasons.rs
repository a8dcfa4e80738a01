//! Verdicts in words.

use std::net::IpAddr;

use super::{Decision, Place, Step};
use crate::{
    compile::policy::PolicyCompiler,
    model::{
        Index, Kind, Name, ObjectRef, Pod, Policy, Problem, Protocol,
        policy::{Direction, PortMatch},
    },
};

pub const NOT_SELECTED: &str = "no policy selects it in this direction";
pub const NO_RULE: &str = "no rule decides, and no NetworkPolicy selects it in this direction";
pub const ISOLATED: &str = "a NetworkPolicy selects it in this direction, and no rule allows this";
pub const CLOSED: &str = "its policies cannot be honoured";
pub const ITSELF: &str = "a Pod always reaches itself";
pub const OWN_NODE: &str = "its own node always reaches it";

impl Step {
    /// No policy is about it.
    pub(super) fn exempt(direction: Direction, at: Place, reason: &str) -> Self {
        Self {
            direction: direction.as_str().into(),
            at,
            allowed: true,
            rule: None,
            reason: reason.to_owned(),
            dry_run: None,
            selected_by: Vec::new(),
        }
    }
}

impl Decision {
    /// A rule of a policy, by its place.
    pub(super) fn of(index: &Index, policy: &ObjectRef, direction: Direction, place: u32) -> Option<Self> {
        let policy = index.policies().get(policy)?;
        let mut rules = policy.rules(direction)?.iter();
        let rule = rules.find(|rule| rule.place == place)?;
        Some(Self {
            policy: policy.key.to_string(),
            tier: policy.tier.to_string(),
            field: field(direction, rule.place),
            name: rule.name.to_string(),
            action: rule.action.label().into(),
        })
    }

    pub(super) fn reason(&self) -> String {
        format!("{} {} of {}: {}", self.tier, self.field, self.policy, self.action)
    }
}

/// Where a rule stands in its policy.
pub fn field(direction: Direction, place: u32) -> String {
    format!("spec.{}[{place}]", direction.as_str())
}

/// Why no policy is about what goes between a Pod and a peer, if so.
pub fn exempt(
    index: &Index,
    pod: &Pod,
    direction: Direction,
    peer: IpAddr,
    other: Option<&Name>,
) -> Option<&'static str> {
    if pod.host_network {
        return Some("it has its node's network: policies are not about it");
    }
    if other == Some(&pod.name) {
        return Some(ITSELF);
    }
    let own_node = pod
        .node
        .as_deref()
        .and_then(|node| index.node_by_name(&Name::new("", node)));
    let from_node = direction == Direction::Ingress && own_node.is_some_and(|node| node.ips.contains(&peer));
    from_node.then_some(OWN_NODE)
}

/// The policies that have a say about a Pod in a direction.
#[derive(Debug)]
pub struct Selection<'a> {
    direction: Direction,
    policies: Vec<Selecting<'a>>,
    problem: Option<&'a Problem>,
    /// Why nothing is allowed, if something of the policies cannot be written.
    closed: Option<&'a str>,
}

/// One of them.
#[derive(Debug)]
struct Selecting<'a> {
    policy: &'a ObjectRef,
    is_dry_run: bool,
    /// Why one of its rules allows nothing at the Pod, if so.
    portless: Option<String>,
}

impl Selecting<'_> {
    fn isolates(&self) -> bool {
        self.policy.kind == Kind::NetworkPolicy
    }
}

impl<'a> Selection<'a> {
    pub fn of(index: &Index, compiler: &'a PolicyCompiler, pod: &Name, direction: Direction) -> Self {
        let of_pod = compiler.pods().get(pod);
        let policies = of_pod.map_or(&[][..], |of_pod| &of_pod.policies[direction as usize]);
        let namespace = index.namespace(pod.namespace());
        let pod = index.pod(pod);
        let selecting = |key| {
            let policy = index.policies().get(key);
            Selecting {
                policy: key,
                is_dry_run: policy.is_some_and(|policy| policy.is_dry_run(namespace)),
                portless: policy
                    .zip(pod)
                    .and_then(|(policy, pod)| portless(policy, pod, direction)),
            }
        };
        Self {
            direction,
            policies: policies.iter().map(selecting).collect(),
            problem: of_pod.and_then(|of_pod| of_pod.problems.first()),
            closed: None,
        }
    }

    /// The same of tables that lack something of these policies.
    pub fn closed(self, closed: Option<&'a str>) -> Self {
        Self { closed, ..self }
    }

    /// A verdict and the rule that gave it; `dry_run`: what it would be if no policy were one, where that is something else.
    pub fn step(
        &self,
        at: Place,
        allowed: bool,
        rule: Option<Decision>,
        dry_run: Option<(bool, Option<Decision>)>,
    ) -> Step {
        let describe = |one: &Selecting<'_>| {
            let suffix = if one.is_dry_run { " (dry run)" } else { "" };
            format!("{}{suffix}", one.policy)
        };
        Step {
            direction: self.direction.as_str().into(),
            at,
            allowed,
            reason: self.reason(allowed, rule.as_ref(), false),
            rule,
            dry_run: dry_run.map(|(allowed, rule)| {
                let verdict = if allowed { "allowed" } else { "denied" };
                format!("{verdict}: {}", self.reason(allowed, rule.as_ref(), true))
            }),
            selected_by: self.policies.iter().map(describe).collect(),
        }
    }

    /// `all`: as if no policy were a dry run.
    fn reason(&self, allowed: bool, rule: Option<&Decision>, all: bool) -> String {
        let in_force = || self.policies.iter().filter(|one| all || !one.is_dry_run);
        let isolated = in_force().any(Selecting::isolates);
        match (rule, allowed) {
            (Some(rule), _) => rule.reason(),
            (None, true) if in_force().next().is_none() => NOT_SELECTED.to_owned(),
            (None, true) => NO_RULE.to_owned(),
            (None, false) => match (self.problem, self.closed) {
                (Some(problem), _) => problem.reason.clone(),
                (None, Some(closed)) if !all => format!("{CLOSED}: {closed}"),
                (None, _) if isolated => {
                    let portless = in_force().filter_map(|one| one.portless.as_deref());
                    let parts: Vec<&str> = [ISOLATED].into_iter().chain(portless).collect();
                    parts.join("; ")
                }
                (None, _) => CLOSED.to_owned(),
            },
        }
    }
}

/// That a rule for ingress of a `NetworkPolicy` names a port which no container of the Pod has, so that it allows nothing there.
fn portless(policy: &Policy, pod: &Pod, direction: Direction) -> Option<String> {
    if direction != Direction::Ingress || policy.key.kind != Kind::NetworkPolicy {
        return None;
    }
    let has = |proto: Option<Protocol>, name: &str| {
        let mut ports = pod.ports.iter();
        ports.any(|port| *port.name == *name && proto.is_none_or(|proto| proto == port.proto))
    };
    policy.rules(direction)?.iter().find_map(|rule| {
        let mut ports = rule.ports.iter().flatten();
        let missing = ports.find_map(|port| match port {
            PortMatch::Named(proto, name) if !has(*proto, name) => Some((proto, name)),
            _ => None,
        });
        let (proto, name) = missing?;
        let proto = proto.map_or_else(String::new, |proto| format!(" ({})", proto.as_str()));
        Some(format!(
            "no container port of {} is called `{name}`{proto}, as {} of {} has it",
            pod.name,
            field(direction, rule.place),
            policy.key,
        ))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::{explain, samples};

    #[test]
    fn a_policys_port_that_no_container_has_is_the_reason() {
        let said = |port: &str| {
            let index = samples::index(&[
                json!({
                    "apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": "shop", "name": "web"},
                    "spec": {"nodeName": "n1", "containers": [
                        {"name": "c", "ports": [{"name": "http", "containerPort": 80}]},
                    ]},
                    "status": {"phase": "Running", "podIPs": [{"ip": "10.244.1.21"}]},
                }),
                json!({
                    "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
                    "metadata": {"namespace": "shop", "name": "web"},
                    "spec": {"podSelector": {}, "ingress": [{"ports": [{"port": port}]}]},
                }),
            ]);
            let end = |text: &str| text.parse().unwrap();
            let flows = explain(
                &index,
                &end("203.0.113.10"),
                &end("shop/web"),
                "81".parse().unwrap(),
            );
            flows.unwrap().remove(0).steps.remove(0).reason
        };
        let isolated = super::ISOLATED;
        assert_eq!(said("http"), isolated);
        assert_eq!(
            said("htpp"),
            format!(
                "{isolated}; no container port of shop/web is called `htpp` (TCP), as spec.ingress[0] of NetworkPolicy shop/web has it"
            )
        );
    }
}

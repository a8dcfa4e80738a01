//! Verdicts in words.

use std::net::IpAddr;

use super::{Decision, Place, Step};
use crate::{
    compile::policy::PolicyCompiler,
    model::{Index, Kind, Name, ObjectRef, Pod, Problem, policy::Direction},
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
            field: format!("spec.{}[{}]", direction.as_str(), rule.place),
            name: rule.name.to_string(),
            action: rule.action.label().into(),
        })
    }

    pub(super) fn reason(&self) -> String {
        format!("{} {} of {}: {}", self.tier, self.field, self.policy, self.action)
    }
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
    /// With whether it is a dry run.
    policies: Vec<(&'a ObjectRef, bool)>,
    problem: Option<&'a Problem>,
    /// Why nothing is allowed, if something of the policies cannot be written.
    closed: Option<&'a str>,
}

impl<'a> Selection<'a> {
    pub fn of(index: &Index, compiler: &'a PolicyCompiler, pod: &Name, direction: Direction) -> Self {
        let of_pod = compiler.pods().get(pod);
        let policies = of_pod.map_or(&[][..], |of_pod| &of_pod.policies[direction as usize]);
        let namespace = index.namespace(pod.namespace());
        let is_dry_run = |key: &ObjectRef| {
            let policy = index.policies().get(key);
            policy.is_some_and(|policy| policy.is_dry_run(namespace))
        };
        Self {
            direction,
            policies: policies.iter().map(|key| (key, is_dry_run(key))).collect(),
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
        let describe = |(key, is_dry_run): &(&ObjectRef, bool)| {
            let suffix = if *is_dry_run { " (dry run)" } else { "" };
            format!("{key}{suffix}")
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
        let mut policies = self.policies.iter().filter(|(_, is_dry_run)| all || !is_dry_run);
        let is_selected = policies.clone().next().is_some();
        let isolated = policies.any(|(policy, _)| policy.kind == Kind::NetworkPolicy);
        match (rule, allowed) {
            (Some(rule), _) => rule.reason(),
            (None, true) if !is_selected => NOT_SELECTED.to_owned(),
            (None, true) => NO_RULE.to_owned(),
            (None, false) => match (self.problem, self.closed) {
                (Some(problem), _) => problem.reason.clone(),
                (None, Some(closed)) if !all => format!("{CLOSED}: {closed}"),
                (None, _) if isolated => ISOLATED.to_owned(),
                (None, _) => CLOSED.to_owned(),
            },
        }
    }
}

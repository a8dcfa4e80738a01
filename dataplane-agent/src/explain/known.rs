//! What is known beside the tables: who is behind which interface, and whose rules these are. An agent knows names; without one,
//! the tables are all there is ([`Unnamed`](super::unnamed::Unnamed)).

use std::{collections::BTreeMap, fmt, iter, net::SocketAddr};

use dataplane_common::{
    policy::{NO_RULE_INDEX, VerdictEvent},
    reason::Reason,
};

use super::{
    Decision, Elsewhere, Step,
    ends::Found,
    place,
    reasons::{self, Selection},
};
use crate::{
    bpf::world::World,
    compile::{Compiler, FrontendAddr, policy::PolicyCompiler},
    model::{Cause, Index, Name, ObjectRef, Protocol, policy::Direction},
    served,
    sync::{
        Failure, Subject,
        policy::{self, PolicySyncer},
    },
};

/// Who knows.
pub trait Known: fmt::Debug {
    /// The interface of an end that is a Pod of this node.
    fn interface(&self, world: &World, end: Found<'_>) -> Option<u32>;

    /// Who is served at an address and port of the tables.
    fn holder(&self, at: SocketAddr, proto: Protocol) -> Option<ObjectRef>;

    /// What keeps a Service from being served, wholly or in part; first what is about an address and port, if that is asked for.
    fn problems(&self, service: &Name, asked: Option<(SocketAddr, Protocol)>) -> Vec<String>;

    /// What of a frontend of the tables has found no room in them.
    fn unwritten(&self, at: SocketAddr, proto: Protocol) -> Option<String>;

    /// What was decided at the first of these ends, of what goes between them.
    fn decided(
        &self,
        world: &World,
        direction: Direction,
        ends: (Found<'_>, Found<'_>),
        told: Told<'_>,
    ) -> Decided;
}

/// Of one end.
#[derive(Debug)]
pub enum Decided {
    Here(Box<Step>),
    Elsewhere(Elsewhere),
    /// It is no Pod.
    Nowhere,
}

impl Decided {
    pub fn here(step: Step) -> Self {
        Self::Here(Box::new(step))
    }
}

/// The verdicts that a packet has met.
#[derive(Clone, Copy, Debug)]
pub struct Told<'a>(pub &'a [VerdictEvent]);

impl Told<'_> {
    /// The verdict in force about an interface's Pod.
    pub fn verdict(&self, ifindex: u32, direction: Direction) -> Option<&VerdictEvent> {
        let reasons = [Reason::PolicyAllowed, Reason::PolicyDenied, Reason::PolicyBroken];
        self.of(ifindex, direction, &reasons)
    }

    /// What it would be if no policy were a dry run, where that is something else.
    pub fn dry_run(&self, ifindex: u32, direction: Direction) -> Option<&VerdictEvent> {
        self.of(ifindex, direction, &[Reason::DryRunAllowed, Reason::DryRunDenied])
    }

    fn of(&self, ifindex: u32, direction: Direction, reasons: &[Reason]) -> Option<&VerdictEvent> {
        let outward = u8::from(direction == Direction::Egress);
        let mut told = self.0.iter();
        told.find(|event| {
            let is_meant = reasons.iter().any(|reason| *reason as u32 == event.reason);
            event.ifindex == ifindex && event.outward == outward && is_meant
        })
    }
}

/// Whether a verdict allows, or would.
pub fn allows(event: &VerdictEvent) -> bool {
    event.reason == Reason::PolicyAllowed as u32 || event.reason == Reason::DryRunAllowed as u32
}

/// What is decided about an interface that nobody knows.
pub fn unknown() -> String {
    Reason::PolicyUnknownPod.text().trim().to_owned()
}

/// Whether a problem is about the frontend that serves an address and port.
fn is_about(problem: &served::Problem, at: SocketAddr, proto: Protocol) -> bool {
    let serving = FrontendAddr::serving(at, proto);
    serving.iter().any(|at| problem.is_about(&served::at(at)))
}

/// What an agent knows.
#[derive(Debug)]
pub struct Named<'a> {
    pub node: &'a str,
    pub index: &'a Index,
    pub compiler: &'a PolicyCompiler,
    /// The interfaces of this node's Pods.
    pub interfaces: BTreeMap<Name, u32>,
    /// Who knows the policies by their numbers in `RULES`.
    pub syncer: &'a PolicySyncer,
    /// Who knows whose an address and port are.
    pub services: &'a Compiler,
    /// Of all objects.
    pub problems: Vec<served::Problem>,
    /// What is not in the tables.
    pub failed: &'a BTreeMap<Subject, Failure>,
}

impl Known for Named<'_> {
    fn interface(&self, _world: &World, (_, pod): Found<'_>) -> Option<u32> {
        self.interfaces.get(&pod?.name).copied()
    }

    fn holder(&self, at: SocketAddr, proto: Protocol) -> Option<ObjectRef> {
        let mut serving = FrontendAddr::serving(at, proto).into_iter();
        serving.find_map(|at| self.services.owner(&at)).cloned()
    }

    fn problems(&self, service: &Name, asked: Option<(SocketAddr, Protocol)>) -> Vec<String> {
        let object = ObjectRef::service(service).to_string();
        let of_service = self.problems.iter().filter(|one| one.object == object);
        let mut problems: Vec<&served::Problem> = of_service.collect();
        if let Some((at, proto)) = asked {
            problems.sort_by_key(|one| !is_about(one, at, proto));
        }
        problems.into_iter().map(said).collect()
    }

    fn unwritten(&self, at: SocketAddr, proto: Protocol) -> Option<String> {
        let holder = self.holder(at, proto)?.to_string();
        let is_it = |one: &&served::Problem| {
            one.object == holder && one.cause == Cause::TableFull && is_about(one, at, proto)
        };
        self.problems.iter().find(is_it).map(|one| one.reason.clone())
    }

    fn decided(
        &self,
        world: &World,
        direction: Direction,
        (own, peer): (Found<'_>, Found<'_>),
        told: Told<'_>,
    ) -> Decided {
        let Some(pod) = own.1 else {
            return Decided::Nowhere;
        };
        let at = place(own);
        let other = peer.1.map(|other| &other.name);
        let is_here = pod.node.as_deref() == Some(self.node);
        if let Some(reason) = reasons::exempt(self.index, pod, direction, peer.0, other)
            && (is_here || pod.host_network || other == Some(&pod.name))
        {
            return Decided::here(Step::exempt(direction, at, reason));
        }
        let Some(ifindex) = self.interface(world, own) else {
            let what = format!("{} of {}", direction.as_str(), pod.name);
            let node = pod.node.as_ref().filter(|_| !is_here);
            return Decided::Elsewhere(Elsewhere {
                direction: direction.as_str().into(),
                node: node.map(ToString::to_string),
                reason: match node {
                    Some(node) => format!("{what} is decided on node {node}"),
                    None => format!("{what}: its interface is not known"),
                },
            });
        };
        let decision = |event: &VerdictEvent| {
            let rule = world.rule(event.rule).filter(|_| event.rule != NO_RULE_INDEX)?;
            let policy: &ObjectRef = self.syncer.policy(rule.policy)?;
            Decision::of(self.index, policy, direction, rule.place)
        };
        let closed = policy::closed(self.failed, &pod.name, direction);
        let selection = Selection::of(self.index, self.compiler, &pod.name, direction).closed(closed);
        Decided::here(match told.verdict(ifindex, direction) {
            Some(event) => {
                let audit = told.dry_run(ifindex, direction);
                let audit = audit.map(|event| (allows(event), decision(event)));
                let mut step = selection.step(at, allows(event), decision(event), audit);
                if !step.allowed {
                    let problems = self.misunderstood(&step, &pod.name, direction);
                    let parts = iter::once(step.reason).chain(problems);
                    step.reason = parts.collect::<Vec<_>>().join("; ");
                }
                step
            }
            None if world.is_unknown(ifindex) => Step {
                reason: unknown(),
                ..selection.step(at, false, None, None)
            },
            None => selection.step(at, true, None, None),
        })
    }
}

impl Named<'_> {
    /// What is known to be wrong with an object, in fields that count.
    fn problems_of(&self, object: &str, counts: impl Fn(&str) -> bool) -> Vec<String> {
        let problems = self.problems.iter();
        let problems = problems.filter(|one| one.object == object && counts(&one.field));
        problems.map(said).collect()
    }

    /// What is not understood of the rule that denies, or where none does, of the policies that isolate the Pod.
    fn misunderstood(&self, step: &Step, pod: &Name, direction: Direction) -> Vec<String> {
        if let Some(rule) = &step.rule {
            self.problems_of(&rule.policy, |at| concerns(at, &rule.field))
        } else {
            let list = format!("spec.{}", direction.as_str());
            let policies = self.compiler.isolating(pod, direction, false).iter();
            policies
                .flat_map(|policy| self.problems_of(&policy.to_string(), |at| concerns(at, &list)))
                .collect()
        }
    }
}

/// What is wrong, and where.
fn said(problem: &served::Problem) -> String {
    match &*problem.field {
        "" => problem.reason.clone(),
        field => format!("{field}: {}", problem.reason),
    }
}

/// Whether a field is within this one, or about the policy as a whole.
fn concerns(field: &str, within: &str) -> bool {
    let is_of_a_rule = ["spec.ingress[", "spec.egress["]
        .iter()
        .any(|list| field.starts_with(list));
    field.starts_with(within) || !is_of_a_rule
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_concerns_its_rule_or_the_whole_policy() {
        let rule = "spec.egress[1]";
        for (field, expected) in [
            ("spec.egress[1]", true),
            ("spec.egress[1].to[0].domainNames", true),
            ("spec.egress[10]", false),
            ("spec.ingress[1]", false),
            ("spec.when", true),
            ("", true),
        ] {
            assert_eq!(concerns(field, rule), expected, "{field}");
        }
        assert!(concerns("spec.ingress[1].ports[0]", "spec.ingress"));
    }
}

//! What the agent makes of policies: which pods they are about and where, and what of them cannot be honoured.

use std::collections::BTreeMap;

use super::{Agent, claims::is_same};
use crate::{
    enforced::{Enforced, EnforcedPolicy, EnforcedRule, OfDirection, OfPod},
    host::HostState,
    model::{
        Kind, Name, ObjectRef, Policy, Rejected,
        policy::{Action, Direction, Rule, Tier},
        policy_words::one_of,
    },
    served,
    sync::{
        Subject,
        policy::{
            BoundPod, closed,
            hits::{Decider, HitsByDecider},
        },
    },
};

impl Agent {
    /// The pods of this node whose interfaces are known, by ifindex.
    pub(super) fn bound_pods(&self, host: &HostState) -> BTreeMap<u32, BoundPod> {
        let bound = host.bound_pods.iter().filter_map(|(ifindex, pod)| {
            let name: Name = pod.parse().ok()?;
            let pod = self.index.local_pod(&name)?;
            // The other Pod of its name is not known yet: closed.
            if self.claims.get(&name).is_some_and(|claim| !is_same(pod, claim)) {
                return None;
            }
            let addrs = pod.ips.clone();
            Some((*ifindex, BoundPod { name, addrs }))
        });
        bound.collect()
    }

    /// Pods whose policies are more than a set holds.
    pub(super) fn rejected_by_policies(&self) -> impl Iterator<Item = Rejected> {
        self.policies.pods().iter().flat_map(move |(name, pod)| {
            let object = ObjectRef {
                kind: Kind::Pod,
                name: name.clone(),
            };
            pod.problems.iter().map(move |problem| Rejected {
                origin: self.origins.get(&object).cloned(),
                object: object.to_string(),
                problem: problem.clone(),
            })
        })
    }

    /// How often rules have decided.
    fn hits(&self) -> HitsByDecider {
        let hits = tokio::task::block_in_place(|| self.policy_syncer.hits(&*self.store));
        hits.unwrap_or_else(|error| {
            tracing::warn!("failed to count what policies have decided: {error}");
            HitsByDecider::new()
        })
    }

    /// A policy that selects Pods of this node, with its rules for these directions.
    fn enforced_policy(
        &self,
        key: &ObjectRef,
        directions: &[Direction],
        hits: &HitsByDecider,
    ) -> Option<EnforcedPolicy> {
        let policy = self.index.policies().get(key)?;
        let dry_run = policy.is_dry_run(self.index.namespace(key.name.namespace()));
        Some(EnforcedPolicy {
            policy: key.to_string(),
            tier: policy.tier.to_string(),
            dry_run,
            pods: self.policies.count_selected(key),
            rules: rules(policy, dry_run, directions, hits),
        })
    }

    /// What policies say about a Pod of this node; `None`: there is no such Pod.
    pub(super) fn enforced_of(&self, name: &Name) -> Option<OfPod> {
        self.index.local_pod(name).filter(|pod| !pod.host_network)?;
        let of_pod = self.policies.pods().get(name);
        let hits = self.hits();
        let of_direction = |direction: Direction| {
            let keys = of_pod.map_or(&[][..], |pod| &pod.policies[direction as usize]);
            let policies = keys
                .iter()
                .filter_map(|key| self.enforced_policy(key, &[direction], &hits));
            let mut policies: Vec<EnforcedPolicy> = policies.collect();
            let denies_others = |policy: &EnforcedPolicy| {
                !policy.dry_run && policy.rules.iter().any(|rule| rule.rule.is_none())
            };
            let isolated = policies.iter().any(denies_others);
            let baseline = Tier::Baseline.to_string();
            policies.retain(|policy| !isolated || policy.tier != baseline);
            OfDirection {
                isolated,
                closed: closed(&self.failed, name, direction).map(str::to_owned),
                policies,
            }
        };
        let object = ObjectRef {
            kind: Kind::Pod,
            name: name.clone(),
        };
        let object = object.to_string();
        let problems = self.rejected_by_policies().filter(|one| one.object == object);
        let problems = problems.map(|one| served::Problem::from(&one));
        let failed = self.failed.iter().filter(|one| is_of_pod(one.0));
        let failed = failed
            .map(served::Problem::from)
            .filter(|one| one.object == object);
        Some(OfPod {
            pod: name.to_string(),
            ingress: of_direction(Direction::Ingress),
            egress: of_direction(Direction::Egress),
            problems: problems.chain(failed).collect(),
        })
    }

    /// What policies do here.
    pub(super) fn enforced(&self) -> Enforced {
        let hits = self.hits();
        let mut selected: Vec<_> = self.policies.selected().collect();
        selected.sort_unstable_by_key(|(policy, _)| *policy);
        let policies = selected
            .into_iter()
            .filter_map(|(key, _)| self.enforced_policy(key, &Direction::ALL, &hits));
        let is_about_policies = |problem: &served::Problem| {
            let object: Option<ObjectRef> = problem.object.parse().ok();
            object.is_some_and(|object| object.kind.is_policy())
        };
        let of_pods = self.rejected_by_policies();
        let mut of_pods: Vec<served::Problem> = of_pods.map(|one| served::Problem::from(&one)).collect();
        of_pods.extend(self.failed.iter().filter(|one| is_of_pod(one.0)).map(Into::into));
        let problems = self.problems().into_iter();
        Enforced {
            policies: policies.collect(),
            problems: problems
                .filter(|problem| is_about_policies(problem) || of_pods.contains(problem))
                .collect(),
        }
    }
}

/// Whether what is not written are policies of a Pod. Services and host ports have addresses.
fn is_of_pod(failed: &Subject) -> bool {
    let is_pod = failed
        .object
        .as_ref()
        .is_some_and(|object| object.kind == Kind::Pod);
    is_pod && failed.entry.contains("policies")
}

/// The rules of a policy with their verdicts. What no rule decides is put down to a dry run as far as that is one.
fn rules(
    policy: &Policy,
    dry_run: bool,
    directions: &[Direction],
    hits: &HitsByDecider,
) -> Vec<EnforcedRule> {
    let row = |direction: Direction, of: Option<&Rule>| {
        let rule = of.map(|rule| rule.place);
        let decider = Decider {
            policy: policy.key.clone(),
            direction,
            rule,
        };
        let hits = hits.get(&decider).copied().unwrap_or_default();
        EnforcedRule {
            direction: direction.as_str().to_owned(),
            rule,
            name: of.map_or_else(String::new, |rule| rule.name.as_ref().to_owned()),
            action: of.map_or(Action::Deny, |rule| rule.action).label().to_owned(),
            peers: of.map_or_else(String::new, |rule| one_of(rule.peers.as_deref())),
            ports: of.map_or_else(String::new, |rule| one_of(rule.ports.as_deref())),
            verdicts: hits.decided,
            dry_run: if dry_run || rule.is_some() {
                hits.dry_run
            } else {
                0
            },
        }
    };
    let mut rows = Vec::new();
    for direction in directions.iter().copied() {
        let Some(rules) = policy.rules(direction) else {
            continue;
        };
        let of_rules = rules.iter();
        rows.extend(of_rules.map(|rule| row(direction, Some(rule))));
        if policy.tier == Tier::Namespace {
            rows.push(row(direction, None));
        }
    }
    rows
}

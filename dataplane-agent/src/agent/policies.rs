//! What the agent makes of policies: which pods they are about and where, and what of them cannot be honoured.

use std::collections::BTreeMap;

use super::{Agent, claims::is_same};
use crate::{
    enforced::{Enforced, EnforcedPolicy, EnforcedRule},
    host::HostState,
    model::{
        Kind, Name, ObjectRef, Policy, Rejected,
        policy::{Action, Direction, Tier},
    },
    served,
    sync::policy::{
        BoundPod,
        hits::{Decider, HitsByDecider},
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

    /// What policies do here.
    pub(super) fn enforced(&self) -> Enforced {
        let hits = tokio::task::block_in_place(|| self.policy_syncer.hits(&*self.store));
        let hits = hits.unwrap_or_else(|error| {
            tracing::warn!("failed to count what policies have decided: {error}");
            HitsByDecider::new()
        });
        let mut selected: Vec<_> = self.policies.selected().collect();
        selected.sort_unstable_by_key(|(policy, _)| *policy);
        let policies = selected.into_iter().filter_map(|(key, pods)| {
            let policy = self.index.policies().get(key)?;
            let namespace = self.index.namespace(key.name.namespace());
            let dry_run = policy.is_dry_run(namespace);
            Some(EnforcedPolicy {
                policy: key.to_string(),
                tier: policy.tier.to_string(),
                dry_run,
                pods: pods.len(),
                rules: rules(policy, dry_run, &hits),
            })
        });
        let is_about_policies = |problem: &served::Problem| {
            let object: Option<ObjectRef> = problem.object.parse().ok();
            object.is_some_and(|object| object.kind.is_policy())
        };
        let of_pods = self.rejected_by_policies();
        let of_pods: Vec<served::Problem> = of_pods.map(|one| served::Problem::from(&one)).collect();
        let problems = self.problems().into_iter();
        Enforced {
            policies: policies.collect(),
            problems: problems
                .filter(|problem| is_about_policies(problem) || of_pods.contains(problem))
                .collect(),
        }
    }
}

/// The rules of a policy with their verdicts. What no rule decides is put down to a dry run as far as that is one.
fn rules(policy: &Policy, dry_run: bool, hits: &HitsByDecider) -> Vec<EnforcedRule> {
    let row = |direction: Direction, rule, name: &str, action: Action| {
        let decider = Decider {
            policy: policy.key.clone(),
            direction,
            rule,
        };
        let hits = hits.get(&decider).copied().unwrap_or_default();
        EnforcedRule {
            direction: direction.as_str().to_owned(),
            rule,
            name: name.to_owned(),
            action: action.label().to_owned(),
            verdicts: hits.decided,
            dry_run: if dry_run || rule.is_some() {
                hits.dry_run
            } else {
                0
            },
        }
    };
    let mut rows = Vec::new();
    for direction in Direction::ALL {
        let Some(rules) = policy.rules(direction) else {
            continue;
        };
        let of_rules = rules.iter();
        rows.extend(of_rules.map(|rule| row(direction, Some(rule.place), &rule.name, rule.action)));
        if policy.tier == Tier::Namespace {
            rows.push(row(direction, None, "", Action::Deny));
        }
    }
    rows
}

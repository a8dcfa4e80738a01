//! What policies have decided, by rule.

use std::collections::{BTreeMap, HashMap, HashSet};

use prometheus::{IntCounterVec, Opts, core::Collector, proto::MetricFamily};

use crate::enforced::{Enforced, EnforcedPolicy, EnforcedRule};

/// So many rules have series of their own.
const PLACES: usize = 2_000;
/// What stands in place of a policy and a rule without series of their own.
const OTHER: &str = "other";

/// Policy, direction, rule, action, mode.
type Labels = [String; 5];

/// Which rules have series of their own: who has them keeps them until the rule is gone.
#[derive(Debug, Default)]
pub struct ByRule {
    own: HashSet<Labels>,
    /// What others had decided when somebody asked last.
    seen: HashMap<Labels, u64>,
    /// What others have decided, together: a counter that never becomes smaller, whichever of them are gone.
    other: BTreeMap<Labels, u64>,
}

impl ByRule {
    /// The family, with a series for each rule of a policy that selects Pods of this node, once it has decided something.
    pub fn families(&mut self, enforced: &Enforced) -> Vec<MetricFamily> {
        let verdicts = IntCounterVec::new(
            Opts::new(
                "dataplane_policy_verdicts_total",
                "Flows that a rule of a policy has allowed and packets that it has denied at Pods of this node (`mode=\"enforced\"`), and what it would change if it were no dry run (`mode=\"dry-run\"`); `rule` counts from 0, and is `none` where a policy isolates and no rule decides. From the first verdict on; the first 2,000 rules have series of their own, all others together are `policy=\"other\"`",
            ),
            &["policy", "direction", "rule", "action", "mode"],
        );
        // Names and labels are constants, made by a test.
        let Ok(verdicts) = verdicts else {
            return Vec::new();
        };
        for (labels, count) in self.take(decided(enforced), PLACES) {
            verdicts
                .with_label_values(&labels.each_ref().map(String::as_str))
                .inc_by(count);
        }
        verdicts.collect()
    }

    /// What is shown of what rules have decided.
    fn take(&mut self, decided: HashMap<Labels, u64>, places: usize) -> Vec<(Labels, u64)> {
        self.own.retain(|labels| decided.contains_key(labels));
        let (mut shown, mut rest) = (Vec::new(), HashMap::new());
        for (labels, count) in decided {
            if !self.own.contains(&labels) {
                if self.own.len() >= places {
                    rest.insert(labels, count);
                    continue;
                }
                self.own.insert(labels.clone());
            }
            shown.push((labels, count));
        }
        for (labels, count) in &rest {
            let before = self.seen.get(labels).copied().unwrap_or_default();
            let [_, direction, _, action, mode] = labels.clone();
            let labels = [OTHER.to_owned(), direction, OTHER.to_owned(), action, mode];
            // Of one that counts anew, all that it has.
            *self.other.entry(labels).or_default() += count.checked_sub(before).unwrap_or(*count);
        }
        self.seen = rest;
        shown.extend(self.other.iter().map(|(labels, count)| (labels.clone(), *count)));
        shown
    }
}

/// What has decided something, and how often.
fn decided(enforced: &Enforced) -> HashMap<Labels, u64> {
    let mut counts = HashMap::new();
    for EnforcedPolicy { policy, rules, .. } in &enforced.policies {
        for EnforcedRule {
            direction,
            rule,
            action,
            verdicts,
            dry_run,
            name: _,
            peers: _,
            ports: _,
        } in rules
        {
            let rule = rule.map_or_else(|| "none".to_owned(), |rule| rule.to_string());
            for (mode, count) in [("enforced", *verdicts), ("dry-run", *dry_run)] {
                if count > 0 {
                    let labels = [policy, direction, &rule, action, mode].map(str::to_owned);
                    *counts.entry(labels).or_default() += count;
                }
            }
        }
    }
    counts
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A policy that has denied.
    pub fn enforced() -> Enforced {
        let rule = EnforcedRule {
            direction: "ingress".to_owned(),
            action: "deny".to_owned(),
            verdicts: 3,
            ..EnforcedRule::default()
        };
        let silent = EnforcedRule {
            rule: Some(0),
            verdicts: 0,
            ..rule.clone()
        };
        Enforced {
            policies: vec![EnforcedPolicy {
                policy: "NetworkPolicy shop/db".to_owned(),
                rules: vec![silent, rule],
                ..EnforcedPolicy::default()
            }],
            problems: Vec::new(),
        }
    }

    #[test]
    fn rules_that_have_decided_have_their_series() {
        let page = crate::metrics::Metrics::new()
            .page(Some(&enforced()), None)
            .unwrap();
        let lines = page.lines().filter(|line| line.contains("shop/db"));
        assert_eq!(
            lines.collect::<Vec<_>>(),
            [
                r#"dataplane_policy_verdicts_total{action="deny",direction="ingress",mode="enforced",policy="NetworkPolicy shop/db",rule="none"} 3"#
            ]
        );
    }

    #[test]
    fn without_a_verdict_the_rest_of_the_page_is_there() {
        let page = crate::metrics::Metrics::new()
            .page(Some(&Enforced::default()), None)
            .unwrap();
        assert!(page.contains("dataplane_build_info"), "{page}");
        assert!(!page.contains("dataplane_policy_verdicts_total"), "{page}");
    }

    #[test]
    fn rules_without_a_place_are_counted_together_and_never_less() {
        let labels = |rule: &str| ["p", "ingress", rule, "deny", "enforced"].map(str::to_owned);
        let other = || [OTHER, "ingress", OTHER, "deny", "enforced"].map(str::to_owned);
        let mut by_rule = ByRule::default();
        let mut shown = |counts: &[(&str, u64)]| {
            let counts = counts.iter().map(|(rule, count)| (labels(rule), *count));
            let mut shown = by_rule.take(counts.collect(), 1);
            shown.sort();
            shown
        };
        assert_eq!(shown(&[("0", 5)]), [(labels("0"), 5)]);
        let both = |own, of_others| vec![(other(), of_others), (labels("0"), own)];
        assert_eq!(shown(&[("0", 6), ("1", 2), ("2", 1)]), both(6, 3));
        // One is gone, and one counts on.
        assert_eq!(shown(&[("0", 6), ("1", 4)]), both(6, 5));
        // A place is free.
        assert_eq!(shown(&[("1", 9)]), [(other(), 5), (labels("1"), 9)]);
    }
}

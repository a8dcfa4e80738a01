//! What policies have decided, by rule.

use prometheus::{IntCounterVec, Opts, core::Collector, proto::MetricFamily};

use crate::enforced::{Enforced, EnforcedPolicy, EnforcedRule};

/// The family, with a series for each rule of a policy that selects Pods of this node, once it has decided something.
pub fn families(enforced: &Enforced) -> Vec<MetricFamily> {
    let verdicts = IntCounterVec::new(
        Opts::new(
            "dataplane_policy_verdicts_total",
            "Flows that a rule of a policy has allowed and packets that it has denied at Pods of this node (`mode=\"enforced\"`), and what it would change if it were no dry run (`mode=\"dry-run\"`); `rule` counts from 0, and is `none` where a policy isolates and no rule decides. From the first verdict on",
        ),
        &["policy", "direction", "rule", "action", "mode"],
    );
    // Names and labels are constants, made by a test.
    let Ok(verdicts) = verdicts else {
        return Vec::new();
    };
    for EnforcedPolicy { policy, rules, .. } in &enforced.policies {
        for EnforcedRule {
            direction,
            rule,
            action,
            verdicts: decided,
            dry_run,
            name: _,
            peers: _,
            ports: _,
        } in rules
        {
            let rule = rule.map_or_else(|| "none".to_owned(), |rule| rule.to_string());
            for (mode, count) in [("enforced", *decided), ("dry-run", *dry_run)] {
                if count > 0 {
                    verdicts
                        .with_label_values(&[policy, direction, &rule, action, mode])
                        .inc_by(count);
                }
            }
        }
    }
    verdicts.collect()
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
}

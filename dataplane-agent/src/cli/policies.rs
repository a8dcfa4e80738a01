//! `policies`: what policies do on a node, rule by rule.

use std::path::Path;

use anyhow::{Context, ensure};

use super::{
    ask,
    output::{self, Output, table},
};
use crate::{
    enforced::{Enforced, EnforcedPolicy, EnforcedRule, OfDirection, OfPod},
    model::Name,
};

/// Prints what the agent at `socket` says.
pub fn run(socket: &Path, output: Output) -> anyhow::Result<()> {
    let enforced: Enforced = ask::value(socket, "/policies")?;
    output.print(&enforced, render)
}

/// Prints what the agent at `socket` says about a Pod.
pub fn run_for(pod: &str, socket: &Path, output: Output) -> anyhow::Result<()> {
    let name = pod
        .parse()
        .ok()
        .filter(|name: &Name| !name.namespace().is_empty());
    let name = name.context("a Pod is named NAMESPACE/NAME")?;
    let answer = ask::reach(socket, &format!("/policies?pod={name}"))?;
    ensure!(
        answer.status != 404,
        "no Pod of this node with an interface of its own is called {name}"
    );
    output.print(&answer.value::<OfPod>()?, render_pod)
}

fn render_pod(of_pod: &OfPod) -> String {
    let rows = [("ingress", &of_pod.ingress), ("egress", &of_pod.egress)]
        .into_iter()
        .flat_map(|(name, direction)| rows_of(name, direction));
    let header = [
        "DIRECTION",
        "TIER",
        "POLICY",
        "RULE",
        "ACTION",
        "PEERS",
        "PORTS",
        "VERDICTS",
        "DRY RUN",
    ];
    let problems = output::problems(&of_pod.problems, "CLOSED BECAUSE");
    format!("{}{problems}", table(&header, rows).trim_start_matches('\n'))
}

/// The rules of a direction as they are asked, and what becomes of a flow that none of them fits.
fn rows_of(name: &str, direction: &OfDirection) -> Vec<Vec<String>> {
    let row = |policy: &EnforcedPolicy, rule: &EnforcedRule| {
        vec![
            name.to_owned(),
            policy.tier.clone(),
            called(policy),
            number(rule),
            rule.action.clone(),
            rule.peers.clone(),
            rule.ports.clone(),
            rule.verdicts.to_string(),
            rule.dry_run.to_string(),
        ]
    };
    let (mut rows, mut last) = (Vec::new(), Vec::new());
    for policy in &direction.policies {
        for rule in &policy.rules {
            let rows = if rule.rule.is_some() { &mut rows } else { &mut last };
            rows.push(row(policy, rule));
        }
    }
    rows.append(&mut last);
    if !direction.isolated {
        let texts = [
            name,
            "",
            "none isolates it",
            "none",
            "allow",
            "any",
            "any",
            "",
            "",
        ];
        rows.push(texts.map(str::to_owned).into());
    }
    rows
}

fn render(enforced: &Enforced) -> String {
    let Enforced { policies, problems } = enforced;
    let rows = policies
        .iter()
        .flat_map(|policy| policy.rules.iter().map(|rule| row(policy, rule)));
    let header = [
        "POLICY",
        "PODS",
        "DIRECTION",
        "RULE",
        "ACTION",
        "VERDICTS",
        "DRY RUN",
    ];
    let policies = table(&header, rows);
    let problems = output::problems(problems, "NOT HONOURED BECAUSE");
    format!("{}{problems}", policies.trim_start_matches('\n'))
}

fn number(rule: &EnforcedRule) -> String {
    match (rule.rule, rule.name.as_str()) {
        (None, _) => "none".to_owned(),
        (Some(number), "") => number.to_string(),
        (Some(number), name) => format!("{number} {name}"),
    }
}

fn called(policy: &EnforcedPolicy) -> String {
    let suffix = if policy.dry_run { " (dry run)" } else { "" };
    format!("{}{suffix}", policy.policy)
}

fn row(policy: &EnforcedPolicy, rule: &EnforcedRule) -> Vec<String> {
    vec![
        called(policy),
        policy.pods.to_string(),
        rule.direction.clone(),
        number(rule),
        rule.action.clone(),
        rule.verdicts.to_string(),
        rule.dry_run.to_string(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_stand_below_each_other_with_their_verdicts() {
        let rule = EnforcedRule {
            direction: "ingress".to_owned(),
            rule: Some(0),
            name: "web".to_owned(),
            action: "allow".to_owned(),
            peers: "pods with app=web in shop".to_owned(),
            ports: "8080/TCP".to_owned(),
            verdicts: 7,
            dry_run: 0,
        };
        let none = EnforcedRule {
            rule: None,
            name: String::new(),
            action: "deny".to_owned(),
            verdicts: 0,
            dry_run: 42,
            ..rule.clone()
        };
        let text = render(&Enforced {
            policies: vec![EnforcedPolicy {
                policy: "NetworkPolicy shop/db".to_owned(),
                tier: "NetworkPolicy".to_owned(),
                dry_run: true,
                pods: 2,
                rules: vec![rule, none],
            }],
            problems: Vec::new(),
        });
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        let of_policy = ["NetworkPolicy", "shop/db", "(dry", "run)", "2", "ingress"];
        let line = |rest: &[&'static str]| [&of_policy[..], rest].concat();
        assert!(lines.contains(&line(&["0", "web", "allow", "7", "0"])), "{text}");
        assert!(lines.contains(&line(&["none", "deny", "0", "42"])), "{text}");
    }

    #[test]
    fn a_pods_rules_stand_in_the_order_in_which_they_are_asked() {
        let rule = |direction: &str, rule, action: &str| EnforcedRule {
            direction: direction.to_owned(),
            rule,
            action: action.to_owned(),
            peers: "any".to_owned(),
            ports: "53/UDP".to_owned(),
            ..EnforcedRule::default()
        };
        let policy = |name: &str, tier: &str, rules| EnforcedPolicy {
            policy: name.to_owned(),
            tier: tier.to_owned(),
            rules,
            ..EnforcedPolicy::default()
        };
        let text = render_pod(&OfPod {
            pod: "shop/db".to_owned(),
            ingress: OfDirection {
                isolated: true,
                policies: vec![
                    policy("guard", "admin", vec![rule("ingress", Some(0), "pass")]),
                    policy(
                        "a",
                        "NetworkPolicy",
                        vec![rule("ingress", Some(0), "allow"), rule("ingress", None, "deny")],
                    ),
                    policy("b", "NetworkPolicy", vec![rule("ingress", Some(0), "allow")]),
                ],
            },
            ..OfPod::default()
        });
        let columns = |line: &str| -> String {
            let words: Vec<&str> = line.split_whitespace().collect();
            words[..5].join(" ")
        };
        let lines: Vec<String> = text.lines().skip(1).map(columns).collect();
        assert_eq!(
            lines,
            [
                "ingress admin guard 0 pass",
                "ingress NetworkPolicy a 0 allow",
                "ingress NetworkPolicy b 0 allow",
                "ingress NetworkPolicy a none deny",
                "egress none isolates it none",
            ],
            "{text}"
        );
    }
}

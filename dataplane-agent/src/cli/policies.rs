//! `policies`: what policies do on a node, rule by rule.

use std::path::Path;

use super::{
    ask,
    output::{self, Output, table},
};
use crate::enforced::{Enforced, EnforcedPolicy, EnforcedRule};

/// Prints what the agent at `socket` says.
pub fn run(socket: &Path, output: Output) -> anyhow::Result<()> {
    let enforced: Enforced = ask::value(socket, "/policies")?;
    output.print(&enforced, render)
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

fn row(policy: &EnforcedPolicy, rule: &EnforcedRule) -> Vec<String> {
    let number = match (rule.rule, rule.name.as_str()) {
        (None, _) => "none".to_owned(),
        (Some(number), "") => number.to_string(),
        (Some(number), name) => format!("{number} {name}"),
    };
    let suffix = if policy.dry_run { " (dry run)" } else { "" };
    vec![
        format!("{}{suffix}", policy.policy),
        policy.pods.to_string(),
        rule.direction.clone(),
        number,
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
}

//! `policies`: what policies do on a node, rule by rule.

use std::{collections::HashMap, net::IpAddr, path::Path, time::Duration};

use anyhow::{Context, bail};
use serde::Serialize;

use super::{
    alone::{self, Places, Said},
    ask,
    output::{self, Output, table},
    pinned,
};
use crate::{
    enforced::{Enforced, EnforcedPolicy, EnforcedRule, OfDirection, OfPod},
    model::Name,
    netlink::tables::device_names,
    store::{
        bpf::BpfStore,
        enforced::{EnforcedTables, TableDirection, TablePod},
    },
};

/// What policies do on a node.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum OfNode {
    /// As an agent says.
    Enforced(Enforced),
    /// As its tables do.
    Pods(InTables),
}

/// A node's tables.
#[derive(Debug, Serialize)]
pub struct InTables {
    pods: Vec<ShownPod>,
}

#[derive(Debug, Serialize)]
struct ShownPod {
    /// Of the interface on the node's side, where it is in this namespace.
    device: Option<String>,
    #[serde(flatten)]
    pod: TablePod,
}

/// Why there is nothing to say of a Pod.
#[derive(Debug, thiserror::Error)]
pub enum NoPod {
    #[error("a Pod is named NAMESPACE/NAME, or by one of its addresses")]
    Misnamed,
    #[error("no Pod of this node with an interface of its own is called {0}")]
    Name(Name),
    #[error("no Pod of this node with an interface of its own has the address {0}")]
    Addr(IpAddr),
}

/// Prints what an agent says, or what its tables do.
pub fn run(places: Places<'_>, output: Output) -> anyhow::Result<()> {
    let of_node = of_node(places, ask::WITHIN)?.noted();
    let render = |shown: &OfNode| match shown {
        OfNode::Enforced(enforced) => render(enforced),
        OfNode::Pods(pods) => render_tables(pods),
    };
    output.print_or_note(&of_node, render, "no policy selects a Pod of this node")
}

/// Prints what an agent, or its tables, say about a Pod, which has a name or an address.
pub fn run_for(pod: &str, places: Places<'_>, output: Output) -> anyhow::Result<()> {
    output.print(&of_pod(pod, places, ask::WITHIN)?.noted(), render_pod)
}

/// What an agent says, or its tables do. `within`: how long the agent may be silent.
pub fn of_node(places: Places<'_>, within: Duration) -> anyhow::Result<Said<OfNode>> {
    let of_agent = ask::value_within(places.socket, "/policies", within);
    match of_agent {
        Ok(enforced) => Ok(Said::by_agent(OfNode::Enforced(enforced))),
        Err(error) => {
            let pods = alone::instead(error, || in_tables(places.bpffs, |tables| Ok(tables.pods()?)))?;
            let devices = device_names().unwrap_or_default();
            let with_device = |pod: TablePod| ShownPod {
                device: devices.get(&pod.ifindex).cloned(),
                pod,
            };
            Ok(pods.map(|pods| {
                let pods = pods.into_iter().map(with_device).collect();
                OfNode::Pods(InTables { pods })
            }))
        }
    }
}

/// The same about a Pod, which has a name or an address; by its name an agent alone knows it.
pub fn of_pod(pod: &str, places: Places<'_>, within: Duration) -> anyhow::Result<Said<OfPod>> {
    match pod.parse::<IpAddr>() {
        Ok(addr) => of_addr(addr.to_canonical(), places, within),
        Err(_) => of_name(pod, places.socket, within).map(Said::by_agent),
    }
}

fn of_name(pod: &str, socket: &Path, within: Duration) -> anyhow::Result<OfPod> {
    let name = pod
        .parse()
        .ok()
        .filter(|name: &Name| !name.namespace().is_empty());
    let name = name.ok_or(NoPod::Misnamed)?;
    let path = format!("/policies?pod={name}");
    let unknown = |error| {
        let way_out = "give an address of the Pod; `policies` alone shows all of them";
        alone::only_an_agent(&error, "names", way_out)
    };
    let answer = ask::reach_within(socket, &path, within).map_err(unknown)?;
    if answer.status == 404 {
        bail!(NoPod::Name(name));
    }
    answer.value().map_err(unknown)
}

fn of_addr(addr: IpAddr, places: Places<'_>, within: Duration) -> anyhow::Result<Said<OfPod>> {
    let nobody = NoPod::Addr(addr);
    let of_agent = ask::value_within(places.socket, &format!("/names?of={addr}"), within);
    match of_agent {
        Ok(names) => {
            let names: HashMap<IpAddr, String> = names;
            let name = names.get(&addr).ok_or(nobody)?;
            of_name(name, places.socket, within).map(Said::by_agent)
        }
        Err(error) => alone::instead(error, || {
            in_tables(places.bpffs, |tables| Ok(tables.of(addr)?.ok_or(nobody)?))
        }),
    }
}

/// Reads the pinned tables.
fn in_tables<T>(
    bpffs: &Path,
    read: impl FnOnce(&EnforcedTables<'_>) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let store = BpfStore::open(&pinned(bpffs)?)?;
    let tables = EnforcedTables::read(&store).context("failed to read the pinned tables")?;
    read(&tables)
}

fn render_tables(shown: &InTables) -> String {
    let rows = shown.pods.iter().flat_map(|ShownPod { device, pod }| {
        let addresses: Vec<String> = pod.addresses.iter().map(ToString::to_string).collect();
        let interface = device.clone().unwrap_or_else(|| pod.ifindex.to_string());
        let row = move |name: &str, direction: &TableDirection| {
            vec![
                interface.clone(),
                addresses.join(", "),
                name.to_owned(),
                if direction.isolated { "yes" } else { "no" }.to_owned(),
                direction.rules.to_string(),
                direction.verdicts.to_string(),
                direction.dry_run.to_string(),
            ]
        };
        [row("ingress", &pod.ingress), row("egress", &pod.egress)]
    });
    let header = [
        "INTERFACE",
        "ADDRESSES",
        "DIRECTION",
        "ISOLATED",
        "RULES",
        "VERDICTS",
        "DRY RUN",
    ];
    table(&header, rows).trim_start_matches('\n').to_owned()
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
    if direction.closed.is_some() {
        let texts = [
            name,
            "",
            "closed, see below",
            "none",
            "deny",
            "any",
            "any",
            "",
            "",
        ];
        return vec![texts.map(str::to_owned).into()];
    }
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
    fn without_names_each_pod_is_an_interface_with_its_addresses() {
        let pod = TablePod {
            ifindex: 12,
            addresses: vec![[10, 0, 0, 1].into(), [10, 0, 0, 2].into()],
            source_checked: true,
            ingress: TableDirection {
                isolated: true,
                rules: 3,
                verdicts: 7,
                dry_run: 0,
            },
            egress: TableDirection::default(),
        };
        let device = Some("veth3".to_owned());
        let shown = InTables {
            pods: vec![
                ShownPod {
                    device,
                    pod: pod.clone(),
                },
                ShownPod { device: None, pod },
            ],
        };
        let text = render_tables(&shown);
        let words = |line: &str| {
            line.split_whitespace()
                .map(str::to_owned)
                .collect::<Vec<_>>()
                .join(" ")
        };
        let lines: Vec<String> = text.lines().map(words).collect();
        assert_eq!(lines[1], "veth3 10.0.0.1, 10.0.0.2 ingress yes 3 7 0");
        assert_eq!(lines[4], "12 10.0.0.1, 10.0.0.2 egress no 0 0 0");
        let json = serde_json::to_value(&shown).unwrap();
        assert_eq!(json["pods"][0]["ingress"]["rules"], 3);
        assert_eq!(json["pods"][0]["device"], "veth3");
    }

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
                ..OfDirection::default()
            },
            egress: OfDirection {
                isolated: true,
                closed: Some("table RULES is full".to_owned()),
                policies: vec![policy(
                    "c",
                    "NetworkPolicy",
                    vec![rule("egress", Some(0), "allow")],
                )],
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
                "egress closed, see below none",
            ],
            "{text}"
        );
    }
}

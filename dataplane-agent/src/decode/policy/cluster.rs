//! The policies of the whole cluster: `ClusterNetworkPolicy` (v1alpha2) and its predecessors `AdminNetworkPolicy` and
//! `BaselineAdminNetworkPolicy` (v1alpha1), policy.networking.k8s.io. They differ in how they say ports, and in names.
//!
//! The API says how to fail closed: a rule that is not understood matches nothing if it allows, and else denies everything.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    Findings, Refused, Unknown, cidr,
    cluster_ports::{ApiPort, ApiProtocol, admin_port, cluster_port},
    selector,
};
use crate::{
    decode::parse,
    model::{
        Kind, ObjectRef,
        policy::{Action, IpBlock, NamespaceSet, Peer, PodSet, Policy, PortMatch, Rule, Tier},
    },
};

/// The only name of a `BaselineAdminNetworkPolicy`.
const BASELINE_NAME: &str = "default";
const PRIORITY_AT_MOST: u16 = 1000;

#[derive(Deserialize)]
struct Document {
    spec: Spec,
}

api! {
    Spec { tier: String, priority: i32, subject: Subject, ingress: Vec<ApiRule>, egress: Vec<ApiRule>, }
    Subject { namespaces: LabelSelector, pods: NamespacedPod, }
    NamespacedPod { namespace_selector: LabelSelector, pod_selector: LabelSelector, }
    ApiRule {
        name: String, action: String, from: Vec<ApiPeer>, to: Vec<ApiPeer>, ports: Vec<ApiPort>,
        protocols: Vec<ApiProtocol>,
    }
    ApiPeer {
        namespaces: LabelSelector, pods: NamespacedPod, nodes: LabelSelector, networks: Vec<String>,
        domain_names: Vec<String>,
    }
}

pub fn decode(key: &ObjectRef, value: &Value, findings: &mut Findings<'_>) -> Result<Policy, Refused> {
    let Document { spec } = parse(value)?;
    let mut unknown = Unknown::of("spec", value.get("spec").unwrap_or(&Value::Null), &spec);
    let (tier, priority) = match key.kind {
        Kind::BaselineAdminNetworkPolicy => {
            if key.name.name() != BASELINE_NAME {
                findings.refuse("metadata.name", format!("has to be `{BASELINE_NAME}`"));
            }
            unknown.extend_if(spec.tier.is_some(), "spec.tier");
            unknown.extend_if(spec.priority.is_some(), "spec.priority");
            // Behind every `ClusterNetworkPolicy` of its tier.
            (Tier::Baseline, PRIORITY_AT_MOST + 1)
        }
        kind => {
            let tier = match (kind, spec.tier.as_deref()) {
                (Kind::AdminNetworkPolicy, tier) => {
                    unknown.extend_if(tier.is_some(), "spec.tier");
                    Tier::Admin
                }
                (_, Some("Admin")) => Tier::Admin,
                (_, Some("Baseline")) => Tier::Baseline,
                (_, Some(other)) => {
                    findings.refuse("spec.tier", format!("`{other}` is no tier"));
                    Tier::Admin
                }
                (_, None) => {
                    findings.refuse("spec.tier", "missing");
                    Tier::Admin
                }
            };
            let priority = spec.priority.and_then(|priority| u16::try_from(priority).ok());
            let priority = priority.filter(|priority| *priority <= PRIORITY_AT_MOST);
            if priority.is_none() {
                let reason = format!("has to be a number from 0 to {PRIORITY_AT_MOST}");
                findings.refuse("spec.priority", reason);
            }
            (tier, priority.unwrap_or_default())
        }
    };
    let subject = subject(spec.subject.as_ref(), findings);
    let reader = Reader {
        kind: key.kind,
        unknown: &unknown,
    };
    let rules = [
        reader.rules("ingress", spec.ingress.as_deref(), findings),
        reader.rules("egress", spec.egress.as_deref(), findings),
    ];
    let closed = unknown.within_but("spec", &["ingress", "egress"]);
    let rules = match closed {
        None => rules.map(|rules| (!rules.is_empty()).then_some(rules)),
        Some(path) => {
            findings.unknown(
                path,
                "not known here: the policy denies everything, in both directions",
            );
            [Some(vec![deny_all(0, "")]), Some(vec![deny_all(0, "")])]
        }
    };
    Ok(Policy {
        key: key.clone(),
        tier,
        priority,
        subject,
        rules,
        dry_run: false,
    })
}

fn subject(subject: Option<&Subject>, findings: &mut Findings<'_>) -> PodSet {
    match subject {
        Some(Subject {
            namespaces: Some(namespaces),
            pods: None,
        }) => pods_of(namespaces, "spec.subject.namespaces", findings),
        Some(Subject {
            namespaces: None,
            pods: Some(pods),
        }) => namespaced(pods, "spec.subject.pods", findings),
        _ => {
            findings.refuse("spec.subject", "has to be one of `namespaces` and `pods`");
            pods_of(&LabelSelector::default(), "spec.subject", findings)
        }
    }
}

fn pods_of(namespaces: &LabelSelector, at: &str, findings: &mut Findings<'_>) -> PodSet {
    PodSet {
        namespaces: NamespaceSet::Labelled(selector(Some(namespaces), at, findings)),
        pods: selector(None, at, findings),
    }
}

fn namespaced(pods: &NamespacedPod, at: &str, findings: &mut Findings<'_>) -> PodSet {
    let (namespaces, pods) = (pods.namespace_selector.as_ref(), pods.pod_selector.as_ref());
    PodSet {
        namespaces: NamespaceSet::Labelled(selector(
            namespaces,
            &format!("{at}.namespaceSelector"),
            findings,
        )),
        pods: selector(pods, &format!("{at}.podSelector"), findings),
    }
}

fn deny_all(place: u32, name: &str) -> Rule {
    Rule {
        place,
        name: name.into(),
        action: Action::Deny,
        peers: None,
        ports: None,
    }
}

struct Reader<'a> {
    kind: Kind,
    unknown: &'a Unknown,
}

impl Reader<'_> {
    fn rules(&self, list: &str, rules: Option<&[ApiRule]>, findings: &mut Findings<'_>) -> Vec<Rule> {
        let rules = rules.unwrap_or_default().iter().enumerate();
        rules
            .filter_map(|(i, rule)| self.rule(list, i, rule, findings))
            .collect()
    }

    fn rule(&self, list: &str, place: usize, rule: &ApiRule, findings: &mut Findings<'_>) -> Option<Rule> {
        let at = format!("spec.{list}[{place}]");
        let ApiRule {
            name,
            action,
            from,
            to,
            ports,
            protocols,
        } = rule;
        let is_cluster = self.kind == Kind::ClusterNetworkPolicy;
        let action = match (action.as_deref(), self.kind) {
            (Some("Accept"), Kind::ClusterNetworkPolicy)
            | (Some("Allow"), Kind::AdminNetworkPolicy | Kind::BaselineAdminNetworkPolicy) => Action::Allow,
            (Some("Deny"), _) => Action::Deny,
            (Some("Pass"), Kind::ClusterNetworkPolicy | Kind::AdminNetworkPolicy) => Action::Pass,
            (action, _) => {
                let action = action.unwrap_or_default();
                findings.refuse(
                    format!("{at}.action"),
                    format!("`{action}` is no action of a {}", self.kind.as_str()),
                );
                Action::Deny
            }
        };
        let is_ingress = list == "ingress";
        let (peers_field, peers, other) = if is_ingress {
            ("from", from, to)
        } else {
            ("to", to, from)
        };
        let foreign = if is_cluster {
            ports.is_some()
        } else {
            protocols.is_some()
        } || other.is_some();
        let mut not_understood = self.unknown.within(&at).map(str::to_owned);
        if foreign && not_understood.is_none() {
            not_understood = Some(at.clone());
        }
        let problems_before = findings.problems.len();
        let peers = match peers.as_deref() {
            None | Some([]) => {
                findings.refuse(format!("{at}.{peers_field}"), "missing");
                Vec::new()
            }
            Some(peers) => {
                let peers = peers.iter().enumerate();
                peers
                    .flat_map(|(i, peer)| {
                        peer_list(peer, &format!("{at}.{peers_field}[{i}]"), is_ingress, findings)
                    })
                    .collect()
            }
        };
        if protocols.as_ref().is_some_and(Vec::is_empty) {
            findings.refuse(format!("{at}.protocols"), "an empty list");
        }
        let old = ports.iter().flatten().enumerate();
        let old: Vec<_> = old
            .map(|(i, port)| admin_port(port, &format!("{at}.ports[{i}]"), findings))
            .collect();
        let new = protocols.iter().flatten().enumerate();
        let new: Vec<_> = new
            .map(|(i, port)| cluster_port(port, &format!("{at}.protocols[{i}]"), findings))
            .collect();
        let ports: Vec<PortMatch> = old.into_iter().chain(new).flatten().collect();
        if let Some(path) = &not_understood {
            findings.unknown(path, "not known here");
        }
        let name = name.as_deref().unwrap_or_default();
        if findings.problems.len() > problems_before {
            let reason = match action {
                Action::Allow => "not understood: the rule allows nothing",
                Action::Deny | Action::Pass => "not understood: the rule denies everything",
            };
            findings.unknown(&at, reason);
            return (action != Action::Allow).then(|| deny_all(place as u32, name));
        }
        Some(Rule {
            place: place as u32,
            name: name.into(),
            action,
            peers: Some(peers),
            ports: (!ports.is_empty()).then_some(ports),
        })
    }
}

/// The peers of one element: each of its networks is one. The schemas say nothing about what is in a selector, and those of
/// v1alpha1 little about what is in a network.
fn peer_list(peer: &ApiPeer, at: &str, is_ingress: bool, findings: &mut Findings<'_>) -> Vec<Peer> {
    let ApiPeer {
        namespaces,
        pods,
        nodes,
        networks,
        domain_names,
    } = peer;
    if domain_names.is_some() {
        findings.unknown(format!("{at}.domainNames"), "domain names are not supported");
        return Vec::new();
    }
    if is_ingress && (nodes.is_some() || networks.is_some()) {
        findings.unknown(
            at,
            "nodes and networks are no peers of an ingress rule as it is known here",
        );
        return Vec::new();
    }
    match (namespaces, pods, nodes, networks) {
        (Some(namespaces), None, None, None) => {
            let at = format!("{at}.namespaces");
            let pods = findings.unchecked(|findings| pods_of(namespaces, &at, findings));
            vec![Peer::Pods(pods)]
        }
        (None, Some(pods), None, None) => {
            let at = format!("{at}.pods");
            let pods = findings.unchecked(|findings| namespaced(pods, &at, findings));
            vec![Peer::Pods(pods)]
        }
        (None, None, Some(nodes), None) => {
            let at = format!("{at}.nodes");
            let nodes = findings.unchecked(|findings| selector(Some(nodes), &at, findings));
            vec![Peer::Nodes(nodes)]
        }
        (None, None, None, Some(networks)) => {
            let networks = networks.iter().enumerate();
            let read = |(i, text): (usize, &String)| {
                let at = format!("{at}.networks[{i}]");
                findings.unchecked(|findings| cidr(text, &at, findings))
            };
            let block = |range| {
                let except = Vec::new();
                Peer::Block(IpBlock { range, except })
            };
            networks.filter_map(read).map(block).collect()
        }
        (None, None, None, None) => {
            findings.unknown(at, "says nothing that is known here");
            Vec::new()
        }
        _ => {
            findings.refuse(at, "says more than one thing");
            Vec::new()
        }
    }
}

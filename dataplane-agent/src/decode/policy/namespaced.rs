//! `NetworkPolicy`, networking.k8s.io/v1: rules that allow, for pods that are closed in a direction because it selects them.

use k8s_openapi::{
    api::networking::v1::{
        NetworkPolicyEgressRule, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort,
    },
    apimachinery::pkg::{apis::meta::v1::LabelSelector, util::intstr::IntOrString},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Findings, Refused, Unknown, cidr, ports, protocol, selector};
use crate::{
    decode::parse,
    model::{
        ObjectRef,
        policy::{Action, IpBlock, NamespaceSet, Peer, PodSet, Policy, PortMatch, Rule, Selector, Tier},
        shared,
    },
};

#[derive(Deserialize)]
struct Document {
    spec: Option<Spec>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    #[serde(skip_serializing_if = "Option::is_none")]
    pod_selector: Option<LabelSelector>,
    #[serde(skip_serializing_if = "Option::is_none")]
    policy_types: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ingress: Option<Vec<NetworkPolicyIngressRule>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    egress: Option<Vec<NetworkPolicyEgressRule>>,
}

pub fn decode(key: &ObjectRef, value: &Value, findings: &mut Findings<'_>) -> Result<Policy, Refused> {
    let spec = parse::<Document>(value)?.spec.unwrap_or_default();
    let unknown = Unknown::of("spec", value.get("spec").unwrap_or(&Value::Null), &spec);
    let subject = PodSet {
        namespaces: NamespaceSet::One(shared::text(key.name.namespace())),
        pods: selector(spec.pod_selector.as_ref(), "spec.podSelector", findings),
    };
    let mut closed = unknown.within_but("spec", &["ingress", "egress"]);
    if let Some(path) = closed {
        findings.unknown(
            path,
            "not known here: the policy closes its pods in both directions",
        );
    }
    let types = spec.policy_types.as_deref().unwrap_or_default();
    // The API server's defaults for a policy without types: egress counts where it has rules.
    let mut applies = if types.is_empty() {
        [true, spec.egress.as_ref().is_some_and(|rules| !rules.is_empty())]
    } else {
        ["Ingress", "Egress"].map(|name| types.iter().any(|one| one == name))
    };
    for (i, name) in types.iter().enumerate() {
        if !matches!(&**name, "Ingress" | "Egress") {
            let field = format!("spec.policyTypes[{i}]");
            let reason = format!("`{name}` is not known here: the policy closes its pods in both directions");
            findings.unknown(field, reason);
            closed = Some(name);
        }
    }
    if closed.is_some() {
        applies = [true, true];
    }
    let reader = Reader {
        namespace: key.name.namespace(),
        unknown: &unknown,
    };
    let ingress = spec.ingress.unwrap_or_default();
    let ingress = ingress.iter().enumerate().map(|(i, rule)| {
        let list = ("ingress", i, "from");
        reader.rule(list, rule.from.as_deref(), rule.ports.as_deref(), findings)
    });
    let ingress: Vec<Rule> = ingress.flatten().collect();
    let egress = spec.egress.unwrap_or_default();
    let egress = egress.iter().enumerate().map(|(i, rule)| {
        let list = ("egress", i, "to");
        reader.rule(list, rule.to.as_deref(), rule.ports.as_deref(), findings)
    });
    let egress: Vec<Rule> = egress.flatten().collect();
    let rules =
        |applies: bool, rules: Vec<Rule>| applies.then(|| if closed.is_some() { Vec::new() } else { rules });
    Ok(Policy {
        key: key.clone(),
        tier: Tier::Namespace,
        priority: 0,
        subject,
        rules: [rules(applies[0], ingress), rules(applies[1], egress)],
        dry_run: false,
    })
}

struct Reader<'a> {
    namespace: &'a str,
    unknown: &'a Unknown,
}

impl Reader<'_> {
    /// `None`: it allows nothing, because it is not understood.
    fn rule(
        &self,
        (list, place, peers_field): (&str, usize, &str),
        peers: Option<&[NetworkPolicyPeer]>,
        port_list: Option<&[NetworkPolicyPort]>,
        findings: &mut Findings<'_>,
    ) -> Option<Rule> {
        let at = format!("spec.{list}[{place}]");
        let not_understood = self.unknown.within_but(&at, &[peers_field, "ports"]);
        if let Some(path) = not_understood {
            findings.unknown(path, "not known here: the rule allows nothing");
        }
        let peers = peers.filter(|peers| !peers.is_empty()).map(|peers| {
            let peers = peers.iter().enumerate();
            let read = |(i, peer)| self.peer(peer, &format!("{at}.{peers_field}[{i}]"), findings);
            peers.filter_map(read).collect()
        });
        let ports = port_list.filter(|ports| !ports.is_empty()).map(|ports| {
            let ports = ports.iter().enumerate();
            let read = |(i, port)| self.port(port, &format!("{at}.ports[{i}]"), findings);
            ports.filter_map(read).collect()
        });
        not_understood.is_none().then_some(Rule {
            place: place as u32,
            name: "".into(),
            action: Action::Allow,
            peers,
            ports,
        })
    }

    fn peer(&self, peer: &NetworkPolicyPeer, at: &str, findings: &mut Findings<'_>) -> Option<Peer> {
        let NetworkPolicyPeer {
            ip_block,
            namespace_selector,
            pod_selector,
        } = peer;
        if let Some(path) = self.unknown.within(at) {
            findings.unknown(path, "not known here: the peer is nobody");
            return None;
        }
        let selects_pods = namespace_selector.is_some() || pod_selector.is_some();
        if let Some(block) = ip_block {
            let at = format!("{at}.ipBlock");
            if selects_pods {
                findings.refuse(at, "stands beside a selector");
                return None;
            }
            let range = cidr(&block.cidr, &format!("{at}.cidr"), findings)?;
            let mut except = Vec::new();
            for (i, text) in block.except.iter().flatten().enumerate() {
                let at = format!("{at}.except[{i}]");
                let one = cidr(text, &at, findings)?;
                if !range.contains(&one) || range == one {
                    findings.refuse(at, format!("{one} is no part of {range}"));
                }
                except.push(one);
            }
            except.sort();
            except.dedup();
            return Some(Peer::Block(IpBlock { range, except }));
        }
        if !selects_pods {
            findings.unknown(at, "says nothing that is known here: the peer is nobody");
            return None;
        }
        let namespaces = match namespace_selector {
            Some(namespaces) => {
                let at = format!("{at}.namespaceSelector");
                NamespaceSet::Labelled(selector(Some(namespaces), &at, findings))
            }
            None => NamespaceSet::One(shared::text(self.namespace)),
        };
        let pods = match pod_selector {
            Some(pods) => selector(Some(pods), &format!("{at}.podSelector"), findings),
            None => Selector::default(),
        };
        Some(Peer::Pods(PodSet { namespaces, pods }))
    }

    fn port(&self, port: &NetworkPolicyPort, at: &str, findings: &mut Findings<'_>) -> Option<PortMatch> {
        let NetworkPolicyPort {
            end_port,
            port,
            protocol: proto,
        } = port;
        if let Some(path) = self.unknown.within(at) {
            findings.unknown(path, "not known here: the port is none");
            return None;
        }
        let end_field = format!("{at}.endPort");
        if end_port.is_some() && !matches!(port, Some(IntOrString::Int(_))) {
            findings.refuse(&end_field, "stands without the number of a port");
        }
        let proto = protocol(proto.as_deref(), || format!("{at}.protocol"), findings)?;
        match port {
            None => Some(PortMatch::Protocol(proto)),
            Some(IntOrString::String(name)) if name.is_empty() => {
                findings.refuse(format!("{at}.port"), "an empty name");
                None
            }
            Some(IntOrString::String(name)) => Some(PortMatch::Named(Some(proto), name.as_str().into())),
            Some(IntOrString::Int(first)) => {
                let last = end_port.map(|last| (last, &*end_field));
                ports(proto, (*first, &format!("{at}.port")), last, findings)
            }
        }
    }
}

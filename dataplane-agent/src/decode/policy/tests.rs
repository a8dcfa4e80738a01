//! What policies say by leaving out, by odd values, and by words that are not known here.

use serde_json::{Value, json};

use crate::{
    decode::{Decoded, decode},
    model::{
        Object, Protocol,
        policy::{Action, Direction, Policy, PortMatch, Tier},
    },
};

fn object(kind: &str, spec: &Value) -> Value {
    let (version, name) = match kind {
        "NetworkPolicy" => ("networking.k8s.io/v1", "p"),
        "ClusterNetworkPolicy" => ("policy.networking.k8s.io/v1alpha2", "p"),
        "AdminNetworkPolicy" => ("policy.networking.k8s.io/v1alpha1", "p"),
        _ => ("policy.networking.k8s.io/v1alpha1", "default"),
    };
    json!({"apiVersion": version, "kind": kind, "metadata": {"name": name}, "spec": spec})
}

/// The policy, and the fields that are complained about.
fn decoded(kind: &str, spec: &Value) -> (Policy, Vec<String>) {
    match decode(&object(kind, spec)) {
        Decoded::Object {
            object: Object::Policy(policy),
            problems,
            ..
        } => (
            Policy::clone(&policy),
            problems.into_iter().map(|problem| problem.field).collect(),
        ),
        other => panic!("{other:?}"),
    }
}

/// The fields for which an object is refused.
fn refused(kind: &str, spec: &Value) -> Vec<String> {
    match decode(&object(kind, spec)) {
        Decoded::Failed {
            key: Some(_),
            problems,
        } => problems.into_iter().map(|problem| problem.field).collect(),
        other => panic!("{spec}: {other:?}"),
    }
}

fn applies(spec: &Value) -> [bool; 2] {
    let (policy, problems) = decoded("NetworkPolicy", spec);
    assert_eq!(problems, [""; 0], "{spec}");
    Direction::ALL.map(|direction| policy.rules(direction).is_some())
}

#[test]
fn policy_types_that_are_left_out_follow_from_the_rules() {
    for (spec, expected) in [
        (json!({}), [true, false]),
        (json!({"egress": []}), [true, false]),
        (json!({"egress": null}), [true, false]),
        (json!({"egress": [{}]}), [true, true]),
        (json!({"policyTypes": [], "egress": [{}]}), [true, true]),
        (json!({"policyTypes": ["Egress"], "ingress": [{}]}), [false, true]),
        (json!({"policyTypes": ["Ingress"], "egress": [{}]}), [true, false]),
        (json!({"policyTypes": ["Ingress", "Egress"]}), [true, true]),
    ] {
        assert_eq!(applies(&spec), expected, "{spec}");
    }
}

#[test]
fn policy_lists_that_are_empty_or_absent_mean_everything() {
    let spec = json!({"ingress": [{}, {"from": [], "ports": []}, {"from": null, "ports": null}]});
    let (policy, _) = decoded("NetworkPolicy", &spec);
    for rule in policy.rules(Direction::Ingress).unwrap() {
        assert_eq!((&rule.peers, &rule.ports), (&None, &None));
    }
    let spec =
        json!({"ingress": [{"ports": [{}, {"protocol": "SCTP", "port": 7, "endPort": 9}, {"port": "web"}]}]});
    let (policy, _) = decoded("NetworkPolicy", &spec);
    let expected = [
        PortMatch::Protocol(Protocol::Tcp),
        PortMatch::Range(Protocol::Sctp, 7, 9),
        PortMatch::Named(Some(Protocol::Tcp), "web".into()),
    ];
    assert_eq!(
        policy.rules(Direction::Ingress).unwrap()[0].ports.as_deref(),
        Some(&expected[..])
    );
}

#[test]
fn policy_what_is_not_known_allows_nothing() {
    let everything = json!({"podSelector": {}});
    let (policy, problems) = decoded(
        "NetworkPolicy",
        &json!({"ingress": [
            {"from": [{"services": {}}, everything, {}], "ports": [{"protocol": "QUIC"}, {"port": 80, "alpn": "h2"}]},
            {"from": [everything], "when": "night"},
            {"from": [{"podSelector": {"matchRegex": "a"}}]},
        ]}),
    );
    let expected = [
        "spec.ingress[0].from[0].services",
        "spec.ingress[0].from[2]",
        "spec.ingress[0].ports[0].protocol",
        "spec.ingress[0].ports[1].alpn",
        "spec.ingress[1].when",
        "spec.ingress[2].from[0].podSelector.matchRegex",
    ];
    assert_eq!(problems, expected);
    let rules = policy.rules(Direction::Ingress).unwrap();
    let shape: Vec<_> = rules
        .iter()
        .map(|rule| {
            (
                rule.place,
                rule.peers.as_ref().map(Vec::len),
                rule.ports.as_ref().map(Vec::len),
            )
        })
        .collect();
    assert_eq!(shape, [(0, Some(1), Some(0)), (2, Some(0), None)]);
    for (spec, field) in [
        (
            json!({"ingress": [{}], "policyTypes": ["Ingress", "Forward"]}),
            "spec.policyTypes[1]",
        ),
        (json!({"ingress": [{}], "mode": "audit"}), "spec.mode"),
        (
            json!({"ingress": [{}], "podSelector": {"matchRegex": "a"}}),
            "spec.podSelector.matchRegex",
        ),
    ] {
        let (policy, problems) = decoded("NetworkPolicy", &spec);
        assert_eq!(problems, [field]);
        for direction in Direction::ALL {
            assert_eq!(policy.rules(direction), Some(&[][..]), "{spec}");
        }
    }
}

#[test]
fn policy_what_the_api_server_would_not_accept_is_refused() {
    let peer = |peer: Value| json!({"ingress": [{"from": [peer]}]});
    let block = |cidr: &str, except: Value| peer(json!({"ipBlock": {"cidr": cidr, "except": except}}));
    let port = |port: Value| json!({"ingress": [{"ports": [port]}]});
    let expression = |expression: Value| json!({"podSelector": {"matchExpressions": [expression]}});
    for (spec, field) in [
        (
            block("10.0.0.0/33", json!([])),
            "spec.ingress[0].from[0].ipBlock.cidr",
        ),
        (
            block("10.0.0.0/8", json!(["11.0.0.0/24"])),
            "spec.ingress[0].from[0].ipBlock.except[0]",
        ),
        (
            block("10.0.0.0/8", json!(["10.0.0.0/8"])),
            "spec.ingress[0].from[0].ipBlock.except[0]",
        ),
        (
            block("10.0.0.0/8", json!(["fd00::/64"])),
            "spec.ingress[0].from[0].ipBlock.except[0]",
        ),
        (
            peer(json!({"ipBlock": {"cidr": "::/0"}, "podSelector": {}})),
            "spec.ingress[0].from[0].ipBlock",
        ),
        (port(json!({"port": 0})), "spec.ingress[0].ports[0].port"),
        (port(json!({"port": 65536})), "spec.ingress[0].ports[0].port"),
        (port(json!({"port": ""})), "spec.ingress[0].ports[0].port"),
        (
            port(json!({"port": 80, "endPort": 79})),
            "spec.ingress[0].ports[0].endPort",
        ),
        (
            port(json!({"port": "web", "endPort": 80})),
            "spec.ingress[0].ports[0].endPort",
        ),
        (port(json!({"endPort": 80})), "spec.ingress[0].ports[0].endPort"),
        (
            expression(json!({"key": "a", "operator": "Gt", "values": ["1"]})),
            "spec.podSelector.matchExpressions[0].values",
        ),
        (
            expression(json!({"key": "a", "operator": "In"})),
            "spec.podSelector.matchExpressions[0].values",
        ),
        (
            expression(json!({"key": "a", "operator": "Exists", "values": ["b"]})),
            "spec.podSelector.matchExpressions[0].values",
        ),
        (json!({"ingress": {"from": []}}), "spec.ingress"),
    ] {
        assert_eq!(refused("NetworkPolicy", &spec)[0], field, "{spec}");
    }
}

#[test]
fn policy_ranges_may_be_spelled_oddly() {
    let spec = json!({"egress": [{"to": [
        {"ipBlock": {"cidr": "::ffff:10.1.0.0/112"}}, {"ipBlock": {"cidr": "010.001.2.3/16", "except": ["10.1.2.9/24"]}},
    ]}]});
    let (policy, problems) = decoded("NetworkPolicy", &spec);
    assert_eq!(problems, [""; 0]);
    let text = format!("{:?}", policy.rules(Direction::Egress).unwrap()[0].peers);
    assert_eq!(text.matches("10.1.0.0/16").count(), 2, "{text}");
    assert!(text.contains("10.1.2.0/24"), "{text}");
}

fn admin(rule: &Value) -> Value {
    json!({"priority": 7, "subject": {"namespaces": {}}, "egress": [rule]})
}

fn cluster(rule: &Value) -> Value {
    let mut spec = admin(rule);
    spec["tier"] = "Baseline".into();
    spec
}

#[test]
fn policy_tiers_and_priorities_are_read() {
    let rule = json!({"action": "Deny", "to": [{"namespaces": {}}]});
    let place = |kind, spec: &Value| {
        let (policy, problems) = decoded(kind, spec);
        assert_eq!(problems, [""; 0]);
        assert_eq!(policy.rules(Direction::Ingress), None);
        (policy.tier, policy.priority)
    };
    assert_eq!(place("AdminNetworkPolicy", &admin(&rule)), (Tier::Admin, 7));
    assert_eq!(
        place("ClusterNetworkPolicy", &cluster(&rule)),
        (Tier::Baseline, 7)
    );
    let baseline =
        json!({"subject": {"pods": {"namespaceSelector": {}, "podSelector": {}}}, "egress": [rule]});
    assert_eq!(
        place("BaselineAdminNetworkPolicy", &baseline),
        (Tier::Baseline, 1001)
    );
}

#[test]
fn policy_a_rule_of_a_tier_that_is_not_known_matches_nothing_or_denies_everything() {
    for unknown in [
        json!({"to": [{"namespaces": {}}, {}]}),
        json!({"to": [{"workloads": {}}]}),
        json!({"to": [{"domainNames": ["kubernetes.io"]}]}),
        json!({"to": [{"namespaces": {}}], "protocols": [{"icmp": {}}]}),
        json!({"to": [{"namespaces": {}}], "protocols": [{"tcp": {}}]}),
        json!({"to": [{"namespaces": {}}], "protocols": [{"udp": {}}]}),
        json!({"to": [{"namespaces": {}}], "protocols": [{"sctp": {"destinationPort": {}}}]}),
        json!({"to": [{"namespaces": {"matchExpressions": [{"key": "a", "operator": "Like", "values": ["b"]}]}}]}),
        json!({"to": [{"pods": {"podSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}}}]}),
        json!({"to": [{"namespaces": {}}], "ports": [{"portNumber": {"port": 80}}]}),
        json!({"to": [{"namespaces": {}}], "hours": "9-5"}),
    ] {
        for (action, expected) in [
            ("Accept", None),
            ("Deny", Some(Action::Deny)),
            ("Pass", Some(Action::Deny)),
        ] {
            let mut rule = unknown.clone();
            rule["action"] = action.into();
            let (policy, problems) = decoded("ClusterNetworkPolicy", &cluster(&rule));
            assert!(
                problems.iter().all(|field| field.starts_with("spec.egress[0]")),
                "{problems:?}"
            );
            assert!(!problems.is_empty());
            let rules = policy.rules(Direction::Egress).unwrap_or_default();
            assert_eq!(rules.first().map(|rule| rule.action), expected, "{rule}");
            assert!(
                rules
                    .iter()
                    .all(|rule| rule.peers.is_none() && rule.ports.is_none()),
                "{rule}"
            );
        }
    }
    let mut spec = cluster(&json!({"action": "Accept", "to": [{"namespaces": {}}]}));
    spec["schedule"] = "night".into();
    let (policy, problems) = decoded("ClusterNetworkPolicy", &spec);
    assert_eq!(problems, ["spec.schedule"]);
    for direction in Direction::ALL {
        assert_eq!(policy.rules(direction).unwrap()[0].action, Action::Deny);
    }
}

#[test]
fn policy_what_the_older_schemas_let_through_closes_its_rule() {
    for (rule, field) in [
        (
            json!({"to": [{"networks": ["10.0.0.0/8", "10.0.0.0/40"]}]}),
            "spec.egress[0].to[0].networks[1]",
        ),
        (
            json!({"to": [{"namespaces": {}}], "ports": [{"portRange": {"start": 9, "end": 8}}]}),
            "spec.egress[0].ports[0].portRange.end",
        ),
        (
            json!({"to": [{"namespaces": {"sameLabels": ["team"]}}]}),
            "spec.egress[0].to[0].namespaces.sameLabels",
        ),
        (
            json!({"to": [{"nodes": {"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["b"]}]}}]}),
            "spec.egress[0].to[0].nodes.matchExpressions[0].values",
        ),
    ] {
        for (action, expected) in [("Allow", None), ("Deny", Some(Action::Deny))] {
            let mut rule = rule.clone();
            rule["action"] = action.into();
            let (policy, problems) = decoded("AdminNetworkPolicy", &admin(&rule));
            assert_eq!(problems, [field, "spec.egress[0]"]);
            let rules = policy.rules(Direction::Egress).unwrap_or_default();
            let found = rules.first().map(|rule| (rule.action, rule.peers.is_none()));
            assert_eq!(found, expected.map(|action| (action, true)), "{rule}");
        }
    }
}

#[test]
fn policy_tiers_refuse_what_their_api_does() {
    let to = json!([{"namespaces": {}}]);
    for (kind, rule, field) in [
        (
            "AdminNetworkPolicy",
            json!({"action": "Accept", "to": to}),
            "spec.egress[0].action",
        ),
        (
            "ClusterNetworkPolicy",
            json!({"action": "Allow", "to": to}),
            "spec.egress[0].action",
        ),
        (
            "AdminNetworkPolicy",
            json!({"action": "Deny"}),
            "spec.egress[0].to",
        ),
        (
            "AdminNetworkPolicy",
            json!({"action": "Deny", "to": []}),
            "spec.egress[0].to",
        ),
        (
            "ClusterNetworkPolicy",
            json!({"action": "Deny", "to": to, "protocols": []}),
            "spec.egress[0].protocols",
        ),
        (
            "ClusterNetworkPolicy",
            json!({"action": "Deny", "to": to, "protocols": [{"udp": {"destinationPort": {"range": {"start": 9, "end": 8}}}}]}),
            "spec.egress[0].protocols[0].udp.destinationPort.range.end",
        ),
        (
            "AdminNetworkPolicy",
            json!({"action": "Deny", "to": [{"namespaces": {}, "nodes": {}}]}),
            "spec.egress[0].to[0]",
        ),
    ] {
        let spec = if kind == "ClusterNetworkPolicy" {
            cluster(&rule)
        } else {
            admin(&rule)
        };
        assert_eq!(refused(kind, &spec), [field], "{rule}");
    }
    let rule = json!({"action": "Deny", "to": to});
    let with = |field: &str, value: Value| {
        let mut spec = cluster(&rule);
        spec[field] = value;
        refused("ClusterNetworkPolicy", &spec)
    };
    assert_eq!(with("tier", json!("Middle")), ["spec.tier"]);
    assert_eq!(with("priority", json!(1001)), ["spec.priority"]);
    assert_eq!(with("priority", Value::Null), ["spec.priority"]);
    assert_eq!(with("subject", json!({})), ["spec.subject"]);
    let mut pass = admin(&json!({"action": "Pass", "to": to}));
    pass["priority"].take();
    assert_eq!(
        refused("BaselineAdminNetworkPolicy", &pass),
        ["spec.egress[0].action"]
    );
}

#[test]
fn policy_dry_run_is_meant_only_when_it_is_said_plainly() {
    let decoded = |value: &str| {
        let mut object = object("NetworkPolicy", &json!({}));
        object["metadata"]["annotations"] = json!({"dataplane/dry-run": value});
        match decode(&object) {
            Decoded::Object {
                object: Object::Policy(policy),
                problems,
                ..
            } => (policy.dry_run, problems.len()),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(
        ["true", "false", "yes"].map(decoded),
        [(true, 0), (false, 0), (false, 1)]
    );
}

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::*;
use crate::{
    compile::policy::{PolicyCompiler, Subjects},
    decode::{Decoded, decode},
    model::{Index, Name},
    store::{
        Limits,
        memory::Memory,
        policy::{PolicyLimits, PolicyStore as _},
    },
    sync::policy::{BoundPod, PolicySyncer},
};

const LIMITS: Limits = Limits {
    frontends: 2,
    services: 2,
    backends: 2,
    maglev: 2,
    source_ranges: 2,
    policy: PolicyLimits::new(100, 100, 400),
};
const WEB: u32 = 7;

fn pod(name: &str, last: u8) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "shop", "labels": {"app": name}},
        "spec": {"nodeName": "n1"}, "status": {"phase": "Running", "podIPs": [{"ip": format!("10.0.0.{last}")}]},
    })
}

fn policy(name: &str, about: &str, dry_run: &str, spec: &Value) -> Value {
    let mut spec = spec.clone();
    spec["podSelector"] = json!({"matchLabels": {"app": about}});
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": "shop", "annotations": {"dataplane/dry-run": dry_run}}, "spec": spec,
    })
}

/// Tables in which `web` takes 8080 and 8081 from `client`, and 53 from a range; a dry run would leave it egress to a port.
fn memory() -> Memory {
    let ingress = json!({"policyTypes": ["Ingress"], "ingress": [
        {"from": [{"podSelector": {"matchLabels": {"app": "client"}}}], "ports": [{"port": 8080, "endPort": 8081}]},
        {"from": [{"ipBlock": {"cidr": "192.0.2.0/24"}}], "ports": [{"port": 53, "protocol": "UDP"}]},
    ]});
    let egress = json!({"policyTypes": ["Egress"], "egress": [{"ports": [{"port": 443}]}]});
    let objects = [
        pod("web", 1),
        pod("client", 2),
        policy("in", "web", "false", &ingress),
        policy("trial", "web", "true", &egress),
    ];
    let mut index = Index::new("n1");
    let mut compiler = PolicyCompiler::new(Subjects::Node("n1".into()));
    let mut memory = Memory::new(LIMITS);
    let mut syncer = PolicySyncer::restore(&memory).unwrap();
    for object in &objects {
        let Decoded::Object { object, .. } = decode(object) else {
            panic!("{object}")
        };
        let dirty = index.apply(object);
        syncer.update(compiler.update(&index, &dirty.policy));
    }
    let bound = |name: &str, last: u8| BoundPod {
        name: Name::new("shop", name),
        addrs: vec![[10, 0, 0, last].into()],
    };
    syncer.set_pods([(WEB, bound("web", 1)), (8, bound("client", 2))].into());
    let report = syncer.run(&mut memory, &compiler);
    assert!(report.failed.is_empty(), "{:?}", report.failed);
    memory.put_bound([10, 0, 0, 1].into(), WEB).unwrap();
    memory.put_bound([10, 0, 0, 2].into(), 8).unwrap();
    memory.put_bound([10, 0, 0, 3].into(), 9).unwrap();
    memory.put_source_checked(WEB).unwrap();
    let sets = memory.policy.pods[&WEB];
    let first = memory.policy.sets[sets.ingress as usize].rules;
    let hits = |decided, dry_run| Hits { decided, dry_run };
    memory.policy.hits.insert(Counted::Rule(first), hits(5, 0));
    memory.policy.hits.insert(Counted::Set(sets.ingress), hits(3, 0));
    memory
        .policy
        .hits
        .insert(Counted::Set(sets.audit_egress), hits(0, 2));
    memory
}

#[test]
fn each_pod_is_its_addresses_and_how_much_is_decided_about_it() {
    let memory = memory();
    let pods = EnforcedTables::read(&memory).unwrap().pods().unwrap();
    let web = TablePod {
        ifindex: WEB,
        addresses: vec![[10, 0, 0, 1].into()],
        source_checked: true,
        ingress: TableDirection {
            isolated: true,
            rules: 2,
            verdicts: 8,
            dry_run: 0,
        },
        egress: TableDirection {
            dry_run: 2,
            ..TableDirection::default()
        },
    };
    assert_eq!(pods[0], web);
    assert_eq!((pods[1].ingress, pods[1].egress), Default::default());
    // An interface that nobody knows is closed.
    assert!(pods[2].ingress.isolated && pods[2].egress.isolated, "{pods:?}");
    assert_eq!(pods.len(), 3);
}

#[test]
fn rules_are_told_with_their_peers_and_ports_as_the_tables_have_them() {
    let memory = memory();
    let tables = EnforcedTables::read(&memory).unwrap();
    let of_pod = tables.of([10, 0, 0, 1].into()).unwrap().unwrap();
    let [of_in, none] = of_pod.ingress.policies.as_slice() else {
        panic!("{of_pod:?}")
    };
    assert!(of_pod.ingress.isolated && !of_pod.egress.isolated);
    assert!(of_in.policy.starts_with("policy number "), "{of_in:?}");
    assert_eq!(
        (of_in.tier.as_str(), of_in.pods, of_in.dry_run),
        ("NetworkPolicy", 1, false)
    );
    let words = |rule: &EnforcedRule| {
        let EnforcedRule { peers, ports, .. } = rule.clone();
        (rule.rule, rule.action.clone(), peers, ports, rule.verdicts)
    };
    let expected = |rule, peers: &str, ports: &str, verdicts| {
        (
            Some(rule),
            "allow".to_owned(),
            peers.to_owned(),
            ports.to_owned(),
            verdicts,
        )
    };
    assert_eq!(
        words(&of_in.rules[0]),
        expected(0, "10.0.0.2", "8080-8081/TCP", 5)
    );
    assert_eq!(words(&of_in.rules[1]), expected(1, "192.0.2.0/24", "53/UDP", 0));
    assert_eq!((none.rules[0].rule, none.rules[0].verdicts), (None, 3));
    let [trial, none] = of_pod.egress.policies.as_slice() else {
        panic!("{of_pod:?}")
    };
    assert!(trial.dry_run && none.dry_run);
    assert_eq!(
        (trial.rules[0].ports.as_str(), trial.rules[0].peers.as_str()),
        ("443/TCP", "any")
    );
    assert_eq!((none.rules[0].verdicts, none.rules[0].dry_run), (0, 2));
    assert!(
        tables
            .of([10, 0, 0, 2].into())
            .unwrap()
            .unwrap()
            .ingress
            .policies
            .is_empty()
    );
    assert_eq!(tables.of([192, 0, 2, 1].into()).unwrap(), None);
}

#[test]
fn rows_that_no_hook_asks_for_are_left_out() {
    let mut memory = memory();
    memory.write_policy_revision(REVISION_NONE).unwrap();
    let pods = EnforcedTables::read(&memory).unwrap().pods().unwrap();
    let isolated: BTreeSet<bool> = pods.iter().map(|pod| pod.ingress.isolated).collect();
    assert_eq!(isolated, BTreeSet::from([false]));
}

#[test]
fn a_rules_tier_is_told_by_its_place_in_the_set() {
    let set = |flags| PolicySet {
        admin_rules: 2,
        flags,
        ..PolicySet::default()
    };
    assert_eq!(tier_of(&set(0), 1), Tier::Admin);
    assert_eq!(tier_of(&set(0), 2), Tier::Namespace);
    assert_eq!(tier_of(&set(set_flags::ALLOW_BY_DEFAULT), 2), Tier::Baseline);
}

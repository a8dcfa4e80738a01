//! What things cost where there are many, and what is shared.

use std::collections::BTreeSet;

use dataplane_common::policy::SET_NONE;
use dataplane_tests::test_run::counting::Counting;
use serde_json::{Value, json};

use super::{Cluster, object_of};
use crate::{
    compile::policy::{
        Subjects,
        classes::Place,
        tables::{Tables, judge},
    },
    model::{Dirty, Name, policy::Direction},
};

fn pod(namespace: &str, name: &str, ip: &str, labels: &Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": {"nodeName": "n1", "containers": [{"name": "c"}]},
        "status": {"phase": "Running", "podIPs": [{"ip": ip}]},
    })
}

fn policy(name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": "x"}, "spec": spec,
    })
}

/// A pod with so many rules, the last of which lets pod `x/b` in at port 80, in a cluster with so many other policies and
/// pods.
fn crowd(rules: u16, policies: usize, peers: usize) -> Cluster {
    let mut cluster = Cluster::about(Subjects::Node("n1".into()));
    let mut dirty = Dirty::default();
    let mut apply = |object: &Value| dirty.merge(cluster.index.apply(object_of(object).1));
    let rule = |port: u16| json!({"from": [{"podSelector": {"matchLabels": {"app": "b"}}}], "ports": [{"port": port}]});
    let ingress: Vec<Value> = (1..rules).map(|i| rule(1000 + i)).chain([rule(80)]).collect();
    apply(&policy(
        "p",
        &json!({"podSelector": {"matchLabels": {"app": "a"}}, "ingress": ingress}),
    ));
    apply(&pod("x", "a", "10.0.0.1", &json!({"app": "a"})));
    apply(&pod("x", "b", "10.0.0.2", &json!({"app": "b"})));
    for i in 1..policies {
        let spec = json!({"podSelector": {"matchLabels": {"app": format!("other-{i}")}}, "ingress": [{}]});
        apply(&policy(&format!("other-{i}"), &spec));
    }
    for i in 1..peers {
        let mut other = pod(
            "x",
            &format!("b{i}"),
            &format!("10.1.{}.{}", i / 256, i % 256),
            &json!({"app": "b"}),
        );
        other["spec"]["nodeName"] = "n2".into();
        apply(&other);
    }
    cluster.compiler.update(&cluster.index, &dirty.policy);
    cluster
}

#[test]
fn policy_a_verdict_takes_as_many_lookups_in_a_crowd_as_alone() {
    let lookups = |cluster: &Cluster| {
        let tables = Tables::of(&cluster.compiler);
        let set = cluster.compiler.set_of(&Name::new("x", "a"), Direction::Ingress);
        let counting = Counting::new(&tables);
        assert!(judge(&counting, set, "10.0.0.2".parse().unwrap(), 6, 80).is_allowed());
        counting.lookups()
    };
    let alone = lookups(&crowd(1, 1, 1));
    assert_eq!(alone, 7);
    assert_eq!(lookups(&crowd(1024, 1, 1)), alone, "rules");
    assert_eq!(lookups(&crowd(1, 10_000, 1)), alone, "policies");
    assert_eq!(lookups(&crowd(1, 1, 10_000)), alone, "peers");
}

#[test]
fn policy_a_label_moves_one_address_and_compiles_one_pod() {
    let mut cluster = crowd(100, 1_000, 1_000);
    let mut other = pod("x", "b7", "10.1.0.7", &json!({"app": "c"}));
    other["spec"]["nodeName"] = "n2".into();
    let changes = cluster.apply(&other);
    assert_eq!(changes.places, [Place::Addr("10.1.0.7".parse().unwrap())].into());
    assert_eq!(changes.pods, [].into());
    let changes = cluster.apply(&pod("x", "a", "10.0.0.1", &json!({"app": "other-5"})));
    assert_eq!(changes.places, [].into());
    assert_eq!(changes.pods, [Name::new("x", "a")].into());
}

#[test]
fn policy_a_peer_that_is_everybody_moves_nobody() {
    let mut cluster = crowd(1, 1, 1_000);
    let before = cluster.compiler.classes().places().count();
    let everybody = json!({"podSelector": {}, "ingress": [{"from": [{"namespaceSelector": {}}]}]});
    assert_eq!(cluster.apply(&policy("all", &everybody)).places, [].into());
    // The larger part stays where it is.
    let most =
        json!({"podSelector": {}, "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "a"}}}]}]});
    assert!(cluster.apply(&policy("some", &most)).places.len() <= 1);
    assert_eq!(cluster.compiler.classes().places().count(), before);
}

#[test]
fn policy_more_rules_than_a_set_holds_close_the_pod_and_say_so() {
    let name = Name::new("x", "a");
    let judged = |cluster: &Cluster, port| {
        let tables = Tables::of(&cluster.compiler);
        let set = cluster.compiler.set_of(&name, Direction::Ingress);
        judge(&tables, set, "10.0.0.2".parse().unwrap(), 6, port).is_allowed()
    };
    let mut cluster = crowd(1025, 1, 1);
    assert!(!judged(&cluster, 80) && !judged(&cluster, 1001));
    let problems = &cluster.compiler.pods()[&name].problems;
    assert!(
        problems[0].reason.starts_with("1025 ingress rules"),
        "{problems:?}"
    );
    assert_eq!(cluster.compiler.set_of(&name, Direction::Egress), SET_NONE);
    cluster.compiler.drop_unused();
    assert_eq!(
        cluster.classes(),
        1,
        "atoms of rules that are not in force are gone"
    );
    let cluster = crowd(1024, 1, 1);
    assert!(judged(&cluster, 80) && judged(&cluster, 1001));
    assert_eq!(cluster.compiler.pods()[&name].problems, []);
}

#[test]
fn policy_pods_that_are_alike_share_a_set_and_what_is_unused_goes() {
    let mut cluster = crowd(3, 1, 1);
    cluster.apply(&pod(
        "x",
        "a2",
        "10.0.0.3",
        &json!({"app": "a", "more": "labels"}),
    ));
    let sets: BTreeSet<u32> = cluster.compiler.pods().values().map(|pod| pod.sets[0]).collect();
    assert_eq!(sets.len(), 2, "one, and none for x/b");
    for name in ["a", "a2"] {
        cluster.apply(&pod("x", name, "10.0.0.9", &json!({})));
    }
    assert_eq!(
        cluster.compiler.sets().iter().count(),
        1,
        "kept until it is let go"
    );
    cluster.compiler.drop_unused();
    assert_eq!(cluster.compiler.sets().iter().count(), 0);
}

#[test]
fn policy_an_address_belongs_to_the_pod_that_lives() {
    let mut cluster = Cluster::about(Subjects::Node("n1".into()));
    cluster.apply(&pod("x", "a", "10.0.0.1", &json!({"app": "a"})));
    let spec =
        json!({"podSelector": {}, "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "b"}}}]}]});
    cluster.apply(&policy("p", &spec));
    let let_in = |cluster: &Cluster| {
        let tables = Tables::of(&cluster.compiler);
        let set = cluster.compiler.set_of(&Name::new("x", "a"), Direction::Ingress);
        judge(&tables, set, "10.0.0.2".parse().unwrap(), 6, 80).is_allowed()
    };
    let aged = |name, app, created: &str| {
        let mut pod = pod("x", name, "10.0.0.2", &json!({"app": app}));
        pod["metadata"]["creationTimestamp"] = created.into();
        pod
    };
    let mut old = aged("old", "b", "2026-01-01T00:00:00Z");
    cluster.apply(&old);
    assert!(let_in(&cluster));
    cluster.apply(&aged("new", "c", "2026-01-02T00:00:00Z"));
    assert!(!let_in(&cluster), "the later one has it");
    cluster.apply(&aged("new", "b", "2026-01-02T00:00:00Z"));
    old["metadata"]["labels"] = json!({});
    cluster.apply(&old);
    assert!(let_in(&cluster));
    let mut leaving = aged("new", "b", "2026-01-02T00:00:00Z");
    leaving["metadata"]["deletionTimestamp"] = "2026-01-03T00:00:00Z".into();
    cluster.apply(&leaving);
    assert!(!let_in(&cluster), "one that is not terminating comes first");
}

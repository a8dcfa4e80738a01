use std::sync::Arc;

use super::Index;
use crate::{
    decode::{Decoded, decode},
    model::{
        Kind, Name, ObjectRef,
        policy::{NamespaceSet, Operator, Requirement, Selector},
    },
};

fn apply(index: &mut Index, object: &serde_json::Value) {
    let Decoded::Object { object, .. } = decode(object) else {
        panic!("not decoded: {object}");
    };
    index.apply(object);
}

fn pod(namespace: &str, name: &str, node: &str) -> serde_json::Value {
    serde_json::json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": namespace, "name": name},
        "spec": {"nodeName": node, "containers": []},
    })
}

#[test]
fn pods_are_found_by_their_namespaces() {
    let mut index = Index::new("n1");
    // One name is the beginning of the others.
    for namespace in ["a", "a-b", "ab", "b"] {
        apply(&mut index, &pod(namespace, "one", "n1"));
        apply(&mut index, &pod(namespace, "two", "n2"));
    }
    apply(
        &mut index,
        &serde_json::json!({
            "apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "a-b", "labels": {"team": "x"}},
        }),
    );
    let found = |set: &NamespaceSet| {
        let names = index.pods_in(set).map(|pod| pod.name.to_string());
        names.collect::<Vec<_>>().join(" ")
    };
    let labelled = |key: &str, operator: Operator| {
        let key = Arc::from(key);
        let requirements = vec![Requirement { key, operator }];
        NamespaceSet::Labelled(Selector { requirements })
    };
    assert_eq!(found(&NamespaceSet::One("a".into())), "a/one a/two");
    assert_eq!(found(&NamespaceSet::One("c".into())), "");
    assert_eq!(found(&labelled("team", Operator::Exists)), "a-b/one a-b/two");
    assert_eq!(
        found(&labelled("team", Operator::DoesNotExist)),
        "a/one a/two ab/one ab/two b/one b/two",
        "namespaces without an object of their own count too"
    );
    assert_eq!(
        found(&NamespaceSet::Labelled(Selector::default()))
            .split(' ')
            .count(),
        8
    );
}

#[test]
fn pods_of_this_node_are_those_that_are_here_now() {
    let mut index = Index::new("n1");
    let local = |index: &Index| {
        index
            .local_pods()
            .map(|pod| pod.name.to_string())
            .collect::<Vec<_>>()
    };
    apply(&mut index, &pod("a", "one", "n1"));
    apply(&mut index, &pod("a", "two", "n2"));
    assert_eq!(local(&index), ["a/one"]);
    apply(&mut index, &pod("a", "one", "n2"));
    apply(&mut index, &pod("a", "two", "n1"));
    assert_eq!(local(&index), ["a/two"]);
    index.delete(&ObjectRef {
        kind: Kind::Pod,
        name: Name::new("a", "two"),
    });
    assert_eq!(local(&index), [""; 0]);
}

#[test]
fn policies_are_counted_by_their_kinds() {
    let mut index = Index::new("n1");
    let policy = |namespace: &str| {
        serde_json::json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"namespace": namespace, "name": "p"}, "spec": {"podSelector": {}},
        })
    };
    apply(&mut index, &policy("a"));
    apply(&mut index, &policy("b"));
    let mut other = policy("a");
    other["spec"]["policyTypes"] = serde_json::json!(["Egress"]);
    apply(&mut index, &other);
    let count = |index: &Index| {
        (
            index.count(Kind::NetworkPolicy),
            index.count(Kind::AdminNetworkPolicy),
        )
    };
    assert_eq!(count(&index), (2, 0));
    let key = ObjectRef {
        kind: Kind::NetworkPolicy,
        name: Name::new("b", "p"),
    };
    index.delete(&key);
    index.delete(&key);
    assert_eq!(count(&index), (1, 0));
}

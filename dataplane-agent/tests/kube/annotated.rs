//! The annotation of the agent's own Node: there when it should be, there again on a new Node, and no matter where it may not
//! be written.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use dataplane_agent::source::kube::STATUS;
use dataplane_tests::agent::patient;
use serde_json::{Value, json};

use super::seen::{Bed, NODE, service};

/// Two writes are some 15 s apart.
const WITHIN: Duration = Duration::from_mins(1);
const ROLE: &str = "/apis/rbac.authorization.k8s.io/v1/clusterroles/dataplane-agent";

#[test]
fn the_node_says_what_its_agent_says() {
    let Some(bed) = Bed::start() else { return };
    // Somebody else's, which stays.
    let other = json!({"metadata": {"annotations": {"other": "kept"}, "labels": {"rack": "7"}}});
    bed.client
        .patch(&format!("/api/v1/nodes/{NODE}"), &other)
        .unwrap()
        .done()
        .unwrap();
    let mut seen = bed.follow();
    seen.until("the first list", |seen| seen.is_complete);
    assert_eq!(of_node(&bed)[STATUS], Value::Null);
    seen.say(r#"{"ready":false}"#);
    until(&bed, "it is written", r#"{"ready":false}"#);
    assert_eq!(of_node(&bed)["other"], "kept");
    seen.say(r#"{"ready":true}"#);
    until(&bed, "the change is written", r#"{"ready":true}"#);

    // A machine that comes back has a new Node.
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}});
    bed.delete(&node);
    seen.until("the Node is gone", |seen| !seen.has("Node node1"));
    bed.apply(&node);
    until(&bed, "the new Node says it too", r#"{"ready":true}"#);

    let role = bed.client.get(ROLE).unwrap().done().unwrap();
    let rules = role["rules"].as_array().unwrap();
    let may_not: Vec<&Value> = rules
        .iter()
        .filter(|rule| rule["resources"] != json!(["nodes"]))
        .collect();
    assert_eq!(may_not.len() + 1, rules.len(), "the right has a rule of its own");
    bed.client
        .patch(ROLE, &json!({"rules": may_not}))
        .unwrap()
        .done()
        .unwrap();
    let asked = seen.report().requests;
    seen.say(r#"{"ready":"maybe"}"#);
    bed.apply(&service("a", 1));
    seen.until("all else goes on", |seen| seen.has("Service ns/a"));
    let end = Instant::now() + patient(WITHIN);
    while seen.report().requests == asked {
        assert!(Instant::now() < end, "it was tried");
        sleep(Duration::from_millis(100));
    }
    seen.for_a_time(Duration::from_secs(3));
    assert_eq!(
        of_node(&bed)[STATUS],
        r#"{"ready":true}"#,
        "the server refuses it"
    );
    assert!(seen.rejected.is_empty(), "an aid that fails is no problem");
}

fn of_node(bed: &Bed) -> Value {
    let node = bed.client.get(&format!("/api/v1/nodes/{NODE}"));
    node.unwrap().done().unwrap()["metadata"]["annotations"].clone()
}

#[track_caller]
fn until(bed: &Bed, what: &str, text: &str) {
    let end = Instant::now() + patient(WITHIN);
    loop {
        let annotations = of_node(bed);
        if annotations[STATUS] == text {
            return;
        }
        assert!(Instant::now() < end, "{what}: {annotations}");
        sleep(Duration::from_millis(100));
    }
}

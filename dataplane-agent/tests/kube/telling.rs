//! Kubernetes Events: on the object concerned, once for all nodes, within bounds, and only where we may.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use dataplane_agent::{
    events::{Event, Reason},
    model::{Name, ObjectRef},
};
use dataplane_tests::agent::patient;
use serde_json::{Value, json};

use super::seen::{Bed, NODE, Seen, service};

const WITHIN: Duration = Duration::from_secs(30);

#[test]
fn events_stand_on_their_objects_once() {
    let Some(bed) = Bed::start() else { return };
    bed.apply(&service("a", 1));
    let kubeconfig = bed.kubeconfig();
    let mut nodes = [NODE, "node2"].map(|node| Seen::start(&kubeconfig, &[], node));
    let refused = event(
        Reason::NotServed,
        "a",
        "Service ns/a: spec.ports[0].protocol: SCTP is not served",
    );
    for node in &mut nodes {
        node.until("the first list", |seen| seen.has("Service ns/a"));
        node.tell(&refused);
    }
    let told = until(&bed, "both nodes have told it", |events| events.len() == 1);
    sleep(Duration::from_secs(4));
    assert_eq!(events(&bed).len(), 1, "the second node found it told");
    let event = &told[0];
    let uid = bed
        .client
        .get("/api/v1/namespaces/ns/services/a")
        .unwrap()
        .done()
        .unwrap()["metadata"]["uid"]
        .clone();
    assert_eq!(event["involvedObject"]["uid"], uid);
    assert_eq!(event["involvedObject"]["kind"], "Service");
    assert_eq!(
        (&event["type"], &event["reason"]),
        (&json!("Warning"), &json!("NotServed"))
    );
    assert_eq!(event["message"], refused.note);
    // Again: whoever wrote it counts.
    for node in &mut nodes {
        node.tell(&refused);
    }
    until(&bed, "it is counted again", |events| {
        events.len() == 1 && events[0]["count"].as_u64() >= Some(2)
    });
    of_one_node(&bed, &mut nodes);
    without_the_right(&bed, &nodes[0]);
}

/// A full table is each node's own.
fn of_one_node(bed: &Bed, nodes: &mut [Seen; 2]) {
    let full = event(
        Reason::TableFull,
        "a",
        "Service ns/a: 10.96.1.1:80/TCP: table FRONTENDS_V4 is full",
    );
    for node in &mut *nodes {
        node.tell(&full);
    }
    until(bed, "each node has told it", |events| {
        events
            .iter()
            .filter(|event| event["reason"] == "TableFull")
            .count()
            == 2
    });
    // What is gone has no events.
    nodes[0].tell(&event(Reason::NotServed, "gone", "Service ns/gone: spec: wrong"));
    sleep(Duration::from_secs(3));
    assert_eq!(events(bed).len(), 3);
}

fn without_the_right(bed: &Bed, node: &Seen) {
    let path = "/apis/rbac.authorization.k8s.io/v1/clusterroles/dataplane-agent";
    let role = bed.client.get(path).unwrap().done().unwrap();
    let is_other = |rule: &&Value| rule["resources"] != json!(["events"]);
    let rules: Vec<&Value> = role["rules"]
        .as_array()
        .unwrap()
        .iter()
        .filter(is_other)
        .collect();
    bed.client
        .patch(path, &json!({"rules": rules}))
        .unwrap()
        .done()
        .unwrap();
    node.tell(&event(Reason::NotServed, "a", "Service ns/a: another thing"));
    sleep(Duration::from_secs(4));
    assert_eq!(events(bed).len(), 3, "nothing was sent");
    assert!(
        node.report().kinds["Service"].failing.is_none(),
        "and all else goes on"
    );
}

fn event(reason: Reason, service: &str, note: &str) -> Event {
    Event {
        reason,
        regarding: Some(ObjectRef::service(&Name::new("ns", service))),
        note: note.to_owned(),
    }
}

fn events(bed: &Bed) -> Vec<Value> {
    let list = bed
        .client
        .get("/api/v1/namespaces/ns/events")
        .unwrap()
        .done()
        .unwrap();
    list["items"].as_array().unwrap().clone()
}

#[track_caller]
fn until(bed: &Bed, what: &str, holds: impl Fn(&[Value]) -> bool) -> Vec<Value> {
    let end = Instant::now() + patient(WITHIN);
    loop {
        let found = events(bed);
        if holds(&found) {
            return found;
        }
        assert!(Instant::now() < end, "{what}: {found:?}");
        sleep(Duration::from_millis(100));
    }
}

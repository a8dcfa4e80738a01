//! What an agent tells the API server: Events on the objects that it does not serve whole, as `kubectl describe` shows them.

use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dataplane_tests::agent::{self, AgentOptions, Agents, patient};
use dataplane_tests::api::{self, served::Served};
use dataplane_tests::cluster::Cluster;
use dataplane_tests::manifests::{self, Manifests, pod};
use dataplane_tests::places::{Owned, Places};
use dataplane_tests::process::Helper;
use dataplane_tests::shape::{Network, NodeShape, PodShape, Shape, parse_prefix};
use serde_json::{Value, json};

const WITHIN: Duration = Duration::from_mins(1);
/// Rules that a Pod may have in one direction.
const RULES: u16 = 1024;

#[test]
fn what_is_not_served_has_events() -> Result<()> {
    let (Some(program), Some(binaries)) = (agent::built(), api::binaries()) else {
        return Ok(());
    };
    let folder = Owned(Places::create("told-api")?);
    let served = Arc::new(Served::start(&binaries, &folder.0.work.join("server"))?);
    let helper = Helper::new(env!("CARGO_BIN_EXE_dataplane-scenarios"));
    let cluster = Cluster::build("told", shape()?, &helper)?;
    let objects = Manifests::create_in(&cluster.places().work, Some(&served))?;
    objects.apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "ns1"}}))?;
    for node in &cluster.shape().nodes {
        objects.apply(&manifests::node(node))?;
        for one in &cluster.shape().pods {
            objects.apply(&pod(one, "ns1", &node.addresses))?;
        }
    }
    let options = AgentOptions {
        program,
        // One frontend has room, beside that of the Service `kubernetes`.
        flags: [
            "--health-addr",
            "off",
            "--metrics-bind-address",
            "off",
            "--max-frontends",
            "2",
        ]
        .map(str::to_owned)
        .to_vec(),
    };
    let mut agents = Agents::reading(&cluster, &objects, options)?;
    agents.settled()?;

    let [crowded, wrong, large] = [crowded(), wrong(), large()];
    for object in [&crowded, &wrong, &large] {
        objects.apply(object)?;
    }
    let told = [
        ("Service", "crowded", "TableFull", "FRONTENDS_V4"),
        ("ClusterNetworkPolicy", "wrong", "NotServed", "spec.tier"),
        ("Pod", "client1", "NotServed", "nothing is allowed"),
    ];
    for (kind, name, reason, text) in told {
        wait_for(&served, kind, name, reason, text)?;
    }
    for object in [&crowded, &wrong, &large] {
        objects.delete(object)?;
    }
    // The server itself takes what is gone from its lists; what is told of other objects stays as it is.
    agents.settled()
}

/// One node with a Pod.
fn shape() -> Result<Shape> {
    let node = NodeShape {
        name: "node1".to_owned(),
        addresses: vec!["192.168.77.11".parse()?],
        extra_addresses: Vec::new(),
        pod_cidrs: vec![parse_prefix("10.244.1.0/24")?],
    };
    let client = PodShape {
        name: "client1".to_owned(),
        node: node.name.clone(),
        addresses: vec!["10.244.1.10".parse()?],
        host_network: false,
    };
    Ok(Shape {
        nodes: vec![node],
        pods: vec![client],
        externals: Vec::new(),
        network: Network::Routed,
    })
}

/// More frontends than there is room for.
fn crowded() -> Value {
    let ports = (80..90).map(|port| json!({"name": format!("p{port}"), "port": port}));
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "crowded", "namespace": "ns1"},
        "spec": {"clusterIP": "10.96.0.41", "ports": ports.collect::<Vec<Value>>()},
    })
}

/// The definition takes it, the API does not have such a tier.
fn wrong() -> Value {
    json!({
        "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy",
        "metadata": {"name": "wrong"},
        "spec": {"tier": "Middle", "priority": 1, "subject": {"namespaces": {}}},
    })
}

/// More rules than a Pod may have: told of the Pod, which is closed.
fn large() -> Value {
    let rules = (0..=RULES).map(|number| {
        let cidr = format!("10.{}.{}.0/24", number >> 8, number & 255);
        json!({"from": [{"ipBlock": {"cidr": cidr}}], "ports": [{"port": 1000 + number}]})
    });
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "large", "namespace": "ns1"},
        "spec": {"podSelector": {}, "ingress": rules.collect::<Vec<Value>>()},
    })
}

/// Waits for an Event of an object, as `kubectl get events -A` lists them.
fn wait_for(served: &Served, kind: &str, name: &str, reason: &str, text: &str) -> Result<()> {
    let end = Instant::now() + patient(WITHIN);
    loop {
        let list = served.client.get("/api/v1/events")?.done()?;
        let events = list["items"].as_array().context("no list of events")?;
        let is_it = |event: &&Value| {
            event["involvedObject"]["kind"] == kind
                && event["involvedObject"]["name"] == name
                && event["reason"] == reason
                && event["type"] == "Warning"
                && event["message"]
                    .as_str()
                    .is_some_and(|message| message.contains(text))
        };
        if events.iter().any(|event| is_it(&event)) {
            return Ok(());
        }
        ensure!(
            Instant::now() < end,
            "no Event {reason} of {kind} {name} with {text}: {events:#?}"
        );
        sleep(Duration::from_millis(200));
    }
}

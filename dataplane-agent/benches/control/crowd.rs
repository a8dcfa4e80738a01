//! The objects of a cluster with many pods and policies, as its manifests have them: namespaces of apps, each with its
//! replicas spread over the nodes, and policies of the shapes that people write.

use std::net::Ipv4Addr;

use serde_json::{Value, json};

/// The node that the agent runs on.
pub const NODE: &str = "node-000";
pub const NAMESPACES: usize = 250;
pub const APPS: usize = 20;
const PODS_A_NODE: usize = 100;
const POLICIES_OF_CLUSTER: usize = 10;

/// How much there is.
#[derive(Clone, Copy, Debug)]
pub struct Crowd {
    pub pods: usize,
    pub policies: usize,
    /// Distinct ones, in `ipBlock` and its `except`.
    pub cidrs: usize,
}

impl Crowd {
    /// The number of a namespace's pods.
    pub fn pods_of(self, namespace: usize) -> usize {
        self.pods / NAMESPACES + usize::from(namespace < self.pods % NAMESPACES)
    }

    fn policies_of(self, namespace: usize) -> usize {
        let policies = self.policies - POLICIES_OF_CLUSTER;
        policies / NAMESPACES + usize::from(namespace < policies % NAMESPACES)
    }

    fn nodes(self) -> usize {
        self.pods.div_ceil(PODS_A_NODE)
    }

    /// The node of a pod, by its place in its namespace.
    pub fn node_of(self, namespace: usize, place: usize) -> usize {
        (place + namespace * 2) % self.nodes()
    }

    /// A namespace, with its pods and its policies.
    pub fn namespace(self, number: usize) -> Vec<Value> {
        let pods = (0..self.pods_of(number)).map(|place| self.pod(number, place));
        let policies = (0..self.policies_of(number)).map(|place| self.policy(number, place));
        let namespace = std::iter::once(namespace(number));
        namespace.chain(pods).chain(policies).collect()
    }

    /// What belongs to no namespace.
    pub fn of_cluster(self) -> Vec<Value> {
        let nodes = (0..self.nodes()).map(|number| {
            json!({
                "apiVersion": "v1", "kind": "Node",
                "metadata": {"name": node_name(number), "labels": {"topology.kubernetes.io/zone": "a"}},
                "status": {"addresses": [{"type": "InternalIP", "address": addr([192, 0, 2, 10], number * 256)}]},
            })
        });
        nodes.chain((0..POLICIES_OF_CLUSTER).map(of_cluster)).collect()
    }

    /// A pod with what real ones carry and the agent does not keep.
    pub fn pod(self, namespace: usize, place: usize) -> Value {
        let name = pod_name(place);
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": name, "namespace": namespace_name(namespace), "creationTimestamp": "2026-01-01T00:00:00Z",
                "uid": format!("8b1c2a54-1111-4222-{namespace:04}-{place:012}"), "resourceVersion": "123456790",
                "labels": {
                    "app.kubernetes.io/name": app_name(place % APPS), "app.kubernetes.io/instance": app_name(place % APPS),
                    "app.kubernetes.io/version": format!("v{}", place % 3), "tier": tier(place % APPS),
                    "pod-template-hash": "5d9c7b8f6",
                },
            },
            "spec": {
                "nodeName": node_name(self.node_of(namespace, place)), "serviceAccountName": "default",
                "containers": [{
                    "name": "main", "image": "registry.example/app:v1",
                    "ports": [{"name": "http", "containerPort": 8080}, {"name": "metrics", "containerPort": 9090}],
                }],
            },
            "status": {
                "phase": "Running", "conditions": [{"type": "Ready", "status": "True"}],
                "podIPs": [{"ip": addr([10, 0, 0, 0], namespace * 1024 + place + 1)}],
            },
        })
    }

    /// One of the policies about an app of a namespace: ingress and egress by turns.
    fn policy(self, namespace: usize, place: usize) -> Value {
        let app = place % APPS;
        let spec = if (place / APPS).is_multiple_of(2) {
            json!({
                "podSelector": app_is(app), "policyTypes": ["Ingress"],
                "ingress": [
                    {"from": [{"podSelector": app_is((app + 1) % APPS)}], "ports": [{"port": "http"}]},
                    {
                        "from": [{
                            "namespaceSelector": {"matchLabels": {"team": team(namespace + app)}},
                            "podSelector": {"matchLabels": {"tier": tier(app)}},
                        }],
                        "ports": [{"port": 8080}, {"port": 8443, "endPort": 8449}],
                    },
                ],
            })
        } else {
            let number = (namespace * APPS + app) % (self.cidrs / 2).max(1);
            json!({
                "podSelector": app_is(app), "policyTypes": ["Egress"],
                "egress": [
                    {"to": [{"podSelector": app_is((app + 2) % APPS)}], "ports": [{"port": "http"}]},
                    {"to": [dns()], "ports": [{"port": 53, "protocol": "UDP"}, {"port": 53}]},
                    {"to": [block(number)], "ports": [{"port": 443}]},
                ],
            })
        };
        json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": policy_name(place), "namespace": namespace_name(namespace)}, "spec": spec,
        })
    }
}

/// A namespace's own object.
pub fn namespace(number: usize) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": namespace_name(number), "labels": {
            "team": team(number), "env": if number.is_multiple_of(5) { "staging" } else { "production" },
        }},
    })
}

/// A policy of the cluster, for or against what tiers and environments may.
fn of_cluster(number: usize) -> Value {
    let (action, env) = [
        ("Accept", "production"),
        ("Deny", "staging"),
        ("Pass", "production"),
    ][number % 3];
    json!({
        "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy",
        "metadata": {"name": format!("guard-{number}")},
        "spec": {
            "tier": if number.is_multiple_of(2) { "Admin" } else { "Baseline" }, "priority": number * 10,
            "subject": {"namespaces": {"matchLabels": {"team": team(number)}}},
            "ingress": [{
                "name": "by-tier", "action": action,
                "from": [{"pods": {
                    "namespaceSelector": {"matchLabels": {"env": env}},
                    "podSelector": {"matchLabels": {"tier": tier(number)}},
                }}],
            }],
        },
    })
}

fn dns() -> Value {
    json!({
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "team-000"}},
        "podSelector": {"matchLabels": {"tier": "back"}},
    })
}

/// A range and an exception from it, no two of which are alike.
pub fn block(number: usize) -> Value {
    let range = addr([172, 16, 0, 0], number * 256);
    let except = addr([172, 16, 0, 64], number * 256);
    json!({"ipBlock": {"cidr": format!("{range}/24"), "except": [format!("{except}/28")]}})
}

pub fn app_is(app: usize) -> Value {
    json!({"matchLabels": {"app.kubernetes.io/name": app_name(app)}})
}

pub fn app_name(app: usize) -> String {
    format!("app-{app:02}")
}

pub fn tier(app: usize) -> &'static str {
    ["front", "middle", "back"][app % 3]
}

pub fn team(namespace: usize) -> String {
    format!("team-{:02}", namespace % 25)
}

pub fn namespace_name(number: usize) -> String {
    format!("team-{number:03}")
}

pub fn policy_name(place: usize) -> String {
    format!("{}-{}", app_name(place % APPS), place / APPS)
}

pub fn pod_name(place: usize) -> String {
    format!("{}-5d9c7b8f6-{place:03}", app_name(place % APPS))
}

fn node_name(number: usize) -> String {
    format!("node-{number:03}")
}

fn addr(base: [u8; 4], number: usize) -> Ipv4Addr {
    Ipv4Addr::from(u32::from_be_bytes(base) + number as u32)
}

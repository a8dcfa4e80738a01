//! The objects of a large cluster, as its API server would send them: Services of which a few are large, and their
//! EndpointSlices of at most 100 endpoints, with everything that real ones carry and the agent does not keep.

use std::net::{IpAddr, Ipv4Addr};

use serde_json::{Value, json};

use crate::driven::NODE_ADDRESS;

/// The node that the agent runs on.
pub const NODE: &str = "node-0000";
/// Nodes of the cluster, over which endpoints are spread.
const NODES: usize = 1000;
const SLICE_AT_MOST: usize = 100;
/// One Service in so many has node ports, ...
const NODE_PORT_EVERY: usize = 50;
/// ... and one in so many is large: it has this part of the endpoints of them all.
const LARGE_EVERY: usize = 100;
const LARGE_PERCENT: usize = 30;

/// How many Services and endpoints.
#[derive(Clone, Copy, Debug)]
pub struct Fleet {
    pub services: usize,
    pub endpoints: usize,
}

impl Fleet {
    /// Endpoints of each Service.
    fn shares(self) -> impl Iterator<Item = usize> {
        let mean = self.endpoints / self.services;
        let of_hundred = mean * LARGE_EVERY;
        let large = of_hundred * LARGE_PERCENT / 100;
        let (small, rest) = (
            (of_hundred - large) / (LARGE_EVERY - 1),
            (of_hundred - large) % (LARGE_EVERY - 1),
        );
        (0..self.services).map(move |number| match number % LARGE_EVERY {
            0 => large,
            place => small + usize::from(place <= rest),
        })
    }

    /// Every Service with its slices, one Service after the other.
    pub fn objects(self) -> impl Iterator<Item = Value> {
        let mut first = 0;
        self.shares().enumerate().flat_map(move |(number, share)| {
            let pods = first..first + share;
            first += share;
            let slices = (0..share.div_ceil(SLICE_AT_MOST)).map(move |part| {
                let from = pods.start + part * SLICE_AT_MOST;
                slice(number, part, from..pods.end.min(from + SLICE_AT_MOST))
            });
            std::iter::once(service(number)).chain(slices)
        })
    }
}

/// The node's own object.
pub fn node() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": NODE, "labels": {"topology.kubernetes.io/zone": zone(0)}},
        "status": {"addresses": [{"type": "InternalIP", "address": NODE_ADDRESS}]},
    })
}

fn service_name(number: usize) -> String {
    format!("checkout-backend-{number}")
}

fn namespace(number: usize) -> String {
    format!("team-{:03}", number % 250)
}

fn zone(node: usize) -> String {
    format!("region-1{}", ['a', 'b', 'c'][node % 3])
}

fn address(base: [u8; 4], number: usize) -> IpAddr {
    Ipv4Addr::from(u32::from_be_bytes(base) + number as u32).into()
}

/// A Service.
pub fn service(number: usize) -> Value {
    let (name, cluster_ip) = (service_name(number), address([172, 16, 0, 1], number));
    let mut port = json!({"name": "http", "protocol": "TCP", "port": 80, "targetPort": "http"});
    let has_node_port = number.is_multiple_of(NODE_PORT_EVERY);
    if has_node_port {
        port["nodePort"] = json!(30000 + number / NODE_PORT_EVERY);
    }
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {
            "name": name, "namespace": namespace(number), "uid": format!("6f1c2a54-1111-4222-8333-{number:012}"),
            "resourceVersion": "123456789", "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"app.kubernetes.io/name": name, "app.kubernetes.io/managed-by": "Helm"},
            "annotations": {"meta.helm.sh/release-name": name, "meta.helm.sh/release-namespace": namespace(number)},
        },
        "spec": {
            "type": if has_node_port { "NodePort" } else { "ClusterIP" },
            "clusterIP": cluster_ip, "clusterIPs": [cluster_ip], "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack",
            "internalTrafficPolicy": "Cluster", "sessionAffinity": "None",
            "selector": {"app.kubernetes.io/name": name}, "ports": [port],
        },
        "status": {"loadBalancer": {}},
    })
}

/// A slice of a Service with these pods.
pub fn slice(service: usize, part: usize, pods: impl Iterator<Item = usize>) -> Value {
    let (name, namespace) = (service_name(service), namespace(service));
    let endpoints: Vec<Value> = pods.map(|pod| endpoint(&name, &namespace, pod)).collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": slice_name(service, part), "namespace": namespace, "generateName": format!("{name}-"),
            "uid": format!("7a1c2a54-1111-4222-8333-{service:012}"), "resourceVersion": "123456790",
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {
                "kubernetes.io/service-name": name, "app.kubernetes.io/name": name,
                "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
            },
            "ownerReferences": [{
                "apiVersion": "v1", "kind": "Service", "name": name, "controller": true, "blockOwnerDeletion": true,
                "uid": format!("6f1c2a54-1111-4222-8333-{service:012}"),
            }],
        },
        "addressType": "IPv4", "endpoints": endpoints,
        "ports": [{"name": "http", "protocol": "TCP", "port": 8080}],
    })
}

fn slice_name(service: usize, part: usize) -> String {
    format!("{}-{part}x7kq", service_name(service))
}

fn endpoint(service: &str, namespace: &str, pod: usize) -> Value {
    let node = pod % NODES;
    json!({
        "addresses": [address([10, 0, 0, 1], pod)],
        "conditions": {"ready": true, "serving": true, "terminating": false},
        "nodeName": format!("node-{node:04}"), "zone": zone(node),
        "targetRef": {
            "kind": "Pod", "name": format!("{service}-5d9c7b8f6-{pod}"), "namespace": namespace,
            "uid": format!("8b1c2a54-1111-4222-8333-{pod:012}"),
        },
    })
}

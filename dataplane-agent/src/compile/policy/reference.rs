//! What the API reference says of policies, word by word, over the manifests as they stand: no tables, no index, nothing
//! shared with what is tested.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Value, json};

/// A cluster's manifests.
#[derive(Clone, Debug, Default)]
pub struct World {
    pub namespaces: Vec<Value>,
    pub pods: Vec<Value>,
    pub nodes: Vec<Value>,
    pub policies: Vec<Value>,
}

/// Whether a pod may get from (`ingress`), or send to (`egress`), an address. `port` is the destination's.
pub fn allows(world: &World, direction: &str, subject: &Value, peer: IpAddr, proto: &str, port: u16) -> bool {
    let other = world.pod_at(peer);
    let flow = Flow {
        world,
        direction,
        subject,
        peer,
        other,
        destination: if direction == "ingress" {
            Some(subject)
        } else {
            other
        },
        proto,
        port,
    };
    let kind = |policy: &Value| policy["kind"].as_str().unwrap().to_owned();
    let tier = |name: &str| {
        let mut policies: Vec<&Value> = world
            .policies
            .iter()
            .filter(|policy| match &*kind(policy) {
                "AdminNetworkPolicy" => name == "Admin",
                "BaselineAdminNetworkPolicy" => name == "Baseline",
                "ClusterNetworkPolicy" => policy["spec"]["tier"] == name,
                _ => false,
            })
            .filter(|policy| flow.is_subject(policy))
            .collect();
        // Of equal priorities the reference leaves the order open; this is ours.
        policies.sort_by_key(|policy| {
            let priority = policy["spec"]["priority"].as_u64().unwrap_or(1001);
            let name = policy["metadata"]["name"].as_str().unwrap().to_owned();
            (priority, kind(policy) != "ClusterNetworkPolicy", name)
        });
        policies
    };
    if let Some(verdict) = flow.cluster_tier(&tier("Admin")) {
        return verdict;
    }
    let policies: Vec<&Value> = world
        .policies
        .iter()
        .filter(|policy| kind(policy) == "NetworkPolicy" && flow.isolates(policy))
        .collect();
    if !policies.is_empty() {
        return policies.iter().any(|policy| flow.is_allowed_by(policy));
    }
    flow.cluster_tier(&tier("Baseline")).unwrap_or(true)
}

struct Flow<'a> {
    world: &'a World,
    direction: &'a str,
    subject: &'a Value,
    peer: IpAddr,
    /// The pod that has the peer's address.
    other: Option<&'a Value>,
    destination: Option<&'a Value>,
    proto: &'a str,
    port: u16,
}

impl World {
    /// Without the policies that only report.
    pub fn in_earnest(&self) -> World {
        let is_dry_run = |object: &Value| object["metadata"]["annotations"]["dataplane/dry-run"] == "true";
        let of_namespace = |policy: &Value| {
            let mut namespaces = self.namespaces.iter();
            policy["kind"] == "NetworkPolicy"
                && namespaces
                    .any(|one| one["metadata"]["name"] == policy["metadata"]["namespace"] && is_dry_run(one))
        };
        let mut world = self.clone();
        world
            .policies
            .retain(|policy| !is_dry_run(policy) && !of_namespace(policy));
        world
    }

    fn pod_at(&self, addr: IpAddr) -> Option<&Value> {
        self.pods.iter().find(|pod| {
            pod["spec"]["hostNetwork"] != true
                && !["Succeeded", "Failed"].contains(&pod["status"]["phase"].as_str().unwrap_or_default())
                && list(&pod["status"]["podIPs"]).any(|ip| ip["ip"].as_str().unwrap().parse() == Ok(addr))
        })
    }

    fn namespace_labels(&self, name: &Value) -> Value {
        let namespace = self
            .namespaces
            .iter()
            .find(|one| one["metadata"]["name"] == *name);
        let mut labels = namespace.map_or(json!({}), |one| one["metadata"]["labels"].clone());
        labels["kubernetes.io/metadata.name"] = name.clone();
        labels
    }
}

impl Flow<'_> {
    fn cluster_tier(&self, policies: &[&Value]) -> Option<bool> {
        for policy in policies {
            for rule in list(&policy["spec"][self.direction]) {
                let peers = if self.direction == "ingress" { "from" } else { "to" };
                let ports: Vec<&Value> = list(&rule["ports"]).chain(list(&rule["protocols"])).collect();
                if list(&rule[peers]).any(|peer| self.is_cluster_peer(peer))
                    && (ports.is_empty() || ports.iter().any(|port| self.is_cluster_port(port)))
                {
                    return match rule["action"].as_str().unwrap() {
                        "Allow" | "Accept" => Some(true),
                        "Deny" => Some(false),
                        _ => None,
                    };
                }
            }
        }
        None
    }

    fn is_subject(&self, policy: &Value) -> bool {
        let subject = &policy["spec"]["subject"];
        let namespace = self
            .world
            .namespace_labels(&self.subject["metadata"]["namespace"]);
        let selected = if subject["pods"].is_null() {
            selects(&subject["namespaces"], &namespace)
        } else {
            selects(&subject["pods"]["namespaceSelector"], &namespace)
                && selects(
                    &subject["pods"]["podSelector"],
                    &self.subject["metadata"]["labels"],
                )
        };
        selected && self.subject["spec"]["hostNetwork"] != true
    }

    fn is_cluster_peer(&self, peer: &Value) -> bool {
        if let Some(networks) = peer["networks"].as_array() {
            return networks.iter().any(|network| contains(network, self.peer));
        }
        if !peer["nodes"].is_null() {
            let has_address = |node: &Value| {
                list(&node["status"]["addresses"])
                    .any(|address| address["address"].as_str().unwrap().parse() == Ok(self.peer))
            };
            let mut nodes = self.world.nodes.iter();
            return nodes
                .any(|node| has_address(node) && selects(&peer["nodes"], &node["metadata"]["labels"]));
        }
        let Some(pod) = self.other else { return false };
        let namespace = self.world.namespace_labels(&pod["metadata"]["namespace"]);
        if peer["pods"].is_null() {
            selects(&peer["namespaces"], &namespace)
        } else {
            selects(&peer["pods"]["namespaceSelector"], &namespace)
                && selects(&peer["pods"]["podSelector"], &pod["metadata"]["labels"])
        }
    }

    fn is_cluster_port(&self, port: &Value) -> bool {
        let number = |number: &Value| {
            let proto = number["protocol"].as_str().unwrap_or("TCP");
            proto == self.proto && number["port"] == self.port
        };
        let within = |range: &Value| {
            let (start, end) = (range["start"].as_u64().unwrap(), range["end"].as_u64().unwrap());
            (start..=end).contains(&u64::from(self.port))
        };
        for (field, proto) in [("tcp", "TCP"), ("udp", "UDP"), ("sctp", "SCTP")] {
            let destination = &port[field]["destinationPort"];
            if !destination.is_null() {
                let matches = destination["number"] == self.port
                    || (!destination["range"].is_null() && within(&destination["range"]));
                return proto == self.proto && matches;
            }
        }
        if !port["portNumber"].is_null() {
            return number(&port["portNumber"]);
        }
        if !port["portRange"].is_null() {
            let range = &port["portRange"];
            return range["protocol"].as_str().unwrap_or("TCP") == self.proto && within(range);
        }
        let name = [&port["namedPort"], &port["destinationNamedPort"]];
        let name = name.into_iter().find_map(Value::as_str).unwrap();
        self.is_named(name)
    }

    /// Whether the destination calls this port so.
    fn is_named(&self, name: &str) -> bool {
        let containers = self.destination.map(|pod| &pod["spec"]["containers"]);
        containers.into_iter().flat_map(list).any(|container| {
            list(&container["ports"]).any(|port| {
                port["name"] == name
                    && port["containerPort"] == self.port
                    && port["protocol"].as_str().unwrap_or("TCP") == self.proto
            })
        })
    }

    fn isolates(&self, policy: &Value) -> bool {
        let spec = &policy["spec"];
        let types: Vec<&str> = list(&spec["policyTypes"]).filter_map(Value::as_str).collect();
        let applies = match (self.direction, types.is_empty()) {
            ("ingress", true) => true,
            ("egress", true) => list(&spec["egress"]).next().is_some(),
            ("ingress", false) => types.contains(&"Ingress"),
            _ => types.contains(&"Egress"),
        };
        applies
            && policy["metadata"]["namespace"] == self.subject["metadata"]["namespace"]
            && selects(&spec["podSelector"], &self.subject["metadata"]["labels"])
    }

    fn is_allowed_by(&self, policy: &Value) -> bool {
        let peers = if self.direction == "ingress" { "from" } else { "to" };
        list(&policy["spec"][self.direction]).any(|rule| {
            let is_peer = |peer: &Value| self.is_peer(peer, &policy["metadata"]["namespace"]);
            (list(&rule[peers]).next().is_none() || list(&rule[peers]).any(is_peer))
                && (list(&rule["ports"]).next().is_none()
                    || list(&rule["ports"]).any(|port| self.is_port(port)))
        })
    }

    fn is_peer(&self, peer: &Value, own_namespace: &Value) -> bool {
        if !peer["ipBlock"].is_null() {
            let block = &peer["ipBlock"];
            return contains(&block["cidr"], self.peer)
                && !list(&block["except"]).any(|except| contains(except, self.peer));
        }
        let Some(pod) = self.other else { return false };
        let namespace = &pod["metadata"]["namespace"];
        let in_namespace = if peer["namespaceSelector"].is_null() {
            namespace == own_namespace
        } else {
            selects(
                &peer["namespaceSelector"],
                &self.world.namespace_labels(namespace),
            )
        };
        in_namespace
            && (peer["podSelector"].is_null() || selects(&peer["podSelector"], &pod["metadata"]["labels"]))
    }

    fn is_port(&self, port: &Value) -> bool {
        if port["protocol"].as_str().unwrap_or("TCP") != self.proto {
            return false;
        }
        match &port["port"] {
            Value::Null => true,
            Value::String(name) => self.is_named(name),
            first => {
                let first = first.as_u64().unwrap();
                let last = port["endPort"].as_u64().unwrap_or(first);
                (first..=last).contains(&u64::from(self.port))
            }
        }
    }
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn contains(range: &Value, addr: IpAddr) -> bool {
    range.as_str().unwrap().parse::<IpNet>().unwrap().contains(&addr)
}

fn selects(selector: &Value, labels: &Value) -> bool {
    let equal = selector["matchLabels"].as_object().into_iter().flatten();
    let mut equal = equal.map(|(key, value)| labels[key] == *value);
    let mut holds = list(&selector["matchExpressions"]).map(|expression| {
        let value = &labels[expression["key"].as_str().unwrap()];
        let among = list(&expression["values"]).any(|one| one == value);
        match expression["operator"].as_str().unwrap() {
            "In" => among,
            "NotIn" => !among,
            "Exists" => !value.is_null(),
            _ => value.is_null(),
        }
    });
    equal.all(|equal| equal) && holds.all(|holds| holds)
}

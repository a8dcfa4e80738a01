//! Random clusters and policies, as manifests.

use serde_json::{Value, json};

use super::reference::World;

/// `SplitMix64`: the same cases for the same seed, everywhere.
pub struct Random(pub u64);

pub const PORTS: [u16; 6] = [1, 79, 80, 81, 443, 65535];
pub const PROTOCOLS: [(&str, u8); 4] = [("TCP", 6), ("UDP", 17), ("SCTP", 132), ("ICMP", 1)];
/// Addresses that are nobody's; some are at the edges of [`RANGES`].
pub const OUTSIDE: [&str; 7] = [
    "192.0.2.1",
    "192.0.2.127",
    "192.0.2.128",
    "198.51.100.9",
    "10.0.0.255",
    "2001:db8::1",
    "2001:db8:1::1",
];
const RANGES: [&str; 10] = [
    "0.0.0.0/0",
    "10.0.0.0/8",
    "10.0.0.0/24",
    "10.0.0.4/30",
    "192.0.2.0/24",
    "192.0.2.128/25",
    "192.0.2.1/32",
    "::/0",
    "2001:db8::/32",
    "fd00::/64",
];
const NAMES: [&str; 3] = ["web", "dns", "db"];

impl Random {
    pub fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % end as u64) as usize
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    fn some<T>(&mut self, at_most: usize, mut make: impl FnMut(&mut Self) -> T) -> Vec<T> {
        (0..self.below(at_most + 1)).map(|_| make(self)).collect()
    }

    fn labels(&mut self) -> Value {
        let mut labels = json!({});
        for key in ["app", "tier"] {
            if !self.one_in(3) {
                labels[key] = self.pick(&["a", "b", ""]).into();
            }
        }
        labels
    }

    fn selector(&mut self) -> Value {
        let mut selector = json!({});
        if self.one_in(3) {
            return selector;
        }
        if self.one_in(2) {
            selector["matchLabels"] = self.labels();
        }
        let expression = |random: &mut Self| {
            let operator = random.pick(&["In", "NotIn", "Exists", "DoesNotExist"]);
            let mut expression = json!({"key": random.pick(&["app", "tier", "other"]), "operator": operator});
            if matches!(operator, "In" | "NotIn") {
                expression["values"] = json!([random.pick(&["a", "b"]), random.pick(&["a", "", "c"])]);
            }
            expression
        };
        if self.one_in(2) {
            selector["matchExpressions"] = self.some(2, expression).into();
        }
        selector
    }

    fn dry_run(&mut self) -> Value {
        match self.below(6) {
            0 => json!({"dataplane/dry-run": "true"}),
            1 => json!({"dataplane/dry-run": "false"}),
            _ => json!({}),
        }
    }

    pub fn namespace(&mut self, name: &str) -> Value {
        let annotations = self.dry_run();
        let metadata = json!({"name": name, "labels": self.labels(), "annotations": annotations});
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
    }

    pub fn node(&mut self, number: usize) -> Value {
        let mut addresses = vec![json!({"type": "InternalIP", "address": format!("172.16.0.{number}")})];
        if self.one_in(2) {
            addresses.push(json!({"type": "ExternalIP", "address": "192.0.2.1"}));
        }
        json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": format!("n{number}"), "labels": self.labels()},
            "status": {"addresses": addresses},
        })
    }

    /// Pods with different numbers have different addresses.
    pub fn pod(&mut self, number: usize) -> Value {
        let namespace = ["x", "y", "z"][number % 3];
        let port = |random: &mut Self| {
            json!({
                "name": random.pick(&NAMES), "containerPort": random.pick(&PORTS),
                "protocol": random.pick(&["TCP", "UDP", "SCTP"]),
            })
        };
        let mut ips = vec![json!({"ip": format!("10.0.0.{number}")})];
        if self.one_in(2) {
            ips.push(json!({"ip": format!("fd00::{number}")}));
        }
        let ports = self.some(3, port);
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": format!("p{number}"), "namespace": namespace, "labels": self.labels()},
            "spec": {
                "nodeName": self.pick(&["n1", "n2"]), "hostNetwork": self.one_in(12),
                "containers": [{"name": "c", "ports": ports}],
            },
            "status": {"phase": if self.one_in(15) { "Failed" } else { "Running" }, "podIPs": ips},
        })
    }

    fn block(&mut self) -> Value {
        let range = self.pick(&RANGES);
        let parts: Vec<&str> = match range {
            "0.0.0.0/0" => vec!["10.0.0.0/24", "192.0.2.128/25", "10.0.0.4/30"],
            "10.0.0.0/8" => vec!["10.0.0.0/24", "10.0.0.4/30"],
            "192.0.2.0/24" => vec!["192.0.2.128/25", "192.0.2.1/32"],
            "::/0" => vec!["2001:db8::/32", "fd00::/64"],
            _ => Vec::new(),
        };
        let except: Vec<&str> = parts.into_iter().filter(|_| self.one_in(2)).collect();
        json!({"cidr": range, "except": except})
    }

    fn peer(&mut self) -> Value {
        match self.below(4) {
            0 => json!({"ipBlock": self.block()}),
            1 => json!({"podSelector": self.selector()}),
            2 => json!({"namespaceSelector": self.selector()}),
            _ => json!({"podSelector": self.selector(), "namespaceSelector": self.selector()}),
        }
    }

    fn port(&mut self) -> Value {
        let mut port = json!({});
        if !self.one_in(3) {
            port["protocol"] = self.pick(&["TCP", "UDP", "SCTP"]).into();
        }
        match self.below(4) {
            0 => {}
            1 => port["port"] = self.pick(&NAMES).into(),
            2 => port["port"] = self.pick(&PORTS).into(),
            _ => {
                let (first, last) = self.range();
                port["port"] = first.into();
                port["endPort"] = last.into();
            }
        }
        port
    }

    fn range(&mut self) -> (u16, u16) {
        let (a, b) = (self.pick(&PORTS), self.pick(&PORTS));
        (a.min(b), a.max(b))
    }

    pub fn network_policy(&mut self, number: usize) -> Value {
        let mut spec = json!({"podSelector": self.selector()});
        if !self.one_in(3) {
            spec["policyTypes"] = self
                .pick(&[&["Ingress"][..], &["Egress"], &["Egress", "Ingress"], &[]])
                .into();
        }
        for (list, peers) in [("ingress", "from"), ("egress", "to")] {
            let rule = |random: &mut Self| {
                let mut rule = json!({});
                if !random.one_in(4) {
                    rule[peers] = random.some(3, Self::peer).into();
                }
                if !random.one_in(3) {
                    rule["ports"] = random.some(2, Self::port).into();
                }
                rule
            };
            if !self.one_in(4) {
                spec[list] = self.some(3, rule).into();
            }
        }
        let namespace = ["x", "y", "z"][number % 3];
        json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": format!("np{number}"), "namespace": namespace, "annotations": self.dry_run()},
            "spec": spec,
        })
    }

    fn namespaced(&mut self) -> Value {
        json!({"namespaceSelector": self.selector(), "podSelector": self.selector()})
    }

    fn cluster_peer(&mut self, is_ingress: bool) -> Value {
        match self.below(if is_ingress { 2 } else { 4 }) {
            0 => json!({"namespaces": self.selector()}),
            1 => json!({"pods": self.namespaced()}),
            2 => json!({"nodes": self.selector()}),
            _ => json!({"networks": [self.pick(&RANGES), self.pick(&RANGES)]}),
        }
    }

    fn admin_port(&mut self) -> Value {
        let (start, end) = self.range();
        let proto = self.pick(&["TCP", "UDP", "SCTP"]);
        match self.below(3) {
            0 => json!({"portNumber": {"protocol": proto, "port": self.pick(&PORTS)}}),
            1 => json!({"portRange": {"protocol": proto, "start": start, "end": end}}),
            _ => json!({"namedPort": self.pick(&NAMES)}),
        }
    }

    fn cluster_port(&mut self) -> Value {
        let (start, end) = self.range();
        let proto = self.pick(&["tcp", "udp", "sctp"]);
        match self.below(3) {
            0 => json!({proto: {"destinationPort": {"number": self.pick(&PORTS)}}}),
            1 => json!({proto: {"destinationPort": {"range": {"start": start, "end": end}}}}),
            _ => json!({"destinationNamedPort": self.pick(&NAMES)}),
        }
    }

    /// An admin policy of either API, or one of the baseline.
    pub fn cluster_policy(&mut self, number: usize) -> Value {
        let (kind, version) = match number % 5 {
            0 => ("BaselineAdminNetworkPolicy", "v1alpha1"),
            1 | 2 => ("AdminNetworkPolicy", "v1alpha1"),
            _ => ("ClusterNetworkPolicy", "v1alpha2"),
        };
        let is_cluster = kind == "ClusterNetworkPolicy";
        let subject = if self.one_in(2) {
            json!({"namespaces": self.selector()})
        } else {
            json!({"pods": self.namespaced()})
        };
        let mut spec = json!({"subject": subject});
        for (list, peers) in [("ingress", "from"), ("egress", "to")] {
            let rule = |random: &mut Self| {
                let first = random.cluster_peer(list == "ingress");
                let mut all = vec![first];
                all.extend(random.some(1, |random| random.cluster_peer(list == "ingress")));
                let actions = match kind {
                    "BaselineAdminNetworkPolicy" => &["Allow", "Deny"][..],
                    "AdminNetworkPolicy" => &["Allow", "Deny", "Pass"],
                    _ => &["Accept", "Deny", "Pass"],
                };
                let mut rule = json!({"action": random.pick(actions), peers: all});
                if random.one_in(2) {
                    let (field, port) = if is_cluster {
                        ("protocols", random.cluster_port())
                    } else {
                        ("ports", random.admin_port())
                    };
                    rule[field] = json!([port]);
                }
                rule
            };
            spec[list] = self.some(3, rule).into();
        }
        let mut name = format!("cp{number}");
        match kind {
            "BaselineAdminNetworkPolicy" => "default".clone_into(&mut name),
            "AdminNetworkPolicy" => spec["priority"] = self.below(3).into(),
            _ => {
                spec["priority"] = self.below(3).into();
                spec["tier"] = self.pick(&["Admin", "Baseline"]).into();
            }
        }
        json!({
            "apiVersion": format!("policy.networking.k8s.io/{version}"), "kind": kind,
            "metadata": {"name": name, "annotations": self.dry_run()}, "spec": spec,
        })
    }
}

/// Replaces the object of that kind and name, or removes it with a chance of one in `gone`.
pub fn change(random: &mut Random, world: &mut World) -> Change {
    let object = match random.below(12) {
        0 => {
            let name = random.pick(&["x", "y", "z"]);
            random.namespace(name)
        }
        1 => {
            let number = 1 + random.below(2);
            random.node(number)
        }
        2..=5 => {
            let number = 1 + random.below(7);
            random.pod(number)
        }
        6..=9 => {
            let number = random.below(4);
            random.network_policy(number)
        }
        _ => {
            let number = random.below(5);
            random.cluster_policy(number)
        }
    };
    let list = match object["kind"].as_str().unwrap() {
        "Namespace" => &mut world.namespaces,
        "Node" => &mut world.nodes,
        "Pod" => &mut world.pods,
        _ => &mut world.policies,
    };
    let same = |a: &Value, b: &Value| {
        a["kind"] == b["kind"]
            && ["name", "namespace"]
                .iter()
                .all(|field| a["metadata"][*field] == b["metadata"][*field])
    };
    let before = list.len();
    list.retain(|one| !same(one, &object));
    if list.len() < before && random.one_in(3) {
        return Change::Delete(object);
    }
    list.push(object.clone());
    Change::Apply(object)
}

/// What happened to an object.
#[derive(Debug)]
pub enum Change {
    Apply(Value),
    Delete(Value),
}

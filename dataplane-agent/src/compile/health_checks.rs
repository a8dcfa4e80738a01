//! The health checks of load balancers: which Service answers at which `healthCheckNodePort`, and with how many
//! endpoints.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use super::endpoints;
use crate::model::{Cause, Index, Name, Problem, Service};

/// What is answered at a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    pub service: Name,
    /// Ready endpoints on this node.
    pub local_endpoints: usize,
}

/// The checks in force, by port.
pub type Checks = BTreeMap<u16, Check>;

/// What every Service asks for, oldest first: of two with one port the older is served.
#[derive(Debug, Default)]
pub struct HealthChecks {
    by_age: BTreeMap<(i64, Name), (u16, usize)>,
    ages: BTreeMap<Name, i64>,
}

impl HealthChecks {
    /// Replaces what a Service asks for.
    pub fn set(&mut self, index: &Index, name: &Name, service: Option<&Service>) {
        if let Some(age) = self.ages.remove(name) {
            self.by_age.remove(&(age, name.clone()));
        }
        let Some(service) = service else { return };
        let Some(port) = service.health_check_node_port else {
            return;
        };
        // Those without a creation time come last.
        let age = if service.created_ns == 0 {
            i64::MAX
        } else {
            service.created_ns
        };
        self.ages.insert(name.clone(), age);
        self.by_age
            .insert((age, name.clone()), (port, local_endpoints(index, service)));
    }

    /// The checks in force.
    pub fn checks(&self) -> Checks {
        let mut checks = Checks::new();
        for ((_, service), (port, local_endpoints)) in &self.by_age {
            checks.entry(*port).or_insert_with(|| Check {
                service: service.clone(),
                local_endpoints: *local_endpoints,
            });
        }
        checks
    }

    /// Services whose port belongs to an older one.
    pub fn problems(&self) -> Vec<(Name, Problem)> {
        let mut owners: BTreeMap<u16, &Name> = BTreeMap::new();
        let mut problems = Vec::new();
        for ((_, service), (port, _)) in &self.by_age {
            let owner = *owners.entry(*port).or_insert(service);
            if owner != service {
                let reason = format!("{port} is taken by Service {owner}");
                let problem = Problem::new("spec.healthCheckNodePort", reason).because(Cause::Conflict);
                problems.push((service.clone(), problem));
            }
        }
        problems
    }
}

/// Ready endpoints of this node, each address once, whatever ports it has. Of the families that count which has more:
/// an endpoint with two addresses is one.
fn local_endpoints(index: &Index, service: &Service) -> usize {
    let count = |ipv4| {
        let of_port = |port| endpoints::of_port(index, service, port, ipv4);
        let local: BTreeSet<IpAddr> = service
            .ports
            .iter()
            .flat_map(of_port)
            .filter(|endpoint| endpoint.ready && endpoint.node() == Some(index.node_name()))
            .map(|endpoint| endpoint.addr)
            .collect();
        local.len()
    };
    count(true).max(count(false))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::{Decoded, decode};

    fn index(documents: &[serde_json::Value]) -> Index {
        let mut index = Index::new("n1");
        for document in documents {
            let Decoded::Object { object, .. } = decode(document) else {
                panic!("refused: {document}");
            };
            index.apply(object);
        }
        index
    }

    fn service(name: &str, policy: &str) -> serde_json::Value {
        serde_json::json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "ns"},
            "spec": {
                "type": "LoadBalancer", "clusterIPs": ["10.96.0.1", "fd00::1"], "ipFamilies": ["IPv4", "IPv6"],
                "externalTrafficPolicy": policy, "healthCheckNodePort": 31000,
                "ports": [{"name": "a", "port": 80}, {"name": "b", "port": 81}],
            },
        })
    }

    fn slice(name: &str, family: &str, endpoints: &[(&str, &str, bool, bool)]) -> serde_json::Value {
        let endpoints: Vec<_> = endpoints
            .iter()
            .map(|(addr, node, ready, terminating)| {
                let conditions =
                    serde_json::json!({"ready": ready, "serving": true, "terminating": terminating});
                serde_json::json!({"addresses": [addr], "nodeName": node, "conditions": conditions})
            })
            .collect();
        serde_json::json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": name, "namespace": "ns", "labels": {"kubernetes.io/service-name": "s"}},
            "addressType": family, "endpoints": endpoints,
            "ports": [{"name": "a", "port": 8080}, {"name": "b", "port": 8081}],
        })
    }

    fn checks(documents: &[serde_json::Value]) -> Checks {
        let index = index(documents);
        let mut checks = HealthChecks::default();
        for service in index.services() {
            checks.set(&index, &service.name, Some(&service));
        }
        checks.checks()
    }

    #[test]
    fn ready_endpoints_of_this_node_count_once() {
        let v4 = [
            ("10.244.1.1", "n1", true, false),
            ("10.244.1.2", "n1", true, false),
            ("10.244.2.1", "n2", true, false),
            ("10.244.1.3", "n1", false, false),
            ("10.244.1.4", "n1", false, true),
        ];
        let v6 = [("fd01::1", "n1", true, false)];
        let found = checks(&[
            service("s", "Local"),
            slice("v4", "IPv4", &v4),
            slice("v6", "IPv6", &v6),
        ]);
        assert_eq!(found[&31000].local_endpoints, 2);
        assert_eq!(checks(&[service("s", "Local")])[&31000].local_endpoints, 0);
        assert_eq!(checks(&[service("s", "Cluster")]), Checks::new());
    }

    #[test]
    fn a_port_has_one_owner() {
        let index = index(&[service("a", "Local"), service("b", "Local")]);
        let mut checks = HealthChecks::default();
        for name in ["b", "a"] {
            let name = Name::new("ns", name);
            checks.set(&index, &name, index.service(&name).as_ref());
        }
        assert_eq!(checks.checks()[&31000].service, Name::new("ns", "a"));
        let [(name, problem)] = &checks.problems()[..] else {
            panic!("{:?}", checks.problems());
        };
        assert_eq!(*name, Name::new("ns", "b"));
        assert_eq!(problem.reason, "31000 is taken by Service ns/a");
        checks.set(&index, &Name::new("ns", "a"), None);
        assert_eq!(checks.checks()[&31000].service, Name::new("ns", "b"));
        assert_eq!(checks.problems(), []);
    }
}

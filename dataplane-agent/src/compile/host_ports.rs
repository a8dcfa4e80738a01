//! Host ports of this node's Pods: frontends like node ports, each with one backend, the Pod itself. Outside clients keep
//! their address, because the backend is on this node.
//!
//! kube-proxy's rules stand before those of the portmap plugin, so where a Service has the address and port, the Service
//! is served and the Pod's part becomes a problem.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use super::{BackendKey, Balancer, Compiled, EndpointInfo, FrontendAddr, claims::Claims, services::describe};
use crate::model::{Cause, HostIp, HostPort, Kind, ObjectRef, Pod, Problem};

/// This node's addresses, and whether node ports answer there.
pub type OwnAddresses = BTreeMap<IpAddr, bool>;

/// What a Pod of this node asks for and may have: `own` says which addresses are this node's.
pub fn frontends<'a>(
    pod: &'a Pod,
    own: &'a OwnAddresses,
) -> impl Iterator<Item = (FrontendAddr, BackendKey, &'a HostPort)> {
    let ports = pod.host_ports.iter().filter(|_| is_served(pod));
    ports.flat_map(move |port| {
        let wanted = pod.ips.iter().filter_map(move |ip| {
            let addr = match port.host_ip {
                HostIp::Any => unspecified(ip.is_ipv4()),
                HostIp::One(addr) => addr,
            };
            let is_here = addr.is_unspecified() || addr.is_loopback() || own.contains_key(&addr);
            (addr.is_ipv4() == ip.is_ipv4() && is_here).then_some((addr, *ip))
        });
        wanted.map(move |(addr, ip)| {
            let frontend = FrontendAddr {
                addr,
                port: port.port,
                proto: port.proto,
            };
            let backend = BackendKey {
                addr: ip,
                port: port.target,
                proto: port.proto,
            };
            (frontend, backend, port)
        })
    })
}

/// Compiles one Pod. What another object has becomes a problem.
pub fn compile(pod: &Pod, own: &OwnAddresses, claims: &Claims) -> (Compiled, Vec<Problem>) {
    let this = ObjectRef {
        kind: Kind::Pod,
        name: pod.name.clone(),
    };
    let other = |frontend: &FrontendAddr| claims.owner(frontend).filter(|owner| **owner != this);
    let mut balancers = Vec::new();
    let mut endpoints = BTreeMap::new();
    let mut problems = Vec::new();
    let mut taken = |port: &HostPort, frontend: &FrontendAddr, by: &ObjectRef| {
        let reason = format!("{} is taken by {by}", describe(frontend));
        let problem = Problem::new(format!("{}.hostPort", port.field), reason);
        problems.push(problem.because(Cause::Conflict));
    };
    for (frontend, backend, port) in frontends(pod, own) {
        let FrontendAddr { addr, .. } = frontend;
        if let Some(owner) = other(&frontend) {
            taken(port, &frontend, owner);
            continue;
        }
        if addr.is_unspecified() {
            // Served, but not at these addresses.
            for addr in own.keys().filter(|own| own.is_ipv4() == addr.is_ipv4()) {
                let exact = FrontendAddr {
                    addr: *addr,
                    ..frontend
                };
                if let Some(owner) = other(&exact) {
                    taken(port, &exact, owner);
                }
            }
        } else if own.get(&addr) == Some(&true) {
            let node_port = FrontendAddr {
                addr: unspecified(addr.is_ipv4()),
                ..frontend
            };
            if let Some(owner) = other(&node_port).filter(|owner| owner.kind == Kind::Service) {
                taken(port, &node_port, owner);
                continue;
            }
        }
        let info = EndpointInfo {
            serving: true,
            local: true,
        };
        endpoints.insert(backend, info);
        balancers.push(Balancer {
            frontend,
            internal: true,
            // Nobody outside may name this machine's loopback address.
            external: !addr.is_loopback(),
            backends: [backend].into(),
            drop_when_empty: false,
            affinity_s: None,
            affinity_of: None,
            source_ranges: Arc::default(),
            echo: false,
        });
    }
    problems.extend(strangers(pod, own));
    (Compiled::new(balancers, endpoints), problems)
}

/// Host addresses that are not this node's: a Pod does not get to capture somebody else's traffic.
fn strangers(pod: &Pod, own: &OwnAddresses) -> impl Iterator<Item = Problem> {
    let ports = pod.host_ports.iter().filter(|_| is_served(pod));
    ports.filter_map(|port| match port.host_ip {
        HostIp::One(addr) if !addr.is_unspecified() && !addr.is_loopback() && !own.contains_key(&addr) => {
            let reason = format!("{addr} is no address of this node");
            Some(Problem::new(format!("{}.hostIP", port.field), reason))
        }
        _ => None,
    })
}

/// A Pod in the host's network listens itself.
fn is_served(pod: &Pod) -> bool {
    pod.running && !pod.host_network
}

fn unspecified(ipv4: bool) -> IpAddr {
    if ipv4 {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::{
        compile::{Compiler, Update},
        decode::{Decoded, decode},
        model::{Dirty, Index},
    };

    const NODE: &str = "192.0.2.1";

    fn pod(name: &str, ports: &Value) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "ns"},
            "spec": {"nodeName": "n1", "containers": [{"name": "a", "ports": ports}]},
            "status": {"phase": "Running", "podIPs": [{"ip": "10.244.1.5"}, {"ip": "fd01::5"}]},
        })
    }

    fn node_port(name: &str, port: u16) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "ns"},
            "spec": {"type": "NodePort", "clusterIP": "10.96.0.1", "ports": [{"port": 80, "nodePort": port}]},
        })
    }

    struct Stage {
        index: Index,
        compiler: Compiler,
        served: BTreeMap<ObjectRef, Vec<String>>,
    }

    impl Stage {
        fn new() -> Self {
            let mut stage = Self {
                index: Index::new("n1"),
                compiler: Compiler::default(),
                served: BTreeMap::new(),
            };
            let own = [(NODE, true), ("198.51.100.1", false), ("127.0.0.1", false)];
            let own = own.map(|(addr, node_ports)| (addr.parse().unwrap(), node_ports));
            let updates = stage.compiler.set_own_addresses(&stage.index, own.into());
            stage.take(updates);
            stage
        }

        fn take(&mut self, updates: Vec<Update>) {
            for (owner, compiled) in updates {
                let balancers = compiled.iter().flat_map(|compiled| &compiled.balancers);
                let lines = balancers.map(|balancer| {
                    let outside = if balancer.external { "" } else { " inside" };
                    let backend = balancer.backends.first().map(|key| (key.addr, key.port));
                    let backend = backend.map_or_else(String::new, |at| {
                        format!(" -> {}", std::net::SocketAddr::from(at))
                    });
                    format!("{}{backend}{outside}", describe(&balancer.frontend))
                });
                self.served.insert(owner, lines.collect());
            }
        }

        fn apply(&mut self, object: &Value) {
            let Decoded::Object { object, .. } = decode(object) else {
                panic!("refused: {object}");
            };
            let dirty: Dirty = self.index.apply(object);
            let updates = self.compiler.update(&self.index, &dirty);
            self.take(updates);
        }

        fn of(&self, kind: Kind, name: &str) -> &[String] {
            let name = crate::model::Name::new("ns", name);
            self.served
                .get(&ObjectRef { kind, name })
                .map_or(&[], Vec::as_slice)
        }

        fn problems(&self) -> Vec<String> {
            let text = |(object, problem): (ObjectRef, Problem)| {
                format!("{object}: {}: {}", problem.field, problem.reason)
            };
            self.compiler.problems().into_iter().map(text).collect()
        }
    }

    #[test]
    fn addresses_protocols_and_families_are_told_apart() {
        let mut stage = Stage::new();
        stage.apply(&pod(
            "a",
            &json!([
                {"containerPort": 80, "hostPort": 8080},
                {"containerPort": 53, "hostPort": 30053, "protocol": "UDP", "hostIP": NODE},
                {"containerPort": 81, "hostPort": 8081, "hostIP": "127.0.0.1"},
                {"containerPort": 82, "hostPort": 8082, "hostIP": "::"},
                {"containerPort": 83},
            ]),
        ));
        let expected = [
            "node port 8080/TCP -> 10.244.1.5:80",
            "127.0.0.1:8081/TCP -> 10.244.1.5:81 inside",
            "192.0.2.1:30053/UDP -> 10.244.1.5:53",
            "node port 8080/TCP -> [fd01::5]:80",
            "node port 8082/TCP -> [fd01::5]:82",
        ];
        assert_eq!(stage.of(Kind::Pod, "a"), expected);
        assert_eq!(stage.problems(), [""; 0]);
    }

    #[test]
    fn only_running_pods_of_this_node_that_have_their_own_network() {
        let port = json!([{"containerPort": 80, "hostPort": 8080}]);
        for (path, value) in [
            ("/status/phase", json!("Pending")),
            ("/status/phase", json!("Succeeded")),
            ("/spec/nodeName", json!("n2")),
            ("/spec/hostNetwork", json!(true)),
        ] {
            let mut stage = Stage::new();
            let served = pod("a", &port);
            stage.apply(&served);
            assert_eq!(stage.of(Kind::Pod, "a").len(), 2);
            let mut changed = served;
            let (parent, field) = path.rsplit_once('/').unwrap();
            changed.pointer_mut(parent).unwrap()[field] = value;
            stage.apply(&changed);
            assert_eq!(stage.of(Kind::Pod, "a"), [""; 0], "{path}");
        }
    }

    #[test]
    fn somebody_elses_address_is_refused() {
        let mut stage = Stage::new();
        stage.apply(&pod(
            "a",
            &json!([{"containerPort": 80, "hostPort": 80, "hostIP": "203.0.113.1"}]),
        ));
        assert_eq!(stage.of(Kind::Pod, "a"), [""; 0]);
        let expected = "Pod ns/a: spec.containers[0].ports[0].hostIP: 203.0.113.1 is no address of this node";
        assert_eq!(stage.problems(), [expected]);
    }

    #[test]
    fn a_service_comes_first_whatever_the_order() {
        let field =
            "Pod ns/a: spec.containers[0].ports[0].hostPort: node port 30080/TCP is taken by Service ns/s";
        for host_ip in ["", NODE] {
            let pod = pod(
                "a",
                &json!([{"containerPort": 80, "hostPort": 30080, "hostIP": host_ip}]),
            );
            let service = node_port("s", 30080);
            for objects in [[&pod, &service], [&service, &pod]] {
                let mut stage = Stage::new();
                for object in objects {
                    stage.apply(object);
                }
                let v4 = |line: &&String| !line.contains("fd01");
                assert_eq!(stage.of(Kind::Pod, "a").iter().filter(v4).count(), 0, "{host_ip}");
                assert_eq!(stage.problems(), [field], "{host_ip}");
                assert_eq!(stage.of(Kind::Service, "s").len(), 2);
                stage.apply(&node_port("s", 30081));
                assert_eq!(stage.of(Kind::Pod, "a").iter().filter(v4).count(), 1, "{host_ip}");
                assert_eq!(stage.problems(), [""; 0]);
            }
        }
    }

    #[test]
    fn an_external_ip_takes_one_address_out() {
        let mut stage = Stage::new();
        stage.apply(&pod("a", &json!([{"containerPort": 80, "hostPort": 80}])));
        let mut service = node_port("s", 30080);
        service["spec"]["externalIPs"] = json!([NODE]);
        stage.apply(&service);
        assert_eq!(stage.of(Kind::Pod, "a").len(), 2);
        let expected =
            "Pod ns/a: spec.containers[0].ports[0].hostPort: 192.0.2.1:80/TCP is taken by Service ns/s";
        assert_eq!(stage.problems(), [expected]);
    }

    #[test]
    fn a_host_port_makes_no_service_address() {
        let mut stage = Stage::new();
        stage.apply(&pod(
            "a",
            &json!([{"containerPort": 80, "hostPort": 80, "hostIP": NODE}]),
        ));
        assert!(!stage.compiler.is_service_address(NODE.parse().unwrap()));
    }
}

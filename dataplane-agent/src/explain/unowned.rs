//! Addresses that look like a Pod's, and are none's.

use std::net::IpAddr;

use ipnet::IpNet;

use super::ends::{self, at};
use crate::model::{Index, Node};

/// What there is to know of an address that no Pod, node or Service has. `None`: one of them has it, or it is of no node's Pod range
/// and not `asked` for by itself, so it may be anybody's. `leaves_by`: the device by which packets to it leave this node.
pub fn note(index: &Index, addr: IpAddr, asked: bool, leaves_by: Option<&str>) -> Option<String> {
    if is_owned(index, addr) {
        return None;
    }
    let Some((node, range)) = range_of(index, addr) else {
        return asked.then(|| format!("no Pod has the address {addr}, and it is in no known Pod range"));
    };
    let node = node.name.name();
    if node != index.node_name() {
        return Some(format!(
            "no Pod has the address {addr}, though it is of the Pod range {range} of node {node}"
        ));
    }
    let leaves = leaves_by.map_or_else(String::new, |device| {
        format!(": what is sent there leaves the node by {device}")
    });
    Some(format!(
        "no Pod has the address {addr}, though it is of this node's Pod range {range}{leaves}"
    ))
}

/// Whether something that the cluster knows has an address.
fn is_owned(index: &Index, addr: IpAddr) -> bool {
    let has_more = || {
        index
            .pods()
            .any(|pod| !pod.finished && pod.extra_ips.contains(&addr))
    };
    let is_of_node = || index.nodes().any(|node| node.ips.contains(&addr));
    at(index, addr).1.is_some() || is_of_node() || ends::service_at(index, addr).is_some() || has_more()
}

fn range_of(index: &Index, addr: IpAddr) -> Option<(&Node, IpNet)> {
    index.nodes().find_map(|node| {
        let range = node.pod_cidrs.iter().find(|range| range.contains(&addr))?;
        Some((node, *range))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{super::samples, *};

    fn node(name: &str, range: &str, addr: &str) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "spec": {"podCIDRs": [range]},
            "status": {"addresses": [{"type": "InternalIP", "address": addr}]},
        })
    }

    #[test]
    fn an_address_of_a_pod_range_that_no_pod_has_is_told() {
        let index = samples::index(&[
            node("n1", "10.244.1.0/24", "192.168.77.11"),
            node("n2", "10.244.2.0/24", "192.168.77.12"),
            samples::service("web", &json!({"clusterIP": "10.96.0.9", "ports": [{"port": 80}]})),
            json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {
                    "namespace": "shop", "name": "web",
                    "annotations": {"dataplane/extra-addresses": "10.244.1.30"},
                },
                "spec": {"nodeName": "n1", "containers": [{"name": "c"}]},
                "status": {"phase": "Running", "podIPs": [{"ip": "10.244.1.21"}]},
            }),
        ]);
        let said = |addr: &str, asked| note(&index, addr.parse().unwrap(), asked, Some("eth0"));
        for addr in ["10.244.1.21", "10.244.1.30", "192.168.77.12", "10.96.0.9"] {
            assert_eq!(said(addr, true), None, "{addr}");
        }
        for (addr, expected) in [
            (
                "10.244.1.99",
                "of this node's Pod range 10.244.1.0/24: what is sent there leaves the node by eth0",
            ),
            ("10.244.2.99", "of the Pod range 10.244.2.0/24 of node n2"),
        ] {
            for asked in [true, false] {
                let said = said(addr, asked).unwrap();
                assert!(
                    said.contains("no Pod has the address") && said.contains(expected),
                    "{said}"
                );
            }
        }
        assert_eq!(said("203.0.113.10", false), None);
        assert!(
            said("203.0.113.10", true)
                .unwrap()
                .contains("in no known Pod range")
        );
    }
}

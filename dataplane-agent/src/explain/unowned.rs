//! Addresses that look like a Pod's, and are none's.

use std::net::IpAddr;

use ipnet::IpNet;

use super::ends;
use crate::model::{Index, Name, Node, Pod, Service};

/// An address of a flow, and how it is met.
#[derive(Clone, Copy, Debug)]
pub struct Met<'a> {
    pub addr: IpAddr,
    /// By itself.
    pub is_asked: bool,
    /// The Service whose endpoint it is.
    pub via: Option<&'a Name>,
    /// The device by which packets to it leave this node.
    pub leaves_by: Option<&'a str>,
}

/// What there is to know of an address that no Pod, node or Service has. `None`: one of them has it, or it is neither an endpoint nor
/// of a node's Pod range nor asked for by itself, so it may be anybody's.
pub fn note(index: &Index, met: Met<'_>) -> Option<String> {
    let Met { addr, is_asked, .. } = met;
    if is_owned(index, addr) {
        return None;
    }
    let service = met.via.and_then(|name| index.service(name));
    if let Some(gone) = service
        .as_ref()
        .and_then(|service| node_gone(index, service, addr))
    {
        return Some(format!("no Pod has the address {addr}, and {gone}"));
    }
    if let Some((node, range)) = range_of(index, addr) {
        return Some(of_range(index, met, node, range));
    }
    match service.filter(|service| !service.selector.is_empty()) {
        Some(service) => Some(format!(
            "no Pod has the address {addr}, though Service {}, which selects Pods, has it as an endpoint",
            service.name
        )),
        None => is_asked.then(|| nobodys(index, addr)),
    }
}

/// Of an address that may be outside.
fn nobodys(index: &Index, addr: IpAddr) -> String {
    // Some Services are left to another proxy.
    let has = |service: Service| ends::addresses(&service).any(|own| own == addr);
    let nobody = if index.services().any(has) {
        "no Pod has"
    } else {
        "no Pod and no Service has"
    };
    format!("{nobody} the address {addr}, and it is in no known Pod range")
}

/// That an endpoint is on a node which is gone, if it is.
fn node_gone(index: &Index, service: &Service, addr: IpAddr) -> Option<String> {
    // In a folder there need not be any.
    index.nodes().next()?;
    let mut slices = index.slices(&service.name);
    slices.find_map(|slice| {
        let endpoint = slice.endpoints.iter().find(|endpoint| endpoint.addr == addr)?;
        let node = endpoint.placement.node.as_deref()?;
        let is_gone = index.node_by_name(&Name::new("", node)).is_none();
        is_gone.then(|| {
            format!(
                "EndpointSlice {} puts it on Node {node}, which there is not",
                slice.name
            )
        })
    })
}

fn of_range(index: &Index, met: Met<'_>, node: &Node, range: IpNet) -> String {
    let (addr, node) = (met.addr, node.name.name());
    if node != index.node_name() {
        return format!(
            "no Pod has the address {addr}, though it is of the Pod range {range} of node {node}"
        );
    }
    let leaves = met.leaves_by.map_or_else(String::new, |device| {
        format!(": what is sent there leaves the node by {device}")
    });
    format!("no Pod has the address {addr}, though it is of this node's Pod range {range}{leaves}")
}

/// Whether something that the cluster knows has an address.
fn is_owned(index: &Index, addr: IpAddr) -> bool {
    let has_more = || {
        let has = |pod: &Pod| pod.ips.contains(&addr) || pod.extra_ips.contains(&addr);
        index.pods().any(|pod| !pod.finished && has(pod))
    };
    let is_of_node = || index.nodes().any(|node| node.ips.contains(&addr));
    is_of_node() || ends::service_at(index, addr).is_some() || has_more()
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
        let said = |addr: &str, is_asked| {
            let met = Met {
                addr: addr.parse().unwrap(),
                is_asked,
                via: None,
                leaves_by: Some("eth0"),
            };
            note(&index, met)
        };
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
        assert_eq!(
            said("10.96.77.77", true).unwrap(),
            "no Pod and no Service has the address 10.96.77.77, and it is in no known Pod range"
        );
    }

    #[test]
    fn an_endpoint_that_no_pod_has_is_told_with_the_node_that_is_gone() {
        let service = |selector: Value| {
            let spec = json!({"clusterIP": "10.96.0.9", "selector": selector, "ports": [{"port": 80}]});
            samples::service("web", &spec)
        };
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"namespace": "shop", "name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
            "ports": [{"port": 80}],
            "endpoints": [
                {"addresses": ["10.244.9.21"], "nodeName": "node9"}, {"addresses": ["10.244.9.22"], "nodeName": "n1"},
            ],
        });
        let n1 = node("n1", "10.244.1.0/24", "192.168.77.11");
        let said = |objects: &[Value], addr: &str| {
            let met = Met {
                addr: addr.parse().unwrap(),
                is_asked: false,
                via: Some(&Name::new("shop", "web")),
                leaves_by: None,
            };
            note(&samples::index(objects), met)
        };
        let selecting = [service(json!({"app": "web"})), slice.clone(), n1.clone()];
        assert_eq!(
            said(&selecting, "10.244.9.21").unwrap(),
            "no Pod has the address 10.244.9.21, and EndpointSlice shop/web-1 puts it on Node node9, which there is not"
        );
        let by_service = "though Service shop/web, which selects Pods, has it as an endpoint";
        assert!(said(&selecting, "10.244.9.22").unwrap().ends_with(by_service));
        // Where no nodes are known, none is missing.
        assert!(
            said(&selecting[..2], "10.244.9.21")
                .unwrap()
                .ends_with(by_service)
        );
        // Endpoints that somebody else names may be anybody's.
        let free = [service(json!({})), slice, n1];
        assert_eq!(said(&free, "10.244.9.22"), None);
        assert!(said(&free, "10.244.9.21").is_some());
    }
}

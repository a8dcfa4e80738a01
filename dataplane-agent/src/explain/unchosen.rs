//! Why a Service has no endpoint for a flow: what its slices, or the Pods that it selects, say of those that are in them, or
//! who may use it.

use std::{collections::BTreeSet, net::IpAddr};

use dataplane_common::reason::Reason;

use super::ends::at;
use crate::{
    compile::endpoints,
    model::{Endpoint, EndpointSlice, Index, Pod, Protocol, Service, ServicePort, SliceFamily, TargetPort},
};

/// A reason names so many endpoints.
const NAMED_AT_MOST: usize = 5;

const NOBODY: &str = "no EndpointSlice of it has an endpoint: does a ready Pod match the selector?";

/// In words; empty where the objects have no more to say than the datapath has. `port`: the one that is asked for, if it is known;
/// `ipv4`: the family of the flow, if it has only one.
pub fn why(
    index: &Index,
    service: &Service,
    port: Option<&ServicePort>,
    ipv4: Option<bool>,
    reason: Reason,
) -> String {
    match reason {
        Reason::NoEndpoints | Reason::NoLocalEndpoints => {}
        Reason::SourceRange => return of_ranges(service),
        _ => return String::new(),
    }
    let is_local = reason == Reason::NoLocalEndpoints;
    if endpoints::are_of_pods(index, service) {
        return of_pods(index, service, port, ipv4);
    }
    let has_endpoints = |slice: &&EndpointSlice| slice.endpoints.iter().next().is_some();
    let mut slices: Vec<_> = index.slices(&service.name).filter(has_endpoints).collect();
    if slices.is_empty() {
        return NOBODY.to_owned();
    }
    slices.retain(|slice| ipv4.is_none_or(|ipv4| slice.family == family(ipv4)));
    if slices.is_empty() {
        return nobody_of(ipv4);
    }
    let has_port = |slice: &&EndpointSlice, port: &ServicePort| {
        let mut ports = slice.ports.iter();
        ports.any(|of_slice| (&of_slice.name, of_slice.proto) == (&port.name, port.proto))
    };
    if let Some(port) = port
        && !slices.iter().any(|slice| has_port(slice, port))
    {
        return no_port(&slices, port);
    }
    let meant = slices
        .iter()
        .filter(|slice| port.is_none_or(|port| has_port(slice, port)));
    let endpoints: Vec<Endpoint> = meant.flat_map(|slice| slice.endpoints.iter()).collect();
    listed(
        endpoints
            .iter()
            .map(|endpoint| of_endpoint(index, endpoint, is_local)),
    )
}

/// Who may use the Service.
fn of_ranges(service: &Service) -> String {
    let ranges = listed(service.source_ranges.iter().map(ToString::to_string));
    format!(
        "spec.loadBalancerSourceRanges of Service {} are {ranges}",
        service.name
    )
}

/// The first few of them.
fn listed(all: impl ExactSizeIterator<Item = String>) -> String {
    let more = all.len().saturating_sub(NAMED_AT_MOST);
    let mut parts: Vec<String> = all.take(NAMED_AT_MOST).collect();
    if more > 0 {
        parts.push(format!("and {more} more"));
    }
    parts.join("; ")
}

const fn family(ipv4: bool) -> SliceFamily {
    if ipv4 { SliceFamily::V4 } else { SliceFamily::V6 }
}

/// There are endpoints, and none has an address of the flow's family.
fn nobody_of(ipv4: Option<bool>) -> String {
    let family = if ipv4 == Some(false) { "IPv6" } else { "IPv4" };
    format!("no endpoint of it has an {family} address")
}

/// Slices tell ports by name, and none is of the Service's.
fn no_port(slices: &[&EndpointSlice], port: &ServicePort) -> String {
    let called = |name: &str, proto: Protocol| match name {
        "" => format!("one without a name ({})", proto.as_str()),
        _ => format!("`{name}` ({})", proto.as_str()),
    };
    let ports = slices.iter().flat_map(|slice| slice.ports.iter());
    let has: BTreeSet<String> = ports.map(|port| called(&port.name, port.proto)).collect();
    let has: Vec<String> = has.into_iter().collect();
    let has = if has.is_empty() {
        "they have none".to_owned()
    } else {
        format!("they have {}", has.join(", "))
    };
    let proto = port.proto.as_str();
    match &*port.name {
        "" => format!("no port of its EndpointSlices is for {proto} and without a name: {has}"),
        name => format!("no port of its EndpointSlices is called `{name}` ({proto}): {has}"),
    }
}

/// Without slices endpoints are the Pods that the Service selects.
fn of_pods(index: &Index, service: &Service, port: Option<&ServicePort>, ipv4: Option<bool>) -> String {
    let mut pods: Vec<&Pod> = index.selected_pods(service).filter(|pod| !pod.finished).collect();
    if pods.is_empty() {
        return NOBODY.to_owned();
    }
    let of_family = |addr: &&IpAddr| ipv4.is_none_or(|ipv4| addr.is_ipv4() == ipv4);
    // Who has no address yet has none of any family.
    pods.retain(|pod| pod.ips.is_empty() || pod.ips.iter().any(|addr| of_family(&addr)));
    if pods.is_empty() {
        return nobody_of(ipv4);
    }
    pods.sort_by(|one, other| one.name.cmp(&other.name));
    let named = port.and_then(|port| match &port.target {
        TargetPort::Name(name) => Some((name, port.proto)),
        TargetPort::Number(_) => None,
    });
    listed(pods.into_iter().map(|pod| {
        let addr = pod
            .ips
            .iter()
            .find(of_family)
            .map_or_else(|| "no address".to_owned(), ToString::to_string);
        let has_port = named.is_none_or(|(name, proto)| {
            let mut ports = pod.ports.iter();
            ports.any(|port| port.name == *name && port.proto == proto)
        });
        match named {
            Some((name, proto)) if !has_port => format!(
                "no container port of {} ({addr}) is called `{name}` ({})",
                pod.name,
                proto.as_str()
            ),
            _ => {
                let is_ready = pod.ready || service.publish_not_ready;
                let state = state(is_ready && !pod.terminating, pod.terminating, pod.ready);
                format!("{} ({addr}) {state}", pod.name)
            }
        }
    }))
}

fn state(is_ready: bool, is_terminating: bool, is_serving: bool) -> &'static str {
    match (is_ready, is_terminating, is_serving) {
        (true, ..) => "is ready",
        (false, true, true) => "is terminating",
        (false, true, false) => "is terminating and does not serve any more",
        (false, false, _) => "is not ready",
    }
}

fn of_endpoint(index: &Index, endpoint: &Endpoint, is_local: bool) -> String {
    let name = match at(index, endpoint.addr) {
        (addr, Some(pod)) => format!("{} ({addr})", pod.name),
        (addr, None) => addr.to_string(),
    };
    let state = state(endpoint.ready, endpoint.terminating, endpoint.serving);
    match &endpoint.placement.node {
        Some(node) if is_local => format!("{name} {state}, on node {node}"),
        _ => format!("{name} {state}"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{super::samples, *};

    fn slice(ports: &Value) -> Value {
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"namespace": "shop", "name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
            "ports": ports,
            "endpoints": [{"addresses": ["10.244.1.21"], "conditions": {"ready": true}}],
        })
    }

    fn pod(port: &str) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"namespace": "shop", "name": "web-1", "labels": {"app": "web"}},
            "spec": {"nodeName": "n1", "containers": [{"name": "c", "ports": [{"name": port, "containerPort": 80}]}]},
            "status": {
                "phase": "Running", "podIPs": [{"ip": "10.244.1.21"}],
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        })
    }

    fn said(target: &Value, others: &[Value]) -> String {
        let service = samples::service(
            "web",
            &json!({
                "clusterIP": "10.96.0.9", "selector": {"app": "web"},
                "ports": [{"name": "http", "port": 80, "targetPort": target}],
            }),
        );
        let index = samples::index(&[&[service], others].concat());
        let service = samples::known(&index, "web");
        let port = service.ports.first();
        why(&index, &service, port, Some(true), Reason::NoEndpoints)
    }

    #[test]
    fn a_port_that_slices_call_otherwise_is_the_reason() {
        let number = json!(80);
        assert_eq!(
            said(&number, &[slice(&json!([{"name": "web", "port": 8080}]))]),
            "no port of its EndpointSlices is called `http` (TCP): they have `web` (TCP)"
        );
        assert_eq!(
            said(&number, &[slice(&json!([]))]),
            "no port of its EndpointSlices is called `http` (TCP): they have none"
        );
        let same = said(&number, &[slice(&json!([{"name": "http", "port": 8080}]))]);
        assert_eq!(same, "10.244.1.21 is ready");
    }

    #[test]
    fn a_client_in_no_range_is_told_the_ranges() {
        let service = samples::service(
            "web",
            &json!({
                "type": "LoadBalancer", "clusterIP": "10.96.0.9", "ports": [{"port": 80}],
                "loadBalancerSourceRanges": ["10.0.0.0/8", "198.51.100.0/24"],
            }),
        );
        let index = samples::index(&[service]);
        let service = samples::known(&index, "web");
        assert_eq!(
            why(&index, &service, service.ports.first(), None, Reason::SourceRange),
            "spec.loadBalancerSourceRanges of Service shop/web are 10.0.0.0/8; 198.51.100.0/24"
        );
    }

    #[test]
    fn a_target_port_that_no_container_has_is_the_reason() {
        let name = json!("htpp");
        assert_eq!(
            said(&name, &[pod("http")]),
            "no container port of shop/web-1 (10.244.1.21) is called `htpp` (TCP)"
        );
        assert_eq!(said(&name, &[pod("htpp")]), "shop/web-1 (10.244.1.21) is ready");
        assert_eq!(said(&name, &[]), NOBODY);
    }

    #[test]
    fn endpoints_of_the_other_family_are_left_out() {
        let (number, ports) = (json!(80), json!([{"name": "http", "port": 8080}]));
        let mut other = slice(&ports);
        other["metadata"]["name"] = json!("web-2");
        other["addressType"] = json!("IPv6");
        other["endpoints"][0]["addresses"] = json!(["fd00::21"]);
        assert_eq!(
            said(&number, &[slice(&ports), other.clone()]),
            "10.244.1.21 is ready"
        );
        let none = "no endpoint of it has an IPv4 address";
        assert_eq!(said(&number, &[other]), none);
        let mut pod = pod("http");
        pod["status"]["podIPs"] = json!([{"ip": "fd00::21"}, {"ip": "10.244.1.21"}]);
        assert_eq!(said(&number, &[pod.clone()]), "shop/web-1 (10.244.1.21) is ready");
        pod["status"]["podIPs"] = json!([{"ip": "fd00::21"}]);
        assert_eq!(said(&number, &[pod]), none);
    }
}

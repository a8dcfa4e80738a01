//! EndpointSlices, with the defaults of their conditions.

use std::num::NonZeroI64;

use k8s_openapi::api::discovery::v1 as discovery;

use super::{ProtocolField, Refused, label, parse_ip, parse_port, parse_protocol};
use crate::model::{
    Cause, Endpoint, EndpointSlice, Endpoints, Name, Placement, Problem, SliceFamily, SlicePort, shared,
};

/// Which change of Pods the slice is the first to show, in RFC 3339.
const CHANGED: &str = "endpoints.kubernetes.io/last-change-trigger-time";
const SERVICE_NAME: &str = "kubernetes.io/service-name";

pub fn decode(
    name: Name,
    slice: &discovery::EndpointSlice,
    problems: &mut Vec<Problem>,
) -> Result<EndpointSlice, Refused> {
    let family = match slice.address_type.as_str() {
        "IPv4" => SliceFamily::V4,
        "IPv6" => SliceFamily::V6,
        "FQDN" => SliceFamily::Fqdn,
        other => {
            let reason = format!("`{other}` is no address type");
            return Err(vec![Problem::new("addressType", reason)]);
        }
    };
    let service = label(&slice.metadata, SERVICE_NAME)
        .filter(|service| !service.is_empty())
        .map(|service| Name::new(name.namespace(), service));
    let ports = ports(slice, problems)?;
    let endpoints = if family == SliceFamily::Fqdn {
        let problem = Problem::new("addressType", "FQDN: host names are not served");
        problems.push(problem.because(Cause::Unsupported));
        Endpoints::Any(Box::default())
    } else {
        let endpoints = slice.endpoints.iter().flatten().enumerate();
        endpoints
            .filter_map(|(i, endpoint)| self::endpoint(i, endpoint, family, problems))
            .collect()
    };
    Ok(EndpointSlice {
        name,
        service,
        family,
        ports: shared::ports(ports),
        endpoints,
        changed_ns: changed_ns(slice),
    })
}

/// Whoever writes anything else there only spoils a statistic.
fn changed_ns(slice: &discovery::EndpointSlice) -> Option<NonZeroI64> {
    let text = slice.metadata.annotations.as_ref()?.get(CHANGED)?;
    let time: jiff::Timestamp = text.parse().ok()?;
    NonZeroI64::new(i64::try_from(time.as_nanosecond()).ok()?)
}

fn ports(slice: &discovery::EndpointSlice, problems: &mut Vec<Problem>) -> Result<Vec<SlicePort>, Refused> {
    let mut ports = Vec::new();
    for (i, port) in slice.ports.iter().flatten().enumerate() {
        let field = |what: &str| format!("ports[{i}].{what}");
        let Some(number) = port.port else {
            let problem = Problem::new(field("port"), "missing: no port of a Service matches `all ports`");
            problems.push(problem.because(Cause::Unsupported));
            continue;
        };
        let number = parse_port(number, || field("port")).map_err(|problem| vec![problem])?;
        match parse_protocol(port.protocol.as_deref(), || field("protocol")) {
            ProtocolField::Served(proto) => ports.push(SlicePort {
                name: shared::text(port.name.as_deref().unwrap_or_default()),
                proto,
                port: number,
            }),
            ProtocolField::NotYet(problem) => problems.push(problem),
            ProtocolField::Unknown(problem) => return Err(vec![problem]),
        }
    }
    Ok(ports)
}

/// Only the first address of an endpoint counts, as in kube-proxy.
fn endpoint(
    place: usize,
    endpoint: &discovery::Endpoint,
    family: SliceFamily,
    problems: &mut Vec<Problem>,
) -> Option<Endpoint> {
    let field = || format!("endpoints[{place}].addresses[0]");
    let Some(text) = endpoint.addresses.first() else {
        problems.push(Problem::new(field(), "missing"));
        return None;
    };
    if endpoint.addresses.len() > 1 {
        let problem = Problem::new(
            format!("endpoints[{place}].addresses"),
            "only the first one is served",
        );
        problems.push(problem.because(Cause::Unsupported));
    }
    let addr = match parse_ip(text) {
        Ok(addr) if addr.is_ipv4() != (family == SliceFamily::V4) => {
            problems.push(Problem::new(
                field(),
                format!("{addr} is not of the slice's address type"),
            ));
            return None;
        }
        Ok(addr) if addr.is_unspecified() || addr.is_loopback() || addr.is_multicast() => {
            problems.push(Problem::new(
                field(),
                format!("{addr} is no address for an endpoint"),
            ));
            return None;
        }
        Ok(addr) => addr,
        Err(reason) => {
            problems.push(Problem::new(field(), reason));
            return None;
        }
    };
    let condition = |read: fn(&discovery::EndpointConditions) -> Option<bool>| {
        endpoint.conditions.as_ref().and_then(read)
    };
    let hints = endpoint.hints.as_ref();
    let zones = hints.and_then(|hints| hints.for_zones.as_ref());
    let nodes = hints.and_then(|hints| hints.for_nodes.as_ref());
    let node = endpoint.node_name.as_deref().filter(|node| !node.is_empty());
    Some(Endpoint {
        addr,
        ready: condition(|conditions| conditions.ready).unwrap_or(true),
        serving: condition(|conditions| conditions.serving).unwrap_or(true),
        terminating: condition(|conditions| conditions.terminating).unwrap_or(false),
        placement: shared::placement(Placement {
            node: node.map(shared::text),
            zone_hints: zones
                .into_iter()
                .flatten()
                .map(|zone| shared::text(&zone.name))
                .collect(),
            node_hints: nodes
                .into_iter()
                .flatten()
                .map(|node| shared::text(&node.name))
                .collect(),
        }),
    })
}

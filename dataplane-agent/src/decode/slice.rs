//! EndpointSlices, with the defaults of their conditions.

use std::sync::Arc;

use k8s_openapi::api::discovery::v1 as discovery;

use super::{ProtocolField, Refused, label, parse_ip, parse_port, parse_protocol};
use crate::model::{Endpoint, EndpointSlice, Name, Problem, SliceFamily, SlicePort};

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
        .map(|service| Name {
            namespace: name.namespace.clone(),
            name: service.into(),
        });
    let ports = ports(slice, problems)?;
    let endpoints = if family == SliceFamily::Fqdn {
        Vec::new()
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
        ports,
        endpoints,
    })
}

fn ports(slice: &discovery::EndpointSlice, problems: &mut Vec<Problem>) -> Result<Vec<SlicePort>, Refused> {
    let mut ports = Vec::new();
    for (i, port) in slice.ports.iter().flatten().enumerate() {
        let field = |what: &str| format!("ports[{i}].{what}");
        // A port without a number means "all ports", which no Service port can match.
        let Some(number) = port.port else { continue };
        let number = parse_port(number, || field("port")).map_err(|problem| vec![problem])?;
        match parse_protocol(port.protocol.as_deref(), || field("protocol")) {
            ProtocolField::Served(proto) => ports.push(SlicePort {
                name: port.name.as_deref().unwrap_or_default().into(),
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
    let text = endpoint.addresses.first()?;
    let field = || format!("endpoints[{place}].addresses[0]");
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
    Some(Endpoint {
        addr,
        ready: condition(|conditions| conditions.ready).unwrap_or(true),
        serving: condition(|conditions| conditions.serving).unwrap_or(true),
        terminating: condition(|conditions| conditions.terminating).unwrap_or(false),
        node: endpoint
            .node_name
            .as_deref()
            .filter(|node| !node.is_empty())
            .map(Arc::from),
        zone_hints: hints
            .and_then(|hints| hints.for_zones.as_ref())
            .into_iter()
            .flatten()
            .map(|zone| Arc::from(zone.name.as_str()))
            .collect(),
        node_hints: hints
            .and_then(|hints| hints.for_nodes.as_ref())
            .into_iter()
            .flatten()
            .map(|node| Arc::from(node.name.as_str()))
            .collect(),
    })
}

//! Why a Service has no endpoint for a flow: what its slices say of those that are in them.

use dataplane_common::reason::Reason;

use super::ends::at;
use crate::model::{Endpoint, Index, Name};

/// A reason names so many endpoints.
const NAMED_AT_MOST: usize = 5;

/// In words; empty where the slices have no more to say than the datapath has.
pub fn why(index: &Index, service: &Name, reason: Reason) -> String {
    let slices = index.slices(service);
    let endpoints: Vec<Endpoint> = slices.flat_map(|slice| slice.endpoints.iter()).collect();
    let is_local = reason == Reason::NoLocalEndpoints;
    let mut parts: Vec<String> = match reason {
        Reason::NoEndpoints | Reason::NoLocalEndpoints if endpoints.is_empty() => {
            return "no EndpointSlice of it has an endpoint: does a ready Pod match the selector?".to_owned();
        }
        Reason::NoEndpoints | Reason::NoLocalEndpoints => endpoints
            .iter()
            .take(NAMED_AT_MOST)
            .map(|endpoint| of_endpoint(index, endpoint, is_local))
            .collect(),
        _ => return String::new(),
    };
    if endpoints.len() > NAMED_AT_MOST {
        parts.push(format!("and {} more", endpoints.len() - NAMED_AT_MOST));
    }
    parts.join("; ")
}

fn of_endpoint(index: &Index, endpoint: &Endpoint, is_local: bool) -> String {
    let name = match at(index, endpoint.addr) {
        (addr, Some(pod)) => format!("{} ({addr})", pod.name),
        (addr, None) => addr.to_string(),
    };
    let state = match (endpoint.ready, endpoint.terminating, endpoint.serving) {
        (true, ..) => "is ready",
        (false, true, true) => "is terminating",
        (false, true, false) => "is terminating and does not serve any more",
        (false, false, _) => "is not ready",
    };
    match &endpoint.placement.node {
        Some(node) if is_local => format!("{name} {state}, on node {node}"),
        _ => format!("{name} {state}"),
    }
}

//! How policies of the whole cluster say ports: `ports` in v1alpha1, `protocols` in v1alpha2.

use serde::{Deserialize, Serialize};

use super::{Findings, ports, protocol};
use crate::model::{Protocol, policy::PortMatch};

api! {
    ApiPort { port_number: PortNumber, named_port: String, port_range: PortRange, }
    PortNumber { protocol: String, port: i32, }
    PortRange { protocol: String, start: i32, end: i32, }
    ApiProtocol { tcp: Transport, udp: Transport, sctp: Transport, destination_named_port: String, }
    Transport { destination_port: DestinationPort, }
    DestinationPort { number: i32, range: PortRange, }
}

pub fn admin_port(port: &ApiPort, at: &str, findings: &mut Findings<'_>) -> Option<PortMatch> {
    match port {
        ApiPort {
            port_number: Some(number),
            named_port: None,
            port_range: None,
        } => {
            let at = format!("{at}.portNumber");
            let proto = protocol(number.protocol.as_deref(), || format!("{at}.protocol"), findings)?;
            ports(
                proto,
                (number.port.unwrap_or_default(), &format!("{at}.port")),
                None,
                findings,
            )
        }
        ApiPort {
            port_number: None,
            named_port: Some(name),
            port_range: None,
        } => Some(PortMatch::Named(None, name.as_str().into())),
        ApiPort {
            port_number: None,
            named_port: None,
            port_range: Some(range),
        } => {
            let at = format!("{at}.portRange");
            let proto = protocol(range.protocol.as_deref(), || format!("{at}.protocol"), findings)?;
            // The schema does not say which end comes first.
            findings.unchecked(|findings| port_range(proto, range, &at, findings))
        }
        ApiPort {
            port_number: None,
            named_port: None,
            port_range: None,
        } => {
            findings.unknown(at, "says nothing that is known here");
            None
        }
        _ => {
            findings.refuse(at, "says more than one thing");
            None
        }
    }
}

pub fn cluster_port(protocol: &ApiProtocol, at: &str, findings: &mut Findings<'_>) -> Option<PortMatch> {
    let ApiProtocol {
        tcp,
        udp,
        sctp,
        destination_named_port,
    } = protocol;
    let (proto, transport) = match (tcp, udp, sctp, destination_named_port) {
        (None, None, None, Some(name)) => return Some(PortMatch::Named(None, name.as_str().into())),
        (Some(tcp), None, None, None) => (Protocol::Tcp, tcp),
        (None, Some(udp), None, None) => (Protocol::Udp, udp),
        (None, None, Some(sctp), None) => (Protocol::Sctp, sctp),
        (None, None, None, None) => {
            findings.unknown(at, "says nothing that is known here");
            return None;
        }
        _ => {
            findings.refuse(at, "says more than one thing");
            return None;
        }
    };
    let at = format!("{at}.{}.destinationPort", proto.as_str().to_lowercase());
    match &transport.destination_port {
        Some(DestinationPort {
            number: Some(number),
            range: None,
        }) => ports(proto, (*number, &format!("{at}.number")), None, findings),
        Some(DestinationPort {
            number: None,
            range: Some(range),
        }) => port_range(proto, range, &format!("{at}.range"), findings),
        Some(DestinationPort {
            number: Some(_),
            range: Some(_),
        }) => {
            findings.refuse(at, "says more than one thing");
            None
        }
        // The schema wants some property of the protocol (`minProperties`), so there is one that is not known here.
        _ => {
            findings.unknown(at, "says nothing that is known here");
            None
        }
    }
}

fn port_range(
    proto: Protocol,
    range: &PortRange,
    at: &str,
    findings: &mut Findings<'_>,
) -> Option<PortMatch> {
    let last = (range.end.unwrap_or_default(), &*format!("{at}.end"));
    ports(
        proto,
        (range.start.unwrap_or_default(), &format!("{at}.start")),
        Some(last),
        findings,
    )
}

//! The ends of a flow: how they are asked for, and what they are. Behind a Service that is each endpoint that a new flow of
//! the client may be given, because policies see that and not the Service.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use dataplane_common::reason::Reason;

use super::{asked, unchosen};
use crate::{
    compile::endpoints::{self, View},
    model::{Index, Name, Pod, Protocol, Proxied, Service, ServicePort},
};

/// An end of a flow, as it is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    Pod(Name),
    Service(Name),
    Addr(IpAddr),
}

impl FromStr for End {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bracketed = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
        if let Ok(addr) = bracketed.unwrap_or(text).parse::<IpAddr>() {
            return Ok(Self::Addr(addr.to_canonical()));
        }
        if text.parse::<SocketAddr>().is_ok() {
            return Err(format!(
                "`{text}` has a port: give the address alone, and with --port the port that is asked"
            ));
        }
        if let Some((addr, length)) = text.split_once('/')
            && addr.parse::<IpAddr>().is_ok()
        {
            return Err(format!(
                "`{text}` is a range: give one address, without `/{length}`"
            ));
        }
        let parts: Vec<&str> = text.split('/').collect();
        match parts[..] {
            _ if parts.contains(&"") => Err(()),
            [namespace, name] => Ok(Self::Pod(Name::new(namespace, name))),
            ["svc", namespace, name] => Ok(Self::Service(Name::new(namespace, name))),
            _ => Err(()),
        }
        .map_err(|()| format!("`{text}` is neither namespace/pod, svc/namespace/service nor an address"))
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod(name) => write!(f, "{name}"),
            Self::Service(name) => write!(f, "svc/{name}"),
            Self::Addr(addr) => write!(f, "{addr}"),
        }
    }
}

/// A protocol and, where it has some, a destination port: `80/TCP`, `80` (TCP) or `ICMP`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Port {
    /// `None`: ICMP, of the flow's address family.
    pub proto: Option<Protocol>,
    pub number: u16,
}

impl FromStr for Port {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "ICMP" {
            return Ok(Self {
                proto: None,
                number: 0,
            });
        }
        let wrong = || format!("`{text}` is no port such as 80/TCP, 53/UDP or 9000/SCTP, nor ICMP");
        let (number, proto) = text.split_once('/').unwrap_or((text, "TCP"));
        let proto = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp]
            .into_iter()
            .find(|known| known.as_str() == proto);
        let number = number.parse().ok().filter(|number| *number != 0);
        match (proto, number) {
            (Some(proto), Some(number)) => Ok(Self {
                proto: Some(proto),
                number,
            }),
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.proto {
            Some(proto) => write!(f, "{}/{}", self.number, proto.as_str()),
            None => f.write_str("ICMP"),
        }
    }
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("there is no Pod {0}")]
    NoPod(Name),
    #[error("Pod {0} has no address")]
    NoAddress(Name),
    #[error("there is no Service {0}")]
    NoService(Name),
    #[error("Service {0} begins no flows: ask for one of its Pods")]
    Client(Name),
    /// With the ports that it has.
    #[error("Service {0} has no port {1}: it has {2}")]
    NoPort(Name, Port, String),
    #[error("Service {0} is headless, it has no cluster IP: ask its Pods")]
    Headless(Name),
    #[error("Service {0} is an ExternalName: it is a name in DNS, nothing is served for it")]
    ExternalName(Name),
    #[error("Service {0} is left to another proxy by a label: nothing is served for it here")]
    OtherProxy(Name),
    /// With what the objects say of it.
    #[error("Service {0} has no endpoint at port {1}: {2}")]
    NoEndpoint(Name, Port, String),
    #[error("the ends have no address family in common")]
    Families,
}

/// An address, and the Pod that has it.
pub type Found<'a> = (IpAddr, Option<&'a Pod>);

/// Where a flow leads.
#[derive(Clone, Debug)]
pub struct Target<'a> {
    pub found: Found<'a>,
    pub port: Port,
    pub via: Option<Name>,
}

/// Where a flow may come from.
pub fn sources<'a>(index: &'a Index, end: &End) -> Result<Vec<Found<'a>>, Error> {
    match end {
        End::Pod(name) => of_pod(index, name),
        End::Service(name) => Err(Error::Client(name.clone())),
        End::Addr(addr) => match service_at(index, *addr) {
            Some(service) => Err(Error::Client(service.name)),
            None => Ok(vec![at(index, *addr)]),
        },
    }
}

/// Where a flow to `end` may lead, of a client that is this Pod or is outside.
pub fn targets<'a>(
    index: &'a Index,
    end: &End,
    port: Port,
    client: Option<&Pod>,
) -> Result<Vec<Target<'a>>, Error> {
    let direct = |found| Target {
        found,
        port,
        via: None,
    };
    match end {
        End::Pod(name) => Ok(of_pod(index, name)?.into_iter().map(direct).collect()),
        End::Service(name) => {
            let service = service(index, name)?;
            behind(index, &service, [true, false], port, client)
        }
        End::Addr(addr) => match service_at(index, *addr) {
            Some(service) => {
                let families = [true, false].map(|ipv4| ipv4 == addr.is_ipv4());
                behind(index, &service, families, port, client)
            }
            None => Ok(vec![direct(at(index, *addr))]),
        },
    }
}

/// The endpoints of a Service for a client; `families`: whether those of IPv4, and of IPv6, are asked for.
fn behind<'a>(
    index: &'a Index,
    service: &Service,
    families: [bool; 2],
    port: Port,
    client: Option<&Pod>,
) -> Result<Vec<Target<'a>>, Error> {
    let mut ports = service.ports.iter();
    let service_port = ports
        .find(|candidate| Some(candidate.proto) == port.proto && candidate.port == port.number)
        .ok_or_else(|| Error::NoPort(service.name.clone(), port, asked::ports(service)))?;
    let node = client
        .and_then(|client| client.node.as_deref())
        .unwrap_or_default();
    let view = View {
        node,
        zone: index
            .node_by_name(&Name::new("", node))
            .and_then(|node| node.zone()),
    };
    let mut targets = Vec::new();
    for ipv4 in [true, false] {
        let of_service = if ipv4 { service.ipv4 } else { service.ipv6 };
        if !of_service || !families[usize::from(!ipv4)] {
            continue;
        }
        let endpoints = endpoints::of_port(index, service, service_port, ipv4);
        let selection = endpoints::select(&endpoints, &view);
        let is_local = service.internal_local && client.is_some();
        let chosen = if is_local {
            selection.local
        } else {
            selection.cluster
        };
        targets.extend(chosen.into_iter().map(|endpoint| Target {
            found: at(index, endpoint.addr),
            port: Port {
                proto: port.proto,
                number: endpoint.port,
            },
            via: Some(service.name.clone()),
        }));
    }
    if targets.is_empty() {
        let reason = if service.internal_local && client.is_some() {
            Reason::NoLocalEndpoints
        } else {
            Reason::NoEndpoints
        };
        let ipv4 = match families {
            [true, true] => None,
            [ipv4, _] => Some(ipv4),
        };
        let why = unchosen::why(index, service, Some(service_port), ipv4, reason);
        return Err(Error::NoEndpoint(service.name.clone(), port, why));
    }
    Ok(targets)
}

/// A Service that is served.
pub fn service(index: &Index, name: &Name) -> Result<Service, Error> {
    let service = index
        .service(name)
        .ok_or_else(|| Error::NoService(name.clone()))?;
    match service.proxied {
        Proxied::Here => Ok(service),
        Proxied::Headless => Err(Error::Headless(name.clone())),
        Proxied::ExternalName => Err(Error::ExternalName(name.clone())),
        Proxied::Elsewhere => Err(Error::OtherProxy(name.clone())),
    }
}

pub fn of_pod<'a>(index: &'a Index, name: &Name) -> Result<Vec<Found<'a>>, Error> {
    let pod = index.pod(name).ok_or_else(|| Error::NoPod(name.clone()))?;
    if pod.ips.is_empty() {
        return Err(Error::NoAddress(name.clone()));
    }
    Ok(pod.ips.iter().map(|ip| (*ip, Some(pod))).collect())
}

pub fn at(index: &Index, addr: IpAddr) -> Found<'_> {
    let is_owner = |pod: &&Pod| !pod.finished && !pod.host_network && pod.ips.contains(&addr);
    (addr, index.pods().find(is_owner))
}

pub fn service_at(index: &Index, addr: IpAddr) -> Option<Service> {
    index
        .services()
        .filter(|service| service.proxied.is_here())
        .find(|service| addresses(service).any(|own| own == addr))
}

/// Those of a Service itself.
pub fn addresses(service: &Service) -> impl Iterator<Item = IpAddr> {
    let ips = [&service.cluster_ips, &service.external_ips, &service.ingress_ips];
    ips.into_iter().flatten().copied()
}

/// The Service that answers at an address and port, a node port among them.
pub fn service_with(index: &Index, at: SocketAddr, proto: Option<Protocol>) -> Option<Service> {
    service_at(index, at.ip()).or_else(|| service_of_node_port(index, at.port(), proto))
}

pub fn service_of_node_port(index: &Index, number: u16, proto: Option<Protocol>) -> Option<Service> {
    index.services().find(|service| {
        let mut ports = service.ports.iter();
        ports.any(|port| port.node_port == Some(number) && Some(port.proto) == proto)
    })
}

/// The port of a Service that an address and port of it are for.
pub fn port_at(service: &Service, at: SocketAddr, proto: Option<Protocol>) -> Option<&ServicePort> {
    let mut ports = service.ports.iter().filter(|port| Some(port.proto) == proto);
    let is_own = addresses(service).any(|own| own == at.ip());
    let by_port = |port: &&ServicePort| is_own && port.port == at.port();
    ports
        .clone()
        .find(by_port)
        .or_else(|| ports.find(|port| port.node_port == Some(at.port())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_may_stand_in_brackets_and_its_port_is_asked_for_apart() {
        let addr = |text: &str| Ok(End::Addr(text.parse().unwrap()));
        assert_eq!("[fd00::21]".parse::<End>(), addr("fd00::21"));
        assert_eq!("10.96.0.80".parse::<End>(), addr("10.96.0.80"));
        let apart = "has a port: give the address alone, and with --port the port that is asked";
        for (text, expected) in [
            ("[fd00::21]:80", apart),
            ("10.96.0.80:80", apart),
            ("10.96.0.80:0x50", "nor an address"),
        ] {
            let error = text.parse::<End>().unwrap_err();
            assert!(error.ends_with(expected), "{error}");
        }
    }
}

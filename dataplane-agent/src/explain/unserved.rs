//! What is said of a Service's address that the tables have no entry for.

use std::{
    iter,
    net::{IpAddr, SocketAddr},
};

use super::{Port, asked, ends};
use crate::model::{Index, Service};

/// Reasons begin with it.
pub const NOT_SERVED: &str = "not-served";

/// Of an address and port that no entry of the tables is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unserved {
    /// The Service has this address and port, and is not served there.
    Missing(Service),
    /// A cluster IP at a port that its Service lacks: nobody is there.
    NoPort(Service, String),
    /// The same of an address from outside, which somebody else may have too.
    Other(String),
}

/// `node_ports_at`: where node ports answer.
pub fn at(index: &Index, at: SocketAddr, port: Port, node_ports_at: &[IpAddr]) -> Option<Unserved> {
    let proto = port.proto?;
    if let Some(service) = ends::service_at(index, at.ip()) {
        let has = |of: &crate::model::ServicePort| (of.proto, of.port) == (proto, at.port());
        if service.ports.iter().any(has) {
            return Some(Unserved::Missing(service));
        }
        let text = format!(
            "{} is an address of Service {}, which has no port {port}: it has {}",
            at.ip(),
            service.name,
            asked::ports(&service)
        );
        if service.cluster_ips.contains(&at.ip()) {
            return Some(Unserved::NoPort(service, text));
        }
        if !node_ports_at.contains(&at.ip()) {
            return Some(Unserved::Other(text));
        }
    }
    let of_node_port = ends::service_of_node_port(index, at.port(), port.proto);
    of_node_port
        .filter(|_| node_ports_at.contains(&at.ip()))
        .map(Unserved::Missing)
}

impl Unserved {
    /// `problems`: what keeps the Service from being served, as far as that is known.
    pub fn reason(&self, port: Port, problems: &[String]) -> String {
        match self {
            Self::Missing(service) => {
                let problems = match problems {
                    [] => "no problem of it is known".to_owned(),
                    _ => problems.join("; "),
                };
                format!(
                    "{NOT_SERVED}: Service {} has {port} here, and the tables have no entry for it: {problems}",
                    service.name
                )
            }
            Self::NoPort(_, text) => {
                let parts: Vec<&str> = iter::once(&**text)
                    .chain(problems.iter().map(String::as_str))
                    .collect();
                format!("{NOT_SERVED}: {}", parts.join("; "))
            }
            Self::Other(text) => text.clone(),
        }
    }

    pub fn service(&self) -> Option<&Service> {
        match self {
            Self::Missing(service) | Self::NoPort(service, _) => Some(service),
            Self::Other(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{super::samples, *};

    #[test]
    fn an_address_that_the_tables_lack_is_said_to_be_a_services() {
        let index = samples::index(&[samples::service(
            "web",
            &json!({
                "type": "NodePort", "clusterIP": "10.96.0.9", "externalIPs": ["198.51.100.9"],
                "ports": [{"port": 80, "nodePort": 30080}],
            }),
        )]);
        let own: [IpAddr; 1] = ["192.168.77.11".parse().unwrap()];
        let said = |addr: &str, port: &str| {
            let port: Port = port.parse().unwrap();
            let asked = SocketAddr::new(addr.parse().unwrap(), port.number);
            let unserved = at(&index, asked, port, &own)?;
            Some((
                unserved.service().is_some(),
                unserved.reason(port, &["a table has no room".to_owned()]),
            ))
        };
        let missing = "has 80/TCP here, and the tables have no entry for it: a table has no room";
        for (addr, port) in [("10.96.0.9", "80/TCP"), ("198.51.100.9", "80/TCP")] {
            let (is_service, text) = said(addr, port).unwrap();
            assert!(is_service && text.contains(missing), "{text}");
        }
        assert!(said("192.168.77.11", "30080/TCP").unwrap().0);
        let (is_service, text) = said("10.96.0.9", "81/TCP").unwrap();
        assert!(
            is_service && text.contains("no port 81/TCP: it has 80/TCP (node port 30080)"),
            "{text}"
        );
        assert!(!said("198.51.100.9", "22/TCP").unwrap().0, "it may be another's");
        for (addr, port) in [
            ("192.168.77.11", "22/TCP"),
            ("10.96.0.9", "ICMP"),
            ("192.0.2.1", "30080/TCP"),
        ] {
            assert_eq!(said(addr, port), None, "{addr}");
        }
    }

    #[test]
    fn services_that_are_never_served_are_told_by_their_type() {
        let index = samples::index(&[
            samples::service("headless", &json!({"clusterIP": "None", "ports": [{"port": 80}]})),
            samples::service(
                "away",
                &json!({"type": "ExternalName", "externalName": "a.example"}),
            ),
        ]);
        for (name, expected) in [
            ("headless", "it has no cluster IP: ask its Pods"),
            ("away", "it is a name in DNS, nothing is served for it"),
        ] {
            let name = crate::model::Name::new("shop", name);
            let error = ends::service(&index, &name).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}

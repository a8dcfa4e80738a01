//! The addresses of a Service that a client can ask: from outside those for clients outside, else the cluster IPs.

use std::net::{IpAddr, SocketAddr};

use super::{Port, ends::Error};
use crate::{
    compile::{
        Options,
        services::{Field, frontends},
    },
    model::{Name, ObjectRef, Protocol, Service},
};

/// Where a flow's first packet is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    pub at: SocketAddr,
    /// Of the Service that is asked for by name.
    pub service: Option<Name>,
    /// What kind of address of it this is; `None`: it is an endpoint of a Service without addresses.
    pub kind: Option<String>,
}

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub struct Client<'a> {
    pub addr: IpAddr,
    /// Neither a Pod nor this node.
    pub is_outside: bool,
    /// The addresses of this node at which node ports answer.
    pub node_ports_at: &'a [IpAddr],
}

impl Asked {
    /// An address that is no Service's, as far as the question says.
    pub fn direct(addr: IpAddr, port: Port) -> Self {
        Self {
            at: SocketAddr::new(addr, port.number),
            service: None,
            kind: None,
        }
    }

    /// What there is to say where another object is served at the address of the Service that is asked for.
    pub fn conflict(&self, holder: Option<&ObjectRef>, port: Port) -> Option<String> {
        let (service, holder) = (self.service.as_ref()?, holder?);
        let is_other = *holder != ObjectRef::service(service);
        let proto = port.proto.map_or("ICMP", Protocol::as_str);
        is_other.then(|| {
            format!(
                "{}/{proto} is held by {holder}, and that is not what was asked: Service {service} is not served there",
                self.at
            )
        })
    }
}

/// The addresses of a Service that a client can ask, of the client's family. A number may be that of a port or of a node port.
pub fn of_service(service: &Service, port: Port, client: Client<'_>) -> Result<Vec<Asked>, Error> {
    let mut has_port = false;
    let (mut inside, mut outside) = (Vec::new(), Vec::new());
    for (frontend, of, _, field) in frontends(service, Options::default()) {
        let is_node_port = matches!(field, Field::NodePort(_)) && frontend.port == port.number;
        if Some(frontend.proto) != port.proto || !is_node_port && of.port != port.number {
            continue;
        }
        has_port = true;
        let addrs = match field {
            Field::NodePort(_) => client.node_ports_at,
            _ => &[frontend.addr],
        };
        let found = addrs
            .iter()
            .filter(|addr| {
                addr.is_ipv4() == frontend.addr.is_ipv4() && addr.is_ipv4() == client.addr.is_ipv4()
            })
            .map(|addr| Asked {
                at: SocketAddr::new(*addr, frontend.port),
                service: Some(service.name.clone()),
                kind: Some(kind(field).to_owned()),
            });
        // Who asks for a node port by its number means it, wherever the client is.
        if matches!(field, Field::ClusterIp(_)) || is_node_port && !client.is_outside {
            inside.extend(found);
        } else {
            outside.extend(found);
        }
    }
    if !has_port {
        return Err(Error::NoPort(service.name.clone(), port, ports(service)));
    }
    if !client.is_outside {
        return Ok(inside);
    }
    if outside.is_empty() {
        for asked in &mut inside {
            let kind = asked.kind.get_or_insert_default();
            kind.push_str(": it has no address for clients outside");
        }
        return Ok(inside);
    }
    Ok(outside)
}

fn kind(field: Field) -> &'static str {
    match field {
        Field::ClusterIp(_) => "its cluster IP",
        Field::ExternalIp => "an external IP of it",
        Field::Ingress => "a load balancer address of it",
        Field::NodePort(_) => "a node port of it",
    }
}

/// The ports that a Service has, in words.
pub fn ports(service: &Service) -> String {
    let ports = service.ports.iter().map(|port| {
        let (number, proto) = (port.port, port.proto.as_str());
        match port.node_port {
            Some(node_port) => format!("{number}/{proto} (node port {node_port})"),
            None => format!("{number}/{proto}"),
        }
    });
    ports.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{super::samples, *};

    const OWN: [&str; 2] = ["192.168.77.11", "fd00::11"];

    fn asked(service: &Service, port: &str, client: &str, is_outside: bool) -> Vec<String> {
        let own = OWN.map(|addr| addr.parse().unwrap());
        let client = Client {
            addr: client.parse().unwrap(),
            is_outside,
            node_ports_at: &own,
        };
        let asked = of_service(service, port.parse().unwrap(), client).unwrap();
        let text = |asked: Asked| format!("{} {}", asked.at, asked.kind.unwrap_or_default());
        asked.into_iter().map(text).collect()
    }

    fn balanced() -> Service {
        let mut object = samples::service(
            "etplocal",
            &json!({
                "type": "LoadBalancer", "clusterIP": "10.96.0.9", "externalIPs": ["198.51.100.9"],
                "ports": [{"port": 80, "nodePort": 30086}],
            }),
        );
        object["status"] = json!({"loadBalancer": {"ingress": [{"ip": "198.51.100.41"}]}});
        samples::known(&samples::index(&[object]), "etplocal")
    }

    #[test]
    fn a_client_outside_asks_what_is_there_for_it() {
        let outside = [
            "198.51.100.9:80 an external IP of it",
            "198.51.100.41:80 a load balancer address of it",
            "192.168.77.11:30086 a node port of it",
        ];
        assert_eq!(asked(&balanced(), "80/TCP", "203.0.113.10", true), outside);
        assert_eq!(
            asked(&balanced(), "30086", "203.0.113.10", true),
            ["192.168.77.11:30086 a node port of it"]
        );
        assert!(asked(&balanced(), "80", "2001:db8::1", true).is_empty());
    }

    #[test]
    fn a_client_inside_asks_the_cluster_ip_or_the_node_port_that_it_names() {
        assert_eq!(
            asked(&balanced(), "80", "10.244.1.10", false),
            ["10.96.0.9:80 its cluster IP"]
        );
        assert_eq!(
            asked(&balanced(), "30086", "10.244.1.10", false),
            ["192.168.77.11:30086 a node port of it"]
        );
    }

    #[test]
    fn an_address_that_another_object_holds_is_said_to_be_so() {
        let asked = Asked {
            at: "10.96.0.80:80".parse().unwrap(),
            service: Some(Name::new("shop", "web")),
            kind: None,
        };
        let port: Port = "80/TCP".parse().unwrap();
        let of = |name| ObjectRef::service(&Name::new("shop", name));
        assert_eq!(asked.conflict(Some(&of("web")), port), None);
        assert_eq!(asked.conflict(None, port), None);
        let said = asked.conflict(Some(&of("dup")), port).unwrap();
        assert!(
            said.starts_with("10.96.0.80:80/TCP is held by Service shop/dup, and that is not what was asked"),
            "{said}"
        );
    }

    #[test]
    fn what_is_there_for_nobody_outside_is_said_to_be_so() {
        let object = samples::service("web", &json!({"clusterIP": "10.96.0.8", "ports": [{"port": 80}]}));
        let plain = samples::known(&samples::index(&[object]), "web");
        assert_eq!(
            asked(&plain, "80", "203.0.113.10", true),
            ["10.96.0.8:80 its cluster IP: it has no address for clients outside"]
        );
    }

    #[test]
    fn who_asks_for_a_port_that_it_lacks_is_told_those_that_it_has() {
        let client = Client {
            addr: "10.244.1.10".parse().unwrap(),
            is_outside: false,
            node_ports_at: &[],
        };
        let error = of_service(&balanced(), "81/UDP".parse().unwrap(), client).unwrap_err();
        assert_eq!(
            error.to_string(),
            "Service shop/etplocal has no port 81/UDP: it has 80/TCP (node port 30086)"
        );
    }
}

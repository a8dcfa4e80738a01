//! The services under measurement: as many as asked for, one of which the client calls. The same fleet is written as
//! manifests for the agent, as an nftables ruleset, and as iptables rules.

use std::net::Ipv4Addr;

/// Every service's port.
pub const SERVICE_PORT: u16 = 80;
/// Where pods are; what comes from elsewhere is masqueraded by kube-proxy's rules.
pub const POD_RANGE: &str = "10.244.0.0/16";
/// Where services' addresses are.
pub const SERVICE_RANGE: &str = "10.96.0.0/12";

/// A number of services.
#[derive(Debug, Clone)]
pub struct Fleet {
    size: u32,
    /// The server that the called service's only endpoint is.
    server: (Ipv4Addr, u16),
}

/// One service of a fleet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    pub name: String,
    pub address: Ipv4Addr,
    pub endpoints: Vec<(Ipv4Addr, u16)>,
}

impl Fleet {
    pub fn new(size: u32, server: (Ipv4Addr, u16)) -> Self {
        Self {
            size: size.max(1),
            server,
        }
    }

    /// The address that the client calls: the service in the middle, the average place where order matters.
    pub fn called(&self) -> Ipv4Addr {
        address(self.size / 2)
    }

    /// All services. Those that nobody calls have two endpoints each, on nodes that don't exist.
    pub fn services(&self) -> impl Iterator<Item = Service> + '_ {
        (0..self.size).map(|index| Service {
            name: format!("svc-{index}"),
            address: address(index),
            endpoints: if index == self.size / 2 {
                vec![self.server]
            } else {
                [1, 2].map(|each| (elsewhere(index * 2 + each), 8080)).to_vec()
            },
        })
    }
}

/// 10.96.1.0 and on, clear of the addresses that clusters give to DNS and the API.
fn address(index: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(10, 96, 1, 0).to_bits() + index)
}

/// 10.244.128.0 and on: pods of other nodes.
fn elsewhere(index: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(10, 244, 128, 0).to_bits() + index % 0x7000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_the_called_service_leads_to_the_server() {
        let server = (Ipv4Addr::new(10, 244, 1, 3), 7000);
        for size in [1, 2, 1000] {
            let fleet = Fleet::new(size, server);
            let led: Vec<_> = fleet
                .services()
                .filter(|service| service.endpoints.contains(&server))
                .collect();
            assert_eq!(led.len(), 1);
            assert_eq!(led[0].address, fleet.called());
            assert_eq!(fleet.services().count(), size as usize);
        }
    }
}

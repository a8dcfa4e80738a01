//! What the agent decides about this machine: which addresses are its own, at which node ports answer, and where health
//! checks are served.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::{Duration, Instant},
};

use dataplane_common::device::own_flags;

use super::Agent;
use crate::{config::NodePortAddresses, host::HostState, sync::HostTables};

/// Between attempts to get the ports of health checks that somebody else has.
const LISTEN_AGAIN: Duration = Duration::from_secs(1);

impl Agent {
    /// What the tables should say of this machine.
    pub(super) fn host_tables(&self, host: &HostState) -> HostTables {
        let own = host
            .own_addresses
            .iter()
            // The node's own address may be an external address too.
            .filter(|(addr, _)| self.is_internal_ip(**addr) || !self.compiler.is_service_address(**addr));
        HostTables {
            own_addresses: own
                .map(|(addr, _)| {
                    let flags = if self.has_node_ports(*addr) {
                        own_flags::NODE_PORT
                    } else if self.localhost_node_ports && *addr == Ipv4Addr::LOCALHOST {
                        own_flags::HOST_NODE_PORT
                    } else {
                        0
                    };
                    (*addr, flags | own_flags::OWN)
                })
                .collect(),
            devices: host
                .devices
                .iter()
                .map(|(ifindex, device)| (*ifindex, device.entry))
                .collect(),
            pod_interfaces: host.pod_interfaces.clone(),
        }
    }

    fn is_internal_ip(&self, addr: IpAddr) -> bool {
        let node = self.index.node();
        node.is_some_and(|node| node.internal_ips.contains(&addr))
    }

    /// Whether an address is the node's first of its family.
    fn is_primary(&self, addr: IpAddr) -> bool {
        let mut ips = self.index.node().into_iter().flat_map(|node| &node.internal_ips);
        ips.find(|ip| ip.is_ipv4() == addr.is_ipv4()) == Some(&addr)
    }

    /// Whether node ports answer at an own address.
    fn has_node_ports(&self, addr: IpAddr) -> bool {
        self.node_port_addresses.answers_at(addr, self.is_primary(addr))
    }

    /// Serves the health checks of load balancers.
    pub(super) fn listen(&mut self, tables: &HostTables) {
        let addrs: BTreeSet<IpAddr> = if self.node_port_addresses == NodePortAddresses::All {
            [IpAddr::V6(Ipv6Addr::UNSPECIFIED)].into()
        } else {
            let node_ports = |flags: u32| flags & own_flags::NODE_PORT != 0;
            let own = tables.own_addresses.iter();
            own.filter(|(_, flags)| node_ports(**flags))
                .map(|(addr, _)| *addr)
                .collect()
        };
        self.health_checks.set(self.compiler.health_checks(), &addrs);
        let is_waiting = !self.health_checks.refused().is_empty();
        self.listen_at = is_waiting.then(|| Instant::now() + LISTEN_AGAIN);
    }

    pub(super) fn listen_again(&mut self) {
        if let Some(host) = &self.host {
            let tables = self.host_tables(host);
            self.listen(&tables);
        }
        self.publish_progress();
    }
}

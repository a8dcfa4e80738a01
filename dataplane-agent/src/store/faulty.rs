//! Tables that refuse some writes, for tests of what happens then.

use std::net::IpAddr;

use ipnet::IpNet;

use dataplane_common::{
    backend::Backend,
    device::Device,
    policy::{Counted, Hits, PeerRulesKey, PodPolicy, PolicyRule, PolicySet, PortRulesKey, RuleBits},
    service::{Frontend, PortSet, Service},
    unbound::PodRange,
};

use super::{
    FrontendKey, Limits, Store, StoreError,
    memory::Memory,
    policy::{BoundRows, PolicyRows, PolicyStore, SourcePlace},
};

/// Memory in which a write fails when `refuse` says so, by its number and the tables as they are before it.
#[derive(Debug)]
pub struct Faulty<F> {
    pub memory: Memory,
    pub refuse: F,
    attempts: usize,
}

impl<F: FnMut(usize, &Memory) -> bool> Faulty<F> {
    pub fn new(memory: Memory, refuse: F) -> Self {
        Self {
            memory,
            refuse,
            attempts: 0,
        }
    }

    fn attempt(&mut self, verb: &'static str, table: &'static str) -> Result<&mut Memory, StoreError> {
        self.attempts += 1;
        if (self.refuse)(self.attempts, &self.memory) {
            return Err(StoreError::Io {
                verb,
                table,
                source: std::io::Error::from(std::io::ErrorKind::OutOfMemory),
            });
        }
        Ok(&mut self.memory)
    }
}

impl<F: FnMut(usize, &Memory) -> bool> Store for Faulty<F> {
    fn limits(&self) -> Limits {
        self.memory.limits()
    }
    fn put_frontend(&mut self, key: FrontendKey, value: Frontend) -> Result<(), StoreError> {
        self.attempt("write", "FRONTENDS")?.put_frontend(key, value)
    }
    fn delete_frontend(&mut self, key: FrontendKey) -> Result<(), StoreError> {
        self.attempt("delete", "FRONTENDS")?.delete_frontend(key)
    }
    fn write_service(&mut self, index: u32, service: &Service) -> Result<(), StoreError> {
        self.attempt("write", "SERVICES")?.write_service(index, service)
    }
    fn write_backend(&mut self, id: u32, backend: &Backend) -> Result<(), StoreError> {
        self.attempt("write", "BACKENDS")?.write_backend(id, backend)
    }
    fn write_maglev(&mut self, offset: u32, words: &[u64]) -> Result<(), StoreError> {
        self.attempt("write", "MAGLEV")?.write_maglev(offset, words)
    }
    fn put_range(&mut self, service: u32, range: IpNet) -> Result<(), StoreError> {
        self.attempt("write", "RANGES")?.put_range(service, range)
    }
    fn delete_range(&mut self, service: u32, range: IpNet) -> Result<(), StoreError> {
        self.attempt("delete", "RANGES")?.delete_range(service, range)
    }
    fn write_ports(&mut self, index: u32, ports: PortSet) -> Result<(), StoreError> {
        self.attempt("write", "PORTS")?.write_ports(index, ports)
    }
    fn put_own_address(&mut self, addr: IpAddr, flags: u32) -> Result<(), StoreError> {
        self.attempt("write", "OWN_ADDRS")?.put_own_address(addr, flags)
    }
    fn delete_own_address(&mut self, addr: IpAddr) -> Result<(), StoreError> {
        self.attempt("delete", "OWN_ADDRS")?.delete_own_address(addr)
    }
    fn put_device(&mut self, ifindex: u32, device: &Device) -> Result<(), StoreError> {
        self.attempt("write", "DEVICES")?.put_device(ifindex, device)
    }
    fn delete_device(&mut self, ifindex: u32) -> Result<(), StoreError> {
        self.attempt("delete", "DEVICES")?.delete_device(ifindex)
    }
    fn grace_period(&mut self) -> Result<(), StoreError> {
        self.attempt("wait for", "a grace period")?.grace_period()
    }
    fn frontends(&self) -> Result<Vec<(FrontendKey, Frontend)>, StoreError> {
        Store::frontends(&self.memory)
    }
    fn read_service(&self, index: u32) -> Result<Service, StoreError> {
        self.memory.read_service(index)
    }
    fn read_backend(&self, id: u32) -> Result<Backend, StoreError> {
        self.memory.read_backend(id)
    }
    fn read_maglev(&self, offset: u32, words: &mut [u64]) -> Result<(), StoreError> {
        self.memory.read_maglev(offset, words)
    }
    fn read_ports(&self, index: u32) -> Result<PortSet, StoreError> {
        self.memory.read_ports(index)
    }
    fn ranges(&self) -> Result<Vec<(u32, IpNet)>, StoreError> {
        Store::ranges(&self.memory)
    }
    fn own_addresses(&self) -> Result<Vec<(IpAddr, u32)>, StoreError> {
        Store::own_addresses(&self.memory)
    }
    fn devices(&self) -> Result<Vec<(u32, Device)>, StoreError> {
        Store::devices(&self.memory)
    }
}

impl<F: FnMut(usize, &Memory) -> bool> PolicyStore for Faulty<F> {
    fn put_peer(&mut self, addr: IpAddr, class: u32) -> Result<(), StoreError> {
        self.attempt("write", "PEERS")?.put_peer(addr, class)
    }
    fn delete_peer(&mut self, addr: IpAddr) -> Result<(), StoreError> {
        self.attempt("delete", "PEERS")?.delete_peer(addr)
    }
    fn put_cidr(&mut self, range: IpNet, class: u32) -> Result<(), StoreError> {
        self.attempt("write", "CIDRS")?.put_cidr(range, class)
    }
    fn delete_cidr(&mut self, range: IpNet) -> Result<(), StoreError> {
        self.attempt("delete", "CIDRS")?.delete_cidr(range)
    }
    fn write_set(&mut self, id: u32, set: &PolicySet) -> Result<(), StoreError> {
        self.attempt("write", "POLICY_SETS")?.write_set(id, set)
    }
    fn put_peer_rules(&mut self, key: PeerRulesKey, bits: u32) -> Result<(), StoreError> {
        self.attempt("write", "PEER_RULES")?.put_peer_rules(key, bits)
    }
    fn delete_peer_rules(&mut self, key: PeerRulesKey) -> Result<(), StoreError> {
        self.attempt("delete", "PEER_RULES")?.delete_peer_rules(key)
    }
    fn put_port_rules(&mut self, length: u32, key: PortRulesKey, bits: u32) -> Result<(), StoreError> {
        self.attempt("write", "PORT_RULES")?
            .put_port_rules(length, key, bits)
    }
    fn delete_port_rules(&mut self, length: u32, key: PortRulesKey) -> Result<(), StoreError> {
        self.attempt("delete", "PORT_RULES")?
            .delete_port_rules(length, key)
    }
    fn write_bits(&mut self, id: u32, bits: &RuleBits) -> Result<(), StoreError> {
        self.attempt("write", "RULE_BITS")?.write_bits(id, bits)
    }
    fn write_rule(&mut self, index: u32, rule: &PolicyRule) -> Result<(), StoreError> {
        self.attempt("write", "RULES")?.write_rule(index, rule)
    }
    fn put_pod_policy(&mut self, ifindex: u32, policy: &PodPolicy) -> Result<(), StoreError> {
        self.attempt("write", "POD_POLICY")?
            .put_pod_policy(ifindex, policy)
    }
    fn delete_pod_policy(&mut self, ifindex: u32) -> Result<(), StoreError> {
        self.attempt("delete", "POD_POLICY")?.delete_pod_policy(ifindex)
    }
    fn write_policy_revision(&mut self, revision: u32) -> Result<(), StoreError> {
        self.attempt("write", "POLICY_REVISION")?
            .write_policy_revision(revision)
    }
    fn hits(&self, of: Counted) -> Result<Hits, StoreError> {
        self.memory.hits(of)
    }
    fn clear_hits(&mut self, of: Counted) -> Result<(), StoreError> {
        self.attempt("clear", "RULE_HITS")?.clear_hits(of)
    }

    fn put_bound(&mut self, addr: IpAddr, ifindex: u32) -> Result<(), StoreError> {
        self.attempt("write", "BOUND")?.put_bound(addr, ifindex)
    }
    fn delete_bound(&mut self, addr: IpAddr) -> Result<(), StoreError> {
        self.attempt("delete", "BOUND")?.delete_bound(addr)
    }
    fn write_source(&mut self, place: SourcePlace, own: Option<(IpAddr, u32)>) -> Result<(), StoreError> {
        self.attempt("write", "SOURCES")?.write_source(place, own)
    }
    fn put_source_checked(&mut self, ifindex: u32) -> Result<(), StoreError> {
        self.attempt("write", "SOURCE_CHECKED")?
            .put_source_checked(ifindex)
    }
    fn delete_source_checked(&mut self, ifindex: u32) -> Result<(), StoreError> {
        self.attempt("delete", "SOURCE_CHECKED")?
            .delete_source_checked(ifindex)
    }
    fn write_pod_range(&mut self, index: u32, range: &PodRange) -> Result<(), StoreError> {
        self.attempt("write", "POD_RANGES")?.write_pod_range(index, range)
    }
    fn bound_rows(&self) -> Result<BoundRows, StoreError> {
        self.memory.bound_rows()
    }
    fn policy_rows(&self) -> Result<PolicyRows, StoreError> {
        self.memory.policy_rows()
    }
}

//! Tables that refuse some writes, for tests of what happens then.

use std::net::IpAddr;

use ipnet::IpNet;

use dataplane_common::{
    backend::Backend,
    device::Device,
    service::{Frontend, PortSet, Service},
};

use super::{FrontendKey, Limits, Store, StoreError, memory::Memory};

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

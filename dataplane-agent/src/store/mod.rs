//! The tables as the agent writes them: one small trait, implemented over BPF maps (`bpf`), in memory
//! (`memory`) and with injected faults (tests).
//!
//! Writes are idempotent and deleting what is missing succeeds. Nothing here decides what is written; that is
//! `compile` and `sync`.

pub mod bpf;
pub mod enforced;
#[cfg(test)]
pub mod faulty;
pub mod flags;
pub mod flows;
pub mod left;
pub mod memory;
pub mod policy;
pub mod served;
pub mod sockets;
pub mod traffic;

use std::net::IpAddr;

use ipnet::IpNet;

use dataplane_common::{
    backend::Backend,
    device::Device,
    service::{Frontend, FrontendKey4, FrontendKey6, PortSet, Service},
};

use self::policy::{PolicyLimits, PolicyStore};

/// Key of `FRONTENDS_V4` or `FRONTENDS_V6`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FrontendKey {
    V4(FrontendKey4),
    V6(FrontendKey6),
}

/// How much fits, as set when the maps were made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Entries of each of `FRONTENDS_V4` and `FRONTENDS_V6`.
    pub frontends: u32,
    pub services: u32,
    pub backends: u32,
    /// 64-bit elements of `MAGLEV`.
    pub maglev: u32,
    /// Entries of each of `RANGES_V4` and `RANGES_V6`.
    pub source_ranges: u32,
    pub policy: PolicyLimits,
}

/// A write or read that the kernel refused.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("table {table} is full ({})", flags::Size { table, limit: *limit })]
    Full { table: &'static str, limit: u32 },
    #[error("failed to open table {table}")]
    Open {
        table: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("failed to {verb} an entry of {table}")]
    Io {
        verb: &'static str,
        table: &'static str,
        #[source]
        source: std::io::Error,
    },
}

/// The datapath's tables.
pub trait Store: PolicyStore {
    fn limits(&self) -> Limits;

    fn put_frontend(&mut self, key: FrontendKey, value: Frontend) -> Result<(), StoreError>;
    fn delete_frontend(&mut self, key: FrontendKey) -> Result<(), StoreError>;
    /// Body first, then the head with one 64-bit release store.
    fn write_service(&mut self, index: u32, service: &Service) -> Result<(), StoreError>;
    /// Body first, then the head with one 64-bit release store.
    fn write_backend(&mut self, id: u32, backend: &Backend) -> Result<(), StoreError>;
    /// Writes elements `offset..offset + words.len()` of `MAGLEV`.
    fn write_maglev(&mut self, offset: u32, words: &[u64]) -> Result<(), StoreError>;
    /// `service`: its index.
    fn put_range(&mut self, service: u32, range: IpNet) -> Result<(), StoreError>;
    fn delete_range(&mut self, service: u32, range: IpNet) -> Result<(), StoreError>;
    fn write_ports(&mut self, index: u32, ports: PortSet) -> Result<(), StoreError>;
    /// `flags`: `dataplane_common::device::own_flags`.
    fn put_own_address(&mut self, addr: IpAddr, flags: u32) -> Result<(), StoreError>;
    fn delete_own_address(&mut self, addr: IpAddr) -> Result<(), StoreError>;
    fn put_device(&mut self, ifindex: u32, device: &Device) -> Result<(), StoreError>;
    fn delete_device(&mut self, ifindex: u32) -> Result<(), StoreError>;

    /// Returns when no program still runs that could have read anything before this call: some 10 ms. Batch what waits
    /// for it.
    fn grace_period(&mut self) -> Result<(), StoreError>;

    // What the kernel holds: read at start, to restore ids, and by the periodic comparison.
    fn frontends(&self) -> Result<Vec<(FrontendKey, Frontend)>, StoreError>;
    fn read_service(&self, index: u32) -> Result<Service, StoreError>;
    fn read_backend(&self, id: u32) -> Result<Backend, StoreError>;
    fn read_maglev(&self, offset: u32, words: &mut [u64]) -> Result<(), StoreError>;
    fn read_ports(&self, index: u32) -> Result<PortSet, StoreError>;
    fn ranges(&self) -> Result<Vec<(u32, IpNet)>, StoreError>;
    fn own_addresses(&self) -> Result<Vec<(IpAddr, u32)>, StoreError>;
    fn devices(&self) -> Result<Vec<(u32, Device)>, StoreError>;
}

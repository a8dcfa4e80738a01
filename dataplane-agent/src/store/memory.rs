//! The tables in memory: for tests, and for looking at what would be programmed.

mod policy;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt::Write,
    net::IpAddr,
};

use ipnet::IpNet;

use dataplane_common::{
    backend::{Backend, backend_flags, backend_state},
    device::Device,
    service::{Frontend, PORT_SETS, PortSet, Scope, Service, TABLE_SIZES, port_set_index, service_flags},
};

pub use self::policy::PolicyMemory;
use super::{FrontendKey, Limits, Store, StoreError};

/// Tables with the limits of the real ones.
#[derive(Clone, Debug)]
pub struct Memory {
    limits: Limits,
    pub frontends: BTreeMap<FrontendKey, Frontend>,
    pub services: HashMap<u32, Service>,
    pub backends: HashMap<u32, Backend>,
    pub maglev: Vec<u64>,
    pub ranges: BTreeSet<(u32, IpNet)>,
    pub ports: Vec<PortSet>,
    pub own_addresses: BTreeMap<IpAddr, u32>,
    pub devices: BTreeMap<u32, Device>,
    pub policy: PolicyMemory,
    /// Writes and deletions so far.
    pub writes: usize,
    pub grace_periods: usize,
}

impl Memory {
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            frontends: BTreeMap::new(),
            services: HashMap::new(),
            backends: HashMap::new(),
            maglev: vec![0; limits.maglev as usize],
            ranges: BTreeSet::new(),
            ports: vec![PortSet::default(); PORT_SETS as usize],
            own_addresses: BTreeMap::new(),
            devices: BTreeMap::new(),
            policy: PolicyMemory::new(limits.policy),
            writes: 0,
            grace_periods: 0,
        }
    }

    /// One line an entry that a packet could meet, sorted; numbers that only name things are left out.
    pub fn dump(&self) -> String {
        let mut lines: Vec<String> = self.frontend_lines().collect();
        for (id, backend) in &self.backends {
            if backend.head.state == backend_state::ACTIVE || backend.head.state == backend_state::SERVING {
                lines.push(self.backend(*id));
            }
        }
        for (addr, flags) in &self.own_addresses {
            lines.push(format!("own {addr} flags={flags}"));
        }
        for (index, set) in self.ports.iter().enumerate() {
            for bit in 0..64 {
                if set.any >> bit & 1 == 1 {
                    let proto = if index >= 1024 { "UDP" } else { "TCP" };
                    let wildcard = if set.wildcard >> bit & 1 == 1 {
                        " wildcard"
                    } else {
                        ""
                    };
                    lines.push(format!("port {}/{proto}{wildcard}", (index % 1024) * 64 + bit));
                }
            }
        }
        lines.sort();
        lines.iter().fold(String::new(), |mut text, line| {
            text.push_str(line);
            text.push('\n');
            text
        })
    }

    /// The lines of [`Memory::dump`] that are about frontends and where they lead.
    pub fn frontend_lines(&self) -> impl Iterator<Item = String> {
        let line = |(key, value): (&FrontendKey, &Frontend)| {
            format!("frontend {} -> {}", frontend(key), self.service(value.service))
        };
        self.frontends.iter().map(line)
    }

    /// Whether the bits of `PORTS` let packets to every frontend through.
    pub fn has_port_of_every_frontend(&self) -> bool {
        self.frontends.keys().all(|key| {
            let (is_wildcard, port_be, proto) = match key {
                FrontendKey::V4(key) => (key.addr_be == 0, key.port_be, key.proto),
                FrontendKey::V6(key) => (key.addr_be == [0; 4], key.port_be, key.proto),
            };
            let port = u16::from_be(port_be);
            let set = self.ports[port_set_index(proto, port) as usize];
            let bit = 1 << (port & 63);
            set.any & bit != 0 && (!is_wildcard || set.wildcard & bit != 0)
        })
    }

    fn service(&self, index: u32) -> String {
        let Some(Service { head, .. }) = self.services.get(&index) else {
            return "no service".to_owned();
        };
        let mut text = String::new();
        if head.flags & service_flags::DELETED != 0 {
            text.push_str("deleted ");
        }
        if head.flags & service_flags::DROP_WHEN_EMPTY != 0 {
            text.push_str("drop ");
        }
        if head.flags & service_flags::AFFINITY != 0 {
            // Writing to a string cannot fail.
            let service = self.services[&index];
            let _ok = if head.flags & service_flags::AFFINITY_SHARED == 0 {
                write!(text, "affinity={} ", service.affinity)
            } else {
                let first = self.services.get(&service.affinity).copied().unwrap_or_default();
                let (addr, port) = (first.addr_be[0].to_ne_bytes(), u16::from_be(first.port_be));
                let known = first.head.flags & (service_flags::AFFINITY | service_flags::AFFINITY_SHARED);
                write!(text, "affinity={} of {addr:?}:{port} {known} ", first.affinity)
            };
        }
        if head.flags & service_flags::RANGES != 0 {
            text.push_str("from");
            for (_, range) in self.ranges.iter().filter(|(of, _)| *of == index) {
                let _ok = write!(text, " {range}");
            }
            text.push_str(": ");
        }
        let shares = self.shares(head.slots_offset, head.size_class);
        if shares.is_empty() {
            text.push_str("none");
        }
        for (backend, slots) in shares {
            // Writing to a string cannot fail.
            let _ok = write!(text, "[{backend} x{slots}]");
        }
        text
    }

    /// Backends behind a table by way of its slots, as a packet finds them, and how many slots each has.
    fn shares(&self, offset: u32, class: u8) -> BTreeMap<String, u32> {
        let mut shares = BTreeMap::new();
        for slot in 0..TABLE_SIZES[usize::from(class)] {
            let number = (self.maglev[(offset + slot / 4) as usize] >> (slot % 4 * 16)) as u32 & 0xffff;
            let id = (self.maglev[(offset - 2 - number / 2) as usize] >> (number % 2 * 32)) as u32;
            *shares.entry(self.backend(id)).or_default() += 1;
        }
        shares
    }

    fn backend(&self, id: u32) -> String {
        let Some(backend) = self.backends.get(&id) else {
            return format!("no backend {id}");
        };
        let Backend { head, addr_be, .. } = backend;
        let addr: IpAddr = if head.flags & backend_flags::IPV6 != 0 {
            bytemuck::cast::<[u32; 4], [u8; 16]>(*addr_be).into()
        } else {
            addr_be[0].to_ne_bytes().into()
        };
        let proto = if head.flags & backend_flags::UDP != 0 {
            "UDP"
        } else {
            "TCP"
        };
        let state = match head.state {
            backend_state::ACTIVE => "active",
            backend_state::SERVING => "serving",
            backend_state::DRAINING => "draining",
            _ => "gone",
        };
        let mut text = format!("backend {addr} {}/{proto} {state}", u16::from_be(head.port_be));
        for (flag, name) in [
            (backend_flags::HOST, " host"),
            (backend_flags::LOCAL, " local"),
            (backend_flags::FAST_PATH, " fast-path"),
        ] {
            if head.flags & flag != 0 {
                text.push_str(name);
            }
        }
        text
    }
}

/// A frontend for people.
fn frontend(key: &FrontendKey) -> String {
    let (addr, port_be, proto, scope): (IpAddr, _, _, _) = match key {
        FrontendKey::V4(key) => (
            key.addr_be.to_ne_bytes().into(),
            key.port_be,
            key.proto,
            key.scope,
        ),
        FrontendKey::V6(key) => {
            let octets: [u8; 16] = bytemuck::cast(key.addr_be);
            (octets.into(), key.port_be, key.proto, key.scope)
        }
    };
    let scope = if scope == Scope::Internal as u8 {
        "internal"
    } else {
        "external"
    };
    let proto = if proto == 6 { "TCP" } else { "UDP" };
    format!("{addr} {}/{proto} {scope}", u16::from_be(port_be))
}

impl Store for Memory {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn put_frontend(&mut self, key: FrontendKey, value: Frontend) -> Result<(), StoreError> {
        self.writes += 1;
        let is_v4 = matches!(key, FrontendKey::V4(_));
        let used = self
            .frontends
            .keys()
            .filter(|key| matches!(key, FrontendKey::V4(_)) == is_v4);
        if !self.frontends.contains_key(&key) && used.count() >= self.limits.frontends as usize {
            return Err(StoreError::Full {
                table: if is_v4 { "FRONTENDS_V4" } else { "FRONTENDS_V6" },
                limit: self.limits.frontends,
            });
        }
        self.frontends.insert(key, value);
        Ok(())
    }

    fn delete_frontend(&mut self, key: FrontendKey) -> Result<(), StoreError> {
        self.writes += 1;
        self.frontends.remove(&key);
        Ok(())
    }

    fn write_service(&mut self, index: u32, service: &Service) -> Result<(), StoreError> {
        self.writes += 1;
        self.services.insert(index, *service);
        Ok(())
    }

    fn write_backend(&mut self, id: u32, backend: &Backend) -> Result<(), StoreError> {
        self.writes += 1;
        self.backends.insert(id, *backend);
        Ok(())
    }

    fn write_maglev(&mut self, offset: u32, words: &[u64]) -> Result<(), StoreError> {
        self.writes += 1;
        self.maglev[offset as usize..offset as usize + words.len()].copy_from_slice(words);
        Ok(())
    }

    fn put_range(&mut self, service: u32, range: IpNet) -> Result<(), StoreError> {
        self.writes += 1;
        let is_v4 = matches!(range, IpNet::V4(_));
        let of_family = |(_, range): &&(u32, IpNet)| matches!(range, IpNet::V4(_)) == is_v4;
        let used = self.ranges.iter().filter(of_family).count();
        if !self.ranges.contains(&(service, range)) && used >= self.limits.source_ranges as usize {
            return Err(StoreError::Full {
                table: if is_v4 { "RANGES_V4" } else { "RANGES_V6" },
                limit: self.limits.source_ranges,
            });
        }
        self.ranges.insert((service, range));
        Ok(())
    }

    fn delete_range(&mut self, service: u32, range: IpNet) -> Result<(), StoreError> {
        self.writes += 1;
        self.ranges.remove(&(service, range));
        Ok(())
    }

    fn write_ports(&mut self, index: u32, ports: PortSet) -> Result<(), StoreError> {
        self.writes += 1;
        self.ports[index as usize] = ports;
        Ok(())
    }

    fn put_own_address(&mut self, addr: IpAddr, flags: u32) -> Result<(), StoreError> {
        self.writes += 1;
        self.own_addresses.insert(addr, flags);
        Ok(())
    }

    fn delete_own_address(&mut self, addr: IpAddr) -> Result<(), StoreError> {
        self.writes += 1;
        self.own_addresses.remove(&addr);
        Ok(())
    }

    fn put_device(&mut self, ifindex: u32, device: &Device) -> Result<(), StoreError> {
        self.writes += 1;
        self.devices.insert(ifindex, *device);
        Ok(())
    }

    fn delete_device(&mut self, ifindex: u32) -> Result<(), StoreError> {
        self.writes += 1;
        self.devices.remove(&ifindex);
        Ok(())
    }

    fn grace_period(&mut self) -> Result<(), StoreError> {
        self.grace_periods += 1;
        Ok(())
    }

    fn frontends(&self) -> Result<Vec<(FrontendKey, Frontend)>, StoreError> {
        Ok(self.frontends.iter().map(|(key, value)| (*key, *value)).collect())
    }

    fn read_service(&self, index: u32) -> Result<Service, StoreError> {
        Ok(self.services.get(&index).copied().unwrap_or_default())
    }

    fn read_backend(&self, id: u32) -> Result<Backend, StoreError> {
        Ok(self.backends.get(&id).copied().unwrap_or_default())
    }

    fn read_maglev(&self, offset: u32, words: &mut [u64]) -> Result<(), StoreError> {
        words.copy_from_slice(&self.maglev[offset as usize..offset as usize + words.len()]);
        Ok(())
    }

    fn read_ports(&self, index: u32) -> Result<PortSet, StoreError> {
        Ok(self.ports[index as usize])
    }

    fn ranges(&self) -> Result<Vec<(u32, IpNet)>, StoreError> {
        Ok(self.ranges.iter().copied().collect())
    }

    fn own_addresses(&self) -> Result<Vec<(IpAddr, u32)>, StoreError> {
        Ok(self
            .own_addresses
            .iter()
            .map(|(addr, flags)| (*addr, *flags))
            .collect())
    }

    fn devices(&self) -> Result<Vec<(u32, Device)>, StoreError> {
        Ok(self
            .devices
            .iter()
            .map(|(ifindex, device)| (*ifindex, *device))
            .collect())
    }
}

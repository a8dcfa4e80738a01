//! [`Store`] over the pinned BPF maps. Arrays are written through their mapping, hashes by system call.

mod policy;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsFd,
    sync::atomic::{AtomicU64, Ordering},
};

use bytemuck::{Pod, Zeroable};
use dataplane_common::{
    backend::Backend,
    device::Device,
    policy::PortRulesKey,
    service::{
        Frontend, FrontendKey4, FrontendKey6, PORT_SETS, PortSet, RANGE_SERVICE_BITS, Service, SourceRange4,
        SourceRange6,
    },
    traffic::Traffic,
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use self::policy::PolicyMaps;
use super::{FrontendKey, Limits, Store, StoreError};
use crate::bpf::{
    map_names as names,
    pins::Pins,
    sys::{self, MapFd, MappedArray},
};

/// A hash or small array that is written by system call.
#[derive(Debug)]
struct Table<K, V> {
    name: &'static str,
    map: MapFd<K, V>,
}

/// A key of a longest prefix match.
#[repr(C)]
#[derive(Clone, Copy, Debug, Zeroable)]
struct Prefix<T> {
    /// Bits of `data` that count.
    length: u32,
    data: T,
}

// SAFETY: both are words, one behind the other without padding.
unsafe impl Pod for Prefix<SourceRange4> {}
// SAFETY: as above.
unsafe impl Pod for Prefix<SourceRange6> {}
// SAFETY: as above.
unsafe impl Pod for Prefix<u32> {}
// SAFETY: as above.
unsafe impl Pod for Prefix<[u32; 4]> {}
// SAFETY: as above.
unsafe impl Pod for Prefix<PortRulesKey> {}

/// 64-bit words of the largest element.
const WORDS_AT_MOST: usize = 8;

/// An array whose elements are `T`, written word by word. The first word of an element is its head.
#[derive(Debug)]
struct Array<T> {
    name: &'static str,
    mapping: MappedArray,
    element: std::marker::PhantomData<T>,
}

/// The maps, opened from their pins.
#[derive(Debug)]
pub struct BpfStore {
    limits: Limits,
    frontends4: Table<FrontendKey4, Frontend>,
    frontends6: Table<FrontendKey6, Frontend>,
    services: Array<Service>,
    backends: Array<Backend>,
    maglev: Array<u64>,
    service_traffic: Array<Traffic>,
    backend_traffic: Array<Traffic>,
    ranges4: Table<Prefix<SourceRange4>, u32>,
    ranges6: Table<Prefix<SourceRange6>, u32>,
    ports: Table<u32, PortSet>,
    own4: Table<u32, u32>,
    own6: Table<[u32; 4], u32>,
    devices: Table<u32, Device>,
    policy: PolicyMaps,
}

impl BpfStore {
    /// Opens the maps that the loader has made.
    pub fn open(pins: &Pins) -> Result<Self, StoreError> {
        let frontends4 = Table::open(pins, names::FRONTENDS_V4)?;
        let services = Array::open(pins, names::SERVICES)?;
        let backends = Array::open(pins, names::BACKENDS)?;
        let maglev = Array::open(pins, names::MAGLEV)?;
        let ranges4 = Table::open(pins, names::RANGES_V4)?;
        let policy = PolicyMaps::open(pins)?;
        let limits = Limits {
            frontends: frontends4.map.info().max_entries,
            services: services.len(),
            backends: backends.len(),
            maglev: maglev.len(),
            source_ranges: ranges4.map.info().max_entries,
            policy: policy.limits(),
        };
        Ok(Self {
            limits,
            frontends4,
            frontends6: Table::open(pins, names::FRONTENDS_V6)?,
            services,
            backends,
            maglev,
            service_traffic: Array::open(pins, names::SERVICE_TRAFFIC)?,
            backend_traffic: Array::open(pins, names::BACKEND_TRAFFIC)?,
            ranges4,
            ranges6: Table::open(pins, names::RANGES_V6)?,
            ports: Table::open(pins, names::PORTS)?,
            own4: Table::open(pins, names::OWN_ADDRS_V4)?,
            own6: Table::open(pins, names::OWN_ADDRS_V6)?,
            devices: Table::open(pins, names::DEVICES)?,
            policy,
        })
    }
}

impl Store for BpfStore {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn put_frontend(&mut self, key: FrontendKey, value: Frontend) -> Result<(), StoreError> {
        match key {
            FrontendKey::V4(key) => self.frontends4.put(&key, &value),
            FrontendKey::V6(key) => self.frontends6.put(&key, &value),
        }
    }

    fn delete_frontend(&mut self, key: FrontendKey) -> Result<(), StoreError> {
        match key {
            FrontendKey::V4(key) => self.frontends4.delete(&key),
            FrontendKey::V6(key) => self.frontends6.delete(&key),
        }
    }

    fn write_service(&mut self, index: u32, service: &Service) -> Result<(), StoreError> {
        // What the one before has seen is not this one's.
        if self.services.read(index)?.head.generation != service.head.generation {
            self.service_traffic.write(index, &Traffic::default())?;
        }
        self.services.write(index, service)
    }

    fn write_backend(&mut self, id: u32, backend: &Backend) -> Result<(), StoreError> {
        if self.backends.read(id)?.head.generation != backend.head.generation {
            self.backend_traffic.write(id, &Traffic::default())?;
        }
        self.backends.write(id, backend)
    }

    fn write_maglev(&mut self, offset: u32, words: &[u64]) -> Result<(), StoreError> {
        for (target, word) in self.maglev.range(offset, words.len())?.iter().zip(words) {
            target.store(*word, Ordering::Relaxed);
        }
        Ok(())
    }

    fn put_range(&mut self, service: u32, range: IpNet) -> Result<(), StoreError> {
        match range {
            IpNet::V4(range) => self.ranges4.put(&prefix4(service, range), &1),
            IpNet::V6(range) => self.ranges6.put(&prefix6(service, range), &1),
        }
    }

    fn delete_range(&mut self, service: u32, range: IpNet) -> Result<(), StoreError> {
        match range {
            IpNet::V4(range) => self.ranges4.delete(&prefix4(service, range)),
            IpNet::V6(range) => self.ranges6.delete(&prefix6(service, range)),
        }
    }

    fn write_ports(&mut self, index: u32, ports: PortSet) -> Result<(), StoreError> {
        self.ports.put(&index, &ports)
    }

    fn put_own_address(&mut self, addr: IpAddr, flags: u32) -> Result<(), StoreError> {
        match addr {
            IpAddr::V4(addr) => self.own4.put(&key4(addr), &flags),
            IpAddr::V6(addr) => self.own6.put(&key6(addr), &flags),
        }
    }

    fn delete_own_address(&mut self, addr: IpAddr) -> Result<(), StoreError> {
        match addr {
            IpAddr::V4(addr) => self.own4.delete(&key4(addr)),
            IpAddr::V6(addr) => self.own6.delete(&key6(addr)),
        }
    }

    fn put_device(&mut self, ifindex: u32, device: &Device) -> Result<(), StoreError> {
        self.devices.put(&ifindex, device)
    }

    fn delete_device(&mut self, ifindex: u32) -> Result<(), StoreError> {
        self.devices.delete(&ifindex)
    }

    fn grace_period(&mut self) -> Result<(), StoreError> {
        sys::grace_period().map_err(|source| StoreError::Io {
            verb: "wait for readers of",
            table: "MAGLEV",
            source,
        })
    }

    fn frontends(&self) -> Result<Vec<(FrontendKey, Frontend)>, StoreError> {
        let mut all = Vec::new();
        self.frontends4
            .for_each(|key, frontend| all.push((FrontendKey::V4(*key), *frontend)))?;
        self.frontends6
            .for_each(|key, frontend| all.push((FrontendKey::V6(*key), *frontend)))?;
        Ok(all)
    }

    fn read_service(&self, index: u32) -> Result<Service, StoreError> {
        self.services.read(index)
    }

    fn read_backend(&self, id: u32) -> Result<Backend, StoreError> {
        self.backends.read(id)
    }

    fn read_maglev(&self, offset: u32, words: &mut [u64]) -> Result<(), StoreError> {
        for (source, word) in self.maglev.range(offset, words.len())?.iter().zip(words) {
            *word = source.load(Ordering::Relaxed);
        }
        Ok(())
    }

    fn read_ports(&self, index: u32) -> Result<PortSet, StoreError> {
        debug_assert!(index < PORT_SETS);
        let ports = self
            .ports
            .map
            .lookup(&index)
            .map_err(|source| io_error("read", self.ports.name, source))?;
        Ok(ports.unwrap_or_default())
    }

    fn ranges(&self) -> Result<Vec<(u32, IpNet)>, StoreError> {
        let mut all = Vec::new();
        let mut add = |service, length: u32, addr: IpAddr| {
            let length = u8::try_from(length.saturating_sub(RANGE_SERVICE_BITS)).ok();
            // A longer prefix than the address cannot be in the table.
            all.extend(length.and_then(|length| Some((service, IpNet::new(addr, length).ok()?))));
        };
        self.ranges4.for_each(|Prefix { length, data }, _| {
            add(data.service, *length, addr4(data.addr_be));
        })?;
        self.ranges6.for_each(|Prefix { length, data }, _| {
            add(data.service, *length, addr6(data.addr_be));
        })?;
        Ok(all)
    }

    fn own_addresses(&self) -> Result<Vec<(IpAddr, u32)>, StoreError> {
        let mut all = Vec::new();
        self.own4.for_each(|key, flags| all.push((addr4(*key), *flags)))?;
        self.own6.for_each(|key, flags| all.push((addr6(*key), *flags)))?;
        Ok(all)
    }

    fn devices(&self) -> Result<Vec<(u32, Device)>, StoreError> {
        let mut all = Vec::new();
        self.devices
            .for_each(|ifindex, device| all.push((*ifindex, *device)))?;
        Ok(all)
    }
}

fn prefix4(service: u32, range: Ipv4Net) -> Prefix<SourceRange4> {
    Prefix {
        length: RANGE_SERVICE_BITS + u32::from(range.prefix_len()),
        data: SourceRange4 {
            service,
            addr_be: key4(range.network()),
        },
    }
}

fn prefix6(service: u32, range: Ipv6Net) -> Prefix<SourceRange6> {
    Prefix {
        length: RANGE_SERVICE_BITS + u32::from(range.prefix_len()),
        data: SourceRange6 {
            service,
            addr_be: key6(range.network()),
        },
    }
}

fn key4(addr: Ipv4Addr) -> u32 {
    u32::from_ne_bytes(addr.octets())
}

fn key6(addr: Ipv6Addr) -> [u32; 4] {
    bytemuck::cast(addr.octets())
}

fn addr4(key: u32) -> IpAddr {
    key.to_ne_bytes().into()
}

fn addr6(key: [u32; 4]) -> IpAddr {
    bytemuck::cast::<[u32; 4], [u8; 16]>(key).into()
}

fn io_error(verb: &'static str, table: &'static str, source: io::Error) -> StoreError {
    StoreError::Io { verb, table, source }
}

impl<K: Pod, V: Pod> Table<K, V> {
    fn open(pins: &Pins, name: &'static str) -> Result<Self, StoreError> {
        let map = pins
            .open_map(name)
            .and_then(MapFd::new)
            .map_err(|source| StoreError::Open { table: name, source })?;
        Ok(Self { name, map })
    }

    fn put(&self, key: &K, value: &V) -> Result<(), StoreError> {
        let (key_bytes, value_bytes) = (bytemuck::bytes_of(key), bytemuck::bytes_of(value));
        tracing::trace!(table = self.name, key = ?key_bytes, value = ?value_bytes, "put");
        self.map
            .update(key, value)
            .map_err(|source| match source.raw_os_error() {
                Some(libc::E2BIG | libc::ENOSPC | libc::ENOMEM) => StoreError::Full {
                    table: self.name,
                    limit: self.map.info().max_entries,
                },
                _ => io_error("write", self.name, source),
            })
    }

    fn delete(&self, key: &K) -> Result<(), StoreError> {
        tracing::trace!(table = self.name, key = ?bytemuck::bytes_of(key), "delete");
        self.map
            .delete(key)
            .map_err(|source| io_error("delete", self.name, source))
    }

    fn for_each(&self, each: impl FnMut(&K, &V)) -> Result<(), StoreError> {
        self.map
            .for_each(each)
            .map_err(|source| io_error("list", self.name, source))
    }
}

impl<T: Pod> Array<T> {
    const WORDS: usize = size_of::<T>() / size_of::<u64>();

    fn open(pins: &Pins, name: &'static str) -> Result<Self, StoreError> {
        const { assert!(size_of::<T>().is_multiple_of(size_of::<u64>()) && Self::WORDS <= WORDS_AT_MOST) };
        let open = || {
            let fd = pins.open_map(name)?;
            let info = sys::map_info(fd.as_fd())?;
            if info.value_size as usize != size_of::<T>() {
                return Err(io::Error::from(io::ErrorKind::InvalidData));
            }
            MappedArray::new(fd.as_fd())
        };
        let mapping = open().map_err(|source| StoreError::Open { table: name, source })?;
        Ok(Self {
            name,
            mapping,
            element: std::marker::PhantomData,
        })
    }

    fn len(&self) -> u32 {
        (self.mapping.words().len() / Self::WORDS) as u32
    }

    /// The words of `count` elements.
    fn range(&self, index: u32, count: usize) -> Result<&[AtomicU64], StoreError> {
        let start = index as usize * Self::WORDS;
        self.mapping
            .words()
            .get(start..start + count * Self::WORDS)
            .ok_or(StoreError::Full {
                table: self.name,
                limit: self.len(),
            })
    }

    /// Body first, then the head with a release store, so that who sees the new head sees the new body.
    fn write(&self, index: u32, value: &T) -> Result<(), StoreError> {
        let target = self.range(index, 1)?;
        tracing::trace!(table = self.name, index, value = ?bytemuck::bytes_of(value), "write");
        let mut words = [0u64; WORDS_AT_MOST];
        let words = &mut words[..Self::WORDS];
        bytemuck::cast_slice_mut::<u64, u8>(words).copy_from_slice(bytemuck::bytes_of(value));
        for (target, word) in target.iter().zip(&*words).skip(1) {
            target.store(*word, Ordering::Relaxed);
        }
        target[0].store(words[0], Ordering::Release);
        Ok(())
    }

    fn read(&self, index: u32) -> Result<T, StoreError> {
        let mut words = [0u64; WORDS_AT_MOST];
        let words = &mut words[..Self::WORDS];
        for (word, source) in words.iter_mut().zip(self.range(index, 1)?) {
            *word = source.load(Ordering::Acquire);
        }
        let mut value = T::zeroed();
        bytemuck::bytes_of_mut(&mut value).copy_from_slice(bytemuck::cast_slice(words));
        Ok(value)
    }
}

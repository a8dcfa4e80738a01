//! The writing of tables: into an older object's as much of each value as they have room for, which whoever fills them
//! has found to mean the same.
//!
//! `unsafe`: one system call.

use std::fs;
use std::mem::size_of;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};

use anyhow::{Context, Result, bail, ensure};
use aya::Ebpf;
use aya::maps::{Map, MapData, PerCpuArray};
use bytemuck::{Pod, bytes_of};
use dataplane_common::{
    backend::{Backend, BackendHead, backend_flags, backend_state},
    device::{Device as DeviceEntry, device_flags},
    flow::{Exit, Flow4, FlowKey4, FlowMeta, flow_flags},
    service::{PortSet, Service, ServiceHead, TABLE_SIZES, port_set_index},
};
use nix::errno::Errno;

use super::{BACKEND, BACKEND_PORT, Device, NODE, PORT, SERVICE, TCP, word};

/// The one service, and its backend.
pub const ID: u32 = 1;
const SLOTS: u32 = 64;

/// The tables of one object.
#[derive(Debug)]
pub struct Filling<'a> {
    pub object: &'a Ebpf,
    /// Whether its values may be the beginning of ours.
    pub older: bool,
}

/// `BPF_MAP_UPDATE_ELEM` and the part of `union bpf_attr` that it reads (uapi `linux/bpf.h`).
const MAP_UPDATE: nix::libc::c_long = 2;

#[repr(C)]
struct MapUpdate {
    map_fd: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

impl Filling<'_> {
    /// A frontend has the packets' port.
    pub fn port(&self) -> Result<()> {
        let bit = 1u64 << (PORT & 63);
        let ports = PortSet {
            any: bit,
            wildcard: 0,
        };
        self.write("PORTS", &port_set_index(TCP, PORT), &ports)
    }

    /// One service, with [`service_flags`](dataplane_common::service::service_flags), and its one backend.
    pub fn service(&self, flags: u8, backend_is_local: bool, device: &Device) -> Result<()> {
        let mut addr_be = [0; 4];
        addr_be[0] = word(BACKEND);
        let backend = Backend {
            head: BackendHead {
                generation: 1,
                port_be: BACKEND_PORT.to_be(),
                state: backend_state::ACTIVE,
                flags: if backend_is_local { backend_flags::LOCAL } else { 0 },
            },
            addr_be,
            ..Backend::default()
        };
        self.write("BACKENDS", &ID, &backend)?;
        let service = Service {
            head: ServiceHead {
                slots_offset: SLOTS,
                generation: 1,
                size_class: 1,
                flags,
            },
            // Three hours, what the API sets where nothing else is said.
            affinity: 3 * 60 * 60 * 8,
            ..Service::default()
        };
        self.write("SERVICES", &ID, &service)?;
        // All slots are zero: number 0 of the list of ids before them, which has one.
        self.write("MAGLEV", &(SLOTS - 1), &1u64)?;
        self.write("MAGLEV", &(SLOTS - 2), &u64::from(ID))?;
        debug_assert!(TABLE_SIZES[1] > 0);
        let entry = DeviceEntry {
            flags: device_flags::ETHERNET | device_flags::XDP,
            snat4_be: word(NODE),
            ..DeviceEntry::default()
        };
        self.write("DEVICES", &device.ifindex, &entry)
    }

    /// Flows to the service as the walk's packets have them, of clients from `first` on, that policies of revision `judged` have
    /// allowed. The keys of the clients' packets.
    pub fn flows(&self, routed: bool, first: u32, flows: u32, judged: u32) -> Result<Vec<FlowKey4>> {
        let mut keys = Vec::new();
        let meta = FlowMeta {
            backend: ID,
            backend_generation: 1,
            service: ID,
            service_generation: 1,
            flags: if routed { flow_flags::SNAT } else { 0 },
            exit: if routed {
                Exit::Route as u8
            } else {
                Exit::Pass as u8
            },
            seen_ticks: now_ticks()?,
            judged,
            ..FlowMeta::default()
        };
        for flow in 0..flows {
            let (client, port) = source(first, flow);
            let key = FlowKey4 {
                src_be: client,
                dst_be: word(SERVICE),
                sport_be: port.to_be(),
                dport_be: PORT.to_be(),
                proto: TCP,
                side: 0,
                unused: [0; 2],
            };
            let value = Flow4 {
                src_be: if routed { word(NODE) } else { client },
                dst_be: word(BACKEND),
                sport_be: port.to_be(),
                dport_be: BACKEND_PORT.to_be(),
                meta,
            };
            self.write("FLOWS_V4", &key, &value)?;
            keys.push(key);
        }
        Ok(keys)
    }

    /// Enters a value, or of an older object's as much as it has room for.
    pub fn write<K: Pod, V: Pod>(&self, name: &str, key: &K, value: &V) -> Result<()> {
        let table = table(self.object, name)?;
        let info = table.info()?;
        let room = info.value_size() as usize;
        ensure!(
            info.key_size() as usize == size_of::<K>()
                && (room == size_of::<V>() || self.older && room < size_of::<V>()),
            "{name} has keys of {} and values of {room} bytes, not {} and {}",
            info.key_size(),
            size_of::<K>(),
            size_of::<V>()
        );
        let update = MapUpdate {
            map_fd: table.fd().as_fd().as_raw_fd().cast_unsigned(),
            padding: 0,
            key: bytes_of(key).as_ptr() as u64,
            value: bytes_of(value).as_ptr() as u64,
            flags: 0,
        };
        // SAFETY: `update` is the first 32 bytes of a `bpf_attr` as its size says; key and value outlive the call, which
        // only reads them, and are at least as long as the table's.
        let result = unsafe {
            nix::libc::syscall(
                nix::libc::SYS_bpf,
                MAP_UPDATE,
                &raw const update,
                size_of::<MapUpdate>(),
            )
        };
        Errno::result(result).with_context(|| format!("failed to write {name}"))?;
        Ok(())
    }
}

/// A table of a kind that can be filled by key.
fn table<'a>(object: &'a Ebpf, name: &str) -> Result<&'a MapData> {
    match object.map(name).with_context(|| format!("no map {name}"))? {
        Map::Array(data) | Map::HashMap(data) | Map::LruHashMap(data) | Map::LpmTrie(data) => Ok(data),
        _ => bail!("{name} is of another kind"),
    }
}

/// Bytes of a map, as the kernel accounts for them (`memlock` in its descriptor's fdinfo).
pub fn memlock(object: &Ebpf, name: &str) -> Result<u64> {
    let map = object.map(name).with_context(|| format!("no map {name}"))?;
    let data = match map {
        Map::PerCpuArray(data) => data,
        _ => table(object, name)?,
    };
    let path = format!("/proc/self/fdinfo/{}", data.fd().as_fd().as_raw_fd());
    let text = fs::read_to_string(&path).with_context(|| format!("failed to read {path}"))?;
    let bytes = text.lines().find_map(|line| line.strip_prefix("memlock:"));
    bytes
        .and_then(|bytes| bytes.trim().parse().ok())
        .with_context(|| format!("{path} does not say how large {name} is"))
}

/// Another descriptor of a map.
pub fn descriptor(object: &Ebpf, name: &str) -> Result<OwnedFd> {
    let map = object.map(name).with_context(|| format!("no map {name}"))?;
    let data = match map {
        Map::PerCpuArray(data) | Map::RingBuf(data) => data,
        _ => table(object, name)?,
    };
    Ok(data.fd().as_fd().try_clone_to_owned()?)
}

/// An element of a per-CPU array of counters, summed over CPUs.
pub fn counted(object: &Ebpf, name: &str, index: u32) -> Result<u64> {
    let map = object.map(name).with_context(|| format!("no map {name}"))?;
    let counts: PerCpuArray<&MapData, u64> = PerCpuArray::try_from(map)?;
    Ok(counts.get(&index, 0)?.iter().sum())
}

/// The verdicts that a rule has given, over all CPUs.
pub fn decided(object: &Ebpf, rule: u32) -> Result<u64> {
    let map = object.map("RULE_HITS").context("no map RULE_HITS")?;
    let hits: PerCpuArray<&MapData, [u64; 2]> = PerCpuArray::try_from(map)?;
    Ok(hits
        .get(&rule, 0)?
        .iter()
        .map(|[decided, _dry_run]| decided)
        .sum())
}

/// The clock of the datapath, in ticks.
pub fn now_ticks() -> Result<u32> {
    let path = "/proc/uptime";
    let text = fs::read_to_string(path).with_context(|| format!("failed to read {path}"))?;
    let seconds: f64 = text
        .split(' ')
        .next()
        .and_then(|word| word.parse().ok())
        .context("no number in /proc/uptime")?;
    Ok((std::time::Duration::from_secs_f64(seconds).as_nanos() >> 30) as u32)
}

/// Address, in network byte order, and port of a flow's packets, for a walk that begins with client `first`.
pub fn source(first: u32, flow: u32) -> (u32, u16) {
    ((first + (flow >> 15)).to_be(), 1024 + (flow & 0x7fff) as u16)
}

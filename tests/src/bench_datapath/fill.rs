//! What is in the tables of an object for a row's packets, and the writing of it: into an older object's tables as much
//! of each value as they have room for, which [`crate::layout`] has found to mean the same.

use std::fs;
use std::mem::size_of;
use std::os::fd::{AsFd as _, AsRawFd as _};

use anyhow::{Context, Result, bail, ensure};
use aya::Ebpf;
use aya::maps::{Map, MapData};
use bytemuck::{Pod, Zeroable, bytes_of};
use dataplane_common::{
    backend::{Backend, BackendHead, backend_flags, backend_state},
    device::{Device as DeviceEntry, device_flags},
    flow::{Exit, Flow4, FlowKey4, FlowMeta, flow_flags},
    service::{
        Affinity, AffinityKey4, Frontend, FrontendKey4, PortSet, RANGE_SERVICE_BITS, Scope, Service,
        ServiceHead, SourceRange4, TABLE_SIZES, port_set_index, service_flags,
    },
};
use nix::errno::Errno;

use crate::cases::{Case, Tables};
use crate::kernel::{BACKEND, BACKEND_PORT, CLIENT, Device, NODE, PORT, SERVICE, TCP, word};

/// Ids and offsets of the one service and its backend.
const ID: u32 = 1;
/// Source ranges of other services than the one.
const OTHER_RANGES: u32 = 1000;
/// Entries that `RANGES_V4` needs room for.
pub const RANGES: u32 = OTHER_RANGES + 1;
const SLOTS: u32 = 64;

/// A key of `RANGES_V4`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct RangeKey {
    prefix_len: u32,
    range: SourceRange4,
}

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
    /// One service with one backend, and what the case asks for.
    pub fn fill(&self, case: &Case, flows: u32, device: &Device) -> Result<()> {
        if case.port_in_use {
            let bit = 1u64 << (PORT & 63);
            let ports = PortSet {
                any: bit,
                wildcard: 0,
            };
            self.write("PORTS", &port_set_index(TCP, PORT), &ports)?;
        }
        let mut addr_be = [0; 4];
        addr_be[0] = word(BACKEND);
        let local = case.program == "from_netdev";
        let backend = Backend {
            head: BackendHead {
                generation: 1,
                port_be: BACKEND_PORT.to_be(),
                state: backend_state::ACTIVE,
                flags: if local { backend_flags::LOCAL } else { 0 },
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
                flags: match case.tables {
                    Tables::Affinity => service_flags::AFFINITY,
                    Tables::Ranges => service_flags::RANGES,
                    _ => 0,
                },
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
        self.write("DEVICES", &device.ifindex, &entry)?;
        match case.tables {
            Tables::None => Ok(()),
            Tables::Frontend | Tables::Affinity | Tables::Ranges => {
                let key = FrontendKey4 {
                    addr_be: word(SERVICE),
                    port_be: PORT.to_be(),
                    proto: TCP,
                    scope: Scope::Internal as u8,
                };
                let frontend = Frontend {
                    service: ID,
                    owner: 0,
                };
                self.write("FRONTENDS_V4", &key, &frontend)?;
                match case.tables {
                    Tables::Affinity => self.fill_affinity(flows),
                    Tables::Ranges => self.fill_ranges(),
                    _ => Ok(()),
                }
            }
            Tables::Flows => self.fill_flows(false, CLIENT, flows).map(drop),
            Tables::RoutedFlows => self.fill_flows(true, CLIENT, flows).map(drop),
        }
    }

    /// Every client of the walk, with the one backend.
    fn fill_affinity(&self, flows: u32) -> Result<()> {
        let seen_eighths = now_ticks()? << 3;
        for client in 0..flows.div_ceil(1 << 15) {
            let key = AffinityKey4 {
                service: ID,
                service_generation: 1,
                addr_be: (CLIENT + client).to_be(),
            };
            let affinity = Affinity {
                backend: ID,
                backend_generation: 1,
                seen_eighths,
            };
            self.write("AFFINITY_V4", &key, &affinity)?;
        }
        Ok(())
    }

    /// The network that all clients are in, for the one service and for others.
    fn fill_ranges(&self) -> Result<()> {
        let addr_be = (CLIENT & 0xff00_0000).to_be();
        for service in ID..=ID + OTHER_RANGES {
            let key = RangeKey {
                prefix_len: RANGE_SERVICE_BITS + 8,
                range: SourceRange4 { service, addr_be },
            };
            self.write("RANGES_V4", &key, &1u32)?;
        }
        Ok(())
    }

    /// Flows as the walk's packets have them, of clients from `first` on. The keys of the clients' packets.
    pub fn fill_flows(&self, routed: bool, first: u32, flows: u32) -> Result<Vec<FlowKey4>> {
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
            ..FlowMeta::default()
        };
        for flow in 0..flows {
            let port = 1024 + (flow & 0x7fff) as u16;
            let client = (first + (flow >> 15)).to_be();
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
    fn write<K: Pod, V: Pod>(&self, name: &str, key: &K, value: &V) -> Result<()> {
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

/// The clock of the datapath.
fn now_ticks() -> Result<u32> {
    let path = "/proc/uptime";
    let text = fs::read_to_string(path).with_context(|| format!("failed to read {path}"))?;
    let seconds: f64 = text
        .split(' ')
        .next()
        .and_then(|word| word.parse().ok())
        .context("no number in /proc/uptime")?;
    Ok((std::time::Duration::from_secs_f64(seconds).as_nanos() >> 30) as u32)
}

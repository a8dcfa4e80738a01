//! Loads the objects for one row, fills their tables alike, and runs programs behind the trampoline.

use std::fs;
use std::mem::size_of;
use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, ProgramArray};
use aya::programs::{Program, ProgramFd, SchedClassifier, TestRun as _, TestRunOptions, Xdp, xdp::XdpMode};
use aya::{Ebpf, EbpfLoader};
use bytemuck::{Pod, Zeroable};
use dataplane_common::{
    addr::Mac,
    backend::{Backend, BackendHead, backend_flags, backend_state},
    device::{Device as DeviceEntry, device_flags},
    flow::{Exit, Flow4, FlowKey4, FlowMeta, flow_flags},
    service::{
        Affinity, AffinityKey4, Frontend, FrontendKey4, PortSet, RANGE_SERVICE_BITS, Scope, Service,
        ServiceHead, SourceRange4, TABLE_SIZES, port_set_index, service_flags,
    },
};
use dataplane_tests::links::Links;
use dataplane_tests::netns::NetNs;

use crate::baseline;
use crate::cases::{Case, Tables};

const FRAME: usize = 64;
const TCP: u8 = 6;
const ACK: u8 = 0x10;
const SYN: u8 = 0x02;
const CLIENT: u32 = 0x0a01_0000;
/// The first client of flows that the walk does not meet.
const ESTABLISHED_CLIENT: u32 = 0x0a02_0000;
const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
const BACKEND: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);
const NODE: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const NEIGHBOUR: [u8; 6] = [2, 0, 0, 0, 0, 2];
const PORT: u16 = 80;
const BACKEND_PORT: u16 = 8080;
/// Ids and offsets of the one service and its backend.
const ID: u32 = 1;
/// Source ranges of other services than the one.
const OTHER_RANGES: u32 = 1000;
const SLOTS: u32 = 64;

/// Plain data in the eyes of aya.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct Raw<T>(pub(crate) T);
// SAFETY: `bytemuck::Pod` demands all that aya's asks for: any bits are a value, and there is no padding.
unsafe impl<T: Pod> aya::Pod for Raw<T> {}

/// As in the object.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct Walk {
    pub(crate) frame: [u32; 16],
    pub(crate) step: u32,
    mask: u32,
    client: u32,
    /// Not 0: the walk's client and port are the packet's destination.
    pub(crate) to_client: u32,
}

/// Where the answers to `from_pod`'s flows come by.
pub const TO_POD: &str = "to_pod";

/// The device by which packets come and go.
#[derive(Debug)]
pub struct Device {
    ifindex: u32,
}

/// A veth with a neighbour that needs no resolution, in the calling process's namespace.
pub fn make_device() -> Result<Device> {
    let netns = NetNs::open(Path::new("/proc/thread-self/ns/net"))?;
    let mut links = Links::open(&netns)?;
    links.add_veth("bench0", "bench1", netns.fd(), None)?;
    links.set_up("bench0")?;
    links.set_up("bench1")?;
    links.add_address("bench0", (NODE.into(), 24))?;
    links.add_neighbour("bench0", BACKEND.into(), NEIGHBOUR)?;
    let forwarding = "/proc/sys/net/ipv4/ip_forward";
    fs::write(forwarding, "1").with_context(|| format!("failed to write {forwarding}"))?;
    Ok(Device {
        ifindex: links.index("bench0")?,
    })
}

/// Both objects, loaded for a row.
#[derive(Debug)]
pub struct Bench {
    trampoline: Ebpf,
    pub(crate) datapath: Ebpf,
    /// Kept loaded.
    _baseline: Option<Ebpf>,
    ours: ProgramFd,
    floor: ProgramFd,
    /// The older object's program, and why there is none although one was asked for.
    old: Option<ProgramFd>,
    pub without_old: Option<String>,
    case: &'static Case,
    pub(crate) walk: Walk,
    ifindex: u32,
}

impl std::fmt::Debug for Walk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Walk({})", self.mask)
    }
}

impl Bench {
    pub fn load(
        objects: &Path,
        baseline: Option<&Path>,
        case: &'static Case,
        flows: u32,
        max_flows: u32,
        device: &Device,
    ) -> Result<Self> {
        let mut bench = load(&objects.join("bench.o"), max_flows)?;
        let mut datapath = load(&objects.join("dataplane.o"), max_flows)?;
        let mut older = baseline.map(|path| load(path, max_flows)).transpose()?;
        let mut without_old = None;
        if let Some(old) = &older {
            let missing = baseline::check_layouts(old, &datapath)?;
            without_old = baseline::lacks(case, &missing);
            if without_old.is_some() {
                older = None;
            }
        }
        let ours = program(&mut datapath, case.program)?;
        let floor = program(&mut bench, case.floor)?;
        program(&mut bench, trampoline(case))?;
        if is_xdp(case) {
            // The kernel registers a veth's receive queue, which a test run at the device needs, while XDP is on.
            let xdp: &mut Xdp = bench
                .program_mut(trampoline(case))
                .context("no trampoline")?
                .try_into()?;
            xdp.attach("bench0", XdpMode::Driver)
                .context("failed to attach the trampoline")?;
        }
        let old = older.as_mut().map(|old| program(old, case.program)).transpose()?;
        for object in [&mut bench, &mut datapath].into_iter().chain(&mut older) {
            fill(object, case, flows, device)?;
        }
        Ok(Self {
            trampoline: bench,
            datapath,
            _baseline: older,
            ours,
            floor,
            old,
            without_old,
            case,
            walk: Walk {
                frame: bytemuck::cast(frame(case)),
                step: 0,
                mask: flows - 1,
                client: CLIENT,
                to_client: 0,
            },
            ifindex: device.ifindex,
        })
    }

    /// All programs answer as the case says, and make the same packet of it. That is also what shows that an older
    /// object means the same by its tables.
    pub fn check(&mut self) -> Result<()> {
        let mut targets = vec![
            ("the floor", self.floor.try_clone()?),
            ("the program", self.ours.try_clone()?),
        ];
        if let Some(old) = &self.old {
            targets.push(("the baseline's program", old.try_clone()?));
        }
        let mut first: Option<[u8; FRAME]> = None;
        for (who, target) in targets {
            self.aim(Some(&target))?;
            let mut out = [0; FRAME];
            let (answer, _) = self.run(1, Some(&mut out))?;
            ensure!(
                answer == self.case.answer,
                "{who} returned {answer}, not {}",
                self.case.answer
            );
            ensure!(
                *first.get_or_insert(out) == out,
                "the floor and {who} made different packets: {first:x?}, {out:x?}"
            );
        }
        Ok(())
    }

    pub fn alone(&mut self, packets: u32) -> Result<f64> {
        self.aim(None)?;
        Ok(self.run(packets, None)?.1)
    }

    pub fn floor(&mut self, packets: u32) -> Result<f64> {
        let target = self.floor.try_clone()?;
        self.aim(Some(&target))?;
        Ok(self.run(packets, None)?.1)
    }

    pub fn ours(&mut self, packets: u32) -> Result<f64> {
        let target = self.ours.try_clone()?;
        self.aim(Some(&target))?;
        Ok(self.run(packets, None)?.1)
    }

    /// The older object's program.
    pub fn old(&mut self, packets: u32) -> Result<Option<f64>> {
        let Some(old) = &self.old else { return Ok(None) };
        let target = old.try_clone()?;
        self.aim(Some(&target))?;
        Ok(Some(self.run(packets, None)?.1))
    }

    /// The case's program.
    pub fn program(&self) -> Result<ProgramFd> {
        Ok(self.ours.try_clone()?)
    }

    /// Enters flows of other clients than the walk's; the keys of the clients' packets.
    pub fn establish(&mut self, flows: u32) -> Result<Vec<FlowKey4>> {
        fill_flows(&mut self.datapath, false, ESTABLISHED_CLIENT, flows)
    }

    /// The SYN of a flood, and the answer to it at [`TO_POD`].
    pub fn flood_frames(&self) -> ([u32; 16], [u32; 16]) {
        let syn = frame(self.case);
        let mut answer = syn;
        answer[26..30].copy_from_slice(&BACKEND.octets());
        answer[34..36].copy_from_slice(&BACKEND_PORT.to_be_bytes());
        answer[47] = SYN | ACK;
        (bytemuck::cast(syn), bytemuck::cast(answer))
    }

    /// Goes on with flows that the last `packets` did not meet.
    pub fn walk_on(&mut self, packets: u32) {
        self.walk.step = self.walk.step.wrapping_add(packets);
    }

    /// Sets what the trampoline calls, and where its walk begins.
    pub(crate) fn aim(&mut self, target: Option<&ProgramFd>) -> Result<()> {
        let name = if is_xdp(self.case) {
            "TARGET_XDP"
        } else {
            "TARGET_TC"
        };
        let map = self.trampoline.map_mut(name).context("no target map")?;
        let mut targets = ProgramArray::try_from(map)?;
        match target {
            Some(fd) => targets.set(0, fd, 0).context("failed to set the target")?,
            None => drop(targets.clear_index(&0)),
        }
        let walk = self.trampoline.map_mut("WALK").context("no map WALK")?;
        Array::<_, Raw<Walk>>::try_from(walk)?.set(0, Raw(self.walk), 0)?;
        Ok(())
    }

    /// What the last run returned, and ns a packet.
    pub(crate) fn run(&self, repeat: u32, out: Option<&mut [u8]>) -> Result<(u32, f64)> {
        let data = bytemuck::bytes_of(&self.walk.frame);
        let mut options = TestRunOptions::new();
        options.data_in = Some(data);
        options.data_out = out;
        options.repeat = repeat;
        let mut xdp_context = [0u32; 6];
        let mut skb_context = [0u32; 48];
        let trampoline = self
            .trampoline
            .program(trampoline(self.case))
            .context("no trampoline")?;
        let result = match trampoline {
            Program::Xdp(xdp) => {
                xdp_context[1] = FRAME as u32;
                xdp_context[3] = self.ifindex;
                options.ctx_in = Some(bytemuck::bytes_of(&xdp_context));
                xdp.test_run(options)
            }
            Program::SchedClassifier(tc) => {
                skb_context[9] = self.ifindex;
                skb_context[10] = self.ifindex;
                options.ctx_in = Some(bytemuck::bytes_of(&skb_context));
                tc.test_run(options)
            }
            _ => bail!("the trampoline is of no known kind"),
        }
        .context("BPF_PROG_TEST_RUN failed")?;
        Ok((result.return_value, result.duration.as_secs_f64() * 1e9))
    }
}

fn is_xdp(case: &Case) -> bool {
    case.program == "xdp"
}

fn trampoline(case: &Case) -> &'static str {
    if is_xdp(case) {
        "trampoline_xdp"
    } else {
        "trampoline_tc"
    }
}

fn load(path: &Path, max_flows: u32) -> Result<Ebpf> {
    let bytes = fs::read(path)
        .with_context(|| format!("failed to read {}: run `cargo xtask build-ebpf`", path.display()))?;
    EbpfLoader::new()
        .map_max_entries("FLOWS_V4", max_flows)
        .map_max_entries("HALF_OPEN_V4", (max_flows / 4).max(1))
        .map_max_entries("AFFINITY_V4", (max_flows / 4).max(1))
        .map_max_entries("RANGES_V4", OTHER_RANGES + 1)
        .load(&bytes)
        .with_context(|| format!("failed to load {}", path.display()))
}

pub(crate) fn program(object: &mut Ebpf, name: &str) -> Result<ProgramFd> {
    let fd = match object
        .program_mut(name)
        .with_context(|| format!("no program {name}"))?
    {
        Program::Xdp(xdp) => Xdp::load(xdp).and_then(|()| xdp.fd()),
        Program::SchedClassifier(tc) => SchedClassifier::load(tc).and_then(|()| tc.fd()),
        _ => bail!("{name} is of no known kind"),
    };
    Ok(fd
        .with_context(|| format!("failed to load {name}"))?
        .try_clone()?)
}

fn word(addr: Ipv4Addr) -> u32 {
    u32::from_ne_bytes(addr.octets())
}

/// The packet of the first flow: Ethernet, IPv4, TCP and ten bytes. The trampoline changes client and port.
fn frame(case: &Case) -> [u8; FRAME] {
    let mut frame = [0u8; FRAME];
    frame[..12].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 3]);
    frame[12..24].copy_from_slice(&[8, 0, 0x45, 0, 0, 50, 0, 1, 0x40, 0, 64, TCP]);
    frame[30..34].copy_from_slice(&SERVICE.octets());
    frame[36..38].copy_from_slice(&PORT.to_be_bytes());
    frame[46] = 5 << 4;
    frame[47] = if case.begins() { SYN } else { ACK };
    frame[50..52].copy_from_slice(&[0x12, 0x34]);
    frame
}

pub(crate) fn hash<'a, K: Pod, V: Pod>(
    object: &'a mut Ebpf,
    name: &str,
) -> Result<HashMap<&'a mut aya::maps::MapData, Raw<K>, Raw<V>>> {
    let map = object.map_mut(name).with_context(|| format!("no map {name}"))?;
    Ok(HashMap::try_from(map)?)
}

fn set<T: Pod>(object: &mut Ebpf, name: &str, index: u32, value: T) -> Result<()> {
    let map = object.map_mut(name).with_context(|| format!("no map {name}"))?;
    Array::<_, Raw<T>>::try_from(map)?
        .set(index, Raw(value), 0)
        .with_context(|| format!("failed to write {name}"))
}

/// One service with one backend, and what the case asks for.
fn fill(object: &mut Ebpf, case: &Case, flows: u32, device: &Device) -> Result<()> {
    if case.port_in_use {
        let bit = 1u64 << (PORT & 63);
        let ports = PortSet {
            any: bit,
            wildcard: 0,
        };
        set(object, "PORTS", port_set_index(TCP, PORT), ports)?;
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
    set(object, "BACKENDS", ID, backend)?;
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
    set(object, "SERVICES", ID, service)?;
    // All slots are zero: number 0 of the list of ids before them, which has one.
    set(object, "MAGLEV", SLOTS - 1, 1u64)?;
    set(object, "MAGLEV", SLOTS - 2, u64::from(ID))?;
    debug_assert!(TABLE_SIZES[1] > 0);
    let entry = DeviceEntry {
        flags: device_flags::ETHERNET | device_flags::XDP,
        snat4_be: word(NODE),
        ..DeviceEntry::default()
    };
    hash(object, "DEVICES")?.insert(Raw(device.ifindex), Raw(entry), 0)?;
    match case.tables {
        Tables::None => Ok(()),
        Tables::Frontend | Tables::Affinity | Tables::Ranges => {
            let key = FrontendKey4 {
                addr_be: word(SERVICE),
                port_be: PORT.to_be(),
                proto: TCP,
                scope: Scope::Internal as u8,
            };
            hash(object, "FRONTENDS_V4")?.insert(
                Raw(key),
                Raw(Frontend {
                    service: ID,
                    owner: 0,
                }),
                0,
            )?;
            match case.tables {
                Tables::Affinity => fill_affinity(object, flows),
                Tables::Ranges => fill_ranges(object),
                _ => Ok(()),
            }
        }
        Tables::Flows => fill_flows(object, false, CLIENT, flows).map(drop),
        Tables::RoutedFlows => fill_flows(object, true, CLIENT, flows).map(drop),
    }
}

/// Every client of the walk, with the one backend.
fn fill_affinity(object: &mut Ebpf, flows: u32) -> Result<()> {
    let seen_eighths = now_ticks()? << 3;
    let mut clients = hash(object, "AFFINITY_V4")?;
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
        clients
            .insert(Raw(key), Raw(affinity), 0)
            .context("failed to write AFFINITY_V4")?;
    }
    Ok(())
}

/// The network that all clients are in, for the one service and for others.
fn fill_ranges(object: &mut Ebpf) -> Result<()> {
    let map = object.map_mut("RANGES_V4").context("no map RANGES_V4")?;
    let mut ranges: LpmTrie<_, Raw<SourceRange4>, u32> = LpmTrie::try_from(map)?;
    let addr_be = (CLIENT & 0xff00_0000).to_be();
    for service in ID..=ID + OTHER_RANGES {
        let key = Key::new(RANGE_SERVICE_BITS + 8, Raw(SourceRange4 { service, addr_be }));
        ranges.insert(&key, 1, 0).context("failed to write RANGES_V4")?;
    }
    Ok(())
}

/// Flows as the walk's packets have them, of clients from `first` on. The keys of the clients' packets.
fn fill_flows(object: &mut Ebpf, routed: bool, first: u32, flows: u32) -> Result<Vec<FlowKey4>> {
    let mut keys = Vec::new();
    let mut map = hash::<FlowKey4, Flow4>(object, "FLOWS_V4")?;
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
        ifindex: 0,
        state: 0,
        sequence: [0; 3],
        mac_dst: Mac::default(),
        mac_src: Mac::default(),
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
        map.insert(Raw(key), Raw(value), 0)
            .context("failed to write FLOWS_V4")?;
        keys.push(key);
    }
    Ok(keys)
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

const _: () = assert!(size_of::<Walk>() == 80);

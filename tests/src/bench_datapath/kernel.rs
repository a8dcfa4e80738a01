//! Loads the objects for one row and runs programs behind the trampoline.

use std::fs;
use std::mem::size_of;
use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use aya::maps::{Array, ProgramArray};
use aya::programs::{Program, ProgramFd, SchedClassifier, TestRun as _, TestRunOptions, Xdp, xdp::XdpMode};
use aya::{Ebpf, EbpfLoader};
use bytemuck::{Pod, Zeroable};
use dataplane_common::flow::FlowKey4;
use dataplane_tests::links::Links;
use dataplane_tests::netns::NetNs;

use crate::baseline::Baseline;
use crate::cases::Case;
use crate::fill::{Filling, RANGES};

const FRAME: usize = 64;
pub const TCP: u8 = 6;
const ACK: u8 = 0x10;
const SYN: u8 = 0x02;
pub const CLIENT: u32 = 0x0a01_0000;
/// The first client of flows that the walk does not meet.
const ESTABLISHED_CLIENT: u32 = 0x0a02_0000;
pub const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
pub const BACKEND: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);
pub const NODE: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const NEIGHBOUR: [u8; 6] = [2, 0, 0, 0, 0, 2];
pub const PORT: u16 = 80;
pub const BACKEND_PORT: u16 = 8080;

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
    pub ifindex: u32,
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
        baseline: Option<&Baseline>,
        case: &'static Case,
        flows: u32,
        max_flows: u32,
        device: &Device,
    ) -> Result<Self> {
        let mut bench = load(&objects.join("bench.o"), max_flows)?;
        let mut datapath = load(&objects.join("dataplane.o"), max_flows)?;
        let without_old = baseline.and_then(|baseline| baseline.lacks(case));
        let mut older = baseline
            .filter(|_| without_old.is_none())
            .map(|baseline| load(&baseline.object, max_flows))
            .transpose()?;
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
        let exact = [&bench, &datapath].map(|object| (object, false));
        for (object, older) in exact.into_iter().chain(older.as_ref().map(|old| (old, true))) {
            Filling { object, older }.fill(case, flows, device)?;
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
    pub fn establish(&self, flows: u32) -> Result<Vec<FlowKey4>> {
        Filling {
            object: &self.datapath,
            older: false,
        }
        .fill_flows(false, ESTABLISHED_CLIENT, flows)
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
        .map_max_entries("RANGES_V4", RANGES)
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

pub fn word(addr: Ipv4Addr) -> u32 {
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

const _: () = assert!(size_of::<Walk>() == 80);

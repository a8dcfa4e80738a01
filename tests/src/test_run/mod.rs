//! Programs of the datapath by `BPF_PROG_TEST_RUN`, behind the trampoline of `bench.o`, which restores the packet and walks
//! the flows before each run. [`tables`] fills what they look up, [`stats`] says what came out of it.
//!
//! `unsafe`: one marker, of plain data.

pub mod counting;
pub mod stats;
pub mod tables;

use std::fs;
use std::mem::size_of;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;

use anyhow::{Context, Result, bail};
use aya::maps::{Array, ProgramArray};
use aya::programs::{Program, ProgramFd, SchedClassifier, TestRun as _, TestRunOptions, Xdp, xdp::XdpMode};
use aya::{Ebpf, EbpfLoader};
use bytemuck::{Pod, Zeroable, bytes_of};
use dataplane_common::config::{self, Config};
use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, unshare};
use nix::unistd::Pid;

use crate::links::Links;
use crate::netns::NetNs;

/// Bytes of a packet.
pub const FRAME: usize = 64;
/// The IANA number.
pub const TCP: u8 = 6;
pub const ACK: u8 = 0x10;
pub const SYN: u8 = 0x02;
/// The walk's first client, host byte order.
pub const CLIENT: u32 = 0x0a01_0000;
pub const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
pub const BACKEND: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);
pub const NODE: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
pub const PORT: u16 = 80;
pub const BACKEND_PORT: u16 = 8080;
const NEIGHBOUR: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// What a program at TC returns for a packet that goes on (`TCX_NEXT`), and for one that it drops.
pub const NEXT: u32 = u32::MAX;
pub const SHOT: u32 = 2;

/// Plain data in the eyes of aya.
#[repr(transparent)]
#[derive(Clone, Copy, Debug)]
pub struct Raw<T>(pub T);
// SAFETY: `bytemuck::Pod` demands all that aya's asks for: any bits are a value, and there is no padding.
unsafe impl<T: Pod> aya::Pod for Raw<T> {}

/// As in the object.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct Walk {
    pub frame: [u32; 16],
    pub step: u32,
    /// The number of flows, a power of two, less one.
    pub mask: u32,
    /// Host byte order.
    pub client: u32,
    /// Not 0: the walk's client and port are the packet's destination.
    pub to_client: u32,
}

const _: () = assert!(size_of::<Walk>() == 80);

impl Walk {
    /// Over so many flows, a power of two, whose packets are `frame` but for source and source port.
    pub fn new(frame: [u8; FRAME], flows: u32) -> Self {
        Self {
            frame: bytemuck::cast(frame),
            step: 0,
            mask: flows - 1,
            client: CLIENT,
            to_client: 0,
        }
    }

    /// Goes on with flows that the last `packets` did not meet.
    pub fn on(&mut self, packets: u32) {
        self.step = self.step.wrapping_add(packets);
    }
}

/// The device by which packets come and go.
#[derive(Debug)]
pub struct Device {
    pub ifindex: u32,
}

/// Puts the process on one CPU, in a network namespace without a name, for this process alone: it goes with it.
pub fn apart(cpu: usize) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).context("failed to unshare the network namespace (not root?)")?;
    let mut cpus = CpuSet::new();
    cpus.set(cpu).context("there is no such CPU")?;
    sched_setaffinity(Pid::from_raw(0), &cpus).context("failed to stay on one CPU")
}

/// Puts the calling thread on all CPUs but one, where there are others.
pub fn on_other(cpu: usize) {
    let mut cpus = CpuSet::new();
    for other in (0..CpuSet::count()).filter(|other| *other != cpu) {
        // CPUs that there are not are left out by the kernel.
        let _set = cpus.set(other);
    }
    let _only_one = sched_setaffinity(Pid::from_raw(0), &cpus);
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

/// Loads an object, its maps with other numbers of entries where `entries` has some.
pub fn load(path: &Path, entries: &[(&str, u32)]) -> Result<Ebpf> {
    load_by(&mut EbpfLoader::new(), path, entries)
}

/// [`load`], with these constants.
pub fn load_with<'a>(path: &Path, entries: &[(&'a str, u32)], config: &'a Config) -> Result<Ebpf> {
    load_by(
        EbpfLoader::new().override_global(config::SYMBOL, bytes_of(config), true),
        path,
        entries,
    )
}

fn load_by<'a>(loader: &mut EbpfLoader<'a>, path: &Path, entries: &[(&'a str, u32)]) -> Result<Ebpf> {
    let bytes = fs::read(path)
        .with_context(|| format!("failed to read {}: run `cargo xtask build-ebpf`", path.display()))?;
    for &(name, entries) in entries {
        loader.map_max_entries(name, entries);
    }
    loader
        .load(&bytes)
        .with_context(|| format!("failed to load {}", path.display()))
}

/// Loads a program of an object.
pub fn program(object: &mut Ebpf, name: &str) -> Result<ProgramFd> {
    // There are two, and one in older objects.
    let name = match name {
        "xdp" if object.program(name).is_none() => "xdp_frags",
        name => name,
    };
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

/// The packet of the walk's flows: Ethernet, IPv4, TCP and ten bytes. The trampoline writes source and source port.
pub fn frame(to: SocketAddrV4, tcp_flags: u8) -> [u8; FRAME] {
    let mut frame = [0u8; FRAME];
    frame[..12].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 3]);
    frame[12..24].copy_from_slice(&[8, 0, 0x45, 0, 0, 50, 0, 1, 0x40, 0, 64, TCP]);
    frame[30..34].copy_from_slice(&to.ip().octets());
    frame[36..38].copy_from_slice(&to.port().to_be_bytes());
    frame[46] = 5 << 4;
    frame[47] = tcp_flags;
    frame[50..52].copy_from_slice(&[0x12, 0x34]);
    frame
}

/// In network byte order.
pub fn word(addr: Ipv4Addr) -> u32 {
    u32::from_ne_bytes(addr.octets())
}

/// A trampoline and what it walks over.
#[derive(Debug)]
pub struct Trampoline {
    /// With the floor programs.
    pub object: Ebpf,
    is_xdp: bool,
    pub walk: Walk,
    ifindex: u32,
}

impl Trampoline {
    /// Of an object `bench.o`.
    pub fn new(mut object: Ebpf, is_xdp: bool, walk: Walk, device: &Device) -> Result<Self> {
        let name = name(is_xdp);
        program(&mut object, name)?;
        if is_xdp {
            // The kernel registers a veth's receive queue, which a test run at the device needs, while XDP is on.
            let xdp: &mut Xdp = object.program_mut(name).context("no trampoline")?.try_into()?;
            xdp.attach("bench0", XdpMode::Driver)
                .context("failed to attach the trampoline")?;
        }
        Ok(Self {
            object,
            is_xdp,
            walk,
            ifindex: device.ifindex,
        })
    }

    /// Runs `target`, or nothing but the trampoline, for so many packets: what the last one returned, and ns a packet.
    pub fn run(
        &mut self,
        target: Option<&ProgramFd>,
        packets: u32,
        out: Option<&mut [u8]>,
    ) -> Result<(u32, f64)> {
        self.aim(target)?;
        let data = bytemuck::bytes_of(&self.walk.frame);
        let mut options = TestRunOptions::new();
        options.data_in = Some(data);
        options.data_out = out;
        options.repeat = packets;
        let mut xdp_context = [0u32; 6];
        let mut skb_context = [0u32; 48];
        let trampoline = self.object.program(name(self.is_xdp));
        let result = match trampoline.context("no trampoline")? {
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

    /// Sets what the trampoline calls, and where its walk begins.
    fn aim(&mut self, target: Option<&ProgramFd>) -> Result<()> {
        let name = if self.is_xdp { "TARGET_XDP" } else { "TARGET_TC" };
        let map = self.object.map_mut(name).context("no target map")?;
        let mut targets = ProgramArray::try_from(map)?;
        match target {
            Some(fd) => targets.set(0, fd, 0).context("failed to set the target")?,
            None => drop(targets.clear_index(&0)),
        }
        let walk = self.object.map_mut("WALK").context("no map WALK")?;
        Array::<_, Raw<Walk>>::try_from(walk)?.set(0, Raw(self.walk), 0)?;
        Ok(())
    }
}

fn name(is_xdp: bool) -> &'static str {
    if is_xdp { "trampoline_xdp" } else { "trampoline_tc" }
}

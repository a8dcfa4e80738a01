//! Loads the objects for one row and runs programs behind the trampoline.

use std::net::SocketAddrV4;
use std::path::Path;

use anyhow::{Result, ensure};
use aya::Ebpf;
use aya::programs::ProgramFd;
use dataplane_common::config::{Config, config_flags};
use dataplane_common::flow::FlowKey4;
use dataplane_tests::test_run::{
    ACK, BACKEND, BACKEND_PORT, Device, FRAME, PORT, SERVICE, SYN, Trampoline, Walk, frame, load, load_with,
    program, tables::Filling,
};

use crate::baseline::Baseline;
use crate::cases::Case;
use crate::fill::{RANGES, fill};

/// The first client of flows that the walk does not meet.
const ESTABLISHED_CLIENT: u32 = 0x0a02_0000;

/// Where the answers to `from_pod`'s flows come by.
pub const TO_POD: &str = "to_pod";

/// Both objects, loaded for a row.
#[derive(Debug)]
pub struct Bench {
    pub trampoline: Trampoline,
    pub datapath: Ebpf,
    /// Kept loaded.
    _baseline: Option<Ebpf>,
    ours: ProgramFd,
    floor: ProgramFd,
    /// The older object's program, and why there is none although one was asked for.
    old: Option<ProgramFd>,
    pub without_old: Option<String>,
    case: &'static Case,
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
        let few = (max_flows / 4).max(1);
        let entries = [
            ("FLOWS_V4", max_flows),
            ("HALF_OPEN_V4", few),
            ("AFFINITY_V4", few),
            ("RANGES_V4", RANGES),
        ];
        let mut bench = load(&objects.join("bench.o"), &entries)?;
        let flag = if case.checks_sources {
            config_flags::SOURCE_CHECK
        } else {
            0
        };
        let config = Config {
            flags: Config::default().flags | flag,
            ..Config::default()
        };
        let mut datapath = load_with(&objects.join("dataplane.o"), &entries, &config)?;
        let without_old = baseline.and_then(|baseline| baseline.lacks(case));
        let mut older = baseline
            .filter(|_| without_old.is_none())
            .map(|baseline| load(&baseline.object, &entries))
            .transpose()?;
        let ours = program(&mut datapath, case.program)?;
        let floor = program(&mut bench, case.floor)?;
        let walk = Walk::new(first_packet(case), flows);
        let trampoline = Trampoline::new(bench, case.program == "xdp", walk, device)?;
        let old = older.as_mut().map(|old| program(old, case.program)).transpose()?;
        let exact = [&trampoline.object, &datapath].map(|object| (object, false));
        for (object, older) in exact.into_iter().chain(older.as_ref().map(|old| (old, true))) {
            fill(&Filling { object, older }, case, flows, device)?;
        }
        Ok(Self {
            trampoline,
            datapath,
            _baseline: older,
            ours,
            floor,
            old,
            without_old,
            case,
        })
    }

    /// All programs answer as the case says, and make the same packet of it. That is also what shows that an older
    /// object means the same by its tables.
    pub fn check(&mut self) -> Result<()> {
        let mut targets = vec![("the floor", &self.floor), ("the program", &self.ours)];
        if let Some(old) = &self.old {
            targets.push(("the baseline's program", old));
        }
        let mut first: Option<[u8; FRAME]> = None;
        for (who, target) in targets {
            let mut out = [0; FRAME];
            let (answer, _) = self.trampoline.run(Some(target), 1, Some(&mut out))?;
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
        Ok(self.trampoline.run(None, packets, None)?.1)
    }

    pub fn floor(&mut self, packets: u32) -> Result<f64> {
        Ok(self.trampoline.run(Some(&self.floor), packets, None)?.1)
    }

    pub fn ours(&mut self, packets: u32) -> Result<f64> {
        Ok(self.trampoline.run(Some(&self.ours), packets, None)?.1)
    }

    /// The older object's program.
    pub fn old(&mut self, packets: u32) -> Result<Option<f64>> {
        let Some(old) = &self.old else { return Ok(None) };
        Ok(Some(self.trampoline.run(Some(old), packets, None)?.1))
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
        .flows(false, ESTABLISHED_CLIENT, flows, 0)
    }

    /// The SYN of a flood, and the answer to it at [`TO_POD`].
    pub fn flood_frames(&self) -> ([u32; 16], [u32; 16]) {
        let syn = first_packet(self.case);
        let mut answer = syn;
        answer[26..30].copy_from_slice(&BACKEND.octets());
        answer[34..36].copy_from_slice(&BACKEND_PORT.to_be_bytes());
        answer[47] = SYN | ACK;
        (bytemuck::cast(syn), bytemuck::cast(answer))
    }
}

/// The packet of the first flow.
fn first_packet(case: &Case) -> [u8; FRAME] {
    frame(
        SocketAddrV4::new(SERVICE, PORT),
        if case.begins() { SYN } else { ACK },
    )
}

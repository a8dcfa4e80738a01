//! A flood: a million SYNs from as many sources, each answered by the backend, into tables of the agent's default sizes,
//! beside a thousand established flows that are silent meanwhile. All of them have to be there afterwards.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use aya::maps::{HashMap, MapData};
use dataplane_common::flow::{Flow4, FlowEvent, FlowKey4};
use dataplane_tests::test_run::{Device, Raw, program, tables::counted};

use crate::cases::FLOOD;
use crate::kernel::{Bench, TO_POD};

const FLOWS: u32 = 262_144;
const ESTABLISHED: u32 = 1000;
const SYNS: u32 = 1 << 20;
/// SYNs before their answers come.
const BATCH: u32 = 1 << 12;

/// Whether all established flows have survived.
pub fn run(objects: &Path, device: &Device) -> Result<bool> {
    let mut bench = Bench::load(objects, None, &FLOOD, SYNS, FLOWS, device)?;
    let keys = bench.establish(ESTABLISHED)?;
    let syns = bench.program()?;
    let answers = program(&mut bench.datapath, TO_POD)?;
    let (syn, answer) = bench.flood_frames();
    for first in (0..SYNS).step_by(BATCH as usize) {
        for (target, frame, to_client) in [(&syns, syn, 0), (&answers, answer, 1)] {
            let walk = &mut bench.trampoline.walk;
            walk.frame = frame;
            walk.to_client = to_client;
            walk.step = first;
            bench.trampoline.run(Some(target), BATCH, None)?;
        }
    }
    let map = bench.datapath.map("FLOWS_V4").context("no map FLOWS_V4")?;
    let flows: HashMap<&MapData, Raw<FlowKey4>, Raw<Flow4>> = HashMap::try_from(map)?;
    let left = keys
        .iter()
        .filter(|key| flows.get(&Raw(**key), 0).is_ok())
        .count();
    let [begun, answered, established] = FlowEvent::ALL else {
        anyhow::bail!("another number of flow events")
    };
    let counts =
        [begun, answered, established].map(|event| counted(&bench.datapath, "FLOW_EVENTS", *event as u32));
    let [begun, answered, established] = counts;
    let (begun, answered, established) = (begun?, answered?, established?);
    println!(
        "flood: {SYNS} SYNs, {begun} flows begun, {answered} answered, {established} established; {left} of {ESTABLISHED} silent flows are left"
    );
    ensure!(
        begun == u64::from(SYNS) && answered == begun,
        "the flood was not what it should have been"
    );
    Ok(left == keys.len())
}

//! `COUNTERS` and `FLOW_EVENTS`: how often each reason and each event in the life of a flow occurred; `RULE_HITS` and
//! `SET_HITS`: what policies have decided.

use std::{fs, io};

use dataplane_common::{
    flow::FlowEvent,
    policy::{Counted, Hits},
    reason::Reason,
};

use super::{map_names, pins::Pins, sys::PerCpuFd};

/// Every reason with its count over all CPUs.
pub fn read(pins: &Pins) -> io::Result<Vec<(Reason, u64)>> {
    sums(pins, map_names::COUNTERS, Reason::ALL, |reason| reason as u32)
}

/// Every event with its count over all CPUs.
pub fn flow_events(pins: &Pins) -> io::Result<Vec<(FlowEvent, u64)>> {
    sums(pins, map_names::FLOW_EVENTS, FlowEvent::ALL, |event| event as u32)
}

fn sums<T: Copy>(pins: &Pins, map: &str, of: &[T], index: impl Fn(T) -> u32) -> io::Result<Vec<(T, u64)>> {
    let counts: PerCpuFd<u64> = open(pins, map)?;
    of.iter()
        .map(|&one| Ok((one, counts.lookup(index(one))?.iter().sum())))
        .collect()
}

/// The verdicts of policies, as they are counted.
#[derive(Debug)]
pub struct VerdictCounts {
    rules: PerCpuFd<Hits>,
    sets: PerCpuFd<Hits>,
}

impl VerdictCounts {
    pub fn open(pins: &Pins) -> io::Result<Self> {
        Ok(Self {
            rules: open(pins, map_names::RULE_HITS)?,
            sets: open(pins, map_names::SET_HITS)?,
        })
    }

    fn map(&self, of: Counted) -> (&PerCpuFd<Hits>, u32) {
        match of {
            Counted::Rule(index) => (&self.rules, index),
            Counted::Set(id) => (&self.sets, id),
        }
    }

    /// Over all CPUs.
    pub fn read(&self, of: Counted) -> io::Result<Hits> {
        let (map, index) = self.map(of);
        let values = map.lookup(index)?;
        Ok(Hits {
            decided: values.iter().map(|hits| hits.decided).sum(),
            dry_run: values.iter().map(|hits| hits.dry_run).sum(),
        })
    }

    pub fn clear(&self, of: Counted) -> io::Result<()> {
        let (map, index) = self.map(of);
        map.clear(index)
    }
}

fn open<V: bytemuck::Pod>(pins: &Pins, map: &str) -> io::Result<PerCpuFd<V>> {
    PerCpuFd::new(pins.open_map(map)?, possible_cpus()?)
}

pub(super) fn possible_cpus() -> io::Result<usize> {
    let text = fs::read_to_string("/sys/devices/system/cpu/possible")?;
    let last = text
        .trim()
        .rsplit(['-', ','])
        .next()
        .and_then(|cpu| cpu.parse::<usize>().ok());
    last.map(|cpu| cpu + 1)
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_walk_with_bpftool_looks_up_the_reason_that_it_names() {
        let text = include_str!("../../../docs/bpftool.md");
        let row = Reason::PolicyDenied as u32;
        for said in [
            format!("counted from 0; {row} is\n`policy-denied`"),
            format!("COUNTERS key hex $(n {row})"),
            format!("{{ \"key\": {row}, \"values\""),
        ] {
            assert!(text.contains(&said), "{said}");
        }
    }
}

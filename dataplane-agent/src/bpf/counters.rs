//! `COUNTERS` and `FLOW_EVENTS`: how often each reason and each event in the life of a flow occurred.

use std::{fs, io, os::fd::AsFd};

use dataplane_common::{flow::FlowEvent, reason::Reason};

use super::{map_names, pins::Pins, sys};

/// Every reason with its count over all CPUs.
pub fn read(pins: &Pins) -> io::Result<Vec<(Reason, u64)>> {
    sums(pins, map_names::COUNTERS, Reason::ALL, |reason| reason as u32)
}

/// Every event with its count over all CPUs.
pub fn flow_events(pins: &Pins) -> io::Result<Vec<(FlowEvent, u64)>> {
    sums(pins, map_names::FLOW_EVENTS, FlowEvent::ALL, |event| event as u32)
}

fn sums<T: Copy>(pins: &Pins, map: &str, of: &[T], index: impl Fn(T) -> u32) -> io::Result<Vec<(T, u64)>> {
    let fd = pins.open_map(map)?;
    let cpus = possible_cpus()?;
    of.iter()
        .map(|&one| {
            let values = sys::lookup_per_cpu(fd.as_fd(), index(one), cpus)?;
            Ok((one, values.iter().sum()))
        })
        .collect()
}

fn possible_cpus() -> io::Result<usize> {
    let text = fs::read_to_string("/sys/devices/system/cpu/possible")?;
    let last = text
        .trim()
        .rsplit(['-', ','])
        .next()
        .and_then(|cpu| cpu.parse::<usize>().ok());
    last.map(|cpu| cpu + 1)
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

//! `COUNTERS`: how often each reason occurred.

use std::{fs, io, os::fd::AsFd};

use dataplane_common::reason::Reason;

use super::{map_names, pins::Pins, sys};

/// Every reason with its count over all CPUs.
pub fn read(pins: &Pins) -> io::Result<Vec<(Reason, u64)>> {
    let fd = pins.open_map(map_names::COUNTERS)?;
    let cpus = possible_cpus()?;
    Reason::ALL
        .iter()
        .map(|&reason| {
            let values = sys::lookup_per_cpu(fd.as_fd(), reason as u32, cpus)?;
            Ok((reason, values.iter().sum()))
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

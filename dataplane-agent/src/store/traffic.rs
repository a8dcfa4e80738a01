//! What went over services, backends and pods, as the tables have it. For commands: no agent has to run.

use std::{collections::HashMap, io, os::fd::AsFd, sync::atomic::Ordering};

use dataplane_common::{policy::VerdictBudget, traffic::Traffic};

use crate::bpf::{
    map_names as names,
    pins::Pins,
    sys::{MapFd, MappedArray},
};

/// 64-bit words of an element.
const WORDS: usize = size_of::<Traffic>() / size_of::<u64>();

/// The tables.
#[derive(Debug)]
pub struct TrafficTables {
    services: MappedArray,
    backends: MappedArray,
    told: MapFd<u32, VerdictBudget>,
}

impl TrafficTables {
    pub fn open(pins: &Pins) -> io::Result<Self> {
        let mapped = |name| MappedArray::new(pins.open_map(name)?.as_fd());
        Ok(Self {
            services: mapped(names::SERVICE_TRAFFIC)?,
            backends: mapped(names::BACKEND_TRAFFIC)?,
            told: MapFd::new(pins.open_map(names::VERDICTS_TOLD)?)?,
        })
    }

    /// By its index.
    #[must_use]
    pub fn service(&self, index: u32) -> Traffic {
        element(&self.services, index)
    }

    /// By its id.
    #[must_use]
    pub fn backend(&self, id: u32) -> Traffic {
        element(&self.backends, id)
    }

    /// Packets that were dropped, by the interface of the pod.
    pub fn drops(&self) -> io::Result<HashMap<u32, u64>> {
        let mut all = HashMap::new();
        self.told.for_each(|ifindex, told| {
            all.insert(*ifindex, told.dropped);
        })?;
        Ok(all)
    }
}

/// All zeros beyond the table's end.
fn element(of: &MappedArray, index: u32) -> Traffic {
    let start = index as usize * WORDS;
    let mut words = [0u64; WORDS];
    for (word, source) in words.iter_mut().zip(of.words().iter().skip(start)) {
        *word = source.load(Ordering::Relaxed);
    }
    bytemuck::cast(words)
}

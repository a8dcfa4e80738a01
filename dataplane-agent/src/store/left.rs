//! `FLOWS_V4`, `FLOWS_V6` and `MIDSTREAM`, written for connections that are left to netfilter ([`crate::takeover`]).

use std::io;

use dataplane_common::flow::{
    Flow4, Flow6, FlowKey4, FlowKey6, MIDSTREAM_LEFT, MIDSTREAM_LEFT_TCP, flow_flags,
};

use crate::{
    bpf::{map_names as names, pins::Pins, sys::MapFd},
    takeover::{Entries, is_counted},
};

/// The maps, opened from their pins.
#[derive(Debug)]
pub struct LeftFlows {
    v4: MapFd<FlowKey4, Flow4>,
    v6: MapFd<FlowKey6, Flow6>,
    midstream: MapFd<u32, u32>,
}

impl LeftFlows {
    pub fn open(pins: &Pins) -> io::Result<Self> {
        Ok(Self {
            v4: MapFd::new(pins.open_map(names::FLOWS_V4)?)?,
            v6: MapFd::new(pins.open_map(names::FLOWS_V6)?)?,
            midstream: MapFd::new(pins.open_map(names::MIDSTREAM)?)?,
        })
    }

    /// Leaves to netfilter all that no table knows and that may be in the middle of something. Before anything is served.
    pub fn begin(&self) -> io::Result<()> {
        self.midstream.update(&0, &MIDSTREAM_LEFT)
    }

    /// Whether connections are still to be entered.
    pub fn is_begun(&self) -> io::Result<bool> {
        let midstream = self.midstream.lookup(&0)?;
        Ok(midstream.is_some_and(|value| matches!(value, MIDSTREAM_LEFT | MIDSTREAM_LEFT_TCP)))
    }

    /// Leaves no datagrams any more.
    pub fn end_datagrams(&self) -> io::Result<()> {
        self.midstream.update(&0, &MIDSTREAM_LEFT_TCP)
    }

    /// All connections have been entered.
    pub fn end(&self) -> io::Result<()> {
        self.midstream.update(&0, &0)
    }

    /// Enters connections; what the datapath has entered itself stays.
    pub fn enter(&self, entries: &Entries) -> io::Result<()> {
        for (key, flow) in &entries.v4 {
            self.v4.insert(key, flow)?;
        }
        for (key, flow) in &entries.v6 {
            self.v6.insert(key, flow)?;
        }
        Ok(())
    }

    /// Connections that are left to netfilter.
    pub fn count(&self) -> io::Result<usize> {
        let mut count = 0;
        self.v4
            .for_each(|_, flow| count += usize::from(is_counted(&flow.meta)))?;
        self.v6
            .for_each(|_, flow| count += usize::from(is_counted(&flow.meta)))?;
        Ok(count)
    }

    /// Removes the entries of connections that netfilter has forgotten, which nobody would translate. `known`: those that it
    /// has not.
    pub fn keep(&self, known: &Entries) -> io::Result<()> {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        self.v4.for_each(|key, flow| {
            if flow.meta.flags & flow_flags::LEFT != 0 && !known.v4.contains_key(key) {
                v4.push(*key);
            }
        })?;
        self.v6.for_each(|key, flow| {
            if flow.meta.flags & flow_flags::LEFT != 0 && !known.v6.contains_key(key) {
                v6.push(*key);
            }
        })?;
        for key in &v4 {
            self.v4.delete(key)?;
        }
        for key in &v6 {
            self.v6.delete(key)?;
        }
        Ok(())
    }
}

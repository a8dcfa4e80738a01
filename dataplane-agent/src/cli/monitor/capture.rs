//! The packets of events as pcapng, which Wireshark opens: an interface for each device, and in each packet's comment what became of it.

use std::{borrow::Cow, collections::HashMap, io::Write, time::Duration};

use anyhow::Context;
use dataplane_common::monitor::Event;
use pcap_file::{
    DataLink,
    pcapng::{
        PcapNgWriter,
        blocks::{
            enhanced_packet::{EnhancedPacketBlock, EnhancedPacketOption},
            interface_description::{InterfaceDescriptionBlock, InterfaceDescriptionOption},
        },
    },
};

use super::seen::Seen;

/// Fractions of a second in the file: nanoseconds.
const RESOLUTION: u8 = 9;

/// A file in the making.
pub struct Capture<W: Write> {
    writer: PcapNgWriter<W>,
    /// Numbers of interfaces, by device and whether its packets have a link-layer header.
    interfaces: HashMap<(u32, bool), u32>,
}

impl<W: Write> Capture<W> {
    pub fn begin(to: W) -> anyhow::Result<Self> {
        let writer = PcapNgWriter::new(to).context("failed to write packets")?;
        Ok(Self {
            writer,
            interfaces: HashMap::new(),
        })
    }

    pub fn write(&mut self, seen: &Seen, event: &Event) -> anyhow::Result<()> {
        let interface_id = self.interface(seen, event)?;
        let since = seen.time.duration_since(jiff::Timestamp::UNIX_EPOCH);
        let bytes = &event.bytes[..usize::from(event.captured).min(event.bytes.len())];
        let comment = seen.to_string();
        let block = EnhancedPacketBlock {
            interface_id,
            timestamp: Duration::try_from(since).unwrap_or_default(),
            original_len: event.length,
            data: Cow::Borrowed(bytes),
            options: vec![EnhancedPacketOption::Comment(Cow::Owned(comment))],
        };
        self.writer
            .write_pcapng_block(block)
            .context("failed to write a packet")?;
        self.writer.get_mut().flush().context("failed to write a packet")
    }

    fn interface(&mut self, seen: &Seen, event: &Event) -> anyhow::Result<u32> {
        let key = (event.ifindex, event.l3 != 0);
        if let Some(known) = self.interfaces.get(&key) {
            return Ok(*known);
        }
        let linktype = if event.l3 == 0 {
            DataLink::RAW
        } else {
            DataLink::ETHERNET
        };
        let block = InterfaceDescriptionBlock {
            linktype,
            snaplen: 0,
            options: vec![
                InterfaceDescriptionOption::IfName(Cow::Owned(seen.device.clone())),
                InterfaceDescriptionOption::IfTsResol(RESOLUTION),
            ],
        };
        self.writer
            .write_pcapng_block(block)
            .context("failed to write an interface")?;
        let number = u32::try_from(self.interfaces.len()).unwrap_or(u32::MAX);
        self.interfaces.insert(key, number);
        Ok(number)
    }
}

//! What is in the tables of an object for a row's packets.

use anyhow::Result;
use bytemuck::{Pod, Zeroable};
use dataplane_common::service::{
    Affinity, AffinityKey4, Frontend, FrontendKey4, RANGE_SERVICE_BITS, Scope, SourceRange4, service_flags,
};
use dataplane_common::source::{Source4, source_place};
use dataplane_tests::test_run::{
    CLIENT, Device, PORT, SERVICE, TCP,
    tables::{Filling, ID, now_ticks},
    word,
};

use crate::cases::{Case, Tables};

/// Source ranges of other services than the one.
const OTHER_RANGES: u32 = 1000;
/// Entries that `RANGES_V4` needs room for.
pub const RANGES: u32 = OTHER_RANGES + 1;

/// A key of `RANGES_V4`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct RangeKey {
    prefix_len: u32,
    range: SourceRange4,
}

/// One service with one backend, and what the case asks for.
pub fn fill(filling: &Filling<'_>, case: &Case, flows: u32, device: &Device) -> Result<()> {
    if case.port_in_use {
        filling.port()?;
    }
    let flags = match case.tables {
        Tables::Affinity => service_flags::AFFINITY,
        Tables::Ranges => service_flags::RANGES,
        _ => 0,
    };
    filling.service(flags, case.program == "from_netdev", device)?;
    if case.checks_sources && !filling.older {
        let own = Source4 {
            addr_be: CLIENT.to_be(),
            ifindex: device.ifindex,
        };
        filling.write("SOURCES_V4", &source_place(device.ifindex), &own)?;
    }
    match case.tables {
        Tables::None => Ok(()),
        Tables::Frontend | Tables::Affinity | Tables::Ranges => {
            let key = FrontendKey4 {
                addr_be: word(SERVICE),
                port_be: PORT.to_be(),
                proto: TCP,
                scope: Scope::Internal as u8,
            };
            let frontend = Frontend {
                service: ID,
                owner: 0,
            };
            filling.write("FRONTENDS_V4", &key, &frontend)?;
            match case.tables {
                Tables::Affinity => fill_affinity(filling, flows),
                Tables::Ranges => fill_ranges(filling),
                _ => Ok(()),
            }
        }
        Tables::Flows => filling.flows(false, CLIENT, flows, 0).map(drop),
        Tables::RoutedFlows => filling.flows(true, CLIENT, flows, 0).map(drop),
    }
}

/// Every client of the walk, with the one backend.
fn fill_affinity(filling: &Filling<'_>, flows: u32) -> Result<()> {
    let seen_eighths = now_ticks()? << 3;
    for client in 0..flows.div_ceil(1 << 15) {
        let key = AffinityKey4 {
            service: ID,
            service_generation: 1,
            addr_be: (CLIENT + client).to_be(),
        };
        let affinity = Affinity {
            backend: ID,
            backend_generation: 1,
            seen_eighths,
        };
        filling.write("AFFINITY_V4", &key, &affinity)?;
    }
    Ok(())
}

/// The network that all clients are in, for the one service and for others.
fn fill_ranges(filling: &Filling<'_>) -> Result<()> {
    let addr_be = (CLIENT & 0xff00_0000).to_be();
    for service in ID..=ID + OTHER_RANGES {
        let key = RangeKey {
            prefix_len: RANGE_SERVICE_BITS + 8,
            range: SourceRange4 { service, addr_be },
        };
        filling.write("RANGES_V4", &key, &1u32)?;
    }
    Ok(())
}

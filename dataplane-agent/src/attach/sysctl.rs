//! Kernel parameters. We change `net.ipv4.conf.lo.accept_local` alone: replies to this host's own clients re-enter at `lo` with an address of this host
//! as their source, which the kernel would drop.

use std::{fs, io};

use super::state::{State, StateError};
use crate::config::PortRange;

const PATH: &str = "/proc/sys/net/ipv4/conf/lo/accept_local";

/// The setting could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum SysctlError {
    #[error(
        "failed to {verb} {PATH}: host processes cannot reach this node's own node ports without it; set it to 1, or make it writable"
    )]
    Io {
        verb: &'static str,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    State(#[from] StateError),
}

/// Switches it on, remembering what it was.
pub fn enable(state: &mut State) -> Result<(), SysctlError> {
    let before = fs::read_to_string(PATH).map_err(|source| SysctlError::Io { verb: "read", source })?;
    let before = before.trim();
    if before == "1" {
        return Ok(());
    }
    state.change(|record| {
        record.accept_local.get_or_insert_with(|| before.to_owned());
    })?;
    fs::write(PATH, "1").map_err(|source| SysctlError::Io {
        verb: "write",
        source,
    })
}

/// Puts it back.
pub fn restore(state: &State) -> Result<(), SysctlError> {
    match &state.record.accept_local {
        Some(before) => fs::write(PATH, before).map_err(|source| SysctlError::Io {
            verb: "write",
            source,
        }),
        None => Ok(()),
    }
}

/// The ports that the kernel gives to this host's own connections.
pub fn local_ports() -> Option<PortRange> {
    let text = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").ok()?;
    let mut ports = text.split_whitespace().map(|port| port.parse().ok());
    Some(PortRange {
        min: ports.next()??,
        max: ports.next()??,
    })
}

/// Whether the kernel leaves all of these ports out.
pub fn is_reserved(ports: PortRange) -> bool {
    let text = fs::read_to_string("/proc/sys/net/ipv4/ip_local_reserved_ports").unwrap_or_default();
    covers(&text, ports)
}

/// Whether a list such as `8080,61000-65535`, sorted as the kernel writes it, holds all of these ports.
fn covers(list: &str, ports: PortRange) -> bool {
    let mut next = ports.min;
    for range in list.trim().split(',') {
        let (min, max) = range.split_once('-').unwrap_or((range, range));
        let (Ok(min), Ok(max)) = (min.parse::<u16>(), max.parse::<u16>()) else {
            continue;
        };
        if (min..=max).contains(&next) {
            if max >= ports.max {
                return true;
            }
            next = max + 1;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_may_be_reserved_in_parts() {
        let ports = "61000-65535".parse().unwrap();
        for (list, expected) in [
            ("\n", false),
            ("61000-65535\n", true),
            ("80,1024-65535\n", true),
            ("61000,61001-63000,63001-65535\n", true),
            ("61000-63000,63002-65535\n", false),
            ("61001-65535\n", false),
        ] {
            assert_eq!(covers(list, ports), expected, "{list}");
        }
    }
}

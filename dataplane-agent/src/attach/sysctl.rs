//! Kernel parameters. We change two of `lo`, and no other device's:
//!
//! - `accept_local`: replies to this host's own clients re-enter at `lo` with an address of this host as their source,
//!   which the kernel would drop.
//! - `route_localnet`, with `--localhost-node-ports` alone: the same for 127.0.0.1 as source and destination. Only packets
//!   of this host enter at `lo`; those that come from outside are judged by their own device's setting, which stays.
//!
//! Where `/proc/sys` is read-only, as in a container, rtnetlink sets them.

use std::{fs, io};

use super::state::{Record, State, StateError};
use crate::{
    config::PortRange,
    netlink::devconf::{self, Parameter},
};

/// A switch of `lo`.
#[derive(Clone, Copy, Debug)]
pub struct Switch {
    path: &'static str,
    parameter: Parameter,
    /// What does not work without it.
    need: &'static str,
    /// Where its value before ours is kept.
    before: fn(&mut Record) -> &mut Option<String>,
}

pub const ACCEPT_LOCAL: Switch = Switch {
    path: "/proc/sys/net/ipv4/conf/lo/accept_local",
    parameter: Parameter::AcceptLocal,
    need: "host processes cannot reach this node's own node ports",
    before: |record| &mut record.accept_local,
};

pub const ROUTE_LOCALNET: Switch = Switch {
    path: "/proc/sys/net/ipv4/conf/lo/route_localnet",
    parameter: Parameter::RouteLocalnet,
    need: "host processes cannot reach node ports at 127.0.0.1",
    before: |record| &mut record.route_localnet,
};

/// The setting could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum SysctlError {
    #[error("failed to {verb} {}: {} without it; set it to 1, or make it writable", switch.path, switch.need)]
    Io {
        verb: &'static str,
        switch: Switch,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    State(#[from] StateError),
}

impl Switch {
    /// Switches it on, remembering what it was.
    pub fn enable(self, state: &mut State) -> Result<(), SysctlError> {
        let before = fs::read_to_string(self.path).map_err(self.failed_to("read"))?;
        let before = before.trim();
        if before == "1" {
            return Ok(());
        }
        state.change(|record| {
            (self.before)(record).get_or_insert_with(|| before.to_owned());
        })?;
        self.write("1")
    }

    /// Puts it back, if it was ours.
    pub fn restore(self, state: &mut State) -> Result<(), SysctlError> {
        let Some(before) = (self.before)(&mut state.record).clone() else {
            return Ok(());
        };
        self.write(&before)?;
        Ok(state.change(|record| *(self.before)(record) = None)?)
    }

    fn write(self, value: &str) -> Result<(), SysctlError> {
        // The loopback device is the first of every network namespace.
        const LOOPBACK: u32 = 1;
        let written = match fs::write(self.path, value) {
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied
                ) =>
            {
                match value.parse() {
                    Ok(number) => devconf::set(LOOPBACK, self.parameter, number),
                    Err(_) => Err(error),
                }
            }
            outcome => outcome,
        };
        written.map_err(self.failed_to("write"))
    }

    fn failed_to(self, verb: &'static str) -> impl FnOnce(io::Error) -> SysctlError {
        move |source| SysctlError::Io {
            verb,
            switch: self,
            source,
        }
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

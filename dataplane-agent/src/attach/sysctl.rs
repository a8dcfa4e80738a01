//! `net.ipv4.conf.lo.accept_local`: replies to this host's own clients re-enter at `lo` with an address of this host
//! as their source, which the kernel would drop.

use std::{fs, io};

use super::state::{State, StateError};

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

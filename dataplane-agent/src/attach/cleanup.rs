//! Puts the machine back as it was before the first start: links, programs, maps and pins go, qdiscs and settings that
//! were ours are undone, and nobody else's are touched. Whatever is missing already is success.

use std::{fs, io, path::Path};

use super::{state::State, state::StateError, sysctl, sysctl::SysctlError};
use crate::{
    bpf::{
        Hook,
        pins::{PinError, Pins},
    },
    netlink::{filters, socket::RequestSocket, tables},
};

/// Something could not be undone.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Pin(#[from] PinError),
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    #[error("failed to remove the filters of clsact qdiscs")]
    Filters(#[source] io::Error),
}

/// Removes all that agents with this `--bpffs` have made. Must be called in the network namespace of the host.
pub fn cleanup(bpffs: &Path) -> Result<(), CleanupError> {
    let state = State::lock(bpffs)?;
    // Links go with their pins, and with the last of those the programs and maps.
    Pins::new(bpffs).remove()?;
    remove_filters(&state).map_err(CleanupError::Filters)?;
    sysctl::restore(&state)?;
    if let Some(socket) = &state.record.socket {
        // A killed agent's. It is gone already after a stop.
        let _ = fs::remove_file(socket);
    }
    for folder in state.record.made_folders.iter().rev() {
        // Stays if somebody else uses it by now.
        let _ = fs::remove_dir(folder);
    }
    state.remove()?;
    Ok(())
}

fn remove_filters(state: &State) -> io::Result<()> {
    let mut socket = RequestSocket::open()?;
    for link in tables::dump_links(&mut socket)? {
        let made = state.record.clsact.get(&link.ifindex) == Some(&link.name);
        let mut others = false;
        for hook in [Hook::TcIngress, Hook::TcEgress] {
            let found = filters::list(&mut socket, link.ifindex, hook)?;
            if found.iter().any(|filter| filter.program().is_some()) {
                filters::remove(&mut socket, link.ifindex, hook)?;
            }
            others |= found.iter().any(|filter| filter.program().is_none());
        }
        if made && !others {
            filters::remove_clsact(&mut socket, link.ifindex)?;
        }
    }
    Ok(())
}

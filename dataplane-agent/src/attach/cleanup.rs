//! Puts the machine back as it was before the first start: links, programs, maps and pins go, qdiscs and settings that
//! were ours are undone, and nobody else's are touched. Whatever is missing already is success.

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use super::{state::State, state::StateError, sysctl, sysctl::SysctlError};
use crate::{
    bpf::{
        Hook,
        links::{LinkError, Links},
        pins::{PinError, Pins},
        sys,
    },
    netlink::{filters, nat, socket::RequestSocket, tables},
};

/// Some grace periods, on a busy machine.
const FREED_WITHIN: Duration = Duration::from_secs(3);
const FREED_POLL: Duration = Duration::from_millis(10);

/// Something could not be undone.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Pin(#[from] PinError),
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    #[error("failed to remove the filters of clsact qdiscs")]
    Filters(#[source] io::Error),
    #[error("failed to remove the nftables table that keeps netfilter's NAT")]
    Nat(#[source] io::Error),
}

/// Removes all that agents with this `--bpffs` have made. Must be called in the network namespace of the host.
pub fn cleanup(bpffs: &Path) -> Result<(), CleanupError> {
    let mut state = State::lock(bpffs)?;
    let mut objects = Objects {
        programs: Vec::new(),
        maps: Vec::new(),
    };
    for pins in Pins::all(bpffs)? {
        let links = Links::new(&pins);
        objects.maps.extend(pins.map_ids());
        for link in pins.list_links()? {
            objects.programs.extend(links.program_id(link));
            links.drop(link)?;
        }
        // With the last pins go the programs and maps.
        pins.remove()?;
    }
    remove_filters(&state, &mut objects.programs).map_err(CleanupError::Filters)?;
    nat::release().map_err(CleanupError::Nat)?;
    for switch in [sysctl::ACCEPT_LOCAL, sysctl::ROUTE_LOCALNET] {
        switch.restore(&mut state)?;
    }
    if let Some(socket) = &state.record.socket {
        // A killed agent's. It is gone already after a stop.
        let _ = fs::remove_file(socket);
    }
    for folder in state.record.made_folders.iter().rev() {
        // Stays if somebody else uses it by now.
        let _ = fs::remove_dir(folder);
    }
    state.remove()?;
    objects.wait_until_freed();
    Ok(())
}

/// What the kernel frees some grace periods after nobody holds it any more.
struct Objects {
    programs: Vec<u32>,
    maps: Vec<u32>,
}

impl Objects {
    /// Waits, but not for ever: somebody may look at one at this moment. Without `CAP_SYS_ADMIN` nothing can be told.
    fn wait_until_freed(&self) {
        let lives = |found: io::Result<OwnedFd>| found.is_ok();
        let deadline = Instant::now() + FREED_WITHIN;
        while Instant::now() < deadline
            && (self.programs.iter().any(|&id| lives(sys::prog_by_id(id)))
                || self.maps.iter().any(|&id| lives(sys::map_by_id(id))))
        {
            thread::sleep(FREED_POLL);
        }
    }
}

/// Adds the removed filters' programs to `programs`.
fn remove_filters(state: &State, programs: &mut Vec<u32>) -> io::Result<()> {
    let mut socket = RequestSocket::open()?;
    for link in tables::dump_links(&mut socket)? {
        let made = state.record.clsact.get(&link.ifindex) == Some(&link.name);
        for hook in [Hook::TcIngress, Hook::TcEgress] {
            let found = filters::list(&mut socket, link.ifindex, hook)?;
            let ours: Vec<_> = found.iter().filter(|filter| filter.program().is_some()).collect();
            if !ours.is_empty() {
                programs.extend(ours.iter().map(|filter| filter.prog_id));
                filters::remove(&mut socket, link.ifindex, hook)?;
            }
        }
        if made {
            filters::remove_unused_clsact(&mut socket, link.ifindex)?;
        }
    }
    Ok(())
}

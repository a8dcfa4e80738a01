//! Keeps programs attached to the devices, pod interfaces and cgroup that should have them.
//!
//! Links are pinned, so everything stays attached when the agent stops; the next start gives every pinned link the
//! new program in place ([`Attacher::adopt`]) before it looks at what else is needed ([`Attacher::reconcile`]).

pub mod cleanup;
mod early;
pub mod inspect;
pub mod observe;
mod room;
pub mod start;
pub mod state;
pub mod sysctl;
pub mod unknown;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use crate::{
    bpf::{
        Hook, Program,
        links::{Cgroup, LinkError, Links},
        loader::{LoadError, Loaded},
        pins::{LinkName, PinError},
    },
    host::Claim,
    netlink::{filters, pods::InterfaceId, socket::RequestSocket, tables::Link},
};
use state::{Record, State, StateError};

/// Something is not attached as it should be. It is tried again.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(
        "failed to attach {link} by a clsact qdisc (this needs the kernel modules sch_ingress and cls_bpf)"
    )]
    Filter {
        link: LinkName,
        #[source]
        source: io::Error,
    },
    #[error("failed to detach {link} from its clsact qdisc")]
    Detach {
        link: LinkName,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Pin(#[from] PinError),
}

/// The programs, and where they are attached.
#[derive(Debug)]
pub struct Attacher {
    loaded: Loaded,
    links: Links,
    state: State,
    cgroup: Option<Cgroup>,
    tcx: bool,
    attached: BTreeSet<LinkName>,
    /// Devices whose driver refused XDP, with the reason; forgotten by [`Self::verify`].
    refused: BTreeMap<u32, String>,
    /// Interfaces that got their programs since the last look at the machine began.
    early: BTreeSet<u32>,
    /// Interfaces that get none before the next look; `None`: no look has said.
    settled: Option<BTreeSet<u32>>,
}

impl Attacher {
    pub fn new(loaded: Loaded, state: State, cgroup: Option<Cgroup>, tcx: bool) -> Self {
        let links = Links::new(&loaded.pins);
        Self {
            loaded,
            links,
            state,
            cgroup,
            tcx,
            attached: BTreeSet::new(),
            refused: BTreeMap::new(),
            early: BTreeSet::new(),
            settled: None,
        }
    }

    pub fn is_attached(&self, program: Program, ifindex: u32) -> bool {
        self.attached.contains(&LinkName { program, ifindex })
    }

    /// Devices that are left to TC alone, with the reason.
    pub fn refused(&self) -> impl Iterator<Item = (u32, &str)> {
        self.refused
            .iter()
            .map(|(&ifindex, reason)| (ifindex, reason.as_str()))
    }

    /// Gives the links of a former run, or of another version's, the new programs, and drops those that are dead, whose program this run does
    /// not use, or that are at another cgroup.
    pub fn adopt(&mut self, socket: &mut RequestSocket, devices: &[Link]) -> Result<(), AttachError> {
        self.loaded.move_links()?;
        for link in self.loaded.pins.list_links()? {
            if link.program.is_late() {
                self.loaded.load_late()?;
            }
            let replaced = match self.loaded.program(link.program) {
                Some(program) if self.is_in_place(link) => self.links.replace(link, program)?,
                _ => false,
            };
            if replaced {
                self.attached.insert(link);
            } else {
                self.links.drop(link)?;
            }
        }
        if !self.tcx {
            self.adopt_filters(socket, devices)?;
        }
        Ok(self.loaded.finish()?)
    }

    fn is_in_place(&self, link: LinkName) -> bool {
        let target = self.links.target(link);
        match &self.cgroup {
            Some(cgroup) if link.program.is_cgroup() => target == Some(cgroup.id()),
            _ => target.is_some(),
        }
    }

    fn adopt_filters(&mut self, socket: &mut RequestSocket, devices: &[Link]) -> Result<(), AttachError> {
        for link in devices {
            for hook in [Hook::TcIngress, Hook::TcEgress] {
                for program in filters::list(socket, link.ifindex, hook)
                    .unwrap_or_default()
                    .iter()
                    .filter_map(filters::Filter::program)
                {
                    self.attach(
                        socket,
                        LinkName {
                            program,
                            ifindex: link.ifindex,
                        },
                        devices,
                    )?;
                }
            }
        }
        Ok(())
    }

    /// Attaches what is wanted and not yet attached, then detaches what is attached and neither wanted nor kept.
    /// An error at one hook does not keep the others from being served.
    pub fn reconcile(
        &mut self,
        socket: &mut RequestSocket,
        devices: &[Link],
        wanted: &BTreeSet<LinkName>,
        keep: impl Fn(LinkName) -> bool,
    ) -> Vec<AttachError> {
        let mut errors = Vec::new();
        let missing: Vec<LinkName> = wanted.difference(&self.attached).copied().collect();
        for link in missing {
            if link.program == Program::Xdp && self.refused.contains_key(&link.ifindex) {
                continue;
            }
            match self.attach(socket, link, devices) {
                Ok(()) => {}
                Err(AttachError::Link(error)) if link.program == Program::Xdp => {
                    self.refuse(link, &error, devices);
                }
                Err(error) => errors.push(error),
            }
        }
        let exists = |ifindex: u32| ifindex == 0 || devices.iter().any(|device| device.ifindex == ifindex);
        let surplus: Vec<LinkName> = self
            .attached
            .difference(wanted)
            .copied()
            .filter(|&link| !(keep(link) && exists(link.ifindex)))
            // Younger than what was seen.
            .filter(|link| !self.early.contains(&link.ifindex))
            .collect();
        for link in surplus {
            if let Err(error) = self.detach(socket, link) {
                errors.push(error);
            }
        }
        self.refused.retain(|&ifindex, _| exists(ifindex));
        let refused = self.refused.clone();
        if let Err(error) = self.state.change(|record| {
            record.xdp_fallback = refused;
            record.clsact.retain(|&ifindex, _| exists(ifindex));
        }) {
            errors.push(error.into());
        }
        errors
    }

    /// Forgets links that somebody has removed, or that died with their device, so that [`Self::reconcile`] makes
    /// them again; and tries XDP again where it was refused.
    pub fn verify(&mut self, socket: &mut RequestSocket) {
        self.refused.clear();
        let tcx = self.tcx;
        let links = &self.links;
        self.attached.retain(|&link| match link.program.hook() {
            hook @ (Hook::TcIngress | Hook::TcEgress) if !tcx => filters::list(socket, link.ifindex, hook)
                .is_ok_and(|found| found.iter().any(|filter| filter.program() == Some(link.program))),
            _ => links.target(link).is_some(),
        });
    }

    fn attach(
        &mut self,
        socket: &mut RequestSocket,
        link: LinkName,
        devices: &[Link],
    ) -> Result<(), AttachError> {
        if link.program.is_late() {
            self.loaded.load_late()?;
        }
        let Some(program) = self.loaded.program(link.program) else {
            return Ok(());
        };
        match link.program.hook() {
            Hook::Cgroup(_) => {
                let Some(cgroup) = &self.cgroup else { return Ok(()) };
                self.links.ensure_cgroup(link.program, program, cgroup)?;
            }
            Hook::TcIngress | Hook::TcEgress if !self.tcx => {
                let made = attach_filter(socket, link, program)?;
                if made {
                    let name = devices.iter().find(|device| device.ifindex == link.ifindex);
                    let name = name.map(|device| device.name.clone()).unwrap_or_default();
                    self.state
                        .change(|record| drop(record.clsact.insert(link.ifindex, name)))?;
                }
            }
            _ => drop(self.links.ensure_device(link, program)?),
        }
        self.attached.insert(link);
        Ok(())
    }

    fn detach(&mut self, socket: &mut RequestSocket, link: LinkName) -> Result<(), AttachError> {
        match link.program.hook() {
            hook @ (Hook::TcIngress | Hook::TcEgress) if !self.tcx => {
                filters::remove(socket, link.ifindex, hook)
                    .map_err(|source| AttachError::Detach { link, source })?;
                let last = !self
                    .attached
                    .iter()
                    .any(|other| *other != link && other.ifindex == link.ifindex);
                if last && self.state.record.clsact.contains_key(&link.ifindex) {
                    filters::remove_unused_clsact(socket, link.ifindex)
                        .map_err(|source| AttachError::Detach { link, source })?;
                    self.state
                        .change(|record| drop(record.clsact.remove(&link.ifindex)))?;
                }
            }
            _ => self.links.drop(link)?,
        }
        self.attached.remove(&link);
        Ok(())
    }

    /// A look at the machine begins: it sees what has come early.
    pub fn begin_look(&mut self) {
        self.early.clear();
    }

    /// A look at the machine has ended, which decided about these interfaces.
    pub fn settle(&mut self, settled: BTreeSet<u32>) {
        self.settled = Some(settled);
    }

    /// Gives a new interface that may be a pod's its programs, before anybody has looked whose it is. False: it is not new.
    pub fn close_early(&mut self, socket: &mut RequestSocket, link: &Link) -> Result<bool, AttachError> {
        let settled = self.settled.as_ref();
        if settled.is_none_or(|settled| settled.contains(&link.ifindex)) {
            return Ok(false);
        }
        let programs = [Program::ToPod, Program::FromPod].map(|program| LinkName {
            program,
            ifindex: link.ifindex,
        });
        if programs.iter().all(|name| self.attached.contains(name)) {
            return Ok(false);
        }
        self.early.insert(link.ifindex);
        for name in programs {
            self.attach(socket, name, std::slice::from_ref(link))?;
        }
        Ok(true)
    }

    /// What was left alone and what CNI plugins have told, for the next start.
    pub fn remember(
        &mut self,
        left: BTreeSet<InterfaceId>,
        claims: BTreeMap<String, Claim>,
    ) -> Result<(), AttachError> {
        let change = |record: &mut Record| {
            record.left_interfaces = left;
            record.claims = claims;
        };
        Ok(self.state.change(change)?)
    }

    /// What [`Self::remember`] was told last.
    pub fn record(&self) -> &Record {
        &self.state.record
    }

    /// Notes why a device gets no XDP, before anybody tries.
    pub fn leave_to_tc(&mut self, device: &Link, reason: String) {
        if self.state.record.xdp_fallback.get(&device.ifindex) != Some(&reason) {
            tracing::info!(
                device = device.name,
                reason,
                "no XDP: TC does all the work on this device"
            );
        }
        self.refused.insert(device.ifindex, reason);
    }

    fn refuse(&mut self, link: LinkName, error: &LinkError, devices: &[Link]) {
        let reason = match error.errno() {
            Some(libc::EOPNOTSUPP) => "the driver has no XDP".to_owned(),
            Some(libc::EBUSY | libc::EEXIST) => "another XDP program is attached".to_owned(),
            Some(libc::EINVAL | libc::ERANGE | libc::E2BIG) => {
                "the driver refuses XDP with the device's present settings (MTU, queues)".to_owned()
            }
            _ => std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string),
        };
        if let Some(device) = devices.iter().find(|device| device.ifindex == link.ifindex) {
            self.leave_to_tc(device, reason);
        }
    }
}

/// Returns whether the qdisc was made.
fn attach_filter(
    socket: &mut RequestSocket,
    link: LinkName,
    program: BorrowedFd<'_>,
) -> Result<bool, AttachError> {
    let made = filters::ensure_clsact(socket, link.ifindex)
        .map_err(|source| AttachError::Filter { link, source })?;
    filters::put(
        socket,
        link.ifindex,
        link.program,
        program.as_raw_fd().cast_unsigned(),
    )
    .map_err(|source| AttachError::Filter { link, source })?;
    Ok(made)
}

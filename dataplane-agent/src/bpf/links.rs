//! Pinned links: attach, replace in place, drop.

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use super::{
    Hook, Program,
    pins::{LinkName, Pins},
    sys,
};

/// `XDP_FLAGS_DRV_MODE`.
const XDP_DRIVER_MODE: u32 = 1 << 2;
/// `BPF_F_BEFORE`; without a relative program it means the first place.
const FIRST: u32 = 1 << 3;

/// A hook that could not be taken or left.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("failed to attach {link}")]
    Attach {
        link: LinkName,
        #[source]
        source: io::Error,
    },
    #[error("failed to pin {link}")]
    Pin {
        link: LinkName,
        #[source]
        source: io::Error,
    },
    #[error("failed to replace the program of {link}")]
    Replace {
        link: LinkName,
        #[source]
        source: io::Error,
    },
    #[error("failed to drop {link}")]
    Drop {
        link: LinkName,
        #[source]
        source: io::Error,
    },
    #[error("failed to open {path}: is it a cgroup? Name one with --cgroup")]
    Cgroup {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl LinkError {
    /// The system's error number.
    pub fn errno(&self) -> Option<i32> {
        match self {
            LinkError::Attach { source, .. }
            | LinkError::Pin { source, .. }
            | LinkError::Replace { source, .. }
            | LinkError::Drop { source, .. }
            | LinkError::Cgroup { source, .. } => source.raw_os_error(),
        }
    }
}

/// An open cgroup directory.
#[derive(Debug)]
pub struct Cgroup {
    folder: fs::File,
    id: u64,
}

impl Cgroup {
    pub fn open(path: &Path) -> Result<Self, LinkError> {
        let cgroup_error = |source| LinkError::Cgroup {
            path: path.to_owned(),
            source,
        };
        let folder = fs::File::open(path).map_err(cgroup_error)?;
        // A cgroup's id is its directory's inode number.
        let id = folder.metadata().map_err(cgroup_error)?.ino();
        Ok(Self { folder, id })
    }

    /// As [`Links::target`] tells it.
    pub fn id(&self) -> u64 {
        self.id
    }

    pub fn target(&self) -> u32 {
        self.folder.as_raw_fd().cast_unsigned()
    }
}

/// What [`Links::ensure`] had to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ensured {
    Replaced,
    Attached,
}

/// The links under one pin folder.
#[derive(Clone, Debug)]
pub struct Links {
    pins: Pins,
}

impl Links {
    pub fn new(pins: &Pins) -> Self {
        Self { pins: pins.clone() }
    }

    /// Attaches `program` to a device: a living pinned link gets the program in place, else a new link is made and
    /// pinned.
    pub fn ensure_device(&self, link: LinkName, program: BorrowedFd<'_>) -> Result<Ensured, LinkError> {
        self.ensure(link, program, link.ifindex, u64::from(link.ifindex))
    }

    /// As [`Self::ensure_device`], for a cgroup. A link to another cgroup is dropped.
    pub fn ensure_cgroup(
        &self,
        program: Program,
        fd: BorrowedFd<'_>,
        cgroup: &Cgroup,
    ) -> Result<Ensured, LinkError> {
        self.ensure(LinkName { program, ifindex: 0 }, fd, cgroup.target(), cgroup.id)
    }

    fn ensure(
        &self,
        link: LinkName,
        program: BorrowedFd<'_>,
        target: u32,
        id: u64,
    ) -> Result<Ensured, LinkError> {
        if self.target(link) == Some(id) {
            match self.replace(link, program) {
                Ok(true) => return Ok(Ensured::Replaced),
                Ok(false) => {}
                Err(error) => return Err(error),
            }
        }
        self.drop(link)?;
        let flags = match link.program.hook() {
            Hook::Xdp => XDP_DRIVER_MODE,
            Hook::TcIngress | Hook::TcEgress => FIRST,
            Hook::Cgroup(_) => 0,
        };
        let fd = sys::link_create(program, target, link.program.hook().attach_type(), flags)
            .map_err(|source| LinkError::Attach { link, source })?;
        sys::pin(fd.as_fd(), &self.pins.link(link)).map_err(|source| LinkError::Pin { link, source })?;
        Ok(Ensured::Attached)
    }

    /// Gives the pinned link another program. False: the link is dead or not there.
    pub fn replace(&self, link: LinkName, program: BorrowedFd<'_>) -> Result<bool, LinkError> {
        let error = |source| LinkError::Replace { link, source };
        let fd = match sys::open_pin(&self.pins.link(link)) {
            Ok(fd) => fd,
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(source) => return Err(error(source)),
        };
        match sys::link_update(fd.as_fd(), program) {
            Ok(()) => Ok(true),
            Err(source) if source.raw_os_error() == Some(libc::ENOLINK) => Ok(false),
            Err(source) => Err(error(source)),
        }
    }

    /// What the pinned link is attached to: an ifindex or a cgroup's id; none when it is dead or not there.
    pub fn target(&self, link: LinkName) -> Option<u64> {
        let fd = sys::open_pin(&self.pins.link(link)).ok()?;
        let info = sys::link_info(fd.as_fd()).ok()?;
        let id = match link.program.hook() {
            Hook::Cgroup(_) => u64::from(info.word0) | u64::from(info.word1) << 32,
            _ => u64::from(info.word0),
        };
        (id != 0).then_some(id)
    }

    /// The program that the pinned link runs.
    pub fn program_id(&self, link: LinkName) -> Option<u32> {
        let fd = sys::open_pin(&self.pins.link(link)).ok()?;
        sys::link_info(fd.as_fd()).ok().map(|info| info.prog_id)
    }

    /// Detaches, and removes the pin; a link that is not there is success.
    pub fn drop(&self, link: LinkName) -> Result<(), LinkError> {
        let path = self.pins.link(link);
        // Without its pin the link would end too, but at some later moment.
        let _dead = sys::open_pin(&path).and_then(|fd| sys::link_detach(fd.as_fd()));
        match fs::remove_file(path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(LinkError::Drop { link, source }),
            _ => Ok(()),
        }
    }
}

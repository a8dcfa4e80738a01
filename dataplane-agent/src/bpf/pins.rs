//! The folder in the BPF filesystem: `<bpffs>/dataplane-v…/` with `maps/` and `links/`. The number is that of the
//! maps' layout; what a folder of another number holds was made by another version of the agent, and is taken over
//! (`bpf/upgrade`). A folder that is being made has a name of its own until it is complete.

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use super::{Program, sys};
use crate::path_error::PathError;

/// Changes when a map's key or value changes its layout.
pub const SCHEMA_VERSION: u32 = 7;

const FOLDER_PREFIX: &str = "dataplane-v";
/// Ends the name of a folder that is not complete. In bpffs names have no dots.
const UNFINISHED: &str = "-new";
/// Ends, with a number behind, the name of a complete folder whose tables have other sizes.
const FORMER: &str = "-former";
/// `BPF_FS_MAGIC`.
const BPF_FS_MAGIC: u32 = 0xcafe_4a11;

/// The folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    #[error(
        "no BPF filesystem is mounted at {path}: mount it with `mount -t bpf bpf {mount}`, or name another with --bpffs"
    )]
    NoBpffs { path: PathBuf, mount: PathBuf },
    #[error(transparent)]
    Path(#[from] PathError),
}

/// Names in the pin folder.
#[derive(Clone, Debug)]
pub struct Pins {
    bpffs: PathBuf,
    folder: String,
}

impl Pins {
    pub fn new(bpffs: &Path) -> Self {
        Self::of(bpffs, SCHEMA_VERSION)
    }

    /// Those of a version.
    pub fn of(bpffs: &Path, schema: u32) -> Self {
        Self {
            bpffs: bpffs.to_owned(),
            folder: format!("{FOLDER_PREFIX}{schema}"),
        }
    }

    /// The folder in which these are made before they are complete.
    #[must_use]
    pub fn unfinished(&self) -> Self {
        Self {
            bpffs: self.bpffs.clone(),
            folder: format!("{}{UNFINISHED}", self.folder),
        }
    }

    /// The folder's name.
    pub fn folder(&self) -> &str {
        &self.folder
    }

    pub fn bpffs(&self) -> &Path {
        &self.bpffs
    }

    pub fn root(&self) -> PathBuf {
        self.bpffs.join(&self.folder)
    }

    pub fn maps(&self) -> PathBuf {
        self.root().join("maps")
    }

    pub fn links(&self) -> PathBuf {
        self.root().join("links")
    }

    pub fn map(&self, name: &str) -> PathBuf {
        self.maps().join(name)
    }

    pub fn exists(&self) -> bool {
        self.root().exists()
    }

    /// The same, where it matters that who may not look does not know.
    pub fn try_exists(&self) -> Result<bool, PathError> {
        let root = self.root();
        root.try_exists().map_err(PathError::new("look at", &root))
    }

    /// Opens the pinned map `name`; `NotFound` when it is not there. Errors name it.
    pub fn open_map(&self, name: &str) -> io::Result<OwnedFd> {
        let path = self.map(name);
        sys::open_pin(&path)
            .map_err(|error| io::Error::new(error.kind(), PathError::new("open", &path)(error)))
    }

    /// The pinned map `name`, if it is there.
    pub fn find_map(&self, name: &str) -> io::Result<Option<OwnedFd>> {
        match self.open_map(name) {
            Ok(map) => Ok(Some(map)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The names of the pinned maps.
    pub fn list_maps(&self) -> io::Result<Vec<String>> {
        match fs::read_dir(self.maps()) {
            Ok(entries) => entries
                .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
                .collect(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// The ids of the pinned maps, as far as they can be opened.
    pub fn map_ids(&self) -> Vec<u32> {
        let id = |path: PathBuf| Some(sys::map_info(sys::open_pin(&path).ok()?.as_fd()).ok()?.id);
        let entries = fs::read_dir(self.maps()).into_iter().flatten().flatten();
        entries.filter_map(|entry| id(entry.path())).collect()
    }

    /// Fails when the path is not in a BPF filesystem.
    pub fn check_bpffs(&self) -> Result<(), PinError> {
        let existing = self
            .bpffs
            .ancestors()
            .find(|path| path.exists())
            .unwrap_or(Path::new("/"));
        let magic = sys::filesystem_magic(existing).map_err(PathError::new("inspect", existing))?;
        if magic == BPF_FS_MAGIC {
            return Ok(());
        }
        let mount = if self.bpffs.starts_with("/sys/fs/bpf") {
            Path::new("/sys/fs/bpf")
        } else {
            &self.bpffs
        };
        Err(PinError::NoBpffs {
            path: self.bpffs.clone(),
            mount: mount.to_owned(),
        })
    }

    /// Every folder of any version, complete or not, by name.
    pub fn all(bpffs: &Path) -> Result<Vec<Self>, PinError> {
        let entries = match fs::read_dir(bpffs) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(PathError::new("list", bpffs)(error).into()),
        };
        let mut folders: Vec<String> = entries
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| name.starts_with(FOLDER_PREFIX))
            .collect();
        folders.sort_unstable();
        let pins = |folder| Self {
            bpffs: bpffs.to_owned(),
            folder,
        };
        Ok(folders.into_iter().map(pins).collect())
    }

    /// The complete folders of other versions.
    pub fn others(&self) -> Result<Vec<Self>, PinError> {
        let mut all = Self::all(&self.bpffs)?;
        all.retain(|other| other.folder != self.folder && other.is_complete());
        Ok(all)
    }

    pub fn is_complete(&self) -> bool {
        !self.folder.ends_with(UNFINISHED)
    }

    /// Gives a folder that is complete its name. `self` must not exist.
    pub fn complete(&self) -> Result<(), PinError> {
        self.take_name_of(&self.unfinished())
    }

    /// Gives the folder another name, by which it is that of another version; says which.
    pub fn give_way(&self) -> Result<Self, PinError> {
        let mut former = self.clone();
        let mut number = 1;
        while former.exists() {
            former.folder = format!("{}{FORMER}{number}", self.folder);
            number += 1;
        }
        former.take_name_of(self)?;
        Ok(former)
    }

    /// Renames the folder of `from`. `self` must not exist.
    pub fn take_name_of(&self, from: &Self) -> Result<(), PinError> {
        let root = self.root();
        Ok(fs::rename(from.root(), &root).map_err(PathError::new("make", &root))?)
    }

    /// Moves a version's pinned links here, each in one step. Those of programs that are not known here stay, and so do
    /// those that are here already.
    pub fn move_links(&self, from: &Self) -> Result<(), PinError> {
        for link in from.list_links()? {
            let (old, new) = (from.link(link), self.link(link));
            if !new.exists() {
                fs::rename(old, &new).map_err(PathError::new("make", &new))?;
            }
        }
        Ok(())
    }

    /// Those folders of `--bpffs` that do not exist, outermost first.
    pub fn missing_folders(&self) -> Vec<PathBuf> {
        let mut missing: Vec<PathBuf> = self
            .bpffs
            .ancestors()
            .take_while(|path| !path.exists())
            .map(Path::to_owned)
            .collect();
        missing.reverse();
        missing
    }

    /// Makes the folders.
    pub fn create(&self) -> Result<(), PinError> {
        self.check_bpffs()?;
        for folder in [self.maps(), self.links()] {
            fs::create_dir_all(&folder).map_err(PathError::new("make", &folder))?;
        }
        Ok(())
    }

    /// Removes the folder and every pin in it.
    pub fn remove(&self) -> Result<(), PinError> {
        let root = self.root();
        match fs::remove_dir_all(&root) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(PathError::new("remove", &root)(error).into())
            }
            _ => Ok(()),
        }
    }

    /// The pinned links, by their names.
    pub fn list_links(&self) -> Result<Vec<LinkName>, PinError> {
        let folder = self.links();
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(PathError::new("list", &folder)(error).into()),
        };
        let mut links: Vec<LinkName> = entries
            .flatten()
            .filter_map(|entry| LinkName::parse(&entry.file_name().to_string_lossy()))
            .collect();
        links.sort_unstable();
        Ok(links)
    }

    pub fn link(&self, name: LinkName) -> PathBuf {
        self.links().join(name.to_string())
    }
}

/// The name of a pinned link: what is attached, and to which device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinkName {
    pub program: Program,
    /// 0 for a cgroup.
    pub ifindex: u32,
}

impl LinkName {
    pub fn parse(name: &str) -> Option<Self> {
        if let Some(symbol) = name.strip_prefix("cgroup-") {
            return Program::by_symbol(symbol)
                .filter(|program| program.is_cgroup())
                .map(|program| Self { program, ifindex: 0 });
        }
        let (symbol, ifindex) = name.strip_prefix("tc-").unwrap_or(name).rsplit_once('-')?;
        let program = Program::by_symbol(symbol).filter(|program| !program.is_cgroup())?;
        Some(Self {
            program,
            ifindex: ifindex.parse().ok()?,
        })
    }
}

impl std::fmt::Display for LinkName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let symbol = self.program.symbol();
        match self.program {
            Program::Xdp => write!(f, "{symbol}-{}", self.ifindex),
            program if program.is_cgroup() => write!(f, "cgroup-{symbol}"),
            _ => write!(f, "tc-{symbol}-{}", self.ifindex),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn link_names_round_trip() {
        for &program in Program::ALL {
            let name = LinkName {
                program,
                ifindex: if program.is_cgroup() { 0 } else { 17 },
            };
            assert_eq!(LinkName::parse(&name.to_string()), Some(name));
        }
        assert_eq!(
            LinkName {
                program: Program::FromNetdev,
                ifindex: 3
            }
            .to_string(),
            "tc-from_netdev-3"
        );
        assert_eq!(
            LinkName {
                program: Program::Xdp,
                ifindex: 3
            }
            .to_string(),
            "xdp-3"
        );
        assert_eq!(
            LinkName {
                program: Program::Connect4,
                ifindex: 0
            }
            .to_string(),
            "cgroup-connect4"
        );
        for bad in ["", "xdp", "xdp-", "tc-nobody-3", "cgroup-xdp", "tc-connect4-1"] {
            assert_eq!(LinkName::parse(bad), None, "{bad}");
        }
    }
}

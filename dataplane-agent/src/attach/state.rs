//! What must be remembered beside the pins, to put the machine back as it was: a small file in
//! `/run/dataplane/<bpffs>`. Losing it loses nothing but that.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File, TryLockError},
    io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{host::Claim, netlink::pods::InterfaceId, path_error::PathError};

const FOLDER: &str = "/run/dataplane";

/// The file's content.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Record {
    /// `accept_local` of `lo` before we set it.
    pub accept_local: Option<String>,
    /// `route_localnet` of `lo` before we set it.
    pub route_localnet: Option<String>,
    /// Devices that got their clsact qdisc from us, by ifindex, with their names.
    pub clsact: BTreeMap<u32, String>,
    /// Folders made for `--bpffs`, outermost first.
    pub made_folders: Vec<PathBuf>,
    /// Devices that are left to TC alone, by ifindex, with the reason.
    pub xdp_fallback: BTreeMap<u32, String>,
    /// Interfaces that may be a pod's and are left alone: a restart does not close them.
    pub left_interfaces: BTreeSet<InterfaceId>,
    /// What CNI plugins have told, by pod.
    pub claims: BTreeMap<String, Claim>,
    /// The cgroup that the socket hooks are attached to.
    pub cgroup: Option<PathBuf>,
    /// The socket of `wait`, which a killed agent leaves behind.
    pub socket: Option<PathBuf>,
}

/// The state folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("another agent runs with this --bpffs (it holds {0}): stop it first")]
    Running(PathBuf),
    #[error(transparent)]
    Path(#[from] PathError),
}

/// The state folder of one `--bpffs`.
#[derive(Debug)]
pub struct State {
    folder: PathBuf,
    /// Held while the agent runs.
    lock: Option<File>,
    pub record: Record,
}

impl State {
    /// Reads the record, without taking the lock.
    pub fn read(bpffs: &Path) -> Self {
        let folder = folder(bpffs);
        let record = fs::read(folder.join("state.json"))
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default();
        Self {
            folder,
            lock: None,
            record,
        }
    }

    /// Reads the record as the only one who may change it.
    pub fn lock(bpffs: &Path) -> Result<Self, StateError> {
        let folder = folder(bpffs);
        fs::create_dir_all(&folder).map_err(PathError::new("make", &folder))?;
        let path = folder.join("lock");
        let lock = File::create(&path).map_err(PathError::new("open", &path))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self {
                lock: Some(lock),
                ..Self::read(bpffs)
            }),
            Err(TryLockError::WouldBlock) => Err(StateError::Running(path)),
            Err(TryLockError::Error(source)) => Err(PathError::new("lock", &path)(source).into()),
        }
    }

    /// Whether an agent holds the lock.
    pub fn is_running(bpffs: &Path) -> bool {
        File::open(folder(bpffs).join("lock"))
            .is_ok_and(|lock| matches!(lock.try_lock(), Err(TryLockError::WouldBlock)))
    }

    /// Changes the record, on disk too if it differs.
    pub fn change(&mut self, change: impl FnOnce(&mut Record)) -> Result<(), StateError> {
        let before = self.record.clone();
        change(&mut self.record);
        if before == self.record {
            return Ok(());
        }
        let path = self.folder.join("state.json");
        let fresh = self.folder.join("state.json.new");
        let bytes = serde_json::to_vec_pretty(&self.record).unwrap_or_default();
        fs::write(&fresh, bytes).map_err(PathError::new("write", &fresh))?;
        fs::rename(&fresh, &path).map_err(PathError::new("write", &path))?;
        Ok(())
    }

    /// Removes the folder, and the common one above it when it is empty.
    pub fn remove(self) -> Result<(), StateError> {
        for name in ["state.json", "state.json.new", "lock"] {
            let path = self.folder.join(name);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(PathError::new("remove", &path)(error).into());
                }
                _ => {}
            }
        }
        // Others may keep files there, such as the socket of `wait`.
        let _ = fs::remove_dir(&self.folder);
        let _ = fs::remove_dir(FOLDER);
        drop(self.lock);
        Ok(())
    }
}

fn folder(bpffs: &Path) -> PathBuf {
    let name: String = bpffs
        .to_string_lossy()
        .trim_matches('/')
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    Path::new(FOLDER).join(name)
}

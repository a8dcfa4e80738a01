//! Names and places of everything a cluster makes outside its namespaces, and their removal.
//!
//! Every name is `dpt-<owner pid>-<cluster>`, so [`sweep`] can tell what belongs to a process that is gone.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::cgroup;

/// First part of every name.
pub const PREFIX: &str = "dpt";

static CLOSED: AtomicBool = AtomicBool::new(false);

const NETNS: &str = "/run/netns";
const WORK: &str = "/run";
/// Where agents keep what they have to restore.
const AGENT_STATE: &str = "/run/dataplane";
const BPFFS: &str = "/sys/fs/bpf";

/// Where one cluster keeps its things. Dropping it does not remove them: [`Places::remove`] does.
#[derive(Debug, Clone)]
pub struct Places {
    /// `dpt-<pid>-<cluster>`.
    pub id: String,
    /// The cluster's cgroup; nodes are its children.
    pub cgroup: PathBuf,
    /// The cluster's folder on bpffs; nodes are its children.
    pub bpffs: PathBuf,
    /// Manifests, sockets and logs.
    pub work: PathBuf,
}

impl Places {
    /// Makes the folders of the cluster `name` of this process.
    pub fn create(name: &str) -> Result<Self> {
        check_open()?;
        let id = format!("{PREFIX}-{}-{name}", std::process::id());
        let places = Self {
            cgroup: cgroup::root()?.join(&id),
            bpffs: bpffs_root()?.join(&id),
            work: Path::new(WORK).join(&id),
            id,
        };
        for dir in [Path::new(NETNS), &places.cgroup, &places.bpffs, &places.work] {
            fs::create_dir_all(dir).with_context(|| format!("failed to create {}", dir.display()))?;
        }
        Ok(places)
    }

    /// The file that names a namespace of this cluster (`ip netns` lists it).
    pub fn netns(&self, name: &str) -> PathBuf {
        Path::new(NETNS).join(format!("{}-{name}", self.id))
    }

    /// Removes everything that carries this cluster's name. Nothing to remove is success.
    pub fn remove(&self) {
        let id = self.id.clone();
        remove_matching(&|name| {
            name == id || name.strip_prefix(&id).is_some_and(|rest| rest.starts_with('-'))
        });
    }
}

/// Places that are removed when this is dropped.
#[derive(Debug)]
pub struct Owned(pub Places);

impl Drop for Owned {
    fn drop(&mut self) {
        self.0.remove();
    }
}

/// Removes what processes that no longer run have left behind.
pub fn sweep() {
    remove_matching(&|name| owner(name).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()));
}

/// Removes everything this process has made and lets it make nothing more: the way out on a signal.
pub fn close() {
    CLOSED.store(true, Ordering::SeqCst);
    let own = std::process::id();
    // Twice: another thread may be in the midst of building.
    for _ in 0..2 {
        remove_matching(&|name| owner(name) == Some(own));
        sleep(Duration::from_millis(100));
    }
    remove_matching(&|name| owner(name) == Some(own));
}

/// Fails once [`close`] was called.
pub fn check_open() -> Result<()> {
    ensure!(!CLOSED.load(Ordering::SeqCst), "the run was interrupted");
    Ok(())
}

fn owner(name: &str) -> Option<u32> {
    name.strip_prefix(PREFIX)?
        .strip_prefix('-')?
        .split('-')
        .next()?
        .parse()
        .ok()
}

fn remove_matching(matches: &dyn Fn(&str) -> bool) {
    if let Ok(root) = cgroup::root() {
        for path in entries(&root, matches) {
            cgroup::remove(&path);
        }
    }
    for path in entries(Path::new(NETNS), matches) {
        // Not mounted yet, or already unmounted, leaves a plain file: both calls are tried.
        let _ = umount2(&path, MntFlags::MNT_DETACH);
        let _ = fs::remove_file(&path);
    }
    for root in [BPFFS, WORK] {
        for path in entries(Path::new(root), matches) {
            let _ = fs::remove_dir_all(&path);
        }
    }
    // An agent names its state after the bpffs folder that it pins to; one that was killed leaves it.
    for path in entries(Path::new(AGENT_STATE), &|name| {
        name.strip_prefix("sys-fs-bpf-").is_some_and(matches)
    }) {
        let _ = fs::remove_dir_all(&path);
    }
}

fn entries(dir: &Path, matches: &dyn Fn(&str) -> bool) -> Vec<PathBuf> {
    let Ok(listing) = fs::read_dir(dir) else {
        return Vec::new();
    };
    listing
        .flatten()
        .filter(|entry| entry.file_name().to_str().is_some_and(matches))
        .map(|entry| entry.path())
        .collect()
}

/// The bpffs of this machine, mounted where it was missing.
fn bpffs_root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").context("failed to read /proc/mounts")?;
    if !mounts.lines().any(|line| line.split(' ').nth(1) == Some(BPFFS)) {
        mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("failed to mount bpffs at {BPFFS}"))?;
    }
    Ok(PathBuf::from(BPFFS))
}

#[cfg(test)]
mod tests {
    use super::owner;

    #[test]
    fn owner_is_read_from_the_name_only() {
        assert_eq!(owner("dpt-42-0"), Some(42));
        assert_eq!(owner("dpt-42-0-node1"), Some(42));
        assert_eq!(owner("dpt-x-0"), None);
        assert_eq!(owner("other-42-0"), None);
    }
}

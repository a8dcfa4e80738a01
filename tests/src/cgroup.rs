//! cgroup v2: where it is mounted, and subtrees that are removed with the processes in them.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result};

/// The mount point of cgroup v2.
pub fn root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").context("failed to read /proc/mounts")?;
    mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            Some((fields.next()?, fields.next()?))
        })
        .find(|(_, kind)| *kind == "cgroup2")
        .map(|(path, _)| PathBuf::from(path))
        .context("cgroup v2 is not mounted (mount -t cgroup2 none /sys/fs/cgroup)")
}

/// Makes a cgroup and its parents.
pub fn create(path: &Path) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("failed to create cgroup {}", path.display()))
}

/// Moves the calling process into a cgroup.
pub fn join(path: &Path) -> Result<()> {
    fs::write(path.join("cgroup.procs"), "0")
        .with_context(|| format!("failed to join cgroup {}", path.display()))
}

/// Kills every process of a subtree and removes it. What is already gone is success.
pub fn remove(path: &Path) {
    let _ = fs::write(path.join("cgroup.kill"), "1");
    // A killed process leaves its cgroup when it is reaped or has exited: soon, but not at once.
    for _ in 0..200 {
        if remove_tree(path) {
            return;
        }
        sleep(Duration::from_millis(5));
    }
}

fn remove_tree(path: &Path) -> bool {
    let Ok(listing) = fs::read_dir(path) else {
        return true;
    };
    for entry in listing.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    fs::remove_dir(path).is_ok() || !path.exists()
}

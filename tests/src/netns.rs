//! Network namespaces with a name under `/run/netns`, and work done inside them.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, Result, anyhow};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

/// A network namespace, held by an open descriptor and a bind mount that gives it a name.
#[derive(Debug)]
pub struct NetNs {
    file: File,
    path: PathBuf,
}

impl NetNs {
    /// Makes a namespace and mounts it at `path`; `crate::places` removes the mount.
    pub fn create(path: &Path) -> Result<Self> {
        crate::places::check_open()?;
        let make = || -> Result<File> {
            unshare(CloneFlags::CLONE_NEWNET)
                .context("failed to unshare the network namespace (not root?)")?;
            let own = Path::new("/proc/thread-self/ns/net");
            File::create(path).with_context(|| format!("failed to create {}", path.display()))?;
            mount(Some(own), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
                .with_context(|| format!("failed to mount a namespace at {}", path.display()))?;
            File::open(own).context("failed to open the new namespace")
        };
        let file = in_thread(make)?;
        Ok(Self {
            file,
            path: path.to_path_buf(),
        })
    }

    /// Opens a namespace that has a name.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("failed to open {}", path.display()))?;
        Ok(Self {
            file,
            path: path.to_path_buf(),
        })
    }

    /// Runs `work` on a thread inside the namespace.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        in_thread(|| {
            setns(&self.file, CloneFlags::CLONE_NEWNET)
                .with_context(|| format!("failed to enter {}", self.path.display()))?;
            work()
        })
    }

    /// Takes the namespace's name away; it goes with the last process in it.
    pub fn remove(self) {
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
        let _ = std::fs::remove_file(&self.path);
    }

    /// Where the namespace is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The descriptor, for netlink messages that name a namespace.
    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// Moves the calling process, which must have one thread only, into the namespace mounted at `path`.
pub fn join(path: &Path) -> Result<()> {
    let file = File::open(path).with_context(|| format!("failed to open {}", path.display()))?;
    setns(file, CloneFlags::CLONE_NEWNET).with_context(|| format!("failed to enter {}", path.display()))
}

/// Sets kernel parameters of the calling thread's namespace (`net/ipv4/ip_forward`, value).
pub fn set_sysctls(values: &[(&str, &str)]) -> Result<()> {
    for (name, value) in values {
        std::fs::write(Path::new("/proc/sys").join(name), value)
            .with_context(|| format!("failed to set {name} to {value}"))?;
    }
    Ok(())
}

fn in_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        scope
            .spawn(work)
            .join()
            .map_err(|_| anyhow!("a thread inside a namespace panicked"))?
    })
}

//! What this kernel and this process can do.

use std::{
    fs, io,
    net::UdpSocket,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use aya::{
    programs::{ProgramError, ProgramType},
    sys::{BpfHelper, is_helper_supported},
};
use dataplane_common::config::{Jiffies, config_flags};

use super::{Hook, sys};
use crate::path_error::PathError;

/// Something that the machine lacks.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error(
        "missing capability {0}: run as root, or grant CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON (CAP_SYS_ADMIN before kernel 5.8)"
    )]
    Capability(&'static str),
    #[error("kernel {found} is too old: 5.10 or newer is needed")]
    TooOld { found: String },
    #[error("this kernel has no bpf system call: it needs CONFIG_BPF_SYSCALL")]
    NoBpf,
    #[error(
        "the kernel denies the bpf system call although the capabilities are there: they must be those of the initial user namespace, and neither a seccomp profile (run the container privileged, or with seccomp=unconfined) nor kernel lockdown may forbid it"
    )]
    BpfDenied,
    #[error("failed to try the bpf system call")]
    Bpf(#[source] io::Error),
    #[error(transparent)]
    Path(#[from] PathError),
    #[error(
        "no cgroup v2 hierarchy is mounted: mount one with `mount -t cgroup2 none /sys/fs/cgroup/unified`, or switch the socket hooks off with --socket-lb off"
    )]
    NoCgroup2,
    #[error(
        "{0} is not in a cgroup v2 hierarchy: name one with --cgroup, or switch the socket hooks off with --socket-lb off"
    )]
    NotCgroup2(PathBuf),
}

/// The running kernel's release, as `uname -r` prints it; empty where /proc does not say.
pub fn release() -> String {
    let release = fs::read_to_string(OSRELEASE).unwrap_or_default();
    release.trim().to_owned()
}

/// Major and minor number of the running kernel.
pub fn version() -> Result<(u32, u32), KernelError> {
    let text = fs::read_to_string(OSRELEASE).map_err(PathError::new("read", OSRELEASE.as_ref()))?;
    parse_version(text.trim()).ok_or_else(|| KernelError::TooOld {
        found: text.trim().to_owned(),
    })
}

const OSRELEASE: &str = "/proc/sys/kernel/osrelease";

fn parse_version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Fails when the kernel is too old.
pub fn check_version() -> Result<(), KernelError> {
    let (major, minor) = version()?;
    if (major, minor) < (5, 10) {
        return Err(KernelError::TooOld {
            found: format!("{major}.{minor}"),
        });
    }
    Ok(())
}

/// Fails, by name, when the process may not load programs or configure the network, or the kernel is too old or denies
/// BPF.
pub fn check() -> Result<(), KernelError> {
    check_version()?;
    check_capabilities()?;
    // Before 5.11 maps count against this limit.
    sys::raise_memlock_limit();
    sys::try_map().map_err(|error| match error.raw_os_error() {
        Some(libc::ENOSYS) => KernelError::NoBpf,
        Some(libc::EPERM) => KernelError::BpfDenied,
        _ => KernelError::Bpf(error),
    })
}

const NET_ADMIN: u32 = 12;
const SYS_ADMIN: u32 = 21;
const PERFMON: u32 = 38;
const BPF: u32 = 39;
/// Those that matter here, by number and name.
pub const CAPABILITIES: [(u32, &str); 4] = [
    (NET_ADMIN, "CAP_NET_ADMIN"),
    (SYS_ADMIN, "CAP_SYS_ADMIN"),
    (PERFMON, "CAP_PERFMON"),
    (BPF, "CAP_BPF"),
];

/// Fails, by name, when a capability is missing.
pub fn check_capabilities() -> Result<(), KernelError> {
    check_net_admin()?;
    let effective = effective_capabilities()?;
    let has = |capability: u32| effective >> capability & 1 == 1;
    for (capability, name) in [(BPF, "CAP_BPF"), (PERFMON, "CAP_PERFMON")] {
        if !has(capability) && !has(SYS_ADMIN) {
            return Err(KernelError::Capability(name));
        }
    }
    Ok(())
}

/// Fails without the capability to configure the network.
pub fn check_net_admin() -> Result<(), KernelError> {
    if effective_capabilities()? >> NET_ADMIN & 1 == 1 {
        Ok(())
    } else {
        Err(KernelError::Capability("CAP_NET_ADMIN"))
    }
}

/// Whether other programs' names and objects can be looked up.
pub fn has_sys_admin() -> bool {
    effective_capabilities().is_ok_and(|effective| effective >> SYS_ADMIN & 1 == 1)
}

/// The capabilities that this thread has, as a bit set.
pub fn effective_capabilities() -> Result<u64, KernelError> {
    let path = "/proc/thread-self/status";
    let text = fs::read_to_string(path).map_err(PathError::new("read", path.as_ref()))?;
    let effective = text
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    Ok(effective)
}

/// Whether TC programs are attached as TCX links (6.6) or as filters of a clsact qdisc.
pub fn has_tcx() -> bool {
    const LOOPBACK: u32 = 1;
    sys::prog_query(LOOPBACK, Hook::TcIngress.attach_type()).is_ok()
}

/// The cookie of this process's network namespace (5.14).
pub fn netns_cookie() -> io::Result<u64> {
    let socket = UdpSocket::bind("127.0.0.1:0").or_else(|_| UdpSocket::bind("[::1]:0"))?;
    sys::netns_cookie(socket.as_fd())
}

/// The flags of [`dataplane_common::config::Config`] that say what this kernel has. Helpers are tried, because
/// distributions bring them to older kernels; a flag of a helper can't be.
pub fn config_flags(version: (u32, u32)) -> Result<u32, ProgramError> {
    let mut flags = 0;
    for (flag, has) in [
        (config_flags::CSUM_IPV6, version >= (6, 16)),
        (
            config_flags::XDP_FRAGS,
            is_helper_supported(ProgramType::Xdp, BpfHelper::BPF_FUNC_xdp_get_buff_len)?,
        ),
        // What came with it, in 5.12, can't be tried: that `bpf_fib_lookup` tells the MTU.
        (
            config_flags::FIB_MTU,
            is_helper_supported(ProgramType::SchedClassifier, BpfHelper::BPF_FUNC_check_mtu)?,
        ),
        (
            config_flags::SET_RETVAL,
            is_helper_supported(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_set_retval)?,
        ),
    ] {
        if has {
            flags |= flag;
        }
    }
    Ok(flags)
}

/// How this kernel counts the time: the coarse clocks go on with every jiffy.
pub fn jiffies() -> io::Result<Jiffies> {
    let resolution = sys::coarse_resolution()?;
    u32::try_from(resolution.as_nanos())
        .ok()
        .filter(|length_ns| (1..=100_000_000).contains(length_ns))
        .map(Jiffies::of)
        .ok_or_else(|| io::Error::other(format!("a jiffy of {resolution:?}")))
}

/// The root of the mounted cgroup v2 hierarchy.
pub fn find_cgroup2() -> Result<PathBuf, KernelError> {
    let path = "/proc/self/mounts";
    let mounts = fs::read_to_string(path).map_err(PathError::new("read", path.as_ref()))?;
    mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .find(|fields| fields.get(2) == Some(&"cgroup2"))
        .map(|fields| PathBuf::from(fields[1]))
        .ok_or(KernelError::NoCgroup2)
}

/// Fails when the folder is not in a cgroup v2 hierarchy.
pub fn check_cgroup2(path: &Path) -> Result<(), KernelError> {
    const CGROUP2_SUPER_MAGIC: u32 = 0x6367_7270;
    match sys::filesystem_magic(path) {
        Ok(CGROUP2_SUPER_MAGIC) => Ok(()),
        Ok(_) => Err(KernelError::NotCgroup2(path.to_owned())),
        Err(source) if source.kind() == io::ErrorKind::NotFound => {
            Err(KernelError::NotCgroup2(path.to_owned()))
        }
        Err(source) => Err(PathError::new("inspect", path)(source).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_release_names() {
        assert_eq!(parse_version("6.18.44-fc-v657"), Some((6, 18)));
        assert_eq!(parse_version("5.10.0-28-amd64"), Some((5, 10)));
        assert_eq!(parse_version("7.1-rc2"), Some((7, 1)));
        assert_eq!(parse_version("nonsense"), None);
    }
}

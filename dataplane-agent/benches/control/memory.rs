//! What the agent takes: its own memory, and that of its maps.

use std::{fs, os::fd::AsRawFd, path::Path};

use anyhow::{Context, Result};
use dataplane_agent::bpf::pins::Pins;
use serde::{Deserialize, Serialize};

/// Bytes of this process.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Resident {
    /// The resident set without mapped maps: the sum of `Rss` in /proc/self/smaps, less what is mapped from `bpf-map`.
    pub own: u64,
    /// Of this, anonymous memory: heap and stacks.
    pub anonymous: u64,
    /// Bytes of the heap that are allocated, as the allocator counts them.
    pub allocated: u64,
}

impl Resident {
    pub fn now() -> Result<Self> {
        let text = fs::read_to_string("/proc/self/smaps").context("failed to read /proc/self/smaps")?;
        let mut resident = Self {
            allocated: allocated(),
            ..Self::default()
        };
        let mut is_map = false;
        for line in text.lines() {
            let (first, rest) = line.split_once(' ').unwrap_or((line, ""));
            let Some(field) = first.strip_suffix(':') else {
                is_map = rest.ends_with("bpf-map");
                continue;
            };
            let bytes = || {
                rest.trim()
                    .trim_end_matches(" kB")
                    .parse()
                    .map_or(0, |kib: u64| kib * 1024)
            };
            match field {
                "Rss" if !is_map => resident.own += bytes(),
                "Anonymous" if !is_map => resident.anonymous += bytes(),
                _ => {}
            }
        }
        Ok(resident)
    }
}

/// 0 with another allocator than glibc's.
fn allocated() -> u64 {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: the allocator locks itself, and the answer is a value.
        let info = unsafe { libc::mallinfo2() };
        (info.uordblks + info.hblkhd) as u64
    }
    #[cfg(not(target_env = "gnu"))]
    0
}

/// Bytes of the pinned maps with these names, as the kernel accounts for them (`memlock` in their descriptors' fdinfo).
pub fn of_maps(bpffs: &Path, names: &[&str]) -> Result<u64> {
    let pins = Pins::new(bpffs);
    names
        .iter()
        .map(|name| {
            let fd = pins
                .open_map(name)
                .with_context(|| format!("failed to open table {name}"))?;
            let path = format!("/proc/self/fdinfo/{}", fd.as_raw_fd());
            let text = fs::read_to_string(&path).with_context(|| format!("failed to read {path}"))?;
            let bytes = text.lines().find_map(|line| line.strip_prefix("memlock:"));
            bytes
                .and_then(|bytes| bytes.trim().parse::<u64>().ok())
                .with_context(|| format!("{path} does not say how large table {name} is"))
        })
        .sum()
}

//! What the chart's container may do, for a process that is in none: its capabilities, no new privileges, and a file system that
//! is read-only but for the folders that are mounted into it.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use caps::{CapSet, Capability};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_no_new_privs;
use nix::sys::statvfs::{FsFlags, statvfs};
use serde::Deserialize as _;
use serde_json::Value;

const MANIFESTS: &str = include_str!("../../deploy/manifests/dataplane.yaml");
/// Where the chart's volumes may be written: the agent's state, and its pins.
const VOLUMES: [&str; 2] = ["/run/dataplane", "/sys/fs/bpf"];

/// The capabilities of the agent's container, as the chart names them.
pub fn capabilities() -> Result<Vec<String>> {
    for document in serde_norway::Deserializer::from_str(MANIFESTS) {
        let object = Value::deserialize(document).context("deploy/manifests is no YAML")?;
        if object["kind"] != "DaemonSet" {
            continue;
        }
        let context = &object["spec"]["template"]["spec"]["containers"][0]["securityContext"];
        ensure!(
            context["privileged"] == false
                && context["allowPrivilegeEscalation"] == false
                && context["readOnlyRootFilesystem"] == true
                && context["capabilities"]["drop"] == serde_json::json!(["ALL"]),
            "not the rights that are given here: {context}"
        );
        return serde_json::from_value(context["capabilities"]["add"].clone())
            .context("the capabilities of the DaemonSet are no list of names");
    }
    anyhow::bail!("deploy/manifests has no DaemonSet")
}

/// Gives up everything else. `writable`: folders beside the chart's volumes that may be written.
pub fn confine(capabilities: &[String], writable: &[PathBuf]) -> Result<()> {
    let kept: HashSet<Capability> = capabilities
        .iter()
        .map(|name| {
            format!("CAP_{name}")
                .parse()
                .with_context(|| format!("no capability is called {name}"))
        })
        .collect::<Result<_>>()?;
    freeze(writable).context("failed to make the file system read-only")?;
    for capability in caps::all() {
        if !kept.contains(&capability) {
            caps::drop(None, CapSet::Bounding, capability)?;
        }
    }
    // The others last: they are what all this takes.
    caps::clear(None, CapSet::Inheritable)?;
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)?;
    set_no_new_privs().context("failed to give up new privileges")
}

/// Makes all mounts read-only for this process, /proc/sys too.
fn freeze(writable: &[PathBuf]) -> Result<()> {
    const NONE: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_SLAVE, NONE)?;
    let volumes = VOLUMES.map(PathBuf::from);
    for folder in volumes.iter().chain(writable) {
        fs::create_dir_all(folder)?;
        mount(Some(folder), folder, NONE, MsFlags::MS_BIND, NONE)?;
    }
    let is_kept = |at: &Path| {
        volumes
            .iter()
            .chain(writable)
            .any(|folder| at.starts_with(folder))
    };
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    for at in mounts.lines().filter_map(|line| line.split(' ').nth(4)) {
        // A namespace's file has no flags of its own, and what is mounted over cannot be reached.
        if is_kept(Path::new(at)) || at.starts_with("/run/netns/") {
            continue;
        }
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        let _hidden = mount(NONE, at, NONE, flags, NONE);
    }
    for at in ["/", "/proc"] {
        let flags = statvfs(at)?.flags();
        ensure!(flags.contains(FsFlags::ST_RDONLY), "{at} can still be written");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chart_names_capabilities() {
        let named = capabilities().unwrap();
        assert!(named.contains(&"BPF".to_owned()) && !named.contains(&"SYS_ADMIN".to_owned()));
        for name in named {
            format!("CAP_{name}").parse::<Capability>().unwrap();
        }
    }
}

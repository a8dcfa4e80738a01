//! Mounts, kernel parameters of the network, and the CNI configuration.

use std::{fs, path::Path};

use serde_json::Value;

use super::Rows;
use crate::{
    attach::{state::State, sysctl},
    bpf::{kernel, pins::Pins},
    config::{Config, SocketLb},
    netlink::{select::DevicePatterns, tables::Tables},
};

pub(super) fn mounts(rows: &mut Rows<'_>, config: &Config) {
    let pins = Pins::new(&config.bpffs);
    match pins.check_bpffs() {
        Ok(()) => rows.ok("BPF file system", config.bpffs.display().to_string()),
        Err(error) => rows.problem("BPF file system", error),
    }
    match pins.others() {
        Ok(_) if State::is_running(&config.bpffs) => rows.note(
            "earlier agent",
            "runs",
            "another one with this --bpffs waits for it to end",
        ),
        Ok(others) if pins.exists() || !others.is_empty() => {
            rows.ok("earlier agent", "its datapath is taken over");
        }
        Ok(_) => rows.ok("earlier agent", "none"),
        Err(error) => rows.problem("earlier agent", error),
    }
    if config.socket_lb != SocketLb::Off {
        let found = config.cgroup.clone().map_or_else(kernel::find_cgroup2, Ok);
        let checked = found.and_then(|path| kernel::check_cgroup2(&path).map(|()| path));
        match checked {
            Ok(path) => rows.ok("cgroup v2", path.display().to_string()),
            Err(error) => rows.problem("cgroup v2", error),
        }
    }
}

pub(super) fn parameters(rows: &mut Rows<'_>, config: &Config, tables: &Tables) {
    for (name, meaning) in [
        (
            "net/ipv4/ip_forward",
            "this node forwards no IPv4 packets: pods are cut off, with any proxy; most CNI plugins set it to 1 with the first pod",
        ),
        (
            "net/ipv6/conf/all/forwarding",
            "this node forwards no IPv6 packets: fine where there is no IPv6, else set it to 1",
        ),
    ] {
        switch(rows, name, "1", meaning);
    }
    reverse_path(rows, config, tables);
    match sysctl::local_ports().and_then(|range| range.shared(config.snat_ports)) {
        Some(shared) if !sysctl::is_reserved(shared) => rows.note(
            "net.ipv4.ip_local_port_range",
            format!("shares {shared} with --snat-ports"),
            format!("a connection of this host and a translated one may meet: keep them apart with --snat-ports or net.ipv4.ip_local_reserved_ports={shared}"),
        ),
        _ => rows.ok("net.ipv4.ip_local_port_range", "apart from --snat-ports"),
    }
    for (name, meaning) in [
        (
            "accept_local",
            "set to 1 for `lo` alone while the agent is installed, and put back by `cleanup`",
        ),
        ("route_localnet", "the same, with --localhost-node-ports alone"),
    ] {
        let path = format!("net/ipv4/conf/lo/{name}");
        if let Some(value) = read(&path) {
            rows.add(super::Verdict::Ok, path.replace('/', "."), value, meaning);
        }
    }
}

fn switch(rows: &mut Rows<'_>, path: &str, wanted: &str, meaning: &str) {
    let name = path.replace('/', ".");
    match read(path) {
        Some(value) if value == wanted => rows.ok(name, value),
        Some(value) => rows.note(name, value, meaning),
        None => rows.note(name, "not there", meaning),
    }
}

/// The kernel takes the stricter of a device's own setting and that of all.
fn reverse_path(rows: &mut Rows<'_>, config: &Config, tables: &Tables) {
    let filter = |device: &str| read(&format!("net/ipv4/conf/{device}/rp_filter"));
    let all: u8 = filter("all").and_then(|value| value.parse().ok()).unwrap_or(0);
    let roles = super::devices::roles(config, tables);
    let strict: Vec<&str> = tables
        .links
        .iter()
        .filter(|link| roles.contains_key(&link.ifindex))
        .filter(|link| {
            let own = filter(&link.name)
                .and_then(|value| value.parse().ok())
                .unwrap_or(0);
            all.max(own) == 1
        })
        .map(|link| link.name.as_str())
        .collect();
    if strict.len() > 1 {
        rows.note(
            "rp_filter",
            format!("strict on {}", strict.join(", ")),
            "packets of clients whose way back is another device are dropped by the kernel before any proxy: set it to 2 where routes are asymmetric",
        );
    } else {
        rows.ok(
            "rp_filter",
            if strict.is_empty() {
                "not strict"
            } else {
                "strict on the only uplink"
            },
        );
    }
    let absent = DevicePatterns::new(&config.devices).absent(&tables.links);
    if !absent.is_empty() {
        rows.note(
            "--device",
            format!("no device {}", absent.join(", ")),
            "it is attached to when it appears",
        );
    }
}

fn read(path: &str) -> Option<String> {
    let text = fs::read_to_string(Path::new("/proc/sys").join(path)).ok()?;
    Some(text.trim().to_owned())
}

/// The configuration that the container runtime uses: the first file by name.
pub(super) fn cni(rows: &mut Rows<'_>, folder: &Path) {
    let mut files: Vec<_> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            path.extension()
                .is_some_and(|ending| ending == "conflist" || ending == "conf")
        })
        .collect();
    files.sort();
    let Some(file) = files.first() else {
        rows.note(
            "configuration",
            format!("none in {}", folder.display()),
            "the agent is no CNI plugin: a node without one has no pods of its own network",
        );
        return;
    };
    let name = file.display().to_string();
    let chain = fs::read(file).ok().and_then(|text| plugins(&text));
    let Some(chain) = chain else {
        rows.note("configuration", name, "failed to read it");
        return;
    };
    rows.ok("configuration", name);
    let found = chain.join(" → ");
    if chain.iter().any(|plugin| plugin == "dataplane-cni") {
        rows.ok("plugins", found);
    } else {
        rows.note(
            "plugins",
            found,
            "without dataplane-cni in the chain, new Pods are without programs for some milliseconds (docs/cni.md)",
        );
    }
}

/// The types of the plugins, in order.
fn plugins(text: &[u8]) -> Option<Vec<String>> {
    let config: Value = serde_json::from_slice(text).ok()?;
    let list = config["plugins"]
        .as_array()
        .cloned()
        .unwrap_or_else(|| vec![config]);
    list.iter()
        .map(|plugin| plugin["type"].as_str().map(str::to_owned))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::preflight::Verdict;

    #[test]
    fn the_first_cni_configuration_counts_and_its_chain_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let mut rows = Vec::new();
        let mut look = || {
            rows.clear();
            cni(
                &mut Rows {
                    area: "cni",
                    rows: &mut rows,
                },
                folder.path(),
            );
            rows.iter()
                .map(|row: &super::super::Row| (row.verdict, row.found.clone()))
                .collect::<Vec<_>>()
        };
        assert_eq!(look()[0].0, Verdict::Note);
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        write("20-later.conf", r#"{"type": "later"}"#);
        write(
            "10-net.conflist",
            r#"{"plugins": [{"type": "ptp"}, {"type": "portmap"}]}"#,
        );
        write("00-note.txt", "no configuration");
        assert_eq!(look()[1], (Verdict::Note, "ptp → portmap".to_owned()));
        write(
            "05-ours.conflist",
            r#"{"plugins": [{"type": "ptp"}, {"type": "dataplane-cni"}]}"#,
        );
        assert_eq!(look()[1], (Verdict::Ok, "ptp → dataplane-cni".to_owned()));
        write("01-broken.conf", "{");
        assert_eq!(look()[0].0, Verdict::Note);
    }
}

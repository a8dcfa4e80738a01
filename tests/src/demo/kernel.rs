//! What the kernel holds, read the way anybody can: `bpftool` on the pinned maps, fields by name.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// Backends that are looked at: ids are given from the lowest.
const FIRST_IDS: u32 = 16;

/// The folder of pinned maps below an agent's bpffs folder.
pub fn maps(bpffs: &Path) -> Result<PathBuf> {
    let entries = std::fs::read_dir(bpffs).with_context(|| format!("failed to list {}", bpffs.display()))?;
    entries
        .flatten()
        .map(|entry| entry.path().join("maps"))
        .find(|maps| maps.is_dir())
        .with_context(|| format!("no maps are pinned below {}", bpffs.display()))
}

/// `10.96.0.80:80` and the like, both families, sorted, each once.
pub fn frontends(maps: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for map in ["FRONTENDS_V4", "FRONTENDS_V6"] {
        for entry in bpftool(&["map", "dump", "pinned"], &maps.join(map), &[])?
            .as_array()
            .into_iter()
            .flatten()
        {
            let key = &entry["formatted"]["key"];
            found.push((address(&key["addr_be"]), port(&key["port_be"])));
        }
    }
    found.sort();
    found.dedup();
    Ok(found.into_iter().map(|(ip, port)| shown(ip, port)).collect())
}

/// `10.244.1.21:8080` and the like of the backends in use.
pub fn backends(maps: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for id in 0..FIRST_IDS {
        let key = id.to_ne_bytes().map(|byte| format!("0x{byte:02x}"));
        let key: Vec<&str> = ["key"]
            .into_iter()
            .chain(key.iter().map(String::as_str))
            .collect();
        let entry = bpftool(&["map", "lookup", "pinned"], &maps.join("BACKENDS"), &key)?;
        let value = &entry["formatted"]["value"];
        let state = match value["head"]["state"].as_u64() {
            Some(1) => "",
            Some(2) => " draining",
            Some(3) => " serving",
            _ => continue,
        };
        found.push((address(&value["addr_be"]), port(&value["head"]["port_be"]), state));
    }
    found.sort();
    found.dedup();
    Ok(found
        .into_iter()
        .map(|(ip, port, state)| shown(ip, port) + state)
        .collect())
}

fn bpftool(verb: &[&str], map: &Path, rest: &[&str]) -> Result<Value> {
    let output = Command::new("bpftool")
        .arg("--json")
        .args(verb)
        .arg(map)
        .args(rest)
        .output()
        .context("failed to start bpftool (`cargo xtask setup` installs it)")?;
    if !output.status.success() {
        bail!(
            "bpftool failed on {}: {}",
            map.display(),
            String::from_utf8_lossy(&output.stdout).trim()
        );
    }
    serde_json::from_slice(&output.stdout)
        .with_context(|| format!("failed to decode bpftool's {}", map.display()))
}

/// A number in network order is an IPv4 address; four of them are an IPv6 address, or an IPv4 one in the first.
fn address(value: &Value) -> IpAddr {
    let word = |value: &Value| (value.as_u64().unwrap_or_default() as u32).to_ne_bytes();
    match words(value) {
        Some([first, rest @ ..]) if rest.iter().all(|value| value.as_u64() == Some(0)) => {
            Ipv4Addr::from(word(first)).into()
        }
        Some(all) => {
            let mut bytes = [0; 16];
            for (place, value) in bytes.chunks_mut(4).zip(all) {
                place.copy_from_slice(&word(value));
            }
            Ipv6Addr::from(bytes).into()
        }
        None => Ipv4Addr::from(word(value)).into(),
    }
}

/// The array itself, or that of a newtype's only field.
fn words(value: &Value) -> Option<&[Value]> {
    let array = value
        .as_array()
        .or_else(|| value.as_object()?.values().next()?.as_array())?;
    Some(array.as_slice())
}

fn port(value: &Value) -> u16 {
    u16::from_be(value.as_u64().unwrap_or_default() as u16)
}

fn shown(ip: IpAddr, port: u16) -> String {
    let any = ip.is_unspecified();
    match ip {
        _ if any => format!("every node address:{port}"),
        IpAddr::V4(ip) => format!("{ip}:{port}"),
        IpAddr::V6(ip) => format!("[{ip}]:{port}"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn addresses_are_in_network_order() {
        let word = u32::from_ne_bytes([10, 96, 0, 80]);
        assert_eq!(address(&json!(word)).to_string(), "10.96.0.80");
        assert_eq!(
            address(&json!({"words": [word, 0, 0, 0]})).to_string(),
            "10.96.0.80"
        );
        let first = u32::from_ne_bytes([0xfd, 0, 0, 0x10]);
        let last = u32::from_ne_bytes([0, 0, 0, 0x80]);
        assert_eq!(address(&json!([first, 0, 0, last])).to_string(), "fd00:10::80");
    }
}

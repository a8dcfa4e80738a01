//! The devices that would carry programs, and what each would get.

use std::collections::{BTreeMap, BTreeSet};

use super::Rows;
use crate::{
    config::{Config, DatapathMode},
    netlink::{
        select::{self, DevicePatterns, Role},
        tables::{Link, Tables},
        xdp_features::{self, Features},
    },
};

/// What is chosen without the Node object, which names the node's addresses, and without Pods.
pub(super) fn roles(config: &Config, tables: &Tables) -> BTreeMap<u32, Role> {
    let patterns = DevicePatterns::new(&config.devices);
    select::devices(tables, &patterns, &[], &BTreeSet::new())
}

pub(super) fn look(rows: &mut Rows<'_>, config: &Config, tables: &Tables) {
    let roles = roles(config, tables);
    if roles.is_empty() {
        rows.note(
            "uplinks",
            "none",
            "traffic from outside is not handled until a device has a default route or the node's address, or is named with --device",
        );
    }
    let features = xdp_features::dump().ok();
    for (ifindex, role) in roles {
        let Some(link) = tables.link(ifindex) else {
            continue;
        };
        let kind = if link.kind.is_empty() { "card" } else { &link.kind };
        let (mode, why) = mode(config, tables, link, role, features.as_ref());
        let found = format!("{kind}, MTU {}, {mode}", link.mtu);
        rows.add(super::Verdict::Ok, link.name.as_str(), found, why);
    }
    let pods = tables
        .links
        .iter()
        .filter(|link| link.kind == "veth" && link.peer_namespace.is_some());
    let largest = pods.map(|link| link.mtu).max().unwrap_or(0);
    let smallest = tables
        .links
        .iter()
        .filter(|link| roles_contain(config, tables, link))
        .map(|link| link.mtu)
        .min()
        .unwrap_or(u32::MAX);
    if largest > smallest {
        rows.note(
            "MTU",
            format!("pods {largest}, smallest uplink {smallest}"),
            "senders are told packet by packet (path MTU discovery); give pods an MTU that fits where they ignore that",
        );
    }
}

fn roles_contain(config: &Config, tables: &Tables, link: &Link) -> bool {
    roles(config, tables).contains_key(&link.ifindex)
}

/// By what a device would take packets from outside, and why.
fn mode(
    config: &Config,
    tables: &Tables,
    link: &Link,
    role: Role,
    features: Option<&BTreeMap<u32, Features>>,
) -> (&'static str, String) {
    if let Some(xdp) = link.xdp {
        // Ours after a start; somebody else's stands in the rows of others too.
        return (
            "an XDP program is attached",
            format!(
                "program {}: the agent's own is taken over, with another's TC does the work",
                xdp.prog_id
            ),
        );
    }
    if config.datapath == DatapathMode::Tc {
        return ("TC", "--datapath tc".to_owned());
    }
    if link.is_layer3() || role == Role::Tunnel {
        return ("TC", "XDP is for uplinks with Ethernet headers".to_owned());
    }
    if let Some(reason) = select::unfit_for_xdp(tables, link, config.datapath == DatapathMode::Xdp) {
        return ("TC", reason);
    }
    match features.map(|features| features.get(&link.ifindex).copied().unwrap_or_default()) {
        Some(features) if features.has_basic() && features.has_transmit() => (
            "XDP",
            "the driver has it, also for what other devices send out here".to_owned(),
        ),
        Some(features) if features.has_basic() => (
            "XDP",
            "the driver has it; what would leave here from another device is TC's".to_owned(),
        ),
        Some(_) => ("TC", "the driver has no XDP".to_owned()),
        None => (
            "XDP or TC",
            "this kernel does not tell before an attempt (6.3); a device without XDP falls back by itself"
                .to_owned(),
        ),
    }
}

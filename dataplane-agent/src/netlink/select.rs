//! Which devices carry our programs: pure decisions over the kernel's tables.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use dataplane_common::device::{Device, device_flags};

use super::tables::{ADDRESS_SECONDARY, ADDRESS_UNUSABLE, Address, Link, Tables};
use crate::host::{OwnAddress, Reach};

/// What `--device` says: each value is a list of which the first element that names an existing device counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DevicePatterns {
    lists: Vec<Vec<String>>,
}

impl DevicePatterns {
    /// `values`: those of `--device`, as typed.
    pub fn new(values: &[String]) -> Self {
        let lists = values
            .iter()
            .map(|value| {
                value
                    .split(',')
                    .map(str::trim)
                    .filter(|name| !name.is_empty())
                    .map(str::to_owned)
                    .collect()
            })
            .filter(|list: &Vec<String>| !list.is_empty())
            .collect();
        Self { lists }
    }

    pub fn is_empty(&self) -> bool {
        self.lists.is_empty()
    }

    /// The devices that are named.
    pub fn chosen<'a>(&self, links: &'a [Link]) -> Vec<&'a Link> {
        let mut chosen = Vec::new();
        for list in &self.lists {
            let first = list
                .iter()
                .map(|pattern| {
                    links
                        .iter()
                        .filter(|link| matches(pattern, &link.name))
                        .collect::<Vec<_>>()
                })
                .find(|found| !found.is_empty());
            chosen.extend(first.unwrap_or_default());
        }
        chosen
    }

    /// The values that no device matches.
    pub fn absent(&self, links: &[Link]) -> Vec<String> {
        self.lists
            .iter()
            .filter(|list| {
                !list
                    .iter()
                    .any(|pattern| links.iter().any(|link| matches(pattern, &link.name)))
            })
            .map(|list| list.join(","))
            .collect()
    }
}

/// Shell patterns of `*` and `?`.
fn matches(pattern: &str, name: &str) -> bool {
    fn walk(pattern: &[u8], name: &[u8]) -> bool {
        match (pattern.first(), name.first()) {
            (None, None) => true,
            (Some(b'*'), _) => walk(&pattern[1..], name) || (!name.is_empty() && walk(pattern, &name[1..])),
            (Some(b'?'), Some(_)) => walk(&pattern[1..], &name[1..]),
            (Some(wanted), Some(found)) if wanted == found => walk(&pattern[1..], &name[1..]),
            _ => false,
        }
    }
    walk(pattern.as_bytes(), name.as_bytes())
}

/// A device that carries our programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Takes XDP too.
    Uplink,
    Tunnel,
}

/// The devices to attach to. `pods` are the interfaces of this node's pods, which are never uplinks.
///
/// By default these are the devices with a default route, a route by a gateway or one of the node's own addresses, and
/// network cards, bonds and VLANs that have an address. Tunnel devices are covered in every case.
pub fn devices(
    tables: &Tables,
    patterns: &DevicePatterns,
    node_addresses: &[IpAddr],
    pods: &BTreeSet<u32>,
) -> BTreeMap<u32, Role> {
    let role = |link: &Link| {
        if link.is_tunnel() {
            Role::Tunnel
        } else {
            Role::Uplink
        }
    };
    // Of link layers, Ethernet and none are known: InfiniBand's is neither.
    let usable = |link: &&Link| (link.is_ethernet() || link.is_layer3()) && !pods.contains(&link.ifindex);
    // What arrives at a port of a bond or team is handed to that, and only its egress knows the port.
    let whole = |link: &'_ Link| {
        let master = tables.link(link.master);
        let master = master.filter(|master| matches!(master.kind.as_str(), "bond" | "team"));
        master.map_or((link.ifindex, role(link)), |master| {
            (master.ifindex, role(master))
        })
    };
    let mut chosen: BTreeMap<u32, Role> = tables
        .links
        .iter()
        .filter(usable)
        .filter(|link| link.is_tunnel() && in_use(tables, link))
        .map(|link| (link.ifindex, Role::Tunnel))
        .collect();
    if patterns.is_empty() {
        let by_default = tables
            .links
            .iter()
            .filter(usable)
            .filter(|link| is_uplink(tables, node_addresses, link));
        chosen.extend(by_default.map(|link| (link.ifindex, role(link))));
    } else {
        chosen.extend(
            patterns
                .chosen(&tables.links)
                .into_iter()
                .filter(usable)
                .map(whole),
        );
    }
    chosen
}

/// A VLAN device on top of a device, if there is one. Drivers take the tags off, so XDP could not tell which packets are for
/// it.
pub fn vlan_above<'a>(tables: &'a Tables, below: &Link) -> Option<&'a Link> {
    tables
        .links
        .iter()
        .find(|link| link.kind == "vlan" && link.peer_namespace.is_none() && link.peer == below.ifindex)
}

/// Why XDP could not be right on a device whose driver has it, if so.
pub fn unfit_for_xdp(tables: &Tables, device: &Link, is_asked_for: bool) -> Option<String> {
    if let Some(vlan) = vlan_above(tables, device) {
        return Some(format!(
            "it carries {}, and its driver may hide VLAN tags from XDP",
            vlan.name
        ));
    }
    // The kernel drops these frames, and tells nobody.
    (device.kind == "veth" && !is_asked_for).then(|| {
        "the other end of a veth may not take what XDP sends, nor complete its checksums; --datapath xdp uses it all the same"
            .to_owned()
    })
}

/// The kernel makes `tunl0`, `sit0` and the like by itself, without addresses or routes.
fn in_use(tables: &Tables, link: &Link) -> bool {
    link.master != 0
        || tables.routes.iter().any(|route| route.ifindex == link.ifindex)
        || addresses_of(tables, link.ifindex).any(|address| address.scope == SCOPE_GLOBAL)
}

fn is_uplink(tables: &Tables, node_addresses: &[IpAddr], link: &Link) -> bool {
    let routed = tables
        .routes
        .iter()
        .any(|route| route.ifindex == link.ifindex && (route.has_gateway || route.prefix == 0));
    let is_node = addresses_of(tables, link.ifindex).any(|address| node_addresses.contains(&address.addr));
    let is_card = matches!(
        link.kind.as_str(),
        "" | "bond" | "team" | "vlan" | "macvlan" | "ipvlan"
    );
    // An address on a dummy or loopback device is reached by another device.
    let carries = link.kind != "dummy";
    carries
        && (routed
            || is_node
            || (is_card && addresses_of(tables, link.ifindex).any(|address| address.scope == SCOPE_GLOBAL)))
}

const SCOPE_GLOBAL: u8 = 0;

fn addresses_of(tables: &Tables, ifindex: u32) -> impl Iterator<Item = &Address> {
    tables
        .addresses
        .iter()
        .filter(move |address| address.ifindex == ifindex)
}

/// The entry of `DEVICES` for a device.
pub fn device_entry(
    tables: &Tables,
    link: &Link,
    role: Role,
    xdp: bool,
    node_addresses: &[IpAddr],
) -> Device {
    let primary = |ipv4: bool| {
        addresses_of(tables, link.ifindex)
            .filter(|address| {
                address.addr.is_ipv4() == ipv4
                    && address.scope == SCOPE_GLOBAL
                    && address.flags & (ADDRESS_SECONDARY | ADDRESS_UNUSABLE) == 0
            })
            .map(|address| address.addr)
            // A node's own address, if it is there, is the one that others know.
            .min_by_key(|addr| !node_addresses.contains(addr))
            .or_else(|| node_addresses.iter().copied().find(|addr| addr.is_ipv4() == ipv4))
    };
    let mut entry = Device {
        mac: link.mac,
        ..Device::default()
    };
    set_sources(&mut entry, primary);
    for (flag, on) in [
        (device_flags::ETHERNET, link.is_ethernet()),
        (device_flags::XDP, xdp),
        (device_flags::TUNNEL, role == Role::Tunnel),
    ] {
        if on {
            entry.flags |= flag;
        }
    }
    entry
}

/// The entry of `DEVICES` for `lo`: packets between loopback addresses that go elsewhere take the node's own address.
pub fn loopback_entry(node_addresses: &[IpAddr]) -> Device {
    let mut entry = Device {
        flags: device_flags::ETHERNET,
        ..Device::default()
    };
    set_sources(&mut entry, |ipv4| {
        node_addresses.iter().copied().find(|addr| addr.is_ipv4() == ipv4)
    });
    entry
}

fn set_sources(entry: &mut Device, of_family: impl Fn(bool) -> Option<IpAddr>) {
    if let Some(IpAddr::V4(addr)) = of_family(true) {
        entry.snat4_be = u32::from_ne_bytes(addr.octets());
    }
    if let Some(IpAddr::V6(addr)) = of_family(false) {
        entry.snat6_be = bytemuck::cast(addr.octets());
    }
}

/// Every address of the host, with how far it reaches.
pub fn own_addresses(tables: &Tables) -> BTreeMap<IpAddr, OwnAddress> {
    tables
        .addresses
        .iter()
        .filter_map(|address| {
            let link = tables.link(address.ifindex)?;
            let reach = match address.addr {
                addr if link.is_loopback() || addr.is_loopback() => Reach::Loopback,
                IpAddr::V4(addr) if addr.is_link_local() => Reach::Link,
                IpAddr::V6(addr) if addr.is_unicast_link_local() => Reach::Link,
                _ => Reach::Global,
            };
            Some((
                address.addr,
                OwnAddress {
                    ifindex: link.ifindex,
                    device: link.name.clone(),
                    reach,
                },
            ))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::tables::{HARDWARE_NONE, Route};

    fn link(ifindex: u32, name: &str, kind: &str) -> Link {
        Link {
            ifindex,
            name: name.into(),
            kind: kind.into(),
            hardware: 1,
            ..Link::default()
        }
    }

    fn address(ifindex: u32, addr: &str) -> Address {
        Address {
            ifindex,
            addr: addr.parse().unwrap(),
            scope: 0,
            flags: 0,
        }
    }

    fn names(tables: &Tables, patterns: &[&str], node: &[IpAddr]) -> Vec<String> {
        let patterns = DevicePatterns::new(&patterns.iter().map(ToString::to_string).collect::<Vec<_>>());
        devices(tables, &patterns, node, &BTreeSet::from([9]))
            .into_keys()
            .map(|ifindex| tables.link(ifindex).unwrap().name.clone())
            .collect()
    }

    fn node() -> Tables {
        let lo = Link {
            hardware: HARDWARE_LOOPBACK,
            ..link(1, "lo", "")
        };
        let veth = Link {
            peer_namespace: Some(0),
            ..link(9, "veth9", "veth")
        };
        Tables {
            links: vec![
                lo,
                link(2, "eth0", ""),
                link(3, "eth1", ""),
                link(4, "cni0", "bridge"),
                link(5, "flannel.1", "vxlan"),
                link(6, "dummy0", "dummy"),
                link(7, "up", "veth"),
                link(8, "tunl0", "ipip"),
                veth,
            ],
            addresses: vec![
                address(1, "127.0.0.1"),
                address(2, "192.0.2.10"),
                address(4, "10.0.1.1"),
                address(5, "10.0.1.0"),
                address(6, "10.96.0.10"),
                address(7, "198.51.100.2"),
            ],
            routes: vec![
                Route {
                    ifindex: 2,
                    prefix: 0,
                    has_gateway: true,
                },
                Route {
                    ifindex: 4,
                    prefix: 24,
                    has_gateway: false,
                },
                Route {
                    ifindex: 5,
                    prefix: 24,
                    has_gateway: true,
                },
                Route {
                    ifindex: 9,
                    prefix: 32,
                    has_gateway: false,
                },
            ],
        }
    }

    const HARDWARE_LOOPBACK: u16 = 772;

    #[test]
    fn uplinks_are_found_by_route_and_address() {
        assert_eq!(names(&node(), &[], &[]), ["eth0", "flannel.1"]);
        assert_eq!(
            names(&node(), &[], &["198.51.100.2".parse().unwrap()]),
            ["eth0", "flannel.1", "up"]
        );
    }

    #[test]
    fn first_match_of_a_list_counts_and_tunnels_stay() {
        assert_eq!(names(&node(), &["wg0,eth1,eth*"], &[]), ["eth1", "flannel.1"]);
        assert_eq!(
            names(&node(), &["wg0,wg0c,eth*"], &[]),
            ["eth0", "eth1", "flannel.1"]
        );
        assert_eq!(
            names(&node(), &["wg0", "eth?"], &[]),
            ["eth0", "eth1", "flannel.1"]
        );
        assert_eq!(
            names(&node(), &["veth9"], &[]),
            ["flannel.1"],
            "a pod's interface is no uplink"
        );
        let patterns = DevicePatterns::new(&["wg0,wg1".into(), "eth*".into()]);
        assert_eq!(patterns.absent(&node().links), ["wg0,wg1"]);
    }

    #[test]
    fn a_bond_stands_for_its_ports_and_a_vlan_is_found_on_top() {
        let mut tables = node();
        tables.links.push(link(20, "bond0", "bond"));
        tables.links.push(Link {
            master: 20,
            ..link(21, "port0", "")
        });
        tables.links.push(Link {
            peer: 20,
            ..link(22, "bond0.7", "vlan")
        });
        tables.addresses.push(address(22, "198.51.100.9"));
        assert_eq!(names(&tables, &["port0"], &[]), ["flannel.1", "bond0"]);
        assert_eq!(names(&tables, &[], &[]), ["eth0", "flannel.1", "bond0.7"]);
        let above = |ifindex| vlan_above(&tables, tables.link(ifindex).unwrap()).map(|link| link.ifindex);
        assert_eq!((above(20), above(21), above(2)), (Some(22), None, None));
    }

    #[test]
    fn the_source_is_the_devices_own_primary_address_else_the_nodes() {
        let mut tables = node();
        tables.addresses.insert(
            0,
            Address {
                flags: ADDRESS_SECONDARY,
                ..address(2, "192.0.2.99")
            },
        );
        let node_addresses = ["203.0.113.7".parse().unwrap()];
        let entry = |ifindex, role| {
            device_entry(
                &tables,
                tables.link(ifindex).unwrap(),
                role,
                false,
                &node_addresses,
            )
        };
        assert_eq!(entry(2, Role::Uplink).snat4_be.to_ne_bytes(), [192, 0, 2, 10]);
        assert_eq!(entry(3, Role::Uplink).snat4_be.to_ne_bytes(), [203, 0, 113, 7]);
        assert_eq!(entry(5, Role::Tunnel).snat4_be.to_ne_bytes(), [10, 0, 1, 0]);
        assert_eq!(
            entry(5, Role::Tunnel).flags,
            device_flags::ETHERNET | device_flags::TUNNEL
        );
    }

    #[test]
    fn devices_without_link_layer_are_tunnels_and_other_link_layers_are_left_alone() {
        const INFINIBAND: u16 = 32;
        let mut tables = node();
        for (ifindex, name, kind, hardware) in [
            (10, "tun0", "tun", HARDWARE_NONE),
            (11, "tun1", "tun", HARDWARE_NONE),
            (12, "wg0", "wireguard", HARDWARE_NONE),
            (13, "tap0", "tun", 1),
            (14, "ib0", "", INFINIBAND),
        ] {
            let hardware = Link {
                hardware,
                ..link(ifindex, name, kind)
            };
            tables.links.push(hardware);
        }
        tables.addresses.push(address(14, "198.51.100.9"));
        for (ifindex, prefix) in [(10, 32), (12, 0), (13, 24), (14, 0)] {
            tables.routes.push(Route {
                ifindex,
                prefix,
                has_gateway: false,
            });
        }
        assert_eq!(names(&tables, &[], &[]), ["eth0", "flannel.1", "tun0", "wg0"]);
        assert_eq!(
            names(&tables, &["tap*"], &[]),
            ["flannel.1", "tun0", "wg0", "tap0"]
        );
        let found = devices(&tables, &DevicePatterns::default(), &[], &BTreeSet::new());
        assert_eq!(
            found[&12],
            Role::Tunnel,
            "XDP has no place there, default route or not"
        );
        let node_addresses = ["192.0.2.10".parse().unwrap()];
        let entry = device_entry(
            &tables,
            tables.link(10).unwrap(),
            found[&10],
            false,
            &node_addresses,
        );
        assert_eq!(entry.flags, device_flags::TUNNEL);
        assert_eq!(entry.snat4_be.to_ne_bytes(), [192, 0, 2, 10]);
    }

    #[test]
    fn patterns_match_like_the_shells() {
        for (pattern, name, expected) in [
            ("eth*", "eth0", true),
            ("*", "x", true),
            ("e?h0", "eth0", true),
            ("eth", "eth0", false),
            ("*0", "eth0", true),
            ("a*b*c", "abc", true),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }
}

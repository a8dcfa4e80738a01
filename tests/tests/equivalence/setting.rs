//! A node for both builds: its devices and routes in a network namespace, and tables that say the same.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use anyhow::{Context as _, Result};
use dataplane_common::addr::{AnyAddr, Family, Mac, V4, V6, proto};
use dataplane_common::backend::{Backend, BackendHead, backend_flags, backend_state};
use dataplane_common::config::{Config, config_flags};
use dataplane_common::device::{Device, device_flags, own_flags};
use dataplane_common::memory::{Memory, MemoryRange, MemoryRoute};
use dataplane_common::service::{ECHO_PORT, Scope, Service, ServiceHead, service_flags};
use dataplane_tests::links::{Links, Route, everywhere};
use dataplane_tests::netns::{NetNs, set_sysctls};
use nix::sched::{CloneFlags, unshare};

/// Devices with a peer each, and their MTU.
const DEVICES: [(&str, u32); 7] = [
    ("up0", 1500),
    ("up1", 1500),
    ("up2", 1300),
    ("up3", 1500),
    ("tun0", 1450),
    ("pod0", 1500),
    ("pod1", 1500),
];

/// Elements of `HELD`.
pub const HELD: u32 = 8192;

/// The MAC address of every neighbour.
const NEIGHBOUR: [u8; 6] = [2, 0, 0, 0, 0, 0x99];

/// The indexes of the devices.
#[derive(Clone, Copy, Debug)]
pub struct Indexes {
    pub up0: u32,
    pub up1: u32,
    pub up2: u32,
    pub up3: u32,
    pub tun0: u32,
    pub pod0: u32,
    pub pod1: u32,
}

/// Everything a packet can be drawn from.
#[derive(Clone, Debug)]
pub struct Setting {
    pub memory: Memory,
    pub indexes: Indexes,
    pub addresses4: Vec<IpAddr>,
    pub addresses6: Vec<IpAddr>,
    /// Ports of frontends, backends, clients and of the range for translation.
    pub ports: Vec<u16>,
}

fn v4(c: u8, d: u8) -> IpAddr {
    [10, 244, c, d].into()
}

fn v6(c: u8, d: u8) -> IpAddr {
    [0xfd00, 0x244, u16::from(c), 0, 0, 0, 0, u16::from(d)].into()
}

pub fn any(ip: IpAddr) -> AnyAddr {
    match ip {
        IpAddr::V4(ip) => V4::to_any(u32::from_ne_bytes(ip.octets())),
        IpAddr::V6(ip) => bytemuck::cast(ip.octets()),
    }
}

/// An own address on the network of uplink `n`, and the neighbour there.
fn own(version: u8, n: u8) -> IpAddr {
    if version == 4 {
        [192, 168, n, 1].into()
    } else {
        [0xfd00, 0x168, u16::from(n), 0, 0, 0, 0, 1].into()
    }
}

fn gateway(version: u8, n: u8) -> IpAddr {
    if version == 4 {
        [192, 168, n, 2].into()
    } else {
        [0xfd00, 0x168, u16::from(n), 0, 0, 0, 0, 2].into()
    }
}

fn absent_gateway(version: u8) -> IpAddr {
    if version == 4 {
        [192, 168, 0, 77].into()
    } else {
        [0xfd00, 0x168, 0, 0, 0, 0, 0, 0x77].into()
    }
}

/// Where a pod network leads.
const NETWORKS: [(u8, &str, u8); 5] = [
    (1, "up0", 0),
    (2, "up1", 1),
    (3, "tun0", 4),
    (5, "up2", 2),
    (7, "up3", 3),
];

/// Makes the namespace and moves the calling thread there for good; no name, so it ends with the thread.
pub fn enter() -> Result<(NetNs, Links)> {
    unshare(CloneFlags::CLONE_NEWNET).context("failed to make a network namespace")?;
    let netns = NetNs::open(Path::new("/proc/thread-self/ns/net"))?;
    let mut links = Links::open(&netns)?;
    set_sysctls(&[
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv6/conf/all/forwarding", "1"),
        ("net/ipv6/conf/default/forwarding", "1"),
    ])?;
    links.set_up("lo")?;
    for (name, mtu) in DEVICES {
        let peer = format!("{name}p");
        links.add_veth(name, &peer, netns.fd(), Some(mtu))?;
        links.set_up(name)?;
        links.set_up(&peer)?;
    }
    for version in [4, 6] {
        let (net, len, one) = if version == 4 {
            (24, 32, v4 as fn(u8, u8) -> IpAddr)
        } else {
            (64, 128, v6 as _)
        };
        for (network, device, n) in NETWORKS {
            links.add_address(device, (own(version, n), net))?;
            links.add_neighbour(device, gateway(version, n), NEIGHBOUR)?;
            links.add_route((one(network, 0), net), via(gateway(version, n), device))?;
        }
        links.add_route((one(4, 0), net), via(absent_gateway(version), "up0"))?;
        let blackhole = Route {
            blackhole: true,
            ..Route::default()
        };
        links.add_route((one(6, 0), net), blackhole)?;
        for (number, device) in [(10, "pod0"), (11, "pod1")] {
            let direct = Route {
                device: Some(device),
                ..Route::default()
            };
            links.add_route((one(0, number), len), direct)?;
            links.add_neighbour(device, one(0, number), NEIGHBOUR)?;
        }
        links.add_route(everywhere(own(version, 0)), via(gateway(version, 0), "up0"))?;
    }
    Ok((netns, links))
}

fn via(gateway: IpAddr, device: &str) -> Route<'_> {
    Route {
        via: Some(gateway),
        device: Some(device),
        ..Route::default()
    }
}

/// The link-layer address of a device of the calling thread's namespace.
fn mac_of(name: &str) -> Result<Mac> {
    nix::ifaddrs::getifaddrs()?
        .filter(|interface| interface.interface_name == name)
        .find_map(|interface| interface.address?.as_link_addr()?.addr())
        .map(Mac)
        .with_context(|| format!("{name} has no link-layer address"))
}

impl Setting {
    pub fn new(links: &mut Links) -> Result<Self> {
        let indexes = Indexes {
            up0: links.index("up0")?,
            up1: links.index("up1")?,
            up2: links.index("up2")?,
            up3: links.index("up3")?,
            tun0: links.index("tun0")?,
            pod0: links.index("pod0")?,
            pod1: links.index("pod1")?,
        };
        let mut setting = Self {
            memory: Memory {
                config: Config {
                    flags: config_flags::FAST_PATH
                        | config_flags::SOURCE_CHECK
                        | crate::kernel::config_flags()?,
                    // Few, so that they collide and run out.
                    snat_port_min: 61_000,
                    snat_port_max: 61_015,
                    refusals_per_tick: u32::MAX,
                    verdicts_per_tick: u32::MAX,
                    // One clock stands still. And so many places that none has to be taken from another.
                    fragment_ticks: u32::MAX / 2,
                    held: HELD,
                    ..Config::default()
                },
                ..Memory::default()
            },
            indexes,
            addresses4: Vec::new(),
            addresses6: Vec::new(),
            ports: vec![80, 81, 82, 83, 84, 8080, 30080, 30081, 40001, 40002, 40003],
        };
        setting.ports.extend(61_000..61_006);
        setting.add_routes(links)?;
        setting.add_devices()?;
        for version in [4, 6] {
            for l4 in [proto::TCP, proto::UDP] {
                setting.add_services(version, l4);
            }
            setting.add_addresses(version);
            let icmp = if version == 4 { proto::ICMP } else { proto::ICMPV6 };
            for scope in [Scope::Internal, Scope::External] {
                // The value is not looked at.
                setting.add_frontend(any(cluster_ip(version, 1)), version, ECHO_PORT, icmp, scope, 0);
            }
        }
        let memory = &mut setting.memory;
        memory.config.services = memory.services.len() as u32;
        memory.config.backends = memory.backends.len() as u32;
        memory.config.maglev = memory.maglev.len() as u32;
        Ok(setting)
    }

    fn add_routes(&mut self, links: &mut Links) -> Result<()> {
        for version in [4, 6] {
            let (net, full, one) = if version == 4 {
                (24, 32, v4 as fn(u8, u8) -> IpAddr)
            } else {
                (64, 128, v6 as _)
            };
            let mut add = |ip, length, device: Option<&str>, known: bool| -> Result<()> {
                let (ifindex, mtu, mac) = match device {
                    Some(name) => {
                        let mtu = DEVICES.iter().find(|d| d.0 == name).map_or(0, |d| d.1);
                        (links.index(name)?, mtu, mac_of(name)?)
                    }
                    None => (0, 0, Mac::default()),
                };
                self.memory.routes.push(MemoryRoute {
                    version,
                    network: any(ip),
                    length,
                    ifindex,
                    mtu: mtu as u16,
                    macs: known.then_some((Mac(NEIGHBOUR), mac)),
                });
                Ok(())
            };
            add(localhost(version), full, None, false)?;
            for (network, device, n) in NETWORKS {
                add(own(version, n), full, None, false)?;
                add(one(network, 0), net, Some(device), true)?;
            }
            for (_, device, n) in NETWORKS {
                add(gateway(version, n), full, Some(device), true)?;
                add(own(version, n), net, Some(device), false)?;
            }
            add(one(4, 0), net, Some("up0"), false)?;
            add(one(6, 0), net, None, false)?;
            add(one(0, 10), full, Some("pod0"), true)?;
            add(one(0, 11), full, Some("pod1"), true)?;
            add(one(0, 0), 0, Some("up0"), true)?;
        }
        Ok(())
    }

    fn add_devices(&mut self) -> Result<()> {
        let Indexes {
            up0, up1, up2, tun0, ..
        } = self.indexes;
        let plain = device_flags::ETHERNET;
        for (name, ifindex, n, flags) in [
            ("up0", up0, 0, plain | device_flags::XDP),
            ("up1", up1, 1, plain | device_flags::XDP),
            ("up2", up2, 2, plain),
            ("tun0", tun0, 4, plain | device_flags::TUNNEL),
        ] {
            let device = Device {
                flags,
                snat4_be: any(own(4, n))[0],
                // The node lacks an address for one of them.
                snat6_be: if n == 2 { [0; 4] } else { any(own(6, n)) },
                mac: mac_of(name)?,
                unused: [0; 2],
            };
            self.memory.devices.insert(ifindex, device);
        }
        let lo = Device {
            flags: plain,
            snat4_be: any(own(4, 0))[0],
            ..Device::default()
        };
        self.memory.devices.insert(1, lo);
        Ok(())
    }

    fn add_backends(&mut self, version: u8) -> Vec<u32> {
        let Indexes { pod0, pod1, .. } = self.indexes;
        let one = if version == 4 { v4 } else { v6 };
        let local = backend_flags::LOCAL;
        let first = self.memory.backends.len() as u32;
        for (ip, flags, ifindex) in [
            (one(0, 10), local | backend_flags::FAST_PATH, pod0),
            (one(0, 11), local, pod1),
            (one(0, 12), local, 0),
            (own(version, 0), backend_flags::HOST, 0),
            (one(1, 5), 0, 0),
            (one(2, 5), 0, 0),
            (one(3, 5), 0, 0),
            (one(4, 5), 0, 0),
            (one(5, 5), 0, 0),
            (one(6, 5), 0, 0),
            (one(7, 5), 0, 0),
        ] {
            self.memory.backends.push(Backend {
                head: BackendHead {
                    generation: 1,
                    port_be: 8080u16.to_be(),
                    state: backend_state::ACTIVE,
                    flags,
                },
                addr_be: any(ip),
                ifindex,
                pod_mac: Mac([2, 0, 0, 0, 1, ifindex as u8]),
                host_mac: Mac([2, 0, 0, 0, 2, ifindex as u8]),
                ..Backend::default()
            });
        }
        (first..self.memory.backends.len() as u32).collect()
    }

    fn add_services(&mut self, version: u8, l4: u8) {
        let backends = self.add_backends(version);
        let all = self.memory.add_slice(&backends);
        let pods = self.memory.add_slice(&backends[..2]);
        let remote = self.memory.add_slice(&backends[4..6]);
        let any_address = if version == 4 {
            [0, 0, 0, 0].into()
        } else {
            [0u16; 8].into()
        };
        let mut with_affinity = 0;
        for (addr, port, slots, flags) in [
            (cluster_ip(version, 1), 80, Some(pods), 0),
            (cluster_ip(version, 1), 81, Some(all), 0),
            (cluster_ip(version, 1), 82, None, 0),
            (cluster_ip(version, 1), 83, None, service_flags::DROP_WHEN_EMPTY),
            (cluster_ip(version, 1), 84, Some(u32::MAX - 9), 0),
            (cluster_ip(version, 2), 80, Some(all), service_flags::AFFINITY),
            (
                cluster_ip(version, 2),
                82,
                Some(u32::MAX - 9),
                service_flags::AFFINITY,
            ),
            // An own address as an external one.
            (own(version, 0), 80, Some(pods), 0),
            // A Pod's host port there.
            (localhost(version), 81, Some(pods), 0),
            (any_address, 30080, Some(all), 0),
            (
                any_address,
                30081,
                Some(remote),
                service_flags::AFFINITY | service_flags::AFFINITY_SHARED,
            ),
            (any_address, 84, None, service_flags::RANGES),
            (cluster_ip(version, 2), 83, Some(remote), service_flags::RANGES),
        ] {
            let service = self.memory.services.len() as u32;
            if flags == service_flags::AFFINITY {
                with_affinity = service;
            }
            self.memory.services.push(Service {
                head: ServiceHead {
                    slots_offset: slots.unwrap_or(0),
                    generation: 1,
                    size_class: u8::from(slots.is_some()),
                    flags,
                },
                family: version,
                proto: l4,
                // Longer than a run, because the host build's clock stands still.
                affinity: if flags & service_flags::AFFINITY_SHARED == 0 {
                    1 << 24
                } else {
                    with_affinity
                },
                ..Service::default()
            });
            self.add_ranges(version, service);
            for scope in [Scope::Internal, Scope::External] {
                self.add_frontend(any(addr), version, port, l4, scope, service);
            }
            self.memory.add_port(l4, port, addr == any_address);
        }
        // A frontend that points nowhere.
        self.add_frontend(
            any(cluster_ip(version, 2)),
            version,
            81,
            l4,
            Scope::Internal,
            1 << 20,
        );
    }

    /// A few of these that are drawn from, whole networks and single addresses; some services have none.
    fn add_ranges(&mut self, version: u8, service: u32) {
        let (net, full, one) = if version == 4 {
            (24, 32, v4 as fn(u8, u8) -> IpAddr)
        } else {
            (64, 128, v6 as _)
        };
        let ranges = [
            (one(0, 0), net),
            (client(version, 7), full),
            (one(1, 5), full),
            (one(0, 10), full - 1),
            (one(0, 0), 0),
        ];
        let count = [4, 2, 1, 0, 5][service as usize % 5];
        for (addr, length) in ranges.into_iter().rev().take(count) {
            let range = MemoryRange {
                service,
                network: any(addr),
                length,
            };
            if version == 4 {
                self.memory.v4.ranges.push(range);
            } else {
                self.memory.v6.ranges.push(range);
            }
        }
    }

    fn add_frontend(&mut self, addr: AnyAddr, version: u8, port: u16, l4: u8, scope: Scope, service: u32) {
        if version == 4 {
            let key = V4::frontend_key(addr[0], port.to_be(), l4, scope);
            self.memory.v4.frontends.insert(key, service);
        } else {
            let key = V6::frontend_key(addr, port.to_be(), l4, scope);
            self.memory.v6.frontends.insert(key, service);
        }
    }

    fn add_addresses(&mut self, version: u8) {
        let one = if version == 4 { v4 } else { v6 };
        for (addr, flags) in [
            (own(version, 0), own_flags::NODE_PORT),
            (own(version, 1), 0),
            (localhost(version), own_flags::HOST_NODE_PORT),
        ] {
            let addr = any(addr);
            if version == 4 {
                self.memory.v4.own_addresses.insert(addr[0], flags);
            } else {
                self.memory.v6.own_addresses.insert(addr, flags);
            }
        }
        let mut pool = vec![cluster_ip(version, 1); 4];
        pool.extend([cluster_ip(version, 2); 3]);
        pool.extend([own(version, 0), own(version, 0), own(version, 1)]);
        pool.extend([localhost(version); 2]);
        pool.extend((1..8).map(|network| one(network, 5)));
        pool.extend([one(0, 10), one(0, 10), one(0, 11), one(0, 12)]);
        pool.extend([client(version, 7), client(version, 7), client(version, 8)]);
        if version == 4 {
            self.addresses4 = pool;
        } else {
            self.addresses6 = pool;
        }
    }
}

fn localhost(version: u8) -> IpAddr {
    if version == 4 {
        Ipv4Addr::LOCALHOST.into()
    } else {
        Ipv6Addr::LOCALHOST.into()
    }
}

fn cluster_ip(version: u8, n: u8) -> IpAddr {
    if version == 4 {
        [10, 96, 0, n].into()
    } else {
        [0xfd00, 0x96, 0, 0, 0, 0, 0, u16::from(n)].into()
    }
}

fn client(version: u8, n: u8) -> IpAddr {
    if version == 4 {
        [203, 0, 113, n].into()
    } else {
        [0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(n)].into()
    }
}

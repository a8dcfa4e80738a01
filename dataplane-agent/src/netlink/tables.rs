//! Links, addresses and routes as the agent uses them, dumped from the kernel.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::RawFd,
};

use dataplane_common::addr::Mac;

use super::socket::{Message, RequestSocket, attributes, push_attribute, read_string, read_u16, read_u32};

const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
pub(super) const RTM_GETROUTE: u16 = 26;

const IFINFO_LEN: usize = 16;
const IFADDR_LEN: usize = 8;
pub(super) const RTMSG_LEN: usize = 12;

pub(super) const AF_INET: u8 = 2;
pub(super) const AF_INET6: u8 = 10;

/// `ARPHRD_ETHER`.
const HARDWARE_ETHERNET: u16 = 1;
/// `ARPHRD_LOOPBACK`.
const HARDWARE_LOOPBACK: u16 = 772;
/// `ARPHRD_PPP`, `ARPHRD_RAWIP` and so on.
const HARDWARE_PPP: u16 = 512;
const HARDWARE_RAWIP: u16 = 519;
const HARDWARE_TUNNEL: u16 = 768;
const HARDWARE_TUNNEL6: u16 = 769;
const HARDWARE_SIT: u16 = 776;
const HARDWARE_IPGRE: u16 = 778;
const HARDWARE_IP6GRE: u16 = 823;
/// tun and WireGuard.
pub const HARDWARE_NONE: u16 = 0xfffe;

/// A network device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    pub ifindex: u32,
    pub name: String,
    /// `rtnl_link`'s kind, such as `veth`; empty for hardware.
    pub kind: String,
    pub hardware: u16,
    pub mac: Mac,
    pub mtu: u32,
    /// The device this one is a port of, or 0.
    pub master: u32,
    /// The other end of a veth pair, the device below a VLAN, or 0.
    pub peer: u32,
    /// The namespace that `peer` is in, when it is not this one.
    pub peer_namespace: Option<i32>,
    pub xdp: Option<XdpState>,
}

impl Link {
    pub fn is_ethernet(&self) -> bool {
        self.hardware == HARDWARE_ETHERNET
    }

    pub fn is_loopback(&self) -> bool {
        self.hardware == HARDWARE_LOOPBACK
    }

    /// Packets come out of others of IP: IPIP, SIT, GRE and their kin of IPv6.
    pub fn is_ip_tunnel(&self) -> bool {
        matches!(
            self.hardware,
            HARDWARE_TUNNEL | HARDWARE_TUNNEL6 | HARDWARE_SIT | HARDWARE_IPGRE | HARDWARE_IP6GRE
        )
    }

    /// Packets begin with the IP header: what the kernel says of tun, WireGuard, IPIP, GRE, PPP and some modems
    /// (`dev_is_mac_header_xmit`).
    pub fn is_layer3(&self) -> bool {
        matches!(self.hardware, HARDWARE_PPP | HARDWARE_RAWIP | HARDWARE_NONE) || self.is_ip_tunnel()
    }

    /// Devices that wrap packets into others, or hand them to a process that does.
    pub fn is_tunnel(&self) -> bool {
        self.is_layer3()
            || matches!(
                self.kind.as_str(),
                "vxlan"
                    | "geneve"
                    | "ipip"
                    | "ip6tnl"
                    | "sit"
                    | "gre"
                    | "gretap"
                    | "ip6gre"
                    | "ip6gretap"
                    | "erspan"
                    | "ip6erspan"
                    | "wireguard"
            )
    }
}

/// What `IFLA_XDP` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct XdpState {
    /// `XDP_ATTACHED_*`: 1 driver, 2 generic, 3 hardware, 4 several.
    pub mode: u8,
    pub prog_id: u32,
}

/// An address of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    pub ifindex: u32,
    pub addr: IpAddr,
    /// `RT_SCOPE_*`: 0 is global, 253 link, 254 host.
    pub scope: u8,
    /// `IFA_F_*`.
    pub flags: u32,
}

/// `IFA_F_SECONDARY` (IPv4) or `IFA_F_TEMPORARY` (IPv6).
pub const ADDRESS_SECONDARY: u32 = 0x01;
/// `IFA_F_DADFAILED`, `IFA_F_DEPRECATED` and `IFA_F_TENTATIVE`.
pub const ADDRESS_UNUSABLE: u32 = 0x08 | 0x20 | 0x40;

/// A unicast route: one entry for each next hop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    pub ifindex: u32,
    /// 0 is a default route.
    pub prefix: u8,
    pub has_gateway: bool,
}

/// The machine's tables at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    pub links: Vec<Link>,
    pub addresses: Vec<Address>,
    pub routes: Vec<Route>,
}

impl Tables {
    pub fn dump(socket: &mut RequestSocket) -> io::Result<Self> {
        let mut routes = dump_routes(socket, AF_INET)?;
        // A kernel without IPv6 answers EOPNOTSUPP.
        routes.extend(dump_routes(socket, AF_INET6).unwrap_or_default());
        Ok(Self {
            links: dump_links(socket)?,
            addresses: dump_addresses(socket, None)?,
            routes,
        })
    }

    pub fn link(&self, ifindex: u32) -> Option<&Link> {
        self.links.iter().find(|link| link.ifindex == ifindex)
    }
}

/// Every device of this namespace.
pub fn dump_links(socket: &mut RequestSocket) -> io::Result<Vec<Link>> {
    const IFLA_EXT_MASK: u16 = 29;
    const RTEXT_FILTER_SKIP_STATS: u32 = 8;
    let mut body = vec![0; IFINFO_LEN];
    push_attribute(&mut body, IFLA_EXT_MASK, &RTEXT_FILTER_SKIP_STATS.to_ne_bytes());
    Ok(socket
        .dump(RTM_GETLINK, &body)?
        .iter()
        .filter_map(parse_link)
        .collect())
}

/// The names of this namespace's devices, by their indices.
pub fn device_names() -> io::Result<BTreeMap<u32, String>> {
    let links = dump_links(&mut RequestSocket::open()?)?.into_iter();
    Ok(links.map(|link| (link.ifindex, link.name)).collect())
}

/// What to call a device: where it has no name here, its index.
pub fn device_name(names: &BTreeMap<u32, String>, ifindex: u32) -> String {
    let name = names.get(&ifindex).cloned();
    name.unwrap_or_else(|| ifindex.to_string())
}

/// One device of another namespace, or of this one.
pub fn get_link(socket: &mut RequestSocket, namespace: Option<i32>, ifindex: u32) -> io::Result<Link> {
    const IFLA_TARGET_NETNSID: u16 = 46;
    let mut body = vec![0; IFINFO_LEN];
    body[4..8].copy_from_slice(&ifindex.to_ne_bytes());
    if let Some(namespace) = namespace {
        push_attribute(&mut body, IFLA_TARGET_NETNSID, &namespace.to_ne_bytes());
    }
    let message = socket.get(RTM_GETLINK, &body)?;
    parse_link(&message).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

/// Every address of this or another namespace.
pub fn dump_addresses(socket: &mut RequestSocket, namespace: Option<i32>) -> io::Result<Vec<Address>> {
    const IFA_TARGET_NETNSID: u16 = 10;
    let mut body = vec![0; IFADDR_LEN];
    if let Some(namespace) = namespace {
        push_attribute(&mut body, IFA_TARGET_NETNSID, &namespace.to_ne_bytes());
    }
    Ok(socket
        .dump(RTM_GETADDR, &body)?
        .iter()
        .filter_map(parse_address)
        .collect())
}

/// The number that this namespace has for the one behind a descriptor; `None`: none yet.
pub fn namespace_id(socket: &mut RequestSocket, namespace: RawFd) -> io::Result<Option<i32>> {
    const RTM_GETNSID: u16 = 90;
    const NETNSA_NSID: u16 = 1;
    const NETNSA_FD: u16 = 3;
    /// `struct rtgenmsg`, padded.
    const RTGENMSG_LEN: usize = 4;
    let mut body = vec![0; RTGENMSG_LEN];
    push_attribute(&mut body, NETNSA_FD, &namespace.cast_unsigned().to_ne_bytes());
    let message = socket.get(RTM_GETNSID, &body)?;
    let mut found = attributes(message.body.get(RTGENMSG_LEN..).unwrap_or_default());
    let id = found.find(|(kind, _)| *kind == NETNSA_NSID);
    let id = id.and_then(|(_, value)| read_u32(value, 0));
    Ok(id.map(u32::cast_signed).filter(|id| *id >= 0))
}

fn dump_routes(socket: &mut RequestSocket, family: u8) -> io::Result<Vec<Route>> {
    const RTN_UNICAST: u8 = 1;
    let mut body = vec![0; RTMSG_LEN];
    body[0] = family;
    body[7] = RTN_UNICAST;
    match socket.dump(RTM_GETROUTE, &body) {
        Ok(messages) => Ok(messages.iter().flat_map(parse_route).collect()),
        // Nothing matches the filter.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

pub fn parse_link(message: &Message) -> Option<Link> {
    const IFLA_ADDRESS: u16 = 1;
    const IFLA_IFNAME: u16 = 3;
    const IFLA_MTU: u16 = 4;
    const IFLA_LINK: u16 = 5;
    const IFLA_MASTER: u16 = 10;
    const IFLA_LINKINFO: u16 = 18;
    const IFLA_LINK_NETNSID: u16 = 37;
    const IFLA_XDP: u16 = 43;
    const IFLA_INFO_KIND: u16 = 1;
    if message.kind != RTM_NEWLINK {
        return None;
    }
    let mut link = Link {
        hardware: read_u16(&message.body, 2)?,
        ifindex: read_u32(&message.body, 4)?,
        ..Link::default()
    };
    for (kind, value) in attributes(message.body.get(IFINFO_LEN..)?) {
        match kind {
            IFLA_ADDRESS => link.mac = Mac(value.try_into().unwrap_or_default()),
            IFLA_IFNAME => link.name = read_string(value),
            IFLA_MTU => link.mtu = read_u32(value, 0)?,
            IFLA_LINK => link.peer = read_u32(value, 0)?,
            IFLA_MASTER => link.master = read_u32(value, 0)?,
            IFLA_LINKINFO => {
                if let Some((_, kind)) = attributes(value).find(|&(kind, _)| kind == IFLA_INFO_KIND) {
                    link.kind = read_string(kind);
                }
            }
            IFLA_LINK_NETNSID => {
                link.peer_namespace = read_u32(value, 0).map(u32::cast_signed).filter(|&id| id >= 0);
            }
            IFLA_XDP => link.xdp = parse_xdp(value),
            _ => {}
        }
    }
    Some(link)
}

fn parse_xdp(value: &[u8]) -> Option<XdpState> {
    const IFLA_XDP_ATTACHED: u16 = 2;
    const IFLA_XDP_PROG_ID: u16 = 4;
    let mut state = XdpState { mode: 0, prog_id: 0 };
    for (kind, value) in attributes(value) {
        match kind {
            IFLA_XDP_ATTACHED => state.mode = *value.first()?,
            IFLA_XDP_PROG_ID => state.prog_id = read_u32(value, 0)?,
            _ => {}
        }
    }
    (state.mode != 0).then_some(state)
}

fn parse_address(message: &Message) -> Option<Address> {
    const IFA_ADDRESS: u16 = 1;
    const IFA_LOCAL: u16 = 2;
    const IFA_FLAGS: u16 = 8;
    if message.kind != RTM_NEWADDR {
        return None;
    }
    let &[_, _, flags, scope] = message.body.first_chunk::<4>()?;
    let mut flags = u32::from(flags);
    let ifindex = read_u32(&message.body, 4)?;
    let mut addr = None;
    for (kind, value) in attributes(message.body.get(IFADDR_LEN..)?) {
        match kind {
            // On a point-to-point device `IFA_ADDRESS` is the other end's.
            IFA_LOCAL => addr = parse_ip(value),
            IFA_ADDRESS if addr.is_none() => addr = parse_ip(value),
            IFA_FLAGS => flags = read_u32(value, 0)?,
            _ => {}
        }
    }
    Some(Address {
        ifindex,
        addr: addr?,
        scope,
        flags,
    })
}

pub(super) fn parse_ip(value: &[u8]) -> Option<IpAddr> {
    if let Ok(octets) = <[u8; 4]>::try_from(value) {
        return Some(Ipv4Addr::from(octets).into());
    }
    <[u8; 16]>::try_from(value)
        .ok()
        .map(|octets| Ipv6Addr::from(octets).into())
}

fn parse_route(message: &Message) -> Vec<Route> {
    const RTA_OIF: u16 = 4;
    const RTA_GATEWAY: u16 = 5;
    const RTA_MULTIPATH: u16 = 9;
    const RTA_VIA: u16 = 18;
    const NEXT_HOP_LEN: usize = 8;
    let (RTM_NEWROUTE, Some(&prefix), Some(rest)) =
        (message.kind, message.body.get(1), message.body.get(RTMSG_LEN..))
    else {
        return Vec::new();
    };
    let gateway_in = |bytes| attributes(bytes).any(|(kind, _)| matches!(kind, RTA_GATEWAY | RTA_VIA));
    let mut routes = Vec::new();
    for (kind, value) in attributes(rest) {
        match kind {
            RTA_OIF => {
                let ifindex = read_u32(value, 0).unwrap_or(0);
                routes.push(Route {
                    ifindex,
                    prefix,
                    has_gateway: gateway_in(rest),
                });
            }
            RTA_MULTIPATH => {
                let mut hops = value;
                while let (Some(len), Some(ifindex)) = (read_u16(hops, 0), read_u32(hops, 4)) {
                    let len = usize::from(len);
                    let Some(own) = hops.get(NEXT_HOP_LEN..len) else {
                        break;
                    };
                    routes.push(Route {
                        ifindex,
                        prefix,
                        has_gateway: gateway_in(own),
                    });
                    hops = hops.get(len.next_multiple_of(4)..).unwrap_or_default();
                }
            }
            _ => {}
        }
    }
    routes
}

//! Devices, addresses, routes, neighbours and rules of one namespace, in the words of `ip`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use anyhow::{Context, Result, bail};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{
    BondMode, InfoBond, InfoBridge, InfoBridgePort, InfoData, InfoIpTunnel, InfoKind, InfoPortData,
    InfoPortKind, InfoVeth, InfoVlan, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, LinkXdp,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::netlink::Netlink;
use crate::netns::NetNs;

/// `RTAX_MTU`.
const METRIC_MTU: u32 = 2;

/// An address with the length of its network.
pub type Prefix = (IpAddr, u8);

/// Every destination of the family of `like`.
pub fn everywhere(like: IpAddr) -> Prefix {
    match like {
        IpAddr::V4(_) => (Ipv4Addr::UNSPECIFIED.into(), 0),
        IpAddr::V6(_) => (Ipv6Addr::UNSPECIFIED.into(), 0),
    }
}

/// The address alone, as a network.
pub fn host(ip: IpAddr) -> Prefix {
    (ip, if ip.is_ipv4() { 32 } else { 128 })
}

/// How a route sends its packets on.
#[derive(Debug, Clone, Copy, Default)]
pub struct Route<'a> {
    pub via: Option<IpAddr>,
    pub device: Option<&'a str>,
    /// The gateway is taken as a neighbour on the device, whatever the addresses say.
    pub onlink: bool,
    /// A table of its own; the main one if absent.
    pub table: Option<u32>,
    /// Discard silently.
    pub blackhole: bool,
    /// The largest packet that goes this way, whatever is learned; the device's if absent.
    pub mtu: Option<u32>,
}

/// The devices of a namespace.
#[derive(Debug)]
pub struct Links {
    netlink: Netlink,
}

impl Links {
    pub fn open(netns: &NetNs) -> Result<Self> {
        Ok(Self {
            netlink: Netlink::open(netns)?,
        })
    }

    /// The index of a device.
    pub fn index(&mut self, name: &str) -> Result<u32> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        let answers = self
            .netlink
            .request(RouteNetlinkMessage::GetLink(message), 0)
            .with_context(|| format!("failed to find device {name}"))?;
        match answers.first() {
            Some(RouteNetlinkMessage::NewLink(link)) => Ok(link.header.index),
            _ => bail!("the kernel did not describe device {name}"),
        }
    }

    /// A veth pair: `name` here, `peer` in another namespace.
    pub fn add_veth(&mut self, name: &str, peer: &str, peer_netns: RawFd, mtu: Option<u32>) -> Result<()> {
        let mut other = LinkMessage::default();
        other.attributes.push(LinkAttribute::IfName(peer.to_owned()));
        other.attributes.push(LinkAttribute::NetNsFd(peer_netns));
        other.attributes.extend(mtu.map(LinkAttribute::Mtu));
        self.add(
            name,
            InfoKind::Veth,
            Some(InfoData::Veth(InfoVeth::Peer(other))),
            mtu,
            None,
        )
    }

    /// Removes a device, and of a veth its other end.
    pub fn delete(&mut self, name: &str) -> Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = self.index(name)?;
        self.netlink
            .request(RouteNetlinkMessage::DelLink(message), 0)
            .map(drop)
            .with_context(|| format!("failed to remove device {name}"))
    }

    /// A bridge that forwards at once and floods multicast (neighbour discovery) to every port.
    pub fn add_bridge(&mut self, name: &str, mtu: Option<u32>) -> Result<()> {
        let data = InfoData::Bridge(vec![InfoBridge::MulticastSnooping(false)]);
        self.add(name, InfoKind::Bridge, Some(data), mtu, None)
    }

    /// A VXLAN device with static entries only, as an overlay network's agent makes it.
    pub fn add_vxlan(
        &mut self,
        name: &str,
        under: &str,
        local: IpAddr,
        mac: [u8; 6],
        mtu: u32,
    ) -> Result<()> {
        let own = match local {
            IpAddr::V4(ip) => InfoVxlan::Local(ip),
            IpAddr::V6(ip) => InfoVxlan::Local6(ip),
        };
        let under = self.index(under)?;
        let data = vec![
            InfoVxlan::Id(1),
            InfoVxlan::Link(under),
            own,
            InfoVxlan::Port(8472),
            InfoVxlan::Learning(false),
        ];
        self.add(
            name,
            InfoKind::Vxlan,
            Some(InfoData::Vxlan(data)),
            Some(mtu),
            Some(mac),
        )
    }

    /// A bond of which one port is active.
    pub fn add_bond(&mut self, name: &str) -> Result<()> {
        let data = vec![InfoBond::Mode(BondMode::ActiveBackup), InfoBond::MiiMon(10)];
        self.add(name, InfoKind::Bond, Some(InfoData::Bond(data)), None, None)
    }

    /// The tagged network `id` on a device.
    pub fn add_vlan(&mut self, name: &str, under: &str, id: u16) -> Result<()> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::Link(self.index(under)?));
        let data = InfoData::Vlan(vec![InfoVlan::Id(id)]);
        self.add_to(message, name, InfoKind::Vlan, Some(data), None, None)
    }

    /// A WireGuard device, which knows no keys yet.
    pub fn add_wireguard(&mut self, name: &str) -> Result<()> {
        self.add(name, InfoKind::Wireguard, None, None, None)
    }

    /// A tunnel between two addresses of IPv4 for packets of one family: IPIP, or SIT for IPv6.
    pub fn add_tunnel(&mut self, name: &str, ipv6: bool, ends: [Ipv4Addr; 2]) -> Result<()> {
        let kind = if ipv6 { InfoKind::SitTun } else { InfoKind::IpIp };
        let [local, remote] = ends.map(IpAddr::V4);
        let data = vec![InfoIpTunnel::Local(local), InfoIpTunnel::Remote(remote)];
        self.add(name, kind, Some(InfoData::IpTunnel(data)), None, None)
    }

    /// Makes a device, which is down, a port of a bond.
    pub fn set_bond(&mut self, name: &str, bond: &str) -> Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = self.index(name)?;
        message
            .attributes
            .push(LinkAttribute::Controller(self.index(bond)?));
        self.set_link(message)
            .with_context(|| format!("failed to put {name} into {bond}"))
    }

    fn add(
        &mut self,
        name: &str,
        kind: InfoKind,
        data: Option<InfoData>,
        mtu: Option<u32>,
        mac: Option<[u8; 6]>,
    ) -> Result<()> {
        self.add_to(LinkMessage::default(), name, kind, data, mtu, mac)
    }

    fn add_to(
        &mut self,
        mut message: LinkMessage,
        name: &str,
        kind: InfoKind,
        data: Option<InfoData>,
        mtu: Option<u32>,
        mac: Option<[u8; 6]>,
    ) -> Result<()> {
        let mut info = vec![LinkInfo::Kind(kind)];
        info.extend(data.map(LinkInfo::Data));
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        message.attributes.extend(mtu.map(LinkAttribute::Mtu));
        message
            .attributes
            .extend(mac.map(|mac| LinkAttribute::Address(mac.to_vec())));
        message.attributes.push(LinkAttribute::LinkInfo(info));
        self.netlink
            .request(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
            .with_context(|| format!("failed to add device {name}"))?;
        Ok(())
    }

    pub fn set_mtu(&mut self, name: &str, mtu: u32) -> Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = self.index(name)?;
        message.attributes.push(LinkAttribute::Mtu(mtu));
        self.set_link(message)
            .with_context(|| format!("failed to set the MTU of {name} to {mtu}"))
    }

    pub fn set_up(&mut self, name: &str) -> Result<()> {
        self.set_flags(name, LinkFlags::Up)
            .with_context(|| format!("failed to set {name} up"))
    }

    pub fn set_down(&mut self, name: &str) -> Result<()> {
        self.set_flags(name, LinkFlags::empty())
            .with_context(|| format!("failed to set {name} down"))
    }

    fn set_flags(&mut self, name: &str, up: LinkFlags) -> Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = self.index(name)?;
        message.header.flags = up;
        message.header.change_mask = LinkFlags::Up;
        self.set_link(message)
    }

    /// Makes a device a port of a bridge; `hairpin` lets a frame leave by the port it came in.
    pub fn set_bridge(&mut self, name: &str, bridge: &str, hairpin: bool) -> Result<()> {
        let index = self.index(name)?;
        let mut message = LinkMessage::default();
        message.header.index = index;
        message
            .attributes
            .push(LinkAttribute::Controller(self.index(bridge)?));
        self.set_link(message)
            .with_context(|| format!("failed to put {name} on {bridge}"))?;
        if !hairpin {
            return Ok(());
        }
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::PortKind(InfoPortKind::Bridge),
            LinkInfo::PortData(InfoPortData::BridgePort(vec![InfoBridgePort::HairpinMode(true)])),
        ]));
        self.netlink
            .request(RouteNetlinkMessage::NewLink(message), 0)
            .with_context(|| format!("failed to let {name} hairpin"))?;
        Ok(())
    }

    /// Attaches an XDP program in the driver; the device keeps it.
    pub fn attach_xdp(&mut self, name: &str, program: &OwnedFd) -> Result<()> {
        const DRIVER_MODE: u32 = 4;
        let mut message = LinkMessage::default();
        message.header.index = self.index(name)?;
        let xdp = vec![LinkXdp::Fd(program.as_raw_fd()), LinkXdp::Flags(DRIVER_MODE)];
        message.attributes.push(LinkAttribute::Xdp(xdp));
        self.set_link(message)
            .with_context(|| format!("failed to attach an XDP program to {name}"))
    }

    fn set_link(&mut self, message: LinkMessage) -> Result<()> {
        self.netlink.request(RouteNetlinkMessage::SetLink(message), 0)?;
        Ok(())
    }

    /// Gives a device an address, usable at once (no duplicate address detection).
    pub fn add_address(&mut self, device: &str, (ip, length): Prefix) -> Result<()> {
        let mut message = AddressMessage::default();
        message.header.family = family(ip);
        message.header.prefix_len = length;
        message.header.index = self.index(device)?;
        message.header.flags = AddressHeaderFlags::Nodad;
        message.attributes = vec![AddressAttribute::Local(ip), AddressAttribute::Address(ip)];
        self.netlink
            .request(
                RouteNetlinkMessage::NewAddress(message),
                NLM_F_CREATE | NLM_F_REPLACE,
            )
            .with_context(|| format!("failed to add address {ip}/{length} to {device}"))?;
        Ok(())
    }

    /// Adds or replaces a route.
    pub fn add_route(&mut self, to: Prefix, route: Route<'_>) -> Result<()> {
        let message = self.route_message(to, route)?;
        self.netlink
            .request(
                RouteNetlinkMessage::NewRoute(message),
                NLM_F_CREATE | NLM_F_REPLACE,
            )
            .with_context(|| format!("failed to add route {}/{} ({route:?})", to.0, to.1))?;
        Ok(())
    }

    pub fn delete_route(&mut self, to: Prefix, route: Route<'_>) -> Result<()> {
        let message = self.route_message(to, route)?;
        self.netlink
            .request(RouteNetlinkMessage::DelRoute(message), 0)
            .with_context(|| format!("failed to delete route {}/{} ({route:?})", to.0, to.1))?;
        Ok(())
    }

    fn route_message(&mut self, (to, length): Prefix, route: Route<'_>) -> Result<RouteMessage> {
        let Route {
            via,
            device,
            onlink,
            table,
            blackhole,
            mtu,
        } = route;
        let mut message = RouteMessage::default();
        message.header = RouteHeader {
            address_family: family(to),
            destination_prefix_length: length,
            table: table.map_or(RouteHeader::RT_TABLE_MAIN, |table| table as u8),
            protocol: RouteProtocol::Static,
            scope: if via.is_none() && !blackhole && to.is_ipv4() {
                RouteScope::Link
            } else {
                RouteScope::Universe
            },
            kind: if blackhole {
                RouteType::BlackHole
            } else {
                RouteType::Unicast
            },
            flags: if onlink {
                RouteFlags::Onlink
            } else {
                RouteFlags::empty()
            },
            ..RouteHeader::default()
        };
        if length > 0 {
            message.attributes.push(RouteAttribute::Destination(to.into()));
        }
        message
            .attributes
            .extend(via.map(|ip| RouteAttribute::Gateway(ip.into())));
        if let Some(device) = device {
            message.attributes.push(RouteAttribute::Oif(self.index(device)?));
        }
        if let Some(mtu) = mtu {
            // `bpf_fib_lookup` looks at locked ones only.
            let metrics = vec![RouteMetric::Lock(1 << METRIC_MTU), RouteMetric::Mtu(mtu)];
            message.attributes.push(RouteAttribute::Metrics(metrics));
        }
        Ok(message)
    }

    /// Packets that came in by `device` are looked up in `table` before the main one.
    pub fn add_rule(&mut self, device: &str, table: u8, like: IpAddr) -> Result<()> {
        let mut message = RuleMessage::default();
        message.header.family = family(like);
        message.header.table = table;
        message.header.action = RuleAction::ToTable;
        message.attributes = vec![
            RuleAttribute::Iifname(device.to_owned()),
            RuleAttribute::Priority(100 + u32::from(table)),
        ];
        self.netlink
            .request(RouteNetlinkMessage::NewRule(message), NLM_F_CREATE | NLM_F_EXCL)
            .with_context(|| format!("failed to add a rule for {device}"))?;
        Ok(())
    }

    /// A permanent neighbour.
    pub fn add_neighbour(&mut self, device: &str, ip: IpAddr, mac: [u8; 6]) -> Result<()> {
        let mut message = NeighbourMessage::default();
        message.header.family = family(ip);
        message
            .attributes
            .push(NeighbourAttribute::Destination(neighbour_address(ip)));
        self.neighbour(message, device, mac)
            .with_context(|| format!("failed to add neighbour {ip} at {device}"))
    }

    /// Forgets every neighbour that was asked for its link-layer address.
    pub fn forget_neighbours(&mut self) -> Result<()> {
        let all = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
        for answer in self.netlink.request(all, NLM_F_DUMP)? {
            let RouteNetlinkMessage::NewNeighbour(neighbour) = answer else {
                continue;
            };
            if !matches!(
                neighbour.header.state,
                NeighbourState::Permanent | NeighbourState::Noarp
            ) {
                // It may be gone already.
                let _gone = self
                    .netlink
                    .request(RouteNetlinkMessage::DelNeighbour(neighbour), 0);
            }
        }
        Ok(())
    }

    /// A permanent forwarding entry of a VXLAN device: frames to `mac` go to the node `at`.
    pub fn add_forwarding(&mut self, device: &str, mac: [u8; 6], at: IpAddr) -> Result<()> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.header.flags = NeighbourFlags::Own;
        message
            .attributes
            .push(NeighbourAttribute::Destination(neighbour_address(at)));
        self.neighbour(message, device, mac)
            .with_context(|| format!("failed to add forwarding to {at} at {device}"))
    }

    fn neighbour(&mut self, mut message: NeighbourMessage, device: &str, mac: [u8; 6]) -> Result<()> {
        message.header.ifindex = self.index(device)?;
        message.header.state = NeighbourState::Permanent;
        message
            .attributes
            .push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
        self.netlink.request(
            RouteNetlinkMessage::NewNeighbour(message),
            NLM_F_CREATE | NLM_F_REPLACE,
        )?;
        Ok(())
    }
}

fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    }
}

fn neighbour_address(ip: IpAddr) -> NeighbourAddress {
    match ip {
        IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
        IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
    }
}

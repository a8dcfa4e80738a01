//! Where this host's own routing sends packets now, and whether the next hop answers. The kernel is asked as it would be for a
//! packet; nothing is sent.

use std::{cell::RefCell, fmt, fs, io, net::IpAddr};

use super::{
    socket::{RequestSocket, attributes, push_attribute, read_u16, read_u32},
    tables::{AF_INET, AF_INET6, RTM_GETROUTE, RTMSG_LEN, get_link, parse_ip},
};

/// A route to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    pub ifindex: u32,
    /// A router, or the address itself where it is on the link.
    pub next_hop: IpAddr,
    /// Bytes of the largest packet: what the route says or has learned, else the device's.
    pub mtu: u32,
    /// The same of packets that the datapath forwards (`bpf_fib_lookup`): what the route says does not count there, unless it is locked.
    pub forwarded_mtu: u32,
    /// `None`: nobody has asked for its link-layer address yet, or the device has none.
    pub neighbour: Option<Neighbour>,
}

/// What the kernel knows of a next hop (`NUD_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Neighbour {
    Incomplete,
    Reachable,
    Stale,
    Delay,
    Probe,
    Failed,
    NoArp,
    Permanent,
}

impl Neighbour {
    const ALL: [(u16, Neighbour); 8] = [
        (0x01, Neighbour::Incomplete),
        (0x02, Neighbour::Reachable),
        (0x04, Neighbour::Stale),
        (0x08, Neighbour::Delay),
        (0x10, Neighbour::Probe),
        (0x20, Neighbour::Failed),
        (0x40, Neighbour::NoArp),
        (0x80, Neighbour::Permanent),
    ];

    /// It was asked for its link-layer address and has not answered.
    pub fn is_silent(self) -> bool {
        matches!(self, Neighbour::Incomplete | Neighbour::Failed)
    }
}

/// As `ip neighbour` has it.
impl fmt::Display for Neighbour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Neighbour::Incomplete => "INCOMPLETE",
            Neighbour::Reachable => "REACHABLE",
            Neighbour::Stale => "STALE",
            Neighbour::Delay => "DELAY",
            Neighbour::Probe => "PROBE",
            Neighbour::Failed => "FAILED",
            Neighbour::NoArp => "NOARP",
            Neighbour::Permanent => "PERMANENT",
        })
    }
}

/// Who asks the kernel.
pub struct Routing(RefCell<RequestSocket>);

impl fmt::Debug for Routing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Routing")
    }
}

impl Routing {
    pub fn open() -> io::Result<Self> {
        RequestSocket::open().map(|socket| Self(RefCell::new(socket)))
    }

    /// By which way a packet to `to` leaves. `None`: there is no route, or one that refuses.
    pub fn way(&self, to: IpAddr) -> io::Result<Option<Way>> {
        const RTA_DST: u16 = 1;
        const RTA_OIF: u16 = 4;
        const RTA_GATEWAY: u16 = 5;
        const RTA_METRICS: u16 = 8;
        const RTA_CACHEINFO: u16 = 12;
        const RTA_VIA: u16 = 18;
        let octets = octets(to);
        let mut body = vec![0; RTMSG_LEN];
        body[0] = family(to);
        body[1] = octets.len() as u8 * 8;
        push_attribute(&mut body, RTA_DST, &octets);
        let message = match self.0.borrow_mut().get(RTM_GETROUTE, &body) {
            Ok(message) => message,
            Err(error) if is_no_route(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        let (mut ifindex, mut next_hop, mut of_route, mut is_learned) = (None, to, OfRoute::default(), false);
        for (kind, value) in attributes(message.body.get(RTMSG_LEN..).unwrap_or_default()) {
            match kind {
                RTA_OIF => ifindex = read_u32(value, 0),
                RTA_METRICS => of_route = OfRoute::read(value),
                // `struct rta_cacheinfo`: what routers have told expires.
                RTA_CACHEINFO => is_learned = read_u32(value, 8).is_some_and(|expires| expires != 0),
                RTA_GATEWAY => next_hop = parse_ip(value).unwrap_or(to),
                // `struct rtvia`: the family, and an address of it.
                RTA_VIA => next_hop = value.get(2..).and_then(parse_ip).unwrap_or(to),
                _ => {}
            }
        }
        let Some(ifindex) = ifindex else {
            return Ok(None);
        };
        let of_device = get_link(&mut self.0.borrow_mut(), None, ifindex)?.mtu;
        let is_followed = of_route.is_locked || is_learned || to.is_ipv4() && forwards_by_routes();
        Ok(Some(Way {
            ifindex,
            next_hop,
            mtu: of_route.mtu.unwrap_or(of_device),
            forwarded_mtu: of_route.mtu.filter(|_| is_followed).unwrap_or(of_device),
            neighbour: self.neighbour(ifindex, next_hop)?,
        }))
    }

    fn neighbour(&self, ifindex: u32, addr: IpAddr) -> io::Result<Option<Neighbour>> {
        const RTM_GETNEIGH: u16 = 30;
        const NDA_DST: u16 = 1;
        const NDMSG_LEN: usize = 12;
        let mut body = vec![0; NDMSG_LEN];
        body[0] = family(addr);
        body[4..8].copy_from_slice(&ifindex.to_ne_bytes());
        push_attribute(&mut body, NDA_DST, &octets(addr));
        match self.0.borrow_mut().get(RTM_GETNEIGH, &body) {
            Ok(message) => {
                let state = read_u16(&message.body, 8).unwrap_or(0);
                let mut known = Neighbour::ALL.into_iter();
                Ok(known.find_map(|(bit, neighbour)| (state & bit != 0).then_some(neighbour)))
            }
            // Not there; a device without addresses of its own.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// What a route says of the MTU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct OfRoute {
    mtu: Option<u32>,
    is_locked: bool,
}

impl OfRoute {
    /// Of its metrics.
    fn read(metrics: &[u8]) -> Self {
        const RTAX_LOCK: u16 = 1;
        const RTAX_MTU: u16 = 2;
        let metric = |wanted| {
            let mut all = attributes(metrics);
            all.find_map(|(kind, value)| (kind == wanted).then(|| read_u32(value, 0))?)
        };
        let locks = metric(RTAX_LOCK).unwrap_or(0);
        Self {
            mtu: metric(RTAX_MTU),
            is_locked: locks & 1 << RTAX_MTU != 0,
        }
    }
}

/// Whether the kernel follows the MTU of IPv4 routes where it forwards too; for IPv6 there is no such parameter.
fn forwards_by_routes() -> bool {
    let value = fs::read_to_string("/proc/sys/net/ipv4/ip_forward_use_pmtu");
    value.is_ok_and(|value| value.trim() != "0")
}

fn family(addr: IpAddr) -> u8 {
    if addr.is_ipv4() { AF_INET } else { AF_INET6 }
}

fn octets(addr: IpAddr) -> Vec<u8> {
    match addr {
        IpAddr::V4(addr) => addr.octets().to_vec(),
        IpAddr::V6(addr) => addr.octets().to_vec(),
    }
}

/// What the kernel answers for no route, and for those of type unreachable, blackhole and prohibit.
fn is_no_route(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EINVAL | libc::EACCES)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::tables::device_names;

    #[test]
    fn the_way_to_this_host_is_by_its_loopback_device() {
        let routing = Routing::open().unwrap();
        let way = routing.way([127, 0, 0, 1].into()).unwrap().unwrap();
        let names = device_names().unwrap();
        assert_eq!(names[&way.ifindex], "lo");
        assert_eq!(way.next_hop, IpAddr::from([127, 0, 0, 1]));
        assert!(!way.neighbour.is_some_and(Neighbour::is_silent));
    }

    #[test]
    fn a_routes_mtu_is_read_with_its_lock() {
        let metrics = |all: &[(u16, u32)]| {
            let mut bytes = Vec::new();
            for (kind, value) in all {
                push_attribute(&mut bytes, *kind, &value.to_ne_bytes());
            }
            let OfRoute { mtu, is_locked } = OfRoute::read(&bytes);
            (mtu, is_locked)
        };
        assert_eq!(metrics(&[]), (None, false));
        assert_eq!(metrics(&[(2, 1300)]), (Some(1300), false));
        assert_eq!(metrics(&[(1, 4), (2, 1300)]), (Some(1300), true));
        // Another metric is locked.
        assert_eq!(metrics(&[(1, 8), (2, 1300), (3, 9)]), (Some(1300), false));
    }
}

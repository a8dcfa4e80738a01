//! From bytes to addresses, ports and flags. Lengths and offsets are believed only as far as the packet reaches.

use bytemuck::{Pod, Zeroable};

use crate::{
    addr::{AnyAddr, Family, Tuple, proto},
    packet::Packet,
    reason::Reason,
};

/// Bytes of an Ethernet header without tags.
pub const ETHERNET_LEN: usize = 14;

/// TCP flag bits.
pub mod tcp {
    pub const FIN: u8 = 0x01;
    pub const SYN: u8 = 0x02;
    pub const RST: u8 = 0x04;
    pub const ACK: u8 = 0x10;
}

/// RFC 791.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct Ipv4Header {
    pub version_ihl: u8,
    pub tos: u8,
    pub len_be: u16,
    pub id_be: u16,
    pub fragment_be: u16,
    pub ttl: u8,
    pub proto: u8,
    pub checksum: u16,
    pub src_be: u32,
    pub dst_be: u32,
}

/// RFC 8200.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct Ipv6Header {
    pub version_class_flow_be: u32,
    pub payload_len_be: u16,
    pub next_header: u8,
    pub hop_limit: u8,
    pub src_be: AnyAddr,
    pub dst_be: AnyAddr,
}

/// RFC 9293, the fixed part.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct TcpHeader {
    pub sport_be: u16,
    pub dport_be: u16,
    pub seq_be: u32,
    pub ack_be: u32,
    /// Data offset in the upper four bits, in 32-bit words.
    pub offset: u8,
    pub flags: u8,
    pub window_be: u16,
    pub checksum: u16,
    pub urgent_be: u16,
}

/// RFC 768.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct UdpHeader {
    pub sport_be: u16,
    pub dport_be: u16,
    pub len_be: u16,
    pub checksum: u16,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fragment {
    #[default]
    Whole,
    /// Offset 0, more to come: has the layer 4 header.
    First,
    /// Has no layer 4 header.
    Later,
}

/// What the datapath needs to know of a packet.
#[derive(Clone, Copy, Debug, Default)]
pub struct Headers<A> {
    /// Ports are 0 until [`parse_l4`].
    pub tuple: Tuple<A>,
    /// Offset of the layer 4 header; see [`Headers::l4`].
    pub l4: u16,
    /// Bytes from the IP header's first byte to the packet's last, as the header says.
    pub l3_len: u16,
    pub proto: u8,
    pub ttl: u8,
    pub fragment: Fragment,
    /// 0 for UDP.
    pub tcp_flags: u8,
    /// There are bytes behind the layer 4 header.
    pub payload: bool,
}

impl<A> Headers<A> {
    #[inline(always)]
    pub fn has_flags(&self, flags: u8) -> bool {
        self.tcp_flags & flags != 0
    }

    /// Offset of the layer 4 header.
    ///
    /// No header is looked for further than the mask reaches, so it changes nothing; but it tells the verifier so,
    /// which forgets the bounds of what has been on the stack.
    #[inline(always)]
    pub fn l4(&self) -> usize {
        usize::from(self.l4) & 0x3ff
    }

    /// A SYN without ACK.
    #[inline(always)]
    pub fn is_syn(&self) -> bool {
        self.tcp_flags & (tcp::SYN | tcp::ACK) == tcp::SYN
    }
}

/// Extension headers that are followed before a packet counts as unusual.
const MAX_EXTENSION_HEADERS: usize = 4;
/// The furthest from the IP header that a layer 4 header is looked for.
const MAX_L4_OFFSET: usize = 255;

/// Reading one family's header.
pub trait ParseIp: Family {
    /// Sets all of `headers`; ports and what else comes from layer 4 is 0.
    fn parse_ip<P: Packet>(packet: &P, l3: usize, headers: &mut Headers<Self::Addr>) -> Result<(), Reason>;

    /// What follows the headers that every fragment repeats, and the identification of a fragment's datagram; nothing of
    /// a whole packet.
    fn fragment_id<P: Packet>(packet: &P, l3: usize) -> Option<(u8, u32)>;

    /// Bytes of the frame that the datapath may want to see of this packet; `None` where they are too few to say.
    fn wanted<P: Packet>(packet: &P, l3: usize) -> Option<usize>;

    /// Protocol and destination port of a whole TCP or UDP packet without options or extension headers, and nothing
    /// of any other.
    fn plain_port<P: Packet>(packet: &P, l3: usize) -> Option<(u8, u16)>;
}

/// An IPv4 header without options, and the ports.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct PlainIpv4 {
    ip: Ipv4Header,
    ports_be: [u16; 2],
}

/// An IPv6 header without extensions, and the ports.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct PlainIpv6 {
    ip: Ipv6Header,
    ports_be: [u16; 2],
}

#[inline(always)]
fn plain(l4_proto: u8, ports_be: [u16; 2]) -> Option<(u8, u16)> {
    (l4_proto == proto::TCP || l4_proto == proto::UDP).then_some((l4_proto, ports_be[1]))
}

/// Bytes of an ICMP error's header and of the layer 4 header that it quotes, up to the checksum of TCP.
const ICMP_WANTED: usize = 8 + 20;

impl ParseIp for crate::addr::V4 {
    #[inline(always)]
    fn fragment_id<P: Packet>(packet: &P, l3: usize) -> Option<(u8, u32)> {
        let header: Ipv4Header = packet.load(l3)?;
        Some((header.proto, bytemuck::cast([header.id_be, 0])))
    }

    #[inline(always)]
    fn wanted<P: Packet>(packet: &P, l3: usize) -> Option<usize> {
        let ip: Ipv4Header = packet.load(l3)?;
        let l4 = l3 + usize::from(ip.version_ihl & 0x0f) * 4;
        Some(if ip.proto == proto::ICMP {
            l4 + ICMP_WANTED + 60
        } else {
            l4 + size_of::<TcpHeader>()
        })
    }

    #[inline(always)]
    fn plain_port<P: Packet>(packet: &P, l3: usize) -> Option<(u8, u16)> {
        let PlainIpv4 { ip, ports_be } = packet.load(l3)?;
        let is_fragment = u16::from_be(ip.fragment_be) & 0x3fff != 0;
        if ip.version_ihl != 0x45 || is_fragment {
            return None;
        }
        plain(ip.proto, ports_be)
    }

    #[inline(always)]
    fn parse_ip<P: Packet>(packet: &P, l3: usize, headers: &mut Headers<u32>) -> Result<(), Reason> {
        let header: Ipv4Header = packet.load(l3).ok_or(Reason::Truncated)?;
        let header_len = usize::from(header.version_ihl & 0x0f) * 4;
        let l3_len = u16::from_be(header.len_be);
        if header.version_ihl >> 4 != 4
            || header_len < 20
            || (usize::from(l3_len) < header_len && !packet.is_gso())
        {
            return Err(Reason::Malformed);
        }
        *headers = Headers {
            tuple: addresses(header.src_be, header.dst_be),
            tcp_flags: 0,
            payload: false,
            proto: header.proto,
            ttl: header.ttl,
            l4: (l3 + header_len) as u16,
            l3_len,
            // Nearly all are whole: that is one comparison, as the header has it.
            fragment: if header.fragment_be & 0x3fff_u16.to_be() == 0 {
                Fragment::Whole
            } else if header.fragment_be & 0x1fff_u16.to_be() == 0 {
                Fragment::First
            } else {
                Fragment::Later
            },
        };
        Ok(())
    }
}

impl ParseIp for crate::addr::V6 {
    #[inline(always)]
    fn fragment_id<P: Packet>(packet: &P, l3: usize) -> Option<(u8, u32)> {
        let header: Ipv6Header = packet.load(l3)?;
        let mut next = header.next_header;
        let mut offset = Self::HEADER_LEN;
        for _ in 0..MAX_EXTENSION_HEADERS {
            if offset > MAX_L4_OFFSET {
                return None;
            }
            match next {
                0 | 43 | 60 => {
                    let [following, len]: [u8; 2] = packet.load(l3 + offset)?;
                    next = following;
                    offset += (usize::from(len) + 1) * 8;
                }
                44 => {
                    let words: [u32; 2] = packet.load(l3 + offset)?;
                    return Some((words[0].to_ne_bytes()[0], words[1]));
                }
                _ => return None,
            }
        }
        None
    }

    #[inline(always)]
    fn wanted<P: Packet>(packet: &P, l3: usize) -> Option<usize> {
        let ip: Ipv6Header = packet.load(l3)?;
        Some(match ip.next_header {
            proto::TCP | proto::UDP => l3 + Self::HEADER_LEN + size_of::<TcpHeader>(),
            // Extension headers, of this packet or of the quoted one.
            _ => l3 + Self::HEADER_LEN + MAX_L4_OFFSET + ICMP_WANTED,
        })
    }

    #[inline(always)]
    fn plain_port<P: Packet>(packet: &P, l3: usize) -> Option<(u8, u16)> {
        let PlainIpv6 { ip, ports_be } = packet.load(l3)?;
        if u32::from_be(ip.version_class_flow_be) >> 28 != 6 {
            return None;
        }
        plain(ip.next_header, ports_be)
    }

    #[inline(always)]
    fn parse_ip<P: Packet>(packet: &P, l3: usize, headers: &mut Headers<AnyAddr>) -> Result<(), Reason> {
        let header: Ipv6Header = packet.load(l3).ok_or(Reason::Truncated)?;
        if u32::from_be(header.version_class_flow_be) >> 28 != 6 {
            return Err(Reason::Malformed);
        }
        *headers = Headers {
            tuple: addresses(header.src_be, header.dst_be),
            tcp_flags: 0,
            payload: false,
            proto: header.next_header,
            ttl: header.hop_limit,
            l4: (l3 + Self::HEADER_LEN) as u16,
            l3_len: u16::from_be(header.payload_len_be).saturating_add(Self::HEADER_LEN as u16),
            fragment: Fragment::Whole,
        };
        if headers.proto != proto::TCP && headers.proto != proto::UDP && headers.proto != proto::ICMPV6 {
            follow_extensions(packet, l3, headers)?;
        }
        Ok(())
    }
}

/// Walks hop-by-hop options, routing, fragment and destination options headers (RFC 8200, section 4).
#[inline(always)]
fn follow_extensions<P: Packet>(packet: &P, l3: usize, info: &mut Headers<AnyAddr>) -> Result<(), Reason> {
    let mut offset = crate::addr::V6::HEADER_LEN;
    for _ in 0..MAX_EXTENSION_HEADERS {
        if offset > MAX_L4_OFFSET {
            return Err(Reason::ExtensionHeaders);
        }
        match info.proto {
            0 | 43 | 60 => {
                let [next, len]: [u8; 2] = packet.load(l3 + offset).ok_or(Reason::Truncated)?;
                info.proto = next;
                offset += (usize::from(len) + 1) * 8;
            }
            44 => {
                let words: [u16; 2] = packet.load(l3 + offset).ok_or(Reason::Truncated)?;
                let fragment = u16::from_be(words[1]);
                info.proto = words[0].to_ne_bytes()[0];
                info.fragment = match (fragment & 0xfff8 != 0, fragment & 1 != 0) {
                    (true, _) => Fragment::Later,
                    (false, true) => Fragment::First,
                    (false, false) => Fragment::Whole,
                };
                offset += 8;
                if info.fragment == Fragment::Later {
                    break;
                }
            }
            _ => {
                info.l4 = (l3 + offset) as u16;
                return Ok(());
            }
        }
    }
    if offset > MAX_L4_OFFSET {
        return Err(Reason::ExtensionHeaders);
    }
    info.l4 = (l3 + offset) as u16;
    match info.proto {
        0 | 43 | 44 | 60 if info.fragment != Fragment::Later => Err(Reason::ExtensionHeaders),
        _ => Ok(()),
    }
}

#[inline(always)]
fn addresses<A>(src: A, dst: A) -> Tuple<A> {
    Tuple {
        src,
        dst,
        sport_be: 0,
        dport_be: 0,
    }
}

/// Adds the ports of a TCP or UDP packet, and nothing is checked but that they are there.
#[inline(always)]
pub fn parse_ports<F: Family, P: Packet>(packet: &P, headers: &mut Headers<F::Addr>) -> Result<(), Reason> {
    [headers.tuple.sport_be, headers.tuple.dport_be] = packet.load(headers.l4()).ok_or(Reason::Truncated)?;
    Ok(())
}

/// Adds the ports and flags of a TCP or UDP packet; `headers.proto` is one of the two.
#[inline(always)]
pub fn parse_l4<F: Family, P: Packet>(
    packet: &P,
    l3: usize,
    headers: &mut Headers<F::Addr>,
) -> Result<(), Reason> {
    let l4_len = if headers.proto == proto::TCP {
        let header: TcpHeader = packet.load(headers.l4()).ok_or(Reason::Truncated)?;
        let len = u16::from(header.offset >> 4) * 4;
        if len < 20 {
            return Err(Reason::Malformed);
        }
        headers.tuple.sport_be = header.sport_be;
        headers.tuple.dport_be = header.dport_be;
        headers.tcp_flags = header.flags;
        len
    } else {
        let header: UdpHeader = packet.load(headers.l4()).ok_or(Reason::Truncated)?;
        headers.tuple.sport_be = header.sport_be;
        headers.tuple.dport_be = header.dport_be;
        8
    };
    let end = headers.l4 - l3 as u16 + l4_len;
    headers.payload = headers.l3_len > end;
    if headers.fragment == Fragment::Whole && headers.l3_len < end && !packet.is_gso() {
        return Err(Reason::Malformed);
    }
    Ok(())
}

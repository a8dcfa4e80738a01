//! Datagrams cut by hand, and sent in any order.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, bail};
use etherparse::{
    IpFragOffset, IpNumber, Ipv4Header, Ipv6FragmentHeader, Ipv6Header, Ipv6RawExtHeader, UdpHeader,
};
use nix::libc;
use socket2::{Domain, Protocol, Socket, Type};

/// Bytes of layer 4 in each fragment: with an extension header more it fits the smallest link here, 1,430 bytes of IPv6.
const PIECE: usize = 1352;

/// The fragments of one UDP datagram, in order, as whole IP packets; those of IPv6 with `options` before the fragment header.
pub fn fragments(
    from: SocketAddr,
    to: SocketAddr,
    id: u16,
    payload: &[u8],
    options: bool,
) -> Result<Vec<Vec<u8>>> {
    let (sport, dport) = (from.port(), to.port());
    let header = match (from.ip(), to.ip()) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            UdpHeader::with_ipv4_checksum(sport, dport, &ipv4(src.octets(), dst.octets())?, payload)?
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            UdpHeader::with_ipv6_checksum(sport, dport, &ipv6(src.octets(), dst.octets()), payload)?
        }
        _ => bail!("{from} and {to} are of two families"),
    };
    let datagram = [&header.to_bytes(), payload].concat();
    let last = datagram.len().div_ceil(PIECE) - 1;
    let pieces = datagram.chunks(PIECE).enumerate();
    pieces
        .map(|(number, piece)| {
            let offset = IpFragOffset::try_new((number * PIECE / 8) as u16)?;
            let more = number != last;
            let headers = match (from.ip(), to.ip()) {
                (IpAddr::V4(src), IpAddr::V4(dst)) => {
                    let mut header = ipv4(src.octets(), dst.octets())?;
                    header.set_payload_len(piece.len())?;
                    header.identification = id;
                    header.dont_fragment = false;
                    header.more_fragments = more;
                    header.fragment_offset = offset;
                    header.header_checksum = header.calc_header_checksum();
                    header.to_bytes().to_vec()
                }
                (IpAddr::V6(src), IpAddr::V6(dst)) => {
                    let fragment = Ipv6FragmentHeader::new(IpNumber::UDP, offset, more, id.into());
                    let mut header = ipv6(src.octets(), dst.octets());
                    let mut extensions = fragment.to_bytes().to_vec();
                    if options {
                        // They say nothing (PadN).
                        let padding = [1, 4, 0, 0, 0, 0];
                        let options = Ipv6RawExtHeader::new_raw(header.next_header, &padding)?;
                        extensions.splice(..0, options.to_bytes());
                        header.next_header = IpNumber::IPV6_DESTINATION_OPTIONS;
                    }
                    header.payload_length = (extensions.len() + piece.len()) as u16;
                    [&header.to_bytes()[..], &extensions].concat()
                }
                _ => bail!("{from} and {to} are of two families"),
            };
            Ok([&headers, piece].concat())
        })
        .collect()
}

fn ipv4(src: [u8; 4], dst: [u8; 4]) -> Result<Ipv4Header> {
    Ok(Ipv4Header::new(0, 64, IpNumber::UDP, src, dst)?)
}

fn ipv6(src: [u8; 16], dst: [u8; 16]) -> Ipv6Header {
    Ipv6Header {
        next_header: IpNumber::IPV6_FRAGMENTATION_HEADER,
        hop_limit: 64,
        source: src,
        destination: dst,
        ..Ipv6Header::default()
    }
}

/// Sends whole IP packets from the calling thread's namespace.
pub fn send<'a>(to: IpAddr, packets: impl Iterator<Item = &'a Vec<u8>>) -> Result<()> {
    // Such a socket takes the IP header with the packet, in both families.
    let protocol = Protocol::from(libc::IPPROTO_RAW);
    let socket = Socket::new(
        Domain::for_address(SocketAddr::new(to, 0)),
        Type::RAW,
        Some(protocol),
    )?;
    for packet in packets {
        socket.send_to(packet, &SocketAddr::new(to, 0).into())?;
    }
    Ok(())
}

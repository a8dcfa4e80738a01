//! Writing a new tuple into a packet, with every checksum that covers it.

use core::mem::offset_of;

use crate::{
    addr::{Family, Mac, Rewrite, V4, V6, proto},
    checksum::{self, diff_words, diff16},
    packet::{Checksum, Packet},
    parse::{Headers, Ipv4Header, Ipv6Header, ParseIp, TcpHeader, UdpHeader},
};

/// Writing one family's header.
pub trait RewriteIp: ParseIp {
    /// Replaces the addresses and the header's own checksum; the difference made to a pseudo header is the result.
    fn write_addresses<P: Packet>(
        packet: &mut P,
        l3: usize,
        old: [&Self::Addr; 2],
        new: [&Self::Addr; 2],
    ) -> Option<u32>;
    /// Takes one from the time to live, of which there is more than one left.
    fn decrement_ttl<P: Packet>(packet: &mut P, l3: usize) -> Option<()>;
    fn set_ttl<P: Packet>(packet: &mut P, l3: usize, ttl: u8) -> Option<()>;
}

impl RewriteIp for V4 {
    #[inline(always)]
    fn write_addresses<P: Packet>(packet: &mut P, l3: usize, old: [&u32; 2], new: [&u32; 2]) -> Option<u32> {
        let difference = checksum::add(checksum::diff(*old[0], *new[0]), checksum::diff(*old[1], *new[1]));
        let at = l3 + offset_of!(Ipv4Header, checksum);
        // Checksum and both addresses are neighbours: one store.
        let field: u16 = packet.load(at)?;
        let sum = checksum::update(field, difference);
        packet.store(at, sum)?;
        packet.store(l3 + offset_of!(Ipv4Header, src_be), [*new[0], *new[1]])?;
        Some(difference)
    }

    #[inline(always)]
    fn decrement_ttl<P: Packet>(packet: &mut P, l3: usize) -> Option<()> {
        let at = l3 + offset_of!(Ipv4Header, ttl);
        let old: u16 = packet.load(at)?;
        let mut bytes = old.to_ne_bytes();
        bytes[0] = bytes[0].checked_sub(1)?;
        let new = u16::from_ne_bytes(bytes);
        packet.store(at, new)?;
        let at = l3 + offset_of!(Ipv4Header, checksum);
        let field: u16 = packet.load(at)?;
        packet.store(at, checksum::update(field, diff16(old, new)))
    }

    #[inline(always)]
    fn set_ttl<P: Packet>(packet: &mut P, l3: usize, ttl: u8) -> Option<()> {
        let at = l3 + offset_of!(Ipv4Header, ttl);
        let old: u16 = packet.load(at)?;
        let new = u16::from_ne_bytes([ttl, old.to_ne_bytes()[1]]);
        packet.store(at, new)?;
        let at = l3 + offset_of!(Ipv4Header, checksum);
        let field: u16 = packet.load(at)?;
        packet.store(at, checksum::update(field, diff16(old, new)))
    }
}

impl RewriteIp for V6 {
    #[inline(always)]
    fn write_addresses<P: Packet>(
        packet: &mut P,
        l3: usize,
        old: [&[u32; 4]; 2],
        new: [&[u32; 4]; 2],
    ) -> Option<u32> {
        packet.store(l3 + offset_of!(Ipv6Header, src_be), *new[0])?;
        packet.store(l3 + offset_of!(Ipv6Header, dst_be), *new[1])?;
        Some(checksum::add(
            diff_words(old[0], new[0]),
            diff_words(old[1], new[1]),
        ))
    }

    #[inline(always)]
    fn decrement_ttl<P: Packet>(packet: &mut P, l3: usize) -> Option<()> {
        // With the byte before it: the verifier does not follow the bounds check of a single byte.
        let at = l3 + offset_of!(Ipv6Header, next_header);
        let [next_header, limit]: [u8; 2] = packet.load(at)?;
        packet.store(at, [next_header, limit.checked_sub(1)?])
    }

    #[inline(always)]
    fn set_ttl<P: Packet>(packet: &mut P, l3: usize, ttl: u8) -> Option<()> {
        let at = l3 + offset_of!(Ipv6Header, next_header);
        let [next_header, _limit]: [u8; 2] = packet.load(at)?;
        packet.store(at, [next_header, ttl])
    }
}

/// How the checksum of a TCP or UDP packet behaves.
#[inline(always)]
pub fn l4_checksum_kind<F: Family>(l4_proto: u8) -> Checksum {
    Checksum {
        zero_is_none: l4_proto == proto::UDP,
        ipv6: F::VERSION == 6,
    }
}

/// Gives a TCP or UDP packet the tuple `new`.
#[inline(always)]
pub fn rewrite<F: RewriteIp, P: Packet>(
    packet: &mut P,
    l3: usize,
    headers: &Headers<F::Addr>,
    new: Rewrite<'_, F::Addr>,
) -> Option<()> {
    let old = &headers.tuple;
    let pseudo = F::write_addresses(packet, l3, [&old.src, &old.dst], [new.src, new.dst])?;
    let l4 = headers.l4();
    packet.store(l4, [new.sport_be, new.dport_be])?;
    let ports = checksum::add(
        diff16(old.sport_be, new.sport_be),
        diff16(old.dport_be, new.dport_be),
    );
    let at = l4
        + if headers.proto == proto::TCP {
            offset_of!(TcpHeader, checksum)
        } else {
            offset_of!(UdpHeader, checksum)
        };
    packet.adjust_l4_checksum(at, pseudo, ports, l4_checksum_kind::<F>(headers.proto))
}

/// Writes the link-layer addresses.
#[inline(always)]
pub fn write_macs<P: Packet>(packet: &mut P, dst: Mac, src: Mac) -> Option<()> {
    // Twelve bytes as three aligned words cost less than twelve byte stores.
    let d = dst.0;
    let s = src.0;
    packet.store(
        0,
        [
            u32::from_ne_bytes([d[0], d[1], d[2], d[3]]),
            u32::from_ne_bytes([d[4], d[5], s[0], s[1]]),
            u32::from_ne_bytes([s[2], s[3], s[4], s[5]]),
        ],
    )
}

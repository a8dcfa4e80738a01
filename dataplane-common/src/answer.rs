//! Answers made of the packet that asks for them: TCP RST, ICMP port unreachable, ICMP fragmentation needed, ICMP echo.
//!
//! They are what a host without a listener, or a router with a smaller link, would have sent, and come from the
//! address that the packet was for. Refusals are rate limited, because they are made from scratch for whoever asks; an echo
//! is no longer than its request and costs less than letting it through.

use crate::{
    addr::{AnyAddr, Family, proto},
    checksum,
    packet::{Checksum, Packet},
    parse::{Headers, Ipv4Header, Ipv6Header, TcpHeader, tcp},
    pipeline::{Context, World},
    reason::Reason,
    rewrite::{RewriteIp, write_macs},
    verdict::Verdict,
};

/// Time to live of what we originate.
const TTL: u8 = 64;
/// Layer 4 bytes that an ICMP error quotes (RFC 792 asks for 8).
const QUOTED_L4: usize = 8;

/// Refuses a TCP or UDP packet that nobody is there for, as a host with a closed port does. `reason` is counted.
#[inline(never)]
pub fn refuse<F: RewriteIp, P: Packet, W: World<F>>(
    packet: &mut P,
    world: &W,
    at: &Context,
    headers: &Headers<F::Addr>,
    reason: u32,
) -> Verdict {
    if headers.has_flags(tcp::RST) {
        return Verdict::drop(Reason::NoEndpoints);
    }
    world.count(reason);
    if !world.take_refusal() {
        return Verdict::drop(Reason::RefusalRateLimited);
    }
    let done = if headers.proto == proto::TCP {
        reset::<F, P>(packet, at.l3, headers)
    } else {
        let (kind, code) = if F::VERSION == 4 { (3, 3) } else { (1, 4) };
        icmp_error::<F, P>(packet, at.l3, headers, kind, code, 0)
    };
    finish(packet, at, done)
}

/// Tells the sender that a packet does not fit (RFC 1191, RFC 8201).
#[inline(never)]
pub fn too_big<F: RewriteIp, P: Packet, W: World<F>>(
    packet: &mut P,
    world: &W,
    at: &Context,
    headers: &Headers<F::Addr>,
    mtu: u16,
) -> Verdict {
    world.count(Reason::FragmentationNeeded as u32);
    if !world.take_refusal() {
        return Verdict::drop(Reason::RefusalRateLimited);
    }
    let (kind, code) = if F::VERSION == 4 { (3, 4) } else { (2, 0) };
    let done = icmp_error::<F, P>(packet, at.l3, headers, kind, code, mtu);
    finish(packet, at, done)
}

/// Answers an echo request with what it brought. One with IP options or extension headers, which would have to be
/// answered in kind, is passed.
#[inline(never)]
pub fn echo<F: RewriteIp, P: Packet>(packet: &mut P, at: &Context, headers: &Headers<F::Addr>) -> Verdict {
    if headers.l4() != at.l3 + F::HEADER_LEN {
        return Verdict::PASS;
    }
    let done = write_echo::<F, P>(packet, at.l3, headers);
    finish(packet, at, done)
}

#[inline(always)]
fn write_echo<F: RewriteIp, P: Packet>(packet: &mut P, l3: usize, headers: &Headers<F::Addr>) -> Option<()> {
    let (src, dst) = (&headers.tuple.src, &headers.tuple.dst);
    F::write_addresses(packet, l3, [src, dst], [dst, src])?;
    F::set_ttl(packet, l3, TTL)?;
    let reply = if F::VERSION == 4 { 0 } else { 129 };
    let old: u16 = packet.load(headers.l4())?;
    let new = u16::from_ne_bytes([reply, 0]);
    packet.store(headers.l4(), new)?;
    // Two addresses that change places change no sum, and the length stays.
    packet.adjust_l4_checksum(
        headers.l4() + crate::icmp::CHECKSUM_AT,
        0,
        checksum::diff16(old, new),
        Checksum {
            zero_is_none: false,
            ipv6: F::VERSION == 6,
        },
    )
}

#[inline(always)]
fn finish<P: Packet>(packet: &mut P, at: &Context, done: Option<()>) -> Verdict {
    match done.and_then(|()| if at.l3 == 0 { Some(()) } else { swap_macs(packet) }) {
        Some(()) => Verdict::ANSWER,
        None => Verdict::drop(Reason::RewriteFailed),
    }
}

#[inline(always)]
fn swap_macs<P: Packet>(packet: &mut P) -> Option<()> {
    let [dst, src] = packet.load(0)?;
    write_macs(packet, src, dst)
}

/// Writes an IP header from `src` to `dst` in front of `payload` bytes; the sum of its pseudo header is the result.
#[inline(always)]
fn write_ip<F: Family, P: Packet>(
    packet: &mut P,
    l3: usize,
    src: F::Addr,
    dst: F::Addr,
    l4_proto: u8,
    payload: u16,
) -> Option<u32> {
    let mut pseudo = checksum::add(u32::from(u16::from(l4_proto).to_be()), u32::from(payload.to_be()));
    for word in F::words(&src) {
        pseudo = checksum::add(pseudo, *word);
    }
    for word in F::words(&dst) {
        pseudo = checksum::add(pseudo, *word);
    }
    if F::VERSION == 4 {
        let mut header = Ipv4Header {
            version_ihl: 0x45,
            tos: 0,
            len_be: (payload + 20).to_be(),
            id_be: 0,
            fragment_be: 0x4000u16.to_be(),
            ttl: TTL,
            proto: l4_proto,
            checksum: 0,
            src_be: F::to_any(src)[0],
            dst_be: F::to_any(dst)[0],
        };
        let words: &[u32; 5] = bytemuck::cast_ref(&header);
        let mut sum = 0;
        for word in words {
            sum = checksum::add(sum, *word);
        }
        header.checksum = !checksum::fold(sum);
        packet.store(l3, header)?;
    } else {
        packet.store(
            l3,
            Ipv6Header {
                version_class_flow_be: 0x6000_0000u32.to_be(),
                payload_len_be: payload.to_be(),
                next_header: l4_proto,
                hop_limit: TTL,
                src_be: F::to_any(src),
                dst_be: F::to_any(dst),
            },
        )?;
    }
    Some(pseudo)
}

/// A reset for a segment that no connection exists for (RFC 9293, section 3.10.7.1).
#[inline(always)]
fn reset<F: RewriteIp, P: Packet>(packet: &mut P, l3: usize, headers: &Headers<F::Addr>) -> Option<()> {
    let asked: TcpHeader = packet.load(headers.l4())?;
    let (seq_be, ack_be, flags) = if asked.flags & tcp::ACK != 0 {
        (asked.ack_be, 0, tcp::RST)
    } else {
        let header_bytes = (headers.l4() - l3) as u16 + u16::from(asked.offset >> 4) * 4;
        let mut next =
            u32::from_be(asked.seq_be).wrapping_add(u32::from(headers.l3_len.saturating_sub(header_bytes)));
        if asked.flags & tcp::SYN != 0 {
            next = next.wrapping_add(1);
        }
        if asked.flags & tcp::FIN != 0 {
            next = next.wrapping_add(1);
        }
        (0, next.to_be(), tcp::RST | tcp::ACK)
    };
    let l4 = l3 + F::HEADER_LEN;
    packet.resize(l4 + size_of::<TcpHeader>())?;
    let tuple = headers.tuple.reversed();
    let pseudo = write_ip::<F, P>(
        packet,
        l3,
        tuple.src,
        tuple.dst,
        proto::TCP,
        size_of::<TcpHeader>() as u16,
    )?;
    let mut header = TcpHeader {
        sport_be: tuple.sport_be,
        dport_be: tuple.dport_be,
        seq_be,
        ack_be,
        offset: 5 << 4,
        flags,
        window_be: 0,
        checksum: 0,
        urgent_be: 0,
    };
    let words: &[u32; 5] = bytemuck::cast_ref(&header);
    let mut sum = pseudo;
    for word in words {
        sum = checksum::add(sum, *word);
    }
    header.checksum = !checksum::fold(sum);
    packet.store(l4, header)
}

/// An ICMP error that quotes the packet's IP header, without options or extension headers, and eight bytes more.
#[inline(always)]
fn icmp_error<F: RewriteIp, P: Packet>(
    packet: &mut P,
    l3: usize,
    headers: &Headers<F::Addr>,
    kind: u8,
    code: u8,
    mtu: u16,
) -> Option<()> {
    let l4_start: [u32; QUOTED_L4 / 4] = packet.load(headers.l4())?;
    let quoted_len = (F::HEADER_LEN + QUOTED_L4) as u16;
    let l4 = l3 + F::HEADER_LEN;
    let quoted_at = l4 + crate::icmp::HEADER_LEN;
    // Read before the packet is cut: the quotation moves.
    let quoted = quote::<F, P>(packet, l3, headers)?;
    packet.resize(quoted_at + usize::from(quoted_len))?;
    let payload = quoted_len + crate::icmp::HEADER_LEN as u16;
    let pseudo = write_ip::<F, P>(packet, l3, headers.tuple.dst, headers.tuple.src, F::ICMP, payload)?;
    let mut sum = if F::VERSION == 6 { pseudo } else { 0 };
    let mtu_word = u32::from(mtu).to_be();
    sum = checksum::add(sum, u32::from(u16::from_ne_bytes([kind, code])));
    sum = checksum::add(sum, mtu_word);
    for word in &quoted {
        sum = checksum::add(sum, *word);
    }
    for word in &l4_start {
        sum = checksum::add(sum, *word);
    }
    let [low, high] = (!checksum::fold(sum)).to_ne_bytes();
    packet.store(l4, [kind, code, low, high])?;
    packet.store(l4 + 4, mtu_word)?;
    if F::VERSION == 4 {
        packet.store(quoted_at, [quoted[0], quoted[1], quoted[2], quoted[3], quoted[4]])?;
    } else {
        packet.store(quoted_at, quoted)?;
    }
    packet.store(quoted_at + F::HEADER_LEN, l4_start)
}

/// The IP header to quote, in words; IPv4's is followed by zeros.
#[inline(always)]
fn quote<F: Family, P: Packet>(packet: &P, l3: usize, headers: &Headers<F::Addr>) -> Option<[u32; 10]> {
    let mut words = [0u32; 10];
    if F::VERSION == 4 {
        let mut header: Ipv4Header = packet.load(l3)?;
        // Options are left out, so the header and its checksum have to say so.
        header.version_ihl = 0x45;
        header.checksum = 0;
        let plain: &[u32; 5] = bytemuck::cast_ref(&header);
        let mut sum = 0;
        for word in plain {
            sum = checksum::add(sum, *word);
        }
        header.checksum = !checksum::fold(sum);
        let plain: &[u32; 5] = bytemuck::cast_ref(&header);
        words[..5].copy_from_slice(plain);
    } else {
        let mut header: Ipv6Header = packet.load(l3)?;
        header.next_header = headers.proto;
        let src: AnyAddr = header.src_be;
        let dst: AnyAddr = header.dst_be;
        words[0] = header.version_class_flow_be;
        words[1] = u32::from_ne_bytes([
            header.payload_len_be.to_ne_bytes()[0],
            header.payload_len_be.to_ne_bytes()[1],
            header.next_header,
            header.hop_limit,
        ]);
        words[2..6].copy_from_slice(&src);
        words[6..].copy_from_slice(&dst);
    }
    Some(words)
}

//! ICMP errors about translated flows: found by the packet they quote, translated with it.
//!
//! An error travels against the packet that it quotes, so the entry that speaks for it is that of the quoted tuple
//! reversed, at this side of the stack. The outer packet is treated like any packet of that entry; the quoted one
//! gets the inverse.

use core::mem::offset_of;

use crate::{
    addr::{Family, Tuple, proto},
    checksum::{self, diff16},
    packet::{Checksum, Packet},
    parse::{Fragment, Headers, Ipv4Header, UdpHeader},
    pipeline::{Context, Leave, World, drop_packet, leave},
    reason::Reason,
    rewrite::RewriteIp,
    tables::Entry,
    verdict::Verdict,
};

/// Bytes of an ICMP or ICMPv6 header.
pub const HEADER_LEN: usize = 8;
/// Where both families keep the checksum.
pub const CHECKSUM_AT: usize = 2;

/// Whether a type is an error, that is, quotes a packet (RFC 792, RFC 4443).
#[inline(always)]
fn is_error<F: Family>(kind: u8) -> bool {
    if F::VERSION == 4 {
        matches!(kind, 3 | 11 | 12)
    } else {
        matches!(kind, 1..=4)
    }
}

/// An ICMP packet at a TC hook.
#[inline(never)]
pub fn process<F: RewriteIp, P: Packet, W: World<F>>(
    packet: &mut P,
    world: &W,
    at: &Context,
    headers: &Headers<F::Addr>,
) -> Verdict {
    match about::<F, P, W>(packet, world, at, headers) {
        Ok(verdict) => verdict,
        Err(reason) => {
            world.count(reason);
            Verdict::Pass
        }
    }
}

#[inline(always)]
fn about<F: RewriteIp, P: Packet, W: World<F>>(
    packet: &mut P,
    world: &W,
    at: &Context,
    headers: &Headers<F::Addr>,
) -> Result<Verdict, Reason> {
    let kind: u8 = packet.load(headers.l4).ok_or(Reason::Truncated)?;
    if !is_error::<F>(kind) {
        return Ok(Verdict::Pass);
    }
    let quoted_at = headers.l4 + HEADER_LEN;
    let mut quoted = F::parse_ip(packet, quoted_at)?;
    if (quoted.proto != proto::TCP && quoted.proto != proto::UDP) || quoted.fragment == Fragment::Later {
        return Ok(Verdict::Pass);
    }
    let [sport_be, dport_be]: [u16; 2] = packet.load(quoted.l4).ok_or(Reason::Truncated)?;
    quoted.tuple.sport_be = sport_be;
    quoted.tuple.dport_be = dport_be;
    let key = F::flow_key(&quoted.tuple.reversed(), quoted.proto, at.side());
    let flow = match world.flow(&key) {
        Some(entry) => entry.load(),
        None => match world.half_open(&key) {
            Some(entry) => entry.load(),
            None => return Ok(Verdict::Pass),
        },
    };
    let rewrite = F::rewrite(&flow);
    // The endpoint itself speaks under its translated address; a router on the way under its own.
    let src = if headers.tuple.src == quoted.tuple.dst {
        rewrite.src
    } else {
        headers.tuple.src
    };
    let outer = Tuple {
        src,
        dst: rewrite.dst,
        sport_be: rewrite.sport_be,
        dport_be: rewrite.dport_be,
    };
    let verdict = match leave::<F, P, W>(packet, world, at, headers, &outer, &F::meta(&flow)) {
        Leave::Exit(verdict) => verdict,
        Leave::Unchanged => return Ok(Verdict::Pass),
        Leave::TooBig(_) => return Ok(drop_packet::<F, W>(world, Reason::FragmentationNeeded)),
        Leave::Drop(reason) => return Ok(drop_packet::<F, W>(world, reason)),
    };
    let done = translate::<F, P>(packet, at.l3, headers, quoted_at, &quoted, &outer, &rewrite);
    Ok(if done.is_some() {
        verdict
    } else {
        drop_packet::<F, W>(world, Reason::RewriteFailed)
    })
}

/// Writes the outer addresses, the quoted addresses and ports, and every checksum among them.
#[inline(always)]
#[expect(
    clippy::too_many_arguments,
    reason = "two packets, one inside the other, each before and after"
)]
fn translate<F: RewriteIp, P: Packet>(
    packet: &mut P,
    l3: usize,
    headers: &Headers<F::Addr>,
    quoted_at: usize,
    quoted: &Headers<F::Addr>,
    outer: &Tuple<F::Addr>,
    rewrite: &Tuple<F::Addr>,
) -> Option<()> {
    let inner = rewrite.reversed();
    let ip_sum_at = quoted_at + offset_of!(Ipv4Header, checksum);
    let old_sum: u16 = if F::VERSION == 4 {
        packet.load(ip_sum_at)?
    } else {
        0
    };
    let addresses = F::write_addresses(
        packet,
        quoted_at,
        (quoted.tuple.src, quoted.tuple.dst),
        (inner.src, inner.dst),
    )?;
    let new_sum: u16 = if F::VERSION == 4 {
        packet.load(ip_sum_at)?
    } else {
        0
    };
    packet.store(quoted.l4, [inner.sport_be, inner.dport_be])?;
    let ports = checksum::add(
        diff16(quoted.tuple.sport_be, inner.sport_be),
        diff16(quoted.tuple.dport_be, inner.dport_be),
    );
    let mut payload = checksum::add(checksum::add(addresses, diff16(old_sum, new_sum)), ports);
    // The quoted checksum, where the quotation reaches that far.
    let l4_sum_at = quoted.l4
        + if quoted.proto == proto::TCP {
            offset_of!(crate::parse::TcpHeader, checksum)
        } else {
            offset_of!(UdpHeader, checksum)
        };
    if let Some(old) = packet.load::<u16>(l4_sum_at)
        && (quoted.proto == proto::TCP || old != 0)
    {
        let mut new = checksum::update(old, checksum::add(addresses, ports));
        if quoted.proto == proto::UDP && new == 0 {
            new = 0xffff;
        }
        packet.store(l4_sum_at, new)?;
        payload = checksum::add(payload, diff16(old, new));
    }
    let pseudo = F::write_addresses(
        packet,
        l3,
        (headers.tuple.src, headers.tuple.dst),
        (outer.src, outer.dst),
    )?;
    let pseudo = if F::VERSION == 4 { 0 } else { pseudo };
    packet.adjust_l4_checksum(
        headers.l4 + CHECKSUM_AT,
        pseudo,
        payload,
        Checksum {
            zero_is_none: false,
            ipv6: F::VERSION == 6,
        },
    )
}

//! ICMP: echo requests to Service addresses, and errors about translated flows, which are found by the packet that they
//! quote, and translated with it.
//!
//! An error travels against the packet that it quotes, so the entry that speaks for it is that of the quoted tuple
//! reversed, at this side of the stack. The outer packet is treated like any packet of that entry; the quoted one
//! gets the inverse.

use core::mem::offset_of;

use crate::{
    addr::{Family, Rewrite, proto},
    answer,
    checksum::{self, diff16},
    exit::{Leave, leave},
    half_open,
    monitor::EventKind,
    packet::{Checksum, Packet},
    parse::{Fragment, Headers, Ipv4Header, UdpHeader, parse_ports},
    pipeline::{Context, Work, World},
    reason::Reason,
    rewrite::RewriteIp,
    service::ECHO_PORT,
    tables::Entry,
    verdict::{Hook, Verdict},
};

/// Bytes of an ICMP or ICMPv6 header.
pub const HEADER_LEN: usize = 8;
/// Where both families keep the checksum.
pub const CHECKSUM_AT: usize = 2;

/// The largest MTU that links commonly have below a packet's length: what its sender is told where nobody knows the MTU that the
/// packet exceeds. If that is too much still, the next packet is told the next one (RFC 1191, section 7.1, and the MTUs of
/// tunnels); IPv6 has no less than 1,280 (RFC 8200, section 5).
#[inline(always)]
pub fn plateau<F: Family>(len: u16) -> u16 {
    const PLATEAUS: [u16; 11] = [
        32_000, 17_914, 8_166, 4_352, 2_002, 1_492, 1_450, 1_420, 1_400, 1_350, 1_280,
    ];
    const LOWEST: [u16; 3] = [1_006, 508, 296];
    let mut i = 0;
    while i < PLATEAUS.len() {
        if PLATEAUS[i] < len {
            return PLATEAUS[i];
        }
        i += 1;
    }
    if F::VERSION == 6 {
        return 1_280;
    }
    let mut i = 0;
    while i < LOWEST.len() {
        if LOWEST[i] < len {
            return LOWEST[i];
        }
        i += 1;
    }
    68
}

/// Whether a type is an error, that is, quotes a packet (RFC 792, RFC 4443).
#[inline(always)]
pub(crate) fn is_error<F: Family>(kind: u8) -> bool {
    if F::VERSION == 4 {
        matches!(kind, 3 | 11 | 12)
    } else {
        matches!(kind, 1..=4)
    }
}

/// An ICMP packet. `TRANSLATE`: it quotes a packet of the flow whose entry is in `work.forward`.
#[inline(never)]
pub fn find<F: RewriteIp, P: Packet, W: World<F>>(
    packet: &P,
    world: &W,
    at: &Context,
    work: &mut Work<F>,
) -> Verdict {
    match read_quoted::<F, P>(packet, &work.headers, &mut work.quoted) {
        Ok(true) => {}
        Ok(false) => return Verdict::PASS,
        Err(reason) => {
            world.count(reason as u32);
            return Verdict::PASS;
        }
    }
    work.key = F::flow_key(&work.quoted.tuple.reversed(), work.quoted.proto, at.side());
    match world.flow(&work.key) {
        Some(entry) => work.forward = *entry.flow(),
        None => match world.half_open(&work.key) {
            Some(entry) => {
                work.forward = *entry.flow();
                if is_port_unreachable::<F, P>(packet, &work.headers) && half_open::refused(world, &entry) {
                    work.noted = EventKind::RefusedByBackend as u32;
                }
            }
            None => return Verdict::PASS,
        },
    }
    Verdict::TRANSLATE
}

/// Translates an error by the entry in `work.forward`.
#[inline(never)]
pub fn finish<F: RewriteIp, P: Packet, W: World<F>>(
    packet: &mut P,
    world: &W,
    at: &Context,
    work: &mut Work<F>,
) -> Verdict {
    let headers = &work.headers;
    let verdict = match leave::<F, P, W>(packet, world, at, headers, &work.forward) {
        Leave::Exit(verdict) => verdict,
        Leave::Unchanged => return Verdict::PASS,
        Leave::TooBig(_) => return Verdict::drop(Reason::FragmentationNeeded),
        Leave::Drop(reason) => return Verdict::drop(reason),
    };
    let rewrite = F::rewrite(&work.forward);
    match translate::<F, P>(packet, at.l3, headers, &work.quoted, rewrite) {
        Some(()) => verdict,
        None => Verdict::drop(Reason::RewriteFailed),
    }
}

/// Whether a host says that nothing listens at a port of its own (RFC 1122, 3.2.2.1; RFC 4443, 3.1).
#[inline(always)]
fn is_port_unreachable<F: Family, P: Packet>(packet: &P, headers: &Headers<F::Addr>) -> bool {
    let kind = if F::VERSION == 4 { [3, 3] } else { [1, 4] };
    packet.load::<[u8; 2]>(headers.l4()) == Some(kind)
}

/// An echo request at a TC hook; `NEXT` for everything else. Apart from [`find`]: kernels before 6.9 count 32 bytes of stack for
/// each call at least.
#[inline(never)]
pub fn echo<F: RewriteIp, P: Packet, W: World<F>>(
    packet: &mut P,
    world: &W,
    at: &Context,
    work: &mut Work<F>,
) -> Verdict {
    if !is_echo_request::<F, P>(packet, &work.headers) {
        return Verdict::NEXT;
    }
    if is_service_address::<F, W>(world, at, &work.headers) {
        answer::echo::<F, P>(packet, at, &work.headers)
    } else {
        Verdict::PASS
    }
}

/// Whether a packet asks for an echo (RFC 792, RFC 4443).
#[inline(always)]
fn is_echo_request<F: Family, P: Packet>(packet: &P, headers: &Headers<F::Addr>) -> bool {
    let request = if F::VERSION == 4 { 8 } else { 128 };
    packet.load::<[u8; 2]>(headers.l4()) == Some([request, 0])
}

/// Whether echo requests to a packet's destination are answered for its Services. At `lo` the address is bound to this
/// host, and the kernel answers.
#[inline(always)]
fn is_service_address<F: Family, W: World<F>>(world: &W, at: &Context, headers: &Headers<F::Addr>) -> bool {
    let Some(scope) = at.scope() else {
        return false;
    };
    let dst = headers.tuple.dst;
    at.hook as u8 != Hook::ToLo as u8
        && world.own_address(dst) == 0
        && world
            .frontend(&F::frontend_key(dst, ECHO_PORT, F::ICMP, scope))
            .is_some()
}

/// Reads the packet that an error quotes; false if it is no error about TCP or UDP.
#[inline(always)]
fn read_quoted<F: RewriteIp, P: Packet>(
    packet: &P,
    headers: &Headers<F::Addr>,
    quoted: &mut Headers<F::Addr>,
) -> Result<bool, Reason> {
    // Type and code: the verifier does not follow the bounds check of a single byte.
    let [kind, _code]: [u8; 2] = packet.load(headers.l4()).ok_or(Reason::Truncated)?;
    if !is_error::<F>(kind) {
        return Ok(false);
    }
    F::parse_ip(packet, headers.l4() + HEADER_LEN, quoted)?;
    if (quoted.proto != proto::TCP && quoted.proto != proto::UDP) || quoted.fragment == Fragment::Later {
        return Ok(false);
    }
    parse_ports::<F, P>(packet, quoted)?;
    Ok(true)
}

/// Writes the outer addresses, the quoted addresses and ports, and every checksum among them.
#[inline(always)]
fn translate<F: RewriteIp, P: Packet>(
    packet: &mut P,
    l3: usize,
    headers: &Headers<F::Addr>,
    quoted: &Headers<F::Addr>,
    rewrite: Rewrite<'_, F::Addr>,
) -> Option<()> {
    let quoted_at = headers.l4() + HEADER_LEN;
    // The endpoint itself speaks under its translated address; a router on the way under its own.
    let outer_src = if headers.tuple.src == quoted.tuple.dst {
        rewrite.src
    } else {
        &headers.tuple.src
    };
    let ip_sum_at = quoted_at + offset_of!(Ipv4Header, checksum);
    let old_sum: u16 = if F::VERSION == 4 {
        packet.load(ip_sum_at)?
    } else {
        0
    };
    let addresses = F::write_addresses(
        packet,
        quoted_at,
        [&quoted.tuple.src, &quoted.tuple.dst],
        [rewrite.dst, rewrite.src],
    )?;
    let new_sum: u16 = if F::VERSION == 4 {
        packet.load(ip_sum_at)?
    } else {
        0
    };
    packet.store(quoted.l4(), [rewrite.dport_be, rewrite.sport_be])?;
    let ports = checksum::add(
        diff16(quoted.tuple.sport_be, rewrite.dport_be),
        diff16(quoted.tuple.dport_be, rewrite.sport_be),
    );
    let mut payload = checksum::add(checksum::add(addresses, diff16(old_sum, new_sum)), ports);
    // The quoted checksum, where the quotation reaches that far.
    let l4_sum_at = quoted.l4()
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
        [&headers.tuple.src, &headers.tuple.dst],
        [outer_src, rewrite.dst],
    )?;
    let pseudo = if F::VERSION == 4 { 0 } else { pseudo };
    packet.adjust_l4_checksum(
        headers.l4() + CHECKSUM_AT,
        pseudo,
        payload,
        Checksum {
            zero_is_none: false,
            ipv6: F::VERSION == 6,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::{V4, V6};

    #[test]
    fn who_does_not_know_the_mtu_tells_one_that_is_smaller_and_comes_to_an_end() {
        for len in 69..=u16::MAX {
            let told = plateau::<V4>(len);
            assert!((68..len).contains(&told), "{len}: {told}");
        }
        for len in 1281..=u16::MAX {
            let told = plateau::<V6>(len);
            assert!((1280..len).contains(&told), "{len}: {told}");
        }
        assert_eq!(plateau::<V4>(1500), 1492);
        assert_eq!(plateau::<V4>(1280), 1006);
        assert_eq!((plateau::<V4>(68), plateau::<V6>(1280)), (68, 1280));
    }
}

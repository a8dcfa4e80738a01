//! `SOURCES_V4`, `SOURCES_V6` and `SOURCE_CHECKED`: a packet that a pod sends has one of the pod's own addresses as its
//! source.
//!
//! Each packet is asked, also one of an established flow: flows are found by addresses and ports, whoever sends them. So
//! the first look is an array's element at the interface's place, which has the address that most packets have. What it
//! does not speak for (a pod with more addresses, two interfaces of one place, one that is not checked) is looked up.

use bytemuck::{Pod, Zeroable};

use crate::{
    addr::{Family, proto},
    config::config_flags,
    enforce,
    packet::Packet,
    parse::{Fragment, parse_ports},
    pipeline::{Context, Work, World},
    policy::Judgement,
    reason::Reason,
    rewrite::RewriteIp,
    tables::{Env, Tables},
    verdict::{Hook, Verdict},
};

/// Elements of each of `SOURCES_V4` and `SOURCES_V6`; a power of two.
pub const SOURCE_PLACES: u32 = 4096;

/// The element of an interface.
#[inline(always)]
pub const fn source_place(ifindex: u32) -> u32 {
    ifindex & (SOURCE_PLACES - 1)
}

/// Element of `SOURCES_V4`: an address of the pod behind an interface. All zeros: none.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Source4 {
    pub addr_be: u32,
    pub ifindex: u32,
}

const _: () = assert!(size_of::<Source4>() == 8);

/// Element of `SOURCES_V6`.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Source6 {
    pub addr_be: [u32; 4],
    pub ifindex: u32,
    pub unused: u32,
}

const _: () = assert!(size_of::<Source6>() == 24);

/// Whether the source of a packet has to be looked up: it is not the address that its interface has in `SOURCES_*`.
#[inline(always)]
pub(crate) fn is_asked<F: Family, P: Packet, W: Tables<F> + Env>(
    packet: &P,
    world: &W,
    at: &Context,
) -> bool {
    if at.hook as u8 != Hook::FromPod as u8 || world.config(|c| &c.flags) & config_flags::SOURCE_CHECK == 0 {
        return false;
    }
    // The two addresses end the fixed part of either header. A packet without them goes nowhere.
    let offset = at.l3 + F::HEADER_LEN - 2 * size_of::<F::Addr>();
    packet
        .load::<F::Addr>(offset)
        .is_some_and(|src| !world.has_source(at.ifindex, &src))
}

/// Drops a packet whose source is not an address of the pod that sends it. Nothing is known of an interface that is not in
/// `SOURCE_CHECKED`: policies close one, if there are any.
#[inline(always)]
pub fn judge<F: RewriteIp, P: Packet, W: World<F>>(
    packet: &P,
    world: &W,
    at: &Context,
    work: &mut Work<F>,
) -> Verdict {
    let headers = &mut work.headers;
    if !world.is_source_checked(at.ifindex) || F::parse_ip(packet, at.l3, headers).is_err() {
        return Verdict::PASS;
    }
    let src = &headers.tuple.src;
    if F::is_of_link(src) || world.bound(src) == Some(at.ifindex) {
        return Verdict::PASS;
    }
    if headers.fragment != Fragment::Later && matches!(headers.proto, proto::TCP | proto::UDP | proto::SCTP) {
        // Told without ports where they can't be read.
        let _ = parse_ports::<F, P>(packet, headers);
    }
    work.from_pod = headers.tuple;
    work.judged.ifindex = at.ifindex;
    work.judged.outward = 1;
    enforce::tell::<F, W>(world, work, Judgement::NONE, Reason::SourceNotOwn);
    Verdict::drop(Reason::SourceNotOwn)
}

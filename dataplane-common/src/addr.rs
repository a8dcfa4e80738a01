//! Address families. Everything that differs between IPv4 and IPv6 in a table or a header is said here, once.

use bytemuck::{Pod, Zeroable};

use crate::{
    datagram::{Datagram4, Datagram6, DatagramHead, DatagramKey4, DatagramKey6},
    flow::{Flow4, Flow6, FlowKey4, FlowKey6, FlowMeta, Side},
    policy::{PolicyFlowKey4, PolicyFlowKey6},
    service::{AffinityKey4, AffinityKey6, FrontendKey4, FrontendKey6, Scope},
    verdict::Hook,
};

/// Layer 4 protocol numbers (IANA).
pub mod proto {
    pub const ICMP: u8 = 1;
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
    pub const ICMPV6: u8 = 58;
    pub const SCTP: u8 = 132;
}

/// IEEE 802 numbers, host byte order.
pub mod ethertype {
    pub const IPV4: u16 = 0x0800;
    pub const IPV6: u16 = 0x86dd;
}

/// An address of either family, as shared arrays store it: network byte order, IPv4 in the first word.
pub type AnyAddr = [u32; 4];

/// The addresses and ports of a packet, in network byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Tuple<A> {
    pub src: A,
    pub dst: A,
    pub sport_be: u16,
    pub dport_be: u16,
}

impl<A: Copy> Tuple<A> {
    /// The tuple of a packet in the other direction.
    #[inline(always)]
    #[must_use]
    pub fn reversed(&self) -> Self {
        Self {
            src: self.dst,
            dst: self.src,
            sport_be: self.dport_be,
            dport_be: self.sport_be,
        }
    }
}

/// The tuple that a packet is to get, in network byte order. Addresses stay where they are: two of IPv6 are more than
/// there are registers for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewrite<'a, A> {
    pub src: &'a A,
    pub dst: &'a A,
    pub sport_be: u16,
    pub dport_be: u16,
}

impl<'a, A: Copy> Rewrite<'a, A> {
    #[inline(always)]
    pub fn of(tuple: &'a Tuple<A>) -> Self {
        Self {
            src: &tuple.src,
            dst: &tuple.dst,
            sport_be: tuple.sport_be,
            dport_be: tuple.dport_be,
        }
    }

    /// The tuple by itself.
    #[inline(always)]
    #[must_use]
    pub fn tuple(&self) -> Tuple<A> {
        Tuple {
            src: *self.src,
            dst: *self.dst,
            sport_be: self.sport_be,
            dport_be: self.dport_be,
        }
    }

    /// The tuple of the answer to a packet that has got this one.
    #[inline(always)]
    #[must_use]
    pub fn reversed(&self) -> Tuple<A> {
        Tuple {
            src: *self.dst,
            dst: *self.src,
            sport_be: self.dport_be,
            dport_be: self.sport_be,
        }
    }
}

/// IPv4 or IPv6: the types of the family's tables and the conversions into them.
pub trait Family: Copy + 'static {
    /// 4 or 6.
    const VERSION: u8;
    /// Bytes of the fixed part of the IP header.
    const HEADER_LEN: usize;
    /// The family's ICMP.
    const ICMP: u8;

    /// Network byte order.
    type Addr: Pod + Copy + Eq + Default + core::fmt::Debug + core::hash::Hash;
    type FrontendKey: Pod + Copy + Eq + core::hash::Hash + core::fmt::Debug;
    type FlowKey: Pod + Copy + Eq + core::hash::Hash + core::fmt::Debug;
    type AffinityKey: Pod + Copy + Eq + core::hash::Hash + core::fmt::Debug;
    type Flow: Pod + Copy + core::fmt::Debug;
    type DatagramKey: Pod + Copy + Eq + core::hash::Hash + core::fmt::Debug;
    type Datagram: Pod + Copy + core::fmt::Debug;
    type PolicyFlowKey: Pod + Copy + Eq + core::hash::Hash + core::fmt::Debug;

    fn frontend_key(addr: Self::Addr, port_be: u16, proto: u8, scope: Scope) -> Self::FrontendKey;
    fn flow_key(tuple: &Tuple<Self::Addr>, proto: u8, side: Side) -> Self::FlowKey;
    /// The key of a flow at a pod, from the tuple of a packet that the pod sends.
    fn policy_flow_key(from_pod: &Tuple<Self::Addr>, proto: u8) -> Self::PolicyFlowKey;
    fn affinity_key(service: u32, generation: u16, client: Self::Addr) -> Self::AffinityKey;
    fn flow(rewrite: &Tuple<Self::Addr>, meta: FlowMeta) -> Self::Flow;
    /// The tuple that a packet of the flow gets.
    fn rewrite(flow: &Self::Flow) -> Rewrite<'_, Self::Addr>;
    fn set_rewrite(flow: &mut Self::Flow, rewrite: &Tuple<Self::Addr>);
    fn set_rewrite_sport(flow: &mut Self::Flow, sport_be: u16);
    fn meta(flow: &Self::Flow) -> &FlowMeta;
    fn meta_mut(flow: &mut Self::Flow) -> &mut FlowMeta;
    fn datagram_key(src: Self::Addr, dst: Self::Addr, id_be: u32, proto: u8, hook: Hook)
    -> Self::DatagramKey;
    /// The identification in a key.
    fn datagram_id(key: &Self::DatagramKey) -> u32;
    fn datagram_head(datagram: &Self::Datagram) -> &DatagramHead;
    fn datagram_head_mut(datagram: &mut Self::Datagram) -> &mut DatagramHead;
    fn datagram_flow(datagram: &Self::Datagram) -> &Self::Flow;
    fn datagram_flow_mut(datagram: &mut Self::Datagram) -> &mut Self::Flow;
    fn to_any(addr: Self::Addr) -> AnyAddr;
    fn from_any(addr: AnyAddr) -> Self::Addr;
    /// 127.0.0.0/8 and `::1`.
    fn is_loopback(addr: &Self::Addr) -> bool;
    /// An address that every interface may have: the unspecified one (a host that has none yet, RFC 2131 and RFC 4862), and
    /// those of the link (169.254.0.0/16, RFC 3927; `fe80::/10`, RFC 4291).
    fn is_of_link(addr: &Self::Addr) -> bool;
    /// The address as 32-bit words in network byte order, for checksums and hashing.
    fn words(addr: &Self::Addr) -> &[u32];
}

/// Internet Protocol version 4.
#[derive(Clone, Copy, Debug)]
pub struct V4;
/// Internet Protocol version 6.
#[derive(Clone, Copy, Debug)]
pub struct V6;

macro_rules! family {
    ($family:ident, $version:literal, $header:literal, $icmp:expr, $addr:ty,
     $frontend:ident, $key:ident, $flow:ident, $affinity:ident, $datagram_key:ident, $datagram:ident, $policy:ident,
     to_any: |$a:ident| $to_any:expr, from_any: |$b:ident| $from_any:expr, words: |$c:ident| $words:expr,
     is_loopback: |$l:ident| $is_loopback:expr, is_of_link: |$i:ident| $is_of_link:expr,
     key_of_words: |$src:ident, $dst:ident, $ports:ident, $rest:ident| $words_of_key:expr) => {
        impl Family for $family {
            const VERSION: u8 = $version;
            const HEADER_LEN: usize = $header;
            const ICMP: u8 = $icmp;
            type Addr = $addr;
            type FrontendKey = $frontend;
            type FlowKey = $key;
            type AffinityKey = $affinity;
            type Flow = $flow;
            type DatagramKey = $datagram_key;
            type Datagram = $datagram;
            type PolicyFlowKey = $policy;

            #[inline(always)]
            fn frontend_key(addr: $addr, port_be: u16, proto: u8, scope: Scope) -> $frontend {
                $frontend {
                    addr_be: addr,
                    port_be,
                    proto,
                    scope: scope as u8,
                }
            }
            #[inline(always)]
            fn flow_key(tuple: &Tuple<$addr>, proto: u8, side: Side) -> $key {
                // Written as whole words, because that is how the kernel's hash reads it: a load that needs several
                // smaller stores waits for all of them.
                let ($src, $dst) = (tuple.src, tuple.dst);
                let $ports: u32 = bytemuck::cast([tuple.sport_be, tuple.dport_be]);
                let $rest: u32 = bytemuck::cast([proto, side as u8, 0, 0]);
                bytemuck::cast($words_of_key)
            }
            #[inline(always)]
            fn policy_flow_key(from_pod: &Tuple<$addr>, proto: u8) -> $policy {
                let ($src, $dst) = (from_pod.src, from_pod.dst);
                let $ports: u32 = bytemuck::cast([from_pod.sport_be, from_pod.dport_be]);
                let $rest: u32 = bytemuck::cast([proto, 0, 0, 0]);
                bytemuck::cast($words_of_key)
            }
            #[inline(always)]
            fn affinity_key(service: u32, generation: u16, client: $addr) -> $affinity {
                $affinity {
                    service,
                    service_generation: u32::from(generation),
                    addr_be: client,
                }
            }
            #[inline(always)]
            fn flow(rewrite: &Tuple<$addr>, meta: FlowMeta) -> $flow {
                $flow {
                    src_be: rewrite.src,
                    dst_be: rewrite.dst,
                    sport_be: rewrite.sport_be,
                    dport_be: rewrite.dport_be,
                    meta,
                }
            }
            #[inline(always)]
            fn rewrite(flow: &$flow) -> Rewrite<'_, $addr> {
                Rewrite {
                    src: &flow.src_be,
                    dst: &flow.dst_be,
                    sport_be: flow.sport_be,
                    dport_be: flow.dport_be,
                }
            }
            #[inline(always)]
            fn set_rewrite(flow: &mut $flow, rewrite: &Tuple<$addr>) {
                flow.src_be = rewrite.src;
                flow.dst_be = rewrite.dst;
                flow.sport_be = rewrite.sport_be;
                flow.dport_be = rewrite.dport_be;
            }
            #[inline(always)]
            fn set_rewrite_sport(flow: &mut $flow, sport_be: u16) {
                flow.sport_be = sport_be;
            }
            #[inline(always)]
            fn meta(flow: &$flow) -> &FlowMeta {
                &flow.meta
            }
            #[inline(always)]
            fn meta_mut(flow: &mut $flow) -> &mut FlowMeta {
                &mut flow.meta
            }
            #[inline(always)]
            fn datagram_key(src: $addr, dst: $addr, id_be: u32, proto: u8, hook: Hook) -> $datagram_key {
                $datagram_key {
                    src_be: src,
                    dst_be: dst,
                    id_be,
                    proto: if $version == 4 { proto } else { 0 },
                    hook: hook as u8,
                    unused: [0; 2],
                }
            }
            #[inline(always)]
            fn datagram_id(key: &$datagram_key) -> u32 {
                key.id_be
            }
            #[inline(always)]
            fn datagram_head(datagram: &$datagram) -> &DatagramHead {
                &datagram.head
            }
            #[inline(always)]
            fn datagram_head_mut(datagram: &mut $datagram) -> &mut DatagramHead {
                &mut datagram.head
            }
            #[inline(always)]
            fn datagram_flow(datagram: &$datagram) -> &$flow {
                &datagram.flow
            }
            #[inline(always)]
            fn datagram_flow_mut(datagram: &mut $datagram) -> &mut $flow {
                &mut datagram.flow
            }
            #[inline(always)]
            fn to_any($a: $addr) -> AnyAddr {
                $to_any
            }
            #[inline(always)]
            fn from_any($b: AnyAddr) -> $addr {
                $from_any
            }
            #[inline(always)]
            fn is_loopback($l: &$addr) -> bool {
                $is_loopback
            }
            #[inline(always)]
            fn is_of_link($i: &$addr) -> bool {
                $is_of_link
            }
            #[inline(always)]
            fn words($c: &$addr) -> &[u32] {
                $words
            }
        }
    };
}

family!(V4, 4, 20, proto::ICMP, u32,
    FrontendKey4, FlowKey4, Flow4, AffinityKey4, DatagramKey4, Datagram4, PolicyFlowKey4,
    to_any: |a| [a, 0, 0, 0], from_any: |b| b[0], words: |c| core::slice::from_ref(c),
    is_loopback: |l| u32::from_be(*l) >> 24 == 127,
    is_of_link: |i| *i == 0 || u32::from_be(*i) >> 16 == 0xa9fe,
    key_of_words: |src, dst, ports, rest| [src, dst, ports, rest]);
family!(V6, 6, 40, proto::ICMPV6, [u32; 4],
    FrontendKey6, FlowKey6, Flow6, AffinityKey6, DatagramKey6, Datagram6, PolicyFlowKey6,
    to_any: |a| a, from_any: |b| b, words: |c| c,
    is_loopback: |l| *l == [0, 0, 0, 1u32.to_be()],
    is_of_link: |i| *i == [0; 4] || u32::from_be(i[0]) >> 22 == 0x3fa,
    key_of_words: |s, d, ports, rest| [s[0], s[1], s[2], s[3], d[0], d[1], d[2], d[3], ports, rest]);

/// A link-layer address.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct Mac(pub [u8; 6]);

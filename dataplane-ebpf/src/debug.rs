//! Debug lines: what became of each packet that was dropped, redirected or rewritten, in aya-log's format.
//!
//! `from_pod 3: pass 0 udp 10.0.1.5 4001 > 10.96.0.53 53 as 10.0.1.5 4001 > 10.0.2.7 5353` tells the hook, the device, the
//! action and its device, and the tuple as the packet came and as it goes; ports are 0 where there are none. A dropped
//! packet's line ends with the reason.
//!
//! Off unless the agent sets [`macro_support::AYA_LOG_LEVEL`] before it loads the object. The verifier knows the
//! constant and removes what it rules out: without debug lines, two reads of that constant are left of them.
//!
//! aya-log's macros find the ring buffer, the level and the record's format by the path
//! `::aya_log_ebpf::macro_support`. That is this crate under a second name (see `main.rs`), because the map of the
//! crate `aya-log-ebpf` is a legacy one, which libbpf and bpftool refuse to load.

use core::mem::offset_of;

use aya_ebpf::{btf_maps::PerCpuArray, macros::btf_map};
use aya_log_common::Level;
use aya_log_ebpf_macros::info;
use dataplane_common::{
    addr::{AnyAddr, Tuple, V4, V6, proto},
    packet::Packet,
    parse::{Fragment, Headers, Ipv4Header, Ipv6Header, parse_l4},
    pipeline::{self, Context, Stages, World},
    reason::{REASONS, Reason},
    rewrite::RewriteIp,
    verdict::{Action, Verdict},
};

/// What `aya_log_ebpf` has by this name, with a BTF map.
pub mod macro_support {
    use aya_ebpf::{Global, btf_maps::RingBuf, macros::btf_map};
    pub use aya_log_common::{
        Argument, DefaultFormatter, DisplayHint, Field, Header, IpFormatter, Level, LogValueLength,
    };

    /// Records for the agent. One page at least; the agent makes it larger where it reads it.
    #[btf_map]
    pub static AYA_LOGS: RingBuf<(), 4096> = RingBuf::new();

    /// The highest [`Level`] that is written; 0 is none.
    #[unsafe(no_mangle)]
    pub static AYA_LOG_LEVEL: Global<u8> = Global::new(0);

    #[inline(always)]
    pub fn level_enabled(level: Level) -> bool {
        level as u8 <= AYA_LOG_LEVEL.load()
    }
}

/// A packet as it came, and as it goes. The tuple is all zeros where the packet could not be parsed.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Seen<A> {
    came: Tuple<A>,
    goes: Tuple<A>,
    /// Offset of the layer 4 header; 0 without ports.
    l4: u16,
    proto: u8,
}

/// A packet of either family.
#[repr(C)]
struct SeenBy {
    v4: Seen<u32>,
    v6: Seen<AnyAddr>,
}
/// Scratch space.
#[btf_map]
static WORK_SEEN: PerCpuArray<SeenBy, 1> = PerCpuArray::new();

/// What a line needs of a family.
pub trait Shown: RewriteIp {
    /// Offset of the source address in the header; the destination is behind it.
    const ADDRESSES: usize;

    fn seen<'a>() -> Option<&'a mut Seen<Self::Addr>>;
    fn dropped(hook: u32, ifindex: u32, reason: u32);
    fn went(hook: u32, ifindex: u32, action: u32, to: u32);
}

/// [`pipeline::process`], with a line if lines are wanted.
#[inline(always)]
pub fn process<F: Shown, P: Packet, W: World<F>, S: Stages<F, P, W>>(
    packet: &mut P,
    world: &W,
    at: &Context,
    stages: &mut S,
) -> Verdict {
    if macro_support::level_enabled(Level::Info) {
        look::<F, P>(packet, at.l3);
    }
    let verdict = pipeline::process::<F, P, W, S>(packet, world, at, stages);
    if macro_support::level_enabled(Level::Info) {
        // A copy in memory for the call: the datapath keeps its own in registers.
        tell::<F, P>(packet, &Context { ..*at }, verdict);
    }
    verdict
}

/// Notes what the packet looks like. Returns a number, because the verifier wants a defined return register.
#[inline(never)]
fn look<F: Shown, P: Packet>(packet: &P, l3: usize) -> u32 {
    let Some(seen) = F::seen() else { return 0 };
    (seen.came, seen.l4, seen.proto) = (Tuple::default(), 0, 0);
    let mut headers = Headers::default();
    if F::parse_ip(packet, l3, &mut headers).is_ok() {
        let has_ports = headers.proto == proto::TCP || headers.proto == proto::UDP;
        if has_ports
            && headers.fragment != Fragment::Later
            && parse_l4::<F, P>(packet, l3, &mut headers).is_ok()
        {
            seen.l4 = headers.l4;
        }
        (seen.came, seen.proto) = (headers.tuple, headers.proto);
    }
    0
}

/// Writes the line, unless the packet passes as it came. This is verified for each way to get here, and so kept short.
#[inline(never)]
fn tell<F: Shown, P: Packet>(packet: &P, at: &Context, verdict: Verdict) -> u32 {
    let (hook, action) = (at.hook as u32, verdict.action());
    if action == Action::Drop {
        F::dropped(hook, at.ifindex, verdict.value());
        return 0;
    }
    let Some(seen) = F::seen() else { return 0 };
    seen.goes = seen.came;
    if let Some([src, dst]) = packet.load::<[F::Addr; 2]>(at.l3 + F::ADDRESSES) {
        (seen.goes.src, seen.goes.dst) = (src, dst);
    }
    if action == Action::Answer {
        // It has another layer 4 than what it answers.
        (seen.goes.sport_be, seen.goes.dport_be) = (0, 0);
    } else if seen.l4 != 0
        && let Some([sport_be, dport_be]) = packet.load::<[u16; 2]>(usize::from(seen.l4) & 0x3ff)
    {
        (seen.goes.sport_be, seen.goes.dport_be) = (sport_be, dport_be);
    }
    let to = if action == Action::Pass {
        0
    } else {
        verdict.value()
    };
    F::went(hook, at.ifindex, action as u32, to);
    0
}

/// A family's lines. The functions that write them are global ones, which the verifier looks at once and not for each way
/// to get there: such have C's linkage, and numbers for arguments.
macro_rules! lines {
    ($family:ident, $addr:ty, $seen:ident, $addresses:expr, |$a:ident| $shown:expr, $dropped:ident, $went:ident) => {
        impl Shown for $family {
            const ADDRESSES: usize = $addresses;

            #[inline(always)]
            fn seen<'a>() -> Option<&'a mut Seen<$addr>> {
                // SAFETY: a per-CPU element; programs that use it do not nest, see `world::work`.
                WORK_SEEN.get_ptr_mut(0).map(|seen| unsafe { &mut (*seen).$seen })
            }
            #[inline(always)]
            fn dropped(hook: u32, ifindex: u32, reason: u32) {
                $dropped(hook, ifindex, reason);
            }
            #[inline(always)]
            fn went(hook: u32, ifindex: u32, action: u32, to: u32) {
                $went(hook, ifindex, action, to);
            }
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $dropped(hook: u32, ifindex: u32, reason: u32) -> u32 {
            let Some(seen) = $family::seen() else { return 0 };
            let shown = |$a: $addr| $shown;
            let Tuple { src, dst, sport_be, dport_be } = seen.came;
            info!(
                (),
                target: "dataplane_ebpf",
                "{} {}: drop {} {:i} {} > {:i} {}: {}",
                HOOKS.get(hook),
                ifindex,
                proto_name(seen.proto),
                shown(src),
                u16::from_be(sport_be),
                shown(dst),
                u16::from_be(dport_be),
                REASON_LABELS.get(reason)
            );
            0
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $went(hook: u32, ifindex: u32, action: u32, to: u32) -> u32 {
            let Some(seen) = $family::seen() else { return 0 };
            if action == Action::Pass as u32 && seen.came == seen.goes {
                return 0;
            }
            let shown = |$a: $addr| $shown;
            info!(
                (),
                target: "dataplane_ebpf",
                "{} {}: {} {} {} {:i} {} > {:i} {} as {:i} {} > {:i} {}",
                HOOKS.get(hook),
                ifindex,
                ACTIONS.get(action),
                to,
                proto_name(seen.proto),
                shown(seen.came.src),
                u16::from_be(seen.came.sport_be),
                shown(seen.came.dst),
                u16::from_be(seen.came.dport_be),
                shown(seen.goes.src),
                u16::from_be(seen.goes.sport_be),
                shown(seen.goes.dst),
                u16::from_be(seen.goes.dport_be)
            );
            0
        }
    };
}

lines!(
    V4,
    u32,
    v4,
    offset_of!(Ipv4Header, src_be),
    |addr| u32::from_be(addr),
    debug_dropped4,
    debug_went4
);
lines!(
    V6,
    AnyAddr,
    v6,
    offset_of!(Ipv6Header, src_be),
    |addr| bytemuck::cast::<_, [u8; 16]>(addr),
    debug_dropped6,
    debug_went6
);

/// Names of one length. An array of string slices would hold pointers, which nobody relocates in a BPF object's data.
/// `COUNT` is a power of two, so that a mask bounds the index where the verifier sees it.
struct Names<const LEN: usize, const COUNT: usize>([[u8; LEN]; COUNT]);

impl<const LEN: usize, const COUNT: usize> Names<LEN, COUNT> {
    const fn new<const NAMED: usize>(names: [&str; NAMED]) -> Self {
        assert!(COUNT.is_power_of_two() && NAMED <= COUNT);
        let mut padded = [[b' '; LEN]; COUNT];
        let mut i = 0;
        while i < NAMED {
            let name = names[i].as_bytes();
            let mut j = 0;
            while j < name.len() {
                padded[i][j] = name[j];
                j += 1;
            }
            i += 1;
        }
        Self(padded)
    }

    #[inline(always)]
    fn get(&'static self, index: u32) -> &'static str {
        // SAFETY: the mask keeps the index inside. Strings were copied whole, and filled up with spaces.
        unsafe { core::str::from_utf8_unchecked(self.0.get_unchecked(index as usize & (COUNT - 1))) }
    }
}

/// By `dataplane_common::verdict::Hook`.
static HOOKS: Names<11, 8> = Names::new(["xdp", "from_netdev", "to_netdev", "to_lo", "from_pod", "to_pod"]);
/// By [`Action`], as far as a packet leaves with it.
static ACTIONS: Names<8, 8> = Names::new(["pass", "drop", "pod", "host", "transmit", "resolve", "answer"]);
/// By [`Reason`].
static REASON_LABELS: Names<24, 64> = Names::new(reason_labels());
/// By [`proto_name`].
static PROTOS: Names<5, 8> = Names::new(["other", "tcp", "udp", "icmp", "icmp6"]);

const fn reason_labels() -> [&'static str; REASONS as usize] {
    let mut labels = [""; REASONS as usize];
    let mut i = 0;
    while i < labels.len() {
        labels[i] = Reason::ALL[i].label();
        i += 1;
    }
    labels
}

#[inline(always)]
fn proto_name(proto: u8) -> &'static str {
    PROTOS.get(match proto {
        proto::TCP => 1,
        proto::UDP => 2,
        proto::ICMP => 3,
        proto::ICMPV6 => 4,
        _ => 0,
    })
}

//! The stages that are verified apart: global functions, which the verifier looks at once for a program, whatever leads
//! to them. Such have C's linkage; their arguments are the program's context and numbers.

use core::ptr;

use aya_ebpf::bindings::{__sk_buff, xdp_md};
use dataplane_common::{
    addr::{V4, V6},
    fragment::Waiting,
    pipeline::{Context, Stages, Work, begin, conclude, decide, glance, read},
    verdict::Verdict,
};

use crate::{
    access::{SkbPacket, XdpPacket},
    enforce::{no_policies, policies},
    fragments::{fragments, no_fragments},
    maps::{WORK_V4, WORK_V6},
    monitor,
    world::{World, work},
};

/// The stages of programs with this context.
pub struct Apart<C>(pub *mut C);

macro_rules! stages {
    ($family:ident, $context:ident, $packet:ident, $work:ident, $fragments:ident, $policies:ident, $decide:ident, $begin:ident, $conclude:ident $(, read: $read:ident)? $(, glance: $glance:ident)?) => {
        impl Stages<$family, $packet, World<$context>> for Apart<$context> {
            #[inline(always)]
            fn work(&mut self) -> Option<&mut Work<$family>> {
                work(&$work)
            }
            $(
                #[inline(always)]
                fn read(&mut self, _: &mut $packet, at: &Context) {
                    $read(self.0, at.to_raw());
                }
            )?
            $(
                #[inline(always)]
                fn glance(&mut self, _: &mut $packet, _: &World<$context>, at: &Context) -> Verdict {
                    Verdict::from_raw($glance(self.0, at.to_raw()))
                }
            )?
            #[inline(always)]
            fn decide(&mut self, _: &mut $packet, _: &World<$context>, at: &Context, verdict: Verdict) -> Verdict {
                Verdict::from_raw($decide(self.0, at.to_raw(), verdict.to_raw()))
            }
            #[inline(always)]
            fn begin(&mut self, _: &World<$context>, at: &Context) -> Verdict {
                Verdict::from_raw($begin(at.to_raw()))
            }
            #[inline(always)]
            fn conclude(&mut self, _: &mut $packet, _: &World<$context>, at: &Context, verdict: Verdict) -> Verdict {
                Verdict::from_raw($conclude(self.0, at.to_raw(), verdict.to_raw()))
            }
            $fragments!($family);
            $policies!($family);
        }

        $(
            #[unsafe(no_mangle)]
            #[inline(never)]
            extern "C" fn $read(ctx: *mut $context, at: u64) -> u64 {
                if let Some(work) = work(&$work) {
                    read::<$family, _>(&$packet(ctx), &Context::from_raw(at), &mut work.headers);
                }
                0
            }
        )?

        $(
            #[unsafe(no_mangle)]
            #[inline(never)]
            extern "C" fn $glance(ctx: *mut $context, at: u64) -> u64 {
                let Some(work) = work(&$work) else {
                    return Verdict::PASS.to_raw();
                };
                let at = Context::from_raw(at);
                glance::<$family, _, _>(&mut $packet(ctx), &World::new(ctx), &at, &mut work.headers).to_raw()
            }
        )?

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $decide(ctx: *mut $context, at: u64, verdict: u64) -> u64 {
            let Some(work) = work(&$work) else {
                return Verdict::PASS.to_raw();
            };
            let (at, verdict) = (Context::from_raw(at), Verdict::from_raw(verdict));
            decide::<$family, _, _>(&mut $packet(ctx), &World::new(ctx), &at, work, verdict).to_raw()
        }

        // No argument that it does not read: the compiler leaves that undefined, and the verifier minds.
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $begin(at: u64) -> u64 {
            let Some(work) = work(&$work) else {
                return Verdict::PASS.to_raw();
            };
            begin::<$family, _>(&World::<$context>::new(ptr::null_mut()), &Context::from_raw(at), work).to_raw()
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $conclude(ctx: *mut $context, at: u64, verdict: u64) -> u64 {
            let Some(work) = work(&$work) else {
                return Verdict::PASS.to_raw();
            };
            let (at, verdict) = (Context::from_raw(at), Verdict::from_raw(verdict));
            monitor::concludes::<$family, _>(ctx, at.hook, at.l3, work, verdict);
            conclude::<$family, _, _>(&mut $packet(ctx), &World::new(ctx), &at, work, verdict).to_raw()
        }
    };
}

stages!(
    V4,
    xdp_md,
    XdpPacket,
    WORK_V4,
    no_fragments,
    no_policies,
    decide_xdp4,
    begin_xdp4,
    conclude_xdp4,
    read: read_xdp4
);
stages!(
    V6,
    xdp_md,
    XdpPacket,
    WORK_V6,
    no_fragments,
    no_policies,
    decide_xdp6,
    begin_xdp6,
    conclude_xdp6,
    glance: glance_xdp6
);
stages!(
    V4,
    __sk_buff,
    SkbPacket,
    WORK_V4,
    fragments,
    policies,
    decide_skb4,
    begin_skb4,
    conclude_skb4,
    read: read_skb4
);
stages!(
    V6,
    __sk_buff,
    SkbPacket,
    WORK_V6,
    fragments,
    policies,
    decide_skb6,
    begin_skb6,
    conclude_skb6,
    glance: glance_skb6
);

//! The stages of `dataplane_common::enforce`, at TC hooks.

use core::ptr;

use aya_ebpf::bindings::__sk_buff;
use dataplane_common::{
    addr::{V4, V6},
    enforce,
    pipeline::Context,
    source, unbound,
    verdict::Verdict,
};

use crate::{
    access::SkbPacket,
    maps::{WORK_V4, WORK_V6},
    world::{World, work},
};

macro_rules! stages_of {
    ($family:ident, $work:ident, $enforce:ident, $again:ident, $source:ident, $guard:ident) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $source(ctx: *mut __sk_buff, at: u64) -> u64 {
            let Some(work) = work(&$work) else {
                return Verdict::PASS.to_raw();
            };
            let at = Context::from_raw(at);
            source::judge::<$family, _, _>(&SkbPacket(ctx), &World::new(ctx), &at, work).to_raw()
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $guard(ctx: *mut __sk_buff, at: u64) -> u64 {
            let at = Context::from_raw(at);
            unbound::guard::<$family, _, _>(&SkbPacket(ctx), &World::new(ctx), &at).to_raw()
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $enforce(ctx: *mut __sk_buff, at: u64, verdict: u64) -> u64 {
            let Some(work) = work(&$work) else {
                return Verdict::PASS.to_raw();
            };
            let (at, verdict) = (Context::from_raw(at), Verdict::from_raw(verdict));
            enforce::untranslated::<$family, _, _>(&SkbPacket(ctx), &World::new(ctx), &at, work, verdict)
                .to_raw()
        }

        // No argument that it does not read: the compiler leaves that undefined, and the verifier minds.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $again(at: u64) -> u64 {
            let Some(work) = work(&$work) else {
                return Verdict::PASS.to_raw();
            };
            let world = World::new(ptr::null_mut::<__sk_buff>());
            enforce::again::<$family, _>(&world, &Context::from_raw(at), work).to_raw()
        }
    };
}

stages_of!(V4, WORK_V4, enforce_skb4, again_skb4, source_skb4, guard_skb4);
stages_of!(V6, WORK_V6, enforce_skb6, again_skb6, source_skb6, guard_skb6);

/// The methods of `Stages` that are about policies, at TC hooks.
macro_rules! policies {
    (V4) => {
        policies!(enforce_skb4, again_skb4, source_skb4, guard_skb4);
    };
    (V6) => {
        policies!(enforce_skb6, again_skb6, source_skb6, guard_skb6);
    };
    ($enforce:ident, $again:ident, $source:ident, $guard:ident) => {
        #[inline(always)]
        fn source(&mut self, _: &mut SkbPacket, _: &World<__sk_buff>, at: &Context) -> Verdict {
            Verdict::from_raw(crate::enforce::$source(self.0, at.to_raw()))
        }
        #[inline(always)]
        fn guard(&mut self, _: &mut SkbPacket, _: &World<__sk_buff>, at: &Context) -> Verdict {
            Verdict::from_raw(crate::enforce::$guard(self.0, at.to_raw()))
        }
        #[inline(always)]
        fn enforce(
            &mut self,
            _: &mut SkbPacket,
            _: &World<__sk_buff>,
            at: &Context,
            verdict: Verdict,
        ) -> Verdict {
            Verdict::from_raw(crate::enforce::$enforce(
                self.0,
                at.to_raw(),
                verdict.to_raw(),
            ))
        }
        #[inline(always)]
        fn judge(&mut self, _: &mut SkbPacket, _: &World<__sk_buff>, at: &Context) -> Verdict {
            Verdict::from_raw(crate::enforce::$again(at.to_raw()))
        }
    };
}
pub(crate) use policies;

/// The same at XDP, where no pods are.
macro_rules! no_policies {
    ($family:ident) => {
        #[inline(always)]
        fn enforce(
            &mut self,
            _: &mut XdpPacket,
            _: &World<xdp_md>,
            _: &Context,
            verdict: Verdict,
        ) -> Verdict {
            verdict
        }
        #[inline(always)]
        fn source(&mut self, _: &mut XdpPacket, _: &World<xdp_md>, _: &Context) -> Verdict {
            Verdict::PASS
        }
        #[inline(always)]
        fn guard(&mut self, _: &mut XdpPacket, _: &World<xdp_md>, _: &Context) -> Verdict {
            Verdict::PASS
        }
        #[inline(always)]
        fn judge(&mut self, _: &mut XdpPacket, _: &World<xdp_md>, _: &Context) -> Verdict {
            Verdict::PASS
        }
    };
}
pub(crate) use no_policies;

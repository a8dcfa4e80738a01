//! Fragments at TC hooks: their tables, the store of those that are held, and their stages, which are global functions as
//! those of `stages`.

use core::ptr;

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_RECOMPUTE_CSUM, BPF_NOEXIST},
    helpers::generated::{bpf_clone_redirect, bpf_skb_change_tail, bpf_skb_load_bytes, bpf_skb_store_bytes},
};
use dataplane_common::{
    addr::{AnyAddr, V4, V6},
    datagram::{
        Datagram4, Datagram6, DatagramHead, DatagramKey4, DatagramKey6, FIRST_BYTES, FragmentSource,
        HELD_BYTES, HeldHead,
    },
    fragment::{self, Fragments, Store, Waiting},
    packet::Packet,
    pipeline::Context,
    tables::InsertError,
    verdict::{Hook, Verdict},
};

use crate::{
    access::SkbPacket,
    maps::{DATAGRAMS_V4, DATAGRAMS_V6, FRAGMENT_SOURCES, HELD, WORK_SCRATCH, WORK_V4, WORK_V6},
    stages::Apart,
    world::{Aligned, World, insert, work},
};

type SkbWorld = World<__sk_buff>;

macro_rules! tables {
    ($family:ty, $key:ty, $datagram:ty, $datagrams:ident) => {
        impl Fragments<$family, SkbPacket> for SkbWorld {
            #[inline(always)]
            fn datagram(&self, key: &$key, into: &mut $datagram) -> bool {
                // SAFETY: may be torn when the entry is reused meanwhile: then the datagram is one that the table has
                // forgotten, and so is this fragment.
                let Some(datagram) = (unsafe { $datagrams.get(key) }) else {
                    return false;
                };
                *into = *datagram;
                true
            }
            #[inline(always)]
            fn datagram_head(&self, key: &$key) -> Option<DatagramHead> {
                // SAFETY: as above.
                unsafe { $datagrams.get(key) }.map(|datagram| datagram.head)
            }
            #[inline(always)]
            fn put_datagram(
                &self,
                key: &$key,
                datagram: &$datagram,
                replace: bool,
            ) -> Result<(), InsertError> {
                let flags = if replace { 0 } else { u64::from(BPF_NOEXIST) };
                insert(&$datagrams, key, datagram, flags)
            }
            #[inline(always)]
            fn remove_datagram(&self, key: &$key) {
                let _ = $datagrams.remove(key);
            }
            #[inline(always)]
            fn add_held(&self, key: &$key) {
                if let Some(datagram) = $datagrams.get_ptr_mut(key) {
                    // SAFETY: an element that exists.
                    unsafe { (*datagram).head.held += 1 };
                }
            }
            #[inline(always)]
            fn source(&self, source: &AnyAddr) -> Option<FragmentSource> {
                // SAFETY: may be torn when the entry is reused meanwhile: a limit that is met too early or too late.
                unsafe { FRAGMENT_SOURCES.get(source) }.copied()
            }
            #[inline(always)]
            fn put_source(&self, source: &AnyAddr, value: FragmentSource) {
                let _ = insert(&FRAGMENT_SOURCES, source, Aligned(value).in_place(), 0);
            }
            #[inline(always)]
            fn add_to_source(&self, source: &AnyAddr, more: i32) {
                if let Some(known) = FRAGMENT_SOURCES.get_ptr_mut(source) {
                    // SAFETY: an element that exists.
                    unsafe { (*known).held += more };
                }
            }
            #[inline(always)]
            fn copy(&self, packet: &SkbPacket, head: HeldHead) -> bool {
                let (Some(scratch), Some(length)) = (
                    WORK_SCRATCH.get_ptr_mut(0),
                    some_bytes(packet.len(), HELD_BYTES),
                ) else {
                    return false;
                };
                // SAFETY: a per-CPU element with room for as many bytes; see `world::work`.
                unsafe {
                    let copy = &raw mut (*scratch).held;
                    (*copy).head = head;
                    let to = (&raw mut (*copy).bytes).cast();
                    bpf_skb_load_bytes(packet.0.cast(), 0, to, length) == 0
                }
            }
        }
    };
}

tables!(V4, DatagramKey4, Datagram4, DATAGRAMS_V4);
tables!(V6, DatagramKey6, Datagram6, DATAGRAMS_V6);

/// `length` if it is at most `most`, which is below 16,384. Written so that the verifier of Linux 6.1 sees that it is not 0,
/// which a comparison with 0 does not tell it. No frame has 0 bytes.
#[inline(always)]
pub fn some_bytes(length: usize, most: usize) -> Option<u32> {
    let bounded = (length.wrapping_sub(1) & 0x3fff) + 1;
    (length <= most).then(|| bounded.min(most) as u32)
}

/// Gives the packet other bytes, and a length.
///
/// # Safety
///
/// There have to be as many bytes to read.
#[inline(always)]
unsafe fn replace(packet: &mut SkbPacket, bytes: *const u8, length: u32) -> bool {
    // SAFETY: the context is valid while the program runs; the helpers check the length, the caller the bytes.
    unsafe {
        bpf_skb_change_tail(packet.0, length, 0) == 0
            && bpf_skb_store_bytes(packet.0, 0, bytes.cast(), length, BPF_F_RECOMPUTE_CSUM.into()) == 0
    }
}

impl Store<SkbPacket> for SkbWorld {
    #[inline(always)]
    fn put(&self, place: u32) -> Result<(), InsertError> {
        let Some(scratch) = WORK_SCRATCH.get_ptr(0) else {
            return Err(InsertError::Failed);
        };
        // SAFETY: a per-CPU element, see `world::work`.
        let copy = unsafe { &(*scratch).held };
        HELD.insert(Aligned(place).in_place(), copy, BPF_NOEXIST.into())
            .map_err(|_| InsertError::Exists)
    }

    #[inline(always)]
    fn head(&self, place: u32) -> Option<HeldHead> {
        // SAFETY: may be torn when the element is reused meanwhile: it is deleted before it is believed.
        unsafe { HELD.get(Aligned(place).in_place()) }.map(|held| held.head)
    }

    #[inline(always)]
    fn remove(&self, place: u32) -> bool {
        HELD.remove(Aligned(place).in_place()).is_ok()
    }

    #[inline(always)]
    fn set_aside(&self, packet: &SkbPacket) -> bool {
        let (Some(scratch), Some(length)) =
            (WORK_SCRATCH.get_ptr_mut(0), some_bytes(packet.len(), FIRST_BYTES))
        else {
            return false;
        };
        // SAFETY: a per-CPU element with room for as many bytes. What is sent again at an egress hook runs programs within
        // this one, but none of them releases anything: that takes a first fragment.
        unsafe {
            let aside = &raw mut (*scratch).aside;
            (*aside).length = length;
            let to = (&raw mut (*aside).bytes).cast();
            bpf_skb_load_bytes(packet.0.cast(), 0, to, length) == 0
        }
    }

    #[inline(always)]
    fn restore(&self, packet: &mut SkbPacket) {
        let Some(scratch) = WORK_SCRATCH.get_ptr(0) else {
            return;
        };
        // SAFETY: as above; the length is read once, and checked.
        unsafe {
            let aside = &raw const (*scratch).aside;
            let length = ptr::read_volatile(&raw const (*aside).length);
            if let Some(length) = some_bytes(length as usize, FIRST_BYTES) {
                replace(packet, (&raw const (*aside).bytes).cast(), length);
            }
        }
    }

    #[inline(always)]
    fn become_held(&self, packet: &mut SkbPacket, place: u32) -> bool {
        let Some(held) = HELD.get_ptr(Aligned(place).in_place()) else {
            return false;
        };
        // SAFETY: an element that exists, with as many bytes; the length is read once, and checked.
        unsafe {
            let length = ptr::read_volatile(&raw const (*held).head.length);
            some_bytes(length as usize, HELD_BYTES)
                .is_some_and(|length| replace(packet, (&raw const (*held).bytes).cast(), length))
        }
    }

    #[inline(always)]
    fn send_again(&self, packet: &mut SkbPacket, at: &Context) {
        /// `BPF_F_INGRESS`.
        const INGRESS: u64 = 1;
        let flags = match at.hook {
            Hook::Xdp | Hook::FromNetdev | Hook::FromPod => INGRESS,
            Hook::ToNetdev | Hook::ToLo | Hook::ToPod => 0,
        };
        // SAFETY: the context is valid while the program runs. What the kernel cannot send is lost, as packets are.
        unsafe { bpf_clone_redirect(packet.0, at.ifindex, flags) };
    }
}

/// A stage that leaves its mark in nothing but its result.
macro_rules! stage {
    ($name:ident($($arg:ident),*): $packet:ident, $world:ident, $at:ident => $body:expr) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $name(ctx: *mut __sk_buff, at: u64 $(, $arg: u64)*) -> u64 {
            let ($packet, $world, $at) = (&mut SkbPacket(ctx), &World::new(ctx), &Context::from_raw(at));
            $body
        }
    };
}

macro_rules! stages_of {
    ($family:ident, $work:ident, $first:ident, $later:ident, $hold:ident, $remember:ident) => {
        stage!($first(): packet, world, at => {
            let Some(work) = work(&$work) else { return Verdict::PASS.to_raw() };
            fragment::first::<$family, _, _>(packet, world, at, work).to_raw()
        });
        stage!($later(): packet, world, at => {
            let Some(work) = work(&$work) else { return Verdict::PASS.to_raw() };
            fragment::later::<$family, _, _>(packet, world, at, work).to_raw()
        });
        // No argument that it does not read: the compiler leaves that undefined, and the verifier minds.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $hold(ctx: *mut __sk_buff) -> u64 {
            let Some(work) = work(&$work) else { return Verdict::PASS.to_raw() };
            fragment::hold::<$family, _, _>(&mut SkbPacket(ctx), &World::new(ctx), work).to_raw()
        }
        stage!($remember(verdict): packet, world, at => {
            let Some(work) = work(&$work) else { return Waiting::NONE.to_raw() };
            fragment::remember::<$family, _, _>(packet, world, at, work, Verdict::from_raw(verdict)).to_raw()
        });
    };
}

stages_of!(V4, WORK_V4, first_skb4, later_skb4, hold_skb4, remember_skb4);
stages_of!(V6, WORK_V6, first_skb6, later_skb6, hold_skb6, remember_skb6);

// Stored frames are of no family.
stage!(release_skb(waiting): packet, world, at => {
    let mut stages = Apart(packet.0);
    fragment::release::<V4, _, _, _>(packet, world, at, &mut stages, Waiting::from_raw(waiting));
    0
});
stage!(release_one_skb(waiting, index): packet, world, at => {
    fragment::release_one::<V4, _, _>(packet, world, at, Waiting::from_raw(waiting), index as u32);
    0
});

/// The methods of `Stages` that are about fragments, at TC hooks.
macro_rules! fragments {
    (V4) => {
        fragments!(first_skb4, later_skb4, hold_skb4, remember_skb4);
    };
    (V6) => {
        fragments!(first_skb6, later_skb6, hold_skb6, remember_skb6);
    };
    ($first:ident, $later:ident, $hold:ident, $remember:ident) => {
        #[inline(always)]
        fn first(&mut self, _: &mut SkbPacket, _: &World<__sk_buff>, at: &Context) -> Verdict {
            Verdict::from_raw(crate::fragments::$first(self.0, at.to_raw()))
        }
        #[inline(always)]
        fn later(&mut self, _: &mut SkbPacket, _: &World<__sk_buff>, at: &Context) -> Verdict {
            Verdict::from_raw(crate::fragments::$later(self.0, at.to_raw()))
        }
        #[inline(always)]
        fn hold(&mut self, _: &mut SkbPacket, _: &World<__sk_buff>, _: &Context) -> Verdict {
            Verdict::from_raw(crate::fragments::$hold(self.0))
        }
        #[inline(always)]
        fn remember(
            &mut self,
            _: &mut SkbPacket,
            _: &World<__sk_buff>,
            at: &Context,
            verdict: Verdict,
        ) -> Waiting {
            let (at, verdict) = (at.to_raw(), verdict.to_raw());
            Waiting::from_raw(crate::fragments::$remember(self.0, at, verdict))
        }
        #[inline(always)]
        fn release(&mut self, _: &mut SkbPacket, _: &World<__sk_buff>, at: &Context, waiting: Waiting) {
            crate::fragments::release_skb(self.0, at.to_raw(), waiting.to_raw());
        }
        #[inline(always)]
        fn release_one(
            &mut self,
            _: &mut SkbPacket,
            _: &World<__sk_buff>,
            at: &Context,
            waiting: Waiting,
            index: u32,
        ) {
            crate::fragments::release_one_skb(self.0, at.to_raw(), waiting.to_raw(), index.into());
        }
    };
}
pub(crate) use fragments;

/// The same at XDP, which leaves fragments to TC.
macro_rules! no_fragments {
    ($family:ident) => {
        #[inline(always)]
        fn first(&mut self, _: &mut XdpPacket, _: &World<xdp_md>, _: &Context) -> Verdict {
            Verdict::PASS
        }
        #[inline(always)]
        fn later(&mut self, _: &mut XdpPacket, _: &World<xdp_md>, _: &Context) -> Verdict {
            Verdict::PASS
        }
        #[inline(always)]
        fn hold(&mut self, _: &mut XdpPacket, _: &World<xdp_md>, _: &Context) -> Verdict {
            Verdict::PASS
        }
        #[inline(always)]
        fn remember(&mut self, _: &mut XdpPacket, _: &World<xdp_md>, _: &Context, _: Verdict) -> Waiting {
            Waiting::NONE
        }
        #[inline(always)]
        fn release(&mut self, _: &mut XdpPacket, _: &World<xdp_md>, _: &Context, _: Waiting) {}
        #[inline(always)]
        fn release_one(&mut self, _: &mut XdpPacket, _: &World<xdp_md>, _: &Context, _: Waiting, _: u32) {}
    };
}
pub(crate) use no_fragments;

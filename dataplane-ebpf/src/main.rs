//! The kernel side: entry points. What they do is in `dataplane_common::pipeline`; this crate gives it packets
//! ([`access`]), maps and helpers ([`world`]), and turns its verdicts into return codes.
#![no_std]
#![no_main]
// Additions that other CPUs see, see `traffic`.
#![feature(asm_experimental_arch)]

// Where aya-log's macros look for the ring buffer, see `debug`.
extern crate self as aya_log_ebpf;

mod access;
mod debug;
mod enforce;
mod fragments;
mod maps;
mod monitor;
mod policies;
mod sock;
mod stages;
mod tc;
mod traffic;
mod world;
mod xdp;

pub(crate) use debug::macro_support;

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: nothing in the datapath panics; the linker would reject an object in which this is reachable.
    unsafe { core::hint::unreachable_unchecked() }
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";

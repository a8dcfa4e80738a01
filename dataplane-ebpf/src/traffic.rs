//! What goes over services and backends: additions to elements that all CPUs share, which is why hardly any packet makes one.

use core::{arch::asm, mem::offset_of};

use aya_ebpf::{btf_maps::Array, helpers::generated::bpf_get_prandom_u32};
use dataplane_common::{
    policy::VerdictBudget,
    traffic::{SAMPLED, Sample, Traffic},
};

use crate::{
    maps::{BACKEND_TRAFFIC, MMAPABLE, SERVICE_TRAFFIC, VERDICTS_TOLD, WORK_SCRATCH},
    world::{Aligned, insert},
};

type Map = Array<Traffic, 65536, MMAPABLE>;

#[inline(always)]
fn elements(service: u32, backend: u32) -> [Option<*mut Traffic>; 2] {
    let element = |map: &Map, index| map.get_ptr_mut(index);
    [
        element(&SERVICE_TRAFFIC, service),
        element(&BACKEND_TRAFFIC, backend),
    ]
}

/// Adds to a number that other CPUs add to. In the kernel's words, because the target has no atomics in Rust.
///
/// # Safety
/// The field of an element that exists.
#[inline(always)]
pub unsafe fn add(to: *mut u64, more: u64) {
    // SAFETY: the caller's; fields of elements are aligned.
    unsafe { asm!("lock *(u64 *)({to} + 0) += {more}", to = in(reg) to, more = in(reg) more) };
}

/// Adds one at an offset in both.
#[inline(always)]
fn count(service: u32, backend: u32, field: usize) {
    for traffic in elements(service, backend).into_iter().flatten() {
        // SAFETY: a field of an element that exists.
        unsafe { add(traffic.byte_add(field).cast(), 1) };
    }
}

#[inline(always)]
pub fn count_connection(service: u32, backend: u32) {
    count(service, backend, offset_of!(Traffic, connections));
}

#[inline(always)]
pub fn count_refused(service: u32, backend: u32) {
    count(service, backend, offset_of!(Traffic, refused));
}

#[inline(always)]
pub fn count_dropped(service: u32, backend: u32) {
    count(service, backend, offset_of!(Traffic, dropped));
}

/// See `Env::count_pod_drop`.
#[inline(always)]
pub fn count_pod_drop(ifindex: u32) {
    let key = Aligned(ifindex);
    if let Some(told) = VERDICTS_TOLD.get_ptr_mut(key.in_place()) {
        // SAFETY: an element that exists.
        unsafe { add(&raw mut (*told).dropped, 1) };
    } else {
        let first = Aligned(VerdictBudget {
            dropped: 1,
            ..VerdictBudget::default()
        });
        let _ = insert(&VERDICTS_TOLD, key.in_place(), first.in_place(), 0);
    }
}

/// See `Env::count_sample`. The next packet that is counted is 1 to 2 × [`SAMPLED`] - 1 packets away, at random: what comes in turns is not
/// always met at the same place. Verified apart, so that what it needs is not in the way of the packets that are not counted.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn count_sample(service: u64, backend: u64, sample: u64) -> u64 {
    if let Some(scratch) = WORK_SCRATCH.get_ptr_mut(0) {
        // SAFETY: a per-CPU element, see `world::work`; a helper without arguments.
        unsafe { (*scratch).until_sample = bpf_get_prandom_u32() % (2 * SAMPLED - 1) };
    }
    let sample = Sample::from_raw(sample);
    let bytes = u64::from(sample.bytes) * u64::from(SAMPLED);
    for traffic in elements(service as u32, backend as u32).into_iter().flatten() {
        // SAFETY: an element that exists.
        unsafe {
            if sample.is_reply {
                add(&raw mut (*traffic).packets_out, SAMPLED.into());
                add(&raw mut (*traffic).bytes_out, bytes);
            } else {
                add(&raw mut (*traffic).packets_in, SAMPLED.into());
                add(&raw mut (*traffic).bytes_in, bytes);
            }
        }
    }
    0
}

//! [`Packet`] over XDP and TC contexts: direct packet access, bounds checked before every read and write.

use core::ptr;

use aya_ebpf::{
    bindings::{__sk_buff, xdp_md},
    helpers::generated::{
        bpf_csum_update, bpf_l4_csum_replace, bpf_skb_change_tail, bpf_skb_pull_data, bpf_xdp_adjust_tail,
        bpf_xdp_get_buff_len,
    },
};
use bytemuck::Pod;
use dataplane_common::{
    checksum,
    config::config_flags,
    packet::{Checksum, Packet},
    parse::ParseIp,
};

use crate::world::config;

/// Flags of `bpf_l4_csum_replace`; the lowest four bits are the size of what is replaced, 0 for a difference.
const PSEUDO_HEADER: u64 = 1 << 4;
const MARK_MANGLED_0: u64 = 1 << 5;
const IPV6: u64 = 1 << 7;

#[inline(always)]
fn load<T: Pod>(data: usize, end: usize, offset: usize) -> Option<T> {
    let at = data + offset;
    if at + size_of::<T>() > end {
        return None;
    }
    // SAFETY: [at, at + size) lies inside [data, end), checked just now, which is what the verifier demands too.
    Some(unsafe { ptr::read_unaligned(at as *const T) })
}

#[inline(always)]
fn store<T: Pod>(data: usize, end: usize, offset: usize, value: T) -> Option<()> {
    let at = data + offset;
    if at + size_of::<T>() > end {
        return None;
    }
    // SAFETY: as in `load`.
    unsafe { ptr::write_unaligned(at as *mut T, value) };
    Some(())
}

/// A packet at an XDP hook.
pub struct XdpPacket(pub *mut xdp_md);

impl XdpPacket {
    #[inline(always)]
    fn bounds(&self) -> (usize, usize) {
        // SAFETY: the context is valid while the program runs. Volatile: two adjacent fields must stay two loads,
        // and they change under helpers that move the packet.
        unsafe {
            (
                ptr::read_volatile(&raw const (*self.0).data) as usize,
                ptr::read_volatile(&raw const (*self.0).data_end) as usize,
            )
        }
    }
}

impl XdpPacket {
    /// The length of the frame in all its buffers.
    #[inline(always)]
    pub fn frame_len(&self) -> u64 {
        if config(|c| &c.flags) & config_flags::XDP_FRAGS == 0 {
            return self.len() as u64;
        }
        // SAFETY: the context is valid while the program runs.
        unsafe { bpf_xdp_get_buff_len(self.0) }
    }
}

impl Packet for XdpPacket {
    #[inline(always)]
    fn len(&self) -> usize {
        let (data, end) = self.bounds();
        end - data
    }

    #[inline(always)]
    fn covers(&self, length: usize) -> bool {
        let (data, end) = self.bounds();
        // Asked only of frames in several buffers.
        data + length <= end || length as u64 <= self.frame_len()
    }

    #[inline(always)]
    fn gso_size(&self) -> u32 {
        0
    }

    #[inline(always)]
    fn load<T: Pod>(&self, offset: usize) -> Option<T> {
        let (data, end) = self.bounds();
        load(data, end, offset)
    }

    #[inline(always)]
    fn store<T: Pod>(&mut self, offset: usize, value: T) -> Option<()> {
        let (data, end) = self.bounds();
        store(data, end, offset, value)
    }

    #[inline(always)]
    fn adjust_l4_checksum(&mut self, offset: usize, pseudo: u32, payload: u32, kind: Checksum) -> Option<()> {
        let old: u16 = self.load(offset)?;
        if kind.zero_is_none && old == 0 {
            return Some(());
        }
        let mut new = checksum::update(old, checksum::add(pseudo, payload));
        if kind.zero_is_none && new == 0 {
            new = 0xffff;
        }
        self.store(offset, new)
    }

    #[inline(always)]
    fn adjust_sum(&mut self, _difference: u32) {}

    #[inline(always)]
    fn resize(&mut self, len: usize) -> Option<()> {
        let now = self.frame_len() as i64;
        // SAFETY: the context is valid while the program runs; the helper checks the length.
        let result = unsafe { bpf_xdp_adjust_tail(self.0, (len as i64 - now) as i32) };
        (result == 0).then_some(())
    }
}

/// A packet at a TC hook.
pub struct SkbPacket(pub *mut __sk_buff);

impl SkbPacket {
    /// Makes the headers readable where the driver left them in fragments.
    #[inline(always)]
    pub fn pull_headers<F: ParseIp>(&mut self, l3: usize) {
        let (data, end) = self.bounds();
        if end - data < self.len() {
            let wanted = F::wanted(self, l3).unwrap_or(l3 + 2 * F::HEADER_LEN + 60);
            if end - data < wanted {
                self.pull(wanted);
            }
        }
    }

    /// Makes the first `wanted` bytes readable, or all if there are less.
    #[inline(always)]
    fn pull(&mut self, wanted: usize) {
        // SAFETY: the context is valid while the program runs. A failure leaves the packet as it is, and the parser
        // says "truncated".
        unsafe { bpf_skb_pull_data(self.0, self.len().min(wanted) as u32) };
    }

    #[inline(always)]
    fn bounds(&self) -> (usize, usize) {
        // SAFETY: as in `XdpPacket::bounds`.
        unsafe {
            (
                ptr::read_volatile(&raw const (*self.0).data) as usize,
                ptr::read_volatile(&raw const (*self.0).data_end) as usize,
            )
        }
    }
}

impl Packet for SkbPacket {
    #[inline(always)]
    fn len(&self) -> usize {
        // SAFETY: the context is valid while the program runs.
        unsafe { (*self.0).len as usize }
    }

    #[inline(always)]
    fn gso_size(&self) -> u32 {
        // SAFETY: the context is valid while the program runs.
        unsafe { (*self.0).gso_size }
    }

    #[inline(always)]
    fn load<T: Pod>(&self, offset: usize) -> Option<T> {
        let (data, end) = self.bounds();
        load(data, end, offset)
    }

    #[inline(always)]
    fn store<T: Pod>(&mut self, offset: usize, value: T) -> Option<()> {
        let (data, end) = self.bounds();
        store(data, end, offset, value)
    }

    #[inline(always)]
    fn adjust_l4_checksum(&mut self, offset: usize, pseudo: u32, payload: u32, kind: Checksum) -> Option<()> {
        // Only the helper knows whether the checksum is partial, complete or none.
        let mangled = if kind.zero_is_none { MARK_MANGLED_0 } else { 0 };
        let ipv6 = if kind.ipv6 && config(|c| &c.flags) & config_flags::CSUM_IPV6 != 0 {
            IPV6
        } else {
            0
        };
        // SAFETY: the context is valid while the program runs; the helper checks the offset.
        let result = unsafe {
            let mut result = 0;
            if pseudo != 0 {
                result = bpf_l4_csum_replace(
                    self.0,
                    offset as u32,
                    0,
                    pseudo.into(),
                    PSEUDO_HEADER | mangled | ipv6,
                );
            }
            if payload != 0 {
                result |= bpf_l4_csum_replace(self.0, offset as u32, 0, payload.into(), mangled);
            }
            result
        };
        (result == 0).then_some(())
    }

    #[inline(always)]
    fn adjust_sum(&mut self, difference: u32) {
        // SAFETY: the context is valid while the program runs. An error says that nothing has been summed up.
        unsafe { bpf_csum_update(self.0, difference) };
    }

    #[inline(always)]
    fn resize(&mut self, len: usize) -> Option<()> {
        // SAFETY: the context is valid while the program runs; the helpers check the length.
        let result = unsafe { bpf_skb_change_tail(self.0, len as u32, 0) };
        if result != 0 {
            return None;
        }
        self.pull(len);
        Some(())
    }
}

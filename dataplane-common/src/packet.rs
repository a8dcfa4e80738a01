//! Access to a packet's bytes: implemented over XDP and TC contexts in the kernel and over a byte vector on the host.

use bytemuck::Pod;

/// Bounded reads and writes. Offsets count from the first byte of the frame; every access that would leave the
/// packet is `None` and changes nothing.
pub trait Packet {
    /// Bytes of the frame.
    fn len(&self) -> usize;

    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the frame has at least `end` bytes.
    #[inline(always)]
    fn covers(&self, end: usize) -> bool {
        end <= self.len()
    }

    /// Bytes of layer 4 payload in each of the segments that are still to be cut of the packet (GSO); 0 for a packet that
    /// goes out as it is.
    fn gso_size(&self) -> u32;

    /// Whether the packet is several segments still to be cut, so its own length says nothing about MTU.
    #[inline(always)]
    fn is_gso(&self) -> bool {
        self.gso_size() != 0
    }

    fn load<T: Pod>(&self, offset: usize) -> Option<T>;

    fn store<T: Pod>(&mut self, offset: usize, value: T) -> Option<()>;

    /// Applies two differences (see [`crate::checksum`]) to the layer 4 checksum at `offset`: `pseudo` of what only
    /// the pseudo header covers (the addresses), `payload` of bytes that the checksum itself covers. A packet whose
    /// checksum is still to be completed by hardware holds the pseudo header's sum alone, and gets only the first.
    fn adjust_l4_checksum(&mut self, offset: usize, pseudo: u32, payload: u32, kind: Checksum) -> Option<()>;

    /// Tells of a change to the packet's sum that no checksum in it makes up for: the device may have summed it up.
    fn adjust_sum(&mut self, difference: u32);

    /// Cuts or extends the frame to `len` bytes, to make an answer out of it.
    fn resize(&mut self, len: usize) -> Option<()>;
}

/// How a layer 4 checksum treats zero and which pseudo header it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checksum {
    /// Zero means "none" and is never the result (UDP, RFC 768).
    pub zero_is_none: bool,
    /// The pseudo header is IPv6's, and there is no IP header checksum that would balance an address change.
    pub ipv6: bool,
}

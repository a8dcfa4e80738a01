//! `DEVICES`, `OWN_ADDRS_V4` and `OWN_ADDRS_V6`: what the datapath knows of this node's network devices.

use bytemuck::{Pod, Zeroable};

use crate::addr::Mac;

/// Bits of [`Device::flags`].
pub mod device_flags {
    /// Frames begin with an Ethernet header.
    pub const ETHERNET: u32 = 1;
    /// Our XDP program runs there in driver mode, so XDP may transmit by it.
    pub const XDP: u32 = 2;
    /// A tunnel (VXLAN, Geneve, IPIP, WireGuard): only its own addresses may be the source of what leaves by it.
    pub const TUNNEL: u32 = 4;
}

/// Value of `DEVICES`, a hash by ifindex: the uplinks and tunnel devices we are attached to; and `lo`, if packets
/// between loopback addresses may be translated.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Device {
    /// [`device_flags`].
    pub flags: u32,
    /// Source of translated packets that leave by this device; the node's own address where the device has none,
    /// 0 where the node has none.
    pub snat4_be: u32,
    pub snat6_be: [u32; 4],
    pub mac: Mac,
    pub unused: [u8; 2],
}

const _: () = assert!(size_of::<Device>() == 32);

/// Bits of the value (u32) of `OWN_ADDRS_V4` and `OWN_ADDRS_V6`, hashes by address in network byte order.
pub mod own_flags {
    /// Node ports answer at this address.
    pub const NODE_PORT: u32 = 1;
    /// Node ports answer at this address, a loopback one, when processes of this host ask.
    pub const HOST_NODE_PORT: u32 = 2;
    /// Every address of this node has it, so that none has no flags.
    pub const OWN: u32 = 4;
}

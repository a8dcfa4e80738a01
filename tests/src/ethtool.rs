//! The two device features that XDP on a veth depends on.

use std::ffi::c_char;
use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

const SET_TX_CHECKSUM: u32 = 0x17; // ETHTOOL_STXCSUM
const SET_GRO: u32 = 0x2c; // ETHTOOL_SGRO
const SIOCETHTOOL: u16 = 0x8946;

#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

/// `struct ifreq` as SIOCETHTOOL uses it.
#[repr(C)]
struct Request {
    name: [c_char; 16],
    value: *mut Value,
    padding: [u8; 16],
}

nix::ioctl_write_ptr_bad!(ethtool, SIOCETHTOOL, Request);

/// Makes the other end of a veth pair fit for XDP: frames that it sends by `XDP_TX` or redirect are only taken here with
/// GRO on, and frames sent to it must carry complete checksums, because a program that rewrites them loses the note that
/// they are partial.
pub fn face_xdp(device: &str) -> Result<()> {
    set(device, SET_GRO, 1).with_context(|| format!("failed to turn GRO on at {device}"))?;
    set(device, SET_TX_CHECKSUM, 0)
        .with_context(|| format!("failed to turn checksum offload off at {device}"))
}

fn set(device: &str, command: u32, data: u32) -> Result<()> {
    ensure!(device.len() < 16, "device name {device} is too long");
    let control: OwnedFd = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let mut value = Value { command, data };
    let mut request = Request {
        name: [0; 16],
        value: &raw mut value,
        padding: [0; 16],
    };
    for (to, from) in request.name.iter_mut().zip(device.bytes()) {
        *to = from.cast_signed();
    }
    // SAFETY: `request` is a complete ifreq with a terminated name, and its pointer leads to a `Value` that outlives the
    // call; both commands read eight bytes there and write none beyond.
    unsafe { ethtool(control.as_raw_fd(), &raw const request) }?;
    Ok(())
}

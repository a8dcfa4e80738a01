//! What the far end of a veth pair needs so that a program on the near end can send frames by `XDP_TX` and redirect.
//!
//! Two things, both tried: an XDP program of its own, without which frames sent by `XDP_TX` stay in a ring that no one reads
//! (GRO serves redirects only); and complete checksums on what it sends, because a frame that a program has rewritten loses
//! the note that its checksum is partial.

use std::ffi::c_char;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

const SET_TX_CHECKSUM: u32 = 0x17; // ETHTOOL_STXCSUM
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

/// One eBPF instruction.
#[repr(C)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// The part of `union bpf_attr` that loading a program needs.
#[repr(C)]
struct ProgramLoad {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
}

const PROG_LOAD: nix::libc::c_int = 5;
const PROG_TYPE_XDP: u32 = 6;
/// `BPF_F_XDP_HAS_FRAGS`: frames may be larger than a page.
const FRAGS: u32 = 1 << 5;

/// Turns transmit checksum offload off at a device of the calling thread's namespace.
pub fn complete_checksums(device: &str) -> Result<()> {
    set(device, SET_TX_CHECKSUM, 0)
        .with_context(|| format!("failed to turn checksum offload off at {device}"))
}

/// What a program says to every packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Pass = 2,
    /// Send it back.
    Transmit = 3,
}

/// Loads a program that gives one answer to every packet, jumbo frames included where the kernel has those at XDP.
pub fn load(answer: Answer) -> Result<OwnedFd> {
    // Programs count against it before 5.11; where it can't be raised, loading says so if it matters.
    setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY).ok();
    match load_with(answer, FRAGS) {
        Err(Errno::EINVAL) => load_with(answer, 0),
        loaded => loaded,
    }
    .context("failed to load an XDP program")
}

fn load_with(answer: Answer, flags: u32) -> nix::Result<OwnedFd> {
    // r0 = answer; exit
    let program = [
        Instruction {
            code: 0xb7,
            registers: 0,
            offset: 0,
            immediate: answer as i32,
        },
        Instruction {
            code: 0x95,
            registers: 0,
            offset: 0,
            immediate: 0,
        },
    ];
    let load = ProgramLoad {
        program_type: PROG_TYPE_XDP,
        instruction_count: 2,
        instructions: program.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buffer: 0,
        kernel_version: 0,
        flags,
    };
    // SAFETY: `load` is the first 48 bytes of a `bpf_attr` as its size says; instructions and license outlive the
    // call, which only reads them.
    let fd = unsafe {
        nix::libc::syscall(
            nix::libc::SYS_bpf,
            PROG_LOAD,
            &raw const load,
            size_of::<ProgramLoad>(),
        )
    };
    let fd = RawFd::try_from(Errno::result(fd)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the call has just returned this descriptor, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
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
    // call; the command reads eight bytes there and writes none.
    unsafe { ethtool(control.as_raw_fd(), &raw const request) }?;
    Ok(())
}

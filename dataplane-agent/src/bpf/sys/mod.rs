//! The system calls that no library offers: bpf(2) for maps, pins, links and queries, mmap of arrays, membarrier,
//! socket options and the allocator. This folder is the one place of the agent with `unsafe` code; everything it exports is safe.

mod attr;
mod maps;
mod objects;
mod process;
mod raw_map;
mod ring;

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use bytemuck::Pod;

pub use attr::{LinkInfo, MapInfo, ProgInfo, map_type};
pub use maps::{MapFd, MappedArray, PerCpuFd, count_entries};
pub use objects::{
    btf_by_id, link_create, link_detach, link_info, link_update, map_by_id, map_in_map_update, map_info,
    map_of_bytes, open_pin, pin, prog_by_id, prog_info, prog_map_ids, prog_query, try_map,
};
pub use process::{
    coarse_resolution, filesystem_magic, forget_read, give_memory_back, grace_period, keep_heap_small,
    legacy_filter_rules, monotonic, netns_cookie, page_size, raise_memlock_limit, since_ticks, ticks,
    watch_readable,
};
pub use raw_map::RawMap;
pub use ring::RingView;

/// Commands of bpf(2), `enum bpf_cmd` in `linux/bpf.h`.
#[repr(i64)]
#[derive(Clone, Copy, Debug)]
enum Command {
    MapCreate = 0,
    MapLookup = 1,
    MapUpdate = 2,
    MapDelete = 3,
    MapNextKey = 4,
    ObjPin = 6,
    ObjGet = 7,
    ProgGetFdById = 13,
    MapGetFdById = 14,
    ObjGetInfo = 15,
    ProgQuery = 16,
    BtfGetFdById = 19,
    MapLookupBatch = 24,
    LinkCreate = 28,
    LinkUpdate = 29,
    LinkDetach = 34,
}

/// Size of the attribute block handed to the kernel: larger than any field used here, and zero beyond them, which
/// every kernel accepts.
const ATTR_LEN: usize = 64;

/// Runs one command whose attribute block holds neither a kernel-written address nor a dangling one.
///
/// # Safety
/// Every address in `attr` must be valid for what the command reads or writes there during the call.
unsafe fn bpf<T: Pod>(command: Command, attr: &mut T) -> io::Result<u32> {
    let mut block = [0u64; ATTR_LEN / 8];
    let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut block);
    let len = size_of::<T>();
    bytes[..len].copy_from_slice(bytemuck::bytes_of(attr));
    loop {
        // SAFETY: `block` lives across the call and is ATTR_LEN bytes long; the addresses in it are the caller's duty.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                command as libc::c_long,
                block.as_mut_ptr(),
                ATTR_LEN,
            )
        };
        if result >= 0 {
            attr_back(attr, bytemuck::cast_slice(&block));
            return Ok(result.cast_unsigned() as u32);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() == Some(libc::EAGAIN) || error.kind() == io::ErrorKind::Interrupted {
            continue;
        }
        // Batch commands say in `count` how far they came, also when they fail.
        attr_back(attr, bytemuck::cast_slice(&block));
        return Err(error);
    }
}

fn attr_back<T: Pod>(attr: &mut T, bytes: &[u8]) {
    let len = size_of::<T>();
    bytemuck::bytes_of_mut(attr).copy_from_slice(&bytes[..len]);
}

/// Runs a command whose answer is a new descriptor.
///
/// # Safety
/// As [`bpf`]; the command must be one that returns a descriptor.
unsafe fn bpf_fd<T: Pod>(command: Command, attr: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: passed on to the caller.
    let fd = unsafe { bpf(command, attr) }?;
    // SAFETY: the kernel has just made this descriptor for us, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd.cast_signed()) })
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

fn address<T>(value: &T) -> u64 {
    std::ptr::from_ref(value) as u64
}

fn address_mut<T>(value: &mut T) -> u64 {
    std::ptr::from_mut(value) as u64
}

fn path_string(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

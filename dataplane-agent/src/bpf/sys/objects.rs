//! Maps, programs and links as objects: what they are, their pins, and where they are attached.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use bytemuck::{Pod, Zeroable};

use super::{
    Command, address, address_mut,
    attr::{
        BtfInfo, ElementAttr, IdAttr, InfoAttr, LinkCreateAttr, LinkInfo, LinkUpdateAttr, MapCreateAttr,
        MapInfo, ObjAttr, ProgInfo, QueryAttr, map_type,
    },
    bpf, bpf_fd, path_string, raw,
};

fn object_info<T: Pod>(fd: BorrowedFd<'_>) -> io::Result<T> {
    let mut info = T::zeroed();
    let mut attr = InfoAttr {
        fd: raw(fd),
        len: size_of::<T>() as u32,
        info: address_mut(&mut info),
    };
    // SAFETY: `info` lives across the call and `len` is its size; it is zero, so the kernel follows no address in it.
    unsafe { bpf(Command::ObjGetInfo, &mut attr) }?;
    Ok(info)
}

/// Makes the smallest of maps, and drops it.
pub fn try_map() -> io::Result<()> {
    small_array().map(drop)
}

/// Updates an array of maps, which the kernel ends with a `synchronize_rcu` (4.20).
pub fn map_in_map_update() -> io::Result<()> {
    const ARRAY_OF_MAPS: u32 = 12;
    let inner = small_array()?;
    let outer = create_map(&MapCreateAttr {
        map_type: ARRAY_OF_MAPS,
        value_size: 4,
        inner_map_fd: raw(inner.as_fd()),
        ..SMALL_ARRAY
    })?;
    let (key, value) = (0_u32, raw(inner.as_fd()));
    let mut attr = ElementAttr {
        map_fd: raw(outer.as_fd()),
        pad: 0,
        key: address(&key),
        value: address(&value),
        flags: 0,
    };
    // SAFETY: `key` and `value` live across the call and have the sizes that the map was made with, 4 bytes each.
    unsafe { bpf(Command::MapUpdate, &mut attr) }.map(drop)
}

const SMALL_ARRAY: MapCreateAttr = MapCreateAttr {
    map_type: map_type::ARRAY,
    key_size: 4,
    value_size: 8,
    max_entries: 1,
    map_flags: 0,
    inner_map_fd: 0,
};

fn small_array() -> io::Result<OwnedFd> {
    create_map(&SMALL_ARRAY)
}

fn create_map(attr: &MapCreateAttr) -> io::Result<OwnedFd> {
    // SAFETY: no addresses; the command returns a descriptor.
    unsafe { bpf_fd(Command::MapCreate, &mut attr.clone()) }
}

/// A map that holds these bytes: an array of one element.
pub fn map_of_bytes(bytes: &[u8]) -> io::Result<OwnedFd> {
    let value_size = u32::try_from(bytes.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let map = create_map(&MapCreateAttr {
        value_size,
        ..SMALL_ARRAY
    })?;
    let key = 0_u32;
    let mut attr = ElementAttr {
        map_fd: raw(map.as_fd()),
        pad: 0,
        key: address(&key),
        value: bytes.as_ptr() as u64,
        flags: 0,
    };
    // SAFETY: `key` and `bytes` live across the call and have the sizes that the map was made with.
    unsafe { bpf(Command::MapUpdate, &mut attr) }?;
    Ok(map)
}

/// The BTF that the kernel keeps under an id. Needs `CAP_SYS_ADMIN`.
pub fn btf_by_id(id: u32) -> io::Result<Vec<u8>> {
    let fd = by_id(Command::BtfGetFdById, id)?;
    let size = object_info::<BtfInfo>(fd.as_fd())?.btf_size;
    let mut bytes = vec![0; size as usize];
    let mut info = BtfInfo {
        btf: bytes.as_mut_ptr() as u64,
        btf_size: size,
        id: 0,
    };
    let mut attr = InfoAttr {
        fd: raw(fd.as_fd()),
        len: size_of::<BtfInfo>() as u32,
        info: address_mut(&mut info),
    };
    // SAFETY: `info` lives across the call and `len` is its size; `bytes` holds as many as it says, and lives as long.
    unsafe { bpf(Command::ObjGetInfo, &mut attr) }?;
    Ok(bytes)
}

pub fn map_info(fd: BorrowedFd<'_>) -> io::Result<MapInfo> {
    object_info(fd)
}

pub fn prog_info(fd: BorrowedFd<'_>) -> io::Result<ProgInfo> {
    object_info(fd)
}

/// The ids of the maps that a program uses.
pub fn prog_map_ids(fd: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    let count = prog_info(fd)?.nr_map_ids;
    let mut ids = vec![0u32; count as usize];
    let mut info = ProgInfo::for_map_ids(count, ids.as_mut_ptr() as u64);
    let mut attr = InfoAttr {
        fd: raw(fd),
        len: size_of::<ProgInfo>() as u32,
        info: address_mut(&mut info),
    };
    // SAFETY: `info` lives across the call and `len` is its size; `ids` has room for as many as it says, and lives as long. No
    // other address in it is anything but zero.
    unsafe { bpf(Command::ObjGetInfo, &mut attr) }?;
    Ok(ids)
}

pub fn link_info(fd: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    object_info(fd)
}

/// Needs `CAP_SYS_ADMIN`.
pub fn prog_by_id(id: u32) -> io::Result<OwnedFd> {
    by_id(Command::ProgGetFdById, id)
}

/// Needs `CAP_SYS_ADMIN`.
pub fn map_by_id(id: u32) -> io::Result<OwnedFd> {
    by_id(Command::MapGetFdById, id)
}

fn by_id(command: Command, id: u32) -> io::Result<OwnedFd> {
    let mut attr = IdAttr {
        id,
        next_id: 0,
        open_flags: 0,
    };
    // SAFETY: no addresses; these commands return a descriptor.
    unsafe { bpf_fd(command, &mut attr) }
}

pub fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = path_string(path)?;
    let mut attr = ObjAttr {
        path: path.as_ptr() as u64,
        fd: raw(fd),
        flags: 0,
    };
    // SAFETY: `path` is a terminated string that lives across the call.
    unsafe { bpf(Command::ObjPin, &mut attr) }.map(drop)
}

pub fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = path_string(path)?;
    let mut attr = ObjAttr {
        path: path.as_ptr() as u64,
        fd: 0,
        flags: 0,
    };
    // SAFETY: `path` is a terminated string that lives across the call; the command returns a descriptor.
    unsafe { bpf_fd(Command::ObjGet, &mut attr) }
}

/// Attaches `prog` to a device (`target` is its ifindex) or a cgroup (`target` is its descriptor).
pub fn link_create(prog: BorrowedFd<'_>, target: u32, attach_type: u32, flags: u32) -> io::Result<OwnedFd> {
    let mut attr = LinkCreateAttr {
        prog_fd: raw(prog),
        target,
        attach_type,
        flags,
        ..LinkCreateAttr::zeroed()
    };
    // SAFETY: no addresses; the command returns a descriptor.
    unsafe { bpf_fd(Command::LinkCreate, &mut attr) }
}

/// Replaces the link's program in place.
pub fn link_update(link: BorrowedFd<'_>, prog: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkUpdateAttr {
        link_fd: raw(link),
        new_prog_fd: raw(prog),
        flags: 0,
        old_prog_fd: 0,
    };
    // SAFETY: no addresses.
    unsafe { bpf(Command::LinkUpdate, &mut attr) }.map(drop)
}

/// Takes the link's program off its hook at once; the link lives on without a target.
pub fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: no addresses.
    unsafe { bpf(Command::LinkDetach, &mut raw(link)) }.map(drop)
}

/// The ids of the programs at a hook, in the order in which they run.
pub fn prog_query(target: u32, attach_type: u32) -> io::Result<Vec<u32>> {
    let mut ids = vec![0u32; 64];
    loop {
        let mut attr = QueryAttr {
            target,
            attach_type,
            prog_ids: ids.as_mut_ptr() as u64,
            count: ids.len() as u32,
            ..QueryAttr::zeroed()
        };
        // SAFETY: `ids` holds `count` elements and lives across the call.
        match unsafe { bpf(Command::ProgQuery, &mut attr) } {
            Ok(_) => {
                ids.truncate(attr.count as usize);
                return Ok(ids);
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => ids.resize(ids.len() * 4, 0),
            Err(error) => return Err(error),
        }
    }
}

//! The system calls that no library offers: bpf(2) for maps, pins, links and queries, mmap of arrays, membarrier
//! and socket options. This is the one place of the agent with `unsafe` code; everything it exports is safe.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    ptr::NonNull,
    sync::atomic::AtomicU64,
};

use bytemuck::{Pod, Zeroable};
use tokio::io::{Interest, unix::AsyncFd};

/// Commands of bpf(2), `enum bpf_cmd` in `linux/bpf.h`.
#[repr(i64)]
#[derive(Clone, Copy, Debug)]
enum Command {
    MapLookup = 1,
    MapUpdate = 2,
    MapDelete = 3,
    ObjPin = 6,
    ObjGet = 7,
    ProgDetach = 9,
    ProgGetFdById = 13,
    ObjGetInfo = 15,
    ProgQuery = 16,
    MapLookupBatch = 24,
    LinkCreate = 28,
    LinkUpdate = 29,
}

/// Size of the attribute block handed to the kernel: larger than any field used here, and zero beyond them, which
/// every kernel accepts.
const ATTR_LEN: usize = 64;

/// Attribute of a command on one map element.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ElementAttr {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ObjAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct InfoAttr {
    fd: u32,
    len: u32,
    info: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct IdAttr {
    id: u32,
    next_id: u32,
    open_flags: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct LinkCreateAttr {
    prog_fd: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    relative_fd: u32,
    pad: u32,
    expected_revision: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct LinkUpdateAttr {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct AttachAttr {
    target: u32,
    prog_fd: u32,
    attach_type: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct QueryAttr {
    target: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    count: u32,
    pad: u32,
    prog_attach_flags: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
}

/// What the kernel says of a map (the first fields of `struct bpf_map_info`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct MapInfo {
    pub map_type: u32,
    pub id: u32,
    pub key_size: u32,
    pub value_size: u32,
    pub max_entries: u32,
    pub map_flags: u32,
    name: [u8; 16],
}

/// What the kernel says of a program (the first fields of `struct bpf_prog_info`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct ProgInfo {
    pub prog_type: u32,
    pub id: u32,
    pub tag: [u8; 8],
    jited_prog_len: u32,
    xlated_prog_len: u32,
    jited_prog_insns: u64,
    xlated_prog_insns: u64,
    load_time: u64,
    created_by_uid: u32,
    nr_map_ids: u32,
    map_ids: u64,
    name: [u8; 16],
}

impl ProgInfo {
    pub fn name(&self) -> String {
        let end = self
            .name
            .iter()
            .position(|&byte| byte == 0)
            .unwrap_or(self.name.len());
        String::from_utf8_lossy(&self.name[..end]).into_owned()
    }
}

/// What the kernel says of a link (`struct bpf_link_info`): type, ids, then two words that depend on the type.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct LinkInfo {
    pub link_type: u32,
    pub id: u32,
    pub prog_id: u32,
    pad: u32,
    /// XDP and TCX: ifindex, 0 once the device is gone.
    pub word0: u32,
    /// TCX: attach type.
    pub word1: u32,
    word2: u32,
    word3: u32,
}

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

/// A map whose key and value sizes have been compared with `K` and `V`, so that the kernel reads and writes no more
/// than they hold.
#[derive(Debug)]
pub struct MapFd<K, V> {
    fd: OwnedFd,
    info: MapInfo,
    types: std::marker::PhantomData<(K, V)>,
}

/// Bytes of a batch cursor: at least as many as any key has.
const CURSOR_LEN: usize = 64;

/// `CONFIG_NR_CPUS` is at most this.
const MAX_CPUS: usize = 8192;

/// Types of maps whose value is one element for each possible CPU.
const PER_CPU_TYPES: [u32; 3] = [5, 6, 10];

impl<K: Pod, V: Pod> MapFd<K, V> {
    /// Fails with `InvalidData` when the map's sizes are not those of `K` and `V`, or the map is per CPU.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let info = map_info(fd.as_fd())?;
        if info.key_size as usize != size_of::<K>()
            || info.value_size as usize != size_of::<V>()
            || PER_CPU_TYPES.contains(&info.map_type)
            || size_of::<K>() > CURSOR_LEN
        {
            return Err(io::Error::from(io::ErrorKind::InvalidData));
        }
        Ok(Self {
            fd,
            info,
            types: std::marker::PhantomData,
        })
    }

    pub fn info(&self) -> &MapInfo {
        &self.info
    }

    pub fn lookup(&self, key: &K) -> io::Result<Option<V>> {
        let mut value = V::zeroed();
        let mut attr = self.element(key, address_mut(&mut value));
        // SAFETY: `key` and `value` live across the call and have the map's key and value sizes (`new`).
        match unsafe { bpf(Command::MapLookup, &mut attr) } {
            Ok(_) => Ok(Some(value)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub fn update(&self, key: &K, value: &V) -> io::Result<()> {
        let mut attr = self.element(key, address(value));
        // SAFETY: `key` and `value` live across the call and have the map's key and value sizes (`new`).
        unsafe { bpf(Command::MapUpdate, &mut attr) }.map(drop)
    }

    /// Deleting what is missing succeeds.
    pub fn delete(&self, key: &K) -> io::Result<()> {
        let mut attr = self.element(key, 0);
        // SAFETY: `key` lives across the call and has the map's key size (`new`).
        match unsafe { bpf(Command::MapDelete, &mut attr) } {
            Err(error) if error.raw_os_error() != Some(libc::ENOENT) => Err(error),
            _ => Ok(()),
        }
    }

    fn element(&self, key: &K, value: u64) -> ElementAttr {
        ElementAttr {
            map_fd: raw(self.fd.as_fd()),
            pad: 0,
            key: address(key),
            value,
            flags: 0,
        }
    }

    /// Calls `each` with every entry of a hash or array, in batches; entries that change meanwhile may be missed.
    pub fn for_each(&self, mut each: impl FnMut(&K, &V)) -> io::Result<()> {
        batches(self.fd.as_fd(), &self.info, |keys, values| {
            let keys = keys.chunks_exact(size_of::<K>());
            for (key, value) in keys.zip(values.chunks_exact(size_of::<V>())) {
                each(
                    &bytemuck::pod_read_unaligned(key),
                    &bytemuck::pod_read_unaligned(value),
                );
            }
        })
    }
}

/// How many entries a hash holds.
pub fn count_entries(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let info = map_info(fd)?;
    if PER_CPU_TYPES.contains(&info.map_type) || info.key_size as usize > CURSOR_LEN {
        return Err(io::Error::from(io::ErrorKind::InvalidData));
    }
    let mut count = 0;
    batches(fd, &info, |keys, _| count += keys.len() / info.key_size as usize)?;
    Ok(count)
}

/// Calls `each` with the keys and the values of each batch. `info` must be the map's own, its values not per CPU, its
/// keys no longer than [`CURSOR_LEN`].
fn batches(fd: BorrowedFd<'_>, info: &MapInfo, mut each: impl FnMut(&[u8], &[u8])) -> io::Result<()> {
    let (key_size, value_size) = (info.key_size as usize, info.value_size as usize);
    let mut capacity = 4096.min(info.max_entries.max(1)) as usize;
    let mut keys = vec![0; capacity * key_size];
    let mut values = vec![0; capacity * value_size];
    // Hash maps keep a 32-bit bucket there, arrays a key.
    let mut cursors = [[0u64; CURSOR_LEN / 8]; 2];
    let mut started = false;
    loop {
        let [from, to] = &mut cursors;
        let mut attr = BatchAttr {
            in_batch: if started { address(from) } else { 0 },
            out_batch: address_mut(to),
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: capacity as u32,
            map_fd: raw(fd),
            ..BatchAttr::zeroed()
        };
        // SAFETY: `keys` and `values` hold `count` elements of the sizes in `info`, which are the map's, and each
        // cursor is no smaller than a key; all live across the call.
        let result = unsafe { bpf(Command::MapLookupBatch, &mut attr) };
        let end = match result {
            Ok(_) => false,
            Err(error) => match error.raw_os_error() {
                Some(libc::ENOENT) => true,
                // One bucket holds more than fits: the cursor has not moved.
                Some(libc::ENOSPC) => {
                    capacity *= 2;
                    keys.resize(capacity * key_size, 0);
                    values.resize(capacity * value_size, 0);
                    continue;
                }
                _ => return Err(error),
            },
        };
        let count = (attr.count as usize).min(capacity);
        each(&keys[..count * key_size], &values[..count * value_size]);
        if end {
            return Ok(());
        }
        started = true;
        cursors.swap(0, 1);
    }
}

/// The 64-bit values of one element of a per-CPU array, one for each of `cpus` possible CPUs.
pub fn lookup_per_cpu(fd: BorrowedFd<'_>, index: u32, cpus: usize) -> io::Result<Vec<u64>> {
    let info = map_info(fd)?;
    if !PER_CPU_TYPES.contains(&info.map_type) || info.key_size != 4 || info.value_size != 8 {
        return Err(io::Error::from(io::ErrorKind::InvalidData));
    }
    // More than any kernel has CPUs, whatever the caller believes.
    let mut values = vec![0u64; cpus.max(MAX_CPUS)];
    let mut attr = ElementAttr {
        map_fd: raw(fd),
        pad: 0,
        key: address(&index),
        value: values.as_mut_ptr() as u64,
        flags: 0,
    };
    // SAFETY: the key is 4 bytes, `values` holds 8 bytes for each possible CPU; both live across the call.
    unsafe { bpf(Command::MapLookup, &mut attr) }?;
    values.truncate(cpus);
    Ok(values)
}

/// The memory of an array map with `BPF_F_MMAPABLE`, as 64-bit words.
#[derive(Debug)]
pub struct MappedArray {
    start: NonNull<AtomicU64>,
    words: usize,
    bytes: usize,
}

// SAFETY: the mapping is shared memory that is only ever accessed through atomics.
unsafe impl Send for MappedArray {}
// SAFETY: as above.
unsafe impl Sync for MappedArray {}

impl MappedArray {
    pub fn new(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let info = map_info(fd)?;
        let element = (info.value_size as usize).next_multiple_of(8);
        let words = element / 8 * info.max_entries as usize;
        // SAFETY: sysconf has no preconditions.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) }.cast_unsigned() as usize;
        let bytes = (words * 8).next_multiple_of(page);
        // SAFETY: a fresh shared mapping at an address of the kernel's choice; the result is checked.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
        Ok(Self { start, words, bytes })
    }

    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is at least `words * 8` bytes long, page aligned, lives as long as `self`, and is never
        // accessed but atomically.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }
}

impl Drop for MappedArray {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this length, and no reference to it outlives `self`.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

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

pub fn map_info(fd: BorrowedFd<'_>) -> io::Result<MapInfo> {
    object_info(fd)
}

pub fn prog_info(fd: BorrowedFd<'_>) -> io::Result<ProgInfo> {
    object_info(fd)
}

pub fn link_info(fd: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    object_info(fd)
}

/// Needs `CAP_SYS_ADMIN`.
pub fn prog_by_id(id: u32) -> io::Result<OwnedFd> {
    // SAFETY: no addresses; the command returns a descriptor.
    unsafe {
        bpf_fd(
            Command::ProgGetFdById,
            &mut IdAttr {
                id,
                next_id: 0,
                open_flags: 0,
            },
        )
    }
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

/// Detaches a program that was attached to a cgroup without a link.
pub fn prog_detach(prog: BorrowedFd<'_>, target: u32, attach_type: u32) -> io::Result<()> {
    let mut attr = AttachAttr {
        target,
        prog_fd: raw(prog),
        attach_type,
        flags: 0,
    };
    // SAFETY: no addresses.
    unsafe { bpf(Command::ProgDetach, &mut attr) }.map(drop)
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

/// `MEMBARRIER_CMD_GLOBAL`: returns when every CPU has passed through a quiescent state (a `synchronize_rcu`).
pub fn membarrier_global() -> io::Result<()> {
    // SAFETY: no addresses.
    match unsafe { libc::syscall(libc::SYS_membarrier, 1, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Kernels before 5.11 charge maps to this limit.
pub fn raise_memlock_limit() {
    let limit = libc::rlimit {
        rlim_cur: libc::RLIM_INFINITY,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: `limit` lives across the call. Failure shows when a map cannot be made.
    unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) };
}

/// `SO_NETNS_COOKIE` (5.14): the cookie of the network namespace that the socket belongs to.
pub fn netns_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let mut cookie = 0u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: `cookie` and `len` live across the call, and `len` is the size of `cookie`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    if result == 0 {
        Ok(cookie)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The `f_type` of the filesystem that holds `path`.
pub fn filesystem_magic(path: &Path) -> io::Result<u32> {
    let path = path_string(path)?;
    let mut stat = std::mem::MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: `path` is a terminated string and `stat` is large enough; both live across the call.
    if unsafe { libc::statfs(path.as_ptr(), stat.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `statfs` is plain integers, for which zeroes are valid, and the kernel has filled it in.
    Ok(unsafe { stat.assume_init() }.f_type.cast_unsigned() as u32)
}

/// Waits for a descriptor inside a tokio runtime.
pub fn watch_readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the `AsyncFd` owns the descriptor, so it stays open and the same for as long as it is registered.
    unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map_err(io::Error::from)
}

//! Elements of maps: by system call, in batches, and through a mapping.

use std::{
    cell::RefCell,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::AtomicU64,
};

use bytemuck::{Pod, Zeroable};

use super::{
    Command, address, address_mut,
    attr::{BatchAttr, ElementAttr, MapInfo, map_type},
    bpf, map_info, page_size, raw,
};

/// A map whose key and value sizes have been compared with `K` and `V`, so that the kernel reads and writes no more
/// than they hold.
#[derive(Debug)]
pub struct MapFd<K, V> {
    fd: OwnedFd,
    info: MapInfo,
    types: std::marker::PhantomData<(K, V)>,
}

/// Bytes of a batch cursor: at least as many as any key has.
pub(super) const CURSOR_LEN: usize = 64;

/// `CONFIG_NR_CPUS` is at most this.
pub(super) const MAX_CPUS: usize = 8192;

/// Types of maps whose value is one element for each possible CPU.
pub(super) const PER_CPU_TYPES: [u32; 3] = [
    map_type::PER_CPU_HASH,
    map_type::PER_CPU_ARRAY,
    map_type::LRU_PER_CPU_HASH,
];

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

    /// Enters what is not there yet. False: it is.
    pub fn insert(&self, key: &K, value: &V) -> io::Result<bool> {
        const BPF_NOEXIST: u64 = 1;
        let mut attr = self.element(key, address(value));
        attr.flags = BPF_NOEXIST;
        // SAFETY: `key` and `value` live across the call and have the map's key and value sizes (`new`).
        match unsafe { bpf(Command::MapUpdate, &mut attr) } {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
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

    /// Every entry, one by one.
    fn walk(&self, mut each: impl FnMut(&K, &V)) -> io::Result<()> {
        let mut key: Option<K> = None;
        loop {
            let mut next = K::zeroed();
            let from = key.as_ref().map(address);
            if !next_key(self.fd.as_fd(), from, address_mut(&mut next))? {
                return Ok(());
            }
            if let Some(value) = self.lookup(&next)? {
                each(&next, &value);
            }
            key = Some(next);
        }
    }

    /// Calls `each` with every entry of a hash or array, in batches; entries that change meanwhile may be missed.
    pub fn for_each(&self, mut each: impl FnMut(&K, &V)) -> io::Result<()> {
        if self.info.map_type == map_type::LPM_TRIE {
            return self.walk(each);
        }
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

/// How many entries a hash or trie holds.
pub fn count_entries(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let info = map_info(fd)?;
    if PER_CPU_TYPES.contains(&info.map_type) || info.key_size as usize > CURSOR_LEN {
        return Err(io::Error::from(io::ErrorKind::InvalidData));
    }
    let mut count = 0;
    if info.map_type == map_type::LPM_TRIE {
        let mut keys = [[0u64; CURSOR_LEN / 8]; 2];
        let [key, next] = &mut keys;
        while next_key(fd, (count > 0).then(|| address(key)), address_mut(next))? {
            count += 1;
            key.copy_from_slice(next);
        }
        return Ok(count);
    }
    batches(fd, &info, |keys, _| count += keys.len() / info.key_size as usize)?;
    Ok(count)
}

/// Writes the key behind `from`, or the first one; false: there is none. `from` and `to` are the addresses of keys of
/// the map's size, or more.
pub(super) fn next_key(fd: BorrowedFd<'_>, from: Option<u64>, to: u64) -> io::Result<bool> {
    let mut attr = ElementAttr {
        map_fd: raw(fd),
        pad: 0,
        key: from.unwrap_or(0),
        value: to,
        flags: 0,
    };
    // SAFETY: the callers' keys live across the call and are no smaller than the map's.
    match unsafe { bpf(Command::MapNextKey, &mut attr) } {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Calls `each` with the keys and the values of each batch. `info` must be the map's own, its values not per CPU, its
/// keys no longer than [`CURSOR_LEN`].
pub(super) fn batches(
    fd: BorrowedFd<'_>,
    info: &MapInfo,
    mut each: impl FnMut(&[u8], &[u8]),
) -> io::Result<()> {
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

/// A per-CPU array whose value size has been compared with `V`.
#[derive(Debug)]
pub struct PerCpuFd<V> {
    fd: OwnedFd,
    cpus: usize,
    /// Room for the values of more CPUs than any kernel has.
    values: RefCell<Vec<V>>,
}

impl<V: Pod> PerCpuFd<V> {
    /// `cpus`: how many are possible. Fails with `InvalidData` when the map is no array of 8-byte words for each CPU, or of
    /// other sizes.
    pub fn new(fd: OwnedFd, cpus: usize) -> io::Result<Self> {
        let info = map_info(fd.as_fd())?;
        if info.map_type != map_type::PER_CPU_ARRAY
            || info.key_size != 4
            || info.value_size as usize != size_of::<V>()
            || !size_of::<V>().is_multiple_of(8)
        {
            return Err(io::Error::from(io::ErrorKind::InvalidData));
        }
        Ok(Self {
            fd,
            cpus,
            values: RefCell::new(vec![V::zeroed(); cpus.max(MAX_CPUS)]),
        })
    }

    /// The values of an element, one for each possible CPU.
    pub fn lookup(&self, index: u32) -> io::Result<Vec<V>> {
        let mut values = self.values.borrow_mut();
        let mut attr = self.element(address(&index), values.as_mut_ptr() as u64);
        // SAFETY: the key is 4 bytes, `values` holds a value for each possible CPU, whose size is a multiple of 8 and the map's
        // (`new`); both live across the call.
        unsafe { bpf(Command::MapLookup, &mut attr) }?;
        Ok(values[..self.cpus].to_vec())
    }

    /// Sets an element to zero on every CPU.
    pub fn clear(&self, index: u32) -> io::Result<()> {
        let mut values = self.values.borrow_mut();
        values.fill(V::zeroed());
        let mut attr = self.element(address(&index), values.as_ptr() as u64);
        // SAFETY: as in `lookup`.
        unsafe { bpf(Command::MapUpdate, &mut attr) }.map(drop)
    }

    fn element(&self, key: u64, value: u64) -> ElementAttr {
        ElementAttr {
            map_fd: raw(self.fd.as_fd()),
            pad: 0,
            key,
            value,
            flags: 0,
        }
    }
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
        let bytes = (words * 8).next_multiple_of(page_size());
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

//! Maps of any layout: entries are bytes.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use super::{
    Command,
    attr::{ElementAttr, MapInfo, map_type},
    bpf, map_info,
    maps::{CURSOR_LEN, MAX_CPUS, PER_CPU_TYPES, batches, next_key},
    raw,
};

/// Types of maps that have entries: hashes and arrays, of each kind, and tries.
const WITH_ENTRIES: [u32; 7] = [
    map_type::HASH,
    map_type::ARRAY,
    map_type::PER_CPU_HASH,
    map_type::PER_CPU_ARRAY,
    map_type::LRU_HASH,
    map_type::LRU_PER_CPU_HASH,
    map_type::LPM_TRIE,
];

/// A map whose entries are read and written as bytes.
#[derive(Debug)]
pub struct RawMap {
    fd: OwnedFd,
    info: MapInfo,
    /// Bytes of a value in user space, for each CPU.
    stride: usize,
    /// How many values an element has.
    values: usize,
}

impl RawMap {
    /// `cpus`: how many are possible. Fails with `InvalidData` when the map has no entries that can be read, or keys that
    /// are too long.
    pub fn new(fd: OwnedFd, cpus: usize) -> io::Result<Self> {
        let info = map_info(fd.as_fd())?;
        if !WITH_ENTRIES.contains(&info.map_type) || info.key_size as usize > CURSOR_LEN || cpus > MAX_CPUS {
            return Err(io::Error::from(io::ErrorKind::InvalidData));
        }
        let is_per_cpu = PER_CPU_TYPES.contains(&info.map_type);
        let size = info.value_size as usize;
        Ok(Self {
            fd,
            info,
            stride: if is_per_cpu {
                size.next_multiple_of(8)
            } else {
                size
            },
            values: if is_per_cpu { cpus } else { 1 },
        })
    }

    pub fn info(&self) -> &MapInfo {
        &self.info
    }

    /// How many values an element has, and the bytes from one to the next.
    pub fn values(&self) -> (usize, usize) {
        (self.values, self.stride)
    }

    /// Calls `each` with every key and its values; entries that change meanwhile may be missed.
    pub fn for_each(&self, mut each: impl FnMut(&[u8], &[u8])) -> io::Result<()> {
        let (key_size, value_size) = (self.info.key_size as usize, self.info.value_size as usize);
        if !self.is_per_cpu() && self.info.map_type != map_type::LPM_TRIE {
            return batches(self.fd.as_fd(), &self.info, |keys, values| {
                let keys = keys.chunks_exact(key_size);
                for (key, value) in keys.zip(values.chunks_exact(value_size)) {
                    each(key, value);
                }
            });
        }
        let mut values = vec![0; self.room()];
        let mut key: Option<[u64; CURSOR_LEN / 8]> = None;
        loop {
            let mut next = [0; CURSOR_LEN / 8];
            let from = key.as_ref().map(super::address);
            if !next_key(self.fd.as_fd(), from, super::address_mut(&mut next))? {
                return Ok(());
            }
            let bytes = &bytemuck::bytes_of(&next)[..key_size];
            let mut attr = self.element(bytes, values.as_mut_ptr() as u64, 0);
            // SAFETY: the key is no shorter than the map's, and `values` has room for those of every CPU; both live across
            // the call.
            match unsafe { bpf(Command::MapLookup, &mut attr) } {
                Ok(_) => each(bytes, &values[..self.stride * self.values]),
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                Err(error) => return Err(error),
            }
            key = Some(next);
        }
    }

    /// The values of the first element.
    pub fn first(&self) -> io::Result<Option<Vec<u8>>> {
        let mut first = None;
        self.for_each(|_, values| {
            first.get_or_insert_with(|| values.to_vec());
        })?;
        Ok(first)
    }

    /// Writes the values of an element; `only_new`: unless it is there. False: it is. Fails with `InvalidInput` when the
    /// sizes are others.
    pub fn put(&self, key: &[u8], values: &[u8], only_new: bool) -> io::Result<bool> {
        const BPF_NOEXIST: u64 = 1;
        self.check_key(key)?;
        if values.len() != self.stride * self.values {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let mut room = Vec::new();
        let values = if self.room() > values.len() {
            room.extend_from_slice(values);
            room.resize(self.room(), 0);
            &room[..]
        } else {
            values
        };
        let flags = if only_new { BPF_NOEXIST } else { 0 };
        let mut attr = self.element(key, values.as_ptr() as u64, flags);
        // SAFETY: `key` has the map's key size, `values` has values for every CPU; both live across the call.
        match unsafe { bpf(Command::MapUpdate, &mut attr) } {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Deleting what is missing succeeds.
    pub fn delete(&self, key: &[u8]) -> io::Result<()> {
        self.check_key(key)?;
        let mut attr = self.element(key, 0, 0);
        // SAFETY: `key` has the map's key size and lives across the call.
        match unsafe { bpf(Command::MapDelete, &mut attr) } {
            Err(error) if error.raw_os_error() != Some(libc::ENOENT) => Err(error),
            _ => Ok(()),
        }
    }

    fn is_per_cpu(&self) -> bool {
        PER_CPU_TYPES.contains(&self.info.map_type)
    }

    fn check_key(&self, key: &[u8]) -> io::Result<()> {
        if key.len() == self.info.key_size as usize {
            Ok(())
        } else {
            Err(io::Error::from(io::ErrorKind::InvalidInput))
        }
    }

    /// Bytes that the kernel may write: values for more CPUs than any kernel has.
    fn room(&self) -> usize {
        if self.is_per_cpu() {
            self.stride * MAX_CPUS
        } else {
            self.stride
        }
    }

    fn element(&self, key: &[u8], value: u64, flags: u64) -> ElementAttr {
        ElementAttr {
            map_fd: raw(self.fd.as_fd()),
            pad: 0,
            key: key.as_ptr() as u64,
            value,
            flags,
        }
    }
}

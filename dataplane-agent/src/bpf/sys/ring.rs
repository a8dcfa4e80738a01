//! A ring buffer that is looked at: nothing is taken out of it, so who takes finds all of it still there.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering, fence},
};

use super::{
    attr::{MapInfo, map_type},
    map_info, page_size,
};

/// Bits of the word in front of a record, `BPF_RINGBUF_BUSY_BIT` and `BPF_RINGBUF_DISCARD_BIT`: it is being written, and nobody is
/// to see it. The others are its length.
const BUSY: u32 = 1 << 31;
const DISCARD: u32 = 1 << 30;
/// Bytes of that word and another.
const HEAD: u64 = 8;

/// A page with the position up to which records were taken, one with that up to which they were written, and the records.
#[derive(Debug)]
pub struct RingView {
    start: NonNull<AtomicU64>,
    page: usize,
    /// Bytes of records, a power of two.
    size: usize,
}

impl RingView {
    /// Fails with `InvalidData` when the map is no ring buffer.
    pub fn new(fd: &OwnedFd) -> io::Result<Self> {
        let MapInfo {
            map_type,
            max_entries,
            ..
        } = map_info(fd.as_fd())?;
        let (page, size) = (page_size(), max_entries as usize);
        if map_type != map_type::RING_BUFFER || !size.is_power_of_two() || size < page {
            return Err(io::Error::from(io::ErrorKind::InvalidData));
        }
        // SAFETY: a fresh shared mapping at an address of the kernel's choice; the result is checked.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                2 * page + size,
                libc::PROT_READ,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
        Ok(Self { start, page, size })
    }

    /// The position up to which records were taken.
    pub fn taken(&self) -> u64 {
        self.words()[0].load(Ordering::Acquire)
    }

    /// Calls `each` with the records from a position on, as far as they are there and complete. Returns where the next one
    /// begins.
    pub fn read(&self, from: u64, each: impl FnMut(&[u8])) -> u64 {
        let written = || self.words()[self.page / 8].load(Ordering::Acquire);
        let records = &self.words()[self.page / 4..];
        walk(records, from, written, || self.taken(), each)
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is two pages and `size` bytes long, page aligned, lives as long as `self`, and is never accessed
        // but atomically, and by us never but to read.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), (2 * self.page + self.size) / 8) }
    }
}

impl Drop for RingView {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this length, and no reference to it outlives `self`.
        unsafe { libc::munmap(self.start.as_ptr().cast(), 2 * self.page + self.size) };
    }
}

/// `records`: as many words as a power of two says, which positions go round and round.
fn walk(
    records: &[AtomicU64],
    from: u64,
    written: impl Fn() -> u64,
    taken: impl Fn() -> u64,
    mut each: impl FnMut(&[u8]),
) -> u64 {
    let word = |at: u64| &records[(at / 8) as usize & (records.len() - 1)];
    let mut at = from.max(taken());
    while at < written() {
        // The kernel ends a record with an exchange of its first half.
        let head = word(at).load(Ordering::Acquire).to_ne_bytes();
        let head = u32::from_ne_bytes([head[0], head[1], head[2], head[3]]);
        let length = (head & !(BUSY | DISCARD)) as usize;
        if head & BUSY != 0 || length > records.len() * 8 {
            break;
        }
        let body = (0..length.div_ceil(8) as u64).map(|number| word(at + HEAD + 8 * number));
        let body: Vec<u64> = body.map(|word| word.load(Ordering::Relaxed)).collect();
        fence(Ordering::Acquire);
        // Where it was taken meanwhile, another one may have been written over it.
        let taken = taken();
        if taken > at {
            at = taken;
            continue;
        }
        if head & DISCARD == 0 {
            each(&bytemuck::cast_slice(&body)[..length]);
        }
        at += HEAD + (length as u64).next_multiple_of(8);
    }
    at
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// A ring of 64 bytes.
    #[derive(Default)]
    struct Ring {
        records: [AtomicU64; 8],
        written: u64,
        taken: Cell<u64>,
    }

    impl Ring {
        fn write(&mut self, bits: u32, text: &[u8]) {
            let mut put = |word: [u8; 8]| {
                let place = (self.written / 8 % 8) as usize;
                self.records[place] = AtomicU64::new(u64::from_ne_bytes(word));
                self.written += 8;
            };
            let mut head = [0; 8];
            head[..4].copy_from_slice(&(text.len() as u32 | bits).to_ne_bytes());
            put(head);
            for chunk in text.chunks(8) {
                let mut word = [0; 8];
                word[..chunk.len()].copy_from_slice(chunk);
                put(word);
            }
        }

        fn read(&self, from: u64) -> (Vec<String>, u64) {
            let mut seen = Vec::new();
            let each = |bytes: &[u8]| seen.push(String::from_utf8_lossy(bytes).into_owned());
            let end = walk(&self.records, from, || self.written, || self.taken.get(), each);
            (seen, end)
        }
    }

    #[test]
    fn records_are_read_and_stay() {
        let mut ring = Ring::default();
        ring.write(0, b"one");
        ring.write(DISCARD, b"never");
        ring.write(0, b"a longer one");
        for _ in 0..2 {
            assert_eq!(
                ring.read(0),
                (vec!["one".to_owned(), "a longer one".to_owned()], 56)
            );
        }
        assert_eq!(ring.read(56), (Vec::new(), 56));
        // Round the end, once the first two are taken.
        ring.taken.set(32);
        ring.write(0, b"twelve bytes");
        ring.write(BUSY, b"");
        let (seen, end) = ring.read(0);
        assert_eq!(seen, ["a longer one", "twelve bytes"]);
        assert_eq!(end, 80, "it waits for what is being written");
    }

    #[test]
    fn what_is_taken_meanwhile_is_left_out() {
        let mut ring = Ring::default();
        ring.write(0, b"one");
        ring.write(0, b"two");
        let looks = Cell::new(0);
        let taken = || {
            looks.set(looks.get() + 1);
            if looks.get() > 1 { 16 } else { 0 }
        };
        let mut seen = Vec::new();
        let end = walk(
            &ring.records,
            0,
            || ring.written,
            taken,
            |bytes| seen.push(bytes.to_vec()),
        );
        assert_eq!((seen, end), (vec![b"two".to_vec()], 32));
    }

    #[test]
    fn a_length_that_cannot_be_ends_the_look() {
        let mut ring = Ring::default();
        ring.records[0] = AtomicU64::new(u64::from_ne_bytes([0xff, 0xff, 0xff, 0x3f, 0, 0, 0, 0]));
        ring.written = 64;
        assert_eq!(ring.read(0), (Vec::new(), 0));
    }
}

//! The space of `MAGLEV`: first fit over free ranges, which merge when they are given back.

use std::collections::BTreeMap;

/// A range of 64-bit elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slice {
    pub start: u32,
    pub len: u32,
}

impl Slice {
    fn end(self) -> u32 {
        self.start + self.len
    }
}

/// The free ranges, by start.
#[derive(Debug)]
pub struct Arena {
    free: BTreeMap<u32, u32>,
    used: u32,
}

impl Arena {
    pub fn new(elements: u32) -> Self {
        Self {
            free: (elements > 0).then_some((0, elements)).into_iter().collect(),
            used: 0,
        }
    }

    /// Elements in use.
    pub fn used(&self) -> u32 {
        self.used
    }

    /// Finds room for `len` elements.
    pub fn allocate(&mut self, len: u32) -> Option<Slice> {
        let (start, room) = self
            .free
            .iter()
            .find(|(_, room)| **room >= len)
            .map(|(start, room)| (*start, *room))?;
        self.free.remove(&start);
        if room > len {
            self.free.insert(start + len, room - len);
        }
        self.used += len;
        Some(Slice { start, len })
    }

    /// Whether [`Arena::allocate`] would find room once a range has been given back.
    pub fn has_room_without(&self, slice: Slice, len: u32) -> bool {
        let before = self.free.range(..slice.start).next_back();
        let before = before.filter(|(start, len)| *start + *len == slice.start);
        let after = self.free.get(&slice.end());
        let merged = slice.len + before.map_or(0, |(_, len)| *len) + after.copied().unwrap_or(0);
        merged >= len
    }

    /// Takes exactly this range, as found in the table at start; false when part of it is taken or outside.
    pub fn reserve(&mut self, slice: Slice) -> bool {
        let Some(end) = slice.start.checked_add(slice.len) else {
            return false;
        };
        let Some((start, room)) = self.free.range(..=slice.start).next_back().map(|(s, r)| (*s, *r)) else {
            return false;
        };
        if end > start + room {
            return false;
        }
        self.free.remove(&start);
        if slice.start > start {
            self.free.insert(start, slice.start - start);
        }
        if start + room > end {
            self.free.insert(end, start + room - end);
        }
        self.used += slice.len;
        true
    }

    /// Gives a range back.
    pub fn free(&mut self, slice: Slice) {
        self.used -= slice.len;
        let mut merged = slice;
        if let Some((start, len)) = self.free.range(..slice.start).next_back().map(|(s, l)| (*s, *l))
            && start + len == slice.start
        {
            merged = Slice {
                start,
                len: len + slice.len,
            };
        }
        if let Some(len) = self.free.remove(&slice.end()) {
            merged.len += len;
        }
        self.free.insert(merged.start, merged.len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_merge_again() {
        let mut arena = Arena::new(100);
        let slices: Vec<Slice> = (0..4).map(|_| arena.allocate(25).unwrap()).collect();
        assert_eq!(arena.allocate(1), None);
        assert!(arena.has_room_without(slices[1], 25));
        assert!(!arena.has_room_without(slices[1], 26));
        arena.free(slices[0]);
        assert!(arena.has_room_without(slices[1], 50));
        assert!(!arena.has_room_without(slices[2], 50));
        assert_eq!(arena.allocate(25), Some(slices[0]));
        for i in [1, 3, 0, 2] {
            arena.free(slices[i]);
        }
        assert_eq!(arena.used(), 0);
        assert_eq!(arena.allocate(100), Some(Slice { start: 0, len: 100 }));
    }

    #[test]
    fn what_was_found_is_not_given_out() {
        let mut arena = Arena::new(100);
        assert!(arena.reserve(Slice { start: 10, len: 20 }));
        assert!(!arena.reserve(Slice { start: 29, len: 2 }));
        assert!(!arena.reserve(Slice { start: 99, len: 2 }));
        assert_eq!(arena.allocate(11), Some(Slice { start: 30, len: 11 }));
        assert_eq!(arena.allocate(10), Some(Slice { start: 0, len: 10 }));
    }
}

//! Numbers that are given out for as long as something lives, and reused oldest first: backend ids and service
//! indexes.

use std::{
    collections::{HashMap, VecDeque},
    hash::Hash,
};

/// Which numbers are in use, and which key had the others last.
///
/// A key that comes back before its number was reused gets the same number again: flows that remember it go on.
#[derive(Debug)]
pub struct Ids<K> {
    limit: u32,
    /// Numbers from here on were never used. 0 is not given out.
    fresh: u32,
    used: HashMap<K, u32>,
    /// Former keys, and the ticket under which they queue.
    retired: HashMap<K, (u32, u64)>,
    queue: VecDeque<(u32, u64, K)>,
    ticket: u64,
    /// Given out and returned unused.
    spare: Vec<u32>,
}

/// A number that was given out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Given {
    /// The key had it already, or had it last: what the table says of it is still about this key.
    Same(u32),
    /// It belonged to another key, or to nobody.
    New(u32),
}

impl<K: Clone + Eq + Hash> Ids<K> {
    /// Numbers below `limit`.
    pub fn new(limit: u32) -> Self {
        Self {
            limit,
            fresh: 1,
            used: HashMap::new(),
            retired: HashMap::new(),
            queue: VecDeque::new(),
            ticket: 0,
            spare: Vec::new(),
        }
    }

    pub fn get(&self, key: &K) -> Option<u32> {
        self.used.get(key).copied()
    }

    /// Numbers in use.
    pub fn used(&self) -> usize {
        self.used.len()
    }

    /// Gives a key its number; `None` when all are in use.
    pub fn give(&mut self, key: &K) -> Option<Given> {
        if let Some(id) = self.used.get(key) {
            return Some(Given::Same(*id));
        }
        if let Some((id, _)) = self.retired.remove(key) {
            self.used.insert(key.clone(), id);
            return Some(Given::Same(id));
        }
        let id = self.reuse_or_fresh()?;
        self.used.insert(key.clone(), id);
        Some(Given::New(id))
    }

    fn reuse_or_fresh(&mut self) -> Option<u32> {
        if let Some(id) = self.spare.pop() {
            return Some(id);
        }
        if self.fresh < self.limit {
            self.fresh += 1;
            return Some(self.fresh - 1);
        }
        while let Some((id, ticket, key)) = self.queue.pop_front() {
            // Whoever came back has left its place in the queue behind.
            if self.retired.get(&key) == Some(&(id, ticket)) {
                self.retired.remove(&key);
                return Some(id);
            }
        }
        None
    }

    /// Takes a new number back from a key whose entry was not written: the table still speaks of somebody else.
    pub fn take_back(&mut self, key: &K) {
        self.spare.extend(self.used.remove(key));
    }

    /// Queues a key's number for reuse.
    pub fn retire(&mut self, key: &K) {
        if let Some(id) = self.used.remove(key) {
            self.ticket += 1;
            self.retired.insert(key.clone(), (id, self.ticket));
            self.queue.push_back((id, self.ticket, key.clone()));
        }
    }

    /// Takes over what a table said at start. In use: `retire` it afterwards if it is not.
    pub fn restore(&mut self, id: u32, key: K) {
        self.fresh = self.fresh.max(id + 1);
        self.used.insert(key, id);
    }

    /// Hands a number that is in use to another key, which has none.
    pub fn rename(&mut self, from: &K, to: K) {
        if let Some(id) = self.used.remove(from) {
            self.used.insert(to, id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_reused_oldest_first_and_kept_for_who_comes_back() {
        let mut ids = Ids::new(4);
        for key in ["a", "b", "c"] {
            assert!(matches!(ids.give(&key), Some(Given::New(_))));
        }
        assert_eq!(ids.give(&"d"), None);
        ids.retire(&"b");
        ids.retire(&"a");
        assert_eq!(ids.give(&"b"), Some(Given::Same(2)));
        assert_eq!(ids.give(&"d"), Some(Given::New(1)));
        assert_eq!(ids.give(&"a"), None);
    }
}

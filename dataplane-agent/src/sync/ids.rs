//! Numbers that are given out for as long as something lives, and reused oldest first: backend ids and service
//! indexes.

use std::{
    collections::{BTreeMap, HashMap},
    hash::{BuildHasher, Hash, RandomState},
};

use hashbrown::HashTable;

/// Which numbers are in use, and which key had the others last.
///
/// A key that comes back before its number was reused gets the same number again: flows that remember it go on.
#[derive(Debug)]
pub struct Ids<K> {
    limit: u32,
    /// Who has a number, or had it last, by number. Numbers beyond were never used, and 0 is not given out.
    keys: Vec<Option<K>>,
    /// The numbers of `keys`, by the hash of their keys.
    by_key: HashTable<u32>,
    hasher: RandomState,
    /// Numbers that nobody uses, by the order in which they became so.
    retired: BTreeMap<u64, u32>,
    /// Their places in it.
    places: HashMap<u32, u64>,
    next_place: u64,
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
            keys: vec![None],
            by_key: HashTable::new(),
            hasher: RandomState::new(),
            retired: BTreeMap::new(),
            places: HashMap::new(),
            next_place: 0,
            spare: Vec::new(),
        }
    }

    pub fn get(&self, key: &K) -> Option<u32> {
        self.find(key).filter(|id| !self.places.contains_key(id))
    }

    /// Numbers in use.
    pub fn used(&self) -> usize {
        self.by_key.len() - self.retired.len()
    }

    /// Who uses a number, by number.
    pub fn keys(&self) -> impl Iterator<Item = &K> {
        let keys = (0..).zip(&self.keys);
        let in_use = keys.filter(|(id, _)| !self.places.contains_key(id));
        in_use.filter_map(|(_, key)| key.as_ref())
    }

    /// Gives a key its number; `None` when all are in use.
    pub fn give(&mut self, key: &K) -> Option<Given> {
        if let Some(id) = self.find(key) {
            if let Some(place) = self.places.remove(&id) {
                self.retired.remove(&place);
            }
            return Some(Given::Same(id));
        }
        let id = self.reuse_or_fresh()?;
        self.enter(id, key.clone());
        Some(Given::New(id))
    }

    fn reuse_or_fresh(&mut self) -> Option<u32> {
        if let Some(id) = self.spare.pop() {
            return Some(id);
        }
        let fresh = self.keys.len() as u32;
        if fresh < self.limit {
            return Some(fresh);
        }
        let (_, id) = self.retired.pop_first()?;
        self.places.remove(&id);
        self.leave(id);
        Some(id)
    }

    /// Takes a new number back from a key whose entry was not written: the table still speaks of somebody else.
    pub fn take_back(&mut self, key: &K) {
        if self.get(key).is_some() {
            self.forget(key);
        }
    }

    /// Queues a key's number for reuse.
    pub fn retire(&mut self, key: &K) {
        if let Some(id) = self.get(key) {
            self.places.insert(id, self.next_place);
            self.retired.insert(self.next_place, id);
            self.next_place += 1;
        }
    }

    /// Takes over what a table said at start. In use: `retire` it afterwards if it is not.
    pub fn restore(&mut self, id: u32, key: K) {
        // Of two entries for one key, the last.
        self.forget(&key);
        self.enter(id, key);
    }

    /// Hands a number that is in use to another key, which has none.
    pub fn rename(&mut self, from: &K, to: K) {
        if let Some(id) = self.get(from) {
            self.leave(id);
            self.forget(&to);
            self.enter(id, to);
        }
    }

    /// Makes the number that a key has or had last free.
    fn forget(&mut self, key: &K) {
        if let Some(id) = self.find(key) {
            if let Some(place) = self.places.remove(&id) {
                self.retired.remove(&place);
            }
            self.leave(id);
            self.spare.push(id);
        }
    }

    /// The number that a key has or had last.
    fn find(&self, key: &K) -> Option<u32> {
        let is_its = |id: &u32| self.keys[*id as usize].as_ref() == Some(key);
        self.by_key.find(self.hasher.hash_one(key), is_its).copied()
    }

    fn enter(&mut self, id: u32, key: K) {
        let Self {
            keys, by_key, hasher, ..
        } = self;
        let hash = hasher.hash_one(&key);
        let place = id as usize;
        if keys.len() <= place {
            keys.resize(place + 1, None);
        }
        keys[place] = Some(key);
        let rehash = |id: &u32| keys[*id as usize].as_ref().map_or(0, |key| hasher.hash_one(key));
        by_key.insert_unique(hash, id, rehash);
    }

    fn leave(&mut self, id: u32) {
        if let Some(key) = self.keys[id as usize].take()
            && let Ok(entry) = self
                .by_key
                .find_entry(self.hasher.hash_one(&key), |known| *known == id)
        {
            entry.remove();
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

//! Numbers that are given out for as long as something lives, and reused oldest first: backend ids and service
//! indexes.

use std::{
    collections::{BTreeMap, HashMap},
    hash::{BuildHasher, Hash, RandomState},
};

use hashbrown::HashTable;

/// Which numbers are in use, and which key had the others last. The keys stand elsewhere: `key_of` tells the one that has a
/// number or had it last.
///
/// A key that comes back before its number was reused gets the same number again: flows that remember it go on.
#[derive(Debug)]
pub struct Ids {
    limit: u32,
    /// Numbers from here on were never used, and 0 is not given out.
    fresh: u32,
    /// By the hash of their keys.
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

impl Ids {
    /// Numbers below `limit`.
    pub fn new(limit: u32) -> Self {
        Self {
            limit,
            fresh: 1,
            by_key: HashTable::new(),
            hasher: RandomState::new(),
            retired: BTreeMap::new(),
            places: HashMap::new(),
            next_place: 0,
            spare: Vec::new(),
        }
    }

    pub fn get<K: Eq + Hash>(&self, key: &K, key_of: impl Fn(u32) -> Option<K>) -> Option<u32> {
        self.find(key, key_of).filter(|id| !self.places.contains_key(id))
    }

    /// How many are in use.
    pub fn used(&self) -> usize {
        self.by_key.len() - self.retired.len()
    }

    /// Those in use.
    pub fn iter(&self) -> impl Iterator<Item = u32> {
        let ids = self.by_key.iter().copied();
        ids.filter(|id| !self.places.contains_key(id))
    }

    /// Gives a key its number; `None` when all are in use. The key of a new number is to stand there before this is asked
    /// again, or the number to be taken back.
    pub fn give<K: Eq + Hash>(&mut self, key: &K, key_of: impl Fn(u32) -> Option<K>) -> Option<Given> {
        if let Some(id) = self.find(key, &key_of) {
            if let Some(place) = self.places.remove(&id) {
                self.retired.remove(&place);
            }
            return Some(Given::Same(id));
        }
        let id = self.reuse_or_fresh(&key_of)?;
        self.enter(id, key, key_of);
        Some(Given::New(id))
    }

    fn reuse_or_fresh<K: Hash>(&mut self, key_of: impl Fn(u32) -> Option<K>) -> Option<u32> {
        if let Some(id) = self.spare.pop() {
            return Some(id);
        }
        if self.fresh < self.limit {
            return Some(self.fresh);
        }
        let (_, id) = self.retired.pop_first()?;
        self.places.remove(&id);
        if let Some(key) = key_of(id) {
            self.leave(id, &key);
        }
        Some(id)
    }

    /// Takes a new number back from a key whose entry was not written: the table still speaks of somebody else.
    pub fn take_back<K: Hash>(&mut self, id: u32, key: &K) {
        self.leave(id, key);
        self.spare.push(id);
    }

    /// Queues a key's number for reuse.
    pub fn retire<K: Eq + Hash>(&mut self, key: &K, key_of: impl Fn(u32) -> Option<K>) {
        if let Some(id) = self.get(key, key_of) {
            self.places.insert(id, self.next_place);
            self.retired.insert(self.next_place, id);
            self.next_place += 1;
        }
    }

    /// Takes over what a table said at start. In use: `retire` it afterwards if it is not.
    pub fn restore<K: Eq + Hash>(&mut self, id: u32, key: &K, key_of: impl Fn(u32) -> Option<K>) {
        // Of two entries for one key, the last.
        self.forget(key, &key_of);
        self.enter(id, key, key_of);
    }

    /// Makes the number that a key has or had last free.
    fn forget<K: Eq + Hash>(&mut self, key: &K, key_of: impl Fn(u32) -> Option<K>) {
        if let Some(id) = self.find(key, key_of) {
            if let Some(place) = self.places.remove(&id) {
                self.retired.remove(&place);
            }
            self.leave(id, key);
            self.spare.push(id);
        }
    }

    /// The number that a key has or had last.
    fn find<K: Eq + Hash>(&self, key: &K, key_of: impl Fn(u32) -> Option<K>) -> Option<u32> {
        let is_its = |id: &u32| key_of(*id).as_ref() == Some(key);
        self.by_key.find(self.hasher.hash_one(key), is_its).copied()
    }

    fn enter<K: Hash>(&mut self, id: u32, key: &K, key_of: impl Fn(u32) -> Option<K>) {
        self.fresh = self.fresh.max(id + 1);
        let hasher = &self.hasher;
        let rehash = |id: &u32| key_of(*id).map_or(0, |key| hasher.hash_one(key));
        self.by_key.insert_unique(hasher.hash_one(key), id, rehash);
    }

    /// Takes a number from its key.
    pub fn leave<K: Hash>(&mut self, id: u32, key: &K) {
        let hash = self.hasher.hash_one(key);
        if let Ok(entry) = self.by_key.find_entry(hash, |known| *known == id) {
            entry.remove();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keys that stand beside their numbers.
    struct Stage {
        ids: Ids,
        keys: [Option<&'static str>; 4],
    }

    impl Stage {
        fn give(&mut self, key: &'static str) -> Option<Given> {
            let given = self.ids.give(&key, |id| self.keys[id as usize]);
            if let Some(Given::New(id)) = given {
                self.keys[id as usize] = Some(key);
            }
            given
        }

        fn retire(&mut self, key: &'static str) {
            self.ids.retire(&key, |id| self.keys[id as usize]);
        }
    }

    #[test]
    fn numbers_are_reused_oldest_first_and_kept_for_who_comes_back() {
        let mut stage = Stage {
            ids: Ids::new(4),
            keys: [None; 4],
        };
        for key in ["a", "b", "c"] {
            assert!(matches!(stage.give(key), Some(Given::New(_))));
        }
        assert_eq!(stage.give("d"), None);
        stage.retire("b");
        stage.retire("a");
        assert_eq!(stage.give("b"), Some(Given::Same(2)));
        assert_eq!(stage.give("d"), Some(Given::New(1)));
        assert_eq!(stage.give("a"), None);
    }

    #[test]
    fn a_number_whose_entry_was_not_written_is_the_next_to_be_given() {
        let mut stage = Stage {
            ids: Ids::new(4),
            keys: [None; 4],
        };
        assert_eq!(stage.give("a"), Some(Given::New(1)));
        assert_eq!(
            stage.ids.give(&"b", |id| stage.keys[id as usize]),
            Some(Given::New(2))
        );
        stage.ids.take_back(2, &"b");
        assert_eq!(stage.ids.used(), 1);
        assert_eq!(stage.give("c"), Some(Given::New(2)));
    }
}

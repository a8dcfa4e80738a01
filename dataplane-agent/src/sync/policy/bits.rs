//! `RULE_BITS`: one element for each content, for as long as a row leads to it.

use std::collections::{BTreeSet, HashMap};

use dataplane_common::policy::RuleBits;

use crate::store::{Store, StoreError};

/// The empty set, which is there without being written.
pub const NONE: u32 = 0;

/// The elements in use, each with the number of its users.
#[derive(Debug)]
pub struct Bits {
    limit: u32,
    by_content: HashMap<RuleBits, u32>,
    by_id: HashMap<u32, (RuleBits, usize)>,
    /// Ids from here on were never used.
    fresh: u32,
    free: BTreeSet<u32>,
}

impl Bits {
    pub fn new(limit: u32) -> Self {
        Self {
            limit,
            by_content: HashMap::new(),
            by_id: HashMap::new(),
            fresh: NONE + 1,
            free: BTreeSet::new(),
        }
    }

    /// Takes over an element that a row was found to lead to.
    pub fn found(&mut self, id: u32, content: RuleBits) {
        if id == NONE {
            return;
        }
        self.free.extend(self.fresh..id);
        self.fresh = self.fresh.max(id + 1);
        self.free.remove(&id);
        self.by_content.entry(content).or_insert(id);
        self.by_id.entry(id).or_insert((content, 0)).1 += 1;
    }

    /// An element with this content, with one user more.
    pub fn hold(&mut self, store: &mut dyn Store, content: &RuleBits) -> Result<u32, StoreError> {
        if *content == RuleBits::default() {
            return Ok(NONE);
        }
        if let Some(id) = self.by_content.get(content).copied() {
            self.hold_again(id);
            return Ok(id);
        }
        let id = self.free.first().copied().unwrap_or(self.fresh);
        if id >= self.limit {
            return Err(StoreError::Full {
                table: "RULE_BITS",
                limit: self.limit,
            });
        }
        store.write_bits(id, content)?;
        self.free.remove(&id);
        self.fresh = self.fresh.max(id + 1);
        self.by_content.insert(*content, id);
        self.by_id.insert(id, (*content, 1));
        Ok(id)
    }

    /// One user more of an element that is in use.
    pub fn hold_again(&mut self, id: u32) {
        if let Some((_, users)) = self.by_id.get_mut(&id) {
            *users += 1;
        }
    }

    /// One user fewer. What nobody uses is given out again: no row leads there.
    pub fn release(&mut self, id: u32) {
        let Some((content, users)) = self.by_id.get_mut(&id) else {
            return;
        };
        *users -= 1;
        if *users == 0 {
            if self.by_content.get(content) == Some(&id) {
                self.by_content.remove(content);
            }
            self.by_id.remove(&id);
            self.free.insert(id);
        }
    }

    /// Elements in use that were found to hold something else.
    pub fn differing(&self, found: &[(u32, RuleBits)]) -> usize {
        let found: HashMap<u32, RuleBits> = found.iter().copied().collect();
        let differs = |(id, (content, _)): &(&u32, &(RuleBits, usize))| found.get(id) != Some(content);
        self.by_id.iter().filter(differs).count()
    }

    pub fn get(&self, id: u32) -> RuleBits {
        self.by_id
            .get(&id)
            .map_or_else(RuleBits::default, |(content, _)| *content)
    }

    /// Elements in use.
    #[cfg(test)]
    pub fn used(&self) -> usize {
        self.by_id.len()
    }
}

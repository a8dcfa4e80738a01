//! The entries of `FRONTENDS_V4` and `FRONTENDS_V6` as we wrote or found them: a table for each, as in the kernel, because a
//! key of both would be as large as those of IPv6.

use std::collections::HashMap;

use dataplane_common::service::{Frontend, FrontendKey4, FrontendKey6};

use crate::store::FrontendKey;

#[derive(Debug, Default)]
pub struct Frontends {
    v4: HashMap<FrontendKey4, Frontend>,
    v6: HashMap<FrontendKey6, Frontend>,
}

impl Frontends {
    pub fn get(&self, key: &FrontendKey) -> Option<&Frontend> {
        match key {
            FrontendKey::V4(key) => self.v4.get(key),
            FrontendKey::V6(key) => self.v6.get(key),
        }
    }

    pub fn contains_key(&self, key: &FrontendKey) -> bool {
        self.get(key).is_some()
    }

    pub fn insert(&mut self, key: FrontendKey, frontend: Frontend) {
        match key {
            FrontendKey::V4(key) => self.v4.insert(key, frontend),
            FrontendKey::V6(key) => self.v6.insert(key, frontend),
        };
    }

    pub fn remove(&mut self, key: &FrontendKey) {
        match key {
            FrontendKey::V4(key) => self.v4.remove(key),
            FrontendKey::V6(key) => self.v6.remove(key),
        };
    }

    pub fn keys(&self) -> impl Iterator<Item = FrontendKey> {
        let v4 = self.v4.keys().copied().map(FrontendKey::V4);
        v4.chain(self.v6.keys().copied().map(FrontendKey::V6))
    }
}

impl FromIterator<(FrontendKey, Frontend)> for Frontends {
    fn from_iter<T: IntoIterator<Item = (FrontendKey, Frontend)>>(entries: T) -> Self {
        let mut frontends = Self::default();
        for (key, frontend) in entries {
            frontends.insert(key, frontend);
        }
        frontends
    }
}

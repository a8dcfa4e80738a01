//! EndpointSlices, found by their own names and by their Services': two tables of pointers, for there are as many as
//! Services.

use std::{
    hash::{BuildHasher, RandomState},
    sync::Arc,
};

use hashbrown::HashTable;

use crate::model::{EndpointSlice, Name};

#[derive(Debug, Default)]
pub struct Slices {
    hasher: RandomState,
    by_name: HashTable<Arc<EndpointSlice>>,
    /// Those that name a Service, whether or not it exists.
    by_service: HashTable<Arc<EndpointSlice>>,
}

impl Slices {
    pub fn len(&self) -> usize {
        self.by_name.len()
    }

    pub fn names(&self) -> impl Iterator<Item = &Name> {
        self.by_name.iter().map(|slice| &slice.name)
    }

    /// Those of a Service, in the order of their names.
    pub fn of<'a>(&'a self, service: &Name) -> impl Iterator<Item = &'a EndpointSlice> {
        let alike = self.by_service.iter_hash(self.hasher.hash_one(Some(service)));
        let mut slices: Vec<&EndpointSlice> = alike
            .map(|slice| &**slice)
            .filter(|slice| slice.service.as_ref() == Some(service))
            .collect();
        slices.sort_unstable_by_key(|slice| &slice.name);
        slices.into_iter()
    }

    pub fn get(&self, name: &Name) -> Option<&Arc<EndpointSlice>> {
        let hash = self.hasher.hash_one(name);
        self.by_name.find(hash, |slice| slice.name == *name)
    }

    /// Returns the one that it replaces.
    pub fn insert(&mut self, slice: Arc<EndpointSlice>) -> Option<Arc<EndpointSlice>> {
        let previous = self.remove(&slice.name);
        let Self {
            hasher,
            by_name,
            by_service,
        } = self;
        if slice.service.is_some() {
            let hash = |slice: &Arc<EndpointSlice>| hash_of_service(hasher, slice);
            by_service.insert_unique(hash(&slice), slice.clone(), hash);
        }
        let hash = |slice: &Arc<EndpointSlice>| hasher.hash_one(&slice.name);
        by_name.insert_unique(hash(&slice), slice, hash);
        previous
    }

    pub fn remove(&mut self, name: &Name) -> Option<Arc<EndpointSlice>> {
        let hash = self.hasher.hash_one(name);
        let found = self.by_name.find_entry(hash, |slice| slice.name == *name);
        let slice = found.ok()?.remove().0;
        if let Ok(linked) = self
            .by_service
            .find_entry(hash_of_service(&self.hasher, &slice), |other| {
                Arc::ptr_eq(other, &slice)
            })
        {
            linked.remove();
        }
        Some(slice)
    }
}

fn hash_of_service(hasher: &RandomState, slice: &EndpointSlice) -> u64 {
    hasher.hash_one(slice.service.as_ref())
}

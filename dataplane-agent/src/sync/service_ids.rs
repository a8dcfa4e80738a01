//! Who has which service index. The table does not say it, so names are kept beside.

use super::ids::{Given, Ids};
use crate::compile::BalancerKey;

/// Who has a service index.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ServiceId {
    Known(BalancerKey),
    /// Found in the table at start, by index: whose it was, its frontends say.
    Found(u32),
}

#[derive(Debug)]
pub struct ServiceIds {
    ids: Ids,
    /// By index: who has it, or had it last.
    names: Vec<Option<ServiceId>>,
}

impl ServiceIds {
    pub fn new(limit: u32) -> Self {
        Self {
            ids: Ids::new(limit),
            names: Vec::new(),
        }
    }

    pub fn get(&self, id: &ServiceId) -> Option<u32> {
        self.ids.get(id, |index| name(&self.names, index))
    }

    /// Who has an index, or had it last.
    pub fn name(&self, index: u32) -> Option<&ServiceId> {
        self.names.get(index as usize)?.as_ref()
    }

    /// Nobody has had an index from here on.
    pub fn end(&self) -> u32 {
        u32::try_from(self.names.len()).unwrap_or(u32::MAX)
    }

    pub fn used(&self) -> usize {
        self.ids.used()
    }

    pub fn give(&mut self, id: &ServiceId) -> Option<Given> {
        let given = self.ids.give(id, |index| name(&self.names, index))?;
        if let Given::New(index) = given {
            self.set_name(index, Some(id.clone()));
        }
        Some(given)
    }

    /// As [`Ids::take_back`].
    pub fn take_back(&mut self, id: &ServiceId) {
        if let Some(index) = self.get(id) {
            self.ids.take_back(index, id);
            self.set_name(index, None);
        }
    }

    pub fn retire(&mut self, id: &ServiceId) {
        self.ids.retire(id, |index| name(&self.names, index));
    }

    /// As [`Ids::restore`], for a service found.
    pub fn restore(&mut self, index: u32) {
        let id = ServiceId::Found(index);
        self.ids.restore(index, &id, |index| name(&self.names, index));
        self.set_name(index, Some(id));
    }

    /// Hands the index of a service found to the balancer that it was, which has none.
    pub fn adopt(&mut self, index: u32, by: BalancerKey) {
        let (found, known) = (ServiceId::Found(index), ServiceId::Known(by));
        self.ids.leave(index, &found);
        self.set_name(index, None);
        self.ids.restore(index, &known, |index| name(&self.names, index));
        self.set_name(index, Some(known));
    }

    fn set_name(&mut self, index: u32, id: Option<ServiceId>) {
        let place = index as usize;
        if self.names.len() <= place {
            self.names.resize(place + 1, None);
        }
        self.names[place] = id;
    }
}

fn name(names: &[Option<ServiceId>], index: u32) -> Option<ServiceId> {
    names.get(index as usize).cloned().flatten()
}

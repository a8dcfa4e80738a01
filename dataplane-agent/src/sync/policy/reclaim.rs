//! What nobody refers to any more: removed after a grace period, so that no program still looks for it.

use std::mem;

use dataplane_common::policy::{CLASS_ANY, REVISION_NONE};

use super::{PolicySyncer, Unused};
use crate::{
    compile::policy::{Dropped, PolicyCompiler},
    store::{Store, StoreError},
};

/// What nobody referred to when the wait for a grace period began, beside [`Programmed::waiting`].
///
/// [`Programmed::waiting`]: super::programmed::Programmed::waiting
#[derive(Debug, Default)]
pub struct Waiting {
    sets: Vec<u32>,
    /// The tables have been asked nothing since.
    pub is_off: bool,
}

impl PolicySyncer {
    /// Whether [`PolicySyncer::end_reclaim`] has something to do.
    pub fn has_garbage(&self) -> bool {
        self.unused == Unused::Some || self.has_rows_to_remove()
    }

    /// Whether [`PolicySyncer::run`] has something to do after [`PolicySyncer::end_reclaim`].
    pub fn has_moves(&self) -> bool {
        !self.touched.is_empty() || !self.leaving.is_empty()
    }

    fn has_rows_to_remove(&self) -> bool {
        let programmed = &self.programmed;
        let is_left = || !programmed.pods.is_empty() || !programmed.places.is_empty();
        !programmed.empty.is_empty() || (self.is_off() && is_left()) || !programmed.unused_sets().is_empty()
    }

    /// The tables are asked nothing.
    fn is_off(&self) -> bool {
        !self.is_on && self.programmed.revision == REVISION_NONE
    }

    /// To be called before a grace period. What is let go from then on waits for another one.
    pub fn begin_reclaim(&mut self) {
        let is_off = self.is_off();
        let programmed = &mut self.programmed;
        programmed.waiting = programmed.empty.clone();
        self.waiting = Waiting {
            sets: programmed.unused_sets(),
            is_off,
        };
    }

    /// To be called after it: removes what nobody has referred to since before.
    pub fn end_reclaim(
        &mut self,
        store: &mut dyn Store,
        compiler: &mut PolicyCompiler,
    ) -> Result<(), StoreError> {
        self.remove(store)?;
        if self.unused == Unused::Some {
            let Dropped {
                places,
                sets: _,
                classes_gone: _,
            } = compiler.drop_unused();
            if self.is_on {
                self.touched.extend(places);
            }
            self.unused = Unused::None;
        }
        self.merge(store)
    }

    /// The same at once.
    #[cfg(test)]
    pub fn reclaim(
        &mut self,
        store: &mut dyn Store,
        compiler: &mut PolicyCompiler,
    ) -> Result<(), StoreError> {
        self.begin_reclaim();
        if self.has_rows_to_remove() {
            store.grace_period()?;
        }
        self.end_reclaim(store, compiler)
    }

    fn remove(&mut self, store: &mut dyn Store) -> Result<(), StoreError> {
        let Waiting { mut sets, is_off } = mem::take(&mut self.waiting);
        let programmed = &mut self.programmed;
        let mut classes = mem::take(&mut programmed.waiting);
        if is_off {
            while let Some((ifindex, _)) = programmed.pods.first_key_value() {
                let ifindex = *ifindex;
                programmed.delete_pod(store, ifindex)?;
            }
            while let Some((place, _)) = programmed.places.first_key_value() {
                let place = *place;
                programmed.delete_place(store, place)?;
            }
            sets = programmed.unused_sets();
            classes.clone_from(&programmed.empty);
        }
        for class in classes {
            programmed.remove_class(store, class)?;
        }
        // An old set is never given to a pod again.
        for set in sets {
            programmed.remove_set(store, set)?;
        }
        Ok(())
    }

    /// Leads the places of a class that is several in the tables to one, as far as no set tells them apart.
    fn merge(&mut self, store: &mut dyn Store) -> Result<(), StoreError> {
        for label in self.programmed.split_labels() {
            if label == CLASS_ANY {
                continue;
            }
            let members = |class: &u32| {
                self.programmed
                    .classes
                    .get(class)
                    .map_or(0, |class| class.members.len())
            };
            let Some(largest) = self.programmed.with_label(label).max_by_key(members) else {
                continue;
            };
            let others = self.programmed.with_label(label);
            let others: Vec<u32> = others
                .filter(|class| *class != largest && self.programmed.are_alike(*class, largest))
                .collect();
            for class in others {
                let places = self.programmed.classes.get(&class);
                let places = places.map_or_else(Vec::new, |class| class.members.iter().copied().collect());
                for place in places {
                    self.programmed.put_place(store, place, largest)?;
                }
            }
        }
        Ok(())
    }
}

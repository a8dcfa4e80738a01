//! What nobody refers to any more: removed after a grace period, so that no program still looks for it.

use dataplane_common::policy::{CLASS_ANY, REVISION_NONE};

use super::{PolicySyncer, Unused};
use crate::{
    compile::policy::{Dropped, PolicyCompiler},
    store::{Store, StoreError},
};

impl PolicySyncer {
    /// Whether [`PolicySyncer::reclaim`] has something to do.
    pub fn has_garbage(&self) -> bool {
        self.unused == Unused::Some || self.has_rows_to_remove()
    }

    /// Whether [`PolicySyncer::run`] has something to do after [`PolicySyncer::reclaim`].
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

    /// Waits until no program uses what was replaced, and removes it. Off the critical path, and batched.
    pub fn reclaim(
        &mut self,
        store: &mut dyn Store,
        compiler: &mut PolicyCompiler,
    ) -> Result<(), StoreError> {
        if self.has_rows_to_remove() {
            store.grace_period()?;
            self.remove(store)?;
        }
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

    fn remove(&mut self, store: &mut dyn Store) -> Result<(), StoreError> {
        if self.is_off() {
            let programmed = &mut self.programmed;
            while let Some((ifindex, _)) = programmed.pods.first_key_value() {
                let ifindex = *ifindex;
                programmed.delete_pod(store, ifindex)?;
            }
            while let Some((place, _)) = programmed.places.first_key_value() {
                let place = *place;
                programmed.delete_place(store, place)?;
            }
        }
        let sets = self.programmed.unused_sets();
        for class in self.programmed.empty.clone() {
            self.programmed.remove_class(store, class)?;
        }
        for set in sets {
            self.programmed.remove_set(store, set)?;
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

//! Entries of `RANGES_V4` and `RANGES_V6`: there before the head of their service asks for them, gone after it. Where
//! some find no room, the service keeps out whoever they would let in.

use std::collections::{BTreeSet, HashMap};

use ipnet::IpNet;

use super::{Report, Syncer, service_ids::ServiceId};
use crate::store::{Store, StoreError};

impl Syncer {
    /// Writes what a service lacks of these ranges.
    pub(super) fn put_ranges(
        &mut self,
        store: &mut dyn Store,
        report: &mut Report,
        index: u32,
        wanted: &[IpNet],
    ) -> Result<(), StoreError> {
        if wanted.is_empty() {
            return Ok(());
        }
        let written = self.programmed.ranges.entry(index).or_default();
        for range in wanted {
            if !written.contains(range) {
                store.put_range(index, *range)?;
                report.writes += 1;
                written.insert(*range);
            }
        }
        Ok(())
    }

    /// Deletes what a service has beside these ranges.
    pub(super) fn trim_ranges(
        &mut self,
        store: &mut dyn Store,
        report: &mut Report,
        index: u32,
        wanted: &[IpNet],
    ) -> Result<(), StoreError> {
        let Some(written) = self.programmed.ranges.get_mut(&index) else {
            return Ok(());
        };
        let surplus: Vec<IpNet> = written
            .iter()
            .filter(|range| wanted.binary_search(range).is_err())
            .copied()
            .collect();
        for range in surplus {
            store.delete_range(index, range)?;
            report.writes += 1;
            written.remove(&range);
        }
        if written.is_empty() {
            self.programmed.ranges.remove(&index);
        }
        Ok(())
    }

    /// As [`Syncer::audit`], for ranges; returns how many services have others than we believed.
    pub(super) fn audit_ranges(&mut self, store: &dyn Store) -> Result<usize, StoreError> {
        let mut found: HashMap<u32, BTreeSet<IpNet>> = HashMap::new();
        for (service, range) in store.ranges()? {
            found.entry(service).or_default().insert(range);
        }
        let believed = std::mem::replace(&mut self.programmed.ranges, found);
        let found = &self.programmed.ranges;
        let differing: BTreeSet<u32> = believed
            .keys()
            .chain(found.keys())
            .filter(|index| believed.get(index) != found.get(index))
            .copied()
            .collect();
        if !differing.is_empty() {
            let index = |key| self.programmed.service_ids.get(&ServiceId::Known(key));
            let keys = self.desired.balancers();
            let of_differing =
                keys.filter(|key| index(key.clone()).is_some_and(|index| differing.contains(&index)));
            self.touched.balancers.extend(of_differing);
        }
        Ok(differing.len())
    }
}

//! Entries of `SERVICES` and their slices of `MAGLEV`: a new slice is written beside the old one, then the head is
//! flipped, then the old one is garbage.

use std::{collections::BTreeSet, sync::Arc};

use dataplane_common::service::{Service, ServiceHead, service_flags, size_class};

use super::{
    NoRoom, Report, Subject, Syncer,
    arena::Slice,
    backends::{self, OwnedBackend},
    desired::Wanted,
    encode::{self, Affinity},
    ids::Given,
    programmed::{ServiceId, Slot},
};
use crate::{
    compile::{BackendKey, BalancerKey, maglev},
    store::{Store, StoreError},
};

/// The table that was computed last: a Service's frontends follow each other and share their backends.
#[derive(Default)]
struct LastTable(Option<(Arc<[BackendKey]>, Vec<u16>)>);

impl LastTable {
    fn slots(&mut self, backends: &Arc<[BackendKey]>, class: u8) -> &[u16] {
        if self.0.as_ref().is_none_or(|(of, _)| of != backends) {
            self.0 = Some((backends.clone(), maglev::table(backends, &[], class)));
        }
        self.0.as_ref().map_or(&[], |(_, slots)| slots)
    }
}

impl Syncer {
    /// Writes the services that are desired.
    pub(super) fn put_services(&mut self, store: &mut dyn Store, report: &mut Report) {
        let mut last = LastTable::default();
        let desired = &self.desired.balancers;
        let mut touched: Vec<(BalancerKey, Wanted)> = self
            .touched
            .balancers
            .iter()
            .filter_map(|key| Some((key.clone(), desired.get(key)?.clone())))
            .collect();
        // Those that others name have their index before these are written.
        touched.sort_by_key(|(_, wanted)| wanted.affinity_of.is_some());
        for (key, wanted) in touched {
            let mut outcome = self.put_service(store, report, &key, &wanted, &mut last);
            if let Err(NotPut::NoRoom(NoRoom::Services { .. })) = outcome {
                self.delete_kept(store, report);
            }
            if let Err(NotPut::NoRoom(NoRoom::Maglev { .. } | NoRoom::Services { .. })) = outcome
                && self.has_garbage()
                && self.reclaim(store).is_ok()
            {
                outcome = self.put_service(store, report, &key, &wanted, &mut last);
            }
            if let Err(NotPut::NoRoom(NoRoom::Maglev { wanted: len, .. })) = outcome
                && self.vacate(store, report, &key, len)
            {
                outcome = self.put_service(store, report, &key, &wanted, &mut last);
            }
            match outcome {
                Ok(()) if self.affinity(&wanted).is_some() || wanted.affinity_s.is_none() => {
                    self.touched.balancers.remove(&key);
                }
                // With clients of its own, until the one that it shares them with finds room.
                Ok(()) => {}
                Err(NotPut::NoRoom(error)) => report.not_tried(describe(&key), &error),
                Err(NotPut::Store(error)) => report.failed(describe(&key), &error),
            }
        }
    }

    /// With as many of its endpoints as have an entry: where others find no room, they are missed, but nobody is sent
    /// to one that is gone.
    fn put_service(
        &mut self,
        store: &mut dyn Store,
        report: &mut Report,
        key: &BalancerKey,
        wanted: &Wanted,
        last: &mut LastTable,
    ) -> Result<(), NotPut> {
        let Wanted {
            backends,
            drop_when_empty,
            affinity_s,
            affinity_of: _,
            source_ranges,
        } = wanted;
        let affinity = self.affinity(wanted).or(affinity_s.map(Affinity::Own));
        if backends.len() > maglev::MAX_BACKENDS {
            let backends = backends.len();
            return Err(NoRoom::TooMany { backends }.into());
        }
        let owner = encode::owner(&key.owner);
        let id = |key: BackendKey| self.programmed.active_backend(&OwnedBackend { key, owner });
        let numbered = |backend: &BackendKey| Some((*backend, id(*backend)?));
        let (active, ids): (Vec<BackendKey>, Vec<u32>) = backends.iter().filter_map(numbered).unzip();
        let missing = backends.len() - ids.len();
        let mut listed = ids.clone();
        listed.sort_unstable();
        let incomplete = NoRoom::Inactive {
            missing,
            wanted: backends.len(),
        };
        if missing > 0 && !self.serves_in_part(report, key, backends, &ids) {
            return Err(incomplete.into());
        }
        let backends = if missing > 0 { &active.into() } else { backends };
        let (index, is_new) = match self.index(key)? {
            Given::Same(index) => (index, false),
            Given::New(index) => (index, true),
        };
        let before = self.programmed.slot(index);
        let class = size_class(ids.len());
        let undo = |syncer: &mut Self, slice: Option<Slice>| syncer.forget_new(key, is_new, slice);
        let keep =
            !is_new && self.slice_fits(index, &before, &ids, class, backends, last) && before.ids == listed;
        let slice = if class == 0 {
            None
        } else if keep {
            before.slice
        } else {
            let len = encode::slice_len(ids.len(), class);
            let Some(slice) = self.programmed.arena.allocate(len) else {
                undo(self, None);
                let limit = self.limits.maglev;
                return Err(NoRoom::Maglev { wanted: len, limit }.into());
            };
            let words = encode::slice_words(&ids, last.slots(backends, class));
            if let Err(error) = store.write_maglev(slice.start, &words) {
                undo(self, Some(slice));
                return Err(error.into());
            }
            report.writes += 1;
            Some(slice)
        };
        if is_new && let Err(error) = self.trim_ranges(store, report, index, &[]) {
            self.forget_new(key, is_new, slice);
            return Err(error.into());
        }
        // Without some of them, fewer clients are served; without the head, more than should be.
        let ranges = self.put_ranges(store, report, index, source_ranges);
        let generation = before.value.head.generation;
        let head = ServiceHead {
            slots_offset: slice.map_or(0, |slice| encode::slots_offset(slice, ids.len())),
            generation: if is_new || generation == 0 {
                generation.wrapping_add(1)
            } else {
                generation
            },
            size_class: class,
            flags: flag(*drop_when_empty || missing > 0, service_flags::DROP_WHEN_EMPTY)
                | Affinity::flags(affinity)
                | flag(!source_ranges.is_empty(), service_flags::RANGES),
        };
        let value = encode::service(&key.frontend, head, affinity);
        if value != before.value {
            if let Err(error) = store.write_service(index, &value) {
                undo(self, slice.filter(|_| !keep));
                return Err(error.into());
            }
            report.writes += 1;
        }
        if !keep {
            self.programmed.slice_garbage.extend(before.slice);
        }
        let slot = Slot {
            value,
            slice,
            ids: listed,
        };
        self.programmed.set_slot(index, slot);
        self.programmed.kept.remove(key);
        self.trim_ranges(store, report, index, source_ranges)?;
        if ranges.is_err() {
            self.put_ranges(store, report, index, source_ranges)?;
        }
        if missing > 0 {
            return Err(incomplete.into());
        }
        Ok(())
    }

    /// How a service's clients are to be remembered; `None` too where that needs an entry which is not written.
    fn affinity(&self, wanted: &Wanted) -> Option<Affinity> {
        let seconds = wanted.affinity_s?;
        match &wanted.affinity_of {
            None => Some(Affinity::Own(seconds)),
            Some(first) => {
                let index = self.programmed.written_service(first)?;
                Some(Affinity::Of { index })
            }
        }
    }

    /// Whether a service goes on with these endpoints alone. Not where the kernel refused a write, which will soon be
    /// tried again, and a new one not without any.
    fn serves_in_part(
        &mut self,
        report: &Report,
        key: &BalancerKey,
        backends: &[BackendKey],
        ids: &[u32],
    ) -> bool {
        if backends
            .iter()
            .any(|backend| report.is_refused(backends::describe(backend)))
        {
            return false;
        }
        self.programmed.adopt(key, &self.desired.frontends);
        !ids.is_empty() || self.programmed.written_service(key).is_some()
    }

    /// Takes a service's table away where its successor fits in no other place. For the moment between, new
    /// connections are dropped, so that their clients try again.
    fn vacate(&mut self, store: &mut dyn Store, report: &mut Report, key: &BalancerKey, len: u32) -> bool {
        let Some(index) = self.programmed.service_ids.get(&ServiceId::Known(key.clone())) else {
            return false;
        };
        let before = self.programmed.slot(index);
        let arena = &self.programmed.arena;
        let Some(slice) = before.slice.filter(|slice| arena.has_room_without(*slice, len)) else {
            return false;
        };
        let head = ServiceHead {
            slots_offset: 0,
            size_class: 0,
            flags: service_flags::DROP_WHEN_EMPTY,
            generation: before.value.head.generation,
        };
        let value = Service { head, ..before.value };
        if !report.note(describe(key), store.write_service(index, &value)) {
            return false;
        }
        self.programmed.slice_garbage.push(slice);
        let slot = Slot {
            value,
            slice: None,
            ids: Vec::new(),
        };
        self.programmed.set_slot(index, slot);
        self.reclaim(store).is_ok()
    }

    /// Whether the slice in force is already what is wanted, if it has these ids.
    fn slice_fits(
        &mut self,
        index: u32,
        before: &Slot,
        ids: &[u32],
        class: u8,
        backends: &Arc<[BackendKey]>,
        last: &mut LastTable,
    ) -> bool {
        let found = self.programmed.found_words.remove(&index);
        if before.value.head.size_class != class
            || before.ids.len() != ids.len()
            || before.slice.is_none() != (class == 0)
        {
            return false;
        }
        match found {
            // Written by an earlier process: perhaps by another version, so compare it in full.
            Some(found) => found == encode::slice_words(ids, last.slots(backends, class)),
            None => true,
        }
    }

    fn forget_new(&mut self, key: &BalancerKey, is_new: bool, slice: Option<Slice>) {
        if let Some(slice) = slice {
            self.programmed.arena.free(slice);
        }
        // The table does not know the new owner: the next try has to bump the generation again.
        if is_new {
            self.programmed
                .service_ids
                .take_back(&ServiceId::Known(key.clone()));
        }
    }

    /// The index of a balancer: its own, one found in the tables behind its frontend, or a new one.
    fn index(&mut self, key: &BalancerKey) -> Result<Given, NoRoom> {
        self.programmed.adopt(key, &self.desired.frontends);
        self.programmed
            .service_ids
            .give(&ServiceId::Known(key.clone()))
            .ok_or(NoRoom::Services {
                limit: self.limits.services,
            })
    }

    /// The backends in the tables of services that are not as desired: a run that failed leaves them in use.
    pub(super) fn backends_of_stale_services(&self) -> BTreeSet<u32> {
        let stale = self.touched.balancers.iter().cloned().map(ServiceId::Known);
        let indexes = stale
            .chain(self.programmed.orphans())
            .filter_map(|id| self.programmed.service_ids.get(&id));
        indexes
            .flat_map(|index| self.programmed.slot(index).ids)
            .collect()
    }

    /// Marks the services that nobody desires as deleted; established flows know their backends.
    pub(super) fn delete_services(&mut self, store: &mut dyn Store, report: &mut Report) {
        let mut gone: Vec<ServiceId> = self.programmed.orphans();
        for key in &self.touched.balancers {
            if self.desired.balancers.contains_key(key) {
                continue;
            }
            let twin = twin(key);
            if self.programmed.kept.contains(&twin) {
                gone.push(ServiceId::Known(twin));
            }
            gone.push(ServiceId::Known(key.clone()));
        }
        for id in gone {
            // Where the owner still has the frontend, only a policy has changed: that ends no flow.
            let keep =
                matches!(&id, ServiceId::Known(key) if self.desired.balancers.contains_key(&twin(key)));
            if self.delete_service(store, report, &id, keep)
                && let ServiceId::Known(key) = &id
            {
                self.touched.balancers.remove(key);
            }
        }
    }

    /// Deletes what was kept for the flows that it had: others need the room.
    fn delete_kept(&mut self, store: &mut dyn Store, report: &mut Report) {
        for key in std::mem::take(&mut self.programmed.kept) {
            if !self.delete_service(store, report, &ServiceId::Known(key.clone()), false) {
                self.programmed.kept.insert(key);
            }
        }
    }

    /// Marks a service as deleted. With `keep`, its flows go on, and it begins none.
    fn delete_service(
        &mut self,
        store: &mut dyn Store,
        report: &mut Report,
        id: &ServiceId,
        keep: bool,
    ) -> bool {
        let Some(index) = self.programmed.service_ids.get(id) else {
            return true;
        };
        // A frontend that could not be deleted or moved still leads here.
        if self.programmed.leads_to(index, id) {
            return false;
        }
        let before = self.programmed.slot(index);
        let head = ServiceHead {
            slots_offset: 0,
            size_class: 0,
            flags: if keep {
                service_flags::DROP_WHEN_EMPTY
            } else {
                service_flags::DELETED
            },
            generation: before.value.head.generation,
        };
        let value = Service { head, ..before.value };
        if value != before.value {
            if let Err(error) = store.write_service(index, &value) {
                report.failed(format!("service index {index}"), &error);
                return false;
            }
            report.writes += 1;
        }
        self.programmed.slice_garbage.extend(before.slice);
        self.programmed.found_words.remove(&index);
        let slot = Slot {
            value,
            slice: None,
            ids: Vec::new(),
        };
        self.programmed.set_slot(index, slot);
        if let Err(error) = self.trim_ranges(store, report, index, &[]) {
            report.failed(format!("service index {index}"), &error);
            return false;
        }
        if let ServiceId::Known(key) = id {
            if keep {
                self.programmed.kept.insert(key.clone());
                return true;
            }
            self.programmed.kept.remove(key);
        }
        self.programmed.discard(id.clone());
        true
    }
}

/// Why a service is not as desired.
enum NotPut {
    NoRoom(NoRoom),
    Store(StoreError),
}

impl From<NoRoom> for NotPut {
    fn from(error: NoRoom) -> Self {
        NotPut::NoRoom(error)
    }
}

impl From<StoreError> for NotPut {
    fn from(error: StoreError) -> Self {
        NotPut::Store(error)
    }
}

/// The other balancer that a frontend may have.
fn twin(key: &BalancerKey) -> BalancerKey {
    BalancerKey {
        outside: !key.outside,
        ..key.clone()
    }
}

/// A flag, if it is set.
fn flag(is_set: bool, flag: u8) -> u8 {
    if is_set { flag } else { 0 }
}

/// A balancer for people.
pub fn describe(key: &BalancerKey) -> Subject {
    let BalancerKey {
        owner,
        frontend,
        outside: _,
    } = key;
    let proto = frontend.proto.as_str();
    let entry = if frontend.addr.is_unspecified() {
        let family = if frontend.addr.is_ipv4() { "IPv4" } else { "IPv6" };
        format!("node port {}/{proto} ({family})", frontend.port)
    } else {
        let at = std::net::SocketAddr::new(frontend.addr, frontend.port);
        format!("{at}/{proto}")
    };
    Subject {
        object: Some(owner.clone()),
        entry,
    }
}

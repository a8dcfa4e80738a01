//! Entries of `SERVICES` and their slices of `MAGLEV`: a new slice is written beside the old one, then the head is
//! flipped, then the old one is garbage.

use std::{collections::BTreeSet, sync::Arc};

use dataplane_common::service::{Service, ServiceHead, service_flags, size_class};

use super::{
    Inactive, NoRoom, Report, Subject, Syncer,
    arena::Slice,
    backends,
    desired::Desired,
    encode::{self, Affinity},
    ids::Given,
    service_ids::ServiceId,
};
use crate::{
    compile::{BackendKey, Balancer, BalancerKey, maglev},
    store::{Store, StoreError},
};

/// The table that was computed last: a Service's frontends follow each other and share their backends.
#[derive(Default)]
struct LastTable {
    of: Option<(Arc<[BackendKey]>, u8)>,
    filler: maglev::Filler,
    words: Vec<u64>,
}

impl LastTable {
    /// The elements of a slice.
    fn words(&mut self, backends: &Arc<[BackendKey]>, class: u8, ids: &[u32]) -> &[u64] {
        let is_last = |(of, of_class): &(Arc<[BackendKey]>, u8)| of == backends && *of_class == class;
        if !self.of.as_ref().is_some_and(is_last) {
            self.filler.fill(backends, &[], class);
            self.of = Some((backends.clone(), class));
        }
        encode::slice_words(&mut self.words, ids, self.filler.slots());
        &self.words
    }
}

impl Syncer {
    /// Writes the services that are desired.
    pub(super) fn put_services(&mut self, store: &mut dyn Store, report: &mut Report) {
        let mut last = LastTable::default();
        let touched = std::mem::take(&mut self.touched.balancers);
        let mut waiting = BTreeSet::new();
        for key in in_order(&self.desired, touched) {
            let Some(wanted) = self.desired.balancer(&key) else {
                waiting.insert(key);
                continue;
            };
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
                Ok(()) if wanted.affinity_s.is_none() || self.affinity(store, &key, &wanted).is_some() => {
                    continue;
                }
                // With clients of its own, until the one that it shares them with finds room.
                Ok(()) => {}
                Err(NotPut::NoRoom(error)) => report.not_tried(describe(&key), &error),
                Err(NotPut::Store(error)) => report.failed(describe(&key), &error),
            }
            waiting.insert(key);
        }
        self.touched.balancers = waiting;
    }

    /// With as many of its endpoints as have an entry: where others find no room, they are missed, but nobody is sent
    /// to one that is gone.
    fn put_service(
        &mut self,
        store: &mut dyn Store,
        report: &mut Report,
        key: &BalancerKey,
        wanted: &Balancer,
        last: &mut LastTable,
    ) -> Result<(), NotPut> {
        let Balancer {
            backends,
            affinity_s,
            source_ranges,
            ..
        } = wanted;
        let affinity = self
            .affinity(store, key, wanted)
            .or(affinity_s.map(Affinity::Own));
        if backends.len() > maglev::MAX_BACKENDS {
            let backends = backends.len();
            return Err(NoRoom::TooMany { backends }.into());
        }
        let (active, ids) = self.active_backends(store, &key.owner, backends);
        let missing = backends.len() - ids.len();
        let mut listed = ids.clone();
        listed.sort_unstable();
        let incomplete = self.incomplete(report, backends, missing);
        if missing > 0 && !self.serves_in_part(store, &incomplete, key, &ids) {
            return Err(incomplete.into());
        }
        let backends = if missing > 0 { &active.into() } else { backends };
        let (index, is_new) = match self.index(key)? {
            Given::Same(index) => (index, false),
            Given::New(index) => (index, true),
        };
        let before = self.programmed.slot(store, index);
        let class = size_class(ids.len());
        let undo = |syncer: &mut Self, slice: Option<Slice>| syncer.forget_new(key, is_new, slice);
        // Written by an earlier process: perhaps by another version, so it is compared in full.
        let is_unverified = self.programmed.unverified.remove(&index);
        let keep = !is_new
            && before.value.head.size_class == class
            && before.slice.is_none() == (class == 0)
            && before.ids(store)? == listed
            && (!is_unverified || holds(store, before.slice, last.words(backends, class, &ids)));
        let slice = if class == 0 {
            None
        } else if keep {
            before.slice
        } else {
            let len = encode::slice_len(ids.len(), class);
            let Some(slice) = self.programmed.arena.allocate(len) else {
                undo(self, None);
                return Err(self.no_slice(len).into());
            };
            let words = last.words(backends, class, &ids);
            if let Err(error) = store.write_maglev(slice.start, words) {
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
            flags: flags(wanted, affinity) | flag(missing > 0, service_flags::DROP_WHEN_EMPTY),
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
            self.programmed.garbage.slices.extend(before.slice);
        }
        self.programmed.set_slice(index, slice);
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

    /// That so many endpoints are missing, and why.
    fn incomplete(&self, report: &Report, backends: &[BackendKey], missing: usize) -> NoRoom {
        let limit = self.limits.backends;
        NoRoom::Inactive {
            missing,
            wanted: backends.len(),
            why: if missing > 0 && is_refused(report, backends) {
                Inactive::Refused
            } else {
                Inactive::NoId { limit }
            },
        }
    }

    fn no_slice(&self, wanted: u32) -> NoRoom {
        let limit = self.limits.maglev;
        NoRoom::Maglev {
            wanted,
            free: limit - self.programmed.arena.used(),
            limit,
        }
    }

    /// How a service's clients are to be remembered; `None` too where that needs an entry which is not written.
    fn affinity(&self, store: &dyn Store, key: &BalancerKey, wanted: &Balancer) -> Option<Affinity> {
        let seconds = wanted.affinity_s?;
        match wanted.affinity_of {
            None => Some(Affinity::Own(seconds)),
            Some(first) => {
                let first = BalancerKey {
                    owner: key.owner.clone(),
                    frontend: first,
                    outside: false,
                };
                let index = self.programmed.written_service(store, &first)?;
                Some(Affinity::Of { index })
            }
        }
    }

    /// Whether a service goes on with these endpoints alone. Not where the kernel refused a write, which will soon be
    /// tried again, and a new one not without any.
    fn serves_in_part(
        &mut self,
        store: &dyn Store,
        incomplete: &NoRoom,
        key: &BalancerKey,
        ids: &[u32],
    ) -> bool {
        if matches!(
            incomplete,
            NoRoom::Inactive {
                why: Inactive::Refused,
                ..
            }
        ) {
            return false;
        }
        self.programmed.adopt(key, &self.desired);
        !ids.is_empty() || self.programmed.written_service(store, key).is_some()
    }

    /// Takes a service's table away where its successor fits in no other place. For the moment between, new
    /// connections are dropped, so that their clients try again.
    fn vacate(&mut self, store: &mut dyn Store, report: &mut Report, key: &BalancerKey, len: u32) -> bool {
        let Some(index) = self.programmed.service_ids.get(&ServiceId::Known(key.clone())) else {
            return false;
        };
        let before = self.programmed.slot(store, index);
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
        if !report.note(|| describe(key), store.write_service(index, &value)) {
            return false;
        }
        self.programmed.garbage.slices.push(slice);
        self.programmed.set_slice(index, None);
        self.reclaim(store).is_ok()
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
        self.programmed.adopt(key, &self.desired);
        self.programmed
            .service_ids
            .give(&ServiceId::Known(key.clone()))
            .ok_or(NoRoom::Services {
                limit: self.limits.services,
            })
    }

    /// The backends in the tables of services that are not as desired: a run that failed leaves them in use.
    pub(super) fn backends_of_stale_services(&self, store: &dyn Store) -> BTreeSet<u32> {
        let stale = self.touched.balancers.iter().cloned().map(ServiceId::Known);
        let indexes = stale
            .chain(self.programmed.orphans())
            .filter_map(|id| self.programmed.service_ids.get(&id));
        // Only what is beyond the table's end cannot be read.
        indexes
            .flat_map(|index| self.programmed.slot(store, index).ids(store).unwrap_or_default())
            .collect()
    }

    /// Marks the services that nobody desires as deleted; established flows know their backends.
    pub(super) fn delete_services(&mut self, store: &mut dyn Store, report: &mut Report) {
        let mut gone: Vec<ServiceId> = self.programmed.orphans();
        for key in &self.touched.balancers {
            if self.desired.balancer(key).is_some() {
                continue;
            }
            let twin = key.twin();
            if self.programmed.kept.contains(&twin) {
                gone.push(ServiceId::Known(twin));
            }
            gone.push(ServiceId::Known(key.clone()));
        }
        for id in gone {
            // Where the owner still has the frontend, only a policy has changed: that ends no flow.
            let keep = matches!(&id, ServiceId::Known(key) if self.desired.balancer(&key.twin()).is_some());
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
        if self.programmed.leads_to(store, index, id) {
            return false;
        }
        let before = self.programmed.slot(store, index);
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
        self.programmed.garbage.slices.extend(before.slice);
        self.programmed.unverified.remove(&index);
        self.programmed.set_slice(index, None);
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

/// Whether the kernel refused to write one of these.
fn is_refused(report: &Report, backends: &[BackendKey]) -> bool {
    let mut described = backends.iter().map(backends::describe);
    described.any(|backend| report.is_refused(backend))
}

/// Whether a slice has this content.
fn holds(store: &dyn Store, slice: Option<Slice>, words: &[u64]) -> bool {
    let Some(slice) = slice else { return true };
    let mut found = vec![0; slice.len as usize];
    store.read_maglev(slice.start, &mut found).is_ok() && found == words
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

/// Balancers owner by owner, of each first those that its others name: they have their index before the others are
/// written.
fn in_order(desired: &Desired, balancers: BTreeSet<BalancerKey>) -> Vec<BalancerKey> {
    let mut balancers: Vec<BalancerKey> = balancers.into_iter().collect();
    let names_another = |key: &BalancerKey| {
        let balancer = desired.balancer(key);
        balancer.is_some_and(|balancer| balancer.affinity_of.is_some())
    };
    for of_owner in balancers.chunk_by_mut(|one, next| one.owner == next.owner) {
        if of_owner.len() > 1 {
            of_owner.sort_by_cached_key(names_another);
        }
    }
    balancers
}

/// The flags that a balancer's own properties set.
fn flags(wanted: &Balancer, affinity: Option<Affinity>) -> u8 {
    flag(wanted.drop_when_empty, service_flags::DROP_WHEN_EMPTY)
        | Affinity::flags(affinity)
        | flag(!wanted.source_ranges.is_empty(), service_flags::RANGES)
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

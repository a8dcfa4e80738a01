//! Keeps the tables equal to what is desired, in an order that never exposes half a state: backends before the
//! tables that choose them, these before the services' heads, frontends last; on removal the other way round.
//!
//! [`desired`] says what should be, [`programmed`] what is; [`Syncer::run`] brings the touched entries of one to the
//! other. Only what was written is recorded as written, so whatever fails stays touched and is tried again.

mod arena;
mod backends;
pub mod bound;
mod desired;
pub mod encode;
mod frontends;
mod ids;
mod placed;
pub mod policy;
mod programmed;
mod ranges;
mod restore;
mod service_ids;
mod services;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use dataplane_common::{device::Device, service::Frontend};

pub use self::backends::serves;
pub use self::placed::Placed;
pub use self::restore::find_slice;
use self::{
    desired::{Desired, Touched},
    frontends::Frontends,
    programmed::Programmed,
};
use crate::{
    compile::{Compiled, Update},
    host::PodInterface,
    model::{Cause, ObjectRef},
    store::{FrontendKey, Limits, Store, StoreError},
};

/// What the tables should say of this machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostTables {
    /// With `own_flags`.
    pub own_addresses: BTreeMap<IpAddr, u32>,
    pub devices: BTreeMap<u32, Device>,
    pub pod_interfaces: BTreeMap<IpAddr, PodInterface>,
}

/// What a failure is about: an entry, and whose it is where that is known.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Subject {
    pub object: Option<ObjectRef>,
    pub entry: String,
}

impl From<String> for Subject {
    fn from(entry: String) -> Self {
        Self { object: None, entry }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(object) = &self.object {
            write!(f, "{object}: ")?;
        }
        f.write_str(&self.entry)
    }
}

/// Why an entry is not as desired.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub reason: String,
    /// The kernel refused the write. Otherwise there is no room, for this entry or for one that it needs.
    pub refused: bool,
}

impl From<&StoreError> for Failure {
    fn from(error: &StoreError) -> Self {
        let mut reason = error.to_string();
        if let StoreError::Io { source, .. } = error {
            reason = format!("{reason}: {source}");
        }
        let refused = matches!(error, StoreError::Io { .. });
        Self { reason, refused }
    }
}

impl Failure {
    pub fn cause(&self) -> Cause {
        if self.refused {
            Cause::WriteRefused
        } else {
            Cause::TableFull
        }
    }
}

/// What [`Syncer::run`] did.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Entries written or deleted.
    pub writes: usize,
    /// What is not as desired, by what it is about. Tried again by the next run.
    pub failed: BTreeMap<Subject, Failure>,
    /// UDP endpoints that a Service has lost: a socket that knows one of them alone does not find another.
    pub lost: BTreeSet<SocketAddr>,
}

impl Report {
    /// What two of them did.
    #[must_use]
    pub fn with(mut self, other: Report) -> Self {
        let Report { writes, failed, lost } = other;
        self.writes += writes;
        self.failed.extend(failed);
        self.lost.extend(lost);
        self
    }

    /// Records a write that failed.
    fn failed(&mut self, what: impl Into<Subject>, error: &StoreError) {
        self.failed.insert(what.into(), Failure::from(error));
    }

    /// Records what could not even be tried; a failed write says more.
    fn not_tried(&mut self, what: impl Into<Subject>, reason: &NoRoom) {
        self.failed.entry(what.into()).or_insert_with(|| Failure {
            reason: reason.to_string(),
            refused: false,
        });
    }

    /// Whether the kernel refused a write.
    fn is_refused(&self, what: impl Into<Subject>) -> bool {
        let failure = self.failed.get(&what.into());
        failure.is_some_and(|failure| failure.refused)
    }

    /// Records the failure of a write that is counted elsewhere; true when it succeeded.
    fn is_written(&mut self, what: impl Into<Subject>, outcome: &Result<(), StoreError>) -> bool {
        if let Err(error) = outcome {
            self.failed(what, error);
        }
        outcome.is_ok()
    }

    /// Records the outcome of a write; true when it succeeded. Most do, and nobody asks what they were about.
    fn note<S: Into<Subject>>(&mut self, what: impl FnOnce() -> S, outcome: Result<(), StoreError>) -> bool {
        match outcome {
            Ok(()) => {
                self.writes += 1;
                true
            }
            Err(error) => {
                self.failed(what(), &error);
                false
            }
        }
    }
}

/// Why something could not even be tried.
#[derive(Debug, thiserror::Error)]
enum NoRoom {
    #[error("no backend id is free ({limit} backends, --max-backends)")]
    Backends { limit: u32 },
    #[error("no service index is free ({limit} services, --max-services)")]
    Services { limit: u32 },
    #[error("no room for a table of {wanted} elements ({free} of {limit} are free, --max-maglev)")]
    Maglev { wanted: u32, free: u32, limit: u32 },
    #[error("{backends} endpoints are more than a table can number")]
    TooMany { backends: usize },
    #[error("{missing} of {wanted} endpoints are not written: {why}")]
    Inactive {
        missing: usize,
        wanted: usize,
        why: Inactive,
    },
    #[error("its service entry is not written")]
    NoService,
    #[error("its port is not written")]
    NoPort,
}

/// Why an endpoint is not in the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
enum Inactive {
    #[error("no backend id is free ({limit} backends, --max-backends)")]
    NoId { limit: u32 },
    #[error("the kernel refused it")]
    Refused,
}

/// The desired and the programmed state, and the way from one to the other.
#[derive(Debug)]
pub struct Syncer {
    limits: Limits,
    desired: Desired,
    host: HostTables,
    touched: Touched,
    programmed: Programmed,
}

impl Syncer {
    /// Reads what the tables hold already.
    pub fn restore(store: &dyn Store) -> Result<Self, StoreError> {
        let mut touched = Touched::default();
        let programmed = restore::restore(store, &mut touched)?;
        Ok(Self {
            limits: store.limits(),
            desired: Desired::default(),
            host: HostTables::default(),
            touched,
            programmed,
        })
    }

    /// Changes what is desired of Services.
    pub fn update(&mut self, updates: Vec<Update>) {
        self.desired.update(updates, &mut self.touched);
    }

    /// Changes what is desired of this machine.
    pub fn set_host(&mut self, store: &dyn Store, host: HostTables) {
        let before = std::mem::replace(&mut self.host, host);
        let mut moved: BTreeSet<IpAddr> = BTreeSet::new();
        let host = &self.host;
        for addr in before.pod_interfaces.keys().chain(host.pod_interfaces.keys()) {
            if before.pod_interfaces.get(addr) != host.pod_interfaces.get(addr) {
                moved.insert(*addr);
            }
        }
        for addr in before.own_addresses.keys().chain(host.own_addresses.keys()) {
            if before.own_addresses.contains_key(addr) != host.own_addresses.contains_key(addr) {
                moved.insert(*addr);
            }
        }
        if !moved.is_empty() {
            // Those without a number wait for one among the touched.
            let numbered = self.programmed.backend_ids.iter();
            let numbered = numbered.filter_map(|id| backends::named(store, id));
            let there = numbered.filter(|backend| moved.contains(&backend.key.addr));
            let desired = there.filter(|backend| self.desired.uses(backend).is_some());
            self.touched.backends.extend(desired);
        }
    }

    /// Whether there is nothing left to write.
    pub fn is_settled(&self) -> bool {
        self.touched.is_empty() && !self.programmed.has_orphans() && self.is_host_settled()
    }

    fn is_host_settled(&self) -> bool {
        self.programmed.own_addresses == self.host.own_addresses
            && self.programmed.devices == self.host.devices
    }

    /// Writes what differs. Never call it before the source is complete: what nobody desires is deleted.
    pub fn run(&mut self, store: &mut dyn Store) -> Report {
        let mut report = Report::default();
        if self.programmed.has_orphans() {
            let kept = self.programmed.adopt_found(store, &self.desired);
            self.touched.balancers.extend(kept);
        }
        self.put_host(store, &mut report);
        self.put_backends(store, &mut report);
        self.put_services(store, &mut report);
        self.put_ports(store, &mut report);
        self.put_frontends(store, &mut report);
        self.delete_frontends(store, &mut report);
        self.trim_ports(store, &mut report);
        self.delete_services(store, &mut report);
        self.demote_backends(store, &mut report);
        self.delete_host(store, &mut report);
        if self.touched.is_empty() {
            self.desired.pack();
        }
        report
    }

    /// Whether [`Syncer::reclaim`] has something to do.
    pub fn has_garbage(&self) -> bool {
        self.programmed.has_garbage()
    }

    /// To be called before a grace period. What is replaced from then on waits for another one.
    pub fn begin_reclaim(&mut self) {
        self.programmed.begin_reclaim();
    }

    /// To be called after it: what was replaced before is free, for no program uses it.
    pub fn end_reclaim(&mut self, store: &dyn Store) {
        self.programmed.end_reclaim(store, &self.desired);
    }

    /// The same at once, where something waits for room.
    pub fn reclaim(&mut self, store: &mut dyn Store) -> Result<(), StoreError> {
        if self.has_garbage() {
            self.begin_reclaim();
            store.grace_period()?;
            self.end_reclaim(store);
        }
        Ok(())
    }

    /// Compares the hash tables with what we believe is in them, for the case that somebody else wrote there. The
    /// next run makes good what differs; returns how much that is.
    pub fn audit(&mut self, store: &dyn Store) -> Result<usize, StoreError> {
        let frontends: Frontends = store.frontends()?.into_iter().collect();
        let believed = std::mem::replace(&mut self.programmed.frontends, frontends);
        let found = &self.programmed.frontends;
        let differing: BTreeSet<FrontendKey> = believed
            .keys()
            .chain(found.keys())
            .filter(|key| believed.get(key) != found.get(key))
            .collect();
        let mut count = differing.len();
        self.touched.frontends.extend(differing);
        count += self.audit_ranges(store)?;
        let own_addresses = store.own_addresses()?.into_iter().collect();
        let devices = store.devices()?.into_iter().collect();
        count += usize::from(self.programmed.own_addresses != own_addresses);
        count += usize::from(self.programmed.devices != devices);
        self.programmed.own_addresses = own_addresses;
        self.programmed.devices = devices;
        Ok(count)
    }

    /// How full the tables are: services, backends and elements of `MAGLEV`.
    pub fn usage(&self) -> (usize, usize, u32) {
        self.programmed.usage()
    }

    /// What every Service and Pod wants, in no order.
    pub fn wanted(&self) -> impl Iterator<Item = (ObjectRef, Arc<Compiled>)> {
        self.desired.owners()
    }

    /// Services known, programmed or not.
    pub fn services(&self) -> usize {
        self.desired.services()
    }

    /// Writes what this node is, before all else. What fails, [`Syncer::run`] reports.
    pub fn write_host(&mut self, store: &mut dyn Store) {
        self.put_host(store, &mut Report::default());
    }

    fn put_host(&mut self, store: &mut dyn Store, report: &mut Report) {
        for (ifindex, device) in &self.host.devices {
            if self.programmed.devices.get(ifindex) != Some(device)
                && report.note(|| format!("device {ifindex}"), store.put_device(*ifindex, device))
            {
                self.programmed.devices.insert(*ifindex, *device);
            }
        }
        for (addr, flags) in &self.host.own_addresses {
            if self.programmed.own_addresses.get(addr) != Some(flags)
                && report.note(
                    || format!("own address {addr}"),
                    store.put_own_address(*addr, *flags),
                )
            {
                self.programmed.own_addresses.insert(*addr, *flags);
            }
        }
    }

    fn delete_host(&mut self, store: &mut dyn Store, report: &mut Report) {
        let host = &self.host;
        self.programmed.own_addresses.retain(|addr, _| {
            host.own_addresses.contains_key(addr)
                || !report.note(|| format!("own address {addr}"), store.delete_own_address(*addr))
        });
        self.programmed.devices.retain(|ifindex, _| {
            host.devices.contains_key(ifindex)
                || !report.note(|| format!("device {ifindex}"), store.delete_device(*ifindex))
        });
    }

    fn put_ports(&mut self, store: &mut dyn Store, report: &mut Report) {
        for index in &self.touched.ports {
            let (desired, programmed) = (
                self.desired.ports[*index as usize],
                self.programmed.ports[*index as usize],
            );
            let mut union = programmed;
            union.any |= desired.any;
            union.wildcard |= desired.wildcard;
            if union != programmed
                && report.note(|| format!("ports {index}"), store.write_ports(*index, union))
            {
                self.programmed.ports[*index as usize] = union;
            }
        }
    }

    /// Clears the bits of ports that no frontend uses; not while a frontend waits for its deletion.
    fn trim_ports(&mut self, store: &mut dyn Store, report: &mut Report) {
        if !self.touched.frontends.is_empty() {
            return;
        }
        let (desired, programmed) = (&self.desired.ports, &mut self.programmed.ports);
        self.touched.ports.retain(|index| {
            let at = *index as usize;
            if desired[at] == programmed[at] {
                return false;
            }
            let done = report.note(
                || format!("ports {index}"),
                store.write_ports(*index, desired[at]),
            );
            if done {
                programmed[at] = desired[at];
            }
            !done
        });
    }

    fn put_frontends(&mut self, store: &mut dyn Store, report: &mut Report) {
        let (desired, programmed) = (&self.desired, &mut self.programmed);
        // Otherwise what is missing comes with the next try.
        let is_full = !report.failed.values().any(|failure| failure.refused);
        self.touched.frontends.retain(|frontend| {
            if let Some((addr, _)) = desired.echoes.get(frontend) {
                return !put_frontend(programmed, store, report, *frontend, Frontend::default(), || {
                    format!("echo at {addr}").into()
                });
            }
            let Some(key) = &desired.frontend(frontend) else {
                return true;
            };
            let index = programmed.written_service(store, key).ok_or(NoRoom::NoService);
            let index = index.and_then(|index| {
                programmed
                    .lets_through(&key.frontend)
                    .then_some(index)
                    .ok_or(NoRoom::NoPort)
            });
            let index = match index {
                Ok(index) => index,
                Err(error) => {
                    report.not_tried(services::describe(key), &error);
                    // There is no room for the owner, and its predecessor holds what may become room.
                    if is_full
                        && matches!(error, NoRoom::NoService)
                        && programmed.frontends.contains_key(frontend)
                        && report.note(|| services::describe(key), store.delete_frontend(*frontend))
                    {
                        programmed.frontends.remove(frontend);
                    }
                    return true;
                }
            };
            let value = Frontend {
                service: index,
                owner: encode::owner(&key.owner),
            };
            !put_frontend(programmed, store, report, *frontend, value, || {
                services::describe(key)
            })
        });
    }

    fn delete_frontends(&mut self, store: &mut dyn Store, report: &mut Report) {
        let (desired, programmed) = (&self.desired, &mut self.programmed);
        self.touched.frontends.retain(|frontend| {
            if desired.frontend(frontend).is_some() || desired.echoes.contains_key(frontend) {
                return true;
            }
            if !programmed.frontends.contains_key(frontend) {
                return false;
            }
            let done = report.note(|| format!("{frontend:?}"), store.delete_frontend(*frontend));
            if done {
                programmed.frontends.remove(frontend);
            }
            !done
        });
    }
}

/// Whether the frontend has this value now.
fn put_frontend(
    programmed: &mut Programmed,
    store: &mut dyn Store,
    report: &mut Report,
    frontend: FrontendKey,
    value: Frontend,
    what: impl FnOnce() -> Subject,
) -> bool {
    if programmed.frontends.get(&frontend) == Some(&value) {
        return true;
    }
    let done = report.note(what, store.put_frontend(frontend, value));
    if done {
        programmed.frontends.insert(frontend, value);
    }
    done
}

//! Keeps the tables of policies equal to what is compiled, in an order in which at every moment each verdict is that of
//! before or that of after: rows of new sets, classes with their rows, addresses and ranges, pods, then the revision;
//! what nobody refers to any more goes after a grace period ([`PolicySyncer::end_reclaim`]).
//!
//! An address has one class for all sets, those that pods are led away from among them. So where what an address is to
//! those changes in the same run, it gets a class that is to them what it was, and to the others what it becomes: a class of
//! the compiler may be several in the tables. That is also how an agent that starts again takes over what it finds: sets
//! and classes that say what is compiled are adopted ([`restore`]), and all others are such old sets.
//!
//! What cannot be written closes the pods that it is about, and is tried again.

mod audit;
mod bits;
mod build;
pub mod hits;
mod names;
mod places;
mod programmed;
mod reclaim;
mod restore;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{BuildHasher, RandomState},
    net::IpAddr,
};

use dataplane_common::policy::{PodPolicy, PolicyRule, REVISION_NONE, SET_NONE};

pub use self::programmed::SET_CLOSED;
use self::{
    programmed::{Programmed, sets_of},
    reclaim::Waiting,
};
use super::{Failure, Report, Subject};
use crate::{
    compile::policy::{
        Changes, PolicyCompiler,
        classes::{ClassId, Place},
        sets::SetId,
    },
    model::{Kind, Name, ObjectRef, policy::Direction},
    store::Store,
};

/// A pod of this node whose interface is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BoundPod {
    pub name: Name,
    pub addrs: Vec<IpAddr>,
}

/// By ifindex, the sets that a pod is to have, in the order of [`sets_of`], as the compiler numbers them.
type Wanted = BTreeMap<u32, [SetId; 4]>;

/// What a pod's policies of a direction are called in [`Report::failed`], where they close it.
fn closed_entry(direction: Direction) -> String {
    format!("{} policies", direction.as_str())
}

/// Why a pod is closed in a direction, if something of its policies cannot be written.
pub fn closed<'a>(
    failed: &'a BTreeMap<Subject, Failure>,
    pod: &Name,
    direction: Direction,
) -> Option<&'a str> {
    let subject = Subject {
        object: Some(ObjectRef {
            kind: Kind::Pod,
            name: pod.clone(),
        }),
        entry: closed_entry(direction),
    };
    Some(&failed.get(&subject)?.reason)
}

/// The programmed state, and what is known of the desired one.
#[derive(Debug)]
pub struct PolicySyncer {
    programmed: Programmed,
    /// The elements of `RULES` that an earlier process left, until its sets have been compared.
    found: Option<BTreeMap<u32, PolicyRule>>,
    bound: BTreeMap<u32, BoundPod>,
    /// Some pod has a set, so places are written.
    is_on: bool,
    /// Places whose class may be another than written.
    touched: BTreeSet<Place>,
    /// Places that are gone and stay until no old set tells them from what is beneath.
    leaving: BTreeSet<Place>,
    /// Flows may remember verdicts that are not those of the tables.
    is_stale: bool,
    last_revision: u32,
    unused: Unused,
    waiting: Waiting,
}

/// What the compiler may hold that no pod uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unused {
    None,
    /// Something, once pods have been led away from it.
    AfterRun,
    Some,
}

impl PolicySyncer {
    /// Takes over what has been compiled.
    pub fn update(&mut self, changes: Changes) {
        let Changes {
            sets,
            peer_rules: _,
            places,
            pods,
            classes_gone: _,
        } = changes;
        if !sets.is_empty() || !pods.is_empty() || !places.is_empty() {
            self.unused = Unused::AfterRun;
        }
        if self.is_on {
            self.touched.extend(places);
        }
    }

    /// Says which pods have which interfaces.
    pub fn set_pods(&mut self, bound: BTreeMap<u32, BoundPod>) {
        self.bound = bound;
    }

    /// Verdicts that flows remember are not those of the tables any more.
    pub fn judge_anew(&mut self) {
        self.is_stale |= self.is_on;
    }

    /// Whether the policies of an interface's pod are in force.
    pub fn is_in_force(&self, ifindex: u32) -> bool {
        !self.is_on || !self.is_stale && self.programmed.pods.contains_key(&ifindex)
    }

    /// Whether there is nothing left to write.
    pub fn is_settled(&self) -> bool {
        self.touched.is_empty() && !self.is_stale
    }

    /// The policy with a number in `RULES`, as long as a set has a rule of it.
    pub fn policy(&self, number: u32) -> Option<&ObjectRef> {
        self.programmed.names.get(number)
    }

    /// Writes what differs. Never call it before the source is complete and the pods' interfaces are known: what nobody
    /// desires is let go.
    pub fn run(&mut self, store: &mut dyn Store, compiler: &PolicyCompiler) -> Report {
        let mut report = Report::default();
        let writes = self.programmed.writes;
        if self.unused == Unused::AfterRun {
            self.unused = Unused::Some;
        }
        let wanted = self.wanted(compiler);
        // Those of pods whose interface is not known yet, too.
        let needed = compiler.pods().values().flat_map(|pod| [pod.sets, pod.audit]);
        let needed: BTreeSet<SetId> = needed.flatten().filter(|set| *set != SET_NONE).collect();
        if needed.is_empty() {
            self.open(store, &mut report);
        } else {
            self.enforce(store, compiler, &wanted, &needed, &mut report);
        }
        report.writes = self.programmed.writes - writes;
        report
    }

    fn wanted(&self, compiler: &PolicyCompiler) -> Wanted {
        let pods = self.bound.iter().filter_map(|(ifindex, pod)| {
            let policy = compiler.pods().get(&pod.name)?;
            let ([ingress, egress], [audit_ingress, audit_egress]) = (policy.sets, policy.audit);
            Some((*ifindex, [ingress, egress, audit_ingress, audit_egress]))
        });
        pods.collect()
    }

    /// No policy has a say: nothing is asked any more.
    fn open(&mut self, store: &mut dyn Store, report: &mut Report) {
        let images: Vec<SetId> = self.programmed.images.keys().copied().collect();
        for set in images {
            self.programmed.retire(set);
        }
        self.found = None;
        self.is_on = false;
        self.touched.clear();
        self.leaving.clear();
        self.is_stale = false;
        if self.programmed.revision != REVISION_NONE {
            let outcome = self.programmed.write_revision(store, REVISION_NONE);
            self.is_stale = !report.is_written("the revision of policies".to_owned(), &outcome);
        }
    }

    fn enforce(
        &mut self,
        store: &mut dyn Store,
        compiler: &PolicyCompiler,
        wanted: &Wanted,
        needed: &BTreeSet<SetId>,
        report: &mut Report,
    ) {
        if !self.is_on {
            self.is_on = true;
            self.waiting.is_off = false;
            self.touched = self.programmed.places.keys().copied().collect();
            self.touched
                .extend(compiler.classes().places().map(|(place, _)| place));
            if let Some(rules) = self.found.take() {
                self.adopt(compiler, wanted, needed, &rules);
            }
        }
        self.touched.append(&mut self.leaving);
        self.delete_pods(store, wanted, report);
        let images = self.programmed.images.keys().copied();
        let retired: Vec<SetId> = images.filter(|set| !needed.contains(set)).collect();
        for set in retired {
            self.programmed.retire(set);
        }
        for set in self.conflicts(compiler, wanted) {
            self.programmed.retire(set);
        }
        let mut broken: BTreeMap<SetId, Failure> = BTreeMap::new();
        for set in needed {
            if !self.programmed.images.contains_key(set)
                && let Err(error) = self.programmed.build(store, compiler, *set)
            {
                broken.insert(*set, Failure::from(&error));
            }
        }
        self.put_places(store, compiler, report);
        self.find_opened(compiler, report, &mut broken);
        self.put_pods(store, wanted, &broken, report);
        if self.is_stale || self.programmed.revision == REVISION_NONE {
            let revision = self.next_revision();
            let outcome = self.programmed.write_revision(store, revision);
            self.is_stale = !report.is_written("the revision of policies".to_owned(), &outcome);
        }
    }

    /// Closes interfaces that belong to no pod any more, before anything else changes what they may.
    fn delete_pods(&mut self, store: &mut dyn Store, wanted: &Wanted, report: &mut Report) {
        let pods = self.programmed.pods.keys().copied();
        let gone: Vec<u32> = pods.filter(|ifindex| !wanted.contains_key(ifindex)).collect();
        for ifindex in gone {
            let outcome = self.programmed.delete_pod(store, ifindex);
            self.is_stale |= report.is_written(format!("policies of interface {ifindex}"), &outcome);
        }
    }

    /// The sets of which some pods are led away while an address becomes another to them. Those pods keep the set as it is,
    /// and the others get a copy.
    fn conflicts(&self, compiler: &PolicyCompiler, wanted: &Wanted) -> Vec<SetId> {
        let image = |set: SetId| match set {
            SET_NONE => Some(SET_NONE),
            set => self.programmed.images.get(&set).copied(),
        };
        let mut left: BTreeMap<u32, Vec<&[IpAddr]>> = BTreeMap::new();
        for (ifindex, row) in &self.programmed.pods {
            let becomes = wanted.get(ifindex).map(|sets| sets.map(image));
            let own = self.bound.get(ifindex).map_or(&[][..], |pod| &pod.addrs);
            for (at, set) in sets_of(row).into_iter().enumerate() {
                if becomes.is_none_or(|sets| sets[at] != Some(set)) {
                    left.entry(set).or_default().push(own);
                }
            }
        }
        if left.is_empty() {
            return Vec::new();
        }
        // Many places move alike.
        let mut moving: BTreeMap<(u32, ClassId), Vec<Place>> = BTreeMap::new();
        for (place, class, label) in self.moving(compiler) {
            moving.entry((class, label)).or_default().push(place);
        }
        let images = self.programmed.images.iter();
        let images = images.filter(|(set, image)| {
            let Some(pods) = left.get(image) else {
                return false;
            };
            moving.iter().any(|(&(class, label), places)| {
                // A pod always reaches itself.
                let is_own = |place: &Place| {
                    let is_among = |own: &&[IpAddr]| matches!(place, Place::Addr(addr) if own.contains(addr));
                    pods.iter().all(is_among)
                };
                self.programmed.row(**image, class) != build::row(compiler, **set, label)
                    && !places.iter().all(is_own)
            })
        });
        images.map(|(set, _)| *set).collect()
    }

    fn put_pods(
        &mut self,
        store: &mut dyn Store,
        wanted: &Wanted,
        broken: &BTreeMap<SetId, Failure>,
        report: &mut Report,
    ) {
        for (ifindex, sets) in wanted {
            let [ingress, egress, audit_ingress, audit_egress] = *sets;
            let image = |set: SetId| match set {
                SET_NONE => Some(SET_NONE),
                set if broken.contains_key(&set) => None,
                set => self.programmed.images.get(&set).copied(),
            };
            let object = self.bound.get(ifindex).map(|pod| ObjectRef {
                kind: Kind::Pod,
                name: pod.name.clone(),
            });
            for (at, set) in sets.iter().enumerate() {
                if let Some(failure) = broken.get(set) {
                    let direction = Direction::ALL[at % 2];
                    let (entry, means) = if at < 2 {
                        (closed_entry(direction), "nothing is allowed")
                    } else {
                        let entry = format!("{} policies of the dry run", direction.as_str());
                        (entry, "not reported")
                    };
                    let subject = Subject {
                        object: object.clone(),
                        entry,
                    };
                    let reason = format!("{}: {means}", failure.reason);
                    report.failed.insert(subject, Failure { reason, ..*failure });
                }
            }
            let row = PodPolicy {
                ingress: image(ingress).unwrap_or(SET_CLOSED),
                egress: image(egress).unwrap_or(SET_CLOSED),
                audit_ingress: image(audit_ingress).or(image(ingress)).unwrap_or(SET_CLOSED),
                audit_egress: image(audit_egress).or(image(egress)).unwrap_or(SET_CLOSED),
            };
            if self.programmed.pods.get(ifindex) == Some(&row) {
                continue;
            }
            let subject = Subject {
                object,
                entry: format!("policies of interface {ifindex}"),
            };
            let outcome = self.programmed.put_pod(store, *ifindex, row);
            self.is_stale |= report.is_written(subject, &outcome);
        }
    }

    fn next_revision(&mut self) -> u32 {
        if self.last_revision == REVISION_NONE {
            // Flows may remember numbers of an earlier process.
            self.last_revision = RandomState::new().hash_one(0) as u32;
        }
        self.last_revision = self.last_revision.wrapping_add(1).max(REVISION_NONE + 1);
        self.last_revision
    }
}

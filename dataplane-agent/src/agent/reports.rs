//! What the agent tells of its work: progress, refused objects, what is served.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use super::Agent;
use crate::{
    events::{Event, Reason},
    metrics,
    model::{Cause, Kind, Name, ObjectRef, Problem, Rejected},
    served::{self, Served, ServedObject},
    sync::{Failure, Subject},
};

impl Agent {
    pub(super) fn publish_progress(&mut self) {
        self.report_rejected();
        let host_revision = self.host.as_ref().map_or(0, |host| host.wanted_revision);
        let started = self.complete && self.host.is_some();
        let settled =
            started && self.failed.is_empty() && self.syncer.is_settled() && self.policy_syncer.is_settled();
        let conditions = served::conditions(&self.problems());
        self.progress.send_modify(|progress| {
            progress.alive = Instant::now();
            progress.taken = self.taken;
            progress.failing_since = self.failing_since;
            progress.synced = self.synced;
            progress.leaving = self.index.node().is_some_and(|node| node.leaving);
            // What finds no room does not keep this node from serving the rest.
            progress.started |= started && !self.failed.values().any(|failure| failure.refused);
            if settled {
                progress.revision = self.taken;
                progress.host_revision = host_revision;
            }
            progress.conditions = conditions;
            progress.rejected = self.rejected.iter().map(ToString::to_string).collect();
            progress.failed = self
                .failed
                .iter()
                .map(|(what, failure)| format!("{what}: {}", failure.reason))
                .collect();
        });
    }

    /// Tells what is newly rejected, and counts all that is not served.
    fn report_rejected(&mut self) {
        let origin = |object: &ObjectRef| self.origins.get(object).cloned();
        let of_health_checks = self.health_checks.refused().into_iter().map(|(service, reason)| {
            let object = ObjectRef::service(&service);
            Rejected {
                origin: origin(&object),
                object: object.to_string(),
                problem: Problem::new("spec.healthCheckNodePort", reason).because(Cause::Conflict),
            }
        });
        let of_objects = self.compiler.rejected(origin).into_iter();
        let of_source = self.source_rejected.iter().cloned();
        let all = of_source.chain(of_objects).chain(of_health_checks);
        let rejected: BTreeSet<Rejected> = all
            .chain(self.rejected_by_policies())
            .chain(self.other_proxy())
            .chain(self.lost_pods())
            .collect();
        let event = |reason, one: &Rejected| Event {
            reason,
            regarding: one.object.parse().ok(),
            note: one.to_string(),
        };
        let new = rejected.difference(&self.rejected);
        let gone = self.rejected.difference(&rejected);
        let events: Vec<Event> = new
            .map(|one| event(reason_of(one), one))
            .chain(gone.map(|one| event(Reason::NoProblemAnyMore, one)))
            .collect();
        self.events.record(&events);
        self.rejected = rejected;
        self.metrics
            .count_problems(&metrics::count(self.rejected.iter(), self.failed.iter()));
    }

    /// The rules of kube-proxy on this node, if there are any.
    fn other_proxy(&self) -> Option<Rejected> {
        let rules = &self.host.as_ref()?.kube_proxy;
        if rules.is_empty() {
            return None;
        }
        let places: Vec<String> = rules.iter().map(ToString::to_string).collect();
        let reason = format!(
            "kube-proxy's rules are here ({}): what passes no hook of ours is served by them, and they cost every packet; keep its DaemonSet off this node, then remove them (docs/migration.md)",
            places.join(", ")
        );
        let object = ObjectRef {
            kind: Kind::Node,
            name: Name::new("", &self.node_name),
        };
        Some(Rejected {
            origin: None,
            object: object.to_string(),
            problem: Problem::new("", reason).because(Cause::OtherProxy),
        })
    }

    /// Takes over what could not be programmed, and tells what is new of it.
    pub(super) fn report_failed(&mut self, failed: BTreeMap<Subject, Failure>) {
        let event = |reason, subject: &Subject, failure: &Failure| Event {
            reason,
            regarding: subject.object.clone(),
            note: format!("{subject}: {}", failure.reason),
        };
        let mut events = Vec::new();
        for (subject, failure) in &failed {
            if self.failed.get(subject) != Some(failure) {
                let reason = if failure.refused {
                    Reason::WriteRefused
                } else {
                    Reason::TableFull
                };
                events.push(event(reason, subject, failure));
            }
        }
        let gone = self
            .failed
            .iter()
            .filter(|(subject, _)| !failed.contains_key(subject));
        events.extend(gone.map(|(subject, failure)| event(Reason::NoProblemAnyMore, subject, failure)));
        self.events.record(&events);
        self.failed = failed;
    }

    /// Everything that is not served.
    pub(super) fn problems(&self) -> Vec<served::Problem> {
        let rejected = self.rejected.iter().map(served::Problem::from);
        let failed = self.failed.iter().map(served::Problem::from);
        rejected.chain(failed).collect()
    }

    pub(super) fn served(&self) -> Served {
        let mut wanted: Vec<_> = self.syncer.wanted().collect();
        wanted.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
        let problems = self.problems();
        Served {
            conditions: served::conditions(&problems),
            objects: wanted
                .into_iter()
                .filter_map(|(object, compiled)| {
                    ServedObject::of(&object, &compiled, |balancer| {
                        if self.failed.is_empty() {
                            balancer.backends.len()
                        } else {
                            self.syncer.written_endpoints(&*self.store, &object, balancer)
                        }
                    })
                })
                .collect(),
            problems,
        }
    }
}

fn reason_of(rejected: &Rejected) -> Reason {
    match rejected.problem.cause {
        Cause::Unfollowed => Reason::SourceNotFollowed,
        Cause::OtherProxy => Reason::OtherProxy,
        _ => Reason::NotServed,
    }
}

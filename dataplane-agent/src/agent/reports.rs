//! What the agent tells of its work: progress, refused objects, what is served.

use std::{collections::BTreeSet, time::Instant};

use super::Agent;
use crate::{
    model::{ObjectRef, Problem, Rejected},
    served::{self, Served, ServedObject},
};

impl Agent {
    pub(super) fn publish_progress(&mut self) {
        self.report_rejected();
        let host_revision = self.host.as_ref().map_or(0, |host| host.wanted_revision);
        let started = self.complete && self.host.is_some();
        let settled = started && self.failed.is_empty() && self.syncer.is_settled();
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
            progress.rejected = self.rejected.iter().map(ToString::to_string).collect();
            progress.failed = self
                .failed
                .iter()
                .map(|(what, failure)| format!("{what}: {}", failure.reason))
                .collect();
        });
    }

    /// Logs what is newly rejected.
    fn report_rejected(&mut self) {
        let origin = |object: &ObjectRef| self.origins.get(object).cloned();
        let of_health_checks = self.health_checks.refused().into_iter().map(|(service, reason)| {
            let object = ObjectRef::service(&service);
            Rejected {
                origin: origin(&object),
                object: object.to_string(),
                problem: Problem::new("spec.healthCheckNodePort", reason),
            }
        });
        let of_objects = self.compiler.rejected(origin).into_iter();
        let of_source = self.source_rejected.iter().cloned();
        let rejected: BTreeSet<Rejected> = of_source.chain(of_objects).chain(of_health_checks).collect();
        for one in rejected.difference(&self.rejected) {
            tracing::warn!("rejected: {one}");
        }
        for one in self.rejected.difference(&rejected) {
            tracing::info!("no longer rejected: {one}");
        }
        self.rejected = rejected;
    }

    pub(super) fn served(&self) -> Served {
        let mut wanted: Vec<_> = self.syncer.wanted().collect();
        wanted.sort_unstable_by_key(|(object, _)| *object);
        let rejected = self.rejected.iter().map(served::Problem::from);
        let failed = self.failed.iter().map(served::Problem::from);
        Served {
            objects: wanted
                .into_iter()
                .filter_map(|(object, compiled)| ServedObject::of(object, compiled))
                .collect(),
            problems: rejected.chain(failed).collect(),
        }
    }
}

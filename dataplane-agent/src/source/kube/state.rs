//! What the source has read, when, and what it cost: for `status` and `/metrics`.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{metrics::source::SourceMetrics, model::Kind};

/// How far a kind is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Never read.
    #[default]
    Waiting,
    Listed,
    /// The cluster has no such kind.
    Absent,
}

impl Phase {
    pub const fn as_str(self) -> &'static str {
        match self {
            Phase::Waiting => "waiting",
            Phase::Listed => "listed",
            Phase::Absent => "absent",
        }
    }
}

/// What is known of a kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KindState {
    pub phase: Phase,
    pub objects: usize,
    /// Lists that were read to their end.
    pub lists: u64,
    /// When something last came of it: a list, a change or a bookmark.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_event: Option<Timestamp>,
    /// Requests that failed.
    pub errors: u64,
    /// Why it is not followed at the moment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failing: Option<String>,
}

/// What `status` shows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The address in use.
    pub server: String,
    pub requests: u64,
    /// Bodies of answers, in bytes.
    pub received_bytes: u64,
    pub kinds: BTreeMap<String, KindState>,
}

/// The state of a source. Clones are the same one.
#[derive(Clone, Debug)]
pub struct State {
    metrics: SourceMetrics,
    report: Arc<Mutex<Report>>,
}

impl State {
    pub fn new(metrics: SourceMetrics) -> Self {
        metrics.begin();
        Self {
            metrics,
            report: Arc::default(),
        }
    }

    pub fn report(&self) -> Report {
        self.lock().clone()
    }

    /// A request was sent to `server`.
    pub fn requested(&self, server: &str) {
        self.metrics.requests.inc();
        let mut report = self.lock();
        report.requests += 1;
        if report.server != server {
            server.clone_into(&mut report.server);
        }
    }

    /// It was answered with this HTTP status, or not at all.
    pub fn answered(&self, server: &str, method: &str, status: Option<u16>) {
        self.metrics.answered(server, method, status);
    }

    pub fn received(&self, bytes: usize) {
        self.metrics.received_bytes.inc_by(bytes as u64);
        self.lock().received_bytes += bytes as u64;
    }

    /// Something has come of a kind, so it is followed.
    pub fn heard(&self, kind: Kind) {
        self.metrics.heard(kind);
        self.of(kind, |state| {
            state.last_event = Some(Timestamp::now());
            state.failing = None;
        });
    }

    /// A list of a kind was read to its end.
    pub fn listed(&self, kind: Kind) {
        self.metrics.lists.with_label_values(&[kind.as_str()]).inc();
        self.of(kind, |state| {
            state.phase = Phase::Listed;
            state.lists += 1;
        });
        self.heard(kind);
        self.metrics.phase(kind, Phase::Listed);
    }

    /// The cluster has no such kind. `elsewhere`: what it has in its place, if that is somebody's mistake.
    pub fn absent(&self, kind: Kind, elsewhere: Option<String>) {
        self.of(kind, |state| {
            state.phase = Phase::Absent;
            state.failing = elsewhere;
        });
        self.metrics.phase(kind, Phase::Absent);
    }

    /// So many objects of a kind are held.
    pub fn holds(&self, kind: Kind, objects: usize) {
        self.of(kind, |state| state.objects = objects);
    }

    /// A request for a kind failed.
    pub fn failed(&self, kind: Kind, reason: &str) {
        self.metrics.errors.with_label_values(&[kind.as_str()]).inc();
        self.of(kind, |state| {
            state.errors += 1;
            state.failing = Some(reason.to_owned());
        });
    }

    /// A Kubernetes Event was taken by the server.
    pub fn event_sent(&self) {
        self.metrics.events_sent.inc();
    }

    /// A Kubernetes Event was not sent.
    pub fn event_dropped(&self) {
        self.metrics.events_dropped.inc();
    }

    fn of(&self, kind: Kind, change: impl FnOnce(&mut KindState)) {
        change(self.lock().kinds.entry(kind.as_str().to_owned()).or_default());
    }

    fn lock(&self) -> MutexGuard<'_, Report> {
        self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

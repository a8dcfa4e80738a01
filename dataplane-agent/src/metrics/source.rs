//! What is counted of the API server as a source.

use std::time::SystemTime;

use prometheus::{GaugeVec, IntCounter, IntCounterVec, IntGaugeVec, Opts, Registry};

use crate::{model::Kind, source::kube::state::Phase};

/// Counts of requests and of what came. Clones count together.
#[derive(Clone, Debug)]
pub struct SourceMetrics {
    pub requests: IntCounter,
    by_outcome: IntCounterVec,
    pub received_bytes: IntCounter,
    pub lists: IntCounterVec,
    pub errors: IntCounterVec,
    pub events_sent: IntCounter,
    pub events_dropped: IntCounter,
    listed: IntGaugeVec,
    last_event: GaugeVec,
}

impl SourceMetrics {
    pub fn new(registry: &Registry) -> prometheus::Result<Self> {
        let kind = &["kind"];
        let counters = |name: &str, help: &str| IntCounterVec::new(Opts::new(name, help), kind);
        let metrics = Self {
            requests: IntCounter::new("dataplane_source_requests_total", "Requests to the API server")?,
            by_outcome: IntCounterVec::new(
                Opts::new(
                    "rest_client_requests_total",
                    "Requests to the API server by HTTP status, method and host, as Kubernetes' own clients count them; the status is `<error>` where there was no answer",
                ),
                &["code", "method", "host"],
            )?,
            received_bytes: IntCounter::new(
                "dataplane_source_received_bytes_total",
                "What the API server has answered, in bytes, without headers",
            )?,
            lists: counters(
                "dataplane_source_lists_total",
                "Lists that were read to their end, by kind; more than one: a watch was lost for too long",
            )?,
            errors: counters("dataplane_source_errors_total", "Requests that failed, by kind")?,
            events_sent: IntCounter::new(
                "dataplane_kubernetes_events_sent_total",
                "Kubernetes Events that the API server has taken",
            )?,
            events_dropped: IntCounter::new(
                "dataplane_kubernetes_events_dropped_total",
                "Kubernetes Events that were too many, or that the API server did not take",
            )?,
            listed: IntGaugeVec::new(
                Opts::new(
                    "dataplane_source_listed",
                    "1 when a kind has been read, or does not exist in this cluster; nothing is deleted from the tables before all have",
                ),
                kind,
            )?,
            last_event: GaugeVec::new(
                Opts::new(
                    "dataplane_source_last_event_timestamp_seconds",
                    "When a list, a change or a bookmark of a kind last came, in seconds since 1970",
                ),
                kind,
            )?,
        };
        registry.register(Box::new(metrics.requests.clone()))?;
        registry.register(Box::new(metrics.by_outcome.clone()))?;
        registry.register(Box::new(metrics.received_bytes.clone()))?;
        registry.register(Box::new(metrics.lists.clone()))?;
        registry.register(Box::new(metrics.errors.clone()))?;
        registry.register(Box::new(metrics.events_sent.clone()))?;
        registry.register(Box::new(metrics.events_dropped.clone()))?;
        registry.register(Box::new(metrics.listed.clone()))?;
        registry.register(Box::new(metrics.last_event.clone()))?;
        Ok(metrics)
    }

    /// Shows every kind, before anything has come: there is an API server to read. Of a folder, no kind is shown.
    pub fn begin(&self) {
        for kind in Kind::ALL {
            let label = &[kind.as_str()];
            self.lists.with_label_values(label);
            self.errors.with_label_values(label);
            self.listed.with_label_values(label);
            self.last_event.with_label_values(label);
        }
    }

    /// A request was answered with an HTTP status, or not at all. `server`: its URL.
    pub fn answered(&self, server: &str, method: &str, status: Option<u16>) {
        let code = status.map_or_else(|| "<error>".to_owned(), |status| status.to_string());
        let host = server.split_once("://").map_or(server, |(_, host)| host);
        self.by_outcome.with_label_values(&[&*code, method, host]).inc();
    }

    #[expect(clippy::disallowed_methods, reason = "Prometheus reads it")]
    pub fn heard(&self, kind: Kind) {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        self.last_event
            .with_label_values(&[kind.as_str()])
            .set(since.map_or(0.0, |since| since.as_secs_f64()));
    }

    pub fn phase(&self, kind: Kind, phase: Phase) {
        self.listed
            .with_label_values(&[kind.as_str()])
            .set(i64::from(phase != Phase::Waiting));
    }
}

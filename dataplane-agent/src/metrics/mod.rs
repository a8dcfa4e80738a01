//! What Prometheus reads at `/metrics`: kube-proxy's names where they exist, so that alerts on them keep working, ours
//! beside them. Every label takes one of a few values, which are known at build time, but for those that name a policy, an API server
//! or, where that is switched on, a Service; so many of these have series of their own at the most.
//!
//! [`Metrics`] is what the agent's loop counts; [`kernel_side`] is read from the maps when somebody asks, and [`policies`] and
//! [`services`] are asked of the loop.

pub mod kernel_side;
pub mod policies;
pub mod services;
pub mod source;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use hyper::Uri;
use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder, core::Collector, process_collector::ProcessCollector,
};
use tokio::time;

use policies::ByRule;
use services::OverServices;
use source::SourceMetrics;

use crate::{
    enforced::Enforced,
    events,
    health::{
        Health,
        http::{self, Answer},
    },
    model::{Cause, Kind, Rejected},
    sync::{Failure, Subject},
};

/// Between attempts to get an address that somebody else has.
const LISTEN_AGAIN: Duration = Duration::from_secs(5);
/// The label of what belongs to no object of a known kind.
const NO_KIND: &str = "none";

const WITHOUT_LOCAL: &str = "kubeproxy_sync_proxy_rules_no_local_endpoints_total";

/// Everything that is counted. Clones count together.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Registry,
    /// From the begin of a run over what has changed to its last write.
    pub sync_duration: Histogram,
    /// From the change of an endpoint, as its slice says, until it was programmed.
    pub programming_duration: Histogram,
    last_sync: Gauge,
    last_queued: Gauge,
    service_changes: Changes,
    endpoint_changes: Changes,
    without_local: IntGaugeVec,
    /// Answers of probes, by path.
    probes: [(&'static str, IntCounterVec); 2],
    objects: IntGaugeVec,
    problems: IntGaugeVec,
    events: IntCounterVec,
    pub writes: IntCounter,
    failures: IntCounterVec,
    pub retries: IntCounter,
    pub source: SourceMetrics,
    policies: Arc<Mutex<ByRule>>,
}

/// Changes of objects of a kind.
#[derive(Clone, Debug)]
struct Changes {
    total: IntCounter,
    /// Those that no synchronisation has followed yet.
    pending: IntGauge,
}

impl Changes {
    fn new(kind: &str, objects: &str) -> prometheus::Result<Self> {
        Ok(Self {
            total: IntCounter::new(
                format!("kubeproxy_sync_proxy_rules_{kind}_changes_total"),
                format!("Changes of {objects} that were taken in"),
            )?,
            pending: IntGauge::new(
                format!("kubeproxy_sync_proxy_rules_{kind}_changes_pending"),
                format!(
                    "Changes of {objects} that were taken in since the tables were last brought up to date"
                ),
            )?,
        })
    }

    fn count(&self) {
        self.total.inc();
        self.pending.inc();
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// # Panics
    /// Not after the tests: names and labels are constants.
    pub fn new() -> Self {
        let made = Self::try_new();
        #[expect(
            clippy::unwrap_used,
            reason = "names and labels are constants, and a test makes them"
        )]
        made.unwrap()
    }

    fn try_new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let counters =
            |name: &str, help: &str, labels: &[&str]| IntCounterVec::new(Opts::new(name, help), labels);
        let gauges =
            |name: &str, help: &str, labels: &[&str]| IntGaugeVec::new(Opts::new(name, help), labels);
        let metrics = Self {
            sync_duration: Histogram::with_opts(
                HistogramOpts::new(
                    "kubeproxy_sync_proxy_rules_duration_seconds",
                    "Time from the begin of a synchronisation to its last write, in seconds",
                )
                .buckets(prometheus::exponential_buckets(0.001, 2.0, 15)?),
            )?,
            programming_duration: Histogram::with_opts(
                HistogramOpts::new(
                    "kubeproxy_network_programming_duration_seconds",
                    "Time from the change of an endpoint, as its EndpointSlice says, until it was programmed, in seconds",
                )
                .buckets(programming_buckets()),
            )?,
            last_sync: Gauge::new(
                "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
                "When the tables were last brought up to date, in seconds since 1970",
            )?,
            last_queued: Gauge::new(
                "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
                "When something last came that the tables have to follow, in seconds since 1970",
            )?,
            service_changes: Changes::new("service", "Services")?,
            endpoint_changes: Changes::new("endpoint", "EndpointSlices")?,
            without_local: gauges(
                WITHOUT_LOCAL,
                "Ports of Services, in each family, that drop because the traffic policy is Local and all endpoints are on other nodes",
                &["traffic_policy"],
            )?,
            probes: [
                (
                    "/healthz",
                    counters(
                        "kubeproxy_proxy_healthz_total",
                        "Answers at `/healthz`, by HTTP status",
                        &["code"],
                    )?,
                ),
                (
                    "/livez",
                    counters(
                        "kubeproxy_proxy_livez_total",
                        "Answers at `/livez`, by HTTP status",
                        &["code"],
                    )?,
                ),
            ],
            objects: gauges("dataplane_objects", "Objects known, by kind", &["kind"])?,
            problems: gauges(
                "dataplane_problems",
                "What is not served at the moment, by the kind of object and the cause; `services --problems` lists it",
                &["kind", "cause"],
            )?,
            events: counters(
                "dataplane_events_total",
                "Events about objects, by Kubernetes' type and reason",
                &["type", "reason"],
            )?,
            writes: IntCounter::new("dataplane_table_writes_total", "Entries written to tables or deleted there")?,
            failures: counters(
                "dataplane_sync_failures_total",
                "Entries that a synchronisation could not program, by cause; each try counts",
                &["cause"],
            )?,
            retries: IntCounter::new(
                "dataplane_sync_retries_total",
                "Synchronisations that only tried again what had failed",
            )?,
            source: SourceMetrics::new(&registry)?,
            policies: Arc::default(),
            registry,
        };
        metrics.register()?;
        metrics.start_at_zero();
        Ok(metrics)
    }

    fn register(&self) -> prometheus::Result<()> {
        let Self {
            registry,
            sync_duration,
            programming_duration,
            last_sync,
            last_queued,
            service_changes,
            endpoint_changes,
            without_local,
            probes: [(_, healthz), (_, livez)],
            objects,
            problems,
            events,
            writes,
            failures,
            retries,
            source: _,
            policies: _,
        } = self;
        let build_info = Gauge::with_opts(
            Opts::new("dataplane_build_info", "1; the labels say what runs")
                .const_label("version", env!("CARGO_PKG_VERSION")),
        )?;
        build_info.set(1.0);
        let collectors: [Box<dyn Collector>; 19] = [
            Box::new(build_info),
            Box::new(sync_duration.clone()),
            Box::new(programming_duration.clone()),
            Box::new(last_sync.clone()),
            Box::new(last_queued.clone()),
            Box::new(service_changes.total.clone()),
            Box::new(service_changes.pending.clone()),
            Box::new(endpoint_changes.total.clone()),
            Box::new(endpoint_changes.pending.clone()),
            Box::new(without_local.clone()),
            Box::new(healthz.clone()),
            Box::new(livez.clone()),
            // As client libraries have it: CPU time, memory, descriptors.
            Box::new(ProcessCollector::for_self()),
            Box::new(objects.clone()),
            Box::new(problems.clone()),
            Box::new(events.clone()),
            Box::new(writes.clone()),
            Box::new(failures.clone()),
            Box::new(retries.clone()),
        ];
        collectors.into_iter().try_for_each(|one| registry.register(one))
    }

    /// Series that alerts compare with their past exist from the start.
    fn start_at_zero(&self) {
        for kind in Kind::ALL {
            self.objects.with_label_values(&[kind.as_str()]);
        }
        for reason in events::Reason::ALL {
            self.events
                .with_label_values(&[reason.kind().as_str(), reason.as_str()]);
        }
        for cause in [Cause::TableFull, Cause::WriteRefused] {
            self.failures.with_label_values(&[cause.as_str()]);
        }
        self.count_problems(&BTreeMap::new());
        self.count_without_local(0, 0);
    }

    /// Sets how many ports of Services drop for want of a local endpoint, by whose traffic policy.
    pub fn count_without_local(&self, internal: usize, external: usize) {
        for (policy, ports) in [("internal", internal), ("external", external)] {
            self.without_local
                .with_label_values(&[policy])
                .set(i64::try_from(ports).unwrap_or(i64::MAX));
        }
    }

    /// Adds what is read from the datapath's maps whenever somebody asks.
    pub fn add(&self, collector: impl Collector + 'static) -> prometheus::Result<()> {
        self.registry.register(Box::new(collector))
    }

    /// Something has come that the tables have to follow.
    pub fn queued(&self) {
        self.last_queued.set(since_1970());
    }

    /// The tables are up to date.
    pub fn synced(&self) {
        self.last_sync.set(since_1970());
        self.service_changes.pending.set(0);
        self.endpoint_changes.pending.set(0);
    }

    /// A probe was answered with this status.
    pub fn probed(&self, path: &str, status: u16) {
        for (_, answers) in self.probes.iter().filter(|(of, _)| *of == path) {
            answers.with_label_values(&[&status.to_string()]).inc();
        }
    }

    /// A change of an object was taken in, of whose kind there are so many now.
    pub fn changed(&self, kind: Kind) {
        match kind {
            Kind::Service => self.service_changes.count(),
            Kind::EndpointSlice => self.endpoint_changes.count(),
            _ => {}
        }
    }

    /// So many objects of a kind are known.
    pub fn count_objects(&self, kind: Kind, objects: usize) {
        self.objects
            .with_label_values(&[kind.as_str()])
            .set(i64::try_from(objects).unwrap_or(i64::MAX));
    }

    pub fn event(&self, reason: events::Reason, times: usize) {
        self.events
            .with_label_values(&[reason.kind().as_str(), reason.as_str()])
            .inc_by(times as u64);
    }

    pub fn failed<'a>(&self, failures: impl Iterator<Item = &'a Failure>) {
        for failure in failures {
            self.failures.with_label_values(&[failure.cause().as_str()]).inc();
        }
    }

    /// Sets how much is not served.
    pub fn count_problems(&self, counts: &BTreeMap<(&'static str, Cause), i64>) {
        let kinds = Kind::ALL.map(Kind::as_str);
        for kind in kinds.into_iter().chain([NO_KIND]) {
            for cause in Cause::ALL {
                let count = counts.get(&(kind, cause)).copied().unwrap_or(0);
                self.problems
                    .with_label_values(&[kind, cause.as_str()])
                    .set(count);
            }
        }
    }

    /// The page, in Prometheus' text format.
    pub fn page(
        &self,
        enforced: Option<&Enforced>,
        over_services: Option<&OverServices>,
    ) -> prometheus::Result<String> {
        let mut families = self.registry.gather();
        if let Some(enforced) = enforced {
            let mut policies = self.policies.lock().unwrap_or_else(PoisonError::into_inner);
            families.extend(policies.families(enforced));
        }
        families.extend(over_services.into_iter().flat_map(OverServices::families));
        // The registry leaves them out too, and none can be written.
        families.retain(|family| !family.get_metric().is_empty());
        let mut page = Vec::new();
        TextEncoder::new().encode(&families, &mut page)?;
        let page = String::from_utf8_lossy(&page);
        // kube-proxy gives a gauge the name of a counter. Without a type it is neither, and alerts on it work all the same.
        Ok(page.replace(
            &format!("# TYPE {WITHOUT_LOCAL} gauge\n"),
            &format!("# TYPE {WITHOUT_LOCAL} untyped\n"),
        ))
    }

    /// Serves the page. While somebody else has the address, it is tried again.
    pub async fn serve(self, addr: SocketAddr, agent: Health) {
        let metrics = Arc::new((self, agent));
        let answer = move |uri: Uri| {
            let metrics = metrics.clone();
            async move {
                if uri.path() != "/metrics" {
                    return Answer::not_found();
                }
                let (metrics, agent) = &*metrics;
                let enforced = agent.enforced().await;
                let over_services = agent.over_services().await;
                // Reading maps takes the kernel a moment.
                let page =
                    tokio::task::block_in_place(|| metrics.page(enforced.as_ref(), over_services.as_ref()));
                page.map_or_else(|_| Answer::of_health(false, "{}\n".to_owned()), Answer::text)
            }
        };
        let mut told = false;
        loop {
            match http::listen(addr) {
                Ok(listener) => return http::serve(listener, answer).await,
                Err(error) if !told => {
                    told = true;
                    tracing::warn!(%addr, %error, "failed to listen for metrics, trying again");
                }
                Err(_) => {}
            }
            time::sleep(LISTEN_AGAIN).await;
        }
    }
}

/// kube-proxy's: quarters and halves of a second, seconds up to a minute, then ever fewer up to five minutes.
fn programming_buckets() -> Vec<f64> {
    let seconds = (1..60).map(f64::from);
    let fives = (12..24).map(|five| f64::from(five * 5));
    let halves = (4..=10).map(|half| f64::from(half * 30));
    [0.25, 0.5]
        .into_iter()
        .chain(seconds)
        .chain(fives)
        .chain(halves)
        .collect()
}

#[expect(clippy::disallowed_methods, reason = "Prometheus reads it")]
fn since_1970() -> f64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0.0, |since| since.as_secs_f64())
}

/// What is not served, by kind of object and cause.
pub fn count<'a>(
    rejected: impl Iterator<Item = &'a Rejected>,
    failed: impl Iterator<Item = (&'a Subject, &'a Failure)>,
) -> BTreeMap<(&'static str, Cause), i64> {
    let mut counts = BTreeMap::new();
    for one in rejected {
        let kind = one.object.split(' ').next().and_then(Kind::parse);
        *counts
            .entry((kind.map_or(NO_KIND, Kind::as_str), one.problem.cause))
            .or_default() += 1;
    }
    for (subject, failure) in failed {
        let kind = subject
            .object
            .as_ref()
            .map_or(NO_KIND, |object| object.kind.as_str());
        *counts.entry((kind, failure.cause())).or_default() += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Problem;

    fn value(page: &str, series: &str) -> Option<f64> {
        let line = page.lines().find(|line| {
            line.strip_prefix(series)
                .is_some_and(|rest| rest.starts_with(' '))
        });
        line?.rsplit(' ').next()?.parse().ok()
    }

    #[test]
    fn problems_are_counted_by_kind_and_cause_and_go_away() {
        let metrics = Metrics::new();
        let rejected = |object: &str, cause| Rejected {
            origin: None,
            object: object.to_owned(),
            problem: Problem::new("spec", "reason").because(cause),
        };
        let some = [
            rejected("Service ns/a", Cause::Conflict),
            rejected("Service ns/b", Cause::Conflict),
            rejected("", Cause::Unreadable),
        ];
        let full = Failure {
            reason: "table FRONTENDS_V4 is full (1 entries)".to_owned(),
            refused: false,
        };
        let subject = Subject::from("backend 10.0.0.1:80/TCP".to_owned());
        metrics.count_problems(&count(some.iter(), [(&subject, &full)].into_iter()));
        let page = metrics.page(None, None).unwrap();
        let problems = |kind, cause| {
            value(
                &page,
                &format!("dataplane_problems{{cause=\"{cause}\",kind=\"{kind}\"}}"),
            )
        };
        assert_eq!(problems("Service", "conflict"), Some(2.0));
        assert_eq!(problems("none", "unreadable"), Some(1.0));
        assert_eq!(problems("none", "table-full"), Some(1.0));
        assert_eq!(problems("Pod", "invalid"), Some(0.0));
        metrics.count_problems(&BTreeMap::new());
        let page = metrics.page(None, None).unwrap();
        let series = "dataplane_problems{cause=\"conflict\",kind=\"Service\"}";
        assert_eq!(value(&page, series), Some(0.0));
    }

    #[test]
    fn kube_proxys_names_are_there() {
        let metrics = Metrics::new();
        metrics.sync_duration.observe(0.003);
        metrics.changed(Kind::EndpointSlice);
        metrics.synced();
        metrics.changed(Kind::Service);
        metrics.probed("/healthz", 503);
        metrics.probed("/readyz", 200);
        let page = metrics.page(None, None).unwrap();
        assert_eq!(
            value(&page, "kubeproxy_sync_proxy_rules_duration_seconds_count"),
            Some(1.0)
        );
        let bucket = "kubeproxy_sync_proxy_rules_duration_seconds_bucket{le=\"0.004\"}";
        assert_eq!(value(&page, bucket), Some(1.0));
        assert!(value(&page, "kubeproxy_sync_proxy_rules_last_timestamp_seconds").unwrap() > 1e9);
        assert_eq!(
            value(&page, "kubeproxy_sync_proxy_rules_service_changes_total"),
            Some(1.0)
        );
        assert_eq!(
            value(&page, "kubeproxy_network_programming_duration_seconds_count"),
            Some(0.0)
        );
        for (series, expected) in [
            ("kubeproxy_sync_proxy_rules_service_changes_pending", 1.0),
            ("kubeproxy_sync_proxy_rules_endpoint_changes_pending", 0.0),
            ("kubeproxy_proxy_healthz_total{code=\"503\"}", 1.0),
        ] {
            assert_eq!(value(&page, series), Some(expected), "{series}");
        }
        assert!(!page.contains("code=\"200\""), "{page}");
        assert!(value(&page, "process_resident_memory_bytes").unwrap() > 1e5);
        let buckets = programming_buckets();
        assert!(buckets.is_sorted(), "{buckets:?}");
    }

    /// What promtool says of a document, if it says anything.
    fn said_by(promtool: &std::ffi::OsStr, arguments: &[&str], document: &str) -> Result<(), String> {
        use std::io::Write as _;
        let mut child = std::process::Command::new(promtool)
            .args(arguments)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .map_err(|error| error.to_string())?;
        let stdin = child.stdin.take().expect("it is piped");
        (&stdin)
            .write_all(document.as_bytes())
            .map_err(|error| error.to_string())?;
        drop(stdin);
        let output = child.wait_with_output().map_err(|error| error.to_string())?;
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        if output.status.success() {
            Ok(())
        } else {
            Err(text)
        }
    }

    /// `cargo xtask test` names promtool in `PROMTOOL`.
    #[test]
    fn promtool_finds_nothing_wrong_with_metrics_alerts_and_dashboard() {
        let Some(promtool) = std::env::var_os("PROMTOOL") else {
            println!("skipped: PROMTOOL names no promtool (`cargo xtask test` does)");
            return;
        };
        let metrics = Metrics::new();
        metrics
            .add(kernel_side::KernelSide::new(std::path::Path::new("/nonexistent")))
            .unwrap();
        let page = metrics
            .page(Some(&policies::tests::enforced()), Some(&services::tests::over()))
            .unwrap();
        said_by(&promtool, &["check", "metrics"], &page).unwrap();
        let wrong = page.replace(
            "# TYPE dataplane_table_writes_total counter",
            "# TYPE dataplane_table_writes_total gauge",
        );
        assert!(
            said_by(&promtool, &["check", "metrics"], &wrong).is_err(),
            "it looks at them"
        );

        let alerts = include_str!("../../../deploy/helm/dataplane/files/alerts.yaml");
        let dashboard = include_str!("../../../deploy/helm/dataplane/files/dashboard.json");
        let dashboard: serde_json::Value = serde_json::from_str(dashboard).unwrap();
        let panels = dashboard["panels"].as_array().unwrap();
        let queries = panels
            .iter()
            .flat_map(|panel| panel["targets"].as_array().into_iter().flatten());
        let queries = queries.map(|target| target["expr"].as_str().unwrap().replace("$instance", ".*"));
        let recorded = queries.enumerate().map(|(number, query)| {
            format!(
                "      - record: panel:{number}\n        expr: {}\n",
                serde_json::json!(query)
            )
        });
        let recorded: Vec<String> = recorded.collect();
        assert!(recorded.len() > 8, "{recorded:?}");
        let rules = format!("{alerts}  - name: dashboard\n    rules:\n{}", recorded.concat());
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("rules.yaml");
        std::fs::write(&path, &rules).unwrap();
        said_by(&promtool, &["check", "rules", &path.display().to_string()], "").unwrap();
        std::fs::write(&path, alerts).unwrap();
        said_by(&promtool, &["check", "rules", &path.display().to_string()], "").unwrap();
    }

    /// `docs/metrics.md` is what the code says. To write it anew: `UPDATE_DOCS=1 cargo test -p dataplane-agent --lib reference`.
    #[test]
    fn the_reference_is_up_to_date() {
        let metrics = Metrics::new();
        metrics
            .add(kernel_side::KernelSide::new(std::path::Path::new("/nonexistent")))
            .unwrap();
        metrics.source.begin();
        metrics.source.answered("https://10.0.0.1:6443", "GET", Some(200));
        for path in ["/healthz", "/livez"] {
            metrics.probed(path, 200);
        }
        let mut families = metrics.registry.gather();
        let table = crate::attach::inspect::TableUse {
            name: "SERVICES",
            entries: 0,
            limit: 0,
        };
        families.retain(|family| !family.name().starts_with("dataplane_table_entries"));
        families.retain(|family| !family.name().starts_with("dataplane_table_limit"));
        families.extend(kernel_side::families(&[], &[table]));
        families.extend(ByRule::default().families(&policies::tests::enforced()));
        families.extend(services::tests::over().families());
        let mut rows: Vec<String> = families
            .iter()
            .map(|family| {
                let labels = family.get_metric().first().map_or_else(Vec::new, |metric| {
                    metric
                        .get_label()
                        .iter()
                        .map(|label| format!("`{}`", label.name()))
                        .collect()
                });
                let kind = format!("{:?}", family.get_field_type()).to_lowercase();
                format!(
                    "| `{}` | {kind} | {} | {} |\n",
                    family.name(),
                    labels.join(", "),
                    family.help()
                )
            })
            .collect();
        rows.sort();
        rows.dedup();
        let mut text = String::from(include_str!("head.md"));
        text.extend(rows);
        let causes = Cause::ALL.map(|cause| format!("| `{}` | {} |\n", cause.as_str(), cause.text()));
        text += "\n## Values of `cause`\n\n| cause | meaning |\n|---|---|\n";
        text.extend(causes);
        text +=
            "\n## Values of `type` and `reason` of events\n\n| type | reason | meaning |\n|---|---|---|\n";
        text.extend(events::Reason::ALL.iter().map(|reason| {
            format!(
                "| `{}` | `{}` | {} |\n",
                reason.kind().as_str(),
                reason.as_str(),
                reason.text()
            )
        }));
        text += "\n## Values of `reason` of packets\n\n| outcome | reason | meaning |\n|---|---|---|\n";
        text.extend(dataplane_common::reason::Reason::ALL.iter().map(|reason| {
            let (outcome, meaning) = kernel_side::outcome(*reason);
            format!("| `{outcome}` | `{}` | {meaning} |\n", reason.label())
        }));
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md");
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::create_dir_all(std::path::Path::new(path).parent().unwrap()).unwrap();
            std::fs::write(path, &text).unwrap();
        }
        assert_eq!(
            std::fs::read_to_string(path).unwrap(),
            text,
            "docs/metrics.md is not what the code says: UPDATE_DOCS=1 cargo test -p dataplane-agent --lib reference"
        );
    }
}

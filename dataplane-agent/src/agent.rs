//! The loop: batches of the source and observations of the machine in, table entries out.

mod claims;
mod explain;
mod load;
mod machine;
mod node_status;
mod pods;
mod policies;
mod reports;
mod run;
mod sockets;
mod takeover;
mod verdicts;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt, io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context;
use dataplane_common::device::own_flags;
use jiff::Timestamp;
use tokio::{
    sync::{mpsc, watch},
    task::{self, JoinHandle},
};

pub use self::run::run;
use self::{sockets::HostSockets, takeover::Takeover};
use crate::{
    bpf::sys,
    compile::{
        Compiler, Options,
        policy::{PolicyCompiler, Subjects},
    },
    config::{Config, NodePortAddresses, PolicyMode},
    events::{Event, Recorder},
    explain::why_unserved,
    health::{Ask, Progress, node_ports},
    host::{HostState, WantedPods},
    metrics::{Metrics, services::Counting},
    model::{Dirty, Index, Kind, Object, ObjectRef, Origin, Pod, Rejected},
    source::{Batch, Change},
    store::{Store, StoreError},
    sync::{Failure, Subject, Syncer, bound::BoundSyncer, policy::PolicySyncer},
};

/// The first wait after a failed write; it doubles up to [`RETRY_AT_MOST`].
const RETRY: Duration = Duration::from_millis(100);
const RETRY_AT_MOST: Duration = Duration::from_secs(30);
/// What was replaced is collected for so long before it is freed.
const RECLAIM_AFTER: Duration = Duration::from_millis(100);
/// A run of so many writes leaves much free memory behind.
const MANY_WRITES: usize = 10_000;
/// Verdicts of before a start wait so long for names.
const NAMES_WITHIN: Duration = Duration::from_secs(30);

/// Where the loop tells what it knows.
#[derive(Debug)]
pub struct Outward {
    pub wanted: watch::Sender<WantedPods>,
    pub progress: watch::Sender<Progress>,
    pub health_checks: node_ports::Servers,
    pub metrics: Metrics,
}

/// The state of the loop, and what it does at each turn.
pub struct Agent {
    node_name: String,
    node_port_addresses: NodePortAddresses,
    localhost_node_ports: bool,
    policy_mode: PolicyMode,
    index: Index,
    compiler: Compiler,
    syncer: Syncer,
    policies: PolicyCompiler,
    policy_syncer: PolicySyncer,
    bound_syncer: BoundSyncer,
    expected: pods::Expected,
    claims: claims::Claims,
    verdicts: verdicts::Kept,
    /// When verdicts are told without the names of who is not known yet.
    nameless_at: Instant,
    store: Box<dyn Store + Send>,
    sockets: Option<HostSockets>,
    tables: Option<explain::Tables>,
    takeover: Option<Takeover>,
    host: Option<HostState>,
    wanted: watch::Sender<WantedPods>,
    progress: watch::Sender<Progress>,
    health_checks: node_ports::Servers,
    metrics: Metrics,
    /// Where single Services have metrics.
    counting: Option<Counting>,
    events: Recorder,
    /// When endpoints changed that are not programmed yet, in nanoseconds since 1970.
    triggers: Vec<i64>,
    origins: HashMap<ObjectRef, Origin>,
    /// The source has been read completely.
    complete: bool,
    /// What is to be compiled once it has.
    dirty: Dirty,
    taken: u64,
    source_rejected: Vec<Rejected>,
    rejected: BTreeSet<Rejected>,
    failed: BTreeMap<Subject, Failure>,
    failing_since: Option<Instant>,
    synced: Timestamp,
    ignored: BTreeSet<String>,
    retry: Duration,
    retry_at: Option<Instant>,
    listen_at: Option<Instant>,
    reclaim_at: Option<Instant>,
}

impl fmt::Debug for Agent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Agent")
            .field("taken", &self.taken)
            .finish_non_exhaustive()
    }
}

impl Agent {
    /// Tells it what it follows: the servers, and who takes Kubernetes Events, if anybody does.
    fn follows(&mut self, servers: &[SocketAddr], events: Option<mpsc::Sender<Event>>) {
        self.compiler.reserve(servers);
        if let Some(events) = events {
            self.events.send_to(events);
        }
    }

    pub fn new(
        config: &Config,
        store: Box<dyn Store + Send>,
        syncer: Syncer,
        policy_syncer: PolicySyncer,
        bound_syncer: BoundSyncer,
        outward: Outward,
    ) -> Self {
        let Outward {
            wanted,
            progress,
            health_checks,
            metrics,
        } = outward;
        Self {
            node_name: config.node_name.clone(),
            node_port_addresses: config.node_port_addresses.clone(),
            localhost_node_ports: config.localhost_node_ports,
            policy_mode: config.policy_mode,
            index: Index::new(&config.node_name),
            compiler: Compiler::new(Options {
                external_ips: config.external_ips,
                source_ranges_for: config.source_ranges_for,
                service_echo: config.service_echo,
            }),
            syncer,
            policies: PolicyCompiler::new(Subjects::Node(config.node_name.as_str().into())),
            policy_syncer,
            bound_syncer,
            expected: pods::Expected::default(),
            claims: claims::Claims::default(),
            verdicts: verdicts::Kept::default(),
            nameless_at: Instant::now() + NAMES_WITHIN,
            store,
            sockets: None,
            tables: None,
            takeover: None,
            host: None,
            wanted,
            progress,
            health_checks,
            events: Recorder::new(metrics.clone()),
            counting: (config.service_metrics > 0).then(|| Counting::new(config.service_metrics as usize)),
            metrics,
            triggers: Vec::new(),
            origins: HashMap::new(),
            complete: false,
            dirty: Dirty::default(),
            taken: 0,
            source_rejected: Vec::new(),
            rejected: BTreeSet::new(),
            failed: BTreeMap::new(),
            failing_since: None,
            synced: Timestamp::UNIX_EPOCH,
            ignored: BTreeSet::new(),
            retry: RETRY,
            retry_at: None,
            listen_at: None,
            reclaim_at: None,
        }
    }

    /// Takes in what the source has found, and writes what follows from it.
    pub fn take_batch(&mut self, batch: Batch) {
        let Batch {
            revision,
            complete,
            changes,
            rejected,
            ignored,
        } = batch;
        let started = Instant::now();
        self.metrics.queued();
        for change in changes {
            let dirty = self.take_change(change);
            self.dirty.merge(dirty);
        }
        let is_first = complete && !self.complete;
        self.complete |= complete;
        self.taken = revision;
        self.source_rejected = rejected;
        for kind in ignored.into_keys() {
            if !self.ignored.contains(&kind) {
                tracing::info!(kind, "not read");
                self.ignored.insert(kind);
            }
        }
        if self.dirty.local_pods || self.dirty.node || !self.dirty.policy.pods.is_empty() {
            self.expected.forget_ranges();
        }
        if self.dirty.local_pods || self.dirty.node || is_first {
            self.publish_wanted(is_first);
        }
        if self.complete {
            let dirty = std::mem::take(&mut self.dirty);
            let updates = self.compiler.update(&self.index, &dirty);
            if is_first {
                // Before these are packed: that fills the room which the trees leave.
                self.index.pack_trees();
                self.compiler.pack_trees();
            }
            self.syncer.update(updates);
            let changes = self.policies.update(&self.index, &dirty.policy);
            self.policy_syncer.update(changes);
        }
        for kind in Kind::ALL {
            self.metrics.count_objects(kind, self.index.count(kind));
        }
        self.retry = RETRY;
        let writes = self.write(started);
        if is_first && writes < MANY_WRITES {
            // What loading the datapath and the first list took.
            sys::give_memory_back();
        }
    }

    /// How full the tables are: services, backends and elements of `MAGLEV`.
    pub fn usage(&self) -> (usize, usize, u32) {
        self.syncer.usage()
    }

    fn take_change(&mut self, change: Change) -> Dirty {
        match change {
            Change::Apply {
                key,
                mut object,
                origin,
            } => {
                self.metrics.changed(key.kind);
                if let (Object::Policy(policy), PolicyMode::DryRun) = (&mut object, self.policy_mode) {
                    Arc::make_mut(policy).dry_run = true;
                }
                self.note_trigger(&object);
                if has_problems_later(key.kind) {
                    self.origins.extend(origin.map(|origin| (key, origin)));
                }
                self.index.apply(object)
            }
            Change::Delete(key) => {
                self.metrics.changed(key.kind);
                self.origins.remove(&key);
                self.index.delete(&key)
            }
        }
    }

    /// Takes in an observation of the machine.
    pub fn take_host(&mut self, state: Option<HostState>) {
        // Before it has seen the first list of pods and the node's addresses, what it does not name may still be there.
        let state = state.filter(|state| state.wanted_revision > 0);
        if state.is_some() {
            self.host = state;
            self.retry = RETRY;
            self.metrics.queued();
            self.write(Instant::now());
        }
    }

    /// Endpoints that changed before the start say nothing of how long we take.
    fn note_trigger(&mut self, object: &Object) {
        if let Object::EndpointSlice(slice) = object
            && self.has_started()
            && let Some(changed_ns) = slice.changed_ns
        {
            self.triggers.push(changed_ns.get());
        }
    }

    /// Tries again what has failed.
    fn retry(&mut self) {
        self.metrics.retries.inc();
        self.write(Instant::now());
    }

    /// Whoever asked may have gone. What cannot be known yet is not answered.
    fn answer(&mut self, ask: Ask) {
        if !self.complete && ask.is_about_objects() {
            return;
        }
        match ask {
            Ask::LookAgain(reply) => {
                self.publish_wanted(true);
                let _gone = reply.send(self.wanted.borrow().revision);
            }
            Ask::Load(reply) => {
                let _gone = reply.send(self.load());
            }
            Ask::OverServices(reply) => {
                self.count_without_local();
                let _gone = reply.send(self.over_services());
            }
            Ask::Served(reply) => {
                let _gone = reply.send(self.served());
            }
            Ask::Explain(query, reply) => {
                let _gone = reply.send(self.explain(&query));
            }
            Ask::Names(addrs, reply) => {
                let name = |addr| Some((addr, self.policies.pod_at(addr)?.to_string()));
                let _gone = reply.send(addrs.into_iter().filter_map(name).collect());
            }
            Ask::Nodes(addrs, reply) => {
                let node = |addr| {
                    let pod = self.index.pod(self.policies.pod_at(addr)?)?;
                    Some((addr, pod.node.as_deref()?.to_owned()))
                };
                let _gone = reply.send(addrs.into_iter().filter_map(node).collect());
            }
            Ask::Pods(pods, reply) => {
                let known = pods.iter().filter(|pod| self.index.pod(pod).is_some());
                let _gone = reply.send(known.map(ToString::to_string).collect());
            }
            Ask::Unserved(service, reply) => {
                let _gone = reply.send(why_unserved(&self.index, &service));
            }
            Ask::EnforcedOf(pod, reply) => {
                let _gone = reply.send(self.enforced_of(&pod));
            }
            Ask::PolicyNames(policies, reply) => {
                let _gone = reply.send(self.policy_names(policies));
            }
            Ask::Closed(addr, direction, reply) => {
                let _gone = reply.send(self.closed(addr, direction));
            }
            Ask::Enforced(reply) => {
                let _gone = reply.send(self.enforced());
            }
            Ask::Bind(pod, claim, binding) => self.take_claim(pod, claim, binding),
            // Before any are taken they wait in the kernel's ring, where those who get no answer find them.
            Ask::Verdicts(..) if !self.tells() => {}
            Ask::Verdicts(after, reply) => {
                let _gone = reply.send(self.verdicts.after(after));
            }
        }
    }

    /// Tells the kernel side which pods' interfaces to find, and the node's addresses. Not before all has been read: a look at the
    /// machine that knows of half the pods would take the others' interfaces for nobody's.
    fn publish_wanted(&mut self, look_again: bool) {
        if !self.complete {
            return;
        }
        let mut pods = BTreeMap::new();
        let local = self.index.local_pods().filter(|pod| !pod.host_network);
        let mut local: Vec<&Pod> = local.collect();
        // Of several that claim an address it is the one that policies take it for: the last to be entered.
        local.sort_by_key(|pod| (!pod.terminating, pod.created_ns, Reverse(&pod.name)));
        for pod in local {
            pods.extend(pod.ips.iter().map(|ip| (*ip, pod.name.to_string())));
        }
        let node = self.index.node();
        let node_addresses = node.map_or_else(Vec::new, |node| node.internal_ips.clone());
        let claims = self.claims.by_name();
        self.wanted.send_if_modified(|wanted| {
            let news = look_again
                || wanted.pods != pods
                || wanted.node_addresses != node_addresses
                || wanted.claims != claims;
            if news {
                wanted.revision += 1;
                wanted.pods = pods;
                wanted.claims = claims;
                wanted.node_addresses = node_addresses;
            }
            news
        });
    }

    /// Writes what differs, once everything is known that decides what may be deleted. `started`: when the work on it
    /// began. Returns how many entries it wrote.
    fn write(&mut self, started: Instant) -> usize {
        let (true, Some(host)) = (self.complete, &self.host) else {
            self.publish_progress();
            return 0;
        };
        let tables = self.host_tables(host);
        let bound = self.bound_pods(host);
        self.listen(&tables);
        let own = tables.own_addresses.iter();
        let own = own.map(|(addr, flags)| (*addr, flags & own_flags::NODE_PORT != 0));
        let updates = self.compiler.set_own_addresses(&self.index, own.collect());
        self.syncer.update(updates);
        self.syncer.set_host(&*self.store, tables);
        self.before_serving();
        let addrs = self.addresses_of(&bound);
        let ranges = self.pod_ranges();
        let checked = self.source_checked(&bound);
        self.bound_syncer.set(addrs, ranges, &checked);
        self.policy_syncer.set_pods(bound);
        let of_services = self.take_over();
        let (report, of_policies) = task::block_in_place(|| {
            let of_addresses = self.bound_syncer.run(&mut *self.store);
            if of_addresses.lost {
                self.policy_syncer.judge_anew();
            }
            let of_policies = self.policy_syncer.run(&mut *self.store, &self.policies);
            (
                of_services.unwrap_or_else(|| self.syncer.run(&mut *self.store)),
                of_policies.with(of_addresses.report),
            )
        });
        self.end_sockets(&report);
        let report = report.with(of_policies);
        let writes = report.writes;
        if writes >= MANY_WRITES {
            sys::give_memory_back();
        }
        if writes > 0 {
            tracing::debug!(revision = self.taken, writes, "programmed");
        }
        self.metrics.writes.inc_by(writes as u64);
        self.metrics.failed(report.failed.values());
        self.report_failed(report.failed);
        if self.failed.values().any(|failure| failure.refused) {
            self.failing_since.get_or_insert_with(Instant::now);
        } else {
            self.failing_since = None;
            self.synced = Timestamp::now();
            self.metrics.synced();
            let now = self.synced.as_nanosecond();
            for changed_ns in self.triggers.drain(..) {
                let took = u64::try_from(now - i128::from(changed_ns)).unwrap_or(0);
                let took = Duration::from_nanos(took).as_secs_f64();
                self.metrics.programming_duration.observe(took);
            }
        }
        self.metrics
            .sync_duration
            .observe(started.elapsed().as_secs_f64());
        self.retry_at = (!self.failed.is_empty()).then(|| Instant::now() + self.retry);
        self.retry = (self.retry * 2).min(RETRY_AT_MOST);
        self.plan_reclaim();
        self.publish_unknown();
        self.answer_claims();
        self.publish_progress();
        writes
    }

    /// Waits for a grace period beside the loop, so that no change does.
    fn wait(&mut self) -> JoinHandle<io::Result<()>> {
        self.begin_reclaim();
        task::spawn_blocking(sys::grace_period)
    }

    /// To be called before a grace period.
    pub fn begin_reclaim(&mut self) {
        self.reclaim_at = None;
        self.syncer.begin_reclaim();
        self.policy_syncer.begin_reclaim();
        if let Some(sockets) = &mut self.sockets {
            sockets.begin_wait();
        }
    }

    /// To be called after it: frees what was replaced before. `waited`: whether it could be waited for.
    pub fn end_reclaim(&mut self, waited: io::Result<()>) {
        let outcome = task::block_in_place(|| {
            waited.context("failed to wait for a grace period")?;
            self.syncer.end_reclaim(&*self.store);
            self.policy_syncer
                .end_reclaim(&mut *self.store, &mut self.policies)?;
            Ok::<(), anyhow::Error>(())
        });
        if let Err(error) = outcome {
            tracing::warn!("failed to free what was replaced: {error:#}");
            self.reclaim_at = Some(Instant::now() + RETRY_AT_MOST);
        } else if self.policy_syncer.has_moves() {
            self.write(Instant::now());
        }
        self.plan_reclaim();
        if let Some(sockets) = &mut self.sockets {
            task::block_in_place(|| sockets.end_late_ones(&*self.store));
        }
    }

    fn plan_reclaim(&mut self) {
        let has_garbage = self.syncer.has_garbage() || self.policy_syncer.has_garbage();
        if has_garbage && self.reclaim_at.is_none() {
            self.reclaim_at = Some(Instant::now() + RECLAIM_AFTER);
        }
    }

    /// Whether all that the source holds has been programmed once.
    fn has_started(&self) -> bool {
        self.progress.borrow().started
    }

    /// Whether verdicts are taken. Before everything is known, those of while no agent ran would get no names.
    fn tells(&self) -> bool {
        self.has_started() || Instant::now() > self.nameless_at
    }

    fn audit(&mut self) {
        if !self.has_started() {
            return;
        }
        let differing = task::block_in_place(|| {
            let of_addresses = self.bound_syncer.audit(&*self.store)?;
            let of_policies = self.policy_syncer.audit(&*self.store)? + of_addresses;
            Ok::<usize, StoreError>(self.syncer.audit(&*self.store)? + of_policies)
        });
        match differing {
            Ok(0) => {}
            Ok(entries) => {
                tracing::warn!(entries, "the tables were changed by somebody else");
                self.write(Instant::now());
            }
            Err(error) => tracing::warn!("failed to compare the tables: {error}"),
        }
        self.look_at_left_flows();
    }

    fn sign_of_life(&mut self) {
        if self.publish_unknown() {
            self.publish_progress();
        }
        self.progress
            .send_modify(|progress| progress.alive = Instant::now());
    }
}

/// Kinds whose problems may show only beside other objects.
fn has_problems_later(kind: Kind) -> bool {
    matches!(kind, Kind::Service | Kind::Pod)
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tokio::sync::oneshot;

    use super::*;
    use crate::{
        args::Cli,
        decode::{Decoded, decode},
        model::Name,
        store::{Limits, memory::Memory, policy::PolicyLimits},
    };

    const LIMITS: Limits = Limits {
        frontends: 10,
        services: 10,
        backends: 10,
        maglev: 1000,
        source_ranges: 10,
        policy: PolicyLimits::new(10, 10, 64),
    };

    fn applied(value: &serde_json::Value) -> Change {
        match decode(value) {
            Decoded::Object { key, object, .. } => Change::Apply {
                key,
                object,
                origin: None,
            },
            other => panic!("{other:?}"),
        }
    }

    fn agent() -> (Agent, watch::Receiver<WantedPods>) {
        let run = ["dataplane-agent", "run", "--node-name", "a", "--manifests", "/m"];
        let config = Cli::config_of(run).unwrap();
        let store = Memory::new(LIMITS);
        let syncer = Syncer::restore(&store).unwrap();
        let policies = PolicySyncer::restore(&store).unwrap();
        let bound = BoundSyncer::restore(&store).unwrap();
        let (progress, seen) = watch::channel(Progress::default());
        let (wanted, wanted_seen) = watch::channel(WantedPods::default());
        let outward = Outward {
            wanted,
            progress,
            health_checks: node_ports::Servers::new(seen),
            metrics: Metrics::new(),
        };
        let agent = Agent::new(&config, Box::new(store), syncer, policies, bound, outward);
        (agent, wanted_seen)
    }

    fn node() -> Change {
        applied(&json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": "a"},
            "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
        }))
    }

    fn pod() -> Change {
        applied(&json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "namespace": "shop"},
            "spec": {"nodeName": "a", "containers": []}, "status": {"podIPs": [{"ip": "10.244.1.5"}]},
        }))
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_machine_is_not_looked_at_with_half_the_pods() {
        let (mut agent, wanted_seen) = agent();
        let mut take = |revision, complete, changes| {
            agent.take_batch(Batch {
                revision,
                complete,
                changes,
                ..Batch::default()
            });
            wanted_seen.borrow().clone()
        };
        assert_eq!(
            take(1, false, vec![node()]),
            WantedPods::default(),
            "Nodes come first"
        );
        assert_eq!(
            take(2, false, vec![pod()]),
            WantedPods::default(),
            "perhaps not all"
        );
        let wanted = take(3, true, Vec::new());
        assert_eq!(wanted.revision, 1);
        assert_eq!(
            wanted.pods["10.244.1.5".parse::<std::net::IpAddr>().as_ref().unwrap()],
            "shop/web"
        );
        assert_eq!(wanted.node_addresses.len(), 1);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_not_read_yet_is_not_said_to_be_nothing() {
        let (mut agent, _wanted) = agent();
        let mut pods = |batch: Batch| {
            agent.take_batch(batch);
            let (reply, mut said) = oneshot::channel();
            agent.answer(Ask::Pods(vec![Name::new("shop", "web")], reply));
            said.try_recv().ok()
        };
        let batch = |revision, complete, changes| Batch {
            revision,
            complete,
            changes,
            ..Batch::default()
        };
        assert_eq!(pods(batch(1, false, vec![node()])), None, "perhaps there is one");
        let known = pods(batch(2, true, vec![pod()]));
        assert_eq!(known.as_deref(), Some(&["shop/web".to_owned()][..]));
        let known = pods(batch(
            3,
            true,
            vec![Change::Delete("Pod shop/web".parse().unwrap())],
        ));
        assert_eq!(known, Some(Vec::new()), "there is none");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_pod_that_no_interface_leads_to_is_a_problem() {
        let (mut agent, _wanted) = agent();
        agent.take_batch(Batch {
            revision: 1,
            complete: true,
            changes: vec![node(), pod()],
            ..Batch::default()
        });
        let looked = HostState {
            wanted_revision: 1,
            ..HostState::default()
        };
        agent.take_host(Some(looked.clone()));
        assert_eq!(agent.problems(), [], "it may be found yet");
        agent
            .expected
            .begin(Instant::now().checked_sub(Duration::from_hours(1)).unwrap());
        agent.sign_of_life();
        let problems = agent.problems();
        assert!(
            matches!(&problems[..], [one] if one.object == "Pod shop/web"),
            "{problems:?}"
        );
        let bound_pods = [(7, "shop/web".to_owned())].into();
        agent.take_host(Some(HostState { bound_pods, ..looked }));
        agent.sign_of_life();
        assert_eq!(agent.problems(), []);
    }
}

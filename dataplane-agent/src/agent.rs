//! The loop: batches of the source and observations of the machine in, table entries out.

mod claims;
mod explain;
mod load;
mod machine;
mod node_status;
mod pods;
mod policies;
mod reports;
mod sockets;
mod takeover;
mod verdicts;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt, io,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context;
use dataplane_common::device::own_flags;
use jiff::Timestamp;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
    task::{self, JoinHandle},
    time,
};

use self::{sockets::HostSockets, takeover::Takeover};
use crate::{
    attach,
    bpf::{pins::Pins, sys, verdicts::Verdicts},
    compile::{
        Compiler, Options,
        policy::{PolicyCompiler, Subjects},
    },
    config::{Config, NodePortAddresses, PolicyMode, SourceConfig},
    events::Recorder,
    health::{self, Ask, Health, Progress, node_ports},
    host::{HostState, Kernel, WantedPods},
    metrics::{Metrics, kernel_side::KernelSide, services::Counting},
    model::{Dirty, Index, Kind, Object, ObjectRef, Origin, Pod, Rejected},
    source::{self, Batch, Change, Source, kube::state::State},
    store::{Store, StoreError},
    sync::{Failure, Subject, Syncer, bound::BoundSyncer, policy::PolicySyncer},
};

/// The first wait after a failed write; it doubles up to [`RETRY_AT_MOST`].
const RETRY: Duration = Duration::from_millis(100);
const RETRY_AT_MOST: Duration = Duration::from_secs(30);
/// What was replaced is collected for so long before it is freed.
const RECLAIM_AFTER: Duration = Duration::from_millis(100);
/// Between comparisons of the tables with what we believe is in them.
const AUDIT: Duration = Duration::from_mins(1);
/// A run of so many writes leaves much free memory behind.
const MANY_WRITES: usize = 10_000;
/// Verdicts of before a start wait so long for names.
const NAMES_WITHIN: Duration = Duration::from_secs(30);
const SIGN_OF_LIFE: Duration = Duration::from_secs(5);

/// Runs the agent until it is told to stop. The datapath stays.
pub fn run(config: Config) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("failed to start the runtime")?
        .block_on(start(config))
}

async fn start(config: Config) -> anyhow::Result<()> {
    let metrics = Metrics::new();
    let source = start_source(&config, &metrics).await?;
    // All that can fail without a trace comes first.
    let prepared = attach::start::prepare(&config)?;
    let claims = claims::Claims::new(prepared.claims());
    let socket = health::bind_unix(&config.socket)?;
    let (wanted, wanted_seen) = watch::channel(WantedPods::default());
    let Kernel {
        store,
        mut host,
        given_sockets,
        left_flows,
        constants,
    } = attach::start::start(prepared, &config, wanted_seen)?;
    let syncer = Syncer::restore(&*store).context("failed to read the tables")?;
    let policy_syncer = PolicySyncer::restore(&*store).context("failed to read the tables of policies")?;
    let bound_syncer = BoundSyncer::restore(&*store).context("failed to read the addresses of pods")?;
    let (progress, progress_seen) = watch::channel(Progress::default());
    let (asks, mut asked) = mpsc::unbounded_channel();
    let health_checks = node_ports::Servers::new(progress_seen.clone());
    let health = Health {
        progress: progress_seen,
        rescan: source.rescan.clone(),
        source: source.state.clone(),
        asks,
    };
    if let Some(addr) = config.health_addr {
        tokio::spawn(health.clone().serve_tcp(addr));
    }
    let for_metrics = health.clone();
    tokio::spawn(health.serve_unix(socket));

    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut alive = time::interval(SIGN_OF_LIFE);
    let mut audit = time::interval_at(time::Instant::now() + AUDIT, AUDIT);
    let mut batches = source.batches;
    metrics.add(KernelSide::new(&config.bpffs))?;
    if let Some(addr) = config.metrics_addr {
        tokio::spawn(metrics.clone().serve(addr, for_metrics.clone()));
    }
    if let Some(told) = source.node_status {
        node_status::spawn(&config, &progress, &host, told);
    }
    let outward = Outward {
        wanted,
        progress,
        health_checks,
        metrics,
    };
    let mut agent = Agent::new(&config, store, syncer, policy_syncer, bound_syncer, outward);
    if let Some(events) = source.events {
        agent.events.send_to(events);
    }
    agent.claims = claims;
    agent.sockets = given_sockets.and_then(sockets::open);
    agent.takeover = Some(Takeover::new(left_flows).context("failed to read the tables of flows")?);
    agent.tables = Some(explain::Tables {
        pins: Pins::new(&config.bpffs),
        constants,
    });
    let mut verdicts = open_verdicts(&config);
    tracing::info!(node = config.node_name, source = ?config.source, "started");
    let mut grace_period: Option<JoinHandle<io::Result<()>>> = None;
    loop {
        let reclaim_at = agent.reclaim_at.filter(|_| grace_period.is_none());
        let retry_at = agent.retry_at;
        let listen_at = agent.listen_at;
        tokio::select! {
            batch = batches.recv() => agent.take_batch(batch.context("the source has ended")?),
            changed = host.changed() => {
                changed.context("the observation of this machine has ended")?;
                let state = host.borrow_and_update().clone();
                agent.take_host(state);
            }
            Some(ask) = asked.recv() => agent.answer(ask),
            readable = readable(verdicts.as_ref()), if agent.tells() => match (readable, &mut verdicts) {
                (Ok(()), Some(verdicts)) => agent.take_verdicts(verdicts),
                (Ok(()), None) => {}
                (Err(error), _) => {
                    tracing::warn!("no more verdicts of policies: failed to read them ({error})");
                    verdicts = None;
                }
            },
            () = at(retry_at), if retry_at.is_some() => agent.retry(),
            () = at(listen_at), if listen_at.is_some() => agent.listen_again(),
            () = at(reclaim_at), if reclaim_at.is_some() => grace_period = Some(agent.wait()),
            outcome = over(&mut grace_period), if grace_period.is_some() => {
                grace_period = None;
                agent.end_reclaim(outcome);
            }
            _ = audit.tick() => agent.audit(),
            _ = alive.tick() => agent.sign_of_life(),
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    tracing::info!("stopped; the datapath stays, `cleanup` removes it");
    // Gone already if somebody removed it.
    let _gone = std::fs::remove_file(&config.socket);
    Ok(())
}

async fn start_source(config: &Config, metrics: &Metrics) -> anyhow::Result<Source> {
    match &config.source {
        SourceConfig::Folder(folder) => {
            source::manifests::start(folder).with_context(|| format!("failed to watch {}", folder.display()))
        }
        SourceConfig::Kube(address) => {
            let settings = source::kube::Settings {
                address: address.clone(),
                node_name: config.node_name.clone(),
            };
            source::kube::start(settings, State::new(metrics.source.clone())).await
        }
    }
}

fn open_verdicts(config: &Config) -> Option<Verdicts> {
    Verdicts::open(&Pins::new(&config.bpffs))
        .inspect_err(|error| {
            tracing::warn!("verdicts of policies are not told: failed to open their tables ({error})");
        })
        .ok()
}

/// Returns when verdicts of policies have been told.
async fn readable(verdicts: Option<&Verdicts>) -> io::Result<()> {
    match verdicts {
        Some(verdicts) => verdicts.wait().await,
        None => std::future::pending().await,
    }
}

async fn at(time: Option<Instant>) {
    if let Some(time) = time {
        time::sleep_until(time.into()).await;
    }
}

/// Returns when the wait for a grace period is over.
async fn over(grace_period: &mut Option<JoinHandle<io::Result<()>>>) -> io::Result<()> {
    match grace_period {
        Some(waiting) => waiting.await.map_err(io::Error::other)?,
        None => std::future::pending().await,
    }
}

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

    /// Whoever asked may have gone.
    fn answer(&mut self, ask: Ask) {
        match ask {
            Ask::LookAgain(reply) => {
                self.publish_wanted(true);
                let _gone = reply.send(self.wanted.borrow().revision);
            }
            Ask::Load(reply) => {
                let _gone = reply.send(self.load());
            }
            Ask::OverServices(reply) => {
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
            Ask::EnforcedOf(pod, reply) => {
                let _gone = reply.send(self.enforced_of(&pod));
            }
            Ask::PolicyNames(policies, reply) => {
                let _gone = reply.send(self.policy_names(policies));
            }
            Ask::Enforced(reply) => {
                let _gone = reply.send(self.enforced());
            }
            Ask::Bind(pod, claim, binding) => self.take_claim(pod, claim, binding),
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
        let (report, of_policies) = task::block_in_place(|| {
            let of_addresses = self.bound_syncer.run(&mut *self.store);
            if of_addresses.lost {
                self.policy_syncer.judge_anew();
            }
            let of_policies = self.policy_syncer.run(&mut *self.store, &self.policies);
            (
                self.syncer.run(&mut *self.store),
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
        self.take_over();
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

    use super::*;
    use crate::{
        args::Cli,
        decode::{Decoded, decode},
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

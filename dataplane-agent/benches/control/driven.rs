//! The agent's own loop in a process of its own inside the node's namespace, driven event by event.

use std::{
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use dataplane_agent::{
    agent::{Agent, Outward},
    attach::start::{prepare, start},
    bpf::sys,
    config::{
        Config, DatapathMode, FastPath, NodePortAddresses, PolicyChanges, PolicyMode, PortRange, ServiceEcho,
        Sizes, SocketLb, SourceConfig, SourceRangesFor, Verdicts,
    },
    health::{Progress, node_ports},
    host::{HostState, Kernel, WantedPods},
    metrics::Metrics,
    source::Batch,
    store::{Limits, policy::PolicyLimits},
    sync::{Syncer, bound::BoundSyncer, policy::PolicySyncer},
};
use serde::Serialize;
use tokio::{sync::watch, time::timeout};

/// The machine's observations.
pub type Host = watch::Receiver<Option<HostState>>;

/// What manifests say of the agent's node.
pub const NODE_ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 10));

/// How long the observation of the machine may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where the agent runs.
#[derive(Debug, clap::Args)]
pub struct Place {
    #[arg(long)]
    pub netns: PathBuf,
    #[arg(long)]
    pub bpffs: PathBuf,
    #[arg(long)]
    pub work: PathBuf,
}

impl Place {
    /// Measures there, and prints the outcome as JSON.
    pub fn run<T: Serialize>(&self, measurement: impl Future<Output = Result<T>>) -> Result<()> {
        dataplane_tests::netns::join(&self.netns)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let outcome = runtime.block_on(measurement)?;
        println!("{}", serde_json::to_string(&outcome)?);
        Ok(())
    }
}

/// Tables with room for so many Services and endpoints, the others small.
pub fn sizes(services: usize, endpoints: usize) -> Sizes {
    Sizes {
        limits: Limits {
            frontends: (services * 5 / 2) as u32,
            services: (services * 5 / 4) as u32,
            backends: (endpoints * 5 / 4) as u32,
            maglev: (endpoints * 64) as u32,
            source_ranges: 1024,
            policy: PolicyLimits::new(1024, 1024, 1024),
        },
        affinity: 1024,
        flows: 4096,
        policy_flows: 1024,
        half_open: 1024,
        datagrams: 1024,
        held: 64,
        sockets: 1024,
        own_addresses: 1024,
        devices: 1024,
    }
}

fn config(place: &Place, node: &str, sizes: Sizes) -> Config {
    Config {
        node_name: node.to_owned(),
        source: SourceConfig::Folder(PathBuf::new()),
        devices: Vec::new(),
        bpffs: place.bpffs.clone(),
        cgroup: None,
        health_addr: None,
        metrics_addr: None,
        service_metrics: 0,
        socket: place.work.join("agent.sock"),
        socket_lb: SocketLb::Off,
        datapath: DatapathMode::Tc,
        fast_path: FastPath::Auto,
        snat_ports: PortRange {
            min: 61000,
            max: 65535,
        },
        node_ports: PortRange {
            min: 30000,
            max: 32767,
        },
        node_port_addresses: NodePortAddresses::All,
        localhost_node_ports: false,
        service_echo: ServiceEcho::default(),
        external_ips: true,
        source_ranges_for: SourceRangesFor::Lb,
        source_check: true,
        policy_changes: PolicyChanges::All,
        policy_mode: PolicyMode::Enforce,
        verdicts: Verdicts::Denied,
        sizes,
        debug_log: false,
    }
}

/// The agent, and what it tells.
pub struct Driven {
    pub agent: Agent,
    /// Reading the tables that an earlier process left, in seconds.
    pub restore_s: f64,
    wanted: watch::Sender<WantedPods>,
    progress: watch::Receiver<Progress>,
    metrics: Metrics,
    revision: u64,
}

impl Driven {
    /// Loads the datapath, and an agent over its tables.
    pub fn start(place: &Place, node: &str, sizes: Sizes) -> Result<(Self, Host)> {
        let config = config(place, node, sizes);
        let (wanted, wanted_seen) = watch::channel(WantedPods::default());
        let Kernel { store, host, .. } = start(prepare(&config)?, &config, wanted_seen)?;
        let started = Instant::now();
        let syncer = Syncer::restore(&*store)?;
        let policies = PolicySyncer::restore(&*store)?;
        let restore_s = started.elapsed().as_secs_f64();
        let (progress, seen) = watch::channel(Progress::default());
        let metrics = Metrics::new();
        let outward = Outward {
            wanted: wanted.clone(),
            progress,
            health_checks: node_ports::Servers::new(seen.clone()),
            metrics: metrics.clone(),
        };
        let driven = Self {
            agent: Agent::new(&config, store, syncer, policies, BoundSyncer::default(), outward),
            restore_s,
            wanted,
            progress: seen,
            metrics,
            revision: 0,
        };
        Ok((driven, host))
    }

    /// Waits for the machine to be observed: it is known before a clock starts, and the agent itself would not look at it before
    /// all has been read.
    pub async fn observe(&self, host: &mut Host) -> Result<HostState> {
        self.wanted.send_modify(|wanted| {
            wanted.revision += 1;
            wanted.node_addresses = vec![NODE_ADDRESS];
        });
        let state = host.wait_for(|state| state.as_ref().is_some_and(|state| state.wanted_revision > 0));
        let state = timeout(PATIENCE, state)
            .await
            .context("the machine was not observed")?;
        let state = state.context("the observation of the machine ended")?;
        state.clone().context("the machine was not observed")
    }

    /// Entries written so far.
    pub fn writes(&self) -> u64 {
        self.metrics.writes.get()
    }

    /// Lets go of what was replaced, as the loop does: beside the wait for a grace period. Returns what is the loop's.
    pub fn reclaim(&mut self) -> Duration {
        let started = Instant::now();
        self.agent.begin_reclaim();
        let before = started.elapsed();
        let outcome = sys::grace_period();
        let over = Instant::now();
        self.agent.end_reclaim(outcome);
        before + over.elapsed()
    }

    /// Hands a batch to the agent; fails when not everything is programmed behind it.
    pub fn take(&mut self, batch: Batch) -> Result<Duration> {
        self.revision += 1;
        let batch = Batch {
            revision: self.revision,
            ..batch
        };
        let started = Instant::now();
        self.agent.take_batch(batch);
        let took = started.elapsed();
        let progress = self.progress.borrow();
        if let Some(problem) = progress.failed.first().or(progress.rejected.first()) {
            bail!("not served: {problem}");
        }
        ensure!(
            progress.revision == self.revision,
            "revision {} is not programmed",
            self.revision
        );
        Ok(took)
    }
}

/// Seconds that this thread has run for.
pub fn on_cpu_s() -> Result<f64> {
    let path = "/proc/thread-self/schedstat";
    let text = std::fs::read_to_string(path).with_context(|| format!("failed to read {path}"))?;
    let nanoseconds = text.split(' ').next().and_then(|first| first.parse().ok());
    let nanoseconds = nanoseconds.with_context(|| format!("{path} has no number"))?;
    Ok(Duration::from_nanos(nanoseconds).as_secs_f64())
}

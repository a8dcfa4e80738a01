//! The measurement, in a process of its own inside the node's namespace: the agent's own loop, driven event by event.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use dataplane_agent::{
    agent::{Agent, Outward},
    attach::start::{prepare, start},
    bpf::map_names,
    config::{
        Config, DatapathMode, FastPath, NodePortAddresses, PolicyChanges, PolicyMode, PortRange, ServiceEcho,
        Sizes, SocketLb, SourceConfig, SourceRangesFor, Verdicts,
    },
    decode::{Decoded, decode},
    health::{Progress, node_ports},
    host::{Kernel, WantedPods},
    metrics::Metrics,
    source::{self, Batch, Change},
    store::{Limits, policy::PolicyLimits},
    sync::{Syncer, policy::PolicySyncer},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::watch;

use crate::{
    fleet::{self, Fleet},
    memory::{self, Resident},
};

/// Maps whose size follows from the Services and endpoints.
const SERVICE_MAPS: [&str; 6] = [
    map_names::FRONTENDS_V4,
    map_names::FRONTENDS_V6,
    map_names::SERVICES,
    map_names::BACKENDS,
    map_names::MAGLEV,
    map_names::PORTS,
];

/// What to measure, and where.
#[derive(Debug, clap::Args)]
pub struct Inside {
    #[arg(long)]
    pub netns: PathBuf,
    #[arg(long)]
    pub bpffs: PathBuf,
    #[arg(long)]
    pub work: PathBuf,
    #[arg(long)]
    pub services: usize,
    #[arg(long)]
    pub endpoints: usize,
    /// Read manifests from this folder instead of being handed decoded objects
    #[arg(long)]
    pub folder: Option<PathBuf>,
    /// Changes of each kind
    #[arg(long)]
    pub changes: usize,
}

/// What was measured.
#[derive(Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// Reading the tables that an earlier process left, in seconds.
    pub restore_s: f64,
    /// From JSON values to the agent's own types; from a folder, the reading of files too.
    pub decode_s: f64,
    /// From decoded objects to the last write of a table.
    pub sync_s: f64,
    /// Of this, what the thread had a CPU for: other work on the machine does not count.
    pub sync_cpu_s: f64,
    /// Services, backends and elements of `MAGLEV` in use.
    pub usage: (usize, usize, u32),
    pub empty: Resident,
    /// After the first sync.
    pub full: Resident,
    /// After all changes.
    pub changed: Resident,
    pub map_bytes: u64,
    /// From an event to its last write, each kind with its samples in milliseconds.
    pub changes: Vec<(String, Vec<f64>)>,
}

/// Tables with room for the fleet, the others small.
fn sizes(fleet: Fleet) -> Sizes {
    Sizes {
        limits: Limits {
            frontends: (fleet.services * 5 / 2) as u32,
            services: (fleet.services * 5 / 4) as u32,
            backends: (fleet.endpoints * 5 / 4) as u32,
            maglev: (fleet.endpoints * 64) as u32,
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

fn config(inside: &Inside, fleet: Fleet) -> Config {
    Config {
        node_name: fleet::NODE.to_owned(),
        source: SourceConfig::Folder(inside.folder.clone().unwrap_or_default()),
        devices: Vec::new(),
        bpffs: inside.bpffs.clone(),
        cgroup: None,
        health_addr: None,
        metrics_addr: None,
        socket: inside.work.join("agent.sock"),
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
        policy_changes: PolicyChanges::All,
        policy_mode: PolicyMode::Enforce,
        verdicts: Verdicts::Denied,
        sizes: sizes(fleet),
        debug_log: false,
    }
}

/// Measures, and prints the outcome as JSON.
pub fn run(inside: &Inside) -> Result<()> {
    dataplane_tests::netns::join(&inside.netns)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let outcome = runtime.block_on(measure(inside))?;
    println!("{}", serde_json::to_string(&outcome)?);
    Ok(())
}

/// The agent, and what it tells.
struct Driven {
    agent: Agent,
    progress: watch::Receiver<Progress>,
    revision: u64,
}

impl Driven {
    /// Hands a batch to the agent; fails when not everything is programmed behind it.
    fn take(&mut self, changes: Vec<Change>) -> Result<Duration> {
        self.revision += 1;
        let batch = Batch {
            revision: self.revision,
            complete: true,
            changes,
            ..Batch::default()
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

async fn measure(inside: &Inside) -> Result<Outcome> {
    let fleet = Fleet {
        services: inside.services,
        endpoints: inside.endpoints,
    };
    let config = config(inside, fleet);
    let (wanted, wanted_seen) = watch::channel(WantedPods::default());
    let Kernel { store, mut host, .. } = start(prepare(&config)?, &config, wanted_seen)?;
    let started = Instant::now();
    let syncer = Syncer::restore(&*store)?;
    let policies = PolicySyncer::restore(&*store)?;
    let restore_s = started.elapsed().as_secs_f64();
    let (progress, seen) = watch::channel(Progress::default());
    let outward = Outward {
        wanted,
        progress,
        health_checks: node_ports::Servers::new(seen.clone()),
        metrics: Metrics::new(),
    };
    let mut driven = Driven {
        agent: Agent::new(&config, store, syncer, policies, outward),
        progress: seen,
        revision: 0,
    };
    // The machine is known before the clock starts; nothing is written before the source is complete.
    driven.agent.take_batch(Batch {
        changes: vec![change(&fleet::node())?],
        ..Batch::default()
    });
    let state = host.wait_for(|state| state.as_ref().is_some_and(|state| state.wanted_revision > 0));
    let state = state
        .await
        .context("the observation of the machine ended")?
        .clone();
    driven.agent.take_host(state);
    let empty = Resident::now()?;

    let started = Instant::now();
    let (changes, decode_s) = match &inside.folder {
        Some(folder) => {
            let changes = read(folder).await?;
            (changes, started.elapsed().as_secs_f64())
        }
        None => decode_all(fleet)?,
    };
    let before = on_cpu_s()?;
    let sync_s = driven.take(changes)?.as_secs_f64();
    let sync_cpu_s = on_cpu_s()? - before;
    let full = Resident::now()?;
    let changes = change_all(&mut driven, fleet, inside.changes)?;
    Ok(Outcome {
        restore_s,
        decode_s,
        sync_s,
        sync_cpu_s,
        usage: driven.agent.usage(),
        empty,
        full,
        changed: Resident::now()?,
        map_bytes: memory::of_maps(&inside.bpffs, &SERVICE_MAPS)?,
        changes,
    })
}

/// Seconds that this thread has run for.
fn on_cpu_s() -> Result<f64> {
    let path = "/proc/thread-self/schedstat";
    let text = std::fs::read_to_string(path).with_context(|| format!("failed to read {path}"))?;
    let nanoseconds = text.split(' ').next().and_then(|first| first.parse().ok());
    let nanoseconds = nanoseconds.with_context(|| format!("{path} has no number"))?;
    Ok(Duration::from_nanos(nanoseconds).as_secs_f64())
}

/// The objects as a watch would decode them, and the seconds that this takes alone.
fn decode_all(fleet: Fleet) -> Result<(Vec<Change>, f64)> {
    let mut took = Duration::ZERO;
    let mut changes = Vec::new();
    for value in fleet.objects() {
        let started = Instant::now();
        changes.push(change(&value)?);
        took += started.elapsed();
    }
    Ok((changes, took.as_secs_f64()))
}

fn change(value: &Value) -> Result<Change> {
    match decode(value) {
        Decoded::Object {
            key,
            object,
            problems,
        } if problems.is_empty() => Ok(Change::Apply {
            key,
            object,
            origin: None,
        }),
        refused => bail!("not decoded: {refused:?}"),
    }
}

async fn read(folder: &Path) -> Result<Vec<Change>> {
    let mut source = source::manifests::start(folder)?;
    loop {
        let batch = source.batches.recv().await.context("the source ended")?;
        if batch.complete {
            return Ok(batch.changes);
        }
    }
}

/// Single changes of each kind, spread over the fleet.
fn change_all(driven: &mut Driven, fleet: Fleet, rounds: usize) -> Result<Vec<(String, Vec<f64>)>> {
    let mut samples: Vec<(String, Vec<f64>)> = Vec::new();
    let mut note = |kind: &str, took: Duration| {
        let millis = took.as_secs_f64() * 1000.0;
        match samples.iter_mut().find(|(known, _)| known == kind) {
            Some((_, of_kind)) => of_kind.push(millis),
            None => samples.push((kind.to_owned(), vec![millis])),
        }
    };
    for round in 0..rounds {
        // Never a large one: those are measured apart.
        let spread = (round * 7919 + 1) % fleet.services;
        let number = if spread.is_multiple_of(100) {
            spread + 1
        } else {
            spread
        };
        let pods = fleet.endpoints + round * 1000;
        let mut apply = |kind: &str, value: Value| -> Result<()> {
            let started = Instant::now();
            let change = change(&value)?;
            let decoded = started.elapsed();
            note(kind, decoded + driven.take(vec![change])?);
            Ok(())
        };
        apply(
            "a small service's endpoints replaced",
            fleet::slice(number, 0, pods..pods + 5),
        )?;
        let mut unready = fleet::slice(number, 0, pods..pods + 5);
        unready["endpoints"][0]["conditions"]["ready"] = false.into();
        apply("an endpoint not ready", unready)?;
        apply(
            "100 endpoints of a large service replaced",
            fleet::slice(spread - spread % 100, 0, pods + 100..pods + 200),
        )?;
        let new = fleet.services + 1 + round * 50;
        apply("a service added", fleet::service(new))?;
        apply("its slice added", fleet::slice(new, 0, pods + 300..pods + 305))?;
        for (kind, value) in [
            ("its slice removed", fleet::slice(new, 0, 0..0)),
            ("a service removed", fleet::service(new)),
        ] {
            let Change::Apply { key, .. } = change(&value)? else {
                bail!("not an object");
            };
            note(kind, driven.take(vec![Change::Delete(key)])?);
        }
        // As the loop does, off the way of an event.
        driven.agent.reclaim();
    }
    Ok(samples)
}

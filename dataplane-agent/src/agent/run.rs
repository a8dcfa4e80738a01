//! What runs beside and around the loop: the source, the machine's observation, who asks, and who is told.

use std::{
    io,
    time::{Duration, Instant},
};

use anyhow::Context;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
    task::JoinHandle,
    time,
};

use super::{Agent, Outward, claims, explain, node_status, sockets, takeover::Takeover};
use crate::{
    attach,
    bpf::{pins::Pins, verdicts::Verdicts},
    config::{Config, SourceConfig},
    health::{self, Health, Progress, node_ports},
    host::{Kernel, WantedPods},
    metrics::{Metrics, kernel_side::KernelSide},
    source::{self, Source, kube::state::State},
    sync::{Syncer, bound::BoundSyncer, policy::PolicySyncer},
};

/// Between comparisons of the tables with what we believe is in them.
const AUDIT: Duration = Duration::from_mins(1);
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
        tokio::spawn(health.clone().serve_tcp(addr, metrics.clone()));
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
    agent.follows(&source.servers, source.events);
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

//! Policies, pods and what becomes of them, measured in the node's namespace: a folder of manifests is followed by the
//! agent's own source, and each of its batches is taken in by the agent's own loop, over its own tables in the kernel.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use dataplane_agent::{
    bpf::map_names,
    host::HostState,
    source::{self, Batch, Source},
    store::policy::PolicyLimits,
};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use crate::{
    crowd::{self, Crowd},
    driven::{Driven, Place, on_cpu_s, sizes},
    edits::{Kind, Manifests},
    memory::{self, Resident},
};

/// Maps whose size follows from policies, and from what they are about.
const POLICY_MAPS: [&str; 11] = [
    map_names::POD_POLICY,
    map_names::PEERS_V4,
    map_names::PEERS_V6,
    map_names::CIDRS_V4,
    map_names::CIDRS_V6,
    map_names::POLICY_SETS,
    map_names::PEER_RULES,
    map_names::PORT_RULES,
    map_names::RULE_BITS,
    map_names::RULES,
    map_names::RULE_HITS,
];
/// The first of the numbers that stand for the pods' interfaces: the tables know no more of these.
const FIRST_IFINDEX: u32 = 1000;

/// How long a change may take to come out of the source.
const PATIENCE: Duration = Duration::from_secs(20);

/// What to measure, and where.
#[derive(Debug, clap::Args)]
pub struct Inside {
    #[command(flatten)]
    pub place: Place,
    /// Where the manifests are written
    #[arg(long)]
    pub folder: PathBuf,
    #[arg(long)]
    pub pods: usize,
    #[arg(long)]
    pub policies: usize,
    #[arg(long)]
    pub cidrs: usize,
    /// Changes of each kind
    #[arg(long)]
    pub changes: usize,
}

/// What was measured.
#[derive(Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// Reading the folder, in seconds.
    pub read_s: f64,
    /// From the source's first batch to the last write.
    pub sync_s: f64,
    pub sync_cpu_s: f64,
    pub full: Resident,
    pub changed: Resident,
    pub map_bytes: u64,
    /// Entries written by the first sync.
    pub writes: u64,
    pub changes: Vec<(String, Vec<Sample>)>,
}

/// One change.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Sample {
    /// From the file to the last write, in milliseconds: with the source's wait for a moment of silence.
    pub from_file_ms: f64,
    /// From the source's event to the last write.
    pub ms: f64,
    /// Of this, what the thread had a CPU for.
    pub cpu_ms: f64,
    /// What the agent did behind that to let go of what was replaced.
    pub after_ms: f64,
    pub writes: u64,
}

/// The machine as observed, with an interface for each pod.
struct Machine {
    state: HostState,
    next: u32,
}

impl Machine {
    /// Makes interfaces come and go with the pods; false when it is as it was.
    fn follow(&mut self, pods: &[String]) -> bool {
        let bound = &mut self.state.bound_pods;
        let before = bound.clone();
        let mut known: BTreeMap<String, u32> = before.iter().map(|(at, pod)| (pod.clone(), *at)).collect();
        bound.clear();
        for pod in pods {
            let ifindex = known.remove(pod).unwrap_or_else(|| {
                self.next += 1;
                self.next
            });
            bound.insert(ifindex, pod.clone());
        }
        *bound != before
    }
}

/// Measures.
pub async fn measure(inside: &Inside) -> Result<Outcome> {
    let crowd = Crowd {
        pods: inside.pods,
        policies: inside.policies,
        cidrs: inside.cidrs,
    };
    let mut sizes = sizes(1024, 1024);
    sizes.limits.policy = PolicyLimits::new(131_072, 16_384, 32_768);
    let mut manifests = Manifests::write(&inside.folder, crowd)?;
    let (mut driven, mut host) = Driven::start(&inside.place, crowd::NODE, sizes)?;
    let started = Instant::now();
    let mut source = source::manifests::start(&inside.folder)?;
    let batch = next_batch(&mut source).await?;
    let read_s = started.elapsed().as_secs_f64();
    ensure!(batch.complete, "the source's first batch is not complete");
    let mut machine = Machine {
        state: driven.observe(&mut host).await?,
        next: FIRST_IFINDEX,
    };
    machine.follow(&manifests.pods_here());
    driven.agent.take_host(Some(machine.state.clone()));
    let before = on_cpu_s()?;
    let sync_s = driven.take(batch)?.as_secs_f64();
    let sync_cpu_s = on_cpu_s()? - before;
    let writes = driven.writes();
    driven.reclaim();
    let full = Resident::now()?;
    let mut changes: BTreeMap<Kind, Vec<Sample>> = BTreeMap::new();
    for round in 0..inside.changes {
        for kind in Kind::ALL {
            manifests.edit(kind, round)?;
            let sample = follow(&mut driven, &mut source, &mut machine, &manifests);
            let sample = sample
                .await
                .with_context(|| format!("{}, round {round}", kind.text()))?;
            changes.entry(kind).or_default().push(sample);
        }
    }
    Ok(Outcome {
        read_s,
        sync_s,
        sync_cpu_s,
        full,
        changed: Resident::now()?,
        map_bytes: memory::of_maps(&inside.place.bpffs, &POLICY_MAPS)?,
        writes,
        changes: changes
            .into_iter()
            .map(|(kind, samples)| (kind.text().to_owned(), samples))
            .collect(),
    })
}

async fn next_batch(source: &mut Source) -> Result<Batch> {
    let batch = timeout(PATIENCE, source.batches.recv()).await;
    batch
        .context("the source has seen nothing new")?
        .context("the source ended")
}

/// Waits for the batch that has a change, and has the agent take it in; then the pods' interfaces follow.
async fn follow(
    driven: &mut Driven,
    source: &mut Source,
    machine: &mut Machine,
    manifests: &Manifests,
) -> Result<Sample> {
    let started = Instant::now();
    let writes = driven.writes();
    let batch = loop {
        let batch = next_batch(source).await?;
        if !batch.changes.is_empty() {
            break batch;
        }
    };
    let on_cpu = on_cpu_s()?;
    let mut took = driven.take(batch)?;
    let waited = started.elapsed();
    let mut cpu_s = on_cpu_s()? - on_cpu;
    if machine.follow(&manifests.pods_here()) {
        let state = Some(machine.state.clone());
        let (observed, on_cpu) = (Instant::now(), on_cpu_s()?);
        driven.agent.take_host(state);
        took += observed.elapsed();
        cpu_s += on_cpu_s()? - on_cpu;
    }
    let let_go = driven.reclaim();
    let millis = |duration: Duration| duration.as_secs_f64() * 1000.0;
    Ok(Sample {
        from_file_ms: millis(waited),
        ms: millis(took),
        cpu_ms: cpu_s * 1000.0,
        after_ms: millis(let_go),
        writes: driven.writes() - writes,
    })
}

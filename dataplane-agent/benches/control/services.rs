//! Services and endpoints, measured in the node's namespace: the first sync and single changes.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use dataplane_agent::{
    bpf::map_names,
    decode::{Decoded, decode},
    source::{self, Batch, Change},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    driven::{Driven, Place, on_cpu_s, sizes},
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
    #[command(flatten)]
    pub place: Place,
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

/// Measures.
pub async fn measure(inside: &Inside) -> Result<Outcome> {
    let fleet = Fleet {
        services: inside.services,
        endpoints: inside.endpoints,
    };
    let sizes = sizes(fleet.services, fleet.endpoints);
    let (mut driven, mut host) = Driven::start(&inside.place, fleet::NODE, sizes)?;
    // Nothing is written before the source is complete.
    driven.agent.take_batch(Batch {
        changes: vec![change(&fleet::node())?],
        ..Batch::default()
    });
    let state = driven.observe(&mut host).await?;
    driven.agent.take_host(Some(state));
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
    let sync_s = driven.take(batch(changes))?.as_secs_f64();
    let sync_cpu_s = on_cpu_s()? - before;
    let full = Resident::now()?;
    let changes = change_all(&mut driven, fleet, inside.changes)?;
    Ok(Outcome {
        restore_s: driven.restore_s,
        decode_s,
        sync_s,
        sync_cpu_s,
        usage: driven.agent.usage(),
        empty,
        full,
        changed: Resident::now()?,
        map_bytes: memory::of_maps(&inside.place.bpffs, &SERVICE_MAPS)?,
        changes,
    })
}

fn batch(changes: Vec<Change>) -> Batch {
    Batch {
        complete: true,
        changes,
        ..Batch::default()
    }
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
            note(kind, decoded + driven.take(batch(vec![change]))?);
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
            note(kind, driven.take(batch(vec![Change::Delete(key)]))?);
        }
        // As the loop does, off the way of an event.
        driven.reclaim();
    }
    Ok(samples)
}
